"""All measurements that need a GPU, in one call of at most 9 minutes: one table, one line of JSON.

    tests      the GPU tests of the repository
    scan       errors of the Triton kernels against fp64, and their time against the chunked form
               (and mamba_ssm and fla, if installed) at the 9B's shape
    fused      convolution, norm and decode step: plain against torch.compile
    fp8        real against emulated GEMM of each recipe, and its speed against bf16
    training   a training step of the preset small by recipe, and its model FLOPs utilisation (MFU)
    plan       the 9B at 131072 tokens within 19.66 GiB: planned bytes against the measured peak
    decode     a decode step of the 9B, and its model bandwidth utilisation (MBU)
    scenario   8k tokens in, 16k out, in 21.06 GiB: the 9B against Qwen3-8B's shape

Sections run in this order. The time limit is checked after each row. A section that fails or has no
time left reports so in its row, and the others still run. Without a CUDA GPU the same code runs on
tiny sizes: a dry run, which tests the code. Its figures mean nothing.

    python -m bench.gpu                       on one GPU; on a CPU a dry run, 1 min
    python -m bench.gpu --sections scan fp8
"""

import dataclasses
import re
import subprocess
import sys
import time

import torch

import bench.infer
import bench.train_fp8
from bench.infer import Measured, build_random, equal_transformer, fit, measure_scenario
from bench.ssm import SHAPES, find_gpu, median_seconds, time_scans, time_steps
from common import GIB, check_flags, flag, script
from infer import GPUS, step_bytes
from model import HybridConfig
from ssm import (Linear, agreement, causal_conv1d, fuse, gated_group_norm, on_cuda, relative_error,
                 unsupported)
from train_fp8 import RECIPES, Float8Linear, gemm, operand

DRY = HybridConfig.preset("toy", vocab_size=512)


@dataclasses.dataclass
class Machine:
    """Where it runs, with bytes/s and dense bf16 FLOP/s of the data sheet; dry: without a GPU."""
    name: str
    device: str
    dry: bool
    bandwidth: float
    flops: float

    @property
    def dtype(self):
        return torch.float32 if self.dry else torch.bfloat16


def find_machine():
    """The first CUDA GPU, or the CPU for a dry run."""
    if not torch.cuda.is_available():
        return Machine("no GPU: a dry run", "cpu", True, 1e10, 1e11)
    name, known = find_gpu()
    _, bandwidth, flops = GPUS[known or "h100"]
    return Machine(name, "cuda", False, bandwidth * 1e9, flops * 1e12)


# ------------------------------------------------------------------------------------------------
# Sections: each yields rows (what, number, unit)


