"""Speed of model.py against transformers' NemotronH: same weights, same batch, fp32.

The sides run in turn, each in fresh processes, and the ratios of their medians are printed:
`transformers` with its own settings, and `transformers, tuned` with the CPU settings of this
project (`common.tune_cpu`).

--learn compares what three shapes with equal numbers of parameters learn from equal numbers of
tokens: a hybrid, a transformer with rotary positions and a pure Mamba, all at one learning rate,
over several seeds. The first test is the loss on text. The second is multi-query associative recall
(MQAR, Zoology, arXiv 2312.04927). A row lists pairs of a key and a value; then the keys are
repeated in another order, and each must be followed by its value. Training has 8 pairs out of 32
keys, tests have 4 to 32. Embeddings begin with a standard deviation of 1 and attention has one head
of 64. With 0.11, the model's own, and heads of 16 the transformer did not learn it in 8,000 steps.

    python -m bench.model               ratios for training, prefill and decode; 3 min
    python -m bench.model --learn       loss and recall by shape and seed; 25 min
"""

import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy as np
import torch

import train_fp8
from bench.infer import equal_transformer
from bench.ssm import mean_and_spread, median_seconds
from common import check_flags, flag, script, tune_cpu, write_json
from data import load_data
from infer import decode_one, prefill, speed_up_decode
from model import HybridConfig, HybridLM, load_hf, save_hf

CONFIG = HybridConfig(pattern="M-M-M*-M-M*-", vocab_size=4096, d_model=256, mlp_dim=1024, n_heads=4,
                      n_kv_heads=2, head_dim=64, mamba_heads=8, mamba_head_dim=64, n_groups=2,
                      d_state=64, chunk_size=64)
HYBRID = dict(pattern="M-M*-M-", d_model=128, mlp_dim=512, n_heads=4, n_kv_heads=2, head_dim=32,
              mamba_heads=8, mamba_head_dim=32, n_groups=2, d_state=32)
SMALL = dict(pattern="M-*-M-", d_model=64, mlp_dim=128, n_heads=1, n_kv_heads=1, head_dim=64,
             mamba_heads=4, mamba_head_dim=32, n_groups=1, d_state=16)
KEYS, TRAINED, ASKED = 32, 8, (4, 8, 16, 32)    # recall: keys; pairs in training, in tests
SIDES = "this project", "transformers", "transformers, tuned"


def measure_ours(folder, tokens):
    """(model, loss(), prefill(rows) -> cache, decode(cache, last)) of this project."""
    model = speed_up_decode(load_hf(folder).eval())

    def run_prompt(rows):
        cache = model.init_cache(len(rows), tokens.shape[1] + 64)
        prefill(model, cache, rows)
        return cache
    return (model, lambda: model.loss(tokens, tokens.roll(-1, 1)), run_prompt,
            lambda cache, last: decode_one(model, cache, last[:, 0]))


def measure_theirs(folder, tokens):
    """The same for transformers."""
    import transformers         # the side of this project does not need it
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return (model, lambda: model(input_ids=tokens, labels=tokens).loss,
            lambda rows: model(input_ids=rows, use_cache=True, logits_to_keep=1).past_key_values,
            lambda cache, last: model(input_ids=last, past_key_values=cache, use_cache=True))


def measure(side, folder, batch, length):
    """Measure one side in this process and print tokens/s as JSON."""
    if side != "transformers":
        tune_cpu()
    torch.manual_seed(0)
    tokens = torch.randint(0, CONFIG.vocab_size, (batch, length))
    model, loss, run_prompt, decode = (measure_ours if side == SIDES[0] else measure_theirs)(
        folder, tokens)

    def step():
        loss().backward()
        model.zero_grad(set_to_none=True)
    result = dict(train=batch * length / median_seconds(step, repeats=7))
    model.eval()
    with torch.inference_mode():
        result["prefill"] = batch * length / median_seconds(lambda: run_prompt(tokens), repeats=7)
        for rows in (1, batch):
            cache, last = run_prompt(tokens[:rows]), tokens[:rows, :1]
            result[f"decode{rows}"] = rows / median_seconds(lambda: decode(cache, last), repeats=59)
    print(json.dumps(result))


