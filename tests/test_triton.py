"""The scan's kernels are the same function as the reference: in Triton's interpreter where there is
no GPU, on it where there is one; and compiled for two GPUs they fit what these have.
"""

import json
import mmap
import os
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, assert_close

import bench.ssm
import ssm
from bench.ssm import other_scans, scan_costs
from ssm import Mamba2, MambaState, random_inputs, ssd, ssd_chunked, ssd_recurrent, ssd_triton

if not ssm.TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)
import triton
import triton.language as tl

if ssm.INTERPRETED:
    import triton_interpreter  # noqa: F401

DEVICE = "cpu" if ssm.INTERPRETED else "cuda"
NAMES = ["y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dinitial"]
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
on_gpu = pytest.mark.skipif(ssm.INTERPRETED, reason="needs a GPU")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if ssm.INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def inputs(b=1, t=70, h=4, p=16, g=2, n=16, dtype=torch.float32, packed=False):
    """Leaves x, dt, A, B, C, D, initial_states and seq_idx; the rows after the last token, which
    the kernels' tiles reach into, are NaN.
    """
    leaves = random_inputs(b, t, h, p, g, n, dtype=dtype)
    if not packed:          # decays that matter within a tile; slow ones would cross documents
        leaves[1] = (leaves[1].detach() * 10).requires_grad_()
    leaves.append(torch.randn(b, h, p, n).requires_grad_())
    for i in (0, 3, 4):
        whole = torch.full((b, t + 128, *leaves[i].shape[2:]), torch.nan, dtype=dtype)
        whole[:, :t] = leaves[i].detach()
        leaves[i] = whole.to(DEVICE)[:, :t].requires_grad_()
    leaves = [m.detach().to(DEVICE).requires_grad_() for m in leaves]
    seq_idx = (torch.rand(b, t) < 0.1).long().cumsum(1) % 2 if packed else None
    return leaves, seq_idx if seq_idx is None else seq_idx.to(DEVICE)


def run(form, leaves, seq_idx, grads, **options):
    y, state = form(*leaves[:6], initial_states=leaves[6], seq_idx=seq_idx, **options)
    return [y, state, *torch.autograd.grad([y, state], leaves, grads)]


def assert_exact(leaves, seq_idx, grads=None, tolerance=None, **options):
    """ssd_triton against the recurrence in fp64 on the same rounded inputs, every gradient."""
    x, state = leaves[0], leaves[6]
    if grads is None:
        grads = torch.randn_like(x.contiguous()), torch.randn_like(state)
    exact = [m.detach().double().cpu().requires_grad_() for m in leaves]
    result = run(ssd_triton, leaves, seq_idx, grads, **options)
    truth = run(ssd_recurrent, exact, None if seq_idx is None else seq_idx.cpu(),
                [m.double().cpu() for m in grads])
    assert result[0].dtype == x.dtype and result[1].dtype == torch.float32
    assert_close([m.cpu() for m in result], truth, NAMES, tolerance or TOLERANCE[x.dtype])


# A chunk is two tiles of 64 tokens, of 32 in fp32. Every length is met in both dtypes, every
# number of groups, head dim and state at least twice.
CASES = [(1, 1, 48, 64), (3, 4, 16, 16), (63, 2, 64, 16), (64, 1, 80, 16), (65, 2, 16, 128),
         (127, 4, 48, 16), (128, 2, 80, 64), (129, 1, 64, 64), (135, 2, 48, 16), (263, 4, 16, 16)]


