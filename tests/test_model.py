"""The model is the released architecture: in its numbers, in its logits, in its files."""

import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_close
from safetensors.torch import load_file, save_file

import bench.model as bench_model
import common
import model as model_file
import ssm
from bench.model import SIDES
from model import (PRESETS, HybridConfig, HybridLM, RMSNorm, config_from_hf, config_to_hf,
                   cross_entropy, load_hf, rotate, save_hf)

TINY = dict(pattern="M-M*-", vocab_size=61, d_model=24, mlp_dim=40, n_heads=6, n_kv_heads=2,
            head_dim=10,
            mamba_heads=4, mamba_head_dim=9, n_groups=2, d_state=7, chunk_size=8)
COUNTS = {"nemotron-nano-12b-v2": 12_310_001_152, "nemotron-nano-9b-v2": 8_888_227_328,
          "nemotron-h-8b": 8_100_852_736, "nemotron-h-47b": 46_791_554_816,
          "nemotron-h-56b": 56_324_350_464}
LAYERS = {"nemotron-nano-12b-v2": (28, 6, 28), "nemotron-nano-9b-v2": (27, 4, 25),
          "nemotron-h-8b": (24, 4, 24),
          "nemotron-h-4b": (24, 4, 24), "nemotron-h-47b": (45, 5, 48),
          "nemotron-h-56b": (54, 10, 54)}


def tiny(dtype=torch.float64, **changes):
    """A small model with every kind of layer, parameters away from their special values."""
    model = HybridLM(HybridConfig(**{**TINY, **changes})).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


# ------------------------------------------------------------------------------------------------
# Configurations and counts


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_formula_equals_the_built_model(name):
    config = HybridConfig.preset(name)
    with torch.device("meta"):
        built = HybridLM(config)
    assert sum(p.numel() for p in built.parameters()) == config.n_params()
    for block in built.backbone.layers:
        assert sum(p.numel() for p in block.parameters()) == config.params_by_layer()[block.letter]


@pytest.mark.parametrize("name", COUNTS)
def test_released_sizes_are_exact(name):
    assert HybridConfig.preset(name).n_params() == COUNTS[name]


@pytest.mark.parametrize("name", LAYERS)
def test_released_patterns_have_the_released_layers(name):
    pattern = HybridConfig.preset(name).pattern
    assert tuple(map(pattern.count, "M*-")) == LAYERS[name]
    assert pattern[0] == "M" and pattern[-1] == "-"


def test_baselines_have_the_compared_models_sizes():
    """Qwen3-8B has 8,190,735,360 parameters, 36 x 256 of them query and key norms that the shape
    leaves out.
    """
    qwen = HybridConfig.preset("qwen3-8b-shape")
    assert qwen.n_params() == 8_190_735_360 - 36 * 256
    assert qwen.cache_bytes(1, 1)["kv"] == 144 * 2 ** 10 and qwen.rope_theta


def test_bytes_of_the_9b_are_the_published_ones():
    config = HybridConfig.preset("nemotron-nano-9b-v2")
    cache = config.cache_bytes(1, 131072)
    assert round(config.weight_bytes() / 2 ** 30, 3) == 16.556
    assert cache["kv"] == 2 * 2 ** 30 and cache["ssm"] == 135 * 2 ** 20
    assert cache["conv"] == 27 * 12288 * 3 * 2


def test_flops_are_those_of_the_matmuls():
    """torch's own counter on a real forward; the scan and attention's triangle are counted by
    formula.
    """
    from torch.utils.flop_counter import FlopCounterMode
    config = HybridConfig(**{**TINY, "pattern": "-M-"})
    model, t = HybridLM(config), 32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, t, dtype=torch.long))
    assert counter.get_total_flops() == t * sum(config.flops_by_part(t).values())


@pytest.mark.parametrize("changes, words", [
    (dict(pattern="M-ME-"), "experts are not supported"), (dict(pattern=""), "must be letters"),
    (dict(pattern="M-X"), "must be letters of M"), (dict(pattern=["M"]), "must be letters of M"),
    (dict(mamba_heads=3), "mamba_heads 3 must be a multiple of n_groups 2"),
    (dict(n_heads=3), "n_heads 3 must be a multiple"), (dict(d_model=0), "d_model is 0"),
    (dict(d_state=2.5), "d_state is 2.5")])
def test_configurations_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        HybridConfig(**{**TINY, **changes})


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="'nemo' is not one of: toy, small"):
        HybridConfig.preset("nemo")


