"""Training learns, stops anywhere and goes on exactly, and never writes over what it did not
make.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import train_fp8
from common import RunFolder, read_rows
from data import TokenStream, load_data, write_shards
from model import HybridConfig, HybridLM, load_hf
from train_fp8 import Run, bits_per_byte, evaluate, make_optimizer, train, train_step, wsd

SMALL = ["--tokenizer", "bytes", "--pattern", "M*-M-", "--seq-len", "32", "--batch-size", "4",
         "--device", "cpu",
         "--compute-dtype", "float32", "--eval-every", "2"]


@pytest.fixture
def text(tmp_path):
    """A small text with structure: 40 documents of counting."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(f"item {j}" for j in range(i, i + 60)),
                                         encoding="utf-8")
    return folder


def run_main(text, out, *flags):
    train_fp8.main(["--data", str(text), "--out", str(out), *SMALL, *flags])


def metrics(out):
    """The rows of metrics.jsonl that are steps; the last line of a finished run is its result."""
    return [row for row in map(json.loads, open(out / "metrics.jsonl")) if "loss" in row]


def weights(out):
    return {name: p.detach() for name, p in load_hf(out).named_parameters()}


def assert_same_run(one, other):
    """Bitwise: parameters, optimizer states, the generator, and every logged loss."""
    first, second = (torch.load(out / "train_state.pt", weights_only=True) for out in (one, other))
    assert first["step"] == second["step"] and torch.equal(first["rng"], second["rng"])
    for name in first["model"]:
        assert torch.equal(first["model"][name], second["model"][name]), name
    for i, moments in first["optimizer"]["state"].items():
        assert all(torch.equal(moments[k], second["optimizer"]["state"][i][k]) for k in moments), i
    losses = [[row["loss"] for row in metrics(out)] for out in (one, other)]
    assert losses[0] == losses[1] and len(losses[0]) == first["step"]
    assert all(torch.equal(p, weights(other)[name]) for name, p in weights(one).items())


# ------------------------------------------------------------------------------------------------
# Schedule, optimizer, evaluation


def test_schedule_warms_up_stays_and_ends_at_its_minimum():
    rates = [wsd(i, 100, 2.0, warmup=0.1, decay=0.2, min_lr=0.01) for i in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert all(rate == 2.0 for rate in rates[9:80])
    assert all(a > b for a, b in zip(rates[79:], rates[80:])) and rates[-1] == pytest.approx(0.02)
    assert rates[89] == pytest.approx(2 * (0.01 + 0.99 * (1 - math.sqrt(0.5))))
    assert wsd(0, 5, 1.0, warmup=0, decay=0) == wsd(4, 5, 1.0, warmup=0, decay=0) == 1.0


def test_weight_decay_is_on_matrices_alone():
    model = HybridLM(HybridConfig(pattern="M*-", d_model=32, vocab_size=64))
    decayed, others = (group["params"] for group in make_optimizer(model, 1e-3, 0.1).param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed) + len(others) == len(names)
    assert {names[id(p)].split(".")[-1] for p in decayed} == {"weight"} and not [p for p in decayed
                                                                                 if p.dim() < 2]
    undecayed = [names[id(p)] for p in others]
    assert all(name.endswith(("A_log", "D", "dt_bias", "norm.weight", "norm_f.weight", "bias"))
               for name in undecayed)


def test_adamw_is_its_formula_with_decay_clip_and_these_betas():
    """One step by hand: moments (0.1 g, 0.05 g^2) corrected to g and g^2, so the update is lr
    (sign(g) + wd p).
    """
    model = HybridLM(HybridConfig(pattern="-", d_model=16, mlp_dim=16, vocab_size=32))
    run = Run(batch_size=2, seq_len=8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, 1e-2, 0.1)

    class Fixed:
        def next(self):
            tokens = torch.arange(16).view(2, 8)
            return tokens, tokens + 1, None
    train_step(model, optimizer, Fixed(), run, 1e-2, "cpu", clip=1e9)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.95)] * 2
    for name, p in model.named_parameters():
        gradient = optimizer.state[p]["exp_avg"] / 0.1
        decay = 0.1 if p.dim() >= 2 else 0.0
        expected = before[name] * (1 - 1e-2 * decay) - 1e-2 * gradient / (gradient.abs() + 1e-8)
        assert torch.allclose(p, expected, atol=1e-5), name


