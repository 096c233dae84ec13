"""From text to batches: a default corpus, a BPE tokenizer, packed windows, exact resume.

The default corpus needs no download: the sources and documentation topics of the Python standard
library, from which a small language model visibly learns. A run records the corpus's fingerprint,
since the text changes with the version of Python.

    corpus      --data stdlib | FILE | DIR: .txt .md .py are documents, .jsonl has one per line
                --data DIR of token shards: what --write-shards wrote, memory-mapped
    split       a twentieth of the documents, chosen by the hash of their path, is validation
    tokenizer   --tokenizer bpe | bytes | FILE: bpe trains a byte-level BPE on the training
                documents in a second; FILE is any byte-level tokenizer.json, Nemotron's too
    packing     separator, document, separator, document ... in windows of seq_len + 1 tokens
    order       a permutation of the windows per epoch, computed from (seed, epoch): see `Batches`

Bits/byte = nats per token x tokens / ln 2 / bytes of text. Unlike nats per token it does not depend
on the tokenizer, and it can be compared with xz.

Left out: mixtures of sources, streaming from object stores, cleaning and deduplication.

    python data.py                                         statistics of corpus and tokenizer; 6 s
    python data.py --data DIR --write-shards out/shards    tokenise once, for large runs
"""

import dataclasses
import hashlib
import json
import lzma
import math
import os
import pathlib
import platform
import re
import sysconfig

import numpy as np
import torch
from pydoc_data.topics import topics
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from common import check_flags, flag, read_json, script, write_json, write_text

# ------------------------------------------------------------------------------------------------
# Documents

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "encodings", "idlelib", "lib2to3", "distutils",
                   "turtledemo", "ensurepip", "site-packages", "dist-packages", "__pycache__",
                   "pydoc_data"}


def stdlib_documents():
    """[(path, text)] of pydoc's topics and the standard library without tests and code tables."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    documents = [(path.as_posix(), (root / path).read_text(encoding="utf-8", errors="replace"))
                 for path in paths if not STDLIB_LEFT_OUT.intersection(path.parts)]
    documents += [(f"pydoc_data/topics/{name}", text) for name, text in topics.items()]
    if sum(len(text) for _, text in documents) < 10 ** 6:
        raise ValueError(f"{root} has almost no Python sources: give --data FILE or DIR")
    return documents


def read_text(path):
    """[(name, text)] of a file, per line of a .jsonl. Raises ValueError if it is not UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    if "\0" in text:
        raise ValueError(f"{path} is binary (it has NUL bytes)")
    if path.suffix.lower() != ".jsonl":
        return [(path.name, text)]
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        try:        # encode raises for anything but a str, and for half a surrogate pair
            if line.strip():
                value = json.loads(line)["text"].encode().decode()
                documents.append((f"{path.name}#{number}", value))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path} line {number} is not an object with a text key") from None
    return documents


def files_below(folder, seen):
    """Yield the files below a folder, also through links, but none that is hidden. seen: folders
    that were read, as a folder that can be reached twice is read once."""
    for path in () if folder.resolve() in seen else sorted(folder.iterdir()):
        seen.add(folder.resolve())
        if path.is_dir() and not path.name.startswith("."):
            yield from files_below(path, seen)
        elif (path.is_file() or path.is_symlink()) and not path.name.startswith("."):
            yield path                                  # a link to nothing fails when it is read


def user_documents(data):
    """[(name, text)] of a file or of every text file below a folder. Raises if there is none."""
    root, documents = pathlib.Path(data), []
    if not root.exists():
        raise FileNotFoundError(f"--data {data} does not exist (stdlib, a file or a folder)")
    for path in [root] if root.is_file() else files_below(root, set()):
        folder = path.relative_to(root).parent.as_posix()
        if path == root or path.suffix.lower() in TEXT_SUFFIXES:
            documents += [(f"{folder}/{name}", text)
                          for name, text in read_text(path) if text.strip()]
    if not documents:
        raise ValueError(f"--data {data} has no text in {', '.join(TEXT_SUFFIXES)} files")
    return documents


def split_documents(documents):
    """(training, validation): a twentieth by hash of the name; below 40 documents, their ends."""
    held_out = lambda name: hashlib.sha256(os.fsencode(name)).digest()[0] % 20 == 0
    documents = sorted(documents)
    validation = [text for name, text in documents if held_out(name)]
    if len(documents) >= 40 and validation:
        return [text for name, text in documents if not held_out(name)], validation
    end = lambda text: len(text) - max(1, len(text) // 20)
    return [text[:end(text)] for _, text in documents], [text[end(text):] for _, text in documents]


def fingerprint(data, documents, tokenizer_json=""):
    """What a checkpoint records: source and size of its text, hashes of text and tokenizer."""
    digest, size = hashlib.sha256(), 0
    for name, text in sorted(documents):
        raw = text.encode()
        digest.update(os.fsencode(f"{name}\0{len(raw)}\0") + raw)     # a name need not be UTF-8
        size += len(raw)
    source = f"Python {platform.python_version()} standard library" if data == "stdlib" else data
    return dict(source=str(source), documents=len(documents), bytes=size, sha256=digest.hexdigest(),
                tokenizer=hashlib.sha256(tokenizer_json.encode()).hexdigest())


def xz_bits_per_byte(texts):
    """Bits/byte that xz -9e needs for the concatenated texts: the figure to beat."""
    raw = "".join(texts).encode()
    return 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)


