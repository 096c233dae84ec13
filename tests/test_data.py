"""Text goes in whole, comes out in a reproducible order, and every tokenizer is one file with one
set of ids.
"""

import dataclasses
import hashlib
import json
import lzma
import os
import re

import numpy as np
import pytest
import torch

import data
import infer
import model
import prune_distill
import stability
import train_fp8
from data import (PATTERN, Batches, TokenStream, bpe_json, encoding_from_json, halves, load_data,
                  make_tokenizer,
                  parse_flags, separator_id, split_documents, stdlib_documents, train_bpe,
                  validation_batches,
                  write_shards, xz_bits_per_byte)

SAMPLES = ["def f(x):\n    return x ** 2  # café\n", "", " ", "\n\n\n", "naïve 日本語 🙂👩‍👩‍👧 end",
           "\t\r\n mixed \x00\x7f",
           "a" * 300, "1234567 3.14e-10", "don't WON'T it's", "    " * 5 + "deep",
           "\u2028 odd \u00a0 spaces"]


@pytest.fixture(scope="module")
def corpus():
    return stdlib_documents()


@pytest.fixture(scope="module")
def tokenizer_json(corpus):
    return train_bpe([text for _, text in corpus[:80]], 1000)


# ------------------------------------------------------------------------------------------------
# Corpus


def test_default_corpus_is_the_standard_library_without_tests_and_tables(corpus):
    names = [name for name, _ in corpus]
    assert len(names) == len(set(names)) > 350 and 5e6 < sum(len(text) for _, text in corpus) < 2e7
    assert "json/decoder.py" in names and "pydoc_data/topics/for" in names
    assert not [name for name in names if "/test/" in name
                or name.startswith(("encodings/", "idlelib/", "lib2to3/"))]


def test_split_is_by_path_and_does_not_depend_on_order(corpus):
    train, validation = split_documents(corpus)
    assert split_documents(corpus[::-1]) == (train, validation)
    assert len(train) + len(validation) == len(corpus)
    assert 0.02 < len(validation) / len(corpus) < 0.1
    held_out = [text for name,
                text in sorted(corpus) if hashlib.sha256(name.encode()).digest()[0] % 20 == 0]
    assert validation == held_out


def test_few_documents_give_their_ends_to_validation():
    train, validation = split_documents([("a", "x" * 95 + "y" * 5), ("b", "z")])
    assert (train, validation) == (["x" * 95, ""], ["y" * 5, "z"])


def test_fingerprint_changes_with_any_byte(corpus):
    first = data.fingerprint("stdlib", corpus)
    name, text = corpus[3]
    assert data.fingerprint("stdlib", corpus[::-1]) == first
    for changed in ((name, text + " "), (name + "x", text)):
        assert data.fingerprint("stdlib",
                                [*corpus[:3], changed, *corpus[4:]])["sha256"] != first["sha256"]


def test_xz_figure_is_that_of_the_xz_format():
    texts = ["hello world " * 50, "something else\n" * 20]
    raw = "".join(texts).encode()
    size = len(lzma.compress(raw, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME))
    assert xz_bits_per_byte(texts) == 8 * size / len(raw)


def test_user_text_of_every_kind(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("alpha", encoding="utf-8")
    (tmp_path / "sub" / "b.md").write_text("# beta", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n',
                                      encoding="utf-8")
    (tmp_path / "ignored.bin").write_bytes(b"\xff\x00")
    assert [text for _, text in data.user_documents(tmp_path)] == ["alpha", "one", "two", "# beta"]
    assert [text for _, text in data.user_documents(tmp_path / "c.jsonl")] == ["one", "two"]


@pytest.mark.parametrize("name, content, words", [
    (None, None, "does not exist"), ("a.txt", b"", "has no text"), ("a.txt", b" \n", "has no text"),
    ("a.txt", b"\x89PNG\r\n\x1a\n\xff", "is not UTF-8 text"), ("a.txt", b"ab\x00cd", "is binary"),
    ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', "line 2 is not an object with a text key"),
    ("a.jsonl", b"[1]\n", "line 1 is not an object"),
    ("a.jsonl", b"nope\n", "line 1 is not an object"),
    ("a.jsonl", b'{"text": null}\n', "line 1 is not"),
    ("a.jsonl", b'{"text": [1]}\n', "line 1 is not")])
def test_text_that_cannot_be_read_is_named_in_one_line(tmp_path, fails, name, content, words):
    path = tmp_path / (name or "missing")
    if name:
        path.write_bytes(content)
    assert words in fails(data.main, ["--data", str(path)])


def test_jsonl_is_cut_at_line_feeds_alone_and_hidden_folders_are_not_read(tmp_path):
    text = "\ufeff" + json.dumps({"text": "one\u2028line\u0085"}, ensure_ascii=False) + "\r\n"
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "lib.py").write_text("not mine")
    assert [text for _, text in data.user_documents(tmp_path)] == ["one\u2028line\u0085"]


