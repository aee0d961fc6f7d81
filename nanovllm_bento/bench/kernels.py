"""Each kernel alone: time, GB/s or TFLOP/s, share of the roofline, and how much faster than plain PyTorch.

Inputs are random and rotate, so that together they exceed the L2 cache (small ones stay in it, as they do in a real
step). On a GPU calls are timed inside a CUDA graph, so that the host does not show, the plain form alike.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from nanovllm_bento.bench.roofline import Ceilings
from nanovllm_bento.kernels import norm, sample, skinny
from nanovllm_bento.kernels.activation import silu_and_mul
from nanovllm_bento.kernels.attention import select_backend
from nanovllm_bento.kernels.attention.base import AttentionMetadata
from nanovllm_bento.kernels.linear import linear, pack_weight
from nanovllm_bento.kernels.rope_store import FP8_MAX, RopeStoreStep, make_step, qk_norm_rope_store
from nanovllm_bento.models.config import ModelConfig

MAX_SETS = 64
DECODE_BOUND = 4096


@dataclass(frozen=True, slots=True)
class Sizes:
    """decode_rows: of decode kernels. tokens: of the element-wise ones. prefills: (sequences, tokens each)."""

    decode_rows: tuple[int, ...] = (1, 16, 64, 256)
    tokens: tuple[int, ...] = (1, 256, 8192)
    prefills: tuple[tuple[int, int], ...] = ((1, 4096), (16, 1024))
    context: tuple[int, int] = (500, 1100)


CPU_SIZES = Sizes(decode_rows=(1, 4), tokens=(1, 64), prefills=((1, 64),), context=(40, 80))


@dataclass(frozen=True, slots=True)
class Case:
    """make(i): the i-th set of inputs. num_bytes, flops: what a call cannot do without. graph: whether it is timed
    inside a CUDA graph. goal: least speed-up over the plain form."""

    kernel: str
    shape: str
    make: Callable[[int], Any]
    run: Callable[[Any], object]
    naive: Callable[[Any], object]
    num_bytes: int
    flops: int = 0
    graph: bool = True
    goal: float | None = None


def measure_kernels(
    rows: list[dict[str, Any]],
    errors: list[dict[str, Any]],
    config: ModelConfig,
    ceilings: Ceilings,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtypes: Sequence[torch.dtype],
    block_size: int,
    sizes: Sizes,
) -> None:
    """Append a row per case to ``rows``, or what went wrong to ``errors``."""
    found = list(cases(config, device=device, dtype=dtype, kv_dtypes=kv_dtypes, block_size=block_size, sizes=sizes))
    for case in tqdm(found, desc="kernels", leave=False):
        try:
            with torch.inference_mode():
                rows.append(measure(case, ceilings, device))
        except Exception as error:
            errors.append({"row": f"{case.kernel} {case.shape}", "error": f"{type(error).__name__}: {error}"})
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(case: Case, ceilings: Ceilings, device: torch.device) -> dict[str, Any]:
    """One case's row. ceiling_share: the roofline's time over ours; rate: in the unit of what bounds it."""
    num_sets = 1
    if device.type == "cuda":
        wanted = 3 * torch.cuda.get_device_properties(device).L2_cache_size
        num_sets = min(MAX_SETS, ceil(wanted / case.num_bytes))
    sets = [case.make(i) for i in range(num_sets)]
    seconds, recorded = time_calls(case.run, sets, device, graph=case.graph)
    naive, naive_recorded = time_calls(case.naive, sets, device, graph=case.graph)
    bytes_bound = case.num_bytes / ceilings.copy_bytes_s >= case.flops / ceilings.matmul_flops_s
    rate = case.num_bytes / seconds / 1e9 if bytes_bound else case.flops / seconds / 1e12
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "us": round(seconds * 1e6, 2),
        "bound": "bytes" if bytes_bound else "flops",
        "rate": round(rate, 3),
        "unit": "GB/s" if bytes_bound else "TFLOP/s",
        "ceiling_share": round(ceilings.seconds(case.num_bytes, case.flops) / seconds, 4),
        "naive_us": round(naive * 1e6, 2),
        "speedup": round(naive / seconds, 2),
        "goal": case.goal,
        "eager": [who for who, graph in (("ours", recorded), ("plain", naive_recorded)) if not graph],
    }


def time_calls(
    run: Callable[[Any], object], sets: Sequence[Any], device: torch.device, *, graph: bool
) -> tuple[float, bool]:
    """(seconds of one call, whether inside a CUDA graph): best of three rounds of many, over the sets by turns.

    What cannot be captured is timed as it is launched.
    """
    for inputs in (sets[0], sets[-1]):
        run(inputs)  # compiles
    if device.type != "cuda":
        samples: list[float] = []
        stop = time.perf_counter() + 0.05
        while len(samples) < 3 or (time.perf_counter() < stop and len(samples) < 1000):
            started = time.perf_counter()
            run(sets[len(samples) % len(sets)])
            samples.append(time.perf_counter() - started)
        return min(samples), False
    once = _elapsed(lambda: [run(inputs) for inputs in sets]) / len(sets)
    calls = max(len(sets), min(128, int(1e-3 / once) + 1))

    def many() -> None:
        for i in range(calls):
            run(sets[i % len(sets)])

    repeat: Callable[[], None] = many
    if graph:
        try:
            repeat = _record(many)
        except RuntimeError:
            torch.cuda.synchronize()
    _elapsed(repeat)
    rounds = min(20, int(5e-3 / (once * calls)) + 1)

    def several() -> None:
        for _ in range(rounds):
            repeat()

    return min(_elapsed(several) for _ in range(3)) / (rounds * calls), repeat is not many


def _record(run: Callable[[], None]) -> Callable[[], None]:
    """``run`` as a CUDA graph's replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    recorded = torch.cuda.CUDAGraph()
    gc.disable()  # a collection during capture could free device memory, which is not allowed there
    try:
        with torch.cuda.stream(stream):
            recorded.capture_begin(capture_error_mode="thread_local")
            try:
                run()
            finally:
                recorded.capture_end()
    finally:
        gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
    return lambda: recorded.replay()


