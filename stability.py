"""Training stability: which normalisation lets a model train at a high learning rate.

If the learning rate is too high, the loss falls for a while and then climbs again, at worst to the
unigram entropy, the loss of predicting each token by its frequency alone. Rybakov et al. (arXiv
2410.16682) provoke this in a transformer of 830M parameters. They see the outputs of its linear
layers grow from step to step, those of QKV, Proj and FC2 most, and they compare ten methods. Each
method changes the model of model.py from outside. With z = q k^T / sqrt(head_dim):

    baseline        the model as it is, with a norm before each layer (pre-norm)
    soft_temp       softmax(z / 2)
    soft_clip       softmax stretched to (-0.03, 1.03) and clipped to [0, 1]: exact zeros and ones
    sigma_reparam   each weight W becomes g W / sigma(W). sigma is its largest singular value, by
                    power iteration with one step per training pass; g is learned and starts at 1
                    (Zhai et al., arXiv 2303.06296; the gradient also flows through sigma = u^T W v)
    layer_scale     the output of a layer is multiplied by a learned vector (Touvron et al., arXiv
                    2103.17239, who start it at 0.1 up to 18 blocks, 1e-5 up to 24, 1e-6 beyond)
    soft_cap        softmax(50 tanh(z / 50))
    qk_norm         LayerNorm of q and of k, per head
    qk_fc_norm      qk_norm, and LayerNorm of the outputs of Proj and of FC2
    qkv_norm        LayerNorm of q, k and v, without the pre-norm
    qk_norm_cap     qk_norm and soft_cap

On a hybrid. The scan is attention without a softmax: C takes the role of q, B that of k and x that
of v; dt weights a token and sets the decay. Hence, in a Mamba-2 layer,

    qk_norm         normalises B and C per group and dt over heads, at the output of in_proj
    qkv_norm        normalises these, and x and z per head; the pre-norm is removed
    qk_fc_norm, layer_scale, sigma_reparam      treat out_proj as Proj and in_proj as QKV
    soft_*          change only attention layers; a pattern without any is refused

Heads share the weight (and the bias) of a norm, and so do groups. The pre-norms stay RMSNorms.

Divergence. A trial has diverged if the loss or the gradient of a step is not finite; or if its
validation loss was above 1.05 times its own best in three evaluations in a row (`diverges`), at
which the trial stops; or if its last validation loss is not below the unigram entropy. A spike from
which the loss recovers is no divergence. bench/stability.py has two other rules.

Search. The learning rates of --lr are tried in rising order until one diverges. Then the bracket
between the highest that converged and the lowest that diverged is bisected in logarithms, until its
ends are within a factor of --resolution. Its lower end is the max stable learning rate.

What makes the toy diverge. The wider a matrix is, the more one step of AdamW changes it as an
operator. The paper's width of 1024 therefore diverges at learning rates ten times lower than the
toy's 128: order and ratios can be compared with the paper's, learning rates cannot. At a width of
64, embedding and head, which no method changes, diverged as soon as the linears did. The warmup
takes half of the run, so that a model learns before it diverges; then the learning rate is
constant. AdamW and clipping are those of train_fp8.py. A step has 512 tokens.

Glossary: as in model.py. QKV: q_proj, k_proj and v_proj as one linear | Proj: o_proj | FC1, FC2:
up_proj, down_proj | logit: z before any capping | trial: a run of one method at one learning rate.

Left out: the paper's 0.2 T token runs for perplexity, and its tokenizer of 256k entries.

    python stability.py                             four methods, one seed: 4 min on 2 cores
    python stability.py --preset toy-hybrid --out out/stability-hybrid
    python stability.py --preset stability-830m --list      the paper's sweep: sizes and cost
    python -m bench.stability                       ten methods, three seeds, three rules: 35 min
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import filelock
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from common import (GIB, check_flags, flag, pick_device, read_rows, script, settings_of, tune_cpu,
                    write_text)
from data import load_data, validation_batches
from model import HybridConfig, HybridLM
from ssm import accumulator
from train_fp8 import NotFinite, check_memory, evaluate, make_batches, prepare_layers, train
from train_fp8 import Run as TrainRun

# ------------------------------------------------------------------------------------------------
# The methods, and what they are made of


def attend_eager(q, k, v, mask=None, beta=1.0, cap=None, stretch=None):
    """Attention.attend with an explicit softmax: q (b, heads, t, head_dim), k, v (b, g, kv_len,
    head_dim) -> (b, heads, t, head_dim).

    beta: softmax(beta z). cap: c of c tanh(z / c). stretch: (zeta, gamma) of soft_clip. mask: bool,
    True where a query sees a key; None is causal, and the last query sees all keys. KV heads are
    not repeated. The scores of all pairs are stored: train long sequences with --recompute."""
    b, heads, t, head_dim = q.shape
    g, kv_len = k.shape[1:3]
    accum_dtype = accumulator(q)
    z = q.to(accum_dtype).reshape(b, g, -1, head_dim) @ k.to(accum_dtype).mT
    z = beta / math.sqrt(head_dim) * z.view(b, g, heads // g, t, kv_len)
    if cap is not None:
        z = cap * torch.tanh(z / cap)

    if mask is None:
        seen = torch.ones(t, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - t)
    else:
        seen = mask[:, :, None]                                         # (b, 1, 1, t, kv_len)
    P = z.masked_fill(~seen, -torch.inf).softmax(-1)
    if stretch is not None:
        zeta, gamma = stretch
        P = ((zeta - gamma) * P + gamma).clamp(0, 1)
    y = P.to(v.dtype).view(b, g, -1, kv_len) @ v                        # (b, g, heads/g t, p)
    return y.view(b, heads, t, head_dim)


class PartNorm(nn.Module):
    """LayerNorm or RMSNorm, in fp32, over each `width` neighbours of the last axis: one head of q,
    one group of B, or a whole output. All parts share one weight."""

    def __init__(self, width, kind="layernorm", eps=1e-5):
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layernorm" else None

    def forward(self, x):
        parts = x.unflatten(-1, (-1, self.width)).to(accumulator(x))
        weight = self.weight.to(parts.dtype)
        if self.bias is None:
            y = F.rms_norm(parts, (self.width,), weight, self.eps)
        else:
            y = F.layer_norm(parts, (self.width,), weight, self.bias.to(parts.dtype), self.eps)
        return y.flatten(-2).to(x.dtype)


class SplitNorm(nn.Module):
    """Norms for parts of in_proj's output [z, x, B, C, dt]; None leaves a part as it is."""

    def __init__(self, sizes, norms):
        super().__init__()
        self.sizes = sizes
        self.norms = nn.ModuleList(norm or nn.Identity() for norm in norms)

    def forward(self, m):
        parts = m.split(self.sizes, -1)
        return torch.cat([norm(part) for norm, part in zip(self.norms, parts)], -1)


