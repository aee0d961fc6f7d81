"""GET /metrics: names, meanings and bounds are vLLM's, sums hold over workers and restarts, gauges return to 0."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanovllm_bento.config import EngineConfig, ServiceConfig
from nanovllm_bento.engine.messages import EngineInfo, EngineStats
from nanovllm_bento.sampling_params import SamplingParams
from nanovllm_bento.serving.generation import plan_jobs, run_jobs
from nanovllm_bento.serving.metrics import Metrics, RequestMetrics
from tests.serving.fakes import FakeEngine, byte_tokenizer

GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"}
COUNTERS = {
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "request_success",
}
LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKENS_TO_512 = (1, 2, 5, 10, 20, 50, 100, 200, 500)
HISTOGRAMS: dict[str, tuple[float, ...]] = {
    "time_to_first_token_seconds": (*TTFT, 2560),
    "inter_token_latency_seconds": PER_TOKEN,
    "request_time_per_output_token_seconds": PER_TOKEN,
    "e2e_request_latency_seconds": LATENCY,
    "request_queue_time_seconds": LATENCY,
    "request_inference_time_seconds": LATENCY,
    "request_prefill_time_seconds": LATENCY,
    "request_decode_time_seconds": LATENCY,
    "request_prompt_tokens": TOKENS_TO_512,
    "request_generation_tokens": TOKENS_TO_512,
    "request_prefill_kv_computed_tokens": TOKENS_TO_512,
    "request_params_max_tokens": TOKENS_TO_512,
    "request_params_n": (1, 2, 5, 10, 20),
    "iteration_tokens_total": (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
}
"""vLLM 0.17's names and bounds (vllm/v1/metrics/loggers.py), for a max_model_len of 512."""
MAY_BE_FINER = {name for name, bounds in HISTOGRAMS.items() if bounds in (LATENCY, PER_TOKEN)}

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def metrics(tmp_path: Path) -> Iterator[Metrics]:
    metrics = make(tmp_path)
    yield metrics
    metrics.close()


def make(folder: Path | None, **settings: object) -> Metrics:
    config = ServiceConfig.create(env={}, **settings)
    return Metrics(config, "tiny", folder, engine_config=EngineConfig.create(env={}))


def info() -> EngineInfo:
    return FakeEngine().info


def value(metrics: Metrics, name: str, stats: EngineStats | None = None, **labels: str) -> float:
    """One sample, by its name without prefix and the labels beside model_name and engine."""
    found = [
        sample.value
        for family in text_string_to_metric_families(metrics.render(stats, info()).decode())
        for sample in family.samples
        if sample.name == metrics.prefix + name
        and all(sample.labels[label] == wanted for label, wanted in labels.items())
    ]
    assert len(found) == 1, found
    return found[0]


def buckets(metrics: Metrics, name: str) -> dict[float, float]:
    """Upper bound → observations up to it."""
    return {
        float(sample.labels["le"]): sample.value
        for family in text_string_to_metric_families(metrics.render(None, info()).decode())
        for sample in family.samples
        if sample.name == f"{metrics.prefix}{name}_bucket"
    }


def run(metrics: Metrics, *, num_tokens: int = 3, reason: str = "stop", num_prompt: int = 10) -> RequestMetrics:
    """A request that came at second 1, was scheduled 0.25 s later, had its first token 0.5 s later and one a second."""
    request = metrics.request(num_prompt, 1.0, max_tokens=100)
    request.queued_at = 1.0
    request.first(1.75, 1.25, 1, 4)
    for i in range(1, num_tokens):
        request.tokens(1.75 + i, 1)
    request.finish(1.75 + num_tokens, reason)
    return request


# -- the text ----------------------------------------------------------------------------------------------------------


