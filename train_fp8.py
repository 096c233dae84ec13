"""Pre-training: the loop of the Nemotron papers, small enough for a laptop and the same on GPUs.

AdamW (0.9, 0.95, weight decay 0.1), clip 1.0, a warmup-stable-decay schedule, packed windows, and a
checkpoint that a kill at any moment cannot spoil. Sources: Nemotron-H, arXiv 2504.03624 (section
2.3) and Nemotron Nano 2, arXiv 2508.14444 (section 2): 8192-token sequences in batches of 6 M
tokens, WSD from 4.5e-4 to 4.5e-6 with the decay over the last 18% of 20 T tokens. The toy keeps the
shape of that and changes the numbers.

Precision, without autocast: parameters and optimizer states are fp32; the residual stream and every
matmul run in the compute dtype (bf16 on a GPU; on a CPU whichever of bf16 and fp32 was faster in a
measured step); norms, decays, states and the loss are fp32. --recipe is bf16 so far; the FP8
recipes are the next stage.

Glossary: as in model.py. WSD: linear warmup, constant, decay to lr x min_lr by 1 - sqrt. gnorm:
gradient norm before clipping. bpb: bits a byte, nats / ln 2 / bytes of text, comparable between
tokenizers and with xz.

The run folder: config.json + model.safetensors (transformers opens it as NemotronH),
tokenizer.json, metrics.jsonl, loss.png, and train_state.pt: everything that resuming needs, in one
file, renamed into place. Running into the same folder again continues; a folder of another run is
refused unless --overwrite.

Left out (so far): FP8, several GPUs, activation checkpointing, data phases.

    python train_fp8.py                     the toy on the standard library's text; 5 min on 2 cores
    python train_fp8.py --data my_texts/ --out out/mine
    python train_fp8.py --preset small --data shards/ --steps 20000 --seq-len 2048     one GPU
"""

import dataclasses
import json
import math
import pathlib
import signal
import sys
import time

import torch
from tqdm import tqdm

from data import Batches, load_data, parse_flags, run_script, validation_batches
from model import (HybridConfig, HybridLM, median_seconds, replace_file, save_hf, tune_cpu,
                   write_text)

RECIPES = ("bf16",)


@dataclasses.dataclass
class Run:
    """Train a hybrid language model. Continues what is in --out if it is the same run."""

    preset: str = "toy"             # a name from model.py
    pattern: str = ""               # another layer pattern than the preset's
    data: str = "stdlib"            # stdlib, a text file, a folder of text, or a folder of shards
    tokenizer: str = "bpe"          # bpe, bytes, a tokenizer.json, or a tiktoken name (downloads)
    reset_documents: bool = False  # nothing crosses a document border: scan, convolution, attention
    recipe: str = "bf16"            # bf16 (FP8 recipes are the next stage)
    steps: int = 1000               # optimizer steps
    batch_size: int = 8             # sequences a step, over all accumulation steps
    grad_accum: int = 1             # backward passes a step
    seq_len: int = 256              # tokens a sequence
    lr: float = 3e-3                # peak learning rate
    min_lr: float = 0.01            # last learning rate as a fraction of lr
    warmup: float = 0.02            # fraction of steps
    decay: float = 0.3              # fraction of steps, at the end
    weight_decay: float = 0.1       # on matrices; none on norms, biases, A_log, D, dt_bias
    clip: float = 1.0               # largest gradient norm
    eval_every: int = 200           # steps between evaluations on a part of the validation text
    save_every: int = 200           # steps between checkpoints
    seed: int = 0                   # of initialisation and data order
    device: str = "auto"            # auto, cuda, mps or cpu
    compute_dtype: str = "auto"     # auto, float32 or bfloat16
    out: str = "out/base"           # run folder
    resume: bool = False            # continue --out, and fail if there is nothing to continue
    overwrite: bool = False         # start anew in --out even if it holds another run
    stop_after: int = 0  # leave off, resumable, after this many steps of this session; 0 = never

    def __post_init__(self):
        if self.recipe not in RECIPES:
            raise ValueError(f"--recipe is {self.recipe!r}, must be one of {', '.join(RECIPES)}")
        for name in ("steps", "batch_size", "grad_accum", "seq_len", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, must be "
                                 f"at least 1")
        if self.batch_size % self.grad_accum:
            raise ValueError(f"--batch-size {self.batch_size} must be a multiple of --grad-accum "
                             f"{self.grad_accum}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} is {getattr(self, name)}, must be positive")
        for name in ("weight_decay", "seed", "stop_after"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, must be "
                                 "at least 0")
        for name in ("min_lr", "warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, must be "
                                 "from 0 to 1")
        if self.warmup + self.decay > 1:
            raise ValueError(f"--warmup {self.warmup} + --decay {self.decay} must be at most 1")
        if self.resume and self.overwrite:
            raise ValueError("--resume continues, --overwrite starts anew: give one of them")


