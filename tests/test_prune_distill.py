"""Cutting what is dead changes nothing, what matters is found, and training wins back the rest."""

import itertools
import json
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_close

import prune_distill
import train_fp8
from infer import GIB, load_run, plan
from model import HybridConfig, HybridLM, load_hf, save_hf
from prune_distill import (Request, Run, best, best_in_groups, choose_layers, grid_for,
                           importance, kd_loss, keep_best, layer_costs, merge, minipuzzle, prune,
                           search, teach, with_counts, without)

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
# Importance and the cut


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
            for h in range(CONFIG.n_heads):         # what a head adds to the stream, by columns
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
def test_planted_dead_weight_is_found_and_its_loss_changes_nothing(what, seed):
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


def test_widths_that_differ_or_do_not_divide_are_named():
    model = random_model()
    scores = importance(model, [TOKENS])
    make = lambda **widths: keep_best(scores, CONFIG, shrunk(**widths), everything(model))
    config = shrunk()
    config.mamba_heads = 5
    with pytest.raises(ValueError, match="mamba_heads 5 .* 2 groups: the nearest are 4 and 6"):
        keep_best(scores, CONFIG, config, everything(model))
    with pytest.raises(ValueError, match="mlp_dim 64 is more than the teacher's 48"):
        make(mlp_dim=64)
    keep = make(mlp_dim=20)
    keep.neurons[1] = keep.neurons[1][:10]
    with pytest.raises(ValueError, match="neurons kept differ from layer to layer"):
        prune(model, keep)


def test_worst_first_is_the_opposite_choice():
    """On every axis: what the best half leaves is what the worst half keeps."""
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
        h, truth = without(model, TOKENS, left), model.hidden(TOKENS)
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


def test_layers_go_one_by_one_with_costs_measured_anew():
    """Of two MLPs that do the same: the cost of the second is the one after the first has gone.
    """
    model = random_model()
    one, two = (model.backbone.layers[i].mixer for i in (1, 4))
    two.load_state_dict(one.state_dict())
    layers, log = choose_layers(model, [TOKENS], {"-": 1})
    assert len(log) == 2 and "".join(CONFIG.pattern[i] for i in layers).count("-") == 1
    left = [j for j in everything(model) if j != log[0][0]]
    anew = layer_costs(model, [TOKENS], left)
    assert log[1][1] == pytest.approx(min(anew[i] for i in left if CONFIG.pattern[i] == "-"))
    _, worst = choose_layers(model, [TOKENS], {"-": 2}, worst=True)
    assert worst[0][1] > log[0][1]
    with pytest.raises(ValueError, match="4 layers M asked for, the teacher has 3"):
        choose_layers(model, [TOKENS], {"M": 4})


# ------------------------------------------------------------------------------------------------
# Search


def test_the_papers_candidates_are_feasible_and_depth_alone_is_not():
    """Nano 2, section 4: three candidates of 8.92, 8.89 and 8.97 B at 19.66 GiB and 128k tokens."""
    config = HybridConfig.preset("nemotron-nano-12b-v2")
    run = Run(memory_gib=19.66, context=131072)
    request, grid = prune_distill.request_for(run, config), grid_for(config)
    found = {(len(c.pattern), c.pattern.count("M"), c.pattern.count("*"), c.d_model, c.mlp_dim,
              c.mamba_heads): c for _, _, c in search(config, request, grid)}
    for d, f, heads, params in ((4480, 17920, 112, 8.92), (4480, 15680, 128, 8.89),
                                (4800, 14400, 120, 8.97)):
        candidate = found[56, 27, 4, d, f, heads]
        assert candidate.n_params() / 1e9 == pytest.approx(params, abs=0.005)
    assert not any(key[3:] == (5120, 20480, 128) for key in found)
    nano = HybridConfig.preset("nemotron-nano-9b-v2")
    judged = plan(nano, 131072, limit=request.limit)
    assert request.needs(nano) == pytest.approx(judged["total_bytes"], rel=1e-3)


