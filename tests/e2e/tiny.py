"""A model that serves at once: random weights of a few hundred kilobytes, one token a byte, float32.

Small enough that what a test waits for is the service and not the model, and exact: tokens do not depend on what else
runs, nor on how often the engine was started again.
"""

import json
from pathlib import Path
from typing import Any

from tests.engine.tiny_models import make_tiny
from tests.serving.fakes import byte_tokenizer

NUM_BLOCKS = 2048
MAX_MODEL_LEN = 4096
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "num_gpu_blocks_override": NUM_BLOCKS,
    "max_num_seqs": 64,
    "served_model_name": "tiny",
    "engine_heartbeat_interval": 0.1,
}
"""How the tests serve it (keywords of ``tests.e2e.server.serve``). A heartbeat also carries the engine's counts."""


def make_served_tiny(folder: Path) -> Path:
    """Write the checkpoint with its tokenizer and chat template into ``folder``."""
    make_tiny(
        "qwen3",
        folder,
        vocab_size=258,
        eos_token_id=257,
        bos_token_id=256,
        pad_token_id=None,
        max_position_embeddings=MAX_MODEL_LEN,
    )
    tokenizer = byte_tokenizer()
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    config = {**tokenizer.special_tokens, "chat_template": tokenizer.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