SESSION_FLAGS = ("device", "out", "resume", "overwrite", "stop_after", "eval_every", "save_every")


# ------------------------------------------------------------------------------------------------
# Schedule, optimizer, evaluation


def wsd(step, steps, lr, warmup=0.02, decay=0.3, min_lr=0.01):
    """Learning rate of step 0 <= step < steps: linear warmup, constant, then down as 1 - sqrt.

    warmup and decay are fractions of steps. The last step has exactly lr * min_lr.
    """
    warm, down = round(warmup * steps), round(decay * steps)
    if step < warm:
        return lr * (step + 1) / warm
    left = steps - 1 - step
    if left >= down:
        return lr
    return lr * (min_lr + (1 - min_lr) * (1 - math.sqrt(1 - left / down)))


def make_optimizer(model, lr, weight_decay):
    """AdamW (0.9, 0.95): decay on matrices, none on norms, biases, A_log, D, dt_bias."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=decayed, weight_decay=weight_decay),
              dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


@torch.no_grad()
def evaluate(model, stream, batch_size=8, seq_len=512, separator=None, limit=None, progress=False):
    """Mean nats a token over the stream (or its first `limit` tokens), every token predicted
    once.
    """
    device, total, count = model.lm_head.weight.device, 0.0, 0
    batches = validation_batches(stream, batch_size, seq_len, separator, limit)
    for tokens, labels, seq_idx in tqdm(batches, "evaluating", disable=None if progress else True,
                                        leave=False):
        kept = int((labels >= 0).sum())
        seq_idx = None if seq_idx is None else seq_idx.to(device)
        total += float(model.loss(tokens.to(device), labels.to(device), seq_idx)) * kept
        count += kept
    return total / count


def bits_per_byte(nats_per_token, tokens, text_bytes):
    """Of a stream of so many tokens that encode so many bytes of text."""
    return nats_per_token * tokens / text_bytes / math.log(2)


def faster_dtype(model, tokens, labels):
    """(dtype, seconds a pass) of bf16 or fp32, whichever is faster forward and backward here."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.compute_dtype = dtype
        seconds[dtype] = median_seconds(lambda: model.loss(tokens, labels).backward(),
                                        tokens.device, repeats=3)
    model.zero_grad(set_to_none=True)
    best = min(seconds, key=seconds.get)
    print(f"measured     a pass takes {1e3 * seconds[torch.float32]:.0f} ms in fp32, "
          f"{1e3 * seconds[torch.bfloat16]:.0f} ms in bf16: {str(best)[6:]}")
    return best, seconds[best]


# ------------------------------------------------------------------------------------------------
# The run folder


def same_run(saved, run):
    """None, or the first flag in which a saved run differs from this one, in words."""
    for name, value in dataclasses.asdict(run).items():
        if name not in SESSION_FLAGS and saved.get(name) != value:
            return f"{name} {saved.get(name)!r}, now {value!r}"


RUN_FILES = ("config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl",
             "train_state.pt", "loss.png")


