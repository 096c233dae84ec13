"""Inference inside a memory budget: plan the bytes before anything is allocated, then generate.

The 9B was made so that a context of 131072 tokens fits an A10G, in bf16 and at batch 1:

                        weights      KV cache         states     sum     of 19.66 GiB
    nano-9b-v2           16.556   4 layers  2.000      0.134    18.69    fits
    nano-12b-v2          22.929   6 layers  3.000      0.139    26.07    does not fit
    Qwen3-8B             15.256  36 layers 18.000               33.26    does not fit (it has 32k)

The GPU has 22.06 GiB, of which 5% go to the framework and 1.3 GiB to a vision encoder. The other
19.66 GiB also hold the temporaries of prefill. To keep them small, a prompt runs in prefill chunks,
no (t, t) mask is built, and only the last token gets logits. `plan` computes weights, KV cache and
states by formula, and traces temporaries on the meta device, one layer of each type, without data.

Where the paper's "up to 6x" comes from. A decode step reads all weights once, and the KV cache and
states of every sequence. At batch 1 the weights dominate, and a hybrid is no faster than a
transformer of equal size; at batch 8 it is 1.6x as fast. A sequence of 24k tokens takes 0.51 GiB in
the 9B and 3.4 GiB in Qwen3-8B, so 5 to 8 sequences fit where Qwen3-8B has room for one.

A KV cache can be truncated to an earlier token; a recurrent state cannot. A chat removes each
thought from its history, so it takes a snapshot of the states before the thought. Sources: Nemotron
Nano 2, arXiv 2508.14444, sections 3 and 4; the released model's sampling and chat template.

Glossary: as in model.py. prefill: run the prompt | decode: run one new token | KV: the keys and
values that attention keeps | prefill chunk: prompt tokens that run at once | roofline: the shortest
time in which the bytes can be read and the FLOPs done.

Left out: paged caches, continuous batching, speculative decoding, tensor parallelism. For quantised
weights, convert a run folder with llama.cpp.

    python infer.py                                        answer a problem, or continue a prompt
    python infer.py --prompt "def main(" --temperature 0.7 --tokens 300
    python infer.py --checkpoint FOLDER --chat             any Nemotron-H with tokenizer.json
    python infer.py --plan --preset nemotron-nano-9b-v2 --context 131072 --memory-gib 19.66
    python -m bench.infer                                  speed; planned against measured memory
"""

import bisect
import codecs
import collections
import contextlib
import dataclasses
import functools
import pathlib
import re
import sys
import time
import weakref

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from common import (GIB, StopRequest, check_flags, flag, flag_name, free_bytes, pick_device,
                    read_json, read_rows, script, tune_cpu)
from data import encoding_from_json, separator_id
from model import HybridCache, HybridConfig, HybridLM, load_hf, read_config
from ssm import Linear


class DecodeLinear(Linear):
    """A Linear that uses oneDNN for up to 16 fp32 rows on a CPU, when no gradient is needed.

    A decode step multiplies a few rows with every weight, which is bound by memory. torch uses MKL,
    with which a step takes 1.2 to 1.8 times as long (presets toy and small, AMD EPYC)."""

    def forward(self, x):
        few = x.numel() <= 16 * x.shape[-1]
        fp32 = x.dtype == self.weight.dtype == torch.float32
        eager = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if few and fp32 and x.is_cpu and eager:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return super().forward(x)


def speed_up_decode(model):
    """Turn each plain Linear of a model on a CPU into a DecodeLinear, in place. Returns it."""
    if model.lm_head.weight.is_cpu and torch.backends.mkldnn.is_available():
        for layer in model.modules():
            if type(layer) is Linear:
                layer.__class__ = DecodeLinear          # the same weight, another forward
    return model


@contextlib.contextmanager
def decode_settings():
    """A context without the setting of `tune_cpu`, which doubles oneDNN's time for one row."""
    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "none"
    try:
        yield
    finally:
        setting.fp32_precision = before


def load_encoding(folder):
    """The data.Encoding of a model folder. Raises FileNotFoundError or ValueError with one line."""
    folder = pathlib.Path(folder)
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder} has no {name}: run python train_fp8.py, or name a folder with "
                "config.json, tokenizer.json and all *.safetensors of a Nemotron-H model")
    encoding = encoding_from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ours, entries = encoding.n_vocab, read_config(folder).vocab_size
    if ours > entries:
        raise ValueError(f"{folder}: the tokenizer has {ours} entries, the model {entries}")
    return encoding


def check_template(folder):
    """Raises ValueError if the folder has a chat template that is not that of Nano 2."""
    own, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    template = own.read_text(encoding="utf-8") if own.exists() else \
        settings.exists() and read_json(settings).get("chat_template")
    markers = SYSTEM, USER, ASSISTANT, END_TURN
    if template and not all(marker.strip() in str(template) for marker in markers):
        raise ValueError(f"--chat uses the template of Nemotron Nano 2 ({USER.strip()} ...), but "
                         f"{folder} has another: write its turns out in --prompt")


