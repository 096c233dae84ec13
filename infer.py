"""Inference inside a memory budget: what fits where, before anything is allocated, and then run.

The 9B exists so that 128k tokens fit an A10G. In bf16, batch 1, 131072 tokens of context:

                        weights      KV cache         states     sum     of 19.66 GiB
    nano-9b-v2           16.556   4 layers  2.000      0.134    18.69    fits
    nano-12b-v2          22.929   6 layers  3.000      0.139    26.07    does not
    Qwen3-8B             15.256  36 layers 18.000               33.26    does not (it has 32k)

(19.66 GiB: the 22.06 that the GPU has, less 5% for the framework and 1.3 GiB for a vision encoder.)
What is left over is the workspace of prefill: temporaries of one block of the prompt, which is why
a prompt goes in in blocks (`prefill`), why there is no (t, t) mask, and why only the last position
gets logits. `plan` knows the first three to the byte; the workspace it finds by running one layer
of each kind on the meta device, where tensors have sizes and no memory (`workspace_bytes`).

Where "up to 6x" comes from. One decode step reads all weights once, and of every sequence its KV
cache and its states. At batch 1 that is the weights, and a hybrid of equal size is no faster. At
equal batch it is 1.6x. But a sequence of 24k tokens weighs 0.51 GiB here and 3.4 GiB in a
transformer with 36 layers of KV, so 5 to 8 of them fit where one of those does: that is the 6x.

    prefill(model, cache, tokens)           the prompt, in blocks, logits of its last token alone
    decode_one(model, cache, token)         one token a row: constant work in the Mamba layers
    sample(logits, ...)                     temperature, top-k, top-p, a generator of each row's own
    generate(model, encoding, prompt)       the three of them as a stream of complete UTF-8 text

A recurrent state cannot be cut back: whoever wants to return to a place takes a snapshot there.
A hybrid needs no position ids; rows of a batch are prefilled one by one into their own part of the
cache, so there is no padding. States stay fp32, as the released model cards ask (--state-dtype
bfloat16 saves 0.07 GiB of the 18.69). Sources: Nemotron Nano 2, arXiv 2508.14444, sections 3 and
4; settings and template of the released model.

Glossary: as in model.py. prefill: run the prompt; decode: one new token; KV: keys and values that
attention keeps; block: tokens of a prompt that are run at once; roofline: the time that reading the
bytes or doing the FLOPs takes at least; MBU: share of the memory bandwidth that a decode step uses.

Left out: paged caches, continuous batching and servers, speculative decoding, tensor parallelism.
int8 weights are turned back piece by piece before each product: that saves memory, not time.

    python infer.py                                        continue a prompt; 5 s on 2 cores
    python infer.py --prompt "def main(" --temperature 0.7 --tokens 300
    python infer.py --checkpoint FOLDER --chat             any Nemotron-H with tokenizer.json
    python infer.py --plan --preset nemotron-nano-9b-v2 --context 131072 --memory-gib 19.66
    python infer.py --fit --preset small --context 8192    build it, run it, compare with the plan
    python infer.py --bench                                speed against context and batch, 2 min
    python infer.py --quality                              what int8 costs in bits a byte
"""

import codecs
import collections
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import pathlib
import platform
import sys
import time
import weakref

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from data import (StopRequest, assigned_ids, encoding_from_json, parse_flags, read_rows,
                  run_script, separator_id)
from model import (FP32_PARAMETERS, HybridCache, HybridConfig, HybridLM, config_from_hf,
                   decode_settings, free_bytes, layer_state, load_hf, median_seconds, read_json,
                   replace_file, reset_peak, resident_bytes, set_parameter, tune_cpu)
from ssm import GPUS, Linear

GIB = 2 ** 30

# ------------------------------------------------------------------------------------------------
# Loading


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 with a scale a row: y = (x q^T) * scale, q = round(w /
    scale), scale = largest of the row / 127.

    codes (n, k) int8, scale (n,) fp32. Rows are made, and turned to x's dtype, in pieces of PIECE
    values, so that no other copy of the whole weight exists. Inference only.
    """
    PIECE = 2 ** 24

    def __init__(self, weight):
        super().__init__()
        n, k = weight.shape
        smallest = torch.finfo(torch.float32).tiny
        scale = torch.maximum(weight.amax(1), -weight.amin(1)).float().clamp(min=smallest) / 127
        self.register_buffer("codes", torch.empty(n, k, dtype=torch.int8, device=weight.device))
        self.register_buffer("scale", scale)
        rows = max(self.PIECE // k, 1)
        for codes, w, s in zip(*(m.split(rows) for m in (self.codes, weight, scale))):
            codes.copy_((w.float() / s[:, None]).round_())

    @property
    def weight(self):
        """The weight that it stands for, fp32 (n, k)."""
        return self.codes.float() * self.scale[:, None]

    def forward(self, x):
        rows = max(self.PIECE // self.codes.shape[1], 1)
        pieces = [F.linear(x, codes.to(x.dtype)).mul_(scale)
                  for codes, scale in zip(self.codes.split(rows), self.scale.split(rows))]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def place_int8(model, name, value):
    """`load_hf`'s place: the weights of linear layers become Int8Linear, one at a time."""
    layer, _, leaf = name.rpartition(".")
    if leaf == "weight" and isinstance(model.get_submodule(layer), Linear):
        model.set_submodule(layer, Int8Linear(value))
    else:
        set_parameter(model, name, value)


def to_int8(model):
    """Make the weights of all linear layers int8, in place; embedding, convolution, norms, A_log, D
    and dt_bias stay. Returns the model.
    """
    for name, p in list(model.named_parameters()):
        place_int8(model, name, p.detach())
    return model


RELEASED = ("config.json, tokenizer.json and all *.safetensors (with model.safetensors.index.json) "
            "of a Nemotron-H model, such as NVIDIA-Nemotron-Nano-9B-v2, put into that folder")


def load_encoding(folder):
    """The tiktoken.Encoding of a run folder or a Hugging Face folder with tokenizer.json. Nothing
    is fetched. Raises FileNotFoundError or ValueError with one line.
    """
    folder = pathlib.Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: train one with python train_fp8.py "
                                f"--out {folder}, name a folder with --checkpoint, or download "
                                f"{RELEASED}")
    if not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(f"{folder} has no tokenizer.json beside its config.json: it "
                                "belongs to the model and comes with it")
    encoding = encoding_from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
    entries = config_from_hf(read_json(folder / "config.json")).vocab_size
    if encoding.n_vocab > entries:
        raise ValueError(f"{folder}: the tokenizer has {encoding.n_vocab} entries, the model "
                         f"{entries}: they do not belong together")
    return encoding


def load_run(folder, device="cpu", dtype=None, int8=False):
    """(model in eval mode, tiktoken.Encoding); errors as in `load_encoding` and `load_hf`."""
    encoding = load_encoding(folder)
    return load_hf(folder, device, dtype, *([place_int8] if int8 else [])).eval(), encoding


def build_random(config, device="cpu", dtype=torch.float32, seed=0, int8=False):
    """A HybridLM with random weights in dtype (A_log, D, dt_bias fp32), in eval mode: allocated
    tensor by tensor and filled in place, so the peak is the weights.
    """
    with torch.device("meta"):
        model = HybridLM(config).to(dtype)
    for name, p in list(model.named_parameters()):
        if name.endswith(FP32_PARAMETERS):
            set_parameter(model, name, p.detach().float())
    if int8:
        to_int8(model)
    torch.manual_seed(seed)
    model.to_empty(device=device)
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.ones_(p)            # the norms; the others follow
    model.init_weights()
    for m in model.modules():
        if isinstance(m, Int8Linear):
            m.codes.random_(-127, 128)
            m.scale.fill_((0.8 / config.d_model) ** 0.5 / 73)       # 73: the codes' deviation
    return model.eval()


# ------------------------------------------------------------------------------------------------
# The plan: bytes

def int8_bytes(config, dtype=torch.bfloat16):
    """Bytes of the weights after `to_int8`: linears 1 byte a value and 4 a row, the rest in dtype
    but for A_log, D and dt_bias in fp32.
    """
    d, q_width, kv_width = config.d_model, config.n_heads * config.head_dim, \
        config.n_kv_heads * config.head_dim
    shapes = {"M": [(config.d_inner + config.conv_dim + config.mamba_heads, d),
                    (d, config.d_inner)],
              "*": [(q_width, d), (kv_width, d), (kv_width, d), (d, q_width)],
              "-": [(config.mlp_dim, d), (d, config.mlp_dim)]}
    linears = [(config.vocab_size, d)] + [shape for c in config.pattern for shape in shapes[c]]
    values = sum(n * k for n, k in linears)
    return config.weight_bytes(dtype) - values * dtype.itemsize + values + 4 * sum(
        n for n, _ in linears)


def loading_bytes(config, dtype=torch.bfloat16):
    """Of int8 weights, while they are read: the largest tensor as stored, and the pieces of it that
    become codes."""
    table = config.vocab_size * config.d_model
    return table * dtype.itemsize + 12 * min(Int8Linear.PIECE, table)


