"""Training stability: where one normalises decides how high a learning rate survives.

Too high a rate and the loss, after falling for a while, climbs again, at worst to what the
frequencies of tokens alone would give. Rybakov et al. (arXiv 2410.16682) force that on an 830M
transformer and see the outputs of its linear layers grow from step to step: of QKV, Proj and FC2
most. Their remedies, each a change from outside to the model of model.py, with
z = q k^T / sqrt(head_dim):

    baseline        pre-norm alone
    soft_temp       softmax(z / 2)
    soft_clip       softmax stretched to (-0.03, 1.03), then clipped to [0, 1]: exact zeros and ones
    sigma_reparam   each weight W becomes g W / sigma(W); sigma is its largest singular value by
                    power iteration, one step a forward pass, g is learned from 1 (Zhai et al.,
                    arXiv 2303.06296, whose gradient also flows through sigma = u^T W v)
    layer_scale     a sublayer's output times a learned vector (Touvron et al., arXiv 2103.17239,
                    also for its start: 0.1 up to 18 blocks, 1e-5 up to 24, then 1e-6)
    soft_cap        softmax(50 tanh(z / 50))
    qk_norm         LayerNorm of q and k, each head by itself
    qk_fc_norm      qk_norm, and LayerNorm after Proj and after FC2
    qkv_norm        LayerNorm of q, k and v; the norm before the layer is gone
    qk_norm_cap     qk_norm, then soft_cap

On a hybrid. The scan is attention without a softmax: C asks as q does, B answers as k, x carries as
v, dt weighs and forgets. So in a Mamba-2 layer

    qk_norm         normalises B and C by group and dt over heads, as in_proj puts them out
    qkv_norm        these, x and z by head; the norm before the layer is gone
    qk_fc_norm, layer_scale, sigma_reparam      treat out_proj as Proj, in_proj as QKV
    soft_*          have nothing to act on: attention layers alone, and refused without any

The norms' weights (and biases, if LayerNorm) are shared by heads or groups; --norm rmsnorm takes
RMSNorm for all that is added. The pre-norms stay the model's own RMSNorm.

Diverged, in words: the loss is not finite; or the validation loss, every --eval-every steps, has
been above 1.05 times its own best for three times running (`divergence`), and the run is stopped
there; or at its end it is no better than the frequencies of tokens alone (`unigram_loss`): what was
learned is gone, or never came. A spike that comes back in time is no divergence. Near an edge such
a rule splits hairs, so the report gives every ratio by two other rules as well (`RULES`).

What pushes the toy over the edge. A step of AdamW moves a matrix the further, as an operator, the
wider it is: the paper's width of 1024 breaks at rates ten times lower than the toy's 128, so orders
and ratios can be compared, rates cannot. At a width of 64 embedding and head, which no method
touches, broke as soon as the linears did, and the methods could not be told apart. The warmup takes
half of the run, so that a run first learns and then loses it. 512 tokens a step, the rate constant
after the warmup, AdamW (0.9, 0.95), weight decay 0.1, clip 1.0, fp32.

The sweep. For each method and seed: rates in rising order until one diverges, then bisection until
the two ends are within --resolution. One process a core (or a GPU); a cell is one line of
cells.jsonl, and the same command goes on where it stopped.

`probe`: every --probe-every steps, of each linear (QKV as one), the mean over layers of
    weight      its L2 norm (Frobenius)
    input, output       root mean square over tokens of the L2 norm of a token's vector
    grad        L2 norm of the gradient with respect to the linear's input
and the largest attention logit z, before any capping. With --grad-accum they are of the last pass
of a step, whose loss is divided by the number of passes, and so is grad.

Glossary: as in model.py. QKV, Proj: q, k, v and o_proj; FC1, FC2: up_proj, down_proj; cell: one
run, of a method, a rate and a seed; edge: the highest rate that converged.

Left out: the paper's 0.2 T token runs for perplexity; its tokenizer (any of 256k entries will do).

    python stability.py                             four methods, one seed: 4 min on 2 cores
    python stability.py --preset toy-full --out out/stability-full          the table: 35 min
    python stability.py --preset toy-full-hybrid --out out/stability-hybrid     of a hybrid: 50 min
    python stability.py --preset stability-830m --list      the paper's, what it would cost
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pathlib
import signal
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from data import hold_folder, load_data, parse_flags, read_rows, run_script
from infer import pick_device, pick_dtype
from model import Attention, HybridConfig, HybridLM, tune_cpu, write_text
from ssm import Linear, accumulator
from train_fp8 import (RECIPES, NotFinite, check_memory, convert_to_fp8, evaluate, make_batches,
                       make_optimizer, recompute_activations, train_step, wsd)
import train_fp8

# ------------------------------------------------------------------------------------------------
# What the methods are made of

TEMPERATURE = 0.5                   # beta of soft_temp
STRETCH = 1.03, -0.03               # zeta, gamma of soft_clip
CAP = 50.0                          # c of soft_cap


def attend_written_out(q, k, v, pos, mask, cap=None, stretch=None):
    """Attention.attend with the softmax in sight: q (b, heads, t, head_dim), k, v (b, g, s,
    head_dim) -> (b, heads, t, head_dim). cap: c tanh(z / c); stretch: (zeta, gamma) of soft_clip.

    mask: bool, True is seen; None is causal, aligned bottom-right. KV heads are not repeated. The
    scores of all pairs exist: for long sequences train with --recompute.
    """
    b, heads, t, head_dim = q.shape
    g, s = k.shape[1:3]
    fine = accumulator(q)
    z = q.to(fine).reshape(b, g, -1, head_dim) @ k.to(fine).mT              # (b, g, heads/g t, s)
    z = z.view(b, g, heads // g, t, s) / math.sqrt(head_dim)
    if cap is not None:
        z = cap * torch.tanh(z / cap)

    if mask is None:
        seen = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    else:
        seen = mask[:, :, None]                                             # (b, 1, 1, t, s)
    P = z.masked_fill(~seen, -torch.inf).softmax(-1)
    if stretch is not None:
        zeta, gamma = stretch
        P = ((zeta - gamma) * P + gamma).clamp(0, 1)
    y = P.to(v.dtype).view(b, g, -1, s) @ v
    return y.view(b, heads, t, head_dim)


def attend_softer(q, k, v, pos, mask):
    """Attention.attend at half the temperature's inverse: softmax(beta z)."""
    return Attention.attend(TEMPERATURE * q, k, v, pos, mask)


class PartNorm(nn.Module):
    """LayerNorm or RMSNorm of every `width` values of the last axis by themselves, in fp32: heads
    of q, groups of B, or (width None at the call: all of it) an output. One weight for all.
    """

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
    """in_proj's output, [z, x, B, C, dt], with a norm for some of the parts; None leaves one."""

    def __init__(self, sizes, norms):
        super().__init__()
        self.sizes = sizes
        self.norms = nn.ModuleList(norm or nn.Identity() for norm in norms)

    def forward(self, m):
        return torch.cat([f(part) for f, part in zip(self.norms, m.split(self.sizes, -1))], -1)


