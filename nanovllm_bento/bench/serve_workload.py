"""What the load generator sends: drawn prompts, traces and conversations, and when requests arrive.

All bodies are made before a run and lie in one file that the client processes map, so that drawing and encoding prompts
costs no time while requests are measured.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from math import ceil, floor
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from nanovllm_bento.bench.serve_messages import Conversation, Turn
from nanovllm_bento.bench.serve_options import LoadOptions, RunShape
from nanovllm_bento.errors import ConfigError

SAFE_IDS = (256, 10_000)
"""Ids that every vocabulary of a real model holds, none of them special in most."""
DEFAULT_PROMPTS, DEFAULT_CONVERSATIONS = 1000, 64
TRACE_BLOCK = 512
"""Tokens behind one of a trace's ``hash_ids`` (Mooncake's traces)."""
_TEXT = """
time people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work night point home water room mother area money story fact month
lot right study book eye job word business issue side kind head house service friend father power hour game line end
member law car city name team minute idea body back parent face level office door health person art war history
party result change morning reason research girl guy moment air teacher force education
"""
WORDS = _TEXT.split()
"""Each is one token, with the space before it, in the vocabularies of most models."""

_TIMES = ("timestamp",)
_PROMPTS = ("prompt", "prompt_token_ids", "messages")
_INPUT_LENS = ("input_length", "input_len", "prompt_len", "input_tokens")
_OUTPUT_LENS = ("output_length", "output_len", "max_tokens", "output_tokens")
_TRACE_FIELDS = {*_TIMES, *_PROMPTS, *_INPUT_LENS, *_OUTPUT_LENS, "hash_ids"}


class Item(msgspec.Struct):
    """One entry of the spool: a body, or a conversation; ``max_tokens``: of a body, if it is known."""

    body: bytes
    max_tokens: int | None = None


@dataclass(slots=True)
class Work:
    """The requests of a run. ``times``: a trace's own, in seconds from its first; None: the run's shape decides."""

    items: Iterator[Item]
    num_items: int
    num_requests: int
    conversations: bool
    describe: dict[str, Any]
    times: list[float] | None = None
    warnings: list[str] = field(default_factory=list)


def body_fields(options: LoadOptions, model: str) -> dict[str, Any]:
    """What all bodies share; ``--extra-body`` wins."""
    fields: dict[str, Any] = {"model": model, "stream": options.stream}
    if options.stream:
        fields["stream_options"] = {"include_usage": True}
    if options.ignore_eos:
        fields["ignore_eos"] = True
    if options.temperature is not None:
        fields["temperature"] = options.temperature
    return {**fields, **options.extra}


def make_work(options: LoadOptions, shape: RunShape, model: str, *, stream: int = 0) -> Work:
    """The work of one run. Runs with different ``stream`` numbers share no drawn prompt but the common prefix.

    Raises ConfigError for a file that cannot be used.
    """
    draw = Draw(options, stream)
    if options.dataset == "multi-turn":
        return _multi_turn(options, shape, draw)
    fields = body_fields(options, model)
    if options.dataset == "trace":
        return _trace(options, shape, draw, fields)
    return _random(options, shape, draw, fields)


class Draw:
    """Draws prompts and lengths from the seed. ``stream`` separates runs with one seed."""

    def __init__(self, options: LoadOptions, stream: int) -> None:
        self.seed, self.stream = options.seed, stream
        self.as_text = options.as_text
        self.chat = options.endpoint == "chat"
        self.low, self.high = (0, options.vocab_size) if options.vocab_size else SAFE_IDS
        self.ratio = options.random_range_ratio
        self.lengths = np.random.default_rng((abs(self.seed), stream, 1))

    def length(self, around: int) -> int:
        """From around × (1 - ratio) to around × (1 + ratio), as vLLM's random dataset."""
        low, high = max(1, floor(around * (1 - self.ratio))), ceil(around * (1 + self.ratio))
        return int(self.lengths.integers(low, high + 1))

    def tokens(self, count: int, *names: int) -> list[Any]:
        """``count`` token ids, or words where prompts are text. The same names give the same tokens."""
        generator = np.random.default_rng((abs(self.seed), *names))
        if self.as_text:
            return [WORDS[i] for i in generator.integers(0, len(WORDS), count).tolist()]
        found: list[int] = generator.integers(self.low, self.high, count).tolist()
        return found

    def prompt(self, tokens: list[Any]) -> dict[str, Any]:
        """The fields of a body that hold the prompt."""
        if self.chat:
            return {"messages": [{"role": "user", "content": " ".join(tokens)}]}
        return {"prompt": " ".join(tokens) if self.as_text else tokens}


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which requests arrive: gaps of a gamma distribution, 1 is a Poisson process.

    As vLLM's client: stretched so that the last one comes at count / rate and the rate is met exactly.
    """
    gaps = np.random.default_rng((abs(seed), 2)).gamma(burstiness, 1.0 / (rate * burstiness), count)
    times = np.cumsum(gaps)
    return [float(t) for t in times * (count / rate / times[-1])]


class Spool:
    """Writes a run's bodies to a file: the data, then for each item where it lies, its length and max_tokens (int64,
    -1: not known). ``serve_client.Bodies`` reads it."""

    def __init__(self, items: Iterator[Item], file: IO[bytes]) -> None:
        rows, at = [], 0
        for item in items:
            file.write(item.body)
            rows.append((at, len(item.body), -1 if item.max_tokens is None else item.max_tokens))
            at += len(item.body)
        file.write(b"\0" * (-at % 8))
        file.write(np.array(rows, dtype="<i8").tobytes())
        file.flush()
        self.file, self.num_items = file, len(rows)


def _random(options: LoadOptions, shape: RunShape, draw: Draw, fields: dict[str, Any]) -> Work:
    count = shape.num_prompts or DEFAULT_PROMPTS
    lengths = [(draw.length(options.random_input_len), draw.length(options.random_output_len)) for _ in range(count)]
    prefix = draw.tokens(options.random_prefix_len, 3) if options.random_prefix_len else []

    def items() -> Iterator[Item]:
        for i, (input_len, output_len) in enumerate(lengths):
            prompt = draw.prompt(prefix + draw.tokens(input_len, draw.stream, 4, i))
            yield Item(msgspec.json.encode({**fields, **prompt, "max_tokens": output_len}), output_len)

    about = {
        "dataset": "random",
        "prompts": "text" if options.as_text else "token ids",
        "requests": count,
        "input_tokens": sum(n for n, _ in lengths) + count * len(prefix),
        "output_tokens": sum(n for _, n in lengths),
        "prefix_tokens": len(prefix),
    }
    return Work(items(), count, count, False, about)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSONL file. Raises ConfigError."""
    try:
        with path.open() as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                found = json.loads(line)
                if not isinstance(found, dict):
                    raise ConfigError(f"{path}, line {number}: a JSON object was expected.")
                yield number, found
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not JSONL: {error}.") from None


