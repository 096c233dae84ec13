"""Pruning what is dead changes nothing, what matters is found, and training recovers the rest."""

import itertools
import json
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from conftest import ROOT, assert_close

import bench.prune_distill
import prune_distill
import train_fp8
from common import GIB
from infer import load_run, plan
from model import HybridConfig, HybridLM, load_hf, save_hf
from prune_distill import (Request, Run, best, best_in_groups, choose_layers, grid_for,
                           importance, kd_loss, keep_best, layer_costs, make_kd_loss,
                           minipuzzle, prune, request_for, run_layers, search, with_counts)

CONFIG = HybridConfig(pattern="M-M*-M*-", vocab_size=90, d_model=40, mlp_dim=48, n_heads=6,
                      n_kv_heads=2, head_dim=8, mamba_heads=8, mamba_head_dim=6, n_groups=2,
                      d_state=5, chunk_size=8)
TOKENS = torch.randint(90, (3, 21), generator=torch.Generator().manual_seed(0))


def random_model(config=CONFIG, seed=0):
    """fp64, and every parameter away from its initial value."""
    torch.manual_seed(seed)
    model = HybridLM(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.requires_grad_(False).eval()


def shrunk(**widths):
    return HybridConfig(**{**vars(CONFIG), **widths})


def everything(model):
    return list(range(len(model.config.pattern)))


# ------------------------------------------------------------------------------------------------
# Importance and pruning


def test_keeping_everything_gives_the_same_bits():
    model = random_model().float()
    scores = importance(model, [TOKENS])
    same = prune(model, keep_best(scores, CONFIG, CONFIG, everything(model)))
    assert same.config == CONFIG and torch.equal(same(TOKENS), model(TOKENS))
    for (name, p), q in zip(same.named_parameters(), model.parameters()):
        assert torch.equal(p, q), name


def test_scores_are_their_formulas():
    """Mean of |.| over the sequence, L2 over the rows; batches are rows of one calibration."""
    model = random_model()
    scores = importance(model, [TOKENS[:1], TOKENS[1:]])
    x, sums = model.embed(TOKENS), []
    for i, block in enumerate(model.backbone.layers):
        normed = block.norm(x)
        level = lambda m: m.abs().mean(1).square().sum(0).sqrt()
        sums.append(level(normed))
        mixer = block.mixer
        if block.letter == "-":
            truth, got = level(F.relu(mixer.up_proj(normed)) ** 2), scores.neurons[i]
        elif block.letter == "M":
            di = CONFIG.d_inner
            truth = level(mixer.in_proj(normed)[..., di:2 * di]).view(8, 6)
            got = scores.mamba[i]
        else:
            heads = []
            for h in range(CONFIG.n_heads):         # what a head adds, by columns
                only = torch.zeros(CONFIG.n_heads * 8, dtype=torch.float64)
                only[8 * h:8 * h + 8] = 1
                seen = []
                hook = mixer.o_proj.register_forward_pre_hook(lambda _, m: seen.append(m[0]))
                mixer(normed)
                hook.remove()
                heads.append((level(seen[0]) * only * mixer.o_proj.weight.norm(dim=0)).norm())
            truth, got = torch.stack(heads), scores.heads[i]
        assert_close([got], [truth], [f"layer {i}"], 1e-6)
        x = block(x)
    assert_close([scores.channels], [sum(sums)], ["channels"], 1e-6)


def plant(model, what, generator):
    """Make a random part of the model inert; returns {name: the indices that must stay}."""
    config, live = model.config, {}
    pick = lambda n, k: torch.randperm(n, generator=generator)[:k].sort().values
    rest = lambda n, dead: torch.tensor([i for i in range(n) if i not in set(dead.tolist())])
    layers = [(i, b.letter, b.mixer) for i, b in enumerate(model.backbone.layers)]
    if "channels" in what:
        dead = pick(config.d_model, 9)
        live["channels"] = rest(config.d_model, dead)
        model.backbone.embeddings.weight[:, dead] = 0
        for _, letter, m in layers:
            out = m.out_proj if letter == "M" else m.o_proj if letter == "*" else m.down_proj
            out.weight[dead] = 0
    for i, letter, m in layers:
        if letter == "-" and "neurons" in what:
            dead = pick(config.mlp_dim, 17)
            m.up_proj.weight[dead] = 0
            live["neurons", i] = rest(config.mlp_dim, dead)
        if letter == "*" and "heads" in what:       # one of each KV head's three
            dead = torch.tensor([0, 3]) + pick(3, 2)
            m.o_proj.weight.view(config.d_model, config.n_heads, -1)[:, dead] = 0
            live["heads", i] = rest(config.n_heads, dead)
        if letter != "M":
            continue
        x = m.in_proj.weight[config.d_inner:2 * config.d_inner].view(config.mamba_heads, -1,
                                                                      config.d_model)
        conv = m.conv1d.bias[:config.d_inner].view(config.mamba_heads, -1)
        if "mamba_heads" in what:                   # one of each group's four
            dead = torch.cat([pick(4, 1), 4 + pick(4, 1)])
            x[dead], conv[dead] = 0, 0
            live["mamba_heads", i] = rest(config.mamba_heads, dead)
        if "mamba_channels" in what:
            dead = pick(config.mamba_head_dim, 2)
            x[:, dead], conv[:, dead] = 0, 0
            live["mamba_channels", i] = rest(config.mamba_head_dim, dead)
    if "layers" in what:
        dead = [1, 5]                               # an MLP and a Mamba layer
        for i in dead:
            m = model.backbone.layers[i].mixer
            (m.down_proj if hasattr(m, "down_proj") else m.out_proj).weight[:] = 0
        live["layers"] = [i for i in everything(model) if i not in dead]
    return live


AXES = {"channels": dict(d_model=31), "neurons": dict(mlp_dim=31), "heads": dict(n_heads=4),
        "mamba_heads": dict(mamba_heads=6), "mamba_channels": dict(mamba_head_dim=4), "layers": {}}


@pytest.mark.parametrize("what", [*AXES, "all"])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_dead_weight_is_found_and_removing_it_changes_nothing(what, seed):
    what = list(AXES) if what == "all" else [what]
    model = random_model(seed=seed)
    live = plant(model, what, torch.Generator().manual_seed(seed))
    widths = {k: v for axis in what for k, v in AXES[axis].items()}
    layers = everything(model)
    if "layers" in what:
        layers, log = choose_layers(model, [TOKENS], {"M": 2, "-": 2})
        assert layers == live["layers"] and all(cost == 0 for _, cost in log)
    new = shrunk(pattern="".join(CONFIG.pattern[i] for i in layers), **widths)
    keep = keep_best(importance(model, [TOKENS]), CONFIG, new, layers)
    for name, expected in live.items():
        if isinstance(name, str):
            assert list(getattr(keep, name)) == list(expected), name
        elif name[1] in layers:
            assert getattr(keep, name[0])[name[1]].tolist() == expected.tolist(), name
    student = prune(model, keep)
    assert student.config.n_params() == sum(p.numel() for p in student.parameters()) \
        < CONFIG.n_params()
    assert_close([student(TOKENS)], [model(TOKENS)], ["logits"], 1e-9)


def test_a_mamba_head_stays_in_its_group_and_reads_the_same_b_and_c():
    """Heads whose scores would all be best in one group: still as many from each, and each with the
    rows of x, dt, A that it had.
    """
    model = random_model()
    scores = importance(model, [TOKENS])
    for i in scores.mamba:
        scores.mamba[i][:4] *= 100                  # group 0 is louder
    keep = keep_best(scores, CONFIG, shrunk(mamba_heads=4), everything(model))
    student = prune(model, keep)
    for i, heads in keep.mamba_heads.items():
        assert len(heads) == 4 and [h // 4 for h in heads.tolist()] == [0, 0, 1, 1]
        old, new = model.backbone.layers[i].mixer, student.backbone.layers[i].mixer
        assert torch.equal(new.A_log, old.A_log[heads])
        x = old.in_proj.weight[48:96].view(8, 6, 40)[heads].flatten(0, 1)
        assert torch.equal(new.in_proj.weight[24:48], x)
        assert torch.equal(new.in_proj.weight[48:68], old.in_proj.weight[96:116])      # B, C whole


def test_heads_are_kept_by_kv_group():
    score = torch.tensor([9.0, 8, 7, 1, 2, 3])
    assert best_in_groups(score, 2, 4).tolist() == [0, 1, 4, 5]
    assert best(torch.tensor([1.0, 1, 3, 1]), 2).tolist() == [0, 2]         # equal ones in order


def test_widths_that_differ_or_are_too_large_are_named():
    model = random_model()
    scores = importance(model, [TOKENS])
    make = lambda **widths: keep_best(scores, CONFIG, shrunk(**widths), everything(model))
    with pytest.raises(ValueError, match="mlp_dim 64 is more than the teacher's 48"):
        make(mlp_dim=64)
    keep = make(mlp_dim=20)
    keep.neurons[4] = keep.neurons[4][:10]
    with pytest.raises(ValueError, match="layers.4.mixer.up_proj.weight would be pruned to "):
        prune(model, keep)


def test_worst_first_is_the_opposite_choice():
    """On every axis the worst half is what the best half does not keep."""
    model = random_model()
    scores, half = importance(model, [TOKENS]), shrunk(d_model=20, mlp_dim=24, mamba_heads=4,
                                                       mamba_head_dim=3)
    good, bad = (keep_best(scores, CONFIG, half, everything(model), worst) for worst in (0, 1))
    assert not set(good.channels.tolist()) & set(bad.channels.tolist())
    for name in ("neurons", "mamba_channels"):
        for i, kept in getattr(good, name).items():
            assert not set(kept.tolist()) & set(getattr(bad, name)[i].tolist()), name
    for i, channels in bad.mamba_channels.items():
        score = scores.mamba[i][:, channels].norm(dim=1).view(2, 4)
        lowest = {int(h) + 4 * g for g in range(2) for h in score[g].argsort()[:2]}
        assert set(bad.mamba_heads[i].tolist()) == lowest


# ------------------------------------------------------------------------------------------------
# Layers


@pytest.mark.parametrize("metric", ["logits", "hidden", "cosine"])
def test_costs_of_layers_are_their_definitions(metric):
    model = random_model()
    cost = layer_costs(model, [TOKENS], everything(model), metric)
    for i in everything(model):
        left = [j for j in everything(model) if j != i]
        h, truth = run_layers(model, TOKENS, left), model(TOKENS, head=False)
        if metric == "logits":
            expected = (model.lm_head(h) - model(TOKENS)).square().mean()
        elif metric == "hidden":
            expected = (h - truth).square().mean()
        else:
            x = model.embed(TOKENS)
            for block in model.backbone.layers[:i]:
                x = block(x)
            expected = 1 - F.cosine_similarity(x, model.backbone.layers[i](x), dim=-1).mean()
        assert cost[i] == pytest.approx(float(expected), rel=1e-5, abs=1e-7)


def test_layers_are_removed_one_by_one_with_costs_measured_again():
    """The cost of the second of two equal MLPs is its cost after the first was removed."""
    model = random_model()
    one, two = (model.backbone.layers[i].mixer for i in (1, 4))
    two.load_state_dict(one.state_dict())
    layers, log = choose_layers(model, [TOKENS], {"-": 1})
    assert len(log) == 2 and "".join(CONFIG.pattern[i] for i in layers).count("-") == 1
    left = [j for j in everything(model) if j != log[0][0]]
    again = layer_costs(model, [TOKENS], left)
    assert log[1][1] == pytest.approx(min(again[i] for i in left if CONFIG.pattern[i] == "-"))
    with pytest.raises(ValueError, match="4 layers M asked for, the teacher has 3"):
        choose_layers(model, [TOKENS], {"M": 4})


# ------------------------------------------------------------------------------------------------
# Search


def test_the_papers_candidates_are_feasible_and_none_of_full_width():
    """Nano 2, section 4: three candidates of 8.92, 8.89 and 8.97 B at 19.66 GiB and 128k tokens."""
    config = HybridConfig.preset("nemotron-nano-12b-v2")
    run = Run(memory_gib=19.66, context=131072)
    request, grid = request_for(run, config), grid_for(config)
    found = {(len(c.pattern), c.pattern.count("M"), c.pattern.count("*"), c.d_model, c.mlp_dim,
              c.mamba_heads): c for _, _, c in search(request, grid)}
    for d, f, heads, params in ((4480, 17920, 112, 8.92), (4480, 15680, 128, 8.89),
                                (4800, 14400, 120, 8.97)):
        candidate = found[56, 27, 4, d, f, heads]
        assert candidate.n_params() / 1e9 == pytest.approx(params, abs=0.005)
    assert not any(key[3:] == (5120, 20480, 128) for key in found)      # of 52 to 62 layers
    full_width = lambda m, f: request.needs(with_counts(config, {"M": m, "*": 4, "-": f}))
    assert full_width(21, 19) < request.limit < full_width(23, 21)      # 44 layers would fit
    assert len(found) == 1096
    nano = HybridConfig.preset("nemotron-nano-9b-v2")
    judged = plan(nano, 131072, limit=request.limit)
    assert request.needs(nano) == pytest.approx(judged["total_bytes"], rel=1e-3)


def test_the_47b_is_feasible_for_its_budget():
    """Nemotron-H, section 3: 31.7 GiB, 4-bit weights, 8-bit KV, a million tokens."""
    config = HybridConfig.preset("nemotron-h-56b")
    run = Run(memory_gib=31.7, context=1_000_000, weight_bits=4, kv_bits=8)
    request = request_for(run, config)
    found = search(request, grid_for(config))
    assert len(found) == 434
    released = HybridConfig.preset("nemotron-h-47b")
    assert any(c.n_params() == released.n_params() and c.mlp_dim == 30720
               and counts == {"M": 45, "*": 5, "-": 48} for _, counts, c in found)


@pytest.mark.parametrize("batch", [1, 64])
def test_what_the_search_accepts_the_plan_accepts(batch):
    """The search counts the teacher's temporaries: never less than the plan of a candidate, and
    little more.
    """
    config = HybridConfig.preset("toy")
    request = request_for(Run(context=512, batch=batch), config)
    for _, one in grid_for(config)[::37]:
        judged = plan(one, 512, batch, prefill_chunk=16)["total_bytes"]
        assert judged <= request.needs(one) <= 1.2 * judged


def test_fewer_bits_are_bits_per_weight_and_no_temporaries():
    config = HybridConfig.preset("toy")
    cache = sum(config.cache_bytes(1, 512).values())
    for bits in (8, 4):
        request = request_for(Run(context=512, weight_bits=bits), config)
        assert request.needs(config) - cache == config.n_params() * bits // 8


def test_a_parent_of_the_paper_gets_the_papers_grid():
    """Whatever its vocabulary and separator are; attention is one of the axes there."""
    nano = grid_for(HybridConfig.preset("nemotron-nano-12b-v2", bos_token_id=1, vocab_size=131088))
    assert len(nano) == 2415 and {counts["*"] for counts, _ in nano} == {4, 6}
    assert {c.d_model for _, c in nano} == {4480, 4640, 4800, 4960, 5120}
    counts, toy = grid_for(HybridConfig.preset("toy"))[0]
    assert counts == {"M": 4, "*": 1, "-": 4}
    assert dict(vars(toy), pattern="") == dict(vars(HybridConfig()), pattern="")
    for pattern in ("*-*-", "M*M", "-"):        # a layer type that is missing stays missing
        assert all(set(c.pattern) == set(pattern) for _, c in grid_for(shrunk(pattern=pattern)))


def test_search_lists_exactly_what_fits_largest_first():
    grid = [(counts, with_counts(CONFIG, counts, d_model=d, mlp_dim=f, mamba_heads=heads))
            for counts in ({"M": 3, "*": 2, "-": 3}, {"M": 2, "*": 1, "-": 2}) for d in (40, 32)
            for f in (48, 24) for heads in (8, 4)]
    every = sorted(Request(0, 100).needs(c) for _, c in grid)
    limit = (every[7] + every[8]) // 2
    assert [n for n, _, _ in search(Request(limit, 100), grid)] == every[:8][::-1]
    with pytest.raises(ValueError, match="5 layers, d_model 32, MLP 24, 4 Mamba heads, needs"):
        search(Request(1000, 100), grid)


def test_minipuzzle_is_the_best_of_all_choices_for_each_width():
    """Against every subset of layers."""
    config = shrunk(pattern="M-M*-")
    generator = torch.Generator().manual_seed(3)
    costs = {i: float(c) for i, c in enumerate(torch.rand(5, generator=generator))}
    width_costs = {16: 0.5, 32: 0.2, 48: 0.0}
    full = Request(1, 64).needs(config)
    subsets = [list(some) for r in range(1, 6) for some in itertools.combinations(range(5), r)]
    for share in (0.95, 0.8, 0.6):
        request, expected = Request(int(share * full), 64), {}
        for layers, width in itertools.product(subsets, width_costs):
            one = shrunk(mlp_dim=width, pattern="".join(config.pattern[i] for i in layers))
            if request.needs(one) <= request.limit:
                cost = sum(costs[i] for i in range(5) if i not in layers) + width_costs[width]
                expected[width] = min(expected.get(width, (9,)), (cost, layers))
        found = minipuzzle(costs, width_costs, config, request)
        assert [cost for cost, _, _ in found] == sorted(cost for cost, _, _ in found)
        assert {f: (pytest.approx(cost), layers) for cost, layers, f in found} == expected
    with pytest.raises(ValueError, match="no choice of layers and MLP width fits .* of one layer"):
        minipuzzle(costs, width_costs, config, Request(1000, 64))
    free = {i: -1.0 for i in range(5)}          # removing pays: one layer is kept all the same
    assert len(minipuzzle(free, width_costs, config, Request(full, 64))[0][1]) == 1


# ------------------------------------------------------------------------------------------------
# Distillation


@pytest.mark.parametrize("block", [1, 7, 100])
def test_kd_loss_is_the_forward_kl_with_its_gradients(block):
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    h, w, ht, wt = make(23, 8), make(50, 8), make(23, 12), make(50, 12)
    h.requires_grad_(), w.requires_grad_()
    p, q = F.log_softmax(ht @ wt.t(), -1), F.log_softmax(h @ w.t(), -1)
    truth = F.kl_div(q, p, log_target=True, reduction="batchmean")
    expected = torch.autograd.grad(truth, (h, w))
    loss = kd_loss(h, w, ht, wt, block=block)
    got = torch.autograd.grad(3 * loss, (h, w))
    assert_close([loss.detach(), *got], [truth.detach(), *(3 * m for m in expected)],
                 ["loss", "dh", "dw"], 1e-10)
    assert kd_loss(ht, wt, ht, wt, block=block) < 1e-12
    with torch.no_grad():
        assert kd_loss(h, w, ht, wt, block=block) == pytest.approx(float(truth.detach()), abs=1e-12)


def test_a_label_below_0_leaves_its_token_out_of_the_kd_loss():
    """The loss and its gradients are those of the other tokens alone; of none it is 0."""
    h, ht, wt = torch.randn(23, 8), torch.randn(23, 12), torch.randn(50, 12)
    h, w = h.requires_grad_(), torch.randn(50, 8, requires_grad=True)
    labels = torch.arange(23) % 3 - 1                   # -1, 0, 1, ...
    kept = labels >= 0
    some = kd_loss(h, w, ht, wt, labels, 7)
    truth = kd_loss(h[kept], w, ht[kept], wt, block=7)
    assert some.item() == pytest.approx(truth.item(), rel=1e-6) != kd_loss(h, w, ht, wt).item()
    got, expected = (torch.autograd.grad(m, (h, w)) for m in (some, truth))
    assert_close(got, expected, ["dh", "dw"], 1e-6)
    assert not got[0][~kept].any() and got[0][kept].any(1).all()
    none = kd_loss(h, w, ht, wt, torch.full((23,), -100))
    assert none == 0 and not torch.autograd.grad(none, w)[0].any()


def test_the_kd_loss_refuses_two_vocabularies():
    """A table with rows of padding is another vocabulary: all its probabilities would be off."""
    h, w = torch.randn(5, 8), torch.randn(50, 8)
    for rows in (48, 64):
        with pytest.raises(ValueError, match=f"vocabulary has 50 entries, the teacher's {rows}:"):
            kd_loss(h, w, h, torch.randn(rows, 8))


def test_the_kd_loss_names_what_cross_entropy_names():
    """Labels beyond the vocabulary; and a second derivative, which would be zero without a word."""
    h, w = torch.randn(5, 8, requires_grad=True), torch.randn(50, 8)
    with pytest.raises(ValueError, match="labels reach 50, the vocabulary is 0 to 49"):
        kd_loss(h, w, h, w, torch.full((5,), 50))
    with pytest.raises(RuntimeError, match="kd_loss has first derivatives only"):
        torch.autograd.grad(kd_loss(h, w, h, w + 1), h, create_graph=True)


def test_a_second_backward_of_the_kd_loss_gives_the_same_gradients():
    h, w = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss = 3 * kd_loss(h, w, torch.randn(5, 4), torch.randn(7, 4))
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    second = torch.autograd.grad(loss, (h, w))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, second))


