"""A thought that can be checked is rewarded for what it is: the task, its labels, the objective."""

import collections
import dataclasses
import itertools
import json
import math
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import assert_close

import align
import prune_distill
import train_fp8
from align import (Conversations, Problem, Rollouts, Run, accuracy, answer_ids, draw_problems,
                   group_advantages, grpo_loss, is_test, logps, look_for_hacks, make_problem, merge,
                   prompt_ids, verify)
from data import load_data
from infer import END_THINK, END_TURN, Chat, Settings, load_run
from model import HybridConfig, HybridLM, load_hf

PROBLEM = Problem("7*3-4+8", ("7*3=1", "1-4=7", "7+8=5"), "5")


@pytest.fixture(scope="module")
def base(text, tmp_path_factory):
    """A byte model that has seen a little text, with the markers of chats in its tokenizer."""
    out = tmp_path_factory.mktemp("base")
    train_fp8.main(["--data", str(text), "--out", str(out), "--tokenizer", "bytes", "--pattern",
                    "M*-", "--seq-len", "32", "--batch-size", "4", "--device", "cpu", "--recipe",
                    "none", "--compute-dtype", "float32", "--steps", "2", "--overwrite"])
    return out


def flags(text, base, out, *more):
    return ["--base", str(base), "--data", str(text), "--out", str(out), "--device", "cpu",
            "--compute-dtype", "float32", "--sft-steps", "4", "--rl-steps", "4", "--batch-size",
            "2", "--problems", "2", "--samples", "4", "--updates", "2", "--lengths", "1", "2",
            *more]


# ------------------------------------------------------------------------------------------------
# The task


def test_a_thought_works_out_its_problem_line_by_line():
    """Python's own arithmetic, modulo 10, from left to right."""
    rng = np.random.default_rng(0)
    for length in (1, 2, 5):
        problem = make_problem(rng, length)
        assert len(problem.lines) == length and len(problem.text) == 2 * length + 1
        value = int(problem.text[0])
        for i, line in enumerate(problem.lines):
            step, result = line.split("=")
            assert step == f"{value}{problem.text[2 * i + 1:2 * i + 3]}"
            value = int(result)
            assert value == eval(step) % 10
        assert problem.answer == str(value)


def test_no_test_problem_is_ever_drawn_for_training():
    draw = lambda test: {p.text for p in draw_problems(np.random.default_rng(0), 600, [1, 2, 3],
                                                       test)}
    training, tests = draw(False), draw(True)
    assert not training & tests and len(training) > 300 and len(tests) > 30
    many = [make_problem(np.random.default_rng(i), 3) for i in range(2000)]
    assert 0.07 < sum(map(is_test, many)) / 2000 < 0.13


def test_the_same_seed_draws_the_same_problems_of_each_length_in_turn():
    first, again = (draw_problems(np.random.default_rng(7), 6, [1, 4]) for _ in range(2))
    assert first == again and [len(p.lines) for p in first] == [1, 4] * 3


@pytest.mark.parametrize("said, right, formed", [
    ("7*3=1\n1-4=7\n7+8=5\n</think>5\n<SPECIAL_12>", True, True),
    ("</think>5\n<SPECIAL_12>", True, True), ("x</think>5<SPECIAL_12>", True, True),
    ("x</think>4\n<SPECIAL_12>", False, True), ("x</think>55\n<SPECIAL_12>", False, False),
    ("x</think>\n<SPECIAL_12>", False, False), ("x</think>5\n", False, False),
    ("5\n<SPECIAL_12>", False, False), ("x</think>5</think>5\n<SPECIAL_12>", False, False),
    ("", False, False)])
def test_the_verifier_wants_one_thought_one_digit_and_an_end(said, right, formed):
    assert verify(PROBLEM, said) == (right + 0.1 * formed, right, formed)


