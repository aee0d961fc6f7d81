"""The roofline: how fast a workload could run at best, from the bytes and FLOPs it cannot do without.

Ceilings are measured (one large copy, one large matrix product); what a model must move and multiply follows from its
config. A phase takes at least ``max(bytes / bandwidth, flops / rate)``, as if everything overlapped perfectly; host
time, launches and everything else between kernels are taken as nothing (Williams, Waterman and Patterson 2009).
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nanovllm_bento.bench.workloads import Workload
from nanovllm_bento.models.config import ModelConfig

if TYPE_CHECKING:
    import torch

COPY_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}
"""Size of the buffer that is copied, far beyond any cache."""
MATMUL_SIZE = {"cuda": 8192, "cpu": 768}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device reached in this run. copy_bytes_s: bytes read plus bytes written, per second."""

    copy_bytes_s: float
    matmul_flops_s: float
    matmul_dtype: str = "bfloat16"

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The least time in which so much can be moved and multiplied."""
        return max(num_bytes / self.copy_bytes_s, flops / self.matmul_flops_s)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one token costs in a model of this config, in bytes and FLOPs (a multiply-add is two).

    Per layer, with hidden size H, inner size I, q width Q = heads * head_dim, kv width K = kv_heads * head_dim:

        weights       H (Q + 2 K) + Q H + 3 H I                 elements of qkv, o, gate, up, down
        KV cache      2 K                                       elements per token
        attention     4 Q                                       FLOPs per (query token, key token) pair: q k^T and p v

    and once per sampled token the LM head, H * vocab_size elements (tied or not, it is read to have logits; the rows
    looked up in the embedding are not counted). Norms and biases are left out.

    In a layer with E experts of which a token takes k, the inner weights are k times 3 H I to multiply, beside the
    router's H E, and a step of n tokens reads the experts that are asked at all: E (1 - (1 - k / E)^n) of them, as if
    drawn at random. Of a tensor-parallel engine this is one rank's share, in whole numbers where it divides; what the
    ranks send each other is left out.
    """

    layer_weights: int  # elements that a token is multiplied by, all layers
    head_weights: int  # elements
    kv_elements: int  # per token, all layers
    attention_flops: int  # per pair of a query token and a key token, all layers
    weight_itemsize: int
    kv_itemsize: int
    expert_weights: int = 0  # elements of one expert, in all sparse layers
    num_experts: int = 1
    num_experts_per_tok: int = 0

    @classmethod
    def of(cls, config: ModelConfig, weight_itemsize: int = 2, kv_itemsize: int = 2, ranks: int = 1) -> "ModelCost":
        hidden, layers = config.hidden_size, config.num_hidden_layers
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        sparse = sum(config.is_sparse(layer) for layer in range(layers))
        expert = sparse * 3 * hidden * config.moe_intermediate_size // ranks
        dense = (layers - sparse) * 3 * hidden * config.intermediate_size // ranks
        weights = dense + layers * (hidden * (q + 2 * kv) + q * hidden) // ranks
        weights += sparse * hidden * config.num_experts + config.num_experts_per_tok * expert
        return cls(
            layer_weights=weights,
            head_weights=hidden * config.vocab_size // ranks,
            kv_elements=layers * 2 * max(kv // ranks, config.head_dim),
            attention_flops=layers * 4 * q // ranks,
            weight_itemsize=weight_itemsize,
            kv_itemsize=kv_itemsize,
            expert_weights=expert,
            num_experts=max(1, config.num_experts),
            num_experts_per_tok=config.num_experts_per_tok,
        )

    def weight_bytes(self, num_tokens: int = 1) -> int:
        """Bytes of weights that a step of so many tokens reads."""
        experts, asked = self.num_experts, self.num_experts_per_tok
        read = round(experts * (1 - (1 - asked / experts) ** num_tokens) * self.expert_weights)
        always = self.layer_weights - asked * self.expert_weights
        return (always + read + self.head_weights) * self.weight_itemsize

    @property
    def all_weight_bytes(self) -> int:
        """Bytes of all weights, of which a step may read fewer."""
        unread = (self.num_experts - self.num_experts_per_tok) * self.expert_weights
        return (self.layer_weights + unread + self.head_weights) * self.weight_itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        return self.kv_elements * self.kv_itemsize

    def decode_step(self, context_lens: Iterable[int]) -> tuple[int, int]:
        """(bytes, flops) of a decode step whose rows attend to that many tokens each, the new one included.

        bytes = weights + sum(context) * KV bytes per token
        flops = rows * 2 * (layer and head weights) + sum(context) * attention FLOPs per pair
        """
        lens = list(context_lens)
        context = sum(lens)
        flops = 2 * len(lens) * (self.layer_weights + self.head_weights) + context * self.attention_flops
        return self.weight_bytes(len(lens)) + context * self.kv_bytes_per_token, flops

    def prefill(self, prompt_len: int, cached: int = 0) -> int:
        """FLOPs of computing tokens [cached, prompt_len) of a prompt, and logits of its last one.

        (n - c) * 2 * layer weights + pairs * attention FLOPs + 2 * head weights, pairs = (n (n + 1) - c (c + 1)) / 2
        """
        pairs = (prompt_len * (prompt_len + 1) - cached * (cached + 1)) // 2
        layers = (prompt_len - cached) * 2 * self.layer_weights
        return layers + pairs * self.attention_flops + 2 * self.head_weights


def floor_seconds(workload: Workload, cost: ModelCost, ceilings: Ceilings) -> float:
    """The least seconds for a workload whose sequences all run together from the start.

    Prefill: all prompts' FLOPs, at least one reading of the weights; it yields each sequence's first token. Then decode
    step j = 1, 2, ... has a row for every sequence with more than j output tokens, each attending to its prompt and j
    tokens. Each is bounded on its own, so the result is the sum over steps of max(bytes / bandwidth, flops / rate).
    """
    pairs = [(len(p), n) for p, n in zip(workload.prompts, workload.output_lens, strict=True)]
    prompt_tokens = sum(length for length, _ in pairs)
    total = ceilings.seconds(cost.weight_bytes(prompt_tokens), sum(cost.prefill(length) for length, _ in pairs))
    for step in range(1, max(workload.output_lens)):
        total += ceilings.seconds(*cost.decode_step(length + step for length, n in pairs if n > step))
    return total


def floor_tok_s(workload: Workload, cost: ModelCost, ceilings: Ceilings) -> float:
    """Output tokens per second at that floor."""
    return workload.num_output_tokens / floor_seconds(workload, cost, ceilings)


def measure_ceilings(device: "torch.device", dtype: "torch.dtype") -> Ceilings:
    """Copy bandwidth and matrix rate of a device, best of several; on a CPU with smaller sizes."""
    import torch

    size = COPY_BYTES[device.type]
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy = _best_seconds(partial(target.copy_, source), device, repeat=20)
    del source, target
    n = MATMUL_SIZE[device.type]
    # Random operands: zeros draw less power and so run faster than any real product.
    a, b = (torch.randn(n, n, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty(n, n, dtype=dtype, device=device)
    matmul = _best_seconds(partial(torch.matmul, a, b, out=out), device, repeat=10)
    return Ceilings(2 * size / copy, 2 * n**3 / matmul, str(dtype).removeprefix("torch."))


def _best_seconds(run: Callable[[], object], device: "torch.device", repeat: int) -> float:
    """Shortest of ``repeat`` runs, after three that are not timed."""
    import torch

    for _ in range(3):
        run()
    best = float("inf")
    for _ in range(repeat):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - started)
    return best
