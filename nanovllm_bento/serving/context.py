"""What every endpoint of one API worker shares: the engine's client, the model's text side, limits and readiness."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanovllm_bento import hub
from nanovllm_bento.config import EngineConfig, ServiceConfig
from nanovllm_bento.engine.client import EngineClient
from nanovllm_bento.errors import EngineNotReadyError, InvalidRequestError, NanoVLLMError
from nanovllm_bento.serving.errors import OverloadedError
from nanovllm_bento.text.chat_template import ChatTemplate
from nanovllm_bento.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

LONG_TEXT = 4096
"""Characters above which text is tokenized in a thread, so that other requests' events are not held up."""
GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p")


@dataclass(slots=True)
class TextSide:
    """The model's tokenizer and chat template, and the sampling defaults of its generation_config (as in vLLM)."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, config: EngineConfig) -> "TextSide":
        """Find the model's files and read them. Raises ModelError."""
        files = hub.resolve_model(config.model, config.revision)
        generation = hub.load_generation_config(files)
        if generation.get("repetition_penalty") not in (None, 1, 1.0):
            logger.warning(
                "generation_config asks for repetition_penalty=%s, which is not supported yet and has no effect",
                generation["repetition_penalty"],
            )
        defaults = {name: generation[name] for name in GENERATION_DEFAULTS if generation.get(name) is not None}
        tokenizer = Tokenizer.load(files)
        return cls(tokenizer, ChatTemplate.of(tokenizer), defaults)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """The prompt of a conversation. Raises InvalidRequestError."""
        if "developer" not in (self.tokenizer.chat_template or ""):
            # OpenAI's newer name of system; a template that does not know it may drop the message in silence.
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        return self.chat_template.render(messages, **options)


class ServingContext:
    """State of one API worker. ``text`` is given in tests; otherwise ``start`` loads it."""

    def __init__(
        self,
        engine: EngineClient,
        engine_config: EngineConfig,
        service_config: ServiceConfig,
        text: TextSide | None = None,
    ) -> None:
        self.engine = engine
        self.engine_config = engine_config
        self.config = service_config
        self.model_name = service_config.served_model_name or engine_config.model
        self.created = int(time.time())
        self.num_open = 0
        self._failure: str | None = None
        self._text = text
        self._loading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the engine's client and load the text side beside it; returns before they are ready."""
        try:
            await self.engine.start()
        except NanoVLLMError as exc:  # raised, it would have BentoML start workers over and over
            self._fail(str(exc))
            return
        if self._text is None:
            self._loading = asyncio.create_task(self._load())

    async def _load(self) -> None:
        try:
            self._text = await asyncio.to_thread(TextSide.load, self.engine_config)
        except Exception as exc:
            self._fail(f"the model's tokenizer could not be loaded: {exc}")

    def _fail(self, reason: str) -> None:
        self._failure = reason
        logger.error("The service cannot start: %s", reason)

    async def close(self) -> None:
        """Abort what is open and let go of the engine."""
        if self._loading is not None:
            self._loading.cancel()
        await self.engine.close()

    @property
    def is_ready(self) -> bool:
        return self._text is not None and self.engine.is_ready

    @property
    def failure(self) -> str | None:
        """Why the service will never be ready, once that is certain."""
        return self._failure or self.engine.failure

    def check_ready(self) -> None:
        """Raises EngineNotReadyError unless requests are served now."""
        if not self.is_ready:
            raise EngineNotReadyError(f"The service is not ready: {self.failure or 'the engine is starting'}.")

    @property
    def text(self) -> TextSide:
        """Raises EngineNotReadyError while the service starts."""
        self.check_ready()
        assert self._text is not None
        return self._text

    @contextlib.contextmanager
    def admit(self, num_sequences: int) -> Iterator[None]:
        """Count sequences as open for the time of the context.

        Raises OverloadedError when max_waiting_requests are open, InvalidRequestError where it could never fit.
        """
        self.check_load(num_sequences)
        self.num_open += num_sequences
        try:
            yield
        finally:
            self.num_open -= num_sequences

    def check_load(self, num_sequences: int) -> None:
        """Raise what ``admit`` would raise now."""
        limit = self.config.max_waiting_requests
        if num_sequences > limit:
            raise InvalidRequestError(
                f"A request may hold at most {limit} sequences (prompts × n), not {num_sequences}."
            )
        if self.num_open + num_sequences > limit:
            raise OverloadedError(f"{self.num_open} requests are open here, of at most {limit}. Try again later.")

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; long ones are done off the event loop."""
        tokenizer = self.text.tokenizer
        if len(text) <= LONG_TEXT:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        # encode_batch releases the interpreter lock; encode would hold up the event loop from its thread.
        return (await asyncio.to_thread(tokenizer.encode_batch, [text], add_special_tokens=add_special_tokens))[0]

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], *, add_special_tokens: bool
    ) -> list[int]:
        """Token ids of a rendered conversation. Raises InvalidRequestError for what the template refuses."""
        length = sum(len(str(message["content"])) for message in messages)
        if length <= LONG_TEXT:
            prompt = self.text.render_chat(messages, options)
        else:
            prompt = await asyncio.to_thread(self.text.render_chat, messages, options)
        return await self.encode(prompt, add_special_tokens=add_special_tokens)

    async def encode_all(self, prompts: Sequence[str | list[int]], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of prompts, which may be token ids already."""
        return [
            await self.encode(p, add_special_tokens=add_special_tokens) if isinstance(p, str) else p for p in prompts
        ]