def test_initialisation_follows_its_table():
    config = HybridConfig(pattern="M-*-" * 4, d_model=320)
    model, std = HybridLM(config), math.sqrt(0.8 / 320)
    for name, p in model.named_parameters():
        if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
            assert abs(p.std() / (std / 4) - 1) < 0.05, name        # 16 layers
        elif "conv1d" in name:
            assert p.abs().max() <= 0.5 and abs(p.std() / (0.5 / math.sqrt(3)) - 1) < 0.05, name
        elif p.dim() == 2:
            assert abs(p.std() / std - 1) < 0.05, name
        elif "norm" in name:
            assert (p == 1).all(), name
    assert all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------------
# Operations


def test_rmsnorm_is_its_formula():
    x, norm = torch.randn(3, 5, 24).double(), RMSNorm(24, 1e-5).double()
    torch.nn.init.normal_(norm.weight)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert_close([norm(x)], [expected], ["y"], 1e-12)
    assert norm(1e-4 * x).abs().mean() < 0.1 * norm(x).abs().mean()      # eps is inside the root
    assert RMSNorm(24, 1e-5)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("block", [4, 7, 100])
def test_cross_entropy_in_blocks_equals_torch(block):
    h, weight = torch.randn(21, 8).double().requires_grad_(), torch.randn(13,
            8).double().requires_grad_()
    labels = torch.randint(0, 13, (21,))
    labels[::5] = -100
    loss, truth = cross_entropy(h, weight, labels, block), F.cross_entropy(h @ weight.t(), labels)
    assert_close([loss, *torch.autograd.grad(3 * loss, [h, weight])],
                 [truth, *torch.autograd.grad(3 * truth, [h, weight])], ["loss", "dh", "dweight"],
                 1e-12)


def test_model_gradients_equal_those_of_plain_torch_operations():
    """loss() with all its hand-written backwards against cross_entropy of the logits by autograd
    alone.
    """
    model = tiny()
    tokens, labels = torch.randint(0, 61, (2, 19)), torch.randint(0, 61, (2, 19))
    mine = torch.autograd.grad(model.loss(tokens, labels), model.parameters())
    kept = ssm.ssd
    try:
        ssm.ssd = lambda *a, chunk_size, **k: ssm.ssd_quadratic(*a, **k)
        plain = torch.autograd.grad(F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten()),
                                    model.parameters())
    finally:
        ssm.ssd = kept
    assert_close(mine, plain, [name for name, _ in model.named_parameters()], 1e-10)


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(1, 1, 1, 8).double(), torch.randn(1, 1, 1, 8).double()
    score = lambda i, j: (rotate(q, i, 1e4) * rotate(k, j, 1e4)).sum()
    assert abs(score(7, 3) - score(104, 100)) < 1e-12 and abs(score(7, 3) - score(7, 4)) > 1e-3


def test_bf16_compute_with_fp32_masters_gives_fp32_gradients_near_fp32():
    model = HybridLM(HybridConfig(**TINY))
    tokens = torch.randint(0, 61, (4, 32))
    grads = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.compute_dtype = dtype
        grads[dtype] = torch.autograd.grad(model.loss(tokens, tokens.roll(-1, 1)),
                                           model.parameters())
        assert all(g.dtype == torch.float32
                   for g in grads[dtype]) and model(tokens).dtype == torch.float32
    flat = {dtype: torch.cat([g.flatten() for g in gs]) for dtype, gs in grads.items()}
    assert_close([flat[torch.bfloat16]], [flat[torch.float32]], ["gradient"], 3e-2)


# ------------------------------------------------------------------------------------------------
# The cache

def tensors_of(cache):
    return [*cache.states(), *cache.kv()]


SPLITS = ([1] * 21, [21], [20, 1], [1, 20], [2, 19], [3, 18], [4, 17], [7, 14], [8, 13], [9, 12],
          [5, 1, 1, 11, 3])


@torch.no_grad()
@pytest.mark.parametrize("changes",
                         [{}, dict(n_groups=1), dict(n_groups=4),
                          dict(pattern="*-*-", rope_theta=1e4)])