def load_run(folder, device="cpu", dtype=None):
    """(HybridLM for inference, data.Encoding) of a model folder; dtype None: as stored. Errors as
    in `load_encoding` and `load_hf`."""
    encoding = load_encoding(folder)
    return speed_up_decode(load_hf(folder, device, dtype).eval()), encoding


# ------------------------------------------------------------------------------------------------
# The plan: bytes, then time


class FusedAttention(TorchFunctionMode):
    """Makes attention on the meta device allocate as a fused kernel does: no (t, kv_len) scores."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *args, is_causal=kwargs.get("is_causal", False),
                attn_mask=kwargs.get("attn_mask"))[0]
        return func(*args, **kwargs)


class LiveBytes(TorchDispatchMode):
    """While it is on: `now`, the bytes of the tensors that operations have made and that are still
    alive, and `peak`, the most so far. `known` tensors are not counted. Views share a storage."""

    def __init__(self, known):
        super().__init__()
        self.storages = weakref.WeakSet(m.untyped_storage() for m in known)
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for m in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(m, torch.Tensor):
                self.add(m.untyped_storage())
        return result

    def add(self, storage):
        if storage not in self.storages:
            self.storages.add(storage)
            self.change(storage.nbytes())
            weakref.finalize(storage, self.change, -storage.nbytes())

    def change(self, nbytes):
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def traced_peak(run, *known):
    """Peak bytes that run() allocates on the meta device, beyond the tensors of `known`."""
    with FusedAttention(), LiveBytes(known) as live:
        run()
    return live.peak


@torch.inference_mode()
def workspace_bytes(config, tokens, context, batch=1, dtype=torch.bfloat16):
    """Peak bytes of temporaries, without logits, when the last `tokens` of each context are run."""
    types = "".join(dict.fromkeys(config.pattern))          # one layer of each type is enough
    config = dataclasses.replace(config, pattern=types, vocab_size=16)
    context = max(context, tokens)
    with torch.device("meta"):
        model = HybridLM(config, dtype).to(dtype)
        x = torch.empty(batch, tokens, config.d_model, dtype=dtype)
    cache = HybridCache(config, batch, context, dtype, "meta")
    cache.pos = context - tokens        # the earlier tokens are in the cache

    def run():
        y = x
        for layer, state in zip(model.backbone.layers, cache.layers):
            y = layer(y, state)
        model.backbone.norm_f(y)
    return x.nbytes + traced_peak(run, *model.parameters(), x, *cache.states(), *cache.kv())


def plan(config, context, batch=1, dtype=torch.bfloat16, prefill_chunk=0, limit=None, snapshots=0,
         advise=True):
    """The memory that inference needs, computed without loading weights. Returns a dict:

        parts       bytes of weights, kv, ssm_states, conv_states, snapshots, workspace, logits
        total_bytes, limit_bytes, fits, prefill_chunk
        largest_prefill_chunk, largest_context, largest_batch   each with the others as asked

    context: tokens per sequence, prompt and answer. batch: sequences. limit: bytes. snapshots:
    copies of the states. prefill_chunk 0: 1024, halved until the plan fits, but at least one chunk
    of the scan. The largest sizes are None without a limit or advise, and 0 if nothing fits; the
    prefill chunk is at most 64 chunks of the scan, the context None if there is no attention."""
    work = functools.cache(functools.partial(workspace_bytes, config, dtype=dtype))

    def parts_of(context, batch, chunk):
        cache = config.cache_bytes(batch, context, dtype)
        traced = min(context, 2 ** 15)                      # masks do not grow beyond this
        return dict(weights=config.weight_bytes(dtype), kv=cache["kv"], ssm_states=cache["ssm"],
                    conv_states=cache["conv"], snapshots=snapshots * (cache["ssm"] + cache["conv"]),
                    workspace=max(work(1, 1, batch), work(min(chunk, context), traced)),
                    logits=batch * config.vocab_size * (dtype.itemsize + 4))    # also in fp32

    fits = lambda *sizes: limit is None or sum(parts_of(*sizes).values()) <= limit
    first, least = (min(prefill_chunk or n, context) for n in (1024, config.chunk_size))
    chunk = first
    while fits(context, batch, least) and not fits(context, batch, chunk):
        chunk = max(chunk // 2, least)
    parts = parts_of(context, batch, chunk)
    found = dict(parts=parts, total_bytes=sum(parts.values()), limit_bytes=limit,
                 fits=fits(context, batch, chunk), prefill_chunk=chunk,
                 largest_prefill_chunk=None, largest_context=None, largest_batch=None)
    if limit is not None and advise:        # bisect finds the first n that does not fit
        largest = lambda fits, at_most: bisect.bisect(
            range(1, int(at_most) + 1), False, key=lambda n: not fits(n))
        unit, room = config.chunk_size, limit - parts["weights"]        # tokens, bytes
        units = largest(lambda n: fits(context, batch, n * unit), min(-(-context // unit), 64))
        whole = context <= 64 * unit and fits(context, batch, context)      # needs no mask
        found["largest_prefill_chunk"] = context if whole else min(units * unit, context)
        found["largest_batch"] = largest(
            lambda n: fits(context, n, least) or fits(context, n, first),
            room * batch // parts["logits"])
        found["largest_context"] = None if not parts["kv"] else largest(
            lambda n: fits(n, batch, chunk), room * context // parts["kv"])
    return found


GPUS = {    # GiB as torch reports them, rounded down; GB/s and dense bf16 TFLOP/s by data sheet
    "a10g": (22.06, 600, 70), "l4": (22.0, 300, 121), "rtx4090": (23.5, 1008, 165),
    "a100": (79.1, 2039, 312), "h100": (79.1, 3350, 989), "h200": (139.0, 4800, 989),
}


def step_bytes(config, context, batch=1, dtype=torch.bfloat16):
    """Bytes that one decode step reads and writes: weights without embedding, KV, states twice."""
    table = config.vocab_size * config.d_model * dtype.itemsize
    cache = config.cache_bytes(batch, context, dtype)
    return config.weight_bytes(dtype) - table + cache["kv"] + 2 * (cache["ssm"] + cache["conv"])


def roofline(config, context, batch, bandwidth, flops, dtype=torch.bfloat16):
    """Best possible decode tokens/s of the batch and prefill seconds, from bytes/s and FLOP/s."""
    prompt, decode = config.flops_by_part(context), config.flops_by_part(context, decode=True)
    head = prompt.pop("head")               # runs for the last token only
    seconds = max(step_bytes(config, context, batch, dtype) / bandwidth,
                  batch * sum(decode.values()) / flops)
    return dict(decode_tokens_per_s=batch / seconds,
                prefill_seconds=(context * sum(prompt.values()) + head) / flops)


# ------------------------------------------------------------------------------------------------
# Generation: prefill, decode, sample

PENALTY_WINDOW = 256        # the repetition penalty applies to the last 256 tokens

# The chat template of the released Nano 2 models. Its markers are special tokens, which `encode`
# recognises. Messages are encoded as ordinary text, so that no user can write a marker.
SYSTEM, USER, ASSISTANT = "<SPECIAL_10>System\n", "<SPECIAL_11>User\n", "<SPECIAL_11>Assistant\n"
END_TURN, THINK, END_THINK = "<SPECIAL_12>", "<think>", "</think>"


def check_logits(logits):
    """Returns the logits. Raises ValueError for NaN or infinity; on a GPU, this waits for them."""
    if not logits.isfinite().all():
        raise ValueError("the logits are not finite (NaN or inf): broken weights or a wrong dtype")
    return logits


@torch.inference_mode()
def prefill(model, cache, tokens, chunk=1024):
    """Run tokens (b, t) into the cache, chunk by chunk. Returns logits (b, v) of the last token."""
    for piece in tokens.split(chunk, 1):        # (b, chunk)
        logits = model(piece, cache, last_only=True)
    return check_logits(logits[:, -1])


@torch.inference_mode()
def decode_one(model, cache, token):
    """Run one token per row, (b,) -> logits (b, v)."""
    with decode_settings():
        return model(token[:, None], cache)[:, -1]


class Decoder:
    """`decode_one` for a GPU: decoder(token (b,)) -> logits (b, v), by replaying a CUDA graph.

    Launching the hundreds of small kernels of a step one by one takes longer than running them; a
    graph launches all at once. It needs fixed shapes: the position is a tensor on the device, and
    attention reads a fixed kv_len, at most an eighth more than the filled part (or 256)."""

    def __init__(self, model, cache):
        self.model, self.cache, self.graphs = model, cache, {}
        self.pos = torch.zeros(1, dtype=torch.int64, device=model.lm_head.weight.device)
        self.token, self.graphed = self.pos.repeat(cache.batch), self.pos.is_cuda

    @torch.inference_mode()
    def __call__(self, token):
        self.cache.check(len(token), 1)
        self.token.copy_(token)        # a graph reads and writes the same tensors every time
        self.pos.fill_(self.cache.pos)
        kv_len = self.fixed_kv_len(self.cache.pos + 1)
        if self.graphed:
            if kv_len not in self.graphs:
                self.graphs[kv_len] = self.capture(kv_len)
            graph, logits = self.graphs[kv_len]
            graph.replay()        # writes new logits
        else:
            logits = self.step(kv_len)
        self.cache.pos += 1
        return logits

    def fixed_kv_len(self, filled):
        """`filled`, rounded up to 256, 288, 320, ... 512, 576, ...: eight lengths per doubling."""
        unit = 1 << max((filled - 1).bit_length() - 4, 5)
        return min(max(-(-filled // unit) * unit, 256), self.cache.max_len)

    def step(self, kv_len):
        """The work on the device: reads self.token and self.pos, returns logits (b, v)."""
        cache, pos = self.cache, self.cache.pos
        cache.fixed = self.pos, kv_len
        logits = self.model(self.token[:, None], cache)[:, -1]
        cache.fixed, cache.pos = None, pos
        return logits

    def capture(self, kv_len):
        """Returns (graph, its logits). Warm-up steps change the states, so these are restored."""
        saved, side = self.cache.snapshot(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step(kv_len)
                self.cache.restore(saved)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool):
            logits = self.step(kv_len)
        return graph, logits


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Token ids (b,) drawn from logits (b, v). temperature 0 is argmax; top_k 0 and top_p 1 keep
    all tokens. top_p keeps the fewest tokens whose probabilities sum to at least p."""
    if temperature < 1e-4:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        sorted_logits, order = logits.sort(-1, descending=True)
        probability = sorted_logits.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p      # those before sum to top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    p = logits.softmax(-1)          # argmax(p / Exp(1)) draws from p, and no GPU waits for the CPU
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


