"""The statistics over known trials, and a sweep in a pool of processes."""

import contextlib
import io
import json
import signal
import subprocess
import sys
import time

import pytest
from bench import stability as bench
from conftest import ROOT

import stability
from common import parse_flags


def trial(method, lr, seed, last, best=None, diverged=None):
    """As run_trial makes it, in what the tables read."""
    return dict(method=method, lr=lr, seed=seed, diverged=diverged, norms=[],
                evals=[[5, best or last], [10, last]], loss=None if diverged else last)


@pytest.fixture
def known(tmp_path):
    """Three seeds of three methods with known limits: qk_norm at 0.1, 0.2, 0.2; baseline at half of
    that, its lowest learning rate diverged in seed 1; qkv_norm never diverged in seed 2.
    """
    run = bench.Run(methods=["qkv_norm", "baseline", "qk_norm"], lr=[0.1, 0.2, 0.4], seeds=3,
                    resolution=2.0, out=str(tmp_path))
    return run, [trial(*args) for args in (
        ("qk_norm", 0.1, 0, 4.0), ("qk_norm", 0.2, 0, 4.9, None, 9),
        ("qk_norm", 0.1, 1, 4.1), ("qk_norm", 0.2, 1, 4.2), ("qk_norm", 0.4, 1, 9, 9, 9),
        ("qk_norm", 0.1, 2, 4.2), ("qk_norm", 0.2, 2, 4.4), ("qk_norm", 0.4, 2, 9, 9, 9),
        ("baseline", 0.1, 0, 4.4), ("baseline", 0.2, 0, 9, 9, 9), ("baseline", 0.1, 1, 9, 9, 9),
        ("baseline", 0.1, 2, 4.62, 4.2), ("baseline", 0.2, 2, 9, 9, 9),
        ("qkv_norm", 0.1, 0, 3.6), ("qkv_norm", 0.2, 0, 4.4), ("qkv_norm", 0.4, 0, 9, 9, 9),
        ("qkv_norm", 0.1, 1, 4.1), ("qkv_norm", 0.2, 1, 9, 9, 9),
        ("qkv_norm", 0.1, 2, 4.2), ("qkv_norm", 0.2, 2, 4.2), ("qkv_norm", 0.4, 2, 4.3))]


def test_the_summary_of_known_trials(known):
    """Learning rates by seed, ratios of seeds that have both, by each rule."""
    run, trials = known
    table = bench.summarise(run, trials, unigram=5.0)
    assert list(table) == ["baseline", "qk_norm", "qkv_norm"]               # the paper's order
    lrs, ratios = ({m: row[what]["as defined"] for m, row in table.items()}
                   for what in ("lrs", "ratios"))
    assert lrs == {"baseline": [0.1, None, 0.1], "qk_norm": [0.1, 0.2, 0.2],
                   "qkv_norm": [0.2, 0.1, 0.4]}
    assert ratios == {"baseline": [1.0, 0.5], "qk_norm": [1, 1, 1], "qkv_norm": [2.0, 0.5, 2.0]}
    assert [row["open"] for row in table.values()] == [False, False, True]
    assert table["baseline"]["losses"] == [4.4, None, 4.62]
    at_end = {m: row["lrs"]["at the end"] for m, row in table.items()}
    assert at_end["baseline"] == [0.1, None, None]          # 4.62 is 1.1 times 4.2
    assert at_end["qk_norm"] == [0.1, 0.2, 0.2]
    half = {m: row["lrs"]["half kept"][0] for m, row in table.items()}      # (5 + 3.6) / 2 = 4.3
    assert half["qkv_norm"] == pytest.approx(0.1 * 2 ** (0.7 / 0.8))
    assert half["qk_norm"] == pytest.approx(0.1 * 2 ** 0.3)                 # 5 at 0.2
    assert half["baseline"] is None                         # above it at the lowest already


def test_the_table_pairs_seeds_and_marks_lower_bounds(known, capsys):
    """Differences to baseline are of the same seed, not of the same place in a list."""
    run, trials = known
    bench.print_table(run, bench.summarise(run, trials, unigram=5.0))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[0] for row in rows] == ["baseline", "qk_norm", "qkv_norm*"]
    assert rows[0][1] == "-" and rows[0][-1] == "4.510"
    assert 4.0 / 4.4 == pytest.approx(4.2 / 4.62) and rows[1][-1] == "-9.09 +- 0.00%"
    assert rows[1][1] == "0.159 x/ 1.49" and rows[2][1] == "0.2 x/ 2.00" and rows[2][7] == "1.5"


def test_the_order_is_judged_by_resolution_and_spread():
    row = lambda lrs: dict(lrs={"as defined": lrs}, open=False)
    table = dict(baseline=row([0.1, 0.1]), qk_norm=row([0.4, 0.4]), soft_cap=row([0.11, 0.11]),
                 qkv_norm=row([0.2, 0.2]), qk_norm_cap=row([None, 0.2]))
    words = ["baseline < qk_norm holds; baseline < soft_cap cannot be told",
             "qk_norm < qkv_norm is reversed; soft_cap < qkv_norm holds"]
    assert bench.compare_order(table, 1.2) == words
    table["baseline"]["open"] = table["qk_norm"]["open"] = True
    assert bench.compare_order(table, 1.2)[0] == words[0].replace("holds", "cannot be told")
    table["baseline"] = row([0.02, 0.5])                    # a spread of a factor of 9.7
    assert "baseline < qk_norm cannot be told" in bench.compare_order(table, 1.2)[0]
    table["baseline"], table["qk_norm"] = row([0.1, 0.1]), row([0.1, 1.6])
    assert "baseline < qk_norm cannot be told" in bench.compare_order(table, 1.2)[0]