def test_gradient_norm_is_clipped_and_reported_before_clipping():
    model = HybridLM(HybridConfig(pattern="-", d_model=16, mlp_dim=16, vocab_size=32))
    seen = []

    class Recorder:
        param_groups = [{}]
        step = lambda self: seen.append(torch.stack([p.grad.norm()
                                                     for p in model.parameters()]).norm())
        zero_grad = lambda self, set_to_none: None

    class Fixed:
        def next(self):
            return torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long), None
    _, grad_norm = train_step(model, Recorder(), Fixed(), Run(batch_size=2), 1e-2, "cpu", clip=0.01)
    assert grad_norm > 0.1 and seen[0] == pytest.approx(0.01, rel=1e-3)


def test_accumulation_gives_the_gradient_of_the_whole_batch(text, tmp_path):
    for n in ("1", "2", "4"):
        run_main(text, tmp_path / n, "--recipe", "none", "--steps", "1", "--grad-accum", n)
    for name, p in weights(tmp_path / "1").items():
        for n in ("2", "4"):
            assert torch.allclose(p, weights(tmp_path / n)[name], atol=2e-4), name
    losses = [metrics(tmp_path / n)[0]["loss"] for n in ("1", "2", "4")]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_accumulation_weighs_passes_by_their_labels():
    """Passes of 5 and 40 labels give the gradient of the 45 together."""
    model = HybridLM(HybridConfig(pattern="M*-", d_model=32, mlp_dim=32, vocab_size=32)).double()
    tokens = torch.randint(32, (2, 40))
    labels = tokens.roll(-1, 1)
    labels[0, 5:] = -100

    class Rows:
        def __init__(self, n):
            self.parts = iter(zip(tokens.split(n), labels.split(n)))

        def next(self):
            return *next(self.parts), None
    gradients = []
    for accum in (1, 2):
        optimizer = make_optimizer(model, 0.0)
        optimizer.step = lambda: gradients.append([p.grad.clone() for p in model.parameters()])
        train_step(model, optimizer, Rows(2 // accum), Run(batch_size=2, grad_accum=accum), 0.0,
                   "cpu")
    for one, two in zip(*gradients):
        assert torch.allclose(one, two, rtol=1e-10, atol=1e-14)


def test_another_objective_is_another_loss_fn(text):
    """train minimises what loss_fn returns, of the same windows; and on_step ends it."""
    token_data = load_data(str(text), "bytes")
    model = HybridLM(HybridConfig(pattern="M-", d_model=32, mlp_dim=32, vocab_size=272))
    seen = []

    def negative_entropy(model, tokens, labels, seq_idx):
        seen.append((tokens, labels))
        log_p = model(tokens).log_softmax(-1)
        return (log_p.exp() * log_p).sum(-1).mean()
    run = Run(steps=30, batch_size=2, seq_len=16, recipe="none", lr=1e-2)
    rows = train(run, model, token_data, negative_entropy, on_step=lambda row: row["step"] == 20)
    assert len(rows) == len(seen) == 20 and rows[-1]["loss"] < rows[0]["loss"]
    steps = []
    train(dataclasses.replace(run, steps=2), model, token_data,
          on_step=lambda row: steps.append(row["step"]))
    assert steps == [1, 2]
    assert rows[-1]["loss"] == pytest.approx(-math.log(272), rel=1e-2)
    batches = train_fp8.make_batches(run, token_data)
    assert all(torch.equal(a, b) for got in seen for a, b in zip(got, batches.next()))


def test_own_batches_take_the_place_of_the_text(text):
    """train asks for next() and sets position; evaluation stays on the validation text."""
    token_data = load_data(str(text), "bytes")
    model = HybridLM(HybridConfig(pattern="M-", d_model=32, mlp_dim=32, vocab_size=272))
    positions = []

    class Letters:
        position = None

        def next(self):
            positions.append(self.position)
            return torch.full((2, 16), 97), torch.full((2, 16), 98), None
    run = Run(steps=4, batch_size=2, seq_len=16, recipe="none", lr=1e-2, eval_every=3)
    rows = train(run, model, token_data, batches=Letters(), on_step=lambda row: row["step"] == 3)
    assert positions == [0, 2, 4] and rows[-1]["loss"] < rows[0]["loss"]
    expected = evaluate(model, token_data.validation, 2, 16, limit=8 * 2 * 16)
    assert rows[-1]["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_evaluation_on_the_way_is_of_windows_from_all_over_the_text(text, tmp_path):
    run_main(text, tmp_path / "out", "--steps", "2", "--stop-after", "1", "--eval-every", "1",
             "--batch-size", "1", "--recipe", "none")
    model, stream = load_hf(tmp_path / "out"), load_data(str(text), "bytes").validation
    assert len(stream) > 256 + 32
    logged = metrics(tmp_path / "out")[0]["val_loss"]
    assert logged == pytest.approx(evaluate(model, stream, 1, 32, limit=256), rel=1e-5)
    assert logged != pytest.approx(evaluate(model, stream, 1, 32), rel=1e-5)


def test_evaluation_of_a_uniform_model_is_log_v_and_bits_follow():
    """A head of zeros predicts 1 / v everywhere: ln v nats a token, however the windows fall."""
    import numpy as np
    model = HybridLM(HybridConfig(pattern="M-", d_model=16, vocab_size=32))
    torch.nn.init.zeros_(model.lm_head.weight)
    tokens = TokenStream([np.arange(101, dtype=np.uint16) % 32])
    nats = evaluate(model, tokens, batch_size=3, seq_len=16)
    assert nats == pytest.approx(math.log(32), rel=1e-6)
    assert bits_per_byte(nats, 100, 250) == pytest.approx(5 * 100 / 250)


def test_evaluation_is_the_mean_over_tokens_not_over_batches():
    """A smaller last batch counts by its tokens: plain cross-entropy of all windows at once."""
    import numpy as np
    model = HybridLM(HybridConfig(pattern="-", d_model=16, mlp_dim=16, vocab_size=32))
    tokens = torch.randint(0, 32, (71,))
    nats = evaluate(model, TokenStream([tokens.numpy().astype(np.uint16)]), 2, 16)
    logits = model(tokens[None, :-1])[0]  # an MLP alone sees one token: windows do not matter
    truth = torch.nn.functional.cross_entropy(logits, tokens[1:])
    assert nats == pytest.approx(truth.item(), rel=1e-5)


def test_processes_share_the_rows_of_an_evaluation(monkeypatch):
    """Sums of nats and tokens add up to those of one process, though the last batch has one row."""
    model = HybridLM(HybridConfig(pattern="-", d_model=16, mlp_dim=16, vocab_size=32))
    stream, sums = TokenStream([torch.randint(0, 32, (65,)).numpy().astype("uint16")]), {}
    assert [len(tokens) for tokens, *_ in train_fp8.validation_batches(stream, 3, 16)] == [3, 1]
    for who in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(train_fp8, "rank_and_size", lambda: who)
        monkeypatch.setattr(train_fp8, "sum_over_processes", lambda m: sums.setdefault(who, m))
        evaluate(model, stream, 3, 16)
    assert torch.allclose(sums[0, 2] + sums[1, 2], sums[0, 1], rtol=1e-6) and sums[0, 1][1] == 64


# ------------------------------------------------------------------------------------------------
# Runs


def test_a_run_learns_and_leaves_a_complete_folder(text, tmp_path, capsys):
    run_main(text, tmp_path / "out", "--steps", "40")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = metrics(tmp_path / "out")
    assert rows[0]["loss"] > 4 and result["val_loss"] < 2.5 and rows[-1]["loss"] < 2.5
    for key in ("recipe", "val_loss", "val_bpb", "tokens", "seconds", "tokens_per_s", "out"):
        assert key in result
    assert result["tokens"] == 40 * 4 * 32 and [row["step"] for row in rows] == list(range(1, 41))
    assert "val_loss" in rows[1] and "val_loss" not in rows[0]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl",
                     "train_state.pt", "loss.png", ".lock"}


def test_every_flag_reaches_the_run(text, tmp_path):
    """The logged rates are the schedule; every other flag changes the weights."""
    run_main(text, tmp_path / "plain", "--steps", "10", "--decay", "0.5", "--warmup", "0.2")
    expected = [wsd(i, 10, 3e-3, 0.2, 0.5, 0.01) for i in range(10)]
    assert [row["lr"] for row in metrics(tmp_path / "plain")] == pytest.approx(expected)
    for flags in (["--reset-documents"], ["--seed", "1"], ["--recipe", "nemotron-h"]):
        out = tmp_path / flags[0]
        run_main(text, out, "--steps", "10", "--decay", "0.5", "--warmup", "0.2", *flags)
        same = weights(tmp_path / "plain")
        assert not all(torch.equal(p, same[name]) for name, p in weights(out).items()), flags


def test_a_torn_or_missing_log_is_mended(text, tmp_path):
    """A metrics.jsonl that is missing, empty or torn does not stand in the way of a good state."""
    out, flags = tmp_path / "out", ["--steps", "6"]
    run_main(text, out, *flags, "--stop-after", "2")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "los')
    run_main(text, out, *flags, "--stop-after", "2")
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4]
    (out / "metrics.jsonl").write_text("")
    run_main(text, out, *flags, "--stop-after", "1")
    (out / "metrics.jsonl").unlink()
    run_main(text, out, *flags)
    assert [row["step"] for row in metrics(out)] == [6]
    rate = read_rows(out / "metrics.jsonl")[-1]["final"]
    assert rate["tokens"] == 6 * 4 * 32
    assert rate["tokens_per_s"] == pytest.approx(4 * 32 / rate["seconds"])      # of what is logged
    (out / "metrics.jsonl").unlink()
    run_main(text, out, *flags)             # all steps done, no log: reported again, not stuck
    assert read_rows(out / "metrics.jsonl")[-1]["final"]["val_loss"] == rate["val_loss"]


