"""The handlers of OpenAI's endpoints: body in, one answer or a stream of chunks out.

They are plain ASGI applications, so that nothing they do not need stands between them and the server: see front.py.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from nanovllm_bento import log_format
from nanovllm_bento.errors import DeadlineExceededError, InvalidRequestError, ModelNotServedError
from nanovllm_bento.sampling_params import SamplingParams
from nanovllm_bento.serving.admission import Ticket
from nanovllm_bento.serving.context import ServingContext, TextSide
from nanovllm_bento.serving.errors import (
    CLIENT_LEFT,
    ClientDisconnectedError,
    error_event,
    error_object,
    invalid_body,
)
from nanovllm_bento.serving.exchange import Exchange
from nanovllm_bento.serving.generation import (
    WHOLE_ANSWER,
    Completion,
    Delta,
    Job,
    plan_jobs,
    run_jobs,
)
from nanovllm_bento.serving.logs import random_hex
from nanovllm_bento.serving.openai.chunks import ChunkEncoder, usage_of, whole_answer
from nanovllm_bento.serving.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    ModelCard,
)
from nanovllm_bento.serving.streaming import (
    DONE,
    EventSender,
    Headers,
    read_body,
    send_whole,
    until_disconnect,
)

RequestT = TypeVar("RequestT", bound=GenerationRequest)

JSON = (b"content-type", b"application/json")


@dataclass(slots=True)
class Plan:
    """A checked request: its jobs, and what the answer repeats. ``num_prompt_tokens`` counts each prompt once."""

    request_id: str
    created: int
    model: str
    jobs: list[Job]
    num_prompts: int
    num_prompt_tokens: int
    chat: bool
    text: TextSide
    exchange: Exchange

    @property
    def num_choices(self) -> int:
        return len(self.jobs) // self.num_prompts

    def usage(self, num_tokens: Sequence[int], num_cached_tokens: Sequence[int]) -> dict[str, Any]:
        """From each job's counts; of a prompt's choices the first tells what the cache gave."""
        return usage_of(self.num_prompt_tokens, sum(num_tokens), sum(num_cached_tokens[:: self.num_choices]))


class OpenAIEndpoints:
    """Bound to one worker's context. Every handler answers errors itself, in OpenAI's shape."""

    def __init__(self, context: ServingContext) -> None:
        self.context = context

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/chat/completions"""
        await self._serve(scope, receive, send, ChatCompletionRequest, self._plan_chat)

    async def completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/completions"""
        await self._serve(scope, receive, send, CompletionRequest, self._plan_completion)

    def model_card(self, name: str | None = None) -> ModelCard:
        """The served model. Raises ModelNotServedError for another name."""
        self._check_model(name)
        length = self.context.engine.info.max_model_len if self.context.is_ready else None
        return ModelCard(id=self.context.model_name, created=self.context.created, max_model_len=length)

    def _check_model(self, name: str | None) -> None:
        served = self.context.model_name
        if name is not None and name != served:
            raise ModelNotServedError(f"The model {name!r} is not served here; {served!r} is.", param="model")

    # -- one exchange -------------------------------------------------------------------------------------------------

    async def _serve(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        kind: type[RequestT],
        plan_it: Callable[[RequestT, Exchange], Awaitable[Plan]],
    ) -> None:
        exchange = Exchange.of(scope)
        log_format.request_id.set(exchange.request_id)
        headers = [(b"x-request-id", exchange.request_id.encode())]
        events = EventSender(send, headers)
        try:
            body = self._parse(kind, await read_body(receive))
            if self.context.logs_prompts:
                exchange.prompt = body.prompt_for_logs()
            if not self.context.is_ready:
                await until_disconnect(receive, self.context.follow(_deadline(body, exchange)))
            plan = await plan_it(body, exchange)
            if body.stream:
                await until_disconnect(receive, self._stream(plan, events, include_usage=body.include_usage))
            else:
                answer = await until_disconnect(receive, self._complete(plan))
                await send_whole(send, 200, [JSON, *headers], answer)
        except ClientDisconnectedError:
            if not events.started:
                exchange.status = CLIENT_LEFT
                await send_whole(send, CLIENT_LEFT, headers, b"")  # nobody reads it, but layers around may wait for it
        except asyncio.CancelledError:
            exchange.status = CLIENT_LEFT
            raise
        except Exception as exc:
            await self._fail(exchange, exc, send, events, headers)
        finally:
            self.context.ended(exchange)

    async def _fail(
        self, exchange: Exchange, exc: Exception, send: Send, events: EventSender, headers: Headers
    ) -> None:
        """Tell the client of an error: by the status, or in an event if the answer has begun."""
        status, answer, more = error_object(exc)
        exchange.error = answer["error"]["code"] or answer["error"]["type"]
        if isinstance(exc, DeadlineExceededError):
            self.context.metrics.deadline_exceeded()
        if events.started:
            if not events.finished:
                await events.send(error_event(exc), last=True)
            return
        exchange.status = status
        extra = [(name.lower().encode(), value.encode("latin-1")) for name, value in more.items()]
        await send_whole(send, status, [JSON, *extra, *headers], msgspec.json.encode(answer))

    # -- from body to plan --------------------------------------------------------------------------------------------

    def _parse(self, kind: type[RequestT], data: bytes) -> RequestT:
        try:
            body = kind.model_validate_json(data)
        except ValidationError as exc:
            raise invalid_body(exc) from None
        if body.stream_options is not None and not body.stream:
            raise InvalidRequestError("stream_options needs stream=true.", param="stream_options")
        self._check_model(body.model)
        return body

    async def _plan_chat(self, body: ChatCompletionRequest, exchange: Exchange) -> Plan:
        sampling = self._sampling(body, 1, exchange)
        messages = [message.for_template() for message in body.messages]
        options = dict(body.chat_template_kwargs or {})
        options["add_generation_prompt"] = body.add_generation_prompt is not False
        salt = exchange.caller.salt(body.cache_salt)
        special = bool(body.add_special_tokens)
        ids = await self.context.encode_chat(messages, options, add_special_tokens=special, salt=salt)
        return self._plan("chatcmpl-", body, [ids], sampling, salt, exchange, param="messages")

    async def _plan_completion(self, body: CompletionRequest, exchange: Exchange) -> Plan:
        sampling = self._sampling(body, len(body.prompt), exchange)
        special = body.add_special_tokens is not False
        prompts = await self.context.encode_all(body.prompt, add_special_tokens=special)
        salt = exchange.caller.salt(body.cache_salt)
        return self._plan("cmpl-", body, prompts, sampling, salt, exchange, param="prompt")

    def _sampling(
        self, body: ChatCompletionRequest | CompletionRequest, num_prompts: int, exchange: Exchange
    ) -> SamplingParams:
        """The request's sampling parameters; what can be refused before its text is looked at is refused here."""
        sampling = body.to_sampling(self.context.text.sampling_defaults)
        admission = self.context.admission
        admission.check(exchange.caller, num_prompts * sampling.n)
        if sampling.stop:
            admission.check_stop(sampling.stop_strings)
        return sampling

    def _plan(
        self,
        prefix: str,
        body: GenerationRequest,
        prompts: list[list[int]],
        sampling: SamplingParams,
        cache_salt: str,
        exchange: Exchange,
        *,
        param: str,
    ) -> Plan:
        info = self.context.engine.info
        exchange.sampling = sampling
        request_id = prefix + random_hex(12)
        jobs = plan_jobs(
            request_id,
            prompts,
            sampling,
            info,
            param=param,
            cache_salt=cache_salt,
            priority=exchange.caller.effective_priority(body.priority, info.scheduling_policy),
            deadline=_deadline(body, exchange),
        )
        return Plan(
            request_id,
            int(time.time()),
            self.context.model_name,
            jobs,
            len(prompts),
            sum(map(len, prompts)),
            param == "messages",
            self.context.text,
            exchange,
        )

    # -- from plan to answer ------------------------------------------------------------------------------------------

    async def _turn(self, plan: Plan, ticket: Ticket) -> None:
        """Wait until the request may go to the engine; its jobs are watched from here on."""
        metrics, n = self.context.metrics, plan.num_choices
        watched = [
            metrics.request(
                len(job.prompt_token_ids),
                plan.exchange.arrived,
                max_tokens=job.sampling.max_tokens,
                n=0 if i % n else n,
                held=True,
            )
            for i, job in enumerate(plan.jobs)
        ]
        plan.exchange.sequences = watched
        for job, watch in zip(plan.jobs, watched, strict=True):
            job.metrics = watch
        try:
            by_priority = self.context.engine.info.scheduling_policy == "priority"
            await ticket.turn(plan.jobs[0].priority if by_priority else None, plan.jobs[0].deadline)
        except BaseException as exc:
            for watch in watched:
                watch.finish(time.monotonic(), "error" if isinstance(exc, DeadlineExceededError) else "abort")
            raise
        for watch in watched:
            watch.submitted()

    async def _complete(self, plan: Plan) -> bytes:
        """The encoded answer of a request without stream."""
        completions = [Completion() for _ in plan.jobs]
        context = self.context

        def add(index: int, delta: Delta) -> None:
            completions[index].add(delta)

        with context.admit(len(plan.jobs), plan.exchange.caller, plan.num_prompt_tokens) as ticket:
            try:
                await self._turn(plan, ticket)
                await run_jobs(context.engine, plan.text.tokenizer, plan.jobs, add, pace=WHOLE_ANSWER)
            finally:
                ticket.charge(sum(len(c.token_ids) for c in completions))
        num_cached = [c.num_cached_tokens for c in completions]
        return whole_answer(
            completions,
            chat=plan.chat,
            request_id=plan.request_id,
            created=plan.created,
            model=plan.model,
            usage=plan.usage([len(c.token_ids) for c in completions], num_cached),
        )

    async def _stream(self, plan: Plan, events: EventSender, *, include_usage: bool) -> None:
        """Send the events of a request with stream."""
        context = self.context
        answer = _StreamedAnswer(plan, include_usage=include_usage)

        def send(index: int, delta: Delta) -> asyncio.Future[None] | None:
            event = answer.event(index, delta)
            return events.push(event, last=not answer.num_running) if event else None

        with context.admit(len(plan.jobs), plan.exchange.caller, plan.num_prompt_tokens) as ticket:
            try:
                await self._turn(plan, ticket)
                await run_jobs(context.engine, plan.text.tokenizer, plan.jobs, send, pace=context.pace)
            finally:
                ticket.charge(sum(answer.num_tokens))


