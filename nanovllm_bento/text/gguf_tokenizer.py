"""Builds a tokenizer of a GGUF file's metadata.

Two kinds: ``gpt2`` (byte-level BPE; ``tokenizer.ggml.pre`` names how text is split first) and ``llama`` (SentencePiece
BPE with byte fallback). Takes about 0.2 s for 49k tokens, most of it within ``tokenizers``, which loading a saved
tokenizer.json would cost as well: hence no cache.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from nanovllm_bento.errors import CorruptFileError, UnsupportedArchitectureError
from nanovllm_bento.gguf_file import open_gguf
from nanovllm_bento.text.tokenizer import Tokenizer, set_bos_eos

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _TEKKEN,
}
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""Vocabularies of tiktoken origin: a word that is a token stays whole, and BOS is added unless the file says no."""
_PLAIN = ("gpt-2", "default")
_DIGITS = ("smollm",)
PRE_TOKENIZERS = (*_PLAIN, *_DIGITS, *_SPLITS)


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a GGUF file.

    Raises UnsupportedArchitectureError for a kind of tokenizer that is not known, CorruptFileError for a bad file.
    """
    metadata = open_gguf(path).decoded()
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind = fields.get("model")
    try:
        if kind == "gpt2":
            backend, adds_bos = _byte_level_bpe(fields, path), fields.get("pre") in _WHOLE_WORDS_FIRST
        elif kind == "llama":
            backend, adds_bos = _sentencepiece_bpe(fields), True
        else:
            raise UnsupportedArchitectureError(f"{path} has a tokenizer of kind {kind!r}; supported: gpt2, llama.")
        special_tokens = _special_tokens(fields)
        _mark_added_tokens(backend, fields, special_tokens)
        set_bos_eos(backend, special_tokens, fields.get("add_bos_token", adds_bos), fields.get("add_eos_token", False))
    except (KeyError, IndexError, TypeError, ValueError) as e:
        raise CorruptFileError(f"{path} has no complete tokenizer in its metadata: {e!r}.") from e
    return Tokenizer(backend, special_tokens=special_tokens, chat_template=metadata.get("tokenizer.chat_template"))


def _byte_level_bpe(fields: dict[str, Any], path: Path) -> Backend:
    pre = fields.get("pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise UnsupportedArchitectureError(
            f"{path} splits text by the rules named {pre!r}; supported: {', '.join(PRE_TOKENIZERS)}. "
            "Use the model's Hugging Face folder instead."
        )
    vocab = {token: i for i, token in enumerate(fields["tokens"])}
    merges = [_pair(merge) for merge in fields["merges"]]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    if pre in _PLAIN:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        first = (
            pre_tokenizers.Digits(individual_digits=True)
            if pre in _DIGITS
            else pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        )
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in _DIGITS)
        backend.pre_tokenizer = pre_tokenizers.Sequence([first, bytes_])
    if _SPLITS.get(pre) is _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


def _sentencepiece_bpe(fields: dict[str, Any]) -> Backend:
    """SentencePiece's BPE joins the neighbours whose union scores best: as ranked merges, best score first."""
    tokens, scores = fields["tokens"], fields["scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    kinds = fields.get("token_type") or [1] * len(tokens)
    ranked = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind in (1, _USER_DEFINED):
            splits = ((token[:i], token[i:]) for i in range(1, len(token)))
            ranked += [(-score, vocab[a], vocab[b], a, b) for a, b in splits if a in vocab and b in vocab]
    ranked.sort()
    merges = [(a, b) for *_, a, b in ranked]
    unknown = tokens[fields.get("unknown_token_id", 0)]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    to_token = normalizers.Replace(" ", _SPACE)
    to_text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), to_token])
        backend.decoder = decoders.Sequence([*to_text, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = to_token
        backend.decoder = decoders.Sequence(to_text)
    return backend


def _special_tokens(fields: dict[str, Any]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: fields.get(f"{key}_token_id") for name, key in keys.items()}
    return {name: fields["tokens"][i] for name, i in ids.items() if i is not None}


def _mark_added_tokens(backend: Backend, fields: dict[str, Any], special_tokens: dict[str, str]) -> None:
    """Control tokens become special; user-defined ones are matched whole in text but are part of decoded text."""
    tokens = fields["tokens"]
    kinds = fields.get("token_type") or [_CONTROL if token in special_tokens.values() else 1 for token in tokens]
    added = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)
