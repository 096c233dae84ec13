"""Every method is its formula, the probe measures what it says, and the search finds the max stable
learning rate.
"""

import contextlib
import copy
import io
import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_close
from torch.nn.utils import parametrize

import stability
import train_fp8
from model import Attention, HybridConfig, HybridLM, rotate
from stability import (METHODS, PartNorm, Run, SigmaReparam, apply_method, attend_eager, diverges,
                       get_bracket, get_linear, mean_norms, next_lr, probe, run_trial,
                       update_sigmas)

CONFIG = HybridConfig(pattern="*-M-*-M-", vocab_size=70, d_model=40, mlp_dim=48, n_heads=6,
                      n_kv_heads=2, head_dim=8, mamba_heads=4, mamba_head_dim=6, n_groups=2,
                      d_state=5, chunk_size=8)
TOKENS = torch.randint(70, (2, 19), generator=torch.Generator().manual_seed(0))
LABELS = TOKENS.roll(-1, 1)


def make(method, norm="layernorm", config=CONFIG):
    """fp64, every parameter away from where it starts."""
    torch.manual_seed(3)
    model = HybridLM(config).double()
    apply_method(model, method, norm)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def by_parts(x, width, weight, bias, eps):
    """LayerNorm (RMSNorm if bias is None) of every `width` values, by formula."""
    parts = x.unflatten(-1, (-1, width))
    if bias is not None:
        parts = parts - parts.mean(-1, keepdim=True)
    parts = parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return (parts if bias is None else parts + bias).flatten(-2)