class _StreamedAnswer:
    """Makes events of the deltas of a plan's jobs, and knows which of those still run."""

    def __init__(self, plan: Plan, *, include_usage: bool) -> None:
        self.plan, self.include_usage = plan, include_usage
        self.num_tokens, self.num_cached = [0] * len(plan.jobs), [0] * len(plan.jobs)
        self.num_running = len(plan.jobs)
        self._is_new = [True] * len(plan.jobs)
        self._encoder = ChunkEncoder(
            chat=plan.chat,
            request_id=plan.request_id,
            created=plan.created,
            model=plan.model,
            include_usage=include_usage,
        )

    def event(self, index: int, delta: Delta) -> bytes:
        """What there is to send of job ``index``; maybe nothing. Behind the last of all jobs comes [DONE]."""
        encoder, event = self._encoder, b""
        if self._is_new[index]:
            self._is_new[index] = False
            if self.plan.chat:
                event = encoder.role(index)
        self.num_tokens[index], self.num_cached[index] = delta.num_tokens, delta.num_cached_tokens
        if delta.finish_reason is None:
            return event + encoder.text(index, delta.text) if delta.text else event
        event += encoder.last(index, delta.text, delta.finish_reason, delta.stop_reason)
        self.num_running -= 1
        if not self.num_running:
            if self.include_usage:
                event += encoder.usage(self.plan.usage(self.num_tokens, self.num_cached))
            event += DONE
        return event


def _deadline(body: GenerationRequest, exchange: Exchange) -> float | None:
    """The time.time() by which the request wants its whole answer."""
    if body.deadline_ms is None:
        return None
    return time.time() - (time.monotonic() - exchange.arrived) + body.deadline_ms / 1000
