"""How far the max stable learning rates of stability.py can be trusted, and what grows beyond them.

    seeds   Each search runs once per seed. Tables give the geometric mean and, after x/, one
            standard deviation over seeds as a factor.
    rules   Which trials converge depends on the definition, so there are three:
            as defined   the max stable learning rate of stability.py
            at the end   in addition, the last validation loss must be at most 1.05 times the best
            half kept    the learning rate at which half of what can be learned is lost
    order   The paper's order of the methods is checked pair by pair, where the spread allows it.
    norms   The norms of the first method that diverges are divided by those of converging trials:
            at the same learning rate, at its own max stable one, and at the lowest.

Each core (or GPU) runs one process. A trial is one line of trials.jsonl, and the same command
resumes a stopped sweep. Ratios can be compared with the paper's, learning rates cannot.

    python -m bench.stability                                   ten methods, three seeds; 35 min
    python -m bench.stability --preset toy-hybrid --out out/bench-stability-hybrid       50 min
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import math
import multiprocessing
import os
import pathlib
import signal
import statistics

import torch
from tqdm import tqdm

import stability
from common import flag, script, tune_cpu
from data import load_data
from stability import (METHODS, RATIO, get_bracket, get_outcomes, next_lr, open_trials, run_trial,
                       unigram_entropy)


@dataclasses.dataclass
class Run(stability.Run):
    """Search max stable learning rates over several seeds. The same command resumes in --out."""

    methods: str = flag(tuple(METHODS), "methods to search", nargs="+", session=True)
    resolution: float = flag(1.2, "factor to which max stable learning rates are found",
                             at_least=1, session=True)
    seed: int = flag(0, "the first seed", at_least=0, at_most=2 ** 60, session=True)
    seeds: int = flag(3, "number of seeds", at_least=1, session=True)
    workers: int = flag(0, "processes; 0: one per core, or per GPU", at_least=0, session=True)
    out: str = flag("out/bench-stability", "folder of the trials and the plot", session=True)

    @property
    def all_seeds(self):
        return range(self.seed, self.seed + self.seeds)


# ------------------------------------------------------------------------------------------------
# Trials, one process each

WORKER = {}     # in a process of the pool: the arguments of `run_trial` for all trials


def start_worker(run, config, tokenizer_json, devices):
    """Set up a process of the pool: one core or GPU, the text, no progress bars, Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TQDM_DISABLE"] = "1"
    device = devices.get()
    if device == "cpu":
        torch.set_num_threads(1)
        tune_cpu()
    text = load_data(run.data, run.tokenizer, config.vocab_size, tokenizer_json)
    WORKER.update(run=run, config=config, token_data=text, device=device)


def run_in_worker(method, lr, seed):
    run = dataclasses.replace(WORKER["run"], seed=seed)
    return run_trial(**WORKER | dict(run=run, method=method, lr=lr))


def next_trials(run, trials, busy):
    """Yield (method, lr, seed) of each search that is not finished and has no trial running."""
    for seed, method in itertools.product(run.all_seeds, run.methods):
        lr = next_lr(run.lr, get_outcomes(of_seed(trials, seed), method), run.resolution)
        if lr and (method, seed) not in busy:
            yield method, lr, seed


def of_seed(trials, seed):
    return [t for t in trials if t["seed"] == seed]


def run_trials(run, config, text, device, trials, add):
    """Run the remaining trials in a pool of processes."""
    count = torch.cuda.device_count() if device == "cuda" else os.cpu_count()
    workers, context, waiting = run.workers or count, multiprocessing.get_context("spawn"), {}
    devices = context.Queue()
    for i in range(workers):
        devices.put(f"cuda:{i % count}" if device == "cuda" else device)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, context, start_worker, (run, config, text.tokenizer_json, devices))
    try:
        with tqdm(unit="trial", initial=len(trials), disable=None) as bar:
            while True:
                for method, lr, seed in next_trials(run, trials, set(waiting.values())):
                    if len(waiting) < workers:
                        waiting[pool.submit(run_in_worker, method, lr, seed)] = method, seed
                if not waiting:
                    break
                for future in concurrent.futures.wait(
                        waiting, return_when=concurrent.futures.FIRST_COMPLETED).done:
                    del waiting[future]
                    trial = future.result()
                    add(trial)
                    bar.update()
                    tqdm.write(f"seed {trial['seed']}  {stability.describe(trial)}")
    except concurrent.futures.process.BrokenProcessPool:
        raise OSError(f"a process died, perhaps out of memory: {len(trials)} trials are kept, and "
                      "the same command resumes; try fewer --workers") from None
    finally:
        for child in multiprocessing.active_children() if waiting else ():
            child.terminate()           # runs on if an error or Ctrl-C ended the loop
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------
# Three rules: (trials of one seed, method, unigram entropy) -> a learning rate, or None