class LivePeak(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and still alive; .peak is the most.

    On the meta device. It makes by itself what simple operations return, since their meta versions
    are written in Python and import the compiler: 1.5 s of a plan's 3.
    """
    _should_skip_dynamo = classmethod(lambda cls: False)    # the same reason
    LIKE_FIRST = ("rsqrt", "triu", "cumsum", "exp", "clamp", "silu", "softplus", "relu", "neg")
    POINTWISE = ("add", "sub", "mul", "div", "minimum", "maximum", "addcmul")

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name.endswith("_") or "out" in (kwargs or {}):
            return (kwargs or {}).get("out", args[0])
        if name in self.LIKE_FIRST:
            out = torch.empty_like(args[0])
        elif name in self.POINTWISE:
            shape = torch.broadcast_shapes(*(getattr(m, "shape", ()) for m in args))
            out = args[0].new_empty(shape, dtype=torch.result_type(*args[:2]))
        elif name == "cat":
            shape, axis = list(args[0][0].shape), args[1] if len(args) > 1 else 0
            shape[axis] = sum(m.shape[axis] for m in args[0])
            out = args[0][0].new_empty(shape)
        elif name == "linalg_vector_norm":      # over the last axis, kept
            out = args[0].new_empty(*args[0].shape[:-1], 1)
        else:
            out = func(*args, **(kwargs or {}))
        given = {m.untyped_storage()._cdata for m in tree_leaves((args, kwargs))
                 if isinstance(m, torch.Tensor)}
        for m in tree_leaves(out):
            if isinstance(m, torch.Tensor):
                storage = m.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in given and key not in self.seen:
                    self.seen.add(key)
                    self.live += size
                    weakref.finalize(storage, self.free, key, size)
        self.peak = max(self.peak, self.live)
        return out

    def free(self, key, size):
        self.seen.discard(key)
        self.live -= size


class FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel allocates it: its output, and nothing that grows with the
    context.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def workspace_bytes(config, tokens, context, batch=1, dtype=torch.bfloat16,
                    state_dtype=torch.float32, int8=False):
    """Most bytes of temporaries while `tokens` a row go through the model at the end of a context.

    Found by running one layer of each kind on the meta device. The logits are not in it.
    """
    kinds = "".join(dict.fromkeys(config.pattern))
    one = dataclasses.replace(config, pattern=kinds, vocab_size=16)
    with torch.device("meta"), torch.inference_mode():
        model = HybridLM(one, dtype).to(dtype)
        if int8:
            to_int8(model)
        x = torch.empty(batch, tokens, config.d_model, dtype=dtype)
    context = max(min(context, 2 ** 18), tokens)        # masks are no larger from there on
    cache = HybridCache(one, batch, context, dtype, "meta", state_dtype)
    cache.pos = context - tokens
    with torch.inference_mode(), FusedAttention(), LivePeak() as live:
        model.run_layers(x, cache)
    return live.peak + x.nbytes


def plan(config, context, batch=1, dtype=torch.bfloat16, state_dtype=torch.float32,
         prefill_chunk=0, int8=False, limit=None, snapshots=0, advise=True):
    """What inference needs, without weights: a dict

        parts       bytes of weights, kv, ssm_states, conv_states, snapshots, workspace, logits
        total_bytes, limit_bytes, fits
        prefill_chunk, largest_prefill_chunk, largest_context, largest_batch

    context: tokens of each of `batch` sequences, prompt and answer. limit: bytes, or None for no
    limit. prefill_chunk 0: 1024, or less if only less fits. Rows are prefilled one at a time.
    snapshots: copies of the states that are held (a chat has one). advise: look for the largest
    context and batch, too. Largest: with everything else as
    asked and this block, to a part in 300; None without a limit (or, for the context,
    without attention); 0 where nothing fits. Raises ValueError for sizes out of range.
    """
    for name, value in (("context", context), ("batch", batch)):
        if not 1 <= value <= 2 ** 40:
            raise ValueError(f"--{name} is {value}, must be from 1 to {2 ** 40}")
    if prefill_chunk < 0:
        raise ValueError(f"--prefill-chunk is {prefill_chunk}, must be at least 1, or 0 for auto")
    kinds, limit = dict(dtype=dtype, state_dtype=state_dtype), limit and int(limit)
    weights = int8_bytes(config, dtype) if int8 else config.weight_bytes(dtype)
    loading = loading_bytes(config, dtype) if int8 else 0

    @functools.cache
    def work(tokens, context, rows=1):
        return workspace_bytes(config, min(tokens, context), context, rows, int8=int8, **kinds)

    def parts_of(context, batch, chunk):
        cache = config.cache_bytes(batch, context, **kinds)
        states = cache["ssm"] + cache["conv"]
        workspace = max(work(1, context, batch), work(chunk, context),
                        loading - sum(cache.values()))
        return dict(weights=weights, kv=cache["kv"], ssm_states=cache["ssm"],
                    conv_states=cache["conv"], snapshots=snapshots * states, workspace=workspace,
                    logits=batch * config.vocab_size * (dtype.itemsize + 4))    # and in fp32
    total = lambda *sizes: sum(parts_of(*sizes).values())

    largest_chunk = None
    if limit is not None:
        least = parts_of(context, batch, 1)
        room = limit - sum(least.values()) + least["workspace"]
        largest_chunk = largest_block(lambda tokens: work(tokens, context), room, context,
                                      config.chunk_size) if least["workspace"] <= room else 0
    chunk = min(prefill_chunk or min(1024, largest_chunk or 1024), context)
    parts = parts_of(context, batch, chunk)
    needed = sum(parts.values())
    result = dict(parts=parts, total_bytes=needed, limit_bytes=limit,
                  fits=limit is None or needed <= limit, prefill_chunk=chunk,
                  largest_prefill_chunk=largest_chunk, largest_context=None, largest_batch=None)
    if limit is not None and advise:
        a_token = parts["kv"] // context
        a_row = (needed - weights - parts["workspace"]) // batch
        result["largest_batch"] = largest(lambda n: total(context, n, chunk) <= limit,
                                          batch + (limit - needed) // a_row)
        if a_token:
            result["largest_context"] = largest(lambda n: total(n, batch, chunk) <= limit,
                                                context + (limit - needed) // a_token)
    return result


def largest(fits, guess):
    """The most n with fits(n), to a part in 300, near a guess or below it; 0 if none."""
    low, high = 0, max(int(1.01 * guess) + 1, 0)            # fits, does not
    for near in (guess, int(1.003 * guess) + 1, int(0.99 * guess), guess // 2):
        if low < near < high:
            low, high = (near, high) if fits(near) else (low, near)
    while high - low > max(low // 300, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_block(work, room, context, unit):
    """The most tokens, at most context, whose work(tokens) bytes fit into the room; 0 if none.

    Temporaries come to grow in a straight line: it is drawn through blocks of 32 and 64 chunks of
    the scan, and followed. Where it promises too much, blocks are halved until one fits.
    """
    near, far = 32 * unit, 64 * unit
    tokens = min(near, context)
    if tokens < context and work(near) <= room:
        slope = max((work(far) - work(near)) / (far - near), 1e-9)
        tokens = min(near + int((room - work(near)) / slope) // unit * unit, context)
    while tokens and work(min(tokens, 2 * far)) > room:
        tokens //= 2
    return tokens


# ------------------------------------------------------------------------------------------------
# The plan: time


def step_bytes(config, context, batch=1, dtype=torch.bfloat16, state_dtype=torch.float32,
               int8=False):
    """Bytes that one decode step moves: all weights but the embedding table once; of every sequence
    its KV, and its states in and out.
    """
    weights = int8_bytes(config, dtype) if int8 else config.weight_bytes(dtype)
    table = config.vocab_size * config.d_model * dtype.itemsize
    cache = config.cache_bytes(batch, context, dtype, state_dtype)
    return weights - table + cache["kv"] + 2 * (cache["ssm"] + cache["conv"])


def prefill_flops(config, tokens):
    """FLOPs of a prompt, logits of its last token only."""
    parts = config.flops_by_part(tokens)
    return tokens * (sum(parts.values()) - parts["head"]) + parts["head"]


def roofline(config, context, batch, bandwidth, flops, **kinds):
    """Ceilings: decode tokens a second of the whole batch at this context, seconds of one prefill.

    bandwidth: bytes a second; flops: FLOP a second. kinds: dtype, state_dtype, int8.
    """
    decode = batch * sum(config.flops_by_part(context, decode=True).values())
    seconds = max(step_bytes(config, context, batch, **kinds) / bandwidth, decode / flops)
    return dict(decode_tokens_per_s=batch / seconds,
                prefill_seconds=prefill_flops(config, context) / flops)


def scenario(config, limit, inputs, outputs, bandwidth, flops, batch=0, **kinds):
    """So many tokens in, so many out, as many sequences at a time as the limit holds (or batch).

    Returns batch and tokens_per_s: generated tokens over the time of all prefills and of all decode
    steps, each at its own context (the mean context does, as the time of a step is linear in it).
    """
    batch = batch or plan(config, inputs + outputs, limit=limit, **kinds)["largest_batch"]
    if not batch:
        return dict(batch=0, tokens_per_s=0.0)
    step = roofline(config, inputs + outputs // 2, batch, bandwidth, flops, **kinds)
    prefill = batch * prefill_flops(config, inputs) / flops
    decode = batch * outputs / step["decode_tokens_per_s"]
    return dict(batch=batch, tokens_per_s=batch * outputs / (prefill + decode))


# ------------------------------------------------------------------------------------------------
# The three steps of generation


@torch.inference_mode()
def prefill(model, cache, tokens, chunk=1024):
    """Run tokens (b, t) into the cache in blocks, so that memory does not grow with t; last logits
    (b, v).
    """
    for piece in tokens.split(chunk, 1):
        logits = model(piece, cache, last_only=True)
    return logits[:, -1]


@torch.inference_mode()
def decode_one(model, cache, token):
    """One token a row, (b,) -> logits (b, v)."""
    with decode_settings():
        return model(token[:, None], cache)[:, -1]


class Decoder:
    """`decode_one` with shapes that do not change from step to step, so that CUDA can replay a
    captured graph and --compile can compile: decoder(token (b,)) -> logits (b, v), fp32.

    The position is a tensor on the device, and attention reads a fixed number of KV columns: the
    filled ones and at most an eighth more. When that number grows there is a new graph.
    """

    def __init__(self, model, cache, compiled=False):
        self.model, self.cache, self.graphs = model, cache, {}
        if cache.lengths is None:
            cache.set_lengths([cache.pos] * cache.batch)
        self.token = torch.zeros(cache.batch, dtype=torch.int64, device=cache.lengths.device)
        self.graphed = self.token.is_cuda
        self.run = torch.compile(self.step, fullgraph=True) if compiled else self.step

    def step(self):
        """Everything that touches the device: reads self.token, returns the logits."""
        model = self.model
        h = model.run_layers(model.embed(self.token[:, None]), self.cache)
        self.cache.lengths += 1
        return model.lm_head(h)[:, 0].float()

    @torch.inference_mode()
    def __call__(self, token):
        cache = self.cache
        cache.check(len(token), 1)
        if cache.lengths is None:
            raise ValueError("the cache went back to before this Decoder: make a new one")
        self.token.copy_(token)
        cache.columns = self.columns(cache.pos + 1)
        if self.graphed:
            if cache.columns not in self.graphs:
                self.graphs[cache.columns] = self.capture()
            graph, logits = self.graphs[cache.columns]
            graph.replay()
        else:
            with decode_settings():
                logits = self.run()
        cache.pos += 1
        return logits

    def columns(self, filled):
        """The next of 256, 288, 320, ... 512, 576, ...: eight steps to a doubling."""
        step = 1 << max((filled - 1).bit_length() - 4, 5)
        return min(max(-(-filled // step) * step, 256), self.cache.max_len)

    def capture(self):
        """(graph, its logits) for the columns that are set. The steps that warm up move the states,
        so these are put back.
        """
        saved = self.cache.snapshot()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):      # each from the same place: there may be room for one only
                self.run()
                self.cache.restore(saved)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool):
            logits = self.run()
        return graph, logits


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Token ids (b,) from logits (b, v). temperature 0 is argmax; top_k 0 and top_p 1 keep
    everything.

    top_p keeps the fewest tokens whose probability reaches p (the one that crosses it included).
    Filters in fp32. Draws argmax(p / Exp(1)), which is a draw from p and never makes the GPU wait
    for the CPU, as torch.multinomial does.
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
    p = logits.softmax(-1)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


PENALTY_WINDOW = 256        # tokens back that repetition_penalty looks


def penalise(logits, ids, penalty):
    """Logits (v,) of the ids seen lately made less likely: positive ones divided by the penalty,
    negative ones multiplied (Keskar et al. 2019). 1 changes nothing.
    """
    if penalty == 1 or not ids:
        return logits
    seen = torch.tensor(sorted(set(ids[-PENALTY_WINDOW:])), device=logits.device)
    value = logits[seen]
    return logits.scatter(0, seen, torch.where(value > 0, value / penalty, value * penalty))


@dataclasses.dataclass
class Settings:
    """How tokens are chosen and when a text ends. Raises ValueError for what is out of range."""

    max_tokens: int = 200
    temperature: float = 0.8        # 0 is greedy
    top_k: int = 0                  # 0 is off
    top_p: float = 0.95             # 1 is off
    repetition_penalty: float = 1.0
    stop: tuple = ()                # strings, never shown
    stop_ids: tuple = ()            # token ids, beside the separator
    think_budget: int = -1          # tokens of a thought before it is closed; -1 is off

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"--tokens is {self.max_tokens}, must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top-k is {self.top_k}, must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p is {self.top_p}, must be above 0 and at most 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition-penalty is {self.repetition_penalty}, must be positive")


# ------------------------------------------------------------------------------------------------
# Text


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


THINK, END_THINK = "<think>", "</think>"


class ThinkingBudget:
    """Closes a thought that goes on too long: at the first newline after `budget` tokens, or after
    `grace` more wherever that is (Nano 2, section 3.4; arXiv 2508.14444). Does nothing once the
    model has closed it by itself.

    Works on bytes, since </think> is one token in one tokenizer and three in another.
    """

    def __init__(self, encoding, budget, grace=500):
        self.encoding, self.budget, self.grace = encoding, budget, grace
        self.count, self.said, self.closed = 0, b"", False

    def watch(self, raw):
        """One more token of the thought -> ids that must come next, usually none."""
        if self.closed:
            return []
        self.count, self.said = self.count + 1, (self.said + raw)[-len(raw) - 16:]
        close = END_THINK.encode()
        if close in self.said:
            self.closed = True
            return []
        at_newline = self.count >= self.budget and b"\n" in raw
        if not at_newline and self.count < self.budget + self.grace:
            return []
        begun = next((n for n in range(len(close) - 1, 0, -1) if self.said.endswith(close[:n])), 0)
        rest = close[begun:].decode() if begun or at_newline else "\n" + END_THINK
        self.closed = True
        return self.encoding.encode(rest, allowed_special="all")


# The chat template of the released Nano 2 models. Its markers are special tokens; what people
# write is encoded as ordinary text, so that nobody can write a marker.
SYSTEM, USER, ASSISTANT = "<SPECIAL_10>System\n", "<SPECIAL_11>User\n", "<SPECIAL_11>Assistant\n"
END_TURN = "<SPECIAL_12>"


def without_switches(text):
    """A message without /think and /no_think, as the template strips them."""
    return text.replace("/think", "").replace("/no_think", "").strip()


def wants_thinking(messages, default=True):
    """The last /think or /no_think in the system's and the user's texts decides."""
    for text in messages:
        place = {switch: text.rfind(switch) for switch in ("/think", "/no_think")}
        if max(place.values()) >= 0:
            default = place["/think"] > place["/no_think"]
    return default


def markers(encoding, text):
    return encoding.encode(text, allowed_special="all")


def system_ids(encoding, text):
    """The system's turn, which is there even when it is empty."""
    return [*markers(encoding, SYSTEM), *encoding.encode_ordinary(without_switches(text) + "\n")]


def user_ids(encoding, text):
    """A user's turn and the head of the answer to it."""
    return [*markers(encoding, USER), *encoding.encode_ordinary(without_switches(text) + "\n"),
            *markers(encoding, ASSISTANT)]


def answer_ids(encoding, text):
    """An answer as later turns see it: without its thought."""
    visible = text.rpartition(END_THINK)[2].strip()
    return [*encoding.encode_ordinary(visible + "\n"), *markers(encoding, END_TURN + "\n")]


# ------------------------------------------------------------------------------------------------
# Generation


class Row:
    """One text being written: its generator, its stream, what it must say next.

    ids: everything seen and said; start: tokens that the cache holds when it begins.
    """

    def __init__(self, encoding, ids, seed, settings, start, device="cpu"):
        self.encoding, self.settings = encoding, settings
        self.ids, self.start, self.count, self.done = list(ids), start, 0, False
        self.generator = torch.Generator(device).manual_seed(seed)
        self.stream, self.forced = TextStream(settings.stop), collections.deque()
        self.budget, self.banned = None, None
        if settings.think_budget >= 0:
            self.budget = ThinkingBudget(encoding, settings.think_budget)
            if THINK in encoding.special_tokens_set:    # not again, once it is closed
                self.banned = encoding.encode_single_token(THINK)
        self.ends = {separator_id(encoding), *settings.stop_ids}

    def choose(self, logits):
        """The next id from logits (v,): what is forced, or a draw."""
        if self.forced:
            return self.forced.popleft()
        s = self.settings
        logits = penalise(logits, self.ids, s.repetition_penalty)
        if self.banned is not None and self.budget.closed:
            logits = logits.clone()
            logits[self.banned] = -torch.inf
        return sample(logits[None], s.temperature, s.top_k, s.top_p, self.generator).item()

    def accept(self, token, max_len):
        """The text that this id lets out. Sets .done at an end, a stop string, the last token, and
        when the cache has no room to go on.
        """
        self.ids.append(token)
        self.count += 1
        if token in self.ends:
            self.done = True
            return self.stream.feed(b"", final=True)
        raw = self.encoding.decode_single_token_bytes(token)
        if self.budget:
            self.forced.extend(self.budget.watch(raw))
        text = self.stream.feed(raw)
        full = self.count >= self.settings.max_tokens or self.length == max_len
        if full and not self.stream.stopped:
            text += self.stream.feed(b"", final=True)
        self.done = full or self.stream.stopped
        return text

    @property
    def length(self):
        """Tokens of this row in the cache: all but the last one said."""
        return self.start + max(self.count - 1, 0)


def stream_rows(model, rows, cache, logits, compiled=False):
    """Yield (row number, text) while rows write on from their logits (b, v), in one batch.

    The cache has seen everything but each row's last id. Rows that have ended are carried along
    and ignored. A row ends by itself or when its own part of the cache is full.
    """
    encoding, device = rows[0].encoding, logits.device
    unassigned = torch.full((model.config.vocab_size,), -torch.inf, device=device)
    unassigned[assigned_ids(encoding)] = 0      # ids that the tokenizer has no text for
    fixed = compiled or logits.is_cuda
    decode = Decoder(model, cache, compiled) if fixed else \
        lambda token: decode_one(model, cache, token)
    while True:
        tokens = [0 if row.done else row.choose(line)
                  for row, line in zip(rows, logits + unassigned)]
        for i, (row, token) in enumerate(zip(rows, tokens)):
            if not row.done:
                text = row.accept(token, cache.max_len)
                if row.done and cache.lengths is not None:      # it takes no room from now on
                    cache.lengths[i] = 0
                if text:
                    yield i, text
        if all(row.done for row in rows):
            return
        cache.pos = max(row.length for row in rows if not row.done)
        logits = decode(torch.tensor(tokens, device=device))


def start_rows(model, prompts, cache, chunk=1024, samples=1):
    """Prefill prompts (lists of ids), each alone, each into `samples` rows of the cache; logits
    (rows, v). No padding: a row knows its own length.
    """
    device, logits = model.backbone.embeddings.weight.device, []
    for i, ids in enumerate(prompts):
        part = cache.row(i * samples)
        logits.append(prefill(model, part, torch.tensor([ids], device=device), chunk))
        for j in range(1, samples):
            cache.copy_row(i * samples, i * samples + j, part.pos)
    lengths = [len(ids) for ids in prompts for _ in range(samples)]
    cache.pos = lengths[0]
    if len(set(lengths)) > 1:
        cache.set_lengths(lengths)
    return torch.cat(logits).repeat_interleave(samples, 0)


def generate_rows(model, encoding, prompts, settings=None, seeds=None, samples=1, max_len=None,
                  chunk=1024, state_dtype=torch.float32, compiled=False, stats=None):
    """Yield (row number, text): every prompt (str) continued `samples` times, in one batch.

    Row i of prompt j is drawn with seeds[j] + i (0 by default): a text does not depend on its
    neighbours. max_len: tokens that a row of the cache holds, by default the longest prompt +
    max_tokens. stats: a dict that receives prompt_tokens, prefill_seconds, tokens, seconds,
    cache_bytes. Raises ValueError for settings out of range and prompts that do not fit.
    """
    settings, seeds = settings or Settings(), seeds or [0] * len(prompts)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    first = [separator_id(encoding)]
    ids = [first + encoding.encode_ordinary(prompt) for prompt in prompts]
    longest = max(len(m) for m in ids)
    max_len = max_len or longest + settings.max_tokens
    if longest > max_len:
        raise ValueError(f"the prompt has {longest} tokens, the cache holds {max_len}")
    device = model.backbone.embeddings.weight.device
    cache = model.init_cache(len(ids) * samples, max_len, state_dtype=state_dtype)
    start = time.perf_counter()
    logits = start_rows(model, ids, cache, chunk, samples)
    stats = {} if stats is None else stats
    timed(stats, cache, logits, sum(map(len, ids)), start)
    rows = [Row(encoding, m, seed + i, settings, len(m), device)
            for m, seed in zip(ids, seeds) for i in range(samples)]
    start = time.perf_counter()
    try:
        yield from stream_rows(model, rows, cache, logits, compiled)
    finally:
        stats["seconds"] += time.perf_counter() - start
        stats["tokens"] += sum(row.count for row in rows)


def timed(stats, cache, logits, tokens, start):
    """Count a prompt that was begun at start in stats, when its logits are there."""
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
    for name, value in dict(prompt_tokens=tokens, prefill_seconds=time.perf_counter() - start,
                            tokens=0, seconds=0.0).items():
        stats[name] = stats.get(name, 0) + value
    stats["cache_bytes"] = cache.nbytes()


def generate(model, encoding, prompt, max_tokens=200, temperature=0.8, top_k=0, top_p=0.95,
             seed=0, stop=(), max_len=None, stats=None, **more):
    """Yield the continuation of prompt (str) piece by piece: complete UTF-8, up to max_tokens or a
    stop.

    Stops at the separator token, at any of the stop strings (not shown) and after max_tokens.
    more: further fields of Settings. Errors and the rest as in `generate_rows`.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    settings = Settings(max_tokens, temperature, top_k, top_p, stop=stop, **more)
    for _, text in generate_rows(model, encoding, [prompt], settings, [seed], max_len=max_len,
                                 stats=stats):
        yield text


class Session:
    """One sequence that goes on: a cache, the ids it has seen, and those that wait to be run.

    feed(ids) appends; write(settings, seed) yields text and appends what was said. The state can
    be saved and loaded, and a chat keeps it between turns: only new tokens are ever run.
    """

    def __init__(self, model, encoding, max_len, chunk=1024, state_dtype=torch.float32,
                 compiled=False):
        self.model, self.encoding, self.chunk, self.compiled = model, encoding, chunk, compiled
        self.cache = model.init_cache(1, max_len, state_dtype=state_dtype)
        self.seen, self.waiting, self.thinking = [], [], True

    @property
    def room(self):
        return self.cache.max_len - self.cache.pos - len(self.waiting)

    def feed(self, ids):
        """Raises ValueError if they do not fit, and then changes nothing."""
        if len(ids) > self.room:
            raise ValueError(f"{len(ids)} more tokens do not fit: "
                             f"{self.cache.max_len - self.room} of --context "
                             f"{self.cache.max_len} are taken")
        self.waiting += ids
        self.seen += ids

    def run(self, stats=None):
        """Everything that waits, through the model; logits (1, v) of the last."""
        if not self.waiting:
            raise ValueError("there is nothing to go on from: feed ids first")
        ids = torch.tensor([self.waiting], device=self.model.backbone.embeddings.weight.device)
        self.cache.lengths = self.cache.columns = None      # a decoder may have set them
        start = time.perf_counter()
        logits = prefill(self.model, self.cache, ids, self.chunk)
        timed({} if stats is None else stats, self.cache, logits, len(self.waiting), start)
        self.waiting = []
        return logits

    def write(self, settings, seed=0, stats=None):
        """Yield text from here on. However it ends, what was said belongs to the sequence."""
        stats, logits = {} if stats is None else stats, None
        logits = self.run(stats)
        begun, before = self.cache.pos, len(self.seen)
        row = Row(self.encoding, self.seen, seed, settings, begun, logits.device)
        start = time.perf_counter()
        try:
            for _, text in stream_rows(self.model, [row], self.cache, logits, self.compiled):
                yield text
        finally:
            self.seen = row.ids
            self.waiting = row.ids[before + self.cache.pos - begun:]
            stats["seconds"] = stats.get("seconds", 0.0) + time.perf_counter() - start
            stats["tokens"] = stats.get("tokens", 0) + row.count

    def mark(self):
        """A place to go back to; everything that waited must have been run."""
        return self.cache.snapshot(), len(self.seen)

    def back(self, mark):
        self.cache.restore(mark[0])
        self.seen, self.waiting = self.seen[:mark[1]], []


class Chat:
    """Turns on one Session. After an answer, or where it was left, the state goes back to before it
    and takes the answer without its thought, as the template writes history: a thought is never
    part of a later turn. An answer ends where the context does, with room for its own end.
    """

    def __init__(self, session, system="", settings=None):
        self.session, self.settings = session, settings or Settings()
        if not session.seen:                                    # not a loaded one
            session.feed(system_ids(session.encoding, system))
            session.thinking = wants_thinking([system])

    def say(self, text, seed=0, stats=None):
        """Yield the answer, thought included. Raises ValueError, with nothing changed, for a turn
        that does not fit.
        """
        session, encoding = self.session, self.session.encoding
        thinking = wants_thinking([text], session.thinking) and self.settings.think_budget != 0
        opening = markers(encoding, THINK + ("\n" if thinking else END_THINK))
        turn, end = user_ids(encoding, text), answer_ids(encoding, "")
        room = session.room - len(turn) - len(opening) - len(end) - 1
        if room < 1:
            raise ValueError(f"the turn of {len(turn)} tokens and an answer do not fit: "
                             f"{session.room} of --context {session.cache.max_len} are left")
        session.feed(turn)
        session.run(stats)
        session.thinking, before = wants_thinking([text], session.thinking), session.mark()
        session.feed(opening)
        settings = dataclasses.replace(
            self.settings, stop=(*self.settings.stop, END_TURN),
            max_tokens=min(self.settings.max_tokens, room),
            think_budget=self.settings.think_budget if thinking else -1)
        said = []
        try:
            for piece in session.write(settings, seed, stats):
                said.append(piece)
                yield piece
        finally:
            session.back(before)
            answer = "".join(said)
            visible = answer if END_THINK in answer or not thinking else ""
            session.feed(answer_ids(encoding, visible)[-session.room:])


# ------------------------------------------------------------------------------------------------
# States on disk


def model_fingerprint(model):
    """A short text that tells models apart: the config and the first values of every parameter."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(model.config)).encode())
    for name, p in model.named_parameters():
        digest.update(name.encode() + p.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_state(session, path):
    """Write a session's state as safetensors: KV up to the position, SSM and conv states, and the
    ids that wait. Written under another name and renamed.
    """
    from safetensors.torch import save_file
    cache = session.cache
    tensors = {f"kv.{i}": m[:, :, :, :cache.pos] for i, m in cache.kv.items()}
    tensors |= {f"ssm.{i}": m for i, m in cache.ssm.items()}
    tensors |= {f"conv.{i}": m for i, m in cache.conv.items()}
    tensors = {name: m.contiguous().cpu() for name, m in tensors.items()}
    about = dict(pos=str(cache.pos), waiting=json.dumps(session.waiting),
                 seen=json.dumps(session.seen[-PENALTY_WINDOW:]),
                 thinking=json.dumps(session.thinking), model=model_fingerprint(session.model))
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=about))


