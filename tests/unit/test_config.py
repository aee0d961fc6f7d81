"""Settings: precedence keyword > environment > default; unknown names and values out of range are errors."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nanovllm_bento.config import EngineConfig, ServiceConfig
from nanovllm_bento.errors import ConfigError


def test_defaults() -> None:
    config = EngineConfig.create(env={})
    assert config.model == "Qwen/Qwen3-0.6B"
    assert (config.max_num_seqs, config.block_size) == (256, 16)
    assert config.max_num_batched_tokens is None  # the engine decides, by the device
    assert config.enable_prefix_caching and config.max_model_len is None
    assert ServiceConfig.create(env={}).workers is None


def test_keyword_beats_environment_beats_default() -> None:
    env = {"NANOVLLM_MAX_NUM_SEQS": "32", "NANOVLLM_BLOCK_SIZE": "64"}
    config = EngineConfig.create(env=env, max_num_seqs=8)
    assert (config.max_num_seqs, config.block_size) == (8, 64)
    assert config.max_num_batched_tokens == EngineConfig.model_fields["max_num_batched_tokens"].default


def test_process_environment_is_the_default_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_MAX_NUM_SEQS", "7")
    assert EngineConfig.create().max_num_seqs == 7


def test_keyword_none_and_empty_variable_count_as_not_given() -> None:
    config = EngineConfig.create(env={"NANOVLLM_SEED": "", "NANOVLLM_BLOCK_SIZE": "32"}, block_size=None)
    assert (config.seed, config.block_size) == (0, 32)


def test_other_variables_are_not_settings() -> None:
    EngineConfig.create(env={"NANOVLLM_WORKERS": "2", "NANOVLLM_SOMETHING": "1", "MODEL": "x"})


@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("0", False), ("False", False)])
def test_environment_booleans(text: str, value: bool) -> None:
    assert EngineConfig.create(env={"NANOVLLM_ENFORCE_EAGER": text}).enforce_eager is value


def test_unknown_keyword_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown argument 'max_num_seq' for EngineConfig.*'max_num_seqs'"):
        EngineConfig.create(env={}, max_num_seq=3)
    with pytest.raises(ConfigError, match=r"unknown argument 'zzz'.*Known: .*max_model_len"):
        EngineConfig.create(env={}, zzz=3)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("model", ["a"], [""]),
        ("device", ["auto", "cpu", "cuda"], ["tpu"]),
        ("dtype", ["auto", "float32", "bfloat16", "float16"], ["int8"]),
        ("seed", [0, 2**40], [-1]),
        ("load_format", ["auto", "dummy"], ["x"]),
        ("max_model_len", [1, 100_000], [0, -1]),
        ("max_num_seqs", [1, 1024], [0, -1]),
        ("max_num_batched_tokens", [256, 10_000], [0, 255]),
        ("schedule_mode", ["two_phase", "mixed"], ["both"]),
        ("max_consecutive_prefill_steps", [1], [0]),
        ("scheduling_policy", ["fcfs", "priority"], ["lifo"]),
        ("block_size", [1, 1024], [0, 1025]),
        ("gpu_memory_utilization", [0.01, 1], [0, 1.01, -0.5]),
        ("kv_cache_memory_bytes", [1], [0]),
        ("num_gpu_blocks_override", [1], [0]),
        ("tensor_parallel_size", [1, 8], [0, 9]),
        ("data_parallel_size", [1], [0, 2]),
        ("batch_invariant", [False, True], ["perhaps"]),
        ("attention_backend", ["auto", "torch"], ["nope"]),
    ],
)
def test_engine_ranges(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert getattr(EngineConfig.create(env={}, **{name: value}), name) == value
    for value in bad:
        with pytest.raises(ConfigError, match=name):
            EngineConfig.create(env={}, **{name: value})


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("stream_interval", 1, 0),
        ("engine_start_timeout", 0.1, 0),
        ("engine_heartbeat_interval", 0.1, 0),
        ("engine_heartbeat_timeout", 0.1, 0),
        ("engine_max_restarts", 0, -1),
        ("max_waiting_requests", 1, 0),
        ("generate_batch_max_size", 2, 1),
        ("generate_batch_max_latency_ms", 300_000, 299_999),
        ("generate_batch_max_tokens", 1, 0),
        ("score_max_size", 2, 1),
        ("score_max_latency_ms", 300_000, 299_999),
        ("score_max_tokens", 2, 1),
        ("batch_max_seconds", 0.1, 0),
        ("batch_max_calls", 1, 0),
        ("batch_max_items", 1, 0),
        ("workers", 1, 0),
    ],
)
def test_service_ranges(name: str, good: Any, bad: Any) -> None:
    assert getattr(ServiceConfig.create(env={}, **{name: good}), name) == good
    with pytest.raises(ConfigError, match=name):
        ServiceConfig.create(env={}, **{name: bad})


def test_error_names_value_and_variable() -> None:
    with pytest.raises(ConfigError, match=r"max_num_seqs='many' \(from NANOVLLM_MAX_NUM_SEQS\)"):
        EngineConfig.create(env={"NANOVLLM_MAX_NUM_SEQS": "many"})
    with pytest.raises(ConfigError) as caught:
        EngineConfig.create(env={"NANOVLLM_MAX_NUM_SEQS": "5"}, max_num_seqs="many")
    assert "from NANOVLLM" not in str(caught.value)


def test_mixed_needs_room_beside_decode() -> None:
    EngineConfig.create(env={}, schedule_mode="mixed", max_num_seqs=4, max_num_batched_tokens=5)
    with pytest.raises(ConfigError, match="mixed"):
        EngineConfig.create(env={}, schedule_mode="mixed", max_num_seqs=4, max_num_batched_tokens=4)
    EngineConfig.create(env={}, schedule_mode="two_phase", max_num_seqs=4, max_num_batched_tokens=4)


def test_settings_are_frozen() -> None:
    config = EngineConfig.create(env={})
    with pytest.raises(ValidationError):
        config.seed = 3


def test_readme_lists_every_setting() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    missing = [n for n in (*EngineConfig.model_fields, *ServiceConfig.model_fields) if f"`{n}`" not in text]
    assert not missing
