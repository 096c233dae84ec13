"""Nemotron-H and Nemotron Nano 2: a stack of Mamba-2, attention and MLP layers, named by a string.

    M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-      the 9B: 27 M, 4 *, 25 -

Each character is one pre-norm residual layer, x + mixer(norm(x)): M is Mamba-2, * is attention, -
is an MLP. About 8% of the layers are attention, spread evenly. They let the model look up an exact
earlier token, and they are the only part whose memory grows with the context. Sources: Nemotron-H,
arXiv 2504.03624, section 2; Nemotron Nano 2, arXiv 2508.14444, section 2; and the released configs,
which we follow where the text differs (it says Mamba head dim 64; the weights have 128 heads x 80).

The released architecture
  * RMSNorm with eps 1e-5, computed in fp32. No linear layer has a bias; the convolution has one.
  * Grouped-query attention without any position embedding: the Mamba layers carry the order.
  * MLP = down(relu(up(x))^2), without a gate. Embedding and head are not tied.
  * A_log, D and dt_bias are fp32 even in a bf16 checkpoint; so are recurrent states and logits.

Glossary: as in ssm.py, and d d_model | f MLP dim | v vocabulary | g also the number of KV heads |
kv_len tokens that attention sees | pos tokens that a cache has seen.

Initialisation (tested)
    embedding, in_proj, q, k, v, up, head    normal, std sqrt(0.8 / d_model): 12B 0.0125
    out_proj, o_proj, down_proj              the same / sqrt(number of layers): residual outputs
    conv1d weight and bias                   uniform +-1 / sqrt(width), torch's default
    norms 1 | D 1 | A uniform in [1, 16] | dt log-uniform in [0.001, 0.1]

Left out: experts (layer type E), dropout (the models have none), tensor parallelism.

    python model.py                                  the toy: layers, parameters, FLOPs, bytes; 4 s
    python model.py --preset nemotron-nano-9b-v2     any size, built on the meta device; 4 s
    python -m bench.model                            speed against transformers, same weights; 3 min
"""

import copy
import dataclasses
import functools
import math
import pathlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from common import GIB, check_flags, flag, read_json, replace_file, script, write_json
from ssm import (Linear, Mamba2, MambaState, accumulator, documents, first_derivatives_only,
                 inverse_rms)

# ------------------------------------------------------------------------------------------------
# Configuration