def load_state(session, path):
    """Put a saved state into a new session, exactly. Raises FileNotFoundError or ValueError with
    one line: no such file, not a state, of another model or dtype, longer than the cache.
    """
    from safetensors import SafetensorError, safe_open
    cache = session.cache
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("model") != model_fingerprint(session.model):
                raise ValueError(f"{path} is no state of this model: it was written by another one")
            pos, waiting = int(about["pos"]), json.loads(about["waiting"])
            if pos + len(waiting) > cache.max_len:
                raise ValueError(f"{path} holds {pos + len(waiting)} tokens, the cache "
                                 f"{cache.max_len}: ask for a larger --context")
            for part in ("kv", "ssm", "conv"):
                for i, m in getattr(cache, part).items():
                    value = file.get_tensor(f"{part}.{i}")
                    if value.dtype != m.dtype:
                        raise ValueError(f"{path} holds {part} in {str(value.dtype)[6:]}, the "
                                         f"cache is {str(m.dtype)[6:]}: see --state-dtype")
                    (m[:, :, :, :pos] if part == "kv" else m).copy_(value)
            session.seen = json.loads(about["seen"])
            session.thinking = json.loads(about["thinking"])
    except FileNotFoundError:
        raise FileNotFoundError(f"--load-state {path} does not exist") from None
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"--load-state {path} is not a whole state file: {error}") from None
    cache.pos, session.waiting = pos, waiting


