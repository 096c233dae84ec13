"""Inference: load a run or a released checkpoint, prefill, decode one token at a time, stream text.

    prefill(model, cache, tokens)        the prompt, in blocks, logits of its last token alone
    decode_one(model, cache, token)      one token: constant work in the Mamba layers
    sample(logits, ...)                  temperature, top-k, top-p, one generator a call
    generate(model, encoding, prompt)    the three of them as a stream of complete UTF-8 text

A hybrid needs no position ids and no attention mask to decode: the cache is the position. Sources:
Nemotron Nano 2, arXiv 2508.14444 (sampling settings in section 4); fp32 states as the released
model cards ask.

Glossary: as in model.py. prefill: run the prompt; decode: one new token; stop: text that ends the
answer.

Left out (so far): the memory plan, chat template and thinking budget, int8 weights, CUDA graphs,
benchmarks.

    python infer.py                                        continue a prompt; 5 s on 2 cores
    python infer.py --prompt "def main(" --temperature 0.7 --tokens 300
    python infer.py --checkpoint FOLDER                    any Nemotron-H with tokenizer.json
"""

import codecs
import dataclasses
import pathlib
import sys
import time

import torch

from data import assigned_ids, encoding_from_json, parse_flags, run_script, separator_id
from model import decode_settings, load_hf, tune_cpu

# ------------------------------------------------------------------------------------------------
# Loading


def load_run(folder, device="cpu", dtype=None):
    """(model in eval mode, tiktoken.Encoding) of a run folder or a Hugging Face folder with
    tokenizer.json.

    Raises FileNotFoundError or ValueError with one line: nothing there, no tokenizer, vocabulary of
    another model.
    """
    folder = pathlib.Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: train one with python train_fp8.py "
                                f"--out {folder}, "
                                "or name a folder with --checkpoint")
    if not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(f"{folder} has no tokenizer.json beside its config.json")
    encoding = encoding_from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = load_hf(folder, device, dtype).eval()
    if encoding.n_vocab > model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {encoding.n_vocab} entries, the model "
                         f"{model.config.vocab_size}: they do not belong together")
    return model, encoding


# ------------------------------------------------------------------------------------------------
# The three steps of generation


@torch.inference_mode()
def prefill(model, cache, tokens, block=1024):
    """Run tokens (b, t) into the cache in blocks, so that memory does not grow with t; last logits
    (b, v).
    """
    for piece in tokens.split(block, 1):
        logits = model(piece, cache, last_only=True)
    return logits[:, -1]


@torch.inference_mode()
def decode_one(model, cache, token):
    """One token a row, (b,) -> logits (b, v)."""
    with decode_settings():
        return model(token[:, None], cache)[:, -1]


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Token ids (b,) from logits (b, v). temperature 0 is argmax; top_k 0 and top_p 1 keep
    everything.

    top_p keeps the fewest tokens whose probability reaches p (the one that crosses it included).
    Filters in fp32.
    """
    if temperature < 1e-4:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        sorted_logits, order = logits.sort(-1, descending=True)
        probability = sorted_logits.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def check_sampling(temperature, top_k, top_p):
    """Raises ValueError, naming what is out of range."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, must be 0 (greedy) or more")
    if top_k < 0:
        raise ValueError(f"top-k is {top_k}, must be 0 (off) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top-p is {top_p}, must be above 0 and at most 1")


class TextStream:
    """Token bytes in, text out: only complete UTF-8, and nothing that may be the start of a stop
    string.
    """

    def __init__(self, stop=()):
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stop, self.pending, self.stopped = [s for s in stop if s], "", False

    def feed(self, raw, final=False):
        """The text that can be shown now. Sets .stopped once a stop string is complete; it is never
        shown.
        """
        self.pending += self.decoder.decode(raw, final)
        found = [i for i in (self.pending.find(s) for s in self.stop) if i >= 0]
        if found:
            self.stopped, text, self.pending = True, self.pending[:min(found)], ""
            return text
        hold = 0 if final else max((n for s in self.stop for n in range(1, len(s))
                                    if self.pending.endswith(s[:n])), default=0)
        cut = len(self.pending) - hold
        text, self.pending = self.pending[:cut], self.pending[cut:]
        return text


