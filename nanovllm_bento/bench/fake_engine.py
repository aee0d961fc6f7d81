"""An engine process without a model: speaks the engine's protocol, and its tokens cost nothing. It imports no torch.

For benchmarks and tests of everything around the engine: what a request costs the HTTP side, many slow streams, engines
that die. Given as ServiceConfig.engine_module it takes engine/worker.py's place. Limits, vocabulary and end tokens are
the model's own; the text is a fixed one that begins at a place given by the prompt, so that a request has the same
tokens after a restart and mixed-up streams are seen.
"""

import itertools
import logging
import math
import os
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from nanovllm_bento import hub, log_format
from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.connections import Connections
from nanovllm_bento.engine.ipc_folder import end_with_owner
from nanovllm_bento.engine.messages import (
    DEADLINE_EXCEEDED,
    INVALID_REQUEST,
    Add,
    EngineArgs,
    EngineInfo,
    EngineStats,
    OutputItem,
    StepOutput,
    unpack_tokens,
)
from nanovllm_bento.engine.processes import name_process, on_sigterm, write_whole
from nanovllm_bento.engine.request import resolve_request
from nanovllm_bento.errors import InvalidRequestError, ModelNotFoundError, NanoVLLMError
from nanovllm_bento.sampling_params import SamplingParams
from nanovllm_bento.text.tokenizer import Tokenizer

logger = logging.getLogger("nanovllm_bento.bench.fake_engine")  # its __name__ is __main__

