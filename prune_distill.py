"""Compression: prune a trained hybrid to a memory budget, then distil it from the original.

Nano 2 compressed its 12B to the 9B so that 128k tokens fit an A10G; Nemotron-H compressed its 56B
to the 47B for 1M tokens in 31.7 GiB. Both took four steps: measure the importance of each part,
enumerate the sizes that fit, prune and briefly train a few candidates, distil the best one.

Importance. A score is the mean of |activation| over a sequence, then the L2 norm over sequences.

    embedding channels   the outputs of all pre-norms, summed over layers           Nano 2
    MLP neurons          the input of down_proj                                     Nano 2
    attention heads      the input of o_proj times the norms of o_proj's columns, which is what a
                         head adds; ranked within the group of a KV head            Minitron
    Mamba channels       the x part of in_proj's output, L2 over heads; one set is kept for all
                         heads                                                      Minitron-SSM
    Mamba heads          the same, L2 over the kept channels; ranked within the group that shares
                         B and C, and each group keeps the same number of heads     Minitron-SSM
    layers   logits      MSE of the logits without the layer; removed one by one    Nano 2
             hidden      MSE of the hidden states before the head                   MiniPuzzle
             cosine      1 - cosine of the layer's input and output                 Minitron

B, C, the state size and the groups are never pruned: in another group a head would read another B.

Pruning slices weights. It changes nothing if the removed parts are dead, that is always zero. A
norm divides by the root of a mean square over channels. If d' of d channels are kept and the others
are zero, the mean becomes d / d' times as large, in the gated norm of a Mamba layer k = d_inner /
d_inner' times. So the weights of the gated norms are multiplied by sqrt(k) and epsilon by k. All
norms share one epsilon, so the residual stream is multiplied by sqrt(k d' / d), in the embedding
and in the last linear of each layer, and the weights of its norms by sqrt(d / d'). (ModelOpt leaves
this difference to later training.) All layers have the same widths, as in the released models.

Distillation minimises the forward KL divergence of the logits, KL(teacher || student), at
temperature 1, without cross-entropy. Logits exist for one block of tokens at a time: those of 8192
tokens x 131072 entries would take 4 GiB in fp32 per model. The loop is `train_fp8.train` with
another loss_fn. Under torchrun the student is sharded; every GPU has the whole teacher.

MiniPuzzle scores single layers and MLP widths, and an integer program chooses the layers to remove
at the lowest cost under the budget. It assumes that costs add up. Published experience is that the
iterative removal of Minitron is better at equal size.

Sources: Nano 2, arXiv 2508.14444, section 4; Nemotron-H, arXiv 2504.03624, section 3; Minitron-SSM,
arXiv 2504.11409; Minitron, arXiv 2407.14679 and 2408.11796.

Glossary: as in model.py. teacher: the model that is pruned | student: the pruned model |
candidate: a configuration that fits | counts: {layer type: number of layers} | recovered: the share
of the loss added by pruning that training has removed.

Left out: different widths per layer; a search over attention heads (`prune` can remove them; the
papers keep them); distillation from stored logits; a teacher too large for one GPU.

    python prune_distill.py                     out/aligned -> out/compressed, 2 to 8 min on 2 cores
    python prune_distill.py --list --preset nemotron-nano-12b-v2 --memory-gib 19.66 --context 131072
    python prune_distill.py --list --preset nemotron-h-56b --memory-gib 31.7 --context 1000000 \
        --weight-bits 4 --kv-bits 8
    python -m bench.prune_distill               over seeds: importance, width or depth, KD or text
"""

import collections
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import shutil

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from scipy.optimize import Bounds, LinearConstraint, milp
from tqdm import tqdm

import align
import train_fp8
from common import (GIB, check_flags, flag, pick_device, pick_dtype, rank_and_size, read_rows,
                    script, settings_of, start_processes)
from data import Batches, load_data
from infer import load_run, workspace_bytes
from model import HybridConfig, HybridLM, labelled
from ssm import accumulator, first_derivatives_only
from train_fp8 import Job, check_memory, evaluate, shard, train, train_in_folder

# ------------------------------------------------------------------------------------------------
# Importance, from forward passes


@dataclasses.dataclass
class Scores:
    """Importance of each part, fp32 on the CPU; higher is more important. Keys are layer numbers.

    channels (d,); neurons {i: (f,)}; mamba {i: (h, p)}; heads {i: (n_heads,)}."""
    channels: torch.Tensor
    neurons: dict
    mamba: dict
    heads: dict

    def map(self, f):
        """Scores with f applied to each tensor."""
        each = lambda scores: {i: f(m) for i, m in scores.items()}
        return Scores(f(self.channels), each(self.neurons), each(self.mamba), each(self.heads))


