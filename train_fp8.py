"""Pre-training in FP8: both recipes of the Nemotron papers, and the loop they run in.

Why scale. An 8-bit float has 256 codes. E4M3 (4 bits of exponent, 3 of mantissa) reaches from 2^-9
to 448, E5M2 from 2^-16 to 57344; gradients of 1e-6 are nothing in either. So a tensor is multiplied
by scale = largest value of the format / its own largest magnitude (amax), cast, multiplied by
another such tensor in FP8 with fp32 accumulation, and divided by both scales. Up to 3 significant
bits are kept whatever the magnitude: signal over noise is 31.5 dB for E4M3 and 25.6 dB for E5M2, of
a product 28.5 and 24.6 dB, and a sum of many such errors, random as they are, is what training
tolerates. `python train_fp8.py --demo` shows the two ways in which this fails.

The two recipes (both with current scaling: the amax of this very tensor, not of its history):

    nemotron-h  one scale a tensor; E4M3 weights and activations, E5M2 output gradients, which need
                range more than precision. One token 30000 times as large as the others takes the
                codes away from all of them. arXiv 2504.03624, section 2.4
    nano2       E4M3 throughout; a scale for each 128 x 128 block of a weight and for each 1 x 128
                tile of activations and gradients, so range is needed within a tile only, and an
                outlier harms its own 127 neighbours. arXiv 2508.14444, section 2; as in DeepSeek-V3
                scales are any fp32, or powers of two with --pow2 (Transformer Engine's default)

A linear layer has three GEMMs: y = x w^T, dx = g w, dw = g^T x, each from freshly quantised
operands. In high precision stay: master weights, optimizer, gradients between layers, the first and
last four linears in execution order, embedding, head, norms, convolution, the scan, attention's own
products. in_proj packs z, x, B, C and dt in one GEMM, so dt's rows share blocks with the others.

Emulation, on any device: the operands are rounded to the FP8 grid and multiplied in fp32 (or bf16,
where the CPU has it, at 50 dB and more from the fp32 product). Products of two codes are exact in
fp32, so this is what the hardware computes, up to accumulation: Hopper's tensor cores keep fewer
bits with fast accumulation (on in nemotron-h's forward), and emulation cannot show that, nor speed.
Its price is 2 to 8% (nemotron-h) and 10 to 18% (nano2) of the toy's training step, as rounding is
one addition (`round_to_grid`) and the rows being worked on stay in the cache. The real GEMMs
(--fp8-backend hopper) follow cuBLASLt's documented layouts and have not been run: not measured.

We differ from nanochat's fp8.py (one recipe, codes kept for nemotron-h alone; here x is kept in
high precision for nano2, since tiles along tokens need it), from Megatron-Bridge's nano2 preset,
whose gradients are E5M2 where the paper has E4M3, and from torchao, whose block GEMMs want
multiples of 128: the MLP of the 9B has 15680 = 122.5 blocks. `_scaled_mm` is never used on a CPU:
e4m3 x e4m3 goes through a reference kernel there, 44 s for 1024 cubed.

The loop: AdamW (0.9, 0.95, weight decay 0.1), clip 1.0, a warmup-stable-decay schedule, packed
windows. The papers: 8192-token sequences in batches of 6 M tokens, WSD from 4.5e-4 to 4.5e-6 with
the decay over the last 18% of 20 T tokens, three phases of data, then 18.9 B tokens of 524288-token
sequences at 4.5e-6 (--phases has all of that by config). The toy keeps the shape of it and changes
the numbers. No autocast: parameters and optimizer states are fp32; the residual stream and every
matmul run in the compute dtype (bf16 on a GPU; on a CPU whichever of bf16 and fp32 was faster in a
measured step); norms, decays, states and the loss are fp32.

Several GPUs: torchrun, FSDP2 (`shard`), --recompute, checkpoints in parts that any number of
processes reads. Scales are local to a process, as in Transformer Engine; --amax-reduce makes
nemotron-h's those of the whole batch, so that 2 processes compute what 1 does in fp32 (in bf16,
FSDP gathers weights already rounded to bf16).

Glossary: as in model.py. code: an 8-bit float; grid: the values that have one; amax: the largest
magnitude; inverse: 1 / scale; block: what shares a scale, tile: a block of one row. WSD: linear
warmup, constant, decay to lr x min_lr by 1 - sqrt. gnorm: gradient norm before clipping. bpb: bits
a byte, nats / ln 2 / bytes of text, comparable between tokenizers and with xz.

The run folder: config.json + model.safetensors (transformers opens it as NemotronH),
tokenizer.json, metrics.jsonl, loss.png, and train_state.pt: everything that resuming needs, in one
file, renamed into place. Running into the same folder again continues; a folder of another run is
refused unless --overwrite.

Memory: what a step holds is predicted on the meta device, part by part, printed before anything is
built (`check_memory`), and refused if it is more than there is; --profile-memory measures it too.

Left out: an FP8 optimizer, delayed scaling, tensor and pipeline parallelism, a model too large for
one host's memory (every process builds it whole before sharding).

    python train_fp8.py                     the toy on the standard library's text, 5 min on 2 cores
    python train_fp8.py --data my_texts/ --out out/mine
    python train_fp8.py --compare --batch-size 4 --out out/compare      recipes against bf16
    python train_fp8.py --demo | --bench | --profile-memory
    torchrun --nproc-per-node 8 train_fp8.py --preset small --data shards/ --steps 20000
"""

import copy
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import sys
import time
import types
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_state_dict, set_model_state_dict,
                                                     set_state_dict)
from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import (Batches, StopRequest, TokenData, check_data, hold_folder, load_data, parse_flags,
                  read_rows, run_script, validation_batches)
from model import (HybridConfig, HybridLM, free_bytes, median_seconds, replace_file, save_hf,
                   tune_cpu, write_text)
from ssm import Linear

