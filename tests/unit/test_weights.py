"""A checkpoint that does not fit, or cannot be read, is refused with everything that is wrong with it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm_bento.errors import CheckpointError, CorruptFileError, ModelNotFoundError
from nanovllm_bento.gguf_file import open_gguf
from nanovllm_bento.models.config import ModelConfig
from nanovllm_bento.models.decoder import DecoderForCausalLM
from nanovllm_bento.models.gguf_weights import dequantize
from nanovllm_bento.models.loader import load_model
from nanovllm_bento.models.registry import build_model
from tests.engine.tiny_models import make_tiny, read_config

CONFIG = ModelConfig.from_dict(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    specs = build_model(CONFIG, dtype=torch.float32).weight_specs()
    save_file({s.name: torch.randn(s.shape, generator=generator) for s in specs}, tmp_path / "model.safetensors")
    return tmp_path


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def load(folder: Path, config: ModelConfig = CONFIG) -> torch.nn.Module:
    return load_model(config, folder, dtype=torch.float32)


def test_a_whole_checkpoint_loads(folder: Path) -> None:
    change(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    model = load(folder)
    wanted = load_file(folder / "model.safetensors")
    assert torch.equal(model.embed.weight, wanted["model.embed_tokens.weight"])
    bias = model.layers[1].attention.qkv.bias
    parts = [wanted[f"model.layers.1.self_attn.{x}_proj.bias"] for x in "qkv"]
    assert torch.equal(bias, torch.cat(parts))


def test_all_problems_are_named_at_once(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["surplus"] = torch.ones(1)
        tensors[Q_PROJ] = torch.ones(3, 5)

    change(folder, edit)
    with pytest.raises(CheckpointError) as e:
        load(folder)
    message = str(e.value)
    assert "1 missing: model.norm.weight" in message
    assert "1 unexpected: surplus" in message
    assert f"1 misshapen: {Q_PROJ} is [3, 5], wanted [16, 16]" in message


def test_a_long_list_of_problems_is_cut(folder: Path) -> None:
    change(folder, lambda t: t.update({f"surplus{i}": torch.ones(1) for i in range(100)}))
    with pytest.raises(CheckpointError, match=r"100 unexpected: .* and 92 more"):
        load(folder)


def test_an_lm_head_is_surplus_only_where_it_is_not_tied(folder: Path) -> None:
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    load(folder, tied)
    change(folder, lambda t: t.__delitem__("lm_head.weight"))
    load(folder, tied)
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        load(folder)


@pytest.mark.parametrize("size", [0, 4, 100, -10])
def test_a_truncated_file_is_corrupt(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
        load(folder)


def test_a_file_of_something_else_is_corrupt(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
        load(folder)


def test_a_folder_without_weights_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no \.safetensors file"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelNotFoundError, match=r"pickled weights .*\.bin.*for safety"):
        load(tmp_path)
    with pytest.raises(ModelNotFoundError, match="neither"):
        load(tmp_path / "absent")


def test_integer_tensors_are_refused(folder: Path) -> None:
    change(folder, lambda t: t.update({Q_PROJ: torch.ones(16, 16, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight \(I8\).*GGUF"):
        load(folder)


def test_shards_are_read_through_their_index(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: shard for shard, members in shards.items() for name in members}}))
    assert torch.equal(load(folder).embed.weight, tensors["model.embed_tokens.weight"])
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of its 2 shards: b\.safetensors"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../a.safetensors"}}))
    with pytest.raises(CorruptFileError, match="weight_map"):
        load(folder)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_dequantizing_equals_the_gguf_library(kind: str, tmp_path: Path) -> None:
    import gguf
    import numpy as np

    raw_type = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    packed = gguf.quants.quantize(values, raw_type)
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_tensor("x", packed, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "m.gguf")
    wanted = torch.from_numpy(gguf.quants.dequantize(packed, raw_type)).view(6, 64)
    assert torch.equal(dequantize(file, file.tensors["x"]).float(), wanted)
    assert (wanted - torch.from_numpy(values)).abs().max() < 0.5


def with_scales(folder: Path, scales: dict[str, float]) -> DecoderForCausalLM:
    """The tiny checkpoint in ``folder`` with these tensors added."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, **{name: torch.tensor(value) for name, value in scales.items()}}, path, {"format": "pt"})
    return load_model(read_config(folder), folder, dtype=torch.float32)


def test_kv_cache_scales_are_read_where_every_layer_has_them(tmp_path: Path) -> None:
    folder = make_tiny("qwen3", tmp_path)
    names = [f"model.layers.{i}.self_attn.{kind}_scale" for i in range(2) for kind in ("k", "v")]
    model = with_scales(folder, {names[0]: 0.5})
    assert model.attentions[0].checkpoint_scales is None
    model = with_scales(folder, {name: 0.5 + i for i, name in enumerate(names)})
    assert [attention.checkpoint_scales for attention in model.attentions] == [(0.5, 1.5), (2.5, 3.5)]
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.v_scale is -1.0; a KV cache scale is a positive"):
        with_scales(folder, {names[3]: -1.0})