def test_any_split_of_a_prompt_gives_the_same_logits_and_states(changes):
    model, tokens = tiny(**changes), torch.randint(0, 61, (2, 21))
    whole = model(tokens)
    for sizes in SPLITS:
        cache = model.init_cache(2, 21)
        parts = [model(part, cache) for part in tokens.split(sizes, 1)]
        assert_close([torch.cat(parts, 1)], [whole], [f"split {sizes}"], 1e-10)
        reference = model.init_cache(2, 21)
        model(tokens, reference)
        assert cache.pos == 21
        mine, theirs = tensors_of(cache), tensors_of(reference)
        assert_close(mine, theirs, map(str, range(len(mine))), 1e-10)


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other():
    model, tokens = tiny(), torch.randint(0, 61, (3, 15))
    assert_close([model(tokens)], [torch.cat([model(row[None]) for row in tokens])], ["logits"],
                 1e-12)


@torch.no_grad()
def test_last_only_gives_the_last_logits_and_computes_no_others():
    model, tokens = tiny(), torch.randint(0, 61, (2, 15))
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    assert_close([model(tokens, last_only=True)], [model(tokens)[:, -1:]], ["logits"], 1e-12)
    assert seen == [1, 15]


@torch.no_grad()
def test_snapshot_and_restore_are_exact():
    model, tokens = tiny(), torch.randint(0, 61, (2, 12))
    cache = model.init_cache(2, 20)
    model(tokens, cache)
    saved = cache.snapshot()
    first = model(tokens[:, :5], cache)
    for _ in range(2):          # the snapshot stays usable
        cache.restore(saved)
        assert cache.pos == 12 and torch.equal(model(tokens[:, :5], cache), first)


def test_cache_bytes_are_the_bytes_of_its_tensors():
    config = HybridConfig(**TINY)
    cache = HybridLM(config).to(torch.bfloat16).init_cache(3, 17)
    assert cache.nbytes() == sum(config.cache_bytes(3, 17).values()) == \
        sum(m.untyped_storage().nbytes() for m in tensors_of(cache))
    assert all(layer.ssm.dtype == torch.float32 for layer, letter in
               zip(cache.layers, config.pattern) if letter == "M")


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(pattern="*-*-", rope_theta=1e4)], ids=str)
def test_rows_that_start_later_are_each_row_alone(changes):
    """Prompts of 3, 9 and 5 tokens end at one position; then one token of each row per call."""
    model, tokens = tiny(**changes), torch.randint(0, 61, (3, 14))
    lengths, cache = [3, 9, 5], model.init_cache(3, 14)
    starts = [max(lengths) - n for n in lengths]
    for i, (n, start) in enumerate(zip(lengths, starts)):
        row = cache.row(i, start)
        for part in tokens[i:i + 1, :n].split([1, n - 1], 1):
            model(part, row)
    cache.pos, cache.start = max(lengths), torch.tensor(starts)
    for step in range(4):
        last = torch.stack([tokens[i, n + step] for i, n in enumerate(lengths)])[:, None]
        logits = model(last, cache)
        alone = [model(tokens[i:i + 1, :n + step + 1], last_only=True)
                 for i, n in enumerate(lengths)]
        assert_close([logits], [torch.cat(alone)], [f"step {step}"], 1e-10)
    with pytest.raises(ValueError, match="take one token per call, not 2"):
        model(tokens[:, :2], cache)


@torch.no_grad()
@pytest.mark.parametrize("starts", [None, [0, 4]], ids=str)
def test_fixed_shapes_and_a_position_on_the_device_change_nothing(starts):
    model, tokens = tiny(), torch.randint(0, 61, (2, 12))
    cache = model.init_cache(2, 32)
    for i in range(2):
        start = starts[i] if starts else 0
        model(tokens[i:i + 1, start:8], cache.row(i, start))
    cache.pos, cache.start = 8, starts and torch.tensor(starts)
    saved, plain = cache.snapshot(), []
    for i in range(8, 11):
        plain.append(model(tokens[:, i:i + 1], cache))
    cache.restore(saved)
    cache.fixed = torch.tensor([8]), 16
    for i, truth in zip(range(8, 11), plain):
        assert_close([model(tokens[:, i:i + 1], cache)], [truth], ["logits"], 1e-12)
        cache.fixed[0].add_(1)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other():
    """Through the scan, the convolution and attention: the same logits as each document alone."""
    model, tokens = tiny(), torch.randint(0, 61, (1, 20))
    seq_idx = torch.tensor([[4] * 6 + [5] + [4] * 13])
    alone = [model(part) for part in tokens.split([6, 1, 13], 1)]
    assert_close([model(tokens, seq_idx=seq_idx)], [torch.cat(alone, 1)], ["logits"], 1e-10)