# ------------------------------------------------------------------------------------------------
# Numbers of 8 bits

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = {         # largest value, bits of mantissa, exponent of the smallest normal number
    E4M3: (448.0, 3, -6),
    E5M2: (57344.0, 2, -14),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Formats and blocks of the three operands of a linear layer.

    A block is (rows, columns) of a matrix whose last axis is the one that the GEMM sums over, as
    x (tokens, k), w (n, k) and g (tokens, n) are in the forward and in the input gradient; the
    weight gradient sums over tokens and takes x and g in blocks turned by a quarter. None is the
    whole tensor.
    """
    x_format: torch.dtype = E4M3
    w_format: torch.dtype = E4M3
    g_format: torch.dtype = E4M3
    x_block: tuple | None = None
    w_block: tuple | None = None
    g_block: tuple | None = None
    pow2: bool = False              # round scales down to powers of two
    amax_reduce: bool = False       # per tensor: one amax of x and g over all processes

    @property
    def per_tensor(self):
        return self.x_block is None


RECIPES = {
    "bf16": None,
    "nemotron-h": Recipe(g_format=E5M2),
    "nano2": Recipe(x_block=(1, 128), w_block=(128, 128), g_block=(1, 128)),
}


def cast(x, fmt):
    """x -> float8, saturating: finite values past the largest become the largest, inf and NaN NaN.

    The clamp is written out because the bare cast differs: E5M2 overflows to inf, and E4M3 to NaN
    before torch 2.12 and to 448 since, where even inf becomes 448 and a divergence looks healthy.
    """
    largest = FORMATS[fmt][0]
    return torch.where(x.isinf(), torch.nan, x.clamp(-largest, largest)).to(fmt)


def in_blocks(x, block):
    """x (m, k) -> fp32 (rows, block rows, columns, block columns), ragged last blocks filled with
    zeros, which change no amax. None: one block.
    """
    rows, columns = block or x.shape
    m, k = x.shape
    x = x.float()
    if m % rows or k % columns:
        x = F.pad(x, (0, -k % columns, 0, -m % rows))
    return x.reshape(-(-m // rows), rows, -(-k // columns), columns)


def block_scales(blocks, fmt, pow2=False):
    """The scale of each block, fp32 (rows, 1, columns, 1): largest value of the format / amax.

    A block of zeros would give inf: the scale stops at fp32's largest, so that 0 x scale is 0. An
    inf or NaN in a block makes the whole block NaN, loudly. pow2 cuts the scale down to a power of
    two, by clearing its mantissa.
    """
    amax = torch.maximum(blocks.amax((1, 3), keepdim=True), -blocks.amin((1, 3), keepdim=True))
    amax = amax.abs()               # of -0, whose quotient would be -inf
    # not 448 / amax, which torch computes as 448 x (1 / amax): a last bit off for a quarter of them
    scale = torch.full_like(amax, FORMATS[fmt][0]) / amax
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    return scale.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32) if pow2 else scale


def quantize(x, fmt, block=None, pow2=False, scale=None):
    """x (m, k) of any float dtype -> codes (m, k) in float8, inverse scales fp32.

    fmt: torch.float8_e4m3fn or float8_e5m2. block: (rows, columns), or None for one scale of the
    whole tensor. The inverse scales are (ceil(m / rows), ceil(k / columns)). Scaled in fp32 and
    cast once: by way of bf16, 3% of the values would round twice. scale: scales to be used
    instead of the tensor's own, in the shape of `block_scales`.
    """
    m, k = x.shape
    blocks = in_blocks(x, block)
    if scale is None:
        scale = block_scales(blocks, fmt, pow2)
    codes = cast((blocks * scale).flatten(2).flatten(0, 1)[:m, :k], fmt)
    return codes.contiguous(), (1 / scale)[:, 0, :, 0]


def dequantize(codes, inverse, block=None, dtype=torch.float32):
    """codes (m, k), inverse scales as from `quantize` -> (m, k) in dtype."""
    m, k = codes.shape
    blocks = in_blocks(codes, block) * inverse[:, None, :, None]
    return blocks.flatten(2).flatten(0, 1)[:m, :k].to(dtype)


def round_to_grid(x, fmt):
    """fp32 x -> the nearest value of the format, ties to even, subnormals too, in place and without
    a cast. Only for |x| up to the format's largest.

    Adding 1.5 x 2^23 grid steps leaves no bits below a step: the rounding of that addition is the
    one wanted. A step is 2^-mantissa of the value's own power of two.
    """
    _, mantissa, smallest = FORMATS[fmt]
    power = x.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    power.clamp_(min=2.0 ** smallest)
    shift = 1.5 * 2.0 ** (23 - mantissa)
    return x.add_(power, alpha=shift).sub_(power, alpha=shift)


FAKE_BLOCK = 2 ** 18        # elements that fake_quantize works on at a time, to stay in the cache


def fake_quantize(x, fmt, block=None, pow2=False, scale=None, dtype=None):
    """dequantize(quantize(x)) in dtype (x's own), bit for bit but for the sign of zeros, several
    times as fast on a CPU. scale: of the whole tensor, as in `quantize`.

    Rows are worked on in pieces that stay in the cache, and no float8 tensor is made: turning one
    back costs a CPU five times as much as making it.
    """
    m, k = x.shape
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    if block is None and scale is None:
        scale = block_scales(in_blocks(x, None), fmt, pow2)
    rows = 1 if block is None else block[0]
    step = max(FAKE_BLOCK // max(k, 1) // rows, 1) * rows if x.is_cpu else max(m, 1)
    for i in range(0, m, step):
        piece = x[i:i + step]
        blocks = in_blocks(piece, block)
        mine = block_scales(blocks, fmt, pow2) if scale is None else scale
        blocks = round_to_grid(blocks * mine, fmt).mul_(1 / mine)
        out[i:i + step] = blocks.flatten(2).flatten(0, 1)[:len(piece), :k]
    return out


def sqnr(value, truth):
    """Signal to quantisation noise in dB: 10 log10(|truth|^2 / |value - truth|^2), in fp64. An
    error of 1% is 40 dB; a cast of N(0, 1) gives E4M3 31.5, E5M2 25.6, bf16 55.6.
    """
    value, truth = value.detach().double(), truth.detach().double()
    return float(10 * torch.log10(truth.square().sum() / (value - truth).square().sum()))


# ------------------------------------------------------------------------------------------------
# One GEMM, two backends


class Operand(NamedTuple):
    """One side of an FP8 GEMM, (rows, k), summed over k. Emulated: the values themselves, in the
    dtype that is multiplied in, and no inverse. Hopper: float8 codes and inverse scales.
    """
    values: torch.Tensor
    inverse: torch.Tensor | None
    block: tuple | None

    def t(self):
        """Transposed: the same codes. For one scale a tensor or square blocks only, as tiles of
        1x128 would then lie across the axis that is summed over.
        """
        inverse = None if self.inverse is None else self.inverse.t()
        return Operand(self.values.t(), inverse, self.block)


def operand(x, fmt, block, recipe, backend, shared=False, dtype=None):
    """x (rows, k) quantised for a GEMM over k. shared: rows are spread over processes. dtype: what
    emulation multiplies in, if not x's own.
    """
    scale = None
    if shared and recipe.amax_reduce and block is None and rank_and_size()[1] > 1:
        scale = block_scales(in_blocks(x, None), fmt, recipe.pow2)
        dist.all_reduce(scale, dist.ReduceOp.MIN)     # of the largest amax
    if backend == "emulated":
        return Operand(fake_quantize(x, fmt, block, recipe.pow2, scale, dtype), None, block)
    return Operand(*quantize(x, fmt, block, recipe.pow2, scale), block)


def gemm(a, b, out_dtype, fast_accum=False):
    """a (m, k), b (n, k) -> a b^T (m, n).

    Emulated: multiply the dequantised values. The products of two codes are exact in fp32, and so
    is their sum up to fp32's rounding, in any order: what the hardware computes up to its own
    accumulation, which on Hopper keeps fewer bits with fast_accum.

    Hopper: cuBLASLt wants both operands with k innermost, e5m2 on one side at most, and k and n
    that 16 divides; scales of 1x128 blocks in columns, those of 128x128 blocks in columns of
    a multiple of 4 (cuBLASLt 12.9, compute capability 9.0).
    """
    if a.inverse is None:
        return (a.values @ b.values.t()).to(out_dtype)
    left, right = a.values.contiguous(), b.values.contiguous().t()
    if a.block is None:
        return torch._scaled_mm(left, right, a.inverse.reshape(()), b.inverse.reshape(()),
                                out_dtype=out_dtype, use_fast_accum=fast_accum)
    kind = {(1, 128): F.ScalingType.BlockWise1x128, (128, 128): F.ScalingType.BlockWise128x128}
    return F.scaled_mm(left, right, in_columns(a), kind[a.block], in_columns(b), kind[b.block],
                       output_dtype=out_dtype)


def in_columns(x):
    """An operand's inverse scales in the memory order of cuBLASLt: 1x128 (rows, k blocks) by
    columns; 128x128 (k blocks up to a multiple of 4, row blocks), also by columns. Strides are
    those of that order even where an axis has one element, since they are checked.
    """
    m = x.inverse if x.block == (1, 128) else F.pad(x.inverse, (0, -x.inverse.shape[1] % 4)).t()
    return torch.empty_strided(m.shape, (1, len(m)), dtype=m.dtype, device=m.device).copy_(m)


def whole_sixteens(x):
    """A Hopper operand with zeros to a multiple of 16 along the axis that is summed over."""
    short = -x.values.shape[1] % 16
    if x.inverse is None or not short:
        return x
    codes = F.pad(x.values.view(torch.uint8), (0, short)).view(x.values.dtype)
    return x._replace(values=codes)


class _Float8Matmul(torch.autograd.Function):
    """y = x w^T and both gradients, each a GEMM of two freshly quantised operands.

    x (tokens, k), w (n, k), g = dL/dy (tokens, n):  dx = g w sums over n,  dw = g^T x over tokens.
    With one scale a tensor, or square blocks, codes can be transposed: one quantisation serves two
    GEMMs, and the codes are what is saved. Tiles of 1x128 lie along the axis that is summed, so x
    and g are quantised again along tokens, x from the high-precision copy that is saved.
    """

    @staticmethod
    def forward(ctx, x, w, recipe, backend, on_grid=False):
        a = operand(x, recipe.x_format, recipe.x_block, recipe, backend, shared=True)
        if on_grid and backend == "emulated":
            b = Operand(w.to(x.dtype), None, recipe.w_block)
        else:
            b = operand(w, recipe.w_format, recipe.w_block, recipe, backend, dtype=x.dtype)
        ctx.recipe, ctx.backend, ctx.w_dtype = recipe, backend, w.dtype
        kept = a if recipe.per_tensor else Operand(x, None, None)
        ctx.save_for_backward(kept.values, kept.inverse, b.values, b.inverse)
        return gemm(a, b, x.dtype, fast_accum=recipe.per_tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        recipe, backend = ctx.recipe, ctx.backend
        x, x_inverse, w, w_inverse = ctx.saved_tensors
        dx = dw = None
        fmt, block = recipe.g_format, recipe.g_block
        g = operand(dy, fmt, block, recipe, backend, shared=True)
        if ctx.needs_input_grad[0]:
            dx = gemm(g, Operand(w, w_inverse, recipe.w_block).t(), dy.dtype)
        if ctx.needs_input_grad[1]:
            if recipe.per_tensor:
                g, a = (whole_sixteens(m.t()) for m in (g, Operand(x, x_inverse, None)))
            else:
                g = along_tokens(dy, fmt, block, recipe, backend)
                a = along_tokens(x, recipe.x_format, recipe.x_block, recipe, backend)
            dw = gemm(g, a, ctx.w_dtype)
        return dx, dw, None, None, None


def along_tokens(x, fmt, block, recipe, backend):
    """x (tokens, k) -> an operand (k, tokens) in blocks along tokens. Hopper's GEMM wants whole
    blocks of tokens: zeros fill the last.
    """
    if backend == "emulated":       # quantised where it lies: no transposed copy
        values = fake_quantize(x, fmt, block[::-1], recipe.pow2)
        return Operand(values.t(), None, block)
    x = F.pad(x, (0, 0, 0, -len(x) % block[1]))
    return operand(x.t(), fmt, block, recipe, backend)


class Float8Linear(Linear):
    """A linear layer that trains with FP8 GEMMs and keeps its weight in high precision.

    Quantises only where gradients are recorded, or while `always` is set: evaluation and the saved
    model are the high-precision ones, as in the released checkpoints.
    """

    def __init__(self, d_in, d_out, recipe, backend="emulated"):
        super().__init__(d_in, d_out)
        self.recipe, self.backend, self.always = recipe, backend, False
        self.on_grid = False        # the weight was rounded already, on its way here

    def forward(self, x):
        if not (torch.is_grad_enabled() or self.always) or not x.numel():
            return super().forward(x)
        w = self.weight
        y = _Float8Matmul.apply(x.reshape(-1, x.shape[-1]), w, self.recipe, self.backend,
                                self.on_grid)
        return y.view(*x.shape[:-1], -1)

    def extra_repr(self):
        return f"{super().extra_repr()}, {self.backend}"


def pick_backend(name, recipe, device):
    """"emulated" or "hopper". auto: what a CUDA GPU has, never silently less, elsewhere emulated.

    Raises ValueError where the GPU lacks what the recipe needs.
    """
    if name not in ("auto", "emulated", "hopper"):
        raise ValueError(f"--fp8-backend is {name!r}, must be auto, emulated or hopper")
    if name == "emulated" or (name == "auto" and device != "cuda"):
        return "emulated"
    if device != "cuda":
        raise ValueError(f"--recipe {recipe} on {device}: it has no FP8 matmul; --fp8-backend "
                         "emulated computes the same numbers without the speed")
    capability = torch.cuda.get_device_capability()
    needed = (8, 9) if RECIPES.get(recipe, recipe).per_tensor else (9, 0)
    if capability < needed or (needed == (9, 0) and capability != needed):
        raise ValueError(f"--recipe {recipe} needs a GPU of compute capability {needed}, this one "
                         f"({torch.cuda.get_device_name()}) has {capability}: --fp8-backend "
                         "emulated computes the same numbers without the speed")
    return "hopper"


def convert_to_fp8(model, recipe, backend="auto", ends=4, pow2=False, amax_reduce=False,
                   verbose=True):
    """Swap the model's eligible linears for Float8Linear, in place; prints what became of each.

    recipe: a name of RECIPES, or a Recipe of your own; bf16 changes nothing. The first and last
    `ends` linears in execution order stay in high precision (the papers' "first and last four"),
    and so do embedding and head.
    Returns the model. Raises ValueError for an unknown recipe, for a layer
    whose sizes 16 does not divide (hardware GEMMs need it, so emulation asks for it too), and when
    nothing is left to convert.
    """
    if not isinstance(recipe, Recipe) and recipe not in RECIPES:
        raise ValueError(f"--recipe is {recipe!r}, must be one of {', '.join(RECIPES)}")
    name, settings = ("own", recipe) if isinstance(recipe, Recipe) else (recipe, RECIPES[recipe])
    if settings is None:
        return model
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, Linear)]
    linears = [(name, m) for name, m in linears if m is not model.lm_head]
    inner = linears[ends:len(linears) - ends]
    if not inner:
        raise ValueError(f"--recipe {name} leaves the first and last {ends} linears alone, and "
                         f"this model has {len(linears)}: nothing to convert")
    for layer, m in inner:
        if m.in_features % 16 or m.out_features % 16:
            raise ValueError(f"{layer} is {m.out_features} x {m.in_features}: FP8 matmuls need "
                             "multiples of 16 (in_proj has 2 d_inner + 2 groups x state + heads "
                             "rows); change the sizes or take --recipe bf16")
    settings = dataclasses.replace(settings, pow2=pow2 or settings.pow2,
                                   amax_reduce=amax_reduce or settings.amax_reduce)
    backend = pick_backend(backend, recipe, model.lm_head.weight.device.type)
    for layer, m in inner:
        with torch.device("meta"):
            swapped = Float8Linear(m.in_features, m.out_features, settings, backend)
        swapped.weight = m.weight
        model.set_submodule(layer, swapped)
    if verbose:
        short = lambda pairs: ", ".join(layer.replace("backbone.layers.", "").replace("mixer.", "")
                                        for layer, _ in pairs)
        share = sum(m.weight.numel() for _, m in inner) / sum(m.weight.numel() for _, m in linears)
        print(f"fp8          {name}, {backend}: {len(inner)} of {len(linears)} linears, "
              f"{share:.0%} of their weights: {short(inner)}")
        outer = (f"the first {ends} ({short(linears[:ends])}) and last {ends} "
                 f"({short(linears[-ends:])}), where errors hurt most; " if ends else "")
        print(f"             in high precision: {outer}embedding, head, norms, conv, scan, "
              "attention")
    return model


# ------------------------------------------------------------------------------------------------
# The run


@dataclasses.dataclass
class Run:
    """Train a hybrid language model. Continues what is in --out if it is the same run."""

    preset: str = "toy"             # a name from model.py
    pattern: str = ""               # another layer pattern than the preset's
    data: str = "stdlib"            # stdlib, a text file, a folder of text, or a folder of shards
    tokenizer: str = "bpe"          # bpe, bytes, a tokenizer.json, or a tiktoken name (downloads)
    reset_documents: bool = False  # nothing crosses a document border: scan, convolution, attention
    recipe: str = "nano2"           # bf16, nemotron-h (one scale a tensor) or nano2 (blocks)
    fp8_backend: str = "auto"       # auto, emulated or hopper (auto never emulates on a CUDA GPU)
    pow2: bool = False              # round FP8 scales down to powers of two
    amax_reduce: bool = False       # nemotron-h: scales over all processes, not each its own
    phases: str = ""                # JSON file: a list of {"fraction", "data", "seq_len", "lr"}
    float8_gather: bool = False     # FSDP moves the weights of FP8 layers as codes, 1 byte a value
    recompute: bool = False         # activation checkpointing: keep only the blocks' inputs
    steps: int = 0                  # optimizer steps; 0 = what fits into --minutes, at most 1000
    minutes: float = 4.5            # of training, as measured at the start, when --steps is 0
    batch_size: int = 8             # sequences a step, over all accumulation steps
    grad_accum: int = 1             # backward passes a step
    seq_len: int = 256              # tokens a sequence
    lr: float = 3e-3                # peak learning rate
    min_lr: float = 0.01            # last learning rate as a fraction of lr
    warmup: float = 0.02            # fraction of steps
    decay: float = 0.3              # fraction of steps, at the end
    weight_decay: float = 0.1       # on matrices; none on norms, biases, A_log, D, dt_bias
    clip: float = 1.0               # largest gradient norm
    eval_every: int = 100           # steps between evaluations on a part of the validation text
    save_every: int = 200           # steps between checkpoints
    seed: int = 0                   # of initialisation and data order
    device: str = "auto"            # auto, cuda, mps or cpu
    compute_dtype: str = "auto"     # auto, float32 or bfloat16
    out: str = "out/base"           # run folder
    resume: bool = False            # continue --out, and fail if there is nothing to continue
    overwrite: bool = False         # start anew in --out even if it holds another run
    compare: bool = False           # bf16 against both recipes, see --seeds; --steps 0 is 100 then
    seeds: int = 5                  # how many, of --compare, from --seed on
    demo: bool = False              # print how FP8 fails: unscaled casts, one token x 30000
    bench: bool = False             # time linears (the 12B's on a GPU, else the toy's) and a step
    profile_memory: bool = False    # bytes of a training step by part, predicted, then measured
    stop_after: int = 0  # leave off, resumable, after this many steps of this session; 0 = never

    def __post_init__(self):
        if self.recipe not in RECIPES:
            raise ValueError(f"--recipe is {self.recipe!r}, must be one of {', '.join(RECIPES)}")
        for name in ("batch_size", "grad_accum", "seq_len", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, must be "
                                 f"at least 1")
        if self.batch_size % self.grad_accum:
            raise ValueError(f"--batch-size {self.batch_size} must be a multiple of --grad-accum "
                             f"{self.grad_accum}")
        size = int(os.environ.get("WORLD_SIZE", 1))
        if self.batch_size // self.grad_accum % size:
            raise ValueError(f"--batch-size {self.batch_size} in {self.grad_accum} passes is "
                             f"{self.batch_size // self.grad_accum} rows: {size} processes cannot "
                             "share them equally")
        for name in ("lr", "clip", "minutes"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} is {getattr(self, name)}, must be positive")
        for name in ("weight_decay", "seed", "stop_after", "steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, must be "
                                 "at least 0")
        for name in ("min_lr", "warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, must be "
                                 "from 0 to 1")
        if self.warmup + self.decay > 1:
            raise ValueError(f"--warmup {self.warmup} + --decay {self.decay} must be at most 1")
        if self.amax_reduce and self.recipe != "nemotron-h" and not self.compare:
            raise ValueError("--amax-reduce is for --recipe nemotron-h, whose scales span all "
                             f"tokens; {self.recipe} has nothing to reduce")
        modes = [name for name in MODES if getattr(self, name)]
        if len(modes) > 1 or modes and size > 1:
            raise ValueError(f"--{modes[-1].replace('_', '-')} runs alone, in one process"
                             + (f", not with --{modes[0]}" if len(modes) > 1 else ": no torchrun"))
        if self.compare and self.phases:
            raise ValueError("--compare trains on one text: leave --phases away")
        for name in ("pow2", "float8_gather"):
            if getattr(self, name) and self.recipe == "bf16":
                raise ValueError(f"--{name.replace('_', '-')} is for FP8 recipes, not for bf16")
        if self.resume and self.overwrite:
            raise ValueError("--resume continues, --overwrite starts anew: give one of them")


MODES = "compare", "demo", "bench", "profile_memory"        # instead of training
SESSION_FLAGS = ("device", "out", "resume", "overwrite", "stop_after", "eval_every", "save_every",
                 "minutes", "seeds", *MODES)
STEPS = (1000, 700, 500, 350, 250, 180, 120)        # what --steps 0 chooses from


# ------------------------------------------------------------------------------------------------
# Several processes: torchrun --nproc-per-node 8 train_fp8.py


def start_processes(device):
    """Join the group that torchrun announces, if it does; processes past the first fall silent.
    Returns (rank, size).
    """
    if "RANK" in os.environ and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    return rank_and_size()


def rank_and_size():
    """Of this process; (0, 1) without torchrun."""
    started = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if started else (0, 1)


def my_rows(m):
    """This process's share of the rows of a batch (b, ...); None stays None."""
    rank, size = rank_and_size()
    return m if m is None or size == 1 else m.chunk(size)[rank]


def mean_over_processes(value):
    """The mean of a 0-dim tensor over all processes, in place."""
    _, size = rank_and_size()
    if size > 1:
        dist.all_reduce(value)
        value /= size
    return value


def recompute_activations(model):
    """Keep only each block's input for the backward pass and run the block again there."""
    for block in model.backbone.layers:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


class Float8Weight(torch.Tensor):
    """A weight, or the part of it that one process keeps, that FSDP gathers as FP8 codes: one byte
    a value moves, and four a block. In all else it is the high-precision tensor that it holds.

    The codes are those that the layer would make of the gathered weight: one scale a tensor needs
    the largest amax of all processes, blocks need parts of whole blocks. They travel as uint8,
    since not every backend knows float8, and arrive dequantised, in the compute dtype.
    """
    KEPT = [getattr(torch.ops.aten, name) for name in (
        "detach", "clone", "alias", "new_zeros", "slice", "split", "view", "as_strided",
        "_to_copy")]

    @staticmethod
    def __new__(cls, values, recipe):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, device=values.device, requires_grad=values.requires_grad)

    def __init__(self, values, recipe):
        self.values, self.recipe = values, recipe

    def __repr__(self):
        return f"Float8Weight({self.values})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        mine = next(m for m in tree_leaves((args, kwargs)) if isinstance(m, cls))
        args, kwargs = tree_map_only(cls, lambda m: m.values, (args, kwargs or {}))
        out = func(*args, **kwargs)
        if func is torch.ops.aten.copy_.default and out is mine.values:
            return mine
        if func.overloadpacket in cls.KEPT:
            return tree_map_only(torch.Tensor, lambda m: cls(m, mine.recipe), out)
        return out

    def fsdp_pre_all_gather(self, mesh):
        """The tensors to gather, and what every process knows already."""
        recipe, scale = self.recipe, None
        if recipe.w_block is None:
            scale = block_scales(in_blocks(self.values, None), recipe.w_format, recipe.pow2)
            dist.all_reduce(scale, dist.ReduceOp.MIN, group=mesh.get_group())
        codes, inverse = quantize(self.values, recipe.w_format, recipe.w_block, recipe.pow2, scale)
        codes = codes.view(torch.uint8)
        return ((codes,), inverse) if recipe.w_block is None else ((codes, inverse), None)

    def fsdp_post_all_gather(self, gathered, inverse, param_dtype, *, out=None):
        """What arrived -> the whole weight, and the tensors that FSDP may free after use."""
        codes, recipe = gathered[0].view(self.recipe.w_format), self.recipe
        inverse = inverse if recipe.w_block is None else gathered[1]
        whole = dequantize(codes, inverse, recipe.w_block, param_dtype)
        if out is None:
            return whole, (whole,)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(out):
            out.copy_(whole)


def gather_in_float8(linears):
    """Make the weights of these layers Float8Weight where recipe and shape allow it."""
    size = dist.get_world_size()
    for m in linears:
        rows = m.recipe.w_block[0] if m.recipe.w_block else 1
        if m.out_features % (size * rows) == 0:
            m.weight = torch.nn.Parameter(Float8Weight(m.weight.data, m.recipe))
            m.on_grid = True


def shard(model, float8_gather=False):
    """FSDP2, in place: every process keeps its part of each parameter, of its gradient and of its
    moments in fp32, and gathers a layer's parameters when they are needed.

    Two groups a block: the linears, gathered in the compute dtype or, with float8_gather, as codes
    (`Float8Weight`; evaluation then sees rounded weights too), and the small ones, gathered in
    fp32, since A_log, dt_bias, D and the norms must not be rounded. Gradients are summed in fp32.
    """
    mesh = dist.device_mesh.init_device_mesh(model.lm_head.weight.device.type,
                                             (dist.get_world_size(),))
    fine = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    low = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32)
    for block in model.backbone.layers:
        linears = [m for m in block.modules() if isinstance(m, Linear)]
        if float8_gather:
            gather_in_float8([m for m in linears if isinstance(m, Float8Linear)])
        fully_shard(linears, mesh=mesh, mp_policy=low)
        fully_shard(block, mesh=mesh, mp_policy=fine)
    fully_shard(model.backbone.norm_f, mesh=mesh, mp_policy=fine)
    fully_shard(model, mesh=mesh, mp_policy=low)
    register_fsdp_forward_method(model, "loss")


def from_first(*values):
    """What the first process has, for all: measurements differ, decisions must not."""
    values = list(values)
    if rank_and_size()[1] > 1:
        dist.broadcast_object_list(values)
    return values


def gathered(model, config):
    """A whole HybridLM on the CPU for the first process, None for the others; alone, the model."""
    rank, size = rank_and_size()
    if size == 1:
        return model
    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True,
                                                                   cpu_offload=True))
    if rank:
        return None
    with torch.device("meta"):
        whole = HybridLM(config, model.compute_dtype)
    whole.load_state_dict(tensors, assign=True)
    return whole