@torch.no_grad()
def importance(model, batches):
    """Scores of a model on batches of tokens, an iterable of int64 (b, t) on the model's device.

    Each batch takes one forward pass, in which hooks read what the layers compute."""
    sums, hooks, config = collections.defaultdict(float), [], model.config

    def watch(module, key, read):
        def add(_, inputs, output):
            m = read(inputs[0], output).float()                                 # (b, t, n)
            sums[key] += m.abs().mean(1).square().sum(0)                        # (n,)
        hooks.append(module.register_forward_hook(add))

    for i, block in enumerate(model.backbone.layers):
        mixer = block.mixer
        watch(block.norm, ("norm", i), lambda x, y: y)
        if block.letter == "M":         # the x part of [z, x, B, C, dt]
            watch(mixer.in_proj, i, lambda x, y: y[..., config.d_inner:2 * config.d_inner])
        else:
            watch(mixer.o_proj if block.letter == "*" else mixer.down_proj, i, lambda x, y: x)
    try:
        for tokens in batches:
            model(tokens, head=False)
    finally:
        for hook in hooks:
            hook.remove()

    value = {key: m.sqrt().cpu() for key, m in sums.items()}
    layers = lambda layer_type: [i for i, c in enumerate(config.pattern) if c == layer_type]
    column_norms = lambda i: model.backbone.layers[i].mixer.o_proj.weight.float().norm(dim=0).cpu()
    by_head = lambda m: m.unflatten(0, (config.n_heads, -1)).norm(dim=1)
    return Scores(channels=sum(value["norm", i] for i in range(len(config.pattern))),
                  neurons={i: value[i] for i in layers("-")},
                  mamba={i: value[i].unflatten(0, (config.mamba_heads, -1)) for i in layers("M")},
                  heads={i: by_head(value[i] * column_norms(i)) for i in layers("*")})


def run_layers(model, tokens, layers):
    """Hidden states (b, t, d) of a model that has only these layers, in order."""
    x = model.embed(tokens)
    for i in layers:
        x = model.backbone.layers[i](x)
    return model.backbone.norm_f(x)


@torch.no_grad()
def layer_costs(model, batches, layers, metric="logits"):
    """{layer: cost of removing it} for each of `layers`, from a model that has only these layers.

    logits, hidden: MSE against the whole model, of the logits or of the hidden states. cosine: 1 -
    cosine similarity of the layer's input and output."""
    if metric not in ("logits", "hidden", "cosine"):
        raise ValueError(f"the metric is {metric!r}, must be logits, hidden or cosine")
    cost = dict.fromkeys(layers, 0.0)
    everything, w = range(len(model.config.pattern)), model.lm_head.weight.float()
    gram = w.t() @ w / len(w)           # MSE of the logits: |W dh|^2 / v = dh W^T W dh / v
    for tokens in batches:
        if metric == "cosine":
            x = model.embed(tokens)
            for i in layers:
                y = model.backbone.layers[i](x)
                cost[i] += 1 - float(torch.cosine_similarity(x.float(), y.float(), dim=-1).mean())
                x = y
            continue
        truth = run_layers(model, tokens, everything).float()
        for i in layers:
            dh = run_layers(model, tokens, [j for j in layers if j != i]).float() - truth
            weighted = dh @ gram if metric == "logits" else dh / dh.shape[-1]
            cost[i] += float((dh * weighted).sum(-1).mean())
    return cost


def choose_layers(model, batches, counts, metric="logits"):
    """Layers to keep, in order, and [(removed layer, its cost)]. counts: {layer type: how many}.

    Layers are removed one at a time: the one of lowest cost among the types that still have too
    many. For logits the costs are measured again after each removal (Nano 2), for cosine and hidden
    once (Minitron, MiniPuzzle)."""
    pattern, log = model.config.pattern, []
    layers, cost = list(range(len(pattern))), None
    for layer_type, n in counts.items():
        if not 0 <= n <= pattern.count(layer_type):
            raise ValueError(f"{n} layers {layer_type} asked for, the teacher has "
                             f"{pattern.count(layer_type)}")
    while True:
        left = collections.Counter(pattern[i] for i in layers)
        removable = [i for i in layers if left[pattern[i]] > counts.get(pattern[i], len(pattern))]
        if not removable:
            return layers, log
        if cost is None or metric == "logits":
            cost = layer_costs(model, batches, layers, metric)
        removed = min(removable, key=cost.get)
        log.append((removed, cost[removed]))
        layers.remove(removed)


# ------------------------------------------------------------------------------------------------
# Pruning


@dataclasses.dataclass
class Keep:
    """What is kept, as sorted indices into the teacher; a layer is its number in the teacher.

    layers (list); channels (d',) of the residual stream; neurons {layer: (f',)}; mamba_heads
    {layer: (h',)}, the same number in each group; mamba_channels {layer: (p',)}, one set for all
    heads; heads {layer: (n_heads',)}, the same number for each KV head."""
    layers: list
    channels: torch.Tensor
    neurons: dict
    mamba_heads: dict
    mamba_channels: dict
    heads: dict

    def config(self, old):
        """The pruned configuration; each width is read from the first layer that has it."""
        width = lambda name, default: next(map(len, getattr(self, name).values()), default)
        new = dataclasses.replace(
            old, pattern="".join(old.pattern[i] for i in self.layers), d_model=len(self.channels),
            mlp_dim=width("neurons", old.mlp_dim), n_heads=width("heads", old.n_heads),
            mamba_heads=width("mamba_heads", old.mamba_heads),
            mamba_head_dim=width("mamba_channels", old.mamba_head_dim))
        return dataclasses.replace(new, norm_eps=old.norm_eps * (old.d_inner / new.d_inner))


def best(score, n, worst=False):
    """Sorted indices of the n largest (worst: smallest) scores; among equal ones the first."""
    return score.argsort(descending=not worst, stable=True)[:n].sort().values


