"""What FP8 training costs: in loss, against no FP8 over paired seeds; in time; in memory.

    loss     Each seed trains the same model on the same batches with every recipe. Gaps in
             validation loss to the recipe `none` are paired by seed. A run whose learning rate is
             1.001 times as high shows what chance does. Since training is chaotic and hides errors,
             each recipe also gets one batch at the same weights.
    time     Each type of linear: forward and both gradients, quantisation included. Then a training
             step of each recipe, in turn. On a CPU this is the cost of emulation.
    memory   Bytes of a training step by recipe and part, predicted and measured.

    python -m bench.train_fp8               four runs x five seeds x 100 steps, 45 min on 2 cores;
                                            the same command resumes it
    python -m bench.train_fp8 --time        2 min; on a GPU the 12B's linears, a step of small
    python -m bench.train_fp8 --memory      1 min
"""

import copy
import dataclasses
import functools
import itertools
import pathlib
import statistics
import time
import types

import torch
from matplotlib.figure import Figure
from torch import nn

from bench.ssm import median_seconds
from common import GIB, check_flags, flag, pick_device, pick_dtype, script, settings_of, tune_cpu
from data import load_data
from model import PRESETS, HybridConfig, HybridLM
from ssm import Linear
from stability import open_trials
from train_fp8 import (RECIPES, Float8Linear, check_memory, convert_to_fp8, evaluate, make_batches,
                       make_optimizer, pick_backend, prepare_layers, sqnr, train, train_step)
from train_fp8 import Run as TrainRun

RUNS = {        # recipe, factor on the learning rate
    "none": ("none", 1.0), "none, lr x 1.001": ("none", 1.001), "nemotron-h": ("nemotron-h", 1.0),
    "nano2": ("nano2", 1.0),
}


@dataclasses.dataclass
class Run:
    """Compare the FP8 recipes with no FP8: loss over seeds, or --time, or --memory."""

    time: bool = flag(False, "measure time instead", session=True)
    memory: bool = flag(False, "predict and measure memory instead", session=True)
    preset: str = flag("toy", "one of " + ", ".join(PRESETS), choices=PRESETS)
    data: str = flag("stdlib", "as in train_fp8.py")
    tokenizer: str = flag("bpe", "as in train_fp8.py")
    steps: int = flag(100, "optimizer steps per run", at_least=1)
    batch_size: int = flag(4, "sequences per step", at_least=1)
    seq_len: int = flag(256, "tokens per sequence", at_least=1)
    lr: float = flag(3e-3, "peak learning rate", above=0)
    seeds: int = flag(5, "number of seeds, from 0", at_least=2, session=True)
    device: str = flag("auto", "auto, cuda, mps or cpu", session=True)
    compute_dtype: str = flag("float32", "auto, float32 or bfloat16",
                              choices=("auto", "float32", "bfloat16"))
    out: str = flag("out/bench-train-fp8", "folder of the runs and the plot", session=True)
    overwrite: bool = flag(False, "start anew even if --out holds other runs", session=True)

    def __post_init__(self):
        check_flags(self)

    def training(self, recipe, **changes):
        return TrainRun(**dict(recipe=recipe, steps=self.steps, batch_size=self.batch_size,
                               seq_len=self.seq_len, lr=self.lr, eval_every=self.steps) | changes)


# ------------------------------------------------------------------------------------------------
# Loss


def fixed_weights(model, recipe, batch):
    """Pass one batch through the same weights without FP8 and with FP8 in all linears. Returns
    (relative difference of the loss, SQNR in dB of the whole gradient, and of the worst parameter's
    gradient, its name). A wrong format costs 4 dB here, but is not visible in a short run."""
    fp8 = convert_to_fp8(copy.deepcopy(model), recipe, "emulated", ends=0, verbose=False)
    losses = [m.loss(*batch) for m in (model, fp8)]
    truth, value = ({name: g for (name, _), g in zip(m.named_parameters(), torch.autograd.grad(
        loss, list(m.parameters())))} for m, loss in zip((model, fp8), losses))
    flat = lambda grads: torch.cat([g.flatten() for g in grads.values()])
    worst = min(truth, key=lambda name: sqnr(value[name], truth[name]))
    return (float((losses[1] / losses[0]).detach()) - 1, sqnr(flat(value), flat(truth)),
            sqnr(value[worst], truth[worst]), worst)


def train_once(run, name, seed, config, token_data, dtype, device):
    """Train one of RUNS with one seed. Returns dict(name, seed, losses: of its steps, val_loss);
    the run `none` adds fixed: the results of `fixed_weights` by recipe."""
    recipe, factor = RUNS[name]
    training = run.training(recipe, seed=seed, lr=factor * run.lr)
    torch.manual_seed(seed)
    model = prepare_layers(training, HybridLM(config, dtype).to(device), "auto", verbose=False)
    rows = train(training, model, token_data)
    if len(rows) < run.steps:
        raise KeyboardInterrupt                         # Ctrl-C ends `train` after a whole step
    result = dict(name=name, seed=seed, losses=[row["loss"] for row in rows], val_loss=evaluate(
        model, token_data.validation, run.batch_size, run.seq_len,
        limit=32 * run.batch_size * run.seq_len))
    if name == "none":
        batches = make_batches(training, token_data)
        batches.position = run.steps * run.batch_size
        batch = [m if m is None else m.to(device) for m in batches.next()]
        result["fixed"] = {r: fixed_weights(model, r, batch) for r in RECIPES if r != "none"}
    return result