def test_right_answers_that_a_thought_did_not_earn_are_counted():
    texts = ["7*3=1\n1-4=7\n7+8=5\n</think>5\n<SPECIAL_12>", "</think>5\n<SPECIAL_12>",
             "7*3=2\n</think>5\n<SPECIAL_12>", "</think>1\n<SPECIAL_12>"]
    shares = look_for_hacks([PROBLEM] * 4, texts)
    assert shares == dict(no_thought=1 / 3, wrong_thought=1 / 3)


# ------------------------------------------------------------------------------------------------
# Supervised fine-tuning


def test_what_is_trained_is_what_a_chat_would_see(base):
    """The prompt is that of infer.py's chat, thinking or not; the answer ends with its turn."""
    model, encoding = load_run(base)
    for thinking in (True, False):
        settings = Settings(tokens=1, think_budget=-1 if thinking else 0)
        chat = Chat(model, encoding, 200, "", settings)
        seen, start = [], align.message_ids(encoding, align.SYSTEM, "")
        chat.run = lambda ids, stats, run=chat.run: seen.extend(ids) or run(ids, stats)
        list(chat.say(PROBLEM.text))
        assert seen[:len(start)] == start
        assert prompt_ids(encoding, PROBLEM, thinking) == seen
    texts = [encoding.decode(answer_ids(encoding, PROBLEM, kept)) for kept in (3, 1, 0, None)]
    assert texts == ["7*3=1\n1-4=7\n7+8=5\n</think>5\n<SPECIAL_12>",
                     "7*3=1\n</think>5\n<SPECIAL_12>", "</think>5\n<SPECIAL_12>",
                     "5\n<SPECIAL_12>"]


def test_labels_are_what_the_assistant_says_and_documents_are_kept_apart(base, text):
    _, encoding = load_run(base)
    words = load_data(text, tokenizer_json=(base / "tokenizer.json").read_text())
    run = Run(lengths=(1, 2), text_share=0.25, empty=0.3, cut=0.3, batch_size=4)
    batches = Conversations(encoding, run, words.train, align.SEQ_LEN)
    tokens, labels, seq_idx = batches.next()
    assert tokens.shape == labels.shape == seq_idx.shape == (4, align.SEQ_LEN)
    assert (labels[3] >= 0).all() and not seq_idx[3].any()                  # the row of text
    thoughts = set()
    for row in range(3):
        for doc in seq_idx[row].unique()[:-1].tolist():
            at = seq_idx[row] == doc
            ids, said = tokens[row][at].tolist(), labels[row][at]
            whole = encoding.decode(ids)
            begin = len(encoding.decode(ids[:int((said >= 0).nonzero()[0]) + 1]))
            assert whole[:begin].endswith(("<think>\n", "<think></think>"))
            spoken = encoding.decode(said[said >= 0].tolist())
            assert spoken == whole[begin:]
            problem = whole.split("User\n")[1].split("\n")[0]
            assert spoken.endswith(f"{END_TURN}") and len(problem) in (3, 5)
            kept = None if END_THINK not in spoken else spoken.count("=")
            thoughts.add((len(problem) // 2, kept))
    assert {(2, None), (2, 2), (2, 1)} <= thoughts          # empty, whole and cut short

    again = Conversations(encoding, run, words.train, align.SEQ_LEN)
    again.position = 4                                      # which is the whole state
    assert all(torch.equal(a, b) for a, b in zip(batches.next(), again.next()))


# ------------------------------------------------------------------------------------------------
# Group relative policy optimisation


def test_advantages_are_the_groups_standard_scores():
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1.1]])
    advantages = group_advantages(rewards)
    assert_close([advantages.mean(1) + 1], [torch.ones(3)], ["mean"], 1e-6)
    assert not advantages[1].any()              # where all are equal there is nothing to learn
    assert advantages[0, 0] == pytest.approx(0.5 / (math.sqrt(1 / 3) + 1e-4), rel=1e-6)