def _first(line: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((line[name] for name in names if line.get(name) is not None), None)


def _trace(options: LoadOptions, shape: RunShape, draw: Draw, fields: dict[str, Any]) -> Work:
    assert options.dataset_path is not None
    path, unit = options.dataset_path, 1000.0 if options.trace_time_unit == "ms" else 1.0
    lines = list(islice(_lines(path), shape.num_prompts))
    if not lines:
        raise ConfigError(f"{path} holds no request.")
    checked = [_trace_line(path, number, line, options) for number, line in lines]
    items = (_trace_item(i, entry, draw, fields) for i, entry in enumerate(checked))
    times = None
    if shape.request_rate is None and shape.max_concurrency is None:
        given = [entry.time for entry in checked]
        if any(t is None for t in given):
            raise ConfigError(f"{path}: not every line has a timestamp; give --request-rate or --max-concurrency.")
        start = min(t for t in given if t is not None)
        times = [(t - start) / unit / options.trace_speed for t in given if t is not None]
    unknown = sorted({name for _, line in lines for name in line} - _TRACE_FIELDS)
    about = {
        "dataset": "trace",
        "file": path.name,
        "requests": len(checked),
        "input_tokens": sum(entry.input_len or 0 for entry in checked) or None,
        "output_tokens": sum(entry.output_len for entry in checked),
        "speed": options.trace_speed if times else None,
    }
    warnings = [f"{path.name}: fields without a meaning here: {', '.join(unknown)}"] if unknown else []
    if shape.num_prompts and len(checked) < shape.num_prompts:
        warnings.append(f"{path.name} holds {len(checked)} requests, not {shape.num_prompts}")
    return Work(items, len(checked), len(checked), False, about, times, warnings)


@dataclass(slots=True)
class _TraceLine:
    time: float | None
    prompt: dict[str, Any] | None
    input_len: int | None
    output_len: int
    hash_ids: list[int]


def _trace_line(path: Path, number: int, line: dict[str, Any], options: LoadOptions) -> _TraceLine:
    """One request of a trace, checked. Raises ConfigError."""
    where = f"{path}, line {number}"
    chat = options.endpoint == "chat"
    prompt: dict[str, Any] | None = None
    if line.get("messages") is not None:
        if not chat:
            raise ConfigError(f"{where}: messages need --endpoint chat.")
        prompt = {"messages": line["messages"]}
    elif (given := _first(line, ("prompt_token_ids", "prompt"))) is not None:
        if chat and not isinstance(given, str):
            raise ConfigError(f"{where}: a token-id prompt needs --endpoint completions.")
        prompt = {"messages": [{"role": "user", "content": given}]} if chat else {"prompt": given}
    input_len, output_len = _first(line, _INPUT_LENS), _first(line, _OUTPUT_LENS)
    for name, value in (("the input length", input_len), ("the output length", output_len)):
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise ConfigError(f"{where}: {name} is {value!r}, not a number of tokens.")
    if prompt is None and input_len is None:
        raise ConfigError(f"{where}: neither a prompt ({', '.join(_PROMPTS)}) nor its length ({_INPUT_LENS[0]}).")
    time = _first(line, _TIMES)
    if time is not None and not isinstance(time, int | float):
        raise ConfigError(f"{where}: timestamp={time!r} is not a number.")
    if output_len is None:
        output_len = options.random_output_len
    return _TraceLine(time, prompt, input_len, output_len, line.get("hash_ids") or [])


def _trace_item(index: int, entry: _TraceLine, draw: Draw, fields: dict[str, Any]) -> Item:
    prompt = entry.prompt
    if prompt is None:
        assert entry.input_len is not None
        tokens: list[Any] = []
        for hash_id in entry.hash_ids:  # what has the same hash in the trace has the same tokens here
            tokens += draw.tokens(TRACE_BLOCK, 5, abs(int(hash_id)))
        del tokens[entry.input_len :]
        if len(tokens) < entry.input_len:
            tokens += draw.tokens(entry.input_len - len(tokens), draw.stream, 6, index)
        prompt = draw.prompt(tokens)
    return Item(msgspec.json.encode({**fields, **prompt, "max_tokens": entry.output_len}), entry.output_len)


def _multi_turn(options: LoadOptions, shape: RunShape, draw: Draw) -> Work:
    warnings = []
    if options.dataset_path is not None:
        found = [_conversation(options, n, x) for n, x in islice(_lines(options.dataset_path), shape.num_prompts)]
        if not found:
            raise ConfigError(f"{options.dataset_path} holds no conversation.")
        if shape.num_prompts and len(found) < shape.num_prompts:
            warnings.append(f"{options.dataset_path.name} holds {len(found)} conversations, not {shape.num_prompts}")
    else:
        system = " ".join(draw.tokens(options.system_len, 3)) if options.system_len else None
        found = []
        for i in range(shape.num_prompts or DEFAULT_CONVERSATIONS):
            turns = []
            for t in range(options.num_turns):
                words = draw.tokens(draw.length(options.random_input_len), draw.stream, 4, i, t)
                turns.append(Turn(" ".join(words), draw.length(options.random_output_len)))
            found.append(Conversation(system, turns))
    requests = sum(len(c.turns) for c in found)
    about = {
        "dataset": "multi-turn",
        "file": options.dataset_path.name if options.dataset_path else None,
        "conversations": len(found),
        "requests": requests,
        "output_tokens": sum(t.max_tokens for c in found for t in c.turns),
    }
    items = (Item(msgspec.json.encode(c)) for c in found)
    return Work(items, len(found), requests, True, about, warnings=warnings)


def _conversation(options: LoadOptions, number: int, line: dict[str, Any]) -> Conversation:
    """A line of OpenAI's form, {"messages": [{role, content}]}, or ShareGPT's, {"conversations": [{from, value}]}.

    The file's answers are left out: the server's own take their place. Raises ConfigError.
    """
    said: list[tuple[str, str]] = []
    try:
        if "messages" in line:
            said = [(m["role"], m["content"]) for m in line["messages"]]
        else:
            roles = {"human": "user", "gpt": "assistant"}
            said = [(roles.get(m["from"], m["from"]), m["value"]) for m in line["conversations"]]
    except (KeyError, TypeError):
        pass
    users = [text for role, text in said if role == "user"]
    if not users or not all(isinstance(text, str) for _, text in said):
        raise ConfigError(f"{options.dataset_path}, line {number}: neither messages nor conversations with user turns.")
    system = next((text for role, text in said if role == "system"), None)
    length = _first(line, _OUTPUT_LENS) or options.random_output_len
    return Conversation(system, [Turn(text, length) for text in users])
