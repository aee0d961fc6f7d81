"""The evaluation report: runs every section on one model and writes report.json, report.md and plots.

One engine lives at a time, one per KV cache type. Sections are isolated: what fails is recorded with its error beside
what did not, and the JSON is written after each, so that a run that is cut short leaves what it had.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanovllm_bento.bench import kernels, markdown, offline, prefix, roofline, steps, workloads
from nanovllm_bento.bench.environment import environment, write_result
from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.errors import ConfigError
from nanovllm_bento.hub import load_config_dict, resolve_model
from nanovllm_bento.kernels.linear import best_cpu_dtype
from nanovllm_bento.models.config import ModelConfig

ENGINE_SECTIONS = ("throughput", "steps", "prefill", "prefix", "ttft", "memory")
SECTIONS = (*ENGINE_SECTIONS, "kernels", "startup")
NUM_SEQS = {"cuda": (1, 16, 64, 256), "cpu": (1, 4)}
SEED_MAX_LEN = {"cuda": 1024, "cpu": 128}
"""Longest prompt and output of the seed workload; 1024 is what every other engine's figures are for."""
CPU_MAX_LEN = 512
"""Longest conversation and TTFT prompt on a CPU, in tokens."""
FRESH_START_TIMEOUT = 300.0
"""Seconds that a fresh process gets."""

_FIRST_TOKEN = """
import json, sys
settings = json.loads(sys.argv[1])
from nanovllm_bento.bench.offline import OurEngine
from nanovllm_bento.bench.workloads import Workload
engine = OurEngine(**settings)
engine.run(Workload("first token", [[1] * 16], [1], 0.0))
print(json.dumps({"first_token": engine.llm.core.info.startup_seconds}), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Options:
    """What to run. Empty or None: chosen by the device. settings: EngineConfig keywords."""

    model: str
    out: Path
    sections: Sequence[str] = SECTIONS
    num_seqs: Sequence[int] = ()
    kv_cache_dtypes: Sequence[str] = ("auto",)
    repeat: int = 2
    seed_max_len: int | None = None
    random_weights: bool = False
    peers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    quality: Any = None
    settings: dict[str, Any] = field(default_factory=dict)


def run_report(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the sections and write report.json into options.out. Raises ConfigError or ModelError for bad options."""
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        raise ConfigError(f"sections={','.join(unknown)}: known are {', '.join(SECTIONS)}.")
    return _Report(options, say).run()


def finish(result: dict[str, Any], out: Path, *, plots: bool) -> list[Path]:
    """Write a result's JSON, its Markdown and, if asked for, its plots into a folder. Returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    images: list[Path] = []
    if plots:
        from nanovllm_bento.bench.plots import write_plots

        images = write_plots(result, out)
    write_result(result, out / "report.json")
    (out / "report.md").write_text(markdown.render(result, [image.name for image in images]))
    return [out / "report.json", out / "report.md", *images]


def failed_sections(result: dict[str, Any]) -> list[str]:
    return [name for name, section in result["sections"].items() if section["errors"]]


def _settings_in_effect(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Every engine setting that is not the default, the environment's included."""
    return EngineConfig.create(model=model, **settings).model_dump(exclude_defaults=True, exclude={"model"})


