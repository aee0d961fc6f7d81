"""Tensors of a GGUF file by Hugging Face name, dequantised by torch (the common types) or the gguf library."""

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nanovllm_bento.errors import CheckpointError
from nanovllm_bento.gguf_file import GGUFFile, GGUFTensor, open_gguf

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFReader:
    """A CheckpointReader (see models/weights.py) over one .gguf file."""

    def __init__(self, path: Path) -> None:
        self.file: GGUFFile = open_gguf(path)
        self._tensors = {hf_name(t.name): t for t in self.file.tensors.values() if t.name != "rope_freqs.weight"}
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        arch = self.file.metadata.get("general.architecture")
        self._heads: dict[str, int] = {}
        if arch == "llama":  # llama.cpp stores q and k of this architecture in the order its rope kernel likes
            heads = self.file.metadata[f"{arch}.attention.head_count"]
            self._heads = {
                "self_attn.q_proj": heads,
                "self_attn.k_proj": self.file.metadata.get(f"{arch}.attention.head_count_kv", heads),
            }

    def read_into(self, name: str, target: Tensor, part: tuple[slice, ...] = ()) -> None:
        """Fill ``target`` with the tensor's values, or the part at that index, in target's dtype.

        Of some of the rows only those are dequantised; of some of the columns the whole tensor is.
        """
        tensor, heads = self._tensors[name], self._heads.get(name.split(".", 3)[-1].rpartition(".")[0], 0)
        if len(part) == 1 and len(tensor.shape) > 1:
            count = part[0].stop - part[0].start
            heads = heads * count // tensor.shape[0]
            tensor, part = _rows(tensor, part[0].start, count), ()
        values = dequantize(self.file, tensor, None if part or heads else target)
        if heads:
            values = unpermute(values, heads)
        if values is not target:
            target.copy_(values[part])

    def close(self) -> None:
        self._tensors.clear()


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; one that is not known keeps its own."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _IN_BLOCK:
        return name
    return f"model.layers.{match[1]}.{_IN_BLOCK[match[2]]}.{match[3]}"


def _rows(tensor: GGUFTensor, start: int, count: int) -> GGUFTensor:
    """Some rows of a tensor, each of which is made of whole blocks."""
    row = tensor.num_bytes // tensor.shape[0]
    return replace(tensor, shape=(count, *tensor.shape[1:]), offset=tensor.offset + start * row, num_bytes=count * row)


def unpermute(values: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's order of q and k rows: from pairs (i, i + half) side by side back to halves one after the other.

    values: [num_heads * head_dim, ...].
    """
    return values.view(num_heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def dequantize(file: GGUFFile, tensor: GGUFTensor, out: Tensor | None = None) -> Tensor:
    """The tensor's values: float32, or its own type where that is a 16-bit float.

    They are written to ``out`` if that is float32, on the CPU, and the type is quantised, else returned in new memory
    or as a view of the mapped file, which must not be written to. Raises CheckpointError where there is no decoder.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the mapping is read-only, and nothing here writes to it
        raw = torch.frombuffer(file.data, dtype=torch.uint8, count=tensor.num_bytes, offset=tensor.offset)
    plain = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}.get(tensor.kind)
    if plain is not None:
        return raw.view(plain).view(tensor.shape)
    decode: Callable[[Tensor, Tensor], None] | None = {2: _q4_0, 3: _q4_1, 8: _q8_0}.get(tensor.kind)
    if decode is not None:
        if out is None or out.dtype != torch.float32 or out.device.type != "cpu":
            out = torch.empty(tensor.shape)
        decode(raw, out.view(-1, 32))
        return out
    import gguf

    kind = gguf.GGMLQuantizationType(tensor.kind)
    try:
        values = gguf.quants.dequantize(raw.numpy(), kind)
    except NotImplementedError as e:
        raise CheckpointError(f"tensor {tensor.name} is quantised as {kind.name}, which is not supported.") from e
    return torch.from_numpy(values).view(tensor.shape)


# Blocks of 32 values, after ggml's block_q4_0, block_q4_1 and block_q8_0. raw: uint8; out: float32 [num_blocks, 32].


def _q4_0(raw: Tensor, out: Tensor) -> None:
    raw = raw.view(-1, 18)
    _nibbles(raw[:, 2:], out)
    out.sub_(8).mul_(_float16(raw[:, :2]))


def _q4_1(raw: Tensor, out: Tensor) -> None:
    raw = raw.view(-1, 20)
    _nibbles(raw[:, 4:], out)
    out.mul_(_float16(raw[:, :2])).add_(_float16(raw[:, 2:4]))


def _q8_0(raw: Tensor, out: Tensor) -> None:
    raw = raw.view(-1, 34)
    torch.mul(raw[:, 2:].view(torch.int8), _float16(raw[:, :2]), out=out)


def _float16(pairs: Tensor) -> Tensor:
    """Bytes [num_blocks, 2] of a float16 each, as float32 [num_blocks, 1]."""
    return pairs.contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, out: Tensor) -> None:
    """uint8 [num_blocks, 16] to numbers: the low halves of a block's bytes first, then the high ones."""
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4