def test_a_cache_is_used_without_gradients_and_for_one_document_a_row():
    model, tokens = tiny(), torch.randint(0, 61, (2, 9))
    cache = model.init_cache(2, 12)
    for part in tokens.split([1, 5, 3], 1):
        assert not model(part, cache).requires_grad
    assert not [m for m in tensors_of(cache) if m.requires_grad]
    with pytest.raises(ValueError, match="a cache holds one document per row"):
        model(tokens[:, :1], cache, seq_idx=torch.zeros(2, 1))


@torch.no_grad()
def test_a_cache_may_have_another_dtype_than_the_model():
    model, tokens = tiny(torch.float32), torch.randint(0, 61, (1, 9))
    cache = model.init_cache(1, 9, dtype=torch.bfloat16)
    parts = [model(part, cache) for part in tokens.split([4, 1, 4], 1)]
    assert_close([torch.cat(parts, 1)], [model(tokens)], ["logits"], 3e-2)


def test_what_does_not_fit_is_named():
    model = tiny()
    with pytest.raises(ValueError, match="tokens span 0 to 61, the vocabulary is 0 to 60"):
        model(torch.tensor([[0, 61]]))
    with pytest.raises(ValueError, match="tokens span -1"):
        model(torch.tensor([[-1, 2]]))
    cache = model.init_cache(1, 4)
    with pytest.raises(ValueError, match=r"0 \+ 5 tokens do not fit a cache of 4"):
        model(torch.zeros(1, 5, dtype=torch.long), cache)
    assert cache.pos == 0
    with pytest.raises(ValueError, match="made for 1 rows, the tokens have 2"):
        model(torch.zeros(2, 1, dtype=torch.long), cache)


# ------------------------------------------------------------------------------------------------
# Hugging Face: the oracle, in and out

ORACLES = [dict(n_groups=1, mamba_head_dim=6, hybrid_override_pattern="M-*M-", hidden_size=40),
           dict(n_groups=2, mamba_head_dim=10, hybrid_override_pattern="M-M*-M*-", hidden_size=48),
           dict(n_groups=4, mamba_head_dim=16, hybrid_override_pattern="MM*-", hidden_size=56)]


def oracle(shape):
    """A random transformers NemotronH whose prefill, like its kernels and its decode, does not
    clamp dt.
    """
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.NemotronHConfig(vocab_size=97, num_attention_heads=6,
                                          num_key_value_heads=2, head_dim=12,
                                          intermediate_size=72, ssm_state_size=9, mamba_num_heads=8,
                                          chunk_size=16, **shape)
    model = transformers.NemotronHForCausalLM(config).eval()
    for name, p in model.named_parameters():
        p.data.add_(0.1 * torch.randn_like(p))
        if name.endswith("dt_bias"):
            p.data.sub_(5)  # dt below 0.001, where a clamp would show
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return transformers, model


@torch.no_grad()
@pytest.mark.parametrize("shape", ORACLES)
def test_logits_equal_transformers_both_ways_and_for_every_split(shape, tmp_path):
    """Sharded file in, logits at 1e-5 for one shot and eleven splits; sharded file out, opened by
    transformers.
    """
    transformers, reference = oracle(shape)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    model, tokens = load_hf(tmp_path / "theirs"), torch.randint(0, 97, (2, 50))
    truth = reference(tokens).logits
    assert_close([model(tokens)], [truth], ["one shot"], 1e-5)
    for sizes in ([1] * 50, [25, 25], [2, 48], [3, 47], [16, 34], [17, 33], [15, 1, 34],
                  [7, 13, 29, 1], [49, 1],
                  [4, 4, 42], [31, 2, 17]):
        cache = model.init_cache(2, 50)
        parts = [model(part, cache) for part in tokens.split(sizes, 1)]
        assert_close([torch.cat(parts, 1)], [truth], [f"split {sizes}"], 1e-5)

    save_hf(model, tmp_path / "ours", shard_bytes=30_000)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back).__name__ == "NemotronHForCausalLM"
    assert_close([back(tokens).logits], [truth], ["back, transformers as it comes"], 1e-5)


def test_transformers_gradients_equal_ours(tmp_path):
    _, reference = oracle(ORACLES[1])
    reference.save_pretrained(tmp_path)
    model, tokens = load_hf(tmp_path), torch.randint(0, 97, (2, 40))
    reference(input_ids=tokens, labels=tokens).loss.backward()
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    model.loss(tokens, labels).backward()
    theirs = {name.replace("model.", "backbone."): p.grad for name,
              p in reference.named_parameters()}
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert_close([ours[name] for name in theirs], theirs.values(), theirs, 2e-4)