def test_the_objective_is_its_formula_with_its_gradient():
    """Token by token with plain numbers, clipped above for what was good and below for what was
    bad; beyond the clip there is no gradient.
    """
    logp = torch.tensor([-1.0, -1.0, -1.0, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0, -1.5, -1.5, -0.5, -1.9], dtype=torch.float64)
    advantage = torch.tensor([1.0, 2.0, -2.0, -2.0, 0.5], dtype=torch.float64)
    reference = torch.tensor([-1.1, -0.9, -1.0, -2.0, -2.0], dtype=torch.float64)
    clip, beta, total, slopes = 0.2, 0.3, 0.0, []
    for p, q, a, r in zip(logp.tolist(), old.tolist(), advantage.tolist(), reference.tolist()):
        rho = math.exp(p - q)
        clipped = min(max(rho, 1 - clip), 1 + clip)
        free = rho * a <= clipped * a
        d = r - p
        total += min(rho * a, clipped * a) - beta * (math.exp(d) - d - 1)
        slopes.append(-((rho * a if free else 0) - beta * (1 - math.exp(d))) / 5)
    loss = grpo_loss(logp, old, advantage, clip, reference, beta)
    [gradient] = torch.autograd.grad(loss, logp)
    assert_close([loss.detach(), gradient],
                 [torch.tensor(-total / 5, dtype=torch.float64),
                  torch.tensor(slopes, dtype=torch.float64)],
                 ["loss", "gradient"], 1e-12)
    without = grpo_loss(logp, old, advantage, clip)
    assert torch.autograd.grad(without, logp)[0][[1, 3]].tolist() == [0, 0]     # moved too far


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_and_gradients_are_those_of_trl(beta):
    """GRPOTrainer's own loss, the mean over the tokens of the batch ("bnpo" there), in fp64: groups
    of answers of several lengths, ratios on both sides of the clip, every gradient."""
    from trl import GRPOTrainer
    torch.manual_seed(0)
    config = HybridConfig(pattern="M*-", vocab_size=32, d_model=32, mlp_dim=32, n_heads=2,
                          n_kv_heads=1, head_dim=16, mamba_heads=4, mamba_head_dim=8, d_state=8)
    model, length, tokens = HybridLM(config).double(), 5, torch.randint(32, (8, 12))
    said = torch.arange(12) < torch.tensor([6, 8, 12, 12, 7, 9, 10, 11])[:, None]
    said[:, :length] = False
    labels = torch.where(said, tokens, -100)[:, 1:]
    advantages = group_advantages(torch.randn(2, 4).double()).flatten()
    old, reference = (logps(model, tokens[:, :-1], labels).detach() + 0.3 * torch.randn(said.sum())
                      for _ in range(2))
    spread = lambda values: values.new_zeros(said.shape).masked_scatter(said, values)[:, length:]
    each = advantages[:, None].expand(8, 11)[labels >= 0]
    ours = grpo_loss(logps(model, tokens[:, :-1], labels), old, each, 0.2, reference, beta)
    ours_by_name = torch.autograd.grad(ours, list(model.parameters()))

    def per_token_logps(model, ids, mask, kept, **_):
        all_logps = model(ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return all_logps[:, -kept:], torch.zeros(len(ids), kept), None
    trainer = types.SimpleNamespace(
        model=model, beta=beta, loss_type="bnpo", epsilon_low=0.2, epsilon_high=0.2,
        importance_sampling_level="token", top_entropy_quantile=1.0, aux_loss_enabled=False,
        off_policy_mask_threshold=None, use_vllm=False, _entropy_bonus_enabled=False,
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None),
        current_gradient_accumulation_steps=1, _metrics={"train": collections.defaultdict(list)},
        accelerator=types.SimpleNamespace(reduce=lambda m, reduction: m, gather=lambda m: m),
        _get_per_token_logps_and_entropies=per_token_logps)
    mask = said.long()
    theirs = GRPOTrainer._compute_loss(trainer, model, dict(
        prompt_ids=tokens[:, :length], prompt_mask=torch.ones(8, length, dtype=torch.int64),
        completion_ids=tokens[:, length:], completion_mask=mask[:, length:], advantages=advantages,
        old_per_token_logps=spread(old), ref_per_token_logps=spread(reference)))
    names = ["loss", *(name for name, _ in model.named_parameters())]
    assert_close([ours.detach(), *ours_by_name],
                 [theirs.detach(), *torch.autograd.grad(theirs, list(model.parameters()))], names,
                 1e-9)
    clipped = trainer._metrics["train"]
    assert clipped["clip_ratio/low_mean"][0] > 0.05 and clipped["clip_ratio/high_mean"][0] > 0.05