def test_a_tokenizer_file_that_changes_does_not_change_a_run(text, tmp_path, capsys):
    """The run's own tokenizer is in its state."""
    from data import make_tokenizer, stdlib_documents
    sources = [source for _, source in stdlib_documents()[:20]]
    path, out = tmp_path / "t.json", tmp_path / "out"
    path.write_text(make_tokenizer("bpe", sources, 400), encoding="utf-8")
    flags = ["--steps", "4", "--tokenizer", str(path)]
    run_main(text, tmp_path / "whole", *flags)
    run_main(text, out, *flags, "--stop-after", "2")
    path.write_text(make_tokenizer("bpe", sources[:3], 350), encoding="utf-8")
    run_main(text, out, *flags)
    assert_same_run(tmp_path / "whole", out)


def test_two_halves_equal_the_whole_bit_for_bit(text, tmp_path):
    run_main(text, tmp_path / "whole", "--steps", "7")
    for _ in range(3):
        run_main(text, tmp_path / "parts", "--steps", "7", "--stop-after", "3")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_two_halves_are_equal_with_documents_kept_apart_in_bf16(text, tmp_path):
    flags = ["--steps", "4", "--reset-documents", "--compute-dtype", "bfloat16"]
    run_main(text, tmp_path / "whole", *flags)
    run_main(text, tmp_path / "parts", *flags, "--stop-after", "2")
    run_main(text, tmp_path / "parts", *flags)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def start(text, out, *flags):
    command = [sys.executable, str(ROOT / "train_fp8.py"), "--data", str(text), "--out", str(out),
               *SMALL, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            cwd=ROOT)


