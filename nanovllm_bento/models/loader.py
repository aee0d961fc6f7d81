"""From a checkpoint to a model that is ready to run."""

import hashlib
import math
from pathlib import Path
from typing import Literal

import torch

from nanovllm_bento.errors import CheckpointError, ModelNotFoundError
from nanovllm_bento.layers.parallel import SINGLE, ParallelGroup
from nanovllm_bento.layers.weight_spec import WeightSpec
from nanovllm_bento.models.config import ModelConfig
from nanovllm_bento.models.decoder import DecoderForCausalLM
from nanovllm_bento.models.registry import build_model
from nanovllm_bento.models.weights import KV_SCALES, CheckpointReader, SafetensorsReader, check_tensors

_DUMMY_STD = 0.02


def load_model(
    config: ModelConfig,
    source: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    load_format: Literal["auto", "dummy"] = "auto",
    seed: int = 0,
    max_positions: int | None = None,
    group: ParallelGroup = SINGLE,
    expert_parallel: bool = False,
) -> DecoderForCausalLM:
    """Build ``config``'s model, fill it from ``source`` (a checkpoint folder or a .gguf file) and make it ready.

    load_format "dummy" fills it with random weights from ``seed`` instead and does not look at source. max_positions:
    longest context that will be asked for, in tokens (default: config.max_context). group: builds and reads its rank's
    part of the model only. expert_parallel: as ``build_model``.

    Raises ModelNotFoundError, CorruptFileError, CheckpointError and UnsupportedArchitectureError, and ConfigError if
    the model cannot be split over the group.
    """
    model = build_model(config, dtype=dtype, group=group, expert_parallel=expert_parallel)
    device = torch.device(device)
    num_positions = min(max_positions or config.max_context, config.max_context)
    if load_format == "dummy":
        generator = torch.Generator(device=device)
        model.materialize(lambda spec: _randomize(spec, generator, seed), num_positions=num_positions, device=device)
        return model.eval()
    reader = _open_reader(Path(source))
    try:
        # nothing is allocated until all names and shapes are known to fit
        check_tensors(model.weight_specs(), reader.shapes, config.tie_word_embeddings, Path(source))
        model.materialize(
            lambda spec: reader.read_into(spec.name, spec.target, spec.part),
            num_positions=num_positions,
            device=device,
        )
        _read_kv_scales(model, reader)
    finally:
        reader.close()
    return model.eval()


def _read_kv_scales(model: DecoderForCausalLM, reader: CheckpointReader) -> None:
    """Scales for an fp8 KV cache, if the checkpoint has them for every layer (else they stay None)."""
    for i, attention in enumerate(model.attentions):
        scales = []
        for name in KV_SCALES:
            full = f"model.layers.{i}.{name}"
            if math.prod(reader.shapes.get(full, (0,))) != 1:
                return
            value = torch.empty(reader.shapes[full], dtype=torch.float32)
            reader.read_into(full, value)
            if not 0 < float(value) < math.inf:
                raise CheckpointError(f"{full} is {float(value)}; a KV cache scale is a positive number.")
            scales.append(float(value))
        attention.checkpoint_scales = (scales[0], scales[1])


def _open_reader(source: Path) -> CheckpointReader:
    if source.suffix == ".gguf":
        from nanovllm_bento.models.gguf_weights import GGUFReader

        return GGUFReader(source)
    if not source.is_dir():
        raise ModelNotFoundError(f"{source} is neither a checkpoint folder nor a .gguf file.")
    return SafetensorsReader(source)


def _randomize(spec: WeightSpec, generator: torch.Generator, seed: int) -> None:
    """Matrices from N(0, 0.02²), norm weights 1, biases 0; the same for a seed on one kind of device.

    A tensor's values follow from its name and the place of this rank's part in it: ranks that hold the same part draw
    the same, and others something else.
    """
    if len(spec.shape) > 1:
        place = hashlib.blake2b(f"{seed} {spec.name} {spec.start}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(place, "little"))
        spec.target.normal_(0.0, _DUMMY_STD, generator=generator)
    else:
        spec.target.fill_(0.0 if spec.name.endswith("bias") else 1.0)