def test_names_types_and_labels_are_vllms(metrics: Metrics) -> None:
    families = {f.name: f for f in text_string_to_metric_families(metrics.render(EngineStats(), info()).decode())}
    kinds = {"gauge": GAUGES, "counter": COUNTERS, "histogram": HISTOGRAMS.keys()}
    for kind, names in kinds.items():
        for name in names:
            family = families[f"nanovllm:{name}"]
            assert family.type == kind, name
            if name != "cache_config_info":
                assert all(s.labels["model_name"] == "tiny" and s.labels["engine"] == "0" for s in family.samples)
    reasons = {s.labels["finished_reason"] for s in families["nanovllm:request_success"].samples}
    assert reasons == {"stop", "length", "abort", "error"}
    text = metrics.render(None).decode()
    for name in ("prefix_cache_queries", "prompt_tokens", "generation_tokens", "num_preemptions"):
        assert f"nanovllm:{name}_total{{" in text


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_bounds_are_vllms_and_finer_only_below_its_first(metrics: Metrics, name: str) -> None:
    bounds, vllms = list(buckets(metrics, name)), HISTOGRAMS[name]
    assert tuple(bound for bound in bounds if bound >= vllms[0]) == (*vllms, float("inf"))
    assert (len(bounds) > len(vllms) + 1) == (name in MAY_BE_FINER)


def test_the_prefix_can_be_vllms(tmp_path: Path) -> None:
    lines = make(tmp_path, metrics_prefix="vllm:").render(EngineStats(), info()).decode().splitlines()
    assert all(line.startswith(("vllm:", "# HELP vllm:", "# TYPE vllm:")) for line in lines)


@pytest.mark.parametrize("prefix", ["", "1a", "a b", "a{", "a\n"])
def test_a_prefix_that_is_no_name_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="metrics_prefix"):
        ServiceConfig.create(env={}, metrics_prefix=prefix)


def test_a_model_name_of_any_text_is_escaped(tmp_path: Path) -> None:
    name = 'a"b\\c\nnanovllm:num_requests_running 5'
    text = Metrics(ServiceConfig.create(env={}), name, tmp_path).render(None).decode()
    gauge = next(f for f in text_string_to_metric_families(text) if f.name == "nanovllm:num_requests_running")
    assert [s.labels["model_name"] for s in gauge.samples] == [name]


def test_cache_config_info_tells_of_the_cache(metrics: Metrics) -> None:
    text = metrics.render(None, info()).decode()
    family = next(f for f in text_string_to_metric_families(text) if f.name == "nanovllm:cache_config_info")
    (sample,) = family.samples
    assert sample.value == 1 and sample.labels["engine"] == "0"
    assert (sample.labels["block_size"], sample.labels["num_gpu_blocks"]) == ("16", "64")
    assert sample.labels["enable_prefix_caching"] == "True"
    assert "cache_config_info" not in metrics.render(None).decode(), "nothing is known before the engine is ready"


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_finished_request_counts_in_every_histogram_once(metrics: Metrics) -> None:
    for num_tokens, reason in ((1, "stop"), (3, "length"), (5, "stop")):
        run(metrics, num_tokens=num_tokens, reason=reason)
    for name in HISTOGRAMS.keys() - {"inter_token_latency_seconds", "iteration_tokens_total"}:
        assert value(metrics, f"{name}_count") == 3, name
        assert buckets(metrics, name)[float("inf")] == 3, name
    assert value(metrics, "inter_token_latency_seconds_count") == 0 + 2 + 4
    assert value(metrics, "prompt_tokens_total") == 30
    assert value(metrics, "prompt_tokens_cached_total") == 12
    assert value(metrics, "generation_tokens_total") == 9
    assert value(metrics, "request_success_total", finished_reason="stop") == 2
    assert value(metrics, "request_success_total", finished_reason="length") == 1


def test_times_mean_what_vllm_means_by_them(metrics: Metrics) -> None:
    run(metrics, num_tokens=3)
    sums = {
        "request_queue_time_seconds": 0.25,  # from the queue to the first step
        "request_prefill_time_seconds": 0.5,  # to the first token
        "time_to_first_token_seconds": 0.75,  # from the request's arrival
        "request_decode_time_seconds": 2.0,  # from the first token to the last
        "request_inference_time_seconds": 2.5,  # prefill and decode
        "request_time_per_output_token_seconds": 1.0,
        "inter_token_latency_seconds": 2.0,
        "e2e_request_latency_seconds": 3.75,
        "request_prompt_tokens": 10,
        "request_generation_tokens": 3,
        "request_prefill_kv_computed_tokens": 6,
        "request_params_max_tokens": 100,
        "request_params_n": 1,
    }
    assert {name: value(metrics, f"{name}_sum") for name in sums} == pytest.approx(sums)


