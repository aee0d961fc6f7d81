"""Qwen3-0.6B's shapes on the GPU in bfloat16, against transformers on the same weights in float32 and in bfloat16."""

import pytest
import torch

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.kernels.attention.base import AttentionMetadata

NUM_TOKENS = 700


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random checkpoint with the official shapes; norm weights vary, as in a trained model."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("qwen3")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 150_000, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))


def transformers_logits(folder, ids, dtype):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").cuda().eval()
    with torch.inference_mode():
        return model(ids.cuda()[None]).logits[0].float()


@pytest.fixture(scope="module")
def wanted(folder, ids):
    allow = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    exact, rounded = (transformers_logits(folder, ids, dtype) for dtype in (torch.float32, torch.bfloat16))
    torch.backends.cuda.matmul.allow_tf32 = allow
    return exact, rounded


def errors(found, exact):
    """(relative norm error, mean KL divergence of the next-token distributions)."""
    log_p, log_q = exact.log_softmax(-1), found.float().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return float((found.float() - exact).norm() / exact.norm()), float(kl)


@pytest.mark.parametrize(
    "settings",
    [{}, {"attention_backend": "triton"}, {"batch_invariant": True}, {"kv_cache_dtype": "fp8_e4m3"}],
    ids=str,
)
def test_logits_are_as_near_to_float32_as_transformers_own_in_bfloat16(folder, ids, wanted, settings):
    """Prefill of all tokens in two chunks, of few and of many rows, then the last ones as decode steps of one row."""
    exact, rounded = wanted
    core = EngineCore.from_model(
        EngineConfig.create(
            env={}, model=str(folder), device="cuda", max_model_len=1024, num_gpu_blocks_override=80, **settings
        )
    )
    runner, found, decode_from = core.runner, [], NUM_TOKENS - 20
    chunks = [(0, 130), (130, decode_from), *((i, i + 1) for i in range(decode_from, NUM_TOKENS))]
    for start, end in chunks:
        decode = end - start == 1
        table = torch.arange(7, 7 + 44, dtype=torch.int32, device="cuda")[None]
        meta = AttentionMetadata(
            query_start_loc=torch.tensor([0, end - start], dtype=torch.int32, device="cuda"),
            seq_lens=torch.tensor([end], dtype=torch.int32, device="cuda"),
            block_table=table,
            slot_mapping=7 * 16 + torch.arange(start, end, device="cuda"),
            max_query_len=end - start,
            max_seq_len=end,
            num_decode_rows=int(decode),
        )
        with torch.inference_mode():
            runner.backend.prepare(meta)
            hidden = runner.model(
                ids[start:end].cuda(), torch.arange(start, end, device="cuda"), runner.kv_caches, meta
            )
            found.append(runner.model.compute_logits(hidden).float())
    ours, theirs = errors(torch.cat(found), exact), errors(rounded, exact)
    print(f"{settings}: error {ours[0]:.2e}, KL {ours[1]:.2e}; transformers bf16: {theirs[0]:.2e}, {theirs[1]:.2e}")
    room = 4.0 if "kv_cache_dtype" in settings else 1.2
    assert ours[0] < room * theirs[0]
    assert ours[1] < room**2 * theirs[1]
