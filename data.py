"""Text to batches: a corpus that is there, a BPE tokenizer, packed windows, exact resume.

Default corpus: the Python standard library's own sources and its documentation topics. Nothing is
downloaded, nothing is redistributed, and it holds what a small language model can visibly learn:
code, comments, prose. A run keeps the corpus's fingerprint (version, bytes, sha256), since another
Python is another text.

    corpus      --data stdlib | FILE | DIR: .txt .md .py are documents, .jsonl has one a line
                --data DIR of token shards: what --write-shards wrote, memory-mapped
    split       a twentieth of the documents, chosen by the hash of their path, is validation
    tokenizer   --tokenizer bpe | bytes | FILE | NAME
                bpe trains a byte-level BPE on the training documents (seconds, Hugging Face
                tokenizers); FILE is any byte-level tokenizer.json, Nemotron's too; NAME is a
                tiktoken encoding, which tiktoken downloads. Every one is saved as tokenizer.json
                and encodes through tiktoken.
    packing     separator, document, separator, document ... cut into windows of seq_len + 1 tokens
    order       a permutation of the windows an epoch, computed from (seed, epoch, position):
                the number of windows taken is the whole state of the sampler

Bits a byte = nats / ln 2 / bytes of text: unlike nats a token it does not depend on the tokenizer.

Left out: mixtures of weighted sources, streaming from object stores, cleaning and deduplication.

    python data.py                                         statistics of corpus and tokenizer; 6 s
    python data.py --data DIR --write-shards out/shards    tokenise once, for large runs
"""

import argparse
import bisect
import dataclasses
import hashlib
import inspect
import json
import lzma
import math
import os
import pathlib
import platform
import re
import signal
import sys
import sysconfig
import typing

import numpy as np
import torch

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None

# ------------------------------------------------------------------------------------------------
# What every script's command line shares


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")


METAVARS = {int: "N", float: "X", str: "TEXT"}


def parse_flags(cls, argv=None):
    """An instance of the dataclass cls from flags: one --flag a field, its default and the comment
    behind it.

    The docstring is the description. Lists take several values; bools are switches. A bad flag
    prints one line and exits with 2. Defaults are written once, in the class.
    """
    source = inspect.getsource(cls)
    parser = OneLineParser(description=inspect.getdoc(cls), allow_abbrev=False,
                           usage="%(prog)s [--flag VALUE ...]")
    for field in dataclasses.fields(cls):
        comment = re.search(rf"^ *{field.name}:[^#]*# (.*(?:\n {{12,}}# .*)*)", source, re.M)[1]
        help_text = re.sub(r"\s+# |%", lambda m: "%%" if m[0] == "%" else " ", comment)
        flag, options = "--" + field.name.replace("_", "-"), dict(field.metadata)
        default = field.default
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction if default else "store_true"
        else:
            plain = [t for t in typing.get_args(field.type) or [field.type] if t is not type(None)]
            options |= dict(type=plain[0], metavar=METAVARS[plain[0]])
        if default is not None and default is not False and default not in ("", ()):
            help_text += " (default: %(default)s)"
        parser.add_argument(flag, dest=field.name, default=default, help=help_text, **options)
    try:
        return cls(**vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))