def attention_by_formula(mixer, x, method, eps):
    """The layer with every formula in sight: causal, grouped, one head at a time."""
    def project(name):
        module = getattr(mixer, name)
        if isinstance(module, torch.nn.Sequential) and name != "o_proj":
            return by_parts(x @ module[0].weight.t(), 8, module[1].weight, module[1].bias, eps)
        return x @ getattr(module, "weight").t()
    q, k, v = project("q_proj"), project("k_proj"), project("v_proj")
    t, outs = x.shape[1], []
    future = torch.ones(t, t, dtype=torch.bool).triu(1)
    for h in range(6):
        of = lambda m, i: m[..., 8 * i:8 * i + 8]
        z = of(q, h) @ of(k, h // 3).transpose(1, 2) / math.sqrt(8)
        if method == "soft_temp":
            z = 0.5 * z
        if method in ("soft_cap", "qk_norm_cap"):
            z = 50 * torch.tanh(z / 50)
        P = z.exp().masked_fill(future, 0)
        P = P / P.sum(-1, keepdim=True)
        if method == "soft_clip":
            P = ((1.03 + 0.03) * P - 0.03).clip(0, 1).masked_fill(future, 0)
        outs.append(P @ of(v, h // 3))
    return torch.cat(outs, -1)


def forward_by_formula(model, method, x):
    """The whole stack by formula, its linears and scans taken from the model."""
    eps, config = CONFIG.norm_eps, CONFIG
    rms = lambda m, w: m / (m.square().mean(-1, keepdim=True) + eps).sqrt() * w
    for block in model.backbone.layers:
        mixer, letter = block.mixer, block.letter
        no_pre_norm = method == "qkv_norm" and letter != "-"
        n = x if no_pre_norm else rms(x, block.norm.weight)
        if letter == "*":
            y, last = attention_by_formula(mixer, n, method, eps), mixer.o_proj
        elif letter == "-":
            first = mixer.up_proj
            y, last = F.relu(n @ first.weight.t()).square(), mixer.down_proj
        else:
            y, last = mamba_by_formula(mixer, n, method), mixer.out_proj
        linear = last[0] if isinstance(last, torch.nn.Sequential) else last
        y = y @ linear.weight.t()
        if method == "qk_fc_norm":
            y = by_parts(y, config.d_model, last[1].weight, last[1].bias, eps)
        if method == "layer_scale":
            y = y * last[1].weight
        x = x + y
    return rms(x, model.backbone.norm_f.weight)


def mamba_by_formula(mixer, x, method):
    """in_proj with its norms, convolution, recurrence token by token, gated group norm."""
    eps, c = CONFIG.norm_eps, CONFIG
    di, bc, h = c.d_inner, c.n_groups * c.d_state, c.mamba_heads
    module = mixer.in_proj
    linear = module[0] if isinstance(module, torch.nn.Sequential) else module
    parts = list((x @ linear.weight.t()).split([di, di, bc, bc, h], -1))
    if method.startswith("qk"):
        widths = [6, 6, 5, 5, 4] if method == "qkv_norm" else [0, 0, 5, 5, 4]
        parts = [by_parts(m, w, f.weight, f.bias, eps) if w else m
                 for m, w, f in zip(parts, widths, module[1].norms)]
    z, xBC, dt = parts[0], torch.cat(parts[1:4], -1), F.softplus(parts[4] + mixer.dt_bias)
    padded = F.pad(xBC, (0, 0, 3, 0))
    taps = mixer.conv1d.weight.squeeze(1)
    xBC = F.silu(sum(padded[:, j:j + x.shape[1]] * taps[:, j] for j in range(4))
                 + mixer.conv1d.bias)
    u, B, C = xBC.split([di, bc, bc], -1)
    u = u.unflatten(-1, (h, 6))
    B, C = (m.unflatten(-1, (2, 5)).repeat_interleave(2, 2) for m in (B, C))
    A, S, ys = -mixer.A_log.exp(), 0, []
    for i in range(x.shape[1]):
        S = (dt[:, i] * A).exp()[..., None, None] * S \
            + dt[:, i, :, None, None] * u[:, i, :, :, None] * B[:, i, :, None, :]
        ys.append((S * C[:, i, :, None, :]).sum(-1) + mixer.D[:, None] * u[:, i])
    y = torch.stack(ys, 1).flatten(2) * F.silu(z)
    return by_parts(y, di // 2, 1.0, None, eps) * mixer.norm.weight


# ------------------------------------------------------------------------------------------------
# The methods


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_formula_with_every_gradient(method):
    """On a pattern with attention (grouped), MLP and Mamba-2. (One number added to all keys changes
    no softmax: the gradient of k's bias is zero but for the cap.)
    """
    model = make(method)
    loss = model.loss(TOKENS, LABELS)
    names, parameters = zip(*model.named_parameters())
    got = torch.autograd.grad(loss, parameters)
    h = forward_by_formula(model, method, model.backbone.embeddings.weight[TOKENS])
    truth = F.cross_entropy((h @ model.lm_head.weight.t()).flatten(0, 1), LABELS.flatten())
    expected = torch.autograd.grad(truth, parameters)
    rows = [row for row in zip(names, got, expected)
            if not (row[0].endswith("k_proj.1.bias") and float(row[2].norm()) < 1e-12)]
    names, got, expected = zip(*rows)
    assert_close([loss.detach(), *got], [truth.detach(), *expected], ["loss", *names], 1e-10)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_part_norm_is_its_formula(norm):
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    m = PartNorm(8, norm).double()
    with torch.no_grad():
        for p in m.parameters():
            p.normal_()
    truth = by_parts(x, 8, m.weight, m.bias, 1e-5)
    weight = torch.randn_like(truth)
    inputs = [x, *m.parameters()]
    assert_close([m(x), *torch.autograd.grad((m(x) * weight).sum(), inputs)],
                 [truth, *torch.autograd.grad((truth * weight).sum(), inputs)],
                 ["y", "dx", "dweight", "dbias"][:len(inputs) + 1], 1e-10)
    assert (m.bias is None) == (norm == "rmsnorm")


def test_added_norms_are_of_the_kind_that_was_asked_for():
    model = apply_method(HybridLM(CONFIG), "qk_fc_norm", "rmsnorm")
    added = [m for m in model.modules() if isinstance(m, PartNorm)]
    assert len(added) == 2 * 3 + 4 + 2 * 4 and all(m.bias is None for m in added)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_changes_the_loss_and_the_baseline_does_not(method):
    """Logits are large here, so that a softmax that nobody swapped would show."""
    torch.manual_seed(0)
    plain = HybridLM(CONFIG).double()
    with torch.no_grad():
        for block in plain.backbone.layers:
            if block.letter == "*":
                block.mixer.q_proj.weight.mul_(30)
    changed = HybridLM(CONFIG).double()
    changed.load_state_dict(plain.state_dict())
    apply_method(changed, method)
    with torch.no_grad():
        a, b = plain.loss(TOKENS, LABELS), changed.loss(TOKENS, LABELS)
    assert (abs(a - b) < 1e-12) == (method == "baseline")


def test_soft_clip_reaches_zero_and_one_and_the_cap_binds():
    """z = 60 and -60 become 50 tanh(1.2) and its negative: the logits differ by 83.4, not 120."""
    q = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    q[..., 0] = 40.0
    k = torch.tensor([[[[3.0, 0, 0, 0], [-3.0, 0, 0, 0]]]], dtype=torch.float64)
    v = torch.eye(2, dtype=torch.float64).repeat(1, 1, 1, 2)
    P = METHODS["soft_clip"].attend(q, k, v)[0, 0, 1, :2]
    assert P.tolist() == [1.0, 0.0]                                 # exactly
    P = METHODS["soft_cap"].attend(q, k, v)[0, 0, 1, :2]
    assert math.log(P[0] / P[1]) == pytest.approx(2 * 50 * math.tanh(60 / 50))


@pytest.mark.parametrize("offset, t", [(0, 9), (5, 4), (8, 1)])
def test_eager_attention_equals_the_kernel_at_any_offset(offset, t):
    """Without cap and stretch it is Attention.attend: causal bottom-right, groups, masks."""
    kv_len = offset + t
    q, k, v = (torch.randn(2, h, n, 8, dtype=torch.float64)
               for h, n in ((6, t), (2, kv_len), (2, kv_len)))
    documents = torch.arange(kv_len) // 4
    mask = (documents[:, None] == documents).tril()[offset:].expand(2, 1, t, kv_len)
    for seen in (None, mask):
        assert torch.allclose(attend_eager(q, k, v, seen), Attention.attend(q, k, v, seen),
                              atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_decoding_equals_the_whole(method):
    """A cache goes through the changed modules too: prefill and single tokens, at any split."""
    model = make(method).eval()
    with torch.no_grad():
        truth, cache = model(TOKENS), model.init_cache(2, 19)
        parts = [model(piece, cache) for piece in TOKENS.split([7, 5, 1, 6], 1)]
    assert torch.allclose(torch.cat(parts, 1), truth, atol=1e-9)


def test_qk_norm_comes_before_the_rotary_positions():
    config = HybridConfig(**{**vars(CONFIG), "pattern": "*-", "rope_theta": 100.0})
    model = apply_method(HybridLM(config).double(), "qk_norm")
    x, seen = torch.randn(1, 5, 40, dtype=torch.float64), []
    mixer = model.backbone.layers[0].mixer
    mixer.attend = lambda q, k, v, mask: seen.append((q, k)) or Attention.attend(q, k, v, mask)
    mixer(x)
    for got, name in zip(seen[0], ("q_proj", "k_proj")):
        normed = by_parts(x @ get_linear(mixer, name).weight.t(), 8, 1.0, 0.0, 1e-5)
        normed = normed.unflatten(-1, (-1, 8)).transpose(1, 2)
        assert torch.allclose(got, rotate(normed, 0, 100.0), atol=1e-12)


def test_qkv_norm_has_no_norm_before_the_layer():
    model = make("qkv_norm")
    kinds = {block.letter: type(block.norm).__name__ for block in model.backbone.layers}
    assert kinds == {"*": "Identity", "M": "Identity", "-": "RMSNorm"}
    assert not any(name.endswith("layers.0.norm.weight") for name, _ in model.named_parameters())


def sigma_weights(model):
    """The parametrisations of a model: [0] is the SigmaReparam, .original its weight."""
    return [m.parametrizations.weight for m in model.modules() if parametrize.is_parametrized(m)]


def largest(m):
    return float(torch.linalg.matrix_norm(m.detach(), 2))


def test_sigma_is_the_largest_singular_value_and_follows_the_weight():
    model = apply_method(HybridLM(CONFIG).double(), "sigma_reparam")
    every = sigma_weights(model)
    assert len(every) == 2 * 4 + 4 * 2 + 2 * 2          # of 2 attention, 4 MLP, 2 Mamba layers
    for p in every:
        sigma = float(p[0].sigma(p.original.detach()))
        assert sigma == pytest.approx(largest(p.original), rel=1e-4)
        assert largest(p()) == pytest.approx(1.0, rel=1e-4)
    with torch.no_grad():
        for p in every:
            p.original.add_(torch.randn_like(p.original))
    model.loss(TOKENS, LABELS)                          # a pass alone does not move u and v
    p = every[0]
    assert float(p[0].sigma(p.original.detach())) < 0.9 * largest(p.original)
    for _ in range(200):
        update_sigmas(model)
    for p in every:
        assert largest(p()) == pytest.approx(1.0, rel=2e-3)


def test_the_gradient_flows_through_sigma():
    """d (g W / sigma) with sigma = u^T W v and u, v held: against autograd of the formula."""
    W = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    m = SigmaReparam(W.detach())
    u, v, weight = m.u.clone(), m.v.clone(), torch.randn(7, 5, dtype=torch.float64)
    truth = (m.g * W / (u @ W @ v) * weight).sum()
    expected = torch.autograd.grad(truth, [W, m.g])
    assert_close(torch.autograd.grad((m(W) * weight).sum(), [W, m.g]), expected, ["dW", "dg"],
                 1e-10)
    assert float((expected[0] * W).sum().detach()) == pytest.approx(0, abs=1e-12)    # no scale of W


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_a_changed_model_is_a_model_of_its_own(method):
    """Its own weights and its own gradients, with FP8 linears and recomputed layers, too."""
    config = HybridConfig(pattern="*-M-*-", vocab_size=48, d_model=32, mlp_dim=48, n_heads=2,
                          n_kv_heads=2, head_dim=16, mamba_heads=16, mamba_head_dim=4, n_groups=2,
                          d_state=8, chunk_size=8)
    model = train_fp8.prepare_layers(train_fp8.Run(recompute=True), HybridLM(config), "emulated",
                                     verbose=False)
    apply_method(model, method)
    tokens = torch.randint(0, config.vocab_size, (2, 9))
    loss, other = float(model.loss(tokens, tokens).detach()), copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    value = other.loss(tokens, tokens)
    value.backward()
    assert float(value.detach()) == loss != float(model.loss(tokens, tokens).detach())
    assert all(p.grad is not None for p in other.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_methods_combine_with_fp8_and_with_recomputing():
    """The linears inside stay Float8Linear; activations are the same when computed twice, and the
    probe sees the same in both.
    """
    config = HybridConfig(pattern="*-M-*-", vocab_size=48, d_model=32, mlp_dim=48, n_heads=2,
                          n_kv_heads=2, head_dim=16, mamba_heads=16, mamba_head_dim=4, n_groups=2,
                          d_state=4, chunk_size=8)
    for method in METHODS:
        results = []
        for recompute in (False, True):
            torch.manual_seed(0)
            run = train_fp8.Run(recipe="nano2", recompute=recompute)
            model = train_fp8.prepare_layers(run, HybridLM(config), "emulated", verbose=False)
            apply_method(model, method)
            with probe(model) as seen:
                loss = model.loss(TOKENS % 48, LABELS % 48)
            loss.backward()
            results.append((loss, {name: p.grad for name, p in model.named_parameters()}, seen))
        inner = [m for m in model.modules() if isinstance(m, train_fp8.Float8Linear)]
        assert len(inner) == 16 - 8, method
        (loss, grads, seen), (again, other, seen_again) = results
        assert torch.equal(loss, again) and seen == seen_again, method
        assert all(torch.equal(grads[name], other[name]) for name in grads), method


@pytest.mark.parametrize("method", ["soft_temp", "soft_clip", "soft_cap", "qk_norm_cap"])
def test_a_softmax_method_needs_attention(method):
    config = HybridConfig(**{**vars(CONFIG), "pattern": "M-M-"})
    with pytest.raises(ValueError, match=f"{method} changes attention's softmax, and M-M- has no"):
        apply_method(HybridLM(config), method)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="method 'qq' is not one of: baseline, soft_temp"):
        apply_method(HybridLM(CONFIG), "qq")
    with pytest.raises(ValueError, match="norm is 'batch'"):
        apply_method(HybridLM(CONFIG), "qk_norm", "batch")


def test_layer_scale_starts_by_depth():
    start = lambda blocks: float(
        stability.LayerScale(HybridConfig(pattern="*-" * blocks)).weight[0].detach())
    assert [start(blocks) for blocks in (1, 18, 19, 24, 25)] == pytest.approx(
        [0.1, 0.1, 1e-5, 1e-5, 1e-6])


# ------------------------------------------------------------------------------------------------
# The probe


@pytest.mark.parametrize("method", ["baseline", "qkv_norm", "qk_fc_norm", "sigma_reparam",
                                    "qk_norm_cap"])
def test_the_probe_measures_what_it_says(method):
    """Against norms taken by hand in the last layers of each type; in qkv_norm the input is the
    residual stream itself, whose other gradient must not be counted.
    """
    model = make(method)
    with probe(model) as seen:
        loss = model.loss(TOKENS, LABELS)
    loss.backward()
    row = mean_norms(seen)
    assert set(row) == {"QKV", "Proj", "FC1", "FC2", "in_proj", "out_proj", "logit"}

    layers = model.backbone.layers
    per_token = lambda m: float(m.detach().square().sum(-1).mean().sqrt())
    outputs, weights, grads, inputs, logits = [], [], [], [], []
    x = model.embed(TOKENS)
    for i, block in enumerate(layers):
        if block.letter == "*":
            n = block.norm(x).detach().requires_grad_()
            three = [get_linear(block.mixer, k) for k in ("q_proj", "k_proj", "v_proj")]
            outputs.append(math.sqrt(sum(per_token(f(n)) ** 2 for f in three)))
            weights.append(math.sqrt(sum(float(f.weight.detach().square().sum()) for f in three)))
            inputs.append(per_token(n))
            heads = lambda m: m.unflatten(-1, (-1, 8)).transpose(1, 2)
            q, k = heads(block.mixer.q_proj(n)), heads(block.mixer.k_proj(n))
            z = q @ k.repeat_interleave(3, 1).mT / math.sqrt(8)
            logits.append(float(z.masked_fill(
                torch.ones(19, 19, dtype=torch.bool).triu(1), -torch.inf).max().detach()))
            h = x.detach() + block.mixer(n)
            for later in layers[i + 1:]:
                h = later(h)
            loss = F.cross_entropy(model.lm_head(model.backbone.norm_f(h)).flatten(0, 1),
                                   LABELS.flatten())
            grads.append(float(torch.autograd.grad(loss, n)[0].norm()))
        x = block(x)
    mean = lambda values: sum(values) / len(values)
    for kind, letter, name in (("Proj", "*", "o_proj"), ("FC1", "-", "up_proj"),
                               ("FC2", "-", "down_proj"), ("out_proj", "M", "out_proj"),
                               ("in_proj", "M", "in_proj")):
        norms, linears = [], [get_linear(b.mixer, name) for b in layers if b.letter == letter]
        with contextlib.ExitStack() as stack:
            for linear in linears:
                stack.enter_context(linear.register_forward_hook(
                    lambda m, i, o: norms.append((per_token(i[0]), per_token(o)))))
            model.loss(TOKENS, LABELS)
        assert row[kind]["input"] == pytest.approx(mean([i for i, _ in norms]), rel=1e-5), kind
        assert row[kind]["output"] == pytest.approx(mean([o for _, o in norms]), rel=1e-5), kind
        assert row[kind]["weight"] == pytest.approx(mean(
            [float(linear.weight.detach().norm()) for linear in linears]), rel=1e-5), kind
    assert row["QKV"]["output"] == pytest.approx(mean(outputs), rel=1e-5)
    assert row["QKV"]["weight"] == pytest.approx(mean(weights), rel=1e-5)
    assert row["QKV"]["input"] == pytest.approx(mean(inputs), rel=1e-5)
    assert row["QKV"]["grad"] == pytest.approx(mean(grads), rel=1e-5)
    assert row["logit"] == pytest.approx(max(logits), rel=1e-5)


def test_the_probe_changes_nothing_and_leaves_nothing():
    model, plain = make("qk_norm_cap"), make("qk_norm_cap")
    attend = [b.mixer.attend for b in plain.backbone.layers if b.letter == "*"]
    with probe(model) as seen:
        loss = model.loss(TOKENS, LABELS)
    loss.backward()
    truth = plain.loss(TOKENS, LABELS)
    truth.backward()
    assert torch.equal(loss, truth)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    before = dict(seen)
    model.loss(TOKENS.roll(1), LABELS).backward()
    assert seen == before and any(key[0] == "grad" for key in seen)
    assert [b.mixer.attend for b in model.backbone.layers if b.letter == "*"] == attend
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_the_probe_knows_packed_documents():
    """A logit between two documents is not one that a query may see."""
    model, seq_idx = make("baseline"), (torch.arange(19) >= 9).long().expand(2, 19)
    with probe(model) as seen:
        model.loss(TOKENS, LABELS, seq_idx)
    apart = mean_norms(seen)["logit"]
    with probe(model) as seen:
        model.loss(TOKENS[:, :9], LABELS[:, :9])
    first = mean_norms(seen)["logit"]
    with probe(model) as seen:
        model.loss(TOKENS[:, 9:], LABELS[:, 9:])
    assert apart == pytest.approx(max(first, mean_norms(seen)["logit"]))


# ------------------------------------------------------------------------------------------------
# Divergence and the search


@pytest.mark.parametrize("losses, expected", [
    ([5, 4, 3, 2.9, 2.8], False), ([5, 4, 3, 3.2, 3.2, 3.2], True),
    ([5, 4, 3, 3.2, 3.2, 3.1], False), ([5, 4, math.nan], True), ([5, 4, math.inf, 4], True),
    ([5, 5.3, 5.3, 5.3], True), ([5, 4, 4.3, 4.3, 4.0, 4.3, 4.3], False),
    ([3, 3.14, 3.14, 3.14, 3.14], False), ([], False)])
def test_divergence_is_what_the_header_says(losses, expected):
    """Three in a row above 1.05 times the best before them, or not finite."""
    assert diverges([[i, loss] for i, loss in enumerate(losses)]) == expected


@pytest.fixture(scope="module")
def token_data(text):
    return stability.load_data(str(text), "bytes")


def small(text, **changes):
    """A run of seconds."""
    return Run(**dict(data=str(text), tokenizer="bytes", device="cpu", steps=30, batch_size=4,
                      seq_len=32, eval_every=5, eval_tokens=1024, warmup=0.0) | changes)


def trial_of(run, token_data, method="baseline", lr=0.01):
    return run_trial(run, run.config(token_data.vocab_size), method, lr, token_data, "cpu")


def test_a_trial_that_ends_at_the_unigram_entropy_has_diverged(text, token_data):
    """The entropy by hand, over the windows that are evaluated; a learning rate so small that
    nothing is learned falls short of it.
    """
    run = small(text, steps=3, eval_tokens=96)
    train, validation = (m.read(0, len(m)) for m in (token_data.train, token_data.validation))
    p = (torch.bincount(torch.from_numpy(train).long(), minlength=token_data.vocab_size) + 1.0)
    windows = -(-(len(validation) - 1) // 32)
    starts = [i * windows // 3 * 32 for i in range(3)]
    seen = [int(i) for start in starts for i in validation[start + 1:start + 33]]
    truth = -sum(float((p / p.sum()).log()[i]) for i in seen) / len(seen)
    assert stability.unigram_entropy(token_data, run) == pytest.approx(truth, rel=1e-6)
    trial = trial_of(run, token_data, lr=1e-9)
    assert trial["diverged"] == 3 and trial["loss"] is None and trial["evals"][-1][1] > truth


def test_a_loss_that_is_not_finite_ends_a_trial(text, token_data, monkeypatch):
    def broken(model, method):
        model.backbone.norm_f.weight.data[0] = math.inf
    monkeypatch.setattr(stability, "apply_method", broken)
    trial = trial_of(small(text), token_data)
    assert trial["diverged"] == 1 and trial["loss"] is None and trial["norms"] == []


def test_a_trial_evaluates_and_probes_on_its_way(text, token_data):
    trial = trial_of(small(text, steps=23), token_data, "qk_norm")
    assert [step for step, _ in trial["evals"]] == [5, 10, 15, 20, 23]
    assert [row["step"] for row in trial["norms"]] == [1, 5, 10, 15, 20]
    assert {"weight", "input", "output", "grad"} == set(trial["norms"][0]["QKV"])
    assert trial["diverged"] is None and trial["loss"] == trial["evals"][-1][1]


def test_a_trial_depends_on_method_learning_rate_and_seed_alone(text, token_data, monkeypatch):
    """Twice the same; another seed is another start and another order of the text."""
    run, another = small(text, steps=4), small(text, steps=4, seed=1)
    loss = lambda trial: trial["evals"][-1][1]
    one, two, other = (trial_of(r, token_data) for r in (run, run, another))
    assert one == two and abs(loss(one) - loss(other)) > 1e-3
    assert one["norms"][0]["QKV"]["weight"] != other["norms"][0]["QKV"]["weight"]
    same = HybridLM(run.config(token_data.vocab_size)).state_dict()
    monkeypatch.setattr(stability, "apply_method", lambda model, _: model.load_state_dict(same))
    one, other = (trial_of(r, token_data) for r in (run, another))     # only the text differs
    assert abs(loss(one) - loss(other)) > 1e-3


def test_a_trial_warms_up_and_then_keeps_its_learning_rate(text):
    run = small(text, steps=8, warmup=0.5).training(0.2)
    lrs = [train_fp8.wsd(step, 8, run.lr, run.warmup, run.decay) for step in range(8)]
    assert lrs == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2, 0.2])


@pytest.mark.parametrize("recompute", [False, True])
def test_sigma_takes_one_power_iteration_per_training_pass(text, token_data, monkeypatch,
                                                           recompute):
    """Not in evaluation, and not again when activations are recomputed."""
    calls, update = [], SigmaReparam.update
    monkeypatch.setattr(SigmaReparam, "update", lambda *args: calls.append(0) or update(*args))
    run = small(text, steps=3, grad_accum=2, eval_every=2, recompute=recompute)
    apply_method(HybridLM(run.config(token_data.vocab_size)), "sigma_reparam")
    at_the_start = len(calls)
    torch.manual_seed(run.seed)
    apply_method(HybridLM(run.config(token_data.vocab_size)), "sigma_reparam")
    at_the_start, calls[:] = len(calls) - at_the_start, []
    trial_of(run, token_data, "sigma_reparam")
    assert len(calls) - at_the_start == 3 * 2 * (4 * 4 + 4 * 2)     # steps, passes, linears


def test_the_max_stable_learning_rate_is_bracketed_and_bisected():
    """A method that converges up to 0.37: the learning rates rise until one diverges, then the
    bracket is halved in logarithms until it is within the resolution.
    """
    tried, outcomes = [], {}
    while lr := next_lr([0.01, 0.1, 0.2, 0.4, 0.8], outcomes, 1.2):
        tried.append(lr)
        outcomes[lr] = lr > 0.37
    assert tried == [0.01, 0.1, 0.2, 0.4, 0.283, 0.336]
    assert get_bracket(outcomes) == (0.336, 0.4) and 0.4 / 0.336 < 1.2
    assert next_lr([0.01, 0.1], {0.01: True}, 1.2) is None              # even the lowest diverged
    assert get_bracket({0.01: True, 0.1: False}) == (None, 0.01)        # what is above: no matter
    assert next_lr([0.01, 0.1], {0.01: False, 0.1: False}, 1.2) is None
    assert next_lr([0.01, 0.1], {0.01: False, 0.1: True}, 1.0) is None  # no bisection
    assert next_lr([0.1, 0.101], {0.1: False, 0.101: True}, 1.005) is None      # in 3 digits
    assert get_bracket({0.01: False, 0.1: False}) == (0.1, None)


def test_a_diverging_trial_is_put_beside_the_right_one():
    """Beside one that converged at the same learning rate, else beside the same method's."""
    trial = lambda method, lr, bad: dict(method=method, lr=lr, diverged=bad or None, norms=[0])
    run = Run(methods=["baseline", "qk_norm"])
    trials = [trial("qk_norm", 0.1, 0), trial("baseline", 0.2, 7), trial("baseline", 0.01, 0),
              trial("baseline", 0.1, 9)]
    assert stability.pick_pair(run, trials) == (trials[3], trials[0])
    assert stability.pick_pair(run, trials[1:]) == (trials[3], trials[2])
    assert stability.pick_pair(run, trials[:1]) is None


# ------------------------------------------------------------------------------------------------
# The script


def flags(text, out, *more):
    return ["--data", str(text), "--tokenizer", "bytes", "--device", "cpu", "--steps", "30",
            "--batch-size", "4", "--seq-len", "32", "--eval-every", "5", "--eval-tokens", "1024",
            "--warmup", "0", "--resolution", "9999", "--lr", "0.01", "30",
            "--methods", "baseline", "qk_norm", "--out", str(out), *more]


@pytest.fixture(scope="module")
def swept(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        stability.main(flags(text, out))
    return out, printed.getvalue()


def test_a_sweep_finds_the_max_stable_learning_rate_and_reports_it(swept):
    out, printed = swept
    head, *trials = map(json.loads, (out / "trials.jsonl").open())
    assert head["settings"]["steps"] == 30 and len(trials) == 4
    result = json.loads(printed.splitlines()[-1])
    assert set(result) == {"table", "max_lr", "out"}
    for method in ("baseline", "qk_norm"):
        row = result["table"][method]
        assert isinstance(row["0.01"], float) and row["30"] == "diverged"
        assert result["max_lr"][method] == 0.01
        line = next(s for s in printed.splitlines() if s.startswith(method) and "div." in s)
        assert line.split()[1:] == [f"{row['0.01']:.3f}", "div.", "0.01",
                                    f"{METHODS[method].paper[0]:g}"]
    assert (out / "norms.png").stat().st_size > 10_000


def test_a_sweep_goes_on_where_it_stopped_and_does_not_mix(swept, text, tmp_path, capsys, fails):
    """A folder that lacks a trial and has a torn line: only what is missing is run; more methods
    may join, another setting may not, and one process at a time.
    """
    out, _ = swept
    whole = (out / "trials.jsonl").read_text().splitlines()
    half = tmp_path / "half"
    half.mkdir()
    (half / "trials.jsonl").write_text("\n".join(whole[:-1]) + "\n" + whole[-1][:40])
    stability.main(flags(text, half))
    again = (half / "trials.jsonl").read_text().splitlines()
    assert again[:len(whole) - 1] == whole[:-1] and len(again) == len(whole)
    capsys.readouterr()
    stability.main(flags(text, half, "--lr", "0.01", "--methods", "qk_norm"))
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])["table"]) == ["qk_norm"]
    assert "another steps (30, now 13)" in fails(stability.main, flags(text, half, "--steps", "13"))
    assert "another seed" in fails(stability.main, flags(text, half, "--seed", "1"))
    with stability.open_trials(tmp_path / "held", {}):
        assert "another process is at work" in fails(stability.main, flags(text, tmp_path / "held"))
    (tmp_path / "held" / "trials.jsonl").write_text("not a log\n")
    assert "trials of another" in fails(stability.main, flags(text, tmp_path / "held"))
    assert (half / "trials.jsonl").read_text().splitlines() == again


def test_ctrl_c_ends_a_trial_and_keeps_those_before(swept, text, tmp_path):
    """Exit code 130 at once, though the trial would take an hour; whole trials stay on file."""
    out = tmp_path / "out"
    out.mkdir()
    whole = (swept[0] / "trials.jsonl").read_text().replace('"steps": 30,', '"steps": 99999,')
    (out / "trials.jsonl").write_text(whole)
    command = [sys.executable, str(ROOT / "stability.py"), *flags(
        text, out, "--steps", "99999", "--methods", "soft_cap", "--lr", "1e-5")]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT,
                                                                signal.default_int_handler))
    while "are done" not in started.stdout.readline():
        assert started.poll() is None, started.stderr.read()
    time.sleep(2)
    started.send_signal(signal.SIGINT)
    _, errors = started.communicate(timeout=30)
    assert started.returncode == 130 and "Traceback" not in errors, errors
    assert (out / "trials.jsonl").read_text() == whole


@pytest.mark.parametrize("more, words", [
    (["--methods", "magic"], "--methods has 'magic'"), (["--lr", "0"], "--lr is 0.0"),
    (["--seq-len", "100000"], "do not fill two windows"), (["--data", "/nowhere"], "/nowhere")])
def test_bad_flags_are_one_line_and_write_nothing(fails, text, tmp_path, more, words):
    assert words in fails(stability.main, flags(text, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_the_papers_preset_is_of_the_papers_size(capsys):
    """826 M with 256k entries; the hybrids are as large to 3%; all on the meta device."""
    stability.main(["--preset", "stability-830m", "--list"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n_params"] == 826_328_064
    for name in ("toy", "stability-830m"):
        same, hybrid = (Run(preset=p).config().n_params() for p in (name, name + "-hybrid"))
        assert abs(hybrid / same - 1) < 0.03, name


@pytest.mark.parametrize("preset", ["stability-830m", "stability-830m-hybrid"])
@pytest.mark.parametrize("method", ["baseline", "qkv_norm", "sigma_reparam"])
def test_the_papers_preset_takes_a_step_scaled_down(preset, method):
    """Its pattern and depth, thin: loss near ln v at the start, a finite gradient everywhere."""
    values = dict(stability.PRESETS[preset][0], vocab_size=64, d_model=32, mlp_dim=64, n_heads=2,
                  n_kv_heads=2, head_dim=16, mamba_heads=8, mamba_head_dim=4, d_state=4,
                  chunk_size=16)
    model = apply_method(HybridLM(HybridConfig(**values)), method)
    loss = model.loss(TOKENS % 64, LABELS % 64)
    loss.backward()
    assert abs(float(loss.detach()) - math.log(64)) < 0.6
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
