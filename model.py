"""Nemotron-H and Nemotron Nano 2: a stack of Mamba-2, attention and MLP layers, named by a string.

    M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-      the 9B: 27 M, 4 *, 25 -

Each letter is one pre-norm residual, x + mixer(norm(x)): M Mamba-2, * attention, - MLP. About 8% of
the layers are attention, spread evenly; they are what lets the model look up an exact earlier
token, and the only part whose memory grows with the context. Sources: Nemotron-H, arXiv 2504.03624
(section 2), Nemotron Nano 2, arXiv 2508.14444 (section 2), and the released configurations, which
win where the text disagrees: the Nano text says Mamba head dim 64, the weights use 128 heads x 80.

What the released architecture is, and is not
  * RMSNorm, eps 1e-5, computed in fp32. No bias in any linear; the convolution has one.
  * Grouped-query attention without positions of any kind: the Mamba layers carry order. (rope_theta
    is for the transformer baselines alone.)
  * MLP = down(relu(up(x))^2), no gate. Embedding and head are not tied.
  * A_log, D and dt_bias are fp32 even in a bf16 checkpoint; so are the recurrent states and the
    logits.

Glossary: as in ssm.py, and d d_model | f MLP dim | v vocabulary | g also counts KV heads | pos
tokens that a cache has seen.

Initialisation (tested)
    embedding, in_proj, q, k, v, up, head    normal, std sqrt(0.8 / d_model): 12B 0.0125
    out_proj, o_proj, down_proj              the same / sqrt(number of layers): residual outputs
    conv1d weight and bias                   uniform +-1 / sqrt(width), torch's default
    norms 1 | D 1 | A uniform in [1, 16] | dt log-uniform in [0.001, 0.1]

Left out: experts (pattern letter E), dropout (the models have none), tensor parallelism.

    python model.py                                  the toy: strip, parameters, FLOPs, bytes; 4 s
    python model.py --preset nemotron-nano-9b-v2     any size, on the meta device; 4 s
    python model.py --bench                          against transformers, same weights; 3 min
"""

import contextlib
import copy
import ctypes
import dataclasses
import functools
import json
import math
import os
import pathlib
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ssm import Linear, Mamba2, accumulator, documents, inverse_rms, median_seconds, \
    relative_error

# ------------------------------------------------------------------------------------------------
# Configuration


LAYER_NAMES = {"M": "Mamba-2", "*": "attention", "-": "MLP"}
FP32_PARAMETERS = ("A_log", "D", "dt_bias")


