"""An engine that says what a test tells it to, a tokenizer with one token a byte, and a client on raw ASGI."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from nanovllm_bento.config import EngineConfig, ServiceConfig
from nanovllm_bento.engine.client import EVERY_STEP, OutputBuffer, Pace
from nanovllm_bento.engine.messages import EngineInfo, EngineStats, OutputItem
from nanovllm_bento.errors import EngineDeadError, EngineNotReadyError, ShuttingDownError
from nanovllm_bento.sampling_params import SamplingParams
from nanovllm_bento.serving.context import ServingContext, TextSide
from nanovllm_bento.text.chat_template import ChatTemplate
from nanovllm_bento.text.tokenizer import Tokenizer

EOS = 257
MODEL = "tiny"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' and not m.tool_call_id %}{{ raise_exception('no tool_call_id') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking %}<think>{% endif %}{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Token i is byte i; 256 begins and 257 ends a turn."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    backend = Backend(models.BPE({spelling[byte]: byte for byte in range(256)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return Tokenizer(backend, special_tokens={"eos_token": "<|im_end|>"}, chat_template=TEMPLATE)


class FakeEngine:
    """Answers every request with ``reply``, ``tokens_per_step`` tokens at a time, then ends as the real engine would.

    hold: requests wait here before their first token. dies_after: tokens after which the engine dies.
    serves_others: whether it is up while this client has not heard so.
    """

    def __init__(self, reply: str | list[int] = "Hello, world!", tokens_per_step: int = 1) -> None:
        self.reply = reply
        self.tokens_per_step = tokens_per_step
        self.is_ready = True
        self.serves_others = False
        self.failure: str | None = None
        self.hold: asyncio.Event | None = None
        self.dies_after: int | None = None
        self.all_aborted: str | None = None
        self.fails_with: Exception | None = None
        self.endless = False
        self.info = EngineInfo(
            max_model_len=512,
            vocab_size=258,
            block_size=16,
            num_blocks=64,
            eos_token_ids=[EOS],
            max_num_seqs=8,
            scheduling_policy="priority",
            dtype="float32",
            device="cpu",
            startup_seconds={},
        )
        self.stats = EngineStats()
        self.requests: dict[str, tuple[list[int], SamplingParams]] = {}
        self.options: dict[str, tuple[str, int]] = {}
        self.deadlines: dict[str, float | None] = {}
        self.folder: Path | None = None
        self.open: set[str] = set()
        self.most_open = 0
        self.aborted: list[str] = []
        self.changed = asyncio.Event()

    def make_room(self, tokens: int = 10**6) -> None:
        """Raise max_model_len and the cache to so many tokens."""
        self.info = msgspec.structs.replace(self.info, max_model_len=tokens, num_blocks=tokens // 16 + 1)

    @property
    def is_up(self) -> bool:
        return self.is_ready or self.serves_others

    @property
    def is_responsive(self) -> bool:
        return self.is_ready

    async def start(self) -> None:
        pass

    def abort_all(self, why: str) -> None:
        self.all_aborted = why
        if self.hold is not None:
            self.hold.set()

    async def close(self) -> None:
        pass

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        on_due: Callable[[], None],
        *,
        cache_salt: str = "",
        priority: int = 0,
        deadline: float | None = None,
        pace: Pace = EVERY_STEP,
        num_scored: int = 0,
    ) -> OutputBuffer:
        if not self.is_ready:
            raise EngineNotReadyError("The engine is being restarted.")
        assert request_id not in self.requests
        self.requests[request_id] = (list(prompt_token_ids), sampling)
        self.options[request_id] = (cache_salt, priority)
        self.deadlines[request_id] = deadline
        self.open.add(request_id)
        self.most_open = max(self.most_open, len(self.open))
        self._wake()

        def close() -> None:
            if request_id in self.open:
                self.open.discard(request_id)
                self.aborted.append(request_id)
                self._wake()
            task.cancel()

        buffer = OutputBuffer(pace, on_due, close)
        task = asyncio.create_task(self._feed(buffer, request_id, prompt_token_ids, sampling, num_scored))
        return buffer

    async def _feed(
        self,
        buffer: OutputBuffer,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        num_scored: int,
    ) -> None:
        try:
            if self.hold is not None:
                await self.hold.wait()
            if self.fails_with is not None:
                raise self.fails_with
            if self.all_aborted is not None:
                raise ShuttingDownError(self.all_aborted)
            if num_scored:
                self.open.discard(request_id)
                scored = prompt_token_ids[-num_scored:]
                logprobs, greedy = [-token / 100 for token in scored], [token % 2 == 0 for token in scored]
                item = OutputItem(request_id, [], "stop", num_cached_tokens=4, logprobs=logprobs, is_greedy=greedy)
                buffer.put(item)
                return
            async for item in self._items(request_id, sampling):
                if item.finish_reason is not None:
                    self.open.discard(request_id)
                buffer.put(item)
        except Exception as exc:
            buffer.fail(exc)
        finally:
            self._wake()

    async def _items(self, request_id: str, sampling: SamplingParams) -> AsyncIterator[OutputItem]:
        tokens = list(self.reply.encode()) if isinstance(self.reply, str) else list(self.reply)
        assert sampling.max_tokens is not None
        sent = 0
        while True:
            await asyncio.sleep(0)
            if self.all_aborted is not None:
                raise ShuttingDownError(self.all_aborted)
            new = (tokens * 2 if self.endless else tokens)[sent % len(tokens) :][: self.tokens_per_step]
            if self.dies_after is not None and sent + len(new) > self.dies_after:
                raise EngineDeadError("The engine died.")
            new = new[: sampling.max_tokens - sent]
            sent += len(new)
            reason, stop_reason = None, None
            if stops := [i for i, token in enumerate(new) if token in (sampling.stop_token_ids or ())]:
                new = new[: stops[0] + 1]
                reason, stop_reason = "stop", new[-1]
            elif sent == sampling.max_tokens:
                reason = "length"
            elif sent == len(tokens) and not self.endless and not sampling.ignore_eos:
                new, reason = [*new, EOS], "stop"
            yield OutputItem(request_id, new, reason, stop_reason, num_cached_tokens=4)
            if reason:
                return

    def _wake(self) -> None:
        self.stats.num_requests_running = len(self.open)
        self.stats.num_blocks_used, self.stats.num_blocks = len(self.open), self.info.num_blocks
        self.changed.set()
        self.changed = asyncio.Event()

    async def until(self, condition: Any) -> None:
        """Return when ``condition()`` holds, looked at whenever a request comes or goes."""
        async with asyncio.timeout(5):
            while not condition():
                await self.changed.wait()


def make_context(engine: FakeEngine, *, defaults: dict[str, Any] | None = None, **settings: Any) -> ServingContext:
    tokenizer = byte_tokenizer()
    text = TextSide(tokenizer, ChatTemplate.of(tokenizer), defaults or {})
    config = ServiceConfig.create(env={}, served_model_name=MODEL, **settings)
    return ServingContext(engine, EngineConfig.create(env={}, model=MODEL), config, text)


class Visit:
    """One HTTP request at the raw ASGI border, whose client can leave at any moment."""

    def __init__(self, app: Any, path: str, body: Any, headers: dict[str, str] | None = None) -> None:
        self.status: int | None = None
        self.body = b""
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        self._grew = asyncio.Event()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                (b"content-type", b"application/json"),
                *((name.lower().encode(), value.encode()) for name, value in (headers or {}).items()),
            ],
            "server": ("test", 80),
            "client": ("test", 1),
        }
        self.task = asyncio.create_task(app(scope, self._inbox.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.body += message.get("body", b"")
        self._grew.set()
        self._grew = asyncio.Event()

    async def until_text(self, text: bytes) -> None:
        """Return when the answer holds ``text``."""
        async with asyncio.timeout(5):
            while text not in self.body:
                await self._grew.wait()

    def disconnect(self) -> None:
        """Close the connection."""
        self._inbox.put_nowait({"type": "http.disconnect"})

    async def leave(self) -> None:
        """Close the connection and wait for the handler's end."""
        self.disconnect()
        async with asyncio.timeout(5):
            await self.task


def events(text: str) -> list[dict[str, Any]]:
    """The chunks of an event stream; the [DONE] at the end is checked for."""
    blocks = text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""], blocks[-3:]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]