class LayerScale(nn.Module):
    """x times a learned vector."""

    def __init__(self, d, start):
        super().__init__()
        self.weight = nn.Parameter(torch.full((d,), start))

    def forward(self, x):
        return x * self.weight.to(x.dtype)


class SigmaReparam(nn.Module):
    """A parametrisation of a weight (n, k): g W / sigma(W), sigma = u^T W v.

    u, v follow the largest singular value, one power iteration each time `follow` is called; g and
    the gradient through sigma are learned. At the start the iteration is run until sigma stands.
    """

    def __init__(self, weight, tolerance=1e-7, most=2000):
        super().__init__()
        self.g = nn.Parameter(torch.ones_like(weight[0, 0]))
        self.register_buffer("u", F.normalize(torch.randn_like(weight[:, 0]), dim=0))
        self.register_buffer("v", F.normalize(torch.randn_like(weight[0]), dim=0))
        sigma = 0.0
        for _ in range(0 if weight.is_meta else most):
            self.follow(weight)
            before, sigma = sigma, float(self.sigma(weight.detach()))
            if abs(sigma - before) <= tolerance * sigma:
                break

    @torch.no_grad()
    def follow(self, weight):
        """One power iteration."""
        self.u.copy_(F.normalize(weight @ self.v, dim=0))
        self.v.copy_(F.normalize(weight.t() @ self.u, dim=0))

    def sigma(self, weight):
        return self.u.detach().clone() @ (weight @ self.v.detach().clone())

    def forward(self, weight):
        return self.g / self.sigma(weight) * weight


# ------------------------------------------------------------------------------------------------
# The methods

METHODS = ("baseline", "soft_temp", "soft_clip", "sigma_reparam", "layer_scale", "soft_cap",
           "qk_norm", "qk_fc_norm", "qkv_norm", "qk_norm_cap")          # in the paper's order
ATTEND = {
    "soft_temp": attend_softer,
    "soft_clip": functools.partial(attend_written_out, stretch=STRETCH),
    "soft_cap": functools.partial(attend_written_out, cap=CAP),
    "qk_norm_cap": functools.partial(attend_written_out, cap=CAP),
}
LINEARS = {     # of each letter: name in the paper -> the linears that make it; the last puts out
    "*": {"QKV": ("q_proj", "k_proj", "v_proj"), "Proj": ("o_proj",)},
    "-": {"FC1": ("up_proj",), "FC2": ("down_proj",)},
    "M": {"in_proj": ("in_proj",), "out_proj": ("out_proj",)},
}
OUTPUT = {"*": "o_proj", "-": "down_proj", "M": "out_proj"}


def after(mixer, name, module):
    """Let a module act on what mixer's linear of that name puts out."""
    linear = getattr(mixer, name)
    setattr(mixer, name, nn.Sequential(linear, module.to(linear.weight)))


def bare(module):
    """The linear inside what `after` made; a linear itself."""
    return module[0] if isinstance(module, nn.Sequential) else module


def normalise_projections(mixer, config, letter, kind, value):
    """qk_norm (value False) or qkv_norm of one layer."""
    norm = functools.partial(PartNorm, kind=kind, eps=config.norm_eps)
    if letter == "*":
        for name in ("q_proj", "k_proj", "v_proj")[:3 if value else 2]:
            after(mixer, name, norm(config.head_dim))
    elif letter == "M":
        di, bc, h = config.d_inner, config.n_groups * config.d_state, config.mamba_heads
        by_head = lambda: norm(config.mamba_head_dim) if value else None
        after(mixer, "in_proj", SplitNorm([di, di, bc, bc, h], [
            by_head(), by_head(), norm(config.d_state), norm(config.d_state), norm(h)]))


def layer_scale_start(config):
    """The first value of LayerScale, by depth (blocks of two layers), as CaiT has it."""
    blocks = len(config.pattern) // 2
    return 0.1 if blocks <= 18 else 1e-5 if blocks <= 24 else 1e-6


def apply_method(model, method, norm="layernorm"):
    """Change a HybridLM in place to train by one of METHODS, as the header defines them. Returns
    it. norm: layernorm or rmsnorm, of what is added.

    FP8 linears (train_fp8.convert_to_fp8) must be there before. Raises ValueError for an unknown
    method or norm, and for a softmax method on a pattern without attention.
    """
    config = model.config
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of: {', '.join(METHODS)}")
    if norm not in ("layernorm", "rmsnorm"):
        raise ValueError(f"--norm is {norm!r}, must be layernorm or rmsnorm")
    if method in ATTEND and "*" not in config.pattern:
        raise ValueError(f"{method} changes attention's softmax, and {config.pattern} has no "
                         "attention (*)")
    for block in model.backbone.layers:
        mixer, letter = block.mixer, block.letter
        if method.startswith("qk"):
            normalise_projections(mixer, config, letter, norm, value=method == "qkv_norm")
        if method == "qkv_norm" and letter != "-":
            block.norm = nn.Identity()
        if method == "qk_fc_norm":
            after(mixer, OUTPUT[letter], PartNorm(config.d_model, norm, config.norm_eps))
        if method == "layer_scale":
            after(mixer, OUTPUT[letter], LayerScale(config.d_model, layer_scale_start(config)))
        if method in ATTEND and letter == "*":
            mixer.attend = ATTEND[method]
        if method == "sigma_reparam":
            for linear in (m for m in list(mixer.modules()) if isinstance(m, Linear)):
                parametrize.register_parametrization(linear, "weight", SigmaReparam(linear.weight))
    if method == "sigma_reparam":       # the embedding runs once a pass, before all others
        model.backbone.embeddings.register_forward_pre_hook(lambda *_: follow_sigmas(model))
    return model


def follow_sigmas(model):
    """One power iteration of every sigma, where gradients are recorded."""
    if torch.is_grad_enabled():
        for module in model.modules():
            if parametrize.is_parametrized(module):
                weight = module.parametrizations.weight
                weight[0].follow(weight.original)


# ------------------------------------------------------------------------------------------------
# The probe