# ------------------------------------------------------------------------------------------------
# Tokenizers: byte-level BPE, kept as tokenizer.json, trained and run by the tokenizers library

MARKERS = ("<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>", "<think>", "</think>")     # for chats
SEPARATORS = ("<|bos|>", "<s>", "<|endoftext|>", "<|begin_of_text|>")
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_characters():
    """{character: byte}: GPT-2's printable stand-ins for the 256 bytes, as in tokenizer.json."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


def byte_level(model, *split):
    """A tokenizers.Tokenizer that splits text by a pre-tokenizer, if given, and then into bytes."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        *split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def cut_runs(text, longest=1000):
    """A text cut where a run (of white space, or of other characters) gets longer than `longest`:
    the time to train a BPE grows with the square of its longest word."""
    ends = [m.end() for m in re.finditer(rf"\s{{{longest}}}|\S{{{longest}}}", text)]
    return [text[i:j] for i, j in zip([0, *ends], [*ends, len(text)])]


def train_bpe(texts, vocab_size):
    """tokenizer.json (a str) of a byte-level BPE; the separator and the markers come first."""
    tokenizer = byte_level(models.BPE(), pre_tokenizers.Split(Regex(PATTERN), "isolated"))
    pieces = (piece for text in texts for piece in cut_runs(text))
    tokenizer.train_from_iterator(pieces, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[SEPARATORS[0], *MARKERS],
        show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer.to_str()


def make_tokenizer(spec, texts, vocab_size):
    """tokenizer.json (a str) for --tokenizer bpe, bytes (every byte is its own id) or a file."""
    if spec == "bpe":
        if vocab_size < 300:
            raise ValueError(f"vocab_size is {vocab_size}, a BPE needs at least 300")
        return train_bpe(texts, vocab_size)
    if spec == "bytes":
        tokenizer = byte_level(models.BPE(vocab=byte_characters(), merges=[]))
        tokenizer.add_special_tokens([SEPARATORS[0], *MARKERS])
        return tokenizer.to_str()
    if not pathlib.Path(spec).exists():
        raise FileNotFoundError(f"--tokenizer {spec} does not exist (bpe, bytes, or a file)")
    read_json(spec)
    return pathlib.Path(spec).read_text(encoding="utf-8")


class Encoding:
    """A byte-level BPE with tiktoken's method names; the tokenizers library does the work."""

    def __init__(self, tokenizer):
        self.tokenizer, self.byte_of = tokenizer, byte_characters()
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.n_vocab = max(tokenizer.get_vocab().values()) + 1
        self.added = tokenizer.get_added_tokens_decoder()
        self.special_tokens_set = {token.content for token in self.added.values() if token.special}

    def encode_ordinary(self, text):
        """Ids of a text in which special tokens are ordinary text."""
        return self.encode_ordinary_batch([text])[0]

    def encode_ordinary_batch(self, texts):
        self.tokenizer.encode_special_tokens = True
        return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode(self, text, allowed_special="all"):
        """Ids of a text in which special tokens keep their meaning."""
        self.tokenizer.encode_special_tokens = False
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_single_token(self, token):
        return self.tokenizer.token_to_id(token)

    def decode_single_token_bytes(self, i):
        """The bytes that an id stands for, which may end inside a character."""
        if i in self.added:
            return self.added[i].content.encode()
        return bytes(self.byte_of[c] for c in self.tokenizer.id_to_token(int(i)))

    def decode(self, ids):
        return b"".join(map(self.decode_single_token_bytes, ids)).decode("utf-8", "replace")


def encoding_from_json(text):
    """The Encoding of a byte-level BPE tokenizer.json. Raises ValueError on another kind."""
    try:
        tokenizer, spec = Tokenizer.from_str(text), json.loads(text)
        kind, decoder = spec["model"]["type"], (spec["decoder"] or {}).get("type")
    except Exception as error:      # the library raises plain Exceptions
        raise ValueError(f"not a tokenizer.json ({type(error).__name__}: {error})") from None
    if kind != "BPE" or decoder != "ByteLevel":
        raise ValueError(f"tokenizer.json is a {kind} with a {decoder} decoder, not byte-level BPE")
    for key in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if spec["model"].get(key):
            raise ValueError(f"tokenizer.json: {key} is {spec['model'][key]!r}, not supported")
    missing = set(byte_characters()) - set(spec["model"]["vocab"])
    if missing:
        raise ValueError(f"tokenizer.json lacks {len(missing)} of the 256 bytes")
    return Encoding(tokenizer)


def separator_id(encoding):
    """The id that stands before every document: the first of SEPARATORS that the tokenizer has."""
    for name in SEPARATORS:
        if name in encoding.special_tokens_set:
            return encoding.encode_single_token(name)
    raise ValueError(f"the tokenizer has no separator (special token {' or '.join(SEPARATORS)})")


# ------------------------------------------------------------------------------------------------
# Token streams and batches


class TokenStream:
    """One long sequence of token ids over one array or several (memory-mapped shards)."""

    def __init__(self, arrays):
        self.arrays, self.borders = arrays, np.cumsum([0, *map(len, arrays)])

    def __len__(self):
        return int(self.borders[-1])

    def read(self, start, stop):
        """Tokens start to stop, or to the end, as int64, also across the arrays' borders."""
        first, last = np.searchsorted(self.borders, (start + 1, min(stop, len(self)))) - 1
        pieces = [self.arrays[i][max(start - self.borders[i], 0):stop - self.borders[i]]
                  for i in range(first, last + 1)]
        return np.concatenate(pieces).astype(np.int64)


@dataclasses.dataclass
class TokenData:
    """Everything that a run needs from its text."""
    train: TokenStream
    validation: TokenStream
    validation_bytes: int           # of text, for bits/byte
    validation_xz: float | None     # bits/byte of xz -9e on the same text; None for shards
    tokenizer_json: str
    encoding: Encoding
    separator: int                  # id of the separator
    fingerprint: dict               # of the corpus and the tokenizer

    @property
    def vocab_size(self):
        """Entries of the tokenizer, rounded up to a multiple of 16, as FP8 matmuls need."""
        return -(-self.encoding.n_vocab // 16) * 16


def pack(texts, encoding):
    """A stream of all texts, the separator before each: uint16 if the ids fit, else uint32."""
    dtype = np.uint16 if encoding.n_vocab <= 2 ** 16 else np.uint32
    separator, encoded = separator_id(encoding), encoding.encode_ordinary_batch(texts)
    return TokenStream([np.concatenate([np.array([separator, *ids], dtype) for ids in encoded])])


def load_data(data="stdlib", tokenizer="bpe", vocab_size=4096, tokenizer_json=None):
    """The TokenData of --data, by --tokenizer or tokenizer_json. Raises ValueError or OSError."""
    if (pathlib.Path(data) / "shards.json").exists():
        return load_shards(pathlib.Path(data))
    documents = stdlib_documents() if data == "stdlib" else user_documents(data)
    train, validation = split_documents(documents)
    tokenizer_json = tokenizer_json or make_tokenizer(tokenizer, train, vocab_size)
    encoding = encoding_from_json(tokenizer_json)
    return TokenData(pack(train, encoding), pack(validation, encoding),
                     sum(len(text.encode()) for text in validation), xz_bits_per_byte(validation),
                     tokenizer_json, encoding, separator_id(encoding),
                     fingerprint(data, documents, tokenizer_json))


def write_shards(token_data, folder, shard_tokens=10 ** 8):
    """Write train-*.npy, validation-*.npy (uint16 or uint32), tokenizer.json and shards.json."""
    folder, files = pathlib.Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "shards.json").exists():
        raise FileExistsError(f"{folder} holds shards already: choose another folder")
    for split in ("train", "validation"):
        stream, files[split] = getattr(token_data, split), []
        for i, start in enumerate(range(0, len(stream), shard_tokens)):
            files[split].append(f"{split}-{i:05d}.npy")
            tokens = stream.read(start, start + shard_tokens)
            np.save(folder / files[split][-1], tokens.astype(stream.arrays[0].dtype))
    write_text(folder / "tokenizer.json", token_data.tokenizer_json)
    write_json(folder / "shards.json", dict(files=files, fingerprint=token_data.fingerprint,
                                            validation_bytes=token_data.validation_bytes))


def load_shards(folder):
    """TokenData of memory-mapped shards. Raises ValueError if files are missing or truncated."""
    try:
        meta = read_json(folder / "shards.json")
        files, corpus, size = meta["files"], meta["fingerprint"], meta["validation_bytes"]
        streams = [TokenStream([np.load(folder / name, mmap_mode="r") for name in files[split]])
                   for split in ("train", "validation")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} does not hold what --write-shards writes, or not all of it: "
                         f"{error}") from None
    tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
    encoding = encoding_from_json(tokenizer_json)
    return TokenData(*streams, size, None, tokenizer_json, encoding, separator_id(encoding), corpus)


