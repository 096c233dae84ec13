"""Compression: cut a trained hybrid to a memory budget, then let the original teach it back.

The 12B became the 9B because 128k tokens did not fit an A10G; the 56B became the 47B for 1M tokens
in 31.7 GiB. Both in four steps: measure what matters (forward passes only), enumerate what fits
the memory, cut a few candidates and train each a little, then distil the best one.

Importance. Of activations: mean of |.| over a sequence, L2 over sequences (Minitron).
    embedding channels      outputs of all pre-norms, summed over layers       Nano 2, ModelOpt
    MLP neurons             input of down_proj                                 ModelOpt
    attention heads         what a head adds to the residual: input of o_proj times its columns'
                            norms; ranked inside the group of a KV head        Minitron
    Mamba channels          the x part of in_proj's output, L2 over heads: one set for all heads
    Mamba heads             the same, L2 over the channels kept; ranked inside the group whose B and
                            C a head reads, as many in each                    Minitron-SSM
    layers      logits      MSE of the logits without it, removed one by one   Nano 2
                hidden      MSE before the head without it                     MiniPuzzle
                cosine      1 - cosine of its input and output                 Minitron
B, C, the state and the groups are never cut: a head that changed its group would read another B.

The cut is exact where it can be. A norm divides by a mean over channels, so cutting dead channels
would change what the others become. With k = d_inner / d_inner' the weights of the gated norms are
scaled by sqrt(k), the epsilon of all norms by k, the stream by sqrt(k d' / d) and the weights of
its norms by sqrt(d / d'): then cutting what is dead changes nothing. (ModelOpt leaves that to the
training after it.) Widths are one number for all layers, as in the released models.

Distillation: forward KL of the logits, KL(teacher || student), T = 1, no cross-entropy. Logits are
made and forgotten block by block of tokens (`kd_loss`): 8192 x 131072 of them in fp32 would be
4 GiB each. It is `train_fp8.train` that trains, with another loss: its resume, its FP8 recipes, its
processes. Under torchrun the student is sharded and the teacher whole on every GPU.

MiniPuzzle: scores of single layers, a choice of layer counts and MLP width by an integer program
(scipy's milp) under the memory budget. One-layer scores know nothing of each other: published
experience is that Minitron's iterative removal is better at equal size.

Sources: Nano 2, arXiv 2508.14444, section 4; Nemotron-H, arXiv 2504.03624, section 3; Minitron-SSM,
arXiv 2504.11409; Minitron, arXiv 2407.14679 and 2408.11796.

Glossary: as in model.py. teacher: the model that is cut; student: what is left of it; candidate: a
configuration that fits; recovery: share of the loss that pruning cost that training has won back.

Left out: alignment stages (DPO, GRPO), NAS over single layers' widths, cutting attention heads in
the search (scored and cut on request; the papers keep them), distillation from stored logits, a
teacher too large for one GPU.

    python prune_distill.py                     out/base -> out/compressed, 4 min on 2 cores
    python prune_distill.py --list --preset nemotron-nano-12b-v2 --memory-gib 19.66 --context 131072
    python prune_distill.py --list --preset nemotron-h-56b --memory-gib 31.7 --context 1000000 \
        --weight-bits 4 --kv-bits 8
    python prune_distill.py --ablate --out out/ablation     importance, width or depth, KD or not
    python prune_distill.py --merge A B --alpha 0.5 --out C     mean of two checkpoints
"""

import collections
import copy
import dataclasses
import itertools
import json
import math
import pathlib
import time
import weakref

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from tqdm import tqdm

import train_fp8
from data import Batches, load_data, parse_flags, read_rows, run_script
from infer import (GIB, Measured, int8_bytes, load_run, loading_bytes, model_fingerprint,
                   pick_device, pick_dtype, workspace_bytes)
from model import (HybridConfig, HybridLM, layer_state, read_json, save_hf, set_parameter,
                   tune_cpu, write_json, write_text)
from ssm import accumulator
from train_fp8 import (RECIPES, check_memory, convert_to_fp8, evaluate, from_first, gathered,
                       make_batches, make_optimizer, rank_and_size, shard, start_processes,
                       train_step, wsd)

# ------------------------------------------------------------------------------------------------
# Importance, from forward passes


@dataclasses.dataclass
class Scores:
    """What a forward pass says of each part; larger matters more. Layers by their number.

    channels (d,); neurons {i: (f,)}; mamba {i: (h, p)}; heads {i: (n_heads,)}. fp32.
    """
    channels: torch.Tensor
    neurons: dict
    mamba: dict
    heads: dict

    def map(self, f):
        """The same with f of each tensor."""
        every = lambda scores: {i: f(m) for i, m in scores.items()}
        return Scores(f(self.channels), every(self.neurons), every(self.mamba), every(self.heads))


@torch.no_grad()
def importance(model, batches):
    """Scores of a model on batches of tokens, an iterable of int64 (b, t); a row is a sample.

    Hooks see what layers compute anyway: no gradient, one pass.
    """
    sums, hooks, config = collections.defaultdict(float), [], model.config

    def add(key, m):                                        # (b, t, n)
        sums[key] += m.float().abs().mean(1).square().sum(0)
    watch = lambda module, key, part=slice(None): hooks.append(module.register_forward_hook(
        lambda _, inputs, out: add(key, out[..., part])))
    watch_input = lambda module, key: hooks.append(module.register_forward_hook(
        lambda _, inputs, out: add(key, inputs[0])))
    for i, block in enumerate(model.backbone.layers):
        watch(block.norm, ("norm", i))
        if block.letter == "M":
            watch(block.mixer.in_proj, ("M", i), slice(config.d_inner, 2 * config.d_inner))
        else:
            mixer = block.mixer
            watch_input(mixer.o_proj if block.letter == "*" else mixer.down_proj, (block.letter, i))
    try:
        for tokens in batches:
            model.hidden(tokens.to(model.backbone.embeddings.weight.device))
    finally:
        for hook in hooks:
            hook.remove()

    value = {key: m.sqrt() for key, m in sums.items()}
    layers = lambda letter: [i for i, c in enumerate(config.pattern) if c == letter]
    columns = lambda i: model.backbone.layers[i].mixer.o_proj.weight.float().norm(dim=0)
    by_head = lambda m: m.unflatten(0, (config.n_heads, -1)).norm(dim=1)
    return Scores(sum(value["norm", i] for i in range(len(config.pattern))),
                  {i: value["-", i] for i in layers("-")},
                  {i: value["M", i].unflatten(0, (config.mamba_heads, -1)) for i in layers("M")},
                  {i: by_head(value["*", i] * columns(i)) for i in layers("*")})


def without(model, tokens, layers):
    """The stream after the final norm (b, t, d) with only these layers, in order."""
    x = model.embed(tokens)
    for i in layers:
        block = model.backbone.layers[i]
        x = block(x, **layer_state(block.letter, i, None, None, None))
    return model.backbone.norm_f(x)


