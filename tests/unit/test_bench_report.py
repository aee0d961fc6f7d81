"""The evaluation report: floors, prefix-cache figures, peers and comparisons are what they are said to be."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nanovllm_bento import cli
from nanovllm_bento.bench import compare, kernels, markdown, prefix, report, roofline, steps
from nanovllm_bento.bench.workloads import Workload, multi_turn, seed_workload, shared_system_prompt
from nanovllm_bento.errors import ConfigError
from nanovllm_bento.models.config import ModelConfig

QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
}
TINY = {
    **QWEN3_06B,
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
H100 = roofline.Ceilings(copy_bytes_s=3.0e12, matmul_flops_s=700e12)
runner = CliRunner()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but a config."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engine(tiny: Path, one_thread: None) -> Any:
    from nanovllm_bento.bench.offline import OurEngine

    return OurEngine(str(tiny), load_format="dummy", device="cpu", dtype="float32", max_num_seqs=8)


# -- roofline ---------------------------------------------------------------------------------------------------------


def test_what_a_token_costs_in_qwen3_06b() -> None:
    cost = roofline.ModelCost.of(ModelConfig.from_dict(QWEN3_06B))
    layer = 1024 * (2048 + 2 * 1024) + 2048 * 1024 + 3 * 1024 * 3072
    assert cost.layer_weights == 28 * layer
    assert cost.weight_bytes() == 2 * (28 * layer + 1024 * 151936) == pytest.approx(1.19e9, rel=0.01)
    assert cost.kv_bytes_per_token == 2 * 28 * 2 * 1024 == 114_688
    assert cost.decode_step([10, 30])[0] == cost.weight_bytes() + 40 * 114_688
    assert cost.prefill(100) - cost.prefill(100, cached=60) == cost.prefill(60) - 2 * cost.head_weights


def test_a_token_costs_its_own_experts_and_a_step_reads_those_that_are_asked() -> None:
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 10, "norm_topk_prob": True}
    config = ModelConfig.from_dict({**TINY, "architectures": ["Qwen3MoeForCausalLM"], **moe})
    cost = roofline.ModelCost.of(config)
    attention, expert = 16 * (16 + 2 * 8) + 16 * 16, 3 * 16 * 10
    assert cost.layer_weights == attention + 16 * 8 + 2 * expert
    assert cost.weight_bytes(1) == 2 * (attention + 16 * 8 + 2 * expert + 16 * 64)
    assert cost.weight_bytes(2) == 2 * (attention + 16 * 8 + round(3.5 * expert) + 16 * 64)
    assert cost.weight_bytes(10_000) == cost.all_weight_bytes == 2 * (attention + 16 * 8 + 8 * expert + 16 * 64)


def test_a_rank_costs_its_share() -> None:
    whole, half = (roofline.ModelCost.of(ModelConfig.from_dict(QWEN3_06B), ranks=ranks) for ranks in (1, 2))
    assert 2 * half.weight_bytes() == whole.weight_bytes() and 2 * half.kv_bytes_per_token == whole.kv_bytes_per_token
    sixteen = roofline.ModelCost.of(ModelConfig.from_dict(QWEN3_06B), ranks=16)
    assert sixteen.kv_bytes_per_token == whole.kv_bytes_per_token // 8, "each rank has one of the 8 heads at least"


@pytest.mark.parametrize(
    ("num_seqs", "kv_bytes", "tok_s"), [(256, 2, 25_800), (256, 1, 46_400), (1, 2, 2_350), (1, 1, 2_400)]
)
def test_floors_of_the_seed_workload_on_an_h100(num_seqs: int, kv_bytes: int, tok_s: float) -> None:
    cost = roofline.ModelCost.of(ModelConfig.from_dict(QWEN3_06B), kv_itemsize=kv_bytes)
    assert roofline.floor_tok_s(next(seed_workload(num_seqs)), cost, H100) == pytest.approx(tok_s, rel=0.06)


def test_a_floor_is_the_sum_of_its_steps() -> None:
    cost = roofline.ModelCost.of(ModelConfig.from_dict(TINY))
    workload = Workload("w", [[1] * 5, [1] * 9], [3, 2], 0.0)
    slow = roofline.Ceilings(1.0, 1e30)  # one byte a second: bytes alone count
    kv = cost.kv_bytes_per_token
    expected = 3 * cost.weight_bytes() + kv * ((6 + 10) + 7)  # prefill, then rows of 6 and 10 tokens, then one of 7
    assert roofline.floor_seconds(workload, cost, slow) == expected
    products = roofline.Ceilings(1e30, 1.0)
    rows = 2 * 3 * (cost.layer_weights + cost.head_weights) + 23 * cost.attention_flops
    assert roofline.floor_seconds(workload, cost, products) == cost.prefill(5) + cost.prefill(9) + rows


def test_measured_ceilings_are_positive(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(roofline.MATMUL_SIZE, "cpu", 32)
    found = roofline.measure_ceilings(torch.device("cpu"), torch.float32)
    assert found.copy_bytes_s > 1e6 and found.matmul_flops_s > 1e6 and found.matmul_dtype == "float32"


# -- workloads and the prefix cache -----------------------------------------------------------------------------------


def test_multi_turn_is_drawn_from_its_ranges() -> None:
    chats = multi_turn()
    assert chats == multi_turn() and chats != multi_turn(seed=1)
    assert (len(chats.user_turns), {len(turns) for turns in chats.user_turns}) == (64, {6})
    assert all(30 <= len(turn) <= 200 for turns in chats.user_turns for turn in turns)
    assert all(60 <= n <= 250 for answers in chats.answer_lens for n in answers)
    assert chats.max_len < 4096


@pytest.mark.parametrize("make", [multi_turn, shared_system_prompt])
def test_a_set_shrinks_to_what_a_model_takes(make: Any) -> None:
    assert make(max_len=100_000) == make()
    small = make(max_len=300)
    assert 100 < small.max_len <= 300
    assert len(small.user_turns) == len(make().user_turns)


def test_hits_are_the_history_in_whole_blocks(engine: Any) -> None:
    """One conversation alone: each turn finds its history, in whole blocks, save the token computed last."""
    core = engine.llm.core
    chat = multi_turn(1, 3, system_len=40, user_len=(10, 20), answer_len=(5, 12))
    cost = roofline.ModelCost.of(ModelConfig.from_dict(TINY))
    row = prefix.prefix_row(core, chat, cost)
    prompts, hits, history, known = 0, 0, 40, 0
    for turn, answer in zip(chat.user_turns[0], chat.answer_lens[0], strict=True):
        history += len(turn)
        prompts, hits = prompts + history, hits + known // 16 * 16
        history += answer
        known = history - 1  # the last token was never fed to the model
    assert row["hit_rate"] == row["prefill_saved"] == pytest.approx(hits / prompts, abs=1e-4)
    assert (row["off"]["prefilled_tokens"], row["on"]["prefilled_tokens"]) == (prompts, prompts - hits)
    assert 0 < row["prefill_flops_saved"] < row["prefill_saved"]
    assert row["goal"] == {"hit_rate": 0.78, "prefill_saved": 0.70}


def test_a_second_run_finds_nothing_of_the_first(engine: Any) -> None:
    cost = roofline.ModelCost.of(ModelConfig.from_dict(TINY))
    requests = shared_system_prompt(3, system_len=64, own_len=(5, 9), output_len=2)
    first, second = (prefix.prefix_row(engine.llm.core, requests, cost) for _ in range(2))
    assert first["hit_rate"] == second["hit_rate"] == pytest.approx(2 * 64 / (3 * 64 + 19), abs=0.02)


def test_ttft_of_a_cached_prompt_computes_one_token(engine: Any) -> None:
    row = prefix.ttft_row(engine.llm.core, prompt_len=100, repeat=2)
    assert row["prompt_tokens"] == 96  # whole blocks
    assert 0 < row["cached_min_ms"] <= row["cached_ms"] and 0 < row["cold_min_ms"] <= row["cold_ms"]


# -- steps ------------------------------------------------------------------------------------------------------------


def test_a_steps_parts_make_up_its_wall_time(engine: Any) -> None:
    core = engine.llm.core
    row = steps.step_breakdown(core, 2, timed_steps=8)
    parts = sum(row[f"{part}_us"] for part in steps.HOST_PARTS)
    assert parts == pytest.approx(row["wall_us"], rel=0.3)
    assert row["gpu_us"] is None and row["num_rows"] == 2
    assert not core.has_work and core.block_manager.num_used_blocks == 0


def test_more_rows_than_the_engine_takes_are_refused(engine: Any) -> None:
    with pytest.raises(ConfigError, match="9 rows do not fit"):
        steps.step_breakdown(engine.llm.core, 9)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "GEMM"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>", "attention"),
        ("_decode_kernel_paged_attention_combine", "attention"),
        ("qk_norm_rope_store_kernel", "norm, rope, activation"),
        ("silu_and_mul_kernel", "norm, rope, activation"),
        ("sample_kernel", "sampling"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<long>>", "other"),
    ],
)
def test_kernels_are_grouped_by_name(name: str, group: str) -> None:
    assert steps.kernel_group(name) == group


def test_kernel_shares_add_up() -> None:
    found = steps.summarize_kernels({"gemm_a": [60.0, 2.0], "gemm_b": [20.0, 1.0], "my_attention": [20.0, 4.0]})
    assert found["kernel_us"] == 100.0 and found["launches"] == 7
    assert {name: g["share"] for name, g in found["groups"].items()} == {"GEMM": 0.8, "attention": 0.2}
    assert [k["kernel"] for k in found["top"]] == ["gemm_a", "gemm_b", "my_attention"]


# -- kernels ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_cases() -> list[kernels.Case]:
    import torch

    sizes = kernels.Sizes(decode_rows=(1, 3), tokens=(5,), prefills=((2, 9),), context=(4, 40))
    config = ModelConfig.from_dict(TINY)
    found = kernels.cases(
        config,
        device=torch.device("cpu"),
        dtype=torch.float32,
        kv_dtypes=[torch.float32, torch.float8_e4m3fn],
        block_size=4,
        sizes=sizes,
    )
    return list(found)


def test_every_kernel_has_a_case(all_cases: list[kernels.Case]) -> None:
    assert {case.kernel for case in all_cases} == {
        "rms_norm",
        "add_rms_norm",
        "silu_and_mul",
        "qk_norm_rope_store",
        "decode attention",
        "prefill attention",
        "linear",
        "skinny",
        "sample",
    }
    assert len({(case.kernel, case.shape) for case in all_cases}) == len(all_cases)


def test_the_plain_forms_compute_what_the_kernels_do(all_cases: list[kernels.Case], one_thread: None) -> None:
    """Not of sampling, whose noise differs. The CPU's attention takes no fp8, so gets it in float32."""
    import torch

    by_name = {(case.kernel, case.shape): case for case in all_cases}
    for case in all_cases:
        if case.kernel == "sample":
            continue
        if "attention" in case.kernel and "fp8" in case.shape:
            wide = by_name[case.kernel, case.shape.replace("fp8", "float32")]
            q, k, v = wide.make(0)
            ours = wide.run((q, k.to(torch.float8_e4m3fn).float(), v.to(torch.float8_e4m3fn).float()))
            plain = case.naive((q, k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)))
        else:
            ours, plain = case.run(case.make(0)), case.naive(case.make(0))
        ours = ours[0] if isinstance(ours, tuple) else ours
        assert isinstance(ours, torch.Tensor) and isinstance(plain, torch.Tensor)
        torch.testing.assert_close(ours.reshape(plain.shape), plain, rtol=2e-4, atol=2e-4, msg=case.kernel + case.shape)