def find_max_lr(trials, method, unigram):
    return get_bracket(get_outcomes(trials, method))[0]


def find_max_lr_at_end(trials, method, unigram):
    """A trial has also diverged if its last loss is above RATIO times its best."""
    recovered = lambda t: t["evals"][-1][1] <= RATIO * min(loss for _, loss in t["evals"])
    return get_bracket({t["lr"]: bool(t["diverged"]) or not recovered(t)
                        for t in trials if t["method"] == method})[0]


def find_half_lr(trials, method, unigram):
    """The learning rate at which the last loss crosses the middle between the unigram entropy and
    the best last loss of any trial of the seed, interpolated linearly over log(lr). The last loss
    of a diverged trial counts as the unigram entropy."""
    last = lambda t: unigram if t["diverged"] else t["loss"]
    middle = (unigram + min(map(last, trials), default=unigram)) / 2
    mine = sorted((t["lr"], last(t)) for t in trials if t["method"] == method)
    for (low, before), (high, later) in itertools.pairwise(mine):
        if before <= middle < later:
            return low * (high / low) ** ((middle - before) / (later - before))
    return None


RULES = {"as defined": find_max_lr, "at the end": find_max_lr_at_end, "half kept": find_half_lr}


def summarise(run, trials, unigram):
    """{method: dict(lrs {rule: [by seed]}, ratios {rule: [to qk_norm, of seeds that have both]},
    open: whether some seed never diverged, losses [by seed, at the lowest learning rate])}."""
    table, by_seed = {}, [of_seed(trials, seed) for seed in run.all_seeds]
    loss = {(t["seed"], t["method"], t["lr"]): t["loss"] for t in trials}
    for method in run.methods:
        table[method] = dict(
            lrs={rule: [f(mine, method, unigram) for mine in by_seed] for rule, f in RULES.items()},
            open=any(get_bracket(get_outcomes(mine, method))[1] is None for mine in by_seed),
            losses=[loss.get((seed, method, run.lr[0])) for seed in run.all_seeds])
    for row in table.values():
        base = table.get("qk_norm", row)["lrs"]
        row["ratios"] = {rule: [a / b for a, b in zip(row["lrs"][rule], base[rule]) if a and b]
                         if "qk_norm" in table else [] for rule in RULES}
    return table


def log_mean(values):
    """(geometric mean, one standard deviation as a factor), (None, None) if a value is missing."""
    if not values or None in values:
        return None, None
    logs = [math.log(v) for v in values]
    return math.exp(statistics.mean(logs)), math.exp(statistics.stdev(logs) if logs[1:] else 0)


def format_mean(values):
    mean, factor = log_mean(values)
    return "-" if mean is None else f"{mean:.3g}" + f" x/ {factor:.2f}" * (len(values) > 1)


def print_table(run, table):
    """Print a Markdown table. A star marks a lower bound: some seed never diverged. The loss is the
    baseline's, for other methods the paired difference to it: mean and standard deviation."""
    print("\n| method | " + " | ".join(f"{rule}: lr | / qk_norm's" for rule in RULES)
          + f" | paper: / qk_norm's | loss at {run.lr[0]:g} |\n|" + "---|" * (3 + 2 * len(RULES)))
    base = table.get("baseline", {}).get("losses", [])
    for method, row in table.items():
        cells = [method + "*" * row["open"]] + [
            format_mean(row[what][rule]) for rule in RULES for what in ("lrs", "ratios")]
        gaps = [100 * (a / b - 1) for a, b in zip(row["losses"], base) if a and b]
        if method == "baseline" or not gaps:
            loss = f"{statistics.mean([v for v in row['losses'] if v] or [math.nan]):.3f}"
        else:
            loss = f"{statistics.mean(gaps):+.2f}"
            loss += (f" +- {statistics.stdev(gaps):.2f}" if gaps[1:] else "") + "%"
        paper = METHODS[method].paper[0] / METHODS["qk_norm"].paper[0]
        print(f"| {' | '.join(cells)} | {paper:.2g} | {loss} |")


