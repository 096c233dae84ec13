"""What a GPU will be asked runs here dry: every section, on tiny sizes."""

import json
import math

import pytest

from bench import gpu


@pytest.mark.parametrize("section", [name for name in gpu.SECTIONS if name != "tests"])
def test_a_section_runs_dry_and_yields_finite_numbers(section, capsys):
    gpu.main(["--sections", section])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    rows = result["sections"][section]
    assert result["dry"] and len(rows) >= 2
    assert all(isinstance(number, (int, float)) and math.isfinite(number) for _, number, _ in rows)
    assert all(f"| {section:9s}| {what}" in out for what, _, _ in rows)


def test_a_section_that_fails_or_has_no_time_left_does_not_stop_the_others(capsys, monkeypatch):
    def breaks(machine):
        yield "first", 1.0, "us"
        raise RuntimeError("no such kernel\nand a long trace")
    monkeypatch.setitem(gpu.SECTIONS, "scan", breaks)
    monkeypatch.setitem(gpu.SECTIONS, "fp8", lambda machine: iter([("second", 2.0, "us")]))
    gpu.main(["--sections", "scan", "fp8"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["sections"]
    assert result["scan"] == [["first", 1.0, "us"], ["failed", "no such kernel", ""]]
    assert result["fp8"] == [["second", 2.0, "us"]]
    gpu.main(["--sections", "fp8", "--minutes", "1e-9"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["sections"]
    assert result["fp8"] == [["failed", "no time left: not measured", ""]]


def test_a_section_is_left_when_the_time_is_over(capsys, monkeypatch):
    now = [0.0]

    def slow(machine):
        yield "first", 1.0, "us"
        now[0] = 1000.0
        yield "second", 2.0, "us"
        yield "third", 3.0, "us"
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])
    monkeypatch.setitem(gpu.SECTIONS, "scan", slow)
    gpu.main(["--sections", "scan", "fp8"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["sections"]
    assert [row[0] for row in result["scan"]] == ["first", "second", "failed"]
    assert result["fp8"] == [["failed", "no time left: not measured", ""]]


def test_an_unknown_section_is_named(fails):
    assert "--sections has 'scans', must be of tests" in fails(gpu.main, ["--sections", "scans"])
