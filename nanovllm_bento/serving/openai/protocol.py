"""The bodies of OpenAI's chat and text completion endpoints, as far as this version supports them.

A field is either supported, or accepted only with a value that changes nothing (``Neutral``), or refused by name:
nothing a client asks for is dropped in silence. vLLM's extra fields keep vLLM's names and meaning.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from nanovllm_bento.errors import SamplingParamsError
from nanovllm_bento.sampling_params import SamplingParams

MAX_N = 128
"""Choices per prompt, at most (as at OpenAI)."""
RESERVED_TEMPLATE_NAMES = frozenset({"messages", "add_generation_prompt", "tools", "documents", "self"})


class Body(BaseModel):
    """A JSON object whose every field is known and of the very type it should have."""

    model_config = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, eq=False)  # by identity: Annotated would take Neutral((0,)) and Neutral((False,)) for one
class Neutral:
    """A field that is not supported yet: null and these values, which change nothing, are all it takes."""

    values: tuple[Any, ...]

    def __get_pydantic_core_schema__(self, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: Any) -> JsonSchemaValue:
        return {"enum": [None, *self.values], "description": "Not supported yet: only values that change nothing."}

    def _check(self, value: Any) -> None:
        for neutral in self.values:
            if value == neutral and isinstance(value, bool) == isinstance(neutral, bool):
                return
        if value is not None:
            allowed = ", ".join(map(repr, (*self.values, None)))
            raise PydanticCustomError("unsupported_parameter", f"not supported yet; only {allowed} may be sent.")


Unsupported = Annotated[Any, Neutral(())]
Zero = Annotated[Any, Neutral((0,))]
One = Annotated[Any, Neutral((1,))]
No = Annotated[Any, Neutral((False,))]
Yes = Annotated[Any, Neutral((True,))]
Nothing = Annotated[Any, Neutral(([],))]
EmptyObject = Annotated[Any, Neutral(({},))]
Either = Annotated[Any, Neutral((True, False))]


def _invalid(message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_value", message.replace("{", "{{").replace("}", "}}"))


def _check_stop(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if value is None or (isinstance(value, list) and all(isinstance(s, str) for s in value)):
        return value
    raise _invalid("Input should be a string or an array of strings")


def _check_prompts(value: Any) -> list[str | list[int]]:
    """Any form of ``prompt`` as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        kinds = set(map(type, value))
        if kinds == {int}:
            return [value]
        if kinds == {str} or (kinds == {list} and all(set(map(type, ids)) <= {int} for ids in value)):
            return value
        if not value:
            raise _invalid("Input should hold at least one prompt")
    raise _invalid("Input should be a string, an array of strings, an array of token ids or an array of those arrays")


def _check_content(value: Any) -> Any:
    """A message's content: a string or a list of text parts."""
    for part in value if isinstance(value, list) else ():
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise _invalid("Input should be a string or an array of text parts")
        if part["type"] != "text":
            raise PydanticCustomError("unsupported_parameter", "only parts of type 'text' are supported.")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise _invalid('A text part should be {"type": "text", "text": string}')
    if not isinstance(value, str | list):
        raise _invalid("Input should be a string or an array of text parts")
    return value


def _check_template_kwargs(value: dict[str, Any] | None) -> dict[str, Any] | None:
    taken = RESERVED_TEMPLATE_NAMES & (value or {}).keys()
    if taken:
        raise _invalid(f"{', '.join(sorted(taken))} cannot be set here")
    return value


_STRING, _NULL = {"type": "string"}, {"type": "null"}
_STRINGS = {"type": "array", "items": _STRING}
_IDS = {"type": "array", "items": {"type": "integer"}}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _STRING},
    "required": ["type", "text"],
}


class SamplingFields(Body):
    """How to sample: OpenAI's fields and vLLM's extras. An absent field takes the model's generation_config's default
    (temperature, top_p, top_k, min_p), else SamplingParams' own."""

    temperature: float | None = Field(None, description="0 is greedy.")
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 or -1 keeps all tokens.")
    min_p: float | None = None
    n: int | None = Field(None, description=f"Choices per prompt, 1 to {MAX_N}.")
    seed: int | None = Field(None, description="0 to 2**64 - 1. Choice i uses seed + i.")
    stop: Annotated[
        list[str] | None, BeforeValidator(_check_stop), WithJsonSchema({"anyOf": [_STRING, _STRINGS, _NULL]})
    ] = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    repetition_penalty: One = None
    length_penalty: One = None
    logit_bias: EmptyObject = None
    bad_words: Nothing = None
    allowed_token_ids: Unsupported = None
    best_of: One = None
    use_beam_search: No = None
    include_stop_str_in_output: No = None
    spaces_between_special_tokens: Yes = None
    prompt_logprobs: Unsupported = None
    truncate_prompt_tokens: Unsupported = None
    structured_outputs: Unsupported = None

    def sampling(self, defaults: Mapping[str, Any], max_tokens: int | None) -> SamplingParams:
        """As SamplingParams; ``defaults`` fill what is absent. Raises SamplingParamsError."""
        names = self.model_fields_set & _SAMPLING_NAMES
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if given.get("n", 1) > MAX_N:
            raise SamplingParamsError(f"n must be at most {MAX_N}, got {given['n']}.", param="n")
        return SamplingParams(**{**defaults, **given, "max_tokens": max_tokens})