def test_round_trip_is_bitwise_and_fp32_where_it_must_be(tmp_path):
    model = tiny(torch.float32)
    save_hf(model, tmp_path)
    for name, p in load_hf(tmp_path).named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name
    low = load_hf(tmp_path, dtype=torch.bfloat16)
    for name, p in low.named_parameters():
        assert p.dtype == (torch.float32 if name.endswith(("A_log", "D", "dt_bias"))
                           else torch.bfloat16), name
    assert low.config == model.config


def test_a_loaded_model_does_not_write_to_its_file(tmp_path):
    save_hf(tiny(torch.float32), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        for p in load_hf(tmp_path).parameters():
            p.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_newer_prefix_and_key_names_load(tmp_path):
    """transformers' own names start with model., its configs list the layers by kind."""
    from safetensors.torch import load_file, save_file
    model = tiny(torch.float32)
    save_hf(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k.replace("backbone.", "model."): v for k, v in tensors.items()},
              tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    kinds = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
    config["layers_block_type"] = [kinds[c] for c in config.pop("hybrid_override_pattern")]
    config["attention_head_dim"] = config.pop("head_dim")
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = torch.randint(0, 61, (1, 9))
    assert torch.equal(load_hf(tmp_path)(tokens), model(tokens))


def test_rope_baseline_round_trips_but_does_not_pose_as_nemotron():
    config = HybridConfig(**{**TINY, "pattern": "*-", "rope_theta": 1e4})
    values = config_to_hf(config, torch.float32)
    assert values["model_type"] == "nemotron_h_rope" and config_from_hf(values) == config
    assert config_from_hf({**values, "model_type": "nemotron_h"}).rope_theta is None


LOAD_AND_MEASURE = """
import json, sys, torch
sys.path.insert(0, {root!r})
from model import load_hf

def resident(key):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status")
                if line.startswith(key))
dtype = getattr(torch, sys.argv[2])
load_hf(sys.argv[3], dtype=dtype)           # imports and first uses are not what is measured
open("/proc/self/clear_refs", "w").write("5")       # the peak begins here
before = resident("VmRSS")
model = load_hf(sys.argv[1], dtype=dtype)
weights = sum(p.nbytes for p in model.parameters())
largest = max(p.nbytes for p in model.parameters())
print(json.dumps(dict(growth=resident("VmHWM") - before, weights=weights, largest=largest)))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"),
                    reason="peak resident memory is read from /proc")
@pytest.mark.parametrize("dtype, stored", [("float32", 1), ("bfloat16", 2)])
def test_loading_peaks_at_the_weights_and_one_tensor(tmp_path, dtype, stored):
    """A 230 MB checkpoint in 40 MB shards. `stored`: the tensor being cast is read at its stored
    size (fp32).
    """
    config = HybridConfig(pattern="M-*-M-", vocab_size=8192, d_model=1024, mlp_dim=4096)
    save_hf(HybridLM(config), tmp_path / "big", shard_bytes=40 * 10 ** 6)
    save_hf(tiny(torch.float32), tmp_path / "tiny")
    assert len(list((tmp_path / "big").glob("*.safetensors"))) > 4
    script = LOAD_AND_MEASURE.format(root=str(ROOT))
    output = subprocess.run([sys.executable, "-c", script, tmp_path / "big", dtype,
                             tmp_path / "tiny"],
                            capture_output=True, text=True, check=True).stdout
    result = json.loads(output)
    assert result["growth"] <= result["weights"] + stored * result["largest"] + 8 * 2 ** 20, result


@pytest.mark.parametrize("damage, words", [
    (lambda folder: (folder / "model.safetensors").unlink(), "has config.json but no weights"),
    (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
     "model_type is 'llama'"),
    (lambda folder: os.truncate(folder / "model.safetensors", 5000),
     "not a complete safetensors file"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"PK\x03\x04" * 50),
     "not a complete safetensors"),
    (lambda folder: edit(folder, "hidden_size", 32), "config.json asks for"),
    (lambda folder: edit(folder, "hybrid_override_pattern", "M-M*"), "num_hidden_layers 5 says"),
    (lambda folder: edit(folder, "hybrid_override_pattern", "M-*M-"), "is not part of pattern"),
    (lambda folder: edit(folder, "hybrid_override_pattern", "M-M*-M", num_hidden_layers=6),
     "tensors are missing"),
    (lambda folder: edit(folder, "layers_block_type", ["mamba", "mlp", "mlp", "attention", "mlp"]),
     "is not what layers_block_type M--\\*- or"),
    (lambda folder: edit(folder, "quantization_config", dict(quant_method="fp8")),
     "quantization_config is {'quant_method': 'fp8'}"),
    (lambda folder: edit(folder, "sliding_window", 512), "sliding_window is 512"),
    (lambda folder: edit(folder, "layers_block_type", 5), "has a value of a wrong type"),
    (lambda folder: edit(folder, "attention_dropout", 0.1), "attention_dropout is 0.1"),
    (lambda folder: edit(folder, "time_step_limit", [0.001, math.inf]), "dt has no limits here"),
    (lambda folder: edit(folder, "time_step_limit", [0.0, 0.1]), "dt has no limits here"),
    (lambda folder: edit(folder, "mamba_conv_bias", False), "use_conv_bias is False"),
    (lambda folder: edit(folder, "mamba_d_conv", 5), "config.json asks for"),
    (lambda folder: edit(folder, "eos_token_id", [2, 61]), "eos_token_id 61 is not an id"),
    (lambda folder: edit(folder, "eos_token_id", "</s>"), "eos_token_id '</s>' is not an id"),
    (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [99]}'),
     "eos_token_id 99 is not an id"),
    (lambda folder: (folder / "generation_config.json").write_text("["), "is not JSON"),
    (lambda folder: store(folder, "lm_head.weight", lambda m: m.to(torch.float8_e4m3fn)),
     "lm_head.weight is float8_e4m3fn: quantised"),
    (lambda folder: store(folder, "backbone.layers.1.mixer.up_proj.weight", lambda m: m.char()),
     "up_proj.weight is int8: quantised"),
    (lambda folder: index(folder, {}), "an index of other files: remove one"),
    (lambda folder: index(folder, {"lm_head.weight": None}), "no weight_map from tensors to files"),
    (lambda folder: index(folder, {"lm_head.weight": "model.safetensors"}),
     "which model.safetensors.index.json has in no file"),
    (lambda folder: edit(folder, "hybrid_override_pattern", "M-ME-"), "experts are not supported"),
    (lambda folder: edit(folder, "mlp_hidden_act", "silu"), "mlp_hidden_act is 'silu'"),
    (lambda folder: edit(folder, "ssm_state_size", None), "ssm_state_size missing"),
    (lambda folder: edit(folder, "hybrid_override_pattern", 5, num_hidden_layers=1),
     "pattern 5 must be letters of M"),
    (lambda folder: (folder / "config.json").write_text("[]"), "does not hold a JSON object"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
     "has no weight_map"),
    (lambda folder: twice(folder), "holds lm_head.weight, which .* has in model-00001"),
    (lambda folder: store(folder, "model.norm_f.weight", lambda m: m, "backbone.norm_f.weight"),
     "or is there twice")])
def test_broken_and_foreign_checkpoints_are_named(tmp_path, damage, words):
    save_hf(tiny(torch.float32), tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        load_hf(tmp_path)
    assert "\n" not in str(error.value)


def edit(folder, key, value, **more):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value, **more}))


def store(folder, name, change, source=None):
    """Write change(tensor) of the tensor `source`, by default `name` itself, under this name."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[source or name]).clone()
    save_file(tensors, folder / "model.safetensors")


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))