def test_a_value_on_a_bound_belongs_below_it(metrics: Metrics) -> None:
    run(metrics, num_prompt=10)
    found = buckets(metrics, "request_prompt_tokens")
    assert (found[5], found[10], found[20]) == (0, 1, 1)


def test_tokens_that_come_together_share_the_time(metrics: Metrics) -> None:
    """So the histogram is the same whether steps are joined into one chunk or not."""
    request = metrics.request(1, 0.0)
    request.first(1.0, 0.5, 2, 0)
    request.tokens(1.0 + 4 * 0.02, 4)
    request.tokens(2.0, 0)
    found = buckets(metrics, "inter_token_latency_seconds")
    assert (found[0.01], found[0.025], found[float("inf")]) == (0, 4, 4)
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(0.08)
    assert value(metrics, "generation_tokens_total") == 6


def test_a_longer_value_than_any_bound_still_counts(metrics: Metrics) -> None:
    request = metrics.request(10**9, 0.0)
    request.first(10**6, 0.0, 1, 0)
    request.finish(10**6, "stop")
    for name in ("time_to_first_token_seconds", "request_prompt_tokens"):
        found = buckets(metrics, name)
        assert found.pop(float("inf")) == 1 and not any(found.values())


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_what_did_not_run_to_its_end_is_counted_but_not_measured(metrics: Metrics, reason: str) -> None:
    run(metrics, reason=reason)
    never_begun = metrics.request(5, 0.0)
    never_begun.finish(1.0, reason)
    assert value(metrics, "request_success_total", finished_reason=reason) == 2
    assert value(metrics, "e2e_request_latency_seconds_count") == 0
    assert value(metrics, "time_to_first_token_seconds_count") == 1
    assert value(metrics, "generation_tokens_total") == 3


def test_only_the_first_end_counts(metrics: Metrics) -> None:
    request = run(metrics)
    request.finish(9.0, "abort")
    assert value(metrics, "request_success_total", finished_reason="stop") == 1
    assert value(metrics, "request_success_total", finished_reason="abort") == 0


def test_choices_count_the_parameter_n_once(metrics: Metrics) -> None:
    for n in (3, 0, 0):
        request = metrics.request(1, 0.0, n=n)
        request.first(1.0, 0.5, 1, 0)
        request.finish(1.0, "stop")
    assert value(metrics, "request_params_n_count") == 1 and value(metrics, "request_params_n_sum") == 3


def test_a_clock_of_another_process_never_gives_negative_times(metrics: Metrics) -> None:
    for scheduled_at in (0.0, 10**9):
        request = metrics.request(1, 0.0)
        request.first(request.queued_at + 1, scheduled_at, 1, 0)
        assert request.queue_seconds >= 0 and request.prefill_seconds >= 0


def test_refusals_are_counted_by_status(metrics: Metrics) -> None:
    for status in (429, 429, 418):
        metrics.refused(status)
    assert value(metrics, "requests_refused_total", status="429") == 2
    assert value(metrics, "requests_refused_total", status="other") == 1


# -- the engine --------------------------------------------------------------------------------------------------------


def stats(epoch: int, preemptions: int, **more: int) -> EngineStats:
    steps = [0] * 14
    steps[1] = preemptions
    return EngineStats(
        num_preemptions=preemptions,
        prefix_cache_queries=100 * preemptions,
        prefix_cache_hits=10 * preemptions,
        iteration_tokens=steps,
        iteration_tokens_sum=5 * preemptions,
        epoch=epoch,
        **more,
    )


