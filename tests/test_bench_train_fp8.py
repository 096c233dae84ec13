"""The comparison of recipes pairs what it says, and predicted bytes are the measured ones."""

import json

import pytest
import torch
from bench import train_fp8 as bench
from conftest import assert_close

import train_fp8
from common import read_rows
from model import HybridConfig, HybridLM

SMALL = ["--device", "cpu", "--batch-size", "2", "--seq-len", "32"]


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_comparison_pairs_runs_and_goes_on_where_it_stopped(fails, text, tmp_path, capsys):
    flags = [*SMALL, "--seeds", "2", "--steps", "2", "--tokenizer", "bytes", "--data", str(text),
             "--out", str(tmp_path / "out")]
    bench.main(flags)
    first = last_line(capsys)
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000
    path = tmp_path / "out" / "trials.jsonl"
    rows = read_rows(path)[1:]
    results = {(row["name"], row["seed"]): row for row in rows}
    assert len(results) == len(rows) == 8 and set(first["gap"]) == set(bench.RUNS) - {"none"}
    for name, gap in first["gap"].items():
        each = [results[name, s]["val_loss"] / results["none", s]["val_loss"] - 1 for s in (0, 1)]
        assert gap["mean"] == pytest.approx(sum(each) / 2)
        assert gap["standard_error"] == pytest.approx(abs(each[0] - each[1]) / 2)
    assert 0 < abs(first["gap"]["none, lr x 1.001"]["mean"]) < 1e-3
    for s in (0, 1):                                    # the same weights and batch at the start
        losses = [results[name, s]["losses"][0] for name in bench.RUNS]
        assert losses[0] == losses[1] and max(losses) - min(losses) < 0.01 * losses[0]
        assert len(set(losses)) == 3
    assert results["none", 0]["losses"][0] != results["none", 1]["losses"][0]

    path.write_text("\n".join(path.read_text().splitlines()[:6])[:-40])     # a line cut short
    bench.main(flags)
    again = capsys.readouterr().out
    assert "4 are done" in again and json.loads(again.splitlines()[-1]) == first
    assert len(read_rows(path)) == 1 + 8
    assert "another lr" in fails(bench.main, [*flags, "--lr", "1e-2"])


def test_fixed_weights_are_one_loss_and_one_gradient_of_each():
    """By hand, with every linear converted; the model is left as it was."""
    model, tokens = HybridLM(HybridConfig.preset("toy")), torch.randint(4096, (2, 24))
    before = {name: m.clone() for name, m in model.state_dict().items()}
    loss_gap, whole, worst, name = bench.fixed_weights(model, "nano2", (tokens, tokens, None))
    assert all(p.grad is None for p in model.parameters())
    assert not any(isinstance(m, train_fp8.Float8Linear) for m in model.modules())
    assert all(torch.equal(m, before[key]) for key, m in model.state_dict().items())
    twin = HybridLM(model.config)
    twin.load_state_dict(before)
    train_fp8.convert_to_fp8(twin, "nano2", ends=0, verbose=False)
    losses = [m.loss(tokens, tokens) for m in (model, twin)]
    truth, value = (torch.autograd.grad(loss, [*m.parameters()])
                    for loss, m in zip(losses, (model, twin)))
    assert loss_gap == pytest.approx(float((losses[1] / losses[0]).detach()) - 1)
    flat = lambda grads: torch.cat([g.flatten() for g in grads])
    assert whole == pytest.approx(train_fp8.sqnr(flat(value), flat(truth)))
    each = {key: train_fp8.sqnr(v, t)
            for (key, _), v, t in zip(model.named_parameters(), value, truth)}
    assert worst == pytest.approx(min(each.values())) == pytest.approx(each[name])


def test_predicted_bytes_are_the_measured_ones(capsys):
    """Weights, gradients and moments exactly (Adam's step counters aside); activations are traced
    on the meta device, where attention counts as its kernel does, without (t, t) scores.
    """
    bench.main(["--memory", *SMALL])
    table, n = last_line(capsys)["memory"], HybridConfig.preset("toy").n_params()
    assert len(table) == 2 * len(train_fp8.RECIPES)
    for name, row in table.items():
        predicted, measured = row["predicted"], row["measured"]
        assert predicted["weights"] == measured["weights"] == measured["gradients"] == 4 * n
        assert predicted["gradients"] == 4 * n and predicted["optimizer"] == 8 * n
        assert measured["optimizer"] == pytest.approx(8 * n, rel=1e-4)
        assert measured["activations"] == pytest.approx(predicted["activations"], rel=0.03), name


def test_time_is_measured_of_each_recipe_in_linears_and_in_a_step(capsys):
    bench.main(["--time", "--device", "cpu", "--batch-size", "1", "--seq-len", "16"])
    result = last_line(capsys)
    assert set(result["step"]) == set(train_fp8.RECIPES)
    rows = [*result["seconds"]["in_proj"].values(), result["step"].values()]
    assert len(rows) == 4 and all(s > 0 for row in rows for s in row)


@pytest.mark.parametrize("recipe", ["none", "nano2"])
def test_a_linears_gradients_are_timed_one_by_one(recipe, monkeypatch):
    """Where one gradient is asked for, the other GEMM does not run: three forwards and two."""
    calls, gemms, settings = [], [], train_fp8.RECIPES[recipe]
    layer = train_fp8.Float8Linear(32, 16, settings) if settings else torch.nn.Linear(32, 16, False)
    x, g, gemm = torch.randn(4, 32), torch.randn(4, 16), train_fp8.gemm
    monkeypatch.setattr(bench, "median_seconds", lambda f, *_, **__: calls.append(f()) or 1.0)
    monkeypatch.setattr(train_fp8, "gemm", lambda *a, **k: gemms.append(0) or gemm(*a, **k))
    assert bench.time_linear(layer, x, g) == [1.0] * 3
    assert len(gemms) == (5 if settings else 0)
    y, (dx,), (dw,) = calls
    x.requires_grad_()
    truth = layer(x)
    assert_close([y, dx, dw], [truth, *torch.autograd.grad(truth, [x, layer.weight], g)],
                 ["y", "dx", "dw"], 1e-6)