def penalise(logits, ids, penalty):
    """Logits (v,): those of recent ids are divided by the penalty, or multiplied if negative."""
    if penalty == 1 or not ids:
        return logits
    seen = torch.tensor(sorted(set(ids[-PENALTY_WINDOW:])), device=logits.device)
    value = logits[seen]
    return logits.scatter(0, seen, torch.where(value > 0, value / penalty, value * penalty))


def overlap(text, word):
    """Length of the longest prefix of `word`, but not all of it, that `text` ends with."""
    return max((n for n in range(1, len(word)) if text.endswith(word[:n])), default=0)


class TextStream:
    """Turns token bytes into text. Holds back incomplete UTF-8 and what may begin a stop string."""

    def __init__(self, stop=()):
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stop, self.pending, self.stopped = [s for s in stop if s], "", False

    def feed(self, raw, final=False):
        """The text that can be shown now. Sets .stopped once a stop string is complete."""
        self.pending += self.decoder.decode(raw, final)
        found = [i for i in map(self.pending.find, self.stop) if i >= 0]
        held = 0 if final else max((overlap(self.pending, s) for s in self.stop), default=0)
        end = min(found, default=len(self.pending) - held)
        self.stopped = bool(found)
        text, self.pending = self.pending[:end], self.pending[end:]
        return text