# ------------------------------------------------------------------------------------------------
# Schedule, optimizer, evaluation


def wsd(step, steps, lr, warmup=0.02, decay=0.3, min_lr=0.01):
    """Learning rate of step 0 <= step < steps: linear warmup, constant, then down as 1 - sqrt.

    warmup and decay are fractions of steps. The last step has exactly lr * min_lr, if the decay
    is a step or more.
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
def evaluate(model, stream, batch_size=8, seq_len=512, separator=None, limit=None, spread=False,
             progress=False):
    """Mean nats a token over the stream, every token predicted once; limit and spread: over a part
    of it, see `validation_batches`.
    """
    device, total, count = model.lm_head.weight.device, 0.0, 0
    batches = validation_batches(stream, batch_size, seq_len, separator, limit, spread)
    rank, size = rank_and_size()
    for batch in tqdm(batches, "evaluating", disable=None if progress and not rank else True,
                      leave=False):
        if size > 1:        # rows in turn; a process without rows of its own goes along
            rows = torch.arange(len(batch[0])) % size == rank
            batch = [m if m is None else m[rows] if rows.any() else m[:1].clone() for m in batch]
            if not rows.any():
                batch[1][:] = -1
        tokens, labels, seq_idx = (m if m is None else m.to(device) for m in batch)
        kept = int((labels >= 0).sum())
        total += float(model.loss(tokens, labels, seq_idx)) * kept
        count += kept
    sums = torch.tensor([total, count], dtype=torch.float64, device=device)
    mean_over_processes(sums)
    return float(sums[0] / sums[1])


def bits_per_byte(nats_per_token, tokens, text_bytes):
    """Of a stream of so many tokens that encode so many bytes of text."""
    return nats_per_token * tokens / text_bytes / math.log(2)


def seconds_a_pass(model, trial):
    """Of one forward and backward on this process's rows of a batch: the median of 3."""
    device = model.lm_head.weight.device
    trial = [None if m is None else my_rows(m).to(device) for m in trial]
    seconds = median_seconds(lambda: model.loss(*trial).backward(), device, repeats=3)
    model.zero_grad(set_to_none=True)
    return seconds


