"""One-shot all-reduce over NVLink in Triton, alone and fused with the residual add and RMSNorm after it.

What it computes is said in all_reduce.py. How: a program takes a row, writes its part straight into the inbox that
every other rank keeps for it, and waits for the others' parts in its own inbox. No flags and no fences: an inbox is
kept full of ``EMPTY``, a word that no sender sends (two halves of -0.0, or a float32 of -5e-41; a sender makes it 0),
so each 32-bit word, which the hardware moves whole, says by itself that it has come. A row thus costs one flight over
NVLink. (The idea is Lamport's, as in NCCL's LL protocol; the sentinel as in TensorRT-LLM's one-shot kernels.)

Why a word is never taken for another call's. A row of the workspace has two inboxes, used in turns; whose turn it is
stands in device memory (``turns``) and is flipped by the program that had the row, so it is right whatever graphs and
eager calls follow each other. All ranks make the same calls, so their turns agree. Let k count the calls that had
some row, and A and B be any two ranks.

- A reads in call k only what call k wrote: after call k - 2, the last to use this inbox, its reader put EMPTY back
  into every word it had read, which is every word that was written.
- B's write of call k + 2 comes after A's EMPTY of call k: B's kernel k + 2 starts when B's kernel k + 1 has ended,
  which has read A's part of that row, which A wrote in its kernel k + 1, which started when A's kernel k had ended.
  The ends of kernels order memory as fences do (with programmatic dependent launch: gdc_wait, before anything here is
  touched), and both writes are to the same word of A's memory.

Why it cannot deadlock. A program writes all its rows before it waits for any, and waits only for the same rows on the
other ranks. There are no more programs than SMs, so all of them run at once, and what ran before on the device ends
without them. A rank that never comes is noticed by counting: after ``max_polls`` looks the kernel traps, which the
process sees as a CUDA error.

Inline PTX: Triton's own stores are weak, and a poll must look into memory each time: ``st.relaxed.sys`` and
``ld.relaxed.sys``, 16 bytes a thread. The interpreter knows no PTX; there a plain load takes what a test has put in.
"""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from nanovllm_bento.kernels.all_reduce import EMPTY, Workspace
from nanovllm_bento.kernels.launch import num_sms, use_pdl

INTERPRETED = bool(triton.knobs.runtime.interpret)
SEND = """{
    .reg .pred active;
    setp.ne.s32 active, $6, 0;
    mov.b32 $0, 0;
    @active st.relaxed.sys.global.v4.b32 [$1], {$2, $3, $4, $5};
}"""