class LayerScale(nn.Module):
    """x times a learned vector. It starts lower in deeper models (at CaiT's values)."""

    def __init__(self, config):
        super().__init__()
        blocks = len(config.pattern) // 2               # of two layers each
        start = 0.1 if blocks <= 18 else 1e-5 if blocks <= 24 else 1e-6
        self.weight = nn.Parameter(torch.full((config.d_model,), start))

    def forward(self, x):
        return x * self.weight.to(x.dtype)


class SigmaReparam(nn.Module):
    """A parametrisation of a weight W (n, k): g W / sigma(W) with sigma = u^T W v.

    u and v follow the largest singular value by one power iteration per `update`; at the start the
    iteration runs until sigma converges. g is learned; gradients also flow through sigma."""

    def __init__(self, weight, tolerance=1e-7, most=2000):
        super().__init__()
        self.g = nn.Parameter(torch.ones_like(weight[0, 0]))
        self.register_buffer("u", F.normalize(torch.randn_like(weight[:, 0]), dim=0))
        self.register_buffer("v", F.normalize(torch.randn_like(weight[0]), dim=0))
        sigma = 0.0
        for _ in range(0 if weight.is_meta else most):
            self.update(weight)
            before, sigma = sigma, float(self.sigma(weight.detach()))
            if abs(sigma - before) <= tolerance * sigma:
                break

    @torch.no_grad()
    def update(self, weight):
        """One power iteration."""
        self.u.copy_(F.normalize(weight @ self.v, dim=0))
        self.v.copy_(F.normalize(weight.t() @ self.u, dim=0))

    def sigma(self, weight):
        return self.u @ (weight @ self.v)

    def forward(self, weight):
        return self.g / self.sigma(weight) * weight


