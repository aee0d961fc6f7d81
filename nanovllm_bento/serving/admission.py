"""What is let in: bounds on open sequences, each caller's share of them, its rates, and the size of what it may send.

Every request passes ``check`` early, before anything is spent on it, and is counted by ``admit`` for as long as it is
open. Refusals are OverloadedError (429), DrainingError (503) and InvalidRequestError (400, for what can never fit).
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.errors import DeadlineExceededError, InvalidRequestError, PromptTooLongError, SamplingParamsError
from nanovllm_bento.serving.auth import ANONYMOUS, Caller
from nanovllm_bento.serving.errors import DrainingError, OverloadedError
from nanovllm_bento.serving.fairness import FairQueue
from nanovllm_bento.serving.ledger import Ledger

SHARE = 4
"""A key may have open SHARE times what is still free of max_waiting_requests: four fifths if it is alone, and however
many keys ask for all they can get, something is left for the next one (dynamic thresholds: Choudhury, Hahne 1998)."""
LOOKAHEAD = 4
"""One sequence for each LOOKAHEAD that the engine can run waits in the engine itself, so that it never runs dry."""


class Ticket:
    """One admitted request, as a context manager; it is counted as open inside."""

    __slots__ = ("_admission", "_caller", "_in_turn", "_num_prompt_tokens", "_num_sequences")

    def __init__(self, admission: "Admission", caller: Caller, num_sequences: int, num_prompt_tokens: int) -> None:
        self._admission = admission
        self._caller = caller
        self._num_sequences = num_sequences
        self._num_prompt_tokens = num_prompt_tokens
        self._in_turn = False

    def __enter__(self) -> "Ticket":
        self._admission._open(self._caller, self._num_sequences, self._num_prompt_tokens)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission._close(self._caller, self._num_sequences)
        if self._in_turn:
            assert self._admission.queue is not None
            self._admission.queue.leave(self._num_sequences)

    async def turn(self, priority: int | None = None, deadline: float | None = None) -> None:
        """Return when the request may go to the engine: at once, unless others of several callers wait for it too.

        priority: the request's own; None takes the caller's. deadline: a time.time(). Raises DeadlineExceededError
        where that has come first.
        """
        queue = self._admission.queue
        if queue is None or self._caller is ANONYMOUS:
            return
        priority = self._caller.priority if priority is None else priority
        try:
            async with asyncio.timeout(None if deadline is None else deadline - time.time()):
                await queue.enter(self._caller.name, priority, self._num_sequences)
                self._in_turn = True
        except TimeoutError:
            raise DeadlineExceededError("The request's deadline passed while it waited for its turn.") from None

    def charge(self, num_tokens: int) -> None:
        """Count output tokens against the caller's tokens a minute; what exceeds them holds its next requests back."""
        if num_tokens > 0:
            self._admission._charge(self._caller, num_tokens)


