"""Renders a conversation with the model's Jinja chat template, as transformers does, within Jinja's sandbox.

A template is code of whoever published the model: it sees plain data only, and any error it raises is the request's.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanovllm_bento.errors import CorruptFileError, InvalidRequestError, UnsupportedFieldError
from nanovllm_bento.text.tokenizer import Tokenizer

_PROBE = "nanovllm-probe"


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's part for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - declared so by Jinja

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template.

    source: Jinja text; None for a model without one. special_tokens: variables such as bos_token.
    Raises CorruptFileError for a template that does not compile.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str] | None = None) -> None:
        self._special_tokens = dict(special_tokens or {})
        self._takes_parts: bool | None = None
        self._template: jinja2.Template | None = None
        if source is not None:
            try:
                self._template = _environment().from_string(source)
                self._template.globals = dict(self._template.globals)  # a ChainMap is copied slowly at each rendering
            except (jinja2.TemplateError, RecursionError) as e:
                raise CorruptFileError(f"the model's chat template does not compile: {e}") from e

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatTemplate":
        """The template that came with a tokenizer."""
        return cls(tokenizer.chat_template, tokenizer.special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt's text; tokenize it with add_special_tokens=False, for the template writes BOS itself.

        messages: OpenAI's. A list of text parts as content is handed on if the template reads such lists, else joined
            with newlines; no content is "". A tool call's arguments may be a JSON string. kwargs: variables of the
            template, e.g. enable_thinking.
        Raises InvalidRequestError for what the template refuses or fails on, UnsupportedFieldError for a part that is
        not text.
        """
        if self._template is None:
            raise InvalidRequestError(
                "this model has no chat template, so it cannot serve chats. Use completions, or add a "
                "chat_template.jinja to the model's folder.",
                param="messages",
            )
        if "messages" in kwargs:
            raise InvalidRequestError("chat_template_kwargs must not hold messages.", param="chat_template_kwargs")
        variables = {**self._special_tokens, **kwargs}
        plain = [self._prepare(message, index) for index, message in enumerate(messages)]
        try:
            return self._template.render(
                {
                    "documents": None,
                    **variables,
                    "messages": plain,
                    "tools": tools or None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except Exception as e:  # the template is foreign code: whatever it fails on, it is this input
            detail = str(e) or type(e).__name__
            raise InvalidRequestError(
                f"the chat template cannot render these messages: {detail}", param="messages"
            ) from e

    def _prepare(self, message: Mapping[str, Any], index: int) -> dict[str, Any]:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(f"messages[{index}] must be an object with a role.", param="messages")
        prepared = dict(message)
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            texts = [_text_of(part, index) for part in content]
            parts = [{"type": "text", "text": text} for text in texts]
            prepared["content"] = parts if self._reads_parts() else "\n".join(texts)
        elif content is None:
            prepared["content"] = ""
        elif not isinstance(content, str):
            raise InvalidRequestError(
                f"messages[{index}].content must be a string or a list of parts, not {type(content).__name__}.",
                param="messages",
            )
        if prepared.get("reasoning") is not None:
            prepared.setdefault("reasoning_content", prepared["reasoning"])
        if prepared.get("tool_calls"):
            prepared["tool_calls"] = [_with_parsed_arguments(call, index) for call in prepared["tool_calls"]]
        return prepared

    def _reads_parts(self) -> bool:
        """Whether the template renders a list of text parts as its text, found by trying once."""
        if self._takes_parts is None:
            assert self._template is not None
            message = {"role": "user", "content": [{"type": "text", "text": _PROBE}]}
            try:
                text = self._template.render({**self._special_tokens, "messages": [message], "tools": None})
                self._takes_parts = _PROBE in text and "'type'" not in text and '"type"' not in text
            except Exception:  # a template for strings fails in any way it likes
                self._takes_parts = False
        return self._takes_parts


def _text_of(part: Any, index: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind is None:
        raise InvalidRequestError(f"messages[{index}].content has a part without a type.", param="messages")
    if kind != "text":
        raise UnsupportedFieldError(
            f"messages[{index}].content has a part of type {kind!r}; this model takes only text.", param="messages"
        )
    if not isinstance(part.get("text"), str):
        raise InvalidRequestError(f"messages[{index}].content has a text part without text.", param="messages")
    return part["text"]


def _with_parsed_arguments(call: Any, index: int) -> dict[str, Any]:
    """OpenAI sends a call's arguments as JSON text; templates expect the object."""
    if not isinstance(call, Mapping):
        raise InvalidRequestError(f"messages[{index}].tool_calls must hold objects.", param="messages")
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else dict(call)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(fmt: str) -> str:
    return datetime.now().strftime(fmt)
