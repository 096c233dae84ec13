"""The tables of accuracies over seeds and shapes are what the runs report."""

import json
import pathlib
import types

import pytest
import torch

from bench import align as bench
from bench import model as bench_model
from data import load_data, make_tokenizer
from model import HybridConfig, HybridLM, save_hf


def test_the_three_shapes_have_equal_parameters_width_and_depth():
    sizes = {name: sum(p.numel() for p in HybridLM(config).parameters())
             for name, config in bench.shapes(272).items()}
    assert list(sizes) == ["hybrid", "transformer", "pure Mamba"]
    assert max(sizes.values()) < 1.002 * min(sizes.values())
    patterns = [config.pattern for config in bench.shapes(272).values()]
    assert "*" in patterns[0] and "M" not in patterns[1] and "*" not in patterns[2]


def test_a_shape_learns_the_task_alone_and_is_asked_every_length(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(bench, "TESTS", 2)
    found = bench.learn(bench.Run(steps=2, batch_size=2), "pure Mamba", 0,
                        make_tokenizer("bytes", [], 0))
    torch.set_num_threads(threads)
    assert (found["shape"], found["seed"]) == ("pure Mamba", 0) and found["loss"] > 0
    asked = [f"{n} steps, {lines} lines" for n in (2, 3, 4, 6) for lines in ("any", 0)]
    assert set(asked) | {f"4 steps, {i} lines" for i in range(5)} == set(found["accuracy"])


@pytest.fixture
def pretend_scripts(monkeypatch):
    """Stand in for align.py and prune_distill.py: accuracies that follow from the seed."""
    asked = []

    def pretend(result):
        def main(argv):
            asked.append(argv)
            out, seed = (argv[argv.index(name) + 1] for name in ("--out", "--seed"))
            out, seed = pathlib.Path(out), int(seed)
            out.mkdir(parents=True, exist_ok=True)
            (out / "metrics.jsonl").write_text(json.dumps(dict(step=1, final=result(seed))) + "\n")
        return main
    monkeypatch.setattr(bench.align, "main", pretend(lambda seed: dict(
        accuracy_base=0.0, accuracy_sft=0.8 + 0.01 * seed, accuracy_rl=0.9, accuracy_merged=0.9,
        accuracy_by_budget={"0": 0.1, "1": 0.5}, no_thought=0.0, wrong_thought=0.02)))
    monkeypatch.setattr(bench.prune_distill, "main", pretend(lambda seed: dict(
        teacher_accuracy=0.9, pruned_accuracy=0.2, student_accuracy=0.9 - 0.09 * seed,
        teacher_val_loss=4.0, pruned_val_loss=5.0, student_val_loss=4.1)))
    return asked


def test_stages_are_recounted_with_the_models_of_each(monkeypatch, tmp_path):
    """The model after RL is found again from the merged one and that before RL."""
    config = HybridConfig(pattern="M-", vocab_size=272, d_model=16, mlp_dim=16, mamba_heads=2,
                          mamba_head_dim=8, n_groups=1, d_state=8)
    sft, rl, seen = HybridLM(config), HybridLM(config), []
    for folder, model in ((tmp_path / "sft", sft), (tmp_path, bench.align.merge(sft, rl, 0.5))):
        save_hf(model, folder)
        (folder / "tokenizer.json").write_text(make_tokenizer("bytes", [], 0), encoding="utf-8")

    def accuracy(model, encoding, problems):
        seen.append([p.clone() for p in model.parameters()])
        return len(problems) / 1000, []
    monkeypatch.setattr(bench.align, "accuracy", accuracy)
    assert bench.recount(tmp_path) == dict(sft=1.0, rl=1.0, merged=1.0)
    for model, found in zip((sft, rl), seen):
        for mine, truth in zip(found, model.parameters()):
            torch.testing.assert_close(mine, truth)


def test_seeds_are_paired_and_kept(pretend_scripts, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "recount", lambda folder: dict(
        sft=0.8 + 0.01 * int(folder.name[-1]), rl=0.9, merged=0.9))
    table = bench.measure_seeds(bench.Run(seeds=2, out=str(tmp_path)))
    assert table["rl - sft"]["each"] == pytest.approx([0.1, 0.09])
    assert table["sft"]["mean"] == pytest.approx(0.805)
    assert table["sft"]["deviation"] == pytest.approx(0.01 / 2 ** 0.5)
    assert table["student / teacher"]["each"] == pytest.approx([1.0, 0.9])
    assert table["1 lines of thought"]["mean"] == 0.5 and table["pruned loss"]["each"] == [5.0, 5.0]
    teachers = [argv[1] for argv in pretend_scripts if argv[0] == "--teacher"]
    assert teachers == [str(tmp_path / "seed-0"), str(tmp_path / "seed-1")]


class NoProcesses:
    """Stands in for a pool of processes: what would be learned is named instead."""

    def __init__(self, processes, context):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, learn, run, name, *more):
        raise LookupError(f"{name} is to be learned with a learning rate of {run.lr}")


