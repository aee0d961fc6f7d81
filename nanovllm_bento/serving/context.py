"""What every endpoint of one API worker shares: the engine's client, the model's text side, limits and readiness."""

import asyncio
import gc
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovllm_bento import hub
from nanovllm_bento.config import EngineConfig, ServiceConfig
from nanovllm_bento.engine.client import EngineClient
from nanovllm_bento.errors import DeadlineExceededError, EngineNotReadyError, NanoVLLMError
from nanovllm_bento.serving.admission import Admission, Ticket
from nanovllm_bento.serving.auth import Caller, current_caller
from nanovllm_bento.serving.errors import CLIENT_LEFT, DrainingError
from nanovllm_bento.serving.exchange import REFUSED, TRACED_PATHS, Exchange
from nanovllm_bento.serving.logs import AccessLog
from nanovllm_bento.serving.metrics import Metrics
from nanovllm_bento.serving.pacing import AdaptivePace, pace_of
from nanovllm_bento.serving.telemetry import Tracing
from nanovllm_bento.text.chat_template import ChatTemplate
from nanovllm_bento.text.pieces import PieceCache, are_independent
from nanovllm_bento.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

LONG_TEXT = 4096
"""Characters above which text is tokenized in a thread, so that other requests' events are not held up."""
GC_THRESHOLDS = (50_000, 20, 100)
"""Objects between collections; what one request leaves behind is freed without the collector."""
_FOLLOW_SECONDS = 10.0
"""How long a request waits for its worker where the engine serves already; workers start within seconds of another."""
_MAX_FOLLOWING = 256
"""Requests that wait so at a time. Their bodies are held meanwhile, and no limit of keys counts them yet."""
GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p")