LAYER_NAMES = {"M": "Mamba-2", "*": "attention", "-": "MLP"}
FP32_PARAMETERS = ("A_log", "D", "dt_bias")
FLOAT_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass
class HybridConfig:
    """One model; sizes in elements. Raises ValueError with one line if a field does not fit."""

    pattern: str = "M-M-M*-M-"      # layer types: M Mamba-2, * attention, - MLP
    vocab_size: int = 4096          # v, embedding and head are separate
    d_model: int = 256              # d, width of the residual stream
    mlp_dim: int = 1024             # f
    n_heads: int = 4                # attention: query heads
    n_kv_heads: int = 2             # attention: key and value heads
    head_dim: int = 64              # attention: n_heads x head_dim need not be d_model
    mamba_heads: int = 16           # h
    mamba_head_dim: int = 32        # p; mamba_heads x mamba_head_dim need not be 2 d_model
    n_groups: int = 2               # g, groups of Mamba heads that share B and C
    d_state: int = 64               # n
    d_conv: int = 4                 # width of the causal convolution
    chunk_size: int = 64            # l, of the scan; changes speed, not results
    norm_eps: float = 1e-5
    rope_theta: float | None = None     # rotary base, for transformer baselines only
    bos_token_id: int | None = None     # the separator between documents
    eos_token_id: int | list | None = None      # what ends a text: one id or several; None: bos
    pad_token_id: int | None = None
    max_positions: int | None = None    # longest text in tokens, as the checkpoint states it
    generation: dict | None = None      # generation_config.json, unchanged

    def __post_init__(self):
        if not self.pattern or set(str(self.pattern)) - set(LAYER_NAMES):
            raise ValueError(f"pattern {self.pattern!r} must be letters of M * - (experts are not "
                             "supported)")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name} is {value!r}, must be a positive integer")
        for letter, heads, groups in (("*", "n_heads", "n_kv_heads"),
                                      ("M", "mamba_heads", "n_groups")):
            n, g = getattr(self, heads), getattr(self, groups)
            if letter in self.pattern and n % g:
                raise ValueError(f"{heads} {n} must be a multiple of {groups} {g}")
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even for rotary positions")

    @classmethod
    def preset(cls, name, **changes):
        """A named configuration, with fields replaced. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not one of: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def end_tokens(self):
        """The ids that end a text, those of generation_config.json included."""
        ends = [self.eos_token_id, (self.generation or {}).get("eos_token_id")]
        ends = [i for some in ends if some is not None
                for i in (some if isinstance(some, list) else [some])]
        return ends or [i for i in [self.bos_token_id] if i is not None]

    @property
    def d_inner(self):
        return self.mamba_heads * self.mamba_head_dim

    @property
    def conv_dim(self):
        return self.d_inner + 2 * self.n_groups * self.d_state

    def params_by_layer(self):
        """Parameters of one layer of each type, its pre-norm included."""
        d, di, heads = self.d_model, self.d_inner, self.mamba_heads
        mamba = d * (2 * di + self.conv_dim + heads)                    # in_proj, out_proj
        mamba += self.conv_dim * (self.d_conv + 1) + 3 * heads + di     # conv; A_log, D, dt; norm
        attention = 2 * d * self.head_dim * (self.n_heads + self.n_kv_heads)    # q, o; k, v
        return {"M": mamba + d, "*": attention + d, "-": 2 * d * self.mlp_dim + d}

    def params_by_part(self):
        """Parameters {layer type, 'head', 'embedding' or 'final norm': total}."""
        table = self.vocab_size * self.d_model
        layers = {c: n * self.pattern.count(c) for c, n in self.params_by_layer().items()}
        return {**layers, "head": table, "embedding": table, "final norm": self.d_model}

    def n_params(self):
        """Total parameters, equal to the sum of numel over a built model."""
        return sum(self.params_by_part().values())

    def flops_by_part(self, context, decode=False):
        """Forward FLOPs per token, {layer type or 'head': total}, a multiply-add counted as two.

        Training: a causal sequence of `context` tokens by the chunked scan. Decode: the next token.
        Norms, convolution and activations, under 1% in any preset, are left out."""
        d, di, n, l = self.d_model, self.d_inner, self.d_state, min(self.chunk_size, context)
        mamba = 2 * d * (2 * di + self.conv_dim + self.mamba_heads)             # in_proj, out_proj
        scan = 5 * di * n if decode else 4 * di * n + 2 * l * (di + self.n_groups * n)
        attention = 4 * d * self.head_dim * (self.n_heads + self.n_kv_heads)    # q, o; k, v
        scores = 4 * self.n_heads * self.head_dim * (context if decode else context / 2)
        layers = {"M": mamba + scan, "*": attention + scores, "-": 4 * d * self.mlp_dim}
        parts = {c: flops * self.pattern.count(c) for c, flops in layers.items()}
        return {**parts, "head": 2 * d * self.vocab_size}

    def cache_bytes(self, batch, context, dtype=torch.bfloat16, state_dtype=torch.float32):
        """Bytes of a cache by part, {'kv', 'ssm', 'conv'}."""
        attention, mamba = (batch * self.pattern.count(c) for c in "*M")
        return dict(kv=attention * 2 * self.n_kv_heads * self.head_dim * context * dtype.itemsize,
                    ssm=mamba * self.d_inner * self.d_state * state_dtype.itemsize,
                    conv=mamba * self.conv_dim * (self.d_conv - 1) * dtype.itemsize)

    def weight_bytes(self, dtype=torch.bfloat16):
        """Bytes of the weights: A_log, D and dt_bias in fp32, the rest in dtype."""
        in_fp32 = 3 * self.mamba_heads * self.pattern.count("M")
        return (self.n_params() - in_fp32) * dtype.itemsize + in_fp32 * 4


def _nemotron(pattern, d, f, heads, **changes):
    return dict(pattern=pattern, d_model=d, mlp_dim=f, n_heads=heads, n_kv_heads=8, head_dim=128,
                mamba_heads=128, mamba_head_dim=64, n_groups=8, d_state=128, chunk_size=128,
                vocab_size=131072) | changes


PRESETS = {
    "toy": dict(),
    "small": dict(pattern="M-M-M*-M-M-M*-M-M-M*-M-M-", vocab_size=32768, d_model=768, mlp_dim=3072,
                  n_heads=12, n_kv_heads=4, mamba_heads=32, mamba_head_dim=48, n_groups=4,
                  d_state=128, chunk_size=128),
    "nemotron-nano-12b-v2": _nemotron("M-M-M-M" + 6 * "*-M-M-M-M" + "-", 5120, 20480, 40,
                                      mamba_head_dim=80),
    "nemotron-nano-9b-v2": _nemotron("M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
                                     4480, 15680, 40, mamba_head_dim=80),
    "nemotron-h-8b": _nemotron("M-M-M-M" + 4 * "*-M-M-M-M-M" + "-", 4096, 21504, 32),
    "nemotron-h-4b": _nemotron("M-M-M-M" + 4 * "*-M-M-M-M-M" + "-", 3072, 12288, 32,
                               mamba_heads=112),
    "nemotron-h-47b": _nemotron("M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M"
                                "*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-",
                                8192, 30720, 64, mamba_heads=256, d_state=256),
    "nemotron-h-56b": _nemotron("M-M-M-M" + 10 * "*-M-M-M-M-M" + "-", 8192, 32768, 64,
                                mamba_heads=256, d_state=256),
    "qwen3-8b-shape": _nemotron("*-" * 36, 4096, 18432, 32, vocab_size=151936, rope_theta=1e6),
    "nemotron-t-8b": _nemotron("*-" * 32, 4096, 21504, 32, rope_theta=1e4),
}


# ------------------------------------------------------------------------------------------------
# Leaf operations


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last axis, in fp32 (fp64 for fp64), returned in x's dtype."""

    def forward(self, x):
        y = x.to(accumulator(x))
        return (y * inverse_rms(y, self.eps) * self.weight).to(x.dtype)


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of h W^T in blocks of tokens: the (tokens, v) logits never exist at once.
    The gradient, softmax - one_hot, is computed while a block's logits exist."""

    @staticmethod
    def forward(ctx, h, weight, labels, block, want_grad):
        accum_dtype, count = accumulator(h), max(len(h), 1)
        dh = torch.empty_like(h) if want_grad else None
        dweight = torch.zeros_like(weight, dtype=accum_dtype) if want_grad else None
        w, total = weight.to(h.dtype), h.new_zeros((), dtype=accum_dtype)
        for i in range(0, len(h), block):
            rows, label = h[i:i + block], labels[i:i + block, None]
            logits = (rows @ w.t()).to(accum_dtype)                         # (block, v)
            norm = logits.logsumexp(-1, keepdim=True)
            total += (norm - logits.gather(1, label)).sum()
            if want_grad:
                d = logits.sub_(norm).exp_()
                d = d.scatter_add_(1, label, d.new_full(label.shape, -1.0)).div_(count).to(h.dtype)
                dh[i:i + block] = d @ w
                dweight += d.t() @ rows
        ctx.save_for_backward(dh, dweight)
        ctx.dtype = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx, g):
        first_derivatives_only("cross_entropy", "torch's own cross_entropy")
        dh, dweight = ctx.saved_tensors
        return dh * g.to(dh.dtype), (dweight * g).to(ctx.dtype), None, None, None


