"""The scan's forms are one function; its derivative is right; the layer around it is Mamba-2."""

import functools
import json
import math
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import ssm
from ssm import (GatedGroupNorm, Mamba2, MambaState, causal_conv1d, documents, gated_group_norm,
                 layer_step, random_inputs, segment_sum, ssd, ssd_chunked, ssd_minimal,
                 ssd_quadratic, ssd_recurrent, ssd_step)

NAMES = ["y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dinitial"]
CHUNK = 16
FORMS = [ssd_recurrent, ssd_quadratic, ssd_minimal, ssd_chunked]


def inputs(b=2, t=33, h=4, p=10, g=2, n=5, with_D=True, with_state=True, packed=False,
           dtype=torch.float64):
    """Leaves x, dt, A, B, C, D, initial_states (None where left out) and seq_idx."""
    leaves = random_inputs(b, t, h, p, g, n, dtype=dtype)
    leaves[1] = (leaves[1].detach() * 10).requires_grad_()  # decays that matter within a few tokens
    if not with_D:
        leaves[5] = None
    state = torch.randn(b, h, p, n, dtype=leaves[1].dtype).requires_grad_() if with_state else None
    seq_idx = (torch.rand(b, t) < 0.2).long().cumsum(1) % 2 if packed else None
    return [*leaves, state], seq_idx


def value_and_gradients(form, leaves, seq_idx=None, grads=None, **options):
    """[y, state, gradients of every leaf that is given], for incoming gradients (dy, dstate)."""
    y, state = form(*leaves[:6], initial_states=leaves[6], seq_idx=seq_idx, **options)
    if grads is None:
        torch.manual_seed(1)
        grads = torch.randn(y.shape, dtype=y.dtype), torch.randn(state.shape, dtype=state.dtype)
    given = [m for m in leaves if m is not None]
    return [y, state,
            *torch.autograd.grad([y, state], given, grads, materialize_grads=True,
                                 allow_unused=True)]


def names_of(leaves):
    return NAMES[:2] + [name for name, m in zip(NAMES[2:], leaves) if m is not None]


