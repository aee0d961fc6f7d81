"""What norm, activation and rope_store are to do, stated once for Triton's interpreter and for the GPU.

Each check takes the operation itself: the launcher of the Triton kernel in the interpreter, the dispatch on the GPU.
What is allocated during a call is filled with NaN first, so that an element nothing wrote shows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nanovllm_bento.kernels.activation import silu_and_mul_reference
from nanovllm_bento.kernels.norm import rms_norm_reference
from nanovllm_bento.kernels.rope_store import make_step, qk_norm_rope_store_reference

Op = Callable[..., Tensor]
PairOp = Callable[..., tuple[Tensor, Tensor]]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FP8 = torch.float8_e4m3fn
EPS = 1e-5


def randn(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape).to(dtype).to(device)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """By relative norm, and no element further off than a few of its own roundings; wanted: float64, anywhere."""
    assert found.dtype == dtype
    found, wanted = found.double().cpu(), wanted.double().cpu()
    assert found.shape == wanted.shape
    assert found.isfinite().all()
    assert (found - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
    torch.testing.assert_close(found, wanted, rtol=5 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


def same_roundings(found: Tensor, reference: Tensor) -> None:
    """Rounded at the reference's points, both differ only where float32 noise tips a rounding; else in every fourth."""
    assert found.dtype == reference.dtype
    assert (found.cpu() != reference.cpu()).double().mean() < 0.01