def compare_loss(run, device, dtype):
    config = HybridConfig.preset(run.preset)
    text = load_data(run.data, run.tokenizer, config.vocab_size)
    config = dataclasses.replace(config, vocab_size=text.vocab_size)
    check_memory(run.training("none"), config, dtype, device)
    settings = settings_of(run) | dict(dtype=str(dtype)[6:], text=text.fingerprint)
    with open_trials(run.out, settings, run.overwrite) as (trials, add):
        done = {(r["name"], r["seed"]) for r in trials}
        for seed, name in itertools.product(range(run.seeds), RUNS):
            if (name, seed) not in done:
                add(train_once(run, name, seed, config, text, dtype, device))
                print(f"{name:18s} seed {seed}  val_loss {trials[-1]['val_loss']:.4f}", flush=True)
    return report_gaps(run, {(r["name"], r["seed"]): r for r in trials})


def report_gaps(run, results):
    """Print tables, draw the plot, return the result. results {(name, seed): of `train_once`}."""
    seeds, gap = range(run.seeds), {}
    base = [results["none", seed]["val_loss"] for seed in seeds]
    loss, spread = statistics.mean(base), statistics.stdev(base) / statistics.mean(base)
    print(f"\nnone: validation loss {loss:.4f}, standard deviation over seeds {spread:.2%}\n"
          f"{'run':18s}{'gap to none [%]':>18s}{'error':>8s}   each seed")
    for name in list(RUNS)[1:]:
        each = [results[name, seed]["val_loss"] / b - 1 for seed, b in zip(seeds, base)]
        mean, error = statistics.mean(each), statistics.stdev(each) / len(each) ** 0.5
        gap[name] = dict(mean=mean, standard_error=error, each=each)
        print(f"{name:18s}{100 * mean:+18.3f}{100 * error:8.3f}   " + " ".join(
            f"{100 * e:+.3f}" for e in each) + "   inside the noise" * (abs(mean) <= 2 * error))
    print(f"\none batch with all linears in FP8, at the weights after {run.steps} steps of none\n"
          f"{'recipe':18s}{'loss [%]':>10s}{'gradient SQNR [dB]':>20s}{'worst parameter':>18s}")
    for recipe in (r for r in RECIPES if r != "none"):
        loss_gaps, whole, worst, names = zip(*(results["none", s]["fixed"][recipe] for s in seeds))
        print(f"{recipe:18s}{100 * statistics.mean(map(abs, loss_gaps)):10.4f}"
              f"{statistics.mean(whole):20.1f}{min(worst):18.1f}  {names[worst.index(min(worst))]}")
    plot_gaps(results, seeds, gap, pathlib.Path(run.out) / "compare.png")
    return dict(gap=gap, seed_spread=spread, val_loss=loss, seeds=run.seeds, steps=run.steps,
                out=run.out)


def plot_gaps(results, seeds, gap, path):
    """Draw the loss of each run, mean over seeds, and below it the relative difference to `none`
    with its standard error; both as running means of 10 steps."""
    losses = {name: torch.tensor([results[name, s]["losses"] for s in seeds], dtype=torch.float64)
              for name in RUNS}
    losses = {name: m.unfold(1, min(10, m.shape[1]), 1).mean(-1) for name, m in losses.items()}
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for (name, m), color in zip(losses.items(), ("#444444", "#999999", "#c44e52", "#4c72b0")):
        each, steps = 100 * (m / losses["none"] - 1), range(1, m.shape[1] + 1)
        mean, error = each.mean(0), each.std(0) / len(seeds) ** 0.5
        above.plot(steps, m.mean(0), color=color, label=name, linewidth=1.2)
        below.plot(steps, mean, color=color)
        below.fill_between(steps, mean - error, mean + error, color=color, alpha=0.2)
    above.set(ylabel="training loss [nats per token]", title="Gap in validation loss: " + ", ".join(
        f"{name} {100 * gap[name]['mean']:+.2f} ± {100 * gap[name]['standard_error']:.2f}%"
        for name in ("nemotron-h", "nano2")))
    below.set(ylabel="difference to none [%]", xlabel="step (running mean of 10)")
    above.legend()
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------
# Time


def time_linear(layer, x, g):
    """Median seconds of the forward, the input gradient and the weight gradient."""
    seconds = [median_seconds(lambda: layer(x), x.device, repeats=7)]
    for wanted, other in ((x, layer.weight), (layer.weight, x)):
        wanted.requires_grad_()
        other.requires_grad_(False)
        y = layer(x)
        seconds.append(median_seconds(
            lambda: torch.autograd.grad(y, wanted, g, retain_graph=True), x.device, repeats=7))
    return seconds