@pytest.mark.parametrize("t, g, p, n", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_the_recurrence_with_every_gradient(t, g, p, n, dtype):
    """Sums of a few hundred fp32 terms; bf16 operands with fp32 decays, sums and states. More heads
    where dA and ddt are sums of few terms, which may cancel.
    """
    h = 16 if t < 10 else 4
    leaves, seq_idx = inputs(1 + t % 2, t, h, p, g, n, dtype, packed=g > 1)
    assert_exact(leaves, seq_idx)


@pytest.mark.skipif(not ssm.INTERPRETED, reason="on a GPU integers wrap around")
@pytest.mark.parametrize("name, number", [("mul", 2 ** 30), ("add", 2 ** 31 - 3),
                                          ("sub", 2 - 2 ** 31)])
def test_an_offset_that_overflows_is_an_error(name, number):
    @triton.jit
    def kernel(out, number, name: tl.constexpr):
        i = tl.arange(0, 4)
        if name == "mul":
            value = number * i
        elif name == "add":
            value = number + i
        else:
            value = number - i
        tl.store(out + i, value)
    kernel[1,](torch.zeros(4, dtype=torch.int32), 5, name)
    with pytest.raises(Exception, match=f"int32 overflows in {name}"):
        kernel[1,](torch.zeros(4, dtype=torch.int32), number, name)


def test_half_precision():
    assert_exact(*inputs(t=100, p=48, dtype=torch.float16, packed=True))


def test_the_nine_billion_models_head():
    """p 80 = 64 + 16, n 128, several heads a group."""
    assert_exact(*inputs(t=200, h=2, p=80, g=1, n=128, dtype=torch.bfloat16))


@pytest.mark.parametrize("chunk_size", [1, 64, 1000])
def test_chunk_size_does_not_change_the_result(chunk_size):
    assert_exact(*inputs(t=150, packed=True), chunk_size=chunk_size)


def test_incoming_gradients_may_be_expanded_or_transposed():
    leaves, seq_idx = inputs(b=2, t=40, packed=True)
    x, state = leaves[0], leaves[6]
    ones = [torch.ones((), device=DEVICE).expand_as(m) for m in (x, state)]
    turned = [torch.randn(m.shape[::-1], device=DEVICE).permute(3, 2, 1, 0) for m in (x, state)]
    assert_exact(leaves, seq_idx, ones)
    assert_exact(leaves, seq_idx, turned)


def test_packed_documents_equal_separate_ones():
    """Bit for bit where a document starts with a tile; a value that comes back is a new one."""
    leaves, _ = inputs(t=130, dtype=torch.bfloat16)
    x, dt, A, B, C, D, _ = leaves
    seq_idx = torch.tensor([[0] * 64 + [1] * 5 + [0] * 60 + [3]], device=DEVICE)
    packed, final = ssd_triton(x, dt, A, B, C, D, seq_idx=seq_idx)
    for start, stop in [(0, 64), (64, 69), (69, 129), (129, 130)]:
        alone, last = ssd_triton(x[:, start:stop], dt[:, start:stop], A, B[:, start:stop],
                                 C[:, start:stop], D)
        assert_close([packed[:, start:stop].cpu()], [alone.cpu()], ["y"],
                     1e-12 if start in (0, 64) else 1e-2)
    assert_close([final.cpu()], [last.cpu()], ["state"], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_overflows_for_dt_from_1e_minus_6_to_1000(dtype):
    for dt in (torch.logspace(-6, 3, 140), torch.full((140,), 1e3), torch.tensor([1e-6, 1e3] * 70)):
        leaves, seq_idx = inputs(t=140, dtype=dtype)
        leaves[1] = dt[None, :, None].expand(1, 140, 4).clone().to(DEVICE).requires_grad_()
        leaves[2] = torch.tensor([-1e-4, -1.0, -16.0, -1e3]).to(DEVICE).requires_grad_()
        grads = torch.randn_like(leaves[0].contiguous()), torch.randn_like(leaves[6])
        for name, value in zip(NAMES, run(ssd_triton, leaves, seq_idx, grads)):
            assert value.isfinite().all(), f"{name} is not finite"


def test_decays_gradient_survives_strong_decay():
    """At a decay of e^-15 per token what tokens are to each other is 3e-7 of what they are to
    themselves, and the gradient of the decays is made of that alone.
    """
    leaves, _ = inputs(t=8, h=8)
    leaves[1] = torch.full((1, 8, 8), 0.5, device=DEVICE).requires_grad_()
    leaves[2] = torch.full((8,), -30.0, device=DEVICE).requires_grad_()
    assert_exact(leaves, None)


def test_no_decay_exceeds_one_whatever_the_sums(monkeypatch):
    """A parallel cumulative sum may rise by rounding; here every other one rises by 50."""
    leaves, _ = inputs(t=70)
    x, dt, A, B, C, D, S = leaves
    bound, last = ssd_recurrent(x.abs(), dt, A * 0, B.abs(), C.abs(), D.abs(),
                                initial_states=S.abs())
    cumsum = torch.Tensor.cumsum

    def rising(m, dim):
        return cumsum(m, dim) + 50 * (torch.arange(m.shape[dim], device=m.device) % 2)
    monkeypatch.setattr(torch.Tensor, "cumsum", rising)
    y, state, dx, *_ = run(ssd_triton, leaves, None, [torch.ones_like(m) for m in (x, S)])
    assert (y.abs() <= 1.001 * bound).all() and (state.abs() <= 1.001 * last).all()
    assert dx.abs().max() < 1e4


def test_the_final_state_continues_the_scan_at_any_split():
    leaves, _ = inputs(t=100)
    x, dt, A, B, C, D, S = leaves
    whole, final = ssd_triton(x, dt, A, B, C, D, initial_states=S)
    for cut in (1, 31, 32, 63, 64, 65, 99):
        first, S1 = ssd_triton(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D,
                               initial_states=S)
        second, S2 = ssd_triton(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D,
                                initial_states=S1)
        assert_close([torch.cat([first, second], 1).cpu(), S2.cpu()], [whole.cpu(), final.cpu()],
                     NAMES[:2], 1e-5)


def huge_view(m, stride):
    """m (b, t, ., .) with rows `stride` elements apart, in memory that is never touched."""
    b, t, k, w = m.shape
    elements = (b * t - 1) * stride + k * w
    memory = torch.frombuffer(mmap.mmap(-1, 2 * elements), dtype=torch.bfloat16)
    view = memory.as_strided(m.shape, (t * stride, stride, w, 1))
    return view.copy_(m)


@pytest.mark.skipif(not ssm.INTERPRETED, reason="memory that is never touched is the CPU's")
@pytest.mark.parametrize("t, stride", [(200, 2 ** 24 - 64), (3, 2 ** 30)])
def test_offsets_beyond_32_bits(t, stride):
    """200 rows reach 2^31 elements, which tiles must reach by a 64-bit base; rows 2^30 apart do so
    inside a tile and are copied first.
    """
    leaves, _ = inputs(t=t, h=8, g=1, dtype=torch.bfloat16)
    leaves[0] = huge_view(leaves[0].detach(), stride).requires_grad_()
    leaves[3] = huge_view(leaves[3].detach(), stride).requires_grad_()
    assert_exact(leaves, None)


@pytest.mark.skipif(not ssm.INTERPRETED, reason="memory that is never touched is the CPU's")
def test_heads_beyond_32_bits():
    """Heads 2^27 elements apart, as of a (b, h, t, p) tensor of a million tokens: copied first."""
    leaves, _ = inputs(t=5, h=18, g=1, dtype=torch.bfloat16)
    x = torch.frombuffer(mmap.mmap(-1, 2 * 18 * 2 ** 27), dtype=torch.bfloat16)
    x = x.as_strided((1, 5, 18, 16), (18 * 2 ** 27, 16, 2 ** 27, 1)).copy_(leaves[0].detach())
    assert_exact([x.requires_grad_(), *leaves[1:]], None)


@pytest.mark.parametrize("change, words", [
    (dict(p=24), "head dim 24 with state 16; the kernels take"),
    (dict(p=8), "head dim 8 with state 16"), (dict(n=48), "head dim 16 with state 48"),
    (dict(p=128, n=256), "head dim 128 with state 256"), (dict(p=128, n=128), "at most 12288"),
    (dict(dtype=torch.float64), "x is torch.float64; the kernels take")])
def test_what_the_kernels_do_not_take_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        ssd_triton(*inputs(**dict(t=5) | change)[0][:6])


@pytest.mark.parametrize("change", [dict(p=24), dict(p=8), dict(n=48), dict(p=128, n=256)])
def test_auto_does_without_the_kernels_where_they_do_not_take_the_shape(change, monkeypatch):
    monkeypatch.setattr(ssm, "on_cuda", lambda x: True)
    leaves = inputs(t=5, dtype=torch.bfloat16, **change)[0][:6]
    assert torch.equal(ssd(*leaves)[0], ssd_chunked(*leaves)[0])


@pytest.mark.parametrize("generation", [7, 10, 12])
def test_a_gpu_that_they_are_not_made_for_is_named(generation, monkeypatch):
    monkeypatch.setattr(ssm, "generation", lambda device: generation)
    x, B = (type("OnCuda", (), dict(dtype=m.dtype, shape=m.shape, is_cuda=True, device=m.device,
                                    element_size=m.element_size)) for m in
            (torch.zeros(1, 5, 2, 16), torch.zeros(1, 5, 1, 16)))
    assert f"compute capability {generation}.x" in ssm.unsupported(x, B)


def test_several_dtypes_and_devices_are_named():
    x, dt, A, B, C, D = inputs(t=5)[0][:6]
    with pytest.raises(ValueError, match="x is torch.float32, B torch.bfloat16 and C"):
        ssd_triton(x, dt, A, B.bfloat16(), C, D)
    with pytest.raises(ValueError, match="inputs are on .*meta: all must be on one device"):
        ssd_triton(x, dt, A, B, C, D.to("meta"))


def test_cpu_tensors_without_the_interpreter_are_named(monkeypatch):
    x, dt, A, B, C, D = (m.detach().cpu() for m in inputs(t=5)[0][:6])
    monkeypatch.setattr(ssm, "INTERPRETED", False)
    with pytest.raises(ValueError, match="x is on cpu; the kernels run on CUDA"):
        ssd_triton(x, dt, A, B, C, D)


def test_auto_takes_the_kernels_for_16_bits_on_cuda(monkeypatch):
    calls = []
    monkeypatch.setitem(ssm.BACKENDS, "triton",
                        lambda *a, **k: calls.append(a) or ssd_chunked(*a, **k))
    for dtype, cuda, expected in [(torch.bfloat16, True, 1), (torch.float16, True, 1),
                                  (torch.float32, True, 0), (torch.bfloat16, False, 0)]:
        monkeypatch.setattr(ssm, "on_cuda", lambda x: cuda)
        calls.clear()
        ssd(*inputs(t=5, dtype=dtype)[0][:6])
        assert len(calls) == expected


def test_second_derivatives_are_refused():
    x, *others = inputs(t=5)[0][:6]
    y, _ = ssd_triton(x, *others)
    with pytest.raises(RuntimeError, match="ssd_triton has first derivatives only"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


# ------------------------------------------------------------------------------------------------
# A layer with the kernels in it


def layer(dtype=torch.float32):
    layer = Mamba2(32, 4, 16, 16, 2).to(DEVICE)
    with torch.no_grad():
        layer.D.uniform_(-1, 1)
    for name in ("in_proj", "conv1d", "norm", "out_proj"):
        getattr(layer, name).to(dtype)
    return layer


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_prefill_and_steps_equal_the_whole(dtype, tolerance, monkeypatch):
    """Shorter than the convolution, and on both sides of a tile."""
    monkeypatch.setattr(ssm, "ssd", lambda *a, **k: ssd_triton(*a, **k))
    mamba, x = layer(dtype), torch.randn(1, 36, 32, device=DEVICE).to(dtype)
    whole = mamba(x)
    for prefill in (1, 31, 33):
        state = MambaState(torch.zeros(1, mamba.conv_dim, 3, dtype=dtype, device=DEVICE),
                           torch.zeros(1, 4, 16, 16, device=DEVICE))
        parts = [mamba(x[:, :prefill], state)]
        parts += [mamba(x[:, i:i + 1], state) for i in range(prefill, prefill + 3)]
        assert_close([torch.cat(parts, 1).cpu()], [whole[:, :prefill + 3].cpu()],
                     [f"prefill {prefill}"], tolerance)


def test_a_layer_trains_through_the_kernels(monkeypatch):
    """Every parameter's gradient, with packed documents and a state that is overwritten, against
    the layer without kernels in fp64.
    """
    mamba, x = layer(), torch.randn(2, 70, 32, device=DEVICE)
    seq_idx = (torch.rand(2, 70) < 0.1).long().cumsum(1).to(DEVICE)
    state = MambaState(torch.randn(2, mamba.conv_dim, 3, device=DEVICE),
                       torch.randn(2, 4, 16, 16, device=DEVICE))
    exact = MambaState(*(m.double().cpu() for m in state))
    monkeypatch.setattr(ssm, "ssd", lambda *a, **k: ssd_triton(*a, **k))
    y = mamba(x, state, seq_idx)
    fast = torch.autograd.grad(y.square().sum(), list(mamba.parameters()))
    monkeypatch.undo()
    mamba, x, seq_idx = mamba.double().cpu(), x.double().cpu(), seq_idx.cpu()
    y = mamba(x, exact, seq_idx)
    slow = torch.autograd.grad(y.square().sum(), list(mamba.parameters()))
    assert_close([m.cpu() for m in (*fast, *state)], [*slow, *exact],
                 [*(name for name, _ in mamba.named_parameters()), "conv", "ssm"], 5e-5)


# ------------------------------------------------------------------------------------------------
# What bench/ssm.py counts and compares


def layer_traffic(h, p, g, n, t, monkeypatch):
    """{kernel: bytes per token} of the tensors that each launch gets, at full size, no memory."""
    traffic = {}

    def record(kernel, grid, *arguments, **constants):
        name = kernel.fn.__name__, constants.get("REVERSE", False), constants.get("FOR_B", False)
        tensors = {m for m in arguments if isinstance(m, torch.Tensor)}
        traffic[name] = sum(m.numel() * m.element_size() for m in tensors) / t
    monkeypatch.setattr(ssm, "launch", record)
    monkeypatch.setattr(ssm, "INTERPRETED", True)
    monkeypatch.setattr(ssm, "generation", lambda device: 9)
    like = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device="meta")
    x, B, C = like(1, t, h, p).requires_grad_(), like(1, t, g, n), like(1, t, g, n)
    dt, A, D = (like(*shape, dtype=torch.float32) for shape in ((1, t, h), (h,), (h,)))
    y, _ = ssd_triton(x, dt, A, B, C, D)
    torch.autograd.grad(y, x, torch.empty_like(y))
    return traffic


@pytest.mark.parametrize("shape", [(128, 80, 8, 128), (128, 64, 8, 128)])
def test_counted_bytes_are_those_of_the_launches(shape, monkeypatch):
    """Within 2%: half of dG and of dcs_late is not used, the states at the ends are not counted."""
    costs = scan_costs(*shape)
    measured = layer_traffic(*shape, 16384, monkeypatch)
    forward, backward = costs["forward"][1], costs["backward"][1]
    for counted, kernel in [(forward["scan"], ("_scan_kernel", False, False)),
                            (backward["states"], ("_states_kernel", False, False)),
                            (backward["states back"], ("_states_kernel", True, False)),
                            (backward["dx"], ("_dx_kernel", False, False)),
                            (backward["dC"], ("_dBC_kernel", False, False)),
                            (backward["dB"], ("_dBC_kernel", False, True))]:
        assert counted == pytest.approx(measured[kernel], rel=0.02), kernel


@pytest.mark.skipif(not ssm.INTERPRETED, reason="counts in the interpreter")
def test_counted_flops_are_those_of_the_dots(monkeypatch):
    """Exactly, for whole chunks."""
    from triton.runtime import interpreter
    counted, dot = [], interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: (
        counted.append(2 * a.data.size * b.data.shape[-1]) or dot(self, a, b, *rest)))
    h, p, g, n, t = 4, 48, 2, 16, 256
    leaves = inputs(1, t, h, p, g, n, torch.bfloat16)[0][:6]
    y, _ = ssd_triton(*leaves)
    costs = scan_costs(h, p, g, n)
    assert sum(counted) == t * costs["forward"][2]
    counted.clear()
    torch.autograd.grad(y.sum(), leaves)
    assert sum(counted) == t * costs["backward"][2]


def test_other_packages_get_the_arguments_they_ask_for(monkeypatch):
    """Stand-ins with the signatures of mamba_ssm and fla, computed by the recurrence."""
    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None):
        return ssd_recurrent(x, dt, A, B, C, D)[0]

    def chunk_simple_gla(q, k, v, g, scale):
        a = -torch.ones(v.shape[2])             # A = -1 and dt = -g, which is undone in v
        return ssd_recurrent(v / -g[..., None], -g, a, k * scale, q)

    def module(name, **content):
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
        sys.modules[name].__dict__.update(content)
    module("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    module("fla.ops.simple_gla", chunk_simple_gla=chunk_simple_gla)
    leaves = [m.double() for m in random_inputs(1, 20, 4, 3, 2, 5)]
    scans = other_scans()
    assert set(scans) == {"mamba_ssm", "fla"}
    for name, scan in scans.items():
        assert_close([scan(*leaves)], [ssd_recurrent(*leaves)[0]], [name], 1e-10)


def test_the_benchmark_prints_its_tables_and_counts_without_a_gpu(capsys):
    bench.ssm.main(["--quick", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["speed"]) == {"recurrent", "quadratic", "chunked", "attention"}
    assert set(result["scan_ms"]) == {"ssd_minimal", "ssd_chunked"}
    forward, backward = (result["kernels"]["9B"][name] for name in ("forward", "backward"))
    assert forward["compulsory"] == 45312 and backward["compulsory"] == 70144
    assert forward["seconds"] == {} and 0 < forward["roofline_s"]["h100"] < 2e-8


# ------------------------------------------------------------------------------------------------
# Compiled for GPUs that are not there


@pytest.fixture(scope="module")
def compiled():
    """{arch: facts of every kernel at the 9B's and 8B's shapes}."""
    words = "86 9B 9B-packed 8B 90 9B 9B-packed 8B".split()
    output = subprocess.run([sys.executable, ROOT / "tests" / "aot.py", *words],
                            capture_output=True, text=True, check=True).stdout
    kernels = [json.loads(line) for line in output.splitlines()]
    return {arch: [k for k in kernels if k["arch"] == arch] for arch in (86, 90)}


SHARED = {86: 99 * 1024, 90: 227 * 1024}
SPILL = {"_scan_kernel": 256, "_dx_kernel": 512}        # bytes per thread; the others none


@pytest.mark.parametrize("arch", [86, 90])
def test_compiled_kernels_fit_the_gpu(arch, compiled):
    """Shared memory per program; spilled bytes per thread. Masks of packed documents may cost
    more.
    """
    kernels = [k for k in compiled[arch] if k["kernel"] != "bad"]
    assert len({k["kernel"] for k in kernels}) == 4
    assert len(kernels) == 3 * 6            # forward and backward, of three shapes
    for k in kernels:
        budget = SPILL.get(k["kernel"], 0) + 96 * k["packed"]
        assert k["shared"] <= SHARED[arch] and k["spill"] <= budget, k


@pytest.mark.parametrize("arch, fast, slow", [(86, "mma", "wgmma"), (90, "wgmma", "mma")])
def test_compiled_kernels_use_the_matrix_units(arch, fast, slow, compiled):
    """On Hopper all dots are wgmma: none is too small for it and falls back."""
    for k in compiled[arch]:
        assert (k[fast] > 0) == (k["dots"] > 0) and k[slow] == 0, k


@pytest.mark.parametrize("arch", [86, 90])
def test_no_accumulator_is_transposed_into_a_dot(arch, compiled):
    """Triton 3.4 to 3.7.0 miscompiles that on Hopper; the check finds it where it is."""
    assert [k["transposed"] for k in compiled[arch] if k["kernel"] == "bad"] == [1, 1, 1]
    assert not any(k["transposed"] for k in compiled[arch] if k["kernel"] != "bad")


def test_a_cpu_build_never_imports_triton():
    code = "import sys, ssm; assert not ssm.TRITON and 'triton' not in sys.modules"
    if torch.version.cuda is None:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=environment)


# ------------------------------------------------------------------------------------------------
# What only a GPU can show


@on_gpu
def test_five_runs_agree_bit_for_bit():
    leaves, seq_idx = inputs(2, 3000, 32, 80, 8, 128, torch.bfloat16, packed=True)
    grads = torch.randn_like(leaves[0].contiguous()), torch.randn_like(leaves[6])
    first = run(ssd_triton, leaves, seq_idx, grads)
    for _ in range(4):
        again = run(ssd_triton, leaves, seq_idx, grads)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@on_gpu
@pytest.mark.parametrize("t", [16384, 131072])
def test_long_sequences_equal_the_chunked_scan(t):
    """Offsets past 2^31 elements: rows as far apart as in in_proj's output."""
    row = torch.empty(1, t, 22656, dtype=torch.bfloat16, device=DEVICE)
    h, p, g, n = 16, 80, 1, 128
    row[..., -h * p - 2 * g * n:].normal_()
    x, B, C = row[..., -h * p - 2 * g * n:].split([h * p, g * n, g * n], -1)
    dt = torch.rand(1, t, h, device=DEVICE) * 0.1
    A = -torch.rand(h, device=DEVICE) * 16
    leaves = [m.requires_grad_() for m in (x.unflatten(2, (h, p)), dt, A, B.unflatten(2, (g, n)),
                                           C.unflatten(2, (g, n)), torch.randn(h, device=DEVICE),
                                           torch.randn(1, h, p, n, device=DEVICE))]
    grads = torch.randn(1, t, h, p, device=DEVICE).bfloat16(), torch.randn_like(leaves[6])
    result = run(ssd_triton, leaves, None, grads)
    truth = run(ssd_chunked, [m.detach().float().requires_grad_() for m in leaves], None,
                [m.float() for m in grads])
    assert_close(result, truth, NAMES, 1e-2)


@on_gpu
def test_the_layer_compiles_its_convolution_norm_and_step():
    """On CUDA the layer is the one without torch.compile, in training and in decode."""
    mamba, x = layer(), torch.randn(2, 40, 32, device=DEVICE)
    results = []
    for compiles in (True, False):
        with pytest.MonkeyPatch.context() as inside:
            if not compiles:
                inside.setattr(ssm, "on_cuda", lambda x: False)
            y = mamba(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(mamba.parameters()))])
            state = MambaState(torch.zeros(2, mamba.conv_dim, 3, device=DEVICE),
                               torch.zeros(2, 4, 16, 16, device=DEVICE))
            with torch.no_grad():
                results[-1] += [mamba(part, state) for part in x.split([37, 1, 1, 1], 1)]
            results[-1] += state
    assert_close(*results, [str(i) for i in range(len(results[0]))], 1e-4)


@on_gpu
@torch.no_grad()
def test_decode_replays_in_cuda_graphs():
    """Two graphs of one shape, the second replayed first and both in turn; warmed up elsewhere."""
    mamba, x = layer(torch.bfloat16), torch.randn(2, 1, 32, device=DEVICE).bfloat16()
    state = MambaState(torch.randn(2, mamba.conv_dim, 3, device=DEVICE).bfloat16(),
                       torch.randn(2, 4, 16, 16, device=DEVICE))
    before, stream = [m.clone() for m in state], torch.cuda.Stream()

    def restore():
        for mine, saved in zip(state, before):
            mine.copy_(saved)
    with torch.cuda.stream(stream):
        mamba(x, state)
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    outputs = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            outputs.append(mamba(x, state))
    restore()
    replayed = []
    for i in (1, 0, 1):
        graphs[i].replay()
        replayed.append(outputs[i].clone())
    after = [m.clone() for m in state]
    restore()
    assert all(torch.equal(mamba(x, state), y) for y in replayed)
    assert all(torch.equal(mine, saved) for mine, saved in zip(state, after))