TEXT = "The quick brown fox jumps over the lazy dog while the old clock on the wall counts the hours of the day. "
_NUM_BLOCKS = 1 << 20


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the fake behaves; each field is read from NANOVLLM_FAKE_<NAME>."""

    tokens_per_second: float = 0.0
    """Of each sequence; 0: as fast as messages can be sent. All running sequences get their tokens in the same step."""
    tokens_per_step: int = 1
    output_tokens: int = 256
    """Tokens after which a sequence ends by itself ("stop"), unless it ignores that or has fewer max_tokens."""
    start_seconds: float = 0.0
    """Time until it is ready."""
    dies_after: int = 0
    """Tokens (of all sequences) after which the process ends itself as if the kernel had killed it; 0: never."""

    @classmethod
    def from_env(cls) -> "Behaviour":
        given = {n: os.environ.get(f"NANOVLLM_FAKE_{n.upper()}") for n in cls.__dataclass_fields__}
        return msgspec.convert({n: v for n, v in given.items() if v}, cls, strict=False)


@dataclass(slots=True)
class _Sequence:
    add: Add
    client: bytes
    order: tuple[int, int]
    num_prompt_tokens: int
    num_tokens: int
    """Output tokens so far."""
    offset: int
    """Where in the text its first token lies."""
    sampling: SamplingParams
    scheduled_at: float = 0.0


class FakeEngine:
    """The state of the fake: sequences that wait or run, and the clock of its steps."""

    def __init__(self, info: EngineInfo, text: list[int], eos_token_ids: list[int], behaviour: Behaviour) -> None:
        self.info, self.text, self.behaviour = info, text, behaviour
        self.eos = eos_token_ids[0] if eos_token_ids else 0
        self.waiting: dict[str, _Sequence] = {}
        self.running: dict[str, _Sequence] = {}
        self.step = 0
        self.next_step = 0.0
        self.prompt_tokens = self.generation_tokens = 0
        self._arrivals = itertools.count()

    @classmethod
    def of_model(cls, config: EngineConfig, behaviour: Behaviour) -> "FakeEngine":
        """With the limits and the vocabulary of config.model. Raises ModelError."""
        files = hub.resolve_model(config.model, config.revision)
        described = hub.load_config_dict(files)
        eos = hub.eos_token_ids(files)
        block_size = config.block_size
        info = EngineInfo(
            max_model_len=config.max_model_len or int(described.get("max_position_embeddings") or 4096),
            vocab_size=int(described["vocab_size"]),
            block_size=block_size,
            num_blocks=config.num_gpu_blocks_override or _NUM_BLOCKS,
            eos_token_ids=eos,
            max_num_seqs=config.max_num_seqs,
            scheduling_policy=config.scheduling_policy,
            dtype="none",
            device="fake",
            startup_seconds={},
        )
        try:
            text = Tokenizer.load(files).encode(TEXT, add_special_tokens=False)
        except ModelNotFoundError:  # a model of tests, without a tokenizer
            text = [token for token in range(min(100, info.vocab_size)) if token not in eos]
        return cls(info, text, eos, behaviour)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_requests_running=len(self.running),
            num_requests_waiting=len(self.waiting),
            num_blocks_used=sum(
                -(-(s.num_prompt_tokens + s.num_tokens) // self.info.block_size) for s in self.running.values()
            ),
            num_blocks=self.info.num_blocks,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
        )

    def add(self, message: Add, client: bytes) -> None:
        """Queue a request. Raises InvalidRequestError."""
        prompt = unpack_tokens(message.prompt_token_ids)
        if message.task != "generate":
            raise InvalidRequestError(f"The fake engine has no task {message.task!r}.")
        if message.priority and self.info.scheduling_policy != "priority":
            raise InvalidRequestError("priority needs scheduling_policy='priority'.", param="priority")
        self.waiting[message.request_id] = _Sequence(
            message,
            client,
            (message.priority, next(self._arrivals)),
            len(prompt),
            len(message.output_token_ids) // 4,
            sum(prompt) % len(self.text),
            resolve_request(prompt, message.sampling, self.info),
        )
        self.prompt_tokens += len(prompt)

    def abort(self, request_id: str) -> None:
        self.waiting.pop(request_id, None)
        self.running.pop(request_id, None)

    def requests_of(self, client: bytes) -> list[str]:
        return [seq.add.request_id for seq in (*self.running.values(), *self.waiting.values()) if seq.client == client]

    def due(self, now: float) -> float | None:
        """Seconds until the next step; None without work."""
        return max(0.0, self.next_step - now) if self.running or self.waiting else None

    def run_step(self, now: float) -> dict[bytes, list[OutputItem]]:
        """One step: items by client."""
        if self.waiting and len(self.running) < self.info.max_num_seqs:
            first = sorted(self.waiting.values(), key=lambda s: s.order)
            for seq in first[: self.info.max_num_seqs - len(self.running)]:
                seq.scheduled_at = now
                self.running[seq.add.request_id] = self.waiting.pop(seq.add.request_id)
        by_client: dict[bytes, list[OutputItem]] = defaultdict(list)
        for seq in list(self.running.values()):
            item = self._advance(seq)
            if item.finish_reason is not None:
                del self.running[item.request_id]
            by_client[seq.client].append(item)
        self.step += 1
        rate = self.behaviour.tokens_per_second / self.behaviour.tokens_per_step
        self.next_step = max(self.next_step, now - 1 / rate) + 1 / rate if rate else now
        if 0 < self.behaviour.dies_after <= self.generation_tokens:
            os.kill(os.getpid(), signal.SIGKILL)
        return by_client

    def _advance(self, seq: _Sequence) -> OutputItem:
        sampling, text = seq.sampling, self.text
        deadline = seq.add.deadline
        if deadline is not None and time.time() > deadline:
            why = "The request's deadline has passed."
            return OutputItem(seq.add.request_id, [], "error", error=why, error_code=DEADLINE_EXCEEDED)
        assert sampling.max_tokens is not None
        new: list[int] = []
        reason, stop_reason = None, None
        while len(new) < self.behaviour.tokens_per_step and reason is None:
            token = text[(seq.offset + seq.num_tokens) % len(text)]
            seq.num_tokens += 1
            if not sampling.ignore_eos and seq.num_tokens >= max(self.behaviour.output_tokens, sampling.min_tokens):
                token, reason = self.eos, "stop"
            elif token in (sampling.stop_token_ids or ()) and seq.num_tokens > sampling.min_tokens:
                reason, stop_reason = "stop", token
            elif seq.num_tokens >= sampling.max_tokens:
                reason = "length"
            new.append(token)
        self.generation_tokens += len(new)
        return OutputItem(seq.add.request_id, new, reason, stop_reason, scheduled_at=seq.scheduled_at)


class FakeServer:
    """Moves messages between the socket and the fake, as engine/worker.py's EngineServer does."""

    def __init__(self, engine: FakeEngine, socket: zmq.Socket[bytes], epoch: int, heartbeat_interval: float) -> None:
        self.engine, self.epoch = engine, epoch
        self.connections = Connections(
            engine, socket, epoch, heartbeat_interval, add=self._add, requests_of=engine.requests_of
        )
        self.draining = False

    def run(self) -> None:
        """Serve until drained."""
        engine = self.engine
        while not (self.draining and engine.due(0.0) is None):
            due = engine.due(time.monotonic())
            self.connections.wait(math.inf if due is None else due)
            self.connections.receive()
            now = time.monotonic()
            if engine.due(now) == 0:
                for client, items in engine.run_step(now).items():
                    self.connections.send(client, StepOutput(self.epoch, engine.step, items))
            self.connections.beat()

    def _add(self, client: bytes, message: Add) -> None:
        try:
            self.engine.add(message, client)
        except InvalidRequestError as e:
            item = OutputItem(message.request_id, [], "error", error=e.message, error_code=INVALID_REQUEST)
            self.connections.send(client, StepOutput(self.epoch, self.engine.step, [item]))


def main() -> None:
    """Entry point of the process; exit codes as engine/worker.py's."""
    args = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineArgs)
    log_format.set_up(args.log_format, "fake engine", level=args.log_level)
    folder = Path(args.folder)
    server: FakeServer | None = None

    def drain() -> None:
        if server is None:
            os._exit(0)
        server.draining = True

    on_sigterm(args.owner_pid, drain)
    end_with_owner(args.owner_pid, folder)
    name_process(folder / "engine.pid", os.getpid())
    socket: zmq.Socket[bytes] = zmq.Context().socket(zmq.ROUTER)
    socket.linger = 1000  # ms
    socket.set_hwm(0)
    socket.bind(f"ipc://{folder}/engine.sock")
    try:
        behaviour = Behaviour.from_env()
        engine = FakeEngine.of_model(EngineConfig.create(env={}, **args.config), behaviour)
    except (NanoVLLMError, msgspec.ValidationError) as e:
        write_whole(folder / "engine.error", str(e))
        logger.error("the fake engine cannot start: %s", e)
        sys.exit(2)
    time.sleep(behaviour.start_seconds)
    server = FakeServer(engine, socket, args.epoch, args.heartbeat_interval)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logger.info("ready: %s", behaviour)
    name_process(folder / "engine.ready", os.getpid())
    server.run()
    socket.close()


if __name__ == "__main__":
    main()
