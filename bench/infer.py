"""Inference: speed against context and batch, and measured memory against the memory plan.

    python -m bench.infer               speed of a hybrid, a transformer of equal size and the
                                        hybrid with Mamba layers instead of attention, in the same
                                        code; then 8k tokens in and 16k out in a fixed memory, as in
                                        the paper (on a CPU a sixteenth of both); 2 min
    python -m bench.infer --fit --preset small --context 8192
                                        memory of a model with random weights against the plan
    python -m bench.infer --picture     out/pipeline.png, from the logs of the runs in out/base,
                                        out/aligned and out/compressed
"""

import contextlib
import ctypes
import dataclasses
import pathlib
import platform
import time
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure

import align
from bench.ssm import median_seconds
from common import GIB, check_flags, flag, free_bytes, pick_device, read_rows, script, tune_cpu
from infer import (Decoder, check_plan, decode_one, decode_settings, load_run, peak_bytes, plan,
                   prefill, roofline, speed_up_decode, start_rows, step_bytes)
from model import FP32_PARAMETERS, PRESETS, HybridConfig, HybridLM

# ------------------------------------------------------------------------------------------------
# Speed


def build_random(config, device="cpu", dtype=torch.float32, seed=0):
    """A HybridLM for inference with random weights in dtype; it takes only their memory."""
    with torch.device("meta"):
        model = HybridLM(config)
    wide = torch.promote_types(dtype, torch.float32)
    stored = lambda name: wide if name.endswith(FP32_PARAMETERS) else dtype
    model.load_state_dict({name: torch.ones(p.shape, dtype=stored(name), device=device)
                           for name, p in model.named_parameters()}, assign=True)
    torch.manual_seed(seed)
    model.init_weights()                # of all but the norms, which stay 1
    return speed_up_decode(model.eval())


def equal_transformer(config):
    """A transformer with rotary positions, of the same width, heads, depth and parameters."""
    pairs = (len(config.pattern) + 1) // 2
    narrow = dataclasses.replace(config, pattern="*-" * pairs, mlp_dim=1, rope_theta=1e4)
    width = (config.n_params() - narrow.n_params()) // (2 * config.d_model * pairs) + 1
    return dataclasses.replace(narrow, mlp_dim=max(width, 1))


class Measured:
    """Seconds of the prefill of one row and of a decode step; on a CPU also attention's share."""

    def __init__(self, model, batch, context, chunk=1024, repeats=20):
        device = model.lm_head.weight.device
        cuda, cache = device.type == "cuda", model.init_cache(batch, context + repeats + 8)
        ids = torch.randint(model.config.vocab_size, (1, context), device=device)
        self.prefill = median_seconds(lambda: prefill(model, cache.row(0), ids, chunk), device, 3)
        token = start_rows(model, ids.tolist(), cache, chunk, samples=batch).argmax(-1)
        decode = Decoder(model, cache) if cuda else partial(decode_one, model, cache)
        self.decode = median_seconds(lambda: decode(token), device, repeats)
        self.attention = None if cuda else self.attention_seconds(model, cache) / self.decode

    @torch.inference_mode()
    def attention_seconds(self, model, cache):
        """Seconds of a decode step that the attention layers take."""
        x = model.embed(torch.zeros(cache.batch, 1, dtype=torch.int64))
        pairs = [pair for pair in zip(model.backbone.layers, cache.layers) if pair[0].letter == "*"]
        run = lambda: [layer(x, state) for layer, state in pairs]
        with decode_settings():
            return median_seconds(run, repeats=20) if pairs else 0.0