def labelled(labels, vocab_size):
    """Positions (n,) of the labels (tokens,) that are not below 0. Raises ValueError for labels
    beyond the vocabulary. (On CUDA the kernel stops at them; on the meta device all count.)"""
    if labels.is_meta:
        return torch.arange(len(labels), device="meta")
    if labels.numel() and not labels.is_cuda and labels.max() >= vocab_size:
        raise ValueError(f"labels reach {labels.max()}, the vocabulary is 0 to {vocab_size - 1}; "
                         "labels below 0 are left out")
    return (labels >= 0).nonzero()[:, 0]


def cross_entropy(h, weight, labels, block=1024):
    """Mean -log softmax(h W^T)[label] in nats; h (tokens, d), weight (v, d), labels (tokens,), of
    which those below 0 are left out. Raises ValueError for labels beyond the vocabulary, and
    RuntimeError for second derivatives."""
    kept = labelled(labels, len(weight))
    h, labels = h[kept], labels[kept]
    want_grad = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return _CrossEntropy.apply(h, weight, labels, block, want_grad)


def rotate(x, pos, theta):
    """Rotary embedding of x (b, heads, t, head_dim); its first position is pos, int or tensor."""
    t, half, dtype = x.shape[2], x.shape[3] // 2, accumulator(x)
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = (torch.arange(t, device=x.device) + pos).to(dtype)[:, None] * frequency     # (t, half)
    cos, sin = angle.cos(), angle.sin()
    x1, x2 = x.to(dtype).chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)


# ------------------------------------------------------------------------------------------------
# The cache: one state per layer, one position


class KVState(NamedTuple):
    """What an attention layer remembers of the tokens so far."""
    cache: "HybridCache"        # holds the position
    kv: torch.Tensor            # (2, b, g, max_len, head_dim), keys and values

    def append(self, k, v):
        """Write k, v (b, g, t, head_dim) at the cache's position, in place.

        Returns all keys and values that may be seen (b, g, kv_len, head_dim) and a mask: None for
        causal, or bool (b, 1, 1, kv_len) for the one new token of each row."""
        cache = self.cache
        if cache.fixed is None:
            begin = int(cache.start) if cache.start is not None and cache.batch == 1 else 0
            end, last = cache.pos + k.shape[2], None
            self.kv[0, :, :, cache.pos:end], self.kv[1, :, :, cache.pos:end] = k, v
        else:
            (last, end), begin = cache.fixed, 0
            self.kv.index_copy_(3, last, torch.stack([k, v]).to(self.kv.dtype))
        k, v = self.kv[:, :, :, begin:end].to(k.dtype)
        return k, v, None if begin else cache.mask(end, last)


