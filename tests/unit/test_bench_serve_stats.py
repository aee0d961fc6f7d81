"""The load generator's numbers, from records with known times."""

from array import array
from typing import Any

import numpy as np
import pytest

from nanovllm_bento.bench import serve_report
from nanovllm_bento.bench.compare import compare_results, differences
from nanovllm_bento.bench.serve_messages import Done, Record, Usage
from nanovllm_bento.bench.serve_stats import peak_concurrency, spread, summarize, timeline


def record(started: float, *chunks: float, tokens: int | None = None, **fields: Any) -> Record:
    """A whole answer whose chunks came so many seconds after ``started``."""
    at = [started + c for c in chunks]
    last = at[-1] if at else None
    return Record(
        **{
            "item": 0,
            "turn": 0,
            "wanted_tokens": None,
            "planned": None,
            "started": started,
            "first": at[0] if at else None,
            "last": last,
            "ended": last or started,
            "chunks": array("d", chunks).tobytes(),
            "prompt_tokens": 10,
            "cached_tokens": 4,
            "output_tokens": len(chunks) if tokens is None else tokens,
            "finish_reason": "length",
            "status": 200,
            **fields,
        }
    )


def done(
    *records: Record, cpu: float = 1.0, waited: float | None = 0.0, seconds: float = 10.0, not_sent: int = 0
) -> Done:
    return Done(list(records), Usage(seconds, cpu, 0.2, waited), not_sent, 0)


def failed(started: float, kind: str, detail: str = "", ended: float = 0.0) -> Record:
    return record(started, failure=kind, detail=detail, ended=ended or started)


def summary(
    *parts: Done, slo: dict[str, float] | None = None, start: float = 100.0, ignore_eos: bool = False
) -> dict[str, Any]:
    return summarize(parts, start, slo=slo or {}, ignore_eos=ignore_eos)


def test_latencies_are_what_their_names_say() -> None:
    # 5 tokens in 3 chunks: TTFT 0.2 s, E2EL 1.0 s, TPOT (1.0 - 0.2) / 4, gaps of 0.3 and 0.5 s
    found = summary(done(record(100.0, 0.2, 0.5, 1.0, tokens=5)))
    assert found["ttft_ms"]["median"] == pytest.approx(200)
    assert found["e2el_ms"]["median"] == pytest.approx(1000)
    assert found["tpot_ms"]["median"] == pytest.approx(200)
    assert (found["itl_ms"]["mean"], found["itl_ms"]["max"]) == (pytest.approx(400), pytest.approx(500))
    assert (found["tokens_per_chunk"], found["chunks_per_s"]) == (pytest.approx(5 / 3, abs=1e-3), 3.0)


def test_throughput_is_over_the_whole_run_of_all_processes() -> None:
    found = summary(done(record(100.0, 1.0, tokens=6)), done(record(101.0, 1.0, 3.0, tokens=2), record(100.5, 0.5)))
    assert found["seconds"] == 4.0 and found["requests_per_s"] == 0.75
    assert (found["output_tok_s"], found["input_tok_s"], found["total_tok_s"]) == (9 / 4, 30 / 4, 39 / 4)
    assert found["requests"]["sent"] == found["requests"]["completed"] == 3


def test_an_answer_of_one_token_has_no_tpot() -> None:
    found = summary(done(record(100.0, 0.2)))
    assert found["tpot_ms"] is None and found["itl_ms"] is None and found["ttft_ms"]["median"] == pytest.approx(200)


def test_failures_are_counted_by_kind_and_count_in_nothing_else() -> None:
    parts = [
        failed(100.0, "http_429", "slow down"),
        failed(100.0, "http_429", "slow down"),
        failed(101, "cut", ended=109),
    ]
    found = summary(done(record(100.0, 0.5, 1.0), *parts, not_sent=3))
    requests = found["requests"]
    assert (requests["sent"], requests["completed"], requests["failed"], requests["turns_not_sent"]) == (4, 1, 3, 3)
    assert requests["failures"] == {
        "http_429": {"count": 2, "examples": ["slow down"]},
        "cut": {"count": 1, "examples": []},
    }
    assert found["output_tokens"] == 2 and found["seconds"] == 9.0  # the run lasted until the last failure
    said = "\n".join(serve_report.text({"model": "m", "url": "u", "endpoint": "/e", "runs": [shown(found)]}))
    assert (
        "1 completed, 3 failed" in said and "FAILED 2 × http_429: slow down" in said and "3 turns were not sent" in said
    )


def test_a_run_in_which_everything_fails_has_a_result() -> None:
    found = summary(done(failed(100.0, "connect", "refused", ended=101.0)), slo={"ttft": 1.0})
    assert found["requests_per_s"] == 0 and found["ttft_ms"] is None and found["goodput"]["share"] == 0
    assert any(
        "FAILED" in line
        for line in serve_report.text({"model": "m", "url": "u", "endpoint": "/e", "runs": [shown(found)]})
    )
    assert summary(done())["requests"]["sent"] == 0