def measure_speed(run, models, device, dtype, limit, bandwidth):
    """Print and return the table {model: {batch x context: numbers}} of decode and prefill."""
    contexts = (8192, 32768, 131072) if device != "cpu" else (256, 1024, 4096, 16384)
    contexts = [n for n in contexts if n <= (run.context or n)] or [run.context]
    print(f"{'model':14s}{'context':>9s}{'batch':>7s}{'prefill tok/s':>15s}{'decode ms':>11s}"
          f"{'tok/s':>9s}{'MBU':>6s}{'attention':>11s}")
    table = {}
    for name, config in models.items():
        model = None
        for batch, context in ((b, n) for b in (1, 8) for n in contexts):
            print(f"{name:14s}{context:9d}{batch:7d}", end="", flush=True)
            if not plan(config, context + 64, batch, dtype, limit=limit, advise=False)["fits"]:
                print(f"   does not fit {limit / GIB:.2f} GiB")
                continue
            model = model or build_random(config, device, dtype, run.seed)
            m = Measured(model, batch, context)
            mbu = step_bytes(config, context, batch, dtype) / m.decode / bandwidth
            share = "" if m.attention is None else f"{m.attention:.0%}"
            print(f"{context / m.prefill:15.0f}{1e3 * m.decode:11.2f}{batch / m.decode:9.0f}"
                  f"{mbu:6.0%}{share:>11s}")
            table.setdefault(name, {})[f"{batch} x {context}"] = dict(
                prefill_tokens_per_s=context / m.prefill, tokens_per_s=batch / m.decode,
                decode_ms=1e3 * m.decode, mbu=mbu, attention=m.attention)
    return table


