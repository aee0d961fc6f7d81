"""Executors of tensor-parallel ranks without a model, and a rank 0 to be killed. Imports no torch.

``python -m tests.engine.fake_rank '{"size": …, "executor": …, "step": …}'`` is that rank 0: it prints its ranks' pids,
publishes one step if there is one to publish, or waits until they load, and then waits for ever.
"""

import ctypes
import hashlib
import json
import os
import sys
import time
from pathlib import Path

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.errors import ConfigError

HOLDING_THE_GIL = "holds the GIL"


class Recorder:
    """Appends the digest of each step to the file ``rank<n>`` in the folder ``config.model``.

    A step that is a JSON object says instead what each rank does, {"1": "sleep"}: see ``misbehave``.
    """

    def __init__(self, config: EngineConfig, rank: int, size: int, store: Path) -> None:
        self.rank = rank
        self.startup_seconds = {"load": 0.25 * rank}
        self.file = (Path(config.model) / f"rank{rank}").open("a") if Path(config.model).is_dir() else None
        store.open("r+b").close()  # it has its name in every rank

    def execute(self, payload: memoryview) -> None:
        if payload[:1] == b"{":
            misbehave(json.loads(bytes(payload)).get(str(self.rank), ""))
        elif self.file is not None:
            self.file.write(f"{digest(payload)}\n")
            self.file.flush()


def digest(payload: bytes | memoryview) -> str:
    return hashlib.sha256(payload).hexdigest()


def misbehave(how: str) -> None:
    """Do what a rank may do wrong, as named; anything else is right."""
    if how == "sleep":
        time.sleep(1e6)
    elif how == "loop":
        while True:
            pass
    elif how == HOLDING_THE_GIL:
        ctypes.PyDLL(None).sleep(10**6)
    elif how == "raise":
        raise ValueError("first line\nsecond line of a wrong value")
    elif how == "refuse":
        raise ConfigError("dtype=float16 is not possible here. Choose another.")
    elif how == "exit":
        os._exit(3)


def building(how: str):
    def make(config: EngineConfig, rank: int, size: int, store: Path) -> Recorder:
        with store.open("ab") as file:
            file.write(b".")  # one for each rank that has come so far
        if rank == size - 1:
            misbehave(how)
        return Recorder(config, rank, size, store)

    return make


refusing, raising, exiting = building("refuse"), building("raise"), building("exit")
loading, stuck_in_c = building("sleep"), building(HOLDING_THE_GIL)


def rank_0(size: int, executor: str, step: dict[str, str] | None) -> None:
    from nanovllm_bento.engine.ranks import Ranks

    ranks = Ranks(EngineConfig.create(env={}), size, device="cpu", executor=executor)
    if step is not None:
        ranks.wait_ready(60)
        ranks.publish(json.dumps(step).encode())
    else:
        while ranks.store.stat().st_size < size - 1:
            time.sleep(0.01)
    print(json.dumps(ranks.pids), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    rank_0(**json.loads(sys.argv[1]))