@pytest.mark.parametrize("t", [1, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
@pytest.mark.parametrize("g", [1, 2, 4])
@pytest.mark.parametrize("p", [3, 10, 64, 80])
def test_all_forms_agree_with_every_gradient(t, g, p):
    """They evaluate one sum in several orders; fp64 leaves only rounding, so 1e-10 is generous."""
    for with_D, with_state, packed in [(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 0), (1, 1, 1)]:
        leaves, seq_idx = inputs(t=t, g=g, p=p, with_D=with_D, with_state=with_state, packed=packed)
        truth = value_and_gradients(ssd_recurrent, leaves, seq_idx)
        for form, options in [(ssd_quadratic, {}), (ssd_minimal, dict(chunk_size=CHUNK)),
                              (ssd_chunked, dict(chunk_size=CHUNK)), (ssd, {})]:
            result = value_and_gradients(form, leaves, seq_idx, **options)
            assert_close(result, truth, names_of(leaves), 1e-10)


def test_recurrence_is_the_written_definition():
    """S = exp(dt A) S + dt x B^T and y = S C + D x, head by head with plain loops: heads of a group
    adjacent.
    """
    leaves, _ = inputs(b=1, t=5, h=4, g=2, p=3, n=2)
    x, dt, A, B, C, D, S = (m.detach() for m in leaves)
    y, final = ssd_recurrent(x, dt, A, B, C, D, initial_states=S)
    for head in range(4):
        state, group = S[0, head], head // 2
        for i in range(5):
            step = dt[0, i, head]
            state = torch.exp(step * A[head]) * state + step * torch.outer(x[0, i, head],
                                                                           B[0, i, group])
            expected = state @ C[0, i, group] + D[head] * x[0, i, head]
            assert torch.allclose(y[0, i, head], expected, rtol=1e-12, atol=1e-14)
        assert torch.allclose(final[0, head], state, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", [ssd_minimal, ssd_chunked])
@pytest.mark.parametrize("chunk", [1, 7, 64, 128, 1000])
def test_chunk_size_does_not_change_the_result(form, chunk):
    leaves, seq_idx = inputs(t=150, packed=True)
    assert_close(value_and_gradients(form, leaves, seq_idx, chunk_size=chunk),
                 value_and_gradients(ssd_recurrent, leaves, seq_idx), NAMES, 1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
def test_low_precision_stays_near_fp64_of_the_same_inputs(dtype, tolerance):
    """fp32 sums of 300 terms; bf16 operands with fp32 decays, sums and states. dt, A and the state
    are fp32.
    """
    leaves, seq_idx = inputs(t=300, p=64, n=32, packed=True, dtype=dtype)
    exact = [m.detach().double().requires_grad_() for m in leaves]
    dy, dstate = torch.randn(2, 300, 4, 64).to(dtype), torch.randn(2, 4, 64, 32)
    result = value_and_gradients(ssd_chunked, leaves, seq_idx, (dy, dstate), chunk_size=64)
    truth = value_and_gradients(ssd_recurrent, exact, seq_idx, (dy.double(), dstate.double()))
    assert result[0].dtype == dtype and result[1].dtype == torch.float32
    assert_close(result, truth, NAMES, tolerance)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("form", [ssd_recurrent, ssd_minimal, ssd_chunked])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_over_4096_tokens_each_tensor_has_what_its_dtype_can_give(dtype, form, groups):
    """State and incoming gradients are strided. What is stored in 16 bits is off by their rounding,
    about eps / 4; what is fp32 by fp32 sums. The chunked scan multiplies 16-bit operands, so that
    its fp32 results carry their rounding, up to eps, but for dD, a sum of exact products.
    """
    *leaves, _ = inputs(t=4096, p=16, n=16, g=groups, dtype=dtype)[0]
    leaves[1] = (leaves[1].detach() / 10).requires_grad_()          # dt as in a new layer
    strided = lambda *shape: torch.randn(shape[::-1]).permute(3, 2, 1, 0)
    leaves.append(strided(2, 4, 16, 16).requires_grad_())
    dy, dstate = strided(2, 4096, 4, 16).to(dtype), strided(2, 4, 16, 16)
    exact = [m.detach().double().requires_grad_() for m in leaves]
    truth = value_and_gradients(ssd_chunked, exact, None, (dy.double(), dstate.double()))
    result = value_and_gradients(form, leaves, None, (dy, dstate))
    eps = torch.finfo(dtype).eps
    for name, value, true in zip(NAMES, result, truth):
        stored = 0.4 * eps if value.dtype == dtype else 0
        multiplied = eps if form is ssd_chunked and name != "dD" else 0
        assert_close([value], [true], [name], max(stored, multiplied, 1e-5))


@pytest.mark.parametrize("form", [ssd_recurrent, ssd_quadratic, ssd_minimal])
def test_forward_derivatives_equal_backward_ones(form):
    """The forms in plain torch have both, packed and with a state to start from."""
    leaves, seq_idx = inputs(t=20, packed=True)
    leaves = [m.detach() for m in leaves]

    def scalar(*m):
        y, state = form(*m[:6], initial_states=m[6], seq_idx=seq_idx)
        return y.square().sum() + state.square().sum()
    tangents = [torch.randn_like(m) for m in leaves]
    _, forward = torch.func.jvp(scalar, tuple(leaves), tuple(tangents))
    backward = torch.func.grad(scalar, tuple(range(7)))(*leaves)
    total = sum((g * tangent).sum() for g, tangent in zip(backward, tangents))
    assert_close([forward], [total], ["jvp"], 1e-10)


def test_what_the_chunked_scan_cannot_derive_is_an_error():
    x, *others = (m.detach() for m in random_inputs(1, 5, 2, 3, 1, 2, dtype=torch.float64))
    scan = lambda x: ssd_chunked(x, *others)[0].sum()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(scan)(x)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(scan)(torch.stack([x, x]))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        scan(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradient_of_D_is_summed_in_fp32(dtype):
    """dD is a sum over b t p products: here 131,072 of about 1, beyond fp16's largest number, of
    which bf16 keeps 8 bits. The products of 16-bit numbers are exact in fp32.
    """
    x, dt, A, B, C, D = random_inputs(1, 2048, 2, 64, 1, 4, dtype=dtype)
    x = (x.detach() + 1).requires_grad_()
    dy = (torch.randn(x.shape) + 1).to(dtype)
    truth = torch.einsum("bthp,bthp->h", dy.double(), x.double())
    for form in (ssd_recurrent, ssd_minimal, ssd_chunked):
        y, _ = form(x, dt, A, B, C, D)
        assert_close(torch.autograd.grad(y, D, dy), [truth], ["dD"], 1e-6)


@pytest.mark.parametrize("form", [ssd_recurrent, ssd_quadratic, ssd_minimal])
def test_second_derivatives_are_autograds(form):
    leaves = random_inputs(1, 5, 2, 3, 1, 2, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda *m: form(*m), leaves)


def test_second_derivatives_through_the_chunked_scan_are_refused():
    """Whether or not the incoming gradient asks for one: it is never silently zero."""
    x, *others = random_inputs(1, 5, 2, 3, 1, 2, dtype=torch.float64)
    for dy in (torch.ones_like(x), torch.ones_like(x).requires_grad_()):
        y, _ = ssd_chunked(x, *others)
        with pytest.raises(RuntimeError, match="ssd_chunked has first derivatives only: with create"
                                               "_graph=True use ssd_minimal"):
            torch.autograd.grad((y * x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(y, x, dy, create_graph=True)


def test_gradients_through_expanded_and_transposed_incoming_gradients():
    """A sum's gradient is an expanded scalar, a transpose's is strided: both must be read by
    strides.
    """
    leaves, _ = inputs(t=40)
    y, state = (m.detach() for m in ssd_recurrent(*leaves[:6], initial_states=leaves[6]))
    transposed = torch.randn(y.shape[::-1], dtype=y.dtype).permute(3, 2, 1, 0)
    one = torch.ones((), dtype=y.dtype)
    for grads in [(one.expand_as(y), one.expand_as(state)),
                  (transposed, torch.randn(state.shape[::-1], dtype=y.dtype).permute(3, 2, 1, 0))]:
        assert_close(value_and_gradients(ssd_chunked, leaves, None, grads, chunk_size=16),
                     value_and_gradients(ssd_recurrent, leaves, None, grads), NAMES, 1e-10)


def test_inputs_may_be_views_of_one_tensor():
    """The layer hands over slices of the convolution's output; nothing may assume contiguity."""
    width = 4 * 10 + 2 * 2 * 5
    whole = torch.randn(2, 33, width, dtype=torch.float64).requires_grad_()
    dt, A = torch.rand(2, 33, 4, dtype=torch.float64), -torch.rand(4, dtype=torch.float64)
    grads = []
    for form in (ssd_recurrent, ssd_minimal, ssd_chunked):
        x, B, C = whole.split([40, 10, 10], -1)
        y, _ = form(x.unflatten(-1, (4, 10)), dt, A, B.unflatten(-1, (2, 5)),
                    C.unflatten(-1, (2, 5)))
        grads.append(torch.autograd.grad(y.square().sum(), whole)[0])
    assert_close(grads[1:], grads[:1] * 2, ["dwhole by minimal", "dwhole by chunked"], 1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_overflows_for_dt_from_1e_minus_6_to_1000(form, dtype):
    """Every exponent is at most 0, masked before the exp: no inf, no NaN, in no output and no
    gradient.
    """
    for dt in (torch.logspace(-6, 3, 70), torch.full((70,), 1e3), torch.full((70,), 1e-6),
               torch.tensor([1e-6, 1e3] * 35)):
        leaves, seq_idx = inputs(t=70, packed=True, dtype=dtype)
        leaves[1] = dt[None, :, None].expand(2, 70, 4).clone().requires_grad_()
        leaves[2] = torch.tensor([-1e-4, -1.0, -16.0, -1e3]).requires_grad_()
        for name, value in zip(NAMES, value_and_gradients(form, leaves, seq_idx)):
            assert value.isfinite().all(), f"{name} is not finite"


def test_decays_gradient_survives_strong_decay():
    """At a decay of e^-15 per token what tokens are to each other is 3e-7 of what they are to
    themselves, and the gradient of the decays is made of that alone: terms that cancel must not be
    in its sums.
    """
    leaves, _ = inputs(t=40, dtype=torch.float32)
    leaves[1] = torch.full((2, 40, 4), 0.5).requires_grad_()
    leaves[2] = torch.full((4,), -30.0).requires_grad_()
    exact = [m.detach().double().requires_grad_() for m in leaves]
    grads = torch.randn(2, 40, 4, 10), torch.randn(2, 4, 10, 5)
    assert_close(value_and_gradients(ssd_chunked, leaves, None, grads, chunk_size=8),
                 value_and_gradients(ssd_recurrent, exact, None, [m.double() for m in grads]),
                 NAMES, 2e-5)


def test_a_change_of_seq_idx_is_a_fresh_start():
    """Packed documents equal the same documents alone; a value that comes back is another
    document.
    """
    leaves, _ = inputs(b=1, t=30, with_state=False)
    x, dt, A, B, C, D, _ = leaves
    seq_idx = torch.tensor([[0] * 9 + [1] + [0] * 13 + [5] * 7])
    packed, final = ssd_chunked(x, dt, A, B, C, D, seq_idx=seq_idx, chunk_size=8)
    for start, stop in [(0, 9), (9, 10), (10, 23), (23, 30)]:
        alone, last = ssd_recurrent(x[:, start:stop], dt[:, start:stop], A, B[:, start:stop],
                                    C[:, start:stop], D)
        assert_close([packed[:, start:stop]], [alone], ["y"], 1e-10)
    assert_close([final], [last], ["state"], 1e-10)
    assert documents(seq_idx)[0, [0, 8, 9, 10, 29]].tolist() == [0, 0, 1, 2, 3]


def test_the_final_state_continues_the_scan_at_any_split():
    leaves, _ = inputs(t=37)
    x, dt, A, B, C, D, S = leaves
    whole, final = ssd_chunked(x, dt, A, B, C, D, initial_states=S, chunk_size=8)
    for cut in (1, 7, 8, 9, 30, 36):
        for form in (ssd_chunked, ssd_minimal):
            first, between = form(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D,
                                  initial_states=S)
            second, last = form(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D,
                                initial_states=between)
            assert_close([torch.cat([first, second], 1), last], [whole, final], ["y", "state"],
                         1e-10)


@torch.no_grad()
def test_one_token_steps_equal_the_scan():
    leaves, _ = inputs(t=12, g=2)
    x, dt, A, B, C, D, S = leaves
    whole, final = ssd_recurrent(x, dt, A, B, C, D, initial_states=S)
    state = S.detach().clone()
    ys = [ssd_step(state, x[:, i], dt[:, i], A, B[:, i], C[:, i], D) for i in range(12)]
    assert_close([torch.stack(ys, 1), state], [whole, final], ["y", "state"], 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("order", [(1, 0, 2, 3), (0, 3, 2, 1), (2, 0, 1, 3)])
def test_a_step_takes_a_state_with_any_strides(order):
    """Rows, heads or numbers that are not side by side in memory: the same step, in place."""
    x, dt, A, B, C, D = (m[:, 0] if m.dim() > 1 else m for m in random_inputs(2, 1, 4, 3, 2, 5))
    contiguous = torch.randn(2, 4, 3, 5)
    back = [order.index(i) for i in range(4)]
    state = contiguous.permute(order).contiguous().permute(back)
    assert not state.is_contiguous()
    ys = [ssd_step(S, x, dt, A, B, C, D) for S in (contiguous, state)]
    assert_close([ys[1], state], [ys[0], contiguous], ["y", "state"], 1e-6)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation returned."""
    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for m in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(m, torch.Tensor):
                self.most = max(self.most, m.untyped_storage().nbytes() // m.element_size())
        return result


def test_the_chunked_scan_holds_no_square_of_t_and_no_copy_of_B_per_head():
    """Nothing larger than x or the chunks' states appears, forward or backward: h g copies would be
    8 times that.
    """
    b, t, h, p, g, n, chunk = 1, 512, 16, 4, 2, 32, 32
    leaves = random_inputs(b, t, h, p, g, n)
    with LargestTensor() as largest:
        y, state = ssd_chunked(*leaves, chunk_size=chunk)
        torch.autograd.grad(y.sum() + state.sum(), leaves)
    states = t // chunk * h * p * n
    assert largest.most <= max(b * t * h * p, b * t * g * n, states, h * chunk * chunk)
    assert largest.most < t * t and largest.most < b * t * h * n


def test_segment_sum_is_the_sum_between_two_positions():
    a = torch.randn(6, dtype=torch.float64)
    s = segment_sum(a)
    for i in range(6):
        for j in range(6):
            expected = a[j + 1:i + 1].sum() if i >= j else torch.tensor(-math.inf)
            assert s[i, j] == expected or abs(s[i, j] - expected) < 1e-12


@pytest.mark.parametrize("change, words", [
    (dict(dt=torch.rand(2, 33, 3)), "dt has shape"), (dict(A=torch.rand(3)), "A has shape"),
    (dict(C=torch.rand(2, 33, 1, 5)), "C has shape"), (dict(D=torch.rand(5)), "D has shape"),
    (dict(B=torch.rand(2, 33, 3, 5), C=torch.rand(2, 33, 3, 5)), "4 heads cannot share 3 groups"),
    (dict(initial_states=torch.rand(2, 4, 5, 10)), "initial_states has shape"),
    (dict(seq_idx=torch.zeros(2, 3)), "seq_idx has shape")])
def test_shapes_that_do_not_fit_are_named(change, words):
    leaves, _ = inputs()
    arguments = dict(zip(["x", "dt", "A", "B", "C", "D", "initial_states"], leaves)) | change
    for form in (ssd_recurrent, ssd_quadratic, ssd_chunked):
        with pytest.raises(ValueError, match=words):
            form(**arguments)


@pytest.mark.parametrize("form", [*FORMS, ssd])
def test_operands_of_several_dtypes_are_named(form):
    x, dt, A, B, C, D = random_inputs(1, 5, 4, 3, 2, 5)
    with pytest.raises(ValueError, match="x is torch.float32, B torch.bfloat16 and C torch.float3"):
        form(x, dt, A, B.bfloat16(), C, D)
    with pytest.raises(ValueError, match="x is torch.float16, B torch.float16 and C torch.float32"):
        form(x.half(), dt, A, B.half(), C, D)
    with pytest.raises(ValueError, match="x is torch.float32, B torch.bfloat16 and C torch.float3"):
        ssd_step(x.new_zeros(1, 4, 3, 5), x[:, 0], dt[:, 0], A, B[:, 0].bfloat16(), C[:, 0], D)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_and_no_rows_are_refused(form):
    for b, t in ((0, 5), (2, 0)):
        with pytest.raises(ValueError, match="at least one row and one token"):
            form(*random_inputs(b, t, 4, 3, 2, 5))


def test_an_unknown_backend_is_named():
    leaves, _ = inputs()
    with pytest.raises(ValueError, match="'cuda' is not one of auto"):
        ssd(*leaves[:6], backend="cuda")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_a_backend(form, monkeypatch):
    """Called by its name, with a chunk size where it has one."""
    name, calls = form.__name__.removeprefix("ssd_"), []
    monkeypatch.setitem(ssm.BACKENDS, name, lambda *a, **k: calls.append(k) or form(*a, **k))
    ssd(*inputs()[0][:6], chunk_size=8, backend=name)
    assert [k.get("chunk_size") for k in calls] == [8 if form in FORMS[2:] else None]


# ------------------------------------------------------------------------------------------------
# Convolution, norm, layer


@pytest.mark.parametrize("t", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("with_state", [False, True])
def test_convolution_equals_torch_conv1d(t, with_state):
    x, weight, bias = (torch.randn(*s).double() for s in ((2, t, 6), (6, 4), (6,)))
    before = torch.randn(2, 6, 3).double() if with_state else None
    y, final = causal_conv1d(x, weight, bias, initial_states=before)
    window = torch.cat([torch.zeros(2, 6, 3) if before is None else before, x.transpose(1, 2)],
                       2).double()
    expected = F.silu(F.conv1d(window, weight[:, None], bias, groups=6)).transpose(1, 2)
    assert_close([y, final], [expected, window[:, :, -3:]], ["y", "final"], 1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_convolution_gradients(packed):
    """Against finite differences, documents of length 1 and 2 included, and the initial state's
    gradient.
    """
    seq_idx = torch.tensor([[0, 0, 1, 2, 2, 0, 0], [3] * 7]) if packed else None
    leaves = [torch.randn(*s).double().requires_grad_()
              for s in ((2, 7, 5), (5, 4), (5,), (2, 5, 3))]
    f = lambda x, w, bias, before: causal_conv1d(x, w, bias, initial_states=before, seq_idx=seq_idx)
    assert torch.autograd.gradcheck(f, leaves)


def test_the_state_before_belongs_to_the_first_document():
    """With seq_idx and a state, the first document continues it and the second one does not."""
    x, weight, bias = torch.randn(1, 5, 6).double(), torch.randn(6, 4).double(), torch.randn(6)
    before, seq_idx = torch.randn(1, 6, 3).double(), torch.tensor([[7, 7, 8, 8, 8]])
    y, _ = causal_conv1d(x, weight, bias.double(), initial_states=before, seq_idx=seq_idx)
    first, _ = causal_conv1d(x[:, :2], weight, bias.double(), initial_states=before)
    second, _ = causal_conv1d(x[:, 2:], weight, bias.double())
    assert_close([y], [torch.cat([first, second], 1)], ["y"], 1e-12)


def test_a_convolution_of_width_one_keeps_nothing():
    y, final = causal_conv1d(torch.randn(2, 5, 6), torch.randn(6, 1), None)
    assert y.shape == (2, 5, 6) and final.shape == (2, 6, 0)


def test_convolution_taps_stay_inside_a_document():
    x, weight, bias = (torch.randn(*s).double() for s in ((1, 9, 5), (5, 4), (5,)))
    y, _ = causal_conv1d(x, weight, bias, seq_idx=torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 0]]))
    alone = [causal_conv1d(part, weight, bias)[0] for part in x.split([2, 5, 2], 1)]
    assert_close([y], [torch.cat(alone, 1)], ["y"], 1e-12)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_norm_gates_first_then_normalises_each_group(groups):
    y, z, weight = (torch.randn(*s).double() for s in ((2, 5, 12), (2, 5, 12), (12,)))
    s = y * F.silu(z)
    parts = [part * torch.rsqrt(part.square().mean(-1, keepdim=True) + 1e-5)
             for part in s.chunk(groups, -1)]
    assert_close([gated_group_norm(y, z, weight, groups, 1e-5)], [torch.cat(parts, -1) * weight],
                 ["out"], 1e-12)
    leaves = [m.clone().requires_grad_() for m in (y, z, weight)]
    assert torch.autograd.gradcheck(lambda y, z, w: gated_group_norm(y, z, w, groups, 1e-5), leaves)


def test_groups_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="12 channels cannot form 5 groups"):
        GatedGroupNorm(12, 5)(torch.zeros(1, 12), torch.zeros(1, 12))
    with pytest.raises(ValueError, match="6 Mamba heads cannot share 4 groups"):
        Mamba2(16, 6, 8, 4, 4)


def new_state(layer, b=2):
    """A state of zeros for a layer of 4 heads of 10 with state size 6, fp64."""
    zeros = functools.partial(torch.zeros, dtype=torch.float64)
    return MambaState(zeros(b, layer.conv_dim, 3), zeros(b, 4, 10, 6))


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_layer_continues_from_its_states_at_any_split(groups):
    """Prefill, shorter than the convolution or not, single steps and several tokens at once: one
    function of the whole.
    """
    layer = Mamba2(24, 4, 10, 6, groups, chunk_size=8).double()      # 40 inner channels on 24
    x = torch.randn(2, 23, 24).double()
    whole = layer(x)
    for sizes in ([1] * 23, [2, 21], [3, 1, 19], [8, 8, 7], [9, 14], [22, 1]):
        state = new_state(layer)
        parts = [layer(part, state) for part in x.split(sizes, 1)]
        assert_close([torch.cat(parts, 1)], [whole], [f"split {sizes}"], 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_step_of_the_layer_is_its_convolution_and_scan(groups):
    """The same outputs and states by the recurrence for one token as by convolution and scan."""
    layer = Mamba2(24, 4, 10, 6, groups).double()
    x, steps, scans = torch.randn(2, 4, 24).double(), new_state(layer), new_state(layer)
    stepped = [layer(x[:, i:i + 1], steps) for i in range(4)]
    with torch.enable_grad():                                       # takes the scan for one token
        scanned = [layer(x[:, i:i + 1], scans) for i in range(4)]
    assert_close([torch.cat(stepped, 1), *steps], [torch.cat(scanned, 1), *scans],
                 ["y", "conv", "ssm"], 1e-10)


@pytest.mark.parametrize("sizes", [[8, 8, 4], [1, 2, 17], [19, 1]])
def test_segments_that_hand_on_their_state_have_the_gradient_of_the_whole(sizes):
    """The state is written in place, and what a backward needs of it is kept: gradients go back
    through every segment, or, where the state is detached between them, stop there.
    """
    layer, x = Mamba2(24, 4, 10, 6, 2, chunk_size=8).double(), torch.randn(2, 20, 24).double()
    parameters = list(layer.parameters())
    whole = torch.autograd.grad(layer(x).square().sum(), parameters)
    state = new_state(layer)
    parts = [layer(part, state) for part in x.split(sizes, 1)]
    assert_close(torch.autograd.grad(torch.cat(parts, 1).square().sum(), parameters), whole,
                 [name for name, _ in layer.named_parameters()], 1e-10)

    state = new_state(layer)
    for part in x.split(sizes, 1):
        state = MambaState(*(m.detach() for m in state))
        layer(part, state).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in parameters)


# ------------------------------------------------------------------------------------------------
# torch.compile on CUDA


@pytest.fixture
def pretend_cuda(monkeypatch):
    """The layer takes the functions that it takes on CUDA; torch.compile traces them and generates
    no code, so that no compiler is needed. Yields the names of the compiled functions.
    """
    names = []

    def trace(f):
        names.append(f.__name__)
        return torch.compile(f, backend="aot_eager")
    monkeypatch.setattr(ssm, "on_cuda", lambda x: not torch.compiler.is_compiling())
    monkeypatch.setattr(ssm, "unsupported", lambda x, B: "no GPU here")
    monkeypatch.setattr(ssm, "compiled", functools.cache(trace))
    return names


def test_nothing_is_compiled_but_on_cuda(monkeypatch):
    on_gpu, on_cpu = types.SimpleNamespace(is_cuda=True), torch.zeros(1)
    monkeypatch.setattr(ssm, "TRITON", True)
    monkeypatch.setattr(ssm, "INTERPRETED", False)
    assert ssm.on_cuda(on_gpu) and not ssm.on_cuda(on_cpu)
    monkeypatch.setattr(ssm, "compiled", lambda f: "compiled")
    assert ssm.fuse(layer_step, on_gpu) == "compiled" and ssm.fuse(layer_step, on_cpu) is layer_step
    with monkeypatch.context() as inside:
        inside.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not ssm.on_cuda(on_gpu), "torch.compile is at work already"
    with monkeypatch.context() as inside:
        inside.setattr(ssm, "INTERPRETED", True)
        assert not ssm.on_cuda(on_gpu), "Triton's interpreter would run what is compiled"
    monkeypatch.setattr(ssm, "TRITON", False)
    assert not ssm.on_cuda(on_gpu), "torch.compile needs Triton"


def test_the_compiled_layer_is_the_layer(pretend_cuda, monkeypatch):
    """Convolution and norm with gradients, packed documents and a state; the convolution, norm and
    step of prefill and decode, which update their state in place. Tracing keeps every operation.
    """
    layer, x = Mamba2(24, 4, 10, 6, 2, chunk_size=8).double(), torch.randn(2, 9, 24).double()
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [2] * 9])
    start = MambaState(*(torch.randn_like(m) for m in new_state(layer)))

    def run():
        state = MambaState(*(m.clone() for m in start))
        y = layer(x, state, seq_idx)
        results = [y, *state, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]
        state = MambaState(*(m.clone() for m in start))
        with torch.no_grad():
            results += [layer(part, state) for part in x.split([6, 1, 1, 1], 1)]
        return results + list(state)
    fast = run()
    assert sorted(pretend_cuda) == ["causal_conv1d", "gated_group_norm", "layer_step"]
    monkeypatch.setattr(ssm, "on_cuda", lambda x: False)
    assert_close(fast, run(), [str(i) for i in range(len(fast))], 1e-10)


@pytest.mark.parametrize("cast, rest", [
    (lambda m: m.bfloat16(), torch.bfloat16), (lambda m: m.half(), torch.float16),
    (lambda m: m.to(torch.bfloat16), torch.bfloat16), (lambda m: m.double(), torch.float64)])
def test_decays_steps_and_skips_are_never_rounded_to_16_bits(cast, rest):
    """Nor are their gradients; inside another module, too; and back in fp32 they are what they
    were."""
    layer = Mamba2(24, 4, 10, 6, 2)
    layer(torch.randn(1, 5, 24)).sum().backward()
    names = "A_log", "D", "dt_bias"
    before = {name: getattr(layer, name).detach().clone() for name in names}
    cast(torch.nn.Sequential(layer))
    wide = torch.float64 if rest == torch.float64 else torch.float32
    for name, p in layer.named_parameters():
        assert p.dtype == p.grad.dtype == (wide if name in names else rest), name
    layer.float()
    assert all(torch.equal(getattr(layer, name), before[name]) for name in names)


def test_layer_starts_with_finite_parameters_in_the_stated_ranges():
    """mamba2-minimal leaves dt_bias, A_log and D as they come from memory; here memory is NaN."""
    layer = Mamba2(16, 256, 4, 8, 4)
    assert all(p.isfinite().all() for p in layer.parameters())
    A, dt = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert 1 <= A.min() < 2 and 15 < A.max() <= 16 and (layer.D == 1).all()
    assert 0.99e-3 < dt.min() < 1.5e-3 and 0.07 < dt.max() < 0.101
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.3      # log-uniform


def test_script_prints_its_table_and_one_json_line(capsys):
    ssm.main(["--device", "cpu"])
    *table, last = capsys.readouterr().out.splitlines()
    agreement = json.loads(last)["agreement"]
    assert [line.rsplit(maxsplit=9)[0] for line in table[2:]] == list(agreement)
    limits = {"float64": 1e-10, "float32": 5e-6, "bfloat16": 1e-2}
    assert {form.split()[0] for form in agreement} == {"recurrent", "quadratic", "minimal",
                                                       "chunked"}
    assert all(error < limits[form.split()[1]] for form, error in agreement.items())