@torch.no_grad()
def layer_costs(model, batches, layers, metric="logits"):
    """{layer: cost of removing it} for each of `layers`, with only these in the model.

    logits, hidden: MSE against the whole model's, of the logits or before the head. cosine: 1 -
    cosine of the layer's input and output, in the model as it is.
    """
    if metric not in ("logits", "hidden", "cosine"):
        raise ValueError(f"--layer-metric is {metric!r}, must be logits, hidden or cosine")
    cost = dict.fromkeys(layers, 0.0)
    everything, w = range(len(model.config.pattern)), model.lm_head.weight.float()
    gram = w.t() @ w / len(w) if metric == "logits" else None   # of logits: |W dh|^2 = dh W^T W dh
    for tokens in batches:
        if metric == "cosine":
            x = model.embed(tokens)
            for i in layers:
                block, before = model.backbone.layers[i], x.float()
                x = block(x, **layer_state(block.letter, i, None, None, None))
                cost[i] += 1 - float(torch.cosine_similarity(before, x.float(), dim=-1).mean())
            continue
        truth = without(model, tokens, everything).float()
        for i in layers:
            difference = without(model, tokens, [j for j in layers if j != i]).float() - truth
            other = difference / difference.shape[-1] if gram is None else difference @ gram
            cost[i] += float((difference * other).sum(-1).mean())
    return cost


def choose_layers(model, batches, counts, metric="logits", worst=False):
    """Layers to keep, in order, and [(layer removed, its cost)]: counts {letter: how many}.

    One at a time, the cheapest of a letter that still has too many; costs are measured anew after
    each removal (Nano 2), or for cosine and hidden once (Minitron, MiniPuzzle). worst: the dearest.
    """
    pattern, log = model.config.pattern, []
    layers, cost = list(range(len(pattern))), None
    for letter, n in counts.items():
        if not 0 <= n <= pattern.count(letter):
            raise ValueError(f"{n} layers {letter} asked for, the teacher has "
                             f"{pattern.count(letter)}")
    while True:
        have = collections.Counter(pattern[i] for i in layers)
        free = [i for i in layers if have[pattern[i]] > counts.get(pattern[i], have[pattern[i]])]
        if not free:
            return layers, log
        if cost is None or metric == "logits":
            cost = layer_costs(model, batches, layers, metric)
        gone = (max if worst else min)(free, key=cost.get)
        log.append((gone, cost[gone]))
        layers.remove(gone)


# ------------------------------------------------------------------------------------------------
# The cut


@dataclasses.dataclass
class Keep:
    """What stays, as sorted indices into the teacher. Layers are the teacher's numbers.

    layers (list); channels (d',) of the residual stream; neurons {layer: (f',)}; mamba_heads
    {layer: (h',)}, as many in each group; mamba_channels {layer: (p',)}, shared by the heads; heads
    {layer: (n_heads',)}, as many for each KV head.
    """
    layers: list
    channels: torch.Tensor
    neurons: dict
    mamba_heads: dict
    mamba_channels: dict
    heads: dict

    def config(self, old):
        """The configuration of what is left. Raises ValueError where layers differ."""
        width = lambda name, default: one_width(name, getattr(self, name), default)
        new = dataclasses.replace(
            old, pattern="".join(old.pattern[i] for i in self.layers), d_model=len(self.channels),
            mlp_dim=width("neurons", old.mlp_dim), n_heads=width("heads", old.n_heads),
            mamba_heads=width("mamba_heads", old.mamba_heads),
            mamba_head_dim=width("mamba_channels", old.mamba_head_dim))
        return dataclasses.replace(new, norm_eps=old.norm_eps * (old.d_inner / new.d_inner))


def one_width(name, kept, default):
    widths = {len(m) for m in kept.values()}
    if len(widths) > 1:
        raise ValueError(f"{name} kept differ from layer to layer ({sorted(widths)}): a model has "
                         "one width")
    return widths.pop() if widths else default


def best(score, n, worst=False):
    """Indices of the n largest (worst: smallest), sorted; equal ones in order."""
    return score.argsort(descending=not worst, stable=True)[:n].sort().values