class _Report:
    """One run: options made definite, and the result as it grows."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.options, self.say = options, say
        self.config = ModelConfig.from_dict(load_config_dict(resolve_model(options.model)))
        cuda = options.settings.get("device") != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        kind = self.device.type
        self.num_seqs = sorted(set(options.num_seqs or NUM_SEQS[kind]))
        self.settings = {
            "max_model_len": min(4096, self.config.max_context),
            "max_num_seqs": max(256, *self.num_seqs),
            **options.settings,
        }
        limit = min(self.settings["max_model_len"], self.config.max_context) // 2
        self.seed_max_len = min(options.seed_max_len or SEED_MAX_LEN[kind], limit)
        self.ceilings: roofline.Ceilings | None = None
        self.dtype: torch.dtype | None = None
        self.result: dict[str, Any] = {
            "benchmark": "report",
            "environment": environment(),
            "model": offline.model_name(options.model),
            "random_weights": options.random_weights or self.settings.get("load_format") == "dummy",
            "device": kind,
            "dtype": None,
            "settings": _settings_in_effect(options.model, self.settings),
            "ceilings": None,
            "sections": {},
            "peers": options.peers,
            "quality": options.quality,
        }

    def run(self) -> dict[str, Any]:
        wanted = self.options.sections
        if {"throughput", "steps", "prefill", "kernels"} & set(wanted):
            dtype = torch.bfloat16 if self.device.type == "cuda" else best_cpu_dtype()
            self.ceilings = roofline.measure_ceilings(self.device, dtype)
            self.result["ceilings"] = self.ceilings.as_dict()
            self._release()
        if {*ENGINE_SECTIONS, "startup"} & set(wanted):
            for kv in self.options.kv_cache_dtypes:
                first = kv == self.options.kv_cache_dtypes[0]  # what the prefix cache finds does not depend on it
                self._run_engine(kv, [n for n in ENGINE_SECTIONS if n in wanted and (first or n != "prefix")])
                self._release()
        if "kernels" in wanted:
            self.say("kernels")
            with self._section("kernels") as (rows, errors):
                self._kernels(rows, errors)
            self._release()
        if "startup" in wanted:
            self.say("start-up in a fresh process")
            for kind in ("kernel caches empty", "kernel caches warm"):
                with self._section("startup", row=kind) as (rows, _):
                    rows.append(self._fresh_start(kind))
        order = {name: self.result["sections"][name] for name in SECTIONS if name in self.result["sections"]}
        self.result["sections"] = order
        self._save()
        return self.result

    def _run_engine(self, kv: str, sections: Sequence[str]) -> None:
        """All sections that need an engine with this KV cache; if it cannot be had, all of them fail."""
        self.say(f"loading {self.options.model}, KV cache {kv}")
        engine = None
        try:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            engine = offline.OurEngine(self.options.model, **self.settings, kv_cache_dtype=kv)
            info = engine.llm.core.info
            self.result["dtype"], self.dtype = info.dtype, getattr(torch, info.dtype)
            engine.run(self._fit(next(workloads.fixed_workload(1, 16, 16, seed=1)), info.vocab_size))
        except Exception as error:
            for name in (*sections, *(["startup"] if "startup" in self.options.sections else [])):
                self._note(name, error, kv_cache_dtype=kv)
            return
        core, cost = engine.llm.core, self._cost(kv)
        if "startup" in self.options.sections:
            with self._section("startup", kv_cache_dtype=kv) as (rows, _):
                phases = {name: round(seconds, 3) for name, seconds in core.info.startup_seconds.items()}
                kind = f"in this process, KV cache {kv}"
                rows.append({"kind": kind, "seconds": round(engine.load_seconds, 3), "phases": phases})
        ttft = {} if self.device.type == "cuda" else {"prompt_len": CPU_MAX_LEN, "repeat": 3}
        measures: dict[str, Iterator[tuple[Any, Callable[[], dict[str, Any]]]]] = {
            "throughput": self._throughput(engine, cost),
            "steps": self._steps(core, cost, kv),
            "prefill": iter([(None, partial(self._prefill, core, cost))]),
            "prefix": self._prefix(core, cost),
            "ttft": iter([(None, partial(prefix.ttft_row, core, **ttft))]),
            "memory": iter([(None, partial(self._memory, core, cost))]),
        }
        for name in sections:
            self.say(f"{name}, KV cache {kv}")
            for row, measure in tqdm(list(measures[name]), desc=name, leave=False):
                with self._section(name, kv_cache_dtype=kv, row=row) as (rows, _):
                    found = measure()
                    rows.append({"kv_cache_dtype": kv, **found})
                self._drain(core)

    # -- sections: pairs of (what it is called if it fails, how to measure its row) -----------------------------------

    def _throughput(
        self, engine: offline.OurEngine, cost: roofline.ModelCost
    ) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
        core, ceilings = engine.llm.core, self.ceilings
        assert ceilings is not None

        def measure(n: int) -> dict[str, Any]:
            length = self.seed_max_len
            draws = workloads.seed_workload(n, max_in=length, max_out=length)
            with prefix.prefix_caching(core, False):
                workload, timings = offline.measure(
                    [engine], (self._fit(w, core.info.vocab_size) for w in draws), self.options.repeat
                )
            floor = roofline.floor_tok_s(workload, cost, ceilings)
            found = timings[0].as_dict(workload.num_output_tokens)
            return {
                "num_seqs": n,
                "workload": workload.name,
                "input_tokens": workload.num_input_tokens,
                "output_tokens": workload.num_output_tokens,
                **found,
                "floor_tok_s": round(floor, 1),
                "floor_share": round(found["tok_s_best"] / floor, 4),
            }

        for n in self.num_seqs:
            yield n, partial(measure, n)

    def _steps(
        self, core: EngineCore, cost: roofline.ModelCost, kv: str
    ) -> Iterator[tuple[Any, Callable[[], dict[str, Any]]]]:
        ceilings = self.ceilings
        assert ceilings is not None

        def measure(n: int) -> dict[str, Any]:
            row = steps.step_breakdown(core, n, steps.TIMED_STEPS if self.device.type == "cuda" else 16)
            floor = ceilings.seconds(*cost.decode_step([row["context_len"]] * n))
            row["floor_us"] = round(floor * 1e6, 1)
            if self.device.type == "cuda":
                with self._section("steps", kv_cache_dtype=kv, row=f"{n}, kernels"):
                    row["kernels"] = steps.kernel_shares(core, n)
            return row

        for n in self.num_seqs:
            yield n, partial(measure, n)

    def _prefill(self, core: EngineCore, cost: roofline.ModelCost) -> dict[str, Any]:
        assert self.ceilings is not None
        row = steps.prefill_breakdown(core)
        num_prompts = row["tokens"] // row["prompt_len"]
        floor = self.ceilings.seconds(cost.weight_bytes(row["tokens"]), num_prompts * cost.prefill(row["prompt_len"]))
        return {**row, "floor_us": round(floor * 1e6, 1)}

    def _prefix(self, core: EngineCore, cost: roofline.ModelCost) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        gpu = self.device.type == "cuda"
        chats, requests = (64, 256) if gpu else (4, 8)
        limit = core.info.max_model_len if gpu else min(core.info.max_model_len, CPU_MAX_LEN)
        sets = (
            workloads.multi_turn(chats, 6 if gpu else 3, max_len=limit),
            workloads.shared_system_prompt(requests, output_len=32 if gpu else 8, max_len=limit),
        )
        for conversations in sets:
            yield conversations.name, partial(prefix.prefix_row, core, conversations, cost)

    def _memory(self, core: EngineCore, cost: roofline.ModelCost) -> dict[str, Any]:
        """Bytes. graph_bytes: memory pools of CUDA graphs; peaks: since this engine began to load."""
        info = core.info
        tied = self.config.tie_word_embeddings
        row: dict[str, Any] = {
            "weights_bytes": cost.all_weight_bytes + (0 if tied else cost.head_weights * cost.weight_itemsize),
            "kv_cache_bytes": info.num_cache_tokens * cost.kv_bytes_per_token,
            "num_blocks": info.num_blocks,
            "cache_tokens": info.num_cache_tokens,
            "kv_bytes_per_token": cost.kv_bytes_per_token,
            "graph_bytes": None,
            "peak_allocated_bytes": None,
            "peak_reserved_bytes": None,
        }
        if self.device.type == "cuda":
            # Other pools than the default one, whose id is (0, 0), are those of graphs.
            pools = [s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
            row["graph_bytes"] = sum(pools)
            row["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            row["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        return row

    def _kernels(self, rows: list[dict[str, Any]], errors: list[dict[str, Any]]) -> None:
        assert self.ceilings is not None
        gpu = self.device.type == "cuda"
        dtype = self.dtype or (torch.bfloat16 if gpu else best_cpu_dtype())
        fp8 = [torch.float8_e4m3fn] if "fp8_e4m3" in self.options.kv_cache_dtypes else []
        kernels.measure_kernels(
            rows,
            errors,
            self.config,
            self.ceilings,
            device=self.device,
            dtype=dtype,
            kv_dtypes=[dtype, *fp8],
            block_size=self.settings.get("block_size") or 16,
            sizes=kernels.Sizes() if gpu else kernels.CPU_SIZES,
        )

    def _fresh_start(self, kind: str) -> dict[str, Any]:
        """Seconds from starting a Python process to its engine's first token; "empty": with a new, empty Triton cache.

        What the operating system keeps of files in memory is as it is.
        """
        settings = {"model": self.options.model, **self.settings, "kv_cache_dtype": self.options.kv_cache_dtypes[0]}
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
            env = dict(os.environ)
            if kind == "kernel caches empty":
                env |= {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
            started = time.perf_counter()
            command = [sys.executable, "-c", _FIRST_TOKEN, json.dumps(settings)]
            with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True) as process:
                deadline = threading.Timer(FRESH_START_TIMEOUT, process.kill)
                deadline.daemon = True
                deadline.start()
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith('{"first_token"'):
                        seconds = time.perf_counter() - started
                        phases = {n: round(s, 3) for n, s in json.loads(line)["first_token"].items()}
                        process.wait()
                        deadline.cancel()
                        return {"kind": f"fresh process, {kind}", "seconds": round(seconds, 3), "phases": phases}
            deadline.cancel()
            log.seek(0)
            tail = log.read().strip().splitlines()[-3:]
            raise RuntimeError(f"the process ended with status {process.returncode}: {' / '.join(tail)}")

    # -- helpers ------------------------------------------------------------------------------------------------------

    @staticmethod
    def _drain(core: EngineCore) -> None:
        """Leave the engine idle, whatever a failed section left in it."""
        for request_id in list(core.scheduler.sequences):
            core.abort(request_id)
        while core.has_work:
            core.step()

    def _cost(self, kv: str) -> roofline.ModelCost:
        assert self.dtype is not None
        return roofline.ModelCost.of(
            self.config,
            self.dtype.itemsize,
            1 if kv.startswith("fp8") else self.dtype.itemsize,
            self.result["settings"].get("tensor_parallel_size", 1),
        )

    @staticmethod
    def _fit(workload: workloads.Workload, vocab_size: int) -> workloads.Workload:
        """The workload itself, unless the vocabulary is smaller than the range its tokens are drawn from."""
        if vocab_size > workloads.MAX_TOKEN_ID:
            return workload
        prompts = [[token % vocab_size for token in prompt] for prompt in workload.prompts]
        return workloads.Workload(workload.name, prompts, workload.output_lens, workload.temperature)

    @contextmanager
    def _section(self, name: str, **where: Any) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
        """Gives a section's rows and errors to append to; an exception becomes an error of the section."""
        section = self.result["sections"].setdefault(name, {"rows": [], "errors": [], "seconds": 0.0})
        started = time.perf_counter()
        try:
            yield section["rows"], section["errors"]
        except Exception as error:
            self._note(name, error, **where)
        section["seconds"] = round(section["seconds"] + time.perf_counter() - started, 2)
        self._save()

    def _note(self, name: str, error: Exception, **where: Any) -> None:
        section = self.result["sections"].setdefault(name, {"rows": [], "errors": [], "seconds": 0.0})
        said = f"{type(error).__name__}: {error}"
        section["errors"].append({**{k: v for k, v in where.items() if v is not None}, "error": said})
        self.say(f"{name} failed: {said}")

    def _save(self) -> None:
        write_result(self.result, self.options.out / "report.json")

    def _release(self) -> None:
        """Give an engine's memory back; graphs and modules hold each other in cycles."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
