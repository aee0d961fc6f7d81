"""How ranks share a mixture of experts: their partial sums add up, whichever way it is split."""

import pytest
import torch

from nanovllm_bento.errors import ConfigError
from nanovllm_bento.kernels import skinny
from nanovllm_bento.layers.moe import ExpertNames, MoEMLP
from nanovllm_bento.layers.norm import RMSNorm
from nanovllm_bento.layers.parallel import ParallelGroup
from nanovllm_bento.layers.weight_spec import allocate
from nanovllm_bento.models.registry import build_model
from tests.engine.tiny_models import make_tiny, read_config

NAMES = ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")
HIDDEN, INNER, EXPERTS, TOP_K = 32, 40, 6, 3
CPU = torch.device("cpu")


def make_layer(rank: int = 0, size: int = 1, **options: bool) -> MoEMLP:
    """A rank's part of one layer; a tensor's values follow from its name."""
    layer = MoEMLP(
        HIDDEN,
        INNER,
        EXPERTS,
        TOP_K,
        renormalize=True,
        dtype=torch.float32,
        names=NAMES,
        group=ParallelGroup(rank, size),
        **options,
    )
    specs = list(layer.weight_specs("layer.mlp."))
    allocate(layer, specs, CPU)
    for spec in specs:
        if spec.num_elements:
            whole = torch.randn(spec.shape, generator=torch.Generator().manual_seed(hash_of(spec.name)))
            spec.target.copy_(whole[spec.part] / 4)
    layer.finalize()
    return layer


def hash_of(name: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(11, HIDDEN, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_the_ranks_partial_sums_add_up(x: torch.Tensor, expert_parallel: bool, size: int) -> None:
    """40 columns over 3 or 4 ranks are padded with zeros; 6 experts over 4 ranks are 1, 2, 1 and 2."""
    wanted = make_layer()(x)
    layers = [make_layer(rank, size, expert_parallel=expert_parallel) for rank in range(size)]
    assert (sum(layer(x) for layer in layers) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    held = sum(len(layer.experts) for layer in layers)
    assert held == (EXPERTS if expert_parallel else size * EXPERTS)


def test_every_rank_names_every_tensor_and_takes_its_part_of_it() -> None:
    names = {spec.name: spec.shape for spec in make_layer().weight_specs("layer.mlp.")}
    assert len(names) == 1 + 3 * EXPERTS
    assert names["layer.mlp.gate.weight"] == (EXPERTS, HIDDEN)
    assert names["layer.mlp.experts.5.down_proj.weight"] == (HIDDEN, INNER)
    for options in ({}, {"expert_parallel": True}):
        specs = [list(make_layer(rank, 4, **options).weight_specs("layer.mlp.")) for rank in range(4)]
        for same in zip(*specs, strict=True):
            assert same[0].shape == names[same[0].name]
            taken = sum(spec.num_elements for spec in same)
            replicated = same[0].name.endswith("mlp.gate.weight")
            assert taken == (4 if replicated else 1) * same[0].shape[0] * same[0].shape[1]


def test_the_residual_is_added_in_the_fused_form(x: torch.Tensor) -> None:
    layer = make_layer()
    norm = RMSNorm(HIDDEN, 1e-6, dtype=torch.float32)
    allocate(norm, list(norm.weight_specs("norm")), CPU)
    norm.weight.data.uniform_(0.5, 1.5)
    wanted = x + layer(norm(x, None)[0])
    assert (layer.forward_fused(skinny, x.clone(), norm) - wanted).abs().max() < 1e-5


def test_more_ranks_than_experts_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=8 with enable_expert_parallel .* 6 experts"):
        make_layer(0, 8, expert_parallel=True)


def test_a_model_is_split_by_experts_if_asked(tmp_path) -> None:
    config = read_config(make_tiny("qwen3_moe_some", tmp_path))
    group = ParallelGroup(1, 2)
    for expert_parallel, held, inner in [(False, range(8), 24), (True, range(4, 8), 48)]:
        model = build_model(config, dtype=torch.float32, group=group, expert_parallel=expert_parallel)
        layers = [m for m in model.modules() if isinstance(m, MoEMLP)]
        assert len(layers) == 1, "layer 3 of 4: every other one, but for layer 1"
        assert (layers[0].experts, layers[0].inner.length) == (held, inner)


def test_batch_invariance_reaches_the_experts(tmp_path) -> None:
    model = build_model(read_config(make_tiny("qwen3_moe", tmp_path)), dtype=torch.float32)
    model.set_batch_invariant()
    layers = [m for m in model.modules() if isinstance(m, MoEMLP)]
    assert layers and all(m.batch_invariant and m.router.batch_invariant for m in layers)
