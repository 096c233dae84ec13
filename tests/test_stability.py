"""Every method is its formula, the probe measures what it says, and the sweep finds an edge."""

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
from stability import (ATTEND, CAP, METHODS, STRETCH, PartNorm, Run, SigmaReparam, Sweep,
                       apply_method, divergence, edge, growth, log_mean, next_rate, probe)

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
    """LayerNorm (RMSNorm if bias is None) of every `width` values, written out."""
    parts = x.unflatten(-1, (-1, width))
    if bias is not None:
        parts = parts - parts.mean(-1, keepdim=True)
    parts = parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return (parts if bias is None else parts + bias).flatten(-2)


def written_out_attention(mixer, x, method, eps):
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


def written_out(model, method, x):
    """The whole stack by formula, its linears and scans taken from the model."""
    eps, config = CONFIG.norm_eps, CONFIG
    rms = lambda m, w: m / (m.square().mean(-1, keepdim=True) + eps).sqrt() * w
    for block in model.backbone.layers:
        mixer, letter = block.mixer, block.letter
        bare = method == "qkv_norm" and letter != "-"
        n = x if bare else rms(x, block.norm.weight)
        if letter == "*":
            y, last = written_out_attention(mixer, n, method, eps), mixer.o_proj
        elif letter == "-":
            first = mixer.up_proj
            y, last = F.relu(n @ first.weight.t()).square(), mixer.down_proj
        else:
            y, last = written_out_mamba(mixer, n, method), mixer.out_proj
        linear = last[0] if isinstance(last, torch.nn.Sequential) else last
        y = y @ linear.weight.t()
        if method == "qk_fc_norm":
            y = by_parts(y, config.d_model, last[1].weight, last[1].bias, eps)
        if method == "layer_scale":
            y = y * last[1].weight
        x = x + y
    return rms(x, model.backbone.norm_f.weight)


def written_out_mamba(mixer, x, method):
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
    h = written_out(model, method, model.backbone.embeddings.weight[TOKENS])
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


@pytest.mark.parametrize("method", METHODS)
def test_a_method_changes_the_loss_and_the_baseline_does_not(method):
    """Logits are large here, so that a softmax that nobody swapped would show."""
    torch.manual_seed(0)
    plain = HybridLM(CONFIG).double()
    with torch.no_grad():
        for block in plain.backbone.layers:
            if block.letter == "*":
                block.mixer.q_proj.weight.mul_(30)
    torch.manual_seed(0)
    changed = HybridLM(CONFIG).double()
    changed.load_state_dict(plain.state_dict())
    apply_method(changed, method)
    with torch.no_grad():
        a, b = plain.loss(TOKENS, LABELS), changed.loss(TOKENS, LABELS)
    assert (abs(a - b) < 1e-12) == (method == "baseline")


def test_soft_clip_reaches_zero_and_one_and_the_cap_binds():
    q = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    q[..., 0] = 40.0
    k = torch.tensor([[[[3.0, 0, 0, 0], [-3.0, 0, 0, 0]]]], dtype=torch.float64)
    v = torch.eye(2, dtype=torch.float64).repeat(1, 1, 1, 2)
    P = ATTEND["soft_clip"](q, k, v, 0, None)[0, 0, 1, :2]
    assert P.tolist() == [1.0, 0.0]                                 # exactly
    # z = 60 and -60, capped to 50 tanh(1.2): the two logits differ by 83.4 and not by 120
    P = ATTEND["soft_cap"](q, k, v, 0, None)[0, 0, 1, :2]
    assert math.log(P[0] / P[1]) == pytest.approx(2 * CAP * math.tanh(60 / CAP))
    assert STRETCH == (1.03, -0.03)