class HybridCache:
    """What decode needs from the tokens so far, allocated once.

    layers[i]: the state of layer i, a MambaState (conv (b, conv_dim, width - 1), ssm (b, h, p, n)
    in fp32), a KVState, or None for an MLP. pos: the next token's position, the same in all rows.
    start: None, or int64 (b,): prompts of different lengths begin at different positions and end at
    the same one. fixed: None, or (pos as an int64 tensor (1,), kv_len), for a CUDA graph, which
    needs constant shapes and a position on the device."""

    def __init__(self, config, batch, max_len, dtype, device, state_dtype=torch.float32):
        self.batch, self.max_len, self.device = batch, max_len, device
        self.pos, self.start, self.fixed = 0, None, None
        zeros = functools.partial(torch.zeros, dtype=dtype, device=device)
        conv = batch, config.d_conv - 1, config.conv_dim
        ssm = batch, config.mamba_heads, config.mamba_head_dim, config.d_state
        kv = 2, batch, config.n_kv_heads, max_len, config.head_dim
        make = {"M": lambda: MambaState(zeros(conv).transpose(1, 2), zeros(ssm, dtype=state_dtype)),
                "*": lambda: KVState(self, zeros(kv)), "-": lambda: None}
        self.layers = [make[letter]() for letter in config.pattern]

    def states(self):
        """The tensors of the Mamba layers, conv and ssm."""
        return [m for layer in self.layers if isinstance(layer, MambaState) for m in layer]

    def kv(self):
        """The tensors of the attention layers."""
        return [layer.kv for layer in self.layers if isinstance(layer, KVState)]

    def nbytes(self):
        """Bytes of all tensors."""
        return sum(m.nbytes for m in (*self.states(), *self.kv()))

    def snapshot(self):
        """A copy of the Mamba states and the position. KV is only appended to: no copy needed."""
        return dict(pos=self.pos, start=self.start, states=[m.clone() for m in self.states()])

    def restore(self, snapshot):
        """Return to a snapshot of this cache, exactly; the snapshot stays usable."""
        self.pos, self.start, self.fixed = snapshot["pos"], snapshot["start"], None
        for mine, saved in zip(self.states(), snapshot["states"], strict=True):
            mine.copy_(saved)

    def row(self, i, start=0):
        """Row i as an empty cache in the same memory, for a prompt that begins at `start`."""
        other, part = copy.copy(self), lambda m, axis: m.narrow(axis, i, 1)
        other.layers = [KVState(other, part(layer.kv, 1)) if isinstance(layer, KVState) else
                        layer and MambaState(*(part(m, 0) for m in layer))
                        for layer in self.layers]
        other.batch, other.pos = 1, start
        other.start = torch.tensor([start], device=self.device) if start else None
        for m in other.states():
            m.zero_()
        return other

    def mask(self, kv_len, last=None):
        """What one new token of each row sees, bool (b, 1, 1, kv_len): from the row's start up to
        `last`, an int64 tensor (1,); None if that is everything."""
        if self.start is None and last is None:
            return None
        place = torch.arange(kv_len, device=self.device)
        seen = place >= (0 if self.start is None else self.start[:, None])
        seen = seen if last is None else seen & (place <= last)
        return seen.expand(self.batch, kv_len)[:, None, None]

    def check(self, batch, t):
        """Raise ValueError if t more tokens for each of `batch` rows do not fit."""
        if batch != self.batch:
            raise ValueError(f"the cache was made for {self.batch} rows, the tokens have {batch}")
        if self.start is not None and t > 1 and self.batch > 1:
            raise ValueError(f"rows of different lengths take one token per call, not {t}")
        if self.pos + t > self.max_len:
            raise ValueError(f"{self.pos} + {t} tokens do not fit a cache of {self.max_len}")


# ------------------------------------------------------------------------------------------------
# Mixers: (x (b, t, d), state, seq_idx (b, t) that keeps packed documents apart) -> (b, t, d)

MASK_ELEMENTS = 2 ** 22         # largest mask of chunked prefill, where the kernel needs a mask