def run_script(body, run):
    """Call body(run), print its result as the last line in JSON; errors of the user's making in one
    line, exit 2.

    Set TRACEBACK=1 to see where an error came from. Ctrl-C exits with 130. Folders that body held
    are free again.
    """
    try:
        result = body(run)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:     # the last: a GPU's
        if os.environ.get("TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        while HELD:
            os.close(HELD.popitem()[1])
    if result is not None:
        print(json.dumps(result), flush=True)


def read_rows(path):
    """The objects of metrics.jsonl; a line that was cut short ends them."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


HELD = {}       # folder -> file descriptor


def hold_folder(folder):
    """Keep this machine's other processes out of a run folder until the script ends, however it
    ends. Raises FileExistsError if one is in it. A lock on the folder itself: where the system or
    the file system has none, nobody is kept out.
    """
    folder = pathlib.Path(folder).resolve()
    if fcntl is None or folder in HELD or not folder.is_dir():
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FileExistsError(f"another process is at work in {folder}: wait until it ends, or "
                              "choose another --out") from None
    except OSError:             # a file system without locks
        pass
    HELD[folder] = descriptor


class StopRequest:
    """A context in which Ctrl-C, or the SIGTERM of a scheduler, sets .asked, for a loop to end at a
    whole step; a second one interrupts at once.
    """

    def __enter__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self.ask)
                       for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, *_):
        self.asked = True
        self.restore()

    def restore(self):
        for number, before in self.before.items():
            signal.signal(number, before)

    def __exit__(self, *_):
        self.restore()


# ------------------------------------------------------------------------------------------------
# Documents

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "encodings", "idlelib", "lib2to3", "distutils",
                   "turtledemo",
                   "ensurepip", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}


def stdlib_documents():
    """[(path, text)] of the standard library without tests and code tables; pydoc's topics."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not STDLIB_LEFT_OUT.intersection(relative.parts):
            documents.append((relative.as_posix(),
                              path.read_text(encoding="utf-8", errors="replace")))
    from pydoc_data.topics import topics
    documents += [(f"pydoc_data/topics/{name}", text) for name, text in topics.items()]
    if sum(len(text) for _, text in documents) < 10 ** 6:
        raise ValueError(f"{root} holds hardly any Python sources (an embedded Python?): name a "
                         f"--data FILE or DIR")
    return documents


def read_text(path):
    """[(name, text)] of one file, a .jsonl by lines. Raises ValueError if it is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): give .txt, .md, .py or "
                         f".jsonl") from None
    if "\0" in text:
        raise ValueError(f"{path} is binary (it has NUL bytes): give .txt, .md, .py or .jsonl")
    if path.suffix != ".jsonl":
        return [(path.name, text)]
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)["text"]
            value.encode()      # raises for anything but a str, and for half a surrogate pair
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path} line {number} is not an object with a text key") from None
        documents.append((f"{path.name}#{number}", value))
    return documents


def hidden(path):
    """True for .git, .venv and what is in them."""
    return any(part.startswith(".") for part in path.parts)


def check_data(data):
    """Raises FileNotFoundError for a --data that is not there."""
    if data != "stdlib" and not pathlib.Path(data).exists():
        raise FileNotFoundError(f"--data {data} does not exist (stdlib, a file or a folder)")


def user_documents(data):
    """[(name, text)] of a file or of every text file below a folder. Raises if there is none."""
    check_data(data)
    root = pathlib.Path(data)
    if root.is_file():
        documents = read_text(root)
    else:
        files = [path for path in sorted(root.rglob("*")) if path.suffix in TEXT_SUFFIXES
                 and path.is_file() and not hidden(path.relative_to(root))]
        documents = [(f"{path.relative_to(root).parent.as_posix()}/{name}", text)
                     for path in files for name, text in read_text(path)]
    documents = [(name, text) for name, text in documents if text.strip()]
    if not documents:
        raise ValueError(f"--data {data} has no text: give {', '.join(TEXT_SUFFIXES)} files that "
                         f"are not empty")
    return documents


def split_documents(documents):
    """(training, validation): a twentieth by hash of the name; of few documents, their ends."""
    held_out = lambda name: hashlib.sha256(name.encode()).digest()[0] % 20 == 0
    documents = sorted(documents)
    train = [text for name, text in documents if not held_out(name)]
    validation = [text for name, text in documents if held_out(name)]
    if len(documents) < 40 or not validation:
        cut = lambda text: len(text) - max(1, len(text) // 20)
        train = [text[:cut(text)] for _, text in documents]
        validation = [text[cut(text):] for _, text in documents]
    return train, validation


def fingerprint(data, documents):
    """What a checkpoint keeps of its corpus: source, size, and a hash of all names and texts."""
    digest, size = hashlib.sha256(), 0
    for name, text in sorted(documents):
        raw = text.encode()
        digest.update(f"{name}\0{len(raw)}\0".encode() + raw)
        size += len(raw)
    library = f"Python {platform.python_version()} standard library"
    source = library if data == "stdlib" else str(data)
    return dict(source=source, documents=len(documents), bytes=size, sha256=digest.hexdigest())


def with_tokenizer(corpus, tokenizer_json):
    """A corpus's fingerprint with that of the tokenizer: together they are what the model reads."""
    return dict(corpus, tokenizer=hashlib.sha256(tokenizer_json.encode()).hexdigest())


def xz_bits_per_byte(texts):
    """Bits a byte that xz -9e needs for the concatenated texts: the figure to beat."""
    raw = "".join(texts).encode()
    return 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)