@dataclass(slots=True)
class TextSide:
    """The model's tokenizer and chat template, and the sampling defaults of its generation_config (as in vLLM)."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    _longest_token: int = 0
    _pieces: PieceCache | None = field(init=False)

    def __post_init__(self) -> None:
        self._pieces = PieceCache(self.tokenizer) if are_independent(self.tokenizer) else None

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

    def longest_token(self) -> int:
        """Characters of the vocabulary's longest token."""
        if not self._longest_token:
            self._longest_token = max(map(len, self.tokenizer.backend.get_vocab()), default=1)
        return self._longest_token

    def render_chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """The prompt of a conversation. Raises InvalidRequestError."""
        if "developer" not in (self.tokenizer.chat_template or ""):
            # OpenAI's newer name of system; a template that does not know it may drop the message in silence.
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        return self.chat_template.render(messages, **options)

    def encode_chat(self, prompt: str, last_message: str, *, add_special_tokens: bool, salt: str) -> list[int]:
        """Token ids of a rendered conversation, whose last message alone is new. Raises InvalidRequestError."""
        if self._pieces is None or add_special_tokens:
            return self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        return self._pieces.encode(prompt, new=last_message.strip(), salt=salt)


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
        self.admission = Admission(service_config)
        self.metrics = Metrics(service_config, self.model_name, engine_config=engine_config)
        self.access_log = AccessLog.create(service_config)
        self.tracing: Tracing | None = None
        self.pace = pace_of(service_config.stream_interval, service_config.max_stream_delay_ms)
        self._failure: str | None = None
        self._text = text
        self._tasks: list[asyncio.Task[None]] = []
        self._num_following = 0

    async def start(self) -> None:
        """Start the engine's client and load the text side beside it; returns before they are ready."""
        try:
            await self.engine.start()
            self.tracing = Tracing.create(self.config)
            self._share(self.engine.folder)
        except (NanoVLLMError, OSError) as exc:  # raised, it would have BentoML start workers over and over
            self._fail(str(exc))
            return
        if isinstance(self.pace, AdaptivePace):
            self.pace.start()
        self._tasks.append(asyncio.create_task(self.metrics.follow(self.engine)))
        if self._text is None:
            self._tasks.append(asyncio.create_task(self._load()))

    def _share(self, folder: Path | None) -> None:
        """Take part in what the workers of the service count together."""
        self.admission = Admission(self.config, folder=folder, max_num_seqs=self.engine_config.max_num_seqs)
        if folder is not None:
            self.metrics.open(folder)

    async def _load(self) -> None:
        try:
            text = await asyncio.to_thread(TextSide.load, self.engine_config)
        except Exception as exc:
            self._fail(f"the model's tokenizer could not be loaded: {exc}")
            return
        gc.collect()
        gc.freeze()  # what start-up made stays; no collection need look at it again
        gc.set_threshold(*GC_THRESHOLDS)
        self._text = text

    def _fail(self, reason: str) -> None:
        self._failure = reason
        logger.error("The service cannot start: %s", reason)

    async def drain(self, grace: float) -> None:
        """Refuse new requests; give running ones ``grace`` seconds to finish, then end them with an error."""
        self.admission.drain()
        logger.info("draining: %d requests are open", self.admission.num_open)
        if not await self.admission.drained(grace):
            logger.warning("%d requests have not finished in %g seconds", self.admission.num_open, grace)
            self.engine.abort_all("The service is shutting down.")

    async def close(self) -> None:
        """Abort what is open and let go of the engine."""
        for task in self._tasks:
            task.cancel()
        if isinstance(self.pace, AdaptivePace):
            self.pace.stop()
        await self.engine.close()
        self.metrics.close()
        self.admission.close()
        if self.tracing is not None:
            await self.tracing.close()

    def render_metrics(self) -> bytes:
        """What /metrics says."""
        ready = self.engine.is_ready
        return self.metrics.render(self.engine.stats if ready else None, self.engine.info if ready else None)

    @property
    def num_open(self) -> int:
        """Sequences that are open here."""
        return self.admission.num_open

    @property
    def is_ready(self) -> bool:
        """Whether requests are served."""
        return self._text is not None and self.engine.is_ready and not self.admission.is_draining

    @property
    def is_healthy(self) -> bool:
        """Whether requests should be sent here: ready, and the engine has been heard of lately."""
        return self.is_ready and self.engine.is_responsive

    @property
    def failure(self) -> str | None:
        """Why the service will never be ready, once that is certain."""
        return self._failure or self.engine.failure

    def check_ready(self) -> None:
        """Raises DrainingError or EngineNotReadyError unless requests are served now."""
        if self.admission.is_draining:
            raise DrainingError("The service is shutting down and takes no new requests.")
        if not self.is_ready:
            why = (self.failure or "the engine is starting").rstrip(".")
            raise EngineNotReadyError(f"The service is not ready: {why}.")

    async def follow(self, deadline: float | None = None) -> None:
        """Return once requests are served here. Only waits where the engine serves already: the service is ready, and
        this worker about to be. deadline: a time.time().

        Raises DrainingError, EngineNotReadyError or, at ``deadline``, DeadlineExceededError.
        """
        if not self.is_ready and self._num_following < _MAX_FOLLOWING and self.engine.is_up:
            patience = _FOLLOW_SECONDS if deadline is None else min(_FOLLOW_SECONDS, deadline - time.time())
            until = time.monotonic() + patience
            self._num_following += 1
            try:
                while not (self.is_ready or self.failure or self.admission.is_draining) and time.monotonic() < until:
                    await asyncio.sleep(0.02)
            finally:
                self._num_following -= 1
            if not self.is_ready and deadline is not None and time.time() >= deadline:
                raise DeadlineExceededError("The request's deadline passed while the service was starting.")
        self.check_ready()

    @property
    def text(self) -> TextSide:
        """Raises EngineNotReadyError while the service starts."""
        self.check_ready()
        assert self._text is not None
        return self._text

    def admit(self, num_sequences: int, caller: Caller | None = None, num_prompt_tokens: int = 0) -> Ticket:
        """Counts sequences as open for the time of the context; see Admission.admit. caller: by default the one whose
        request this task serves."""
        return self.admission.admit(caller or current_caller.get(), num_sequences, num_prompt_tokens)

    @property
    def logs_prompts(self) -> bool:
        """Whether an exchange is to have its prompt."""
        return self.access_log is not None and self.access_log.prompts

    def ended(self, exchange: Exchange) -> None:
        """Tell of a request that has ended: in the metrics, and in the access log and the traces where asked for."""
        scope = exchange.scope
        if REFUSED in scope:
            return
        self.refused(exchange)
        if self.tracing is not None and scope["path"] in TRACED_PATHS:
            self.tracing.record(
                scope["headers"],
                exchange.request_id,
                self.model_name,
                exchange.arrived,
                exchange.sequences,
                exchange.sampling,
                error=exchange.error,
            )

    def refused(self, exchange: Exchange) -> None:
        """As ``ended``, of a request that came to no route: no span is made of it."""
        if exchange.status >= 400 and exchange.status != CLIENT_LEFT:
            self.metrics.refused(exchange.status)
        if self.access_log is not None:
            self.access_log.write(
                exchange.request_id,
                exchange.scope["path"],
                exchange.status,
                exchange.arrived,
                exchange.sequences,
                caller=exchange.caller.name,
                error=exchange.error,
                prompt=exchange.prompt,
            )

    async def encode(self, text: str, *, add_special_tokens: bool, param: str = "prompt") -> list[int]:
        """Token ids of a text; long ones are done off the event loop. Raises PromptTooLongError."""
        text_side = self.text
        self._check_length(text_side, text, param)
        tokenizer = text_side.tokenizer
        if len(text) <= LONG_TEXT:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        # encode_batch releases the interpreter lock; encode would hold up the event loop from its thread.
        return (await asyncio.to_thread(tokenizer.encode_batch, [text], add_special_tokens=add_special_tokens))[0]

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        *,
        add_special_tokens: bool,
        salt: str = "",
    ) -> list[int]:
        """Token ids of a rendered conversation. Raises InvalidRequestError for what the template refuses.

        salt: what is kept of the texts for the next time is found again under the same salt only.
        """
        self.admission.check_messages(len(messages))
        text_side = self.text
        length = sum(len(str(message["content"])) for message in messages)
        if length > LONG_TEXT:
            prompt = await asyncio.to_thread(text_side.render_chat, messages, options)
        else:
            prompt = text_side.render_chat(messages, options)
        if len(prompt) > LONG_TEXT:
            return await self.encode(prompt, add_special_tokens=add_special_tokens, param="messages")
        self._check_length(text_side, prompt, "messages")
        last = messages[-1]["content"]
        return text_side.encode_chat(
            prompt, last if isinstance(last, str) else "", add_special_tokens=add_special_tokens, salt=salt
        )

    def _check_length(self, text_side: TextSide, text: str, param: str) -> None:
        self.admission.check_prompt_chars(len(text), self.engine.info.max_model_len, text_side.longest_token, param)

    async def encode_all(self, prompts: Sequence[str | list[int]], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of prompts, which may be token ids already."""
        return [
            await self.encode(p, add_special_tokens=add_special_tokens) if isinstance(p, str) else p for p in prompts
        ]
