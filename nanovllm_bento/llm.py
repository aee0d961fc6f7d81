"""Offline inference: ``LLM(model).generate(prompts)``, ``.chat(messages)`` and ``.score(contexts, continuations)``.

The engine runs in this process; with tensor_parallel_size above 1 its other ranks run in processes of their own.
"""

import itertools
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tqdm import tqdm

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.engine.messages import Add, pack_tokens
from nanovllm_bento.engine.request import check_score, resolve_request
from nanovllm_bento.errors import EngineError, InvalidRequestError
from nanovllm_bento.hub import resolve_model
from nanovllm_bento.outputs import CompletionOutput, RequestMetrics, RequestOutput, ScoreOutput
from nanovllm_bento.sampling_params import MAX_SEED, SamplingParams
from nanovllm_bento.text.chat_template import ChatTemplate
from nanovllm_bento.text.detokenizer import IncrementalDetokenizer
from nanovllm_bento.text.pairs import continuation_ids, move_spaces
from nanovllm_bento.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


class LLM:
    """A model, loaded. ``engine_args`` are EngineConfig's settings; an unknown one raises ConfigError.

    Also raises ModelError if the model cannot be found, read or run.
    """

    def __init__(self, model: str = "demo", **engine_args: Any) -> None:
        self.config = EngineConfig.create(model=model, **engine_args)
        self.core = EngineCore.from_model(self.config)
        if self.core.leave is not None:
            weakref.finalize(self, self.core.leave)
        self.tokenizer = Tokenizer.load(resolve_model(self.config.model, self.config.revision))
        self._request_ids = itertools.count()

    def close(self) -> None:
        """End what ``tensor_parallel_size`` above 1 has started; it also ends with this object and this process."""
        self.core.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts; the result has one RequestOutput a prompt, in the order asked.

        prompts: a str, a list of token ids, ``{"prompt": str}`` or ``{"prompt_token_ids": [...]}``, or a list of these.
        sampling_params: one for all, or one a prompt; None is SamplingParams(). use_tqdm: show a progress bar with
        prompt and output tokens per second.

        Raises InvalidRequestError for a bad prompt or parameter, before anything runs; then nothing is lost. Raises
        EngineError where the engine could not finish; with EngineDeadError (RankError) a new LLM is needed. Ctrl-C ends
        the call after the running step, and the next call finds the engine as before; a second one does not wait for
        the step, and ends the engine.
        """
        tokenized = [self._tokenize(prompt) for prompt in _as_list(prompts)]
        if sampling_params is None:
            sampling_params = SamplingParams()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(tokenized)
        if len(sampling_params) != len(tokenized):
            raise InvalidRequestError(
                f"There are {len(tokenized)} prompts but {len(sampling_params)} sampling_params; give one or one each.",
                param="sampling_params",
            )
        resolved = [
            resolve_request(token_ids, sampling, self.core.info)
            for (_, token_ids), sampling in zip(tokenized, sampling_params, strict=True)
        ]
        requests = [
            _Request(str(next(self._request_ids)), text, token_ids, sampling, self.tokenizer)
            for (text, token_ids), sampling in zip(tokenized, resolved, strict=True)
        ]
        with _interrupts_between_steps() as between_steps:
            try:
                self._run(requests, use_tqdm, between_steps)
            finally:
                self._abort_open(requests)
        return [request.output for request in requests]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or a list of them, through the model's own chat template. Otherwise as ``generate``.

        messages: ``{"role": ..., "content": ...}`` mappings. Also raises InvalidRequestError if the template refuses.
        """
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        template = ChatTemplate.of(self.tokenizer)
        prompts = [
            self.tokenizer.encode(
                template.render(
                    list(conversation),  # type: ignore[arg-type]
                    add_generation_prompt=add_generation_prompt,
                    **(chat_template_kwargs or {}),
                ),
                add_special_tokens=False,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def score(
        self,
        contexts: str | Sequence[int] | Sequence[str | Sequence[int]],
        continuations: str | Sequence[int] | Sequence[str | Sequence[int]],
        use_tqdm: bool = True,
    ) -> list[ScoreOutput]:
        """Log-probabilities of each continuation's tokens after its context, in one forward pass; nothing is sampled.

        contexts, continuations: a str or a list of token ids, or a list of these; one context may serve all
        continuations. Two strs are tokenized together, as lm-evaluation-harness does (text.pairs). A context has at
        least one token. Raises InvalidRequestError for a bad pair, before anything runs; otherwise as ``generate``.
        """
        all_contexts, all_continuations = _as_list(contexts), _as_list(continuations)
        if len(all_contexts) == 1:
            all_contexts *= len(all_continuations)
        if len(all_contexts) != len(all_continuations):
            raise InvalidRequestError(
                f"There are {len(all_contexts)} contexts but {len(all_continuations)} continuations; give one context "
                "or one each.",
                param="continuations",
            )
        pairs = [self._tokenize_pair(*pair) for pair in zip(all_contexts, all_continuations, strict=True)]
        for context, continuation in pairs:
            check_score(context + continuation, len(continuation), self.core.info, param="contexts")
        open_ids: dict[str, int] = {}
        outputs: list[ScoreOutput | None] = [None] * len(pairs)
        progress = tqdm(total=len(pairs), desc="Scoring", unit="req", dynamic_ncols=True, disable=not use_tqdm)
        with _interrupts_between_steps() as between_steps:
            try:
                for i, (context, continuation) in enumerate(pairs):
                    request_id = f"score-{next(self._request_ids)}"
                    tokens, nothing = pack_tokens(context + continuation), SamplingParams(seed=0)
                    self.core.add(Add(request_id, tokens, nothing, task="score", num_scored=len(continuation)))
                    open_ids[request_id] = i
                while open_ids:
                    for _, item in self.core.step():
                        if item.finish_reason == "error":
                            raise EngineError(item.error)
                        i = open_ids.pop(item.request_id)
                        assert item.logprobs is not None and item.is_greedy is not None
                        outputs[i] = ScoreOutput(*pairs[i], item.logprobs, item.is_greedy, item.num_cached_tokens)
                        progress.update()
                    between_steps()
            finally:
                progress.close()
                self._abort(open_ids)
        return [output for output in outputs if output is not None]

    def _tokenize_pair(self, context: Prompt, continuation: Prompt) -> tuple[list[int], list[int]]:
        if isinstance(context, str) and isinstance(continuation, str):
            context, continuation = move_spaces(context, continuation)
            context_ids = self.tokenizer.encode(context)
            rest = continuation_ids(self.tokenizer.encode(context + continuation), context_ids)
            return context_ids, rest or self.tokenizer.encode(continuation, add_special_tokens=False)
        if isinstance(continuation, str):
            return self._tokenize(context)[1], self.tokenizer.encode(continuation, add_special_tokens=False)
        return self._tokenize(context)[1], self._tokenize(continuation)[1]

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or len(prompt) != 1:
                raise InvalidRequestError(
                    f"A prompt given as a dict holds either 'prompt' or 'prompt_token_ids', got {sorted(prompt)}.",
                    param="prompts",
                )
            prompt = next(iter(prompt.values()))
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        if isinstance(prompt, Sequence):
            token_ids = [t for t in prompt if isinstance(t, int) and not isinstance(t, bool)]
            if len(token_ids) == len(prompt):
                return None, token_ids
        raise InvalidRequestError(
            f"A prompt is a string, a list of token ids or a dict, got {type(prompt).__name__}.", param="prompts"
        )

    def _run(self, requests: list["_Request"], use_tqdm: bool, between_steps: Callable[[], None]) -> None:
        by_id: dict[str, tuple[_Request, int]] = {}
        for request in requests:
            packed = pack_tokens(request.output.prompt_token_ids)
            for index in range(request.sampling.n):
                request_id = f"{request.output.request_id}-{index}"
                self.core.add(Add(request_id, packed, request.choice_sampling(index)))
                by_id[request_id] = (request, index)
                request.open_ids.add(request_id)
        progress = _Progress(len(requests)) if use_tqdm else None
        while any(request.open_ids for request in requests) and self.core.has_work:
            for _, item in self.core.step():
                request, index = by_id[item.request_id]
                if item.finish_reason == "error":
                    raise EngineError(item.error)
                first = request.metrics.first_token_time is None
                if request.take(index, item.new_token_ids, item.finish_reason, item.stop_reason):
                    self.core.abort(item.request_id)  # a stop string; the engine does not know
                if first:
                    request.output.num_cached_tokens = item.num_cached_tokens
                if progress is not None:
                    progress.update(
                        len(request.output.prompt_token_ids) if first else 0,
                        len(item.new_token_ids),
                        int(request.output.finished and not request.open_ids),
                    )
            between_steps()
        if progress is not None:
            progress.close()

    def _abort_open(self, requests: list["_Request"]) -> None:
        self._abort(request_id for request in requests for request_id in request.open_ids)

    def _abort(self, request_ids: Iterable[str]) -> None:
        if self.core.failure is not None:
            return  # nothing comes free any more
        for request_id in request_ids:
            self.core.abort(request_id)
        while self.core.has_work and not self.core.scheduler.sequences:
            self.core.step()  # read what is in flight, so that blocks come free


@contextmanager
def _interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Within it Ctrl-C only takes effect where the yielded function is called, or when it is given a second time: a
    step that is broken off cannot be undone. In other threads than the main one there are no signals to hold back.
    """
    act = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(act):
        yield lambda: None
        return
    is_pending = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal is_pending
        if is_pending:
            act(signum, frame)
        is_pending = True

    def between_steps() -> None:
        nonlocal is_pending
        if is_pending:
            is_pending = False
            act(signal.SIGINT, None)

    signal.signal(signal.SIGINT, note)
    try:
        yield between_steps
    finally:
        signal.signal(signal.SIGINT, act)
    between_steps()


class _Request:
    """Builds one RequestOutput from tokens as they come."""

    def __init__(
        self, request_id: str, prompt: str | None, token_ids: list[int], sampling: SamplingParams, tokenizer: Tokenizer
    ) -> None:
        self.sampling = sampling
        self.metrics = RequestMetrics(arrival_time=time.monotonic())
        self.output = RequestOutput(request_id, prompt, token_ids, metrics=self.metrics)
        self.output.outputs = [CompletionOutput(index, "", []) for index in range(sampling.n)]
        self.open_ids: set[str] = set()
        self.detokenizers = [
            IncrementalDetokenizer(
                tokenizer,
                skip_special_tokens=sampling.skip_special_tokens,
                stop=sampling.stop_strings,
                min_tokens=sampling.min_tokens,
            )
            if sampling.detokenize
            else None
            for _ in range(sampling.n)
        ]

    def choice_sampling(self, index: int) -> SamplingParams:
        """Parameters of completion ``index``: its own seed, derived from the request's."""
        assert self.sampling.seed is not None
        return self.sampling.with_changes(n=1, seed=(self.sampling.seed + index) & MAX_SEED)

    def take(self, index: int, token_ids: list[int], finish_reason: str | None, stop_reason: int | None) -> bool:
        """Add tokens to completion ``index``; True if a stop string ended it while the engine goes on."""
        completion, detokenizer = self.output.outputs[index], self.detokenizers[index]
        now = time.monotonic()
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = now
        completion.token_ids += token_ids
        stopped = False
        completion.finish_reason, completion.stop_reason = finish_reason, stop_reason
        if detokenizer is not None:
            # The token that ended the sequence (end of sequence, stop token) counts but is no text.
            completion.text += detokenizer.push(token_ids[:-1] if finish_reason == "stop" else token_ids)
            if detokenizer.stop_reason is not None:
                stopped = finish_reason is None
                completion.finish_reason, completion.stop_reason = "stop", detokenizer.stop_reason
                del completion.token_ids[detokenizer.num_tokens_used :]
            elif finish_reason is not None:
                completion.text += detokenizer.finish()
        if completion.finish_reason is not None:
            self.open_ids.discard(f"{self.output.request_id}-{index}")
            self.output.finished = all(c.finished() for c in self.output.outputs)
            self.metrics.finished_time = now
        return stopped


class _Progress:
    """A progress bar over requests that shows prompt and output tokens per second, as running means."""

    def __init__(self, num_requests: int) -> None:
        self.bar = tqdm(total=num_requests, desc="Generating", unit="req", dynamic_ncols=True)
        self.started = time.perf_counter()
        self.num_prompt_tokens = self.num_output_tokens = 0
        self.next_refresh = 0.0

    def update(self, num_prompt_tokens: int, num_output_tokens: int, num_finished: int) -> None:
        self.num_prompt_tokens += num_prompt_tokens
        self.num_output_tokens += num_output_tokens
        now = time.perf_counter()
        if num_finished or now >= self.next_refresh:
            self.next_refresh = now + 0.1
            elapsed = max(now - self.started, 1e-9)
            self.bar.set_postfix_str(
                f"prefill {self.num_prompt_tokens / elapsed:.0f} tok/s, "
                f"decode {self.num_output_tokens / elapsed:.0f} tok/s",
                refresh=False,
            )
            self.bar.update(num_finished)

    def close(self) -> None:
        self.bar.close()


def _as_list(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError(
            f"prompts is a prompt or a list of them, got {type(prompts).__name__}.", param="prompts"
        )
    if len(prompts) and isinstance(prompts[0], int):
        return [prompts]
    return list(prompts)
