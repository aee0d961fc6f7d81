"""The models compute what transformers computes, through a paged cache whose blocks are in random order."""

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm_bento.kernels.attention import select_backend
from nanovllm_bento.kernels.attention.base import AttentionMetadata
from nanovllm_bento.models.config import ModelConfig
from nanovllm_bento.models.loader import load_model
from tests.engine.tiny_models import FAMILIES, computed_by, load_reference, make_tiny, read_config

BLOCK_SIZE = 4
CPU = torch.device("cpu")
PROMPT = torch.randint(3, 512, (45,), generator=torch.Generator().manual_seed(1)).tolist()


class Runner:
    """A model with a paged cache for ``num_seqs`` sequences of up to 128 tokens."""

    def __init__(self, source: Path, config: ModelConfig | None = None, num_seqs: int = 1) -> None:
        self.config = config or read_config(source)
        self.model = load_model(self.config, source, dtype=torch.float32)
        self.backend = select_backend(
            "auto",
            num_heads=self.config.num_attention_heads,
            num_kv_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            dtype=torch.float32,
            kv_dtype=torch.float32,
            block_size=BLOCK_SIZE,
            device=CPU,
        )
        self.model.set_attention_backend(self.backend)
        per_seq = 128 // BLOCK_SIZE
        order = torch.randperm(num_seqs * per_seq, generator=torch.Generator().manual_seed(2))
        self.tables = order.view(num_seqs, per_seq).int()
        shape = (len(order), BLOCK_SIZE, self.config.num_key_value_heads, self.config.head_dim)
        self.caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(self.config.num_hidden_layers)]

    def step(
        self, rows: list[tuple[int, list[int], int]], num_decode: int = 0, *, last_only: bool = False
    ) -> list[torch.Tensor]:
        """rows: (sequence, tokens, position of the first). Returns the logits of each row's tokens, or of its last."""
        bounds = [0, *accumulate(len(tokens) for _, tokens, _ in rows)]
        positions = torch.cat([torch.arange(start, start + len(tokens)) for _, tokens, start in rows])
        owners = torch.cat([torch.full((len(tokens),), seq) for seq, tokens, _ in rows])
        lens = [start + len(tokens) for _, tokens, start in rows]
        blocks = self.tables[owners, positions // BLOCK_SIZE].long()
        meta = AttentionMetadata(
            query_start_loc=torch.tensor(bounds, dtype=torch.int32),
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            block_table=self.tables[[seq for seq, _, _ in rows]],
            slot_mapping=blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
            max_query_len=max(len(tokens) for _, tokens, _ in rows),
            max_seq_len=max(lens),
            num_decode_rows=num_decode,
        )
        with torch.inference_mode():
            self.backend.prepare(meta)
            ids = torch.tensor([token for _, tokens, _ in rows for token in tokens])
            hidden = self.model(ids, positions, self.caches, meta, last_only=last_only)
            logits = self.model.compute_logits(hidden)
        if last_only:
            return list(logits.split(1))
        return [logits[a:b] for a, b in pairwise(bounds)]


def reference_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert found.dtype == torch.float32
    assert 1.0 < wanted.std() < 100, "logits of no sane scale prove little"
    assert (found - wanted).abs().max() < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    folder = make_tiny(family, tmp_path)
    wanted = reference_logits(load_reference(folder), PROMPT)
    assert_close(Runner(folder).step([(0, PROMPT, 0)])[0], wanted)


def test_logits_of_a_sharded_checkpoint_equal_transformers(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_close(Runner(folder).step([(0, PROMPT, 0)])[0], reference_logits(load_reference(folder), PROMPT))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = make_tiny("qwen3", tmp_path_factory.mktemp("qwen3"))
    return folder, load_reference(folder)


def test_prefill_in_two_chunks_equals_one(qwen3: tuple[Path, Any]) -> None:
    folder, reference = qwen3
    runner = Runner(folder)
    first = runner.step([(0, PROMPT[:18], 0)])[0]
    second = runner.step([(0, PROMPT[18:], 18)])[0]
    assert_close(torch.cat((first, second)), reference_logits(reference, PROMPT))


def test_decode_and_prefill_rows_in_one_step_do_not_touch_each_other(qwen3: tuple[Path, Any]) -> None:
    folder, reference = qwen3
    runner = Runner(folder, num_seqs=4)
    lengths = [45, 7, 30]
    runner.step([(seq, PROMPT[:n], 0) for seq, n in enumerate(lengths)])
    rows = [(seq, [100 + seq], n) for seq, n in enumerate(lengths)] + [(3, PROMPT[5:25], 0)]
    found = runner.step(rows, num_decode=3)
    for (_, tokens, start), logits in zip(rows, found, strict=True):
        whole = tokens if start == 0 else PROMPT[:start] + tokens
        assert_close(logits, reference_logits(reference, whole)[-len(tokens) :])


@pytest.mark.parametrize("products", [None, "skinny", "many_rows"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_tokens_alone_equal_those_of_the_whole_step(family: str, products: str | None, tmp_path: Path) -> None:
    """Decode rows, a prompt, a prompt's second chunk; and the keys and values that the step leaves are the same."""
    folder = make_tiny(family, tmp_path)
    rows = [(0, [100], 9), (1, [101], 20), (2, PROMPT[5:25], 0), (3, PROMPT[18:], 18)]
    found = []
    with computed_by(products):
        runners = Runner(folder, num_seqs=4), Runner(folder, num_seqs=4)
        for runner, last_only in zip(runners, (False, True), strict=True):
            runner.step([(seq, PROMPT[:n], 0) for seq, n in ((0, 9), (1, 20), (3, 18))], last_only=last_only)
            found.append(runner.step(rows, num_decode=2, last_only=last_only))
    for whole, last in zip(*found, strict=True):
        assert_close(last, whole[-1:])
    for caches in zip(runners[0].caches, runners[1].caches, strict=True):
        for whole, last in zip(*caches, strict=True):
            torch.testing.assert_close(last, whole)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "mixtral"])
def test_greedy_decoding_equals_generate(family: str, tmp_path: Path) -> None:
    folder = make_tiny(family, tmp_path)
    reference = load_reference(folder)
    num_new = 64
    with torch.inference_mode():
        wanted = reference.generate(
            torch.tensor([PROMPT]), max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False
        )[0].tolist()
    runner = Runner(folder)
    tokens = list(PROMPT)
    logits = runner.step([(0, tokens, 0)])[0]
    for _ in range(num_new):
        last = logits[-1].clone()
        last[2] = float("-inf")  # min_new_tokens: no end of sequence
        tokens.append(int(last.argmax()))
        logits = runner.step([(0, tokens[-1:], len(tokens) - 1)], num_decode=1)[0]
    assert tokens == wanted
    assert len(set(tokens[len(PROMPT) :])) > 5, "a loop of few tokens proves little"


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Any, path: Path, arch: str, quantize: bool = False, rope_freqs: np.ndarray | None = None) -> None:
    """What llama.cpp's converter would make of a transformers model; ``quantize``: q8_0 for matrices.

    Rounds the matrices of ``model`` itself to what the file holds, so that both can be compared exactly.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_token_list([f"token{i}" for i in range(config.vocab_size)])
    writer.add_eos_token_id(2)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, weight in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if module in outside:
            target = f"{outside[module]}.{kind}"
        else:
            _, _, layer, rest = module.split(".", 3)
            target = f"blk.{layer}.{_GGUF_NAMES[rest]}.{kind}"
        raw_type = gguf.GGMLQuantizationType.Q8_0
        if quantize and weight.dim() == 2:
            rounded = gguf.quants.dequantize(gguf.quants.quantize(weight.detach().numpy(), raw_type), raw_type)
            weight.data.copy_(torch.from_numpy(rounded))
        values = weight.detach().numpy()
        if arch == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if quantize and weight.dim() == 2:
            writer.add_tensor(target, gguf.quants.quantize(values, raw_type), raw_dtype=raw_type)
        else:
            writer.add_tensor(target, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("quantize", [False, True], ids=["f32", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "qwen3"])
def test_logits_of_a_gguf_file_equal_transformers(family: str, quantize: bool, tmp_path: Path) -> None:
    reference = load_reference(make_tiny(family, tmp_path))
    path = tmp_path / "model.gguf"
    write_gguf(reference, path, family.removesuffix("_tied"), quantize)
    assert_close(Runner(path).step([(0, PROMPT, 0)])[0], reference_logits(reference, PROMPT))


def test_logits_of_a_llama3_gguf_file_use_its_frequency_factors(tmp_path: Path) -> None:
    reference = load_reference(make_tiny("llama3", tmp_path))
    plain = 1.0 / 10000.0 ** (np.arange(0, 32, 2) / 32)
    factors = plain / reference.model.rotary_emb.inv_freq.numpy()
    path = tmp_path / "model.gguf"
    write_gguf(reference, path, "llama", rope_freqs=factors.astype(np.float32))
    assert_close(Runner(path).step([(0, PROMPT, 0)])[0], reference_logits(reference, PROMPT))


def test_dummy_weights_depend_on_the_seed_alone(qwen3: tuple[Path, Any]) -> None:
    config = read_config(qwen3[0])
    models = [
        load_model(config, "nowhere", dtype=torch.float32, load_format="dummy", seed=seed).embed.weight
        for seed in (3, 3, 4)
    ]
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])
