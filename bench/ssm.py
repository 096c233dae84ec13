"""Speed of the Mamba-2 scan: against sequence length, against autograd, against memory bandwidth.

It prints three tables. The first has the forward time of each form and of causal attention against
sequence length, with the exponent of a fitted power law. The second compares `ssd_chunked`, whose
backward is derived by hand, with `ssd_minimal`, whose backward is autograd's. The third counts the
bytes and FLOPs of the Triton kernels per token, with the shortest time that data sheets allow (the
roofline). On a CUDA GPU it also has measured times, and those of mamba_ssm and fla if installed.

    python -m bench.ssm               45 s on 2 cores
    python -m bench.ssm --quick       the same with fewer lengths, 10 s
"""

import argparse
import json
import math
import re
import statistics
import time

import torch
import torch.nn.functional as F

from infer import GPUS
from ssm import (Mamba2, MambaState, fuse, layer_step, on_cuda, random_inputs, relative_error,
                 ssd_chunked, ssd_minimal, ssd_quadratic, ssd_recurrent, ssd_triton, unsupported)

# ------------------------------------------------------------------------------------------------
# Time against length, and the backward by hand against autograd


def median_seconds(f, device="cpu", repeats=5):
    """Median wall time of f() after one warm-up, the device synchronised."""
    wait, times = torch.cuda.synchronize if str(device).startswith("cuda") else lambda: None, []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        f()
        wait()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def mean_and_spread(values):
    """dict(mean, deviation: the standard deviation over seeds (None for one seed), each)."""
    return dict(mean=statistics.mean(values), each=values,
                deviation=statistics.stdev(values) if values[1:] else None)


def find_gpu():
    """(name of the first CUDA GPU, its name in infer.GPUS or None)."""
    name = torch.cuda.get_device_name()
    words = re.split(r"[^a-z0-9]+", name.lower().replace("rtx ", "rtx"))
    return name, next((gpu for gpu in GPUS if gpu in words), None)


def fitted_exponent(times):
    """The exponent e of time ~ t^e, by least squares in log-log over the longer half of lengths."""
    t = sorted(times)[len(times) // 2 - 1:]
    x, y = (torch.tensor([math.log(i) for i in values]) for values in (t, [times[i] for i in t]))
    x = x - x.mean()
    return ((x * (y - y.mean())).sum() / x.square().sum()).item()


@torch.no_grad()
def print_times(lengths, device, h=8, p=64, g=2, n=64):
    """Print the forward time against length. Returns {form: highest tokens per second}."""
    forms = {"recurrent": (ssd_recurrent, 1024), "quadratic": (ssd_quadratic, 2048),
             "chunked": (ssd_chunked, math.inf), "attention": (lambda x, *_:
             F.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3, is_causal=True), math.inf)}
    print(f"forward ms on {device}, {torch.get_num_threads()} threads: 1 sequence, {h} heads x "
          f"{p}, state {n}\n{'t':>10s}" + "".join(f"{t:9d}" for t in lengths))
    table = {}
    for name, (form, longest) in forms.items():
        times = table[name] = {}
        for t in (t for t in lengths if t <= longest):
            inputs = random_inputs(1, t, h, p, g, n, device=device)
            times[t] = median_seconds(lambda: form(*inputs), device)
        row = "".join(f"{1e3 * times[t]:9.2f}" if t in times else f"{'-':>9s}" for t in lengths)
        print(f"{name:>10s}{row}   ~ t^{fitted_exponent(times):.2f}", flush=True)
    return {form: max(t / s for t, s in times.items()) for form, times in table.items()}


def print_backward(chunks, device, shape=(4, 1024, 16, 64, 1, 128)):
    """Print both backwards by chunk size. Returns {form: lowest ms of forward + backward}."""
    print("\nms of the scan alone at b 4, t 1024, h 16, p 64, n 128, one group: forward, forward "
          "+ backward")
    best = {}
    for chunk in chunks:
        row = f"chunk {chunk:4d}"
        for form in (ssd_minimal, ssd_chunked):
            inputs = random_inputs(*shape, device=device)
            dy, name = torch.randn_like(inputs[0]), form.__name__
            forward = lambda: form(*inputs, chunk_size=chunk)[0]
            both = lambda: torch.autograd.grad(forward(), inputs, dy)
            ms = [1e3 * median_seconds(f, device) for f in (forward, both)]
            row += f"   {name} {ms[0]:6.1f} {ms[1]:6.1f}"
            best[name] = min(ms[1], best.get(name, ms[1]))
        print(row, flush=True)
    print(f"each at its best chunk size: the backward by hand makes the scan "
          f"{best['ssd_minimal'] / best['ssd_chunked']:.2f} times as fast")
    return best