def wait_for_step(process, step):
    for line in process.stdout:
        if line.startswith("step") and int(line.split()[1].split("/")[0]) >= step:
            return
    raise AssertionError(process.stderr.read())


def test_a_killed_run_goes_on_from_its_last_checkpoint(text, tmp_path):
    """SIGKILL three times at random moments, between and during checkpoints; the end equals an
    undisturbed run.
    """
    run_main(text, tmp_path / "whole", "--steps", "16", "--eval-every", "1")
    out = tmp_path / "killed"
    for step, delay in ((2, 0.0), (6, 0.013), (10, 0.031)):
        process = start(text, out, "--steps", "16", "--eval-every", "1")
        wait_for_step(process, step)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        torch.load(out / "train_state.pt", weights_only=True)        # complete, whenever it died
    run_main(text, out, "--steps", "16", "--eval-every", "1")
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_first(fails, text, tmp_path, number):
    """And while a run is at work nobody else starts in its folder, not even with --overwrite."""
    out = tmp_path / "stopped"
    process = start(text, out, "--steps", "4000", "--eval-every", "100000")
    wait_for_step(process, 3)
    for more in ([], ["--overwrite"]):
        argv = ["--data", str(text), "--out", str(out), *SMALL, "--steps", "4000", *more]
        assert f"another process is at work in {out}" in fails(train_fp8.main, argv)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    result = json.loads(printed.splitlines()[-1])
    assert process.returncode == 0 and "saved; the same command resumes" in printed
    state = torch.load(out / "train_state.pt", weights_only=True)
    assert state["step"] == result["step"] >= 3 and load_hf(out)
    run_main(text, out, "--steps", "4000", "--eval-every", "100000", "--stop-after", "1")
    assert torch.load(out / "train_state.pt", weights_only=True)["step"] == state["step"] + 1


def test_a_finished_run_says_so_and_changes_nothing(text, tmp_path, capsys):
    run_main(text, tmp_path / "out", "--steps", "3")
    before = weights(tmp_path / "out")
    run_main(text, tmp_path / "out", "--steps", "3")
    assert "finished already" in capsys.readouterr().out
    assert all(torch.equal(p, before[name]) for name, p in weights(tmp_path / "out").items())