def update_sigmas(model):
    """One power iteration of every sigma in a model; nothing without sigma_reparam."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            weight = module.parametrizations.weight
            weight[0].update(weight.original)


class Method(NamedTuple):
    """What a method changes."""

    paper: tuple                    # its max stable learning rate, the lowest that diverged
    attend: Callable | None = None  # replaces Attention.attend
    normalised: str = ""            # "qk" or "qkv": the projections that get a norm
    pre_norm: bool = True           # False removes the norm before attention and Mamba layers
    output: str = ""                # "norm" or "scale", after o_proj, down_proj, out_proj
    sigma: bool = False             # each weight W becomes g W / sigma(W)


soft_temp = functools.partial(attend_eager, beta=0.5)
soft_clip = functools.partial(attend_eager, stretch=(1.03, -0.03))
soft_cap = functools.partial(attend_eager, cap=50.0)
METHODS = {
    "baseline": Method((6e-3, 8e-3)),
    "soft_temp": Method((8e-3, 20e-3), attend=soft_temp),
    "soft_clip": Method((8e-3, 20e-3), attend=soft_clip),
    "sigma_reparam": Method((20e-3, 40e-3), sigma=True),
    "layer_scale": Method((20e-3, 40e-3), output="scale"),
    "soft_cap": Method((40e-3, 60e-3), attend=soft_cap),
    "qk_norm": Method((40e-3, 60e-3), normalised="qk"),
    "qk_fc_norm": Method((40e-3, 60e-3), normalised="qk", output="norm"),
    "qkv_norm": Method((60e-3, 80e-3), normalised="qkv", pre_norm=False),
    "qk_norm_cap": Method((60e-3, None), normalised="qk", attend=soft_cap),     # sources disagree
}
LINEARS = {     # by layer type: {name in the paper: the linears that it consists of}
    "*": {"QKV": ("q_proj", "k_proj", "v_proj"), "Proj": ("o_proj",)},
    "-": {"FC1": ("up_proj",), "FC2": ("down_proj",)},
    "M": {"in_proj": ("in_proj",), "out_proj": ("out_proj",)},
}
OUTPUT = {"*": "o_proj", "-": "down_proj", "M": "out_proj"}


def append_module(mixer, name, module):
    """Apply a module to the output of the mixer's linear of that name."""
    linear = getattr(mixer, name)
    setattr(mixer, name, nn.Sequential(linear, module.to(linear.weight)))


def get_linear(mixer, name):
    """The mixer's linear of that name, with or without an appended module."""
    module = getattr(mixer, name)
    return module[0] if isinstance(module, nn.Sequential) else module


def normalise_projections(block, config, make_norm, parts):
    """Append norms to the projections of one layer. parts: "", "qk" or "qkv"."""
    if block.letter == "*":
        for part in parts:
            append_module(block.mixer, f"{part}_proj", make_norm(config.head_dim))
    if block.letter == "M" and parts:
        by_head = lambda: make_norm(config.mamba_head_dim) if "v" in parts else None
        by_group = lambda: make_norm(config.d_state)
        sizes = [config.d_inner] * 2 + [config.n_groups * config.d_state] * 2 + [config.mamba_heads]
        append_module(block.mixer, "in_proj", SplitNorm(sizes, [     # z, x, B, C, dt
            by_head(), by_head(), by_group(), by_group(), make_norm(config.mamba_heads)]))


