"""The ranks agree on whether they share memory: what fails on one is told on all."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from nanovllm_bento.kernels.peer_memory import PeerMemoryError, _agree


def on_all(acts):
    store = HashStore()
    with ThreadPoolExecutor(len(acts)) as pool:
        return [pool.submit(_agree, store, "step", rank, len(acts), act) for rank, act in enumerate(acts)]


def test_each_rank_gets_what_all_have_given():
    given = [bytes([rank, 0, 255]) for rank in range(3)]
    assert [answer.result() for answer in on_all([lambda g=g: g for g in given])] == [given] * 3


@pytest.mark.parametrize("error", [PeerMemoryError("no way there"), OSError("no way there")])
def test_what_fails_on_one_rank_fails_on_all_and_names_it(error):
    def fail():
        raise error

    for answer in on_all([lambda: b"", fail, lambda: b""]):
        with pytest.raises(PeerMemoryError, match=r"^rank 1: no way there$"):
            answer.result()
