"""GPUs under BentoML: the service asks for TP × DP devices, and what its processes see is said before they start."""

import os
from pathlib import Path

import pytest

from nanovllm_bento.cli.machine import diagnose
from nanovllm_bento.config import EngineConfig, ServiceConfig
from nanovllm_bento.errors import ConfigError
from nanovllm_bento.serving import resources
from nanovllm_bento.serving.resources import (
    check_devices,
    count_gpus,
    explain_devices,
    num_workers,
    service_resources,
    usable_cores,
    visible_gpus,
    worker_devices,
)


def config(device: str = "cuda", tp: int = 1, dp: int = 1) -> EngineConfig:
    """Not validated: sizes that this version refuses are counted all the same."""
    values = {"device": device, "tensor_parallel_size": tp, "data_parallel_size": dp}
    return EngineConfig.model_construct(**{**EngineConfig().model_dump(), **values})  # type: ignore[arg-type]


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML says that this machine has eight, to us and to BentoML."""
    import pynvml
    from bentoml._internal.resource import NvidiaGpuResource

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("BENTOML_DISABLE_GPU_ALLOCATION", raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 8)
    NvidiaGpuResource.from_system.cache_clear()
    yield
    NvidiaGpuResource.from_system.cache_clear()


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize(
    ("tp", "dp", "devices"), [(1, 1, "0"), (2, 1, "0,1"), (2, 2, "0,1,2,3"), (8, 1, "0,1,2,3,4,5,6,7")]
)
def test_bentoml_gives_workers_as_many_devices_as_the_engine_needs(tp: int, dp: int, devices: str) -> None:
    import bentoml
    from _bentoml_impl.server.allocator import ResourceAllocator

    asked = config(tp=tp, dp=dp)

    class Service:
        pass

    service = bentoml.service(Service, name=f"devices_{tp}_{dp}", workers=3, resources=service_resources(asked))
    service.inject_config()
    workers, env = ResourceAllocator().get_worker_env(service)
    assert (workers, env["CUDA_VISIBLE_DEVICES"]) == (3, devices)
    assert worker_devices(asked, count_gpus()) == devices
    assert visible_gpus(8, env) == tp * dp


@pytest.mark.usefixtures("eight_gpus")
def test_bentoml_leaves_devices_alone_that_were_chosen_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    import bentoml
    from _bentoml_impl.server.allocator import ResourceAllocator

    class Service:
        pass

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    service = bentoml.service(Service, name="devices_by_hand", resources=service_resources(config(tp=2)))
    service.inject_config()
    assert ResourceAllocator().get_worker_env(service)[1] == {}
    assert worker_devices(config(tp=2), 8) == "4,5"


def test_the_service_of_this_project_asks_for_what_its_engine_needs() -> None:
    assert service_resources(config(tp=2, dp=3)) == {"gpu": 6}
    assert service_resources(config("cpu")) == {}
    assert service_resources(config("auto"), num_gpus=0) == {}
    assert service_resources(config("auto"), num_gpus=1) == {"gpu": 1}


def test_a_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert count_gpus() == 0


@pytest.mark.parametrize(
    ("listed", "seen"),
    [(None, 4), ("", 0), ("0", 1), ("3,1", 2), ("0,9,1", 1), ("-1", 0), ("GPU-6af5", 1), (" 0 , 1 ", 2)],
)
def test_visible_devices_are_counted_as_cuda_does(listed: str | None, seen: int) -> None:
    assert visible_gpus(4, {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}) == seen


def test_too_few_devices_are_refused_with_the_reason() -> None:
    check_devices(config(tp=2), 2, {})
    check_devices(config("auto"), 0, {})
    check_devices(config("auto", tp=2), 0, {})
    check_devices(config("cpu", tp=1), 0, {})
    with pytest.raises(
        ConfigError, match=r"tensor_parallel_size=2 .* 2 GPUs needed, 1 visible \(CUDA_VISIBLE_DEVICES=1"
    ):
        check_devices(config(tp=2), 4, {"CUDA_VISIBLE_DEVICES": "1"})
    with pytest.raises(ConfigError, match="2 GPUs needed, 1 visible"):
        check_devices(config("auto", tp=2), 1, {})
    with pytest.raises(ConfigError, match="1 GPU needed, 0 visible"):
        check_devices(config("cuda"), 0, {})


@pytest.mark.parametrize(
    ("asked", "env", "words"),
    [
        (config(tp=2), {}, "needs 2, this machine has 4; BentoML gives all workers CUDA_VISIBLE_DEVICES=0,1"),
        (
            config(tp=2),
            {"CUDA_VISIBLE_DEVICES": "2,3"},
            "CUDA_VISIBLE_DEVICES='2,3' is set: workers and engine inherit it",
        ),
        (config(tp=2), {"CUDA_VISIBLE_DEVICES": "2"}, "NOT ENOUGH"),
        (config(tp=2), {"BENTOML_DISABLE_GPU_ALLOCATION": "1"}, "workers and engine see all"),
        (config("cpu"), {}, "stays unset"),
    ],
)
def test_doctor_says_what_workers_inherit(asked: EngineConfig, env: dict[str, str], words: str) -> None:
    assert words in explain_devices(asked, 4, env)


def test_doctor_names_the_gpus_for_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "count_gpus", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "needs 1, this machine has 2" in dict(diagnose())["GPUs for serving"]


def test_there_is_a_worker_for_every_four_cores_beside_a_gpu_and_one_on_a_cpu() -> None:
    unset = ServiceConfig.create(env={})
    assert [num_workers(unset, config("cuda"), cores) for cores in (1, 2, 4, 8, 15, 16, 128)] == [1, 1, 1, 2, 3, 4, 4]
    assert num_workers(unset, config("cpu"), 128) == 1
    assert num_workers(ServiceConfig.create(env={}, workers=7), config("cpu"), 2) == 7


def test_a_containers_cpu_quota_counts(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    cores = len(os.sched_getaffinity(0))
    for text, expected in (("max 100000", cores), ("50000 100000", 1), ("90000000 100000", cores), ("nonsense", cores)):
        quota.write_text(text)
        assert usable_cores(quota) == expected
    assert usable_cores(tmp_path / "absent") == cores