def open_folder(run):
    """The state to continue from, or None for a fresh start; writes nothing.

    Raises FileExistsError rather than mixing two runs, ValueError for a state that is not one.
    """
    folder = pathlib.Path(run.out)
    state_file = folder / "train_state.pt"
    if run.overwrite:
        return None
    if state_file.exists():
        try:
            state = torch.load(state_file, map_location="cpu", weights_only=True)
            difference = same_run(state["run"], run)
        except Exception as error:      # torch raises many kinds for a file that is not its own
            raise ValueError(f"{state_file} cannot be read ({type(error).__name__}): move it "
                             "away, or --overwrite") from None
        if difference:
            raise FileExistsError(f"{folder} holds another run ({difference}): choose another "
                                  "--out, or --overwrite")
        return state
    if run.resume:
        raise FileNotFoundError(f"{state_file} does not exist: nothing to resume")
    foreign = [name for name in RUN_FILES if (folder / name).exists()]
    if foreign:
        raise FileExistsError(f"{folder} holds a {foreign[0]} that this run did not make: choose "
                              "another --out, or --overwrite")
    return None


def clear_folder(run):
    """Make the folder, remove what an overwritten run left; last the state, which guards it."""
    folder = pathlib.Path(run.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(RUN_FILES, key=lambda name: name == "train_state.pt"):
        (folder / name).unlink(missing_ok=True)


def save_state(run, model, optimizer, batches, step, token_data, matmul):
    """train_state.pt: all that resuming needs, whole or not at all."""
    state = dict(run=dataclasses.asdict(run), step=step, position=batches.position,
                 model=model.state_dict(), optimizer=optimizer.state_dict(),
                 fingerprint=token_data.fingerprint, tokenizer_json=token_data.tokenizer_json,
                 rng=torch.get_rng_state(), compute_dtype=str(model.compute_dtype)[6:],
                 matmul=matmul)
    path = pathlib.Path(run.out) / "train_state.pt"
    replace_file(path, lambda temporary: torch.save(state, temporary))


def read_rows(path):
    """The objects of metrics.jsonl; a line that was cut short ends them."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def finished_result(run):
    """The result of a run that has ended and reported, or None."""
    rows = read_rows(pathlib.Path(run.out) / "metrics.jsonl")
    return rows[-1].get("final") if rows else None


class Metrics:
    """metrics.jsonl: one object a step. On resuming, lines after the checkpoint are dropped."""

    def __init__(self, path, step):
        self.rows = [row for row in read_rows(path) if row["step"] <= step and "loss" in row]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_text(path, text)
        self.file = open(path, "a", encoding="utf-8")

    def write(self, **row):
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


class StopRequest:
    """Ctrl-C asks the loop to stop after its step; a second one interrupts at once."""

    def __enter__(self):
        self.asked, self.before = False, signal.signal(signal.SIGINT, self.ask)
        return self

    def ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, self.before)
        tqdm.write("stopping after this step (Ctrl-C again to stop at once)", file=sys.stderr)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


# ------------------------------------------------------------------------------------------------
# The loop


def train_step(model, optimizer, batches, run, lr, device):
    """One optimizer step: accumulate, clip, update. Returns the mean loss and the gradient norm, as
    floats.
    """
    total = 0.0
    for _ in range(run.grad_accum):
        tokens, labels, seq_idx = (None if m is None else m.to(device, non_blocking=True)
                                   for m in batches.next())
        loss = model.loss(tokens, labels, seq_idx) / run.grad_accum
        loss.backward()
        total += loss.detach()
    gnorm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
    if not math.isfinite(total) or not math.isfinite(gnorm):
        raise ValueError(f"the loss is {float(total):g} and the gradient norm {float(gnorm):g}: "
                         f"start anew with --overwrite and a lower --lr (it was {run.lr:g}); the "
                         "last checkpoint is from before")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(total), float(gnorm)


def make_batches(run, token_data, position=0):
    """The run's training windows from a position on. Raises ValueError if the text is too short."""
    separator = token_data.separator if run.reset_documents else None
    return Batches(token_data.train, run.batch_size // run.grad_accum, run.seq_len, run.seed,
                   position, separator)


def train(run, model, token_data, state=None, matmul=None):
    """Train model as run says, from state if given. Returns (last step, rows of metrics.jsonl).

    Writes train_state.pt at the start, every save_every steps, on Ctrl-C and at the end, so that
    stopping loses nothing and N + N steps equal 2N bit for bit on a CPU. Raises ValueError, and
    keeps the last checkpoint, when the loss or the gradient is not finite.
    """
    device, separator = model.lm_head.weight.device, token_data.separator
    optimizer = make_optimizer(model, run.lr, run.weight_decay)
    first = saved = 0 if state is None else state["step"]
    batches = make_batches(run, token_data, 0 if state is None else state["position"])
    save = lambda step: save_state(run, model, optimizer, batches, step, token_data, matmul)
    if state is None:
        save(0)
    else:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
    last = run.steps if not run.stop_after else min(run.steps, first + run.stop_after)
    metrics, step = Metrics(pathlib.Path(run.out) / "metrics.jsonl", first), first
    tokens_a_step = run.batch_size * run.seq_len

    with StopRequest() as stop, tqdm(total=run.steps, initial=first, unit="step",
                                     disable=None) as bar:
        while step < last and not stop.asked:
            start = time.perf_counter()
            lr = wsd(step, run.steps, run.lr, run.warmup, run.decay, run.min_lr)
            loss, gnorm = train_step(model, optimizer, batches, run, lr, device)
            seconds, step = time.perf_counter() - start, step + 1
            row = dict(step=step, loss=loss, gnorm=gnorm, lr=lr, ms=1e3 * seconds,
                       tokens=step * tokens_a_step)
            if step % run.eval_every == 0 and step < run.steps:
                row["val_loss"] = evaluate(model, token_data.validation, run.batch_size,
                                           run.seq_len, separator if run.reset_documents else None,
                                           limit=8 * tokens_a_step)
            metrics.write(**row)
            bar.update()
            tqdm.write(log_line(row, run.steps, tokens_a_step), file=sys.stdout)
            if step % run.save_every == 0:
                save(step)
                saved = step
    if step > saved:
        save(step)
    return step, metrics.rows


def log_line(row, steps, tokens_a_step):
    rate = tokens_a_step / row["ms"]
    validation = f" | val {row['val_loss']:.3f}" if "val_loss" in row else ""
    return (f"step {row['step']:{len(str(steps))}d}/{steps} | loss {row['loss']:.3f} | gnorm "
            f"{row['gnorm']:.2f} | "
            f"lr {row['lr']:.1e} | {row['ms']:.0f} ms | {rate:.1f}k tok/s{validation}")


def plot_loss(rows, val_loss, val_bpb, xz, path):
    """Training loss (and its running mean), validation points, and the schedule below."""
    from matplotlib.figure import Figure
    tokens = [row["tokens"] / 1e6 for row in rows]
    smooth, mean = [], rows[0]["loss"]
    for row in rows:
        mean = 0.95 * mean + 0.05 * row["loss"]
        smooth.append(mean)
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axis, below = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
    axis.plot(tokens, [row["loss"] for row in rows], color="#4c72b0", alpha=0.25, linewidth=0.8)
    axis.plot(tokens, smooth, color="#4c72b0", label="training, running mean")
    seen = [(row["tokens"] / 1e6, row["val_loss"]) for row in rows if "val_loss" in row]
    axis.plot(*zip(*seen, (tokens[-1], val_loss)), "o-", color="#c44e52", label="validation")
    against = "" if xz is None else f", xz -9e needs {xz:.2f}"
    axis.set(ylabel="loss [nats a token]",
             ylim=(min(val_loss, smooth[-1]) - 0.2, min(6, rows[0]["loss"])),
             title=f"Validation ends at {val_bpb:.3f} bits a byte{against}")
    axis.grid(alpha=0.3)
    axis.legend()
    below.plot(tokens, [row["lr"] for row in rows], color="#55a868")
    below.set(ylabel="lr", xlabel="tokens [millions]")
    below.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------
# python train_fp8.py


def announce(run, config, token_data, device):
    """What is about to happen, in numbers."""
    tokens = run.steps * run.batch_size * run.seq_len
    flops = 3 * sum(config.flops_by_part(run.seq_len).values())
    corpus = token_data.fingerprint
    print(f"model        {config.pattern}: {config.n_params() / 1e6:.2f} M parameters, "
          f"d_model {config.d_model}, vocabulary {config.vocab_size}")
    print(f"corpus       {corpus['source']}: {corpus['bytes'] / 1e6:.2f} MB, "
          f"{len(token_data.train) / 1e6:.2f} M training tokens, sha256 {corpus['sha256'][:12]}")
    print(f"run          {run.steps} steps x {run.batch_size} x {run.seq_len} = "
          f"{tokens / 1e6:.2f} M tokens ({tokens / len(token_data.train):.1f} epochs), "
          f"{flops * tokens / 1e15:.2f} PFLOP, on {device}")


def body(run):
    from infer import generate, pick_device, pick_dtype
    start, folder = time.perf_counter(), pathlib.Path(run.out)
    device, dtype = pick_device(run.device), pick_dtype(run.compute_dtype)
    state = open_folder(run)
    if state is not None and state["step"] == run.steps and finished_result(run):
        print(f"finished already: {folder} holds all {run.steps} steps (--overwrite trains anew)")
        return finished_result(run)

    config = HybridConfig.preset(run.preset, **(dict(pattern=run.pattern) if run.pattern else {}))
    token_data = load_data(run.data, run.tokenizer, config.vocab_size,
                           state and state["tokenizer_json"])
    if state is not None and state["fingerprint"] != token_data.fingerprint:
        raise ValueError(f"the corpus or its tokenizer has changed since {folder} was begun: "
                         f"{state['fingerprint']}, now {token_data.fingerprint}")
    trial = make_batches(run, token_data).next()
    config = dataclasses.replace(config, vocab_size=token_data.vocab_size,
                                 bos_token_id=token_data.separator)
    torch.manual_seed(run.seed)
    model = HybridLM(config).to(device)
    announce(run, config, token_data, device)

    matmul = None
    if device == "cpu":
        print(f"settings     {tune_cpu(state and state['matmul'])}")
        matmul = torch.backends.mkldnn.matmul.fp32_precision
    if state is not None:
        model.compute_dtype = getattr(torch, state["compute_dtype"])
        print(f"resuming     at step {state['step']} of {run.steps}")
    elif dtype is None and device == "cpu":
        model.compute_dtype, seconds = faster_dtype(model, *trial[:2])
        print(f"predicted    {run.steps * run.grad_accum * seconds / 60:.1f} minutes of training")
    else:
        model.compute_dtype = dtype or torch.bfloat16

    if state is None:
        clear_folder(run)           # nothing was written before every flag and file proved good
    step, rows = train(run, model, token_data, state, matmul)
    write_text(folder / "tokenizer.json", token_data.tokenizer_json)
    save_hf(model, folder)
    if step < run.steps:
        print(f"stopped at step {step} of {run.steps}, saved; the same command continues")
        return dict(recipe=run.recipe, step=step, out=run.out)
    result = report(run, model, token_data, rows, start, generate)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(step=run.steps, final=result)) + "\n")
    return result