# ------------------------------------------------------------------------------------------------
# Tokenizers: all are byte-level BPE, kept as tokenizer.json, run by tiktoken

SEPARATORS = ("<|bos|>", "<s>", "<|endoftext|>", "<|begin_of_text|>")
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_characters():
    """{character: byte}: GPT-2's printable stand-ins for the 256 bytes, as in tokenizer.json."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


def train_bpe(texts, vocab_size):
    """tokenizer.json (a str) of a byte-level BPE of vocab_size entries with the separator."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[SEPARATORS[0]],
                                  show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def bpe_json(ranks, pattern, special):
    """tokenizer.json (a str) from {bytes: rank}, the split pattern and {special token: id}.

    tokenizer.json wants the two halves of each merge; they are what BPE with only the lower ranks
    leaves.
    """
    character = {byte: c for c, byte in byte_characters().items()}
    written = lambda token: "".join(character[b] for b in token)
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            merges.append([written(part) for part in halves(token, rank, ranks)])
    vocabulary = {written(token): rank for token, rank in ranks.items()}
    added = [dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False,
                  normalized=False, special=True)
             for name, i in special.items()]
    split = dict(type="Split", pattern=dict(Regex=pattern), behavior="Isolated", invert=False)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    return json.dumps(dict(version="1.0", truncation=None, padding=None, added_tokens=added,
                           normalizer=None,
                           pre_tokenizer=dict(type="Sequence", pretokenizers=[split, byte_level]),
                           post_processor=None, decoder=byte_level,
                           model=dict(type="BPE", dropout=None, unk_token=None,
                                      continuing_subword_prefix=None,
                                      end_of_word_suffix=None, fuse_unk=False, byte_fallback=False,
                                      ignore_merges=False, vocab={**vocabulary, **special},
                                      merges=merges)))