class Probe:
    """Norms of a model's linears, of the pass inside `with probe:`; see `probe`."""

    def __init__(self, model):
        self.model, self.on, self.seen, self.hooks = model, False, {}, []
        for i, block in enumerate(model.backbone.layers):
            first, last = LINEARS[block.letter]
            mixer = block.mixer
            self.hook_input(mixer, (i, first))      # x is the input of q, k and v together
            self.hook_input(bare(getattr(mixer, OUTPUT[block.letter])), (i, last))
            for kind, names in LINEARS[block.letter].items():
                for name in names:
                    self.hook_output(bare(getattr(mixer, name)), (i, kind, name))
            if block.letter == "*":
                mixer.attend = functools.partial(self.attend, mixer.attend, i)

    def hook_input(self, module, key):
        """Norm of the input, and of the gradient that comes back to it through this module alone:
        as a view of its own, since the residual stream has other readers.
        """
        def hook(_, inputs):
            if not self.on:
                return None
            x = inputs[0].view_as(inputs[0])
            self.seen["input", key] = token_norm(x)
            if x.requires_grad:
                x.register_hook(lambda g: self.seen.__setitem__(("grad", key), g.float().norm()))
            return x, *inputs[1:]
        self.hooks.append(module.register_forward_pre_hook(hook))

    def hook_output(self, linear, key):
        def hook(_, inputs, output):
            if self.on:
                self.seen["output", key] = token_norm(output)
                self.seen["weight", key] = linear.weight.detach().float().norm()
        self.hooks.append(linear.register_forward_hook(hook))

    def attend(self, inner, i, q, k, v, pos, mask):
        """The attention that was there, and the largest logit that a query may see."""
        if self.on:
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            seen = seen.tril(k.shape[2] - q.shape[2])
            largest = []
            for row in range(len(q)):               # one row's scores at a time
                z = q[row].detach().unflatten(0, (k.shape[1], -1)) @ k[row, :, None].detach().mT
                visible = seen if mask is None else mask[row, :, None]
                largest.append(z.masked_fill(~visible, -torch.inf).amax().float())
            self.seen["logit", (i, "")] = torch.stack(largest).amax() / math.sqrt(q.shape[-1])
        return inner(q, k, v, pos, mask)

    def __enter__(self):
        self.seen.clear()
        self.on = True
        return self

    def __exit__(self, *_):
        self.on = False

    def remove(self):
        """Take the hooks out of the model."""
        for hook in self.hooks:
            hook.remove()
        for block in self.model.backbone.layers:
            if block.letter == "*":
                block.mixer.attend = block.mixer.attend.args[0]

    def row(self):
        """{linear: {weight, input, output, grad}, "logit": largest}: floats, mean over layers."""
        squares, row = {}, {}
        for (what, key), value in self.seen.items():
            if what != "logit":         # q, k and v are one linear: their squares add up
                one = squares.setdefault((key[1], what), {})
                one[key[0]] = one.get(key[0], 0.0) + float(value) ** 2
        for (kind, what), layers in squares.items():
            mean = sum(math.sqrt(s) for s in layers.values()) / len(layers)
            row.setdefault(kind, {})[what] = mean
        logits = [float(value) for (what, _), value in self.seen.items() if what == "logit"]
        return row | (dict(logit=max(logits)) if logits else {})


def token_norm(x):
    """Root mean square over tokens of the L2 norm of x (..., d)."""
    x = x.detach()
    return x.float().norm() / math.sqrt(x.numel() / x.shape[-1])


def probe(model):
    """Hooks on a model, before or after apply_method's changes (call it last). Then

        with watch: model.loss(tokens, labels).backward()
        watch.row()     {"QKV": {"weight", "input", "output", "grad"}, "Proj": ..., "logit": ...}

    Outside of `with` the hooks return at once. watch.remove() takes them out again.
    """
    return Probe(model)


# ------------------------------------------------------------------------------------------------
# One cell


def divergence(losses, ratio=1.05, patience=3):
    """Index of the evaluation that makes a run a diverged one, or None: a loss that is not finite,
    or the last of `patience` in a row above `ratio` times the best before them.
    """
    best, above = math.inf, 0
    for i, loss in enumerate(losses):
        above = above + 1 if loss > ratio * best else 0
        best = min(best, loss)
        if not math.isfinite(loss) or above >= patience:
            return i
    return None


def unigram_loss(token_data, limit):
    """Nats a token of validation text (its first `limit`) by the frequencies of training tokens."""
    count = lambda m: torch.bincount(torch.from_numpy(m.astype("int64")),
                                     minlength=token_data.vocab_size).double()
    train = token_data.train
    p = count(train.read(0, min(len(train), 10 ** 7))) + 1
    validation = token_data.validation
    truth = count(validation.read(1, min(len(validation), limit + 1)))
    return float(-(truth * (p / p.sum()).log()).sum() / truth.sum())


def build(run, config, method, seed, device, dtype):
    """A fresh model on the device, changed by the method."""
    torch.manual_seed(seed)
    model = HybridLM(config, dtype).to(device)
    convert_to_fp8(model, run.recipe, verbose=False)
    apply_method(model, method, run.norm)
    if run.recompute:
        recompute_activations(model)
    return model