class ThinkingBudget:
    """Closes a thought at the first newline after `budget` tokens, or after budget + grace (Nano 2,
    section 3.4). It works on bytes: </think> is one token in some tokenizers, three in others."""

    def __init__(self, encoding, budget, grace=500):
        self.encoding, self.budget, self.grace = encoding, budget, grace
        self.count, self.said, self.closed = 0, b"", False

    def watch(self, raw):
        """Returns the ids that must follow a token of these bytes, usually none."""
        if self.closed:
            return []
        self.count, self.said = self.count + 1, (self.said + raw)[-len(raw) - 16:]
        close, over = END_THINK.encode(), self.count - self.budget
        at_newline = over >= 0 and b"\n" in raw
        by_model = close in self.said
        self.closed = by_model or at_newline or over >= self.grace
        if by_model or not self.closed:
            return []
        begun = overlap(self.said, close)        # bytes of </think> that the model has said already
        rest = close[begun:].decode() if begun or at_newline else "\n" + END_THINK
        return self.encoding.encode(rest)


def wants_thinking(text, default=True):
    """Whether a message asks for a thought: its last /think or /no_think, else the default."""
    switches = re.findall("/think|/no_think", text)
    return switches[-1] == "/think" if switches else default


def message_ids(encoding, head, text, tail=""):
    """Ids of a message between its markers, without /think and /no_think, as in the template."""
    text = re.sub("/think|/no_think", "", text).strip() + "\n"
    return [*encoding.encode(head), *encoding.encode_ordinary(text), *encoding.encode(tail)]


def answer_ids(encoding, text):
    """Ids of an answer as later turns see it: without its thought."""
    visible = text.rpartition(END_THINK)[2].strip()
    return [*encoding.encode_ordinary(visible + "\n"), *encoding.encode(END_TURN + "\n")]


# ------------------------------------------------------------------------------------------------
# Texts: a row, a batch of rows, a chat


@dataclasses.dataclass
class Settings:
    """How tokens are chosen and when a text ends. Raises ValueError for a value out of range."""

    tokens: int = flag(200, "generate at most this many", at_least=1)
    temperature: float = flag(0.7, "sampling temperature; 0: greedy", at_least=0)
    top_k: int = flag(0, "sample from the N most likely tokens; 0: all", at_least=0)
    top_p: float = flag(0.95, "keep the top tokens of total probability X", above=0, at_most=1)
    repetition_penalty: float = flag(1.0, f"on the last {PENALTY_WINDOW} tokens; 1: none", above=0)
    stop: tuple[str, ...] = flag((), "texts that end the output; they are not shown", nargs="*")
    think_budget: int = flag(-1, "tokens per thought in a chat; 0: none, -1: no limit", at_least=-1)

    def __post_init__(self):
        check_flags(self)


