"""Text goes in whole, comes out in a reproducible order, and every tokenizer is one file with one
set of ids.
"""

import hashlib
import json
import lzma
import os
import re
import sys

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

import data
from data import (Batches, TokenStream, encoding_from_json, load_data, make_tokenizer, separator_id,
                  split_documents, stdlib_documents, train_bpe, validation_batches, write_shards,
                  xz_bits_per_byte)

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


def test_links_and_upper_case_suffixes_are_read_and_each_folder_once(tmp_path):
    """Through links to files and folders, of which one leads back up."""
    shelf, root = tmp_path / "shelf", tmp_path / "root"
    for folder in (shelf, root / "sub"):
        folder.mkdir(parents=True)
    (shelf / "far.TXT").write_text("far")
    (shelf / "rows.JSONL").write_text('{"text": "row"}')
    (root / "sub" / "near.Md").write_text("near")
    (root / "linked").symlink_to(shelf)
    (root / "again").symlink_to(shelf)
    (root / "sub" / "up").symlink_to(root)
    (root / "z.txt").symlink_to(shelf / "far.TXT")
    assert [text for _, text in data.user_documents(root)] == ["far", "row", "near", "far"]


def test_a_link_to_nothing_is_named(tmp_path, fails):
    (tmp_path / "a.txt").write_text("words " * 50)
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    assert "b.txt" in fails(data.main, ["--data", str(tmp_path)])


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="file names there are Unicode")
def test_a_file_name_need_not_be_utf8(tmp_path, capsys):
    for name in (b"caf\xe9.txt", b"ok.txt"):
        (tmp_path / os.fsdecode(name)).write_text("words and words " * 50)
    data.main(["--data", str(tmp_path), "--tokenizer", "bytes"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["documents"] == 2


def test_statistics_of_a_few_words(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("hello world")
    data.main(["--data", str(tmp_path / "a.txt"), "--tokenizer", "bytes"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bytes"] == 11


def test_an_empty_folder_is_named(tmp_path, fails):
    assert "has no text" in fails(data.main, ["--data", str(tmp_path)])


# ------------------------------------------------------------------------------------------------
# Tokenizers


def test_ids_are_those_of_tokenizers_and_decode_back(tokenizer_json, corpus):
    """On real and on hostile text, and the bytes come back, token by token."""
    theirs, ours = Tokenizer.from_str(tokenizer_json), encoding_from_json(tokenizer_json)
    assert ours.n_vocab == theirs.get_vocab_size() == 1000
    for text in SAMPLES + [text[:5000] for _, text in corpus[80:160]]:
        ids = ours.encode_ordinary(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text
        assert b"".join(map(ours.decode_single_token_bytes, ids)) == text.encode()


def test_a_special_token_in_a_text_is_text_unless_it_is_asked_for(tokenizer_json):
    encoding = encoding_from_json(tokenizer_json)
    marker = encoding.encode_single_token("<|bos|>")
    assert marker not in encoding.encode_ordinary("a<|bos|>b")
    assert encoding.encode("a<|bos|>b").count(marker) == 1
    assert encoding.decode_single_token_bytes(marker) == b"<|bos|>"


@pytest.mark.parametrize("change", [
    lambda t: t.add_tokens([AddedToken("    ", special=False, normalized=False)]),
    lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
    lambda t: t.enable_truncation(3), lambda t: t.enable_padding(length=50)],
    ids=["added", "prefix space", "truncation", "padding"])
def test_what_else_a_tokenizer_json_says_of_words_is_obeyed(tokenizer_json, change):
    """Added tokens are found in ordinary text; but no text is cut short or filled."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    change(tokenizer)
    ours = encoding_from_json(tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text in SAMPLES:
        assert ours.encode_ordinary(text) == tokenizer.encode(text).ids


def test_bytes_tokenizer_is_one_id_a_byte():
    encoding = encoding_from_json(make_tokenizer("bytes", [], 0))
    for text in SAMPLES:
        assert encoding.encode_ordinary(text) == list(text.encode())
    assert separator_id(encoding) == 256 and encoding.n_vocab == 257 + len(data.MARKERS)


def test_ids_may_start_anywhere_as_nemotrons_do(tokenizer_json):
    """Special tokens first, bytes at 1000 and up: only the order of merges matters."""
    spec = json.loads(tokenizer_json)
    special = {token["content"] for token in spec["added_tokens"]}
    spec["model"]["vocab"] = {k: v if k in special else v + 1000 for k,
                              v in spec["model"]["vocab"].items()}
    text = json.dumps(spec)
    theirs, ours = Tokenizer.from_str(text), encoding_from_json(text)
    for sample in SAMPLES:
        assert ours.encode_ordinary(sample) == theirs.encode(sample, add_special_tokens=False).ids
    assert min(ours.encode_ordinary("hello")) > 1000


def all_splits(spec):
    """A tokenizer.json as it is made of a tiktoken vocabulary: one merge for each way to split a
    token into two known ones, in the order of tokens."""
    order = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    known = spec["model"]["vocab"]
    spec["model"]["merges"] = [[token[:i], token[i:]] for token in order
                               for i in range(1, len(token))
                               if token[:i] in known and token[i:] in known]


def whole_word(spec):
    """A word that no merge makes, as hundreds of Llama-3's."""
    spec["model"]["vocab"]["Ġdefinitely"] = len(spec["model"]["vocab"])
    spec["model"]["ignore_merges"] = True


def gpt2_words(spec):
    spec["pre_tokenizer"] = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True,
                                 use_regex=True)


@pytest.mark.parametrize("change", [all_splits, whole_word, gpt2_words])
def test_what_tokenizers_of_other_makers_say_is_obeyed(tokenizer_json, corpus, change):
    """The ids of the tokenizers library on 300 documents, and the text comes back."""
    changed = broken(tokenizer_json, change)
    theirs, ours = Tokenizer.from_str(changed), encoding_from_json(changed)
    texts = [text[:2000] for _, text in corpus[:299]] + ["we definitely go, don't we?"]
    ids = ours.encode_ordinary_batch(texts)
    assert ids == [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)]
    assert [ours.decode(i) for i in ids] == texts
    if change is all_splits:
        assert len(json.loads(changed)["model"]["merges"]) > 1.2 * (ours.n_vocab - 257)


@pytest.mark.parametrize("letter", ["a", " "])
def test_training_cuts_words_without_end(letter, monkeypatch):
    """The time of training grows with the square of the longest word."""
    text = "one " + 2500 * letter + " two" + 2 * letter
    pieces = data.cut_runs(text)
    assert "".join(pieces) == text and data.cut_runs("a b") == ["a b"]
    assert max(len(run) for piece in pieces for run in re.split(r"(\s+)", piece)) <= 1000
    seen = []
    monkeypatch.setattr(data, "cut_runs", lambda text: seen.append(text) or [text])
    train_bpe(["short text"], 300)
    assert seen == ["short text"]


def test_gpt2_style_tokenizer_without_split_loads(corpus):
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"],
                                  show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    theirs.train_from_iterator([text for _, text in corpus[:30]], trainer)
    theirs.decoder = decoders.ByteLevel()
    ours = encoding_from_json(theirs.to_str())
    for sample in SAMPLES:
        assert ours.encode_ordinary(sample) == theirs.encode(sample).ids


def broken(tokenizer_json, change):
    spec = json.loads(tokenizer_json)
    change(spec)
    return json.dumps(spec)


@pytest.mark.parametrize("change, words", [
    (lambda s: s["model"].pop("merges"), "not a tokenizer.json"),
    (lambda s: s["model"]["vocab"].pop("A"), "lacks 1 of the 256 bytes|not a tokenizer.json"),
    (lambda s: s["model"].update(vocab=[]), "not a tokenizer.json"),
    (lambda s: s["model"].update(dropout=0.1), "dropout is 0.1, not supported"),
    (lambda s: s["model"].update(byte_fallback=True), "byte_fallback is True, not supported"),
    (lambda s: s["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix is '</w>'"),
    (lambda s: s.update(decoder=None), "is a BPE with a None decoder, not byte-level BPE"),
    (lambda s: s.update(model=dict(type="WordLevel", vocab={"a": 0}, unk_token="a")),
     "is a WordLevel with")])
def test_tokenizers_of_another_kind_are_named(tokenizer_json, change, words):
    with pytest.raises(ValueError, match=words):
        encoding_from_json(broken(tokenizer_json, change))


@pytest.mark.parametrize("argv, words", [
    (["--tokenizer", "gtp2"], "--tokenizer gtp2 does not exist (bpe, bytes, or"),
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
    limited = [labels for _, labels, _ in validation_batches(stream(103, (103,)), 2, 10, limit=39)]
    assert torch.cat(limited)[:, 0].tolist() == [1, 31, 71]     # of the windows 0 to 10: 0, 3, 7
    assert len(list(validation_batches(stream(103, (103,)), 1, 10, limit=999))) == 11


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
    for damaged in ("{}", "[]", "nope", whole.replace("train-00001.npy", "other.npy", 1)):
        meta.write_text(damaged)
        with pytest.raises(ValueError, match="does not hold what --write-shards writes"):
            load_data(str(tmp_path / "shards"))
    meta.write_text(whole)
    with open(tmp_path / "shards" / "train-00001.npy", "r+b") as file:
        file.truncate(3000)                                             # still whole tokens
    with pytest.raises(ValueError, match="or not all of it"):
        load_data(str(tmp_path / "shards"))


# ------------------------------------------------------------------------------------------------
# The script


def test_script_prints_statistics_and_one_json_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some words and some more words\n" * 300)
    data.main(["--data", str(tmp_path / "a.txt"), "--vocab-size", "320", "--write-shards",
               str(tmp_path / "s")])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["documents"] == 1 and result["bytes"] == 31 * 300 and result["xz_bpb"] > 0
    assert (tmp_path / "s" / "shards.json").exists() and "sha256" in printed