def choose_dtype(model, trial):
    """On a CPU: the faster of fp32 and bf16, in a measured pass of this model.

    bf16 is not even tried on a CPU without bf16 arithmetic: one matmul of 256 cubed says so in
    milliseconds, where a pass through the model would take a minute.
    """
    def matmul(dtype):
        a = torch.randn(256, 256).to(dtype)
        return median_seconds(lambda: a @ a, repeats=3)
    slow, = from_first(matmul(torch.bfloat16) > 4 * matmul(torch.float32))
    if slow:
        print("measured     this CPU has no bf16 arithmetic: float32")
        return torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.compute_dtype = dtype
        seconds[dtype] = seconds_a_pass(model, trial)
    best, = from_first(min(seconds, key=seconds.get))
    print("measured     a pass takes " + ", ".join(
        f"{1e3 * s:.0f} ms in {str(dtype)[6:]}" for dtype, s in seconds.items())
        + f": {str(best)[6:]}")
    return best


def choose_steps(run, model, trial):
    """The run with its number of steps settled: what fits into --minutes, as measured, from a
    coarse ladder, so that the noise of a measurement seldom changes a run.
    """
    seconds = seconds_a_pass(model, trial) * run.grad_accum
    steps, = from_first(next((n for n in STEPS if n * seconds <= 60 * run.minutes), STEPS[-1]))
    print(f"steps        {steps}, of {STEPS[0]} at most: a step takes {seconds:.2f} s, --minutes "
          f"{run.minutes:g}")
    return dataclasses.replace(run, steps=steps)


# ------------------------------------------------------------------------------------------------
# Memory of a step, predicted