class Batches:
    """Windows of a stream in a seeded order; `position`, how many were taken, is the whole state.

    Epoch e visits window (stride * i + offset) mod n for i = 0 .. n - 1. The stride (coprime to n),
    the offset and a shift of all windows are drawn from (seed, e), so that no order is stored."""

    def __init__(self, stream, batch_size, seq_len, seed=0, position=0, separator=None):
        self.stream, self.batch_size, self.seq_len, self.seed = stream, batch_size, seq_len, seed
        self.position, self.separator = position, separator
        self.windows = (len(stream) - 1) // seq_len - 1  # one window less leaves room for the shift
        if self.windows < 1:
            raise ValueError(f"{len(stream)} tokens of training text do not fill two windows of "
                             f"{seq_len}: use more text or a smaller --seq-len")

    def start_of(self, position):
        """First token of the window at this position."""
        n = self.windows
        epoch, i = divmod(position, n)
        draw = np.random.default_rng((self.seed, epoch))
        shift, offset = draw.integers(self.seq_len), draw.integers(n)
        stride = n
        while math.gcd(stride, n) != 1:
            stride = int(draw.integers(1, n + 1))
        return (stride * i + int(offset)) % n * self.seq_len + int(shift)

    def next(self):
        """(tokens, labels, seq_idx), int64 (b, seq_len); seq_idx rises at separators or is None."""
        starts = [self.start_of(self.position + i) for i in range(self.batch_size)]
        self.position += self.batch_size
        windows = [self.stream.read(start, start + self.seq_len + 1) for start in starts]
        return label(np.stack(windows), self.separator)