def test_the_47b_is_feasible_for_its_budget():
    """Nemotron-H, section 3: 31.7 GiB, 4-bit weights, 8-bit KV, a million tokens."""
    config = HybridConfig.preset("nemotron-h-56b")
    run = Run(memory_gib=31.7, context=1_000_000, weight_bits=4, kv_bits=8)
    request = prune_distill.request_for(run, config)
    found = search(config, request, grid_for(config))
    assert 350 < len(found) < 450
    released = HybridConfig.preset("nemotron-h-47b")
    assert any(c.n_params() == released.n_params() and c.mlp_dim == 30720
               and counts == {"M": 45, "*": 5, "-": 48} for _, counts, c in found)


@pytest.mark.parametrize("bits, batch", [(16, 1), (16, 64), (8, 1), (8, 16)])
def test_what_the_search_accepts_the_plan_accepts(bits, batch):
    """The search counts the teacher's temporaries once: never less than the plan of a candidate,
    and little more.
    """
    config = HybridConfig.preset("toy")
    request = prune_distill.request_for(Run(context=512, batch=batch, weight_bits=bits), config)
    for counts, d, f, heads in list(grid_for(config))[::37]:
        one = with_counts(config, counts, d_model=d, mlp_dim=f, mamba_heads=heads)
        judged = plan(one, 512, batch, int8=bits == 8, prefill_chunk=16)["total_bytes"]
        assert judged <= request.needs(one) <= 1.2 * judged


def test_a_parent_of_the_paper_gets_the_papers_grid():
    """Whatever its vocabulary and separator are; attention is one of the axes there."""
    nano = HybridConfig.preset("nemotron-nano-12b-v2", bos_token_id=1, vocab_size=131088)
    assert all(counts["*"] == 4 for counts in grid_for(nano).depths[:-1])
    assert 15680 in grid_for(nano).mlp_dim and 4480 in grid_for(nano).d_model
    toy = grid_for(HybridConfig.preset("toy"))
    assert toy.depths[0] == {"M": 4, "*": 1, "-": 4} and toy.d_model[:2] == (256, 240)
    for pattern in ("*-*-", "M*M", "-"):        # a kind that is not there stays away
        assert all(c.pattern for _, _, c in search(shrunk(pattern=pattern), Request(10 ** 9, 9),
                                                   grid_for(shrunk(pattern=pattern))))


def test_takes_fp8_is_what_the_conversion_accepts():
    refused = 0
    for pattern, d, f, heads in itertools.product(("M-M*-M-", "M-*", "*-*-*-"), (32, 40), (48, 56),
                                                  (16, 12)):
        one = HybridConfig(pattern=pattern, vocab_size=32, d_model=d, mlp_dim=f, n_heads=2,
                           n_kv_heads=2, head_dim=16, mamba_heads=heads, mamba_head_dim=8,
                           n_groups=2, d_state=8)
        with torch.device("meta"):
            model = HybridLM(one)
        try:
            train_fp8.convert_to_fp8(model, "nano2", "emulated", verbose=False)
            converted = True
        except ValueError:
            converted, refused = False, refused + 1
        assert prune_distill.takes_fp8(one) == converted, one
    assert 0 < refused < 24
    with pytest.raises(ValueError, match="can be trained in FP8"):
        search(CONFIG, Request(10 ** 9, 9), grid_for(CONFIG), fp8=True)


def test_search_lists_exactly_what_fits_largest_first():
    grid = prune_distill.Grid(({"M": 3, "*": 2, "-": 3}, {"M": 2, "*": 1, "-": 2}), (40, 32),
                              (48, 24), (8, 4))
    one = lambda c, d, f, h: with_counts(CONFIG, c, d_model=d, mlp_dim=f, mamba_heads=h)
    every = sorted(Request(0, 100).needs(one(*point)) for point in grid)
    limit = (every[7] + every[8]) // 2
    found = search(CONFIG, Request(limit, 100), grid)
    assert [n for n, _, _ in found] == every[:8][::-1]
    with pytest.raises(ValueError, match="5 layers, d_model 32, MLP 24, 4 Mamba heads, needs"):
        search(CONFIG, Request(1000, 100), grid)


