"""Accuracy of alignment over seeds, and of three shapes of model trained on its task from scratch.

    seeds    runs align.py and prune_distill.py once per seed, all from one base model: accuracy
             after SFT, GRPO and merging, by lines of thought, and of teacher, pruned and distilled
    shapes   trains a hybrid, a transformer with rotary positions and a pure Mamba of equal size on
             equal numbers of tokens: accuracy by length of the problem, with and without a thought,
             and by lines of thought; tokens of thought per second after long contexts

All runs are tested on the same problems, and no seed is trained on them. The accuracy on n problems
has a standard error of sqrt(p (1 - p) / n), at most 2.5% for 400. The tables print the standard
deviation over seeds.

    python -m bench.align               both parts, resumable; 50 min on 2 cores
    python -m bench.align --part shapes --seeds 1
"""

import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import statistics

import numpy as np
import torch

import align
import prune_distill
import train_fp8
from bench.infer import Measured
from bench.model import shapes
from bench.ssm import mean_and_spread
from common import check_flags, flag, read_rows, script, tune_cpu, write_json
from data import encoding_from_json, make_tokenizer
from infer import load_run, speed_up_decode
from model import HybridLM

LENGTHS, LONGER = (2, 3, 4), (2, 3, 4, 6)       # operations per problem: in training, in tests
TESTS, MANY = 400, 1000                         # problems of each length; of all, for a stage
CONTEXTS = (256, 1024, 4096, 16384)             # tokens in the cache where decoding is timed


@dataclasses.dataclass
class Run:
    """Accuracy over seeds, and of three shapes of model. The same command resumes in --out."""

    part: str = flag("both", "both, seeds or shapes", choices=("both", "seeds", "shapes"))
    seeds: int = flag(3, "number of seeds", at_least=1)
    base: str = flag("out/base", "seeds: run folder of train_fp8.py to start from")
    data: str = flag("stdlib", "seeds: text for align.py and prune_distill.py")
    steps: int = flag(300, "shapes: optimizer steps", at_least=1)
    batch_size: int = flag(16, "shapes: rows per step", at_least=1)
    lr: float = flag(3e-3, "shapes: peak learning rate", above=0)
    out: str = flag("out/bench-align", "folder of the runs, seeds.json and shapes.json")

    def __post_init__(self):
        check_flags(self)


def show(name, values):
    """Print a row of shares in percent. Returns their mean and spread."""
    row = mean_and_spread(values)
    spread = "" if row["deviation"] is None else f" +- {row['deviation']:.1%}"
    print(f"  {name:34s}{row['mean']:8.1%}{spread:9s}   " + " ".join(f"{v:.1%}" for v in values))
    return row


# ------------------------------------------------------------------------------------------------
# Seeds


def result_of(main, arguments, folder):
    """Run a script in a folder, unless it has finished there. Returns its reported values."""
    main([*arguments, "--out", str(folder)])
    rows = read_rows(folder / "metrics.jsonl")
    if not rows or "final" not in rows[-1]:
        raise KeyboardInterrupt                 # it was stopped; it can be resumed
    return rows[-1]["final"]


def recount(folder):
    """{stage: accuracy on MANY problems} of a folder that align.py wrote. The merged model is the
    mean of those before and after RL, so that the latter is twice the merged one less SFT's."""
    (sft, encoding), (merged, _) = (load_run(path) for path in (folder / "sft", folder))
    models = dict(sft=sft, rl=align.merge(sft.float(), merged.float(), 2.0), merged=merged)
    problems = align.draw_problems(np.random.default_rng((9, 9)), MANY, LENGTHS, test=True)
    with torch.no_grad():
        return {name: align.accuracy(model, encoding, problems)[0]
                for name, model in models.items()}


def measure_seeds(run):
    """Run the pipeline once per seed, all from one base. Returns tables of accuracy and loss."""
    aligned, compressed = [], []
    for seed in map(str, range(run.seeds)):
        folder = pathlib.Path(run.out) / f"seed-{seed}"
        shared = ["--data", run.data, "--seed", seed]
        aligned.append(result_of(align.main, ["--base", run.base, *shared], folder))
        compressed.append(result_of(
            prune_distill.main, ["--teacher", str(folder), "--no-scratch", *shared],
            folder.with_name(f"seed-{seed}-compressed")))
    column = lambda rows, key: [row[key] for row in rows]
    stages = [recount(pathlib.Path(run.out) / f"seed-{seed}") for seed in range(run.seeds)]
    print(f"\naccuracy, mean and standard deviation over {run.seeds} seeds, each seed; of "
          f"{MANY} problems after SFT, RL and merging, else of {align.TESTS}")
    table = {"base": show("base", column(aligned, "accuracy_base"))}
    table |= {name: show(name, column(stages, name)) for name in ("sft", "rl", "merged")}
    table["rl - sft"] = show("rl - sft", [a - b for a, b in zip(table["rl"]["each"],
                                                                table["sft"]["each"])])
    for lines in aligned[0]["accuracy_by_budget"]:
        name = f"{lines} lines of thought"
        table[name] = show(name, [row["accuracy_by_budget"][lines] for row in aligned])
    for name in ("no_thought", "wrong_thought"):
        table[name] = show(f"right answers with {name.replace('_', ' ')}", column(aligned, name))
    for name in ("teacher", "pruned", "student"):
        table[name] = show(name, column(compressed, f"{name}_accuracy"))
    table["student / teacher"] = show("student / teacher", [
        a / b for a, b in zip(table["student"]["each"], table["teacher"]["each"])])
    for name in ("teacher", "pruned", "student"):
        table[f"{name} loss"] = mean_and_spread(column(compressed, f"{name}_val_loss"))
    return table