@pytest.mark.parametrize("pos, t", [(0, 9), (5, 4), (8, 1)])
def test_attention_written_out_equals_the_kernel_at_any_offset(pos, t):
    """Without cap and stretch it is Attention.attend: causal bottom-right, groups, masks."""
    q, k, v = (torch.randn(2, h, s, 8, dtype=torch.float64)
               for h, s in ((6, t), (2, pos + t), (2, pos + t)))
    truth = Attention.attend(q, k, v, pos, None)
    assert torch.allclose(stability.attend_written_out(q, k, v, pos, None), truth, atol=1e-12)
    if pos == 0:
        mask = (torch.arange(9) // 4)[:, None] == (torch.arange(9) // 4)
        mask = mask.tril().expand(2, 1, 9, 9)
        assert torch.allclose(stability.attend_written_out(q, k, v, 0, mask),
                              Attention.attend(q, k, v, 0, mask), atol=1e-12)


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
    mixer.attend = lambda q, k, v, pos, mask: seen.append((q, k)) or Attention.attend(
        q, k, v, pos, mask)
    mixer(x)
    for (got, name) in zip(seen[0], ("q_proj", "k_proj")):
        linear = getattr(mixer, name)[0]
        normed = by_parts(x @ linear.weight.t(), 8, 1.0, 0.0, 1e-5)
        normed = normed.unflatten(-1, (-1, 8)).transpose(1, 2)
        assert torch.allclose(got, rotate(normed, 0, 100.0), atol=1e-12)


def test_qkv_norm_has_no_norm_before_the_layer():
    model = make("qkv_norm")
    kinds = {block.letter: type(block.norm).__name__ for block in model.backbone.layers}
    assert kinds == {"*": "Identity", "M": "Identity", "-": "RMSNorm"}
    assert not any(name.endswith("layers.0.norm.weight") for name, _ in model.named_parameters())


def test_sigma_is_the_largest_singular_value_and_follows_the_weight():
    torch.manual_seed(0)
    model = apply_method(HybridLM(CONFIG).double(), "sigma_reparam")
    every = [m for m in model.modules() if parametrize.is_parametrized(m)]
    assert len(every) == 2 * 4 + 4 * 2 + 2 * 2          # of 2 attention, 4 MLP, 2 Mamba layers
    largest = lambda m: torch.linalg.matrix_norm(m, 2)
    for m in every:
        p = m.parametrizations.weight
        weight = p.original.detach()
        assert float(p[0].sigma(weight)) == pytest.approx(float(largest(weight)), rel=1e-4)
        assert float(largest(m.weight.detach())) == pytest.approx(1.0, rel=1e-4)
    with torch.no_grad():
        for m in every:
            m.parametrizations.weight.original.add_(torch.randn_like(m.weight))
    with torch.no_grad():
        model.loss(TOKENS, LABELS)              # evaluation does not move u and v
    p = every[0].parametrizations.weight
    assert float(p[0].sigma(p.original.detach())) < 0.9 * float(largest(p.original.detach()))
    for _ in range(200):
        model.loss(TOKENS, LABELS)
    for m in every:
        assert float(largest(m.weight.detach())) == pytest.approx(1.0, rel=2e-3)


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


def test_methods_combine_with_fp8_and_with_recomputing():
    """The linears inside stay Float8Linear; activations are the same when computed twice."""
    config = HybridConfig(pattern="*-M-*-", vocab_size=48, d_model=32, mlp_dim=48, n_heads=2,
                          n_kv_heads=2, head_dim=16, mamba_heads=16, mamba_head_dim=4, n_groups=2,
                          d_state=4, chunk_size=8)
    tokens = TOKENS % 48
    for method in METHODS:
        run = Run(recipe="nano2")
        model = stability.build(run, config, method, 0, "cpu", torch.float32)
        inner = [m for m in model.modules() if isinstance(m, train_fp8.Float8Linear)]
        assert len(inner) == 16 - 8, method
        loss = model.loss(tokens, tokens)
        loss.backward()
        run = Run(recipe="nano2", recompute=True)
        twin = stability.build(run, config, method, 0, "cpu", torch.float32)
        again = twin.loss(tokens, tokens)
        again.backward()
        assert torch.equal(loss, again), method
        for (name, p), q in zip(model.named_parameters(), twin.parameters()):
            assert torch.equal(p.grad, q.grad), (method, name)


@pytest.mark.parametrize("method", ["soft_temp", "soft_clip", "soft_cap", "qk_norm_cap"])
def test_a_softmax_method_needs_attention(method):
    config = HybridConfig(**{**vars(CONFIG), "pattern": "M-M-"})
    with pytest.raises(ValueError, match=f"{method} changes attention's softmax, and M-M- has no"):
        apply_method(HybridLM(config), method)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="method 'qq' is not one of: baseline, soft_temp"):
        apply_method(HybridLM(CONFIG), "qq")
    with pytest.raises(ValueError, match="--norm is 'batch'"):
        apply_method(HybridLM(CONFIG), "qk_norm", "batch")


