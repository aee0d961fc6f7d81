"""Offline throughput: LLM.generate over a workload, and transformers' generate beside it on the same prompts.

Timed is the one generate call, wall clock, with all prompts handed over at once; loading and one warm-up are not. The
score is output tokens per second. Where there is a peer, the engines take turns repeat by repeat, so that a change of
the machine's speed hits both alike.
"""

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nanovllm_bento.bench.environment import environment
from nanovllm_bento.bench.workloads import Workload, fixed_workload, seed_workload, shared_prefix_len

if TYPE_CHECKING:
    from nanovllm_bento import LLM

CPU_BATCHES = (1, 8, 32)
CPU_INPUT_LEN, CPU_OUTPUT_LEN = 64, 48
CPU_GOALS = {1: 2.3, 8: 3.0, 32: 3.0}
"""How many times transformers' speed we mean to reach, by batch size."""
PEER_DTYPES = ("float32", "bfloat16")


class Engine(Protocol):
    """What a benchmark needs of an engine: run a workload, return the tokens of each sequence."""

    name: str

    def run(self, workload: Workload, *, show_progress: bool = False) -> list[list[int]]: ...


class OurEngine:
    """This package's LLM, without detokenizing."""

    name = "nanovllm_bento"

    def __init__(self, model: str, **settings: Any) -> None:
        started = time.perf_counter()
        self.llm = load_llm(model, **settings)
        self.load_seconds = time.perf_counter() - started

    def run(self, workload: Workload, *, show_progress: bool = False) -> list[list[int]]:
        from nanovllm_bento import SamplingParams

        sampling = [
            SamplingParams(temperature=workload.temperature, ignore_eos=True, max_tokens=n, detokenize=False, seed=i)
            for i, n in enumerate(workload.output_lens)
        ]
        outputs = self.llm.generate(workload.prompts, sampling, use_tqdm=show_progress)
        return [list(output.outputs[0].token_ids) for output in outputs]


class TransformersEngine:
    """transformers' generate as it comes: one static batch, greedy, KV cache on, no end of sequence.

    A GGUF file is dequantized to a float model when it is loaded, which is how transformers reads those.
    """

    def __init__(self, model: str, dtype: str, device: str = "cpu") -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.name = f"transformers {dtype}"
        self.device = device
        started = time.perf_counter()
        folder, gguf_file = local_files(model)
        kind: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **kind)
        self.model = self.model.to(device=device, dtype=getattr(torch, dtype)).eval()
        # Without an end of sequence every sequence runs to its length, and no logits processor is needed for it.
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.load_seconds = time.perf_counter() - started

    def run(self, workload: Workload, *, show_progress: bool = False) -> list[list[int]]:
        import torch

        if (
            workload.temperature != 0
            or len(set(map(len, workload.prompts))) != 1
            or len(set(workload.output_lens)) != 1
        ):
            raise ValueError("the transformers peer runs greedy workloads of one input and one output length only")
        prompts = torch.tensor(workload.prompts, device=self.device)
        with torch.inference_mode():
            tokens = self.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=workload.output_lens[0],
            )
        return list(tokens[:, prompts.shape[1] :].tolist())


@dataclass(slots=True)
class Timing:
    """Wall-clock seconds of one engine's repeats of one workload, and the tokens of the first."""

    engine: str
    seconds: list[float]
    tokens: list[list[int]]

    def as_dict(self, num_output_tokens: int) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "seconds": [round(s, 4) for s in self.seconds],
            "tok_s_first": round(num_output_tokens / self.seconds[0], 1),
            "tok_s_best": round(num_output_tokens / min(self.seconds), 1),
        }


def measure(
    engines: Sequence[Engine], workloads: Iterator[Workload], repeat: int, *, show_progress: bool = False
) -> tuple[Workload, list[Timing]]:
    """Run every engine on each of ``repeat`` workloads, taking turns. Returns the first workload and the timings.

    Raises RuntimeError if an engine did not yield exactly as many tokens as asked for.
    """
    timings = [Timing(engine.name, [], []) for engine in engines]
    first: Workload | None = None
    for workload in islice(workloads, repeat):
        first = first or workload
        for engine, timing in zip(engines, timings, strict=True):
            gc.collect()
            started = time.perf_counter()
            tokens = engine.run(workload, show_progress=show_progress)
            timing.seconds.append(time.perf_counter() - started)
            got, wanted = [len(t) for t in tokens], workload.output_lens
            if got != wanted:
                raise RuntimeError(f"{engine.name} yielded {sum(got)} tokens where {sum(wanted)} were asked for")
            timing.tokens = timing.tokens or tokens
    assert first is not None, "repeat is at least 1"
    return first, timings


