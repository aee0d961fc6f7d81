"""A model split over 2 or 4 ranks computes what it computes whole, and each rank reads its part of the file only."""

from collections.abc import Callable, Iterator
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nanovllm_bento.errors import ConfigError
from nanovllm_bento.layers.mlp import MLP
from nanovllm_bento.layers.parallel import SINGLE, ParallelGroup
from nanovllm_bento.layers.weight_spec import split
from nanovllm_bento.models.decoder import DecoderForCausalLM, GatedMLP
from nanovllm_bento.models.loader import load_model
from tests.engine.sharded_ranks import SIZES, Ranks, calibrate, generate
from tests.engine.test_model_parity import write_gguf
from tests.engine.tiny_models import load_reference, make_tiny, read_config

Make = Callable[..., Path]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3, tied, fewer KV heads than 4 ranks": ("qwen3", {}),
    "qwen3, untied": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3, one KV head": ("qwen3", {"num_key_value_heads": 1}),
    "llama with every bias": ("llama_bias", {}),
    "qwen2, bias of q, k and v": ("qwen2", {"num_key_value_heads": 4}),
    "sizes that do not divide": ("llama_bias", {"vocab_size": 509, "intermediate_size": 90}),
    "sizes that do not divide, tied": ("qwen3", {"vocab_size": 509, "intermediate_size": 90}),
    "an intermediate size that leaves the last of 4 ranks nothing": ("qwen3", {"intermediate_size": 20}),
    "a checkpoint of several files": ("llama", {"max_shard_size": "100KB"}),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make_tiny, into a folder of its own, once for the same arguments."""

    @cache
    def make(family: str, **overrides: Any) -> Path:
        return make_tiny(family, tmp_path_factory.mktemp(family), **overrides)

    return make


@cache
def generate_alone(source: Path) -> tuple[np.ndarray, list[int]]:
    logits, tokens = generate(SINGLE, source)
    assert 1.0 < logits.std() < 100, "logits of no sane scale prove little"
    assert len(set(tokens)) > 2, "a loop of few tokens proves little"
    return logits, tokens


def assert_equal_to_one_rank(results: list[tuple[np.ndarray, list[int]]], source: Path) -> None:
    wanted, tokens = generate_alone(source)
    for logits, found in results:
        assert found == tokens
        assert np.array_equal(logits, results[0][0]), "ranks that sample for themselves need the very same logits"
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_ranks_compute_what_one_rank_computes(case: str, size: int, ranks: Ranks, make: Make) -> None:
    family, overrides = CASES[case]
    source = make(family, **overrides)
    assert_equal_to_one_rank(ranks.run(size, generate, source), source)


@pytest.mark.parametrize("quantize", [False, True], ids=["f32", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_ranks_compute_what_one_rank_computes_from_a_gguf_file(
    family: str, quantize: bool, ranks: Ranks, make: Make, tmp_path: Path
) -> None:
    source = tmp_path / "model.gguf"
    write_gguf(load_reference(make(family)), source, family, quantize)
    for size in SIZES:
        assert_equal_to_one_rank(ranks.run(size, generate, source), source)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_bias"])
def test_steps_of_few_rows_compute_the_same(family: str, ranks: Ranks, make: Make) -> None:
    source = make(family)
    assert_equal_to_one_rank(ranks.run(2, generate, source, "skinny"), source)
    assert_equal_to_one_rank([generate(SINGLE, source, "skinny")], source)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_bias"])
def test_steps_of_many_rows_compute_the_same(family: str, ranks: Ranks, make: Make) -> None:
    source = make(family)
    assert_equal_to_one_rank(ranks.run(2, generate, source, "many_rows"), source)
    assert_equal_to_one_rank([generate(SINGLE, source, "many_rows")], source)


def test_an_mlp_without_forms_of_its_own_for_few_rows_computes_the_same(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GatedMLP, "forward_fused", MLP.forward_fused)
    assert_equal_to_one_rank([generate(SINGLE, make("qwen3"), "skinny")], make("qwen3"))


@pytest.mark.parametrize("size", SIZES)
def test_fp8_scales_are_those_of_one_rank(size: int, ranks: Ranks, make: Make) -> None:
    source = make("qwen3")
    wanted = calibrate(SINGLE, source)
    results = ranks.run(size, calibrate, source)
    assert all(found == results[0] for found in results)
    np.testing.assert_allclose(results[0], wanted, rtol=1e-5)


def test_every_rank_says_that_fp8_scales_cannot_be_calibrated(ranks: Ranks, tmp_path: Path) -> None:
    path = make_tiny("qwen2", tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.v_proj.bias"][-1] = float("nan")  # the last rank's
    save_file(tensors, path, {"format": "pt"})
    assert all("cannot be calibrated" in message for message in ranks.run(2, calibrate, tmp_path))


class CountingFile:
    """A safetensors file that adds up how many elements are taken from it."""

    def __init__(self, taken: list[int], path: Path, **options: Any) -> None:
        self._file = safe_open(path, **options)
        self._taken = taken

    def __enter__(self) -> "CountingFile":
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor = self._file.get_tensor(name)
        self._taken.append(tensor.numel())
        return tensor

    def get_slice(self, name: str) -> "CountingSlice":
        return CountingSlice(self._file.get_slice(name), self._taken)


class CountingSlice:
    def __init__(self, piece: Any, taken: list[int]) -> None:
        self._piece, self._taken = piece, taken
        self.get_shape, self.get_dtype = piece.get_shape, piece.get_dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._piece[index]
        self._taken.append(tensor.numel())
        return tensor


def load_rank(source: Path, rank: int, size: int, **options: Any) -> DecoderForCausalLM:
    """A rank's model; loading needs no other rank."""
    return load_model(read_config(source), source, dtype=torch.float32, group=ParallelGroup(rank, size), **options)


