"""What all scripts share: flags from a dataclass, errors in one line, files and folders that are
never half written.
"""

import dataclasses
import io
import json
import multiprocessing
import re
import sys

import pytest
import torch

import align
import common
import data
import infer
import model
import prune_distill
import stability
import train_fp8
from common import RunFolder, check_flags, flag, parse_flags, read_rows, script, write_text

SCRIPTS = [data, model, train_fp8, align, prune_distill, stability, infer]


@dataclasses.dataclass
class Flags:
    """What it does."""

    steps: int = flag(7, "how many, in steps", at_least=1)
    wait: int = flag(0, "seconds before", session=True)
    speed: float | None = flag(None, "per second, 5% more", above=0, at_most=9)
    kind: str = flag("a", "which", choices=("a", "b"))
    loud: bool = flag(False, "say more")
    quiet_end: bool = flag(True, "end quietly")
    sizes: int = flag((1, 2), "several", nargs="+", at_least=1)

    def __post_init__(self):
        check_flags(self)


def test_flags_come_from_the_dataclass(capsys):
    assert parse_flags(Flags, []) == Flags()
    given = ["--steps", "3", "--speed", "0.5", "--loud", "--no-quiet-end", "--sizes", "4", "5"]
    assert parse_flags(Flags, given) == Flags(3, 0, 0.5, "a", True, False, [4, 5])
    with pytest.raises(SystemExit):
        parse_flags(Flags, ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "What it does." in printed and "--steps N how many, in steps (default: 7)" in printed
    assert "--wait N seconds before (default: 0)" in printed and "5% more --kind" in printed


@pytest.mark.parametrize("argv, words", [
    (["--steps", "0"], "--steps is 0, must be at least 1"),
    (["--speed", "0"], "--speed is 0.0, must be above 0 and at most 9"),
    (["--speed", "nan"], "--speed is nan"), (["--speed", "10"], "--speed is 10.0"),
    (["--kind", "c"], "--kind is 'c', must be one of a, b"),
    (["--sizes", "3", "0"], "--sizes is 0"), (["--step", "3"], "--step")])
def test_what_is_out_of_range_is_one_line(fails, argv, words):
    assert words in fails(script(Flags)(lambda run: None), argv)


@pytest.mark.parametrize("stage", SCRIPTS, ids=lambda stage: stage.__name__)
def test_every_flag_is_explained_and_there_are_few(stage, capsys):
    with pytest.raises(SystemExit):
        stage.main(["--help"])
    printed = capsys.readouterr().out
    flags = re.split(r"\n  (?=-)", printed)[2:]
    assert len(flags) == len(dataclasses.fields(stage.Run)) <= 24
    for text in flags:
        words = re.sub(r"--?[\w-]+,?|\[.*?\]|\b(N|X|TEXT)\b", "", text).split()
        assert len(words) >= 2, text


@pytest.mark.parametrize("error, code, words", [
    (ValueError("--x is 1,\nmust be 2"), 2, "error: --x is 1, must be 2\n"),
    (FileNotFoundError(2, "none there", "a.txt"), 2, "error: [Errno 2] none there: 'a.txt'\n"),
    (torch.OutOfMemoryError("tried 2 GiB"), 2, "error: tried 2 GiB\n"),
    (KeyboardInterrupt(), 130, "interrupted\n")])
def test_errors_of_a_script_are_one_line_and_a_code(capsys, error, code, words):
    @script(Flags)
    def main(run):
        raise error
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == code and capsys.readouterr() == ("", words)


def test_a_script_ends_with_its_result_in_json(capsys):
    script(Flags)(lambda run: dict(steps=run.steps))(["--steps", "4"])
    assert json.loads(capsys.readouterr().out) == dict(steps=4)


def test_a_console_that_lacks_a_character_does_not_end_a_script(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "cp1252"))
    script(Flags)(lambda run: print("слово") or dict(steps=1))([])
    sys.stdout.flush()
    assert raw.getvalue().splitlines() == [b"?????", b'{"steps": 1}']


def test_a_file_is_old_or_new_and_a_torn_log_ends_where_it_is_torn(tmp_path):
    def half(path):
        open(path, "w").write("half")
        raise RuntimeError("disk full")
    write_text(tmp_path / "a", "whole")
    with pytest.raises(OSError, match="could not be written: disk full"):
        common.replace_file(tmp_path / "a", half)
    assert (tmp_path / "a").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "rows").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_rows(tmp_path / "rows") == [dict(step=1), dict(step=2)]
    assert read_rows(tmp_path / "none") == []


def open_when_asked(path, asked, answers):
    while asked.get():
        try:
            with RunFolder(path, {}):
                answers.put("free")
        except FileExistsError as error:
            answers.put(str(error))


def test_a_folder_is_held_by_one_process_and_set_free(tmp_path):
    """Whoever comes meanwhile is refused, even to overwrite; a missing folder is not made."""
    context = multiprocessing.get_context("spawn")
    asked, answers = context.Queue(), context.Queue()
    other = context.Process(target=open_when_asked, args=(tmp_path, asked, answers))
    other.start()

    def ask():
        asked.put(True)
        return answers.get(timeout=60)
    with RunFolder(tmp_path, {}):
        assert "another process is at work" in ask()
    assert ask() == "free"
    asked.put(False)
    other.join()
    with RunFolder(tmp_path / "new", {}):
        assert not (tmp_path / "new").exists()