class Row:
    """One text that is being written. ids: all its tokens. room: new tokens that fit the cache."""

    def __init__(self, encoding, ids, seed, settings, room, device="cpu", ends=()):
        self.encoding, self.settings, self.ids = encoding, settings, list(ids)
        self.count, self.most, self.done = 0, min(settings.tokens, room), False
        self.generator = torch.Generator(device).manual_seed(seed)
        self.stream, self.ends = TextStream(settings.stop), {separator_id(encoding), *ends}
        self.forced, limited = [], settings.think_budget >= 0
        self.budget = ThinkingBudget(encoding, settings.think_budget) if limited else None

    def choose(self, logits):
        """The next id, forced or sampled. A closed thought is not opened again."""
        if self.forced:
            return self.forced.pop(0)
        s = self.settings
        logits = penalise(logits, self.ids, s.repetition_penalty)
        if self.budget and self.budget.closed and THINK in self.encoding.special_tokens_set:
            logits = logits.clone()
            logits[self.encoding.encode_single_token(THINK)] = -torch.inf
        return sample(logits[None], s.temperature, s.top_k, s.top_p, self.generator).item()

    def accept(self, token):
        """Append this id; returns the text to show. Sets .done at an end token, stop or limit."""
        self.ids.append(token)
        self.count += 1
        ended = token in self.ends                  # an end token has no text
        last = ended or self.count == self.most
        raw = b"" if ended else self.encoding.decode_single_token_bytes(token)
        if self.budget:
            self.forced.extend(self.budget.watch(raw))
        text = self.stream.feed(raw, final=last)
        self.done = last or self.stream.stopped
        return text


def stream_rows(model, rows, cache, logits, stats):
    """Decode from logits (b, v) until all rows have ended. Yields (row number, text)."""
    excluded = torch.full_like(logits[0], -torch.inf)
    excluded[[*rows[0].encoding.tokenizer.get_vocab().values()]] = 0     # other ids have no text
    step = Decoder(model, cache) if logits.is_cuda else functools.partial(decode_one, model, cache)
    start = time.perf_counter()
    try:
        while True:
            for i, row in enumerate(rows):
                text = "" if row.done else row.accept(row.choose(logits[i] + excluded))
                if text:
                    yield i, text
            if all(row.done for row in rows):
                return
            tokens = torch.tensor([row.ids[-1] for row in rows], device=logits.device)
            logits = check_logits(step(tokens))
    finally:
        stats.update(tokens=sum(row.count for row in rows), seconds=time.perf_counter() - start)


def start_rows(model, prompts, cache, chunk=1024, samples=1):
    """Prefill each prompt (a list of ids) once, and copy it into `samples` rows of the cache.
    Returns logits (rows, v). There is no padding: a shorter prompt begins later in the cache."""
    device, longest, logits = model.lm_head.weight.device, max(map(len, prompts)), []
    starts = [longest - len(ids) for ids in prompts]        # so that all end at the same position
    for i, (ids, start) in enumerate(zip(prompts, starts)):
        first, others = i * samples, slice(i * samples + 1, (i + 1) * samples)
        tokens = torch.tensor([ids], device=device)
        logits.append(prefill(model, cache.row(first, start), tokens, chunk))
        for m in cache.kv():                                    # (2, b, g, max_len, head_dim)
            m[:, others] = m[:, first, None]
        for m in cache.states():
            m[others] = m[first]
    cache.pos = longest
    if any(starts):
        cache.start = torch.tensor(starts, device=device).repeat_interleave(samples)
    return torch.cat(logits).repeat_interleave(samples, 0)


def generate_rows(model, encoding, prompts, settings=None, seeds=None, samples=1, max_len=None,
                  chunk=1024, stats=None):
    """Continue every prompt (str) `samples` times, in one batch. Yields (row number, text).

    In fp32 a row gives the same text as alone; in bf16, whose sums round differently in a batch, 1
    of 60 greedy texts differed. Sample i of prompt j has seed seeds[j] + i. max_len: tokens per row
    of the cache. stats: a dict that receives prompt_tokens, prefill_seconds, tokens, seconds, or a
    Counter that adds them up."""
    settings, seeds = settings or Settings(), seeds or [0] * len(prompts)
    stats = {} if stats is None else stats
    ids = [[separator_id(encoding), *encoding.encode_ordinary(prompt)] for prompt in prompts]
    longest = max(map(len, ids))
    max_len = max_len or longest + settings.tokens
    cache, start = model.init_cache(len(ids) * samples, max_len), time.perf_counter()
    logits = start_rows(model, ids, cache, chunk, samples)
    stats.update(prompt_tokens=sum(map(len, ids)), prefill_seconds=time.perf_counter() - start)
    room, ends = max_len - longest + 1, model.config.end_tokens
    rows = [Row(encoding, m, seed + i, settings, room, logits.device, ends)
            for m, seed in zip(ids, seeds, strict=True) for i in range(samples)]
    yield from stream_rows(model, rows, cache, logits, stats)