# ------------------------------------------------------------------------------------------------
# The probe


@pytest.mark.parametrize("method", ["baseline", "qkv_norm", "qk_fc_norm", "sigma_reparam",
                                    "qk_norm_cap"])
def test_the_probe_measures_what_it_says(method):
    """Against norms taken by hand in the last layers of each kind; in qkv_norm the input is the
    residual stream itself, whose other gradient must not be counted.
    """
    model = make(method)
    watch = probe(model)
    with watch:
        model.loss(TOKENS, LABELS).backward()
    row = watch.row()
    assert set(row) == {"QKV", "Proj", "FC1", "FC2", "in_proj", "out_proj", "logit"}

    layers = model.backbone.layers
    per_token = lambda m: float(m.detach().square().sum(-1).mean().sqrt())
    outputs, weights, grads, inputs, logits = [], [], [], [], []
    with torch.no_grad():           # else u and v of sigma_reparam would move on
        x = model.embed(TOKENS)
    for i, block in enumerate(layers):
        if block.letter == "*":
            n = block.norm(x).detach().requires_grad_()
            three = [stability.bare(getattr(block.mixer, k)) for k in ("q_proj", "k_proj",
                                                                      "v_proj")]
            outputs.append(math.sqrt(sum(per_token(f(n)) ** 2 for f in three)))
            weights.append(math.sqrt(sum(float(f.weight.detach().square().sum()) for f in three)))
            inputs.append(per_token(n))
            heads = lambda m: m.unflatten(-1, (-1, 8)).transpose(1, 2)
            q, k = heads(block.mixer.q_proj(n)), heads(block.mixer.k_proj(n))
            z = q @ k.repeat_interleave(3, 1).mT / math.sqrt(8)
            logits.append(float(z.tril().masked_fill(
                torch.ones(19, 19, dtype=torch.bool).triu(1), -torch.inf).max().detach()))
            rest, h = block.mixer(n), x + 0
            h = x.detach() + rest
            for later in layers[i + 1:]:
                h = later(h)
            loss = F.cross_entropy(model.lm_head(model.backbone.norm_f(h)).flatten(0, 1),
                                   LABELS.flatten())
            grads.append(float(torch.autograd.grad(loss, n)[0].norm()))
        x = block(x)
    mean = lambda values: sum(values) / len(values)
    for kind, letter, name in (("Proj", "*", "o_proj"), ("FC2", "-", "down_proj"),
                               ("out_proj", "M", "out_proj"), ("in_proj", "M", "in_proj")):
        seen, hooks = [], []
        for block in layers:
            if block.letter == letter:
                linear = stability.bare(getattr(block.mixer, name))
                hooks.append(linear.register_forward_hook(
                    lambda m, i, o: seen.append((per_token(i[0]), per_token(o)))))
        with torch.no_grad():
            model.loss(TOKENS, LABELS)
        for hook in hooks:
            hook.remove()
        assert row[kind]["input"] == pytest.approx(mean([i for i, _ in seen]), rel=1e-5), kind
        assert row[kind]["output"] == pytest.approx(mean([o for _, o in seen]), rel=1e-5), kind
    assert row["QKV"]["output"] == pytest.approx(mean(outputs), rel=1e-5)
    assert row["QKV"]["weight"] == pytest.approx(mean(weights), rel=1e-5)
    assert row["QKV"]["input"] == pytest.approx(mean(inputs), rel=1e-5)
    assert row["QKV"]["grad"] == pytest.approx(mean(grads), rel=1e-5)
    assert row["logit"] == pytest.approx(max(logits), rel=1e-5)