def test_engine_totals_neither_fall_nor_double_when_it_restarts(metrics: Metrics, tmp_path: Path) -> None:
    other = make(tmp_path)
    seen = []
    news = [(metrics, 0, 2), (other, 0, 5), (metrics, 0, 3), (other, 1, 1), (metrics, 0, 4), (metrics, 1, 3)]
    news += [(other, 1, 3), (other, 1, 0), (metrics, 2, 0), (other, 3, 1)]  # the last but one counted nothing
    for worker, epoch, preemptions in news:
        seen.append(value(worker, "num_preemptions_total", stats(epoch, preemptions)))
    assert seen == [2, 5, 5, 6, 6, 8, 8, 8, 8, 9]
    for worker in (metrics, other):
        assert value(worker, "prefix_cache_queries_total") == 900
        assert value(worker, "prefix_cache_hits_total") == 90
        assert value(worker, "iteration_tokens_total_sum") == 45
        assert buckets(worker, "iteration_tokens_total")[8] == 9
        assert buckets(worker, "iteration_tokens_total")[1] == 0
        assert value(worker, "engine_restarts_total") == 3


def test_engine_totals_survive_all_workers(tmp_path: Path) -> None:
    first = make(tmp_path)
    first.record_engine(stats(0, 7))
    first.close()
    assert value(make(tmp_path), "num_preemptions_total") == 7


def test_before_there_is_a_folder_a_worker_counts_for_itself(tmp_path: Path) -> None:
    metrics = make(None)
    run(metrics)
    for epoch, preemptions in ((0, 2), (0, 1), (1, 1)):
        metrics.record_engine(stats(epoch, preemptions))
    assert value(metrics, "num_preemptions_total") == 3
    metrics.open(tmp_path)
    run(metrics)
    assert value(metrics, "num_preemptions_total") == 3
    assert value(metrics, "request_success_total", finished_reason="stop") == 2


def test_gauges_are_the_engines_and_0_without_one(metrics: Metrics) -> None:
    now = EngineStats(num_requests_running=3, num_requests_waiting=2, num_blocks_used=16, num_blocks=64)
    assert value(metrics, "num_requests_running", now) == 3
    assert value(metrics, "num_requests_waiting", now) == 2
    assert value(metrics, "kv_cache_usage_perc", now) == 0.25
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert value(metrics, name, None) == 0


def test_requests_that_a_worker_holds_back_are_waiting(metrics: Metrics, tmp_path: Path) -> None:
    other = make(tmp_path)
    first, second, third = (metrics.request(1, 0.0, held=True) for _ in range(3))
    other.request(1, 0.0, held=True)
    now = EngineStats(num_requests_waiting=2)
    assert value(metrics, "num_requests_waiting", now) == value(other, "num_requests_waiting", now) == 2 + 4
    first.submitted()
    first.submitted()
    first.finish(1.0, "stop")
    second.finish(1.0, "abort")
    assert value(metrics, "num_requests_waiting", now) == 2 + 2
    other.close()  # as when its process ends
    assert value(metrics, "num_requests_waiting", now) == 2 + 1
    assert value(make(tmp_path), "num_requests_waiting", now) == 2 + 1, "the next worker takes the file, not the gauge"
    third.submitted()
    assert value(metrics, "num_requests_waiting", None) == 0


async def test_gauges_return_to_0_after_aborts(metrics: Metrics) -> None:
    engine = FakeEngine()
    engine.endless = True
    engine.make_room()
    tokenizer, sampling = byte_tokenizer(), SamplingParams(max_tokens=None, n=3)
    jobs = plan_jobs("r", [[1, 2, 3]], sampling, engine.info)
    begun = [asyncio.Event() for _ in jobs]
    task = asyncio.create_task(run_jobs(engine, tokenizer, jobs, lambda index, delta: begun[index].set()))
    for event in begun:
        await event.wait()
    assert value(metrics, "num_requests_running", engine.stats) == 3
    assert value(metrics, "kv_cache_usage_perc", engine.stats) > 0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert value(metrics, name, engine.stats) == 0


# -- over HTTP ---------------------------------------------------------------------------------------------------------