def test_statistics_of_a_few_words(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("hello world")
    data.main(["--data", str(tmp_path / "a.txt"), "--tokenizer", "bytes"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bytes"] == 11


def test_an_empty_folder_is_named(tmp_path, fails):
    assert "has no text" in fails(data.main, ["--data", str(tmp_path)])


# ------------------------------------------------------------------------------------------------
# Tokenizers


def test_tiktoken_gives_the_ids_of_tokenizers_and_decodes_back(tokenizer_json, corpus):
    """One tokenizer.json, two libraries: the same ids on real and on hostile text, and bytes come
    back.
    """
    from tokenizers import Tokenizer
    theirs, ours = Tokenizer.from_str(tokenizer_json), encoding_from_json(tokenizer_json)
    assert ours.n_vocab == theirs.get_vocab_size() == 1000
    for text in SAMPLES + [text[:5000] for _, text in corpus[80:160]]:
        ids = ours.encode_ordinary(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text


def test_bytes_tokenizer_is_one_id_a_byte():
    encoding = encoding_from_json(make_tokenizer("bytes", [], 0))
    for text in SAMPLES:
        assert encoding.encode_ordinary(text) == list(text.encode())
    assert separator_id(encoding) == 256 and encoding.n_vocab == 257


def test_ids_may_start_anywhere_as_nemotrons_do(tokenizer_json):
    """Special tokens first, bytes at 1000 and up: only the order of merges matters."""
    from tokenizers import Tokenizer
    spec = json.loads(tokenizer_json)
    special = {token["content"] for token in spec["added_tokens"]}
    spec["model"]["vocab"] = {k: v if k in special else v + 1000 for k,
                              v in spec["model"]["vocab"].items()}
    text = json.dumps(spec)
    theirs, ours = Tokenizer.from_str(text), encoding_from_json(text)
    for sample in SAMPLES:
        assert ours.encode_ordinary(sample) == theirs.encode(sample, add_special_tokens=False).ids
    assert min(ours.encode_ordinary("hello")) > 1000


def test_gpt2_style_tokenizer_without_split_loads(corpus):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"],
                                  show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    theirs.train_from_iterator([text for _, text in corpus[:30]], trainer)
    ours = encoding_from_json(theirs.to_str())
    for sample in SAMPLES:
        assert ours.encode_ordinary(sample) == theirs.encode(sample).ids


def test_a_tiktoken_encoding_becomes_a_tokenizer_json_with_its_ids(tokenizer_json):
    """What --tokenizer NAME does after the download, on an encoding that is here."""
    from tokenizers import Tokenizer
    first = encoding_from_json(tokenizer_json)
    ranks = {token: rank for token, rank in first._mergeable_ranks.items()}
    text = bpe_json(ranks, PATTERN, first._special_tokens)
    again, theirs = encoding_from_json(text), Tokenizer.from_str(text)
    for sample in SAMPLES:
        ids = first.encode_ordinary(sample)
        assert again.encode_ordinary(sample) == ids == theirs.encode(sample,
                                                                     add_special_tokens=False).ids
    assert halves(b"abc", 9, {b"a": 0, b"b": 1, b"c": 2, b"bc": 5}) == [b"a", b"bc"]
    with pytest.raises(ValueError, match="cannot be built"):
        halves(b"abc", 9, {b"a": 0, b"b": 1, b"c": 2})


def broken(tokenizer_json, change):
    spec = json.loads(tokenizer_json)
    change(spec)
    return json.dumps(spec)


@pytest.mark.parametrize("change, words", [
    (lambda s: s["model"].pop("merges"), "not a tokenizer.json with a BPE model"),
    (lambda s: s.update(normalizer={"type": "NFC"}), "not byte-level BPE without normalizer"),
    (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer: Whitespace"),
    (lambda s: s["model"]["vocab"].pop("A"), "lacks 1 of the 256 bytes"),
    (lambda s: s["model"]["vocab"].popitem(), "is not a tokenizer.json with a BPE model"),
    (lambda s: s["model"].update(vocab=[]), "is not a tokenizer.json with a BPE model"),
    (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "not byte-level"),
    (lambda s: s["model"]["merges"].reverse(), "do not rise in merge order")])
def test_tokenizers_of_another_kind_are_named(tokenizer_json, change, words):
    with pytest.raises(ValueError, match=words):
        encoding_from_json(broken(tokenizer_json, change))


@pytest.mark.parametrize("argv, words", [
    (["--tokenizer", "gtp2"], "is not bpe, bytes, a .json file"),
    (["--tokenizer", "no.json"], "does not exist"),
    (["--vocab-size", "100"], "at least 300"), (["--vocab-size", "many"], "invalid int value")])
def test_tokenizer_flags_that_cannot_be_are_named(fails, tmp_path, argv, words):
    (tmp_path / "a.txt").write_text("some text")
    assert words in fails(data.main, ["--data", str(tmp_path / "a.txt"), *argv])


# ------------------------------------------------------------------------------------------------
# Streams and batches


def stream(n=1000, pieces=(1000,)):
    tokens, arrays = np.arange(n, dtype=np.uint16), []
    for size in pieces:
        arrays, tokens = arrays + [tokens[:size]], tokens[size:]
    return TokenStream(arrays)


def test_reading_crosses_shard_borders():
    whole, cut = stream(), stream(pieces=(3, 400, 1, 596))
    for start, stop in [(0, 1000), (2, 5), (402, 405), (403, 404), (999, 1000), (0, 3)]:
        assert (cut.read(start, stop) == np.arange(start, stop)).all()
    assert len(cut) == len(whole) == 1000


def test_an_epoch_visits_every_window_once_and_the_next_one_in_another_order():
    batches = Batches(stream(), 1, 10, seed=3)
    n = batches.windows
    for epoch in (0, 1):
        starts = [batches.start_of(epoch * n + i) for i in range(n)]
        assert len({start // 10 for start in starts}) == n and len({start % 10
                                                                    for start in starts}) == 1
        assert max(starts) + 10 < 1000
    assert len({batches.start_of(epoch * n) % 10 for epoch in range(20)}) > 3      # borders move
    assert [batches.start_of(i) for i in range(n)] != [batches.start_of(n + i) for i in range(n)]
    assert [batches.start_of(i) for i in range(n)] != [Batches(stream(), 1, 10, seed=4).start_of(i)
                                                       for i in range(n)]


def test_labels_are_the_next_tokens_and_position_is_the_whole_state():
    first = Batches(stream(), 3, 10)
    tokens, labels, seq_idx = first.next()
    assert tokens.shape == (3, 10) and (labels == tokens + 1).all() and seq_idx is None
    expected = [first.next()[0] for _ in range(50)]       # several epochs
    again = Batches(stream(), 3, 10, position=3)
    assert all(torch.equal(again.next()[0], e) for e in expected)


def test_documents_rise_at_each_separator():
    tokens = TokenStream([np.array([0, 5, 5, 0, 6, 0, 7, 7, 7, 0, 8, 8, 8], dtype=np.uint16)])
    got, _, seq_idx = Batches(tokens, 1, 3, separator=0).next()
    assert torch.equal(seq_idx, (got == 0).cumsum(1))


def test_validation_predicts_every_token_once():
    seen = []
    for tokens, labels, _ in validation_batches(stream(103, (103,)), 4, 10):
        kept = labels >= 0
        assert (labels[kept] == tokens[kept] + 1).all()
        seen += labels[kept].tolist()
    assert seen == list(range(1, 103))
    limited = [labels[labels >= 0] for _, labels,
               _ in validation_batches(stream(103, (103,)), 4, 10, limit=25)]
    assert torch.cat(limited).tolist() == list(range(1, 26))
    spread = [labels for _, labels, _ in validation_batches(stream(103, (103,)), 2, 10, limit=39,
                                                            spread=True)]
    assert torch.cat(spread)[:, 0].tolist() == [1, 31, 71]      # of the windows 0 to 10: 0, 3, 7
    assert len(list(validation_batches(stream(103, (103,)), 1, 10, limit=999, spread=True))) == 11


def test_text_too_short_for_two_windows_is_named():
    with pytest.raises(ValueError,
                       match="100 tokens of training text do not fill two windows of 64"):
        Batches(stream(100, (100,)), 1, 64)


def test_shards_hold_the_same_tokens(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 400, encoding="utf-8")
    token_data = load_data(str(tmp_path / "text.txt"), "bytes")
    write_shards(token_data, tmp_path / "shards", shard_tokens=3000)
    again = load_data(str(tmp_path / "shards"))
    assert len(again.train.arrays) == 3 and isinstance(again.train.arrays[0], np.memmap)
    for split in ("train", "validation"):
        one, other = getattr(token_data, split), getattr(again, split)
        assert (one.read(0, len(one)) == other.read(0, len(other))).all()
    for name in ("validation_bytes", "separator", "fingerprint", "vocab_size"):
        assert getattr(token_data, name) == getattr(again, name)
    with pytest.raises(FileExistsError, match="holds shards already"):
        write_shards(token_data, tmp_path / "shards")
    meta = tmp_path / "shards" / "shards.json"
    whole = meta.read_text()
    for damaged in ("{}", "[]", "nope", whole.replace("train-00001.bin", "other.bin", 1)):
        meta.write_text(damaged)
        with pytest.raises(ValueError, match="is not what --write-shards writes"):
            load_data(str(tmp_path / "shards"))
    meta.write_text(whole)
    with open(tmp_path / "shards" / "train-00001.bin", "r+b") as file:
        file.truncate(3000)                                             # still whole tokens
    with pytest.raises(ValueError, match="missing or cut short"):
        load_data(str(tmp_path / "shards"))


# ------------------------------------------------------------------------------------------------
# Flags and the script


@dataclasses.dataclass
class Flags:
    """What it does."""

    steps: int = 7                  # how many, in steps
    wait: int = 0                   # seconds before
    rate: float | None = None       # per second
    loud: bool = False              # say more
    quiet_end: bool = True          # end quietly


def test_flags_come_from_the_dataclass(capsys):
    assert parse_flags(Flags, []) == Flags()
    assert parse_flags(Flags, ["--steps", "3", "--rate", "0.5", "--loud", "--no-quiet-end"]) == \
        Flags(3, 0, 0.5, True, False)
    with pytest.raises(SystemExit):
        parse_flags(Flags, ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "What it does." in printed and "--steps N how many, in steps (default: 7)" in printed
    assert "--wait N seconds before (default: 0)" in printed
    assert "--rate X per second --loud say more --no-quiet-end" in printed.replace(
        "--quiet-end, ", "")                        # nothing to say of a default that is none


@pytest.mark.parametrize("script", [data, model, train_fp8, prune_distill, stability, infer])
def test_every_flag_is_explained(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    printed = capsys.readouterr().out
    flags = re.split(r"\n  (?=-)", printed)[2:]
    assert len(flags) >= 5
    for flag in flags:
        words = re.sub(r"--?[\w-]+,?|\[.*?\]|\b(N|X|TEXT)\b", "", flag).split()
        assert len(words) >= 2, flag


@pytest.mark.parametrize("error, code, words", [
    (ValueError("--x is 1,\nmust be 2"), 2, "error: --x is 1, must be 2\n"),
    (FileNotFoundError(2, "none there", "a.txt"), 2, "error: [Errno 2] none there: 'a.txt'\n"),
    (torch.OutOfMemoryError("tried 2 GiB"), 2, "error: tried 2 GiB\n"),
    (KeyboardInterrupt(), 130, "interrupted\n")])
def test_errors_of_a_script_are_one_line_and_a_code(capsys, error, code, words):
    def body(run):
        raise error
    with pytest.raises(SystemExit) as stop:
        data.run_script(body, None)
    assert stop.value.code == code and capsys.readouterr() == ("", words)


def test_a_folder_is_held_until_the_script_ends(tmp_path, monkeypatch):
    """By one descriptor a folder; a file system or a system without locks keeps nobody out."""
    fcntl = pytest.importorskip("fcntl")

    def free():
        descriptor = os.open(tmp_path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)

    def body(run):
        data.hold_folder(tmp_path)
        data.hold_folder(tmp_path / "." / "")
        assert not free() and tmp_path.resolve() in data.HELD
    data.run_script(body, None)
    assert free() and not data.HELD

    def refuses(*_):
        raise OSError(95, "not supported")
    monkeypatch.setattr(data.fcntl, "flock", refuses)
    data.run_script(lambda run: data.hold_folder(tmp_path), None)
    monkeypatch.setattr(data, "fcntl", None)
    data.run_script(lambda run: data.hold_folder(tmp_path), None)


def test_script_prints_statistics_and_one_json_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some words and some more words\n" * 300)
    data.main(["--data", str(tmp_path / "a.txt"), "--vocab-size", "320", "--write-shards",
               str(tmp_path / "s")])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["documents"] == 1 and result["bytes"] == 31 * 300 and result["xz_bpb"] > 0
    assert (tmp_path / "s" / "shards.json").exists() and "sha256" in printed