def compare(batch=8, length=512, rounds=2):
    """Run the sides in turn, each in its own processes. Prints and returns medians and ratios."""
    runs = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_hf(HybridLM(CONFIG), folder)
        for side in SIDES * rounds:
            done = subprocess.run(
                [sys.executable, "-m", "bench.model", "--side", side, folder, str(batch),
                 str(length)], capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"{side}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"  {side}: {runs[side][-1]['train']:.0f} tokens/s in training", flush=True)

    keys = list(runs[SIDES[0]][0])
    median = {side: {k: statistics.median(r[k] for r in runs[side]) for k in keys}
              for side in SIDES}
    print(f"\n{CONFIG.pattern}, {CONFIG.n_params():,} parameters, batch {batch} x {length}, fp32, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}; tokens/s")
    print(f"{'':24s}" + "".join(f"{key:>12s}" for key in keys))
    for side in SIDES:
        print(f"{side:24s}" + "".join(f"{median[side][k]:12.0f}" for k in keys))
    ratios = {side: {k: median[SIDES[0]][k] / median[side][k] for k in keys} for side in SIDES[1:]}
    for side, row in ratios.items():
        print(f"against {side:24s}" + "   ".join(f"{k} {v:.2f}x" for k, v in row.items()))
    return dict(n_params=CONFIG.n_params(), tokens_per_s=median, ratios=ratios)


def shapes(vocab_size, base=HYBRID):
    """{name: configuration} of a hybrid, a transformer and a pure Mamba of equal width and size."""
    hybrid = HybridConfig(vocab_size=vocab_size, **base)
    mamba = dataclasses.replace(hybrid, pattern=hybrid.pattern.replace("*", "M"), mlp_dim=1)
    per_unit = 2 * hybrid.d_model * mamba.pattern.count("-")        # parameters per unit of mlp_dim
    width = 1 + (hybrid.n_params() - mamba.n_params()) // per_unit
    return {"hybrid": hybrid, "transformer": equal_transformer(hybrid),
            "pure Mamba": dataclasses.replace(mamba, mlp_dim=width)}


class RecallBatches:
    """Rows of pairs and questions, from a seed; `position`, the rows drawn so far, is all state."""

    def __init__(self, pairs, rows, seed):
        self.pairs, self.rows, self.seed, self.position = pairs, rows, seed, 0

    def next(self):
        """tokens, labels int64 (rows, 4 pairs): only the values that are asked for have a label."""
        rng = np.random.default_rng((self.seed, self.position))
        self.position += self.rows
        keys = rng.random((self.rows, KEYS)).argsort(1)[:, :self.pairs]
        told = np.stack([keys, KEYS + rng.integers(KEYS, size=keys.shape)], 2)
        order = rng.random(keys.shape).argsort(1)[..., None]
        asked = np.take_along_axis(told, order, 1)
        tokens = torch.from_numpy(np.concatenate([told, asked], 1).reshape(self.rows, -1))
        labels = torch.full_like(tokens, -100)
        labels[:, 2 * self.pairs::2] = tokens[:, 2 * self.pairs + 1::2]
        return tokens, labels, None


def learn_recall(config, seed, steps):
    """Train a model on TRAINED pairs. Returns {pairs: share of the values that it recalls}."""
    torch.manual_seed(seed)
    model, found = HybridLM(config), {}
    torch.nn.init.normal_(model.backbone.embeddings.weight)     # see the header
    training = train_fp8.Run(recipe="none", steps=steps, batch_size=64, seq_len=4 * TRAINED,
                             lr=3e-3, warmup=0.1, eval_every=steps)
    train_fp8.train(training, model, None, batches=RecallBatches(TRAINED, 64, seed))
    for pairs in ASKED:
        tokens, labels, _ = RecallBatches(pairs, 256, 10 ** 6).next()
        with torch.no_grad():
            said = model(tokens).argmax(-1)
        found[pairs] = (said == labels)[labels >= 0].double().mean().item()
    return found


def learn_text(run, config, seed, text):
    """Train a model on text. Returns its validation loss in nats per token."""
    torch.manual_seed(seed)
    model = HybridLM(config)
    training = train_fp8.Run(recipe="none", steps=run.steps, seed=seed, eval_every=run.steps)
    train_fp8.train(training, model, text)
    return train_fp8.evaluate(model, text.validation, 8, 256, limit=2 ** 16)


def compare_learning(run):
    """Train each shape with each seed: loss on the standard library's text, and recall."""
    tune_cpu()
    text, table = load_data(), {}
    small = shapes(2 * KEYS, SMALL)
    for name, config in shapes(text.vocab_size).items():
        losses, recalls = [], []
        for seed in range(run.seeds):
            losses.append(learn_text(run, config, seed, text))
            recalls.append(learn_recall(small[name], seed, run.recall_steps))
            print(f"{name:14s} seed {seed}   {losses[-1]:.4f} nats per token   recalled "
                  + ", ".join(f"{n} pairs {v:.1%}" for n, v in recalls[-1].items()), flush=True)
        table[name] = {"n_params": config.n_params(), "pattern": config.pattern,
                       "corpus loss": mean_and_spread(losses),
                       "recall n_params": small[name].n_params(),
                       "recall pattern": small[name].pattern}
        table[name] |= {f"recall, {n} pairs": mean_and_spread([r[n] for r in recalls])
                        for n in ASKED}
    pathlib.Path(run.out).mkdir(parents=True, exist_ok=True)
    write_json(pathlib.Path(run.out) / "model_shapes.json", table)
    return dict(tokens=2048 * run.steps, table=table)


@dataclasses.dataclass
class Run:
    """Compare training, prefill and decode with transformers, which must be installed."""
    batch: int = flag(8, "sequences per batch", at_least=1)
    length: int = flag(512, "tokens per sequence", at_least=1)
    rounds: int = flag(2, "processes per side", at_least=1)
    learn: bool = flag(False, "compare what three shapes learn instead")
    seeds: int = flag(3, "with --learn: seeds per shape", at_least=1)
    steps: int = flag(300, "with --learn: steps on text, 8 x 256 tokens each", at_least=1)
    recall_steps: int = flag(1500, "with --learn: steps on recall, 64 rows each", at_least=1)
    out: str = flag("out", "with --learn: folder of model_shapes.json")
    side: str = flag("", "internal: side, folder, batch and length of one process", nargs=4)

    def __post_init__(self):
        check_flags(self)


@script(Run)
def main(run):
    if run.side:
        side, folder, batch, length = run.side
        return measure(side, folder, int(batch), int(length))
    if run.learn:
        return compare_learning(run)
    return compare(run.batch, run.length, run.rounds)


if __name__ == "__main__":
    main()