_SAMPLING_NAMES = frozenset(SamplingParams.__struct_fields__) & SamplingFields.model_fields.keys() - {"max_tokens"}


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="A last chunk tells the usage of the whole request.")
    continuous_usage_stats: No = None
    include_obfuscation: No = None


class GenerationRequest(SamplingFields):
    """What both endpoints take."""

    model: str | None = Field(None, description="A name in /v1/models; absent: the one that is served.")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream=true.")
    max_tokens: int | None = None
    user: str | None = Field(None, description="The client's name for its end user; has no effect.")
    safety_identifier: str | None = Field(None, description="As user; has no effect.")
    cache_salt: str | None = Field(None, description="Cached prompt prefixes are shared within one salt only.")
    priority: int | None = Field(None, ge=-(2**31), lt=2**31, description="Lower runs earlier (priority scheduling).")
    deadline_ms: int | None = Field(
        None,
        ge=1,
        le=2**53,
        description="Milliseconds after which the request ends with an error if it has not finished (ours).",
    )
    add_special_tokens: bool | None = None

    response_format: Annotated[Any, Neutral(({"type": "text"},))] = None
    return_token_ids: No = None
    return_tokens_as_token_ids: No = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def prompt_for_logs(self) -> Any:
        """What the access log shows where prompts are logged."""
        raise NotImplementedError


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[
        list[str | list[int]],
        BeforeValidator(_check_prompts),
        WithJsonSchema({"anyOf": [_STRING, _STRINGS, _IDS, {"type": "array", "items": _IDS}]}),
    ]
    max_tokens: int | None = Field(16, description="null: up to the context's end.")
    add_special_tokens: bool | None = Field(None, description="Default true.")

    echo: No = None
    suffix: Annotated[Any, Neutral(("",))] = None
    logprobs: Unsupported = None

    def to_sampling(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Raises SamplingParamsError."""
        return self.sampling(defaults, self.max_tokens)

    def prompt_for_logs(self) -> Any:
        return self.prompt


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | list[dict[str, Any]],
        BeforeValidator(_check_content),
        WithJsonSchema({"anyOf": [_STRING, {"type": "array", "items": _PART}]}),
    ]
    name: str | None = None
    tool_call_id: str | None = None

    tool_calls: Nothing = None
    function_call: Unsupported = None
    refusal: Unsupported = None
    annotations: Nothing = None
    audio: Unsupported = None

    def for_template(self) -> dict[str, Any]:
        """What a chat template sees of it: the fields that were given, other than null."""
        names = self.model_fields_set
        return {name: value for name in _MESSAGE_NAMES if name in names and (value := getattr(self, name)) is not None}


_MESSAGE_NAMES = tuple(ChatMessage.model_fields)


class ChatCompletionRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, description="Absent: up to the context's end.")
    max_completion_tokens: int | None = Field(None, description="OpenAI's newer name of max_tokens.")
    add_special_tokens: bool | None = Field(None, description="Default false: the template writes them.")
    add_generation_prompt: bool | None = Field(None, description="Default true.")
    chat_template_kwargs: Annotated[dict[str, Any] | None, AfterValidator(_check_template_kwargs)] = Field(
        None, description="Variables for the chat template, for example enable_thinking."
    )

    logprobs: No = None
    top_logprobs: Zero = None
    tools: Nothing = None
    tool_choice: Annotated[Any, Neutral(("none", "auto"))] = None
    parallel_tool_calls: Either = None
    functions: Nothing = None
    function_call: Annotated[Any, Neutral(("none", "auto"))] = None
    modalities: Annotated[Any, Neutral((["text"],))] = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    store: No = None
    metadata: EmptyObject = None
    service_tier: Annotated[Any, Neutral(("auto", "default"))] = None
    echo: No = None
    continue_final_message: No = None
    documents: Nothing = None
    chat_template: Unsupported = None

    def to_sampling(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Raises SamplingParamsError."""
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise SamplingParamsError(
                f"max_tokens={old} and max_completion_tokens={new} differ; send one of them.", param="max_tokens"
            )
        if new is not None and new < 1:
            raise SamplingParamsError(
                f"max_completion_tokens must be at least 1, got {new}.", param="max_completion_tokens"
            )
        return self.sampling(defaults, old if new is None else new)

    def prompt_for_logs(self) -> Any:
        return [message.for_template() for message in self.messages]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """Counts of tokens; the prompt counts once for all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> "Usage":
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        )


class _Choice(BaseModel):
    index: int
    logprobs: None = None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = Field(None, description="The stop string or stop token id that ended it (vLLM's).")


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(_Choice):
    message: AnswerMessage


class CompletionChoice(_Choice):
    text: str


class _Answer(BaseModel):
    id: str
    created: int = Field(description="Unix time in seconds.")
    model: str
    system_fingerprint: str | None = None
    usage: Usage


class ChatCompletion(_Answer):
    """The answer of POST /v1/chat/completions with stream=false."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class TextCompletion(_Answer):
    """The answer of POST /v1/completions with stream=false."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nanovllm_bento"
    max_model_len: int | None = Field(None, description="Tokens of prompt and output; null until the engine is ready.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error's body."""

    error: ErrorObject