def twice(folder):
    """Two files that both hold the head, of which the index names the first."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model-00001.safetensors")
    save_file({"lm_head.weight": tensors["lm_head.weight"] + 1}, folder / "model-00002.safetensors")
    names = {name: "model-00001.safetensors" for name in tensors}
    index(folder, {**names, "unknown": "model-00002.safetensors"})


def test_config_keys_have_old_names_too():
    """What transformers renames when it reads a configuration is read here."""
    config = HybridConfig(**TINY)
    values = config_to_hf(config, torch.float32)
    for old, new in model_file.HF_OLD_NAMES.items():
        if new in values:
            values[old] = values.pop(new)
    assert "mamba_n_groups" in values and config_from_hf(values).n_groups == 2


def test_end_tokens_and_lengths_survive_loading_and_saving(tmp_path):
    """As in a released folder, where config.json names fewer end tokens than generation_config."""
    transformers = pytest.importorskip("transformers")
    first, second = tmp_path / "a", tmp_path / "b"
    save_hf(tiny(torch.float32), first)
    edit(first, "bos_token_id", 1, eos_token_id=2, pad_token_id=0, max_position_embeddings=131072)
    generation = dict(bos_token_id=1, eos_token_id=[2, 11], pad_token_id=0, temperature=0.6)
    (first / "generation_config.json").write_text(json.dumps(generation))
    model = load_hf(first)
    assert model.config.end_tokens == [2, 2, 11]
    save_hf(model, second)
    written = json.loads((second / "config.json").read_text())
    assert [written[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id",
                                     "max_position_embeddings")] == [1, 2, 0, 131072]
    assert json.loads((second / "generation_config.json").read_text()) == generation
    theirs = transformers.AutoModelForCausalLM.from_pretrained(second)
    assert theirs.generation_config.eos_token_id == [2, 11]

    save_hf(tiny(torch.float32), second)        # another model's end tokens do not stay behind
    assert not (second / "generation_config.json").exists()


class Adapter(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.low = base, torch.nn.Linear(base.in_features, 2)


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_layer(model):
    model.backbone.layers[1] = torch.compile(model.backbone.layers[1], backend="eager")
    return model


@pytest.mark.parametrize("change", [compiled, compiled_layer])
def test_a_compiled_model_is_saved_as_the_model(tmp_path, change):
    model, tokens = tiny(torch.float32), torch.randint(0, 61, (1, 7))
    logits = model(tokens)
    save_hf(change(model), tmp_path)
    assert torch.equal(load_hf(tmp_path)(tokens), logits)


def tied(model):
    model.lm_head.weight = model.backbone.embeddings.weight


def adapted(model):
    model.backbone.layers[1].mixer.up_proj = Adapter(model.backbone.layers[1].mixer.up_proj)


def in_codes(model):
    weight = model.lm_head.weight.detach().to(torch.float8_e4m3fn)
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)


def reparametrised(model):
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)


def narrowed(model):
    model.config = dataclasses.replace(model.config, d_model=25)


@pytest.mark.parametrize("change, words", [
    (tied, "lm_head.weight is not there"), (adapted, "up_proj.weight is not there"),
    (in_codes, "float8_e4m3fn"), (reparametrised, "lm_head.weight is not there"),
    (narrowed, "the config asks for"), (lambda model: model.to("meta"), "on meta")])
def test_a_changed_model_is_refused_and_the_folder_kept(tmp_path, change, words):
    """Also in several files, where the config goes first."""
    save_hf(tiny(torch.float32), tmp_path, 10_000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = tiny(torch.float32)
    change(model)
    with pytest.raises(ValueError, match=words):
        save_hf(model, tmp_path, 10_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_a_language_model_is_saved(tmp_path):
    with pytest.raises(ValueError, match="only a HybridLM can be saved, not a Linear"):
        save_hf(torch.nn.Linear(2, 2), tmp_path)


def test_the_files_of_a_model_have_the_modes_of_any_file(tmp_path):
    """safetensors writes for the owner alone."""
    before = os.umask(0o027)
    try:
        save_hf(tiny(torch.float32), tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


# ------------------------------------------------------------------------------------------------
# Autograd outside its plain use


def test_labels_beyond_the_vocabulary_are_named():
    model, tokens = tiny(), torch.randint(0, 61, (2, 9))
    with pytest.raises(ValueError, match="labels reach 61, the vocabulary is 0 to 60"):
        model.loss(tokens, torch.full_like(tokens, 61))


def test_second_derivatives_of_the_loss_are_refused():
    """autograd.grad would take them for zero: the backward by hand is a constant to it."""
    h, weight = torch.randn(9, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    loss = cross_entropy(h, weight, torch.arange(9))
    with pytest.raises(RuntimeError, match="cross_entropy has first derivatives only"):
        torch.autograd.grad(loss, h, create_graph=True)
    first, again = (torch.autograd.grad(loss, h, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)            # but any number of backwards over a kept graph


def test_a_copy_of_a_model_is_a_model_of_its_own(tmp_path):
    """Copied, pickled and saved: its own weights, its own gradients."""
    model, tokens = tiny(), torch.randint(0, 61, (2, 9))
    loss = float(model.loss(tokens, tokens).detach())
    torch.save(model, tmp_path / "model")
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
              torch.load(tmp_path / "model", weights_only=False)]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    for other in others:
        value = other.loss(tokens, tokens)
        value.backward()
        assert float(value.detach()) == loss
        assert all(p.grad is not None for p in other.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_missing_shard_is_named(tmp_path):
    save_hf(tiny(torch.float32), tmp_path, shard_bytes=10_000)
    (tmp_path / "model-00002-of-00008.safetensors").unlink(missing_ok=True)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="is not a complete safetensors file: No such file"):
        load_hf(tmp_path)


def test_saving_over_another_number_of_files_leaves_one_checkpoint(tmp_path):
    """Single over sharded and back: what is left is what transformers and load_hf both read."""
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(0, 61, (1, 7))
    for shard_bytes in (10 ** 9, 10_000, 20_000, 10 ** 9):
        model = tiny(torch.float32)
        save_hf(model, tmp_path, shard_bytes)
        count = len(list(tmp_path.glob("model*.safetensors")))
        assert (count == 1) == (shard_bytes == 10 ** 9)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        for other in (load_hf(tmp_path), lambda m: theirs(m).logits):
            assert_close([other(tokens)], [model(tokens)], ["logits"], 1e-5)


def test_an_interrupted_sharded_save_is_refused_not_mixed(tmp_path, monkeypatch):
    import safetensors.torch
    save_hf(tiny(torch.float32), tmp_path, 10_000)
    real, calls = safetensors.torch.save_file, []

    def full_disk_at_the_third(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 3:
            raise RuntimeError("No space left on device")
        real(tensors, path, metadata)
    monkeypatch.setattr(model_file, "save_file", full_disk_at_the_third)
    with pytest.raises(OSError, match="could not be written: No space left"):
        save_hf(tiny(torch.float32), tmp_path, 10_000)
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        load_hf(tmp_path)


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = tiny(torch.float32)
    save_hf(model, tmp_path)

    def dies_halfway(tensors, path, metadata):
        open(path, "wb").write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(model_file, "save_file", dies_halfway)
    with pytest.raises(KeyboardInterrupt):
        save_hf(tiny(torch.float32), tmp_path)
    assert torch.equal(load_hf(tmp_path).lm_head.weight, model.lm_head.weight)


# ------------------------------------------------------------------------------------------------
# Settings and the script


def test_cpu_settings_are_exact_and_reported():
    """Whatever tune_cpu picks, an fp32 product stays one."""
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    try:
        assert common.tune_cpu()
        a, b = torch.randn(300, 500), torch.randn(500, 200)
        assert_close([a @ b], [a.double() @ b.double()], ["product"], 1e-6)
    finally:
        setting.fp32_precision = before


def test_free_memory_is_a_containers_where_there_is_one(tmp_path, monkeypatch):
    """Its limit less what is in use and cannot be dropped; page cache can."""
    monkeypatch.setattr(common, "CONTAINER", tmp_path)
    machine = common.free_bytes()
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 900\n")
    for limit, expected in (("max", machine), ("5000", 4000), ("800", 0)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        assert common.free_bytes() == pytest.approx(expected, rel=0.1)


def test_script_describes_a_preset(capsys):
    model_file.main(["--preset", "nemotron-nano-9b-v2", "--context", "131072"])
    printed = capsys.readouterr().out
    assert "Mamba-2          27" in printed and "8,888,227,328" in printed
    assert "weights 16.556, kv 2.000, ssm 0.132, conv 0.002" in printed
    assert json.loads(printed.splitlines()[-1])["n_params"] == 8_888_227_328


@pytest.mark.parametrize("argv, words", [
    (["--preset", "gpt"], "--preset is 'gpt', must be one of toy"),
    (["--context", "0"], "--context is 0, must be at least 1"), (["--contxt", "9"], "--contxt")])
def test_script_errors_are_one_line(fails, argv, words):
    assert words in fails(model_file.main, argv)


def test_benchmark_runs_all_sides(capsys, monkeypatch):
    """A tiny batch: the figures mean nothing here, the command has to work. What needs transformers
    runs in this process, which has imported it.
    """
    pytest.importorskip("transformers")
    run = subprocess.run

    def run_here(command, **options):
        if SIDES[0] in command:
            return run(command, **options)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            bench_model.main(command[3:])
        return subprocess.CompletedProcess(command, 0, printed.getvalue())
    monkeypatch.setattr(subprocess, "run", run_here)
    result = bench_model.compare(batch=2, length=32, rounds=1)
    assert set(result["tokens_per_s"]) == set(SIDES)
    assert all(value > 0 for side in result["tokens_per_s"].values() for value in side.values())
    assert set(result["ratios"]["transformers"]) == {"train", "prefill", "decode1", "decode2"}
    assert "against transformers" in capsys.readouterr().out