def scenario(config, limit, inputs, outputs, bandwidth, flops, batch=0, dtype=torch.bfloat16):
    """dict(batch, tokens_per_s): the batch (if 0, the largest within the limit), and the ceiling of
    generated tokens/s over all prefills and decode steps. The time of a step is linear in its
    context, so the step at the mean context stands for all."""
    batch = batch or plan(config, inputs + outputs, dtype=dtype, limit=limit)["largest_batch"]
    if not batch:
        return dict(batch=0, tokens_per_s=0.0)
    ceilings = lambda context: roofline(config, context, batch, bandwidth, flops, dtype)
    seconds = batch * (ceilings(inputs)["prefill_seconds"]
                       + outputs / ceilings(inputs + outputs // 2)["decode_tokens_per_s"])
    return dict(batch=batch, tokens_per_s=batch * outputs / seconds)


def measure_scenario(run, models, device, dtype, bandwidth, flops):
    """The paper's 8k tokens in and 16k out, in a fixed memory; on a CPU a sixteenth of both."""
    inputs = min(8192 if device != "cpu" else 512, run.context or 8192)
    outputs, limit, result = 2 * inputs, int(run.memory_gib * GIB), {}
    if not limit:               # what the transformer needs for one and a half sequences
        needed = plan(models["transformer"], inputs + outputs, dtype=dtype)
        limit = int(needed["total_bytes"] + 0.5 * needed["parts"]["kv"])
    print(f"\n{inputs} tokens in, {outputs} out, within {limit / GIB:.3f} GiB\n"
          f"{'model':14s}{'batch':>7s}{'tok/s measured':>16s}{'tok/s roofline':>16s}")
    for name in ("hybrid", "transformer"):
        best = scenario(models[name], limit, inputs, outputs, bandwidth, flops, dtype=dtype)
        batch, speed = best["batch"], 0.0
        if batch:
            model = build_random(models[name], device, dtype, run.seed)
            found = check_plan(models[name], limit, inputs + outputs, batch, dtype=dtype)
            first, mean = (Measured(model, batch, context, found["prefill_chunk"], 7)
                           for context in (inputs, inputs + outputs // 2))
            speed = batch * outputs / (batch * first.prefill + outputs * mean.decode)
        result[name] = dict(best, measured_tokens_per_s=speed)
        print(f"{name:14s}{batch:7d}{speed:16.1f}{best['tokens_per_s']:16.1f}", flush=True)
    ours, theirs = result["hybrid"], result["transformer"]
    if theirs["batch"]:
        result["ratio"] = {key: ours[key] / theirs[key] for key in ours}
        print("ratio: " + ", ".join(f"{key} {n:.2f}" for key, n in result["ratio"].items()))
    return result


def measure(run, config, device, dtype, limit):
    """Bandwidth and FLOP/s of this machine, then the speed of each model."""
    check_plan(config, limit, (run.context or 256) + 64, 1, dtype=dtype)
    settings = torch.cuda.get_device_name() if device.startswith("cuda") else tune_cpu()
    a = torch.ones(2 ** 26 if device == "cpu" else 2 ** 28, device=device)
    b, m = torch.empty_like(a), torch.randn(2048, 2048, device=device, dtype=dtype)
    bandwidth = 2 * a.nbytes / median_seconds(lambda: b.copy_(a), device)
    flops = 2 * 2048 ** 3 / median_seconds(lambda: m @ m, device)
    a = b = m = None        # frees their memory
    print(f"{settings}; {torch.get_num_threads()} threads, torch {torch.__version__}; copies "
          f"{bandwidth / 1e9:.1f} GB/s, products {flops / 1e12:.2f} TFLOP/s ({str(dtype)[6:]})")
    other = HybridConfig.preset("qwen3-8b-shape") if config.d_model >= 4096 else \
        equal_transformer(config)
    models = {"hybrid": config, "transformer": other, "no attention":
              dataclasses.replace(config, pattern=config.pattern.replace("*", "M"))}
    table = measure_speed(run, models, device, dtype, limit, bandwidth)
    first = next(iter(table["hybrid"].values()))
    return dict(first, table=table, bandwidth=bandwidth, scenario=measure_scenario(
        run, models, device, dtype, bandwidth, flops), peak_bytes=peak_bytes(device))


@contextlib.contextmanager
def measured_peak(device):
    """Yield a function that returns the peak growth of this process's memory, in bytes."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    if platform.libc_ver()[0] == "glibc":       # return freed memory to the system at once
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 65536)             # M_MMAP_MAX
        libc.mallopt(-3, 2 ** 16)           # M_MMAP_THRESHOLD
        libc.malloc_trim(0)
    process = pathlib.Path("/proc/self")
    (process / "clear_refs").write_text("5")                # resets the peak
    resident = lambda key: next(1024 * int(line.split()[1]) for line in (
        process / "status").read_text().splitlines() if line.startswith(key))
    before = resident("VmRSS")
    yield lambda: resident("VmHWM") - before


def fit(run, config, device, dtype, limit):
    """Build a model, prefill and decode within the limit, and compare memory with the plan."""
    cuda, context = device.startswith("cuda"), run.context or 8192
    if device == "cpu" and not pathlib.Path("/proc/self/clear_refs").exists():
        raise ValueError("--fit on a CPU reads the peak from /proc, which only Linux has")
    found = check_plan(config, limit, context + run.tokens, run.batch, dtype=dtype,
                       prefill_chunk=run.prefill_chunk, snapshots=cuda)
    wait = torch.cuda.synchronize if cuda else lambda: None
    clock = lambda: wait() or time.perf_counter()
    tiny = dataclasses.replace(config, vocab_size=16, d_model=16, mlp_dim=16)
    Measured(build_random(tiny, device, dtype), 1, 2 * config.chunk_size)   # loads the code
    with measured_peak(device) as peak:
        model = build_random(config, device, dtype, run.seed)
        cache = model.init_cache(run.batch, context + run.tokens, dtype)
        prompts = torch.randint(config.vocab_size, (run.batch, context)).tolist()
        start = clock()
        logits = start_rows(model, prompts, cache, found["prefill_chunk"])
        middle = clock()
        decode = Decoder(model, cache) if cuda else partial(decode_one, model, cache)
        for _ in range(run.tokens):
            logits = decode(logits.argmax(-1))
        end, taken = clock(), peak()

    parts, total = found["parts"], found["total_bytes"]
    weights, held = sum(p.nbytes for p in model.parameters()), cache.nbytes()
    caches = sum(parts[name] for name in ("kv", "ssm_states", "conv_states"))
    rows = dict(weights=(parts["weights"], weights), caches=(caches, held), peak=(total, taken))
    print(f"{'part':12s}{'planned GiB':>13s}{'measured GiB':>14s}")
    for name, (planned, measured) in rows.items():
        share = f"{measured / planned - 1:+9.1%}" if planned else ""
        print(f"{name:12s}{planned / GIB:13.3f}{measured / GIB:14.3f}{share}")
    speed = run.batch * context / (middle - start), run.batch * run.tokens / (end - middle)
    print(f"prefill {speed[0]:.0f}, decode {speed[1]:.1f} tokens/s on {device}, random weights")
    return dict(tokens_per_s=speed[1], prefill_tokens_per_s=speed[0], peak_bytes=taken,
                predicted_bytes=total, parts=parts, fits=taken <= limit)


def draw_pipeline(folders, path):
    """Draw loss and accuracy by stage, and accuracy by lines of thought, from the logs of the runs
    of train_fp8.py, align.py and prune_distill.py. Returns the last model's answer to a problem."""
    ends = [read_rows(folder / "metrics.jsonl")[-1:] for folder in folders]
    for folder, rows in zip(folders, ends):
        if not rows or "final" not in rows[0]:
            raise ValueError(f"{folder} has no result of a finished run")
    train, aligned, final = (rows[0]["final"] for rows in ends)
    if final.get("student_accuracy") is None:
        raise ValueError(f"{folders[-1]} was not distilled from an aligned model")

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    loss, stages, budget = figure.subplots(1, 3)
    before, after = (f"{final[f'params_{when}'] / 1e6:.2f} M" for when in ("before", "after"))
    bars = loss.bar(["trained", f"aligned\n{before}", "pruned", f"distilled\n{after}"],
                    [train["val_loss"], *(final[f"{m}_val_loss"]
                                          for m in ("teacher", "pruned", "student"))])
    loss.bar_label(bars, fmt="%.2f")
    loss.set(title=f"{train['val_bpb']:.3f} bits/byte before alignment", ymargin=0.1,
             ylabel="validation loss [nats/token]")
    scores = {"base": aligned["accuracy_base"], "SFT": aligned["accuracy_sft"],
              "RL": aligned["accuracy_rl"], "merged": final["teacher_accuracy"],
              "pruned": final["pruned_accuracy"], "distilled": final["student_accuracy"]}
    bars = stages.bar(list(scores), [100 * score for score in scores.values()], color="#55a868")
    stages.bar_label(bars, fmt="%.0f")
    stages.tick_params(axis="x", labelrotation=30)
    stages.set(title="Arithmetic, step by step", ylabel="answered right [%]", ylim=(0, 105))
    lines = aligned["accuracy_by_budget"]
    budget.plot([int(n) for n in lines], [100 * score for score in lines.values()], "o-",
                color="#c44e52")
    budget.set(title="The longer it may think, the better", xlabel="budget [lines of thought]",
               ylabel="answered right [%]", ylim=(0, 105), xticks=[int(n) for n in lines])
    figure.savefig(path, dpi=120)
    model, encoding = load_run(folders[-1])
    [problem] = align.draw_problems(np.random.default_rng(0), 1, [max(aligned["lengths"])], True)
    return problem.text + " " + align.accuracy(model, encoding, [problem])[1][0]


# ------------------------------------------------------------------------------------------------
# python -m bench.infer


@dataclasses.dataclass
class Run:
    """Measure the speed of inference, or with --fit its memory; --picture draws the pipeline."""

    preset: str = flag("toy", "a preset of model.py", choices=PRESETS)
    pattern: str = flag("", "layer pattern, instead of the preset's")
    context: int = flag(0, "most tokens; 0: 16384, on a GPU 131072, with --fit 8192", at_least=0)
    fit: bool = flag(False, "compare measured memory with the plan instead")
    picture: bool = flag(False, "draw out/pipeline.png from the logs in out instead")
    batch: int = flag(1, "with --fit: number of sequences", at_least=1)
    tokens: int = flag(32, "with --fit: tokens to decode", at_least=1)
    prefill_chunk: int = flag(0, "with --fit: as in infer.py", at_least=0)
    memory_gib: float = flag(0.0, "memory limit; 0: all free memory", at_least=0)
    device: str = flag("auto", "auto, cuda, mps or cpu")
    dtype: str = flag("auto", "auto: bfloat16 on a GPU", choices=("auto", "float32", "bfloat16"))
    seed: int = flag(0, "seed of the random weights", at_least=0, at_most=2 ** 60)

    def __post_init__(self):
        check_flags(self)


@script(Run)
def main(run):
    if run.picture:
        folders = [pathlib.Path("out") / name for name in ("base", "aligned", "compressed")]
        return dict(text=draw_pipeline(folders, "out/pipeline.png"), picture="out/pipeline.png")
    config = HybridConfig.preset(run.preset, **(dict(pattern=run.pattern) if run.pattern else {}))
    device = pick_device(run.device)
    free = free_bytes(device)
    limit = min(int(run.memory_gib * GIB) or free, free)
    auto = "float32" if device == "cpu" else "bfloat16"
    dtype = getattr(torch, auto if run.dtype == "auto" else run.dtype)
    return (fit if run.fit else measure)(run, config, device, dtype, limit)


if __name__ == "__main__":
    main()