class Attention(nn.Module):
    """Grouped-query attention without positions; with a KVState it continues at any offset."""

    def __init__(self, config):
        super().__init__()
        self.head_dim, self.rope_theta, d = config.head_dim, config.rope_theta, config.d_model
        self.q_proj = Linear(d, config.n_heads * config.head_dim)
        self.k_proj = Linear(d, config.n_kv_heads * config.head_dim)
        self.v_proj = Linear(d, config.n_kv_heads * config.head_dim)
        self.o_proj = Linear(config.n_heads * config.head_dim, d)

    def forward(self, x, state=None, seq_idx=None):
        heads = lambda m: m.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        if self.rope_theta:
            fixed = state and state.cache.fixed
            pos = fixed[0] if fixed else state.cache.pos if state else 0
            q, k = rotate(q, pos, self.rope_theta), rotate(k, pos, self.rope_theta)

        mask = None
        if seq_idx is not None:         # causal, and inside one document: (b, 1, t, t)
            doc = documents(seq_idx)
            mask = (doc[:, :, None] == doc[:, None, :]).tril()[:, None]
        if state is not None:
            k, v, mask = state.append(k, v)                     # (b, g, kv_len, head_dim)
        y = self.attend(q, k, v, mask)                          # (b, heads, t, head_dim)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    @staticmethod
    def attend(q, k, v, mask=None):
        """q (b, heads, t, head_dim), k, v (b, g, kv_len, head_dim) -> (b, heads, t, head_dim).

        mask: bool, True for a key that is seen; None: causal, and the last query sees every key."""
        (b, heads, t, head_dim), (g, kv_len) = q.shape, k.shape[1:3]
        sdpa = functools.partial(F.scaled_dot_product_attention, enable_gqa=t > 1 and heads != g)
        if t == 1:  # a group's query heads become rows; a single query sees every key
            return sdpa(q.view(b, g, -1, head_dim), k, v, attn_mask=mask).view(q.shape)
        if mask is not None or kv_len == t:
            return sdpa(q, k, v, attn_mask=mask, is_causal=mask is None)
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):    # no mask needed
            from torch.nn.attention.bias import causal_lower_right      # takes a second to import
            return sdpa(q, k, v, attn_mask=causal_lower_right(t, kv_len))

        # Else a mask is needed, as is_causal aligns top-left. Few queries at a time keep it small.
        y, rows = torch.empty_like(q), max(MASK_ELEMENTS // kv_len, 1)
        for i in range(0, t, rows):
            queries = q[:, :, i:i + rows]
            n, seen = queries.shape[2], kv_len - t + min(i + rows, t)
            ahead = torch.full((n, n), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
            y[:, :, i:i + n] = sdpa(queries, k[:, :, :seen], v[:, :, :seen],
                                    attn_mask=F.pad(ahead, (seen - n, 0)))
        return y


class MLP(nn.Module):
    """down(relu(up(x))^2). It has no state and treats each token alone."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = Linear(config.d_model, config.mlp_dim)
        self.down_proj = Linear(config.mlp_dim, config.d_model)

    def forward(self, x, state=None, seq_idx=None):
        return self.down_proj(F.relu(self.up_proj(x)).square())


class Block(nn.Module):
    """One layer of the pattern: x + mixer(norm(x)); letter is its type."""

    def __init__(self, config, letter):
        super().__init__()
        self.letter, c = letter, config
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        if letter == "M":
            self.mixer = Mamba2(c.d_model, c.mamba_heads, c.mamba_head_dim, c.d_state, c.n_groups,
                                c.d_conv, c.chunk_size, c.norm_eps)
        else:
            self.mixer = Attention(c) if letter == "*" else MLP(c)

    def forward(self, x, state=None, seq_idx=None):
        return x + self.mixer(self.norm(x), state, seq_idx)


class HybridLM(nn.Module):
    """The language model: model(tokens (b, t) int64) -> fp32 logits (b, t, v) (fp64 if it is fp64).

    compute_dtype: dtype of the residual stream and the matmuls; None follows the parameters. Norms,
    decays, states and logits stay fp32, and so do fp32 parameters: bf16 training keeps fp32 master
    weights without autocast."""

    def __init__(self, config, compute_dtype=None):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        shape = config.vocab_size, config.d_model
        self.backbone = nn.ModuleDict(dict(         # named as in the released checkpoints
            embeddings=nn.Embedding(*shape, _weight=torch.empty(shape)),
            layers=nn.ModuleList(Block(config, letter) for letter in config.pattern),
            norm_f=RMSNorm(config.d_model, config.norm_eps)))
        self.lm_head = Linear(config.d_model, config.vocab_size)
        if not self.lm_head.weight.is_meta:         # meta tensors have no values
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Follow the table in the module's docstring, in the order of the parameters."""
        std = math.sqrt(0.8 / self.config.d_model)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight"))
                p.normal_(0, std / math.sqrt(len(self.config.pattern)) if residual else std)
        for module in self.modules():
            if isinstance(module, Mamba2):
                module.conv1d.reset_parameters()
                module.reset_ssm_parameters()

    def forward(self, tokens, cache=None, last_only=False, seq_idx=None, head=True):
        """Logits (b, t, v); with last_only those of the last token, (b, 1, v); with head=False the
        hidden states (b, t, d) that the head would read.

        cache: a HybridCache, which advances by t tokens in place, without gradients; a prompt may
        be split anywhere. seq_idx (b, t) int: packed documents that must not see each other. Raises
        ValueError for tokens outside the vocabulary, and if the tokens do not fit the cache."""
        states = [None] * len(self.backbone.layers)
        if cache is not None:
            if seq_idx is not None:
                raise ValueError("seq_idx is for training: a cache holds one document per row")
            cache.check(*tokens.shape)
            states = cache.layers
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            x = self.embed(tokens)                                              # (b, t, d)
            for layer, state in zip(self.backbone.layers, states):
                x = layer(x, state, seq_idx)
            x = self.backbone.norm_f(x)

            if cache is not None:
                cache.pos += tokens.shape[1]
            if not head:
                return x
            logits = self.lm_head(x[:, -1:] if last_only else x)                # (b, t, v)
            return logits.to(accumulator(logits))

    def embed(self, tokens):
        """tokens (b, t) -> (b, t, d) in the compute dtype. Raises ValueError for unknown ids."""
        try:
            x = self.backbone.embeddings(tokens)
        except IndexError:
            raise ValueError(f"tokens span {tokens.min()} to {tokens.max()}, the vocabulary is "
                             f"0 to {self.config.vocab_size - 1}") from None
        return x.to(self.compute_dtype or x.dtype)

    def loss(self, tokens, labels, seq_idx=None):
        """Mean cross-entropy in nats over the labels (b, t) that are not below 0."""
        x = self(tokens, seq_idx=seq_idx, head=False)
        return cross_entropy(x.flatten(0, 1), self.lm_head.weight, labels.flatten())

    def init_cache(self, batch, max_len, dtype=None, state_dtype=torch.float32):
        """An empty HybridCache; dtype of KV and conv states, by default the compute dtype."""
        weight = self.backbone.embeddings.weight
        dtype = dtype or self.compute_dtype or weight.dtype
        state_dtype = torch.float64 if dtype == torch.float64 else state_dtype
        return HybridCache(self.config, batch, max_len, dtype, weight.device, state_dtype)


# ------------------------------------------------------------------------------------------------
# Hugging Face checkpoints, in and out

HF_FIELDS = dict(       # field of HybridConfig = key in config.json of nemotron_h
    vocab_size="vocab_size", d_model="hidden_size", mlp_dim="intermediate_size",
    n_heads="num_attention_heads", n_kv_heads="num_key_value_heads", head_dim="head_dim",
    mamba_heads="mamba_num_heads", mamba_head_dim="mamba_head_dim", n_groups="n_groups",
    d_state="ssm_state_size", d_conv="conv_kernel", chunk_size="chunk_size",
    norm_eps="layer_norm_epsilon", bos_token_id="bos_token_id", eos_token_id="eos_token_id",
    pad_token_id="pad_token_id", max_positions="max_position_embeddings")
HF_OLD_NAMES = dict(attention_head_dim="head_dim", mamba_n_groups="n_groups",
                    mamba_d_conv="conv_kernel", mamba_chunk_size="chunk_size",
                    mamba_conv_bias="use_conv_bias", layer_types="layers_block_type",
                    mamba_dt_limit="time_step_limit")
HF_LAYERS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*",
             "mlp": "-", "moe": "E"}
HF_MUST_BE = dict(mlp_hidden_act="relu2", mamba_hidden_act="silu", tie_word_embeddings=False,
                  use_bias=False, mlp_bias=False, attention_bias=False, mamba_proj_bias=False,
                  use_conv_bias=True, quantization_config=None, sliding_window=None,
                  attention_dropout=None, hidden_dropout=None)


def config_from_hf(values, generation=None):
    """A HybridConfig from the values of config.json, with old or new keys, and those of
    generation_config.json. What the model does not support raises a ValueError with the key."""
    kind = values.get("model_type")
    if kind not in ("nemotron_h", "nemotron_h_rope"):
        raise ValueError(f"config.json: model_type is {kind!r}, must be 'nemotron_h'")
    values = {HF_OLD_NAMES.get(key, key): value for key, value in values.items()}
    for key, value in HF_MUST_BE.items():
        if (values.get(key, value) or None) != (value or None):
            raise ValueError(f"config.json: {key} is {values[key]!r}, only {value!r} is supported")
    low, high = values.get("time_step_limit") or (0, math.inf)
    if low > 0 or isinstance(high, (int, float)) and high < math.inf:
        raise ValueError(f"config.json: time_step_limit is {[low, high]}, dt has no limits here")
    layers = "".join(HF_LAYERS.get(str(c), "?") for c in values.get("layers_block_type") or [])
    pattern = values.get("hybrid_override_pattern") or layers
    count = values.get("num_hidden_layers") or len(str(pattern))
    if layers not in ("", pattern) or count != len(str(pattern)):
        raise ValueError(f"config.json: hybrid_override_pattern {pattern} is not what "
                         f"layers_block_type {layers} or num_hidden_layers {count} says")
    known = {ours: values[theirs] for ours, theirs in HF_FIELDS.items()
             if values.get(theirs) is not None}
    optional = "chunk_size", "norm_eps", "d_conv", *(      # and fields that default to None
        field.name for field in dataclasses.fields(HybridConfig) if field.default is None)
    missing = [theirs for ours, theirs in HF_FIELDS.items()
               if ours not in known and ours not in optional]
    if missing:
        raise ValueError(f"config.json: {', '.join(missing)} missing")
    rope = values.get("rope_theta") if kind == "nemotron_h_rope" else None
    config = HybridConfig(pattern=pattern, rope_theta=rope, generation=generation, **known)
    for i in config.end_tokens:
        if type(i) is not int or not 0 <= i < config.vocab_size:
            raise ValueError(f"config.json: eos_token_id {i!r} is not an id of the vocabulary, "
                             f"0 to {config.vocab_size - 1}")
    return config


def read_config(folder):
    """The HybridConfig of a Hugging Face folder. Raises FileNotFoundError or ValueError."""
    generation = folder / "generation_config.json"
    try:
        return config_from_hf(read_json(folder / "config.json"),
                              read_json(generation) if generation.exists() else None)
    except TypeError as error:          # such as a list in the place of a number
        raise ValueError(f"{folder / 'config.json'} has a value of a wrong type: {error}") from None


def config_to_hf(config, dtype):
    """The values of config.json. transformers 5.23 raises dt to time_step_min, except in decode."""
    values = {theirs: getattr(config, ours) for ours, theirs in HF_FIELDS.items()}
    values = {key: value for key, value in values.items() if value is not None}
    values.setdefault("bos_token_id", None)         # else transformers uses 1 and 2
    values.setdefault("eos_token_id", values["bos_token_id"])
    if config.rope_theta is not None:
        values["rope_theta"] = config.rope_theta
    return dict(model_type="nemotron_h" if config.rope_theta is None else "nemotron_h_rope",
                architectures=["NemotronHForCausalLM"], hybrid_override_pattern=config.pattern,
                num_hidden_layers=len(config.pattern), **values,
                **{key: value for key, value in HF_MUST_BE.items() if value is not None},
                initializer_range=math.sqrt(0.8 / config.d_model), time_step_min=1e-9,
                time_step_max=0.1, torch_dtype=str(dtype)[6:])


def read_tensors(folder):
    """Yield (file, name, tensor) of a checkpoint, in one file or in shards; raises as `load_hf`."""
    index, whole, files = folder / INDEX, folder / "model.safetensors", ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or set(map(type, weight_map.values())) - {str}:
            raise ValueError(f"{index} has no weight_map from tensors to files")
        files = sorted(set(weight_map.values()))
        if whole.exists() and whole.name not in files:
            raise ValueError(f"{folder} has {whole.name} and an index of other files: remove one")
    elif not whole.exists():
        raise FileNotFoundError(f"{folder} has config.json but no weights (model.safetensors)")
    for file in files:
        try:
            with safe_open(folder / file, "pt") as shard:
                names = list(shard.keys())
            moved = [n for n in names if index.exists() and weight_map.get(n) != file]
            if moved:
                raise ValueError(f"{folder / file} holds {moved[0]}, which {index.name} has in "
                                 f"{weight_map.get(moved[0], 'no file')}")
            for name in names:      # reopened, so that no mapped page outlives its tensor
                with safe_open(folder / file, "pt") as shard:
                    yield folder / file, name, shard.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / file} is not a complete safetensors file: {error}") \
                from None