# ------------------------------------------------------------------------------------------------
# Bytes and FLOPs of the kernels, and their time

SHAPES = {"9B": (128, 80, 8, 128), "8B": (128, 64, 8, 128)}     # h, p, g, n


def scan_costs(h, p, g, n, tile=64):
    """{operation: (compulsory bytes, {kernel: bytes}, FLOPs)} per token, bf16 inputs, fp32 states.

    Compulsory bytes move each input and output once. In the bytes by kernel, each kernel moves each
    of its tensors once, as if later reads hit L2. FLOPs count whole tiles as multiplied: scores per
    head in the forward, per group in the backward. A chunk is two tiles, with three tiles of
    scores."""
    x, BC, dt, line = 2 * h * p, 2 * g * n, 2 * h, 4 * h        # bf16, bf16, bf16, fp32 (b, h, t)
    S, dG = h * p * n / tile, 2 * g * tile * 1.5
    forward = {"torch": dt + 7 * line, "scan": 2 * x + 2 * BC + 2 * line}
    backward = {"states": x + BC + 2 * line + S, "states back": x + BC + line + 2 * S,
                "dx": 3 * x + 2 * BC + S + 4.5 * line + dG,
                "dC": x + S + 3 * BC + 3.5 * line + dG,
                "dB": x + S + 2 * BC + 2 * line + dG, "torch": 18 * line + dt}
    step = {"step": 2 * 4 * h * p * n + 2 * x + 2 * BC + dt + 2 * 3 * (x + 2 * BC)}
    state, scores_x, scores = 2 * h * n * p, 2 * h * tile * p, 2 * tile * n
    return {"forward": (2 * x + 2 * BC + dt, forward, 2 * state + scores_x + h * scores),
            "backward": (3 * x + 4 * BC + 2 * dt, backward,
                         5 * state + 3 * scores_x + 4.5 * g * scores),
            "decode": (step["step"], step, 2 * state)}