@dataclasses.dataclass
class HybridConfig:
    """One model. Sizes in elements; validates itself, raising ValueError with one line."""

    pattern: str = "M-M-M*-M-"      # one letter a layer: M Mamba-2, * attention, - MLP
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

    def __post_init__(self):
        if "E" in self.pattern:
            raise ValueError(f"pattern {self.pattern!r} has experts (E): only M, * and - are "
                             f"supported")
        unknown = sorted(set(self.pattern) - set(LAYER_NAMES))
        if unknown or not self.pattern:
            raise ValueError(f"pattern {self.pattern!r} must be letters of M * -, has {unknown}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name} is {value!r}, must be a positive integer")
        if "*" in self.pattern and self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads "
                             f"{self.n_kv_heads}")
        if "M" in self.pattern and self.mamba_heads % self.n_groups:
            raise ValueError(f"mamba_heads {self.mamba_heads} must be a multiple of "
                             f"n_groups {self.n_groups}")
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even for rotary positions")

    @classmethod
    def preset(cls, name, **changes):
        """A named configuration, with fields replaced. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not one of: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def d_inner(self):
        return self.mamba_heads * self.mamba_head_dim

    @property
    def conv_dim(self):
        return self.d_inner + 2 * self.n_groups * self.d_state

    def params_by_layer(self):
        """Parameters of one layer of each letter, its pre-norm included."""
        d, di, heads = self.d_model, self.d_inner, self.mamba_heads
        mamba = d * (di + self.conv_dim + heads) + self.conv_dim * (self.d_conv + 1) + 3 * heads \
            + di + di * d + d
        q_width, kv_width = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {"M": mamba, "*": d * (2 * q_width + 2 * kv_width) + d,
                "-": 2 * d * self.mlp_dim + d}

    def n_params(self):
        """Total parameters, equal to the sum of numel over a built model."""
        layers = self.params_by_layer()
        tables = 2 * self.vocab_size * self.d_model                         # embedding and head
        return sum(layers[c] for c in self.pattern) + self.d_model + tables

    def flops_by_part(self, context, decode=False):
        """Forward FLOPs a token, {letter or 'head': total}, a multiply-add counted as two.

        Training: a causal sequence of `context` tokens, the chunked scan. Decode: one token after
        `context`. Norms, convolution and activations are left out (under 1% at any preset's size).
        """
        d, di, n = self.d_model, self.d_inner, self.d_state
        mamba = 2 * (d * (di + self.conv_dim + self.mamba_heads) + di * d)
        l = min(self.chunk_size, context)
        scan = 5 * di * n if decode else 4 * di * n + 2 * l * di + 2 * l * self.n_groups * n
        width = self.n_heads * self.head_dim
        attention = 2 * d * (2 * width + 2 * self.n_kv_heads * self.head_dim)
        scores = 4 * width * (context if decode else context / 2)
        one = {"M": mamba + scan, "*": attention + scores, "-": 4 * d * self.mlp_dim}
        parts = {c: one[c] * self.pattern.count(c) for c in one}
        return {**parts, "head": 2 * d * self.vocab_size}

    def cache_bytes(self, batch, context, dtype=torch.bfloat16, state_dtype=torch.float32):
        """Bytes of a cache by part, {'kv', 'ssm', 'conv'}."""
        size, layers = dtype.itemsize, self.pattern.count
        kv = layers("*") * 2 * batch * self.n_kv_heads * context * self.head_dim * size
        ssm = layers("M") * batch * self.d_inner * self.d_state * state_dtype.itemsize
        return dict(kv=kv, ssm=ssm,
                    conv=layers("M") * batch * self.conv_dim * (self.d_conv - 1) * size)

    def weight_bytes(self, dtype=torch.bfloat16):
        """Bytes of the weights: A_log, D and dt_bias fp32, the rest in dtype."""
        fine = 3 * self.mamba_heads * self.pattern.count("M")
        return (self.n_params() - fine) * dtype.itemsize + fine * 4


def _nemotron(pattern, d, f, heads, mamba, vocab=131072, state=128):
    return dict(pattern=pattern, d_model=d, mlp_dim=f, n_heads=heads, n_kv_heads=8, head_dim=128,
                mamba_heads=mamba[0], mamba_head_dim=mamba[1], n_groups=8, d_state=state,
                chunk_size=128, vocab_size=vocab)


PRESETS = {
    "toy": dict(),
    "small": dict(pattern="M-M-M*-M-M-M*-M-M-M*-M-M-", vocab_size=32768, d_model=768, mlp_dim=3072,
                  n_heads=12,
                  n_kv_heads=4, mamba_heads=32, mamba_head_dim=48, n_groups=4, d_state=128,
                  chunk_size=128),
    "nemotron-nano-12b-v2": _nemotron(
        "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
        5120, 20480, 40, (128, 80)),
    "nemotron-nano-9b-v2": _nemotron(
        "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", 4480, 15680, 40, (128, 80)),
    "nemotron-h-8b": _nemotron(
        "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", 4096, 21504, 32, (128, 64)),
    "nemotron-h-4b": _nemotron(
        "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", 3072, 12288, 32, (112, 64)),
    "nemotron-h-47b": _nemotron(
        "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M"
        "*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-",
        8192, 30720, 64, (256, 64), state=256),
    "nemotron-h-56b": _nemotron("M-M-M-M" + 10 * "*-M-M-M-M-M" + "-",
                                8192, 32768, 64, (256, 64), state=256),
    "qwen3-8b-shape": dict(_nemotron("*-" * 36, 4096, 18432, 32, (128, 64), vocab=151936),
                           rope_theta=1e6),
    "nemotron-t-8b": dict(_nemotron("*-" * 32, 4096, 21504, 32, (128, 64)), rope_theta=1e4),
}


# ------------------------------------------------------------------------------------------------
# Leaf operations


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in fp32 (fp64 for fp64), back in x's dtype."""

    def __init__(self, d, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        fine = x.to(accumulator(x))
        return (fine * inverse_rms(fine, self.eps) * self.weight).to(x.dtype)


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2 with one temporary each way."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return F.relu(ctx.saved_tensors[0]).mul_(dy).mul_(2)


def squared_relu(x):
    """relu(x)^2 of any shape."""
    return _SquaredReLU.apply(x) if torch.is_grad_enabled() else F.relu(x).square_()


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of h W^T in blocks of tokens: the (tokens, v) logits never exist at once.

    The gradient is softmax - one_hot for each block while its logits are there, so nothing is
    computed twice. Labels below 0 are left out of the mean.
    """

    @staticmethod
    def forward(ctx, h, weight, labels, block, want_grad):
        fine = accumulator(h)
        dh = torch.empty_like(h) if want_grad else None
        dweight = torch.zeros_like(weight, dtype=fine) if want_grad else None
        w, total = weight.to(h.dtype), h.new_zeros((), dtype=fine)
        count = (labels >= 0).sum().clamp(min=1)
        for i in range(0, len(h), block):
            rows, label = h[i:i + block], labels[i:i + block, None]
            kept = label >= 0
            logits = (rows @ w.t()).to(fine)                                # (block, v)
            norm = logits.logsumexp(-1, keepdim=True)
            total += ((norm - logits.gather(1, label.clamp(min=0))) * kept).sum()
            if want_grad:
                d = logits.sub_(norm).exp_()
                d.scatter_add_(1, label.clamp(min=0), d.new_full(label.shape, -1.0))
                d = d.mul_(kept.to(fine) / count).to(h.dtype)
                dh[i:i + block] = d @ w
                dweight += d.t() @ rows
        ctx.save_for_backward(dh, dweight)
        ctx.dtype = weight.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dh, dweight = ctx.saved_tensors
        return dh * g.to(dh.dtype), (dweight * g).to(ctx.dtype), None, None, None


def cross_entropy(h, weight, labels, block=1024):
    """Mean -log softmax(h W^T)[label] in nats: h (tokens, d), weight (v, d), labels (tokens,), < 0
    ignored.
    """
    want_grad = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return _CrossEntropy.apply(h, weight, labels, block, want_grad)


def rotate(x, pos, theta):
    """Rotary positions pos, pos + 1, ... on x (b, heads, t, head_dim); baselines only. pos: one
    for all rows, or an int64 tensor (b,).
    """
    t, half = x.shape[2], x.shape[3] // 2
    fine = accumulator(x)
    rate = theta ** (-torch.arange(half, device=x.device, dtype=fine) / half)
    place = torch.arange(t, device=x.device) + (pos[:, None] if torch.is_tensor(pos) else pos)
    angle = place.to(fine)[..., None] * rate                    # (t, half) or (b, t, half)
    angle = angle[:, None] if angle.dim() == 3 else angle
    cos, sin = angle.cos(), angle.sin()
    x1, x2 = x.to(fine).chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)


# ------------------------------------------------------------------------------------------------
# The cache


class HybridCache:
    """What decode needs of the past, allocated once: KV for attention, states for Mamba-2.

    Per layer, by its index: kv[i] (2, b, g, max_len, head_dim), ssm[i] fp32 (b, h, p, n), conv[i]
    (b, conv_dim, width - 1), the last inputs of the convolution, in memory by time. pos: tokens
    seen so far. lengths: None, or int64 (b,) where rows have seen different numbers of tokens, of
    which pos is the largest; such a cache takes one token a call, and attention reads the first
    `columns` tokens of KV (None: pos + 1), so that shapes can be held fixed.
    """

    def __init__(self, config, batch, max_len, dtype, device, state_dtype=torch.float32):
        self.batch, self.max_len, self.pos, self.device = batch, max_len, 0, device
        self.lengths = self.columns = None
        zeros = lambda *shape, dtype: torch.zeros(shape, dtype=dtype, device=device)
        M = [i for i, c in enumerate(config.pattern) if c == "M"]
        attention = [i for i, c in enumerate(config.pattern) if c == "*"]
        self.kv = {i: zeros(2, batch, config.n_kv_heads, max_len, config.head_dim, dtype=dtype)
                   for i in attention}
        state = batch, config.mamba_heads, config.mamba_head_dim, config.d_state
        self.ssm = {i: zeros(*state, dtype=state_dtype) for i in M}
        past = batch, config.d_conv - 1, config.conv_dim
        self.conv = {i: zeros(*past, dtype=dtype).transpose(1, 2) for i in M}

    def tensors(self):
        return [*self.kv.values(), *self.ssm.values(), *self.conv.values()]

    def nbytes(self):
        """Bytes of all tensors."""
        return sum(m.numel() * m.element_size() for m in self.tensors())

    def snapshot(self):
        """A copy of the states and the position; KV is only appended, the position is enough."""
        return dict(pos=self.pos, ssm={i: m.clone() for i, m in self.ssm.items()},
                    conv={i: m.clone() for i, m in self.conv.items()},
                    lengths=None if self.lengths is None else self.lengths.clone())

    def restore(self, snapshot):
        """Back to a snapshot of this cache, exactly; the snapshot stays usable."""
        self.pos = snapshot["pos"]
        if snapshot["lengths"] is None:
            self.lengths = self.columns = None
        elif self.lengths is None:
            self.lengths = snapshot["lengths"].clone()
        else:
            self.lengths.copy_(snapshot["lengths"])
        for mine, saved in ((self.ssm, snapshot["ssm"]), (self.conv, snapshot["conv"])):
            for i, m in saved.items():
                mine[i].copy_(m)

    def expand(self, n):
        """A new cache with every row n times, copies adjacent: n samples from one prefill."""
        other = copy.copy(self)
        other.batch = self.batch * n
        other.kv = {i: m.repeat_interleave(n, 1) for i, m in self.kv.items()}
        other.ssm = {i: m.repeat_interleave(n, 0) for i, m in self.ssm.items()}
        other.conv = {i: m.repeat_interleave(n, 0) for i, m in self.conv.items()}
        if self.lengths is not None:
            other.lengths = self.lengths.repeat_interleave(n)
        return other

    def row(self, i):
        """Row i as a cache of its own, empty, in the same memory: prompts of different lengths are
        prefilled one by one, without padding and without a copy; `set_lengths` then joins them.
        """
        other = copy.copy(self)
        other.batch, other.pos, other.lengths = 1, 0, None
        other.kv = {k: m[:, i:i + 1] for k, m in self.kv.items()}
        other.ssm = {k: m[i:i + 1] for k, m in self.ssm.items()}
        other.conv = {k: m[i:i + 1] for k, m in self.conv.items()}
        for m in (*other.ssm.values(), *other.conv.values()):
            m.zero_()
        return other

    def copy_row(self, source, target, tokens):
        """Row target becomes what row source is after so many tokens."""
        for m in self.kv.values():
            m[:, target, :, :tokens] = m[:, source, :, :tokens]
        for m in (*self.ssm.values(), *self.conv.values()):
            m[target] = m[source]

    def set_lengths(self, lengths):
        """Tokens that each row has seen, a list of ints."""
        self.pos = max(lengths)
        self.lengths = torch.tensor(lengths, device=self.device)

    def advance(self, t):
        self.pos += t
        if self.lengths is not None:
            self.lengths += t

    def check(self, batch, t):
        """Raises ValueError if t more tokens a row, for `batch` rows, do not fit."""
        if batch != self.batch:
            raise ValueError(f"the cache was made for {self.batch} rows, the tokens have {batch}")
        if self.lengths is not None and t > 1:
            raise ValueError(f"rows of different lengths take one token a call, not {t}")
        if self.pos + t > self.max_len:
            raise ValueError(f"{self.pos} + {t} tokens do not fit a cache of {self.max_len}")


# ------------------------------------------------------------------------------------------------
# Mixers and the model


MASK_ELEMENTS = 2 ** 22         # of a mask in chunked prefill where there is no kernel without one


class Attention(nn.Module):
    """Grouped-query attention without positions; with a cache, at any offset."""

    def __init__(self, config):
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        q_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = Linear(config.d_model, q_width)
        self.k_proj = Linear(config.d_model, kv_width)
        self.v_proj = Linear(config.d_model, kv_width)
        self.o_proj = Linear(q_width, config.d_model)

    def forward(self, x, kv=None, pos=0, columns=None, mask=None):
        """x (b, t, d) -> (b, t, d). kv (2, b, g, max_len, head_dim) holds pos tokens and takes t
        more, in place. pos (b,): one token a row, each at its own place, seeing `columns` of KV.

        mask (b, 1, t, t) bool keeps documents apart in training; None is causal, aligned
        bottom-right.
        """
        heads = lambda m: m.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        if self.rope_theta:
            q, k = rotate(q, pos, self.rope_theta), rotate(k, pos, self.rope_theta)

        if torch.is_tensor(pos):
            place = pos[:, None, None, None].expand_as(k)
            kv[0].scatter_(2, place, k.to(kv.dtype))
            kv[1].scatter_(2, place, v.to(kv.dtype))
            k, v = kv[:, :, :, :columns].to(q.dtype)
            mask = torch.arange(columns, device=x.device) <= pos[:, None, None, None]
        elif kv is not None:
            total = pos + x.shape[1]
            kv[0, :, :, pos:total], kv[1, :, :, pos:total] = k, v
            k, v = kv[:, :, :, :total].to(q.dtype)
        y = self.attend(q, k, v, pos, mask)                         # (b, heads, t, head_dim)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    @staticmethod
    def attend(q, k, v, pos, mask):
        """q (b, heads, t, head_dim), k, v (b, g, pos + t, head_dim); KV heads are not repeated."""
        b, heads, t, head_dim = q.shape
        if t == 1:  # a group's query heads become rows; one query sees all that was before it
            y = F.scaled_dot_product_attention(q.view(b, k.shape[1], -1, head_dim), k, v,
                                               attn_mask=mask)
            return y.view(b, heads, 1, head_dim)
        attention = functools.partial(F.scaled_dot_product_attention,
                                      enable_gqa=heads != k.shape[1])
        if mask is not None or pos == 0:
            return attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):    # without a mask
            from torch.nn.attention.bias import causal_lower_right      # takes a second to import
            return attention(q, k, v, attn_mask=causal_lower_right(t, pos + t))

        # Elsewhere is_causal would align top-left: a few queries at a time, for a small mask.
        y, rows = torch.empty_like(q), max(MASK_ELEMENTS // (pos + t), 1)
        for i in range(0, t, rows):
            piece = q[:, :, i:i + rows]
            n, seen = piece.shape[2], pos + min(i + rows, t)
            ahead = torch.full((n, n), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
            mask = F.pad(ahead, (seen - n, 0))
            y[:, :, i:i + n] = attention(piece, k[:, :, :seen], v[:, :, :seen], attn_mask=mask)
        return y


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up_proj = Linear(config.d_model, config.mlp_dim)
        self.down_proj = Linear(config.mlp_dim, config.d_model)

    def forward(self, x):
        return self.down_proj(squared_relu(self.up_proj(x)))


class Block(nn.Module):
    """One letter of the pattern: x + mixer(norm(x))."""

    def __init__(self, config, letter):
        super().__init__()
        self.letter = letter
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if letter == "M":
            self.mixer = Mamba2(config.d_model, config.mamba_heads, config.mamba_head_dim,
                                config.d_state, config.n_groups, config.d_conv,
                                config.chunk_size, config.norm_eps)
        else:
            self.mixer = Attention(config) if letter == "*" else MLP(config)

    def forward(self, x, **state):
        return x + self.mixer(self.norm(x), **state)


class Backbone(nn.Module):
    """Embeddings, layers and final norm, under the names of the released checkpoints."""

    def __init__(self, config):
        super().__init__()
        shape = config.vocab_size, config.d_model
        self.embeddings = nn.Embedding(*shape, _weight=torch.empty(shape))      # see init_weights
        self.layers = nn.ModuleList(Block(config, letter) for letter in config.pattern)
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)


class HybridLM(nn.Module):
    """The language model: model(tokens (b, t) int64) -> fp32 logits (b, t, v) (fp64 if it is).

    compute_dtype: dtype of the residual stream and the matmuls; None follows the parameters. Norms,
    decays, states and logits stay fp32, and so do fp32 parameters: bf16 training keeps fp32 masters
    without autocast.
    """

    def __init__(self, config, compute_dtype=None):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.backbone = Backbone(config)
        self.lm_head = Linear(config.d_model, config.vocab_size)
        if not self.lm_head.weight.is_meta:         # there is nothing to initialise
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """The table of the module's docstring, in order of the parameters."""
        std = math.sqrt(0.8 / self.config.d_model)
        for name, p in self.named_parameters():
            if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
                p.normal_(0, std / math.sqrt(len(self.config.pattern)))
            elif p.dim() == 2:
                p.normal_(0, std)
        for module in self.modules():
            if isinstance(module, Mamba2):
                module.conv1d.reset_parameters()
                module.reset_ssm_parameters()

    def embed(self, tokens):
        """tokens (b, t) -> (b, t, d) in the compute dtype. Raises ValueError for unknown ids."""
        try:
            x = self.backbone.embeddings(tokens)
        except IndexError:
            raise ValueError(f"tokens span {tokens.min()} to {tokens.max()}, the vocabulary is "
                             f"0 to {self.config.vocab_size - 1}") from None
        return x.to(self.compute_dtype or x.dtype)

    def hidden(self, tokens, cache=None, seq_idx=None):
        """Everything but the head: tokens (b, t) -> (b, t, d) after the final norm; a cache moves
        on by t.
        """
        b, t = tokens.shape
        if cache is not None:
            if seq_idx is not None:
                raise ValueError("seq_idx is for training: a cache holds one document a row")
            cache.check(b, t)
        h = self.run_layers(self.embed(tokens), cache, seq_idx)
        if cache is not None:
            cache.advance(t)
        return h

    def run_layers(self, x, cache=None, seq_idx=None):
        """The residual stream x (b, t, d) through all layers and the final norm."""
        mask = document_mask(seq_idx)
        for i, block in enumerate(self.backbone.layers):
            x = block(x, **layer_state(block.letter, i, cache, seq_idx, mask))
        return self.backbone.norm_f(x)

    def forward(self, tokens, cache=None, last_only=False, seq_idx=None):
        """Logits (b, t, v), or (b, 1, v) of the last token alone. Right for any split of a prompt
        with a cache.

        seq_idx (b, t) int: packed documents that must not see each other (training; not with a
        cache). Raises ValueError for tokens outside the vocabulary and for a cache that is full or
        of another batch.
        """
        if cache is not None and torch.is_grad_enabled():       # a cache is written in place
            with torch.no_grad():
                return self.forward(tokens, cache, last_only, seq_idx)
        h = self.hidden(tokens, cache, seq_idx)
        logits = self.lm_head(h[:, -1:] if last_only else h)
        return logits.to(accumulator(logits))

    def loss(self, tokens, labels, seq_idx=None):
        """Mean cross-entropy in nats of labels (b, t), below 0 ignored, without ever holding all
        logits.
        """
        h = self.hidden(tokens, seq_idx=seq_idx)
        return cross_entropy(h.flatten(0, 1), self.lm_head.weight, labels.flatten())

    def init_cache(self, batch, max_len, dtype=None, state_dtype=torch.float32):
        """An empty HybridCache on the model's device. dtype of KV and conv states: by default the
        compute dtype.
        """
        weight = self.backbone.embeddings.weight
        dtype = dtype or self.compute_dtype or weight.dtype
        fine = torch.float64 if dtype == torch.float64 else state_dtype
        return HybridCache(self.config, batch, max_len, dtype, weight.device, fine)


def layer_state(letter, i, cache, seq_idx, mask):
    """The keyword arguments that layer i's mixer takes."""
    if letter == "M":
        states = {} if cache is None else dict(conv_state=cache.conv[i], ssm_state=cache.ssm[i])
        return dict(seq_idx=seq_idx, **states)
    if letter == "*" and cache is None:
        return dict(mask=mask)
    if letter == "*" and cache.lengths is None:
        return dict(kv=cache.kv[i], pos=cache.pos)
    if letter == "*":
        return dict(kv=cache.kv[i], pos=cache.lengths, columns=cache.columns or cache.pos + 1)
    return {}


def document_mask(seq_idx):
    """seq_idx (b, t) -> (b, 1, t, t) bool: causal and inside one document. None stays None."""
    if seq_idx is None:
        return None
    doc = documents(seq_idx)
    return (doc[:, :, None] == doc[:, None, :]).tril()[:, None]


# ------------------------------------------------------------------------------------------------
# Hugging Face checkpoints, in and out

HF_FIELDS = {       # ours -> config.json of nemotron_h
    "vocab_size": "vocab_size", "d_model": "hidden_size", "mlp_dim": "intermediate_size",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "mamba_heads": "mamba_num_heads", "mamba_head_dim": "mamba_head_dim", "n_groups": "n_groups",
    "d_state": "ssm_state_size", "d_conv": "conv_kernel", "chunk_size": "chunk_size",
    "norm_eps": "layer_norm_epsilon", "bos_token_id": "bos_token_id",
}
HF_LAYERS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*",
             "mlp": "-",
             "moe": "E"}
HF_MUST_BE = dict(mlp_hidden_act="relu2", mamba_hidden_act="silu", tie_word_embeddings=False,
                  use_bias=False,
                  mlp_bias=False, attention_bias=False, mamba_proj_bias=False, use_conv_bias=True)
SHARD_BYTES = 5 * 10 ** 9


def config_from_hf(values):
    """A HybridConfig from config.json's values (old and new key names). Raises ValueError, naming
    the key.
    """
    if values.get("model_type") not in ("nemotron_h", "nemotron_h_rope"):
        raise ValueError(f"config.json: model_type is {values.get('model_type')!r}, must be "
                         f"'nemotron_h'")
    for key, value in HF_MUST_BE.items():
        if values.get(key, value) != value:
            raise ValueError(f"config.json: {key} is {values[key]!r}, only {value!r} is supported")
    pattern = values.get("hybrid_override_pattern")
    if pattern is None:
        layers = values.get("layers_block_type") or []
        pattern = "".join(HF_LAYERS.get(layer, "?") for layer in layers)
    if not isinstance(pattern, str):
        raise ValueError(f"config.json: hybrid_override_pattern is {pattern!r}, must be a string")
    values = {"head_dim": values.get("attention_head_dim"), **values}
    known = {ours: values[theirs] for ours,
             theirs in HF_FIELDS.items() if values.get(theirs) is not None}
    missing = [theirs for ours, theirs in HF_FIELDS.items()
               if ours not in known and ours not in ("chunk_size", "norm_eps", "bos_token_id",
                                                     "d_conv")]
    if missing:
        raise ValueError(f"config.json: {', '.join(missing)} missing")
    rope = values.get("rope_theta") if values["model_type"] == "nemotron_h_rope" else None
    return HybridConfig(pattern=pattern, rope_theta=rope, **known)


def config_to_hf(config, dtype):
    """config.json's values. time_step_min is what transformers' torch path clamps dt at: the
    kernels do not.
    """
    values = {theirs: getattr(config, ours) for ours, theirs in HF_FIELDS.items()}
    rope = {} if config.rope_theta is None else dict(rope_theta=config.rope_theta)
    name = "nemotron_h" if config.rope_theta is None else "nemotron_h_rope"
    return dict(architectures=["NemotronHForCausalLM"], model_type=name, **values, **rope,
                hybrid_override_pattern=config.pattern, num_hidden_layers=len(config.pattern),
                **HF_MUST_BE,
                initializer_range=math.sqrt(0.8 / config.d_model), time_step_min=1e-9,
                time_step_max=0.1,
                eos_token_id=config.bos_token_id, torch_dtype=str(dtype)[6:])


def read_json(path):
    """The object in a JSON file. Raises FileNotFoundError or ValueError with one line."""
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def replace_file(path, write):
    """Call write(temporary path) and rename onto path, so that path is old or new and never
    half.
    """
    temporary = f"{path}.tmp"
    try:
        write(temporary)
        os.replace(temporary, path)
    except Exception as error:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from error


def tensor_files(folder):
    """[(file, tensor name)] of a checkpoint, sharded or not. Raises with one line on missing or
    broken files.
    """
    from safetensors import SafetensorError, safe_open
    folder = pathlib.Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map")
        files = sorted(set(weight_map.values()))
    elif single.exists():
        files = [single.name]
    else:
        raise FileNotFoundError(f"{folder} has config.json but no weights: model.safetensors (or "
                                f"shards with "
                                "model.safetensors.index.json) belong beside it")
    found = []
    for file in files:
        try:
            with safe_open(folder / file, "pt") as shard:
                found += [(folder / file, key) for key in shard.keys()]
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder / file}, named by {index.name}, does not exist") \
                from None
        except SafetensorError as error:
            raise ValueError(f"{folder / file} is not a complete safetensors file: {error}") \
                from None
    return found