def test_a_diverging_trial_is_put_beside_the_right_ones():
    """The method's lowest of --lr that diverged, beside qk_norm at that learning rate, itself at
    its max stable one and at the lowest; not beside what diverged, and nothing twice.
    """
    run = bench.Run(methods=["baseline", "qkv_norm", "qk_norm"], lr=[0.01, 0.1, 0.2, 0.4])
    trials = [trial(method, lr, 0, 4.0, None, bad) | dict(norms=[dict(step=1)])
              for method, lr, bad in (
                  ("baseline", 0.01, None), ("baseline", 0.1, None), ("baseline", 0.14, 9),
                  ("baseline", 0.2, 9), ("baseline", 0.12, None), ("qkv_norm", 0.2, None),
                  ("qk_norm", 0.2, None))]
    pairs = bench.pick_pairs(run, trials)
    assert [(good["method"], good["lr"]) for _, good in pairs] == [
        ("qk_norm", 0.2), ("baseline", 0.12), ("baseline", 0.01)]
    assert all((bad["method"], bad["lr"]) == ("baseline", 0.2) for bad, _ in pairs)
    assert len(bench.pick_pairs(run, trials[:1] + trials[3:4])) == 1
    assert bench.pick_pairs(run, trials[:2]) == []


def test_norms_are_compared_at_the_last_common_step(capsys):
    row = lambda step, *outputs: dict(step=step, logit=float(step), **{
        k: dict(weight=1.0, output=o) for k, o in zip(("QKV", "FC2"), outputs)})
    bad, good = trial("baseline", 0.2, 0, 4.0, None, 20), trial("qk_norm", 0.2, 0, 4.0)
    bad["norms"] = [row(1, 1, 1), row(10, 3, 1), row(20, 8, 1.9)]
    good["norms"] = [row(1, 1, 1), row(10, 1, 1), row(20, 2, 1), row(30, 2, 1)]
    bench.print_norms(bad, good)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.endswith("baseline at 0.2 over qk_norm at 0.2, step 20; largest logits 20 20")
    assert [line.split() for line in lines] == [
        ["QKV", "weight", "1x", "output", "4x", "output", "over", "2x", "from", "step", "10"],
        ["FC2", "weight", "1x", "output", "1.9x", "output", "over", "2x", "never"]]


# ------------------------------------------------------------------------------------------------
# The script


def flags(text, out, *more):
    return ["--data", str(text), "--tokenizer", "bytes", "--device", "cpu", "--steps", "20",
            "--batch-size", "4", "--seq-len", "32", "--eval-every", "5", "--eval-tokens", "1024",
            "--warmup", "0", "--resolution", "9999", "--lr", "0.01", "30", "--methods", "baseline",
            "qk_norm", "--seeds", "2", "--workers", "2", "--out", str(out), *more]


@pytest.fixture(scope="module")
def swept(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        bench.main(flags(text, out))
    return out, printed.getvalue()


def test_a_sweep_over_seeds_reports_by_three_rules(swept):
    out, printed = swept
    result = json.loads(printed.splitlines()[-1])
    assert result["max_lr"] == pytest.approx({"baseline": 0.01, "qk_norm": 0.01})
    assert result["ratio_to_qk_norm"]["as defined"]["baseline"] == pytest.approx(1)
    assert set(result["ratio_to_qk_norm"]) == set(bench.RULES) and result["trials"] == 8
    assert "order        baseline < qk_norm cannot be told" in printed
    assert "seed 1, baseline at 30 over baseline at 0.01" in printed
    assert (out / "norms.png").stat().st_size > 10_000


def test_a_trial_is_the_same_alone_and_in_a_pool(swept, text):
    """What it computes depends on method, learning rate and seed, not on who computes it."""
    trials = [json.loads(line) for line in (swept[0] / "trials.jsonl").open()][1:]
    pooled = next(t for t in trials if (t["method"], t["lr"], t["seed"]) == ("qk_norm", 0.01, 1))
    run = parse_flags(bench.Run, flags(text, "out", "--seed", "1"))
    token_data = stability.load_data(run.data, run.tokenizer)
    alone = stability.run_trial(run, run.config(token_data.vocab_size), "qk_norm", 0.01,
                                token_data, "cpu")
    assert [loss for _, loss in alone["evals"]] == pytest.approx(
        [loss for _, loss in pooled["evals"]], rel=1e-3)


def test_a_sweep_goes_on_where_it_stopped(swept, text, tmp_path, capsys, fails):
    """Half of its trials and a torn line: only what is missing is run; more seeds may join."""
    whole = (swept[0] / "trials.jsonl").read_text().splitlines()
    (tmp_path / "trials.jsonl").write_text("\n".join(whole[:-1]) + "\n" + whole[-1][:40])
    bench.main(flags(text, tmp_path))
    again = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert again[:len(whole) - 1] == whole[:-1] and len(again) == len(whole)
    before = json.loads(swept[1].splitlines()[-1])
    after = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert after["max_lr"] == before["max_lr"] and after["trials"] == 8
    bench.main(flags(text, tmp_path, "--seeds", "1", "--seed", "1"))
    assert "another steps (20, now 13)" in fails(bench.main, flags(text, tmp_path, "--steps", "13"))


def test_ctrl_c_ends_the_trials_that_run(text, tmp_path):
    """Exit code 130 at once, though the trials would take an hour."""
    command = [sys.executable, "-m", "bench.stability", *flags(
        text, tmp_path / "out", "--steps", "99999", "--lr", "1e-5")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, preexec_fn=lambda: signal.signal(
                                   signal.SIGINT, signal.default_int_handler))
    while "are done" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    time.sleep(8)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert len((tmp_path / "out" / "trials.jsonl").read_text().splitlines()) == 1