def compare_order(table, resolution):
    """Verdicts on the paper's order, one line per pair of neighbouring groups. Two max stable
    learning rates differ if their ratio is above the resolution and above the spread of each."""
    groups = collections.defaultdict(list)
    for method in sorted(table, key=lambda method: METHODS[method].paper[0]):
        if log_mean(table[method]["lrs"]["as defined"])[0]:
            groups[METHODS[method].paper[0]].append(method)
    lines = []
    for lower, higher in itertools.pairwise(groups.values()):
        verdicts = []
        for a, b in itertools.product(lower, higher):
            (low, x), (high, y) = (log_mean(table[m]["lrs"]["as defined"]) for m in (a, b))
            unclear = math.inf if table[a]["open"] and table[b]["open"] else max(resolution, x, y)
            verdicts.append(f"{a} < {b} " + (
                "holds" if high > low * unclear else "is reversed" if low > high * unclear else
                "cannot be told"))
        lines.append("; ".join(verdicts))
    return lines


# ------------------------------------------------------------------------------------------------
# What grows


def pick_pairs(run, trials):
    """[(diverging trial, converging trial)] of one seed. The diverging trial is that of the first
    method that has one, at the lowest of --lr that diverged. The converging trials are another
    method (qk_norm if possible) at that learning rate, then the same method at its max stable and
    at its lowest learning rate."""
    at = {(t["method"], t["lr"]): t for t in trials if t["norms"]}
    for method in run.methods:
        bad = next((t for lr in run.lr if (t := at.get((method, lr))) and t["diverged"]), None)
        if bad:
            max_lr = get_bracket(get_outcomes(trials, method))[0]
            others = [(m, bad["lr"]) for m in ("qk_norm", "qkv_norm", *run.methods)]
            picks = [next((t for key in keys if (t := at.get(key)) and not t["diverged"]), None)
                     for keys in (others, [(method, max_lr)], [(method, run.lr[0])])]
            return [(bad, good) for i, good in enumerate(picks) if good and good not in picks[:i]]
    return []


def print_norms(bad, good):
    """Print the norms of a diverging trial over those of a converging one, at the last common step,
    and the first step at which outputs are over twice as large."""
    theirs = {row["step"]: row for row in good["norms"]}
    common = [(row, theirs[row["step"]]) for row in bad["norms"] if row["step"] in theirs]
    row, other = common[-1]
    logits = "".join(f" {m['logit']:.3g}" for m in (row, other) if "logit" in m) or " none"
    print(f"seed {bad['seed']}, {bad['method']} at {bad['lr']:g} over {good['method']} at "
          f"{good['lr']:g}, step {row['step']}; largest logits{logits}")
    for kind in (kind for kind in row if kind not in ("step", "logit")):
        ratio = lambda what: row[kind][what] / (other[kind][what] or math.nan)
        since = next((f"from step {a['step']}" for a, b in common
                      if a[kind]["output"] > 2 * b[kind]["output"]), "never")
        print(f"  {kind:10s}" + "".join(f"{what} {ratio(what):9.3g}x  " for what in row[kind])
              + f"output over 2x {since}")


def report(run, trials, unigram):
    """Print the tables, draw the plot, return the result."""
    table = summarise(run, trials, unigram)
    print(f"\n{run.seeds} seeds, resolution a factor of {run.resolution:g}; unigram entropy "
          f"{unigram:.3f} nats per token")
    print_table(run, table)
    for line in compare_order(table, run.resolution):
        print(f"order        {line}")
    pairs = [pair for seed in run.all_seeds for pair in pick_pairs(run, of_seed(trials, seed))]
    for pair in pairs:
        print_norms(*pair)
    if pairs:
        stability.plot_pair(*pairs[0], pathlib.Path(run.out) / "norms.png")
    mean = lambda what, rule: {m: log_mean(row[what][rule])[0] for m, row in table.items()}
    return dict(max_lr=mean("lrs", "as defined"),
                lower_bounds=[m for m, row in table.items() if row["open"]],
                ratio_to_qk_norm={rule: mean("ratios", rule) for rule in RULES},
                trials=len(trials), out=run.out)


@script(Run)
def main(run):
    if run.list:
        return stability.show_costs(run, run.config())
    device, text, config, settings = stability.prepare(run)
    with open_trials(run.out, settings, run.overwrite) as (trials, add):
        run_trials(run, config, text, device, trials, add)
        return report(run, trials, unigram_entropy(text, run))


if __name__ == "__main__":
    main()
