"""Tokenizers from Hugging Face folders and from GGUF files."""

import json
from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from nanovllm_bento.errors import (
    CorruptFileError,
    InvalidRequestError,
    ModelNotFoundError,
    UnsupportedArchitectureError,
)
from nanovllm_bento.gguf_file import open_gguf
from nanovllm_bento.hub import ModelFiles, resolve_model
from nanovllm_bento.text.tokenizer import Tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "1 2"]
TEXTS = ["hello", "hello 1234 wörld", "日本語 😀👨\u200d👩", "a<|end|>b <think>", "", "  \n\t x"]


def hf_folder(folder: Path, *, specials: tuple[str, ...] = ("<s>", "<|end|>"), **config: object) -> ModelFiles:
    vocab = {char: i for i, char in enumerate(ALPHABET)}
    for merge in MERGES:
        vocab[merge.replace(" ", "")] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=[tuple(merge.split()) for merge in MERGES]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    backend.enable_truncation(4)
    backend.enable_padding()
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "<|end|>", "__type": "AddedToken"}, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ModelFiles("test", folder, "hf")


def gguf_file(path: Path, model: str, tokens: list[str], kinds: list[int], **fields: object) -> ModelFiles:
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if model == "gpt2":
        writer.add_token_merges(MERGES)
        writer.add_tokenizer_pre(str(fields.pop("pre", "gpt-2")))
    else:
        writer.add_token_scores(fields.pop("scores"))
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return ModelFiles("test", path, "gguf")


def gpt2_gguf(path: Path, **fields: object) -> ModelFiles:
    tokens = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES), "<s>", "<|end|>", "<think>"]
    normal = len(tokens) - 3
    kinds = [TokenType.NORMAL] * normal + [TokenType.CONTROL, TokenType.CONTROL, TokenType.USER_DEFINED]
    return gguf_file(path, "gpt2", tokens, kinds, bos_token_id=normal, eos_token_id=normal + 1, **fields)


def spm_gguf(path: Path, **fields: object) -> ModelFiles:
    words = ["\u2581", "h", "e", "l", "o", "he", "ll", "hell", "hello", "\u2581hello", "lo"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    scores = [0.0] * 259 + [-50.0] * 5 + [-1.0, -2.0, -3.0, -4.0, -5.0, -0.5]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    kinds += [TokenType.NORMAL] * len(words)
    return gguf_file(path, "llama", tokens, kinds, scores=scores, bos_token_id=1, eos_token_id=2, **fields)


def test_text_survives_encoding_and_decoding(tmp_path):
    tokenizer = Tokenizer.load(hf_folder(tmp_path))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    tokenizer = Tokenizer.load(hf_folder(tmp_path))
    assert len(tokenizer.encode("x" * 50)) == 50
    assert [len(ids) for ids in tokenizer.encode_batch(["x", "xyz"])] == [1, 3]


def test_special_tokens_are_known_by_name_and_id(tmp_path):
    tokenizer = Tokenizer.load(hf_folder(tmp_path))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "<|end|>")
    assert tokenizer.eos_token_id == tokenizer.token_to_id("<|end|>") == tokenizer.vocab_size - 1
    assert tokenizer.special_token_ids == {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert tokenizer.decode(tokenizer.encode("a<|end|>b")) == "ab"


@pytest.mark.parametrize(
    ("add_bos", "add_eos", "expected"),
    [
        (None, None, "a"),
        (True, None, "<s>a"),
        (True, True, "<s>a<|end|>"),
        (False, True, "a<|end|>"),
        (False, False, "a"),
    ],
)
def test_bos_and_eos_are_added_as_the_config_says(tmp_path, add_bos, add_eos, expected):
    tokenizer = Tokenizer.load(hf_folder(tmp_path, add_bos_token=add_bos, add_eos_token=add_eos))
    assert tokenizer.decode(tokenizer.encode("a"), skip_special_tokens=False) == expected
    assert tokenizer.decode(tokenizer.encode("a", add_special_tokens=False), skip_special_tokens=False) == "a"


def test_tokens_that_only_the_config_names_are_added(tmp_path):
    entry = {"content": "<think>", "special": False, "normalized": False}
    files = hf_folder(tmp_path, specials=(), added_tokens_decoder={"260": entry}, additional_special_tokens=["<tool>"])
    tokenizer = Tokenizer.load(files)
    assert [tokenizer.token_to_id(token) for token in ("<think>", "<s>", "<|end|>", "<tool>")] == [260, 261, 262, 263]
    assert tokenizer.special_token_ids == {261, 262, 263}
    assert tokenizer.encode("<think>") == [260]


def test_the_chat_template_is_found_in_each_place(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert Tokenizer.load(hf_folder(tmp_path)).chat_template is None
    assert Tokenizer.load(hf_folder(tmp_path, chat_template="C")).chat_template == "C"
    assert Tokenizer.load(hf_folder(tmp_path, chat_template=named)).chat_template == "D"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "J"}')
    assert Tokenizer.load(hf_folder(tmp_path, chat_template="C")).chat_template == "J"
    (tmp_path / "chat_template.jinja").write_text("F\n")
    assert Tokenizer.load(hf_folder(tmp_path, chat_template="C")).chat_template == "F\n"


def test_text_that_is_not_unicode_is_refused_by_name(tmp_path):
    tokenizer = Tokenizer.load(hf_folder(tmp_path))
    with pytest.raises(InvalidRequestError, match=r"surrogate.*character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(InvalidRequestError, match="must be a string"):
        tokenizer.encode_batch(["a", 3])  # type: ignore[list-item]


def test_missing_and_corrupt_files_are_named(tmp_path):
    files = ModelFiles("test", tmp_path, "hf")
    with pytest.raises(ModelNotFoundError, match=r"no tokenizer\.json"):
        Tokenizer.load(files)
    hf_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.load(files)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CorruptFileError, match=r"tokenizer\.json"):
        Tokenizer.load(files)


def test_byte_table_agrees_with_decode(tmp_path):
    tokenizer = Tokenizer.load(hf_folder(tmp_path))
    table = tokenizer.byte_table(skip_special_tokens=False)
    for token in range(tokenizer.vocab_size + 2):
        assert table[token].decode(errors="replace") == tokenizer.decode([token], skip_special_tokens=False)
    assert len(table) == tokenizer.vocab_size
    assert tokenizer.byte_table(skip_special_tokens=True)[tokenizer.eos_token_id] == b""


def test_a_byte_level_gguf_gives_the_same_ids_as_the_folder(tmp_path):
    folder = Tokenizer.load(hf_folder(tmp_path))
    tokenizer = Tokenizer.load(gpt2_gguf(tmp_path / "m.gguf", chat_template="C"))
    for text in TEXTS[:4]:
        text = text.replace("<think>", "")
        assert tokenizer.encode(text) == folder.encode(text)
    assert tokenizer.chat_template == "C"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "<|end|>")
    think = tokenizer.token_to_id("<think>")
    assert tokenizer.encode("<think>") == [think] and think not in tokenizer.special_token_ids


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["a", "Ġ", "12", "3", "4"]),
        ("smollm", ["a", "Ġ", "1", "2", "3", "4"]),
        ("qwen2", ["a", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["<s>", "a", "Ġ", "12", "3", "4"]),
        ("tekken", ["<s>", "a", "Ġ", "1", "2", "3", "4"]),
    ],
)
def test_digits_are_split_as_the_named_rules_say(tmp_path, pre, pieces):
    tokenizer = Tokenizer.load(gpt2_gguf(tmp_path / "m.gguf", pre=pre))
    assert [tokenizer.id_to_token(token) for token in tokenizer.encode("a 1234")] == pieces