def test_minipuzzle_is_the_best_of_all_choices():
    """Against every subset of layers and every width."""
    config = shrunk(pattern="M-M*-")
    generator = torch.Generator().manual_seed(3)
    costs = {i: float(c) for i, c in enumerate(torch.rand(5, generator=generator))}
    width_costs = {48: 0.0, 32: 0.2, 16: 0.5}
    full = Request(1, 64).needs(config)
    for share in (0.95, 0.8, 0.6):
        request = Request(int(share * full), 64)
        options = []
        for r in range(1, 6):
            some = itertools.combinations(range(5), r)
            for layers, width in itertools.product(some, width_costs):
                one = HybridConfig(**{**vars(config), "mlp_dim": width,
                                      "pattern": "".join(config.pattern[i] for i in layers)})
                if request.needs(one) <= request.limit:
                    lost = sum(costs[i] for i in range(5) if i not in layers) + width_costs[width]
                    options.append((lost, list(layers), width))
        layers, width = minipuzzle(costs, width_costs, config, request)
        got = sum(costs[i] for i in range(5) if i not in layers) + width_costs[width]
        assert got == pytest.approx(min(options)[0])
    with pytest.raises(ValueError, match="no choice of layers and MLP width fits .* of one layer"):
        minipuzzle(costs, width_costs, config, Request(1000, 64))
    with pytest.raises(ValueError, match="M\\*M has none"):
        minipuzzle({0: 1.0}, width_costs, shrunk(pattern="M*M"), Request(1000, 64))
    free = {i: -1.0 for i in range(5)}          # removing pays: one layer stays all the same
    layers, _ = minipuzzle(free, width_costs, config, Request(full, 64))
    assert len(layers) == 1


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
    loss = kd_loss(h, w, ht, wt, block)
    got = torch.autograd.grad(3 * loss, (h, w))
    assert_close([loss.detach(), *got], [truth.detach(), *(3 * m for m in expected)],
                 ["loss", "dh", "dw"], 1e-10)
    assert kd_loss(ht, wt, ht, wt, block) < 1e-12
    with torch.no_grad():
        assert kd_loss(h, w, ht, wt, block) == pytest.approx(float(truth.detach()), abs=1e-12)


def test_a_taught_student_trains_on_the_kl_and_is_evaluated_on_the_text():
    teacher, student = random_model(), random_model(seed=1)
    student.requires_grad_(True)
    labels = TOKENS.roll(-1, 1)
    own = float(student.loss(TOKENS, labels).detach())
    teach(student, teacher)
    loss = student.loss(TOKENS, labels)
    truth = F.kl_div(F.log_softmax(student(TOKENS), -1), F.log_softmax(teacher(TOKENS), -1),
                     log_target=True, reduction="none").sum(-1).mean()
    assert float(loss.detach()) == pytest.approx(float(truth.detach()), rel=1e-9)
    with torch.no_grad():
        assert float(student.loss(TOKENS, labels)) == pytest.approx(own, rel=1e-12)
    gone = weakref.ref(student)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    del student, loss
    assert gone() is None           # at once: a tried candidate of 9 B must not linger


def test_the_kd_loss_holds_no_logits():
    """Growth of resident memory, forward and backward, in a process of its own: far below one
    model's fp32 logits, which are 256 MiB here.
    """
    code = """
import torch
from infer import measured_peak
from prune_distill import kd_loss
h, w = torch.randn(2048, 16, requires_grad=True), torch.randn(32768, 16, requires_grad=True)
ht, wt = torch.randn(2048, 16), torch.randn(32768, 16)
kd_loss(h[:64], w, ht[:64], wt, 64).backward()
h.grad = w.grad = None
with measured_peak("cpu") as peak:
    kd_loss(h, w, ht, wt, 64).backward()
    print(peak())
"""
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout
    assert int(output) < 64 * 2 ** 20


def test_merging_is_the_weighted_mean_and_wants_equal_models():
    a, b = random_model(), random_model(seed=1)
    m = merge(a, b, 0.25)
    for p, q, r in zip(a.parameters(), b.parameters(), m.parameters()):
        assert torch.allclose(r, 0.75 * p + 0.25 * q, rtol=1e-12)
    assert torch.equal(merge(a, b, 0)(TOKENS), a(TOKENS))
    with pytest.raises(ValueError, match="different d_model cannot be merged"):
        merge(a, random_model(shrunk(d_model=24)), 0.5)
    with pytest.raises(ValueError, match="--alpha is 2"):
        merge(a, b, 2)