def bench_offline(
    model: str,
    *,
    num_seqs: int = 256,
    input_len: int | None = None,
    output_len: int | None = None,
    repeat: int = 3,
    peers: list[str] | None = None,
    settings: dict[str, Any] | None = None,
    show_progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Throughput of one workload: the seed workload, or fixed lengths (greedy) when both are given.

    ``peers`` are dtypes for transformers to run the same prompts in; they need fixed lengths. ``settings`` are
    EngineConfig keywords; the prefix cache is off and max_num_seqs is at least num_seqs unless they say otherwise.
    """
    if (input_len is None) != (output_len is None):
        raise ValueError("give both input_len and output_len, or neither for the seed workload")
    if peers and input_len is None:
        raise ValueError("a peer needs input_len and output_len: transformers has no continuous batching")

    def workloads() -> Iterator[Workload]:
        if input_len is None or output_len is None:
            return seed_workload(num_seqs)
        return fixed_workload(num_seqs, input_len, output_len)

    longest = next(workloads()).max_len
    settings = {
        "enable_prefix_caching": False,
        "max_model_len": max(longest, 4096) if input_len is None else longest,
        "max_num_seqs": max(256, num_seqs),
        **(settings or {}),
    }
    ours, engines = load_engines(model, settings, peers or [], say)
    warm_up(engines)
    workload, timings = measure(engines, workloads(), repeat, show_progress=show_progress)
    return {
        "benchmark": "offline",
        "environment": environment(),
        "model": model_name(model),
        "settings": settings,
        "engine_info": engine_info(ours),
        "load_seconds": {engine.name: round(engine.load_seconds, 2) for engine in engines},
        "workload": workload.describe(),
        "results": [timing.as_dict(workload.num_output_tokens) for timing in timings],
        **compare(timings, workload),
    }


def bench_cpu(
    model: str,
    *,
    batches: tuple[int, ...] = CPU_BATCHES,
    repeat: int = 5,
    settings: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The CPU comparison: 64 tokens in, 48 out, greedy, at batch 1, 8 and 32, against transformers in fp32 and bf16.

    The headline of each batch is our best run over the best run of whichever transformers was faster.
    """
    settings = {
        "enable_prefix_caching": False,
        "max_model_len": CPU_INPUT_LEN + CPU_OUTPUT_LEN,
        "max_num_seqs": max(batches),
        **(settings or {}),
    }
    ours, engines = load_engines(model, settings, list(PEER_DTYPES), say)
    warm_up(engines)
    rows = []
    for batch in batches:
        prompts = fixed_workload(batch, CPU_INPUT_LEN, CPU_OUTPUT_LEN)
        workload, timings = measure(engines, prompts, repeat)
        row = {
            "batch": batch,
            "workload": workload.describe(),
            "results": [timing.as_dict(workload.num_output_tokens) for timing in timings],
            **compare(timings, workload),
            "goal": CPU_GOALS.get(batch),
        }
        rows.append(row)
        speeds = ", ".join(f"{r['engine']} {r['tok_s_best']} tok/s" for r in row["results"])
        say(f"batch {batch:3}: {speeds}: {row['speedup']}x")
    return {
        "benchmark": "offline-cpu",
        "environment": environment(),
        "model": model_name(model),
        "settings": settings,
        "engine_info": engine_info(ours),
        "load_seconds": {engine.name: round(engine.load_seconds, 2) for engine in engines},
        "method": f"best of {repeat} runs each, taking turns; greedy; speedup is against the faster transformers",
        "batches": rows,
    }


def compare(timings: list[Timing], workload: Workload) -> dict[str, Any]:
    """Ours (the first) against the fastest peer by best run, and how long greedy tokens stay equal to each peer's.

    greedy_agreement: the share of output tokens before the first difference. Different dtypes and summation orders
    move near ties, and one moved tie changes all that follows.
    """
    ours, peers = timings[0], timings[1:]
    if not peers:
        return {}
    fastest = min(peers, key=lambda timing: min(timing.seconds))
    agreement = {
        peer.engine: round(
            sum(shared_prefix_len(a, b) for a, b in zip(ours.tokens, peer.tokens, strict=True))
            / workload.num_output_tokens,
            3,
        )
        for peer in peers
    }
    return {
        "fastest_peer": fastest.engine,
        "speedup": round(min(fastest.seconds) / min(ours.seconds), 2),
        "greedy_agreement": agreement,
    }


def load_engines(
    model: str, settings: dict[str, Any], peers: list[str], say: Callable[[str], None]
) -> tuple[OurEngine, list[OurEngine | TransformersEngine]]:
    """Our engine, and all engines: ours first, then transformers once per dtype of ``peers``."""
    say(f"loading {model}")
    ours = OurEngine(model, **settings)
    engines: list[OurEngine | TransformersEngine] = [ours]
    device = ours.llm.core.info.device
    for dtype in peers:
        say(f"loading {model} with transformers ({dtype})")
        engines.append(TransformersEngine(model, dtype, device))
    return ours, engines


def warm_up(engines: Sequence[Engine]) -> None:
    """One short greedy request per engine, untimed."""
    workload = next(fixed_workload(1, 16, 16, seed=1))
    for engine in engines:
        engine.run(workload)


def engine_info(engine: OurEngine) -> dict[str, Any]:
    """dtype, device, cache size and start-up phases of our engine, as it reports them."""
    import msgspec

    return dict(msgspec.to_builtins(engine.llm.core.info))


def load_llm(model: str, **settings: Any) -> "LLM":
    """An LLM; of a folder without a tokenizer (a config alone, load_format="dummy") one that takes token ids only."""
    from nanovllm_bento import LLM
    from nanovllm_bento.config import EngineConfig
    from nanovllm_bento.engine.core import EngineCore
    from nanovllm_bento.hub import resolve_model

    class TokenIdsLLM(LLM):
        def __init__(self, model: str, **engine_args: Any) -> None:
            self.config = EngineConfig.create(model=model, **engine_args)
            self.core = EngineCore.from_model(self.config)
            self.tokenizer = None  # type: ignore[assignment]
            self._request_ids = itertools.count()

    files = resolve_model(model, settings.get("revision"))
    bare = files.format == "hf" and not (files.path / "tokenizer.json").is_file()
    return (TokenIdsLLM if bare else LLM)(model, **settings)


def local_files(model: str) -> tuple[str, str | None]:
    """(folder, name of the GGUF file in it or None) of a model named in any way this package knows."""
    from nanovllm_bento.hub import resolve_model

    files = resolve_model(model)
    return (str(files.path.parent), files.path.name) if files.format == "gguf" else (str(files.path), None)


def model_name(model: str) -> str:
    """The model as a result file names it: without the folders of this machine."""
    return Path(model).name if Path(model).exists() else model