def generate(model, encoding, prompt, max_tokens=200, temperature=0.8, top_k=0, top_p=0.95,
             seed=0, stop=(), max_len=None, stats=None):
    """Yield the continuation of prompt (str) piece by piece: complete UTF-8, up to max_tokens or a
    stop.

    Stops at the separator token, at any of the stop strings (not shown) and after max_tokens.
    max_len: tokens of the cache, prompt + max_tokens by default. stats: a dict that receives
    timings. Raises ValueError for an empty prompt without separator, settings out of range, or a
    prompt longer than the cache.
    """
    check_sampling(temperature, top_k, top_p)
    separator = separator_id(encoding)
    ids = [separator, *encoding.encode_ordinary(prompt)]
    max_len = max_len or len(ids) + max_tokens
    if len(ids) > max_len:
        raise ValueError(f"the prompt has {len(ids)} tokens, the cache holds {max_len}")
    device = model.backbone.embeddings.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    cache = model.init_cache(1, max_len)
    stream = TextStream(stop)
    unassigned = torch.full((model.config.vocab_size,), -torch.inf, device=device)
    unassigned[assigned_ids(encoding)] = 0      # ids that the tokenizer has no text for

    start = time.perf_counter()
    logits = prefill(model, cache, torch.tensor([ids], device=device))
    middle, count = time.perf_counter(), 0
    while count < max_tokens:
        token = sample(logits + unassigned, temperature, top_k, top_p, generator)
        count += 1
        if token.item() == separator:
            break
        text = stream.feed(encoding.decode_single_token_bytes(token.item()))
        if text:
            yield text
        if stream.stopped or cache.pos == max_len or count == max_tokens:
            break
        logits = decode_one(model, cache, token)
    if not stream.stopped:
        text = stream.feed(b"", final=True)
        if text:
            yield text
    if stats is not None:
        end = time.perf_counter()
        stats.update(prompt_tokens=len(ids), tokens=count, tokens_per_s=count / (end - middle),
                     prefill_tokens_per_s=len(ids) / (middle - start), cache_bytes=cache.nbytes())


# ------------------------------------------------------------------------------------------------
# python infer.py


@dataclasses.dataclass
class Run:
    """Stream a continuation of --prompt from a run folder or a Hugging Face folder."""

    checkpoint: str = ""            # folder; by default out/compressed, else out/base
    prompt: str = "import os\n\n\ndef read_"     # text to continue
    tokens: int = 200               # most tokens to generate
    temperature: float = 0.7        # 0 is greedy
    top_k: int = 0                  # 0 is off
    top_p: float = 0.95             # 1 is off
    stop: str = dataclasses.field(default="", metadata=dict(nargs="*"))  # strings that end the text
    seed: int = 0                   # of the sampling
    context: int = 0                # tokens that the cache holds; 0 = prompt + tokens
    device: str = "auto"            # auto, cuda, mps or cpu
    dtype: str = "auto"             # auto (as stored), float32 or bfloat16


def pick_device(name):
    """auto -> cuda, mps or cpu, whichever is there first. Raises ValueError for a device that is
    not.
    """
    if name == "auto":
        found = [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())]
        return next((device for device, there in found if there), "cpu")
    if name.split(":")[0] not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device is {name!r}, must be auto, cuda, mps or cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def pick_dtype(name):
    """auto -> None (as stored), else a torch dtype by name."""
    if name not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--dtype is {name!r}, must be auto, float32 or bfloat16")
    return None if name == "auto" else getattr(torch, name)


def peak_bytes(device):
    """The most memory this process has held: allocated on a CUDA device, else resident in all."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    import resource     # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def newest_checkpoint():
    """out/compressed if the pipeline has come that far, else out/base."""
    return "out/compressed" if pathlib.Path("out/compressed/config.json").exists() else "out/base"


def body(run):
    if run.tokens < 1:
        raise ValueError(f"--tokens is {run.tokens}, must be at least 1")
    folder, device = run.checkpoint or newest_checkpoint(), pick_device(run.device)
    if device == "cpu":
        tune_cpu()
    model, encoding = load_run(folder, device, pick_dtype(run.dtype))
    n = model.config.n_params()
    print(f"{folder}: {model.config.pattern}, {n / 1e6:.1f} M parameters, {device}, "
          f"{str(model.lm_head.weight.dtype)[6:]}\n")
    pieces, stats = [], {}
    print(run.prompt, end="", flush=True)
    for text in generate(model, encoding, run.prompt, run.tokens, run.temperature, run.top_k,
                         run.top_p, run.seed, run.stop or (), run.context or None, stats):
        print(text, end="", flush=True)
        pieces.append(text)
    print(f"\n\n{stats['tokens']} tokens at {stats['tokens_per_s']:.0f} tokens/s, prompt of "
          f"{stats['prompt_tokens']} at {stats['prefill_tokens_per_s']:.0f} tokens/s, cache "
          f"{stats['cache_bytes'] / 2 ** 20:.2f} MiB")
    return dict(tokens_per_s=stats["tokens_per_s"],
                prefill_tokens_per_s=stats["prefill_tokens_per_s"],
                peak_bytes=peak_bytes(device), text="".join(pieces))


def main(argv=None):
    run_script(body, parse_flags(Run, argv))


if __name__ == "__main__":
    main()