@triton.jit
def _send(address, words, active, VECTORS: tl.constexpr, EMPTY: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write words [VECTORS, 4] to the 16 bytes at each address [VECTORS]."""
    if PTX is not None:
        even, odd = tl.split(tl.reshape(words, (VECTORS, 2, 2)))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        tl.inline_asm_elementwise(
            PTX,
            "=r,l,r,r,r,r,r",
            [address, w0, w1, w2, w3, active.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        pointers = address.to(tl.pointer_type(tl.int32))[:, None] + tl.arange(0, 4)[None, :]
        tl.store(pointers, words, mask=active[:, None])


@triton.jit
def _join(w0, w1, w2, w3, VECTORS: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (VECTORS, 4))


@triton.jit
def _unpack(words, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The low and the high half of each word as float32; a float32 is all in the low one, and the high one 0."""
    if DTYPE == tl.float32:  # noqa: SIM300
        low = words.to(tl.float32, bitcast=True)
        high = tl.zeros_like(low)
    else:
        low = words.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _pack(low, high, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    if DTYPE == tl.float32:  # noqa: SIM300
        words = low.to(tl.int32, bitcast=True)
    else:
        low_bits = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        words = low_bits | (high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return words


@triton.jit(do_not_specialize=["rows", "max_polls"])
def _all_reduce_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # what is returned is written over it
    residual_ptr,  # None: the sum alone
    weight_ptr,
    inboxes_ptr,  # int64 [SIZE], the address of each rank's inboxes: words of [2, MAX_ROWS, SIZE, STRIDE]
    turns_ptr,
    rows,
    max_polls,
    eps,
    N: tl.constexpr,
    WORDS: tl.constexpr,  # of a row, a multiple of 4
    VECTORS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    EMPTY: tl.constexpr,
    SEND: tl.constexpr,  # PTX; None in the interpreter
    RECEIVE: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    RECEIVED: tl.constexpr,  # the types of what RECEIVE gives
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    words_ptr = tl.pointer_type(tl.int32)
    vectors = tl.arange(0, VECTORS)
    active = vectors < WORDS // 4
    cols = vectors[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = cols < WORDS
    empty = tl.full((VECTORS, 4), EMPTY, tl.int32)
    inbox = tl.load(inboxes_ptr + RANK)
    if residual_ptr is not None:
        weight = tl.load(weight_ptr.to(words_ptr) + cols, mask=mask, other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()

    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        turn = tl.load(turns_ptr + row)
        words = tl.load(x_ptr.to(words_ptr) + row * WORDS + cols, mask=mask, other=0)
        words = tl.where(words == EMPTY, 0, words)
        part = ((turn * MAX_ROWS + row) * SIZE + RANK) * STRIDE
        for peer in tl.static_range(SIZE):
            if peer != RANK:
                address = tl.load(inboxes_ptr + peer) + (part + vectors * 4) * 4
                _send(address, words, active, VECTORS, EMPTY, SEND)

    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        turn = tl.load(turns_ptr + row)
        at = row * WORDS + cols
        own = tl.load(x_ptr.to(words_ptr) + at, mask=mask, other=0)
        own = tl.where(own == EMPTY, 0, own)  # so that all ranks sum the same
        if residual_ptr is not None:
            residual = tl.load(residual_ptr.to(words_ptr) + at, mask=mask, other=0)
        parts = inbox + ((turn * MAX_ROWS + row) * (SIZE * STRIDE) + vectors * 4) * 4
        if RECEIVE is not None:
            received = tl.inline_asm_elementwise(
                RECEIVE, CONSTRAINTS, [parts, active.to(tl.int32), max_polls], dtype=RECEIVED, is_pure=False, pack=1
            )
        low = tl.zeros((VECTORS, 4), tl.float32)
        high = tl.zeros((VECTORS, 4), tl.float32)
        for rank in tl.static_range(SIZE):
            if rank == RANK:
                words = own
            elif RECEIVE is not None:
                words = _join(
                    received[4 * rank], received[4 * rank + 1], received[4 * rank + 2], received[4 * rank + 3], VECTORS
                )
            else:
                pointers = (parts + rank * STRIDE * 4).to(words_ptr)[:, None] + tl.arange(0, 4)[None, :]
                words = tl.load(pointers, mask=mask, other=0)
            more_low, more_high = _unpack(words, dtype)
            low += more_low
            high += more_high
        tl.debug_barrier()  # so that whoever has read a turn has done so before it is flipped
        for rank in tl.static_range(SIZE):
            if rank != RANK:
                _send(parts + rank * STRIDE * 4, empty, active, VECTORS, EMPTY, SEND)
        tl.store(turns_ptr + row, 1 - turn)

        if residual_ptr is not None:
            low, high = _unpack(_pack(low, high, dtype), dtype)
            residual_low, residual_high = _unpack(residual, dtype)
            total = _pack(low + residual_low, high + residual_high, dtype)
            tl.store(residual_ptr.to(words_ptr) + at, total, mask=mask)
            low, high = _unpack(total, dtype)
            squares = tl.sum(tl.sum(low * low + high * high, axis=1), axis=0)
            scale = tl.rsqrt(squares / N + eps)
            low, high = _unpack(_pack(low * scale, high * scale, dtype), dtype)
            weight_low, weight_high = _unpack(weight, dtype)
            low *= weight_low
            high *= weight_high
        tl.store(x_ptr.to(words_ptr) + at, _pack(low, high, dtype), mask=mask)


def all_reduce(x: Tensor, workspace: Workspace) -> Tensor:
    """Overwrites x with the sum, and returns it."""
    _launch(x, None, None, x.shape[-1], 0.0, workspace)
    return x


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, workspace: Workspace
) -> tuple[Tensor, Tensor]:
    """Overwrites x with the norm and residual with the sum, and returns the two."""
    assert residual.is_contiguous()
    _launch(x, residual, weight, weight.shape[0], eps, workspace)
    return x, residual


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, n: int, eps: float, workspace: Workspace
) -> None:
    if not x.numel():
        return
    words = n * x.element_size() // 4
    # Never more threads than vectors: Triton would give one to two threads, and the second to write it might come after
    # the peer has read what the first wrote and emptied its inbox.
    vectors = max(32, triton.next_power_of_2(words // 4))
    num_warps = min(32, vectors // 32)  # with one vector a thread, no thread polls for one after another
    rows = x.numel() // n
    pdl = use_pdl(x.device)
    programs = workspace.max_programs or (1 << 30 if INTERPRETED else num_sms(x.device))
    stride = workspace.row_bytes // 4
    receive, constraints = (None, None) if INTERPRETED else _receive(workspace.size, workspace.rank, stride)
    _all_reduce_kernel[(min(rows, programs),)](
        x,
        residual,
        weight,
        workspace.inboxes,
        workspace.turns,
        rows,
        workspace.max_polls,
        eps,
        N=n,
        WORDS=words,
        VECTORS=vectors,
        MAX_ROWS=workspace.max_rows,
        STRIDE=stride,
        SIZE=workspace.size,
        RANK=workspace.rank,
        EMPTY=EMPTY,
        SEND=None if INTERPRETED else SEND,
        RECEIVE=receive,
        CONSTRAINTS=constraints,
        RECEIVED=(tl.int32,) * (4 * workspace.size),
        PDL=pdl,
        num_warps=num_warps,
        launch_pdl=pdl,
    )


@cache
def _receive(size: int, rank: int, stride: int) -> tuple[str, str]:
    """PTX that loads 16 bytes of each rank's part until no word of them is EMPTY, and its constraints.

    Results: four words of each rank, this one's own 0. All parts are asked for before the first is looked at, so that
    a look costs one trip to memory.
    """
    words = 4 * size
    address, active, max_polls = (f"${words + i}" for i in range(3))
    others = [other for other in range(size) if other != rank]
    loads = [
        f"@active ld.relaxed.sys.global.v4.b32 {{{', '.join(f'${4 * other + i}' for i in range(4))}}}, "
        f"[{address} + {other * stride * 4}];"
        for other in others
    ]
    checks = [f"setp.eq.or.s32 missing, ${4 * other + i}, {EMPTY}, missing;" for other in others for i in range(4)]
    lines = [
        "{",
        ".reg .pred active, missing, late;",
        ".reg .s32 polls;",
        f"setp.ne.s32 active, {active}, 0;",
        *(f"mov.b32 ${word}, 0;" for word in range(words)),
        f"mov.b32 polls, {max_polls};",
        "look:",
        *loads,
        "setp.ne.s32 missing, 0, 0;",
        *checks,
        "@!missing bra come;",
        "sub.s32 polls, polls, 1;",
        "setp.lt.s32 late, polls, 0;",
        "@late trap;",
        "bra look;",
        "come:",
        "}",
    ]
    return "\n".join(lines), ",".join(["=&r"] * words + ["l", "r", "r"])