# ------------------------------------------------------------------------------------------------
# --plan, --fit: what it will take, what it took


def gib(n):
    return f"{n / GIB:9.3f} GiB"


def describe_plan(config, found, context, batch, dtype, int8):
    """The text of a plan."""
    lines = [f"{config.pattern}: {config.n_params():,} parameters in "
             f"{'int8 and ' if int8 else ''}{str(dtype)[6:]}, {batch} x {context} tokens"]
    lines += [f"    {name:12s}{gib(value)}" for name, value in found["parts"].items()]
    lines += [f"    {'total':12s}{gib(found['total_bytes'])}   (prefill in blocks of "
              f"{found['prefill_chunk']} tokens, one row at a time)"]
    if found["limit_bytes"] is not None:
        over = found["total_bytes"] - found["limit_bytes"]
        verdict = f"fits, {-over / GIB:.3f} GiB to spare" if found["fits"] else \
            f"does NOT fit: {over / GIB:.3f} GiB too much"
        context = found["largest_context"]
        lines += [f"    {'limit':12s}{gib(found['limit_bytes'])}   {verdict}",
                  f"largest, with the rest as asked: block of {found['largest_prefill_chunk']} "
                  f"tokens | context "
                  f"{'without limit' if context is None else f'{context} tokens'} | batch "
                  f"{found['largest_batch']}"]
    return "\n".join(lines)


