"""What all tests share: a quiet environment, hypothesis profiles, markers by folder, and the demo model."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from nanovllm_bento.hub import ModelFiles

TESTS = Path(__file__).parent

# Before anything imports torch: share the cores among pytest-xdist's workers; servers that tests start inherit this.
_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(4, _cores) // _workers)))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["BENTOML_DO_NOT_TRACK"] = "True"
for _name in [name for name in os.environ if name.startswith("NANOVLLM_") and name != "NANOVLLM_CACHE"]:
    del os.environ[_name]  # the developer's own settings

_quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", deadline=None, suppress_health_check=_quiet)
settings.register_profile("ci", deadline=None, suppress_health_check=_quiet, derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """tests/gpu is gpu, tests/e2e is e2e, users of demo_model are demo; without a GPU, gpu tests are skipped."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if folder in ("gpu", "e2e"):
            item.add_marker(folder)
        if "demo_model" in getattr(item, "fixturenames", ()):
            item.add_marker("demo")
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not _has_gpu():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def demo_model() -> "ModelFiles":
    """The demo model's files, fetched into the user's cache the first time; skips where that cannot be done."""
    from nanovllm_bento.errors import ModelNotFoundError
    from nanovllm_bento.hub import resolve_model

    try:
        return resolve_model("demo")
    except ModelNotFoundError as error:
        pytest.skip(f"the demo model cannot be had here: {error}")