def test_the_probe_changes_nothing_and_is_quiet_outside():
    model, plain = make("qk_norm"), make("qk_norm")
    watch = probe(model)
    for inside in (True, False):
        model.zero_grad()
        plain.zero_grad()
        if inside:
            with watch:
                loss = model.loss(TOKENS, LABELS)
                loss.backward()
            seen = watch.row()
        else:
            loss = model.loss(TOKENS, LABELS)
            loss.backward()
            assert watch.row() == seen
        truth = plain.loss(TOKENS, LABELS)
        truth.backward()
        assert torch.equal(loss, truth)
        for p, q in zip(model.parameters(), plain.parameters()):
            assert torch.equal(p.grad, q.grad)
    attend = [b.mixer.attend for b in plain.backbone.layers if b.letter == "*"]
    watch.remove()
    assert [b.mixer.attend for b in model.backbone.layers if b.letter == "*"] == attend
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


# ------------------------------------------------------------------------------------------------
# Divergence and the search of the edge


@pytest.mark.parametrize("losses, where", [
    ([5, 4, 3, 2.9, 2.8], None), ([5, 4, 3, 3.2, 3.2, 3.2], 5), ([5, 4, 3, 3.2, 3.2, 3.1], None),
    ([5, 4, math.nan], 2), ([5, 4, math.inf, 4], 2), ([5, 5.3, 5.3, 5.3], 3),
    ([5, 4, 4.3, 4.3, 4.0, 4.3, 4.3, 4.3], 7), ([3, 3.14, 3.14, 3.14, 3.14], None)])
def test_divergence_is_what_the_header_says(losses, where):
    """Three in a row above 1.05 times the best before them, or not finite."""
    assert divergence(losses) == where


def test_a_run_that_ends_at_the_frequencies_of_tokens_has_diverged(text):
    """The unigram loss by hand; a rate so small that nothing is learned falls short of it."""
    token_data = stability.load_data(str(text), "bytes")
    train, validation = (m.read(0, len(m)) for m in (token_data.train, token_data.validation))
    p = (torch.bincount(torch.from_numpy(train).long(), minlength=token_data.vocab_size) + 1.0)
    p = (p / p.sum()).log()
    truth = -sum(float(p[int(i)]) for i in validation[1:101]) / 100
    assert stability.unigram_loss(token_data, 100) == pytest.approx(truth, rel=1e-6)
    run = stability.parse_flags(Run, flags(text, "out", "--steps", "3"))
    cell = stability.run_cell(run, run.config(token_data.vocab_size), "baseline", 1e-9, 0,
                              token_data, "cpu", torch.float32)
    assert cell["diverged"] == 3 and cell["loss"] is None


def test_cells_without_an_evaluation_have_tables_too(known, capsys):
    for one in known.cells.values():
        one["evals"] = []
    table = stability.summary(known)
    assert table["qk_norm"]["rates"]["and within 1.05 of the best at the end"] == [0.1, 0.2, 0.2]
    stability.print_table(known, table)


def test_a_loss_that_is_not_finite_ends_a_cell(text, monkeypatch):
    token_data = stability.load_data(str(text), "bytes")
    run = stability.parse_flags(Run, flags(text, "out"))
    build = stability.build

    def broken(*args):
        model = build(*args)
        model.backbone.norm_f.weight.data[0] = math.inf
        return model
    monkeypatch.setattr(stability, "build", broken)
    cell = stability.run_cell(run, run.config(token_data.vocab_size), "baseline", 0.01, 0,
                              token_data, "cpu", torch.float32)
    assert cell["diverged"] == 1 and cell["losses"] == [] and cell["norms"] == []


def test_the_edge_is_bracketed_and_bisected():
    """A method that converges up to 0.37 on rates 0.01, 0.1 ... : the tried rates rise, then the
    bracket is halved in logarithms until it is within the resolution.
    """
    tried, verdicts = [], {}
    while (lr := next_rate([0.01, 0.1, 0.2, 0.4, 0.8], verdicts, 1.2)) is not None:
        tried.append(lr)
        verdicts[lr] = lr > 0.37
    assert tried == [0.01, 0.1, 0.2, 0.4, 0.283, 0.336]
    assert edge(verdicts) == (0.336, 0.4) and 0.4 / 0.336 < 1.2
    assert next_rate([0.01, 0.1], {0.01: True}, 1.2) is None        # even the lowest diverged
    assert edge({0.01: True, 0.1: False}) == (None, 0.01)           # what lies above does not count
    assert next_rate([0.01, 0.1], {0.01: False, 0.1: False}, 1.2) is None
    assert next_rate([0.1, 0.101], {0.1: False, 0.101: True}, 1.005) is None    # in 3 digits
    assert edge({0.01: False, 0.1: False}) == (0.1, None)
    assert log_mean([0.1, 0.4])[0] == pytest.approx(0.2) and log_mean([None, 1.0]) == (None, None)


