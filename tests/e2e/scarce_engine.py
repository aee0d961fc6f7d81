"""The real engine's process on a device that has no memory left when a test says so; as ServiceConfig.engine_module.

A test writes "TRIES NUM_TOKENS" into the file NANOVLLM_NO_MEMORY_FILE (``run_out``): that many tries to compute a step
of at least so many tokens fail, as a GPU's allocator fails, in rank 0. Everything else is the engine's own.
"""

import os
from pathlib import Path
from typing import Any

import torch

from nanovllm_bento.engine import worker
from nanovllm_bento.engine.model_runner import ModelRunner
from nanovllm_bento.engine.processes import write_whole


def run_out(path: Path, *, tries: int, num_tokens: int = 1) -> None:
    """Have that many tries to compute a step of ``num_tokens`` or more fail."""
    write_whole(path, f"{tries} {num_tokens}")


def main() -> None:
    path = Path(os.environ["NANOVLLM_NO_MEMORY_FILE"])
    launch, execute = ModelRunner.launch, ModelRunner.execute
    num_tokens = 0  # of the step that is computed

    def noting_launch(self: ModelRunner, batch: Any) -> Any:
        nonlocal num_tokens
        num_tokens = batch.num_tokens
        return launch(self, batch)

    def scarce_execute(self: ModelRunner, inputs: Any) -> Any:
        tries, least = map(int, path.read_text().split()) if path.exists() else (0, 0)
        if tries and num_tokens >= least:
            run_out(path, tries=tries - 1, num_tokens=least)
            raise torch.OutOfMemoryError(f"no memory for {num_tokens} tokens, says a test")
        return execute(self, inputs)

    ModelRunner.launch = noting_launch  # type: ignore[method-assign]
    ModelRunner.execute = scarce_execute  # type: ignore[method-assign]
    worker.main()


if __name__ == "__main__":
    main()