def test_the_plain_store_writes_what_the_kernel_writes(all_cases: list[kernels.Case]) -> None:
    import torch

    stores = [case for case in all_cases if case.kernel == "qk_norm_rope_store"]
    assert len(stores) == 2  # float32 and fp8
    for case in stores:
        ours, plain, before = case.make(0), case.make(0), case.make(0)
        case.run(ours)
        case.naive(plain)
        for a, b, untouched in zip(ours[1:], plain[1:], before[1:], strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=0.07, atol=1e-5)  # fp8: the neighbour at most
            assert not torch.equal(a.float(), untouched.float())


def test_a_kernels_share_of_the_ceiling(one_thread: None) -> None:
    import torch

    case = kernels.Case("k", "s", lambda i: None, lambda x: None, lambda x: None, num_bytes=1000, flops=10)
    row = kernels.measure(case, roofline.Ceilings(1e6, 1e3), torch.device("cpu"))
    assert (row["bound"], row["unit"]) == ("flops", "TFLOP/s")  # 10 ms of products, 1 ms of bytes
    assert row["ceiling_share"] > 1000  # nothing takes less than a microsecond or so
    row = kernels.measure(case, roofline.Ceilings(1e3, 1e3), torch.device("cpu"))
    assert (row["bound"], row["unit"]) == ("bytes", "GB/s")