def load_hf(folder, device="cpu", dtype=None):
    """A HybridLM from a Hugging Face folder: config.json and model.safetensors, whole or in shards.

    dtype: None keeps the stored one; A_log, D and dt_bias become fp32 (fp64 for float64) in any
    case. Tensors are read, cast and placed singly: memory peaks at the weights + one tensor. Raises
    FileNotFoundError or ValueError for missing files and for broken or foreign checkpoints."""
    folder = pathlib.Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = HybridLM(config)
    wanted, tensors = dict(model.named_parameters()), {}
    for file, key, value in read_tensors(folder):
        name = "backbone." + key.removeprefix("model.") if key.startswith("model.") else key
        if name not in wanted or name in tensors:
            raise ValueError(f"{file}: tensor {key} is not part of pattern {config.pattern}, or is "
                             "there twice")
        if value.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{file}: {key} is {str(value.dtype)[6:]}: quantised checkpoints are "
                             "not supported, use the bfloat16 one")
        if value.shape != wanted[name].shape:
            raise ValueError(f"{file}: {key} has shape {tuple(value.shape)}, config.json asks for "
                             f"{tuple(wanted[name].shape)}")
        target = dtype or value.dtype
        if name.endswith(FP32_PARAMETERS):
            target = torch.promote_types(target, torch.float32)
        tensors[name] = value.to(device=device, dtype=target, copy=True)
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, {missing[0]} first")
    model.load_state_dict(tensors, assign=True)
    return model


