"""Which kernels are told to prefer how much shared memory, and when; the CUDA driver is stood in for."""

import ctypes

import pytest
import torch
from triton import knobs

from nanovllm_bento.engine.cuda_graphs import graph_buckets
from nanovllm_bento.kernels import shared_memory
from nanovllm_bento.kernels.shared_memory import DRIVERS_CHOICE, Shape, choose_percent, prefer


class Driver:
    """Knows what each kernel was told last."""

    def __init__(self) -> None:
        self.told: dict[int, int] = {}
        self.code = 0

    def cuFuncSetAttribute(self, function: ctypes.c_void_p, attribute: int, value: ctypes.c_int) -> int:
        assert attribute == 9, "CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT"
        assert function.value is not None
        self.told[function.value] = value.value
        return self.code


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch):
    found = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: found)
    hooks = type(knobs.runtime.kernel_load_end_hook)(reversed=True)
    monkeypatch.setattr(knobs.runtime, "kernel_load_end_hook", hooks)
    if hasattr(knobs.runtime, "kernel_unload_hook"):
        monkeypatch.setattr(knobs.runtime, "kernel_unload_hook", type(hooks)())
    shared_memory.watch.cache_clear()
    yield found
    shared_memory.watch.cache_clear()


def load(handle: int) -> None:
    """As Triton says that it has loaded a kernel."""
    knobs.runtime.kernel_load_end_hook(1, handle, "a_kernel", {}, "hash")


def test_kernels_prefer_it_within_and_none_afterwards(driver):
    shared_memory.watch()
    load(10)
    with prefer(57):
        assert driver.told == {10: 57}
        load(11)
        assert driver.told == {10: 57, 11: 57}
    assert driver.told == {10: DRIVERS_CHOICE, 11: DRIVERS_CHOICE}
    load(12)
    assert 12 not in driver.told


def test_a_fault_within_leaves_no_preference(driver):
    shared_memory.watch()
    load(10)
    with pytest.raises(torch.OutOfMemoryError), prefer(43):
        raise torch.OutOfMemoryError
    assert driver.told == {10: DRIVERS_CHOICE}


def test_the_drivers_choice_asks_for_nothing(driver):
    shared_memory.watch()
    load(10)
    with prefer(DRIVERS_CHOICE):
        load(11)
    assert driver.told == {}


def test_what_the_driver_refuses_is_said_once_and_leaves_nothing(driver, caplog):
    shared_memory.watch()
    load(10)
    load(11)
    driver.code = 400
    with prefer(43):
        pass
    assert driver.told == {10: DRIVERS_CHOICE, 11: DRIVERS_CHOICE}
    assert [record.args for record in caplog.records] == [(400,)]
    driver.told.clear()
    load(12)
    assert driver.told == {}


def test_a_kernel_that_was_unloaded_is_told_nothing_more(driver):
    if not hasattr(knobs.runtime, "kernel_unload_hook"):
        pytest.skip("this Triton unloads nothing")
    shared_memory.watch()
    load(10)
    load(11)
    knobs.runtime.kernel_unload_hook(1, 10, "a_kernel", {}, "hash")
    with prefer(43):
        pass
    assert driver.told == {11: DRIVERS_CHOICE}


def test_every_graph_of_up_to_64_rows_has_a_measured_division():
    measured = Shape(1024, 128, 8, 2)
    found = {rows: choose_percent(rows, measured) for rows in graph_buckets(256)}
    assert all((percent == DRIVERS_CHOICE) == (rows > 64) for rows, percent in found.items())
    for other in ({"hidden_size": 2048}, {"head_dim": 64}, {"num_kv_heads": 4}, {"kv_itemsize": 4}):
        assert choose_percent(1, measured._replace(**other)) == DRIVERS_CHOICE, f"{other} was not measured"