def test_the_loss_of_a_student_is_the_kl_of_the_kept_tokens_and_reaches_only_the_student():
    """Documents are kept apart in both models."""
    teacher, student = random_model(), random_model(seed=1).requires_grad_(True)
    teacher.requires_grad_(True)
    labels, seq_idx = TOKENS.roll(-1, 1).clone(), (torch.arange(21) >= 9).long().expand(3, -1)
    labels[:, 12:] = -100
    loss = make_kd_loss(teacher)(student, TOKENS, labels, seq_idx)
    q, p = (F.log_softmax(m(TOKENS, seq_idx=seq_idx), -1) for m in (student, teacher))
    truth = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)[:, :12].mean()
    assert float(loss.detach()) == pytest.approx(float(truth.detach()), rel=1e-9)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_the_kd_loss_holds_no_logits():
    """No tensor of forward and backward has more than a block's logits, or the weights' gradient:
    one model's logits would have 64 times as many elements as a block's.
    """
    h, w = torch.randn(2048, 16, requires_grad=True), torch.randn(4096, 16, requires_grad=True)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(m.numel() for m in torch.utils._pytree.tree_leaves(result)
                         if isinstance(m, torch.Tensor))
            return result
    with Watch():
        kd_loss(h, w, torch.randn(2048, 16), torch.randn(4096, 16), block=32).backward()
    assert max(sizes) == 32 * 4096
    assert h.grad is not None and w.grad is not None


