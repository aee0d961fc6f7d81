"""Ids that are looked up piece by piece are those of the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from nanovllm_bento.errors import InvalidRequestError
from nanovllm_bento.text.pieces import PieceCache, are_independent
from nanovllm_bento.text.tokenizer import Tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "Ġ a", "Ċ Ċ", "1 2", "< |"]
SPECIAL = ["<|a|>", "<|a|>b", "<|ab|>", "|>", "<s>"]  # some begin or end like others
CONTRACTIONS = r"'s|\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make(pre_tokenizer: object = None, normalizer: object = None, **flags: bool) -> Tokenizer:
    vocab = {char: i for i, char in enumerate(ALPHABET)}
    for merge in MERGES:
        vocab[merge.replace(" ", "")] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=[tuple(merge.split()) for merge in MERGES]))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    special = [
        AddedToken(text, **{"normalized": False, "special": i % 2 == 0, **flags}) for i, text in enumerate(SPECIAL)
    ]
    backend.add_tokens(special)
    return Tokenizer(backend)


TOKENIZERS = {
    "gpt2": make(),
    "prefix space": make(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "smollm": make(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ),
    "qwen": make(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(CONTRACTIONS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        normalizers.NFC(),
    ),
}
TEXT = st.text(st.sampled_from([*"hel a'12<|>bs\n\t ", "é", "\u0301", "日", "😀"]), max_size=12)
TEXTS = st.lists(st.one_of(TEXT, st.sampled_from(SPECIAL)), max_size=10).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4), new=TEXT)
def test_the_ids_are_those_of_the_text_as_a_whole(name: str, texts: list[str], new: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert are_independent(tokenizer)
    pieces = PieceCache(tokenizer, max_chars=20)
    for text in texts + texts:
        assert pieces.encode(text, new=new) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "tokenizer",
    [
        make(lstrip=True),
        make(rstrip=True),
        make(single_word=True),
        make(normalized=True),
        make(pre_tokenizers.Metaspace()),
        make(pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])),
    ],
)
def test_a_tokenizer_whose_special_tokens_reach_beyond_themselves_is_left_alone(tokenizer: Tokenizer) -> None:
    assert not are_independent(tokenizer)


class Counted:
    """The tokenizer's backend, and what it was asked to encode."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.asked: list[str] = []

    def encode(self, text: str, **options: object) -> object:
        self.asked.append(text)
        return self._backend.encode(text, **options)

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)


@pytest.fixture
def counted() -> tuple[Tokenizer, Counted]:
    tokenizer = make()
    tokenizer.backend = backend = Counted(tokenizer.backend)  # type: ignore[assignment]
    return tokenizer, backend


def test_only_what_was_not_seen_before_is_tokenized(counted: tuple[Tokenizer, Counted]) -> None:
    tokenizer, backend = counted
    pieces = PieceCache(tokenizer)
    pieces.encode("<s>help<|ab|>hello", new="hello")
    pieces.encode("<s>help<|ab|>hello<|ab|>a<|ab|>12", new="12")  # the next turn
    pieces.encode("<s>help<|ab|>hello<|ab|>a<|ab|>12<|ab|>all", new="all")
    assert backend.asked == ["help", "hello", "hello", "a", "12", "12", "all"]


def test_what_one_salt_has_sent_is_not_found_under_another(counted: tuple[Tokenizer, Counted]) -> None:
    tokenizer, backend = counted
    pieces = PieceCache(tokenizer)
    for salt in ("", "x", "y", "x"):
        pieces.encode("<s>hello", salt=salt)
    assert backend.asked == ["hello"] * 3


def test_the_least_recently_used_is_given_up_when_there_is_too_much(counted: tuple[Tokenizer, Counted]) -> None:
    tokenizer, backend = counted
    pieces = PieceCache(tokenizer, max_chars=5)
    for text in ("aa", "bb", "aa", "ee", "aa", "bb"):
        pieces.encode(text)
    assert backend.asked == ["aa", "bb", "ee", "bb"]


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="not valid Unicode"):
        PieceCache(make()).encode("a\ud800")