def test_a_checkpoint_opens_in_transformers_and_its_tokenizer_in_tokenizers(text, tmp_path):
    """What training writes is what the ecosystem reads: the same logits, the same ids."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    run_main(text, tmp_path / "out", "--steps", "5")
    token_data = load_data(str(text), "bytes")
    sentence = "item 1 item 2 café 🙂"
    ids = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode(sentence).ids
    assert ids == token_data.encoding.encode_ordinary(sentence)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours, tokens = load_hf(tmp_path / "out"), torch.tensor([ids])
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, ours(tokens), rtol=1e-4, atol=1e-5)
    assert type(theirs).__name__ == "NemotronHForCausalLM"


# ------------------------------------------------------------------------------------------------
# What is refused, in one line, with nothing overwritten


@pytest.mark.parametrize("flags, words", [
    (["--recipe", "fp4"], "--recipe is 'fp4', must be one of none"),
    (["--steps", "0"], "--steps is 0, must be at least 1"),
    (["--fp8-backend", "hopper"], "has no FP8 matmul"),
    (["--pattern", "M-"], "nothing to convert"), (["--pattern", "ME"], "experts are not supported"),
    (["--batch-size", "5", "--grad-accum", "2"], "must be a multiple of --grad-accum"),
    (["--warmup", "0.9", "--decay", "0.3"], "at most 1"),
    (["--seq-len", "100000"], "do not fill two windows"),
    (["--device", "tpu"], "--device tpu: must be auto, cuda"),
    (["--seed", str(2 ** 63)], "--seed is"),
    (["--data", "/nowhere"], "--data /nowhere does not exist")])
def test_bad_flags_are_one_line(fails, text, tmp_path, flags, words):
    argv = ["--data", str(text), "--out", str(tmp_path / "out"), *SMALL, *flags]
    assert words in fails(train_fp8.main, argv)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_step_that_memory_cannot_hold_is_refused(fails, text, tmp_path, monkeypatch):
    """At the length of the longest phase; one byte decides, and processes share what there is."""
    config = HybridConfig(pattern="M*-M-", vocab_size=272)
    longest = Run(seq_len=64, batch_size=2)
    needed = sum(train_fp8.check_memory(longest, config, torch.float32, "cpu").values())
    argv = ["--data", str(text), "--out", str(tmp_path / "out"), *SMALL, "--phases", "0.5",
            "0.5::64", "--steps", "2"]
    monkeypatch.setattr(train_fp8, "free_bytes", lambda device: needed - 1)
    words = fails(train_fp8.main, argv)
    assert "2 x 64 tokens take" in words and "are needed on cpu" in words
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(train_fp8, "free_bytes", lambda device: needed)
    train_fp8.main(argv)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="are needed on cpu"):
        train_fp8.check_memory(longest, config, torch.float32, "cpu")


def test_a_folder_of_another_run_is_refused_and_kept(fails, text, tmp_path):
    out = tmp_path / "out"
    run_main(text, out, "--steps", "2")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    argv = ["--data", str(text), "--out", str(out), *SMALL, "--steps", "3"]
    assert "holds another run (steps 2, now 3)" in fails(train_fp8.main, argv)
    argv[1], argv[-1] = "mistyped", "2"
    assert "--data mistyped does not exist" in fails(train_fp8.main, argv)
    other = tmp_path / "other.txt"
    other.write_text("another text " * 3000)
    argv[1] = str(other)
    assert "the corpus or its tokenizer has changed" in fails(train_fp8.main, argv)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run_main(text, out, "--steps", "3", "--overwrite")
    assert torch.load(out / "train_state.pt", weights_only=True)["step"] == 3


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_goes_on_wherever_its_text_has_moved(text, tmp_path, capsys, finished):
    """A run knows its text by the fingerprint, not by the spelling of --data."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    run_main(f"{text}/", out, "--steps", "2", *([] if finished else ["--stop-after", "1"]))
    shutil.copytree(text, moved)
    run_main(moved, out, "--steps", "2")
    assert ("finished already" in capsys.readouterr().out) == finished
    assert len(metrics(out)) == 2


def test_a_folder_that_filled_meanwhile_is_refused_and_kept(fails, text, tmp_path, monkeypatch):
    """Another run may come and end between the first look and the first write."""
    out, begin = tmp_path / "out", RunFolder.begin

    def late(folder, model, optimizer):
        out.mkdir()
        (out / "model.safetensors").write_text("precious")
        return begin(folder, model, optimizer)
    monkeypatch.setattr(RunFolder, "begin", late)
    argv = ["--data", str(text), "--out", str(out), *SMALL, "--steps", "1"]
    assert "holds a model.safetensors that this run did not make" in fails(train_fp8.main, argv)
    assert (out / "model.safetensors").read_text() == "precious"


