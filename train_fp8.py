"""Pre-training in FP8: both recipes of the Nemotron papers, and the training loop.

Why scale. An 8-bit float has 256 codes. E4M3 (4 bits of exponent, 3 of mantissa) reaches from 2^-9
to 448, E5M2 from 2^-16 to 57344; a gradient of 1e-6 is zero in either. So a tensor is multiplied by
scale = largest value of the format / its own largest magnitude (amax) and cast to 8 bits. A GEMM of
two such tensors accumulates in fp32, and its result is divided by both scales. E4M3 keeps 4
significant bits and E5M2 3, whatever the magnitude. The signal to quantisation noise ratio (SQNR)
is 31.5 dB for a tensor in E4M3, 25.6 for one in E5M2, 28.5 for a product of two E4M3 tensors, and
24.6 for E4M3 x E5M2. Training tolerates the sum of many such errors because they are random. --demo
shows two ways in which FP8 fails.

The recipes. Both use current scaling: the amax of the tensor itself, not of earlier steps.

    nemotron-h  one scale per tensor; E4M3 weights and activations, E5M2 output gradients, which
                need range more than precision. The exponent absorbs a token 3000 times as large as
                the others; at 30000 times the others lose precision. arXiv 2504.03624, section 2.4
    nano2       E4M3 throughout; one scale per 128 x 128 block of a weight and per 1 x 128 tile of
                activations and gradients, so that an outlier harms only its own tile. Without
                outliers nearly all of the gain, 4 dB in both gradients, comes from E4M3. arXiv
                2508.14444, section 2, as in DeepSeek-V3

A linear layer has three GEMMs, y = x w^T, dx = g w and dw = g^T x, each from freshly quantised
operands. High precision is kept for master weights, optimizer state, gradients between layers, the
first and last four linears in execution order, embedding, head, norms, convolution, the scan and
attention's own products. in_proj computes z, x, B, C and dt in one GEMM: dt shares their blocks.

Emulation, on any device: operands are rounded to the FP8 grid and multiplied in fp32 or bf16.
Products of two codes are exact in fp32, so the result is that of the hardware, except for the
accumulation, in which Hopper keeps fewer bits. Emulation adds 5% to 18% to the toy's training step.
The real GEMMs (--fp8-backend hopper) follow cuBLASLt's documented layouts: not measured. Others
differ: nanochat's fp8.py has one recipe; Megatron-Bridge's nano2 preset has E5M2 gradients, the
paper E4M3; torchao's block GEMMs need multiples of 128, and the 9B's MLP has 15680 = 122.5 blocks.

The papers train on 8192-token sequences in batches of 6 M tokens. The learning rate follows a
warmup-stable-decay schedule (WSD) from 4.5e-4 to 4.5e-6, with the decay over the last 18% of 20 T
tokens. The data come in three phases, followed by 524288-token sequences at 4.5e-6: see --phases.
Under torchrun the model is sharded (FSDP2), and each process has its own scales, as in Transformer
Engine. Left out: an FP8 optimizer, FP8 all-gathers, delayed scaling, tensor and pipeline
parallelism, a model larger than a host's memory.

Glossary: as in model.py. code: an 8-bit float | grid: the values that have a code | inv_scale: 1 /
scale | block: elements that share a scale | tile: a block of one row | grad_norm: before clipping

    python train_fp8.py                     the toy on Python's library, 3 to 12 min on 2 cores
    python -m bench.train_fp8               recipes against no FP8 over seeds; time; memory
"""

import dataclasses
import functools
import math
import os
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common import (GIB, RunFolder, StopRequest, Unsaved, check_flags, flag, free_bytes, local_rows,
                    pick_device, pick_dtype, rank_and_size, script, settings_of, start_processes,
                    sum_over_processes, tune_cpu, write_text)
from data import Batches, TokenData, load_data, validation_batches
from infer import generate, traced_peak
from model import PRESETS, HybridConfig, HybridLM, save_hf
from ssm import first_derivatives_only