def cell(method, lr, seed, last, best=None, diverged=None):
    """As run_cell makes it, in the two evaluations that the tables read."""
    return dict(method=method, lr=lr, seed=seed, diverged=diverged, evals=[[5, best or last],
                                                                            [10, last]],
                loss=None if diverged else last, norms=[], losses=[], ms=1.0, probe_ms=2.0)


@pytest.fixture
def known(tmp_path):
    """Three seeds of three methods with known edges: qk_norm at 0.1, 0.2, 0.2; baseline at half of
    that, its lowest rate diverged in seed 1; qkv_norm never diverged in seed 2.
    """
    run = Run(methods=["qkv_norm", "baseline", "qk_norm"], lr=[0.1, 0.2, 0.4], seeds=3,
              resolution=2.0, out=str(tmp_path / "known"))
    sweep = Sweep(run, {}, unigram=5.0)
    for args in (("qk_norm", 0.1, 0, 4.0), ("qk_norm", 0.2, 0, 4.9, None, 9),
                 ("qk_norm", 0.1, 1, 4.1), ("qk_norm", 0.2, 1, 4.2), ("qk_norm", 0.4, 1, 9, 9, 9),
                 ("qk_norm", 0.1, 2, 4.2), ("qk_norm", 0.2, 2, 4.4), ("qk_norm", 0.4, 2, 9, 9, 9),
                 ("baseline", 0.1, 0, 4.4), ("baseline", 0.2, 0, 9, 9, 9),
                 ("baseline", 0.1, 1, 9, 9, 9),
                 ("baseline", 0.1, 2, 4.62, 4.2), ("baseline", 0.2, 2, 9, 9, 9),
                 ("qkv_norm", 0.1, 0, 3.6), ("qkv_norm", 0.2, 0, 4.4),
                 ("qkv_norm", 0.4, 0, 9, 9, 9),
                 ("qkv_norm", 0.1, 1, 4.1), ("qkv_norm", 0.2, 1, 9, 9, 9),
                 ("qkv_norm", 0.1, 2, 4.2), ("qkv_norm", 0.2, 2, 4.2), ("qkv_norm", 0.4, 2, 4.3)):
        one = cell(*args)
        sweep.cells[one["method"], one["lr"], one["seed"]] = one
    return sweep


def test_the_summary_of_known_cells(known):
    """Edges by seed, ratios of seeds that have both, the two other rules."""
    assert known.run.methods == ["baseline", "qk_norm", "qkv_norm"]         # the paper's order
    table = stability.summary(known)
    assert table["qk_norm"]["edges"] == [0.1, 0.2, 0.2] and not table["qk_norm"]["open"]
    assert table["baseline"]["edges"] == [0.1, None, 0.1]
    assert table["baseline"]["ratios"]["as defined"] == [1.0, 0.5]
    assert table["baseline"]["losses"] == [4.4, None, 4.62]
    assert table["qkv_norm"]["open"] and table["qkv_norm"]["edges"] == [0.2, 0.1, 0.4]
    assert table["qkv_norm"]["ratios"]["as defined"] == [2.0, 0.5, 2.0]
    strict = {m: row["rates"]["and within 1.05 of the best at the end"] for m, row in table.items()}
    assert strict["baseline"] == [0.1, None, None]          # 4.62 is 1.1 times 4.2
    assert strict["qk_norm"] == [0.1, 0.2, 0.2]
    half = "half of what can be learned is kept"            # seed 0: (5 + 3.6) / 2 = 4.3
    assert table["qkv_norm"]["rates"][half][0] == pytest.approx(0.1 * 2 ** (0.7 / 0.8))
    assert table["qk_norm"]["rates"][half][0] == pytest.approx(0.1 * 2 ** 0.3)     # 5 at 0.2
    assert table["baseline"]["rates"][half][0] is None      # above it at the lowest rate already