def best_in_groups(score, groups, n, worst=False):
    """Indices of the n largest in all, as many from each of the groups of neighbours."""
    each = score.unflatten(0, (groups, -1))
    return torch.cat([best(one, n // groups, worst) + i * len(one) for i, one in enumerate(each)])


def keep_best(scores, old, new, layers, worst=False):
    """The Keep that turns a model of configuration `old` into one of `new`, of these layers.

    worst keeps the lowest scores, to compare with. Raises ValueError, naming the nearest, where a
    width is larger or does not divide.
    """
    for name in ("d_model", "mlp_dim", "mamba_heads", "mamba_head_dim", "n_heads"):
        if getattr(new, name) > getattr(old, name):
            raise ValueError(f"{name} {getattr(new, name)} is more than the teacher's "
                             f"{getattr(old, name)}")
    for name, groups in (("mamba_heads", old.n_groups), ("n_heads", old.n_kv_heads)):
        n = getattr(new, name)
        if n % groups:
            raise ValueError(f"{name} {n} cannot be shared by {groups} groups: the nearest are "
                             f"{n // groups * groups} and {(n // groups + 1) * groups}")
    of = lambda letter: [i for i in layers if old.pattern[i] == letter]
    channels = {i: best(scores.mamba[i].norm(dim=0), new.mamba_head_dim, worst) for i in of("M")}
    mamba = {i: best_in_groups(scores.mamba[i][:, channels[i]].norm(dim=1), old.n_groups,
                               new.mamba_heads, worst) for i in of("M")}
    return Keep(layers, best(scores.channels, new.d_model, worst),
                {i: best(scores.neurons[i], new.mlp_dim, worst) for i in of("-")}, mamba, channels,
                {i: best_in_groups(scores.heads[i], old.n_kv_heads, new.n_heads, worst)
                 for i in of("*")})


def cut_layer(letter, mixer, i, keep, old):
    """{name: tensor} of layer i's mixer: every tensor that the choice touches, sliced."""
    c, w = keep.channels, {name: p.detach() for name, p in mixer.named_parameters()}
    if letter == "-":
        n = keep.neurons[i]
        return {"up_proj.weight": w["up_proj.weight"][n][:, c],
                "down_proj.weight": w["down_proj.weight"][c][:, n]}
    if letter == "*":
        wide = (keep.heads[i][:, None] * old.head_dim
                + torch.arange(old.head_dim, device=c.device)).flatten()
        return {"q_proj.weight": w["q_proj.weight"][wide][:, c],
                "k_proj.weight": w["k_proj.weight"][:, c],
                "v_proj.weight": w["v_proj.weight"][:, c],
                "o_proj.weight": w["o_proj.weight"][c][:, wide]}

    # x, z and all that follows them by head and channel; B and C whole; dt, A, D by head
    heads, di, bc = keep.mamba_heads[i], old.d_inner, 2 * old.n_groups * old.d_state
    wide = (heads[:, None] * old.mamba_head_dim + keep.mamba_channels[i]).flatten()
    shared = torch.arange(bc, device=c.device)
    rows = torch.cat([wide, di + wide, 2 * di + shared, 2 * di + bc + heads])
    conv = torch.cat([wide, di + shared])
    return {"in_proj.weight": w["in_proj.weight"][rows][:, c],
            "conv1d.weight": w["conv1d.weight"][conv], "conv1d.bias": w["conv1d.bias"][conv],
            "A_log": w["A_log"][heads], "D": w["D"][heads], "dt_bias": w["dt_bias"][heads],
            "norm.weight": w["norm.weight"][wide] * math.sqrt(di / len(wide)),
            "out_proj.weight": w["out_proj.weight"][c][:, wide]}


@torch.no_grad()
def prune(model, keep):
    """A new, smaller HybridLM that keeps what `keep` says; the old one stays as it is.

    Norms and the stream are scaled as the header says: cutting dead weight changes nothing, keeping
    everything gives the same bits.
    """
    old = model.config
    config = keep.config(old)
    with torch.device("meta"):
        student = HybridLM(config, model.compute_dtype)
    c, fewer = keep.channels, old.d_model / config.d_model
    norm, scale = math.sqrt(fewer), math.sqrt(old.d_inner / config.d_inner / fewer)
    backbone = model.backbone
    tensors = {"backbone.embeddings.weight": backbone.embeddings.weight[:, c] * scale,
               "backbone.norm_f.weight": backbone.norm_f.weight[c] * norm,
               "lm_head.weight": model.lm_head.weight[:, c].clone()}
    for new, i in enumerate(keep.layers):
        block, prefix = backbone.layers[i], f"backbone.layers.{new}."
        tensors[prefix + "norm.weight"] = block.norm.weight[c] * norm
        for name, m in cut_layer(block.letter, block.mixer, i, keep, old).items():
            back = name in ("out_proj.weight", "o_proj.weight", "down_proj.weight")
            tensors[f"{prefix}mixer.{name}"] = m * scale if back else m
    for name, p in list(student.named_parameters()):
        if tensors[name].shape != p.shape:
            raise AssertionError(f"{name} was cut to {tuple(tensors[name].shape)}, the "
                                 f"configuration says {tuple(p.shape)}")
        set_parameter(student, name, tensors[name])
    return student.train(model.training)


# ------------------------------------------------------------------------------------------------
# Distillation


class _KLDivergence(torch.autograd.Function):
    """Mean KL(teacher || student) over tokens, in blocks: no model's (tokens, v) logits ever exist.

    d KL / d student logits = softmax(student) - softmax(teacher): the gradients are made with the
    block's logits, as in model.cross_entropy.
    """

    @staticmethod
    def forward(ctx, h, weight, teacher_h, teacher_weight, block, want_grad):
        fine = accumulator(h)
        dh = torch.empty_like(h) if want_grad else None
        dweight = torch.zeros_like(weight, dtype=fine) if want_grad else None
        w, v = weight.to(h.dtype), teacher_weight.to(teacher_h.dtype)
        total = h.new_zeros((), dtype=fine)
        for i in range(0, len(h), block):
            rows = h[i:i + block]
            log_q = (rows @ w.t()).to(fine)
            log_q -= log_q.logsumexp(-1, keepdim=True)
            log_p = (teacher_h[i:i + block] @ v.t()).to(fine)
            log_p -= log_p.logsumexp(-1, keepdim=True)
            p = log_p.exp()
            total += (log_p.sub_(log_q).mul_(p)).sum()
            if want_grad:
                d = log_q.exp_().sub_(p).div_(len(h)).to(h.dtype)
                dh[i:i + block] = d @ w
                dweight.addmm_(d.t(), rows) if fine == h.dtype else dweight.add_(d.t() @ rows)
        ctx.save_for_backward(dh, dweight)
        ctx.dtype = weight.dtype
        return total / len(h)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dh, dweight = ctx.saved_tensors         # nobody else's: scaled where they are
        return dh.mul_(g), dweight.mul_(g).to(ctx.dtype), None, None, None, None


def kd_loss(h, weight, teacher_h, teacher_weight, block=256):
    """Mean over tokens of KL(teacher || student) in nats, temperature 1: h (tokens, d), weight (v,
    d), the teacher's (tokens, d_t) and (v, d_t). Gradients to h and weight.
    """
    want_grad = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return _KLDivergence.apply(h, weight, teacher_h.detach(), teacher_weight.detach(), block,
                               want_grad)


def teach(student, teacher, block=256):
    """From now on student.loss(tokens, labels) in training is the KL to the teacher; where no
    gradient is recorded, as in evaluation, it is the student's own cross-entropy. Returns student.
    """
    teacher.eval()
    me = weakref.proxy(student)         # a model that held itself would outlive its last name

    def loss(tokens, labels, seq_idx=None):
        if not torch.is_grad_enabled():
            return HybridLM.loss(me, tokens, labels, seq_idx)
        with torch.no_grad():
            truth = teacher.hidden(tokens, seq_idx=seq_idx).flatten(0, 1)
        h = me.hidden(tokens, seq_idx=seq_idx).flatten(0, 1)
        return kd_loss(h, me.lm_head.weight, truth, teacher.lm_head.weight, block)
    student.loss = loss
    return student


def distill(teacher, student, run, token_data, steps=None, progress=None):
    """Train a student from a teacher (None: by plain cross-entropy) for `steps`, nothing saved.
    Returns the losses. run: a train_fp8.Run. For the saved, resumable way see `body`.
    """
    steps = steps or run.steps
    if teacher is not None:
        teach(student, teacher)
    if rank_and_size()[1] > 1:
        shard(student)
    optimizer = make_optimizer(student, run.lr, run.weight_decay)
    batches, losses = make_batches(run, token_data), []
    device = student.lm_head.weight.device
    for step in tqdm(range(steps), progress, leave=False, disable=None if progress else True):
        lr = wsd(step, steps, run.lr, run.warmup, run.decay, run.min_lr)
        losses.append(train_step(student, optimizer, batches, run, lr, device)[0])
    return losses


def merge(a, b, alpha):
    """A model whose parameters are (1 - alpha) a + alpha b: two of one configuration (Nano 2 merges
    two at 0.5). Raises ValueError for two configurations.
    """
    if a.config != b.config:
        different = [f.name for f in dataclasses.fields(a.config)
                     if getattr(a.config, f.name) != getattr(b.config, f.name)]
        raise ValueError(f"two models of different {', '.join(different)} cannot be merged")
    if not 0 <= alpha <= 1:
        raise ValueError(f"--alpha is {alpha}, must be from 0 to 1")
    merged = copy.deepcopy(a)
    with torch.no_grad():
        for p, q in zip(merged.parameters(), b.parameters()):
            p.lerp_(q.to(p.dtype), alpha)
    return merged


# ------------------------------------------------------------------------------------------------
# Search: what fits


@dataclasses.dataclass(frozen=True)
class Request:
    """What the compressed model must fit: bytes, tokens, sequences, and how it is stored."""

    limit: int                      # bytes
    context: int = 131072           # tokens of each sequence
    batch: int = 1
    weight_bits: int = 16           # 16; 8 as infer.py's int8; 4: all weights alike
    kv_dtype: torch.dtype = torch.bfloat16
    state_dtype: torch.dtype = torch.float32
    workspace: int = 0              # bytes of temporaries, see `request_for`

    def needs(self, config):
        """Bytes of a configuration: the plan of infer.py, with the teacher's temporaries."""
        weights = {16: config.weight_bytes, 8: lambda: int8_bytes(config),
                   4: lambda: config.n_params() // 2}[self.weight_bits]()
        cache = sum(config.cache_bytes(self.batch, self.context, self.kv_dtype,
                                       self.state_dtype).values())
        loading = loading_bytes(config) - cache if self.weight_bits == 8 else 0
        logits = self.batch * config.vocab_size * 6 if self.workspace else 0    # bf16 and fp32
        return weights + cache + max(self.workspace, loading) + logits


@dataclasses.dataclass(frozen=True)
class Grid:
    """What the search tries: layer counts {letter: n}, and widths."""
    depths: tuple
    d_model: tuple
    mlp_dim: tuple
    mamba_heads: tuple

    def __iter__(self):
        return itertools.product(self.depths, self.d_model, self.mlp_dim, self.mamba_heads)

    def __len__(self):
        return math.prod(map(len, (self.depths, self.d_model, self.mlp_dim, self.mamba_heads)))


def grid_for(config):
    """The paper's grid for its two parents; for others a third off each width and a few layers."""
    counts = lambda m, a, f: {"M": m, "*": a, "-": f}
    shape = lambda one: (one.pattern, one.params_by_layer())
    is_preset = lambda name: shape(config) == shape(HybridConfig.preset(name))
    if is_preset("nemotron-nano-12b-v2"):   # Nano 2, section 4: 52 to 56 layers, 4 of attention
        depths = tuple(counts(m, 4, n - 4 - m) for n in (52, 54, 56)
                       for m in ((n - 4) // 2, (n - 4) // 2 + 1))
        return Grid((*depths, counts(28, 6, 28)), tuple(range(4480, 5121, 160)),
                    tuple(range(13440, 20481, 320)), (112, 120, 128))
    if is_preset("nemotron-h-56b"):         # Nemotron-H, section 3: widths as published
        depths = tuple(counts(m, a, f) for m in (45, 48, 51, 54) for a in (3, 4, 5, 6)
                       for f in (42, 45, 48, 51, 54))
        return Grid(depths, (8192,), tuple(range(24576, 32769, 1024)), (256,))
    have = collections.Counter(config.pattern)
    one_less = lambda letter: (have[letter], have[letter] - 1)[:max(min(have[letter], 2), 1)]
    depths = tuple(counts(m, have["*"], f) for m in one_less("M") for f in one_less("-"))
    down = lambda n, step: tuple(range(n, min(max(int(0.62 * n), step), n) - 1, -step))
    sixteens = lambda n, parts: max(n // parts // 16 * 16, 16)
    return Grid(depths, down(config.d_model, sixteens(config.d_model, 16)),
                down(config.mlp_dim, sixteens(config.mlp_dim, 8)),
                down(config.mamba_heads, config.n_groups))


def with_counts(config, counts, **widths):
    """A configuration with so many layers of each letter, the last ones of each left away: for
    bytes and parameters, which do not depend on which.
    """
    left, pattern = dict(counts), ""
    for letter in config.pattern:
        if left.get(letter, 0) > 0:
            pattern, left[letter] = pattern + letter, left[letter] - 1
    return dataclasses.replace(config, pattern=pattern, **widths)


def takes_fp8(config):
    """Whether `convert_to_fp8` accepts it: widths that 16 divides, more than the eight linears at
    the ends."""
    rows = {"M": (config.d_inner, config.d_inner + config.conv_dim + config.mamba_heads),
            "*": (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim),
            "-": (config.mlp_dim,)}
    widths = [config.d_model, *(n for letter in set(config.pattern) for n in rows[letter])]
    linears = sum(4 if letter == "*" else 2 for letter in config.pattern)
    return linears > 8 and not any(n % 16 for n in widths)


def search(config, request, grid, fp8=False):
    """[(bytes, counts, configuration)] of everything in the grid that fits, largest first; fp8:
    that can be trained in FP8. Raises ValueError, naming the smallest, if nothing does.
    """
    found, smallest = [], None
    for counts, d, f, heads in grid:
        one = with_counts(config, counts, d_model=d, mlp_dim=f, mamba_heads=heads)
        if fp8 and not takes_fp8(one):
            continue
        needed = request.needs(one)
        if smallest is None or needed < smallest[0]:
            smallest = needed, one
        if needed <= request.limit:
            found.append((needed, counts, one))
    if smallest is None:
        raise ValueError(f"none of {len(grid)} candidates can be trained in FP8, which wants "
                         "widths that 16 divides and more than 8 linears: --recipe bf16")
    if not found:
        raise ValueError(f"nothing fits {request.limit / GIB:.4g} GiB: the smallest of "
                         f"{len(grid)} candidates, {describe(smallest[1])}, needs "
                         f"{smallest[0] / GIB:.4g} GiB")
    return sorted(found, key=lambda row: -row[0])


def describe(config):
    return (f"{len(config.pattern)} layers, d_model {config.d_model}, MLP {config.mlp_dim}, "
            f"{config.mamba_heads} Mamba heads")


def minipuzzle(costs, width_costs, config, request):
    """(layers, MLP width) of the least cost that fits, by integer program (Nemotron-H, section 3).

    costs {layer: of removing it}, width_costs {MLP width: of cutting all MLPs to it}, both an MSE
    before the head. Costs add up, which is the assumption. Which layers stay is k_i, the width
    y_j; the bytes of an MLP are a product of the two, made linear by z_ij >= k_i + y_j - 1. Raises
    ValueError if nothing fits.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    layers, widths = list(costs), list(width_costs)
    mlps = [i for i in layers if config.pattern[i] == "-"]
    if not mlps:
        raise ValueError(f"MiniPuzzle chooses a width of the MLPs, and {config.pattern} has none: "
                         "--method minitron")
    place = {("k", i): n for n, i in enumerate(layers)}
    place |= {("y", j): len(place) + n for n, j in enumerate(widths)}
    pairs = itertools.product(mlps, widths)
    place |= {("z", i, j): len(place) + n for n, (i, j) in enumerate(pairs)}
    row = lambda values: np.array([values.get(name, 0.0) for name in place])

    # bytes of one layer of each letter and width, from the whole's own formula
    bytes_of = lambda pattern, f: request.needs(dataclasses.replace(config, pattern=pattern,
                                                                    mlp_dim=f))
    one = lambda letter, f=config.mlp_dim: bytes_of(letter * 2, f) - bytes_of(letter, f)
    rest = bytes_of("M", config.mlp_dim) - one("M") if "M" in config.pattern else \
        bytes_of("*", config.mlp_dim) - one("*")
    scale = (1 + 1e-5) / request.limit          # the solver may miss a bound by 1e-6 of it
    memory = {("k", i): one(config.pattern[i]) * scale for i in layers if i not in mlps}
    memory |= {("z", i, j): one("-", j) * scale for i in mlps for j in widths}
    constraints = [LinearConstraint(row(memory), -np.inf, 1 - rest * scale),
                   LinearConstraint(row({("y", j): 1.0 for j in widths}), 1, 1),
                   LinearConstraint(row({("k", i): 1.0 for i in layers}), 1, np.inf),
                   LinearConstraint(np.stack([row({("z", i, j): 1, ("k", i): -1, ("y", j): -1})
                                              for i in mlps for j in widths]), -1, np.inf)]
    cost = {("k", i): -c for i, c in costs.items()} | {("y", j): c for j, c in width_costs.items()}
    whole = np.array([float(name[0] != "z") for name in place])
    found = milp(row(cost), constraints=constraints, integrality=whole, bounds=Bounds(0, 1))
    if found.x is None:
        least = min(bytes_of(config.pattern[i], min(widths)) for i in layers)
        raise ValueError(f"no choice of layers and MLP width fits {request.limit / GIB:.4g} GiB: "
                         f"the smallest, of one layer, needs {least / GIB:.4g}")
    value = {name: round(found.x[n]) for name, n in place.items()}
    return ([i for i in layers if value["k", i]], next(j for j in widths if value["y", j]))


def request_for(run, config):
    """The Request of a run; a limit of 0 is --keep of what the teacher needs.

    Temporaries as infer.plan counts them, of the teacher's widths, so never too few; with 4-bit
    weights, which infer.py has not, none: the papers' budget of 31.7 GiB has none either.
    """
    kinds = {16: torch.bfloat16, 8: torch.float8_e4m3fn}
    if run.weight_bits not in (16, 8, 4) or run.kv_bits not in kinds:
        raise ValueError(f"--weight-bits is {run.weight_bits}, --kv-bits {run.kv_bits}: must be "
                         "16, 8 or 4, and 16 or 8")
    workspace, int8 = 0, run.weight_bits == 8
    if run.weight_bits != 4:
        block = max(min(1024, run.context // 32), 1)    # of the prompt, in prefill
        workspace = max(workspace_bytes(config, 1, run.context, run.batch, int8=int8),
                        workspace_bytes(config, block, run.context, int8=int8))
    request = Request(0, run.context, run.batch, run.weight_bits, kinds[run.kv_bits],
                      torch.float32 if run.kv_bits == 16 else torch.bfloat16, workspace)
    limit = run.memory_gib * GIB if run.memory_gib > 0 else run.keep * request.needs(config)
    return dataclasses.replace(request, limit=int(limit))


def show_list(run):
    """--list: everything in the grid that fits, without weights."""
    name = run.preset or "nemotron-nano-12b-v2"
    config = HybridConfig.preset(name)
    request, grid = request_for(run, config), grid_for(config)
    found = search(config, request, grid, run.recipe != "bf16")
    print(f"{name}, {request.needs(config) / GIB:.2f} GiB at {run.context} tokens x {run.batch}: "
          f"{len(found)} of {len(grid)} candidates fit {request.limit / GIB:.2f} GiB")
    full = dict(d_model=config.d_model, mlp_dim=config.mlp_dim, mamba_heads=config.mamba_heads)
    for counts in grid.depths:
        needed = request.needs(with_counts(config, counts, **full))
        if needed <= request.limit:
            print(f"at full width {counts} fits: {needed / GIB:.2f} GiB")
    if not any(all(getattr(c, k) == v for k, v in full.items()) for _, _, c in found):
        print("at full width no depth of the grid fits")
    print(f"{'GiB':>8s}{'params B':>10s}  layers M * -      d_model    MLP  Mamba heads")
    for needed, counts, c in found[:run.rows]:
        letters = " ".join(f"{counts[letter]:3d}" for letter in "M*-")
        print(f"{needed / GIB:8.3f}{c.n_params() / 1e9:10.3f}  {len(c.pattern):3d}  {letters}"
              f"{c.d_model:12d}{c.mlp_dim:7d}{c.mamba_heads:10d}")
    return dict(candidates=len(grid), fits=len(found), limit_bytes=request.limit, largest=[
        dict(bytes=n, params=c.n_params(), counts=counts, d_model=c.d_model, mlp_dim=c.mlp_dim,
             mamba_heads=c.mamba_heads) for n, counts, c in found[:run.rows]])


# ------------------------------------------------------------------------------------------------
# python prune_distill.py


@dataclasses.dataclass
class Run:
    """Cut a trained model to a memory budget and distil it from the original."""

    teacher: str = "out/base"       # run folder, or a Hugging Face folder with tokenizer.json
    data: str = "stdlib"            # text to calibrate on and to distil with, as in training
    memory_gib: float = 0.0         # budget of weights, caches, temporaries; 0 = by --keep
    keep: float = 0.72              # share of the teacher's bytes, when --memory-gib is 0
    context: int = 4096             # tokens that must fit, beside the weights
    batch: int = 1                  # sequences that must fit
    weight_bits: int = 16           # bits of a deployed weight: 16, 8, or 4 (without temporaries)
    kv_bits: int = 16               # bits of a cached value: 16, or 8 (then states in bf16)
    method: str = "minitron"        # minitron (search by width and depth) or minipuzzle
    layer_metric: str = "logits"    # what removing a layer costs: logits, hidden or cosine
    samples: int = 48               # rows of text that importance is measured on
    candidates: int = 3             # cuts that are distilled a little before one is chosen
    trial_steps: int = 12           # steps of that, for each of the candidates
    steps: int = 140                # optimizer steps of the distillation
    batch_size: int = 8             # sequences a step
    seq_len: int = 256              # tokens a sequence
    lr: float = 1.5e-3              # peak learning rate
    loss: str = "kd"                # kd (from the teacher) or ce (from the text)
    scratch: bool = True            # train the same shape from scratch, on as much of --data, too
    recipe: str = "bf16"            # FP8 recipe, as in training
    phases: str = ""                # JSON file of phases, as in training: sequence lengths, texts
    eval_tokens: int = 24576        # tokens from all over the validation text, for a loss
    eval_every: int = 35            # steps between evaluations: the recovery table
    save_every: int = 70            # steps between checkpoints
    seed: int = 0                   # of data order and of the model from scratch
    device: str = "auto"            # auto, cuda, mps or cpu
    compute_dtype: str = "auto"     # auto, float32 or bfloat16
    out: str = "out/compressed"     # run folder
    overwrite: bool = False         # start anew in --out even if it holds another run
    stop_after: int = 0  # leave off, resumable, after this many steps of this session; 0 = never
    list: bool = False              # what fits, for --preset, without weights
    preset: str = ""                # the model that --list is about; by default the 12B
    rows: int = 10                  # candidates that --list prints
    ablate: bool = False            # importance against random and worst, KD against the rest
    seeds: int = 3                  # how many, of --ablate
    merge: str = dataclasses.field(default="", metadata=dict(nargs=2))   # two folders to average
    alpha: float = 0.5              # share of the second in --merge

    def __post_init__(self):
        for name in ("samples", "candidates", "steps", "trial_steps", "batch_size", "seq_len",
                     "context", "batch", "eval_tokens", "rows", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, must be "
                                 "at least 1")
        for name, allowed in (("method", ("minitron", "minipuzzle")), ("loss", ("kd", "ce")),
                              ("layer_metric", ("logits", "hidden", "cosine"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)!r}, must be "
                                 f"one of {', '.join(allowed)}")
        if self.ablate and self.seeds < 2:
            raise ValueError(f"--seeds is {self.seeds}, must be at least 2: a mean needs a spread")
        if not 0 <= self.memory_gib < math.inf:
            raise ValueError(f"--memory-gib is {self.memory_gib}, must be positive and finite")
        if not 0 < self.keep <= 1:
            raise ValueError(f"--keep is {self.keep}, must be above 0 and at most 1")
        if self.recipe not in RECIPES:
            raise ValueError(f"--recipe is {self.recipe!r}, must be one of {', '.join(RECIPES)}")
        if not self.merge and pathlib.Path(self.out).resolve() == \
                pathlib.Path(self.teacher).resolve():
            raise ValueError(f"--out and --teacher are both {self.out}: the student would take its "
                             "teacher's place")

    def training(self):
        """The run of train_fp8 that distils."""
        return train_fp8.Run(
            data=self.data, recipe=self.recipe, phases=self.phases, steps=self.steps,
            batch_size=self.batch_size, seq_len=self.seq_len, lr=self.lr, warmup=0.05, decay=0.5,
            eval_every=self.eval_every, save_every=self.save_every, seed=self.seed,
            device=self.device, compute_dtype=self.compute_dtype, out=self.out,
            overwrite=self.overwrite, stop_after=self.stop_after)


def load_text(run, vocab_size):
    """(the teacher's tokenizer.json, --data in its tokens). Raises ValueError for others'."""
    tokenizer_json = (pathlib.Path(run.teacher) / "tokenizer.json").read_text(encoding="utf-8")
    token_data = load_data(run.data, "bpe", vocab_size, tokenizer_json)
    if token_data.tokenizer_json != tokenizer_json:
        raise ValueError(f"the tokens of --data {run.data} are not those of the teacher "
                         f"{run.teacher}: another tokenizer wrote them")
    return tokenizer_json, token_data


def calibration(run, token_data):
    """--samples rows of the training text, in batches, other ones than distillation begins with.
    Raises ValueError if there are fewer.
    """
    batches = Batches(token_data.train, min(8, run.samples), run.seq_len, run.seed + 1)
    if run.samples > batches.windows:
        raise ValueError(f"--samples is {run.samples}, the training text has {batches.windows} "
                         f"windows of {run.seq_len} tokens: fewer samples, or more text")
    rows = torch.cat([batches.next()[0] for _ in range(-(-run.samples // batches.batch_size))])
    return rows[:run.samples].split(8)


def measure(run, model, token_data):
    """Validation loss, nats a token, on --eval-tokens."""
    return evaluate(model, token_data.validation, run.batch_size, run.seq_len,
                    limit=run.eval_tokens, spread=True)


def compress(run, teacher, token_data):
    """Importance, search, short distillations: (keep, table of what was tried). Prints both."""
    config, request = teacher.config, request_for(run, teacher.config)
    batches = calibration(run, token_data)
    few = batches[:2]
    start = time.perf_counter()
    scores = importance(teacher, batches)
    print(f"importance   {run.samples} rows of {run.seq_len} tokens, forward only, "
          f"{time.perf_counter() - start:.1f} s")
    print(f"budget       {request.limit / GIB:.4f} GiB of the teacher's "
          f"{request.needs(config) / GIB:.4f}, {run.context} tokens x {run.batch}")
    if run.method == "minipuzzle":
        proposals = puzzle(run, teacher, few, scores, request)
    else:
        proposals = rank(run, teacher, few, scores, request, token_data)
    trial = dataclasses.replace(run.training(), recipe="bf16", phases="")
    table = []                      # masters are fp32, whatever the teacher is stored in
    print(f"loss, nats a token of {run.eval_tokens} from all over the validation text, straight "
          f"after the cut and after {run.trial_steps} steps of training:\n"
          f"{'candidate':52s}{'params M':>9s}{'GiB':>8s}{'cut':>8s}{'trained':>9s}{'tok/s':>7s}")
    for keep in proposals:
        student = prune(teacher, keep).float()
        row = dict(config=dataclasses.asdict(student.config), layers=keep.layers,
                   params=student.config.n_params(), bytes=request.needs(student.config),
                   cut=measure(run, student, token_data),
                   tokens_per_s=1 / Measured(student.eval(), 1, min(run.context, 512)).decode)
        if len(proposals) > 1:
            distill(teacher, student.train(), trial, token_data, run.trial_steps)
        row["trained"] = measure(run, student, token_data)
        table.append(row)
        print(f"{describe(student.config):52s}{row['params'] / 1e6:9.2f}{row['bytes'] / GIB:8.4f}"
              f"{row['cut']:8.4f}{row['trained']:9.4f}{row['tokens_per_s']:7.0f}", flush=True)
    lowest = min(row["trained"] for row in table)           # and of equally good ones the fastest
    near = [i for i, row in enumerate(table) if row["trained"] <= 1.001 * lowest]
    chosen, = from_first(max(near, key=lambda i: table[i]["tokens_per_s"]))
    if len(table) > 1:
        print(f"chosen       {describe(proposals[chosen].config(config))}: lowest loss after "
              f"{run.trial_steps} steps" + (", fastest of those within 0.1%" * (len(near) > 1)))
    return proposals[chosen], table, chosen


def rank(run, teacher, batches, scores, request, token_data):
    """The Keeps of the best --candidates: of each depth and d_model the largest that fits, by their
    loss straight after the cut.
    """
    config, kept, grid = teacher.config, {}, grid_for(teacher.config)
    found = search(config, request, grid, run.recipe != "bf16")
    largest = {}
    for needed, counts, one in found:
        largest.setdefault((tuple(counts.items()), one.d_model), (needed, counts, one))
    for counts, _ in largest:
        if counts not in kept:
            kept[counts], log = choose_layers(teacher, batches, dict(counts), run.layer_metric)
            if log:
                print("layers       " + " ".join(f"{n} {letter}" for letter, n in counts)
                      + ": without " + ", ".join(f"number {i} ({config.pattern[i]}, costs "
                                                 f"{cost:.2g})" for i, cost in log))
    cut = []
    for (counts, _), (_, _, one) in tqdm(largest.items(), "cutting", leave=False, disable=None):
        layers = kept[counts]
        keep = keep_best(scores, config, one, layers)
        student, limit = prune(teacher, keep), run.batch_size * run.seq_len
        loss = evaluate(student, token_data.validation, run.batch_size, run.seq_len, limit=limit,
                        spread=True)
        cut.append((loss, keep))
    print(f"search       {len(found)} of {len(grid)} candidates fit, {len(largest)} cut and "
          "evaluated")
    cut.sort(key=lambda row: row[0])
    return [keep for _, keep in cut[:run.candidates]]


def puzzle(run, teacher, batches, scores, request):
    """MiniPuzzle's Keeps: for each MLP width the best layers by integer program, of these the
    --candidates that should cost least; all other widths as they are.
    """
    config, found, refusal = teacher.config, [], None
    costs = layer_costs(teacher, batches, list(range(len(config.pattern))), "hidden")
    step = max(config.mlp_dim // 16, 16)
    for width in range(config.mlp_dim, config.mlp_dim // 4, -step):
        cost = cut_cost(teacher, batches, scores, width)
        try:
            layers, _ = minipuzzle(costs, {width: cost}, config, request)
        except ValueError as error:
            refusal = error                     # the narrowest fits most, so its word is the last
            continue
        cost += sum(costs[i] for i in costs if i not in layers)
        one = dataclasses.replace(config, pattern="".join(config.pattern[i] for i in layers),
                                  mlp_dim=width)
        if run.recipe == "bf16" or takes_fp8(one):
            found.append((cost, keep_best(scores, config, one, layers)))
    if not found:
        raise refusal or ValueError("no choice of MiniPuzzle's can be trained in FP8: --recipe "
                                    "bf16")
    print(f"minipuzzle   {len(found)} MLP widths fit, each with its best layers")
    return [keep for _, keep in sorted(found, key=lambda row: row[0])[:run.candidates]]


@torch.no_grad()
def cut_cost(teacher, batches, scores, mlp_dim):
    """MSE before the head of cutting every MLP to a width."""
    config = teacher.config
    cut = prune(teacher, keep_best(scores, config, dataclasses.replace(config, mlp_dim=mlp_dim),
                                   list(range(len(config.pattern)))))
    return sum(float((cut.hidden(tokens).float() - teacher.hidden(tokens).float()).square().mean())
               for tokens in batches)


def earlier(run, training, settings):
    """(the state to go on from, what compression.json keeps of its begin), or (None, None). Raises
    FileExistsError if --out holds another compression.
    """
    state, folder = train_fp8.open_folder(training), pathlib.Path(run.out)
    if state is None:
        return None, None
    begun = read_json(folder / "compression.json")
    if begun.get("settings") != settings:
        theirs = (begun.get("settings") or {}).get("teacher")
        what = "another teacher" if theirs != settings["teacher"] else "other settings"
        raise FileExistsError(f"{folder} holds a compression of {what}: choose another --out, or "
                              "--overwrite")
    return state, begun


def largest_student(run, config):
    """The largest configuration that the budget leaves room for, of a teacher's; for MiniPuzzle,
    which finds its own, the teacher's. Raises ValueError for a budget that nothing fits, or that
    the teacher does.
    """
    request = request_for(run, config)
    if run.memory_gib and request.needs(config) <= request.limit:
        raise ValueError(f"--memory-gib is {run.memory_gib:g}: the teacher fits it already, with "
                         f"{request.needs(config) / GIB:.4g} GiB; there is nothing to cut")
    if run.method == "minipuzzle":
        return config
    return search(config, request, grid_for(config), run.recipe != "bf16")[0][2]


def begin(run, teacher, token_data, settings):
    """(the student, cut and not yet distilled; what compression.json keeps of it)."""
    print(f"to do        of {run.batch_size} x {run.seq_len} tokens: {run.trial_steps} steps "
          f"with each of {run.candidates} candidates, {run.steps} of distillation"
          + f", {run.steps} from scratch" * run.scratch)
    before = measure(run, teacher, token_data)
    keep, table, chosen = compress(run, teacher, token_data)
    student = prune(teacher, keep).float()
    return student, dict(
        settings=settings, config=dataclasses.asdict(student.config), layers=keep.layers,
        candidates=table, chosen=chosen, teacher_val_loss=before,
        pruned_val_loss=table[chosen]["cut"])


def body(run):
    if run.list:
        return show_list(run)
    if run.merge:
        return merge_folders(run)
    device = pick_device(run.device)
    rank_, size = start_processes(device)
    if run.ablate:
        return ablate(run, device)
    start, folder, training = time.perf_counter(), pathlib.Path(run.out), run.training()
    teacher, _ = load_run(run.teacher, device)
    settings = {k: v for k, v in dataclasses.asdict(run).items() if k not in NOT_SETTINGS}
    settings["teacher"] = model_fingerprint(teacher)
    state, begun = earlier(run, training, settings)
    if state and state["step"] == run.steps and train_fp8.finished_result(training):
        print(f"finished already: {folder} (--overwrite compresses anew)")
        return train_fp8.finished_result(training)

    # What is too large, or nowhere, is said before anything is measured.
    largest = HybridConfig(**begun["config"]) if state else largest_student(run, teacher.config)
    tokenizer_json, token_data = load_text(run, teacher.config.vocab_size)
    phases = train_fp8.load_phases(training, token_data)
    teacher.requires_grad_(False)
    print(f"teacher      {run.teacher}: {teacher.config.pattern}, "
          f"{teacher.config.n_params() / 1e6:.2f} M parameters")
    check_memory(train_fp8.longest(phases), largest, pick_dtype(run.compute_dtype, device), device)
    matmul = None
    if device == "cpu":
        print(f"settings     {tune_cpu(state and state['matmul'])}")
        matmul = torch.backends.mkldnn.matmul.fp32_precision
    teacher.compute_dtype = pick_compute(run, state, teacher, token_data, training, device)
    if state is None:
        student, begun = begin(run, teacher, token_data, settings)
    else:
        student = HybridLM(HybridConfig(**begun["config"])).to(device)
    student.requires_grad_(True).train()
    student.compute_dtype = teacher.compute_dtype
    convert_to_fp8(student, run.recipe)
    if run.loss == "kd":
        teach(student, teacher)
    if size > 1:
        dist.barrier()
        shard(student)
    if state is None and rank_ == 0:
        train_fp8.clear_folder(training)
        write_json(folder / "compression.json", begun)
    config = HybridConfig(**begun["config"])
    if run.loss == "kd":
        print("distilling   loss is KL(teacher || student), val the validation loss on the text")
    step, rows = train_fp8.train(training, student, token_data, state, matmul, phases,
                                 run.eval_tokens)
    student_loss = measure(run, student, token_data) if step == run.steps else None
    student = gathered(student, config)
    if rank_ == 0:
        write_text(folder / "tokenizer.json", tokenizer_json)
        student.__dict__.pop("loss", None)
        save_hf(student, folder)
    if step < run.steps:
        print(f"stopped at step {step} of {run.steps}, saved; the same command continues")
        return dict(step=step, out=run.out)
    scratch_loss = from_scratch(run, config, teacher, token_data, device) if run.scratch else None
    if rank_:
        return {}
    result = report(run, begun, teacher, student.to(device), student_loss, scratch_loss, rows)
    result["wall_seconds"] = time.perf_counter() - start
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(step=run.steps, final=result)) + "\n")
    return result


NOT_SETTINGS = ("teacher", "device", "out", "overwrite", "stop_after", "save_every", "list",
                "preset", "rows", "ablate", "seeds", "merge", "alpha")


def pick_compute(run, state, teacher, token_data, training, device):
    """The dtype of the matmuls: of the run that is continued, as asked, or the faster one here."""
    if state is not None:
        return getattr(torch, state["compute_dtype"])
    if run.compute_dtype != "auto" or device != "cpu":
        return pick_dtype(run.compute_dtype, device)
    teacher.requires_grad_(True)
    dtype = train_fp8.choose_dtype(teacher, make_batches(training, token_data).next())
    teacher.requires_grad_(False)
    return dtype


def from_scratch(run, config, teacher, token_data, device):
    """Loss of the same configuration trained from nothing, by cross-entropy, on the same tokens."""
    torch.manual_seed(run.seed)
    model = HybridLM(config, teacher.compute_dtype).to(device)
    convert_to_fp8(model, run.recipe, verbose=False)
    training = dataclasses.replace(run.training(), phases="", lr=train_fp8.Run.lr)
    distill(None, model, training, token_data, progress="from scratch")
    return measure(run, model, token_data)


def report(run, begun, teacher, student, student_loss, scratch_loss, rows):
    """The tables, the plot, the last line's values."""
    request = request_for(run, teacher.config)
    before, pruned = begun["teacher_val_loss"], begun["pruned_val_loss"]
    won_back = lambda loss: (pruned - loss) / (pruned - before) if pruned > before else None
    speed = {name: 1 / Measured(m.eval(), 1, min(run.context, 512)).decode
             for name, m in (("teacher", teacher), ("student", student))}
    sizes = {name: (m.config.n_params(), request.needs(m.config))
             for name, m in (("teacher", teacher), ("student", student))}
    print(f"\n{'':22s}{'loss [nats]':>12s}{'parameters':>13s}{'GiB':>9s}{'decode tok/s':>14s}")
    table = [("teacher", before, "teacher"), ("cut", pruned, "student"),
             (f"distilled ({run.loss})", student_loss, "student")]
    if scratch_loss is not None:
        table.append(("from scratch", scratch_loss, "student"))
    for name, loss, size in table:
        print(f"{name:22s}{loss:12.4f}{sizes[size][0]:13,d}{sizes[size][1] / GIB:9.4f}"
              f"{speed[size]:14.0f}")
    seen = [(0, pruned)] + [(row["tokens"], row["val_loss"]) for row in rows if "val_loss" in row]
    seen.append((run.steps * run.batch_size * run.seq_len, student_loss))
    total = teacher_tokens(run)
    print(f"\n{'tokens':>10s}{'of the teacher':>16s}{'loss':>9s}{'recovered':>11s}")
    percent = lambda share, missing: missing if share is None else f"{share:.1%}"
    for tokens, loss in seen:
        share = percent(tokens / total if total else None, "unknown")
        print(f"{tokens:10,d}{share:>16s}{loss:9.4f}{percent(won_back(loss), 'no loss'):>11s}")
    picture = pathlib.Path(run.out) / "recovery.png"
    title = percent(won_back(student_loss), "nothing")
    plot_recovery(seen, before, scratch_loss, f"{title} of what the cut cost is won back", picture)
    print(f"plot         {picture}")
    return dict(teacher_val_loss=before, pruned_val_loss=pruned, student_val_loss=student_loss,
                scratch_val_loss=scratch_loss, recovered=won_back(student_loss),
                params_before=sizes["teacher"][0], params_after=sizes["student"][0],
                memory_gib_before=sizes["teacher"][1] / GIB,
                memory_gib_after=sizes["student"][1] / GIB,
                tokens_per_s_before=speed["teacher"], tokens_per_s_after=speed["student"],
                out=run.out)


def teacher_tokens(run):
    """Tokens that the teacher was trained on, if its log tells."""
    rows = read_rows(pathlib.Path(run.teacher) / "metrics.jsonl")
    return max((row.get("tokens", 0) for row in rows), default=0)


def plot_recovery(seen, teacher, scratch, title, path):
    """Loss over tokens of distillation, between the cut and the teacher."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    tokens = [t / 1e6 for t, _ in seen]
    axis.plot(tokens, [loss for _, loss in seen], "o-", color="#4c72b0", label="student")
    axis.axhline(teacher, color="#444444", linestyle="--", label="teacher")
    if scratch is not None:
        axis.plot(tokens[-1:], [scratch], "s", color="#c44e52", label="from scratch, same tokens")
    axis.set(xlabel="tokens of distillation [millions]", ylabel="validation loss [nats a token]",
             title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def ablate(run, device):
    """--ablate: over --seeds, which change calibration, data order and random choices (the teacher
    is one): the loss straight after cutting the same sizes by importance, at random and worst
    first; width against depth at equal size; and after --steps of KD, of cross-entropy, and from
    scratch. Mean and standard deviation.
    """
    teacher, _ = load_run(run.teacher, device)
    _, token_data = load_text(run, teacher.config.vocab_size)
    teacher.requires_grad_(False)
    if device == "cpu":
        print(f"settings     {tune_cpu()}")
    teacher.compute_dtype = pick_compute(run, None, teacher, token_data, run.training(), device)
    config, before = teacher.config, measure(run, teacher, token_data)
    have = collections.Counter(config.pattern)
    even = lambda n, step: max(n * 3 // 4 // step * step, step)
    narrow = dataclasses.replace(config, d_model=even(config.d_model, 16),
                                 mlp_dim=even(config.mlp_dim, 16),
                                 mamba_heads=even(config.mamba_heads, config.n_groups))
    shallow = {letter: have[letter] - (letter != "*" and have[letter] > 1) for letter in "M*-"}
    size = with_counts(config, shallow).n_params()
    thinner = (dataclasses.replace(config, d_model=d, mlp_dim=config.mlp_dim * d // config.d_model
                                   // 16 * 16) for d in range(config.d_model, 16, -8))
    slim = min(thinner, key=lambda one: abs(one.n_params() - size))     # width alone, equal size
    print(f"teacher {before:.4f}; cut to {describe(narrow)}, {narrow.n_params() / 1e6:.2f} of "
          f"{config.n_params() / 1e6:.2f} M parameters; {run.steps} steps, {run.seeds} seeds")
    rows, everything = collections.defaultdict(list), list(range(len(config.pattern)))
    for seed in tqdm(range(run.seed, run.seed + run.seeds), "seeds", disable=None):
        mine = dataclasses.replace(run, seed=seed)
        batches = calibration(mine, token_data)
        scores = importance(teacher, batches)
        generator = torch.Generator().manual_seed(seed)
        chance = scores.map(lambda m: torch.rand(m.shape, generator=generator).to(m.device))
        note = lambda name, model: rows[name].append(measure(mine, model, token_data))
        kept = {name: keep_best(order, config, narrow, everything, worst=name == "worst first")
                for name, order in (("importance", scores), ("random", chance),
                                    ("worst first", scores))}
        for name, keep in kept.items():
            note(f"cut: {name}", prune(teacher, keep))
        layers, _ = choose_layers(teacher, batches[:2], shallow, run.layer_metric)
        deep = dataclasses.replace(config, pattern="".join(config.pattern[i] for i in layers))
        for name, one, chosen in (("depth", deep, layers), ("width", slim, everything)):
            student = prune(teacher, keep_best(scores, config, one, chosen)).float()
            note(f"cut: by {name} to {one.n_params() / 1e6:.2f} M", student)
            distill(teacher, student, mine.training(), token_data, run.trial_steps)
            note(f"then {run.trial_steps} steps: {name}", student)
        torch.manual_seed(seed)
        new = HybridLM(narrow, teacher.compute_dtype).to(device)
        for name, source, student, lr in (
                ("KD", teacher, prune(teacher, kept["importance"]).float(), run.lr),
                ("cross-entropy", None, prune(teacher, kept["importance"]).float(), run.lr),
                ("from scratch", None, new, train_fp8.Run.lr)):
            training = dataclasses.replace(mine.training(), lr=lr)
            distill(source, student.requires_grad_(True), training, token_data, progress=name)
            note(f"trained: {name}", student)
    print(f"{'':34s}{'loss':>9s}{'+-':>8s}   each seed")
    table = {}
    for name, each in rows.items():
        values = torch.tensor(each)
        table[name] = dict(mean=float(values.mean()), deviation=float(values.std()), each=each)
        print(f"{name:34s}{table[name]['mean']:9.4f}{table[name]['deviation']:8.4f}   "
              + " ".join(f"{v:.4f}" for v in each))
    folder = pathlib.Path(run.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "ablation.json", table)
    return dict(teacher_val_loss=before, table=table, out=run.out)


def merge_folders(run):
    """--merge A B: the mean of two checkpoints, weighted by --alpha, into --out."""
    folder = pathlib.Path(run.out)
    if (folder / "config.json").exists() and not run.overwrite:
        raise FileExistsError(f"{folder} holds a model: choose another --out, or --overwrite")
    if (folder / "train_state.pt").exists():
        raise FileExistsError(f"{folder} holds a training run, which a merge cannot continue: "
                              "choose another --out")
    a, b = (load_run(name)[0] for name in run.merge)
    words = [(pathlib.Path(name) / "tokenizer.json").read_text("utf-8") for name in run.merge]
    if words[0] != words[1]:
        raise ValueError(f"{run.merge[0]} and {run.merge[1]} have two tokenizers: their entries do "
                         "not mean the same")
    save_hf(merge(a, b, run.alpha), folder)
    write_text(folder / "tokenizer.json", words[0])
    print(f"{1 - run.alpha:g} x {run.merge[0]} + {run.alpha:g} x {run.merge[1]}: {folder}")
    return dict(out=run.out, alpha=run.alpha)


def main(argv=None):
    run_script(body, parse_flags(Run, argv))


if __name__ == "__main__":
    main()