def test_the_file_decides_whether_bos_is_added(tmp_path):
    plain = Tokenizer.load(gpt2_gguf(tmp_path / "a.gguf", pre="llama-bpe", add_bos_token=False))
    added = Tokenizer.load(gpt2_gguf(tmp_path / "b.gguf", add_bos_token=True, add_eos_token=True))
    assert plain.encode("") == []
    assert added.encode("") == [added.bos_token_id, added.eos_token_id]


def test_a_sentencepiece_gguf_joins_the_best_scored_neighbours(tmp_path):
    tokenizer = Tokenizer.load(spm_gguf(tmp_path / "m.gguf"))

    def pieces(text: str) -> list[str | None]:
        return [tokenizer.id_to_token(token) for token in tokenizer.encode(text, add_special_tokens=False)]

    assert pieces("hello") == ["\u2581", "he", "l", "lo"]  # "lo" scores above "ll"
    assert pieces("hell é") == ["\u2581", "hell", "\u2581", "<0xC3>", "<0xA9>"]
    assert tokenizer.encode("h")[0] == tokenizer.bos_token_id
    for text in ["hello", " hello  é\n", "日本 😀"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not tokenizer.is_byte_level


def test_without_a_space_prefix_text_begins_as_it_is(tmp_path):
    tokenizer = Tokenizer.load(spm_gguf(tmp_path / "m.gguf", add_space_prefix=False))
    assert tokenizer.decode(tokenizer.encode(" he")) == " he"
    assert tokenizer.decode(tokenizer.encode("he")) == "he"


def test_unknown_kinds_of_gguf_tokenizers_are_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match=r"'viking'.*smollm"):
        Tokenizer.load(gpt2_gguf(tmp_path / "a.gguf", pre="viking"))
    with pytest.raises(UnsupportedArchitectureError, match="'bert'"):
        Tokenizer.load(gguf_file(tmp_path / "b.gguf", "bert", ["a"], [1], scores=[0.0]))


def test_a_truncated_gguf_is_corrupt_wherever_it_ends(tmp_path):
    files = gpt2_gguf(tmp_path / "m.gguf", chat_template="C")
    data = files.path.read_bytes()
    assert open_gguf(files.path).decoded()["tokenizer.chat_template"] == "C"
    for size in [0, 3, 4, 20, *range(24, len(data) - 40, 97)]:
        files.path.write_bytes(data[:size])
        with pytest.raises(CorruptFileError, match="not a GGUF file"):
            open_gguf(files.path)


@pytest.mark.demo
def test_the_demo_tokenizer_splits_digits_and_finds_its_special_tokens():
    try:
        files = resolve_model("demo")
    except ModelNotFoundError as e:
        pytest.skip(str(e))
    tokenizer = Tokenizer.load(files)
    assert tokenizer.encode("Hello 123 wörld 😀") == [19556, 216, 33, 34, 35, 267, 29989, 400, 40303, 218]
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (49152, 2)
    assert tokenizer.special_token_ids == set(range(17))
    assert "<|im_start|>" in (tokenizer.chat_template or "")