def generate(model, encoding, prompt, max_tokens=200, temperature=0.8, top_k=0, top_p=0.95,
             seed=0, stop=(), max_len=None, stats=None, **more):
    """Yield the continuation of prompt (str) in pieces. more: other fields of Settings."""
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    settings = Settings(max_tokens, temperature, top_k, top_p, stop=stop, **more)
    rows = generate_rows(model, encoding, [prompt], settings, [seed], max_len=max_len, stats=stats)
    yield from (text for _, text in rows)


class ContextFull(ValueError):
    """A turn that does not fit the cache of a chat."""


class Chat:
    """A conversation. history: the ids of all turns; the cache has seen the first cache.pos. Both
    drop a thought as soon as its answer has ended, so that later turns never see it."""

    def __init__(self, model, encoding, max_len, system="", settings=None, chunk=1024):
        self.model, self.encoding, self.chunk = model, encoding, chunk
        self.settings, self.cache = settings or Settings(), model.init_cache(1, max_len)
        self.thinking = wants_thinking(system)
        self.history = message_ids(encoding, SYSTEM, system)    # the template has it even if empty

    def run(self, ids, stats):
        """Prefill ids. Returns logits (1, v) of the last token."""
        start = time.perf_counter()
        tokens = torch.tensor([ids], device=self.model.lm_head.weight.device)
        logits = prefill(self.model, self.cache, tokens, self.chunk)
        stats.update(prompt_tokens=len(ids), prefill_seconds=time.perf_counter() - start)
        return logits

    def say(self, text, seed=0, stats=None):
        """Yield the answer, thought included. Raises ContextFull before it changes anything."""
        stats, encoding, settings = {} if stats is None else stats, self.encoding, self.settings
        asked = wants_thinking(text, self.thinking)
        thinking = asked and settings.think_budget != 0
        opening = encoding.encode(THINK + ("\n" if thinking else END_THINK))
        turn, end = message_ids(encoding, USER, text, ASSISTANT), answer_ids(encoding, "")
        left = self.cache.max_len - len(self.history)
        room = left - len(turn) - len(opening) - len(end) - 1        # for the answer
        if room < 1:
            raise ContextFull(f"the turn of {len(turn)} tokens and an answer do not fit: {left} of "
                              f"--context {self.cache.max_len} are left")
        self.thinking = asked
        self.history += turn
        self.run(self.history[self.cache.pos:], stats)        # what the cache has not seen

        before, said = self.cache.snapshot(), ""        # where the thought begins
        logits = self.run(opening, stats)
        settings = dataclasses.replace(settings, stop=(*settings.stop, END_TURN),
                                       think_budget=settings.think_budget if thinking else -1)
        row = Row(encoding, self.history + opening, seed, settings, room, logits.device,
                  self.model.config.end_tokens)
        try:
            for _, piece in stream_rows(self.model, [row], self.cache, logits, stats):
                said += piece
                yield piece
        finally:
            self.cache.restore(before)
            visible = said if END_THINK in said or not thinking else ""
            left = self.cache.max_len - len(self.history)
            self.history += answer_ids(encoding, visible)[-left:]       # if too long, only its end


# ------------------------------------------------------------------------------------------------
# python infer.py


def verdict(found):
    """A plan compared with its limit, and the largest sizes that fit, in words."""
    needed, limit, weights = (n / GIB for n in (found["total_bytes"], found["limit_bytes"],
                                                found["parts"]["weights"]))
    sizes = [(name, found["largest_" + name]) for name in ("prefill_chunk", "context", "batch")]
    return (f"{needed:.3f} GiB are needed (weights {weights:.3f}), {limit:.3f} are there, "
            f"{limit - needed:+.3f} left; the largest that fits, all else as asked: " + ", ".join(
                f"{name.replace('_', ' ')} {'any' if n is None else n}" for name, n in sizes))


def check_plan(config, limit, context, batch, **more):
    """The plan of a request. Raises ValueError with the largest sizes if it does not fit."""
    found = plan(config, context, batch, limit=limit, advise=False, **more)
    if not found["fits"]:
        found = plan(config, context, batch, limit=limit, **more)
        raise ValueError(f"{batch} x {context} tokens do not fit: {verdict(found)}")
    return found