def test_a_shape_is_learned_once_per_setting(monkeypatch, tmp_path):
    monkeypatch.setattr(bench.concurrent.futures, "ProcessPoolExecutor", NoProcesses)
    monkeypatch.setenv("TQDM_DISABLE", "1")             # which the function sets
    monkeypatch.setattr(bench, "Measured", lambda *sizes: types.SimpleNamespace(decode=0.5))
    (tmp_path / "shapes").mkdir()
    for name in ("hybrid", "transformer", "pure-Mamba"):
        (tmp_path / "shapes" / f"{name}-0-300-16-0.003.json").write_text(json.dumps(
            dict(accuracy={"2 steps, any lines": 0.5}, loss=1.0)))
    table = bench.measure_shapes(bench.Run(seeds=1, out=str(tmp_path)))
    assert table["hybrid"]["loss"]["mean"] == 1.0
    assert table["pure Mamba"]["thought_tokens_per_s"][256] == 16.0
    for other in (dict(lr=1e-3), dict(batch_size=8), dict(steps=200)):
        with pytest.raises(LookupError, match="hybrid is to be learned"):
            bench.measure_shapes(bench.Run(seeds=1, out=str(tmp_path), **other))


def test_what_shapes_learn_from_a_text_is_kept(monkeypatch, text, tmp_path, capsys):
    monkeypatch.setattr(bench_model, "load_data", lambda: load_data(str(text), "bytes"))
    bench_model.main(["--learn", "--seeds", "2", "--steps", "1", "--recall-steps", "1", "--out",
                      str(tmp_path)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["table"] == json.loads((tmp_path / "model_shapes.json").read_text())
    assert result["tokens"] == 2048 and len(result["table"]) == 3
    for row in result["table"].values():
        loss = row["corpus loss"]
        assert len(set(loss["each"])) == 2 and loss["mean"] == pytest.approx(sum(loss["each"]) / 2)
        assert all(0 <= row[f"recall, {n} pairs"]["mean"] < 0.3 for n in bench_model.ASKED)


def test_recall_begins_with_large_embeddings(monkeypatch):
    """With those of the model, 0.1, a transformer does not learn it."""
    seen = []
    monkeypatch.setattr(bench_model.train_fp8, "train", lambda run, model, text, batches:
                        seen.append(model.backbone.embeddings.weight.std().item()))
    config = bench_model.shapes(2 * bench_model.KEYS, bench_model.SMALL)["transformer"]
    found = bench_model.learn_recall(config, seed=0, steps=1)
    assert 0.95 < seen[0] < 1.05 and list(found) == [4, 8, 16, 32] and max(found.values()) < 0.2


def test_recall_asks_every_key_once_and_its_value_is_what_was_told():
    tokens, labels, _ = bench_model.RecallBatches(5, 3, 0).next()
    again = bench_model.RecallBatches(5, 3, 0)
    assert tokens.shape == labels.shape == (3, 20) and torch.equal(again.next()[0], tokens)
    assert not torch.equal(again.next()[0], tokens)
    for row, said in zip(tokens.tolist(), labels.tolist()):
        told = dict(zip(row[:10:2], row[1:10:2]))
        assert len(told) == 5 and set(row[10::2]) == set(told) and max(told) < 32
        assert said[10::2] == [told[key] for key in row[10::2]]         # at the key: the next token
        assert said[:10] + said[11::2] == [-100] * 15