class KernelAttention(TorchFunctionMode):
    """Inside it, attention on the meta device keeps what kernels keep (a CPU's, a GPU's for 16-bit
    inputs): q, k, v, the output and one number a query. torch traces it there written out, with all
    (t, t) scores.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *args, is_causal=kwargs.get("is_causal", False), attn_mask=kwargs["attn_mask"])[0]
        return func(*args, **(kwargs or {}))


def saved_bytes(model, tokens):
    """Bytes that autograd keeps for the backward pass of model.loss(tokens, ...), parameters not
    counted. On the meta device too, where it takes no memory: a prediction for any size.
    """
    kept, weights = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(m):
        storage = m.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(m)         # so that no storage's address is used twice
        return m
    alive = []
    with KernelAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda m: m):
        model.loss(tokens, tokens)
    return sum(kept.values())


def built_for_memory(run, config, dtype, where):
    """(model, tokens) of one pass of a process, on a device or on "meta"."""
    with torch.device(where):
        model = HybridLM(config, dtype)
    backend = run.fp8_backend if where != "meta" else "emulated"
    convert_to_fp8(model, run.recipe, backend, pow2=run.pow2, verbose=False)
    if run.recompute:
        recompute_activations(model)
    rows = run.batch_size // run.grad_accum // rank_and_size()[1]
    return model, torch.zeros(rows, run.seq_len, dtype=torch.int64, device=where)


def step_bytes(run, config, dtype):
    """{part: bytes} that a training step holds on each process, predicted without memory."""
    mine = 4 * config.n_params() // rank_and_size()[1]
    return dict(weights=mine, gradients=mine, optimizer=2 * mine,
                activations=saved_bytes(*built_for_memory(run, config, dtype, "meta")))


def check_memory(run, config, dtype, device, processes=1):
    """Prints what a training step takes on one of so many processes. Raises ValueError if that is
    more than is free, since a machine out of memory kills without a word.
    """
    parts, gib = step_bytes(run, config, dtype), lambda n: f"{n / 2 ** 30:,.2f} GiB"
    need, activations = sum(parts.values()), parts.pop("activations")
    takes = (f"at least {gib(need)}: {gib(sum(parts.values()))} of weights, gradients and moments, "
             f"{gib(activations)} of activations")
    if rank_and_size()[1] > 1:          # all build the model whole before they keep their shares,
        whole = 4 * config.n_params()   # and on a CPU run it, to choose a dtype
        whole += whole + activations if device == "cpu" else 0
        takes += f"; before it is shared out, {gib(whole)}"
        need = max(need, whole)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    # on the way to a GPU the model is in the host's memory, once for each of its processes
    for needs, where in ((need * processes if device == "cpu" else need, device),
                         (4 * config.n_params() * processes, "cpu")):
        free = free_bytes(where)
        if needs > free:
            raise ValueError(
                f"{config.n_params() / 1e6:,.1f} M parameters and {run.batch_size} x {run.seq_len} "
                f"tokens a step take {takes}. On {where} {gib(needs)} are wanted"
                + f" by {processes} processes" * (processes > 1) + f", {gib(free)} are free. Less: "
                "a smaller model, --batch-size or --seq-len; in training also a larger "
                "--grad-accum, or --recompute")
    print(f"memory       {takes}")


# ------------------------------------------------------------------------------------------------
# The run folder


def same_run(saved, run):
    """None, or the first flag in which a saved run differs from this one, in words."""
    for name, value in dataclasses.asdict(run).items():
        if name in SESSION_FLAGS or (name == "steps" and value == 0):
            continue
        if saved.get(name) != value:
            return f"{name} {saved.get(name)!r}, now {value!r}"


RUN_FILES = ("config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl",
             "train_state.pt", "loss.png")


def open_folder(run):
    """The state to continue from, or None for a fresh start; writes nothing.

    Raises FileExistsError rather than mixing two runs, ValueError for a state that is not one.
    """
    folder = pathlib.Path(run.out)
    state_file = folder / "train_state.pt"
    if rank_and_size()[0] == 0:
        hold_folder(folder)
    if run.overwrite:
        return None
    if state_file.exists():
        try:
            state = torch.load(state_file, map_location="cpu", weights_only=True)
            difference = same_run(state["run"], run)
        except Exception as error:      # torch raises many kinds for a file that is not its own
            raise ValueError(f"{state_file} cannot be read ({type(error).__name__}): move it "
                             "away, or --overwrite") from None
        parts = state.get("parts")
        if parts and not (folder / parts / ".metadata").exists():
            raise ValueError(f"{folder / parts}, which {state_file.name} names, is missing or not "
                             "whole: restore it, or --overwrite")
        if difference:
            check_data(run.data)        # a path mistyped is the likelier error
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


def part_folders(folder):
    """Those that `save_state` made for several processes, and nothing else of a similar name."""
    return [parts for parts in folder.glob("train_state-*")
            if parts.name.removeprefix("train_state-").isdecimal() and parts.is_dir()
            and ((parts / ".metadata").exists() or any(parts.glob("*.distcp")))]


def clear_folder(run):
    """Make the folder, remove what an overwritten run left; last the state, which guards it."""
    folder = pathlib.Path(run.out)
    folder.mkdir(parents=True, exist_ok=True)
    hold_folder(folder)
    if not run.overwrite and any((folder / name).exists() for name in RUN_FILES):
        raise FileExistsError(f"{folder} was filled by another run since this one began: choose "
                              "another --out, or --overwrite")
    for parts in part_folders(folder):
        shutil.rmtree(parts)
    for name in sorted(RUN_FILES, key=lambda name: name == "train_state.pt"):
        (folder / name).unlink(missing_ok=True)


def save_state(run, model, optimizer, batches, step, token_data, matmul, phases):
    """train_state.pt: all that resuming needs, whole or not at all.

    Several processes write their parts into a folder beside it (torch.distributed.checkpoint), and
    then the file names that folder, so a kill in between leaves the checkpoint of before.
    """
    folder, (rank, size) = pathlib.Path(run.out), rank_and_size()
    parts = folder / f"train_state-{step}"
    state = dict(run=dataclasses.asdict(run), step=step, position=batches.position,
                 fingerprint=token_data.fingerprint, tokenizer_json=token_data.tokenizer_json,
                 rng=torch.get_rng_state(), compute_dtype=str(model.compute_dtype)[6:],
                 matmul=matmul, phases=phases)
    tensors = training_tensors(model, optimizer)
    if size > 1:
        dcp.save(tensors, checkpoint_id=parts, no_dist=False)
        state["parts"] = parts.name
    else:
        state |= tensors
    if rank == 0:
        replace_file(folder / "train_state.pt", lambda temporary: torch.save(state, temporary))
        for other in part_folders(folder):
            if other.name != state.get("parts"):
                shutil.rmtree(other)


def training_tensors(model, optimizer):
    """Parameters and moments by parameter name, whatever the number of processes. An optimizer that
    has not stepped has none (and asking for them would make torch take a step).
    """
    if not optimizer.state:
        return dict(model=plain(get_model_state_dict(model)))
    parameters, moments = get_state_dict(model, optimizer)
    return dict(model=plain(parameters), optimizer=moments)


def plain(tensors):
    """The same storage without Float8Weight around it, as checkpoints hold it."""
    def unwrap(m):
        local = m.to_local() if isinstance(m, DTensor) else m
        if not isinstance(local, Float8Weight):
            return m
        return DTensor.from_local(local.values, m.device_mesh, m.placements, shape=m.shape,
                                  stride=m.stride(), run_check=False)
    return {name: unwrap(m.detach()) for name, m in tensors.items()}


def load_state(state, folder, model, optimizer):
    """Put a checkpoint into model and optimizer, whatever number of processes wrote it."""
    options = StateDictOptions(full_state_dict="parts" not in state)
    if "parts" in state:
        parts = pathlib.Path(folder) / state["parts"]
        stepped = any(key.startswith("optimizer.")
                      for key in dcp.FileSystemReader(parts).read_metadata().state_dict_metadata)
        tensors = dict(model=plain(get_model_state_dict(model)))
        if stepped:
            parameters, moments = get_state_dict(model, optimizer)
            tensors = dict(model=plain(parameters), optimizer=moments)
        with warnings.catch_warnings():     # that one process may read it is the point
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            try:
                dcp.load(tensors, checkpoint_id=parts)
            except (Exception, dcp.api.CheckpointException) as error:
                raise ValueError(f"{parts} cannot be read ({type(error).__name__}): restore it, or "
                                 "--overwrite") from None
    else:
        tensors = {key: state[key] for key in ("model", "optimizer") if key in state}
    if "optimizer" in tensors:
        set_state_dict(model, optimizer, model_state_dict=tensors["model"],
                       optim_state_dict=tensors["optimizer"], options=options)
    else:
        set_model_state_dict(model, tensors["model"], options=options)


def finished_result(run):
    """The result of a run that has ended and reported, or None."""
    rows = read_rows(pathlib.Path(run.out) / "metrics.jsonl")
    return rows[-1].get("final") if rows else None


class Metrics:
    """metrics.jsonl: one object a step. On resuming, lines after the checkpoint are dropped."""

    def __init__(self, path, step):
        path = pathlib.Path(path)
        self.rows = [row for row in read_rows(path) if row["step"] <= step and "loss" in row]
        if path != pathlib.Path(os.devnull):        # where processes past the first write
            write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.file = open(path, "a", encoding="utf-8")

    def write(self, **row):
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


class StopAfterStep(StopRequest):
    """Ctrl-C or SIGTERM asks the loop to stop after its step, and says so."""

    def ask(self, *_):
        super().ask()
        tqdm.write("stopping after this step (Ctrl-C again to stop at once)", file=sys.stderr)

    def everywhere(self):
        """Whether any process was asked: all must leave the loop after the same step."""
        if rank_and_size()[1] == 1:
            return self.asked
        asked = [None] * dist.get_world_size()
        dist.all_gather_object(asked, self.asked)
        return any(asked)


# ------------------------------------------------------------------------------------------------
# The loop


class NotFinite(ValueError):
    """The loss or the gradient of a step is infinite or NaN; nothing was updated."""


def train_step(model, optimizer, batches, run, lr, device):
    """One optimizer step: accumulate, clip, update. Returns the mean loss and the gradient norm, as
    floats. Raises NotFinite.
    """
    total = 0.0
    for _ in range(run.grad_accum):
        tokens, labels, seq_idx = (None if m is None else my_rows(m).to(device, non_blocking=True)
                                   for m in batches.next())
        loss = model.loss(tokens, labels, seq_idx) / run.grad_accum
        loss.backward()
        total += loss.detach()
    total = mean_over_processes(total)
    gnorm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
    if isinstance(gnorm, DTensor):
        gnorm = gnorm.full_tensor()
    if not math.isfinite(total) or not math.isfinite(gnorm):
        raise NotFinite(f"the loss is {float(total):g} and the gradient norm {float(gnorm):g}: "
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


class Phase(NamedTuple):
    """A stretch of a run: up to a fraction of its steps, on a text, with a length; lr None follows
    the schedule.
    """
    end: float
    run: Run
    token_data: TokenData
    lr: float | None


def load_phases(run, token_data):
    """The phases of --phases, a JSON list of objects, or the whole run as one.

    Keys: fraction (of the steps), data, seq_len, lr (constant; without it the schedule goes on).
    What is missing is the run's. Tokens a step stay as they are: a longer sequence means fewer
    rows. Raises ValueError for anything else.
    """
    if not run.phases:
        return [Phase(1.0, run, token_data, None)]
    try:
        wanted = json.loads(pathlib.Path(run.phases).read_text(encoding="utf-8"))
        total = sum(phase["fraction"] for phase in wanted)
        unknown = set().union(*wanted) - {"fraction", "data", "seq_len", "lr"}
    except (json.JSONDecodeError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"--phases {run.phases} must be a JSON list of objects with a fraction "
                         "and, if they differ, data, seq_len, lr "
                         f"({type(error).__name__}: {error})") from None
    if unknown or not abs(total - 1) <= 1e-6 or min(phase["fraction"] for phase in wanted) <= 0:
        raise ValueError(f"--phases {run.phases}: positive fractions must sum to 1 (they sum to "
                         f"{total:g}), keys are fraction, data, seq_len, lr"
                         + (f", not {', '.join(sorted(unknown))}" if unknown else ""))
    phases, done, tokens = [], 0.0, run.batch_size * run.seq_len
    for phase in wanted:
        done += phase["fraction"]
        length, data = phase.get("seq_len", run.seq_len), phase.get("data", run.data)
        if not isinstance(length, int) or length < 1 or tokens % length:
            raise ValueError(f"--phases {run.phases}: seq_len {length!r} must divide the {tokens} "
                             "tokens of a step")
        lr = phase.get("lr")
        if not isinstance(data, str) or not (
                lr is None or isinstance(lr, (int, float)) and 0 < lr < math.inf):
            raise ValueError(f"--phases {run.phases}: data {data!r} must be a path and lr {lr!r} a "
                             "positive number")
        mine = dataclasses.replace(run, seq_len=length, batch_size=tokens // length, data=data)
        text = token_data if data == run.data else load_data(
            data, run.tokenizer, token_data.vocab_size, token_data.tokenizer_json)
        if text.tokenizer_json != token_data.tokenizer_json:
            raise ValueError(f"--phases {run.phases}: the shards in {data} were written with "
                             "another tokenizer than the run's")
        make_batches(mine, text)
        phases.append(Phase(done, mine, text, lr))
    return phases


def longest(phases):
    """The run of the phase with the longest sequences: what memory must be there for."""
    return max((phase.run for phase in phases), key=lambda run: run.seq_len)


def train(run, model, token_data, state=None, matmul=None, phases=None, eval_tokens=None):
    """Train model as run says, from state if given. Returns (last step, rows of metrics.jsonl).
    eval_tokens: of the validation text, at every eval_every; by default those of eight steps.

    Writes train_state.pt at the start, every save_every steps, on Ctrl-C or SIGTERM and at the
    end, so that stopping loses nothing and N + N steps equal 2N bit for bit on a CPU. Raises
    ValueError, and keeps the last checkpoint, when the loss or the gradient is not finite.
    """
    device, separator = model.lm_head.weight.device, token_data.separator
    optimizer = make_optimizer(model, run.lr, run.weight_decay)
    first = saved = 0 if state is None else state["step"]
    phases = phases or load_phases(run, token_data)
    phases = [phase._replace(end=round(phase.end * run.steps)) for phase in phases]
    phases[-1] = phases[-1]._replace(end=run.steps)
    plan = [[p.end, p.run.seq_len, p.lr, p.token_data.fingerprint] for p in phases]
    if state is not None and state["phases"] != plan:
        raise ValueError(f"--phases {run.phases} or the text it names has changed since {run.out} "
                         "was begun: restore it, or --overwrite")
    phase = next((p for p in phases if first < p.end), phases[-1])
    batches = make_batches(phase.run, phase.token_data, 0 if state is None else state["position"])
    save = lambda step: save_state(run, model, optimizer, batches, step, token_data, matmul, plan)
    if state is None:
        save(0)
    else:
        load_state(state, run.out, model, optimizer)
        torch.set_rng_state(state["rng"])
    last = run.steps if not run.stop_after else min(run.steps, first + run.stop_after)
    rank, step = rank_and_size()[0], first
    metrics = Metrics(os.devnull if rank else pathlib.Path(run.out) / "metrics.jsonl", first)
    tokens_a_step = run.batch_size * run.seq_len

    with StopAfterStep() as stop, tqdm(total=run.steps, initial=first, unit="step",
                                     disable=rank > 0 or None) as bar:
        while step < last and not stop.everywhere():
            start = time.perf_counter()
            lr = phase.lr or wsd(step, run.steps, run.lr, run.warmup, run.decay, run.min_lr)
            loss, gnorm = train_step(model, optimizer, batches, phase.run, lr, device)
            seconds, step = time.perf_counter() - start, step + 1
            if step == phase.end and step < run.steps:
                before, phase = phase, next(p for p in phases if step < p.end)
                if phase.run != before.run:     # else only the rate changes: the text goes on
                    batches = make_batches(phase.run, phase.token_data)
            row = dict(step=step, loss=loss, gnorm=gnorm, lr=lr, ms=1e3 * seconds,
                       tokens=step * tokens_a_step)
            if step % run.eval_every == 0 and step < run.steps:
                row["val_loss"] = evaluate(model, token_data.validation, run.batch_size,
                                           run.seq_len, separator if run.reset_documents else None,
                                           limit=eval_tokens or 8 * tokens_a_step, spread=True)
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
    losses, n = [row["loss"] for row in rows], len(rows) // 50      # n neighbours on each side
    smooth = [sum(near) / len(near) for near in (losses[max(i - n, 0):i + n + 1]
                                                 for i in range(len(rows)))]
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axis, below = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
    axis.plot(tokens, losses, color="#4c72b0", alpha=0.25, linewidth=0.8)
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
# --compare: what the recipes cost in loss, --demo: how FP8 fails, --bench: what they cost in time


def fixed_weights(model, recipe, batch, pow2=False):
    """One batch through the same weights in high precision and in FP8, all linears converted:
    (relative difference of the loss, SQNR of the whole gradient in dB, the worst parameter's, its
    name). Training is chaotic and hides errors that this shows: a wrong format costs 4 dB here and
    nothing visible in a short run.
    """
    fp8 = convert_to_fp8(copy.deepcopy(model), recipe, "emulated", ends=0, pow2=pow2,
                         verbose=False)
    losses = []
    for m in (model, fp8):
        m.zero_grad(set_to_none=True)
        losses.append(m.loss(*batch))
        losses[-1].backward()
    truth, value = ({name: p.grad for name, p in m.named_parameters()} for m in (model, fp8))
    model.zero_grad(set_to_none=True)
    flat = lambda grads: torch.cat([g.flatten() for g in grads.values()])
    worst = min(truth, key=lambda name: sqnr(value[name], truth[name]))
    loss, fp8_loss = (float(loss.detach()) for loss in losses)
    return ((fp8_loss - loss) / loss, sqnr(flat(value), flat(truth)),
            sqnr(value[worst], truth[worst]), worst)


ARMS = {        # what --compare trains on the same batches: recipe, factor on the learning rate
    "bf16": ("bf16", 1.0), "bf16, lr x 1.001": ("bf16", 1.001),
    "nemotron-h": ("nemotron-h", 1.0), "nano2": ("nano2", 1.0),
}


def train_cell(run, arm, seed, config, token_data, device, dtype):
    """One arm from one seed, nothing saved: losses of the steps, validation loss, and fixed-weight
    differences if it is the bf16 arm.
    """
    recipe, factor = ARMS[arm]
    torch.manual_seed(seed)
    model = HybridLM(config, dtype).to(device)
    convert_to_fp8(model, recipe, run.fp8_backend, pow2=run.pow2, verbose=False)
    mine = dataclasses.replace(run, seed=seed, lr=run.lr * factor)
    optimizer, batches = make_optimizer(model, mine.lr, run.weight_decay), make_batches(mine,
                                                                                        token_data)
    losses = []
    for step in tqdm(range(run.steps), f"{arm}, seed {seed}", leave=False, disable=None):
        lr = wsd(step, run.steps, mine.lr, run.warmup, run.decay, run.min_lr)
        losses.append(train_step(model, optimizer, batches, mine, lr, device)[0])
    cell = dict(arm=arm, seed=seed, losses=losses,
                val_loss=evaluate(model, token_data.validation, run.batch_size, run.seq_len,
                                  token_data.separator if run.reset_documents else None,
                                  limit=32 * run.batch_size * run.seq_len))
    if arm == "bf16":
        batch = [None if m is None else m.to(device) for m in batches.next()]
        cell["fixed"] = {r: fixed_weights(model, r, batch, run.pow2)
                         for r in RECIPES if r != "bf16"}
    return cell


def compare(run):
    """Every arm from the same seeds on the same batches: paired gaps beside the noise floor.

    A cell is one line of cells.jsonl in --out, so a stopped comparison goes on where it was. A
    folder of other settings is refused.
    """
    from infer import pick_device, pick_dtype
    device = pick_device(run.device)
    if run.seeds < 2:
        raise ValueError(f"--seeds is {run.seeds}, must be at least 2: a gap needs its error bar")
    if not run.steps:
        run = dataclasses.replace(run, steps=100)
    if device == "cpu":
        print(f"settings     {tune_cpu()}")
    dtype = pick_dtype(run.compute_dtype, device)
    config = HybridConfig.preset(run.preset, **(dict(pattern=run.pattern) if run.pattern else {}))
    token_data = load_data(run.data, run.tokenizer, config.vocab_size)
    config = dataclasses.replace(config, vocab_size=token_data.vocab_size)
    folder = pathlib.Path(run.out)
    hold_folder(folder)
    settings = {k: v for k, v in dataclasses.asdict(run).items() if k in COMPARE_SETTINGS}
    settings |= dict(dtype=str(dtype)[6:], sha256=token_data.fingerprint["sha256"])
    rows = [] if run.overwrite else read_rows(folder / "cells.jsonl")
    if (folder / "cells.jsonl").exists() and not run.overwrite and rows[:1] != [
            dict(settings=settings)]:
        raise FileExistsError(f"{folder} holds a comparison of other settings: choose another "
                              "--out, or --overwrite")
    cells = {(row["arm"], row["seed"]): row for row in rows[1:]}
    todo = [(arm, seed) for seed in range(run.seed, run.seed + run.seeds) for arm in ARMS
            if (arm, seed) not in cells]
    print(f"comparison   {len(ARMS)} arms x {run.seeds} seeds x {run.steps} steps of "
          f"{run.batch_size} x {run.seq_len} tokens in {str(dtype)[6:]}, {len(todo)} runs to do")
    check_memory(run, config, dtype, device)
    if not rows:
        folder.mkdir(parents=True, exist_ok=True)
        hold_folder(folder)
        write_text(folder / "cells.jsonl", json.dumps(dict(settings=settings)) + "\n")
    for arm, seed in tqdm(todo, "runs", disable=None):
        cell = train_cell(run, arm, seed, config, token_data, device, dtype)
        cells[arm, seed] = cell
        write_text(folder / "cells.jsonl", "".join(
            json.dumps(row) + "\n" for row in [dict(settings=settings), *cells.values()]))
        print(f"{arm:18s} seed {seed}  val_loss {cell['val_loss']:.4f}", flush=True)
    return report_gaps(run, cells, folder)


COMPARE_SETTINGS = ("preset", "pattern", "data", "tokenizer", "reset_documents", "steps",
                    "batch_size", "grad_accum", "seq_len", "lr", "min_lr", "warmup", "decay",
                    "weight_decay", "clip", "fp8_backend", "pow2")


def mean_and_error(values):
    """Mean and its standard error."""
    values = torch.tensor(values, dtype=torch.float64)
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def report_gaps(run, cells, folder):
    """The tables, the plot, the last line's values."""
    seeds = range(run.seed, run.seed + run.seeds)
    base = [cells["bf16", seed]["val_loss"] for seed in seeds]
    mean, error = mean_and_error(base)
    spread = error * run.seeds ** 0.5 / mean
    print(f"\nbf16: validation loss {mean:.4f}, standard deviation over seeds {spread:.2%} of it")
    print(f"{'arm':18s}{'gap to bf16 [%]':>18s}{'error':>8s}   each seed")
    gap = {}
    for arm in list(ARMS)[1:]:
        each = [100 * (cells[arm, seed]["val_loss"] / b - 1) for seed, b in zip(seeds, base)]
        mean, error = mean_and_error(each)
        gap[arm] = dict(mean=mean / 100, standard_error=error / 100)
        print(f"{arm:18s}{mean:+18.3f}{error:8.3f}   " + " ".join(f"{e:+.3f}" for e in each))
    for arm in ("nemotron-h", "nano2"):
        two = 2 * gap[arm]["standard_error"]
        print(f"{arm}: " + ("inside the noise, " if abs(gap[arm]["mean"]) <= two else "")
              + f"{100 * gap[arm]['mean']:+.3f}% with two standard errors of {100 * two:.3f}%; "
              f"another seed moves bf16 itself by {spread:.2%}")
    print(f"\nthe same weights and batch, every linear in FP8, mean of {run.seeds} seeds (bf16 "
          f"runs, after {run.steps} steps)")
    heads = ("loss [%]", "gradient SQNR [dB]", "worst parameter [dB]")
    print(f"{'recipe':18s}{heads[0]:>10s}{heads[1]:>20s}{heads[2]:>22s}")
    for recipe in ("nemotron-h", "nano2"):
        fixed = [cells["bf16", seed]["fixed"][recipe] for seed in seeds]
        worst = min(fixed, key=lambda f: f[2])
        print(f"{recipe:18s}{100 * sum(abs(f[0]) for f in fixed) / len(fixed):10.4f}"
              f"{sum(f[1] for f in fixed) / len(fixed):20.1f}{worst[2]:22.1f}   {worst[3]}")
    picture = folder / "compare.png"
    plot_gaps(cells, seeds, gap, picture)
    print(f"plot: {picture}")
    return dict(recipe="compare", seeds=run.seeds, steps=run.steps, gap=gap, seed_spread=spread,
                val_loss=sum(base) / len(base), out=run.out)


