"""Text comes out whole, sampling is what it says, and decoding continues what prefill saw."""

import argparse
import inspect
import json

import pytest
import torch
from conftest import assert_close

import infer
from data import encoding_from_json, make_tokenizer, train_bpe
from infer import TextStream, decode_one, generate, load_run, prefill, sample
from model import HybridConfig, HybridLM, save_hf


@pytest.fixture(scope="module")
def tokenizer_json():
    return train_bpe([inspect.getsource(argparse), "naïve 日本語 🙂 text"], 400)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tokenizer_json):
    """A random model with a real tokenizer, as training would leave it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    save_hf(HybridLM(HybridConfig(pattern="M*-", d_model=32, mlp_dim=64, vocab_size=400, n_heads=2,
                                  n_kv_heads=1,
                                  head_dim=16, mamba_heads=4, mamba_head_dim=8, d_state=16)),
            folder)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    return folder


@pytest.fixture
def loaded(run_folder):
    return load_run(run_folder)


class Scripted(torch.nn.Module):
    """A model that says the given tokens, whatever it is fed: greedy decoding shows what the stream
    does.
    """

    def __init__(self, ids, n_vocab, folder):
        super().__init__()
        self.model, _ = load_run(folder)
        self.backbone, self.config = self.model.backbone, self.model.config
        self.ids, self.n_vocab = ids, n_vocab
        self.said = 0

    def init_cache(self, batch, max_len):
        return self.model.init_cache(batch, max_len)

    def forward(self, tokens, cache, last_only=False):
        cache.pos += tokens.shape[1]
        logits = torch.zeros(1, 1, self.n_vocab)
        logits[..., self.ids[min(self.said, len(self.ids) - 1)]] = 1
        self.said += 1
        return logits


# ------------------------------------------------------------------------------------------------
# Generation


def test_prefill_in_blocks_and_decode_equal_one_forward(loaded):
    model, tokens = loaded[0].double(), torch.randint(0, 400, (2, 23))
    with torch.no_grad():
        whole = model(tokens)
    for block in (1, 5, 23, 100):
        cache = model.init_cache(2, 23)
        got = [prefill(model, cache, tokens[:, :15], block)]
        got += [decode_one(model, cache, tokens[:, i]) for i in range(15, 23)]
        assert_close([torch.stack(got, 1)], [whole[:, 14:]], [f"block {block}"], 1e-10)


def test_greedy_text_is_the_argmax_of_the_whole_model(loaded):
    """Token by token against the model without a cache."""
    model, encoding = loaded
    ids = [encoding.encode_single_token("<|bos|>"), *encoding.encode_ordinary("def f")]
    for _ in range(12):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    text = "".join(generate(model, encoding, "def f", max_tokens=12, temperature=0))
    expected = encoding.decode_bytes(ids[1
            + len(encoding.encode_ordinary("def f")):]).decode("utf-8", "replace")
    assert text == expected


def test_the_same_seed_gives_the_same_text_and_another_seed_another(loaded):
    say = lambda seed: "".join(generate(*loaded, "x", max_tokens=40, temperature=1.0, seed=seed))
    assert say(1) == say(1) != say(2)


def test_sampling_follows_the_distribution_and_its_filters():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, -1)
    generator = torch.Generator().manual_seed(0)
    frequency = lambda **k: torch.bincount(sample(logits, generator=generator, **k),
                                           minlength=4) / 20000
    p = logits[0].softmax(0)                                            # 0.644 0.237 0.087 0.032
    assert torch.allclose(frequency(), p, atol=0.02)
    assert torch.allclose(frequency(temperature=2.0), (logits[0] / 2).softmax(0), atol=0.02)
    assert torch.allclose(frequency(top_k=2), torch.cat([p[:2] / p[:2].sum(), torch.zeros(2)]),
                          atol=0.02)
    assert torch.allclose(frequency(top_p=0.7), torch.cat([p[:2] / p[:2].sum(), torch.zeros(2)]),
                          atol=0.02)
    assert (frequency(top_p=0.6)[0] == 1) and (frequency(top_k=1)[0] == 1)
    assert (sample(logits, temperature=0) == 0).all()


def test_top_p_keeps_the_token_that_crosses_the_threshold_whatever_the_order():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.05, 0.35]]))
    drawn = {sample(logits, top_p=0.8, generator=torch.Generator().manual_seed(i)).item()
             for i in range(200)}
    assert drawn == {1, 3}


def test_generate_hands_its_filters_on(loaded):
    """top_k = 1 and a tiny top_p are greedy at any temperature; so is a temperature near 0."""
    say = lambda **k: "".join(generate(*loaded, "import", max_tokens=15, **k))
    greedy = say(temperature=0)
    assert say(temperature=5.0, top_k=1, top_p=1) == say(temperature=5.0, top_p=1e-6) == greedy
    assert say(temperature=1e-45) == greedy != say(temperature=5.0, top_p=1)


def test_generation_ends_when_the_cache_is_full(loaded):
    stats = {}
    list(generate(*loaded, "", max_tokens=50, max_len=6, temperature=0, stats=stats))
    assert stats["prompt_tokens"] == 1 and stats["tokens"] == 6      # the last one is not fed back


def test_ids_without_text_are_never_drawn(run_folder, tokenizer_json):
    """A model with more rows than the tokenizer has ids: the spare ones cannot be said."""
    encoding = encoding_from_json(make_tokenizer("bytes", [], 0))
    model = Scripted([300], 400, run_folder)         # id 300 of 257
    assert len("".join(generate(model, encoding, "p", max_tokens=5, temperature=0))) <= 5


# ------------------------------------------------------------------------------------------------
# The stream


@pytest.mark.parametrize("text", ["plain ascii", "naïve café", "日本語のテキスト",
                                  "🙂👩‍👩‍👧 flags 🇯🇵"])
def test_streamed_text_is_complete_at_every_piece(text):
    """Fed byte by byte, no piece ever holds half a character, and together they are the text."""
    stream, pieces = TextStream(), []
    for byte in text.encode():
        pieces.append(stream.feed(bytes([byte])))
    pieces.append(stream.feed(b"", final=True))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)


def test_bytes_that_end_inside_a_character_show_as_a_replacement():
    stream = TextStream()
    assert stream.feed("日".encode()[:2]) == "" and stream.feed(b"", final=True) == "\ufffd"


@pytest.mark.parametrize("cut", range(1, 12))
def test_no_part_of_a_stop_string_is_shown_however_it_is_cut(cut):
    stream, raw = TextStream(["\nstop", "END"]), b"text \nstop more"
    shown = stream.feed(raw[:cut]) + ("" if stream.stopped else stream.feed(raw[cut:]))
    assert shown == "text " and stream.stopped


def test_what_only_looks_like_a_stop_is_shown():
    stream = TextStream(["\nstop"])
    assert stream.feed(b"a\nst") == "a" and stream.feed(b"ay") == "\nstay" and not stream.stopped
    assert stream.feed(b"\nsto") == "" and stream.feed(b"", final=True) == "\nsto"


def test_generation_stops_at_strings_separator_and_limits(run_folder, tokenizer_json):
    encoding = encoding_from_json(tokenizer_json)
    ids = encoding.encode_ordinary("return x\nEND and more")
    say = lambda ids, **k: "".join(generate(Scripted(ids, 400, run_folder), encoding, "p",
                                            temperature=0, **k))
    assert say(ids, max_tokens=len(ids)) == "return x\nEND and more"
    assert say(ids, max_tokens=50, stop=["END"]) == "return x\n"
    assert say([*ids, encoding.encode_single_token("<|bos|>")],
               max_tokens=50) == "return x\nEND and more"
    assert encoding.encode_ordinary(say(ids, max_tokens=3)) == ids[:3]


def test_streamed_emoji_split_over_tokens_are_whole(run_folder):
    encoding = encoding_from_json(make_tokenizer("bytes", [], 0))
    text = "a🙂日b"
    pieces = list(generate(Scripted(list(text.encode()), 400, run_folder), encoding, "p",
                           max_tokens=len(text.encode()), temperature=0))
    assert "".join(pieces) == text and pieces == ["a", "🙂", "日", "b"]


# ------------------------------------------------------------------------------------------------
# The script


def test_script_streams_and_ends_with_one_json_line(run_folder, capsys):
    infer.main(["--checkpoint", str(run_folder), "--prompt", "def f", "--tokens", "9", "--device",
                "cpu"])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert set(result) == {"tokens_per_s", "prefill_tokens_per_s", "peak_bytes", "text"}
    assert result["peak_bytes"] > 10 ** 8       # a process with torch in it: bytes, not kilobytes
    assert "def f" + result["text"].split("\n")[0] in "\n".join(lines)


@pytest.mark.parametrize("flags, words", [
    (["--tokens", "0"], "--tokens is 0"), (["--temperature", "nan"], "temperature is nan"),
    (["--temperature", "-1"], "temperature is -1.0"),
    (["--top-p", "0"], "top-p is 0.0"), (["--top-k", "-3"], "top-k is -3"),
    (["--dtype", "fp4"], "--dtype is 'fp4'"),
    (["--context", "3"], "tokens, the cache holds 3"),
    (["--checkpoint", "/nowhere"], "has no config.json"),
    (["--device", "abacus"], "--device is 'abacus', must be auto")])
def test_bad_flags_are_one_line(fails, run_folder, flags, words):
    argv = ["--checkpoint", str(run_folder), "--device", "cpu", "--prompt",
            "a longer prompt than three", *flags]
    assert words in fails(infer.main, argv)


def test_a_tokenizer_of_another_model_is_named(fails, run_folder, tmp_path, tokenizer_json):
    save_hf(HybridLM(HybridConfig(pattern="-", d_model=16, vocab_size=300)), tmp_path)
    assert "has no tokenizer.json" in fails(infer.main, ["--checkpoint", str(tmp_path)])
    (tmp_path / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    assert "the tokenizer has 400 entries, the model 300" in fails(infer.main,
                                                                   ["--checkpoint", str(tmp_path)])
