"""Reading safetensors checkpoints, and checking a checkpoint against what a model needs.

Pickled .bin files are never opened: unpickling runs whatever code they hold.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovllm_bento.errors import CheckpointError, CorruptFileError, ModelNotFoundError
from nanovllm_bento.hub import read_json_object
from nanovllm_bento.layers.weight_spec import WeightSpec

_FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_NAMED = 8

KV_SCALES = ("self_attn.k_scale", "self_attn.v_scale")
"""One number each per layer: what a key or value of an fp8 KV cache is to be multiplied by."""


class CheckpointReader(Protocol):
    """A checkpoint's tensors by Hugging Face name."""

    shapes: dict[str, tuple[int, ...]]

    def read_into(self, name: str, target: Tensor, part: tuple[slice, ...] = ()) -> None:
        """Fill ``target`` with the tensor's values, or a part of them, in target's dtype.

        part: an index into the tensor, with a start and a stop for each of its first dimensions; () is all of it.
        target has the shape of that.
        """

    def close(self) -> None:
        """Let go of the files."""


class SafetensorsReader:
    """All tensors of a folder: model.safetensors, or the shards that model.safetensors.index.json names."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}  # tensor name -> open file
        self._open: list[Any] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        integers = []
        for path in _safetensors_files(folder):
            try:
                file = safe_open(path, framework="pt", device="cpu").__enter__()
                for name in file.keys():  # noqa: SIM118 (no iterator)
                    piece = file.get_slice(name)
                    self._files[name] = file
                    self.shapes[name] = tuple(piece.get_shape())
                    if piece.get_dtype() not in _FLOATS:
                        integers.append(f"{name} ({piece.get_dtype()})")
            except (SafetensorError, OSError) as e:
                raise CorruptFileError(f"{path} is truncated or no safetensors file: {e}") from e
            self._open.append(file)
        if integers:
            raise CheckpointError(
                f"{folder} holds tensors that are not float32, float16 or bfloat16: {_some(integers)}. Quantised "
                "checkpoints are not supported, except as GGUF."
            )

    def read_into(self, name: str, target: Tensor, part: tuple[slice, ...] = ()) -> None:
        file = self._files[name]
        target.copy_(file.get_slice(name)[part] if part else file.get_tensor(name))

    def close(self) -> None:
        self._files.clear()
        for file in self._open:
            file.__exit__(None, None, None)
        self._open.clear()


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        shards = read_json_object(index).get("weight_map")
        if not isinstance(shards, dict) or any(not isinstance(s, str) or Path(s).name != s for s in shards.values()):
            raise CorruptFileError(f"{index} has no weight_map from tensor names to file names.")
        paths = [folder / name for name in sorted(set(shards.values()))]
        absent = [path.name for path in paths if not path.is_file()]
        if absent:
            raise CheckpointError(f"{folder} lacks {len(absent)} of its {len(paths)} shards: {_some(absent)}.")
        return paths
    paths = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("consolidated")]
    if paths:
        return paths
    pickled = sorted(path.name for kind in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{kind}"))
    if pickled:
        raise ModelNotFoundError(
            f"{folder} holds no .safetensors file, only pickled weights ({pickled[0]}), which are not loaded for "
            "safety: unpickling can run any code. Convert them to safetensors first."
        )
    raise ModelNotFoundError(f"{folder} holds no .safetensors file; download the model again or give another folder.")


def check_tensors(specs: Iterable[WeightSpec], shapes: Mapping[str, tuple[int, ...]], tied: bool, source: Path) -> None:
    """Raises one CheckpointError that names every tensor missing from, unexpected in, or misshapen in a checkpoint.

    Harmless extras pass: rotary frequencies, scales for an fp8 KV cache, and the LM head of a model that ties it to the
    embedding.
    """
    wanted = {spec.name: spec.shape for spec in specs}
    missing = [name for name in wanted if name not in shapes]
    extra = [name for name in shapes if name not in wanted and not _harmless(name, tied)]
    misshapen = [
        f"{name} is {list(shapes[name])}, wanted {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    problems = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (("missing", missing), ("unexpected", extra), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(f"the tensors in {source} do not fit its config: {'; '.join(problems)}.")


def _harmless(name: str, tied: bool) -> bool:
    return name.endswith(("rotary_emb.inv_freq", *KV_SCALES)) or (tied and name == "lm_head.weight")


def _some(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