def label(windows, separator):
    """(tokens, labels, seq_idx) of windows (b, seq_len + 1), in which -100 is padding."""
    windows = torch.from_numpy(windows)
    tokens, labels = windows[:, :-1].clamp(min=0), windows[:, 1:].contiguous()
    return tokens, labels, None if separator is None else (tokens == separator).long().cumsum(1)


def validation_batches(stream, batch_size, seq_len, separator=None, limit=None):
    """Yield batches as `Batches.next` does, but in order, with every token predicted once; labels
    of padding are -100. limit: about how many tokens to use, in windows spread over the stream."""
    starts = range(0, len(stream) - 1, seq_len)
    n = len(starts) if limit is None else min(max(limit // seq_len, 1), len(starts))
    starts = [starts[i * len(starts) // n] for i in range(n)]
    for i in range(0, len(starts), batch_size):
        windows = np.full((len(starts[i:i + batch_size]), seq_len + 1), -100)
        for window, start in zip(windows, starts[i:i + batch_size]):
            tokens = stream.read(start, start + seq_len + 1)
            window[:len(tokens)] = tokens
        yield label(windows, separator)


# ------------------------------------------------------------------------------------------------
# python data.py: statistics of corpus and tokenizer


@dataclasses.dataclass
class Run:
    """Statistics of a corpus and of a tokenizer on it."""
    data: str = flag("stdlib", "stdlib, a text file, a folder of text, or a folder of shards")
    tokenizer: str = flag("bpe", "bpe, bytes, or a tokenizer.json")
    vocab_size: int = flag(4096, "vocabulary size of a trained BPE", at_least=1)
    write_shards: str = flag("", "folder to write token shards to, for large runs")

    def __post_init__(self):
        check_flags(self)


@script(Run)
def main(run):
    text = load_data(run.data, run.tokenizer, run.vocab_size)
    corpus, stream, xz = text.fingerprint, text.validation, text.validation_xz
    bytes_per_token = text.validation_bytes / len(stream)
    example = "|".join(text.encoding.decode([i]) for i in stream.read(0, 40)).replace("\n", "\\n")
    print(f"corpus       {corpus['source']}: {corpus['documents']} documents, "
          f"{corpus['bytes'] / 1e6:.2f} MB, sha256 {corpus['sha256'][:12]}")
    print(f"tokenizer    {run.tokenizer}: {text.encoding.n_vocab} entries, {bytes_per_token:.2f} "
          "bytes per token on validation text")
    print(f"tokens       {len(text.train):,} training, {len(stream):,} validation "
          f"({text.validation_bytes / 1e3:.0f} kB)")
    print("xz -9e      ", f"{xz:.3f} bits/byte on validation text" if xz else
          "not computed for shards")
    print(f"example      {example}")
    if run.write_shards:
        write_shards(text, run.write_shards)
        print(f"shards       written to {run.write_shards}")
    return dict(documents=corpus["documents"], bytes=corpus["bytes"], tokens=len(text.train),
                validation_tokens=len(stream), bytes_per_token=bytes_per_token, xz_bpb=xz)


if __name__ == "__main__":
    main()