# -- the whole report -------------------------------------------------------------------------------------------------


def test_a_report_of_a_model_without_a_tokenizer(
    tiny: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, through the command line; one KV cache type that does not exist there fails, and shows."""
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(roofline.MATMUL_SIZE, "cpu", 32)
    arguments = f"--out {tmp_path} --model {tiny} --load-format dummy --device cpu --dtype float32 --repeat 1"
    arguments += " --num-seqs 1,2 --sections throughput,memory --kv-cache-dtype auto,nonsense --no-plots"
    done = runner.invoke(cli.app, ["bench", "report", *arguments.split()])
    assert isinstance(done.exception, SystemExit) and done.exit_code == 1, done.output
    result = json.loads((tmp_path / "report.json").read_text())
    assert result["random_weights"] and list(result["sections"]) == ["throughput", "memory"]
    rows = result["sections"]["throughput"]["rows"]
    assert [row["num_seqs"] for row in rows] == [1, 2]
    assert all(row["tok_s_best"] > 0 and row["floor_tok_s"] > 0 for row in rows)
    for section in result["sections"].values():
        assert [error["kv_cache_dtype"] for error in section["errors"]] == ["nonsense"]
        assert "kv_cache_dtype" in section["errors"][0]["error"]
    (memory,) = result["sections"]["memory"]["rows"]
    assert memory["kv_cache_bytes"] == memory["num_blocks"] * 16 * 2 * 8 * 4
    text = (tmp_path / "report.md").read_text()
    assert "**Failed** (nonsense): ConfigError" in text and "Random weights" in text
    assert text.count(f"float32 {markdown.RANDOM}") == 3  # every row of both tables


def test_a_failing_row_leaves_the_others(
    tiny: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = steps.step_breakdown

    def fails_at_two(core: Any, num_rows: int, timed_steps: int) -> dict[str, Any]:
        if num_rows == 2:
            raise RuntimeError("broken here")
        return whole(core, num_rows, 4)

    monkeypatch.setattr(steps, "step_breakdown", fails_at_two)
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(roofline.MATMUL_SIZE, "cpu", 32)
    settings = {"load_format": "dummy", "device": "cpu", "dtype": "float32", "max_num_seqs": 4}
    options = report.Options(str(tiny), tmp_path, sections=["steps", "ttft"], num_seqs=[1, 2, 3], settings=settings)
    result = report.run_report(options, say=lambda line: None)
    assert [row["num_rows"] for row in result["sections"]["steps"]["rows"]] == [1, 3]
    assert result["sections"]["steps"]["errors"] == [
        {"kv_cache_dtype": "auto", "row": 2, "error": "RuntimeError: broken here"}
    ]
    assert report.failed_sections(result) == ["steps"] and len(result["sections"]["ttft"]["rows"]) == 1


def test_unknown_sections_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sections=speed"):
        report.run_report(report.Options("demo", tmp_path, sections=["speed"]))


def a_report() -> dict[str, Any]:
    """A result with every section, as of a GPU; its numbers are invented."""
    speeds = {1: (1500, 2226), 16: (8100, 12270), 64: (17000, 22400), 256: (23800, 25660)}
    phases = {"cuda_context": 0.4, "load_weights": 1.1, "kv_cache": 0.9, "cuda_graphs": 1.6, "warm_up": 0.1}
    cases = [("rms_norm", "256 × 1024", "bytes", 0.55), ("decode attention", "256 rows, bfloat16 KV", "bytes", 0.88)]
    cases += [("prefill attention", "1 × 4096 causal", "flops", 0.61), ("sample", "256 × 151936, plain", "bytes", 0.8)]
    step = {1: (690, 610, 80), 16: (1300, 1230, 70), 64: (2900, 2800, 100), 256: (9300, 9100, 200)}
    sections: dict[str, list[dict[str, Any]]] = {
        "throughput": [
            {
                "kv_cache_dtype": kv,
                "num_seqs": n,
                "workload": "seed",
                "output_tokens": 500 * n,
                "tok_s_first": 0.97 * speed * factor,
                "tok_s_best": speed * factor,
                "floor_tok_s": floor * factor,
                "floor_share": speed / floor,
            }
            for kv, factor in (("auto", 1.0), ("fp8_e4m3", 1.4))
            for n, (speed, floor) in speeds.items()
        ],
        "steps": [
            {
                "kv_cache_dtype": "auto",
                "num_rows": n,
                "context_len": 552,
                "wall_us": wall,
                "schedule_us": 0.05 * wall,
                "launch_us": 0.15 * wall,
                "wait_us": 0.72 * wall,
                "commit_us": 0.08 * wall,
                "host_us": 0.28 * wall,
                "gpu_us": gpu,
                "gap_us": gap,
                "floor_us": 0.8 * gpu,
                **(
                    {"kernels": steps.summarize_kernels({"nvjet": [400.0, 113.0], "attn": [90.0, 28.0]})}
                    if n == 1
                    else {}
                ),
            }
            for n, (wall, gpu, gap) in step.items()
        ],
        "prefix": [
            {
                "kv_cache_dtype": "auto",
                "name": name,
                "requests": 384,
                "hit_rate": share,
                "prefill_saved": share,
                "prefill_flops_saved": share - 0.03,
                "off": {"ttft_median_ms": 61.0, "ttft_p95_ms": 130.0, "output_tok_s": 9100.0},
                "on": {"ttft_median_ms": 21.0, "ttft_p95_ms": 50.0, "output_tok_s": 12100.0},
                "goal": prefix.GOALS.get(name),
            }
            for name, share in (("multi-turn", 0.87), ("shared system prompt", 0.84))
        ],
        "ttft": [
            {
                "kv_cache_dtype": "auto",
                "prompt_tokens": 4080,
                "repeat": 7,
                "cold_ms": 31.0,
                "cold_min_ms": 30.0,
                "cached_ms": 4.0,
                "cached_min_ms": 3.5,
            }
        ],
        "memory": [
            {
                "kv_cache_dtype": "auto",
                "weights_bytes": 1_191_968_768,
                "kv_cache_bytes": 60 << 30,
                "num_blocks": 35_000,
                "cache_tokens": 560_000,
                "kv_bytes_per_token": 114_688,
                "graph_bytes": 300 << 20,
                "peak_allocated_bytes": 62 << 30,
                "peak_reserved_bytes": 63 << 30,
            }
        ],
        "kernels": [
            {
                "kernel": kernel,
                "shape": shape,
                "us": 10.0,
                "bound": bound,
                "rate": 3000 * share if bound == "bytes" else 700 * share,
                "unit": "GB/s" if bound == "bytes" else "TFLOP/s",
                "ceiling_share": share,
                "naive_us": 55.0,
                "speedup": 5.5,
                "goal": None,
            }
            for kernel, shape, bound, share in cases
        ],
        "startup": [
            {"kind": "in this process, KV cache auto", "seconds": 4.4, "phases": phases},
            {"kind": "fresh process, kernel caches empty", "seconds": 21.0, "phases": {**phases, "cuda_graphs": 12.0}},
            {"kind": "fresh process, kernel caches warm", "seconds": 7.4, "phases": phases},
        ],
    }
    return {
        "benchmark": "report",
        "environment": {
            "time": "2026-01-01T00:00:00+00:00",
            "command": "nanovllm-bento bench report",
            "git": {"commit": "0" * 40, "dirty": False},
            "cpu": {"model": "a CPU", "cores": 16},
            "gpu": [{"name": "NVIDIA H100 80GB HBM3", "memory_mib": 81559, "driver": "1"}],
            "packages": {"torch": "2.11.0"},
        },
        "model": "qwen3-0.6b",
        "random_weights": True,
        "device": "cuda",
        "dtype": "bfloat16",
        "settings": {},
        "ceilings": H100.as_dict(),
        "sections": {name: {"rows": rows, "errors": [], "seconds": 1.0} for name, rows in sections.items()},
        "peers": {},
        "quality": None,
    }


def vllm_line(num_seqs: int, kv: str, speed: float) -> str:
    """What bench_vllm_offline.py prints last."""
    return json.dumps(
        {
            "engine": "vllm",
            "version": "0.26.0",
            "gpu": "NVIDIA H100 80GB HBM3",
            "tp": 1,
            "kv_dtype": kv,
            "seqs": num_seqs,
            "in_tokens": 1,
            "out_tokens": 500 * num_seqs,
            "load_s": 38.0,
            "run_s": [2.0, 1.0],
            "tok_s_first": speed / 2,
            "tok_s_best": speed,
        }
    )


def test_a_peers_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "vllm.jsonl"
    lines = ["INFO loading", vllm_line(256, "auto", 17700), vllm_line(256, "fp8", 21800), vllm_line(256, "auto", 1)]
    path.write_text("\n".join(lines) + "\n")
    rows = compare.read_peer(path)
    assert [(r["kv_cache_dtype"], r["num_seqs"], r["tok_s_best"]) for r in rows] == [
        ("auto", 256, 17700),
        ("fp8_e4m3", 256, 21800),
    ]
    path.write_text(vllm_line(16, "auto", 3400))
    assert compare.read_peer(path)[0]["num_seqs"] == 16


def test_our_own_results_are_peers_too(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(a_report()))
    assert len(compare.read_peer(path)) == 8
    offline = {
        "results": [{"engine": "nanovllm_bento", "tok_s_first": 90.0, "tok_s_best": 100.0}],
        "workload": {"name": "seed", "num_seqs": 4, "output_tokens": 2000},
        "settings": {"kv_cache_dtype": "fp8_e4m3"},
        "load_seconds": {"nanovllm_bento": 2.0},
    }
    path.write_text(json.dumps(offline, indent=2))
    (row,) = compare.read_peer(path)
    assert (row["kv_cache_dtype"], row["num_seqs"], row["tok_s_best"], row["load_s"]) == ("fp8_e4m3", 4, 100.0, 2.0)


def test_a_file_without_throughput_is_no_peer(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"a": 1}\nnothing\n')
    with pytest.raises(ConfigError, match="no throughput"):
        compare.read_peer(tmp_path / "x")
    with pytest.raises(ConfigError, match="cannot be read"):
        compare.read_peer(tmp_path / "missing")


def test_a_peer_stands_beside_the_row_it_belongs_to(tmp_path: Path) -> None:
    result = a_report()
    (tmp_path / "p").write_text(vllm_line(256, "auto", 17000))
    result["peers"] = {"vLLM": compare.read_peer(tmp_path / "p")}
    rows = [line for line in markdown.render(result).splitlines() if line.startswith("| bfloat16 †") and "%" in line]
    assert sum("1.40×" in line for line in rows) == 1
    assert next(line for line in rows if "| 256 |" in line).endswith("| 8,500 | 17,000 | 1.40× |")
    result["peers"]["vLLM"][0]["output_tokens"] = 7  # another workload: not comparable
    assert "1.40×" not in markdown.render(result)


def test_markdown_tells_what_an_fp8_cache_costs_in_quality() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    text = markdown.render({**a_report(), "quality": json.loads((results / "h100_kv_quality.json").read_text())})
    assert "| most likely token is the same | 94.3% |" in text
    assert "scales" not in text


def test_markdown_holds_every_section_and_the_quality_file() -> None:
    result = a_report()
    result["quality"] = {"note": "on SmolLM2", "rows": [{"kv_cache_dtype": "fp8_e4m3", "KL": 0.002}]}
    text = markdown.render(result, ["throughput.png"])
    for title in ("Throughput", "Decode step", "Prefix cache", "Time to first token", "Kernels", "Memory", "Start-up"):
        assert f"## {title}\n" in text
    assert "| fp8_e4m3 | 0.002 |" in text and "![throughput](throughput.png)" in text
    assert "78% hits, 70% saved" in text and "Failed" not in text
    for line in text.splitlines():
        if line.startswith(("| bfloat16", "| fresh process")):
            assert markdown.RANDOM in line.split("|")[1]
    result["random_weights"] = False
    assert markdown.RANDOM not in markdown.render(result)


def test_plots_are_drawn_from_a_result(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = a_report()
    files = report.finish(result, tmp_path, plots=True)
    images = {path.name for path in files if path.suffix == ".png"}
    assert images == {"throughput.png", "steps.png", "prefix.png", "kernels.png", "startup.png"}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in images)
    del result["sections"]["steps"]["rows"][:]
    assert "steps.png" not in {path.name for path in report.finish(result, tmp_path / "other", plots=True)}


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    done = runner.invoke(cli.app, ["bench", "report", "--out", str(tmp_path)])
    assert isinstance(done.exception, ConfigError) and "nanovllm-bento[bench]" in str(done.exception)


def test_a_report_is_written_again_with_peers(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps(a_report()))
    (tmp_path / "v.json").write_text(vllm_line(64, "auto", 10_700))
    arguments = f"--from {tmp_path / 'old.json'} --out {tmp_path / 'new'} --no-plots --peer vLLM={tmp_path / 'v.json'}"
    done = runner.invoke(cli.app, ["bench", "report", *arguments.split()])
    assert done.exit_code == 0, done.output
    assert "1.59×" in (tmp_path / "new" / "report.md").read_text()


# -- compare ----------------------------------------------------------------------------------------------------------


def test_a_change_counts_in_the_direction_that_is_worse() -> None:
    old, new = a_report(), a_report()
    new["sections"]["throughput"]["rows"][0]["tok_s_best"] *= 0.9
    new["sections"]["kernels"]["rows"][0]["us"] *= 0.9
    new["sections"]["ttft"]["rows"][0]["cached_ms"] *= 1.02
    changes = {change.name: change for change in compare.compare_results(old, new)}
    assert [name for name, change in changes.items() if change.regressed] == ["throughput: auto, 1, seed: tok_s_best"]
    assert [name for name, change in changes.items() if change.improved] == ["kernels: rms_norm, 256 × 1024: us"]
    assert changes["ttft: auto, 4080: cached_ms"].change == pytest.approx(0.02)
    assert not compare.lost(old, new) and not compare.differences(old, new)


def test_numbers_that_are_gone_are_named() -> None:
    old, new = a_report(), a_report()
    new["sections"]["ttft"]["rows"] = []
    new["random_weights"] = False
    assert compare.lost(old, new) == ["ttft: auto, 4080: cold_ms", "ttft: auto, 4080: cached_ms"]
    assert compare.differences(old, new) == ["random weights: True against False"]


def test_compare_command(tmp_path: Path) -> None:
    old, new = a_report(), copy.deepcopy(a_report())
    new["sections"]["throughput"]["rows"][0]["tok_s_best"] *= 0.96
    for name, result in (("a.json", old), ("b.json", new)):
        (tmp_path / name).write_text(json.dumps(result))
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert runner.invoke(cli.app, ["bench", "compare", *files]).exit_code == 0
    assert runner.invoke(cli.app, ["bench", "compare", *files, "--fail"]).exit_code == 1
    assert runner.invoke(cli.app, ["bench", "compare", *files, "--fail", "--threshold", "5%"]).exit_code == 0
    assert runner.invoke(cli.app, ["bench", "compare", *files[:1], *files[:1], "--fail"]).exit_code == 0


def test_offline_results_are_compared() -> None:
    def result(speed: float) -> dict[str, Any]:
        return {
            "results": [{"engine": "ours", "tok_s_first": speed, "tok_s_best": 2 * speed}],
            "workload": {"name": "seed", "num_seqs": 256},
            "load_seconds": {"ours": 3.0},
        }

    changes = compare.compare_results(result(100.0), result(110.0), 0.05)
    assert [(change.improved, change.regressed) for change in changes] == [(True, False), (True, False), (False, False)]
    with pytest.raises(ConfigError, match="no number in common"):
        compare.compare_results(result(1.0), a_report())


@pytest.mark.parametrize(("text", "value"), [("3%", 0.03), ("0.03", 0.03), ("0", 0.0)])
def test_a_threshold(text: str, value: float) -> None:
    assert compare.parse_threshold(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["3 percent", "-1%", "2"])
def test_a_threshold_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        compare.parse_threshold(text)