async def test_what_was_served_is_seen_over_http(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    for body in ({**chat, "n": 2}, {**chat, "stream": True, "max_tokens": 3}):
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    assert (await http.post("/v1/chat/completions", json={**chat, "model": "other"})).status_code == 404
    engine.dies_after = 2
    assert (await http.post("/v1/chat/completions", json=chat)).status_code == 500
    answer = await http.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {
        (sample.name.removeprefix("nanovllm:"), sample.labels.get("finished_reason") or sample.labels.get("status")): (
            sample.value
        )
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if "le" not in sample.labels
    }
    reasons = {reason: found["request_success_total", reason] for reason in ("stop", "length", "abort", "error")}
    assert reasons == {"stop": 2, "length": 1, "abort": 0, "error": 1}
    assert found["requests_refused_total", "404"] == 1 and found["requests_refused_total", "500"] == 1
    assert found["e2e_request_latency_seconds_count", None] == 3
    assert found["request_params_n_sum", None] == 2 + 1
    assert found["generation_tokens_total", None] == 2 * (len("Hello, world!") + 1) + 3 + 2
    assert found["num_requests_running", None] == 0


# -- several processes -------------------------------------------------------------------------------------------------

WORKER = """
import sys
from pathlib import Path
from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.serving.metrics import Metrics
metrics = Metrics(ServiceConfig.create(env={}), "tiny", Path(sys.argv[1]))
print("ready", flush=True)
for line in sys.stdin:
    for _ in range(int(line)):
        request = metrics.request(10, 0.0, max_tokens=5)
        request.first(1.0, 0.5, 1, 0)
        request.tokens(2.0, 1)
        request.finish(2.0, "length")
    print("done", flush=True)
"""


class Worker:
    """A process that counts requests on command."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", WORKER, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def begin(self, num_requests: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{num_requests}\n")

    def wait(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{word}\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[list[Worker]]:
    workers = [Worker(tmp_path) for _ in range(3)]
    try:
        for worker in workers:
            worker.wait("ready")
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.communicate()


def test_workers_are_summed_and_counters_never_fall(tmp_path: Path, workers: list[Worker]) -> None:
    scraper = make(tmp_path)
    for worker in workers:
        worker.begin(2000)
    seen = [0.0]
    while seen[-1] < 6000:  # scraped while three processes count
        assert all(worker.process.poll() is None for worker in workers)
        seen.append(value(scraper, "request_success_total", finished_reason="length"))
    for worker in workers:
        worker.wait("done")

    # Killed amid its work: what it counted stays, and a new worker goes on from there.
    workers[0].begin(10**9)
    while value(scraper, "request_success_total", finished_reason="length") <= 6000:
        assert workers[0].process.poll() is None
    workers[0].kill()
    seen.append(value(scraper, "request_success_total", finished_reason="length"))
    files = sorted(os.listdir(tmp_path))
    workers.append(Worker(tmp_path))
    workers[-1].wait("ready")
    seen.append(value(scraper, "request_success_total", finished_reason="length"))
    workers[-1].begin(5)
    workers[-1].wait("done")
    seen.append(value(scraper, "request_success_total", finished_reason="length"))
    assert seen == sorted(seen) and seen[-1] == seen[-2] + 5 == seen[-3] + 5
    assert sorted(os.listdir(tmp_path)) == files, "a file that nobody holds is taken before one is added"

    # The histograms agree, up to the one request that the killed worker was counting.
    total = seen[-1]
    assert value(scraper, "generation_tokens_total") - 2 * total in (0, 1, 2)
    for name in ("e2e_request_latency_seconds", "time_to_first_token_seconds", "request_prompt_tokens"):
        assert abs(value(scraper, f"{name}_count") - total) <= 1


def test_a_file_of_another_version_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "worker7.metrics").write_bytes(b"nanovllm" + b"\1" * 5000)
    (tmp_path / "worker8.metrics").write_bytes(b"")
    metrics = make(tmp_path)
    run(metrics)
    assert value(metrics, "request_success_total", finished_reason="stop") == 1
    (tmp_path / "worker0.metrics").rename(tmp_path / "worker9.metrics")
    (tmp_path / "worker7.metrics").rename(tmp_path / "worker0.metrics")
    newcomer = make(tmp_path)  # takes the old one for itself
    run(newcomer)
    assert value(metrics, "request_success_total", finished_reason="stop") == 2