def test_logps_are_those_of_the_logits():
    torch.manual_seed(0)
    model = HybridLM(HybridConfig(pattern="M*-", vocab_size=40, d_model=32, mlp_dim=64, n_heads=2,
                                  n_kv_heads=1, head_dim=16, mamba_heads=4, mamba_head_dim=8,
                                  d_state=16))
    tokens, labels = torch.randint(0, 40, (2, 3, 7))
    labels[:, 4:] = -100
    truth = model(tokens).log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    assert_close([logps(model, tokens, labels)], [truth[labels >= 0]], ["logps"], 1e-6)


def reward_in_turn(monkeypatch, rewards):
    """Let the verifier hand out these rewards, whatever was said."""
    turn = itertools.cycle(rewards)
    monkeypatch.setattr(align, "verify", lambda problem, said: (next(turn), True, True))


def test_a_rollout_holds_what_was_said_and_how_likely_it_was(base, monkeypatch):
    """In the first update every ratio is 1; padding has no labels; both updates see other rows."""
    model, encoding = load_run(base)
    run = Run(lengths=(1, 2), problems=2, samples=4, updates=2, kl=0.1)
    reward_in_turn(monkeypatch, [0.0, 1.1])
    rollouts = Rollouts(model, model, encoding, run, {})
    seen = [rollouts.next(), rollouts.next()]
    assert rollouts.position == 8 and rollouts.notes["number"] == 0
    for tokens, labels, extra in seen:
        assert tokens.shape == labels.shape == extra.shape[:2] and len(tokens) == 4
        advantage, old, reference = extra[labels >= 0].unbind(-1)
        now = logps(model, tokens, labels)
        assert_close([old, reference], [now.detach()] * 2, ["old", "reference"], 1e-5)
        assert (labels >= 0).any(1).all()
        inner = (labels[:, :-1] >= 0) & (labels[:, 1:] >= 0)    # all but the last of each answer
        assert (labels[:, :-1] == tokens[:, 1:])[inner].all()
    first, second = ({tuple(row) for row in tokens.tolist()} for tokens, _, _ in seen)
    assert not first & second
    rollouts.next()
    assert rollouts.notes["number"] == 1 and len(rollouts.notes["right"]) == 2


def test_groups_that_agree_are_left_out(base, monkeypatch):
    """Their advantages are 0. If all agree, each update still has one row, which moves nothing."""
    model, encoding = load_run(base)
    run = Run(lengths=(1, 2), problems=3, samples=4, updates=2)
    reward_in_turn(monkeypatch, [1.1] * 4 + [0.0, 1.1, 0.1, 0.0] + [0.1] * 4)
    rollouts = Rollouts(model, None, encoding, run, {})
    seen = [rollouts.next(), rollouts.next()]
    assert [len(tokens) for tokens, _, _ in seen] == [2, 2] and rollouts.position == 12
    advantages = torch.cat([extra[:, 0, 0] for _, _, extra in seen])
    truth = group_advantages(torch.tensor([[0.0, 1.1, 0.1, 0.0]]))[0]
    assert_close([advantages.sort()[0]], [truth.sort()[0]], ["advantages"], 1e-6)

    reward_in_turn(monkeypatch, [1.1])
    seen = [rollouts.next(), rollouts.next()]
    assert [len(tokens) for tokens, _, _ in seen] == [1, 1]
    assert not any(extra[..., 0].abs().max() > 1e-2 for _, _, extra in seen)


