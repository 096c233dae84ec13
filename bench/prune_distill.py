"""Ablations of pruning and distillation: validation loss over seeds, and the speed of decoding.

All seeds share one teacher. A seed changes the windows that importance is measured on, the order of
the training text, and all random choices. Rows of the table:

    pruned    after pruning to three quarters of each width. Kept are the parts of highest
              importance, random parts, or the parts of lowest importance (worst first)
    by        after pruning to equal size by depth alone or width alone, and after distilling these
              for a ninth of the steps
    trained   the model pruned by importance, after KD from the teacher or cross-entropy on the
              text, and a model of the same shape trained from scratch, on equal tokens

    python -m bench.prune_distill               out/base and out/compressed, 15 min on 2 cores
"""

import collections
import dataclasses
import pathlib

import torch
from tqdm import tqdm

import prune_distill
import train_fp8
from bench.infer import Measured
from bench.ssm import mean_and_spread
from common import check_flags, flag, pick_device, pick_dtype, script, tune_cpu
from infer import load_run
from model import HybridLM
from prune_distill import (TRIAL_SHARE, calibration, choose_layers, describe, importance, keep_best,
                           load_text, make_kd_loss, prune, train_briefly, validation_loss,
                           with_counts)

CONTEXT = 512               # tokens in the cache where decoding is timed


@dataclasses.dataclass
class Run:
    """Compare ways to prune and to distil over seeds, and measure the speed of decoding."""

    teacher: str = flag("out/base", "run folder or Hugging Face folder")
    student: str = flag("out/compressed", "compressed model; its speed is measured if it exists")
    data: str = flag("stdlib", "text for measuring and training")
    seeds: int = flag(3, "number of seeds", at_least=2)
    steps: int = flag(80, "optimizer steps of each training", at_least=1)
    batch_size: int = flag(8, "sequences per step", at_least=1)
    seq_len: int = flag(256, "tokens per sequence", at_least=1)
    samples: int = flag(48, "windows of text that importance is measured on", at_least=1)
    device: str = flag("auto", "auto, cuda, mps or cpu")
    compute_dtype: str = flag("auto", "float32 or bfloat16; auto: bfloat16 where it is fast",
                              choices=("auto", "float32", "bfloat16"))

    def __post_init__(self):
        check_flags(self)

    def compression(self, seed):
        """The prune_distill.Run of one seed."""
        shared = {name: v for name, v in vars(self).items() if name not in ("student", "seeds")}
        return prune_distill.Run(seed=seed, **shared)


def smaller_configs(config):
    """(a configuration of three quarters of each width; counts {layer type: layers} with one layer
    less of each type but attention; a configuration of all layers, narrowed to the size of these
    counts)."""
    three_quarters = lambda n, step: max(n * 3 // 4 // step * step, step)
    narrow = dataclasses.replace(config, d_model=three_quarters(config.d_model, 16),
                                 mlp_dim=three_quarters(config.mlp_dim, 16),
                                 mamba_heads=three_quarters(config.mamba_heads, config.n_groups))
    counts = {c: config.pattern.count(c) - (c != "*" and config.pattern.count(c) > 1)
              for c in "M*-"}
    size = with_counts(config, counts).n_params()
    slim = lambda d: dataclasses.replace(config, d_model=d, mlp_dim=max(
        config.mlp_dim * d // config.d_model // 16 * 16, 16))
    return narrow, counts, min(map(slim, range(config.d_model, 16, -8)),
                               key=lambda c: abs(c.n_params() - size))


def ablate(run, teacher, token_data, seed, note):
    """Run one seed. Calls note(name, loss) for each row of the table."""
    config, compression = teacher.config, run.compression(seed)
    narrow, counts, slim = smaller_configs(config)
    everything = list(range(len(config.pattern)))
    batches = calibration(compression, token_data, teacher.lm_head.weight.device)
    scores, kd = importance(teacher, batches), make_kd_loss(teacher)
    student = lambda new, layers, order=scores, worst=False: prune(teacher, keep_best(
        order, config, new, layers, worst)).float()

    generator = torch.Generator().manual_seed(seed)
    random = scores.map(lambda m: torch.rand(m.shape, generator=generator))
    for name, order in (("importance", scores), ("random", random), ("worst first", scores)):
        model = student(narrow, everything, order, worst=name == "worst first")
        note(f"pruned: {name}", validation_loss(compression, model, token_data))

    layers, _ = choose_layers(teacher, batches[:2], counts)
    deep = dataclasses.replace(config, pattern="".join(config.pattern[i] for i in layers))
    trial = compression.training(steps=-(-run.steps // TRIAL_SHARE))
    for name, new, kept in (("depth", deep, layers), ("width", slim, everything)):
        model = student(new, kept)
        size = f"by {name} to {new.n_params() / 1e6:.2f} M"
        note(f"pruned: {size}", validation_loss(compression, model, token_data))
        note(f"{trial.steps} steps of KD: {size}", train_briefly(trial, model, token_data, kd))

    torch.manual_seed(seed)
    scratch = HybridLM(narrow, teacher.compute_dtype).to(teacher.lm_head.weight.device)
    for name, model, loss_fn, lr in (
            ("KD", student(narrow, everything), kd, compression.lr),
            ("cross-entropy", student(narrow, everything), HybridLM.loss, compression.lr),
            ("from scratch", scratch, HybridLM.loss, train_fp8.Run.lr)):
        training = compression.training(lr=lr)
        note(f"trained: {name}", train_briefly(training, model, token_data, loss_fn))


@script(Run)
def main(run):
    device = pick_device(run.device)
    if device == "cpu":
        print(f"settings     {tune_cpu()}")
    dtype, speed = pick_dtype(run.compute_dtype, device), {}
    for name in ("teacher", "student"):
        if name == "teacher" or pathlib.Path(run.student).exists():
            model, _ = load_run(getattr(run, name), device, dtype)
            speed[name] = 1 / Measured(model, 1, CONTEXT, repeats=40).decode
            print(f"{name:13s}{speed[name]:.0f} tokens/s, {model.config.n_params() / 1e6:.2f} M "
                  "parameters")

    teacher, _ = load_run(run.teacher, device)
    teacher.requires_grad_(False)
    teacher.compute_dtype = dtype
    token_data, rows = load_text(run), collections.defaultdict(list)
    before = validation_loss(run, teacher, token_data)
    narrow, _, _ = smaller_configs(teacher.config)
    print(f"teacher      {before:.4f} nats per token; pruned to {describe(narrow)}, "
          f"{narrow.n_params() / 1e6:.2f} M parameters")
    for seed in tqdm(range(run.seeds), "seeds", disable=None):
        ablate(run, teacher, token_data, seed, lambda name, loss: rows[name].append(loss))

    table = {name: mean_and_spread(each) for name, each in rows.items()}
    print(f"{'':36s}{'loss':>9s}{'+-':>8s}   each seed")
    for name, row in table.items():
        print(f"{name:36s}{row['mean']:9.4f}{row['deviation']:8.4f}   "
              + " ".join(f"{loss:.4f}" for loss in row["each"]))
    return dict(teacher_val_loss=before, tokens_per_s=speed, table=table)


if __name__ == "__main__":
    main()
