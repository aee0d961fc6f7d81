"""The handlers of OpenAI's endpoints: body in, one answer or a stream of chunks out."""

import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from nanovllm_bento.errors import InvalidRequestError, ModelNotServedError, UnsupportedFieldError
from nanovllm_bento.sampling_params import SamplingParams
from nanovllm_bento.serving.context import ServingContext
from nanovllm_bento.serving.errors import error_response, invalid_body
from nanovllm_bento.serving.generation import Completion, Job, complete, generate_text, plan_jobs, side_by_side
from nanovllm_bento.serving.openai.chunks import ChunkEncoder
from nanovllm_bento.serving.openai.protocol import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionRequest,
    CompletionChoice,
    CompletionRequest,
    GenerationRequest,
    ModelCard,
    TextCompletion,
    Usage,
)
from nanovllm_bento.serving.streaming import DONE, ClientDisconnectedError, EventStream, until_disconnect

RequestT = TypeVar("RequestT", bound=GenerationRequest)


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

    def usage(self, num_tokens: Sequence[int], num_cached_tokens: Sequence[int]) -> Usage:
        """From each job's counts; of a prompt's choices the first tells what the cache gave."""
        choices = len(self.jobs) // self.num_prompts
        return Usage.of(self.num_prompt_tokens, sum(num_tokens), sum(num_cached_tokens[::choices]))


class OpenAIEndpoints:
    """Bound to one worker's context. Every handler answers errors itself, in OpenAI's shape."""

    def __init__(self, context: ServingContext) -> None:
        self.context = context

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await self._answer(request, ChatCompletionRequest, self._plan_chat)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        return await self._answer(request, CompletionRequest, self._plan_completion)

    def model_card(self, name: str | None = None) -> ModelCard:
        """The served model. Raises ModelNotServedError for another name."""
        served = self.context.model_name
        if name is not None and name != served:
            raise ModelNotServedError(f"The model {name!r} is not served here; {served!r} is.", param="model")
        length = self.context.engine.info.max_model_len if self.context.is_ready else None
        return ModelCard(id=served, created=self.context.created, max_model_len=length)

    async def _answer(
        self, request: Request, kind: type[RequestT], plan_it: Callable[[RequestT], Awaitable[Plan]]
    ) -> Response:
        try:
            try:
                body = kind.model_validate_json(await request.body())
            except ValidationError as exc:
                raise invalid_body(exc) from None
            if body.stream_options is not None and not body.stream:
                raise InvalidRequestError("stream_options needs stream=true.", param="stream_options")
            self.model_card(body.model)
            plan = await plan_it(body)
            if body.stream:
                return EventStream(self._events(plan, include_usage=body.include_usage))
            completions = await until_disconnect(request.receive, self._complete(plan))
            return Response(self._whole(plan, completions), media_type="application/json")
        except (ClientDisconnectedError, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it
        except Exception as exc:
            return error_response(exc)

    async def _plan_chat(self, body: ChatCompletionRequest) -> Plan:
        text_side = self.context.text
        sampling = body.to_sampling(text_side.sampling_defaults)
        self.context.check_load(sampling.n)
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        options = dict(body.chat_template_kwargs or {})
        options["add_generation_prompt"] = body.add_generation_prompt is not False
        ids = await self.context.encode_chat(messages, options, add_special_tokens=bool(body.add_special_tokens))
        return self._plan("chatcmpl-", body, [ids], sampling, param="messages")

    async def _plan_completion(self, body: CompletionRequest) -> Plan:
        text_side = self.context.text
        sampling = body.to_sampling(text_side.sampling_defaults)
        self.context.check_load(len(body.prompt) * sampling.n)
        special = body.add_special_tokens is not False
        prompts = await self.context.encode_all(body.prompt, add_special_tokens=special)
        return self._plan("cmpl-", body, prompts, sampling, param="prompt")

    def _plan(
        self, prefix: str, body: GenerationRequest, prompts: list[list[int]], sampling: SamplingParams, param: str
    ) -> Plan:
        info = self.context.engine.info
        if body.priority and info.scheduling_policy != "priority":
            raise UnsupportedFieldError(
                f"priority={body.priority} needs scheduling_policy=priority, but it is {info.scheduling_policy} here.",
                param="priority",
            )
        request_id = prefix + secrets.token_hex(12)
        jobs = plan_jobs(
            request_id,
            prompts,
            sampling,
            info,
            param=param,
            cache_salt=body.cache_salt or "",
            priority=body.priority or 0,
        )
        num_prompt_tokens = sum(map(len, prompts))
        model = self.context.model_name
        return Plan(request_id, int(time.time()), model, jobs, len(prompts), num_prompt_tokens, param == "messages")

    async def _complete(self, plan: Plan) -> list[Completion]:
        with self.context.admit(len(plan.jobs)):
            return await complete(self.context.engine, self.context.text.tokenizer, plan.jobs)

    def _whole(self, plan: Plan, completions: Sequence[Completion]) -> bytes:
        """The encoded answer of a request without stream."""
        usage = plan.usage([len(c.token_ids) for c in completions], [c.num_cached_tokens for c in completions])
        common: dict[str, Any] = {"id": plan.request_id, "created": plan.created, "model": plan.model, "usage": usage}
        answer: ChatCompletion | TextCompletion
        if plan.chat:
            answer = ChatCompletion(
                choices=[
                    ChatChoice(message=AnswerMessage(content=c.text), **_end(i, c)) for i, c in enumerate(completions)
                ],
                **common,
            )
        else:
            answer = TextCompletion(
                choices=[CompletionChoice(text=c.text, **_end(i, c)) for i, c in enumerate(completions)], **common
            )
        return answer.model_dump_json().encode()

    async def _events(self, plan: Plan, *, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """The encoded events of a request with stream."""
        context = self.context
        encoder = ChunkEncoder(
            chat=plan.chat,
            request_id=plan.request_id,
            created=plan.created,
            model=plan.model,
            include_usage=include_usage,
        )
        num_tokens, num_cached = [0] * len(plan.jobs), [0] * len(plan.jobs)
        interval = context.config.stream_interval
        with context.admit(len(plan.jobs)):
            tokenizer = context.text.tokenizer
            streams = [generate_text(context.engine, tokenizer, job, stream_interval=interval) for job in plan.jobs]
            num_running = len(streams)
            async with aclosing(side_by_side(streams)) as deltas:
                async for index, delta in deltas:
                    event = encoder.role(index) if plan.chat and not num_tokens[index] else b""
                    num_tokens[index], num_cached[index] = delta.num_tokens, delta.num_cached_tokens
                    if delta.finish_reason is not None:
                        event += encoder.last(index, delta.text, delta.finish_reason, delta.stop_reason)
                        num_running -= 1
                    elif delta.text:
                        event += encoder.text(index, delta.text)
                    if not num_running:
                        if include_usage:
                            event += encoder.usage(plan.usage(num_tokens, num_cached))
                        event += DONE
                    if event:
                        yield event


def _end(index: int, completion: Completion) -> dict[str, Any]:
    """What the choices of both endpoints share."""
    return {"index": index, "finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