# ------------------------------------------------------------------------------------------------
# 8-bit numbers and their GEMMs

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# largest value, bits of mantissa, exponent of the smallest normal number
FORMATS = {E4M3: (448.0, 3, -6), E5M2: (57344.0, 2, -14)}
FAKE_BLOCK = 2 ** 18        # elements that fake_quantize works on at a time, to stay in the cache


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Formats and blocks of the operands x (tokens, k), w (n, k), g (tokens, n). A block is (rows,
    columns) of a matrix whose last axis is the one that the GEMM sums over; it is transposed for
    the weight gradient, which sums over tokens. None: the whole tensor is one block."""
    x_format: torch.dtype = E4M3
    w_format: torch.dtype = E4M3
    g_format: torch.dtype = E4M3
    x_block: tuple | None = None
    w_block: tuple | None = None
    g_block: tuple | None = None
    pow2: bool = False              # round scales down to powers of two


RECIPES = {"none": None, "nemotron-h": Recipe(g_format=E5M2),
           "nano2": Recipe(x_block=(1, 128), w_block=(128, 128), g_block=(1, 128))}


def cast(x, fmt):
    """x -> float8, saturating: too large values become the largest finite one; inf and NaN become
    NaN. The clamp is explicit because a plain cast differs: E5M2 overflows to inf, E4M3 to NaN
    before torch 2.12 and to 448 since then. There inf, too, becomes 448 and hides a divergence."""
    largest = FORMATS[fmt][0]
    return torch.where(x.isinf(), torch.nan, x.clamp(-largest, largest)).to(fmt)


def in_blocks(x, block):
    """x (m, k) -> fp32 (row blocks, rows, column blocks, columns). Incomplete last blocks are
    filled with zeros, which change no amax. block None: one block."""
    (m, k), (rows, columns) = x.shape, block or x.shape
    x = x.float()
    if m % rows or k % columns:
        x = F.pad(x, (0, -k % columns, 0, -m % rows))
    return x.reshape(-(-m // rows), rows, -(-k // columns), columns)


def block_scales(blocks, fmt, pow2=False):
    """The scale of each block, fp32 (row blocks, 1, column blocks, 1): format's largest / amax.

    A block of zeros gets the largest fp32 number instead of inf, so that 0 x scale is 0. An inf or
    NaN makes its whole block NaN. pow2 rounds the scale down: it clears the mantissa."""
    amax = blocks.abs().amax((1, 3), keepdim=True)
    # not 448 / amax: torch computes 448 x (1 / amax), whose last bit is wrong in a quarter of cases
    scale = (torch.full_like(amax, FORMATS[fmt][0]) / amax).clamp(max=torch.finfo(amax.dtype).max)
    return scale.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32) if pow2 else scale


def quantize(x, fmt, block=None, pow2=False):
    """x (m, k) of any float dtype -> codes (m, k) in fmt, E4M3 or E5M2, and fp32 inverse scales
    (ceil(m / rows), ceil(k / columns)). block: (rows, columns), or None for one scale of the whole
    tensor. x is scaled in fp32 and cast once: through bf16, 3% of the values would round twice."""
    m, k = x.shape
    blocks = in_blocks(x, block)
    scale = block_scales(blocks, fmt, pow2)
    codes = cast((blocks * scale).flatten(2).flatten(0, 1)[:m, :k], fmt)
    return codes.contiguous(), (1 / scale)[:, 0, :, 0]


def dequantize(codes, inv_scale, block=None, dtype=torch.float32):
    """codes (m, k), inverse scales as from `quantize` -> (m, k) in dtype."""
    m, k = codes.shape
    blocks = in_blocks(codes, block) * inv_scale[:, None, :, None]
    return blocks.flatten(2).flatten(0, 1)[:m, :k].to(dtype)


def round_to_grid(x, fmt):
    """Round fp32 x to the nearest value of the format, ties to even, subnormals included, in place
    and without a cast. |x| must not exceed the format's largest value.

    Adding 1.5 x 2^23 grid steps leaves no bits below one step, so that fp32 addition itself rounds
    to the grid. A step is the power of two at or below |x|, times 2^-mantissa."""
    _, mantissa, smallest = FORMATS[fmt]
    power = x.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    power.clamp_(min=2.0 ** smallest)
    shift = 1.5 * 2.0 ** (23 - mantissa)
    return x.add_(power, alpha=shift).sub_(power, alpha=shift)


def fake_quantize(x, fmt, block=None, pow2=False, dtype=None):
    """dequantize(quantize(x)) in dtype (default: x's), bit for bit except for the sign of zeros.
    Several times as fast on a CPU: pieces stay in the cache, and no float8 tensor is converted."""
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    (m, k), rows = x.shape, block[0] if block else 1
    whole = None if block else block_scales(in_blocks(x, None), fmt, pow2)
    step = max(FAKE_BLOCK // max(k, 1) // rows, 1) * rows if x.is_cpu else max(m, 1)
    for piece, rounded in zip(x.split(step), out.split(step)):
        blocks = in_blocks(piece, block)
        scale = block_scales(blocks, fmt, pow2) if whole is None else whole
        blocks = round_to_grid(blocks * scale, fmt).mul_(1 / scale)
        rounded.copy_(blocks.flatten(2).flatten(0, 1)[:len(piece), :k])
    return out


def sqnr(value, truth):
    """Signal to quantisation noise in dB: 10 log10(|truth|^2 / |value - truth|^2), in fp64. An
    error of 1% is 40 dB; a cast of N(0, 1) to E4M3 has 31.5 dB, to E5M2 25.6, to bf16 55.6."""
    value, truth = value.detach().double(), truth.detach().double()
    return float(10 * torch.log10(truth.square().sum() / (value - truth).square().sum()))


class Operand(NamedTuple):
    """One operand (rows, k) of an FP8 GEMM, which sums over k. Emulated: dequantised values in the
    dtype of the multiplication, no inverse scales. Hopper: float8 codes and inverse scales."""
    values: torch.Tensor
    inv_scale: torch.Tensor | None
    block: tuple | None

    def t(self):
        """The transpose, with the same codes: for one scale per tensor or square blocks only."""
        inv_scale = None if self.inv_scale is None else self.inv_scale.t()
        return Operand(self.values.t(), inv_scale, self.block)


def operand(x, fmt, block, recipe, backend, dtype=None):
    """x (rows, k) quantised for a GEMM over k. dtype: of the emulated product, by default x's."""
    if backend == "emulated":
        return Operand(fake_quantize(x, fmt, block, recipe.pow2, dtype), None, block)
    return Operand(*quantize(x, fmt, block, recipe.pow2), block)


def operand_along_tokens(x, fmt, block, recipe, backend):
    """x (tokens, k) -> its transpose (k, tokens), quantised for a GEMM over tokens."""
    if backend == "emulated":       # quantised before the transpose, which then needs no copy
        return Operand(fake_quantize(x, fmt, block[::-1], recipe.pow2).t(), None, block)
    x = F.pad(x, (0, 0, 0, -len(x) % block[1]))         # Hopper wants whole blocks of tokens
    return operand(x.t(), fmt, block, recipe, backend)


def gemm(a, b, out_dtype, fast_accum=False):
    """a (m, k), b (n, k) -> a b^T (m, n).

    Emulated: multiply the dequantised values, whose products are exact in fp32. Hopper: cuBLASLt
    needs k innermost in both operands, E5M2 in at most one of them, k and n divisible by 16, and
    scales in the order of `in_columns` (cuBLASLt 12.9, compute capability 9.0)."""
    if a.inv_scale is None:
        return (a.values @ b.values.t()).to(out_dtype)
    left, right = a.values.contiguous(), b.values.contiguous().t()
    if a.block is None:
        return torch._scaled_mm(left, right, a.inv_scale.reshape(()), b.inv_scale.reshape(()),
                                out_dtype=out_dtype, use_fast_accum=fast_accum)
    kind = {(1, 128): F.ScalingType.BlockWise1x128, (128, 128): F.ScalingType.BlockWise128x128}
    return F.scaled_mm(left, right, in_columns(a), kind[a.block], in_columns(b), kind[b.block],
                       output_dtype=out_dtype)


def in_columns(x):
    """An operand's inverse scales in cuBLASLt's column-major order. Their shape is (rows, k blocks)
    for 1x128, and (k blocks padded to a multiple of 4, row blocks) for 128x128. The strides are
    checked, even those of an axis with one element."""
    m = x.inv_scale
    m = m if x.block == (1, 128) else F.pad(m, (0, -m.shape[1] % 4)).t()
    return torch.empty_strided(m.shape, (1, len(m)), dtype=m.dtype, device=m.device).copy_(m)


def pad_to_sixteen(x):
    """Pad a Hopper operand with zeros to a multiple of 16 along the axis that is summed over."""
    short = -x.values.shape[1] % 16
    if x.inv_scale is None or not short:
        return x
    return x._replace(values=F.pad(x.values.view(torch.uint8), (0, short)).view(x.values.dtype))


class _Float8Matmul(torch.autograd.Function):
    """y = x w^T and both gradients, each a GEMM of two freshly quantised operands.

    x (tokens, k), w (n, k), g = dL/dy (tokens, n):  dx = g w sums over n,  dw = g^T x over tokens.
    With one scale per tensor, or square blocks, codes can be transposed: one quantisation serves
    two GEMMs, and only codes are saved. Tiles of 1x128 lie along the axis that is summed over, so
    for dw x and g are quantised again along tokens; x itself is saved, in high precision."""

    @staticmethod
    def forward(ctx, x, w, recipe, backend):
        a = operand(x, recipe.x_format, recipe.x_block, recipe, backend)
        b = operand(w, recipe.w_format, recipe.w_block, recipe, backend, dtype=x.dtype)
        ctx.recipe, ctx.backend, ctx.w_dtype = recipe, backend, w.dtype
        kept = Operand(x, None, None) if recipe.x_block else a
        ctx.save_for_backward(kept.values, kept.inv_scale, b.values, b.inv_scale)
        return gemm(a, b, x.dtype, fast_accum=not recipe.x_block)      # (tokens, n)

    @staticmethod
    def backward(ctx, dy):
        first_derivatives_only("Float8Linear", "recipe none")
        recipe, backend, dx, dw = ctx.recipe, ctx.backend, None, None
        x, x_inv_scale, w, w_inv_scale = ctx.saved_tensors
        g = operand(dy, recipe.g_format, recipe.g_block, recipe, backend)
        if ctx.needs_input_grad[0]:
            dx = gemm(g, Operand(w, w_inv_scale, recipe.w_block).t(), dy.dtype)     # (tokens, k)
        if ctx.needs_input_grad[1]:
            if recipe.x_block:
                g = operand_along_tokens(dy, recipe.g_format, recipe.g_block, recipe, backend)
                a = operand_along_tokens(x, recipe.x_format, recipe.x_block, recipe, backend)
            else:
                g, a = (pad_to_sixteen(m.t()) for m in (g, Operand(x, x_inv_scale, None)))
            dw = gemm(g, a, ctx.w_dtype)                                            # (n, k)
        return dx, dw, None, None


class Float8Linear(nn.Linear):
    """A linear layer that trains with FP8 GEMMs and keeps its weight in high precision. It
    quantises only when gradients are recorded or `always` is set: evaluation and the saved model
    are in high precision, as the released checkpoints are."""

    def __init__(self, d_in, d_out, recipe, backend="emulated", bias=False):
        super().__init__(d_in, d_out, bias)
        self.recipe, self.backend, self.always = recipe, backend, False

    def forward(self, x):
        if not (torch.is_grad_enabled() or self.always) or not x.numel():
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        y = _Float8Matmul.apply(x.reshape(-1, x.shape[-1]), self.weight, self.recipe, self.backend)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def pick_backend(name, recipe, device):
    """"emulated" or "hopper". auto: hopper on a CUDA device, or an error; elsewhere emulated."""
    if name == "emulated" or (name == "auto" and device != "cuda"):
        return "emulated"
    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    if capability < (8, 9) or (recipe.x_block and capability != (9, 0)):
        raise ValueError(f"this {device} of capability {capability} has no FP8 matmul for this "
                         "recipe (8.9, or 9.0 for blocks): set --fp8-backend emulated")
    return "hopper"


def convert_to_fp8(model, recipe, backend="auto", ends=4, skip=("lm_head",), verbose=True):
    """Replace the eligible nn.Linear layers of any nn.Module by Float8Linear, in place. Returns it.

    recipe: a name of RECIPES, or a Recipe of your own. The first and last `ends` linears in order
    of registration, which is execution order here, and those named in `skip` stay as they are.
    Raises ValueError before it converts anything: for an unknown recipe, for sizes that are not
    multiples of 16 (hardware GEMMs need them), and if nothing is left to convert."""
    if recipe == "none":
        return model
    settings = RECIPES.get(recipe, recipe)
    if not isinstance(settings, Recipe):
        raise ValueError(f"--recipe is {recipe!r}, must be one of {', '.join(RECIPES)}")
    linears = [(name, m) for name, m in model.named_modules()
               if isinstance(m, nn.Linear) and name.split(".")[-1] not in skip]
    inner = linears[ends:len(linears) - ends]
    if not inner:
        raise ValueError(f"--recipe leaves the first and last {ends} linears alone, and this model "
                         f"has {len(linears)}: nothing to convert")
    for name, m in inner:
        if m.in_features % 16 or m.out_features % 16:
            raise ValueError(f"{name} is {m.out_features} x {m.in_features}: FP8 matmuls need "
                             "multiples of 16; change the sizes or use --recipe none")
    backend = pick_backend(backend, settings, inner[0][1].weight.device.type)
    for name, m in inner:
        with torch.device("meta"):
            swapped = Float8Linear(m.in_features, m.out_features, settings, backend)
        swapped.weight, swapped.bias = m.weight, m.bias
        model.set_submodule(name, swapped)
    if verbose:
        share = sum(m.weight.numel() for _, m in inner) / sum(m.weight.numel() for _, m in linears)
        print(f"fp8          {recipe if isinstance(recipe, str) else 'own recipe'}, {backend}: "
              f"{len(inner)} of {len(linears)} linears, {share:.0%} of their weights")
    return model


# ------------------------------------------------------------------------------------------------
# Training


@dataclasses.dataclass
class Run:
    """Train a hybrid language model. Resumes the run in --out if its settings are the same."""
    preset: str = flag("toy", "one of " + ", ".join(PRESETS), choices=PRESETS)
    pattern: str = flag("", "layer pattern, instead of the preset's")
    data: str = flag("stdlib", "stdlib, a file, a folder of text or of shards", session=True)
    tokenizer: str = flag("bpe", "bpe, bytes, or a tokenizer.json")
    phases: str = flag((), "parts of the run, each FRACTION[:DATA[:SEQ_LEN[:LR]]]", nargs="+")
    reset_documents: bool = flag(False, "no state, convolution or attention crosses documents")
    recipe: str = flag("nano2", "none, nemotron-h (per tensor) or nano2 (blocks)", choices=RECIPES)
    fp8_backend: str = flag("auto", "auto, emulated or hopper (auto never emulates on CUDA)",
                            choices=("auto", "emulated", "hopper"))
    recompute: bool = flag(False, "activation checkpointing: keep only the layers' inputs")
    steps: int = flag(500, "optimizer steps", at_least=1)
    batch_size: int = flag(8, "sequences per step, over all accumulation passes", at_least=1)
    grad_accum: int = flag(1, "backward passes per step", at_least=1)
    seq_len: int = flag(256, "tokens per sequence", at_least=1)
    lr: float = flag(3e-3, "peak learning rate", above=0)
    warmup: float = flag(0.02, "fraction of steps with rising learning rate", at_least=0, at_most=1)
    decay: float = flag(0.3, "fraction of steps with falling learning rate", at_least=0, at_most=1)
    eval_every: int = flag(100, "steps per evaluation and checkpoint", at_least=1, session=True)
    seed: int = flag(0, "seed of initialisation, data order", at_least=0, at_most=2 ** 63 - 1)
    device: str = flag("auto", "auto, cuda, mps or cpu", session=True)
    compute_dtype: str = flag("auto", "float32 or bfloat16; auto: bfloat16 where it is fast",
                              choices=("auto", "float32", "bfloat16"))
    out: str = flag("out/base", "run folder", session=True)
    overwrite: bool = flag(False, "start anew even if --out holds another run", session=True)
    stop_after: int = flag(0, "stop after this many steps; 0: never", at_least=0, session=True)
    demo: bool = flag(False, "show how FP8 fails (a few seconds), train nothing", session=True)

    def __post_init__(self):
        check_flags(self)
        size = int(os.environ.get("WORLD_SIZE", 1))
        if self.batch_size % (self.grad_accum * size):
            raise ValueError(f"--batch-size {self.batch_size} must be a multiple of --grad-accum "
                             f"{self.grad_accum} x {size} processes")
        if self.warmup + self.decay > 1:
            raise ValueError(f"--warmup {self.warmup} + --decay {self.decay} must be at most 1")
        self.tokenizer = os.path.normpath(self.tokenizer)       # ./a.json is a.json


def prepare_layers(run, model, backend, verbose=True):
    """Give the model FP8 linears and, with --recompute, layers that keep only their inputs."""
    convert_to_fp8(model, run.recipe, backend, verbose=verbose)
    for block in model.backbone.layers if run.recompute else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model


def shard(model):
    """FSDP2, in place. Every process keeps its part of each parameter, gradient and moment in fp32,
    and gathers a layer's parameters when it needs them: linears in the compute dtype, the others
    in fp32, because A_log, dt_bias, D and norms must not be rounded. Gradients sum in fp32."""
    mesh = dist.init_device_mesh(model.lm_head.weight.device.type, (dist.get_world_size(),))
    exact = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    rounded = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(model.compute_dtype, torch.float32))
    for block in model.backbone.layers:
        fully_shard([m for m in block.modules() if isinstance(m, nn.Linear)], **rounded)
        fully_shard(block, **exact)
    fully_shard(model.backbone.norm_f, **exact)
    fully_shard(model, **rounded)