# ------------------------------------------------------------------------------------------------
# Shapes


def learn(run, name, seed, tokenizer_json):
    """Train one shape with one seed on the task alone. Returns dict(shape, seed, loss: mean of the
    last 20 steps, accuracy: by length of the problem and lines of thought)."""
    torch.set_num_threads(1)
    tune_cpu()
    torch.manual_seed(seed)
    encoding = encoding_from_json(tokenizer_json)
    model = HybridLM(shapes(-(-encoding.n_vocab // 16) * 16)[name])
    task = align.Run(lengths=LENGTHS, text_share=0, batch_size=run.batch_size, seed=seed)
    training = train_fp8.Run(recipe="none", steps=run.steps, batch_size=run.batch_size, lr=run.lr,
                             seq_len=align.SEQ_LEN, warmup=0.05, decay=0.5, eval_every=run.steps)
    rows = train_fp8.train(training, model, None,
                           batches=align.Conversations(encoding, task, None, align.SEQ_LEN))
    model, found = speed_up_decode(model.eval()), {}
    for length in LONGER:
        problems = align.draw_problems(np.random.default_rng(9), TESTS, [length], test=True)
        budgets = [None, *range(length + 1)] if length == LENGTHS[-1] else [None, 0]
        for lines in budgets:
            key = f"{length} steps, {'any' if lines is None else lines} lines"
            found[key] = align.accuracy(model, encoding, problems, lines)[0]
    return dict(shape=name, seed=seed, loss=statistics.mean(r["loss"] for r in rows[-20:]),
                accuracy=found)


def measure_shapes(run):
    """Train every shape with every seed, one process per core. Then time decoding, one by one."""
    tokenizer_json = make_tokenizer("bytes", [], 0)
    configs = shapes(-(-encoding_from_json(tokenizer_json).n_vocab // 16) * 16)
    for name, config in configs.items():
        print(f"{name:14s}{config.pattern:16s}{config.n_params():10,d} parameters")
    done, folder = {}, pathlib.Path(run.out) / "shapes"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TQDM_DISABLE"] = "1"
    with concurrent.futures.ProcessPoolExecutor(
            os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for name, seed in itertools.product(configs, range(run.seeds)):
            path = folder / (f"{name.replace(' ', '-')}-{seed}-{run.steps}-{run.batch_size}-"
                             f"{run.lr:g}.json")
            if path.exists():
                done[name, seed] = json.loads(path.read_text())
            else:
                done[name, seed] = pool.submit(learn, run, name, seed, tokenizer_json)
                done[name, seed].add_done_callback(
                    lambda job, path=path: write_json(path, job.result()))
        done = {key: job if isinstance(job, dict) else job.result() for key, job in done.items()}

    table = {}
    for name in configs:
        mine = [done[name, seed] for seed in range(run.seeds)]
        print(f"\n{name}: accuracy on {TESTS} problems, trained on {LENGTHS} operations")
        table[name] = {key: show(key, [m["accuracy"][key] for m in mine])
                       for key in mine[0]["accuracy"]}
        table[name]["loss"] = mean_and_spread([m["loss"] for m in mine])
    print(f"\n{tune_cpu()}; tokens of thought per second, 8 rows, by tokens in the cache\n{'':14s}"
          + "".join(f"{n:9d}" for n in CONTEXTS))
    for name, config in configs.items():
        model = speed_up_decode(HybridLM(config).eval())
        table[name]["thought_tokens_per_s"] = speed = {
            n: 8 / Measured(model, 8, n).decode for n in CONTEXTS}
        print(f"{name:14s}" + "".join(f"{v:9.0f}" for v in speed.values()), flush=True)
    return table


@script(Run)
def main(run):
    result = {}
    for part, measure in (("seeds", measure_seeds), ("shapes", measure_shapes)):
        if run.part in ("both", part):
            result[part] = measure(run)
            write_json(pathlib.Path(run.out) / f"{part}.json", result[part])
    return result


if __name__ == "__main__":
    main()