class Admission:
    """One worker's. folder: the IPC folder, where the workers of a service share callers' limits (ledger.py).

    max_num_seqs: what the engine runs at once; None lets everything go to the engine in the order it comes.
    """

    def __init__(
        self,
        config: ServiceConfig,
        *,
        folder: Path | None = None,
        max_num_seqs: int | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.config = config
        self.num_open = 0
        self.queue = None if max_num_seqs is None else FairQueue(max_num_seqs + max(1, max_num_seqs // LOOKAHEAD))
        self.is_draining = False
        self._open_by_name: dict[str, int] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._folder = folder
        self._ledger = ledger

    # -- requests -----------------------------------------------------------------------------------------------------

    def admit(self, caller: Caller, num_sequences: int, num_prompt_tokens: int = 0) -> Ticket:
        """A context manager that counts sequences (and the request, and its prompt's tokens) for ``caller``.

        Entering it raises OverloadedError, DrainingError, and InvalidRequestError for more than could ever be open.
        """
        return Ticket(self, caller, num_sequences, num_prompt_tokens)

    def check(self, caller: Caller, num_sequences: int, num_prompt_tokens: int = 0) -> None:
        """Raise what ``admit`` would raise now, and count nothing."""
        self._check_open(caller, num_sequences)
        if self._is_limited(caller):
            ledger = self._shared()
            with ledger:
                self._check_limits(ledger, caller, num_sequences, num_prompt_tokens)

    def _open(self, caller: Caller, num_sequences: int, num_prompt_tokens: int) -> None:
        self._check_open(caller, num_sequences)
        if self._is_limited(caller):
            ledger = self._shared()
            with ledger:
                requests, tokens = self._check_limits(ledger, caller, num_sequences, num_prompt_tokens)
                ledger.set_used(caller.name, requests + 1, tokens + num_prompt_tokens)
                ledger.add_open(caller.name, num_sequences)
        self.num_open += num_sequences
        if caller is not ANONYMOUS:
            self._open_by_name[caller.name] = self._open_by_name.get(caller.name, 0) + num_sequences
        self._idle.clear()

    def _close(self, caller: Caller, num_sequences: int) -> None:
        self.num_open -= num_sequences
        if caller is not ANONYMOUS:
            left = self._open_by_name[caller.name] - num_sequences
            if left:
                self._open_by_name[caller.name] = left
            else:
                del self._open_by_name[caller.name]
        if self._is_limited(caller):
            self._shared().add_open(caller.name, -num_sequences)
        if not self.num_open:
            self._idle.set()

    def _charge(self, caller: Caller, num_tokens: int) -> None:
        rates = self._rates(caller)
        if rates[1] is not None:
            with self._shared() as ledger:
                requests, tokens = ledger.used(caller.name, rates)
                ledger.set_used(caller.name, requests, tokens + num_tokens)

    # -- limits -------------------------------------------------------------------------------------------------------

    def _check_open(self, caller: Caller, num_sequences: int) -> None:
        if self.is_draining:
            raise DrainingError("The service is shutting down and takes no new requests.")
        limit = self.config.max_waiting_requests
        if num_sequences > limit:
            raise InvalidRequestError(
                f"A request may hold at most {limit} sequences (prompts × n), not {num_sequences}."
            )
        free = limit - self.num_open
        if num_sequences > free:
            raise OverloadedError(f"{self.num_open} requests are open here, of at most {limit}. Try again later.")
        if caller is not ANONYMOUS:
            own = self._open_by_name.get(caller.name, 0)
            if own and own + num_sequences > SHARE * free:
                raise OverloadedError(
                    f"{own} requests of this API key are open here, and the rest of the room is for others. "
                    "Try again later."
                )

    def _rates(self, caller: Caller) -> tuple[int | None, int | None]:
        """Requests and tokens a minute."""
        own = caller.limits
        return (
            self.config.requests_per_minute if own.requests_per_minute is None else own.requests_per_minute,
            self.config.tokens_per_minute if own.tokens_per_minute is None else own.tokens_per_minute,
        )

    def _max_concurrency(self, caller: Caller) -> int | None:
        own = caller.limits.max_concurrency
        return self.config.max_concurrency_per_key if own is None else own

    def _is_limited(self, caller: Caller) -> bool:
        return self._max_concurrency(caller) is not None or self._rates(caller) != (None, None)

    def _shared(self) -> Ledger:
        if self._ledger is None:
            self._ledger = Ledger(self._folder)
        return self._ledger

    def _check_limits(
        self, ledger: Ledger, caller: Caller, num_sequences: int, num_prompt_tokens: int
    ) -> tuple[float, float]:
        """Requests and tokens that the caller has used of its minute. With the ledger's lock."""
        most = self._max_concurrency(caller)
        whose = "of this API key" if caller is not ANONYMOUS else "here"
        if most is not None:
            if num_sequences > most:
                raise InvalidRequestError(
                    f"A request {whose} may hold at most {most} sequences (prompts × n), not {num_sequences}."
                )
            if (num_open := ledger.num_open(caller.name)) + num_sequences > most:
                raise OverloadedError(f"{num_open} requests {whose} are open, of at most {most}. Try again later.")
        rates = self._rates(caller)
        requests, tokens = used = ledger.used(caller.name, rates)
        for what, limit, excess in (
            ("requests", rates[0], requests + 1 - (rates[0] or 0)),
            # A prompt longer than a minute's worth passes once nothing is used.
            ("tokens", rates[1], tokens + min(num_prompt_tokens or 1, rates[1] or 0) - (rates[1] or 0)),
        ):
            if limit is not None and excess > 1e-6:
                message = f"The limit of {limit} {what} a minute {whose} is used up."
                raise OverloadedError(message, retry_after=60.0 * excess / limit)
        return used

    # -- the end ------------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Refuse every later request with DrainingError; open ones go on."""
        self.is_draining = True

    async def drained(self, timeout: float | None = None) -> bool:
        """Wait until nothing is open, ``timeout`` seconds at most; whether nothing is."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            pass
        return not self.num_open

    def close(self) -> None:
        """Let go of the shared table."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    # -- what is sent -------------------------------------------------------------------------------------------------

    def check_messages(self, num_messages: int) -> None:
        """Raises InvalidRequestError for too long a conversation."""
        if num_messages > self.config.max_messages:
            raise InvalidRequestError(
                f"A conversation may have at most {self.config.max_messages} messages, not {num_messages}.",
                param="messages",
            )

    def check_stop(self, stops: Sequence[str]) -> None:
        """Raises SamplingParamsError for too many stop strings, or too long a one."""
        most, longest = self.config.max_stop_strings, self.config.max_stop_chars
        if len(stops) > most:
            raise SamplingParamsError(f"stop may hold at most {most} strings, not {len(stops)}.", param="stop")
        for stop in stops:
            if len(stop) > longest:
                raise SamplingParamsError(
                    f"A stop string may have at most {longest} characters, not {len(stop)}.", param="stop"
                )

    def check_prompt_chars(
        self, num_chars: int, max_model_len: int, longest_token: Callable[[], int], param: str = "prompt"
    ) -> None:
        """Refuse a text that cannot fit before it is tokenized, which costs the most of all that a worker does.

        longest_token: characters of the vocabulary's longest token, asked for only if no limit is configured.
        Raises PromptTooLongError.
        """
        most = self.config.max_prompt_chars
        if most is None:
            if num_chars <= max_model_len:
                return
            most = max_model_len * longest_token()
        if num_chars > most:
            raise PromptTooLongError(
                f"The prompt has {num_chars} characters, but {most} at most can be served (max_model_len="
                f"{max_model_len} tokens).",
                param=param,
            )