def test_every_rank_reads_its_part_only(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make("llama_bias", num_key_value_heads=4, vocab_size=509, intermediate_size=90)
    taken: list[int] = []
    monkeypatch.setattr("nanovllm_bento.models.weights.safe_open", lambda path, **o: CountingFile(taken, path, **o))
    with safe_open(source / "model.safetensors", framework="pt") as file:
        sizes = {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no iterator)
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    read = []
    for rank in range(4):
        taken.clear()
        load_rank(source, rank, 4)
        read.append(sum(taken))
    assert sum(read) == sum(sizes.values()) + 3 * norms, "norms are read by all ranks, everything else once"
    assert max(read) < 0.3 * sum(sizes.values())


def test_every_rank_holds_its_part_only(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm_bento.layers.linear.pack_weight", lambda weight: None)
    monkeypatch.setattr("nanovllm_bento.layers.embedding.pack_weight", lambda weight: None)
    source = make("qwen3", tie_word_embeddings=False)  # 4 heads of 32, 2 KV heads, hidden size 64, vocabulary 512
    for rank in range(4):
        model = load_rank(source, rank, 4)
        layer = model.layers[0]
        assert (layer.attention.num_heads, layer.attention.num_kv_heads) == (1, 1)
        assert layer.attention.qkv.weight.shape == (3 * 32, 64)
        assert layer.attention.out.weight.shape == (64, 32)
        assert layer.mlp.gate_up.weight.shape == (2 * 24, 64)
        assert layer.mlp.down.weight.shape == (64, 24)
        assert model.embed.rows.shape == model.lm_head.weight.shape == (128, 64)


def test_dummy_weights_are_the_same_where_ranks_hold_the_same(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm_bento.layers.linear.pack_weight", lambda weight: None)
    source = make("qwen3", vocab_size=509)  # 2 KV heads: ranks 0 and 1 share one, ranks 2 and 3 the other
    models = [load_rank(source, rank, 4, load_format="dummy", seed=5) for rank in range(4)]
    values = [{spec.name: spec.target for spec in model.weight_specs()} for model in models]
    layer = "model.layers.1."
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        parts = [rank[f"{layer}{name}.weight"] for rank in values]
        assert not any(torch.equal(parts[0], part) for part in parts[1:])
    keys = [rank[f"{layer}self_attn.k_proj.weight"] for rank in values]
    assert torch.equal(keys[0], keys[1]) and torch.equal(keys[2], keys[3]) and not torch.equal(keys[0], keys[2])
    assert not torch.equal(values[0][f"{layer}mlp.gate_proj.weight"], values[0][f"{layer}mlp.up_proj.weight"])
    for rank, model in enumerate(models):
        rows = model.embed.weight
        assert not rows[0].any() and not rows[-1].any(), "where the ids of other ranks look"
        assert model.embed.rows.any(1).sum() == (125 if rank == 3 else 128), "the rest of the vocabulary is zeros"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "possible"), [(6, 2, 4, "1, 2, 6"), (12, 3, 4, "1, 3, 6"), (4, 2, 3, "1, 2, 4")]
)
def test_heads_that_do_not_divide_are_refused_by_name(
    heads: int, kv_heads: int, size: int, possible: str, make: Make
) -> None:
    source = make("qwen3", num_attention_heads=heads, num_key_value_heads=kv_heads)
    message = f"tensor_parallel_size={size} .* {heads} attention heads and {kv_heads} key-value heads.*: {possible}\\."
    with pytest.raises(ConfigError, match=message):
        load_rank(source, 0, size)


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("total", [1, 20, 90, 96, 509, 12288, 151936])
def test_the_parts_of_a_dimension_are_all_of_it(total: int, size: int) -> None:
    shards = [split(total, ParallelGroup(rank, size)) for rank in range(size)]
    assert [i for shard in shards for i in range(shard.start, shard.stop)] == list(range(total))
    assert len({shard.length for shard in shards}) == 1
    assert all(shard.start == shard.stop or shard.start == rank * shard.length for rank, shard in enumerate(shards))
    assert size > 1 or shards[0].is_whole