def test_the_tables_of_known_cells(known, capsys):
    """Differences to baseline pair seeds, not places in a list; a lower bound is marked."""
    table = stability.summary(known)
    stability.print_table(known, table)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[3:6]}
    assert 4.0 / 4.4 == pytest.approx(4.2 / 4.62) and "-9.09 +- " in lines["qk_norm"]
    assert ">0.2 x/ 2.00" in lines["qkv_norm"] and "0.159" in lines["qk_norm"]
    assert "- " in lines["baseline"]
    words = stability.compare_order({
        "baseline": dict(edges=[0.1, 0.1], open=False),
        "qk_norm": dict(edges=[0.4, 0.4], open=False),
        "soft_cap": dict(edges=[0.11, 0.11], open=False),
        "qkv_norm": dict(edges=[0.2, 0.2], open=False),
        "qk_norm_cap": dict(edges=[None, 0.2], open=False)}, 1.2)
    assert words == ["baseline < soft_cap cannot be told; baseline < qk_norm holds",
                     "soft_cap < qkv_norm holds; qk_norm < qkv_norm not here"]


def test_every_seed_is_another_start_and_another_text(text, monkeypatch):
    token_data = stability.load_data(str(text), "bytes")
    run = stability.parse_flags(Run, flags(text, "out", "--steps", "2"))
    config = run.config(token_data.vocab_size)
    one, two = (stability.build(run, config, "baseline", seed, "cpu", None) for seed in (0, 1))
    assert not torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert run.training(0.1, 5).seed == 5
    monkeypatch.setattr(stability, "build", lambda *_: HybridLM(config))
    first = []
    for seed in (0, 1):
        torch.manual_seed(0)                    # the same start: only the text differs
        first.append(stability.run_cell(run, config, "baseline", 1e-12, seed, token_data, "cpu",
                                        torch.float32)["losses"])
    assert all(abs(a - b) > 1e-3 for a, b in zip(*first))


def test_layer_scale_starts_by_depth():
    starts = {blocks: stability.layer_scale_start(HybridConfig(pattern="*-" * blocks))
              for blocks in (1, 18, 19, 24, 25)}
    assert starts == {1: 0.1, 18: 0.1, 19: 1e-5, 24: 1e-5, 25: 1e-6}


# ------------------------------------------------------------------------------------------------
# The script


def flags(text, out, *more):
    return ["--data", str(text), "--tokenizer", "bytes", "--device", "cpu", "--steps", "30",
            "--batch-size", "4", "--seq-len", "32", "--eval-every", "5", "--eval-tokens", "128",
            "--probe-every", "10", "--warmup", "0", "--ratio", "1.5", "--resolution", "99",
            "--lr", "0.01", "30", "--methods", "baseline", "qk_norm", "--out", str(out), *more]