def apply_method(model, method, norm="layernorm"):
    """Change a HybridLM in place to train by one of METHODS. Returns it.

    norm: "layernorm" or "rmsnorm", the kind of the added norms. With sigma_reparam, call
    `update_sigmas(model)` before each training pass. Convert to FP8 (train_fp8.convert_to_fp8)
    before this. Raises ValueError for an unknown method or norm, and for a method that changes
    the softmax on a pattern without attention."""
    config = model.config
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of: {', '.join(METHODS)}")
    if norm not in ("layernorm", "rmsnorm"):
        raise ValueError(f"norm is {norm!r}, must be layernorm or rmsnorm")
    change = METHODS[method]
    if change.attend and "*" not in config.pattern:
        raise ValueError(f"{method} changes attention's softmax, and {config.pattern} has no "
                         "attention (*)")
    make_norm = functools.partial(PartNorm, kind=norm, eps=config.norm_eps)

    for block in model.backbone.layers:
        mixer, letter = block.mixer, block.letter
        if change.attend and letter == "*":
            mixer.attend = change.attend
        normalise_projections(block, config, make_norm, change.normalised)
        if not change.pre_norm and letter != "-":
            block.norm = nn.Identity()
        if change.output:
            append_module(mixer, OUTPUT[letter], make_norm(config.d_model)
                          if change.output == "norm" else LayerScale(config))
        if change.sigma:
            for linear in [m for m in mixer.modules() if isinstance(m, nn.Linear)]:
                parametrize.register_parametrization(linear, "weight", SigmaReparam(linear.weight))
    return model


# ------------------------------------------------------------------------------------------------
# The probe


@contextlib.contextmanager
def probe(model):
    """Record the norms of a forward and a backward pass. Call `apply_method` before.

        with probe(model) as seen:
            loss = model.loss(tokens, labels)
        loss.backward()
        mean_norms(seen)    # {"QKV": {"weight", "input", "output", "grad"}, ..., "logit": largest}

    weight is the L2 norm of a linear's weight. input and output are the L2 norm of a token's
    vector, root mean square over tokens. grad is the L2 norm of the gradient with respect to the
    linear's input, recorded during the backward pass. logit is the largest unmasked attention
    logit."""
    seen = {}
    record = lambda f, *key: functools.partial(f, seen, key)
    with contextlib.ExitStack() as stack:
        for i, block in enumerate(model.backbone.layers):
            mixer, (first, last) = block.mixer, LINEARS[block.letter]
            output = get_linear(mixer, OUTPUT[block.letter])
            hooks = [mixer.register_forward_pre_hook(record(record_input, first, i, "")),
                     output.register_forward_pre_hook(record(record_input, last, i, ""))]
            hooks += [get_linear(mixer, name).register_forward_hook(
                record(record_output, kind, i, name))
                for kind, names in LINEARS[block.letter].items() for name in names]
            for hook in hooks:
                stack.enter_context(hook)               # removes the hook at the end
            if block.letter == "*":
                stack.callback(setattr, mixer, "attend", mixer.attend)
                mixer.attend = functools.partial(record_logit, seen, mixer.attend)
        yield seen


def record_input(seen, key, module, inputs):
    """A forward pre-hook. The module gets a view of its input, whose gradient comes from this
    module alone; the residual stream itself has other readers."""
    x = inputs[0].view_as(inputs[0])
    seen["input", *key] = token_norm(x)
    if x.requires_grad:
        x.register_hook(lambda g: seen.__setitem__(("grad", *key), float(g.float().norm())))
    return x, *inputs[1:]


@torch.no_grad()
def record_output(seen, key, linear, inputs, output):
    """A forward hook."""
    seen["output", *key] = token_norm(output)
    seen["weight", *key] = float(linear.weight.float().norm())


def record_logit(seen, attend, q, k, v, mask=None):
    """Record the largest logit, from the scores of one row at a time, and call `attend`."""
    t, kv_len = q.shape[2], k.shape[2]
    causal = torch.ones(1, t, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - t)
    for row, (queries, keys) in enumerate(zip(q.detach(), k.detach())):
        z = queries.unflatten(0, (len(keys), -1)) @ keys[:, None].mT    # (g, heads/g, t, kv_len)
        z = z.masked_fill(~(causal if mask is None else mask[row]), -torch.inf)
        largest = float(z.amax()) / math.sqrt(q.shape[3])
        seen["logit"] = max(largest, seen.get("logit", -math.inf))
    return attend(q, k, v, mask)