def report(run, model, token_data, rows, start, generate):
    """The whole validation text, the plot, a sample, and the last line's values."""
    separator = token_data.separator if run.reset_documents else None
    stream = token_data.validation
    val_loss = evaluate(model, stream, run.batch_size, run.seq_len, separator, progress=True)
    val_bpb = bits_per_byte(val_loss, len(stream) - 1, token_data.validation_bytes)
    xz = token_data.validation_xz
    picture = pathlib.Path(run.out) / "loss.png"
    if rows:
        plot_loss(rows, val_loss, val_bpb, xz, picture)
    against = "" if xz is None else f"; xz -9e needs {xz:.3f} on the same text"
    print(f"\nvalidation   {val_loss:.4f} nats a token, {val_bpb:.4f} bits a byte{against}")
    print(f"plot         {picture}")
    model.eval()
    print("sample")
    prompt = "def read_"
    print(prompt + "".join(generate(model, token_data.encoding, prompt, 120, temperature=0.7,
                                    seed=run.seed)))
    tokens_a_step = run.batch_size * run.seq_len
    seconds = sum(row["ms"] for row in rows) / 1e3          # of the steps that are in the log
    return dict(recipe=run.recipe, val_loss=val_loss, val_bpb=val_bpb, xz_bpb=xz,
                tokens=run.steps * tokens_a_step, seconds=seconds,
                tokens_per_s=len(rows) * tokens_a_step / seconds if rows else None,
                compute_dtype=str(model.compute_dtype)[6:],
                wall_seconds=time.perf_counter() - start, out=run.out)


def main(argv=None):
    run_script(body, parse_flags(Run, argv))


if __name__ == "__main__":
    main()