def test_reward_moves_the_model_to_what_is_rewarded(base, monkeypatch):
    """Rewarded for answers that begin with one character, a model comes to begin with it."""
    model, encoding = load_run(base)
    model.requires_grad_(True)
    wanted = lambda problem, said: (float(said[:1] in "0123456789"),) * 3
    monkeypatch.setattr(align, "verify", wanted)
    run, notes = Run(lengths=(1,), problems=4, samples=8, updates=2), {}
    optimizer = train_fp8.make_optimizer(model, 3e-3)
    rollouts, loss_fn = Rollouts(model, None, encoding, run, notes), align.make_grpo_loss(run)
    for _ in range(24):
        train_fp8.train_step(model, optimizer, rollouts, train_fp8.Run(), 3e-3, "cpu", loss_fn)
    assert notes["right"][0] < 0.3 and notes["right"][-1] > 0.8


# ------------------------------------------------------------------------------------------------
# Accuracy, merging, the script


class Says:
    """Stands in for answer_all: says the thought whole, or what the budget leaves of it."""

    def __init__(self, monkeypatch):
        self.settings = []
        monkeypatch.setattr(align, "answer_all", self)

    def __call__(self, model, encoding, problems, settings, thinking=True):
        self.settings.append((settings, thinking))
        return [([], [], f"</think>{p.answer if i % 2 else 'x'}\n<SPECIAL_12>")
                for i, p in enumerate(problems)]


def test_a_budget_of_lines_is_closed_at_the_end_of_its_last_line(base, monkeypatch):
    _, encoding = load_run(base)
    says, line = Says(monkeypatch), align.tokens_per_line(encoding)
    for budget in (None, 0, 1, 3):
        assert accuracy(None, encoding, [PROBLEM] * 10, budget)[0] == 0.5
    budgets = [(s.think_budget, thinking) for s, thinking in says.settings]
    assert line == 6 and budgets == [(-1, True), (-1, False), (1, True), (13, True)]
    assert [s.temperature for s, _ in says.settings] == [0.6, 0, 0.6, 0.6]


def test_merging_is_the_weighted_mean_and_wants_equal_models():
    make = lambda d: HybridLM(HybridConfig(pattern="M-", vocab_size=16, d_model=d, mlp_dim=16,
                                           mamba_heads=4, mamba_head_dim=8, d_state=8))
    a, b = make(16), make(16)
    for p, q, r in zip(a.parameters(), b.parameters(), merge(a, b, 0.25).parameters()):
        assert torch.allclose(r, 0.75 * p + 0.25 * q, rtol=1e-6)
    assert all(torch.equal(p, r) for p, r in zip(a.parameters(), merge(a, b, 0).parameters()))
    with pytest.raises(ValueError, match="cannot be merged: .*d_model=16.* and .*d_model=24"):
        merge(a, make(24), 0.5)


@pytest.fixture(scope="module")
def aligned(text, base, tmp_path_factory):
    out = tmp_path_factory.mktemp("aligned") / "out"
    align.main(flags(text, base, out))
    return out


def final(out):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["final"]


def test_an_alignment_leaves_the_mean_of_both_stages_and_its_accuracies(aligned, text, base,
                                                                         capsys):
    result = final(aligned)
    assert set(result) >= {"accuracy_base", "accuracy_sft", "accuracy_rl", "accuracy_by_budget",
                           "out"}
    assert list(result["accuracy_by_budget"]) == ["0", "1", "2"]
    assert (aligned / "accuracy.png").stat().st_size > 10_000
    sft, state = load_hf(aligned / "sft"), torch.load(aligned / "train_state.pt")
    for name, p in load_hf(aligned).named_parameters():
        mean = sft.get_parameter(name).lerp(state["model"][name], 0.5)
        assert torch.allclose(p, mean, rtol=1e-5, atol=1e-7), name
    align.main(flags(text, base, aligned))
    assert capsys.readouterr().out.count("finished already") == 2
    align.main(["--eval", str(aligned), "--device", "cpu", "--lengths", "1", "2"])
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["accuracy_by_budget"] == result["accuracy_by_budget"]
    assert shown["accuracy_by_budget"]["2"] == result["accuracy_merged"]