def show_plan(run):
    """Print bytes by part, then for each GPU whether the total fits and the best possible speed."""
    if run.checkpoint:
        config = read_config(pathlib.Path(run.checkpoint))
    else:
        changes = dict(pattern=run.pattern) if run.pattern else {}
        config = HybridConfig.preset(run.preset or "toy", **changes)
    dtype = torch.bfloat16 if run.dtype == "auto" else getattr(torch, run.dtype)
    context, limit = run.context or 131072, run.limit_bytes()
    found = plan(config, context, run.batch, dtype, run.prefill_chunk, limit)
    total, ceilings = found["total_bytes"], {}
    print(f"{config.pattern}: {config.n_params():,} parameters in {str(dtype)[6:]}, {run.batch} x "
          f"{context} tokens, prefill chunks of {found['prefill_chunk']}")
    print(f"{'':12s}{'GiB':>9s}{'fits':>6s}{'decode tok/s':>14s}{'prefill s':>11s}    (at best)")
    for name, value in [*found["parts"].items(), ("total", total)]:
        print(f"{name:12s}{value / GIB:9.3f}")
    for name in GPUS if run.gpu == "none" else [run.gpu]:
        memory, bandwidth, flops = GPUS[name]
        best = roofline(config, context, run.batch, bandwidth * 1e9, flops * 1e12, dtype)
        ceilings[name] = best
        print(f"{name:12s}{memory:9.3f}{'yes' if total <= memory * GIB else 'no':>6s}"
              f"{best['decode_tokens_per_s']:14.1f}{best['prefill_seconds']:11.1f}")
    if limit is not None:
        print("fits:" if found["fits"] else "does NOT fit:", verdict(found))
    return dict(found, ceilings=ceilings)


PIPELINE = [pathlib.Path("out") / name for name in ("compressed", "aligned", "base")]
DEFAULT_PROMPT, DEFAULT_PROBLEM = "import os\n\n\ndef read_", "7*3-4+8"


@dataclasses.dataclass
class Run(Settings):
    """Continue a prompt, chat, or print a memory plan (--plan)."""

    checkpoint: str = flag("", "model folder (default: the first of out/compressed, aligned, base)")
    prompt: tuple[str, ...] = flag((), "texts to continue, as one batch", nargs="+")
    samples: int = flag(1, "continuations per prompt, from one prefill", at_least=1)
    seed: int = flag(0, "sample i of a prompt has seed + i", at_least=0, at_most=2 ** 63 - 1)
    context: int = flag(0, "tokens per text, prompt included; 0: as many as needed, 4096 in a "
                        "chat, 131072 in a plan", at_least=0, at_most=2 ** 40)
    chat: bool = flag(False, "chat from standard input, in the released template")
    system: str = flag("", "system message of a chat; it may contain /think or /no_think")
    device: str = flag("auto", "auto, cuda, mps or cpu")
    dtype: str = flag("auto", "float32, bfloat16; auto: as stored, bfloat16 in a plan",
                      choices=("auto", "float32", "bfloat16"))
    prefill_chunk: int = flag(0, "prompt tokens run at once; 0: 1024, or what fits", at_least=0)
    memory_gib: float = flag(0.0, "memory limit; 0: that of --gpu, or what is free", at_least=0)
    gpu: str = flag("none", "limit memory to that of " + ", ".join(GPUS), choices=("none", *GPUS))
    preset: str = flag("", "for --plan: a name from model.py (default: toy)")
    pattern: str = flag("", "for --plan: layer pattern, instead of the preset's")
    batch: int = flag(1, "for --plan: number of sequences", at_least=1, at_most=2 ** 40)
    plan: bool = flag(False, "print bytes by part, what fits and best speeds; needs no weights")

    def __post_init__(self):
        check_flags(self)
        for name, mode in (("preset", "plan"), ("pattern", "plan"), ("system", "chat")):
            if getattr(self, name) and not getattr(self, mode):
                raise ValueError(f"{flag_name(name)} is for --{mode}")
        if self.checkpoint and (self.preset or self.pattern):
            raise ValueError("--checkpoint goes with neither --preset nor --pattern")
        if self.chat and (self.plan or self.samples > 1):
            raise ValueError("--chat goes with neither --plan nor --samples")
        if not all(self.prompt):
            raise ValueError("--prompt is empty: give it some text")

    def limit_bytes(self):
        """Bytes of --memory-gib, or of the --gpu; None if neither is given."""
        return int((self.memory_gib or GPUS.get(self.gpu, [0])[0]) * GIB) or None


def is_aligned(folder):
    """Whether align.py made this model, or the teacher that it was distilled from."""
    rows = read_rows(folder / "metrics.jsonl")
    result = rows[-1].get("final", {}) if rows else {}
    return "accuracy_by_budget" in result or result.get("student_accuracy") is not None