def test_percentiles_are_numpys() -> None:
    values = list(np.random.default_rng(0).gamma(2.0, 10.0, 999))
    found = spread(values)
    assert found is not None
    for name, p in (("median", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        assert found[name] == pytest.approx(float(np.percentile(values, p)), abs=1e-3)
    assert found["mean"] == pytest.approx(float(np.mean(values)), abs=1e-3)


def test_goodput_counts_requests_that_meet_every_bound() -> None:
    good = record(100.0, 0.1, 0.2, 0.3)
    late_first, slow = record(100.0, 0.5, 0.6, 0.7), record(100.0, 0.1, 1.0, 2.0)
    found = summary(
        done(good, late_first, slow, failed(100.0, "http_503")), slo={"ttft": 200, "tpot": 150, "e2el": 5000}
    )
    assert found["goodput"]["share"] == 0.25 and found["goodput"]["requests_per_s"] == 0.5
    assert found["goodput"]["share_each"] == {"ttft": 0.5, "tpot": 0.5, "e2el": 0.75}


def test_prefix_cache_comes_from_usage() -> None:
    told = [
        record(100.0, 1.0, cached_tokens=8),
        record(100.0, 1.0, cached_tokens=0),
        record(100.0, 1.0, cached_tokens=None),
    ]
    found = summary(done(*told))["prefix_cache"]
    assert found == {"cached_tokens": 8, "prompt_tokens": 20, "hit_rate": 0.4}
    assert summary(done(record(100.0, 1.0, cached_tokens=None)))["prefix_cache"] is None


def test_without_usage_the_chunks_are_counted_and_it_is_said() -> None:
    found = summary(done(record(100.0, 0.1, 0.2, output_tokens=None)))
    assert found["output_tokens"] == 2 and found["output_tokens_counted_by"] == "chunks"


def test_answers_of_another_length_than_asked_for_are_noticed() -> None:
    parts = done(record(100.0, 0.1, wanted_tokens=1), record(100.0, 0.1, wanted_tokens=2))
    assert summary(parts, ignore_eos=True)["short_answers"] == 1
    assert summary(parts)["short_answers"] is None


@pytest.mark.parametrize(
    ("cpu", "waited", "bound", "starved"), [(4.9, 2.4, False, False), (5.1, 0.0, True, False), (0.1, 2.6, False, True)]
)
def test_a_client_near_its_limit_is_said_so(cpu: float, waited: float, bound: bool, starved: bool) -> None:
    found = summary(done(record(100.0, 0.1)), done(record(100.0, 0.1), cpu=cpu, waited=waited))
    assert (found["client"]["bound"], found["client"]["starved"]) == (bound, starved)
    assert found["client"]["processes"][1]["cpu_share"] == pytest.approx(cpu / 10)
    assert any("CLIENT-BOUND" in line for line in serve_report.warnings(shown(found))) == (bound or starved)


def test_a_rate_that_was_not_met_is_said() -> None:
    found = summary(done(record(100.1, 0.1, planned=100.0), record(100.3, 0.1, planned=100.2)))
    assert found["client"]["late_ms"]["median"] == pytest.approx(100)
    assert any("100 ms late" in line for line in serve_report.warnings(shown(found)))


def test_open_requests_and_the_time_line() -> None:
    records = [record(0.0, 1.0, 2.0), record(1.0, 1.0), record(2.0, 1.0)]
    assert peak_concurrency(records) == 2
    rows = timeline(records, 0.0, 3.0)
    assert [row["at_s"] for row in rows] == [0.0, 1.0, 2.0]
    assert [row["running"] for row in rows] == [1.0, 2.0, 1.0]
    assert sum(row["output_tok_s"] * row["seconds"] for row in rows) == 4
    assert sum(row["completed"] for row in rows) == 3


def shown(found: dict[str, Any], name: str = "concurrency 2") -> dict[str, Any]:
    workload = {"dataset": "random", "requests": 4}
    return {
        "name": name,
        "max_concurrency": None,
        "request_rate": None,
        "interrupted": False,
        "workload": workload,
        **found,
    }


def test_two_results_are_compared_number_by_number() -> None:
    old = {"benchmark": "serve", "runs": [shown(summary(done(record(100.0, 0.1, 0.2))))]}
    new = {"benchmark": "serve", "runs": [shown(summary(done(record(100.0, 0.2, 0.4), cpu=9.0)))]}
    changes = {c.name: c for c in compare_results(old, new)}
    assert changes["serve: concurrency 2: ttft_ms.median"].regressed
    assert changes["serve: concurrency 2: requests_per_s"].regressed
    assert not changes["serve: concurrency 2: requests.failed"].regressed
    assert any(line.startswith("client-bound runs") for line in differences(old, new))