@pytest.mark.parametrize("stop", [1, 3])
def test_stopping_changes_nothing(aligned, text, base, tmp_path, stop):
    """Within SFT and within GRPO, where a rollout may be half used."""
    for _ in range(2 * -(-4 // stop)):
        align.main(flags(text, base, tmp_path / "out", "--stop-after", str(stop)))
    for (name, p), q in zip(load_hf(aligned).named_parameters(),
                            load_hf(tmp_path / "out").parameters()):
        assert torch.equal(p, q), name
    assert final(tmp_path / "out")["rollouts"] == final(aligned)["rollouts"]


def test_an_aligned_teacher_is_distilled_on_its_task(aligned, base, text, tmp_path, capsys,
                                                     monkeypatch):
    """Half of the rows; the accuracies of teacher, pruned and distilled model are reported."""
    out = tmp_path / "out"
    argv = ["--data", str(text), "--out", str(out), "--device", "cpu", "--seq-len", "64",
            "--batch-size", "4", "--steps", "2", "--candidates", "2", "--samples", "8", "--context",
            "64", "--compute-dtype", "float32", "--no-scratch", "--keep", "0.9"]
    trials, real = [], prune_distill.train
    monkeypatch.setattr(prune_distill, "train", lambda *a, **k: trials.append(k) or real(*a, **k))
    prune_distill.main(["--teacher", str(aligned), *argv])
    assert len(trials) == 2 and all(k["batches"].seq_len == 64 for k in trials)
    assert "accuracy     teacher" in capsys.readouterr().out
    result = final(out)
    assert all(0 <= result[f"{name}_accuracy"] <= 1 for name in ("teacher", "pruned", "student"))
    run = prune_distill.Run(teacher=str(aligned), data=str(text), batch_size=4, seq_len=64, seed=3)
    task = prune_distill.load_task(run, prune_distill.load_text(run))
    assert (task.run.lengths, task.run.seed, task.text_rows, task.seq_len) == ((1, 2), 3, 2, 64)
    assert prune_distill.load_task(dataclasses.replace(run, teacher=str(base)), None) is None


def test_pruning_takes_the_aligned_model_if_there_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prune_distill.Run().teacher == "out/base"
    (tmp_path / "out" / "aligned").mkdir(parents=True)
    assert prune_distill.Run().teacher == "out/aligned"
    assert prune_distill.Run(teacher="mine").teacher == "mine"


@pytest.mark.parametrize("more, words", [
    (["--base", "nowhere"], "has no config.json"), (["--samples", "1"], "must be at least 2"),
    (["--lengths", "0"], "--lengths is 0, must be at least 1"),
    (["--empty", "0.7", "--cut", "0.6"], "--empty 0.7 + --cut 0.6 must be at most 1"),
    (["--updates", "3"], "must be a multiple of --updates 3"),
    (["--text-share", "-1"], "--text-share is -1"), (["--clip", "0"], "--clip is 0.0"),
    (["--kl", "-1"], "--kl is -1.0"), (["--data", "nowhere"], "does not exist")])
def test_bad_flags_are_one_line_and_write_nothing(fails, text, base, tmp_path, more, words):
    out = tmp_path / "out"
    assert words in fails(align.main, flags(text, base, out, *more))
    assert not out.exists()


def test_a_base_whose_tokenizer_has_no_markers_is_named(fails, text, base, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(base, other)
    spec = json.loads((other / "tokenizer.json").read_text())
    spec["added_tokens"] = spec["added_tokens"][:1]
    (other / "tokenizer.json").write_text(json.dumps(spec))
    assert "the markers of a chat: train the base anew" in fails(
        align.main, flags(text, other, tmp_path / "out"))


def test_out_is_not_the_base(fails, text, base):
    assert "would take the place" in fails(align.main, flags(text, base, base))