def load_what_fits(run, folder, prompts):
    """Returns (model, encoding, context, prefill chunk). Loads no weights unless the plan fits."""
    device = pick_device(run.device)
    encoding, values = load_encoding(folder), read_json(folder / "config.json")
    stored = values.get("torch_dtype") or values.get("dtype")        # the old and the new name
    dtype = getattr(torch, str(stored if run.dtype == "auto" else run.dtype), torch.float32)
    longest = 1 + max((len(encoding.encode_ordinary(text)) for text in prompts), default=0)
    context = run.context or (4096 if run.chat else longest + run.tokens)
    if run.chat:
        check_template(folder)
    if longest > context:
        raise ValueError(f"the prompt has {longest} tokens, the cache holds {context}")
    cuda, free, asked = device.startswith("cuda"), free_bytes(device), run.limit_bytes()
    config, limit = read_config(folder), min(asked or free, free)
    found = check_plan(config, limit, context, 1 if run.chat else len(prompts) * run.samples,
                       dtype=dtype, prefill_chunk=run.prefill_chunk, snapshots=run.chat + cuda)
    if device == "cpu":
        tune_cpu()
    elif asked and cuda:            # torch then refuses what exceeds the limit
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    model, _ = load_run(folder, device, None if run.dtype == "auto" else dtype)
    print(f"{folder}: {config.pattern}, {config.n_params() / 1e6:.1f} M parameters, {device}, "
          f"{str(dtype)[6:]}, planned {found['total_bytes'] / GIB:.3f} GiB for {context} tokens\n")
    return model, encoding, context, found["prefill_chunk"]


def show(pieces, n=1):
    """Join (row number, piece) pairs to n texts, until Ctrl-C; print a single text as it comes."""
    texts = [""] * n
    with StopRequest() as stop, contextlib.closing(pieces):
        for i, piece in pieces:
            texts[i] += piece
            print(piece if n == 1 else "", end="", flush=True)
            if stop.asked:
                break
    return texts


def write_texts(run, model, encoding, prompts, context, chunk, stats):
    """Continue the prompts. One text is printed as it comes, several are printed at the end."""
    n = len(prompts) * run.samples
    print(prompts[0] if n == 1 else "", end="", flush=True)
    texts = show(generate_rows(model, encoding, prompts, run, [run.seed] * len(prompts),
                               run.samples, context, chunk, stats), n)
    for i, text in enumerate(texts if n > 1 else []):
        print(f"--- {i + 1} of {n}\n{prompts[i // run.samples]}{text}")
    return texts if n > 1 else texts[0]


def converse(run, chat, prompts, stats, once):
    """Answer the prompts and, unless `once`, standard input, until it or the context ends."""
    if END_TURN not in chat.encoding.special_tokens_set:
        print("note: this tokenizer has no token that ends a turn: the model has seen no chats")
    answers, turns = [], list(prompts)
    try:
        while turns or not once:
            text = turns.pop(0) if turns else input("\n> " if sys.stdin.isatty() else "")
            seed = run.seed + len(answers)
            with contextlib.closing(chat.say(text, seed, stats)) as answer:     # also on Ctrl-C
                answers += show((0, piece) for piece in answer)
            print()
    except ContextFull as error:
        print(f"\nthe chat ends here: {error}")
    except (EOFError, KeyboardInterrupt):       # the input has ended
        pass
    return answers


def peak_bytes(device):
    """The peak memory of this process: allocated on a CUDA device, else resident in total."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@script(Run)
def main(run):
    if run.plan:
        return show_plan(run)
    newest = next((path for path in PIPELINE if (path / "config.json").exists()), PIPELINE[-1])
    folder, prompts = pathlib.Path(run.checkpoint or newest), list(run.prompt)
    once = not (run.chat or prompts or run.samples > 1) and is_aligned(folder)
    if once:            # by default an aligned model solves a problem
        run, prompts = dataclasses.replace(run, chat=True), [DEFAULT_PROBLEM]
        print(f"{DEFAULT_PROBLEM} in {folder}, as with --chat --prompt {DEFAULT_PROBLEM}:")
    if run.think_budget >= 0 and not run.chat:
        raise ValueError("--think-budget is for --chat, or a model of align.py without --prompt")
    prompts = prompts or ([] if run.chat else [DEFAULT_PROMPT])
    model, encoding, context, chunk = load_what_fits(run, folder, prompts)
    stats = collections.Counter()
    if run.chat:
        chat = Chat(model, encoding, context, run.system, run, chunk)
        text = converse(run, chat, prompts, stats, once)
    else:
        text = write_texts(run, model, encoding, prompts, context, chunk, stats)
    decode = stats["tokens"] / max(stats["seconds"], 1e-9)
    speed = stats["prompt_tokens"] / max(stats["prefill_seconds"], 1e-9)
    print(f"\n\ngenerated {stats['tokens']} tokens at {decode:.0f} tokens/s, prompt of "
          f"{stats['prompt_tokens']} tokens at {speed:.0f} tokens/s")
    peak = peak_bytes(str(model.lm_head.weight.device))
    return dict(tokens_per_s=decode, prefill_tokens_per_s=speed, peak_bytes=peak, text=text)


if __name__ == "__main__":
    main()