def norm64(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def check_rms_norm(op: Op, rows: int, n: int, dtype: torch.dtype, device: str) -> None:
    x, weight = randn(rows, n, dtype=dtype, device=device), randn(n, dtype=dtype, device=device)
    x[0] *= 100  # so that the mean matters
    before = x.clone()
    with poisoned_memory():
        found = op(x, weight, EPS)
    close(found, norm64(x, weight), dtype)
    assert torch.equal(x, before)


def check_add_rms_norm(op: PairOp, rows: int, n: int, dtype: torch.dtype, device: str, *, truncates: bool) -> None:
    """truncates: the interpreter does where it converts to bfloat16, so the sum is not torch's to the bit."""
    x, residual = (randn(rows, n, dtype=dtype, device=device) for _ in range(2))
    weight = randn(n, dtype=dtype, device=device)
    total = x + residual
    with poisoned_memory():
        normed, new_residual = op(x, residual, weight, EPS)
    if truncates:
        close(new_residual, total, dtype)
    else:
        assert torch.equal(new_residual, total)
    close(normed, norm64(total, weight), dtype)
    assert (normed.data_ptr(), new_residual.data_ptr()) == (x.data_ptr(), residual.data_ptr())  # nothing allocated


def check_sum_add_rms_norm(op: PairOp, rows: int, n: int, dtype: torch.dtype, device: str) -> None:
    parts = randn(3, rows, n, dtype=torch.float32, device=device)
    residual, weight = randn(rows, n, dtype=dtype, device=device), randn(n, dtype=dtype, device=device)
    before, total = parts.clone(), residual.double() + parts.double().sum(0)
    with poisoned_memory():
        normed, new_residual = op(parts, residual, weight, EPS)
    close(new_residual, total, dtype)
    close(normed, norm64(new_residual, weight), dtype)
    assert torch.equal(parts, before)


def check_norm_rounds_as_the_reference(op: Op, n: int, dtype: torch.dtype, device: str) -> None:
    x, weight = randn(8, n, dtype=dtype, device=device), randn(n, dtype=dtype, device=device)
    same_roundings(op(x, weight, EPS), rms_norm_reference(x.cpu(), weight.cpu(), EPS))


def check_norms_do_not_depend_on_the_batch(
    op: Op, add_op: PairOp, n: int, dtype: torch.dtype, device: str, rows: int
) -> None:
    x, residual = (randn(rows, n, dtype=dtype, device=device) for _ in range(2))
    weight = randn(n, dtype=dtype, device=device)
    together = op(x, weight, EPS)
    added = add_op(x.clone(), residual.clone(), weight, EPS)
    for row in (slice(0, 1), slice(rows // 2, rows // 2 + 1), slice(rows - 3, rows)):
        assert torch.equal(op(x[row].clone(), weight, EPS), together[row])
        normed, total = add_op(x[row].clone(), residual[row].clone(), weight, EPS)
        assert torch.equal(normed, added[0][row]) and torch.equal(total, added[1][row])


def check_silu_and_mul(op: Op, rows: int, n: int, dtype: torch.dtype, device: str) -> None:
    x = randn(rows, 2 * n, dtype=dtype, device=device)
    x[0, 0], x[-1, n - 1] = 200.0, -200.0  # exp(200) is infinite in float32
    before = x.clone()
    with poisoned_memory():
        found = op(x)
    gate, up = x.double().chunk(2, -1)
    close(found, gate / (1 + (-gate).exp()) * up, dtype)
    assert torch.equal(x, before)


def check_silu_rounds_as_the_reference(op: Op, dtype: torch.dtype, device: str) -> None:
    x = randn(8, 512, dtype=dtype, device=device)
    same_roundings(op(x), silu_and_mul_reference(x.cpu()))


class RopeCase:
    """Random inputs of qk_norm_rope_store: repeated positions, slots in any order, every third token not stored."""

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        device: str,
        head_dim: int = 64,
        heads: int = 4,
        kv_heads: int = 2,
        num_tokens: int = 5,
        norm: bool = True,
        cache_dtype: torch.dtype | None = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        self.dtype, self.heads, self.kv_heads, self.head_dim = dtype, heads, kv_heads, head_dim
        self.k_scale, self.v_scale = k_scale, v_scale
        self.qkv = randn(num_tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=device)
        self.weight = randn(heads + kv_heads, head_dim, dtype=dtype, device=device) if norm else None
        angles = torch.randn(20, head_dim // 2) * 3
        self.table = torch.cat((angles.cos(), angles.sin()), -1).to(device)
        self.positions = torch.randint(20, (num_tokens,)).to(device)
        block_size = 4
        num_blocks = num_tokens // block_size + 2
        slots = torch.randperm(num_blocks * block_size)[:num_tokens]
        slots[1::3] = -1
        self.slots = slots.to(device)
        self.k_cache = torch.full((num_blocks, block_size, kv_heads, head_dim), torch.nan, device=device)
        self.k_cache = self.k_cache.to(cache_dtype or dtype)
        self.v_cache = self.k_cache.clone()

    def run(self, op: Op, **options: int) -> Tensor:
        """q of the operation, or of the reference where ``op`` is that; the caches are written."""
        return op(
            self.qkv,
            make_step(self.table, self.positions, self.slots),
            self.k_cache,
            self.v_cache,
            self.heads,
            self.weight,
            EPS,
            self.k_scale,
            self.v_scale,
            **options,
        )

    def on_cpu(self) -> "RopeCase":
        copy = object.__new__(RopeCase)
        for name, value in vars(self).items():
            setattr(copy, name, value.cpu().clone() if isinstance(value, Tensor) else value)
        return copy

    def tokens(self, start: int, stop: int) -> "RopeCase":
        """The same case with these tokens alone, and the caches as they are now, copied."""
        copy = object.__new__(RopeCase)
        for name, value in vars(self).items():
            setattr(copy, name, value)
        copy.qkv = self.qkv[start:stop].clone()
        copy.positions, copy.slots = self.positions[start:stop].clone(), self.slots[start:stop].clone()
        copy.k_cache, copy.v_cache = self.k_cache.clone(), self.v_cache.clone()
        return copy

    def wanted(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v in float64, [num_tokens, heads of each, head_dim]."""
        return self.wanted_of(self.qkv.view(self.qkv.shape[0], -1, self.head_dim))

    def wanted_of(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``wanted`` of another projection, [num_tokens, heads of all, head_dim]."""
        x = qkv.double()
        qk, v = x[:, : self.heads + self.kv_heads], x[:, self.heads + self.kv_heads :]
        if self.weight is not None:
            qk = norm64(qk, self.weight)
        cos, sin = self.table[self.positions].double().unsqueeze(1).chunk(2, -1)
        first, second = qk.chunk(2, -1)
        qk = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        return qk[:, : self.heads], qk[:, self.heads :], v

    def stored(self, cache: Tensor) -> Tensor:
        """What the cache holds for the tokens that have a slot. All its other slots must hold their poison."""
        flat = cache.view(-1, self.kv_heads, self.head_dim)
        free = torch.ones(flat.shape[0], dtype=torch.bool, device=flat.device)
        free[self.slots[self.slots >= 0]] = False
        assert free.any() and flat.float()[free].isnan().all()
        return flat.view(torch.uint8)[self.slots[self.slots >= 0]].view(cache.dtype)


def check_rope_store(op: Op, case: RopeCase, **options: int) -> None:
    before = case.qkv.clone()
    with poisoned_memory():
        q = case.run(op, **options)
    wanted_q, wanted_k, wanted_v = case.wanted()
    close(q, wanted_q, case.dtype)
    assert q.is_contiguous()
    close(case.stored(case.k_cache), wanted_k[case.slots >= 0], case.k_cache.dtype)
    assert torch.equal(case.stored(case.v_cache).double(), wanted_v[case.slots >= 0])
    assert torch.equal(case.qkv, before)


def check_rope_store_keeps_the_keys(op: Op, case: RopeCase) -> None:
    """Beside the cache, all of them; and what is not finite stays with its own token and head."""
    num_tokens, last = case.qkv.shape[0], case.heads + 2 * case.kv_heads - 1
    before = case.qkv.view(num_tokens, -1, case.head_dim).clone()
    case.run(op, keep=True)
    after = case.qkv.view(num_tokens, -1, case.head_dim)
    wanted_keys = case.wanted_of(before)[1]
    keys, values = after[:, case.heads : case.heads + case.kv_heads], after[:, case.heads + case.kv_heads :]
    close(keys, wanted_keys, case.dtype)
    assert torch.equal(values, before[:, case.heads + case.kv_heads :])
    case.qkv.copy_(before.flatten(1))
    case.qkv.view(num_tokens, -1, case.head_dim)[1, last, 3] = torch.nan
    case.qkv.view(num_tokens, -1, case.head_dim)[2, last, -1] = -torch.inf
    case.run(op, keep=True)
    broken = torch.zeros(num_tokens, case.kv_heads, dtype=torch.bool, device=keys.device)
    broken[1:3, -1] = True
    assert keys[broken].isnan().all() and (values[broken] == 0).all()
    assert torch.equal(values[~broken], before[:, case.heads + case.kv_heads :][~broken])
    close(keys[~broken], wanted_keys[~broken], case.dtype)


def check_rope_rounds_as_the_reference(op: Op, case: RopeCase) -> None:
    reference = case.on_cpu()
    same_roundings(case.run(op), reference.run(qk_norm_rope_store_reference))
    same_roundings(case.stored(case.k_cache).float(), reference.stored(reference.k_cache).float())
    same_roundings(case.stored(case.v_cache).float(), reference.stored(reference.v_cache).float())


def check_rope_store_does_not_depend_on_the_batch(op: Op, case: RopeCase) -> None:
    n = case.qkv.shape[0]
    parts = [case.tokens(start, stop) for start, stop in ((0, 1), (n // 2, n // 2 + 1), (n - 3, n))]
    q = case.run(op)
    for part, (start, stop) in zip(parts, ((0, 1), (n // 2, n // 2 + 1), (n - 3, n)), strict=True):
        assert torch.equal(part.run(op), q[start:stop])
        kept = part.slots[part.slots >= 0]
        for cache, whole in ((part.k_cache, case.k_cache), (part.v_cache, case.v_cache)):
            shape = (-1, case.kv_heads, case.head_dim)
            assert torch.equal(cache.view(shape)[kept], whole.view(shape)[kept])


def check_fp8_cache_of_representable_values(op: Op, dtype: torch.dtype, device: str) -> None:
    """Every finite e4m3 value, times a scale, is stored as it is, and beyond the largest the largest is."""
    case = RopeCase(
        dtype=dtype, device=device, norm=False, cache_dtype=FP8, k_scale=0.5, v_scale=2.0, num_tokens=7, head_dim=64
    )
    case.table = torch.cat((torch.ones(20, 32), torch.zeros(20, 32)), -1).to(device)  # turns by nothing
    grid = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    grid = grid[grid.isfinite()]
    shape = (7, case.kv_heads, case.head_dim)
    values = grid[torch.randint(len(grid), (2, *shape))]
    values.view(2, 7, -1)[:, :, 3], values.view(2, 7, -1)[:, :, 77] = 448.0, -448.0
    beyond = values.clone()
    beyond.view(2, 7, -1)[:, :, 3], beyond.view(2, 7, -1)[:, :, 77] = 600.0, -torch.inf
    qkv = case.qkv.view(7, -1, case.head_dim)
    qkv[:, 4:6], qkv[:, 6:8] = (beyond[0] * 0.5).to(case.qkv), (beyond[1] * 2.0).to(case.qkv)
    qkv[:, 4:6] = qkv[:, 4:6].nan_to_num(neginf=-60000.0)  # infinity times sin 0 is not a number
    case.run(op)
    stored = case.slots >= 0
    assert torch.equal(case.stored(case.k_cache).float(), values[0].to(device)[stored])
    assert torch.equal(case.stored(case.v_cache).float(), values[1].to(device)[stored])