def test_the_model_must_fit_the_host_on_its_way_to_a_gpu(monkeypatch):
    """Once for each process there."""
    config, sizes = HybridConfig(pattern="M*-M-", vocab_size=272), Run(seq_len=64, batch_size=2)
    whole = 4 * config.n_params()
    free = {"cuda": 10 ** 12, "cpu": 8 * whole}
    monkeypatch.setattr(train_fp8, "free_bytes", free.get)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    train_fp8.check_memory(sizes, config, torch.bfloat16, "cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    with pytest.raises(ValueError, match="are needed on cpu"):
        train_fp8.check_memory(sizes, config, torch.bfloat16, "cuda")


def test_a_folder_that_training_did_not_make_is_refused(fails, text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    argv = ["--data", str(text), "--out", str(out), *SMALL, "--steps", "3"]
    assert "holds a config.json that this run did not make" in fails(train_fp8.main, argv)
    assert {path.name for path in out.iterdir()} == {"config.json", ".lock"}


def test_a_changed_corpus_and_a_broken_state_are_named(fails, text, tmp_path):
    out, argv = tmp_path / "out", ["--data", str(text), "--out", str(tmp_path / "out"), *SMALL,
                                   "--steps", "4"]
    run_main(text, out, "--steps", "4", "--stop-after", "2")
    (text / "0.txt").write_text("changed")
    assert "the corpus or its tokenizer has changed" in fails(train_fp8.main, argv)
    os.truncate(out / "train_state.pt", 1000)
    assert "train_state.pt cannot be read" in fails(train_fp8.main, argv)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_checkpoint(fails, text, tmp_path):
    out = tmp_path / "out"
    argv = ["--data", str(text), "--out", str(out), *SMALL, "--steps", "60", "--eval-every", "1"]
    assert "lower --lr" in fails(train_fp8.main, [*argv, "--lr", "1e30"])
    state = torch.load(out / "train_state.pt", weights_only=True)
    assert all(p.isfinite().all() for p in state.get("model", {}).values())
    assert all(math.isfinite(row[name]) for row in metrics(out) for name in ("loss", "grad_norm"))


def test_overwriting_destroys_nothing_before_the_new_run_is_sound(fails, text, tmp_path):
    out = tmp_path / "out"
    run_main(text, out, "--steps", "4", "--stop-after", "2")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    argv = ["--data", "/nowhere", "--out", str(out), *SMALL, "--steps", "4", "--overwrite"]
    assert "does not exist" in fails(train_fp8.main, argv)
    argv[1:2] = [str(text), "--seq-len", "99999"]
    assert "--seq-len" in fails(train_fp8.main, argv[:2] + argv[4:] + argv[2:4])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_stop_before_the_first_step_can_be_continued(text, tmp_path, monkeypatch):
    """Only the checkpoint of step 0 is there: the seed makes the same start again."""
    def dies(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(train_fp8, "train_step", dies)
    with pytest.raises(SystemExit):
        run_main(text, tmp_path / "out", "--steps", "3")
    monkeypatch.undo()
    run_main(text, tmp_path / "out", "--steps", "3")
    run_main(text, tmp_path / "whole", "--steps", "3")
    assert_same_run(tmp_path / "whole", tmp_path / "out")


# ------------------------------------------------------------------------------------------------
# Two processes

RUNS = {        # each once by two processes, in one torchrun, and again by one
    "fp32": ["--recipe", "none"],
    "nano2": ["--recipe", "nano2"],
    "nemotron-h": ["--recipe", "nemotron-h"],
    "stopped": ["--recipe", "nano2", "--recompute", "--stop-after", "2"],
}
SHARED = [*SMALL, "--seq-len", "64", "--steps", "4", "--lr", "1e-5", "--eval-every", "2"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The text, and the folder of every run by two processes."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(" ".join(f"item {j}" for j in range(i, i + 60)),
                                         encoding="utf-8")
    runs = [["--data", str(folder / "text"), "--out", str(folder / "runs" / name), *SHARED, *flags]
            for name, flags in RUNS.items()]
    script = folder / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_fp8\n"
                      "train_fp8.generate = lambda *_, **__: []\n"
                      f"for flags in {runs!r}:\n    train_fp8.main(flags)\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                           "--master-port", "29611", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def by_one(pairs, name, out):
    train_fp8.main(["--data", str(pairs / "text"), "--out", str(out), *SHARED, *RUNS[name]])
    return out, pairs / "runs" / name


def largest_difference(one, other, steps=4):
    """Of the losses of the first steps, relative."""
    a, b = metrics(one), metrics(other)
    assert len(a) == len(b) == 4
    return max(abs(x["loss"] / y["loss"] - 1) for x, y in zip(a[:steps], b[:steps]))


@pytest.mark.parametrize("name, tolerance, steps", [("fp32", 1e-6, 4), ("nano2", 1e-5, 2)])
def test_two_processes_train_what_one_trains(pairs, tmp_path, name, tolerance, steps):
    """Sums in another order differ by fp32's rounding. In FP8 a value at the border of two codes
    then takes the other one, 6% away, so two runs part after a few updates; the loss before and
    after the first update has all of forward, backward, reduction and optimizer in it. Half the
    batch, unreduced sums or rows given twice would differ by percents.
    """
    one, two = by_one(pairs, name, tmp_path / "one")
    assert largest_difference(one, two, steps) < tolerance
    norms = [metrics(out)[0]["grad_norm"] for out in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    validation = [row["val_loss"] for out in (one, two) for row in metrics(out)
                  if "val_loss" in row]
    assert len(validation) == 2 and validation[0] == pytest.approx(validation[1], rel=1e-5)


def test_scales_of_each_process_alone_differ_from_the_whole_batch(pairs, tmp_path):
    """With one scale per tensor, half a batch has another largest value, as in Transformer
    Engine.
    """
    one, two = by_one(pairs, "nemotron-h", tmp_path / "one")
    assert 1e-4 < largest_difference(one, two, steps=1) < 1e-2


def test_a_checkpoint_of_two_processes_is_read_by_one_exactly(pairs, tmp_path):
    """Weights are bit for bit those that two processes gathered and saved, and so are moments."""
    out = tmp_path / "copy"
    shutil.copytree(pairs / "runs" / "stopped", out)
    state = torch.load(out / "train_state.pt", weights_only=True)
    assert state["step"] == 2 and "model" not in state and (out / state["parts"]).is_dir()
    saved = weights(out)
    model = HybridLM(load_hf(out).config)
    optimizer = make_optimizer(model, 1e-3, 0.1)
    with RunFolder(out, state["settings"]) as folder:
        folder.load(model, optimizer)
    for name, p in model.named_parameters():
        assert torch.equal(p, saved[name]), name
    moments = optimizer.state_dict()["state"]
    assert len(moments) == len(saved) and all(m["step"] == 2 for m in moments.values())
    assert all(m["exp_avg"].abs().max() > 0 for m in moments.values())

    train_fp8.main(["--data", str(pairs / "text"), "--out", str(out), *SHARED, "--recipe", "nano2",
                    "--recompute"])
    assert largest_difference(out, by_one(pairs, "nano2", tmp_path / "one")[0]) < 1e-3
    assert not list(out.glob("train_state-*")), "parts of an older checkpoint are left"


def test_missing_parts_are_one_line_and_an_overwritten_run_leaves_none(pairs, tmp_path, fails):
    out = tmp_path / "copy"
    shutil.copytree(pairs / "runs" / "stopped", out)
    flags = ["--data", str(pairs / "text"), "--out", str(out), *SHARED, *RUNS["stopped"]]
    part = out / "train_state-2" / "__0_0.distcp"
    whole = part.read_bytes()
    part.write_bytes(whole[:1000])
    assert "cannot be read" in fails(train_fp8.main, flags)
    (out / "train_state-best").mkdir()          # somebody's own
    (out / "train_state-2" / ".metadata").unlink()
    assert "cannot be read" in fails(train_fp8.main, flags)
    train_fp8.main([*flags, "--overwrite"])
    assert [p.name for p in out.glob("train_state-*")] == ["train_state-best"]


def test_recomputing_activations_changes_nothing_but_memory(text, tmp_path):
    """The same operations run again: bit for bit, FP8 codes included."""
    for name, flags in (("one", []), ("two", ["--recompute"])):
        run_main(text, tmp_path / name, "--steps", "3", *flags)
    first, second = (metrics(tmp_path / name) for name in ("one", "two"))
    assert [row["loss"] for row in first] == [row["loss"] for row in second]
    assert [row["grad_norm"] for row in first] == [row["grad_norm"] for row in second]


def test_rows_that_processes_cannot_share_are_refused(fails, text, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    words = fails(train_fp8.main, ["--batch-size", "8"])
    assert "must be a multiple of --grad-accum 1 x 3 processes" in words


# ------------------------------------------------------------------------------------------------
# Phases, memory, comparison


def test_phases_change_text_length_and_rate_at_their_steps(text, tmp_path, monkeypatch):
    """Tokens a step stay; a constant rate replaces the schedule; stopping anywhere, the border
    included, changes nothing.
    """
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("zebra " * 4000, encoding="utf-8")
    flags = ["--phases", "0.5", f"0.25:{other}:64", "0.25::16:1e-4", "--steps", "8"]
    shapes, step = [], train_fp8.train_step

    def watched(model, optimizer, batches, run, lr, device, loss_fn):
        shapes.append((run.batch_size, run.seq_len, pathlib.Path(run.data).name, lr))
        return step(model, optimizer, batches, run, lr, device, loss_fn)
    monkeypatch.setattr(train_fp8, "train_step", watched)
    run_main(text, tmp_path / "whole", *flags)
    assert [s[:3] for s in shapes] == 4 * [(4, 32, "text")] + 2 * [(2, 64, "other")] + 2 * [
        (8, 16, "text")]
    assert [s[3] for s in shapes[-2:]] == [1e-4, 1e-4]
    assert shapes[5][3] == wsd(5, 8, Run.lr)
    for n in ("4", "1", "3"):
        run_main(text, tmp_path / "parts", *flags, "--stop-after", n)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_phase_of_another_rate_reads_on_in_the_same_text(text, tmp_path, monkeypatch):
    """Only data and seq_len begin a text anew: a change of rate must not repeat what was read."""
    flags = ["--phases", "0.5", "0.5:::1e-4"]
    seen, step = [], train_fp8.train_step

    def watched(model, optimizer, batches, run, lr, device, loss_fn):
        seen.append(batches.position)
        return step(model, optimizer, batches, run, lr, device, loss_fn)
    monkeypatch.setattr(train_fp8, "train_step", watched)
    run_main(text, tmp_path / "whole", *flags, "--steps", "4")
    assert len(set(seen)) == 4 and sorted(seen) == seen
    for _ in range(2):
        run_main(text, tmp_path / "parts", *flags, "--steps", "4", "--stop-after", "2")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_shards_of_another_tokenizer_are_no_phase(text, tmp_path, fails):
    """Their ids would mean other text: silently wrong, since they are valid ids."""
    write_shards(load_data(str(text), "bpe", 300), tmp_path / "shards")
    flags = ["--phases", "0.5", f"0.5:{tmp_path / 'shards'}"]
    argv = ["--data", str(text), "--out", str(tmp_path / "out"), *SMALL, *flags]
    assert "another tokenizer" in fails(train_fp8.main, argv)


def test_equal_phases_too_short_for_a_step_are_passed_over(text, tmp_path):
    flags = ["--phases", "0.4", "0.02:::1e-3", "0.02:::1e-3", "0.56"]
    run_main(text, tmp_path / "out", *flags, "--steps", "3")
    assert len(metrics(tmp_path / "out")) == 3


def test_phases_that_change_are_refused_and_lose_nothing(fails, text, tmp_path):
    flags = ["--data", str(text), "--out", str(tmp_path / "out"), *SMALL, "--steps", "4"]
    train_fp8.main([*flags, "--phases", "1", "--stop-after", "2"])
    before = (tmp_path / "out" / "train_state.pt").read_bytes()
    changed = ["--phases", "0.5", "0.5:::1e-4"]
    assert "holds another run (phases" in fails(train_fp8.main, [*flags, *changed])
    assert (tmp_path / "out" / "train_state.pt").read_bytes() == before


@pytest.mark.parametrize("wanted, words", [
    (["0.5"], "must sum to 1, not 0.5"), (["1::48"], "a divisor of the 128 tokens"),
    (["1::0"], "'1::0'"), (["1:::high"], "'1:::high'"), (["nan"], "'nan'"), (["half"], "'half'"),
    (["inf"], "'inf'"),
    (["0.5", "0.5:nowhere"], "--data nowhere does not exist")])
def test_bad_phases_are_one_line_and_write_nothing(fails, text, tmp_path, wanted, words):
    flags = ["--data", str(text), "--out", str(tmp_path / "out"), *SMALL, "--steps", "2"]
    assert words in fails(train_fp8.main, [*flags, "--phases", *wanted])
    assert not (tmp_path / "out").exists()


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_demonstrations_show_underflow_and_what_one_token_does(capsys):
    train_fp8.main(["--demo"])
    result = last_line(capsys)
    assert result["unscaled 1e-06"][:2] == [0, 0] and result["unscaled 1e-06"][2] > 31
    assert result["outlier nemotron-h"][1] < 20 and result["outlier nano2"][1] > 27