def run_cell(run, config, method, lr, seed, token_data, device, dtype):
    """Train one cell: a dict of method, lr, seed, diverged (the step at which that was clear, or
    None), loss (at the end, None if diverged), losses [of each step], evals [[step, loss]], norms
    [{step, **probe}], milliseconds of a step with and without the probe.
    """
    model = build(run, config, method, seed, device, dtype)
    watch = probe(model)
    training = run.training(lr, seed)
    batches, optimizer = make_batches(training, token_data), make_optimizer(model, lr,
                                                                            run.weight_decay)
    score = lambda limit: evaluate(model, token_data.validation, run.eval_rows, run.seq_len,
                                   limit=limit)
    losses, evals, norms, took, diverged = [], [], [], {True: [], False: []}, None
    for step in range(1, run.steps + 1):
        probing, start = step % run.probe_every == 0 or step == 1, time.perf_counter()
        rate = wsd(step - 1, run.steps, lr, run.warmup, decay=0)
        try:
            with watch if probing else contextlib.nullcontext():
                losses.append(train_step(model, optimizer, batches, training, rate, device)[0])
            if probing:
                norms.append(dict(step=step, **watch.row()))
        except NotFinite:
            diverged = step
        took[probing].append(time.perf_counter() - start)
        if step % run.eval_every == 0 and not diverged:
            evals.append([step, score(run.eval_tokens)])
            if divergence([loss for _, loss in evals], run.ratio, run.patience) is not None:
                diverged = step
        if diverged:
            break
    loss = None if diverged else score(4 * run.eval_tokens)
    if loss is not None and not loss < unigram_loss(token_data, 4 * run.eval_tokens):
        diverged, loss = run.steps, None
    middle = lambda seconds: 1e3 * sorted(seconds)[len(seconds) // 2] if seconds else None
    return dict(method=method, lr=lr, seed=seed, diverged=diverged,
                loss=loss, losses=losses, evals=evals, norms=norms, ms=middle(took[False]),
                probe_ms=middle(took[True]))


# ------------------------------------------------------------------------------------------------
# The sweep


def edge(verdicts):
    """(highest rate that converged below every one that diverged, lowest that diverged), each None
    if there is none. verdicts {rate: whether it diverged}.
    """
    first = min((lr for lr, bad in verdicts.items() if bad), default=None)
    fine = [lr for lr, bad in verdicts.items() if not bad and (first is None or lr < first)]
    return max(fine, default=None), first


def next_rate(rates, verdicts, resolution):
    """The rate to try next, None if the edge is known: the rising rates up to one that diverges,
    then halves of the bracket in logarithms until its ends are within `resolution`.
    """
    for lr in sorted(rates):
        if lr not in verdicts:
            return lr
        if verdicts[lr]:
            break
    low, high = edge(verdicts)
    if low and high and 1 < resolution < high / low:
        middle = float(f"{math.sqrt(low * high):.3g}")
        return middle if low < middle < high else None
    return None


class Sweep:
    """The cells of a folder, and what is still to do."""

    def __init__(self, run, settings, unigram=None):
        self.unigram = unigram          # loss by the frequencies of tokens
        self.run, self.path = run, pathlib.Path(run.out) / "cells.jsonl"
        rows = [] if run.overwrite else read_rows(self.path)
        if self.path.exists() and not run.overwrite:
            theirs = (rows[0] if rows else {}).get("settings") or {}
            different = [k for k, v in settings.items() if theirs.get(k) != v]
            if different:
                raise FileExistsError(f"{run.out} holds a sweep of another {different[0]} "
                                      f"({theirs.get(different[0])!r}, now "
                                      f"{settings[different[0]]!r}): choose another --out, or "
                                      "--overwrite")
        elif run.resume:
            raise FileNotFoundError(f"{self.path} does not exist: nothing to resume")
        if any(not {"method", "lr", "seed", "diverged", "evals"} <= set(c) for c in rows[1:]):
            raise ValueError(f"{self.path} has lines that are no cells: restore it, or --overwrite")
        self.cells = {(c["method"], c["lr"], c["seed"]): c for c in rows[1:]}
        self.head = dict(settings=settings)
        self.running = set()

    def begin(self):
        """Write the file anew, without a line that was cut short."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        hold_folder(self.path.parent)
        write_text(self.path, "".join(json.dumps(row) + "\n"
                                      for row in [self.head, *self.cells.values()]))

    def verdicts(self, method, seed):
        """{rate: whether it diverged} of the cells that are done, in rising order."""
        done = {lr: bool(c["diverged"]) for (m, lr, s), c in self.cells.items()
                if (m, s) == (method, seed)}
        return dict(sorted(done.items()))

    def next(self):
        """(method, lr, seed) of a cell to start, or None: no chain waits for two at a time."""
        for seed in range(self.run.seed, self.run.seed + self.run.seeds):
            for method in self.run.methods:
                if (method, seed) not in self.running:
                    lr = next_rate(self.run.lr, self.verdicts(method, seed), self.run.resolution)
                    if lr is not None:
                        self.running.add((method, seed))
                        return method, lr, seed
        return None

    def finished(self, cell):
        """Keep a cell: a line, written at once."""
        self.running.remove((cell["method"], cell["seed"]))
        self.cells[cell["method"], cell["lr"], cell["seed"]] = cell
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")

    def most(self):
        """Cells that are still to do, at most."""
        finer = max((b / a for a, b in zip(sorted(self.run.lr), sorted(self.run.lr)[1:])),
                    default=1.0)
        halvings = 0
        while self.run.resolution > 1 and finer > self.run.resolution:
            finer, halvings = math.sqrt(finer), halvings + 1
        chains = [(m, s) for m in self.run.methods
                  for s in range(self.run.seed, self.run.seed + self.run.seeds)]
        left = 0
        for chain in chains:
            verdicts = self.verdicts(*chain)
            if next_rate(self.run.lr, verdicts, self.run.resolution) is not None:
                left += max(len(self.run.lr) + halvings - len(verdicts), 1)
        return left


WORKER = {}     # of a process of the pool: what `start_worker` was given


def start_worker(run, config, tokenizer_json, devices, dtype):
    """Set up a process of the pool: one core or one GPU, the text, deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    device = devices.get()
    if device == "cpu":
        torch.set_num_threads(1)
        tune_cpu()
    text = load_data(run.data, run.tokenizer, config.vocab_size, tokenizer_json)
    WORKER.update(run=run, config=config, token_data=text, device=device, dtype=dtype)


def worker_cell(method, lr, seed):
    return run_cell(method=method, lr=lr, seed=seed, **WORKER)


def sweep_cells(sweep, config, token_data, device, dtype):
    """Run what is to do, a process a core or a GPU; prints a method's row whenever it grows."""
    run = sweep.run
    context, workers = multiprocessing.get_context("spawn"), run.workers
    devices = context.Queue()
    for i in range(workers):
        devices.put(f"cuda:{i % torch.cuda.device_count()}" if device == "cuda" else device)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, start_worker, (
        run, config, token_data.tokenizer_json, devices, dtype))
    waiting = {}
    try:
        with tqdm(total=sweep.most(), unit="cell", disable=None) as bar:
            while True:
                while len(waiting) < workers and (cell := sweep.next()):
                    waiting[pool.submit(worker_cell, *cell)] = cell
                if not waiting:
                    break
                done, _ = concurrent.futures.wait(
                    waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in sorted(done, key=lambda f: f.exception() is not None):
                    method, _, seed = waiting[future]       # what is whole is kept first
                    sweep.finished(future.result())
                    del waiting[future]
                    bar.update()
                    bar.total = max(bar.n + sweep.most(), bar.n)
                    tqdm.write(f"{method:14s} seed {seed}  " + row_of_losses(sweep, method, seed))
    except concurrent.futures.process.BrokenProcessPool:
        raise OSError(f"a process of the sweep died, out of memory perhaps: {len(sweep.cells)} "
                      "cells are kept, the same command goes on; try fewer --workers") from None
    except RuntimeError as error:       # as torch reports a GPU without memory
        raise OSError(f"a cell failed ({str(error).splitlines()[0]}): {len(sweep.cells)} cells are "
                      "kept, the same command goes on; try --grad-accum or --recompute") from None
    except KeyboardInterrupt:
        print(f"stopped: {len(sweep.cells)} cells are in {sweep.path}, the same command goes on")
        raise
    finally:
        for child in multiprocessing.active_children() if waiting else ():
            child.terminate()           # cells that nobody waits for any more
        pool.shutdown(cancel_futures=True)


def row_of_losses(sweep, method, seed):
    """A method's row of the live table."""
    cells = {lr: sweep.cells[method, lr, seed] for lr in sweep.verdicts(method, seed)}
    return "  ".join(f"{lr:g}: " + (f"diverged at {c['diverged']}" if c["diverged"]
                                    else f"{c['loss']:.3f}") for lr, c in cells.items())


# ------------------------------------------------------------------------------------------------
# What came out

PAPER = {       # highest rate that converged, first that diverged, perplexity at 3e-4
    "baseline": (6e-3, 8e-3, 11.19), "soft_temp": (8e-3, 20e-3, None),
    "soft_clip": (8e-3, 20e-3, None), "sigma_reparam": (20e-3, 40e-3, None),
    "layer_scale": (20e-3, 40e-3, None), "soft_cap": (40e-3, 60e-3, 11.24),
    "qk_norm": (40e-3, 60e-3, 10.84), "qk_fc_norm": (40e-3, 60e-3, 10.87),
    "qkv_norm": (60e-3, 80e-3, 10.85), "qk_norm_cap": (60e-3, None, 11.00),
}
PAPER_ORDER = (("baseline",), ("soft_temp", "soft_clip"), ("sigma_reparam", "layer_scale"),
               ("soft_cap", "qk_norm", "qk_fc_norm"), ("qkv_norm", "qk_norm_cap"))


def mean_and_deviation(values):
    """Of a list of floats; the deviation of one value is 0."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))
    return mean, spread


def verdicts_at_the_end(sweep, method, seed):
    """As `Sweep.verdicts`, and diverged as well if the last evaluation is above --ratio x the best:
    what has not come back by the end.
    """
    found = sweep.verdicts(method, seed)
    for lr, bad in found.items():
        losses = [loss for _, loss in sweep.cells[method, lr, seed]["evals"]]
        found[lr] = bad or bool(losses) and losses[-1] > sweep.run.ratio * min(losses)
    return found


def half_rate(sweep, method, seed):
    """The rate at which half of what can be learned is lost: the last evaluation crosses the middle
    between the frequencies of tokens and the best that any cell of the seed reached, in a straight
    line over log(rate). A cell that diverged has kept nothing. None if it does not cross.
    """
    ends = {key: sweep.unigram if c["diverged"] else c["evals"][-1][1]
            for key, c in sweep.cells.items() if key[2] == seed and (c["diverged"] or c["evals"])}
    middle = (sweep.unigram + min(ends.values(), default=sweep.unigram)) / 2
    mine = sorted((lr, loss) for (m, lr, _), loss in ends.items() if m == method)
    for (low, before), (high, after) in zip(mine, mine[1:]):
        if before <= middle < after:
            return low * (high / low) ** ((middle - before) / (after - before))
    return None


RULES = {       # what "survives a rate" may mean: words -> rate by sweep, method and seed
    "as defined": lambda sweep, m, s: edge(sweep.verdicts(m, s))[0],
    "and within 1.05 of the best at the end": lambda sweep, m, s: edge(
        verdicts_at_the_end(sweep, m, s))[0],
    "half of what can be learned is kept": half_rate,
}


def summary(sweep):
    """{method: dict(edges, first, losses [each by seed: the edge, the first rate that diverged, the
    loss at the lowest rate], rates {rule: [by seed]}, ratios {rule: [to qk_norm, of seeds that have
    both]}, open)}. open: a seed never diverged, its edge is a lower bound.
    """
    run = sweep.run
    seeds, table = range(run.seed, run.seed + run.seeds), {}
    for method in run.methods:
        ends = [edge(sweep.verdicts(method, s)) for s in seeds]
        low = [sweep.cells.get((method, run.lr[0], s)) for s in seeds]
        table[method] = dict(edges=[e for e, _ in ends], first=[f for _, f in ends],
                             open=any(f is None for _, f in ends),
                             losses=[c and c["loss"] for c in low],
                             rates={rule: [f(sweep, method, s) for s in seeds]
                                    for rule, f in RULES.items()})
    for row in table.values():
        base = table.get("qk_norm", {}).get("rates")
        row["ratios"] = {rule: [a / b for a, b in zip(row["rates"][rule], base[rule]) if a and b]
                         if base else [] for rule in RULES}
    return table


def log_mean(values):
    """Geometric mean of rates and the factor that one standard deviation is; None where a rate is.
    """
    if not values or None in values:
        return None, None
    mean, spread = mean_and_deviation([math.log(v) for v in values])
    return math.exp(mean), math.exp(spread)


def in_words(values, form=".3g"):
    """Geometric mean x/ deviation of rates or ratios, "-" for what is not there."""
    middle, spread = log_mean(values)
    if middle is None:
        return "-"
    return format(middle, form) + (f" x/ {spread:.2f}" if len(values) > 1 else "")


def plus_minus(values, form, unit=""):
    """Mean +- deviation, of one value without, "-" for none."""
    if not values:
        return "-"
    mean, spread = mean_and_deviation(values)
    return format(mean, form) + (f" +- {spread:.2g}" if len(values) > 1 else "") + unit


def print_table(sweep, table):
    """In the paper's order, beside the paper's cells; then how much hangs on the definition."""
    run, qk = sweep.run, table.get("qk_norm", {})
    print(f"\nedge: highest rate that converged, geometric mean of {run.seeds} seeds x/ standard "
          f"deviation, known to a factor of {run.resolution:g} (> a lower bound, ? two of them). "
          f"Loss at rate {run.lr[0]:g}")
    print(f"{'method':14s}{'edge':>15s}{'first div.':>12s}{'/ qk_norm':>14s}{'paper':>8s}"
          f"{'/ qk':>6s}{'loss':>17s}{'to baseline':>18s}{'paper ppl':>11s}")
    base = table.get("baseline", {}).get("losses", [])
    percent = lambda pairs: [100 * (a / b - 1) for a, b in pairs if a and b]
    for method, row in table.items():
        bound = {(0, 0): "", (1, 0): ">", (0, 1): "<", (1, 1): "?"}[row["open"], qk.get("open", 0)]
        losses, gaps = [v for v in row["losses"] if v], percent(zip(row["losses"], base))
        highest, _, perplexity = PAPER[method]
        print(f"{method:14s}{'>' * row['open'] + in_words(row['edges']):>15s}"
              f"{in_words(row['first']).split()[0]:>12s}"
              f"{bound + in_words(row['ratios']['as defined']):>14s}"
              f"{highest:8g}{highest / PAPER['qk_norm'][0]:6g}{plus_minus(losses, '.4f'):>17s}"
              f"{plus_minus(gaps, '+.2f', '%'):>18s}{perplexity or '-':>11}")
    print("\nthe same by other definitions of what survives a rate: rate, and over qk_norm's")
    print(f"{'':14s}" + "".join(f"{rule:>44s}" for rule in RULES))
    for method, row in table.items():
        print(f"{method:14s}" + "".join(f"{in_words(row['rates'][rule]):>28s}"
                                        f"{in_words(row['ratios'][rule]):>16s}" for rule in RULES))


def compare_order(table, resolution):
    """The paper's order between groups of methods that are here, one after the other: lines of
    text. Two edges can be told apart if they differ by more than the resolution and by more than
    the deviations of both.
    """
    groups = [[m for m in group if table.get(m) and log_mean(table[m]["edges"])[0]]
              for group in PAPER_ORDER]
    groups, lines = [group for group in groups if group], []
    for lower, higher in zip(groups, groups[1:]):
        verdicts = []
        for a, b in ((a, b) for a in lower for b in higher):
            (low, one), (high, two) = (log_mean(table[m]["edges"]) for m in (a, b))
            unclear = max(resolution, one, two)
            word = "holds" if high > low * unclear else "not here" if low > high * unclear else \
                "cannot be told"
            if table[b]["open"] and table[a]["open"]:
                word = "cannot be told"
            verdicts.append(f"{a} < {b} {word}")
        lines.append("; ".join(verdicts))
    return lines


def comparisons(sweep, seed):
    """A diverging cell of a seed beside converging ones, [(words, bad, good)]: of the first method
    that has any, the lowest of --lr that diverged; beside it a method that converged at that rate,
    then the method itself at its edge and at the lowest rate. Empty if nothing diverged.
    """
    run = sweep.run
    for method in run.methods:
        verdicts = sweep.verdicts(method, seed)
        high = next((lr for lr in run.lr if verdicts.get(lr)), None)
        if high is None or not sweep.cells[method, high, seed]["norms"]:
            continue
        bad, found = sweep.cells[method, high, seed], []
        same_rate = [(m, high) for m in ("qk_norm", "qkv_norm", *run.methods)]
        for keys in (same_rate, [(method, edge(verdicts)[0])], [(method, run.lr[0])]):
            cells = (sweep.cells.get((m, lr, seed)) for m, lr in keys)
            good = next((c for c in cells if c and not c["diverged"] and c["norms"]), None)
            if good and all(good is not other for _, _, other in found):
                found.append((f"{good['method']} at {good['lr']:g}", bad, good))
        if found:
            return found
    return []


def growth(bad, good):
    """What the probes of a diverging run say beside a converging one: ({linear: {what: ratio at
    the last step that both have}}, that step, {linear: first step at which its output is over
    twice as large, or None}).
    """
    theirs = {row["step"]: row for row in good["norms"]}
    common = [row for row in bad["norms"] if row["step"] in theirs]
    last, kinds = common[-1], [k for k in common[-1] if k not in ("step", "logit")]
    over_theirs = lambda value, other: value / other if other else math.inf     # all neurons dead
    ratios = {k: {what: over_theirs(last[k][what], theirs[last["step"]][k][what])
                  for what in last[k]} for k in kinds}
    over = {k: next((row["step"] for row in common
                     if row[k]["output"] > 2 * theirs[row["step"]][k]["output"]), None)
            for k in kinds}
    return ratios, last["step"], over


def print_growth(sweep, found):
    """Of the first seed's diverging run, norms over those of each converging run beside it; of
    every seed the steps from which outputs are twice as large. Returns {words: {linear: {what:
    ratio}}}.
    """
    bad, each = found[0][1], {words: growth(bad, good) for words, bad, good in found}
    step = next(iter(each.values()))[1]
    print(f"\nnorms of {bad['method']} at {bad['lr']:g}, which diverges at step {bad['diverged']}, "
          f"at step {step}, over those of runs that converge")
    print(f"{'':12s}" + "".join(f"{words:>40s}" for words in each))
    print(f"{'':12s}" + f"{'weight':>10s}{'input':>10s}{'output':>10s}{'grad':>10s}"
          * len(each))
    for kind in each[found[0][0]][0]:
        print(f"{kind:12s}" + "".join(
            f"{ratios[kind][what]:10.3g}" for ratios, _, _ in each.values()
            for what in ("weight", "input", "output", "grad")))
    logits = [[row["logit"] for row in c["norms"] if row["step"] == step and "logit" in row]
              for c in (bad, *(good for _, _, good in found))]
    if all(logits):
        print(f"largest attention logit {logits[0][0]:.1f}; " + ", ".join(
            f"{words} {z[0]:.1f}" for (words, _, _), z in zip(found, logits[1:])))
    print("output over twice that of the converging run from step")
    for seed in range(sweep.run.seed, sweep.run.seed + sweep.run.seeds):
        for words, bad, good in comparisons(sweep, seed):
            steps = sorted(growth(bad, good)[2].items(), key=lambda row: row[1] or math.inf)
            print(f"  seed {seed}, {bad['method']} at {bad['lr']:g} over {words}: "
                  + ", ".join(f"{kind} {step or 'never'}" for kind, step in steps))
    return {words: ratios for words, (ratios, _, _) in each.items()}


def plot_heat(sweep, table, path):
    """Loss at the end by method and rate, mean of the seeds; grey: diverged in some seed; a bar at
    the edge.
    """
    import numpy as np
    from matplotlib.figure import Figure
    run, rates = sweep.run, sorted(sweep.run.lr)
    seeds = range(run.seed, run.seed + run.seeds)
    values = np.full((len(run.methods), len(rates)), np.nan)
    figure = Figure(figsize=(1.6 + 0.95 * len(rates), 1.6 + 0.42 * len(run.methods)),
                    layout="constrained")
    axis = figure.subplots()
    for i, method in enumerate(run.methods):
        for j, lr in enumerate(rates):
            cells = [c for s in seeds if (c := sweep.cells.get((method, lr, s)))]
            bad = sum(bool(c["diverged"]) for c in cells)
            fine = [c["loss"] for c in cells if not c["diverged"]]
            if cells and not bad:
                values[i, j] = sum(fine) / len(fine)
            text = "" if not cells else f"{values[i, j]:.2f}" if not bad else \
                f"diverged\n{bad} of {len(cells)}"
            axis.text(j, i, text, ha="center", va="center", fontsize=7 if bad else 9)
        middle, _ = log_mean(table[method]["edges"])
        if middle is not None and len(rates) > 1:
            place = np.interp(math.log(middle), [math.log(lr) for lr in rates], range(len(rates)))
            axis.plot([place, place], [i - 0.42, i + 0.42], color="#c44e52", linewidth=3)
    edges = {m: e for m, row in table.items() if (e := log_mean(row["edges"])[0])}
    best, worst = (f(edges, key=edges.get, default=None) for f in (max, min))
    axis.set_facecolor("#dddddd")
    image = axis.imshow(values, aspect="auto", cmap="viridis_r", alpha=0.75)
    figure.colorbar(image, ax=axis, label="loss at the end [nats a token]")
    axis.set(xticks=range(len(rates)), xticklabels=[f"{lr:g}" for lr in rates],
             yticks=range(len(run.methods)), yticklabels=run.methods, xlabel="learning rate",
             title=f"The highest rate that converges (red): {best} {edges[best]:.2g}, {worst} "
                   f"{edges[worst]:.2g}" if edges else "Loss by method and rate")
    figure.savefig(path, dpi=120)


def plot_curves(found, path):
    """Above: validation losses of a diverging run and of those beside it; below: output norms of
    each linear, and the largest logit.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter
    bad = found[0][1]
    runs = [(bad, "#c44e52")] + [(good, color) for (_, _, good), color
                                 in zip(found, ("#4c72b0", "#dd8452", "#55a868"))]
    kinds = [k for k in bad["norms"][0] if k != "step"]
    rows = -(-len(kinds) // 3)
    figure = Figure(figsize=(10, 2.6 + 1.8 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, 3, height_ratios=[1.3] + [1] * rows)
    above = figure.add_subplot(grid[0, :])
    for cell, color in runs:
        above.plot(*zip(*cell["evals"]), color=color,
                   label=f"{cell['method']}, rate {cell['lr']:g}" + ": diverges" * (cell is bad))
    above.set(ylabel="validation loss\n[nats a token]", xlabel="step",
              title=f"{bad['method']} at {bad['lr']:g} loses what it has learned")
    above.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    above.grid(alpha=0.3)
    for place, kind in enumerate(kinds):
        axis = figure.add_subplot(grid[1 + place // 3, place % 3])
        value = lambda row: row[kind] if kind == "logit" else row[kind]["output"]
        for cell, color in runs:
            axis.plot([row["step"] for row in cell["norms"]], [value(row) for row in cell["norms"]],
                      color=color)
        axis.set(yscale="log", xlabel="step")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title("largest attention logit" if kind == "logit" else f"output of {kind}, L2",
                       fontsize=9)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def report(sweep, path):
    """Tables, plots, and the last line's values."""
    run, table = sweep.run, summary(sweep)
    print_table(sweep, table)
    for line in compare_order(table, run.resolution):
        print(f"order        {line}")
    cells, share = [c for c in sweep.cells.values() if c["ms"] and c["probe_ms"]], None
    if cells:
        step, probed = (mean_and_deviation([c[k] for c in cells])[0] for k in ("ms", "probe_ms"))
        share = (probed / step - 1) / run.probe_every
        print(f"probe        {probed - step:+.1f} ms in one of {run.probe_every} steps of "
              f"{step:.1f} ms: {share:.1%} of the time")
    seeds, result = range(run.seed, run.seed + run.seeds), {}
    (path / "norms.png").unlink(missing_ok=True)        # of what this folder held before
    found = next(filter(None, (comparisons(sweep, seed) for seed in seeds)), [])
    if found:
        result = dict(growth=print_growth(sweep, found))
        plot_curves(found, path / "norms.png")
    plot_heat(sweep, table, path / "sweep.png")
    print(f"plots        {path / 'sweep.png'}" + (f", {path / 'norms.png'}" if found else ""))
    losses = {}
    for method in run.methods:
        rates = sorted({lr for s in seeds for lr in sweep.verdicts(method, s)})
        losses[method] = {}
        for lr in rates:
            done = [c for s in seeds if (c := sweep.cells.get((method, lr, s)))]
            losses[method][f"{lr:g}"] = "diverged" if any(c["diverged"] for c in done) else \
                sum(c["loss"] for c in done) / len(done)
    return dict(table=losses, max_lr={m: log_mean(row["edges"])[0] for m, row in table.items()},
                lower_bounds=[m for m, row in table.items() if row["open"]],
                ratio_to_qk_norm={rule: {m: log_mean(row["ratios"][rule])[0]
                                         for m, row in table.items()} for rule in RULES},
                **result, probe_share=share, cells=len(sweep.cells), out=run.out)


# ------------------------------------------------------------------------------------------------
# python stability.py

TOY = dict(pattern="*-*-*-*-", vocab_size=512, d_model=128, mlp_dim=512, n_heads=4, n_kv_heads=4,
           head_dim=32, mamba_heads=8, mamba_head_dim=32, n_groups=2, d_state=16, chunk_size=64,
           rope_theta=1e4)
PAPER_SIZE = dict(pattern="*-" * 24, vocab_size=256000, d_model=1024, mlp_dim=4096, n_heads=16,
                  n_kv_heads=16, head_dim=64, mamba_heads=32, mamba_head_dim=64, n_groups=8,
                  d_state=128, chunk_size=128, rope_theta=1e4)
AS_HYBRID = {       # of about as many parameters, and attention without positions
    "toy": dict(TOY, pattern="M-M*-M-", rope_theta=None),
    "stability-830m": dict(PAPER_SIZE, rope_theta=None,
                           pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-"),
}
TOY_RUN = dict(steps=210, batch_size=8, grad_accum=1, seq_len=64, warmup=0.5,
               lr=(0.01, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6))
PRESETS = {     # name -> (configuration, what of the run it sets)
    "toy": (TOY, dict(TOY_RUN, seeds=1, resolution=1.5, methods=(
        "baseline", "qk_norm", "qkv_norm", "qk_norm_cap"))),
    "toy-full": (TOY, dict(TOY_RUN, seeds=3, resolution=1.2, methods=METHODS)),
    "stability-830m": (PAPER_SIZE, dict(
        steps=1000, batch_size=512, grad_accum=64, seq_len=4096, warmup=0.1, seeds=1,
        resolution=1.0, methods=METHODS, lr=(3e-4, 6e-3, 8e-3, 20e-3, 40e-3, 60e-3, 80e-3))),
}
PRESETS |= {name + "-hybrid": (AS_HYBRID[name.removesuffix("-full")], settings)
            for name, (_, settings) in list(PRESETS.items())}


@dataclasses.dataclass
class Run:
    """How high a learning rate each method of normalising survives, and what grows when it does
    not. Goes on in --out where it stopped.
    """

    preset: str = "toy"             # toy, toy-full, stability-830m, or one of them with -hybrid
    methods: str | None = dataclasses.field(default=None, metadata=dict(
        nargs="+"))                 # names, as in the header of this file; by default the preset's
    lr: float | None = dataclasses.field(default=None, metadata=dict(
        nargs="+"))                 # rates, tried in rising order; by default the preset's
    resolution: float | None = None     # to this factor the edge is bisected, 1 = not at all; by
                                        # default the preset's, as of all flags without one here
    seeds: int | None = None        # how many, from --seed on
    seed: int = 0                   # of initialisation and data order
    pattern: str = ""               # another layer pattern than the preset's
    norm: str = "layernorm"         # layernorm or rmsnorm, of what the methods add
    steps: int | None = None        # of a cell: one method, one rate, one seed
    batch_size: int | None = None   # sequences a step, over all accumulation steps
    grad_accum: int | None = None   # backward passes a step
    seq_len: int | None = None      # tokens a sequence
    warmup: float | None = None     # fraction of steps; the rate is constant after it
    weight_decay: float = 0.1       # on matrices
    clip: float = 1.0               # largest gradient norm
    ratio: float = 1.05             # diverged: validation loss above its best times this
    patience: int = 3               # diverged: that, for so many evaluations in a row
    eval_every: int = 15            # steps between evaluations
    eval_tokens: int = 4096         # tokens of an evaluation; four times as many at the end
    eval_rows: int = 32             # sequences at once in evaluation
    probe_every: int = 15           # steps between probes
    recipe: str = "bf16"            # FP8 recipe, as in training; bf16: none
    recompute: bool = False         # activation checkpointing, as in training
    data: str = "stdlib"            # text to train on, as in training
    tokenizer: str = "bpe"          # bpe, bytes, a file or a name, as in training
    device: str = "auto"            # auto, cuda, mps or cpu
    compute_dtype: str = "auto"     # auto (float32 on a CPU, bfloat16 on a GPU), or one of them
    workers: int = 0                # processes; 0 = one a core, or a GPU
    list: bool = False              # sizes and cost of the preset, nothing is trained
    out: str = "out/stability"      # folder of the cells and plots
    resume: bool = False            # go on in --out, and fail if there is nothing
    overwrite: bool = False         # start anew in --out even if it holds another sweep

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"--preset is {self.preset!r}, must be one of {', '.join(PRESETS)}")
        for name, value in PRESETS[self.preset][1].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"--methods has {method!r}, must be of {', '.join(METHODS)}")
        self.methods = [m for m in METHODS if m in self.methods]
        self.lr = sorted(set(self.lr))
        for lr in self.lr:
            if not 0 < lr < math.inf:
                raise ValueError(f"--lr has {lr}, must be positive")
        for name in ("seeds", "steps", "patience", "eval_every", "eval_tokens", "eval_rows",
                     "probe_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, must be at "
                                 "least 1")
        if not 1 <= self.resolution < math.inf or not 1 < self.ratio < math.inf:
            raise ValueError(f"--resolution is {self.resolution}, must be at least 1, --ratio is "
                             f"{self.ratio}, must be above 1")
        if self.workers < 0:
            raise ValueError(f"--workers is {self.workers}, must be at least 0")
        if self.recipe not in RECIPES:
            raise ValueError(f"--recipe is {self.recipe!r}, must be one of {', '.join(RECIPES)}")
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on, --overwrite starts anew: give one of them")
        self.training(self.lr[0], self.seed)        # for its checks

    def training(self, lr, seed):
        """The run of train_fp8 that a cell is."""
        return train_fp8.Run(
            data=self.data, tokenizer=self.tokenizer, recipe=self.recipe, steps=self.steps,
            batch_size=self.batch_size, grad_accum=self.grad_accum, seq_len=self.seq_len, lr=lr,
            warmup=self.warmup, decay=0.0, weight_decay=self.weight_decay, clip=self.clip,
            seed=seed)

    def config(self, vocab_size=None):
        """The preset's HybridConfig, with --pattern and the tokenizer's entries."""
        values = dict(PRESETS[self.preset][0])
        if self.pattern:
            values["pattern"] = self.pattern
        return HybridConfig(**{**values, "vocab_size": vocab_size or values["vocab_size"]})


SETTINGS = ("pattern", "norm", "steps", "batch_size", "grad_accum", "seq_len", "warmup",
            "weight_decay", "clip", "ratio", "patience", "eval_every", "eval_tokens", "eval_rows",
            "probe_every", "recipe", "data", "tokenizer")   # what a cell's losses depend on


def announce(run, config, cells):
    """What is about to happen, in numbers."""
    tokens = run.batch_size * run.seq_len
    flops = 3 * sum(config.flops_by_part(run.seq_len).values()) * tokens * run.steps
    print(f"model        {config.pattern}: {config.n_params() / 1e6:.2f} M parameters, d_model "
          f"{config.d_model}, vocabulary {config.vocab_size}")
    print(f"sweep        {len(run.methods)} methods x {run.seeds} seeds, rates "
          f"{', '.join(f'{lr:g}' for lr in run.lr)}, edges to a factor of {run.resolution:g}: at "
          f"most {cells} cells")
    print(f"a cell       {run.steps} steps of {tokens} tokens, {flops / 1e12:.3g} TFLOP")


def show_list(run):
    """--list: sizes and cost, on the meta device."""
    config = run.config()
    cells = Sweep(dataclasses.replace(run, overwrite=True, resume=False), {}).most()
    announce(run, config, cells)
    with torch.device("meta"):
        model = HybridLM(config)
        sizes = {m: sum(p.numel() for p in apply_method(HybridLM(config), m, run.norm).parameters())
                 for m in run.methods if m not in ATTEND or "*" in config.pattern}
    n = sum(p.numel() for p in model.parameters())
    print(f"parameters   {n:,}; " + ", ".join(f"{m} {size - n:+,}" for m, size in sizes.items()))
    print(f"memory       {16 * n / 2 ** 30:.2f} GiB of weights, gradients and moments in fp32")
    return dict(n_params=n, cells=cells, added={m: size - n for m, size in sizes.items()})


def body(run):
    if run.list:
        return show_list(run)
    device = pick_device(run.device)
    dtype = pick_dtype(run.compute_dtype, device)
    with torch.device("meta"):          # what a cell would refuse is refused before there is one
        convert_to_fp8(HybridLM(run.config()), run.recipe, "emulated", verbose=False)
        for method in run.methods:
            apply_method(HybridLM(run.config()), method, run.norm)
    text = load_data(run.data, run.tokenizer, run.config().vocab_size)
    make_batches(run.training(run.lr[0], run.seed), text)
    config = run.config(text.vocab_size)
    settings = {name: getattr(run, name) for name in SETTINGS}
    settings |= dict(config=dataclasses.asdict(config), dtype=str(dtype)[6:],
                     text=text.fingerprint)
    hold_folder(run.out)
    sweep = Sweep(run, settings, unigram_loss(text, run.eval_tokens))
    count = dict(cuda=torch.cuda.device_count(), cpu=os.cpu_count()).get(device, 1)
    workers = min(run.workers or count, max(sweep.most(), 1))
    sweep.run = dataclasses.replace(run, workers=workers)
    announce(run, config, sweep.most())
    print(f"processes    {workers} on {device}, {str(dtype)[6:]}; {len(sweep.cells)} cells are "
          "done")
    check_memory(dataclasses.replace(run.training(run.lr[0], run.seed), recompute=run.recompute),
                 config, dtype, device, workers)
    sweep.begin()
    if sweep.most():
        sweep_cells(sweep, config, text, device, dtype)
    return report(sweep, pathlib.Path(run.out))


def main(argv=None):
    run_script(body, parse_flags(Run, argv))


if __name__ == "__main__":
    main()
