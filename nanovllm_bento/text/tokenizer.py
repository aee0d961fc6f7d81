"""The tokenizer of a model, on the Rust ``tokenizers`` library: text to ids and back, special tokens, chat template.

From a Hugging Face folder (tokenizer.json with tokenizer_config.json) it follows transformers' TokenizersBackend,
without importing transformers. From a GGUF file it is built of the file's metadata (text/gguf_tokenizer.py).
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from nanovllm_bento.errors import CorruptFileError, InvalidRequestError, ModelNotFoundError
from nanovllm_bento.hub import ModelFiles, read_json_object, token_text

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Encodes and decodes. ``special_tokens``: {"bos_token": text, ...}; ``chat_template``: Jinja source or None.

    Truncation and padding that a tokenizer.json may ask for are off.
    """

    def __init__(
        self, backend: Backend, *, special_tokens: dict[str, str] | None = None, chat_template: str | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = special_tokens or {}
        self.chat_template = chat_template
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        """Ids the tokenizer knows; the model's embedding may have more rows."""
        self._byte_tables: dict[bool, _ByteTable] = {}

    @classmethod
    def load(cls, files: ModelFiles) -> "Tokenizer":
        """The tokenizer of a model. Raises ModelNotFoundError, CorruptFileError or UnsupportedArchitectureError."""
        if files.format == "gguf":
            from nanovllm_bento.text.gguf_tokenizer import load_gguf_tokenizer

            return load_gguf_tokenizer(files.path)
        return _load_folder(files.path)

    @staticmethod
    def check_text(text: str) -> None:
        """Raises InvalidRequestError for what is no text, or not valid Unicode."""
        if not isinstance(text, str):
            raise InvalidRequestError(f"the prompt must be a string, got {type(text).__name__}.", param="prompt")
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise InvalidRequestError(
                f"the prompt is not valid Unicode: half a surrogate pair ({text[e.start]!r}) at character {e.start}.",
                param="prompt",
            ) from None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. Raises InvalidRequestError for a text that is not valid Unicode."""
        self.check_text(text)
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of each text, in parallel where there are several. Unlike ``encode`` it lets other threads run."""
        for text in texts:
            self.check_text(text)
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids. Ids the tokenizer does not know add nothing; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (byte-level: in GPT-2's byte alphabet)."""
        return self.backend.id_to_token(token_id)

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that decode() leaves out."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether each token is a string of bytes and the text their plain concatenation (GPT-2's scheme)."""
        decoder = component_state(self.backend.decoder)
        steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
        return [step.get("type") for step in steps] == ["ByteLevel"]

    def byte_table(self, skip_special_tokens: bool) -> "_ByteTable":
        """Maps an id to its bytes (none for an id that is unknown or skipped). Only for byte-level tokenizers."""
        assert self.is_byte_level
        if skip_special_tokens not in self._byte_tables:
            self._byte_tables[skip_special_tokens] = _ByteTable(self, skip_special_tokens)
        return self._byte_tables[skip_special_tokens]

    def is_byte_fallback(self, token_id: int) -> bool:
        """Whether the token is a single byte spelled like <0x0A> (SentencePiece)."""
        token = self.backend.id_to_token(token_id)
        return token is not None and len(token) == 6 and token.startswith("<0x") and token.endswith(">")


class _ByteTable(dict[int, bytes]):
    """id -> bytes of a byte-level vocabulary, filled as ids are asked for (all at once takes 0.1 s or more)."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_token_ids if skip_special_tokens else frozenset()

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""  # not kept, so the table never outgrows the vocabulary
        if token_id in self._skip:
            data = b""
        else:
            try:
                data = bytes([_BYTE_OF[char] for char in token])
            except KeyError:  # an added token, which is plain text
                data = token.encode()
        self[token_id] = data
        return data


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def component_state(component: Any) -> dict[str, Any]:
    """The JSON form of a part of a backend; {} for None."""
    return {} if component is None else json.loads(component.__getstate__())


def _load_folder(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFoundError(
            f"{folder} has no tokenizer.json. If it has a slow tokenizer's files, convert them once with "
            "transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as e:  # the library raises plain Exception
        raise CorruptFileError(f"{path} is not a tokenizer that can be read: {e}") from e
    config = read_json_object(folder / "special_tokens_map.json") | read_json_object(folder / "tokenizer_config.json")
    special_tokens = {name: text for name in SPECIAL_TOKEN_NAMES if (text := token_text(config.get(name)))}
    _add_tokens(backend, config, special_tokens)
    set_bos_eos(backend, special_tokens, config.get("add_bos_token"), config.get("add_eos_token"))
    return Tokenizer(backend, special_tokens=special_tokens, chat_template=_chat_template(folder, config))


def _add_tokens(backend: Backend, config: dict[str, Any], special_tokens: dict[str, str]) -> None:
    """Adds what tokenizer_config.json names and tokenizer.json lacks, in transformers' order."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    declared = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        token = AddedToken(entry["content"], **{flag: entry[flag] for flag in flags if flag in entry})
        old = known.get(token.content)
        if old is None or any(getattr(old, flag) != getattr(token, flag) for flag in flags):
            backend.add_tokens([token])
            known[token.content] = token
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    for text in [*special_tokens.values(), *filter(None, map(token_text, extra))]:
        if text not in known or not known[text].special:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
            known[text] = AddedToken(text, special=True, normalized=False)


def set_bos_eos(backend: Backend, special_tokens: dict[str, str], add_bos: bool | None, add_eos: bool | None) -> None:
    """Makes encode() add BOS and EOS as asked; None leaves what the backend does by itself."""
    if add_bos is None and add_eos is None:
        return
    present = backend.encode("").ids
    bos, eos = special_tokens.get("bos_token"), special_tokens.get("eos_token")
    if add_bos is None:
        add_bos = bos is not None and present[:1] == [backend.token_to_id(bos)]
    if add_eos is None:
        add_eos = eos is not None and present[-1:] == [backend.token_to_id(eos)]
    head = [bos] if add_bos and bos else []
    tail = [eos] if add_eos and eos else []
    single = [*(f"{token}:0" for token in head), "$A:0", *(f"{token}:0" for token in tail)]
    pair = [*single, *(f"{token}:1" for token in head), "$B:1", *(f"{token}:1" for token in tail)]
    ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys([*head, *tail])]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja before chat_template.json before tokenizer_config.json; of several, the one named default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise CorruptFileError(f"{file} is not UTF-8: {e}") from e
    template = read_json_object(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