def measure_time(run, device, dtype):
    """Time each type of linear of the preset (on a GPU the 12B replaces the toy), then steps."""
    preset = "nemotron-nano-12b-v2" if (device, run.preset) == ("cuda", "toy") else run.preset
    tokens, table = 8192 if device == "cuda" else run.batch_size * run.seq_len, {}
    with torch.device("meta"):
        model = HybridLM(HybridConfig.preset(preset))
    shapes = {name.split(".")[-1]: m.weight.shape for name, m in model.named_modules()
              if isinstance(m, nn.Linear) and m is not model.lm_head}
    print(f"{preset}, {tokens} tokens in {str(dtype)[6:]}, {device}: milliseconds (TFLOP/s) of "
          "forward, input gradient, weight gradient; speedup of all three over no FP8")
    for kind, (n, k) in shapes.items():
        x = torch.randn(tokens, k, device=device, dtype=dtype)
        g = torch.randn(tokens, n, device=device, dtype=dtype)
        weight = nn.Parameter(torch.randn(n, k, device=device) / k ** 0.5)
        for name, recipe in RECIPES.items():
            layer = Float8Linear(k, n, recipe, pick_backend("auto", recipe, device)) if recipe \
                else Linear(k, n)
            layer.weight = weight
            seconds = table.setdefault(kind, {})[name] = time_linear(layer, x, g)
            print(f"{kind:10s}{f'{n} x {k}':>15s}  {name:11s}" + "".join(
                f"{1e3 * s:9.2f} ({2e-12 * tokens * n * k / s:6.2f})" for s in seconds)
                + f"{sum(table[kind]['none']) / sum(seconds):8.2f}x")
    return dict(seconds=table, step=time_steps(run, device, dtype))


def time_steps(run, device, dtype, repeats=21):
    """{recipe: median seconds} of training steps, in turn, of the toy (on a GPU: of small)."""
    config = HybridConfig.preset("small" if device == "cuda" else "toy")
    tokens = torch.randint(config.vocab_size, (run.batch_size, run.seq_len))
    batches, steps = types.SimpleNamespace(next=lambda: (tokens, tokens, None)), {}
    for recipe in RECIPES:
        training, model = run.training(recipe), HybridLM(config, dtype).to(device)
        prepare_layers(training, model, "auto", verbose=False)
        steps[recipe] = functools.partial(train_step, model, make_optimizer(model, run.lr), batches,
                                          training, run.lr, device)
    seconds = {recipe: [] for recipe in RECIPES}
    for _, (recipe, step) in itertools.product(range(repeats), steps.items()):
        start = time.perf_counter()
        step()
        seconds[recipe].append(time.perf_counter() - start)
    median = {recipe: statistics.median(each) for recipe, each in seconds.items()}
    print(f"a training step of {run.batch_size} x {run.seq_len} tokens: " + ", ".join(
        f"{recipe} {1e3 * s:.0f} ms ({s / median['none']:.2f}x)" for recipe, s in median.items()))
    return median


# ------------------------------------------------------------------------------------------------
# Memory


def allocated_peak(f, device):
    """Peak bytes that f() allocates beyond what was there before, as the allocator reports."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        f()
    changes = [event for event in profile.profiler.kineto_results.events()
               if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


def measure_step(run, training, config, device, dtype):
    """{part: bytes} of a training step, measured from tensors and by the allocator."""
    model = HybridLM(config, dtype).to(device)
    prepare_layers(training, model, "auto", verbose=False)
    optimizer = make_optimizer(model, run.lr)
    tokens = torch.zeros(run.batch_size, run.seq_len, dtype=torch.int64, device=device)
    model.loss(tokens, tokens).backward()
    optimizer.step()
    size = lambda tensors: sum(m.nbytes for m in tensors)
    return dict(weights=size(model.parameters()),
                gradients=size(p.grad for p in model.parameters()),
                optimizer=size(m for s in optimizer.state.values() for m in s.values()),
                activations=allocated_peak(lambda: model.loss(tokens, tokens), device))


def measure_memory(run, device, dtype):
    """Predict (`check_memory`) and measure each recipe, with and without recomputation."""
    config, table = HybridConfig.preset(run.preset), {}
    for recipe, recompute in itertools.product(RECIPES, (False, True)):
        name = recipe + ", recompute" * recompute
        training = run.training(recipe, recompute=recompute)
        predicted = check_memory(training, config, dtype, device)
        measured = measure_step(run, training, config, device, dtype)
        table[name] = dict(predicted=predicted, measured=measured)
        print(f"{name}, measured: " + ", ".join(
            f"{part} {n / GIB:.3f} GiB ({n / predicted[part] - 1:+.2%})"
            for part, n in measured.items()))
    return dict(memory=table)


@script(Run)
def main(run):
    device = pick_device(run.device)
    dtype = pick_dtype(run.compute_dtype, device)
    print(f"settings     {tune_cpu()}" if device == "cpu" else f"device       {device}")
    measure = measure_time if run.time else measure_memory if run.memory else compare_loss
    return measure(run, device, dtype)


if __name__ == "__main__":
    main()
