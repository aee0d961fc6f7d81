"""Text that comes in pieces equals the text decoded at once, and a stop string never gets out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from nanovllm_bento.text.detokenizer import IncrementalDetokenizer
from nanovllm_bento.text.tokenizer import Tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [
    "\u2581",
    "\u2581\u2581\u2581",
    "\u2581he",
    "llo",
    "a",
    "b",
    "e",
    "h",
    "l",
    "o",
    "日",
    "é",
    "\ufffd",
    ".",
    "\u2581a",
]


def byte_level() -> Tokenizer:
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("h", "e"), ("Ġ", "h"), ("l", "l"), ("Ã", "©"), ("ð", "Ł"), ("ðŁ", "ĺ")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return with_added_tokens(backend)


def llama_like() -> Tokenizer:
    vocab = {token: i for i, token in enumerate(["<unk>", *BYTES, *WORDS])}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_added_tokens(backend)


def unigram() -> Tokenizer:
    vocab = [("<unk>", -20.0), *((token, -10.0) for token in BYTES), *((word, -1.0) for word in WORDS)]
    backend = Backend(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return with_added_tokens(backend)


def with_added_tokens(backend: Backend) -> Tokenizer:
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False), AddedToken("<s>", normalized=False)])
    backend.add_tokens([AddedToken("<think>", normalized=False), "wörld é", "日本"])
    return Tokenizer(backend)


TOKENIZERS = {"byte-level": byte_level(), "llama-like": llama_like(), "unigram": unigram()}
kinds = pytest.mark.parametrize("kind", TOKENIZERS)
CHARS = st.one_of(
    st.text(max_size=30),
    st.text(alphabet="he llo", max_size=30),
    st.text(alphabet="日本語é😀👨\u200d👩e\u0301", max_size=20),
)


def in_pieces(tokenizer: Tokenizer, ids: list[int], sizes: list[int], **options) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    pieces, at = [], 0
    while at < len(ids):
        size = sizes[at % len(sizes)]
        pieces.append(detokenizer.push(ids[at : at + size]))
        at += size
    pieces.append(detokenizer.finish())
    assert detokenizer.text == "".join(pieces)
    assert detokenizer.finish() == ""
    return pieces


@kinds
@settings(max_examples=150, deadline=None)
@given(text=CHARS, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_the_pieces_of_a_text_add_up_to_it(kind, text, sizes):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    pieces = in_pieces(tokenizer, ids, sizes)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text and kind == "byte-level":
        assert "\ufffd" not in "".join(pieces)


@kinds
@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans(), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_the_pieces_of_random_tokens_add_up_to_their_text(kind, data, skip, sizes):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=30))  # 3 ids beyond the vocabulary
    pieces = in_pieces(tokenizer, ids, sizes, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
    held = in_pieces(tokenizer, ids, sizes, skip_special_tokens=skip, stop=["\x00never\x00"])
    assert "".join(held) == "".join(pieces)


@kinds
@settings(max_examples=200, deadline=None)
@given(data=st.data(), stops=st.lists(st.text(alphabet="helo ", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_is_found_wherever_tokens_end_and_never_sent(kind, data, stops):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(data.draw(st.text(alphabet="helo ", max_size=30)))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    text = tokenizer.decode(ids)
    detokenizer = IncrementalDetokenizer(tokenizer, stop=stops)
    sent = ""
    for at in range(0, len(ids), sizes[0]):
        sent += detokenizer.push(ids[at : at + sizes[0]])
        assert not any(stop in sent for stop in stops)
    sent += detokenizer.finish()
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        assert (sent, detokenizer.stop_reason, detokenizer.num_tokens_used) == (text, None, len(ids))
        return
    end, _, stop = min(found)
    assert (sent, detokenizer.stop_reason) == (text[: end - len(stop)], stop)
    used = detokenizer.num_tokens_used
    assert len(tokenizer.decode(ids[:used])) >= end
    assert len(tokenizer.decode(ids[: used - 1])) < end


def test_half_a_character_waits_and_becomes_a_replacement_only_at_the_end():
    tokenizer = TOKENIZERS["byte-level"]
    ids = [tokenizer.token_to_id(char) for char in "ðŁĺĢ"]  # the bytes F0 9F 98 80
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push([token]) for token in ids] == ["", "", "", "😀"]
    assert detokenizer.push(ids[:2]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_bytes_that_are_no_utf8_do_not_hold_back_what_follows():
    tokenizer = TOKENIZERS["byte-level"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([tokenizer.token_to_id("ÿ")]) == "\ufffd"
    assert detokenizer.push([tokenizer.token_to_id("ð"), tokenizer.token_to_id("a")]) == "\ufffda"


def test_what_could_begin_a_stop_string_is_held_back_and_sent_when_it_does_not():
    tokenizer = TOKENIZERS["byte-level"]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["hello"])
    pieces = [detokenizer.push(tokenizer.encode(text)) for text in ("ab he", "l", "p", "!")]
    assert pieces == ["ab ", "", "help", "!"]


def test_tokens_behind_the_one_that_completes_the_stop_string_do_not_count():
    tokenizer = TOKENIZERS["byte-level"]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["lo"])
    ids = tokenizer.encode("he") + tokenizer.encode("ll") + tokenizer.encode("o") + tokenizer.encode("abc")
    assert detokenizer.push(ids) == "hel"
    assert (detokenizer.stop_reason, detokenizer.num_tokens_used) == ("lo", 3)
    assert detokenizer.push(ids) == "" and detokenizer.finish() == ""
    assert (detokenizer.num_tokens_used, detokenizer.text) == (3, "hel")


@pytest.mark.parametrize(
    ("min_tokens", "text", "used"), [(0, "", 1), (1, "a", 2), (2, "aa", 3), (3, "aaa", 4), (4, "aaaa", 4)]
)
def test_a_stop_string_counts_only_behind_min_tokens(min_tokens, text, used):
    tokenizer = TOKENIZERS["byte-level"]
    for pushes in ([4], [1, 1, 1, 1], [3, 1], [1, 3]):
        detokenizer = IncrementalDetokenizer(tokenizer, stop=["a"], min_tokens=min_tokens)
        a = tokenizer.token_to_id("a")
        sent = "".join(detokenizer.push([a] * size) for size in pushes) + detokenizer.finish()
        assert (sent, detokenizer.num_tokens_used) == (text, used)
        assert detokenizer.stop_reason == ("a" if min_tokens < 4 else None)


def test_a_stop_string_in_what_was_held_as_bytes_is_found_at_the_end():
    tokenizer = TOKENIZERS["llama-like"]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["€"])
    ids = tokenizer.encode("a€")
    assert detokenizer.push(ids) + detokenizer.finish() == "a"
    assert detokenizer.stop_reason == "€"


def test_behind_a_prompt_the_first_word_keeps_its_space():
    tokenizer = TOKENIZERS["llama-like"]
    prompt, word = tokenizer.encode("a"), [tokenizer.token_to_id("\u2581he"), tokenizer.token_to_id("llo")]
    assert IncrementalDetokenizer(tokenizer).push(word) == "hello"
    assert IncrementalDetokenizer(tokenizer, prompt).push(word) == " hello"


@kinds
def test_a_token_costs_the_same_late_in_a_long_text(kind):
    tokenizer = TOKENIZERS[kind]
    calls = 0
    decode = tokenizer.decode

    def counting(ids, skip_special_tokens=True):
        nonlocal calls
        calls += len(ids)
        return decode(ids, skip_special_tokens)

    ids = tokenizer.encode("hello hello. " * 50)
    tokenizer.decode = counting  # type: ignore[method-assign]
    try:
        detokenizer = IncrementalDetokenizer(tokenizer)
        for token in ids:
            detokenizer.push([token])
    finally:
        del tokenizer.decode
    assert calls <= 4 * len(ids)