def tensors_to_save(model):
    """{name: tensor} of a HybridLM, compiled or not. Raises ValueError if its config differs."""
    config = getattr(model, "config", None)
    if not isinstance(config, HybridConfig):
        raise ValueError(f"only a HybridLM can be saved, not a {type(model).__name__}")
    with torch.device("meta"):
        wanted = {name: p.shape for name, p in HybridLM(config).named_parameters()}
    tensors = {name.replace("_orig_mod.", ""): p.detach()       # torch.compile's prefix
               for name, p in model.named_parameters()}
    for name in {**wanted, **tensors}:
        p, shape = tensors.get(name), wanted.get(name)
        if p is None or p.shape != shape or p.dtype not in FLOAT_DTYPES or p.is_meta:
            found = "not there (or tied to another)" if p is None else \
                f"{tuple(p.shape)} {str(p.dtype)[6:]} on {p.device}"
            raise ValueError(f"the model does not match its config and is not saved: {name} is "
                             f"{found}, the config asks for {shape and tuple(shape)}")
    return tensors


def save_hf(model, folder, shard_bytes=5 * 10 ** 9):
    """Write a checkpoint that transformers opens as NemotronH: config.json and model.safetensors,
    in several files above shard_bytes; dtypes are kept.

    A single file replaces a single file atomically. With several, old or new, the folder has no
    config.json until all are written, so that no mixture of two checkpoints can be loaded. Raises
    ValueError, with nothing written, for a model whose parameters are not those of its config."""
    tensors, folder = tensors_to_save(model), pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for name, p in tensors.items():
        if shards[-1] and size + p.nbytes > shard_bytes:
            shards, size = shards + [{}], 0
        shards[-1][name], size = p.contiguous(), size + p.nbytes
    names = ["model.safetensors"] if len(shards) == 1 else \
        [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]

    stale = {path.name for path in folder.glob("model*.safetensors*")} - set(names)
    if stale or len(shards) > 1:
        (folder / "config.json").unlink(missing_ok=True)    # written again at the end
    for name, shard in zip(names, shards):
        replace_file(folder / name, lambda path: save_file(shard, path, metadata={"format": "pt"}))
    for name in stale:
        (folder / name).unlink()
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        total = sum(p.nbytes for p in tensors.values())
        write_json(folder / INDEX, dict(metadata=dict(total_size=total), weight_map=weight_map))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if model.config.generation is not None:
        write_json(folder / "generation_config.json", model.config.generation)
    write_json(folder / "config.json", config_to_hf(model.config, tensors["lm_head.weight"].dtype))