def check_plan(config, limit, context, batch, **kinds):
    """The plan of a request that fits. Raises ValueError, before anything is allocated, with the
    largest that would.
    """
    found = plan(config, context, batch, limit=limit, advise=False, **kinds)
    if found["fits"]:
        return found
    found = plan(config, context, batch, limit=limit, **kinds)
    weights, room = found["parts"]["weights"], []
    if found["largest_prefill_chunk"]:
        room.append(f"with --prefill-chunk {found['largest_prefill_chunk']} it would fit")
    if found["largest_context"]:
        room.append(f"a context of {found['largest_context']} at batch {batch} fits")
    if found["largest_batch"]:
        room.append(f"a batch of {found['largest_batch']} at this context fits")
    if weights > limit:
        room = ["the weights alone are more"]
    raise ValueError(f"{batch} x {context} tokens need {found['total_bytes'] / GIB:.3f} GiB "
                     f"(weights {weights / GIB:.3f}), {limit / GIB:.3f} GiB are there: "
                     f"{', '.join(room) or 'nothing smaller in context or batch fits'}")


def settle_limit(run, device):
    """Bytes that a run may take: --memory-gib or what the --gpu has, and never more than is free
    here, unless it is a plan.
    """
    if run.gpu and run.gpu not in GPUS:
        raise ValueError(f"--gpu is {run.gpu!r}, must be one of {', '.join(GPUS)}")
    if not 0 <= run.memory_gib < 2 ** 40:
        raise ValueError(f"--memory-gib is {run.memory_gib}, must be positive")
    asked = int((run.memory_gib or (GPUS[run.gpu][0] if run.gpu else 0)) * GIB) or None
    if run.plan:
        return asked
    return min(asked or free_bytes(device), free_bytes(device))


def cap_memory(device, limit):
    """Let CUDA refuse what goes beyond the limit."""
    if device.startswith("cuda"):
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0),
                                                   torch.device(device).index)


def show_plan(run):
    """--plan: bytes by part and the verdict, then what each GPU could do at best."""
    config = pick_config(run)
    dtype = pick_dtype(run.dtype) or torch.bfloat16
    kinds = dict(dtype=dtype, state_dtype=pick_state_dtype(run.state_dtype), int8=run.int8)
    context = run.context or 131072
    found = plan(config, context, run.batch, prefill_chunk=run.prefill_chunk,
                 limit=settle_limit(run, "cpu"), **kinds)
    print(describe_plan(config, found, context, run.batch, dtype, run.int8))
    print(f"\n{'ceilings':12s}{'GiB':>8s}{'fits':>6s}{'decode tok/s':>14s}{'prefill s':>11s}"
          f"    (bytes / bandwidth, FLOPs / peak; expect 70%, and a quarter without graphs)")
    ceilings = {}
    for name, (memory, bandwidth, flops) in GPUS.items():
        if run.gpu in ("", name):
            best = roofline(config, context, run.batch, bandwidth * 1e9, flops * 1e12, **kinds)
            ceilings[name] = best
            fits = "yes" if found["total_bytes"] <= memory * GIB else "no"
            print(f"{name:12s}{memory:8.2f}{fits:>6s}{best['decode_tokens_per_s']:14.1f}"
                  f"{best['prefill_seconds']:11.1f}")
    return dict(found, ceilings=ceilings)


@contextlib.contextmanager
def measured_peak(device):
    """Yields a function that tells the bytes this process has come to hold at most since here. On a
    CPU freed blocks go back to the kernel at once meanwhile, so that resident is what is alive.
    """
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 65536)             # M_MMAP_MAX, in case tune_cpu was here
        libc.mallopt(-3, 2 ** 16)           # M_MMAP_THRESHOLD
        libc.malloc_trim(0)
    reset_peak()
    before = resident_bytes()
    yield lambda: resident_bytes(peak=True) - before


def fit(run):
    """--fit: build a preset with random weights within --memory-gib, prefill --context tokens,
    decode, and hold the plan against what it took.
    """
    device, config = pick_device(run.device), pick_config(run)
    dtype = pick_dtype(run.dtype, device)
    kinds = dict(dtype=dtype, state_dtype=pick_state_dtype(run.state_dtype), int8=run.int8)
    context, tokens = run.context or 8192, min(run.tokens, 32)
    limit = settle_limit(run, device)
    if device == "cpu" and not pathlib.Path("/proc/self/clear_refs").exists():
        raise ValueError("--fit on a CPU reads the peak from /proc, which is Linux's")
    found = check_plan(config, limit, context + tokens, run.batch, prefill_chunk=run.prefill_chunk,
                       snapshots=device.startswith("cuda"), **kinds)
    print(describe_plan(config, found, context + tokens, run.batch, dtype, run.int8))
    cap_memory(device, limit)

    # Code is loaded and threads start when they are first used: with a model of nothing.
    tiny = dataclasses.replace(config, vocab_size=16, d_model=16, mlp_dim=16)
    warm = build_random(tiny, device, dtype)
    with torch.inference_mode():
        warm(torch.zeros(1, 2 * config.chunk_size, dtype=torch.int64, device=device),
             warm.init_cache(1, 2 * config.chunk_size))
    del warm
    with measured_peak(device) as peak, torch.inference_mode():
        model = build_random(config, device, dtype, run.seed, run.int8)
        cache = model.init_cache(run.batch, context + tokens, dtype, kinds["state_dtype"])
        generator = torch.Generator().manual_seed(run.seed)
        ids = torch.randint(config.vocab_size, (1, context), generator=generator).to(device)
        wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
        start, last = time.perf_counter(), []
        chunk = found["prefill_chunk"]
        bar = tqdm(total=run.batch * context, unit="token", disable=None, desc="prefill")
        for i in range(run.batch):
            part = cache.row(i)
            for piece in ids.split(chunk, 1):
                logits = model(piece, part, last_only=True)
                bar.update(piece.shape[1])
            last.append(logits[:, -1])
        bar.close()
        cache.pos, logits = context, torch.cat(last)
        wait()
        middle = time.perf_counter()
        decode = Decoder(model, cache)
        for _ in range(tokens):
            logits = decode(logits.argmax(-1))
        wait()
        end = time.perf_counter()
        taken = peak()
    size = sum(m.nbytes for m in (*model.parameters(), *model.buffers()))
    parts, statics = found["parts"], cache.nbytes()
    kept = sum(parts[name] for name in ("kv", "ssm_states", "conv_states"))
    rows = [("weights", parts["weights"], size), ("caches", kept, statics),
            ("workspace", found["total_bytes"] - parts["weights"] - kept, taken - size - statics),
            ("peak", found["total_bytes"], taken)]
    print(f"\n{'part':12s}{'predicted':>15s}{'measured':>15s}")
    for name, a, b in rows:
        print(f"{name:12s}  {gib(a)}  {gib(b)}" + (f"   {b / a - 1:+.1%}" if a else ""))
    print(f"prefill {run.batch * context / (middle - start):.0f} tokens/s, decode "
          f"{run.batch * tokens / (end - middle):.1f} tokens/s; {device}, random weights")
    return dict(tokens_per_s=run.batch * tokens / (end - middle),
                prefill_tokens_per_s=run.batch * context / (middle - start), peak_bytes=taken,
                predicted_bytes=found["total_bytes"], parts=parts, fits=taken <= limit)