def gather_model(model):
    """A sharded model as a whole HybridLM on the CPU of the first process; None for the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors = get_model_state_dict(model, options=options)
    if dist.get_rank():
        return None
    with torch.device("meta"):
        whole = HybridLM(model.config, model.compute_dtype)
    whole.load_state_dict(tensors, assign=True)
    return whole


def check_memory(run, config, dtype, device):
    """{part: bytes} that a training step needs per process, traced on the meta device. Raises
    ValueError if the device has less, or if the host cannot hold a whole model per process."""
    size, processes = rank_and_size()[1], int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with torch.device("meta"):
        model = prepare_layers(run, HybridLM(config, dtype), "emulated", verbose=False)
        rows = run.batch_size // run.grad_accum // size
        tokens = torch.zeros(rows, run.seq_len, dtype=torch.int64)
    whole, gib = 4 * config.n_params(), lambda n: f"{n / GIB:,.2f} GiB"
    parts = dict(weights=whole // size, gradients=whole // size, optimizer=2 * (whole // size),
                 activations=traced_peak(lambda: model.loss(tokens, tokens), *model.parameters(),
                                         tokens))
    total, takes = sum(parts.values()), ", ".join(f"{name} {gib(n)}" for name, n in parts.items())
    print(f"memory       {gib(total)} per step: {takes}")
    on_device = total * processes if device == "cpu" else total
    for needs, where in ((on_device, device), (whole * processes, "cpu")):
        if needs > (free := free_bytes(where)):
            raise ValueError(f"{run.batch_size} x {run.seq_len} tokens take {takes}; {gib(needs)} "
                             f"are needed on {where}, {gib(free)} are free: use a smaller model, "
                             "--batch-size or --seq-len, a larger --grad-accum, or --recompute")
    return parts


Phase = dataclasses.make_dataclass("Phase", "start end run batches lr".split())


def load_phases(run, token_data):
    """The phases of --phases, or the whole run as one phase: steps `start` to `end` on one text, at
    one sequence length. lr is constant; None follows the schedule. A part that is left out is the
    run's. Tokens per step do not change: longer sequences mean fewer rows."""
    phases, tokens, end = [], run.batch_size * run.seq_len, 0.0
    for text in run.phases or ["1"]:
        try:
            fraction, data, seq_len, lr = (*text.split(":"), "", "", "")[:4]
            fraction, seq_len, lr = float(fraction), int(seq_len or run.seq_len), float(lr or 0)
            if seq_len < 1 or tokens % seq_len or not (0 < fraction <= 1 and 0 <= lr < math.inf):
                raise ValueError
        except ValueError:
            raise ValueError(f"--phases has {text!r}, must be FRACTION:DATA:SEQ_LEN:LR; SEQ_LEN is "
                             f"a divisor of the {tokens} tokens per step") from None
        local = dataclasses.replace(run, data=data or run.data, seq_len=seq_len,
                                    batch_size=tokens // seq_len)
        start, end = round(end * run.steps), end + fraction
        if phases and local == phases[-1].run:      # only the learning rate changes
            start, batches = phases[-1].start, phases[-1].batches
        else:
            texts = token_data if local.data == run.data else load_data(
                local.data, run.tokenizer, token_data.vocab_size, token_data.tokenizer_json)
            if texts.tokenizer_json != token_data.tokenizer_json:
                raise ValueError(f"--phases: {local.data} was written with another tokenizer")
            batches = make_batches(local, texts)
        phases.append(Phase(start, round(end * run.steps), local, batches, lr or None))
    if abs(end - 1) > 1e-6:
        raise ValueError(f"the fractions of --phases must sum to 1, not {end:g}")
    return phases


def make_batches(run, token_data):
    """The run's training windows. Raises ValueError if the text is too short."""
    return Batches(token_data.train, run.batch_size // run.grad_accum, run.seq_len, run.seed,
                   separator=token_data.separator if run.reset_documents else None)


def wsd(step, steps, lr, warmup=0.02, decay=0.3, min_lr=0.01):
    """Learning rate at 0 <= step < steps: linear warmup, constant, then decay as 1 - sqrt.
    warmup and decay are fractions of steps. The last step has lr * min_lr, if any step decays."""
    warm, down, left = round(warmup * steps), round(decay * steps), steps - 1 - step
    if step < warm:
        return lr * (step + 1) / warm
    if left >= down:
        return lr
    return lr * (min_lr + (1 - min_lr) * (1 - math.sqrt(1 - left / down)))


def make_optimizer(model, lr, weight_decay=0.1):
    """AdamW (0.9, 0.95): weight decay on matrices, none on norms, biases, A_log, D, dt_bias."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=others, weight_decay=0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


@torch.no_grad()
def evaluate(model, stream, batch_size=8, seq_len=512, separator=None, limit=None):
    """Mean nats per token over the stream, or over about `limit` tokens spread over it."""
    device, (rank, size) = model.lm_head.weight.device, rank_and_size()
    batches = validation_batches(stream, batch_size, seq_len, separator, limit)
    sums = torch.zeros(2, dtype=torch.float64)              # nats, tokens
    for batch in tqdm(batches, "evaluating", leave=False, delay=5, disable=True if rank else None):
        rows = list(range(rank, len(batch[0]), size))       # if empty, run row 0, do not count it
        tokens, labels, seq_idx = (m if m is None else m[rows or [0]].to(device) for m in batch)
        count = int((labels >= 0).sum()) if rows else 0
        sums += torch.tensor([float(model.loss(tokens, labels, seq_idx)) * count, count])
    nats, count = sum_over_processes(sums.to(device) if size > 1 else sums)     # no fp64 on mps
    return float(nats / count)


def bits_per_byte(nats_per_token, tokens, text_bytes):
    """Bits/byte of a text of `text_bytes` bytes that is encoded in `tokens` tokens."""
    return nats_per_token * tokens / text_bytes / math.log(2)


class NotFinite(ValueError):
    """The loss or the gradient of a step is infinite or NaN; nothing was updated."""


def train_step(model, optimizer, batches, run, lr, device, loss_fn=HybridLM.loss, clip=1.0):
    """One optimizer step: accumulate, clip, update. Returns (loss, grad_norm) as floats; the loss
    is the mean over the labels >= 0 of all passes and processes. Raises NotFinite."""
    passes = [[None if m is None else local_rows(m).to(device, non_blocking=True)
               for m in batches.next()] for _ in range(run.grad_accum)]
    counts = torch.stack([(labels >= 0).sum() for _, labels, _ in passes])
    weights = counts / sum_over_processes(counts.sum()).clamp(min=1)
    total = torch.zeros((), device=device)
    for batch, weight in zip(passes, weights):
        loss = loss_fn(model, *batch) * weight
        (loss * rank_and_size()[1]).backward()      # FSDP takes the mean over processes
        total += loss.detach()
    total = float(sum_over_processes(total))
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    grad_norm = float(grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm)
    if not math.isfinite(total) or not math.isfinite(grad_norm):
        raise NotFinite(f"the loss is {total:g}, grad_norm {grad_norm:g}: start again with "
                        f"--overwrite and a lower --lr (it was {lr:g})")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, grad_norm


def train(run, model, token_data, loss_fn=HybridLM.loss, *, folder=None, batches=None,
          eval_tokens=None, on_step=None):
    """Train model in place with run's settings. Returns the log, a dict per step. Raises NotFinite.

    loss_fn(model, tokens, labels, seq_idx) -> a scalar, the mean over the labels >= 0: another
    objective is another loss_fn. batches: replaces the windows of token_data; an object whose
    next() gives (tokens, labels, seq_idx) at .position, the number of rows used before.
    eval_tokens: validation tokens every run.eval_every steps, by default those of eight steps.
    on_step(row) is called after each step and ends training if it returns True.

    folder: a RunFolder to resume from and to save to, every run.eval_every steps, on Ctrl-C or
    SIGTERM, and at the end: stopping loses nothing, and N + N steps equal 2N bit for bit on a CPU.
    None saves nothing and prints nothing."""
    device, quiet, folder = model.lm_head.weight.device, folder is None, folder or Unsaved()
    optimizer, tokens_per_step = make_optimizer(model, run.lr), run.batch_size * run.seq_len
    phases = [Phase(0, run.steps, run, batches, None)] if batches else load_phases(run, token_data)
    separator = token_data.separator if run.reset_documents else None
    rows = run.batch_size // run.grad_accum
    first = folder.begin(model, optimizer)
    last = min(run.steps, first + (run.stop_after or run.steps))

    with StopRequest() as stop, tqdm(total=run.steps, initial=first, unit="step", leave=False,
                                     disable=True if quiet or rank_and_size()[0] else None) as bar:
        for step in range(first, last):
            start = time.perf_counter()
            phase = next(p for p in phases if step < p.end)
            phase.batches.position = (step - phase.start) * phase.run.batch_size
            lr = phase.lr or wsd(step, run.steps, run.lr, run.warmup, run.decay)
            loss, grad_norm = train_step(model, optimizer, phase.batches, phase.run, lr, device,
                                         loss_fn)
            done = step + 1
            row = dict(step=done, loss=loss, grad_norm=grad_norm, lr=lr,
                       ms=1e3 * (time.perf_counter() - start), tokens=done * tokens_per_step)

            if done % run.eval_every == 0 and done < run.steps:
                row["val_loss"] = evaluate(model, token_data.validation, rows, run.seq_len,
                                           separator, eval_tokens or 8 * tokens_per_step)
            folder.log(row)
            bar.update()
            if not quiet:
                validation = f" | val {row['val_loss']:.3f}" if "val_loss" in row else ""
                tqdm.write(f"step {done:{len(str(run.steps))}d}/{run.steps} | loss {loss:.3f} | "
                           f"grad_norm {grad_norm:.2f} | lr {lr:.1e} | {row['ms']:.0f} ms | "
                           f"{tokens_per_step / row['ms']:.1f}k tok/s{validation}")
            if not quiet and done == first + 2:         # the second step: the first warms up
                tqdm.write(f"time         about {(last - done) * row['ms'] / 6e4:.1f} min left")
            ending = bool(on_step and on_step(row)) or done == last or stop.asked_anywhere()
            if ending or done % run.eval_every == 0:
                folder.save(done, model, optimizer)
            if ending:
                break
    return folder.rows


class Job(NamedTuple):
    """What a script has built, ready to be trained."""
    model: HybridLM
    token_data: TokenData
    loss_fn: object = HybridLM.loss
    batches: object = None              # as in `train`
    eval_tokens: int | None = None      # per evaluation; None: the whole validation text at the end
    notes: dict | None = None           # saved in every checkpoint, as state["notes"]


def train_in_folder(run, build, report, settings=None):
    """What every training script does: open the folder, build, train, save, report.

    build(run, state) -> Job; state is the checkpoint to resume from, or None. report(run, job,
    rows, val_loss) -> the result, in the first process only. settings: {flag: value} that identify
    the run, by default those of `run`. Returns the result, or the step where it stopped."""
    device = pick_device(run.device)
    rank, size = start_processes(device)
    if device == "cpu":
        print(f"settings     {tune_cpu()}")
    with RunFolder(run.out, settings or settings_of(run), run.overwrite) as folder:
        job = build(run, folder.state)
        text, corpus = job.token_data, job.token_data.fingerprint
        before = folder.state["fingerprint"] if folder.state else corpus
        if before | dict(source=None) != corpus | dict(source=None):    # the source may have moved
            raise ValueError(f"the corpus or its tokenizer has changed since {run.out} was begun: "
                             f"{before}, now {corpus}")
        if folder.result:
            print(f"finished already: {folder.path} (--overwrite starts anew)")
            return folder.result
        folder.notes = dict(notes=job.notes, compute_dtype=str(job.model.compute_dtype)[6:],
                            fingerprint=corpus, tokenizer_json=text.tokenizer_json)
        if size > 1:
            shard(job.model)
        rows = train(run, job.model, text, job.loss_fn, folder=folder, batches=job.batches,
                     eval_tokens=job.eval_tokens)

        step = folder.state["step"]
        val_loss = step == run.steps and evaluate(
            job.model, text.validation, run.batch_size // run.grad_accum, run.seq_len,
            text.separator if run.reset_documents else None, job.eval_tokens)
        if size > 1:
            job = job._replace(model=gather_model(job.model))
        if rank:
            return {}
        write_text(folder.path / "tokenizer.json", text.tokenizer_json)
        save_hf(job.model, folder.path)
        if step < run.steps:
            print(f"stopped at step {step} of {run.steps}, saved; the same command resumes")
            return dict(step=step, out=run.out)
        result = report(run, job, rows, val_loss)
        folder.log(dict(step=step, final=result))
        return result


# ------------------------------------------------------------------------------------------------
# python train_fp8.py


def build(run, state):
    """The Job of a run. What can be wrong with it is found here, before anything is written."""
    device = pick_device(run.device)
    dtype = pick_dtype(state["compute_dtype"] if state else run.compute_dtype, device)
    config = HybridConfig.preset(run.preset)
    text = load_data(run.data, run.tokenizer, config.vocab_size, state and state["tokenizer_json"])
    config = dataclasses.replace(config, pattern=run.pattern or config.pattern,
                                 vocab_size=text.vocab_size, bos_token_id=text.separator)
    longest = max(load_phases(run, text), key=lambda phase: phase.run.seq_len).run
    corpus = text.fingerprint
    print(f"model        {config.pattern}: {config.n_params() / 1e6:.2f} M parameters, d_model "
          f"{config.d_model}, vocabulary {config.vocab_size}, on {device} in {str(dtype)[6:]}\n"
          f"corpus       {corpus['source']}: {corpus['bytes'] / 1e6:.2f} MB, "
          f"{len(text.train) / 1e6:.2f} M training tokens, sha256 {corpus['sha256'][:12]}")
    check_memory(longest, config, dtype, device)
    torch.manual_seed(run.seed)
    model = HybridLM(config, dtype).to(device)
    return Job(prepare_layers(run, model, run.fp8_backend), text)


def report(run, job, rows, val_loss):
    """Print bits/byte and a sample, plot losses and schedule. Returns the last line's values."""
    text, tokens_per_step = job.token_data, run.batch_size * run.seq_len
    val_bpb = bits_per_byte(val_loss, len(text.validation) - 1, text.validation_bytes)
    xz = f", xz -9e needs {text.validation_xz:.3f}" if text.validation_xz else ""
    print(f"\nvalidation   {val_loss:.4f} nats per token, {val_bpb:.4f} bits/byte{xz}")
    if rows:
        figure = Figure(figsize=(7.5, 5), layout="constrained")
        axis, below = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
        tokens = [row["tokens"] / 1e6 for row in rows]
        seen = [(row["tokens"] / 1e6, row["val_loss"]) for row in rows if "val_loss" in row]
        axis.plot(tokens, [row["loss"] for row in rows], alpha=0.5, linewidth=0.8, label="training")
        axis.plot(*zip(*seen, (tokens[-1], val_loss)), "o-", color="#c44e52", label="validation")
        axis.set(ylabel="loss [nats per token]", ylim=(val_loss - 0.5, val_loss + 2),
                 title=f"Validation ends at {val_bpb:.3f} bits/byte{xz}")
        axis.legend()
        below.plot(tokens, [row["lr"] for row in rows], color="#55a868")
        below.set(ylabel="learning rate", xlabel="tokens [millions]")
        figure.savefig(os.path.join(run.out, "loss.png"), dpi=120)
        print(f"plot         {os.path.join(run.out, 'loss.png')}")

    print("sample\ndef read_", *generate(job.model.eval(), text.encoding, "def read_", 120,
                                          temperature=0.7, seed=run.seed), sep="")
    seconds = sum(row["ms"] for row in rows) / 1e3          # of the steps in the log
    return dict(recipe=run.recipe, val_loss=val_loss, val_bpb=val_bpb, xz_bpb=text.validation_xz,
                tokens=run.steps * tokens_per_step, seconds=seconds,
                tokens_per_s=len(rows) * tokens_per_step / seconds if rows else None,
                compute_dtype=str(job.model.compute_dtype)[6:], out=run.out)


def demonstrate():
    """Print two ways in which FP8 fails. Returns the numbers."""
    generator, result = torch.Generator().manual_seed(0), {}
    print("1. A cast without a scale loses small values. SQNR and share of zeros for N(0, s):\n"
          f"{'s':>8s}{'E4M3 unscaled':>24s}{'E5M2 unscaled':>24s}{'E4M3 scaled':>24s}")
    for s in (1.0, 1e-2, 1e-4, 1e-6):
        g = s * torch.randn(512, 512, generator=generator)
        values = [cast(g, E4M3).float(), cast(g, E5M2).float(), fake_quantize(g, E4M3)]
        result[f"unscaled {s:g}"] = [sqnr(v, g) for v in values]
        print(f"{s:8.0e}" + "".join(
            f"{sqnr(v, g):10.1f} dB, {(v == 0).float().mean():4.0%} zeros" for v in values))
    print("\n2. One token x 30000. It dominates the SQNR of all tokens: see the median token.\n"
          f"{'recipe':12s}{'all tokens':>14s}{'median token':>16s}{'zeros':>8s}")
    x, w = torch.randn(2, 512, 512, generator=generator)
    x[7] *= 30000
    for name in ("nemotron-h", "nano2"):
        y, truth = _Float8Matmul.apply(x, w, RECIPES[name], "emulated"), x @ w.t()
        median = sorted(map(sqnr, y, truth))[len(x) // 2]
        zeros = float((fake_quantize(x, E4M3, RECIPES[name].x_block) == 0).float().mean())
        result[f"outlier {name}"] = [sqnr(y, truth), median, zeros]
        print(f"{name:12s}{sqnr(y, truth):11.1f} dB{median:13.1f} dB{zeros:8.1%}")
    return result


@script(Run)
def main(run):
    return demonstrate() if run.demo else train_in_folder(run, build, report)


if __name__ == "__main__":
    main()