# ------------------------------------------------------------------------------------------------
# python model.py: the architecture in numbers


@dataclasses.dataclass
class Run:
    """The architecture in numbers: parameters, FLOPs and bytes, without allocating anything."""
    preset: str = flag("toy", "one of " + ", ".join(PRESETS), choices=PRESETS)
    context: int = flag(8192, "context in tokens, for FLOPs and cache bytes", at_least=1)

    def __post_init__(self):
        check_flags(self)


@script(Run)
def main(run):
    config, context = HybridConfig.preset(run.preset), run.context
    train = {part: 3 * flops for part, flops in config.flops_by_part(context).items()}
    decode = config.flops_by_part(context, decode=True)
    print(f"{config.pattern}\n\npart         layers      parameters  train MFLOP/token  "
          "decode MFLOP/token")
    row = "{:12s}{:7d}{:16,d}{:19,.1f}{:20,.1f}".format
    for part, n in config.params_by_part().items():
        count = config.pattern.count(part) if part in LAYER_NAMES else 1
        print(row(LAYER_NAMES.get(part, part), count, n, train.get(part, 0) / 1e6,
                  decode.get(part, 0) / 1e6))
    print(row("total", len(config.pattern), config.n_params(), sum(train.values()) / 1e6,
              sum(decode.values()) / 1e6))

    sizes = dict(weights=config.weight_bytes(), **config.cache_bytes(1, context))
    print(f"\nGiB at {context} tokens, bfloat16, SSM states in fp32: "
          + ", ".join(f"{name} {size / GIB:.3f}" for name, size in sizes.items()))

    with torch.device("meta"):
        built = sum(p.numel() for p in HybridLM(config).parameters())
    print(f"built on the meta device: {built:,} parameters, by formula {config.n_params():,}")
    assert built == config.n_params()
    return dict(n_params=built, flops_per_token=sum(train.values()))


if __name__ == "__main__":
    main()