def set_parameter(model, name, value):
    """Put a tensor in the place of the parameter of this name."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(value))


def load_hf(folder, device="cpu", dtype=None, place=set_parameter):
    """A HybridLM from a Hugging Face folder: config.json and model.safetensors, whole or in shards.

    dtype: None keeps the stored one; A_log, D and dt_bias become fp32 (fp64 for float64) in any
    case. The model is built without memory and each tensor is read, cast and placed alone: the peak
    is the weights + one tensor. place(model, name, tensor) puts it there, or what it makes of it.
    Raises FileNotFoundError or ValueError with one line: missing
    files, broken or foreign checkpoints.
    """
    from safetensors import safe_open
    config = config_from_hf(read_json(pathlib.Path(folder) / "config.json"))
    with torch.device("meta"):
        model = HybridLM(config)
    wanted, loaded = dict(model.named_parameters()), set()
    for file, key in tensor_files(folder):
        name = "backbone." + key.removeprefix("model.") if key.startswith("model.") else key
        if name not in wanted:
            raise ValueError(f"{file}: tensor {key} is not part of pattern {config.pattern}")
        # opened anew so that no mapped page outlives its tensor
        with safe_open(file, "pt") as shard:
            value = shard.get_tensor(key)
            if value.shape != wanted[name].shape:
                raise ValueError(f"{file}: {key} has shape {tuple(value.shape)}, config.json asks "
                                 f"for "
                                 f"{tuple(wanted[name].shape)}")
            target = dtype or value.dtype
            if name.endswith(FP32_PARAMETERS):
                target = torch.promote_types(target, torch.float32)
            value = value.to(device=device, dtype=target, copy=True)
        place(model, name, value)
        loaded.add(name)
    missing = sorted(set(wanted) - loaded)
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, {missing[0]} first")
    return model


def save_hf(model, folder, shard_bytes=SHARD_BYTES):
    """Write a checkpoint that transformers opens as NemotronH: config.json and model.safetensors.

    Above shard_bytes there are several files. Each is written under another name and renamed;
    dtypes are kept. One file replaces one file at once; if there are several, before or after, the
    folder has no config.json until all are there: no mixture of two checkpoints can be loaded.
    """
    from safetensors.torch import save_file
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for name, p in model.named_parameters():
        if shards[-1] and size + p.nbytes > shard_bytes:
            shards, size = shards + [{}], 0
        shards[-1][name] = p.detach().contiguous()
        size += p.nbytes

    stale = {path.name for path in folder.glob("model*.safetensors*")}
    if len(shards) > 1 or stale - {"model.safetensors"}:
        (folder / "config.json").unlink(missing_ok=True)    # until the last file is there
    names = ["model.safetensors"] if len(shards) == 1 else \
        [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        replace_file(folder / name, lambda path: save_file(shard, path, metadata={"format": "pt"}))
    index = folder / "model.safetensors.index.json"
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        total = sum(p.nbytes for p in model.parameters())
        write_json(index, dict(metadata=dict(total_size=total), weight_map=weight_map))
        names.append(index.name)
    for name in stale - set(names):
        (folder / name).unlink()
    write_json(folder / "config.json", config_to_hf(model.config, model.lm_head.weight.dtype))


def write_text(path, text):
    """Write a text file, under another name first."""
    replace_file(path, lambda name: pathlib.Path(name).write_text(text, encoding="utf-8"))


def write_json(path, value):
    """Write one JSON object, under another name first."""
    write_text(path, json.dumps(value, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------
# Machine settings that scripts make (imports never do)


def tune_cpu(matmul=None):
    """Make two process-wide CPU settings and return what was done, in words. On an AMD EPYC they
    made transformers' training step 1.2 and then 1.4 times as fast (`--bench` has both together).

    Memory: glibc hands blocks over 32 MB back to the kernel at every free, and the next allocation
    pays a page fault per 4 KB: a 64 MB addition takes 26 ms fresh and 1.5 ms in memory that was
    kept. Keep it. Matmul: torch gives fp32 products to MKL, which does not use the full vector
    width of AMD's AVX-512 cores. oneDNN does (1.2 to 1.4 times as fast on Zen 4, up to twice on
    Zen 5), and takes them when bf16 is *allowed*; on CPUs without AMX it still computes in fp32.
    So: allow it there, and keep it if the error is fp32's. The choice follows the CPU and not a
    timing, as another choice is another last bit. matmul: a setting found before, to be used
    again, so that a resumed run computes what it computed.
    """
    import platform
    done = []
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)                 # M_MMAP_MAX: no block of its own mapping
        libc.mallopt(-1, 2 ** 31 - 1)       # M_TRIM_THRESHOLD: keep what is freed
        done.append("freed memory is kept")
    setting = torch.backends.mkldnn.matmul
    if matmul is not None:
        setting.fp32_precision = matmul
        done.append(f"fp32 matmuls as before ({matmul})")
    elif amd_with_avx512() and torch.backends.mkldnn.is_available():
        a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
        before, setting.fp32_precision = setting.fp32_precision, "bf16"
        if relative_error(a @ a, a.double() @ a.double()) > 1e-6:
            setting.fp32_precision = before
        else:
            done.append("fp32 matmuls by oneDNN")
    return "; ".join(done) or "nothing to set"


def amd_with_avx512():
    """Whether this is the kind of CPU on which oneDNN's fp32 matmul beats MKL's (Linux tells)."""
    try:
        vendor = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "AuthenticAMD" in vendor and torch.backends.cpu.get_cpu_capability() == "AVX512"


@contextlib.contextmanager
def decode_settings():
    """Inside: fp32 matmuls as torch comes. For one row oneDNN is twice as fast without bf16 allowed
    (`tune_cpu`).
    """
    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "none"
    try:
        yield
    finally:
        setting.fp32_precision = before


def resident_bytes(peak=False):
    """Resident memory of this process, or its peak since `reset_peak`, from /proc (Linux)."""
    key = "VmHWM" if peak else "VmRSS"
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024


CONTAINER = pathlib.Path("/sys/fs/cgroup")      # inside one, its own limits (cgroup v2)


def free_bytes(device="cpu"):
    """Memory that this process could take now: of the GPU, or of the machine or container."""
    if str(device).startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):        # not Linux: no limit is known
        return 2 ** 62
    try:
        limit = int((CONTAINER / "memory.max").read_text())
        used = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
        return max(min(free, limit - int(used["anon"])), 0)
    except (OSError, ValueError):           # no container, or one without a limit ("max")
        return free


def reset_peak():
    pathlib.Path("/proc/self/clear_refs").write_text("5")


# ------------------------------------------------------------------------------------------------
# python model.py: the architecture in numbers


def describe(config, context=8192, dtype=torch.bfloat16):
    """The text that main prints: strip, parameters by letter, FLOPs a token, bytes."""
    counts = {c: config.pattern.count(c) for c in LAYER_NAMES}
    lines = [config.pattern, "  ".join(f"{c} {LAYER_NAMES[c]} x {n}" for c, n in counts.items()),
             f"d_model {config.d_model}, MLP {config.mlp_dim}, attention "
             f"{config.n_heads}/{config.n_kv_heads} x "
             f"{config.head_dim}, Mamba {config.mamba_heads} x {config.mamba_head_dim}, groups "
             f"{config.n_groups}, "
             f"state {config.d_state}, vocabulary {config.vocab_size}", ""]

    layers, total = config.params_by_layer(), config.n_params()
    train, decode = config.flops_by_part(context), config.flops_by_part(context, decode=True)
    lines.append(f"{'part':12s}{'layers':>7s}{'parameters':>16s}{'share':>7s}"
                 f"{'train MF/token':>16s}{'decode MF/token':>17s}")
    rows = {LAYER_NAMES[c]: (counts[c], layers[c] * counts[c], train[c], decode[c]) for c in counts}
    rows["head"] = (1, config.vocab_size * config.d_model, train["head"], decode["head"])
    rows["embedding"] = (1, config.vocab_size * config.d_model, 0, 0)
    rows["final norm"] = (1, config.d_model, 0, 0)
    for name, (n, params, a, b) in rows.items():
        lines.append(f"{name:12s}{n:7d}{params:16,d}{params / total:7.1%}"
                     f"{3 * a / 1e6:16,.1f}{b / 1e6:17,.1f}")
    lines.append(f"{'total':12s}{len(config.pattern):7d}{total:16,d}{'':7s}"
                 f"{3 * sum(train.values()) / 1e6:16,.1f}{sum(decode.values()) / 1e6:17,.1f}")

    cache = config.cache_bytes(1, context, dtype)
    gib = lambda n: f"{n / 2 ** 30:.3f} GiB" if n >= 2 ** 28 else f"{n / 2 ** 20:.2f} MiB"
    lines += ["",
              f"at a context of {context} tokens, {str(dtype)[6:]}: weights "
              f"{gib(config.weight_bytes(dtype))}, "
              f"KV {gib(cache['kv'])}, fp32 SSM states {gib(cache['ssm'])}, conv states "
              f"{gib(cache['conv'])}"]
    return "\n".join(lines)


def plot_architecture(config, path, context=8192):
    """The pattern as a strip of coloured cells, parameters and training FLOPs by layer type under
    it.
    """
    from matplotlib.figure import Figure
    colours = {"M": "#4c72b0", "*": "#c44e52", "-": "#b8b8b8", "head": "#55a868",
               "embedding": "#8172b2"}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    strip, bars = figure.subplots(2, 1, height_ratios=[1, 2.2])
    for i, c in enumerate(config.pattern):
        strip.bar(i, 1, width=0.9, color=colours[c])
    strip.set(xlim=(-1, len(config.pattern)), yticks=[], xlabel="layer",
              title=f"{len(config.pattern)} layers, {config.n_params() / 1e6:,.0f} M parameters")
    table = config.vocab_size * config.d_model
    params = {c: n * config.pattern.count(c) for c, n in config.params_by_layer().items()}
    flops = config.flops_by_part(context)
    for y, values in enumerate(({**params, "embedding": table, "head": table}, flops)):
        left, total = 0, sum(values.values())
        for part, value in values.items():
            bars.barh(y, value / total, left=left, color=colours[part],
                      label=LAYER_NAMES.get(part, part) if y == 0 else None)
            if value / total > 0.015:
                bars.text(left + value / total / 2, y, f"{value / total:.0%}", ha="center",
                          va="center", fontsize=9)
            left += value / total
    bars.set(yticks=[0, 1], yticklabels=["parameters", f"FLOPs a token\nat {context}"], xlim=(0, 1),
             xlabel="share of the whole")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------
# python model.py --bench: against transformers, same weights, same batch, fp32

BENCH = dict(pattern="M-M-M*-M-M*-", vocab_size=4096, d_model=256, mlp_dim=1024, n_heads=4,
             n_kv_heads=2,
             head_dim=64, mamba_heads=8, mamba_head_dim=64, n_groups=2, d_state=64, chunk_size=64)


def bench_child(side, folder, batch, length):
    """Measure one side in this process: training step, prefill, decode, memory, the machine's
    matmul peak.
    """
    settings = tune_cpu() if side != "transformers" else "defaults"
    torch.manual_seed(0)
    tokens = torch.randint(0, BENCH["vocab_size"], (batch, length))
    if side == "this file":
        model = load_hf(folder)
        loss = lambda: model.loss(tokens, tokens.roll(-1, 1))

        def prefill(rows):
            cache = model.init_cache(len(rows), length + 64)
            model(rows, cache, last_only=True)
            return cache
        decode = lambda cache, last: model(last, cache)
    else:
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        loss = lambda: model(input_ids=tokens, labels=tokens).loss
        prefill = lambda rows: model(input_ids=rows, use_cache=True,
                                     logits_to_keep=1).past_key_values
        decode = lambda cache, last: model(input_ids=last, past_key_values=cache, use_cache=True)

    def step():
        model.zero_grad(set_to_none=True)
        loss().backward()
    reset_peak()
    before = resident_bytes()
    result = dict(side=side, settings=settings,
                  train=batch * length / median_seconds(step, repeats=7))
    result["growth"] = resident_bytes(peak=True) - before
    model.zero_grad(set_to_none=True)
    model.eval()
    with torch.inference_mode():
        result["prefill"] = batch * length / median_seconds(lambda: prefill(tokens), repeats=7)
        for rows in (1, batch):
            cache, last = prefill(tokens[:rows]), tokens[:rows, :1]
            with decode_settings():
                result[f"decode{rows}"] = rows / median_seconds(lambda: decode(cache, last),
                                                                repeats=60)
    a = torch.randn(2048, 2048)
    result["peak"] = 2 * 2048 ** 3 / median_seconds(lambda: a @ a)
    print(json.dumps(result))


def bench(batch=8, length=512, rounds=2):
    """Each side in fresh processes, in turn; the table of medians, ratios and shares of the matmul
    peak.
    """
    import statistics
    import subprocess
    import tempfile
    config = HybridConfig(**BENCH)
    sides = ["this file", "transformers", "transformers, our settings"]
    runs = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_hf(HybridLM(config), folder)
        for side in sides * rounds:
            command = [sys.executable, __file__, "--bench-child", side, folder, str(batch),
                       str(length)]
            output = subprocess.run(command, capture_output=True, text=True)
            if output.returncode:
                raise ValueError(f"{side}: {output.stderr.strip().splitlines()[-1]}")
            runs[side].append(json.loads(output.stdout.splitlines()[-1]))
            print(f"  {side}: {runs[side][-1]['train']:.0f} tokens/s in training "
                  f"({runs[side][-1]['settings']})")

    keys = ["train", "growth", "prefill", "decode1", f"decode{batch}", "peak"]
    median = {side: {k: statistics.median(r[k] for r in runs[side]) for k in keys}
              for side in sides}
    forward, decode = config.flops_by_part(length), config.flops_by_part(length, decode=True)
    flops = dict(train=3 * sum(forward.values()), prefill=sum(forward.values()) - forward["head"],
                 decode1=sum(decode.values()), **{f"decode{batch}": sum(decode.values())})
    print(f"\n{config.pattern}, {config.n_params():,} parameters, batch {batch} x {length}, fp32, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    heads = ("train tok/s", "prefill tok/s", "decode 1 tok/s", f"decode {batch} tok/s")
    print(f"{'':28s}" + "".join(f"{head:>18s}" for head in heads) +
          f"{'growth GB':>11s}{'2048^3 GFLOP/s':>16s}")
    for side in sides:
        m = median[side]
        cells = (f"{m[k]:9.0f} ({flops[k] * m[k] / m['peak']:4.0%})" for k in flops)
        print(f"{side:28s}" + "".join(f"{c:>18s}" for c in cells) + f"{m['growth'] / 1e9:11.2f}"
              f"{m['peak'] / 1e9:16.0f}")
    ratios = {other: {k: median["this file"][k] / median[other][k] for k in keys[:-1]}
              for other in sides[1:]}
    for other, r in ratios.items():
        print(f"against {other:26s}" + "   ".join(f"{k} {v:.2f}x" for k, v in r.items()))
    print("(in brackets: share of the side's own 2048^3 fp32 matmul rate; growth: peak resident "
          "memory over start)")
    return dict(n_params=config.n_params(), flops_per_token=flops["train"], bench=median,
                ratios=ratios)


def main(argv=None):
    from data import parse_flags, run_script

    @dataclasses.dataclass
    class Run:
        """The architecture in numbers: pattern strip, parameters, FLOPs, bytes. Builds on the meta
        device.
        """
        preset: str = "toy"         # one of the presets
        context: int = 8192         # tokens, for FLOPs and cache bytes
        out: str = "out"            # folder for the plot, model-PRESET.png
        bench: bool = False         # measure against transformers (must be installed)
        bench_child: str = dataclasses.field(   # one side of --bench, in a process of its own
            default="", metadata=dict(nargs=4))

    def body(run):
        if run.bench_child:
            side, folder, batch, length = run.bench_child
            return bench_child(side, folder, int(batch), int(length))
        if run.bench:
            return bench()
        config = HybridConfig.preset(run.preset)
        if run.context < 1:
            raise ValueError(f"--context is {run.context}, must be at least 1")
        print(describe(config, run.context))
        with torch.device("meta"):
            built = sum(p.numel() for p in HybridLM(config).parameters())
        print(f"built on the meta device: {built:,} parameters, formula {config.n_params():,}")
        assert built == config.n_params()
        pathlib.Path(run.out).mkdir(parents=True, exist_ok=True)
        picture = pathlib.Path(run.out) / f"model-{run.preset}.png"
        plot_architecture(config, picture, run.context)
        print(f"plot: {picture}")
        return dict(n_params=built,
                    flops_per_token=3 * sum(config.flops_by_part(run.context).values()))

    run_script(body, parse_flags(Run, argv))


if __name__ == "__main__":
    main()