# ------------------------------------------------------------------------------------------------
# --bench


def baseline(config):
    """A transformer of the same width, heads, depth and number of parameters: *- repeated, with
    rotary positions, its MLP as wide as that takes.
    """
    pairs = (len(config.pattern) + 1) // 2
    pattern = "*-" * pairs
    one = dataclasses.replace(config, pattern=pattern, mlp_dim=1, rope_theta=1e4)
    width = (config.n_params() - one.n_params()) // (2 * config.d_model * pairs) + 1
    return dataclasses.replace(one, mlp_dim=max(width, 1))


def measured_bandwidth(device, dtype=torch.float32):
    """Bytes a second of copying 256 MB (1 GB on a GPU), read and write counted."""
    a = torch.ones(2 ** 26 if device == "cpu" else 2 ** 28, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / median_seconds(lambda: b.copy_(a), device)


def measured_flops(device, dtype):
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    return 2 * 2048 ** 3 / median_seconds(lambda: a @ a, device)


class Measured:
    """One model at one batch and context: seconds of a prefill of one row and of a decode step."""

    def __init__(self, model, batch, context, chunk=1024, repeats=20):
        device = model.backbone.embeddings.weight.device
        cache = model.init_cache(batch, context + repeats + 8)
        ids = torch.randint(model.config.vocab_size, (1, context), device=device)

        def run_prompt():
            part = cache.row(0)
            return prefill(model, part, ids, chunk)
        self.prefill = median_seconds(run_prompt, device, repeats=3)
        for i in range(1, batch):
            cache.copy_row(0, i, context)
        cache.pos = context
        token = ids[0, :1].expand(batch).contiguous()
        decode = Decoder(model, cache) if device.type == "cuda" else \
            lambda token: decode_one(model, cache, token)
        self.decode = median_seconds(lambda: decode(token), str(device), repeats=repeats)
        self.cache_bytes = cache.nbytes()
        self.attention = None
        if device.type != "cuda":
            self.attention = self.attention_seconds(model, cache, repeats) / self.decode

    @torch.inference_mode()
    def attention_seconds(self, model, cache, repeats):
        """Of the attention layers alone at this context."""
        x = torch.zeros(cache.batch, 1, model.config.d_model,
                        dtype=model.compute_dtype or model.backbone.embeddings.weight.dtype)
        blocks = [(block, layer_state("*", i, cache, None, None))
                  for i, block in enumerate(model.backbone.layers) if block.letter == "*"]
        with decode_settings():
            return median_seconds(lambda: [block(x, **state) for block, state in blocks],
                                  repeats=repeats) if blocks else 0.0


def against_transformers(model, batch, context, rounds=5):
    """Seconds of a decode step of ours and of transformers' on the same weights, in turn; None if
    transformers is not installed.
    """
    import importlib.util
    import statistics
    import tempfile
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from model import save_hf
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=model.lm_head.weight.dtype).eval()
    ids = torch.randint(model.config.vocab_size, (batch, context))
    cache = model.init_cache(batch, context + 200)
    times = {"ours": [], "transformers": []}
    with torch.inference_mode():
        prefill(model, cache, ids)
        past = theirs(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        for _ in range(rounds):
            times["ours"].append(median_seconds(
                lambda: decode_one(model, cache, ids[:, 0]), repeats=9))
            with decode_settings():
                times["transformers"].append(median_seconds(
                    lambda: theirs(input_ids=ids[:, :1], past_key_values=past, use_cache=True),
                    repeats=9))
    return {name: statistics.median(t) for name, t in times.items()}


def bench(run):
    """--bench: the hybrid, a transformer of its size and the hybrid without attention, in the same
    code: speed against context and batch, then the many-tokens-out scenario, all beside the
    roofline of this machine.
    """
    device = pick_device(run.device)
    settings = torch.cuda.get_device_name() if device.startswith("cuda") else device
    if device == "cpu":
        settings = tune_cpu()
    dtype = pick_dtype(run.dtype, device)
    config, limit = pick_config(run), settle_limit(run, device)
    check_plan(config, limit, (run.context or 256) + 64, 1, dtype=dtype)
    bandwidth, flops = measured_bandwidth(device), measured_flops(device, dtype)
    print(f"machine      {settings}; {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"copies {bandwidth / 1e9:.1f} GB/s, 2048-cubed matmul {flops / 1e12:.2f} TFLOP/s "
          f"({str(dtype)[6:]})")
    other = HybridConfig.preset("qwen3-8b-shape") if config.d_model >= 4096 else baseline(config)
    arms = {"hybrid": config, "transformer": other, "no attention":
            dataclasses.replace(config, pattern=config.pattern.replace("*", "M"))}
    contexts = (8192, 32768, 131072) if device != "cpu" else (256, 1024, 4096, 16384)
    contexts = [n for n in contexts if n <= (run.context or n)] or [run.context]
    batches = (1, 8)
    kinds = dict(dtype=dtype)
    print(f"{'model':14s}{'context':>9s}{'batch':>7s}{'prefill tok/s':>15s}{'decode ms':>11s}"
          f"{'tok/s':>9s}{'MBU':>6s}{'attention':>11s}{'cache MiB':>11s}")
    table = {}
    for name, arm in arms.items():
        fits = {(batch, n): plan(arm, n + 64, batch, limit=limit, advise=False, **kinds)["fits"]
                for batch in batches for n in contexts}
        model = build_random(arm, device, dtype, run.seed) if any(fits.values()) else None
        for batch in batches:
            for context in contexts:
                if not fits[batch, context]:
                    print(f"{name:14s}{context:9d}{batch:7d}   does not fit {limit / GIB:.2f} GiB")
                    continue
                m = Measured(model, batch, context)
                used = step_bytes(arm, context, batch, **kinds) / m.decode / bandwidth
                share = "" if m.attention is None else f"{m.attention:10.0%}"
                print(f"{name:14s}{context:9d}{batch:7d}{context / m.prefill:15.0f}"
                      f"{1e3 * m.decode:11.2f}{batch / m.decode:9.0f}{used:6.0%}{share:>11s}"
                      f"{m.cache_bytes / 2 ** 20:11.1f}", flush=True)
                table[f"{name} {batch} x {context}"] = dict(
                    prefill_tokens_per_s=context / m.prefill, tokens_per_s=batch / m.decode,
                    decode_ms=1e3 * m.decode, mbu=used, attention=m.attention)
        del model
    result = dict(table=table, bandwidth=bandwidth)
    if device == "cpu":
        model = build_random(config, device, dtype, run.seed)
        result["transformers"] = {}
        for batch in batches:
            pair = against_transformers(model, batch, 512)
            if pair is None:
                print("transformers is not installed: no comparison with it")
                break
            ratio = pair["transformers"] / pair["ours"]
            print(f"decode, batch {batch}, after 512 tokens: ours {1e3 * pair['ours']:.2f} ms, "
                  f"transformers {1e3 * pair['transformers']:.2f} ms: {ratio:.2f}x")
            result["transformers"][str(batch)] = ratio
    result["scenario"] = bench_scenario(run, config, other, device, dtype, bandwidth, flops)
    first = table[f"hybrid 1 x {contexts[0]}"]
    return dict(tokens_per_s=first["tokens_per_s"],
                prefill_tokens_per_s=first["prefill_tokens_per_s"], peak_bytes=peak_bytes(device),
                **result)


def bench_scenario(run, config, other, device, dtype, bandwidth, flops):
    """Many tokens out of a fixed memory: 8k in and 16k out as in the paper on a GPU, a sixteenth of
    that on a CPU. The batch is what fits, found by `plan`; decode steps are measured at five
    contexts on the way and added up.
    """
    inputs = 8192 if device != "cpu" else 512
    inputs = min(inputs, run.context or inputs)
    outputs = 2 * inputs
    kinds = dict(dtype=dtype)
    limit = int(run.memory_gib * GIB)
    if not limit:               # what the transformer needs for one and a half sequences
        one = plan(other, inputs + outputs, **kinds)
        limit = int(one["total_bytes"] + 0.5 * one["parts"]["kv"])
    print(f"\n{inputs} tokens in, {outputs} out, within {limit / GIB:.3f} GiB")
    print(f"{'model':14s}{'batch':>7s}{'tok/s measured':>16s}{'tok/s roofline':>16s}")
    result = {}
    for name, arm in (("hybrid", config), ("transformer", other)):
        best = scenario(arm, limit, inputs, outputs, bandwidth, flops, **kinds)
        batch, seconds = best["batch"], None
        if batch:
            model = build_random(arm, device, dtype, run.seed)
            places = [inputs + outputs * i // 4 for i in range(5)]
            at = [Measured(model, batch, place, repeats=7) for place in places]
            steps = [m.decode for m in at]
            mean = sum(steps[1:-1], (steps[0] + steps[-1]) / 2) / 4
            seconds = batch * at[0].prefill + outputs * mean
            del model
        best["measured_tokens_per_s"] = batch * outputs / seconds if batch else 0.0
        result[name] = best
        print(f"{name:14s}{batch:7d}{best['measured_tokens_per_s']:16.1f}"
              f"{best['tokens_per_s']:16.1f}", flush=True)
    a, b = result["hybrid"], result["transformer"]
    if b["batch"]:
        measured = a["measured_tokens_per_s"] / b["measured_tokens_per_s"]
        predicted = a["tokens_per_s"] / b["tokens_per_s"]
        print(f"{'ratio':14s}{a['batch'] / b['batch']:7.1f}{measured:16.2f}{predicted:16.2f}")
        result["ratio"] = dict(measured=measured, roofline=predicted)
    return result


def quality(run):
    """--quality: bits a byte of the checkpoint on the validation part of --data, with weights as
    stored and in int8.
    """
    from data import load_data
    from train_fp8 import bits_per_byte, evaluate
    folder, device = pathlib.Path(run.checkpoint or newest_checkpoint()), pick_device(run.device)
    if device == "cpu":
        tune_cpu()
    found = {}
    for name, int8 in (("stored", False), ("int8", True)):
        model, encoding = load_run(folder, device, pick_dtype(run.dtype), int8)
        text = load_data(run.data, run.data, model.config.vocab_size,
                         (folder / "tokenizer.json").read_text(encoding="utf-8"))
        nats = evaluate(model, text.validation, progress=True)
        found[name] = bits_per_byte(nats, len(text.validation) - 1, text.validation_bytes)
        size = sum(m.nbytes for m in (*model.parameters(), *model.buffers()))
        print(f"{name:8s} weights {size / 2 ** 20:9.2f} MiB, {found[name]:.4f} bits a byte")
    cost = found["int8"] / found["stored"] - 1
    print(f"int8 costs {cost:+.3%} of bits a byte on {run.data}")
    return dict(val_bpb=found["stored"], int8_bpb=found["int8"], cost=cost)


# ------------------------------------------------------------------------------------------------
# python infer.py


@dataclasses.dataclass
class Run:
    """Continue a prompt, chat, or plan and measure: --plan, --fit, --bench, --quality."""

    checkpoint: str = ""            # folder; by default out/compressed, else out/base
    prompt: str = dataclasses.field(default="", metadata=dict(nargs="+"))   # texts to go on from
    tokens: int = 200               # at most so many are generated
    samples: int = 1                # continuations of every prompt, from one prefill
    temperature: float = 0.7        # of the sampling; 0 is greedy
    top_k: int = 0                  # sample from so many of the likeliest tokens; 0 is off
    top_p: float = 0.95             # sample from the likeliest that reach this; 1 is off
    repetition_penalty: float = 1.0     # of the last 256 tokens; 1 is off
    stop: str = dataclasses.field(default="", metadata=dict(nargs="*"))  # strings that end the text
    stop_ids: int = dataclasses.field(default=(), metadata=dict(nargs="*"))  # ids that end the text
    seed: int = 0                   # of the sampling; sample i of a prompt has seed + i
    context: int = 0                # tokens that a row of the cache holds; 0 = prompt + tokens
    chat: bool = False              # turns from standard input, in the released chat template
    system: str = ""                # the system's message in a chat; /think or /no_think inside
    think_budget: int = -1          # in a chat: tokens of a thought until it is closed, at the
                                    # next newline or 500 later; 0 no thought, -1 off
    save_state: str = ""            # file for the state after the text
    load_state: str = ""            # go on from a state file; --prompt is appended to it
    device: str = "auto"            # auto, cuda, mps or cpu
    dtype: str = "auto"             # auto (as stored), float32 or bfloat16
    state_dtype: str = "float32"    # of the Mamba states: float32, or bfloat16 to save a little
    int8: bool = False              # weights of linear layers in int8, a scale a row
    prefill_chunk: int = 0          # tokens of a prompt run at once; 0 = 1024, or what fits
    compile: bool = False           # torch.compile the decode step (on CUDA it is a graph anyway)
    memory_gib: float = 0.0         # refuse what needs more; 0 = what --gpu has, or what is free
    gpu: str = ""                   # as --memory-gib: a10g, l4, rtx4090, a100, h100 or h200
    preset: str = ""                # of --plan, --fit, --bench: a name from model.py
    pattern: str = ""               # another layer pattern than the preset's
    batch: int = 1                  # sequences, of --plan and --fit
    plan: bool = False              # bytes by part, what fits, ceilings; needs no weights
    fit: bool = False               # build --preset with random weights and hold the plan to it
    bench: bool = False             # speed against context and batch, hybrid and transformer
    quality: bool = False           # bits a byte on --data, weights as stored and in int8
    data: str = "stdlib"            # text of --quality, as in training

    def __post_init__(self):
        modes = [name for name in ("plan", "fit", "bench", "quality", "chat")
                 if getattr(self, name)]
        if len(modes) > 1:
            raise ValueError(f"--{modes[0]} and --{modes[1]}: give one of them")
        for name in ("samples", "batch", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, must be at least 1")
        if self.context < 0 or self.prefill_chunk < 0:
            raise ValueError("--context and --prefill-chunk must be at least 1, or 0 for auto")
        if not 0 <= self.seed < 2 ** 63 or self.tokens > 2 ** 40:
            raise ValueError(f"--seed {self.seed} or --tokens {self.tokens} is out of range")
        if not modes or self.chat:
            for name in ("preset", "pattern"):
                if getattr(self, name):
                    raise ValueError(f"--{name} is for --plan, --fit and --bench: what is run is "
                                     "named by --checkpoint")
        if self.system and (not self.chat or self.load_state):
            raise ValueError("--system begins a --chat: not without one, nor with --load-state")
        if self.bench and (self.int8 or self.state_dtype != "float32"):
            raise ValueError("--bench measures weights and states as they are: no --int8, no "
                             "--state-dtype")
        if self.chat and self.samples > 1:
            raise ValueError("--samples is for texts, a --chat has one")
        if self.save_state and not pathlib.Path(self.save_state).absolute().parent.is_dir():
            raise ValueError(f"--save-state {self.save_state}: its folder does not exist")
        if self.think_budget >= 0 and not self.chat:
            raise ValueError("--think-budget is for --chat: elsewhere there is no thought to close")
        prompts = self.prompt or []
        if not all(prompts):
            raise ValueError("--prompt is empty: give it some text")
        if (self.save_state or self.load_state) and not self.chat and (
                self.samples > 1 or len(prompts) > 1):
            raise ValueError("--save-state and --load-state are for one prompt and one sample")


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
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def pick_dtype(name, device=None):
    """A torch dtype by name; auto is None (as stored), or for a device what it computes in."""
    if name not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype is {name!r}, must be auto, float32 or bfloat16")
    if name == "auto":
        return device and (torch.float32 if device == "cpu" else torch.bfloat16)
    return getattr(torch, name)


def pick_state_dtype(name):
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"--state-dtype is {name!r}, must be float32 or bfloat16")
    return getattr(torch, name)


def pick_config(run):
    """Of --preset and --pattern, else of --checkpoint, else the toy."""
    if run.checkpoint and not run.preset:
        return config_from_hf(read_json(pathlib.Path(run.checkpoint) / "config.json"))
    return HybridConfig.preset(run.preset or "toy",
                               **(dict(pattern=run.pattern) if run.pattern else {}))


def peak_bytes(device):
    """The most memory this process has held: allocated on a CUDA device, else resident in all."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:         # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


PIPELINE = pathlib.Path("out/base"), pathlib.Path("out/compressed")     # where the scripts write


def newest_checkpoint():
    """out/compressed if the pipeline has come that far, else out/base."""
    base, compressed = PIPELINE
    return compressed if (compressed / "config.json").exists() else base


def plot_pipeline(base, compressed, text, path):
    """What the three commands did, from the logs of two run folders: pre-training, the cut and its
    recovery, memory before and after, a sample of text. False if a log has no end yet.
    """
    training, recovery = (read_rows(folder / "metrics.jsonl") for folder in (base, compressed))
    if not (training and recovery and "final" in training[-1] and "final" in recovery[-1]):
        return False
    from matplotlib.figure import Figure
    end, final = training[-1]["final"], recovery[-1]["final"]
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplot_mosaic([["pre"] * 2 + ["cut"] * 2, ["memory"] + ["text"] * 3])
    steps = [row for row in training if "loss" in row]
    seen = [row for row in steps if "val_loss" in row]
    axes["pre"].plot([row["tokens"] / 1e6 for row in steps], [row["loss"] for row in steps],
                     color="#4c72b0", alpha=0.4, linewidth=0.8, label="training")
    axes["pre"].plot([row["tokens"] / 1e6 for row in seen] + [end["tokens"] / 1e6],
                     [row["val_loss"] for row in seen] + [end["val_loss"]], "o-", color="#c44e52",
                     label="validation")
    axes["pre"].set(title=f"1. pre-trained ({end['recipe']}): {end['val_bpb']:.3f} bits a byte",
                    xlabel="tokens [millions]", ylabel="loss [nats a token]",
                    ylim=(end["val_loss"] - 0.5, min(7, steps[0]["loss"])))

    seen = [row for row in recovery if "val_loss" in row]
    tokens = [0] + [row["tokens"] / 1e6 for row in seen]
    losses = [final["pruned_val_loss"]] + [row["val_loss"] for row in seen]
    last = max(row.get("tokens", 0) for row in recovery) / 1e6
    axes["cut"].plot(tokens + [last], losses + [final["student_val_loss"]], "o-", color="#4c72b0",
                     label="cut, then distilled")
    axes["cut"].axhline(final["teacher_val_loss"], color="#444444", linestyle="--",
                        label="before the cut")
    won = final["recovered"]
    axes["cut"].set(title="2. cut" + (f": {won:.0%} won back" if won else ""),
                    xlabel="tokens of distillation [millions]",
                    ylabel="validation loss [nats a token]")
    before, after = final["memory_gib_before"], final["memory_gib_after"]
    bars = axes["memory"].bar(["before", "after"], [1024 * before, 1024 * after],
                              color=["#999999", "#4c72b0"])
    axes["memory"].bar_label(bars, [f"{n / 1e6:.2f} M\nparameters" for n in
                                    (final["params_before"], final["params_after"])], padding=2)
    axes["memory"].set(title=f"3. memory {after / before - 1:+.0%}", ylabel="planned memory [MiB]")
    axes["memory"].margins(y=0.25)
    for name in ("pre", "cut"):
        axes[name].grid(alpha=0.3)
        axes[name].legend()
    axes["text"].axis("off")
    axes["text"].set_title("4. what the compressed model writes", loc="left")
    lines = [line[:105] for line in text.expandtabs(4).splitlines()[:16]]
    axes["text"].text(0, 1, "\n".join(lines).replace("$", r"\$"), family="monospace", fontsize=8,
                      va="top")
    figure.savefig(path, dpi=120)
    return True


class Interrupt(StopRequest):
    """Ctrl-C or SIGTERM ends the text after the token that is being made: the state stays whole."""

    def watch(self, pieces):
        """The pieces, until Ctrl-C."""
        for piece in pieces:
            yield piece
            if self.asked:
                pieces.close()
                return


DEFAULT_PROMPT = "import os\n\n\ndef read_"


def prepare(run, prompts):
    """(model, encoding, device, context, block of prefill) of a request that fits; nothing large is
    allocated before that is known.
    """
    folder, device = pathlib.Path(run.checkpoint or newest_checkpoint()), pick_device(run.device)
    encoding = load_encoding(folder)
    values = read_json(folder / "config.json")
    config, dtype = config_from_hf(values), pick_dtype(run.dtype)
    stored = getattr(torch, str(values.get("torch_dtype") or values.get("dtype")), None)
    stored = dtype or (stored if isinstance(stored, torch.dtype) else torch.float32)
    longest = 1 + max((len(encoding.encode_ordinary(text)) for text in prompts), default=0)
    context = run.context or (4096 if run.chat or run.load_state else longest + run.tokens)
    if longest > context:
        raise ValueError(f"the prompt has {longest} tokens, the cache holds {context}")
    limit = settle_limit(run, device)
    rows = 1 if run.chat else max(len(prompts), 1) * run.samples
    found = check_plan(config, limit, context, rows, dtype=stored,
                       snapshots=run.chat + device.startswith("cuda"),
                       state_dtype=pick_state_dtype(run.state_dtype), int8=run.int8,
                       prefill_chunk=run.prefill_chunk)
    if device == "cpu":
        tune_cpu()
    elif run.memory_gib or run.gpu:
        cap_memory(device, limit)
    model = load_run(folder, device, dtype, run.int8)[0]
    print(f"{folder}: {config.pattern}, {config.n_params() / 1e6:.1f} M parameters, {device}, "
          f"{'int8 and ' if run.int8 else ''}{str(stored)[6:]}, planned "
          f"{found['total_bytes'] / GIB:.3f} GiB for {context} tokens")
    if len(prompts) == 1:
        print(f"prompt: {prompts[0] if len(prompts[0]) < 60 else prompts[0][:57] + '...'!r}")
    print()
    return model, encoding, device, context, found["prefill_chunk"]


def body(run):
    for asked, mode in ((run.plan, show_plan), (run.fit, fit), (run.bench, bench),
                        (run.quality, quality)):
        if asked:
            return mode(run)
    settings = Settings(run.tokens, run.temperature, run.top_k, run.top_p, run.repetition_penalty,
                        tuple(run.stop or ()), tuple(run.stop_ids or ()), run.think_budget)
    prompts = list(run.prompt or [])
    if not prompts and not run.load_state and not run.chat:
        prompts = [DEFAULT_PROMPT]
    model, encoding, device, context, chunk = prepare(run, prompts)
    more = dict(chunk=chunk, state_dtype=pick_state_dtype(run.state_dtype), compiled=run.compile)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # a terminal that lacks a character
    stats = dict(tokens=0, seconds=0.0, prompt_tokens=0, prefill_seconds=0.0, cache_bytes=0)
    if run.chat or run.save_state or run.load_state:
        session = Session(model, encoding, context, **more)
        if run.load_state:
            load_state(session, run.load_state)
        text = (converse if run.chat else go_on)(run, session, settings, prompts, stats)
        if run.save_state:
            save_state(session, run.save_state)
            print(f"state of {session.cache.pos + len(session.waiting)} tokens: {run.save_state}")
    else:
        text = write_rows(run, model, encoding, settings, prompts, context, more, stats)
    rate = lambda n, seconds: n / seconds if seconds else 0.0
    print(f"\n{stats['tokens']} tokens at {rate(stats['tokens'], stats['seconds']):.0f} tokens/s, "
          f"prompt of {stats['prompt_tokens']} at "
          f"{rate(stats['prompt_tokens'], stats['prefill_seconds']):.0f} tokens/s, cache "
          f"{stats['cache_bytes'] / 2 ** 20:.2f} MiB, peak {peak_bytes(device) / GIB:.3f} GiB"
          + (", Python and libraries included" if device == "cpu" else ""))
    if not run.checkpoint and prompts == [DEFAULT_PROMPT] and isinstance(text, str):
        picture = pathlib.Path("out/pipeline.png")
        if plot_pipeline(*PIPELINE, DEFAULT_PROMPT + text, picture):
            print(f"the whole run as a picture: {picture}")
    return dict(tokens_per_s=rate(stats["tokens"], stats["seconds"]),
                prefill_tokens_per_s=rate(stats["prompt_tokens"], stats["prefill_seconds"]),
                peak_bytes=peak_bytes(device), text=text)


def write_rows(run, model, encoding, settings, prompts, context, more, stats):
    """The texts, shown as they come if there is one, else one after the other."""
    texts = [""] * (len(prompts) * run.samples)
    if len(texts) == 1:
        print(prompts[0], end="", flush=True)
    with Interrupt() as interrupt:
        for i, text in interrupt.watch(generate_rows(
                model, encoding, prompts, settings, [run.seed] * len(prompts), run.samples,
                context, stats=stats, **more)):
            texts[i] += text
            if len(texts) == 1:
                print(text, end="", flush=True)
    for i, text in enumerate(texts if len(texts) > 1 else []):
        print(f"--- {i + 1} of {len(texts)}\n{prompts[i // run.samples]}{text}")
    print()
    return texts[0] if len(texts) == 1 else texts


def go_on(run, session, settings, prompts, stats):
    """One text from a session: what was loaded, then the prompt."""
    encoding = session.encoding
    if not run.load_state:
        session.feed([separator_id(encoding)])
    if prompts:
        session.feed(encoding.encode_ordinary(prompts[0]))
        print(prompts[0], end="", flush=True)
    said = []
    with Interrupt() as interrupt:
        for text in interrupt.watch(session.write(settings, run.seed, stats)):
            print(text, end="", flush=True)
            said.append(text)
    print()
    return "".join(said)


def converse(run, session, settings, prompts, stats):
    """Turns: --prompt first, then lines of standard input until it ends. Turn i has seed + i. A
    second Ctrl-C in an answer ends everything, and nothing is saved.
    """
    if END_TURN not in session.encoding.special_tokens_set:
        print("note: this tokenizer has no token that ends a turn, so the model has seen no chats")
    chat, answers = Chat(session, run.system, settings), []
    turns = iter(prompts)
    ask = "\n> " if sys.stdin and sys.stdin.isatty() else ""
    while (text := next(turns, None) or read_line(ask)) is not None:
        answer = []
        with Interrupt() as interrupt:
            try:
                for piece in interrupt.watch(chat.say(text, run.seed + len(answers), stats)):
                    print(piece, end="", flush=True)
                    answer.append(piece)
            except ValueError as error:         # the context is full
                print(f"\nthe chat ends here: {error}")
                break
        print()
        answers.append("".join(answer))
    return answers


def read_line(ask):
    """A line of standard input; None at its end or at Ctrl-C."""
    try:
        return input(ask) if sys.stdin else None
    except (EOFError, KeyboardInterrupt):
        return None


def main(argv=None):
    run_script(body, parse_flags(Run, argv))


if __name__ == "__main__":
    main()
