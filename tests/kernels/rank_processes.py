"""Real ranks for tests: processes that make a ParallelGroup, do something in it, and tell how it ended."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from nanovllm_bento.layers.parallel import ParallelGroup

PATIENCE = 120.0
Act = Callable[[ParallelGroup], Any]


def run_ranks(size: int, store: Path, act: Act, device: str = "cpu") -> list[Any]:
    """What ``act`` (a function of a module) returned on each rank, the error that ended it, or None from a process that
    died. device: "cpu", or "cuda" for a GPU each."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=rank_main, args=(rank, size, store, act, device, sender), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    answers: list[Any] = []
    try:
        for rank, (receiver, _) in enumerate(pipes):
            assert receiver.poll(PATIENCE), f"rank {rank} hangs; the ranks before it: {answers}"
            try:
                answers.append(receiver.recv())
            except EOFError:
                answers.append(None)
        for process in processes:
            process.join(PATIENCE)
    finally:
        for process in processes:
            process.kill()
    return answers


def rank_main(rank: int, size: int, store: Path, act: Act, device: str, answer: Connection) -> None:
    torch.set_num_threads(1)
    own = torch.device(device, rank) if device == "cuda" else torch.device(device)
    group = ParallelGroup.connect(rank, size, store, own, timeout=PATIENCE)
    try:
        answer.send(act(group))
    except (RuntimeError, AssertionError):
        answer.send(RuntimeError(f"rank {rank}: {traceback.format_exc()[-2000:]}"))
    finally:
        group.close()
