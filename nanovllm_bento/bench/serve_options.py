"""What ``bench serve`` is asked to do: every option of the load generator, checked, and the parsers of their forms.

Options that vLLM's ``bench serve`` has too carry its names. Imports no typer: the load generator also runs where only
the standard library, pydantic, msgspec and numpy are: ``python -m nanovllm_bento.bench.serve``.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nanovllm_bento.errors import ConfigError

MAX_PROCESSES = 8
"""Client processes by default, at most: with a few dozen µs a chunk one is good for tens of thousands a second."""
SLO_METRICS = ("ttft", "tpot", "e2el")


class LoadOptions(BaseModel):
    """Options of the load generator. Lists are given with commas; lengths are in tokens, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)

    base_url: str = "http://127.0.0.1:3000"
    """Where the server listens, with or without /v1."""
    endpoint: Literal["completions", "chat"] = "completions"
    """/v1/completions or /v1/chat/completions."""
    model: str | None = None
    """Model to ask; default: the first of /v1/models."""
    api_key: str | None = Field(None, repr=False)
    """Sent as a bearer token; default: OPENAI_API_KEY."""
    header: list[str] = Field([], repr=False)
    """Another header, NAME=VALUE; may be repeated."""
    ready_timeout: float = Field(0.0, ge=0)
    """Seconds to wait for a server that does not answer yet."""

    max_concurrency: str | None = None
    """Requests open at the same time. Several with commas are one run after another."""
    request_rate: str | None = None
    """Requests a second; default: no limit. Several with commas are one run after another."""
    burstiness: float = Field(1.0, gt=0)
    """Shape of the gamma distribution of the gaps between arrivals: 1 is Poisson, less comes in bursts."""
    num_prompts: str | None = None
    """Requests (of multi-turn: conversations); a list gives each run its own. Default: 1000 (64), or the whole file."""
    warmup: int = Field(0, ge=0)
    """Requests sent before, which do not count."""
    seed: int = 0
    """Seed of prompts, lengths and arrivals."""
    timeout: float = Field(600.0, gt=0)
    """Seconds after which a request is given up."""
    processes: int | None = Field(None, ge=1, le=256)
    """Client processes; default: half of the cores, at most 8."""

    dataset: Literal["random", "trace", "multi-turn"] = "random"
    """random: drawn prompts; trace: a JSONL file; multi-turn: conversations, drawn or of a JSONL file."""
    dataset_path: Path | None = None
    """JSONL file of a trace (timestamp, a prompt or its length, output length) or of conversations."""
    trace_time_unit: Literal["ms", "s"] = "ms"
    """Unit of a trace's timestamps (Mooncake's are milliseconds)."""
    trace_speed: float = Field(1.0, gt=0)
    """A trace is replayed this many times as fast. Its times hold unless a rate or a concurrency is given."""
    prompt_form: Literal["auto", "ids", "text"] = "auto"
    """Drawn prompts as token ids (completions) or as words of about a token each (chat)."""
    vocab_size: int | None = Field(None, ge=2)
    """Token ids are drawn below this; default: from a range that every vocabulary holds."""
    random_input_len: int = Field(512, ge=1)
    random_output_len: int = Field(128, ge=1)
    random_range_ratio: float = Field(0.0, ge=0, lt=1)
    """Lengths are drawn from len × (1 - ratio) to len × (1 + ratio)."""
    random_prefix_len: int = Field(0, ge=0)
    """Tokens in front of every prompt that all of them share."""
    num_turns: int = Field(6, ge=1)
    """multi-turn: turns of a drawn conversation."""
    system_len: int = Field(200, ge=0)
    """multi-turn: tokens of the system prompt that all drawn conversations share."""
    think_time: float = Field(0.0, ge=0)
    """multi-turn: seconds between an answer and the next turn."""

    stream: bool = True
    """Without it only whole answers can be timed."""
    ignore_eos: bool = False
    """Every answer has exactly the length asked for."""
    temperature: float | None = Field(None, ge=0)
    """Default: the server's."""
    extra_body: str | None = None
    """JSON object with more fields of each request."""
    goodput: str | None = None
    """Service levels in ms, ttft:200,tpot:20,e2el:5000 (some of them): requests that meet all are counted."""

    @classmethod
    def create(cls, **given: Any) -> Self:
        """Options that are not None, checked. Raises ConfigError."""
        try:
            return cls.model_validate({name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            what = f"--{str(first['loc'][0]).replace('_', '-')} {first['input']}: " if first["loc"] else ""
            raise ConfigError(what + first["msg"].removeprefix("Value error, ")) from None

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.runs, self.slo, self.headers, self.extra  # noqa: B018 - they raise
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url is http://… or https://…, got {self.base_url!r}.")
        if self.dataset == "trace" and self.dataset_path is None:
            raise ValueError("the dataset trace needs --dataset-path FILE.jsonl.")
        if self.dataset == "random" and self.dataset_path is not None:
            raise ValueError("--dataset-path is for the datasets trace and multi-turn.")
        if self.endpoint == "chat" and self.prompt_form == "ids":
            raise ValueError("token-id prompts need the endpoint completions: a chat message is text.")
        if self.dataset == "multi-turn" and self.prompt_form == "ids":
            raise ValueError("multi-turn goes on from answers, which are text: token-id prompts cannot.")
        if self.slo and not self.stream and self.slo.keys() != {"e2el"}:
            raise ValueError("without stream only e2el can be judged.")
        return self

    @property
    def runs(self) -> list["RunShape"]:
        """One per rate and concurrency given. Raises ValueError."""
        rates: list[float | None] = _numbers("request-rate", self.request_rate, float) or [None]
        limits: list[int | None] = _numbers("max-concurrency", self.max_concurrency, int) or [None]
        counts: list[int | None] = _numbers("num-prompts", self.num_prompts, int) or [None]
        if len(rates) > 1 and len(limits) > 1:
            raise ValueError("give several rates or several concurrencies, not both.")
        pairs = [(rate, limit) for rate in rates for limit in limits]
        if len(counts) not in (1, len(pairs)):
            raise ValueError(f"--num-prompts holds {len(counts)} numbers for {len(pairs)} runs; give one or as many.")
        counts = counts * len(pairs) if len(counts) == 1 else counts
        return [
            RunShape(n, None if rate == math.inf else rate, limit)
            for (rate, limit), n in zip(pairs, counts, strict=True)
        ]

    @property
    def slo(self) -> dict[str, float]:
        """Metric -> bound in ms. Raises ValueError."""
        found: dict[str, float] = {}
        for part in (self.goodput or "").replace(",", " ").split():
            name, _, value = part.partition(":")
            try:
                found[name] = float(value)
            except ValueError:
                found[name] = -1.0
            if name not in SLO_METRICS or not found[name] >= 0:
                raise ValueError(f"goodput is METRIC:MILLISECONDS of {', '.join(SLO_METRICS)}; got {part!r}.")
        return found

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request beside those of HTTP itself. Raises ValueError."""
        found = {}
        key = self.api_key or os.environ.get("OPENAI_API_KEY")
        if key:
            found["Authorization"] = f"Bearer {key}"
        for given in self.header:
            name, equals, value = given.partition("=")
            if not equals or not name.strip() or "\n" in given or "\r" in given:
                raise ValueError("a header is NAME=VALUE.")
            found[name.strip()] = value.strip()
        return found

    @property
    def extra(self) -> dict[str, Any]:
        """Further fields of each body. Raises ValueError."""
        try:
            found = json.loads(self.extra_body or "{}")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"extra_body is a JSON object, got {self.extra_body!r}.")
        return found

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"

    @property
    def url(self) -> str:
        """The base without /v1 and without a slash at its end."""
        return self.base_url.rstrip("/").removesuffix("/v1").rstrip("/")

    @property
    def as_text(self) -> bool:
        """Whether drawn prompts are text."""
        form = {"auto": self.endpoint == "chat" or self.dataset == "multi-turn", "ids": False, "text": True}
        return form[self.prompt_form]

    def num_processes(self, num_prompts: int, max_concurrency: int | None) -> int:
        """Client processes of a run: never more than there are requests to hold."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = self.processes or max(1, min(MAX_PROCESSES, cores // 2))
        return max(1, min(wanted, num_prompts, max_concurrency or wanted))

    def recorded(self) -> dict[str, Any]:
        """The options in a result file: no secrets, no folders."""
        found = self.model_dump(mode="json", exclude={"api_key", "header", "dataset_path"})
        if self.dataset_path is not None:
            found["dataset_path"] = self.dataset_path.name
        found["header"] = [given.partition("=")[0] for given in self.header]
        return found


@dataclass(frozen=True, slots=True)
class RunShape:
    """How many requests one run sends, and when: at a rate, at a concurrency, at a trace's times, or all at once.

    num_prompts: None for as many as the dataset holds by itself.
    """

    num_prompts: int | None
    request_rate: float | None
    max_concurrency: int | None

    @property
    def name(self) -> str:
        """As one would say it: "16 req/s", "concurrency 64"."""
        parts = [f"{self.request_rate:g} req/s"] if self.request_rate else []
        parts += [f"concurrency {self.max_concurrency}"] if self.max_concurrency else []
        return ", ".join(parts) or "no limit"


def _numbers(name: str, text: str | None, kind: type[int] | type[float]) -> list[Any]:
    """Numbers above 0 with commas between; "inf" is one of the floats."""
    try:
        found = [kind(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        found = [kind(0)]
    if not all(n > 0 for n in found):
        raise ValueError(f"--{name} is a number above 0, or several with commas between; got {text!r}.")
    return found