@pytest.fixture(scope="module")
def swept(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "out"
    command = [sys.executable, str(ROOT / "stability.py"), *flags(text, out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


def test_a_sweep_finds_an_edge_and_reports_it(swept):
    out, printed = swept
    result = json.loads(printed.splitlines()[-1])
    for method in ("baseline", "qk_norm"):
        row = result["table"][method]
        assert isinstance(row["0.01"], float) and row["30"] == "diverged"
        assert 0.01 <= result["max_lr"][method] < 30
    assert all(rule["qk_norm"] in (1, None) for rule in result["ratio_to_qk_norm"].values())
    assert result["ratio_to_qk_norm"]["as defined"]["qk_norm"] == 1
    assert (out / "sweep.png").stat().st_size > 10_000
    assert (out / "norms.png").stat().st_size > 10_000
    assert "order        baseline < qk_norm" in printed and "soft_temp" not in printed


def test_cells_hold_losses_norms_and_verdict(swept):
    out, _ = swept
    head, *cells = map(json.loads, (out / "cells.jsonl").open())
    assert head["settings"]["steps"] == 30
    good = next(c for c in cells if c["method"] == "qk_norm" and c["lr"] == 0.01)
    assert len(good["losses"]) == 30 and [step for step, _ in good["evals"]] == [*range(5, 31, 5)]
    assert [row["step"] for row in good["norms"]] == [1, 10, 20, 30] and good["diverged"] is None
    assert {"weight", "input", "output", "grad"} == set(good["norms"][0]["QKV"])
    bad = next(c for c in cells if c["method"] == "baseline" and c["lr"] == 30)
    assert bad["loss"] is None and len(bad["losses"]) <= bad["diverged"] <= 30


def test_growth_is_the_ratio_at_the_last_common_step():
    row = lambda step, *outputs: dict(step=step, logit=1.0, **{
        k: dict(weight=1.0, output=o) for k, o in zip(("QKV", "FC2"), outputs)})
    bad = dict(norms=[row(1, 1, 1), row(10, 3, 1), row(20, 8, 1.9)])
    good = dict(norms=[row(1, 1, 1), row(10, 1, 1), row(20, 2, 1), row(30, 2, 1)])
    ratios, step, over = growth(bad, good)
    assert step == 20 and over == {"QKV": 10, "FC2": None}
    assert ratios == {"QKV": dict(weight=1.0, output=4.0), "FC2": dict(weight=1.0, output=1.9)}


def test_a_diverging_run_is_put_beside_the_right_ones(tmp_path):
    """The method's lowest of --lr that diverged, beside qk_norm at that rate, itself at its edge
    and at the lowest rate; not beside what diverged.
    """
    sweep = Sweep(Run(methods=["baseline", "qkv_norm", "qk_norm"], lr=[0.01, 0.1, 0.2, 0.4],
                      out=str(tmp_path)), {})
    for method, lr, bad in (("baseline", 0.01, 0), ("baseline", 0.1, 0), ("baseline", 0.14, 1),
                            ("baseline", 0.2, 1), ("baseline", 0.12, 0), ("qkv_norm", 0.2, 0),
                            ("qk_norm", 0.2, 0)):
        sweep.cells[method, lr, 0] = dict(method=method, lr=lr, seed=0, diverged=bad or None,
                                          norms=[dict(step=1)])
    found = stability.comparisons(sweep, 0)
    assert [words for words, _, _ in found] == ["qk_norm at 0.2", "baseline at 0.12",
                                                "baseline at 0.01"]
    assert all(bad["lr"] == 0.2 and bad["method"] == "baseline" for _, bad, _ in found)
    assert stability.comparisons(sweep, 1) == []


def test_a_cell_is_the_same_alone_and_in_a_pool(swept, text):
    """Losses of a cell depend on its method, rate and seed, not on who computed it."""
    out, _ = swept
    cells = [json.loads(line) for line in (out / "cells.jsonl").open()][1:]
    cell = next(c for c in cells if c["method"] == "qk_norm" and c["lr"] == 0.01)
    run = stability.parse_flags(Run, flags(text, out))
    token_data = stability.load_data(run.data, run.tokenizer, 512)
    again = stability.run_cell(run, run.config(token_data.vocab_size), "qk_norm", 0.01, 0,
                               token_data, "cpu", torch.float32)
    assert again["losses"] == pytest.approx(cell["losses"], rel=1e-3)


def test_a_sweep_goes_on_where_it_stopped_and_does_not_mix(swept, text, tmp_path, capsys, fails):
    """A folder with half its cells and a torn line: only what is missing is run; more methods may
    join, another setting may not.
    """
    out, _ = swept
    whole = (out / "cells.jsonl").read_text().splitlines()
    half = tmp_path / "half"
    half.mkdir()
    (half / "cells.jsonl").write_text("\n".join(whole[:-1]) + "\n" + whole[-1][:40])
    stability.main(flags(text, half, "--workers", "1"))
    again = (half / "cells.jsonl").read_text().splitlines()
    assert again[:len(whole) - 1] == whole[:-1] and len(again) == len(whole)
    capsys.readouterr()
    stability.main(flags(text, half, "--workers", "1", "--resume"))
    assert "at most 0 cells" in capsys.readouterr().out
    assert "another steps (30, now 13)" in fails(stability.main, flags(text, half, "--steps", "13"))
    assert "another norm" in fails(stability.main, flags(text, half, "--norm", "rmsnorm"))
    assert (half / "cells.jsonl").read_text().splitlines() == again


def test_ctrl_c_ends_the_cells_that_run(swept, text, tmp_path, fails):
    """Exit code 130 at once, though the cells would take an hour; whole cells stay on file."""
    out = tmp_path / "out"
    out.mkdir()
    whole = (swept[0] / "cells.jsonl").read_text().replace('"steps": 30,', '"steps": 99999,')
    (out / "cells.jsonl").write_text(whole)
    command = [sys.executable, str(ROOT / "stability.py"), *flags(
        text, out, "--steps", "99999", "--methods", "soft_cap", "qkv_norm")]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT,
                                                                signal.default_int_handler))
    while "processes" not in started.stdout.readline():
        assert started.poll() is None, started.stderr.read()
    time.sleep(5)
    assert "another process is at work" in fails(stability.main, command[2:])
    started.send_signal(signal.SIGINT)
    printed, errors = started.communicate(timeout=30)
    assert started.returncode == 130 and "Traceback" not in errors, errors
    cells = len(whole.splitlines()) - 1
    assert f"stopped: {cells} cells are in" in printed
    assert (out / "cells.jsonl").read_text() == whole


@pytest.mark.parametrize("more, words", [
    (["--methods", "magic"], "--methods has 'magic'"), (["--lr", "0"], "--lr has 0.0"),
    (["--preset", "huge"], "--preset is 'huge'"), (["--norm", "batch"], "--norm is 'batch'"),
    (["--pattern", "M-M-", "--methods", "soft_cap"], "M-M- has no attention"),
    (["--resume"], "nothing to resume"), (["--steps", "0"], "--steps is 0"),
    (["--seq-len", "100000"], "do not fill two windows"), (["--ratio", "1"], "--ratio is 1.0"),
    (["--data", "/nowhere"], "/nowhere"), (["--recipe", "int3"], "--recipe is 'int3'"),
    (["--batch-size", "3", "--grad-accum", "2"], "must be a multiple of --grad-accum")])
def test_bad_flags_are_one_line_and_write_nothing(fails, text, tmp_path, more, words):
    assert words in fails(stability.main, flags(text, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_step_that_memory_cannot_hold_is_refused(fails, text, tmp_path, monkeypatch):
    monkeypatch.setattr(train_fp8, "free_bytes", lambda device: 10 ** 6)
    assert "are free" in fails(stability.main, flags(text, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_papers_preset_is_of_the_papers_size(capsys):
    """826 M with 256k entries; the hybrids are as large to 3%; all on the meta device."""
    stability.main(["--preset", "stability-830m", "--list"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["n_params"] == 826_328_064 and result["added"]["qk_norm"] == 24 * 4 * 64
    for name in ("toy", "toy-full", "stability-830m"):
        same, hybrid = (Run(preset=p).config().n_params() for p in (name, name + "-hybrid"))
        assert abs(hybrid / same - 1) < 0.03, name


@pytest.mark.parametrize("preset", ["stability-830m", "stability-830m-hybrid"])
@pytest.mark.parametrize("method", ["baseline", "qkv_norm", "sigma_reparam"])
def test_the_papers_preset_takes_a_step_scaled_down(preset, method):
    """Its pattern and depth, thin: loss near ln v at the start, a finite gradient everywhere."""
    values = dict(stability.PRESETS[preset][0], vocab_size=64, d_model=32, mlp_dim=64, n_heads=2,
                  n_kv_heads=2, head_dim=16, mamba_heads=8, mamba_head_dim=4, d_state=4,
                  chunk_size=16)
    model = stability.build(Run(preset=preset), HybridConfig(**values), method, 0, "cpu",
                            torch.float32)
    loss = model.loss(TOKENS % 64, LABELS % 64)
    loss.backward()
    assert abs(float(loss.detach()) - math.log(64)) < 0.6
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_sweep_counts_what_is_left(tmp_path):
    run = Run(preset="toy", methods=["baseline"], lr=[0.1, 0.2], resolution=1.2, seeds=2,
              out=str(tmp_path))
    sweep = Sweep(run, {})
    assert sweep.most() == 2 * (2 + 2)          # two rates, two halvings, two seeds
    first = sweep.next()
    assert first == ("baseline", 0.1, 0) and sweep.next() == ("baseline", 0.1, 1)
    assert sweep.next() is None                 # a chain has one cell at a time
