"""Processes that are the ranks of a tensor-parallel group over gloo, and what tests have them do.

Models are so small that starting the processes is what takes time: one pool serves groups of two and of four.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanovllm_bento.engine.kv_scales import set_kv_scales
from nanovllm_bento.errors import NanoVLLMError
from nanovllm_bento.kernels.attention.base import AttentionMetadata
from nanovllm_bento.kernels.attention.torch_backend import TorchAttention
from nanovllm_bento.layers.parallel import ParallelGroup
from nanovllm_bento.models.loader import load_model
from tests.engine.tiny_models import computed_by, read_config

SIZES = (2, 4)
PROMPT = torch.randint(3, 500, (21,), generator=torch.Generator().manual_seed(1)).tolist()
NUM_NEW = 6
_BLOCK_SIZE, _NUM_BLOCKS = 4, 8
_TIMEOUT = 60.0


class Ranks:
    """max(SIZES) processes. ``run`` calls a function of this module on the first ``size`` of them."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(max(SIZES)):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, folder, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(group, *args) of each rank, in order; raises AssertionError where one fails or does not answer."""
        for pipe in self._pipes[:size]:
            pipe.send((size, function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes[:size]):
            assert pipe.poll(2 * _TIMEOUT), f"rank {rank} does not answer"
            answer, error = pipe.recv()
            assert error is None, f"rank {rank}: {error}"
            answers.append(answer)
        return answers

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # which ends the process's loop
        for process in self._processes:
            process.join(_TIMEOUT)
            process.kill()


def _serve(rank: int, folder: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # and memory that nobody filled is NaN
    cpu = torch.device("cpu")
    groups = {
        size: ParallelGroup.connect(rank, size, folder / f"group{size}", cpu, _TIMEOUT) for size in SIZES if rank < size
    }
    while True:
        try:
            size, function, args = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((function(groups[size], *args), None))
        except Exception as error:
            pipe.send((None, repr(error)))
    for group in groups.values():
        group.close()


def generate(group: ParallelGroup, source: Path, products: str | None = None) -> tuple[np.ndarray, list[int]]:
    """Logits of PROMPT and NUM_NEW greedy tokens after it, float32 [num_tokens, vocab_size], and those tokens.

    products: as ``computed_by`` says.
    """
    config = read_config(source)
    with computed_by(products):
        model = load_model(config, source, dtype=torch.float32, group=group)
        backend = TorchAttention(_BLOCK_SIZE, torch.float32)
        model.set_attention_backend(backend)
        caches = []
        for attention in model.attentions:
            shape = (_NUM_BLOCKS, _BLOCK_SIZE, attention.num_kv_heads, config.head_dim)
            caches.append((torch.zeros(shape), torch.zeros(shape)))

        def step(tokens: list[int], start: int) -> torch.Tensor:
            positions = torch.arange(start, start + len(tokens))
            meta = AttentionMetadata(
                query_start_loc=torch.tensor([0, len(tokens)], dtype=torch.int32),
                seq_lens=torch.tensor([start + len(tokens)], dtype=torch.int32),
                block_table=torch.arange(_NUM_BLOCKS, dtype=torch.int32)[None],
                slot_mapping=positions,
                max_query_len=len(tokens),
                max_seq_len=start + len(tokens),
                num_decode_rows=int(len(tokens) == 1),
            )
            backend.prepare(meta)
            hidden = model(torch.tensor(tokens), positions, caches, meta)
            logits = model.compute_logits(hidden)
            assert logits.is_contiguous() and logits.shape[1] == config.vocab_size
            return logits

        with torch.inference_mode():
            logits = [step(PROMPT, 0)]
            tokens: list[int] = []
            for i in range(NUM_NEW):
                tokens.append(int(logits[-1][-1].argmax()))
                logits.append(step(tokens[-1:], len(PROMPT) + i))
        return torch.cat(logits).numpy(), tokens


def calibrate(group: ParallelGroup, source: Path) -> list[tuple[float, float]] | str:
    """Each layer's k_scale and v_scale, or why there are none."""
    config = read_config(source)
    model = load_model(config, source, dtype=torch.float32, group=group)
    try:
        set_kv_scales(model, config, torch.float32, torch.device("cpu"))
    except NanoVLLMError as error:
        return str(error)
    return [(attention.k_scale, attention.v_scale) for attention in model.attentions]