def _elapsed(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


# -- cases ------------------------------------------------------------------------------------------------------------


def cases(
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtypes: Sequence[torch.dtype],
    block_size: int,
    sizes: Sizes,
) -> Iterator[Case]:
    """Every kernel of a decoder of this shape."""
    new = _Maker(device, dtype)
    yield from _norm_cases(config, new, sizes)
    for kv_dtype in dict.fromkeys(kv_dtypes):
        yield from _store_cases(config, new, sizes, kv_dtype, block_size)
        yield from _attention_cases(config, new, sizes, kv_dtype, block_size)
    yield from _linear_cases(config, new, sizes)
    yield from _skinny_cases(config, new, sizes)
    yield from _sample_cases(config, new, sizes)


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes random tensors."""

    device: torch.device
    dtype: torch.dtype

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def __call__(self, *shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)
        return values.mul_(scale).to(dtype or self.dtype)

    def ints(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def _norm_cases(config: ModelConfig, new: _Maker, sizes: Sizes) -> Iterator[Case]:
    hidden, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
    weight = new(hidden)
    for n in sizes.tokens:
        yield Case(
            "rms_norm",
            f"{n} × {hidden}",
            lambda i, n=n: new(n, hidden, seed=i),  # type: ignore[misc]
            lambda x: norm.rms_norm(x, weight, eps),
            lambda x: _naive_norm(x, weight, eps),
            2 * n * hidden * new.itemsize,
        )
        yield Case(
            "add_rms_norm",
            f"{n} × {hidden}",
            lambda i, n=n: (new(n, hidden, seed=i), new(n, hidden, seed=i + 1)),  # type: ignore[misc]
            lambda pair: norm.add_rms_norm(pair[0], pair[1], weight, eps),
            lambda pair: _naive_norm(pair[0] + pair[1], weight, eps),
            4 * n * hidden * new.itemsize,
        )
        yield Case(
            "silu_and_mul",
            f"{n} × 2·{inner}",
            lambda i, n=n: new(n, 2 * inner, seed=i),  # type: ignore[misc]
            silu_and_mul,
            lambda x: functional.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1],
            3 * n * inner * new.itemsize,
        )


def _naive_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def _store_cases(
    config: ModelConfig, new: _Maker, sizes: Sizes, kv_dtype: torch.dtype, block_size: int
) -> Iterator[Case]:
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    eps = config.rms_norm_eps
    weight = new(heads + kv_heads, dim) if config.architecture == "Qwen3ForCausalLM" else None
    num_positions = 4096
    angles = torch.outer(torch.arange(num_positions), 10000.0 ** -(torch.arange(0, dim, 2) / dim))
    table = torch.cat((angles.cos(), angles.sin()), -1).to(new.device)
    for n in sizes.tokens:
        random = Random(n)
        num_blocks = ceil(n / block_size)
        slots = new.ints(random.sample(range(num_blocks * block_size), n))
        step = make_step(table, new.ints([random.randrange(num_positions) for _ in range(n)]), slots)

        def make(i: int, n: int = n, num_blocks: int = num_blocks) -> tuple[Tensor, Tensor, Tensor]:
            caches = (_cache(new, num_blocks, block_size, kv_heads, dim, kv_dtype, i + s) for s in range(2))
            return (new(n, (heads + 2 * kv_heads) * dim, seed=i), *caches)  # type: ignore[return-value]

        qkv_bytes = (heads + 2 * kv_heads) * dim * new.itemsize
        stored = 2 * kv_heads * dim * kv_dtype.itemsize
        yield Case(
            "qk_norm_rope_store",
            f"{n} tokens, {_kv_name(kv_dtype)}",
            make,
            lambda s, step=step: qk_norm_rope_store(s[0], step, s[1], s[2], heads, weight, eps),  # type: ignore[misc]
            lambda s, step=step: _naive_store(s, step, heads, weight, eps),  # type: ignore[misc]
            n * (qkv_bytes + heads * dim * new.itemsize + stored + dim * 4),
            goal=4.0 if n > 1 and new.device.type == "cuda" else None,
        )


def _naive_store(
    inputs: tuple[Tensor, Tensor, Tensor], step: RopeStoreStep, num_heads: int, weight: Tensor | None, eps: float
) -> Tensor:
    """inputs: qkv, k_cache, v_cache."""
    qkv, k_cache, v_cache = inputs
    kv_heads, dim = k_cache.shape[-2:]
    q, k, v = qkv.view(len(qkv), -1, dim).split([num_heads, kv_heads, kv_heads], dim=1)
    if weight is not None:
        q, k = _naive_norm(q, weight[:num_heads], eps), _naive_norm(k, weight[num_heads:], eps)
    cos, sin = step.table[step.positions].unsqueeze(1).chunk(2, dim=-1)
    q, k = _naive_rope(q, cos, sin), _naive_rope(k, cos, sin)
    for x, cache in ((k, k_cache), (v, v_cache)):
        if cache.dtype == torch.float8_e4m3fn:
            x = x.float().clamp(-FP8_MAX, FP8_MAX).to(cache.dtype).view(torch.uint8)
            cache = cache.view(torch.uint8)
        cache.view(-1, kv_heads, dim)[step.slot_mapping] = x
    return q


def _naive_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _cache(
    new: _Maker, num_blocks: int, block_size: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int
) -> Tensor:
    return new(num_blocks, block_size, kv_heads, dim, seed=seed, dtype=dtype)


def _kv_name(kv_dtype: torch.dtype) -> str:
    return "fp8 KV" if kv_dtype == torch.float8_e4m3fn else f"{str(kv_dtype).removeprefix('torch.')} KV"


def _attention_cases(
    config: ModelConfig, new: _Maker, sizes: Sizes, kv_dtype: torch.dtype, block_size: int
) -> Iterator[Case]:
    for rows in sizes.decode_rows:
        random = Random(rows)
        lens = [random.randint(*sizes.context) for _ in range(rows)]
        name = f"{rows} rows, {round(statistics.fmean(lens))} tokens each"
        yield _attention_case("decode attention", name, config, new, kv_dtype, block_size, [1] * rows, lens)
    for rows, length in sizes.prefills:
        lens = [length] * rows
        yield _attention_case(
            "prefill attention", f"{rows} × {length} causal", config, new, kv_dtype, block_size, lens, lens
        )


def _attention_case(
    kernel: str,
    shape: str,
    config: ModelConfig,
    new: _Maker,
    kv_dtype: torch.dtype,
    block_size: int,
    query_lens: list[int],
    seq_lens: list[int],
) -> Case:
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    decode = max(query_lens) == 1
    backend = None

    num_blocks = [ceil(n / block_size) for n in seq_lens]
    ids = Random(0).sample(range(sum(num_blocks)), sum(num_blocks))
    # Under a CUDA graph the engine only knows that no row is longer than max_model_len; so here.
    bound = max(DECODE_BOUND, *seq_lens) if decode else max(seq_lens)
    width = ceil(bound / block_size)
    table = [[ids.pop() for _ in range(n)] + [0] * (width - n) for n in num_blocks]
    starts = [sum(query_lens[:i]) for i in range(len(query_lens) + 1)]
    meta = AttentionMetadata(
        query_start_loc=new.ints(starts, torch.int32),
        seq_lens=new.ints(seq_lens, torch.int32),
        block_table=torch.tensor(table, dtype=torch.int32, device=new.device),
        slot_mapping=new.ints([-1] * starts[-1]),
        max_query_len=max(query_lens),
        max_seq_len=bound,
        num_decode_rows=len(query_lens) if decode else 0,
    )

    def make(i: int) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal backend
        if backend is None:  # the first set's; here, so that a backend which cannot be had fails this case alone
            backend = select_backend(
                "auto",
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=dim,
                dtype=new.dtype,
                kv_dtype=kv_dtype,
                block_size=block_size,
                device=new.device,
            )
            backend.prepare(meta)
        q = new(starts[-1], heads, dim, seed=i)
        k, v = (_cache(new, sum(num_blocks), block_size, kv_heads, dim, kv_dtype, 2 * i + s) for s in range(2))
        return q, k, v

    def run(s: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        assert backend is not None
        return backend.forward(*s, meta, dim**-0.5)

    pairs = sum(q * (n - q) + q * (q + 1) // 2 for q, n in zip(query_lens, seq_lens, strict=True))
    return Case(
        kernel,
        f"{shape}, {_kv_name(kv_dtype)}",
        make,
        run,
        lambda s: _naive_attention(s[0], s[1], s[2], meta, max(num_blocks)),
        sum(seq_lens) * 2 * kv_heads * dim * kv_dtype.itemsize + 2 * starts[-1] * heads * dim * new.itemsize,
        4 * heads * dim * pairs,
        graph=decode,  # prefill runs eagerly in the engine too, and its kernels are long
    )


def _naive_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, num_blocks: int) -> Tensor:
    """Gather num_blocks pages of each row, then softmax(q k^T) v with a mask; all rows have as many queries."""
    rows, queries = meta.block_table.shape[0], meta.max_query_len
    kv_heads, dim = k_cache.shape[-2:]
    blocks = meta.block_table[:, :num_blocks].long()
    keys, values = (_gather(cache, blocks).to(q.dtype) for cache in (k_cache, v_cache))  # [rows, kv_heads, tokens, dim]
    q = q.view(rows, queries, kv_heads, -1, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = (q @ keys.transpose(-1, -2)) * dim**-0.5
    where = torch.arange(keys.shape[2], device=q.device)
    last = meta.seq_lens[:, None] - queries + torch.arange(queries, device=q.device)  # [rows, queries]
    hidden = where > last[..., None]  # [rows, queries, tokens]
    scores = scores.view(rows, kv_heads, -1, queries, keys.shape[2])
    scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    out = scores.softmax(-1, dtype=torch.float32).to(q.dtype).flatten(2, 3) @ values
    return out.view(rows, kv_heads, -1, queries, dim).permute(0, 3, 1, 2, 4).reshape(rows * queries, -1, dim)


def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """[rows, kv_heads, tokens, dim]"""
    if cache.dtype == torch.float8_e4m3fn:  # indexing knows no float8
        return cache.view(torch.uint8)[blocks].view(cache.dtype).flatten(1, 2).transpose(1, 2)
    return cache[blocks].flatten(1, 2).transpose(1, 2)


def _linear_cases(config: ModelConfig, new: _Maker, sizes: Sizes) -> Iterator[Case]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {
        "qkv": (hidden, q + 2 * kv),
        "o": (q, hidden),
        "gate_up": (hidden, 2 * inner),
        "down": (inner, hidden),
        "lm_head": (hidden, config.vocab_size),
    }
    for name, (n_in, n_out) in shapes.items():
        for rows in sizes.decode_rows:

            def make(i: int, rows: int = rows, n_in: int = n_in, n_out: int = n_out) -> tuple[Tensor, ...]:
                x, weight = new(rows, n_in, seed=i), new(n_out, n_in, seed=i, scale=n_in**-0.5)
                packed = pack_weight(weight)
                return (x, weight) if packed is None else (x, weight, packed)

            yield Case(
                "linear",
                f"{name} {n_in} → {n_out}, {rows} rows",
                make,
                lambda s: linear(s[0], s[1], None, *s[2:]),
                lambda s: functional.linear(s[0], s[1]),
                (rows * n_in + n_in * n_out + rows * n_out) * new.itemsize,
                2 * rows * n_in * n_out,
            )


def _skinny_cases(config: ModelConfig, new: _Maker, sizes: Sizes) -> Iterator[Case]:
    """Products of small batches, fused with what is around them; plain PyTorch runs the parts one by one."""
    hidden, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    scale = new(hidden)

    def make(rows: int, n_in: int, n_out: int, i: int) -> tuple[Tensor, Tensor, Tensor]:
        weight = new(n_out, n_in, seed=i, scale=n_in**-0.5)
        return new(rows, n_in, seed=i), weight, new(rows, n_out, seed=i + 1)

    def add(s: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return skinny.linear_add(s[0], s[1], None, s[2])

    def add_naive(s: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return s[2] + functional.linear(s[0], s[1])

    def gate_up_naive(s: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        gate, up = functional.linear(_naive_norm(s[0], scale, eps), s[1]).chunk(2, dim=-1)
        return functional.silu(gate) * up

    products: list[tuple[str, int, int, Callable[[Any], Tensor], Callable[[Any], Tensor]]] = [
        (
            "norm + qkv",
            hidden,
            q + 2 * kv,
            lambda s: skinny.norm_linear(s[0], scale, eps, s[1], None),
            lambda s: functional.linear(_naive_norm(s[0], scale, eps), s[1]),
        ),
        ("o + residual", q, hidden, add, add_naive),
        (
            "norm + gate_up + silu",
            hidden,
            2 * inner,
            lambda s: skinny.norm_gate_up(s[0], scale, eps, s[1]),
            gate_up_naive,
        ),
        ("down + residual", inner, hidden, add, add_naive),
    ]
    for name, n_in, n_out, run, naive in products:
        for rows in sizes.decode_rows:
            if new.device.type == "cuda" and not skinny.supports(rows, new.dtype, new.device):
                continue
            yield Case(
                "skinny",
                f"{name} {n_in} → {n_out}, {rows} rows",
                partial(make, rows, n_in, n_out),
                run,
                naive,
                (rows * n_in + n_in * n_out + rows * n_out) * new.itemsize,
                2 * rows * n_in * n_out,
            )


def _sample_cases(config: ModelConfig, new: _Maker, sizes: Sizes) -> Iterator[Case]:
    vocab = config.vocab_size
    dtype = new.dtype if new.device.type == "cuda" else torch.float32
    for rows in (min(sizes.decode_rows), max(sizes.decode_rows)):
        for name, top_k, top_p in (("plain", 0, 1.0), ("top-k 50, top-p 0.9", 50, 0.9)):
            slots = sample.new_slot_table(rows)
            slots["temperature"], slots["top_k"], slots["top_p"], slots["seed"] = 0.6, top_k, top_p, range(rows)
            parameters = sample.slot_words(slots).to(new.device)
            indices = new.ints(range(rows))
            yield Case(
                "sample",
                f"{rows} × {vocab}, {name}",
                partial(_logits, new, rows, vocab, dtype),
                partial(_sample, parameters, indices, top_k > 0),
                partial(_naive_sample, 0.6, top_k, top_p),
                rows * vocab * dtype.itemsize,
            )


def _logits(new: _Maker, rows: int, vocab: int, dtype: torch.dtype, i: int) -> Tensor:
    return new(rows, vocab, seed=i, scale=3.0, dtype=dtype)


def _sample(slot_params: Tensor, slots: Tensor, filtered: bool, logits: Tensor) -> Tensor:
    return sample.sample_rows(logits, slot_params, slots, slots, filtered=filtered)


def _naive_sample(temperature: float, top_k: int, top_p: float, logits: Tensor) -> Tensor:
    logits = logits.float() / temperature
    if top_k:
        values, order = logits.sort(dim=-1, descending=True)
        values[:, top_k:] = -torch.inf
        probs = values.softmax(-1)
        values = values.masked_fill(probs.cumsum(-1) - probs >= top_p, -torch.inf)
        logits = torch.empty_like(values).scatter_(-1, order, values)
    probs = logits.softmax(-1)
    return (probs / torch.empty_like(probs).exponential_(1)).argmax(-1)
