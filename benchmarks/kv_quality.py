"""What an fp8 KV cache costs in quality, on real weights and real text: benchmarks/kv_quality.py MODEL RESULT [TEXT...]

Every token of the texts is predicted twice by our own engine on the GPU, with the model's own KV dtype and with fp8,
and the two next-token distributions are compared: KL divergence, agreement of the most likely token, perplexity. Then
both engines go on greedily from the start of each text, and it is counted for how many tokens they agree.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from nanovllm_bento.bench.environment import environment, write_result
from nanovllm_bento.bench.offline import model_name
from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.engine.messages import Add, pack_tokens
from nanovllm_bento.engine.model_runner import ModelRunner
from nanovllm_bento.hub import resolve_model
from nanovllm_bento.kernels.attention.base import AttentionMetadata
from nanovllm_bento.sampling_params import SamplingParams
from nanovllm_bento.text.tokenizer import Tokenizer

WINDOW, CHUNK, GREEDY_PROMPT, GREEDY_TOKENS = 1024, 256, 64, 128


def make_engine(model: str, kv_cache_dtype: str) -> EngineCore:
    return EngineCore.from_model(
        EngineConfig.create(
            model=model, device="cuda", kv_cache_dtype=kv_cache_dtype, num_gpu_blocks_override=1024, max_num_seqs=64
        )
    )


def logits_of(core: EngineCore, ids: list[int]) -> torch.Tensor:
    """float32 [len(ids), vocab_size]; later chunks read earlier tokens' keys and values from the cache."""
    assert isinstance(core.runner, ModelRunner)
    runner, size, device = core.runner, core.info.block_size, "cuda"
    table = torch.arange(-(-len(ids) // size), dtype=torch.int32, device=device)[None]
    found = []
    for start in range(0, len(ids), CHUNK):
        end = min(start + CHUNK, len(ids))
        positions = torch.arange(start, end, device=device)
        meta = AttentionMetadata(
            query_start_loc=torch.tensor([0, end - start], dtype=torch.int32, device=device),
            seq_lens=torch.tensor([end], dtype=torch.int32, device=device),
            block_table=table,
            slot_mapping=positions,
            max_query_len=end - start,
            max_seq_len=end,
            num_decode_rows=0,
        )
        with torch.inference_mode():
            runner.backend.prepare(meta)
            hidden = runner.model(torch.tensor(ids[start:end], device=device), positions, runner.kv_caches, meta)
            found.append(runner.model.compute_logits(hidden).float())
    return torch.cat(found)


def greedy(core: EngineCore, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=GREEDY_TOKENS, ignore_eos=True, seed=0)
    for i, prompt in enumerate(prompts):
        core.add(Add(str(i), pack_tokens(prompt), params))
    tokens: list[list[int]] = [[] for _ in prompts]
    while core.has_work:
        for seq, item in core.step():
            tokens[int(seq.request_id)] += item.new_token_ids
    return tokens


def main() -> None:
    model, result, texts = sys.argv[1], Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]]
    if not texts:
        raise SystemExit(__doc__)
    tokenizer = Tokenizer.load(resolve_model(model))
    windows = []
    for text in texts:
        ids = tokenizer.encode(text.read_text())
        windows += [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW) if len(ids) - i > GREEDY_PROMPT]
    engines = {name: make_engine(model, name) for name in ("auto", "fp8_e4m3")}
    kls, agree = [], []
    nll: dict[str, list[torch.Tensor]] = {name: [] for name in engines}
    for window in windows:
        target = torch.tensor(window[1:], device="cuda")
        logs = {name: logits_of(core, window)[:-1].log_softmax(-1) for name, core in engines.items()}
        base, fp8 = logs["auto"], logs["fp8_e4m3"]
        kls.append((base.exp() * (base - fp8)).sum(-1))
        agree.append((base.argmax(-1) == fp8.argmax(-1)).float())
        for name in engines:
            nll[name].append(-logs[name].gather(1, target[:, None])[:, 0])
    kl, top = torch.cat(kls), torch.cat(agree)
    prompts = [window[:GREEDY_PROMPT] for window in windows]
    runs = {name: greedy(core, prompts) for name, core in engines.items()}
    shared = []
    for a, b in zip(runs["auto"], runs["fp8_e4m3"], strict=True):
        shared.append(next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a)))
    runner = engines["fp8_e4m3"].runner
    assert isinstance(runner, ModelRunner)
    attention = runner.model.attentions
    answer: dict[str, Any] = {
        "benchmark": "kv-quality",
        "environment": environment(),
        "model": model_name(model),
        "random_weights": False,
        "dtype": engines["auto"].info.dtype,
        "kv_cache_dtype": "fp8_e4m3",
        "texts": [path.name for path in texts],
        "num_tokens": kl.numel(),
        "kl_mean": float(kl.mean()),
        "kl_p99": float(kl.quantile(0.99)),
        "kl_max": float(kl.max()),
        "top1_agreement": float(top.mean()),
        "perplexity": {name: float(torch.cat(values).mean().exp()) for name, values in nll.items()},
        "greedy": {
            "prompts": len(prompts),
            "tokens": GREEDY_TOKENS,
            "mean_shared_prefix": sum(shared) / len(shared),
            "identical": sum(n == GREEDY_TOKENS for n in shared),
        },
        "scales": [(round(a.k_scale, 5), round(a.v_scale, 5)) for a in attention],
    }
    write_result(answer, result)
    print({k: v for k, v in answer.items() if k not in ("environment", "scales")})


if __name__ == "__main__":
    main()