def best_in_groups(score, groups, n, worst=False):
    """Indices of n scores: the n / groups largest of each group of neighbouring scores."""
    parts = score.unflatten(0, (groups, -1))
    return torch.cat([best(m, n // groups, worst) + i * len(m) for i, m in enumerate(parts)])


def keep_best(scores, old, new, layers, worst=False):
    """The Keep that prunes a model of configuration `old` to `new` with these layers. worst keeps
    the lowest scores, for comparison."""
    for name in ("d_model", "mlp_dim", "mamba_heads", "mamba_head_dim", "n_heads"):
        if getattr(new, name) > getattr(old, name):
            raise ValueError(f"{name} {getattr(new, name)} is more than the teacher's "
                             f"{getattr(old, name)}")
    of_type = lambda layer_type: [i for i in layers if old.pattern[i] == layer_type]
    channels = {i: best(scores.mamba[i].norm(dim=0), new.mamba_head_dim, worst)
                for i in of_type("M")}
    return Keep(layers, best(scores.channels, new.d_model, worst), mamba_channels=channels,
                neurons={i: best(scores.neurons[i], new.mlp_dim, worst) for i in of_type("-")},
                mamba_heads={i: best_in_groups(scores.mamba[i][:, channels[i]].norm(dim=1),
                                               old.n_groups, new.mamba_heads, worst)
                             for i in of_type("M")},
                heads={i: best_in_groups(scores.heads[i], old.n_kv_heads, new.n_heads, worst)
                       for i in of_type("*")})


def cut_layer(layer_type, mixer, i, keep, old):
    """{name: tensor} of the mixer of layer i, every tensor sliced to what is kept."""
    c, w = keep.channels, {name: p.detach() for name, p in mixer.named_parameters()}
    if layer_type == "-":
        n = keep.neurons[i]
        return {"up_proj.weight": w["up_proj.weight"][n][:, c],
                "down_proj.weight": w["down_proj.weight"][c][:, n]}
    if layer_type == "*":
        wide = (keep.heads[i][:, None] * old.head_dim + torch.arange(old.head_dim)).flatten()
        return {"q_proj.weight": w["q_proj.weight"][wide][:, c],
                "k_proj.weight": w["k_proj.weight"][:, c],
                "v_proj.weight": w["v_proj.weight"][:, c],
                "o_proj.weight": w["o_proj.weight"][c][:, wide]}

    # z, x and what is computed from them: by head and channel; dt, A, D: by head; B, C: whole
    heads, di, bc = keep.mamba_heads[i], old.d_inner, 2 * old.n_groups * old.d_state
    wide = (heads[:, None] * old.mamba_head_dim + keep.mamba_channels[i]).flatten()
    shared = torch.arange(bc)
    rows = torch.cat([wide, di + wide, 2 * di + shared, 2 * di + bc + heads])
    conv = torch.cat([wide, di + shared])
    return {"in_proj.weight": w["in_proj.weight"][rows][:, c],
            "conv1d.weight": w["conv1d.weight"][conv], "conv1d.bias": w["conv1d.bias"][conv],
            "A_log": w["A_log"][heads], "D": w["D"][heads], "dt_bias": w["dt_bias"][heads],
            "norm.weight": w["norm.weight"][wide] * math.sqrt(di / len(wide)),
            "out_proj.weight": w["out_proj.weight"][c][:, wide]}


@torch.no_grad()
def prune(model, keep):
    """A new, smaller HybridLM with the parts in `keep`; the old model is not changed.

    Norms and the residual stream are scaled as the header says: removing dead weights changes no
    logits, and keeping everything gives the same bits."""
    old, c, backbone = model.config, keep.channels, model.backbone
    config = keep.config(old)
    norm = math.sqrt(old.d_model / config.d_model)
    stream = math.sqrt(old.d_inner / config.d_inner) / norm
    tensors = {"backbone.embeddings.weight": backbone.embeddings.weight[:, c] * stream,
               "backbone.norm_f.weight": backbone.norm_f.weight[c] * norm,
               "lm_head.weight": model.lm_head.weight[:, c]}
    for new, i in enumerate(keep.layers):
        block, prefix = backbone.layers[i], f"backbone.layers.{new}."
        tensors[prefix + "norm.weight"] = block.norm.weight[c] * norm
        for name, m in cut_layer(block.letter, block.mixer, i, keep, old).items():
            last = name in ("out_proj.weight", "o_proj.weight", "down_proj.weight")
            tensors[f"{prefix}mixer.{name}"] = m * stream if last else m

    with torch.device("meta"):
        student = HybridLM(config, model.compute_dtype)
    for name, p in student.named_parameters():
        if tensors[name].shape != p.shape:
            raise ValueError(f"{name} would be pruned to {tuple(tensors[name].shape)}, the "
                             f"configuration says {tuple(p.shape)}: all layers need one width")
    student.load_state_dict(tensors, assign=True)
    return student.train(model.training)


# ------------------------------------------------------------------------------------------------
# Distillation


class _KLDivergence(torch.autograd.Function):
    """Mean KL(teacher || student) over tokens, in blocks, so that no (tokens, v) logits ever exist.

    The gradient of the student's logits, softmax(student) - softmax(teacher), is computed while
    the logits of the block exist, as in model.cross_entropy."""

    @staticmethod
    def forward(ctx, h, weight, teacher_h, teacher_weight, block, want_grad):
        accum_dtype, count = accumulator(h), max(len(h), 1)
        dh = torch.empty_like(h) if want_grad else None
        dweight = torch.zeros_like(weight, dtype=accum_dtype) if want_grad else None
        w, teacher_w = weight.to(h.dtype), teacher_weight.to(teacher_h.dtype)
        total = h.new_zeros((), dtype=accum_dtype)
        for i in range(0, len(h), block):
            rows = h[i:i + block]
            log_q = (rows @ w.t()).to(accum_dtype)                                     # (block, v)
            log_q -= log_q.logsumexp(-1, keepdim=True)
            log_p = (teacher_h[i:i + block] @ teacher_w.t()).to(accum_dtype)
            log_p -= log_p.logsumexp(-1, keepdim=True)
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum()
            if want_grad:
                d = log_q.exp_().sub_(p).div_(count).to(h.dtype)
                dh[i:i + block] = d @ w
                dweight += d.t() @ rows
        ctx.save_for_backward(dh, dweight)
        ctx.dtype = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx, g):
        first_derivatives_only("kd_loss", "torch's own kl_div")
        dh, dweight = ctx.saved_tensors
        return dh * g.to(dh.dtype), (dweight * g).to(ctx.dtype), None, None, None, None


def kd_loss(h, weight, teacher_h, teacher_weight, labels=None, block=256):
    """Mean over tokens of KL(teacher || student) in nats, at temperature 1.

    Gradients flow to h (tokens, d) and weight (v, d), not to teacher_h (tokens, d_t) and
    teacher_weight (v, d_t). labels (tokens,): tokens with a label below 0 are left out, as in
    cross-entropy. block: number of tokens whose logits exist at one time."""
    if len(weight) != len(teacher_weight):
        raise ValueError(f"the student's vocabulary has {len(weight)} entries, the teacher's "
                         f"{len(teacher_weight)}: distillation compares entry with entry")
    if labels is not None:
        kept = labelled(labels, len(weight))
        h, teacher_h = h[kept], teacher_h[kept]
    want_grad = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return _KLDivergence.apply(h, weight, teacher_h.detach(), teacher_weight.detach(), block,
                               want_grad)


def make_kd_loss(teacher):
    """A loss_fn for `train` that distils from the teacher."""
    def loss_fn(student, tokens, labels, seq_idx):
        with torch.no_grad():
            truth = teacher(tokens, seq_idx=seq_idx, head=False).flatten(0, 1)
        h = student(tokens, seq_idx=seq_idx, head=False).flatten(0, 1)
        return kd_loss(h, student.lm_head.weight, truth, teacher.lm_head.weight, labels.flatten())
    return loss_fn


# ------------------------------------------------------------------------------------------------
# Search: what fits


@dataclasses.dataclass(frozen=True)
class Request:
    """The limit, the context and batch that must fit it, and how numbers are stored."""

    limit: int                      # bytes
    context: int = 131072           # tokens of each sequence
    batch: int = 1
    weight_bits: int = 16           # of every weight; at 16, A_log, D and dt_bias are in fp32
    kv_dtype: torch.dtype = torch.bfloat16
    state_dtype: torch.dtype = torch.float32
    workspace: int = 0              # bytes of temporaries, see `request_for`

    def needs(self, config):
        """Bytes of a configuration, as infer.plan counts them, with the teacher's temporaries."""
        weights = config.weight_bytes() if self.weight_bits == 16 \
            else config.n_params() * self.weight_bits // 8
        cache = config.cache_bytes(self.batch, self.context, self.kv_dtype, self.state_dtype)
        logits = self.batch * config.vocab_size * 6 if self.workspace else 0    # bf16 and fp32
        return weights + sum(cache.values()) + self.workspace + logits


def request_for(run, config):
    """The Request of a run whose teacher is `config`. The limit is --memory-gib, or the share
    --keep of the bytes that the teacher needs.

    Temporaries are the teacher's, so they are never too few. With 8-bit or 4-bit weights, which
    infer.py does not run, they are not counted, nor are they in the papers' budget of 31.7 GiB."""
    workspace = 0
    if run.weight_bits == 16:
        chunk = max(min(1024, run.context // 32), 1)                # prefill chunk
        workspace = max(workspace_bytes(config, 1, run.context, run.batch),
                        workspace_bytes(config, chunk, run.context))
    kv_dtype, state_dtype = {16: (torch.bfloat16, torch.float32),
                             8: (torch.float8_e4m3fn, torch.bfloat16)}[run.kv_bits]
    request = Request(0, run.context, run.batch, run.weight_bits, kv_dtype, state_dtype, workspace)
    limit = run.memory_gib * GIB or run.keep * request.needs(config)
    return dataclasses.replace(request, limit=int(limit))


def with_counts(config, counts, **widths):
    """A configuration of so many layers of each type. Bytes do not depend on their order."""
    return dataclasses.replace(config, pattern="".join(c * n for c, n in counts.items()), **widths)


def grid_for(config):
    """[(counts, configuration)] of all candidates: the papers' candidates for their two teachers;
    for others widths down to 62%, and at most one layer less of each type but attention."""
    counts = lambda m, a, f: {"M": m, "*": a, "-": f}
    shape = lambda c: (c.pattern, c.params_by_layer())
    is_preset = lambda name: shape(config) == shape(HybridConfig.preset(name))
    if is_preset("nemotron-nano-12b-v2"):   # Nano 2, section 4: 52 to 56 layers, 4 of attention
        depths = [counts(m, 4, n - 4 - m) for n in (52, 54, 56)
                  for m in ((n - 4) // 2, (n - 4) // 2 + 1)] + [counts(28, 6, 28)]
        widths = range(4480, 5121, 160), range(13440, 20481, 320), (112, 120, 128)
    elif is_preset("nemotron-h-56b"):       # Nemotron-H, section 3: widths as published
        depths = [counts(m, a, f) for m in (45, 48, 51, 54) for a in (3, 4, 5, 6)
                  for f in (42, 45, 48, 51, 54)]
        widths = (8192,), range(24576, 32769, 1024), (256,)
    else:
        layers, fewer = config.pattern.count, lambda n: (n, n - 1) if n > 1 else (n,)
        depths = [counts(m, layers("*"), f) for m in fewer(layers("M")) for f in fewer(layers("-"))]
        down = lambda n, step: range(n, min(max(int(0.62 * n), step), n) - 1, -step)
        sixteens = lambda n, parts: max(n // parts // 16 * 16, 16)
        widths = (down(config.d_model, sixteens(config.d_model, 16)),
                  down(config.mlp_dim, sixteens(config.mlp_dim, 8)),
                  down(config.mamba_heads, config.n_groups))
    return [(n, with_counts(config, n, d_model=d, mlp_dim=f, mamba_heads=heads))
            for n, d, f, heads in itertools.product(depths, *widths)]


def search(request, grid):
    """[(bytes, counts, configuration)] of the candidates that fit, largest first. Raises ValueError
    that names the smallest candidate if none fits."""
    rows = sorted(((request.needs(c), counts, c) for counts, c in grid), key=lambda row: -row[0])
    found = [row for row in rows if row[0] <= request.limit]
    if not found:
        needed, _, smallest = rows[-1]
        raise ValueError(f"nothing fits {request.limit / GIB:.4g} GiB: the smallest of {len(rows)} "
                         f"candidates, {describe(smallest)}, needs {needed / GIB:.4g} GiB")
    return found


def describe(config):
    return (f"{len(config.pattern)} layers, d_model {config.d_model}, MLP {config.mlp_dim}, "
            f"{config.mamba_heads} Mamba heads")


def minipuzzle(costs, width_costs, config, request):
    """[(cost, layers, MLP width)], lowest cost first: for each width the best layers that fit, by
    integer program (Nemotron-H, section 3).

    costs {layer: cost of removing it} and width_costs {MLP width: cost of pruning all MLPs to it}
    are MSEs of the hidden states. Under the budget the program keeps at least one layer and
    maximises the cost of the layers that are kept. Raises ValueError if nothing fits."""
    layers, found = list(costs), []
    needs = lambda p, f: request.needs(dataclasses.replace(config, pattern=p, mlp_dim=f))
    for f, width_cost in width_costs.items():
        layer_bytes = {c: needs(c + c, f) - needs(c, f) for c in config.pattern}
        rest = 2 * needs("-", f) - needs("--", f)       # bytes of everything but the layers
        scale = (1 + 1e-5) / request.limit              # the solver may miss a bound by 1e-6 of it
        memory = np.array([layer_bytes[config.pattern[i]] * scale for i in layers])
        x = milp(-np.array(list(costs.values())), integrality=1, bounds=Bounds(0, 1), constraints=[
            LinearConstraint(memory, -np.inf, 1 - rest * scale),
            LinearConstraint(np.ones(len(layers)), 1, np.inf)]).x
        if x is not None:
            kept = [i for i, chosen in zip(layers, x) if round(chosen)]
            found.append((width_cost + sum(costs[i] for i in layers if i not in kept), kept, f))
    if not found:
        least = min(needs(layer_type, min(width_costs)) for layer_type in config.pattern)
        raise ValueError(f"no choice of layers and MLP width fits {request.limit / GIB:.4g} GiB: "
                         f"the smallest, of one layer, needs {least / GIB:.4g} GiB")
    return sorted(found)


# ------------------------------------------------------------------------------------------------
# The run

EVAL_TOKENS = 24576         # spread over the validation text; every loss is measured on these
TRIAL_SHARE = 9             # a trial takes a ninth of the steps; MiniPuzzle: 7 B and 63 B tokens


@dataclasses.dataclass
class Run:
    """Prune a trained model to a memory budget and distil it from the original."""

    teacher: str = flag("", "run folder or Hugging Face folder (default: out/aligned if it exists, "
                        "else out/base)", session=True)
    data: str = flag("stdlib", "text for measuring and for distillation", session=True)
    memory_gib: float = flag(0.0, "budget of weights, caches, temporaries; 0: --keep", at_least=0)
    keep: float = flag(0.72, "budget as a share of the teacher's bytes", above=0, at_most=1)
    context: int = flag(4096, "tokens per sequence that must fit", at_least=1)
    batch: int = flag(1, "sequences that must fit", at_least=1)
    weight_bits: int = flag(16, "bits per weight; 8 and 4 ignore temporaries", choices=(16, 8, 4))
    kv_bits: int = flag(16, "bits per cached value; 8: states in bf16", choices=(16, 8))
    method: str = flag("minitron", "minitron (by measured loss) or minipuzzle (by integer program)",
                       choices=("minitron", "minipuzzle"))
    samples: int = flag(48, "windows of text that importance is measured on", at_least=1)
    candidates: int = flag(3, "candidates to train briefly before one is chosen", at_least=1)
    steps: int = flag(140, "optimizer steps of the distillation", at_least=1)
    batch_size: int = flag(8, "sequences per step", at_least=1)
    seq_len: int = flag(256, "tokens per sequence", at_least=1)
    lr: float = flag(1.5e-3, "peak learning rate", above=0)
    scratch: bool = flag(True, "also train the same shape from scratch, on as many tokens")
    seed: int = flag(0, "seed of data order and a new model", at_least=0, at_most=2 ** 63 - 1)
    device: str = flag("auto", "auto, cuda, mps or cpu", session=True)
    compute_dtype: str = flag("auto", "float32 or bfloat16; auto: bfloat16 where it is fast",
                              choices=("auto", "float32", "bfloat16"))
    out: str = flag("out/compressed", "run folder", session=True)
    overwrite: bool = flag(False, "start anew even if --out holds another run", session=True)
    stop_after: int = flag(0, "stop after N steps, to be resumed", at_least=0, session=True)
    list: bool = flag(False, "print the candidates of --preset that fit", session=True)
    preset: str = flag("nemotron-nano-12b-v2", "the teacher of --list", session=True)

    def __post_init__(self):
        check_flags(self)
        there = [path for path in ("out/aligned", "out/base") if os.path.exists(path)]
        self.teacher = self.teacher or [*there, "out/base"][0]
        if pathlib.Path(self.out).resolve() == pathlib.Path(self.teacher).resolve():
            raise ValueError(f"--out and --teacher are both {self.out}: the student would take its "
                             "teacher's place")

    def training(self, **changes):
        """The train_fp8.Run of the distillation."""
        names = "data steps batch_size seq_len lr seed device out overwrite stop_after"
        mine = {name: getattr(self, name) for name in names.split()} | changes
        return train_fp8.Run(recipe="none", warmup=0.05, decay=0.5, eval_every=-(-self.steps // 4),
                             **mine)


def show_list(run):
    """--list: print the candidates that fit."""
    config = HybridConfig.preset(run.preset)
    request, grid = request_for(run, config), grid_for(config)
    found = search(request, grid)
    print(f"{run.preset} needs {request.needs(config) / GIB:.2f} GiB at {run.context} tokens x "
          f"{run.batch}: {len(found)} of {len(grid)} candidates fit {request.limit / GIB:.2f} GiB")
    widths = lambda c: (c.d_model, c.mlp_dim, c.mamba_heads)
    full = [request.needs(c) for _, c in grid if widths(c) == widths(config)]
    print(f"at full width {sum(n <= request.limit for n in full)} of {len(full)} depths fit; the "
          "largest that fit:")
    for needed, counts, c in found[:10]:
        print(f"{needed / GIB:8.3f} GiB {c.n_params() / 1e9:8.3f} B parameters   {describe(c)}, "
              + ", ".join(f"{n} {layer_type}" for layer_type, n in counts.items()))
    return dict(candidates=len(grid), fits=len(found), limit_bytes=request.limit)


def load_text(run):
    """--data, by the teacher's tokenizer. Raises ValueError for shards of another tokenizer."""
    tokenizer_json = (pathlib.Path(run.teacher) / "tokenizer.json").read_text(encoding="utf-8")
    token_data = load_data(run.data, tokenizer_json=tokenizer_json)
    if token_data.tokenizer_json != tokenizer_json:
        raise ValueError(f"the tokens of --data {run.data} are not those of the teacher "
                         f"{run.teacher}: another tokenizer wrote them")
    return token_data


def load_task(run, token_data):
    """Batches for `train`, of which half of the rows are the task of an aligned teacher and the
    others text. None for a teacher that is not aligned."""
    rows = read_rows(pathlib.Path(run.teacher) / "metrics.jsonl")
    result = rows[-1].get("final", {}) if rows else {}
    if "accuracy_by_budget" not in result:
        return None
    settings = align.Run(lengths=tuple(result["lengths"]), batch_size=run.batch_size,
                         text_share=0.5, seed=run.seed)
    return align.Conversations(token_data.encoding, settings, token_data.train, run.seq_len)


def score(model, task):
    """The accuracy on test problems of the task, or None without a task."""
    return task and align.accuracy(model, task.encoding, align.tests_of(task.run))[0]


def calibration(run, token_data, device="cpu"):
    """--samples windows of the training text in batches of 8, not in the order of training."""
    windows = Batches(token_data.train, run.samples, run.seq_len, run.seed + 1)
    if run.samples > windows.windows:
        raise ValueError(f"--samples is {run.samples}, the training text has {windows.windows} "
                         f"windows of {run.seq_len} tokens: take fewer, or more text")
    return windows.next()[0].to(device).split(8)


def validation_loss(run, model, token_data, tokens=None):
    """Nats per token, on `tokens` tokens or by default EVAL_TOKENS."""
    return evaluate(model, token_data.validation, run.batch_size, run.seq_len,
                    limit=tokens or EVAL_TOKENS)


def train_briefly(training, model, token_data, loss_fn=HybridLM.loss, task=None):
    """Train a model for training.steps, without files. Returns its validation loss."""
    training = dataclasses.replace(training, eval_every=training.steps, stop_after=0)
    if rank_and_size()[1] > 1:
        shard(model)
    rows = train(training, model, token_data, loss_fn, batches=task)
    if len(rows) < training.steps:          # Ctrl-C: there is nothing to resume
        raise KeyboardInterrupt
    return validation_loss(training, model, token_data)


def propose_minitron(run, teacher, token_data, batches, scores, request):
    """The best Keeps, best first: for each depth and d_model the largest candidate that fits, in
    order of the loss directly after pruning."""
    config, largest, kept, rows = teacher.config, {}, {}, []
    for _, counts, candidate in search(request, grid_for(config)):
        largest.setdefault((tuple(counts.items()), candidate.d_model), candidate)
    for (counts, _), candidate in tqdm(largest.items(), "pruning", leave=False, disable=None):
        if counts not in kept:
            kept[counts], log = choose_layers(teacher, batches, dict(counts))
            removed = [f"{i} ({config.pattern[i]}, cost {cost:.2g})" for i, cost in log]
            tqdm.write(f"layers       {dict(counts)}: removed {', '.join(removed) or 'none'}")
        keep = keep_best(scores, config, candidate, kept[counts])
        loss = validation_loss(run, prune(teacher, keep), token_data, run.batch_size * run.seq_len)
        rows.append((loss, keep))
    return [keep for _, keep in sorted(rows, key=lambda row: row[0])][:run.candidates]


@torch.no_grad()
def propose_minipuzzle(run, teacher, token_data, batches, scores, request):
    """The best Keeps, best first, by the integer program. It changes layers and the MLP width."""
    config, width_costs = teacher.config, {}
    everything = list(range(len(config.pattern)))
    choose = lambda f, layers: keep_best(scores, config, dataclasses.replace(config, mlp_dim=f),
                                         layers)
    hidden = lambda model, tokens: model(tokens, head=False).float()
    widths = range(config.mlp_dim, config.mlp_dim // 4, -max(config.mlp_dim // 16, 16))
    for f in widths if "-" in config.pattern else widths[:1]:
        pruned = prune(teacher, choose(f, everything))
        width_costs[f] = sum(float((hidden(pruned, tokens) - hidden(teacher, tokens)
                                    ).square().mean()) for tokens in batches)
    costs = layer_costs(teacher, batches, everything, "hidden")
    found = minipuzzle(costs, width_costs, config, request)
    return [choose(f, layers) for _, layers, f in found[:run.candidates]]


def propose(run, teacher, token_data):
    """The Keeps of the best --candidates, the same in every process."""
    request = request_for(run, teacher.config)
    needed, limit = request.needs(teacher.config) / GIB, request.limit / GIB
    print(f"budget       {limit:.4f} GiB of the teacher's {needed:.4f}, {run.context} tokens x "
          f"{run.batch}")
    if run.memory_gib and needed <= limit:
        raise ValueError(f"--memory-gib is {run.memory_gib:g}: the teacher fits it already, with "
                         f"{needed:.4g} GiB; there is nothing to prune")
    batches = calibration(run, token_data, teacher.lm_head.weight.device)
    method = propose_minitron if run.method == "minitron" else propose_minipuzzle
    box = [method(run, teacher, token_data, batches[:2], importance(teacher, batches), request)]
    if rank_and_size()[1] > 1:      # other processes may rank nearly equal scores differently
        dist.broadcast_object_list(box)
    return box[0]


def compress(run, teacher, token_data, loss_fn, task):
    """Propose candidates, try them, choose one: (pruned student, notes for a resumed run)."""
    before, proposals = validation_loss(run, teacher, token_data), propose(run, teacher, token_data)
    configs = [keep.config(teacher.config) for keep in proposals]
    device, dtype = teacher.lm_head.weight.device, teacher.compute_dtype
    trial, table = run.training(steps=-(-run.steps // TRIAL_SHARE)), []
    check_memory(trial, max(configs, key=HybridConfig.n_params), dtype, device.type)
    print(f"loss [nats per token] directly after pruning and after {trial.steps} steps of "
          f"training:\n{'candidate':52s}{'params M':>9s}{'pruned':>9s}{'trained':>9s}")
    for keep, config in zip(proposals, configs):
        student = prune(teacher, keep).float()      # fp32 masters, whatever the teacher's dtype
        pruned = trained = validation_loss(run, student, token_data)
        if len(proposals) > 1:
            trained = train_briefly(trial, student, token_data, loss_fn, task)
        table.append(dict(candidate=describe(config), layers=keep.layers, pruned=pruned,
                          trained=trained))
        print(f"{describe(config):52s}{config.n_params() / 1e6:9.2f}{pruned:9.4f}{trained:9.4f}",
              flush=True)

    chosen, scratch = min(range(len(table)), key=lambda i: table[i]["trained"]), None
    print(f"chosen       {describe(configs[chosen])}: the lowest loss")
    if run.scratch:
        print(f"scratch      the same shape from scratch, {run.steps} steps", flush=True)
        torch.manual_seed(run.seed)
        model = HybridLM(configs[chosen], dtype).to(device)
        scratch = train_briefly(run.training(lr=train_fp8.Run.lr), model, token_data, task=task)
    student = prune(teacher, proposals[chosen]).float()
    return student, dict(
        teacher_accuracy=score(teacher, task), pruned_accuracy=score(student, task),
        config=dataclasses.asdict(configs[chosen]), candidates=table, teacher_val_loss=before,
        pruned_val_loss=table[chosen]["pruned"], scratch_val_loss=scratch)


def build(run, teacher, training, state):
    """The Job of the distillation. A run resumed at step 0 prunes again."""
    device, token_data, loss_fn = pick_device(run.device), load_text(run), make_kd_loss(teacher)
    task = load_task(run, token_data)
    dtype = pick_dtype(state["compute_dtype"] if state else run.compute_dtype, device)
    teacher.compute_dtype = dtype
    print(f"teacher      {run.teacher}: {teacher.config.pattern}, "
          f"{teacher.config.n_params() / 1e6:.2f} M parameters, on {device} in {str(dtype)[6:]}")
    if state and state["step"]:
        notes = state["notes"]
        student = HybridLM(HybridConfig(**notes["config"]), dtype).to(device)
        check_memory(training, student.config, dtype, device)
    else:
        student, notes = compress(run, teacher, token_data, loss_fn, task)
    print("distilling   loss is KL(teacher || student), val is the student's loss on the text"
          + (", half of the rows are the task that the teacher was aligned to" if task else ""))
    return Job(student, token_data, loss_fn, task, eval_tokens=EVAL_TOKENS, notes=notes)


def report(run, teacher_config, training, job, rows, student_loss):
    """Print the tables, draw the plot, return the values of the last line."""
    request, config, notes = request_for(run, teacher_config), job.model.config, job.notes
    before, pruned, scratch = (notes[f"{name}_val_loss"]
                               for name in ("teacher", "pruned", "scratch"))
    print(f"\n{'':14s}{'loss':>9s}{'parameters':>13s}{'GiB':>9s}")
    for name, loss, c in (("teacher", before, teacher_config), ("pruned", pruned, config),
                          ("distilled", student_loss, config), ("from scratch", scratch, config)):
        if loss is not None:
            print(f"{name:14s}{loss:9.4f}{c.n_params():13,d}{request.needs(c) / GIB:9.4f}")

    recovered = lambda loss: (pruned - loss) / (pruned - before) if pruned > before else None
    percent = lambda share: "nothing" if share is None else f"{share:.1%}"
    seen = [(0, pruned)] + [(row["tokens"], row["val_loss"]) for row in rows if "val_loss" in row]
    seen.append((run.steps * run.batch_size * run.seq_len, student_loss))
    print(f"\n{'tokens':>10s}{'loss':>9s}{'recovered':>11s}")
    for tokens, loss in seen:
        print(f"{tokens:10,d}{loss:9.4f}{percent(recovered(loss)):>11s}")
    picture = pathlib.Path(run.out) / "recovery.png"
    plot_recovery(seen, before, scratch, f"{percent(recovered(student_loss))} of the loss that "
                  "pruning added is recovered", picture)
    print(f"plot         {picture}")
    accuracy = score(job.model, job.batches)
    if accuracy is not None:
        print(f"accuracy     teacher {notes['teacher_accuracy']:.1%}, pruned "
              f"{notes['pruned_accuracy']:.1%}, distilled {accuracy:.1%}")
    for name in ("chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"):
        if (pathlib.Path(run.teacher) / name).exists():         # the format of a chat
            shutil.copy(pathlib.Path(run.teacher) / name, run.out)
    return notes | dict(student_val_loss=student_loss, recovered=recovered(student_loss),
                        student_accuracy=accuracy,
                        params_before=teacher_config.n_params(), params_after=config.n_params(),
                        memory_gib_before=request.needs(teacher_config) / GIB,
                        memory_gib_after=request.needs(config) / GIB, out=run.out)


def plot_recovery(seen, teacher, scratch, title, path):
    """Draw the student's loss over tokens of distillation, and the teacher's."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis, tokens = figure.subplots(), [t / 1e6 for t, _ in seen]
    axis.plot(tokens, [loss for _, loss in seen], "o-", color="#4c72b0", label="student")
    axis.axhline(teacher, color="#444444", linestyle="--", label="teacher")
    if scratch is not None:
        axis.plot(tokens[-1:], [scratch], "s", color="#c44e52", label="from scratch, same tokens")
    axis.set(title=title, xlabel="tokens of distillation [millions]",
             ylabel="validation loss [nats per token]")
    axis.legend()
    figure.savefig(path, dpi=120)


@script(Run)
def main(run):
    if run.list:
        return show_list(run)
    training, device = run.training(), pick_device(run.device)
    start_processes(device)
    teacher, _ = load_run(run.teacher, device)
    teacher.requires_grad_(False)
    settings = settings_of(run) | dict(teacher=align.fingerprint(teacher))
    return train_in_folder(training, functools.partial(build, run, teacher),
                           functools.partial(report, run, teacher.config), settings)


if __name__ == "__main__":
    main()
