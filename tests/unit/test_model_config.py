"""ModelConfig reads both styles of config.json and refuses, by name, what the engine would compute wrongly."""

import math
from pathlib import Path
from typing import Any

import pytest

from nanovllm_bento.errors import CheckpointError, CorruptFileError, ModelNotFoundError, UnsupportedArchitectureError
from nanovllm_bento.models.config import ModelConfig
from nanovllm_bento.models.gguf import read_gguf_config
from tests.engine.tiny_models import read_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}


def config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**LLAMA, **changes})


def test_absent_fields_take_the_usual_defaults() -> None:
    c = config()
    assert (c.num_key_value_heads, c.head_dim, c.rope.theta) == (4, 16, 10000.0)
    assert (c.tie_word_embeddings, c.attention_bias, c.mlp_bias) == (False, False, False)
    assert c.max_context == 2048


@pytest.mark.parametrize(
    "style",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "torch_dtype": "float16"},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}, "torch_dtype": "torch.float16"},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}, "dtype": "float16"},
    ],
    ids=["transformers 4", "older", "transformers 5"],
)
def test_both_styles_of_config_mean_the_same(style: dict[str, Any]) -> None:
    c = config(**style)
    assert (c.rope.type, c.rope.theta, c.rope.factor, c.rope.original_max_position) == ("llama3", 5e5, 8.0, 512)
    assert c.dtype == "float16"
    assert c.max_context == 2048, "llama3 configs state the stretched length"


def test_linear_and_yarn_stretch_the_context() -> None:
    assert config(rope_scaling={"type": "linear", "factor": 4.0}).max_context == 8192
    yarn = config(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048})
    assert yarn.max_context == 8192
    assert yarn.rope.attention_factor == pytest.approx(0.1 * math.log(4.0) + 1)


def test_biases_follow_the_family() -> None:
    qwen2 = config(architectures=["Qwen2ForCausalLM"])
    assert (qwen2.attention_bias, qwen2.o_bias, qwen2.mlp_bias) == (True, False, False)
    llama = config(attention_bias=True, mlp_bias=True)
    assert (llama.attention_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)


def test_a_sliding_window_limits_the_context_if_it_is_in_use() -> None:
    assert config(architectures=["MistralForCausalLM"], sliding_window=100).max_context == 100
    assert config(architectures=["MistralForCausalLM"], sliding_window=None).max_context == 2048
    qwen = {"architectures": ["Qwen3ForCausalLM"], "sliding_window": 100, "max_window_layers": 1}
    assert config(**qwen).max_context == 2048
    assert config(**qwen, use_sliding_window=True).max_context == 100
    assert config(**{**qwen, "max_window_layers": 2}, use_sliding_window=True).max_context == 2048


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": None, "hidden_size": None}, "lacks vocab_size, hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lack low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers='two'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"dtype": "int8"}, "int8"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config(**changes)


QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
MIXTRAL: dict[str, Any] = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}


def test_a_dense_model_has_no_experts() -> None:
    c = config(num_experts=8)
    assert c.num_experts == 0 and not c.is_sparse(0)


def test_experts_of_both_families() -> None:
    c = config(**QWEN3_MOE)
    assert (c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size, c.norm_topk_prob) == (128, 8, 768, True)
    assert c.is_sparse(0) and c.is_sparse(1)
    assert config(**{**QWEN3_MOE, "num_experts": None, "num_local_experts": 16}).num_experts == 16, "transformers 5"
    assert not config(**{**QWEN3_MOE, "norm_topk_prob": None}).norm_topk_prob
    assert config(**QWEN3_MOE, use_sliding_window=True, sliding_window=100).max_context == 100
    m = config(**MIXTRAL)
    assert (m.num_experts, m.num_experts_per_tok, m.moe_intermediate_size, m.norm_topk_prob) == (8, 2, 96, True)
    assert m.rope.theta == 1e6 and m.max_context == 2048
    assert config(**MIXTRAL, sliding_window=100).max_context == 100


def test_some_layers_may_be_dense() -> None:
    c = config(**QWEN3_MOE, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [c.is_sparse(i) for i in range(6)] == [False, True, False, False, False, True]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"moe_intermediate_size": None}, "lacks moe_intermediate_size"),
        ({"num_experts_per_tok": 200}, "num_experts_per_tok=200 is above num_experts=128"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size=512"),
        ({"n_shared_experts": 1}, "n_shared_experts=1"),
        ({"mlp_only_layers": [2]}, "mlp_only_layers names 2; layers are numbered 0 to 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
    ],
)
def test_experts_that_are_not_supported_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config(**{**QWEN3_MOE, **changes})


@pytest.mark.parametrize("architectures", [["GPT2LMHeadModel"], [], None])
def test_an_unknown_architecture_lists_the_known(architectures: Any) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"LlamaForCausalLM.*Qwen3ForCausalLM"):
        config(architectures=architectures)


def test_a_folder_needs_a_readable_config(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures":')
    with pytest.raises(CorruptFileError, match=r"config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CorruptFileError, match="list"):
        read_config(tmp_path)


def _write_gguf(path: Path, arch: str, **extra: Any) -> Path:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([f"token{i}" for i in range(512)])
    writer.add_eos_token_id(2)
    for key, value in extra.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", np.zeros((512, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_has_a_config(tmp_path: Path) -> None:
    c = read_config(_write_gguf(tmp_path / "m.gguf", "qwen3"))
    assert (c.architecture, c.vocab_size, c.head_dim, c.num_key_value_heads) == ("Qwen3ForCausalLM", 512, 16, 2)
    assert (c.tie_word_embeddings, c.max_context) == (True, 2048)


def test_a_gguf_file_of_another_architecture_or_rope_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"'phi3'.*llama, qwen2, qwen3"):
        read_gguf_config(_write_gguf(tmp_path / "a.gguf", "phi3"))
    with pytest.raises(CheckpointError, match="longrope"):
        read_gguf_config(_write_gguf(tmp_path / "b.gguf", "llama", llama__rope__scaling__type="longrope"))


def test_a_gguf_file_cut_anywhere_is_corrupt(tmp_path: Path) -> None:
    whole = _write_gguf(tmp_path / "m.gguf", "llama").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 10, 24, 60, 500, 5000, len(whole) - 64]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CorruptFileError, match=r"cut\.gguf"):
            read_gguf_config(cut)


def test_a_gguf_file_that_claims_huge_sizes_is_corrupt(tmp_path: Path) -> None:
    whole = bytearray(_write_gguf(tmp_path / "m.gguf", "llama").read_bytes())
    bad = tmp_path / "bad.gguf"
    for at in (8, 16, 24):  # number of tensors, of values, length of the first key
        broken = whole.copy()
        broken[at : at + 8] = b"\xff" * 8
        bad.write_bytes(broken)
        with pytest.raises(CorruptFileError):
            read_gguf_config(bad)
