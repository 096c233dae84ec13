"""Every command and every snippet of the README runs; long ones with smaller sizes through the same
flags.
"""

import importlib
import io
import re
import shlex
import subprocess
import sys

import pytest
from bench import infer as bench
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
SHORTER = {         # added to a command of this script, so that it takes seconds
    "train_fp8.py": ["--pattern", "M-*-", "--steps", "2", "--batch-size", "2", "--seq-len", "32",
                     "--tokenizer", "bytes", "--device", "cpu"],
    "align.py": ["--data", "my_texts", "--sft-steps", "2", "--rl-steps", "2", "--problems", "2",
                 "--samples", "2", "--batch-size", "2", "--lengths", "1", "--device", "cpu"],
    "prune_distill.py": ["--data", "my_texts", "--steps", "2", "--samples", "4", "--batch-size",
                         "2", "--seq-len", "32", "--device", "cpu"],
    "stability.py": ["--data", "my_texts", "--tokenizer", "bytes", "--steps", "3", "--seq-len",
                     "16", "--lr", "0.01", "--methods", "baseline", "qkv_norm", "--device", "cpu"],
    "infer.py": ["--tokens", "5", "--device", "cpu"],
}
CALLS_MAIN = '\n\nif __name__ == "__main__":\n    main()\n'
# install, this suite, tested elsewhere
NOT_RUN = ("pip install", "python -m pytest")


def commands():
    """Each command line of a shell block, comments stripped, split at &&."""
    for language, text in BLOCKS:
        if language in ("", "bash", "sh"):
            for line in text.splitlines():
                for command in line.split("#")[0].split("&&"):
                    if command.strip():
                        yield command.strip()


def test_the_test_command_is_there_once_for_the_ci():
    lines = [line for line in README.splitlines() if "python -m pytest" in line]
    assert lines[0] == "pip install -r requirements.txt && python -m pytest"


def test_every_command_runs(tmp_path, monkeypatch):
    """In order, in one folder, as a reader would; the text folder that the README speaks of is made
    first. A script's main gets the command line, so that torch is imported once.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())        # a chat ends
    (tmp_path / "my_texts").mkdir()
    for i in range(3):
        (tmp_path / "my_texts" / f"{i}.txt").write_text("words and more words\n" * 60)
    ran = 0
    for command in commands():
        if any(skip in command for skip in NOT_RUN):
            continue
        words = shlex.split(command)
        assert words[0] in ("python", "torchrun"), f"do not know how to run: {command}"
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script, flags = words[at], words[at + 1:]
        assert (ROOT / script).read_text(encoding="utf-8").endswith(CALLS_MAIN), command
        if script == "train_fp8.py" and "--data" not in flags:
            flags += ["--data", "my_texts"]
        shorter = SHORTER.get(script, [])
        if "out/shards" in flags and script == "train_fp8.py":      # have a tokenizer of their own
            shorter = [flag for flag in shorter if flag not in ("--tokenizer", "bytes")]
        argv = [*flags, *shorter]
        if words[0] == "torchrun":          # at full size a cluster's; here the toy, two processes
            argv = [flag if not flag.startswith("nemotron") else "toy" for flag in argv]
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
            result = subprocess.run([*launcher, ROOT / script, *argv], capture_output=True,
                                    text=True)
            assert result.returncode == 0, f"{command}\n{result.stderr}"
        else:
            print(f"$ {command}")           # the last one is shown if it fails
            importlib.import_module(script.removesuffix(".py")).main(argv)
        ran += 1
    assert ran >= 10
    bench.main(["--picture"])
    assert (tmp_path / "out" / "pipeline.png").exists()         # all three stages left their logs


@pytest.mark.parametrize("snippet", [text for language, text in BLOCKS if language == "python"])
def test_every_snippet_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README", "exec"), {})


def test_every_file_that_the_readme_names_exists():
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / name).exists(), name


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