# ------------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def teacher(text, tmp_path_factory):
    """A byte model that has learned to count a little."""
    out = tmp_path_factory.mktemp("teacher")
    train_fp8.main(["--data", str(text), "--out", str(out), "--tokenizer", "bytes", "--pattern",
                    "M-M*-", "--seq-len", "32", "--batch-size", "4", "--device", "cpu", "--recipe",
                    "bf16", "--compute-dtype", "float32", "--steps", "60", "--overwrite"])
    return out


def flags(text, teacher, out, *more):
    return ["--teacher", str(teacher), "--data", str(text), "--out", str(out), "--device", "cpu",
            "--seq-len", "32", "--batch-size", "4", "--steps", "8", "--trial-steps", "2",
            "--candidates", "2", "--samples", "8", "--eval-tokens", "512", "--eval-every", "3",
            "--save-every", "2", "--context", "64", "--compute-dtype", "float32", "--lr", "5e-4",
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
    prune_distill.main(flags(text, teacher, tmp_path / "out", "--stop-after", "3"))
    another = tmp_path / "another"
    shutil.copytree(teacher, another)
    model = load_hf(another)
    model.lm_head.weight.data[0] += 1
    save_hf(model, another)
    assert "another teacher" in fails(prune_distill.main, flags(text, another, tmp_path / "out"))
    prune_distill.main(flags(text, teacher, tmp_path / "out"))
    for (name, p), q in zip(load_hf(compressed).named_parameters(),
                            load_hf(tmp_path / "out").parameters()):
        assert torch.equal(p, q), name
    a, b = final(compressed), final(tmp_path / "out")
    assert all(a[k] == b[k] for k in a if k.endswith("loss"))


def test_a_teacher_in_bf16_has_a_student_with_fp32_masters(text, teacher, tmp_path):
    """As a released checkpoint is stored; and stopping changes nothing there either."""
    short, half = tmp_path / "bf16", tmp_path / "half"
    shutil.copytree(teacher, short)
    save_hf(load_hf(short, dtype=torch.bfloat16), short)
    for out, more in ((tmp_path / "whole", []), (half, ["--stop-after", "2"]), (half, [])):
        prune_distill.main(flags(text, short, out, "--steps", "4", "--no-scratch", *more))
    for (name, p), q in zip(load_hf(tmp_path / "whole").named_parameters(),
                            load_hf(half).parameters()):
        assert p.dtype == torch.float32 and torch.equal(p, q), name


def test_every_row_of_the_recovery_is_of_the_same_text(text, teacher, tmp_path, capsys):
    """With next to no learning rate the loss on the way is the loss of the cut."""
    prune_distill.main(flags(text, teacher, tmp_path / "out", "--lr", "1e-12", "--no-scratch",
                             "--eval-tokens", "100"))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert len(losses) == 2
    assert losses == pytest.approx([rows[-1]["final"]["pruned_val_loss"]] * 2, rel=1e-5)


def test_where_the_cut_costs_nothing_nothing_is_won_back(text, teacher, tmp_path, capsys,
                                                         monkeypatch):
    monkeypatch.setattr(prune_distill, "grid_for", lambda config: prune_distill.Grid(
        ({"M": 2, "*": 1, "-": 2},), (256,), (1024,), (16,)))
    prune_distill.main(flags(text, teacher, tmp_path / "out", "--keep", "1", "--candidates", "1",
                             "--steps", "1", "--no-scratch"))
    result = final(tmp_path / "out")
    assert result["params_after"] == result["params_before"] and result["recovered"] is None
    assert "no loss" in capsys.readouterr().out


def test_calibration_has_as_many_rows_as_asked(text, teacher):
    run = Run(data=str(text), teacher=str(teacher), samples=11, seq_len=16)
    _, token_data = prune_distill.load_text(run, 272)
    batches = prune_distill.calibration(run, token_data)
    assert [len(rows) for rows in batches] == [8, 3]
    assert len(torch.cat(batches).unique(dim=0)) == 11


def test_a_finished_compression_says_so_and_another_is_refused(compressed, text, teacher, capsys,
                                                                fails):
    before = (compressed / "model.safetensors").read_bytes()
    prune_distill.main(flags(text, teacher, compressed))
    assert "finished already" in capsys.readouterr().out
    assert "other settings" in fails(prune_distill.main,
                                     flags(text, teacher, compressed, "--samples", "4"))
    assert "another run (lr" in fails(prune_distill.main,
                                      flags(text, teacher, compressed, "--lr", "1e-4"))
    assert (compressed / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("more", [["--method", "minipuzzle"], ["--loss", "ce"],
                                  ["--layer-metric", "cosine"]], ids=" ".join)
def test_other_ways_run(text, teacher, tmp_path, more):
    prune_distill.main(flags(text, teacher, tmp_path / "out", "--steps", "2", "--no-scratch",
                             *more))
    result = final(tmp_path / "out")
    assert result["scratch_val_loss"] is None and result["memory_gib_after"] > 0


@pytest.mark.parametrize("more, words", [
    (["--memory-gib", "0.0001"], "nothing fits 0.0001 GiB: the smallest of"),
    (["--teacher", "/nowhere"], "has no config.json"),
    (["--keep", "2"], "--keep is 2.0, must be above 0 and at most 1"),
    (["--method", "magic"], "must be one of minitron, minipuzzle"),
    (["--weight-bits", "5"], "--weight-bits is 5"), (["--steps", "0"], "--steps is 0"),
    (["--seq-len", "15000"], "do not fill two windows"),
    (["--list", "--preset", "huge"], "preset 'huge' is not one of"),
    (["--memory-gib", "inf"], "must be positive and finite"),
    (["--memory-gib", "50"], "the teacher fits it already, with 0."),
    (["--memory-gib", "1e-12"], "nothing fits 0 GiB"),
    (["--recipe", "int3"], "--recipe is 'int3'"), (["--samples", "5000"], "--samples is 5000"),
    (["--method", "minipuzzle", "--keep", "0.01"], "no choice of layers and MLP width fits"),
    (["--out", "out/base", "--teacher", "out/base/"], "would take its teacher's place")])
def test_bad_flags_are_one_line_and_write_nothing(fails, text, teacher, tmp_path, more, words):
    assert words in fails(prune_distill.main, flags(text, teacher, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_step_that_memory_cannot_hold_is_refused(fails, text, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(train_fp8, "free_bytes", lambda device: 10 ** 6)
    assert "are free" in fails(prune_distill.main, flags(text, teacher, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_folders_are_merged_and_not_written_over(compressed, tmp_path, fails, capsys):
    other = tmp_path / "other"
    shutil.copytree(compressed, other)
    model = load_hf(other)
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    save_hf(model, other)
    argv = ["--merge", str(compressed), str(other), "--alpha", "0.25", "--out"]
    prune_distill.main([*argv, str(tmp_path / "merged")])
    for p, q in zip(load_hf(compressed).parameters(), load_hf(tmp_path / "merged").parameters()):
        assert torch.allclose(p + 0.25, q, atol=1e-6)
    capsys.readouterr()
    assert "holds a model" in fails(prune_distill.main, [*argv, str(tmp_path / "merged")])
    assert "holds a training run" in fails(prune_distill.main, [*argv, str(other), "--overwrite"])
    words = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(words | {"version": "1.1"}))
    assert "two tokenizers" in fails(prune_distill.main, [*argv, str(tmp_path / "new")])


def test_the_list_needs_no_weights(capsys):
    prune_distill.main(["--list", "--preset", "nemotron-nano-12b-v2", "--memory-gib", "19.66",
                        "--context", "131072", "--rows", "3"])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert "no depth of the grid fits" in out and len(result["largest"]) == 3
    assert 1000 < result["fits"] < result["candidates"]
    assert result["limit_bytes"] == int(19.66 * GIB)


def test_the_ablation_has_every_row(text, teacher, tmp_path, capsys):
    prune_distill.main(flags(text, teacher, tmp_path / "out", "--ablate", "--seeds", "2", "--steps",
                             "2"))
    table = json.loads(capsys.readouterr().out.splitlines()[-1])["table"]
    assert all(len(row["each"]) == 2 for row in table.values())
    assert {"cut: importance", "cut: random", "cut: worst first", "trained: KD",
            "trained: cross-entropy", "trained: from scratch"} <= set(table)
    assert table["cut: importance"]["mean"] < table["cut: worst first"]["mean"]


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