def token_norm(x):
    """L2 norm of the vectors of x (..., d), root mean square over them."""
    return float(x.detach().float().norm()) / math.sqrt(x.numel() / x.shape[-1])


def mean_norms(seen):
    """What `probe` recorded, as means over layers: {linear: {"weight", ...}, "logit": largest}."""
    squares = collections.defaultdict(lambda: collections.defaultdict(float))
    for what, kind, layer, name in (key for key in seen if key != "logit"):
        squares[kind, what][layer] += seen[what, kind, layer, name] ** 2    # q, k, v are one linear
    row = {"logit": seen["logit"]} if "logit" in seen else {}
    for (kind, what), layers in squares.items():
        row.setdefault(kind, {})[what] = sum(map(math.sqrt, layers.values())) / len(layers)
    return row


# ------------------------------------------------------------------------------------------------
# The run

TOY = dict(pattern="*-*-*-*-", vocab_size=512, d_model=128, mlp_dim=512, n_heads=4, n_kv_heads=4,
           head_dim=32, mamba_heads=8, mamba_head_dim=32, n_groups=2, d_state=16, chunk_size=64,
           rope_theta=1e4)
PAPER_SIZE = dict(pattern="*-" * 24, vocab_size=256000, d_model=1024, mlp_dim=4096, n_heads=16,
                  n_kv_heads=16, head_dim=64, mamba_heads=32, mamba_head_dim=64, n_groups=8,
                  d_state=128, chunk_size=128, rope_theta=1e4)