def run_tests(machine):
    """Run the GPU tests; a dry run only collects them."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/test_triton.py",
               *["--collect-only"] * machine.dry]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    counts = dict(re.findall(r"(\w+) (\d+)", re.sub(r"(\d+) (\w+)", r"\2 \1", done.stdout[-200:])))
    yield "exit code", done.returncode, ""
    for word in ("passed", "failed", "skipped", "tests"):
        if word in counts:
            yield word, int(counts[word]), "tests"


def measure_scan(machine):
    x, B = (torch.empty(1, 1, 1, n, device=machine.device) for n in (64, 32))
    for dtype in (torch.float32, torch.bfloat16):
        form = "triton" if on_cuda(x) and unsupported(x.to(dtype), B.to(dtype)) is None \
            else "chunked"
        worst = max(agreement(form, dtype, machine.device).values())
        yield f"{form} {str(dtype)[6:]}, worst of results and gradients", worst, "relative error"
    shape, lengths = ((4, 16, 2, 16), (64,)) if machine.dry else (SHAPES["9B"], (2048, 8192, 32768))
    for t in lengths:
        for name, seconds in time_scans(shape, t, machine.device).items():
            for direction, s in zip(("forward", "backward"), seconds):
                yield f"{name}, {t} tokens, {direction}", 1e6 * s, "us"


@torch.no_grad()
def measure_fused(machine):
    """Plain torch against what `fuse` compiles; in a dry run both are the same function."""
    h, p, g, n = (4, 16, 2, 16) if machine.dry else SHAPES["9B"]
    make = lambda *size: torch.randn(*size, device=machine.device)
    channels, t = h * p + 2 * g * n, 64 if machine.dry else 8192
    x, weight, bias = make(1, t, channels).to(machine.dtype), make(channels, 4), make(channels)
    y, z, scale = *make(2, 1, t, h * p).to(machine.dtype), make(h * p)
    convolve = lambda f: f(x, weight, bias)[0]
    normalise = lambda f: f(y, z, scale, g, 1e-5)
    for name, run, plain in (("convolution", convolve, causal_conv1d),
                             ("gated norm", normalise, gated_group_norm)):
        compiled = fuse(plain, x)
        yield f"{name}, compiled against plain", relative_error(run(compiled), run(plain)), \
            "relative error"
        for form, f in (("plain", plain), ("compiled", compiled)):
            yield f"{name}, {form}", 1e6 * median_seconds(lambda: run(f), machine.device, 20), "us"
    for form, seconds in time_steps((h, p, g, n), machine.device).items():
        yield f"decode step of a layer, {form}", 1e6 * seconds, "us"


def measure_fp8(machine):
    """The up projection of the 12B's MLP on 8192 tokens."""
    tokens, n, k = (64, 256, 128) if machine.dry else (8192, 20480, 5120)
    make = lambda *size: torch.randn(*size, device=machine.device, dtype=machine.dtype)
    x, w, g = make(tokens, k), make(n, k), make(tokens, n)
    backend, seconds = "emulated" if machine.dry else "hopper", {}
    seconds["none"] = median_seconds(lambda: x @ w.t(), machine.device, 20)
    yield "bf16 GEMM", 2e-12 * tokens * n * k / seconds["none"], "TFLOP/s"
    for name, recipe in list(RECIPES.items())[1:]:
        sides = {b: [operand(m, f, block, recipe, b) for m, f, block in (
            (x, recipe.x_format, recipe.x_block), (w, recipe.w_format, recipe.w_block))]
            for b in ("emulated", backend)}
        results = {b: gemm(*pair, machine.dtype) for b, pair in sides.items()}
        yield f"{name}, real against emulated", relative_error(
            results[backend], results["emulated"]), "relative error"
        seconds[name] = median_seconds(
            lambda: gemm(*sides[backend], machine.dtype), machine.device, 20)
        yield f"{name} GEMM", 2e-12 * tokens * n * k / seconds[name], "TFLOP/s"
    for name, recipe in RECIPES.items():
        layer = Float8Linear(k, n, recipe, backend) if recipe else Linear(k, n)
        layer.weight = torch.nn.Parameter(w.float())
        yield f"{name}, a linear's three GEMMs, quantisation included", 1e3 * sum(
            bench.train_fp8.time_linear(layer, x.clone(), g)), "ms"


def measure_training(machine):
    batch, length = (2, 64) if machine.dry else (16, 2048)
    config = HybridConfig.preset("toy" if machine.dry else "small")
    run = bench.train_fp8.Run(batch_size=batch, seq_len=length)
    flops = 3 * batch * length * sum(config.flops_by_part(length).values())
    steps = bench.train_fp8.time_steps(run, machine.device, machine.dtype,
                                       repeats=2 if machine.dry else 11)
    for recipe, seconds in steps.items():
        yield f"{recipe}, {batch} x {length} tokens", batch * length / seconds, "tokens/s"
        yield f"{recipe}, MFU", 100 * flops / seconds / machine.flops, "%"