def plot_gaps(cells, seeds, gap, path):
    """Above: loss of each arm, mean of the seeds; below: relative difference to bf16 with its
    standard error, smoothed.
    """
    from matplotlib.figure import Figure
    losses = {arm: torch.tensor([cells[arm, s]["losses"] for s in seeds], dtype=torch.float64)
              for arm in ARMS}
    smooth = lambda m: m.unfold(1, min(10, m.shape[1]), 1).mean(-1)
    losses = {arm: smooth(m) for arm, m in losses.items()}
    steps = range(1, losses["bf16"].shape[1] + 1)
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[2, 2], sharex=True)
    colors = {"bf16": "#444444", "bf16, lr x 1.001": "#999999", "nemotron-h": "#c44e52",
              "nano2": "#4c72b0"}
    for arm, m in losses.items():
        above.plot(steps, m.mean(0), color=colors[arm], label=arm, linewidth=1.2)
        if arm != "bf16":
            each = 100 * (m / losses["bf16"] - 1)
            mean, error = each.mean(0), each.std(0) / len(seeds) ** 0.5
            below.plot(steps, mean, color=colors[arm], label=arm)
            below.fill_between(steps, mean - error, mean + error, color=colors[arm], alpha=0.2)
    above.set(ylabel="training loss [nats a token]", title="Validation gap to bf16: " + ", ".join(
        f"{arm} {100 * gap[arm]['mean']:+.2f} ± {100 * gap[arm]['standard_error']:.2f}%"
        for arm in ("nemotron-h", "nano2")))
    below.axhline(0, color="#444444", linewidth=0.8)
    below.set(ylabel="difference to bf16 [%]", xlabel="step (running mean of 10)")
    for axis in (above, below):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def demonstrate(run):
    """Two ways in which FP8 fails, in seconds. Returns the figures."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    result = {}
    print("1. A cast without a scale loses what is small: gradients of size s, N(0, s)")
    print(f"{'s':>8s}{'E4M3 as it is':>24s}{'E5M2 as it is':>24s}{'E4M3 scaled':>24s}")
    for s in (1.0, 1e-2, 1e-4, 1e-6):
        g = s * normal(512, 512)
        values = [cast(g, fmt).float() for fmt in (E4M3, E5M2)] + [fake_quantize(g, E4M3)]
        result[f"unscaled {s:g}"] = [sqnr(v, g) for v in values]
        zeros = lambda v: float((v == 0).float().mean())
        print(f"{s:8.0e}" + "".join(f"{sqnr(v, g):10.1f} dB, {zeros(v):4.0%} -> 0" for v in values))
    print("\n2. One token x 30000: with one scale a tensor, the others are left the smallest codes")
    x, w = normal(512, 512), normal(512, 512)
    x[7] *= 30000
    print(f"{'recipe':12s}{'all tokens':>14s}{'median token':>16s}{'values -> 0':>14s}")
    for name in ("nemotron-h", "nano2"):
        recipe = RECIPES[name]
        a = operand(x, recipe.x_format, recipe.x_block, recipe, "emulated")
        y, truth = gemm(a, operand(w, E4M3, recipe.w_block, recipe, "emulated"), x.dtype), x @ w.t()
        median = sorted(sqnr(y[i], truth[i]) for i in range(len(x)))[len(x) // 2]
        flushed = float(((a.values == 0) & (x != 0)).float().mean())
        result[f"outlier {name}"] = [sqnr(y, truth), median, flushed]
        print(f"{name:12s}{sqnr(y, truth):11.1f} dB{median:13.1f} dB{flushed:14.1%}")
    print("The SQNR over all tokens sees one token only: it is the median that tells.")
    return result


def profile_memory(run):
    """Bytes of a training step by part: predicted without memory, then measured on the device."""
    from infer import pick_device, pick_dtype
    device = pick_device(run.device)
    dtype = pick_dtype(run.compute_dtype, device)
    config = HybridConfig.preset(run.preset, **(dict(pattern=run.pattern) if run.pattern else {}))
    predicted = step_bytes(run, config, dtype)
    print(f"{config.pattern}: {config.n_params() / 1e6:.2f} M parameters, "
          f"{run.batch_size // run.grad_accum} x {run.seq_len} tokens, "
          f"{run.recipe}, compute in {str(dtype)[6:]}, {device}")
    size = lambda tensors: sum(m.numel() * m.element_size() for m in tensors)
    if 1.2 * sum(predicted.values()) > free_bytes(device):
        measured = {}
        print("it does not fit here: predicted only")
    else:
        model, tokens = built_for_memory(run, config, dtype, device)
        optimizer = make_optimizer(model, run.lr, run.weight_decay)
        step = lambda: model.loss(tokens, tokens).backward()
        if device == "cpu":
            tune_cpu("none")
        step()
        optimizer.step()
        measured = dict(weights=size(model.parameters()),
                        gradients=size(p.grad for p in model.parameters()),
                        optimizer=size(m for s in optimizer.state.values() for m in s.values()),
                        activations=saved_bytes(model, tokens))
    gib = lambda n: f"{n / 2 ** 30:15.3f}"
    print(f"{'part':14s}{'predicted GiB':>15s}{'measured GiB':>15s}")
    for name, value in predicted.items():
        print(f"{name:14s}{gib(value)}"
              + (gib(measured[name]) if measured else f"{'not measured':>15s}"))
    total = sum(predicted.values())
    print(f"{'sum':14s}{gib(total)}" + (gib(sum(measured.values())) if measured else ""))
    return dict(predicted=predicted, measured=measured, total_bytes=total)


def bench_steps(run, preset, device, dtype):
    """{arm: seconds} of a whole training step of a preset, medians of 21 in turn, and a table."""
    config, steps, seconds = HybridConfig.preset(preset), {}, {}
    run = dataclasses.replace(run, grad_accum=1)
    tokens = torch.randint(config.vocab_size, (run.batch_size, run.seq_len))
    batches = types.SimpleNamespace(next=lambda: (tokens, tokens, None))
    for arm in RECIPES:
        model = convert_to_fp8(HybridLM(config, dtype).to(device), arm, run.fp8_backend,
                               verbose=False)
        optimizer = make_optimizer(model, run.lr, run.weight_decay)
        steps[arm] = functools.partial(train_step, model, optimizer, batches, run, run.lr, device)
    for _ in range(21):
        for arm, step in steps.items():
            start = time.perf_counter()
            step()
            seconds.setdefault(arm, []).append(time.perf_counter() - start)
    median = {arm: sorted(each)[len(each) // 2] for arm, each in seconds.items()}
    print(f"a training step of {preset}, {run.batch_size} x {run.seq_len} tokens in "
          f"{str(dtype)[6:]}: " + ", ".join(
              f"{'no FP8' if arm == 'bf16' else arm} {1e3 * s:.0f} ms ({s / median['bf16']:.2f}x)"
              for arm, s in median.items()))
    return median


def bench(run):
    """Each kind of linear of a preset: seconds of the forward and the two gradient GEMMs in high
    precision and in both recipes, quantisation included; then a whole step of a small preset.
    """
    from infer import pick_device, pick_dtype
    device = pick_device(run.device)
    preset = run.preset if run.preset != "toy" or device == "cpu" else "nemotron-nano-12b-v2"
    tokens = 8192 if device == "cuda" else run.batch_size * run.seq_len
    with torch.device("meta"):
        model = HybridLM(HybridConfig.preset(preset))
    shapes = {}
    for name, m in model.named_modules():
        if isinstance(m, Linear) and m is not model.lm_head:
            shapes.setdefault(name.split(".")[-1], (m.out_features, m.in_features))
    print(f"settings     {tune_cpu()}" if device == "cpu" else torch.cuda.get_device_name())
    dtype = pick_dtype(run.compute_dtype, device)
    arms = {str(dtype)[6:]: None} | {name: r for name, r in RECIPES.items() if r}
    print(f"{preset}, {tokens} tokens, {device}: milliseconds (TFLOP/s) of forward, input "
          "gradient, weight gradient; then all three against the first row")
    table = {}
    for name, (n, k) in shapes.items():
        x = torch.randn(tokens, k, device=device, dtype=dtype)
        g = torch.randn(tokens, n, device=device, dtype=dtype)
        w = torch.nn.Parameter(torch.randn(n, k, device=device) / k ** 0.5)
        for arm, recipe in arms.items():
            layer = Linear(k, n) if recipe is None else Float8Linear(
                k, n, recipe, pick_backend(run.fp8_backend, arm, device))
            layer.weight = w

            def backward(x_grad, w_grad):
                w.requires_grad_(w_grad)
                y = layer(x.requires_grad_(x_grad))
                inputs = [m for m in (x, w) if m.requires_grad]
                return median_seconds(lambda: torch.autograd.grad(y, inputs, g, retain_graph=True),
                                      device, repeats=7)
            with torch.enable_grad():
                seconds = [median_seconds(lambda: layer(x), device, repeats=7),
                           backward(True, False), backward(False, True)]
            w.requires_grad_()
            x.requires_grad_(False)
            table.setdefault(name, {})[arm] = seconds
            first = next(iter(table[name].values()))
            print(f"{name:10s}{f'{n} x {k}':>15s}  {arm:11s}" + "".join(
                f"{1e3 * s:9.2f} ({2e-12 * tokens * n * k / s:6.2f})" for s in seconds)
                + f"{sum(first) / sum(seconds):8.2f}x")
    step = bench_steps(run, "small" if device == "cuda" else "toy", device, dtype)
    return dict(device=device, preset=preset, tokens=tokens, seconds=table, step=step)


# ------------------------------------------------------------------------------------------------
# python train_fp8.py


def announce(run, config, token_data, device):
    """What is about to happen, in numbers."""
    flops = 3 * sum(config.flops_by_part(run.seq_len).values())
    corpus, tokens = token_data.fingerprint, run.batch_size * run.seq_len
    print(f"model        {config.pattern}: {config.n_params() / 1e6:.2f} M parameters, "
          f"d_model {config.d_model}, vocabulary {config.vocab_size}")
    print(f"corpus       {corpus['source']}: {corpus['bytes'] / 1e6:.2f} MB, "
          f"{len(token_data.train) / 1e6:.2f} M training tokens, sha256 {corpus['sha256'][:12]}")
    print(f"a step       {run.batch_size} x {run.seq_len} = {tokens} tokens, "
          f"{flops * tokens / 1e12:.2f} TFLOP, on {device}")


def body(run):
    from infer import generate, pick_device, pick_dtype
    start, folder = time.perf_counter(), pathlib.Path(run.out)
    device = pick_device(run.device)
    dtype, planned = pick_dtype(run.compute_dtype), pick_dtype(run.compute_dtype, device)
    rank, size = start_processes(device)
    state = open_folder(run)
    if state is not None:
        run = dataclasses.replace(run, steps=state["run"]["steps"])
    if state is not None and state["step"] == run.steps and finished_result(run):
        print(f"finished already: {folder} holds all {run.steps} steps (--overwrite trains anew)")
        return finished_result(run)

    config = HybridConfig.preset(run.preset, **(dict(pattern=run.pattern) if run.pattern else {}))
    token_data = load_data(run.data, run.tokenizer, config.vocab_size,
                           state and state["tokenizer_json"])
    if state is not None and state["fingerprint"] != token_data.fingerprint:
        raise ValueError(f"the corpus or its tokenizer has changed since {folder} was begun: "
                         f"{state['fingerprint']}, now {token_data.fingerprint}")
    trial, phases = make_batches(run, token_data).next(), load_phases(run, token_data)
    config = dataclasses.replace(config, vocab_size=token_data.vocab_size,
                                 bos_token_id=token_data.separator)
    announce(run, config, token_data, device)
    check_memory(longest(phases), config, planned, device)
    torch.manual_seed(run.seed)
    model = HybridLM(config).to(device)
    convert_to_fp8(model, run.recipe, run.fp8_backend, pow2=run.pow2, amax_reduce=run.amax_reduce)

    matmul = None
    if device == "cpu":
        print(f"settings     {tune_cpu(state and state['matmul'])}")
        matmul, = from_first(torch.backends.mkldnn.matmul.fp32_precision)
        torch.backends.mkldnn.matmul.fp32_precision = matmul
    if run.recompute:
        recompute_activations(model)
    if state is not None:
        model.compute_dtype = getattr(torch, state["compute_dtype"])
        print(f"resuming     at step {state['step']} of {run.steps}")
    else:
        model.compute_dtype = dtype or (planned if device != "cpu" else choose_dtype(model, trial))
    if size > 1:
        shard(model, run.float8_gather)
    if not run.steps:
        run = choose_steps(run, model, trial)
    print(f"total        {run.steps} steps, {run.steps * run.batch_size * run.seq_len / 1e6:.2f} M "
          "tokens")
    if size > 1:
        dist.barrier()              # nobody writes to the folder before all have looked into it
    if state is None and rank == 0:
        clear_folder(run)           # nothing was written before every flag and file proved good
    step, rows = train(run, model, token_data, state, matmul, phases)
    finished = step == run.steps
    separator = token_data.separator if run.reset_documents else None
    val_loss = finished and evaluate(model, token_data.validation, run.batch_size, run.seq_len,
                                     separator, progress=True)
    model = gathered(model, config)
    if rank:
        return {}
    write_text(folder / "tokenizer.json", token_data.tokenizer_json)
    save_hf(model, folder)
    if not finished:
        print(f"stopped at step {step} of {run.steps}, saved; the same command continues")
        return dict(recipe=run.recipe, step=step, out=run.out)
    result = report(run, model, token_data, rows, val_loss, start, generate)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(step=run.steps, final=result)) + "\n")
    return result


def report(run, model, token_data, rows, val_loss, start, generate):
    """Bits a byte, the plot, a sample, and the last line's values."""
    val_bpb = bits_per_byte(val_loss, len(token_data.validation) - 1, token_data.validation_bytes)
    xz = token_data.validation_xz
    picture = pathlib.Path(run.out) / "loss.png"
    if rows:
        plot_loss(rows, val_loss, val_bpb, xz, picture)
    against = "" if xz is None else (f", {abs(val_bpb / xz - 1):.1%} "
                                     f"{'below' if val_bpb < xz else 'ABOVE'} what xz -9e needs "
                                     f"for the same text ({xz:.3f})")
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
    def dispatch(run):
        modes = (run.compare and compare, run.demo and demonstrate, run.bench and bench,
                 run.profile_memory and profile_memory)
        return next(filter(None, modes), body)(run)
    run_script(dispatch, parse_flags(Run, argv))


if __name__ == "__main__":
    main()