def halves(token, rank, ranks):
    """The two parts that the merge of this rank joins: BPE with the lower ranks alone."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
        i = min(range(len(joined)), key=joined.__getitem__)
        if joined[i] >= rank:
            raise ValueError(f"token {token!r} cannot be built from two smaller ones: not a BPE "
                             f"vocabulary")
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def encoding_from_json(text, name="tokenizer.json"):
    """A tiktoken.Encoding with the ids of a byte-level BPE tokenizer.json. Raises ValueError on
    another kind.

    tiktoken merges by id, so ids must rise in merge order: true of every trained tokenizer, checked
    here. Ids of bytes and of special tokens may be anything (Nemotron's bytes sit at 1000 and up).
    """
    import tiktoken
    try:
        spec = json.loads(text)
        steps = spec["pre_tokenizer"].get("pretokenizers", [spec["pre_tokenizer"]])
        kinds = [step["type"] for step in steps]
        pattern = split_pattern(steps, kinds, spec.get("normalizer"), name)
        ranks = merge_ranks(spec["model"]["vocab"], spec["model"]["merges"], name)
        special = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is not a tokenizer.json with a BPE model "
                         f"({type(error).__name__}: {error})") from None
    ranks = {token: rank for token, rank in ranks.items() if rank not in special.values()}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def split_pattern(steps, kinds, normalizer, name):
    """The regular expression that cuts text into words. Raises ValueError if that is not all."""
    isolated = all(step.get("behavior") == "Isolated" and not step.get("invert")
                   for step in steps[:-1])
    if kinds not in (["Split", "ByteLevel"], ["ByteLevel"]) or normalizer or not isolated \
            or steps[-1].get("add_prefix_space"):
        raise ValueError(f"{name} is not byte-level BPE without normalizer "
                         f"(pre-tokenizer: {', '.join(kinds)})")
    return steps[0]["pattern"]["Regex"] if kinds[0] == "Split" else GPT2_PATTERN


def merge_ranks(vocabulary, merges, name):
    """{bytes: id} of the 256 bytes and of every merge, whose ids must rise in order."""
    character = byte_characters()
    ranks = {bytes([byte]): vocabulary.get(c) for c, byte in character.items()}
    if None in ranks.values():
        raise ValueError(f"{name} lacks {list(ranks.values()).count(None)} of the 256 bytes: it "
                         "cannot write any text")
    previous = -1
    for merge in merges:
        joined = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        rank = vocabulary[joined]
        if rank <= previous:
            raise ValueError(f"{name}: ids do not rise in merge order (at {joined!r}), which "
                             "tiktoken needs")
        ranks[bytes(character[c] for c in joined)] = previous = rank
    return ranks


def assigned_ids(encoding):
    """The ids that stand for something, in order; a vocabulary may have holes."""
    return sorted({*encoding._mergeable_ranks.values(), *encoding._special_tokens.values()})


def make_tokenizer(spec, texts, vocab_size):
    """tokenizer.json (a str) for --tokenizer: bpe, bytes, a file, a tiktoken name (downloads)."""
    if spec == "bpe":
        if vocab_size < 300:
            raise ValueError(f"a BPE of {vocab_size} entries is hardly more than the 256 bytes: "
                             f"at least 300")
        return train_bpe(texts, vocab_size)
    if spec == "bytes":
        return bpe_json({bytes([b]): b for b in range(256)}, r"[\s\S]", {SEPARATORS[0]: 256})
    path = pathlib.Path(spec)
    if path.suffix == ".json":
        if not path.exists():
            raise FileNotFoundError(f"--tokenizer {spec} does not exist")
        return path.read_text(encoding="utf-8")
    import tiktoken
    if spec not in tiktoken.list_encoding_names():
        raise ValueError(f"--tokenizer {spec!r} is not bpe, bytes, a .json file or one of "
                         f"tiktoken's "
                         f"{', '.join(tiktoken.list_encoding_names())}")
    encoding = tiktoken.get_encoding(spec)
    return bpe_json(encoding._mergeable_ranks, encoding._pat_str, encoding._special_tokens)


def separator_id(encoding):
    """The id that stands before every document: the first of SEPARATORS that the tokenizer has."""
    for name in SEPARATORS:
        if name in encoding.special_tokens_set:
            return encoding.encode_single_token(name)
    raise ValueError(f"{encoding.name} has no separator: one of {', '.join(SEPARATORS)} must be a "
                     f"special token")


# ------------------------------------------------------------------------------------------------
# Token streams and batches


class TokenStream:
    """One long sequence of token ids over one array or several (memory-mapped shards)."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.ends = np.cumsum([len(a) for a in arrays]).tolist()

    def __len__(self):
        return self.ends[-1]

    def read(self, start, stop):
        """Tokens start to stop as int64, across shard borders."""
        pieces, i = [], bisect.bisect_right(self.ends, start)
        while start < stop:
            first = self.ends[i] - len(self.arrays[i])
            piece = self.arrays[i][start - first:stop - first]
            pieces.append(piece)
            start, i = start + len(piece), i + 1
        return np.concatenate(pieces).astype(np.int64)


@dataclasses.dataclass
class TokenData:
    """Everything a run needs of its text."""

    train: TokenStream
    validation: TokenStream
    validation_bytes: int           # of text, for bits a byte
    validation_xz: float | None     # bits a byte of xz -9e on the same text; None for shards
    tokenizer_json: str
    encoding: typing.Any            # tiktoken.Encoding
    separator: int                  # id of the separator
    fingerprint: dict               # of the corpus

    @property
    def vocab_size(self):
        """Entries of the tokenizer, rounded up to a multiple of 16 as FP8 matmuls want it."""
        return -(-self.encoding.n_vocab // 16) * 16


def pack(texts, encoding, separator):
    """Token ids of all texts, the separator before each: uint16 if they fit, else uint32."""
    dtype = np.uint16 if encoding.n_vocab <= 2 ** 16 else np.uint32
    encoded = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())
    return np.concatenate([np.array([separator, *ids], dtype=dtype) for ids in encoded])


def load_data(data="stdlib", tokenizer="bpe", vocab_size=4096, tokenizer_json=None):
    """TokenData of --data and --tokenizer, or of a tokenizer_json that is there already.

    Raises FileNotFoundError or ValueError with one line.
    """
    if (pathlib.Path(data) / "shards.json").exists():
        return load_shards(data)
    documents = stdlib_documents() if data == "stdlib" else user_documents(data)
    train, validation = split_documents(documents)
    tokenizer_json = tokenizer_json or make_tokenizer(tokenizer, train, vocab_size)
    encoding = encoding_from_json(tokenizer_json)
    separator = separator_id(encoding)
    return TokenData(TokenStream([pack(train, encoding, separator)]),
                     TokenStream([pack(validation, encoding, separator)]),
                     sum(len(text.encode()) for text in validation), xz_bits_per_byte(validation),
                     tokenizer_json, encoding, separator,
                     with_tokenizer(fingerprint(data, documents), tokenizer_json))


def write_shards(token_data, folder, shard_tokens=10 ** 8):
    """Writes train-*.bin, validation-*.bin (raw uint16 or uint32), tokenizer.json, shards.json."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "shards.json").exists():
        raise FileExistsError(f"{folder} holds shards already: name another folder")
    files, tokens = {}, {}
    for split in ("train", "validation"):
        stream = getattr(token_data, split)
        dtype, files[split] = stream.arrays[0].dtype, []
        for i, start in enumerate(range(0, len(stream), shard_tokens)):
            name = f"{split}-{i:05d}.bin"
            stream.read(start,
                        min(start + shard_tokens, len(stream))).astype(dtype).tofile(folder / name)
            files[split].append(name)
            tokens[name] = min(shard_tokens, len(stream) - start)
    (folder / "tokenizer.json").write_text(token_data.tokenizer_json, encoding="utf-8")
    meta = dict(dtype=dtype.name, tokens=tokens, files=files,
                validation_bytes=token_data.validation_bytes,
                fingerprint=token_data.fingerprint)
    (folder / "shards.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def load_shards(folder):
    """TokenData of memory-mapped shards. Raises with one line on missing or cut files."""
    folder = pathlib.Path(folder)
    try:
        meta = json.loads((folder / "shards.json").read_text(encoding="utf-8"))
        dtype, files = np.dtype(meta["dtype"]), meta["files"]
        counts = {name: meta["tokens"][name] for name in [*files["train"], *files["validation"]]}
        corpus, text_bytes = meta["fingerprint"], meta["validation_bytes"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'shards.json'} is not what --write-shards writes") from None
    for name, count in counts.items():
        size = (folder / name).stat().st_size if (folder / name).exists() else 0
        if size != count * dtype.itemsize:
            raise ValueError(f"{folder / name} has {size} bytes, shards.json says {count} "
                             f"tokens of {dtype.name}: missing or cut short")
    streams = {split: TokenStream([np.memmap(folder / name, dtype, "r") for name in names])
               for split, names in files.items()}
    tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
    encoding = encoding_from_json(tokenizer_json)
    return TokenData(streams["train"], streams["validation"], text_bytes, None, tokenizer_json,
                     encoding, separator_id(encoding), with_tokenizer(corpus, tokenizer_json))


class Batches:
    """Windows of a stream in a seeded order. `position`, the number of windows taken, is the whole
    state.

    Epoch e visits window (stride * i + offset) mod n, i = 0 .. n - 1, with a stride coprime to n
    and a shift of all window borders, both drawn from (seed, e): every window once an epoch,
    nothing stored, any position at once.
    """

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
        stride = draw.integers(1, n + 1)
        while math.gcd(int(stride), n) != 1:
            stride = draw.integers(1, n + 1)
        return int((int(stride) * i + int(offset)) % n * self.seq_len + shift)

    def next(self):
        """(tokens, labels, seq_idx), int64 (batch, seq_len) each; seq_idx may be None."""
        rows = []
        for i in range(self.batch_size):
            start = self.start_of(self.position + i)
            rows.append(self.stream.read(start, start + self.seq_len + 1))
        self.position += self.batch_size
        rows = torch.from_numpy(np.stack(rows))
        return with_documents(rows[:, :-1], rows[:, 1:], self.separator)


def with_documents(tokens, labels, separator):
    """Adds seq_idx, which rises at each separator, if one is given."""
    seq_idx = None if separator is None else (tokens == separator).long().cumsum(1)
    return tokens.contiguous(), labels.contiguous(), seq_idx


def validation_batches(stream, batch_size, seq_len, separator=None, limit=None, spread=False):
    """The stream in order, every token predicted once; labels are -100 where it is padded.

    limit: only so many tokens, from the beginning; or with spread as many whole windows, one at
    least, from all over the stream, which stand for the whole better: neighbours are of one
    document.
    """
    total = len(stream) - 1
    if limit is not None and not spread:
        total = min(total, limit)
    starts = range(0, total, seq_len)
    if limit is not None and spread:
        n = min(max(limit // seq_len, 1), len(starts))
        starts = [starts[i * len(starts) // n] for i in range(n)]
    for i in range(0, len(starts), batch_size):
        rows = np.full((len(starts[i:i + batch_size]), seq_len + 1), -100)
        for row, start in zip(rows, starts[i:i + batch_size]):
            window = stream.read(start, min(start + seq_len, total) + 1)
            row[:len(window)] = window
        rows = torch.from_numpy(rows)
        yield with_documents(rows[:, :-1].clamp(min=0), rows[:, 1:], separator)


# ------------------------------------------------------------------------------------------------
# python data.py: what the model will read


@dataclasses.dataclass
class Run:
    """Statistics of a corpus and a tokenizer on it."""

    data: str = "stdlib"            # stdlib, a text file, a folder of text, or a folder of shards
    tokenizer: str = "bpe"          # bpe, bytes, a tokenizer.json, or a tiktoken name (downloads)
    vocab_size: int = 4096          # entries of a trained BPE
    write_shards: str = ""          # folder: write token shards there, for large runs
    seed: int = 0                   # of the shown example


def main(argv=None):
    run_script(statistics, parse_flags(Run, argv))


def statistics(run):
    token_data = load_data(run.data, run.tokenizer, run.vocab_size)
    encoding, stream = token_data.encoding, token_data.validation
    print(f"corpus       {token_data.fingerprint['source']}: "
          f"{token_data.fingerprint['documents']} documents, "
          f"{token_data.fingerprint['bytes'] / 1e6:.2f} MB, sha256 "
          f"{token_data.fingerprint['sha256'][:12]}")
    bytes_per_token = token_data.validation_bytes / len(stream)
    print(f"tokenizer    {run.tokenizer}: {encoding.n_vocab} entries, {bytes_per_token:.2f} bytes "
          f"a token on "
          "validation text")
    print(f"tokens       {len(token_data.train):,} training, {len(stream):,} validation "
          f"({token_data.validation_bytes / 1e3:.0f} kB)")
    xz = token_data.validation_xz
    print("xz -9e       " + ("not computed for shards" if xz is None
                             else f"{xz:.3f} bits a byte on validation text"))
    start = int(np.random.default_rng(run.seed).integers(max(1, len(stream) - 40)))
    shown = stream.read(start, min(start + 40, len(stream)))
    pieces = (encoding.decode_single_token_bytes(int(i)) for i in shown)
    print("example      " + "|".join(piece.decode("utf-8", "replace").replace("\n", "\\n")
                                     for piece in pieces))
    if run.write_shards:
        write_shards(token_data, run.write_shards)
        print(f"shards       written to {run.write_shards}")
    return dict(documents=token_data.fingerprint["documents"],
                bytes=token_data.fingerprint["bytes"],
                tokens=len(token_data.train), validation_tokens=len(stream),
                bytes_per_token=bytes_per_token,
                xz_bpb=xz)


if __name__ == "__main__":
    main()