def measure_plan(machine):
    preset, context = ("toy", 512) if machine.dry else ("nemotron-nano-9b-v2", 131072)
    run = bench.infer.Run(preset=preset, context=context, fit=True, tokens=8)
    limit = int(19.66 * GIB)
    found = fit(run, HybridConfig.preset(preset), machine.device, machine.dtype, limit)
    yield f"planned for {context} tokens", found["predicted_bytes"] / GIB, "GiB"
    yield "measured peak", found["peak_bytes"] / GIB, "GiB"
    yield f"within {limit / GIB:.2f} GiB", int(found["fits"]), "(1: yes)"
    yield "prefill", found["prefill_tokens_per_s"], "tokens/s"
    yield "decode, first steps", found["tokens_per_s"], "tokens/s"


def measure_decode(machine):
    config = DRY if machine.dry else HybridConfig.preset("nemotron-nano-9b-v2")
    model = build_random(config, machine.device, machine.dtype)
    for batch, context in ((1, 64), (2, 64)) if machine.dry else ((1, 8192), (8, 8192), (1, 65536)):
        seconds = Measured(model, batch, context, repeats=10).decode
        moved = step_bytes(config, context, batch, machine.dtype)
        yield f"{batch} x {context} tokens", batch / seconds, "tokens/s"
        yield f"{batch} x {context} tokens, MBU", 100 * moved / seconds / machine.bandwidth, "%"


def scenario(machine):
    hybrid = DRY if machine.dry else HybridConfig.preset("nemotron-nano-9b-v2")
    other = equal_transformer(DRY) if machine.dry else HybridConfig.preset("qwen3-8b-shape")
    context, gib = (64, 0) if machine.dry else (8192, 21.06)
    run = bench.infer.Run(context=context, memory_gib=gib)
    found = measure_scenario(run, {"hybrid": hybrid, "transformer": other}, machine.device,
                             machine.dtype, machine.bandwidth, machine.flops)
    for name, row in found.items():
        for key, unit in (("batch", "sequences"), ("measured_tokens_per_s", "tokens/s"),
                          ("tokens_per_s", "tokens/s, roofline")):
            yield name, row[key], unit if name != "ratio" else f"x ({unit})"


SECTIONS = dict(tests=run_tests, scan=measure_scan, fused=measure_fused, fp8=measure_fp8,
                training=measure_training, plan=measure_plan, decode=measure_decode,
                scenario=scenario)


@dataclasses.dataclass
class Run:
    """Measure all that needs a GPU; on a CPU a dry run with tiny sizes."""

    sections: tuple[str, ...] = flag(tuple(SECTIONS), "sections to run, in this order", nargs="+")
    minutes: float = flag(9.0, "time limit of the whole call", above=0)

    def __post_init__(self):
        check_flags(self)
        unknown = [name for name in self.sections if name not in SECTIONS]
        if unknown:
            raise ValueError(f"--sections has {unknown[0]!r}, must be of {', '.join(SECTIONS)}")


@script(Run)
def main(run):
    machine, start, result = find_machine(), time.perf_counter(), {}
    for name in run.sections:
        rows = result[name] = []
        try:
            if time.perf_counter() - start > 60 * run.minutes:
                raise TimeoutError("no time left: not measured")
            for row in SECTIONS[name](machine):
                rows.append(row)
                if time.perf_counter() - start > 60 * run.minutes:
                    raise TimeoutError("no time left for the remaining rows")
        except Exception as error:          # of any kind: the other sections still run
            rows.append(("failed", str(error).splitlines()[0] if str(error) else repr(error), ""))
        if not machine.dry:
            torch.cuda.empty_cache()
        print(f"{name} done after {time.perf_counter() - start:.0f} s", flush=True)
    print(f"\n{machine.name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    for name, rows in result.items():
        for what, number, unit in rows:
            figure = number if isinstance(number, str) else f"{number:,.4g}"
            print(f"| {name:9s}| {what:56s}| {figure} {unit} |")
    return dict(device=machine.name, dry=machine.dry, sections=result)


if __name__ == "__main__":
    main()