def other_scans():
    """{name: scan(x, dt, A, B, C, D) -> y} of the packages that are installed."""
    scans = {}
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
        scans["mamba_ssm"] = lambda x, dt, A, B, C, D: mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size=256, D=D)
    except ImportError:
        pass
    try:
        from fla.ops.simple_gla import chunk_simple_gla

        def gated_linear_attention(x, dt, A, B, C, D):
            """B and C repeated for each head, dt x as values, dt A as gates; D x is added after."""
            k, q = (m.repeat_interleave(x.shape[2] // m.shape[2], 2) for m in (B, C))
            y, _ = chunk_simple_gla(q, k, (x * dt[..., None]).to(x.dtype), dt * A, scale=1.0)
            return y + (x * D[:, None]).to(x.dtype)
        scans["fla"] = gated_linear_attention
    except ImportError:
        pass
    return scans


def time_scans(shape, t, device):
    """{scan: (forward, backward) seconds} of one bf16 sequence. Wrong results are not timed."""
    inputs = random_inputs(1, t, *shape, torch.bfloat16, device)
    scans = {"chunked": lambda *leaves: ssd_chunked(*leaves)[0]} | other_scans()
    if on_cuda(inputs[0]) and unsupported(inputs[0], inputs[3]) is None:
        scans = {"triton": lambda *leaves: ssd_triton(*leaves)[0]} | scans
    with torch.no_grad():
        truth = scans["chunked"](*inputs)
    times = {}
    for name, scan in scans.items():
        try:
            with torch.no_grad():
                if (error := relative_error(scan(*inputs), truth)) > 2e-2:
                    print(f"{name} differs from chunked by {error:.1e}: not timed")
                    continue
                forward = median_seconds(lambda: scan(*inputs), device)
            y = scan(*inputs)
            backward = median_seconds(
                lambda: torch.autograd.grad(y, inputs, truth, retain_graph=True), device)
            times[name] = forward, backward
        except torch.cuda.OutOfMemoryError:
            print(f"{name} runs out of memory at t = {t}: not timed")
    return times


@torch.no_grad()
def time_steps(shape, device):
    """{form: seconds} of a layer's decode step between its projections: one row, bf16."""
    h, p, g, n = shape
    layer = Mamba2(64, h, p, n, g).to(device)
    layer.conv1d.bfloat16()
    weight, bias = layer.conv1d.weight.squeeze(1), layer.conv1d.bias
    xBC, dt = torch.randn(1, layer.conv_dim, device=device).bfloat16(), torch.randn(1, h).to(device)
    state = MambaState(torch.zeros(1, layer.conv_dim, 3, device=device).bfloat16(),
                       torch.zeros(1, h, p, n, device=device))
    arguments = state, xBC, dt, weight, bias, layer.dt_bias, layer.A_log, layer.D
    steps = {"torch": lambda: layer_step(*arguments),
             "compiled": lambda: fuse(layer_step, xBC)(*arguments)}
    try:
        from causal_conv1d import causal_conv1d_update
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        A = -layer.A_log.exp()[:, None, None].expand(h, p, n)
        dt_bias, D = (m[:, None].expand(h, p) for m in (layer.dt_bias, layer.D))

        def step_in_mamba_ssm():
            mixed = causal_conv1d_update(xBC, state.conv, weight, bias, "silu")
            x, B, C = layer.split_groups(mixed)
            return selective_state_update(state.ssm, x, dt[..., None].expand(1, h, p), A, B, C, D,
                                          dt_bias=dt_bias, dt_softplus=True)
        steps["mamba_ssm"] = step_in_mamba_ssm
    except ImportError:
        pass
    return {name: median_seconds(step, device, repeats=20) for name, step in steps.items()}


def print_kernels(lengths, device):
    """Print and return the counts, rooflines and times of the kernels."""
    cuda = str(device).startswith("cuda")
    name, known = find_gpu() if cuda else ("no CUDA device", None)
    gpus, result = [known] if known else ["a10g", "h100", "h200"], dict(device=name)
    print(f"\nTriton kernels, {name}: " + ("medians of 5" if cuda else "times are not measured")
          + "\nbytes and FLOPs per token of one layer's scan in bf16; roofline: the longer of "
          "compulsory bytes at\nthe data sheet's bandwidth and FLOPs at its peak; in brackets: "
          "roofline over measured time\n")
    for shape, sizes in SHAPES.items():
        scans = {t: time_scans(sizes, t, device) for t in lengths} if cuda else {}
        measured = {operation: {t: {k: s[i] for k, s in scans[t].items()} for t in scans}
                    for i, operation in enumerate(("forward", "backward"))}
        measured["decode"] = {1: time_steps(sizes, device)} if cuda else {}
        result[shape] = {}
        for operation, (floor, kernels, flops) in scan_costs(*sizes).items():
            moved, seconds = sum(kernels.values()), measured[operation]
            best = {gpu: max(floor / GPUS[gpu][1] / 1e9, flops / GPUS[gpu][2] / 1e12)
                    for gpu in gpus}
            print(f"{shape} {operation:9s} compulsory {floor:10,.0f} B   moved {moved:10,.0f} B "
                  f"({moved / floor:.2f} x)   {flops / 1e6:6.2f} MFLOP")
            print("   " + "   ".join(f"{kernel} {b:,.0f}" for kernel, b in kernels.items()))
            for t in lengths if operation != "decode" else [1]:
                row = f"   t {t:7,d}   roofline " + "   ".join(
                    f"{gpu} {1e6 * t * s:9.1f} us" for gpu, s in best.items())
                for scan, s in seconds.get(t, {}).items():
                    row += f"   {scan} {1e6 * s:9.1f} us"
                    row += f" ({t * best[known] / s:.0%})" if known else ""
                print(row, flush=True)
            result[shape][operation] = dict(compulsory=floor, bytes=moved, flops=flops,
                                            roofline_s=best, seconds=seconds)
    return result


def main(argv=None):
    parser = argparse.ArgumentParser(description="Speed of the Mamba-2 scan.")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[-1],
                        help="device that runs the scan (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer lengths and one chunk size")
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    lengths = [2 ** i for i in range(7, 11 if args.quick else 15)]
    speed = print_times(lengths, args.device)
    scan_ms = print_backward((64,) if args.quick else (32, 64, 128), args.device)
    kernels = print_kernels([2048] if args.quick else [2048, 8192, 32768, 131072], args.device)
    print(json.dumps(dict(speed=speed, scan_ms=scan_ms, kernels=kernels)))


if __name__ == "__main__":
    main()