TOY_RUN = dict(
    steps=210, batch_size=8, grad_accum=1, seq_len=64, warmup=0.5, eval_tokens=8192,
    compute_dtype="float32", resolution=1.5, lr=(0.01, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
    methods=("baseline", "qk_norm", "qkv_norm", "qk_norm_cap"))
PAPER_RUN = dict(
    steps=1000, batch_size=512, grad_accum=64, seq_len=4096, warmup=0.1, eval_tokens=32768,
    compute_dtype="bfloat16", resolution=1.0, lr=(3e-4, 6e-3, 8e-3, 20e-3, 40e-3, 60e-3, 80e-3),
    methods=tuple(METHODS))
PRESETS = {     # (configuration, settings of the run); hybrids have attention without positions
    "toy": (TOY, TOY_RUN),
    "toy-hybrid": (dict(TOY, pattern="M-M*-M-", rope_theta=None), TOY_RUN),
    "stability-830m": (PAPER_SIZE, PAPER_RUN),
    "stability-830m-hybrid": (dict(PAPER_SIZE, pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-",
                                   rope_theta=None), PAPER_RUN),
}


@dataclasses.dataclass
class Run:
    """Find the max stable learning rate of each method, and what grows beyond it. Flags without a
    default here have the preset's. The same command resumes a stopped sweep in --out."""

    preset: str = flag("toy", "one of " + ", ".join(PRESETS), choices=PRESETS)
    methods: str | None = flag(None, "from " + ", ".join(METHODS), nargs="+", session=True)
    lr: float | None = flag(None, "learning rates, tried in rising order", above=0, nargs="+",
                             session=True)
    resolution: float | None = flag(None, "factor to which the max stable learning rate is found "
                                    "(1: no bisection)", at_least=1, session=True)
    seed: int = flag(0, "seed of initialisation and data order", at_least=0, at_most=2 ** 63 - 1)
    steps: int | None = flag(None, "optimizer steps per trial", at_least=1)
    batch_size: int | None = flag(None, "sequences per step", at_least=1)
    grad_accum: int | None = flag(None, "backward passes per step", at_least=1)
    seq_len: int | None = flag(None, "tokens per sequence", at_least=1)
    warmup: float | None = flag(None, "fraction of steps with rising learning rate", at_least=0)
    recompute: bool = flag(False, "activation checkpointing, as in train_fp8.py", session=True)
    eval_every: int = flag(15, "steps between evaluations and between probes", at_least=1)
    eval_tokens: int | None = flag(None, "validation tokens per evaluation", at_least=1)
    data: str = flag("stdlib", "stdlib, a file, a folder of text or of shards", session=True)
    tokenizer: str = flag("bpe", "bpe, bytes, or a tokenizer.json")
    device: str = flag("auto", "auto, cuda, mps or cpu", session=True)
    compute_dtype: str | None = flag(None, "float32 or bfloat16", choices=("float32", "bfloat16"))
    list: bool = flag(False, "print sizes and cost, train nothing", session=True)
    out: str = flag("out/stability", "folder of the trials and the plot", session=True)
    overwrite: bool = flag(False, "start anew even if --out holds other trials", session=True)

    def __post_init__(self):
        for name, value in PRESETS.get(self.preset, ({}, {}))[1].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_flags(self)
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown:
            raise ValueError(f"--methods has {unknown[0]!r}, must be of {', '.join(METHODS)}")
        self.methods = [method for method in METHODS if method in self.methods]
        self.lr = sorted(set(self.lr))
        self.training(self.lr[0])                       # raises for bad values

    def training(self, lr):
        """The train_fp8.Run of a trial. After the warmup the learning rate is constant."""
        return TrainRun(data=self.data, tokenizer=self.tokenizer, recipe="none", steps=self.steps,
                        batch_size=self.batch_size, grad_accum=self.grad_accum,
                        seq_len=self.seq_len, recompute=self.recompute, lr=lr, warmup=self.warmup,
                        decay=0.0, eval_every=self.eval_every, seed=self.seed)

    def config(self, vocab_size=None):
        """The preset's HybridConfig, with the tokenizer's vocabulary size."""
        values = PRESETS[self.preset][0]
        return HybridConfig(**values | dict(vocab_size=vocab_size or values["vocab_size"]))


# ------------------------------------------------------------------------------------------------
# Trials, and the search

RATIO, PATIENCE = 1.05, 3       # diverged: validation loss above RATIO x its best PATIENCE times


def diverges(evals):
    """Whether a trial with evals [[step, validation loss], ...] diverges: a loss is not finite, or
    PATIENCE losses in a row are above RATIO times the best before them."""
    best, above = math.inf, 0
    for _, loss in evals:
        above = above + 1 if loss > RATIO * best else 0
        best = min(best, loss)
        if not math.isfinite(loss) or above >= PATIENCE:
            return True
    return False


def unigram_entropy(token_data, run):
    """Nats per token of the evaluated text if tokens are predicted by their frequency alone."""
    text = token_data.train.read(0, min(len(token_data.train), 10 ** 7))
    counts = torch.bincount(torch.from_numpy(text), minlength=token_data.vocab_size).double() + 1
    labels = torch.cat([labels.flatten() for _, labels, _ in validation_batches(
        token_data.validation, run.batch_size, run.seq_len, limit=run.eval_tokens)])
    return float(-(counts / counts.sum()).log()[labels[labels >= 0]].mean())


def run_trial(run, config, method, lr, token_data, device):
    """Train one method at one learning rate; probe the first step and each step that is evaluated.

    Returns dict(method, lr, seed, diverged: the step at which divergence was found, or None, loss:
    the last validation loss, or None if diverged, evals [[step, loss]], norms [{step, linear:
    norms}])."""
    torch.manual_seed(run.seed)
    training, step, evals, probes = run.training(lr), 1, [], {}
    model = HybridLM(config, getattr(torch, run.compute_dtype)).to(device)
    apply_method(prepare_layers(training, model, "emulated"), method)

    def loss_fn(model, tokens, labels, seq_idx):
        update_sigmas(model)
        if step > 1 and step % run.eval_every:
            return model.loss(tokens, labels, seq_idx)
        with probe(model) as probes[step]:
            return model.loss(tokens, labels, seq_idx)

    def on_step(row):
        nonlocal step
        step = row["step"] + 1
        bar.update()
        if "val_loss" in row:
            evals.append([row["step"], row["val_loss"]])
        return diverges(evals)

    with tqdm(total=run.steps, desc=f"{method} at {lr:g}", leave=False, disable=None) as bar:
        try:
            done = len(train(training, model, token_data, loss_fn, eval_tokens=run.eval_tokens,
                             on_step=on_step))
        except NotFinite:
            evals.append([step, math.inf])
            probes.pop(step, None)
    if not diverges(evals):
        if done < run.steps:
            raise KeyboardInterrupt                     # Ctrl-C ends `train` after a whole step
        evals.append([done, evaluate(model, token_data.validation, run.batch_size, run.seq_len,
                                     limit=run.eval_tokens)])
    step, loss = evals[-1]
    diverged = diverges(evals) or not loss < unigram_entropy(token_data, run)
    norms = [dict(step=i, **mean_norms(seen)) for i, seen in probes.items()]
    return dict(method=method, lr=lr, seed=run.seed, diverged=step if diverged else None,
                loss=None if diverged else loss, evals=evals, norms=norms)


def get_outcomes(trials, method):
    """{learning rate: whether the trial diverged} of a method."""
    return {t["lr"]: bool(t["diverged"]) for t in trials if t["method"] == method}


def get_bracket(outcomes):
    """(max stable learning rate, lowest learning rate that diverged), each None if there is none. A
    learning rate that converged above one that diverged does not count."""
    high = min((lr for lr, diverged in outcomes.items() if diverged), default=None)
    stable = [lr for lr, diverged in outcomes.items()
              if not diverged and (high is None or lr < high)]
    return max(stable, default=None), high


def next_lr(lrs, outcomes, resolution):
    """The learning rate to try next, or None if the search is finished."""
    for lr in sorted(lrs):
        if lr not in outcomes:
            return lr
        if outcomes[lr]:
            break
    low, high = get_bracket(outcomes)
    if low and high and 1 < resolution < high / low:
        middle = float(f"{math.sqrt(low * high):.3g}")
        return middle if low < middle < high else None
    return None


@contextlib.contextmanager
def open_trials(folder, settings, overwrite=False):
    """Open trials.jsonl in a folder for this process alone. Yields (the finished trials, a function
    that adds one). The first line of the file holds the settings.

    Raises FileExistsError if another process has it open, and for trials of other settings."""
    path, settings = pathlib.Path(folder) / "trials.jsonl", json.loads(json.dumps(settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.parent / ".lock", blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise FileExistsError(f"another process is at work in {folder}: wait until it ends, or "
                              "choose another --out") from None
    try:
        new = overwrite or not path.exists()
        head, *trials = [dict(settings=settings)] if new else read_rows(path) or [{}]
        theirs = head.get("settings", {})
        for name in settings:
            if theirs.get(name) != settings[name]:
                raise FileExistsError(f"{folder} holds trials of another {name} "
                                      f"({theirs.get(name)!r}, now {settings[name]!r}): choose "
                                      "another --out, or --overwrite")
        lines = [json.dumps(row) + "\n" for row in [head, *trials]]
        write_text(path, "".join(lines))                # drops a last line that was cut short
        print(f"trials       {len(trials)} are done; the same command resumes after a stop",
              flush=True)

        def add(trial):
            trials.append(trial)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(trial) + "\n")
        yield trials, add
    finally:
        lock.release()


# ------------------------------------------------------------------------------------------------
# python stability.py

def report(run, trials):
    """Print losses by method and learning rate, draw the plot, return the last line's values."""
    table, max_lr, trials = {}, {}, [t for t in trials if t["method"] in run.methods]
    print(f"\n{'validation loss':15s}" + "".join(f"{lr:8g}" for lr in run.lr)
          + f"{'max stable lr':>16s}{'in the paper':>15s}")
    for method in run.methods:
        losses = {t["lr"]: t["loss"] for t in trials if t["method"] == method}
        table[method] = {f"{lr:g}": losses[lr] or "diverged" for lr in sorted(losses)}
        max_lr[method], high = get_bracket(get_outcomes(trials, method))
        words = lambda lr: f"{losses[lr]:.3f}" if losses.get(lr) else "div." if lr in losses else ""
        best = f"{'' if high else 'at least '}{max_lr[method]:g}" if max_lr[method] else "none"
        print(f"{method:15s}" + "".join(f"{words(lr):>8s}" for lr in run.lr)
              + f"{best:>16s}{METHODS[method].paper[0]:15g}")
    pair = pick_pair(run, trials)
    if pair:
        plot_pair(*pair, pathlib.Path(run.out) / "norms.png")
    return dict(table=table, max_lr=max_lr, out=run.out)


def pick_pair(run, trials):
    """(a diverging trial, a converging one at its learning rate or else of its method), or None."""
    rank = lambda t: (run.methods.index(t["method"]), t["lr"])
    bad = sorted((t for t in trials if t["diverged"] and t["norms"]), key=rank)
    good = sorted((t for t in trials if not t["diverged"]), key=rank)
    pairs = [(a, b) for what in ("lr", "method") for a in bad for b in good if a[what] == b[what]]
    return pairs[0] if pairs else None


def plot_pair(bad, good, path):
    """Draw validation loss, output norms and largest logit of two trials."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    loss, outputs, logit = axes = figure.subplots(1, 3)
    for trial, style in ((bad, "-"), (good, "--")):
        norms, name = trial["norms"], f"{trial['method']} at {trial['lr']:g}"
        steps = [row["step"] for row in norms]
        loss.plot(*zip(*trial["evals"]), f"k{style}", label=name)
        logit.plot(steps, [row.get("logit", 1) for row in norms], f"k{style}", label=name)
        for i, kind in enumerate(k for k in norms[0] if k not in ("step", "logit")):
            outputs.plot(steps, [row[kind]["output"] for row in norms], f"C{i}{style}",
                         label=kind if trial is bad else None)
    loss.set(title=f"{bad['method']} at {bad['lr']:g} diverges", ylabel="validation loss [nats]")
    outputs.set(title="Outputs of linears", ylabel="L2 norm per token", yscale="log")
    logit.set(title="Largest attention logit", yscale="log")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def show_costs(run, config):
    """Print the cost of a sweep; return the last line's values of --list."""
    n, tokens = config.n_params(), run.batch_size * run.seq_len
    flops = 3 * sum(config.flops_by_part(run.seq_len).values()) * tokens * run.steps
    print(f"model        {config.pattern}: {n:,} parameters, d_model {config.d_model}, vocabulary "
          f"{config.vocab_size}; {16 * n / GIB:.2f} GiB with gradients and moments in fp32\n"
          f"sweep        {', '.join(run.methods)} at {', '.join(f'{lr:g}' for lr in run.lr)}, "
          f"bisected to a factor of {run.resolution:g}\n"
          f"a trial      {run.steps} steps of {tokens} tokens, {flops / 1e12:.3g} TFLOP")
    return dict(n_params=n, tflop_per_trial=flops / 1e12)


def prepare(run):
    """(device, token data, config, settings) of a sweep. Raises if no trial could run."""
    device = pick_device(run.device)
    print(f"settings     {tune_cpu()}" if device == "cpu" else f"device       {device}")
    text = load_data(run.data, run.tokenizer, run.config().vocab_size)
    config, training = run.config(text.vocab_size), run.training(run.lr[0])
    show_costs(run, config)
    make_batches(training, text)                        # raises if the text is too short
    check_memory(training, config, getattr(torch, run.compute_dtype), device)
    return device, text, config, settings_of(run) | dict(config=dataclasses.asdict(config),
                                                         text=text.fingerprint | dict(source=None))


def describe(trial):
    end = "diverged at step {diverged}" if trial["diverged"] else "validation loss {loss:.3f}"
    return ("{method:15s}lr {lr:<7g}" + end).format(**trial)


@script(Run)
def main(run):
    if run.list:
        return show_costs(run, run.config())
    device, text, config, settings = prepare(run)
    with open_trials(run.out, settings, run.overwrite) as (trials, add):
        for method in run.methods:
            while lr := next_lr(run.lr, get_outcomes(trials, method), run.resolution):
                add(run_trial(run, config, method, lr, text, device))
                print(describe(trials[-1]), flush=True)
        return report(run, trials)


if __name__ == "__main__":
    main()