# ------------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def teacher(text, tmp_path_factory):
    """A byte model that has learned to count a little."""
    out = tmp_path_factory.mktemp("teacher")
    train_fp8.main(["--data", str(text), "--out", str(out), "--tokenizer", "bytes", "--pattern",
                    "M-M*-", "--seq-len", "32", "--batch-size", "4", "--device", "cpu", "--recipe",
                    "none", "--compute-dtype", "float32", "--steps", "60", "--overwrite"])
    return out


def flags(text, teacher, out, *more):
    return ["--teacher", str(teacher), "--data", str(text), "--out", str(out), "--device", "cpu",
            "--seq-len", "32", "--batch-size", "4", "--steps", "12", "--candidates", "2",
            "--samples", "8", "--context", "64", "--compute-dtype", "float32", "--lr", "5e-4",
            *more]


@pytest.fixture(scope="module")
def compressed(text, teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("compressed") / "out"
    prune_distill.main(flags(text, teacher, out))
    return out


def final(out):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["final"]


def test_a_compression_leaves_a_smaller_model_that_transformers_opens(compressed, teacher):
    import transformers
    result = final(compressed)
    assert result["params_after"] < 0.75 * result["params_before"]
    assert result["memory_gib_after"] <= 0.72 * result["memory_gib_before"]
    assert result["student_val_loss"] < result["pruned_val_loss"]
    student, encoding = load_run(compressed)
    assert student.config.n_params() == result["params_after"]
    assert (compressed / "recovery.png").stat().st_size > 10_000
    ids = torch.tensor([encoding.encode_ordinary("item 1 item 2 item")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(compressed).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, student(ids), rtol=1e-4, atol=1e-4)
    assert (compressed / "tokenizer.json").read_text() == (teacher / "tokenizer.json").read_text()


def test_two_halves_equal_the_whole(compressed, text, teacher, tmp_path, fails):
    prune_distill.main(flags(text, teacher, tmp_path / "out", "--stop-after", "5"))
    another = tmp_path / "another"
    shutil.copytree(teacher, another)
    model = load_hf(another)
    model.lm_head.weight.data[0] += 1
    save_hf(model, another)
    assert "another run (teacher" in fails(prune_distill.main,
                                           flags(text, another, tmp_path / "out"))
    prune_distill.main(flags(text, teacher, tmp_path / "out"))
    for (name, p), q in zip(load_hf(compressed).named_parameters(),
                            load_hf(tmp_path / "out").parameters()):
        assert torch.equal(p, q), name
    a, b = final(compressed), final(tmp_path / "out")
    assert all(a[k] == b[k] for k in a if k.endswith("loss"))


def test_a_teacher_in_bf16_has_a_student_with_fp32_masters(text, teacher, tmp_path):
    """As a released checkpoint is stored. Stopping changes nothing there either, nor does a kill
    before the first step, which leaves a checkpoint without tensors.
    """
    short, whole, half, none = (tmp_path / name for name in ("bf16", "whole", "half", "none"))
    shutil.copytree(teacher, short)
    save_hf(load_hf(short, dtype=torch.bfloat16), short)
    compress = lambda out, *more: prune_distill.main(
        flags(text, short, out, "--steps", "4", "--candidates", "1", "--no-scratch", *more))
    compress(whole)
    compress(half, "--stop-after", "2")
    shutil.copytree(half, none)
    state = torch.load(none / "train_state.pt")
    torch.save({name: m for name, m in state.items() if name not in ("model", "optimizer")}
               | dict(step=0), none / "train_state.pt")
    for out in (half, none):
        compress(out)
        for (name, p), q in zip(load_hf(whole).named_parameters(), load_hf(out).parameters()):
            assert p.dtype == torch.float32 and torch.equal(p, q), name


def test_what_ends_a_text_and_how_a_chat_is_written_survives(text, teacher, tmp_path):
    """Of a teacher as it is released: end tokens, padding, lengths, generation, templates."""
    source, out = tmp_path / "teacher", tmp_path / "out"
    shutil.copytree(teacher, source)
    values = json.loads((source / "config.json").read_text())
    ours = dict(bos_token_id=256, eos_token_id=[2, 11], pad_token_id=0,
                max_position_embeddings=131072)
    beside = {"config.json": json.dumps(values | ours), "chat_template.jinja": "{{ messages }}",
              "tokenizer_config.json": "{}",
              "generation_config.json": json.dumps(dict(eos_token_id=[2, 11, 12], top_p=0.95))}
    for name, content in beside.items():
        (source / name).write_text(content)
    prune_distill.main(flags(text, source, out, "--steps", "2", "--no-scratch"))
    values = json.loads((out / "config.json").read_text())
    assert {key: values[key] for key in ours} == ours
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        assert (out / name).read_text() == beside[name]
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == json.loads(beside["generation_config.json"])
    assert set(load_hf(out).config.end_tokens) == {2, 11, 12}


def test_every_loss_is_on_the_same_text(text, teacher, tmp_path, monkeypatch):
    """With next to no learning rate the losses on the way and at the end are the pruned one."""
    monkeypatch.setattr(prune_distill, "EVAL_TOKENS", 100)
    prune_distill.main(flags(text, teacher, tmp_path / "out", "--lr", "1e-12", "--no-scratch"))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    losses.append(rows[-1]["final"]["student_val_loss"])
    assert losses == pytest.approx([rows[-1]["final"]["pruned_val_loss"]] * 4, rel=1e-5)


def test_where_pruning_costs_nothing_nothing_is_recovered(text, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(prune_distill, "grid_for",
                        lambda config: [({"M": 2, "*": 1, "-": 2}, config)])
    prune_distill.main(flags(text, teacher, tmp_path / "out", "--keep", "1", "--candidates", "1",
                             "--steps", "1", "--no-scratch"))
    result = final(tmp_path / "out")
    assert result["params_after"] == result["params_before"] and result["recovered"] is None


def test_calibration_has_as_many_rows_as_asked(text, teacher):
    run = Run(data=str(text), teacher=str(teacher), samples=11, seq_len=16)
    batches = prune_distill.calibration(run, prune_distill.load_text(run))
    assert [len(rows) for rows in batches] == [8, 3]
    assert len(torch.cat(batches).unique(dim=0)) == 11


def test_a_finished_compression_says_so_and_another_is_refused(compressed, text, teacher, capsys,
                                                                fails):
    before = (compressed / "model.safetensors").read_bytes()
    prune_distill.main(flags(text, teacher, compressed))
    assert "finished already" in capsys.readouterr().out
    assert "another run (samples 8, now 4)" in fails(
        prune_distill.main, flags(text, teacher, compressed, "--samples", "4"))
    assert (compressed / "model.safetensors").read_bytes() == before


def test_minipuzzle_runs(text, teacher, tmp_path):
    prune_distill.main(flags(text, teacher, tmp_path / "out", "--steps", "2", "--no-scratch",
                             "--method", "minipuzzle"))
    result = final(tmp_path / "out")
    assert result["scratch_val_loss"] is None
    assert result["memory_gib_after"] <= 0.72 * result["memory_gib_before"]


@pytest.mark.parametrize("more, words", [
    (["--memory-gib", "0.0001"], "nothing fits 0.0001 GiB: the smallest of"),
    (["--memory-gib", "50"], "the teacher fits it already, with 0."),
    (["--teacher", "/nowhere"], "has no config.json"),
    (["--weight-bits", "5"], "--weight-bits is 5, must be one of 16, 8, 4"),
    (["--seq-len", "15000"], "do not fill two windows"),
    (["--list", "--preset", "huge"], "preset 'huge' is not one of"),
    (["--samples", "5000"], "--samples is 5000"),
    (["--method", "minipuzzle", "--keep", "0.01"], "no choice of layers and MLP width fits"),
    (["--out", "out/base", "--teacher", "out/base/"], "would take its teacher's place")])
def test_bad_flags_are_one_line_and_write_nothing(fails, text, teacher, tmp_path, more, words):
    assert words in fails(prune_distill.main, flags(text, teacher, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_step_that_memory_cannot_hold_is_refused(fails, text, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(train_fp8, "free_bytes", lambda device: 10 ** 6)
    assert "are free" in fails(prune_distill.main, flags(text, teacher, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_list_needs_no_weights(capsys):
    prune_distill.main(["--list", "--memory-gib", "19.66", "--context", "131072"])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert "at full width 0 of 7 depths fit" in out
    assert 1000 < result["fits"] < result["candidates"] == 2415
    assert result["limit_bytes"] == int(19.66 * GIB)


def test_the_ablation_has_every_row(text, teacher, tmp_path, capsys):
    bench.prune_distill.main(["--teacher", str(teacher), "--student", str(teacher), "--data",
                              str(text), "--device", "cpu", "--seeds", "2", "--steps", "2",
                              "--seq-len", "32", "--batch-size", "4", "--samples", "8"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    table = result["table"]
    assert all(len(row["each"]) == 2 for row in table.values())
    assert {"pruned: importance", "pruned: random", "pruned: worst first", "trained: KD",
            "trained: cross-entropy", "trained: from scratch"} <= set(table)
    assert table["pruned: importance"]["mean"] < table["pruned: worst first"]["mean"]
    assert all(speed > 0 for speed in result["tokens_per_s"].values())


def test_two_processes_compress_what_one_does(compressed, text, teacher, tmp_path):
    """Trials, choice, distillation and the comparison from scratch, the student sharded."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               str(ROOT / "prune_distill.py"), *flags(text, teacher, tmp_path / "two")]
    output = subprocess.run(command, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr[-2000:]
    one, two = final(compressed), final(tmp_path / "two")
    assert one["params_after"] == two["params_after"]
    for name in ("teacher", "pruned", "student", "scratch"):
        assert two[f"{name}_val_loss"] == pytest.approx(one[f"{name}_val_loss"], rel=1e-5)
