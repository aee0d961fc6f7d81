"""Rows by id in Triton: one program a block of columns of one row. What it does is said in embedding.py.

It takes no longer than torch's kernel; it is here for programmatic dependent launch, so that in a decode step the first
layer's product asks for its weights while the rows are still on their way.

The kernels after it may start once it has waited, no earlier: what came before it, a step's own inputs above all, is
then complete and need not be waited for again. Attention in decode reads context lengths and block tables ahead of its
own wait and counts on that.
"""

import triton
import triton.language as tl
from torch import Tensor

from nanovllm_bento.kernels.launch import use_pdl


# Ids are read one at a time, so that nothing is gained by knowing how they are aligned; and a rank's first id is no
# reason to compile anew.
@triton.jit(do_not_specialize=["first", "num_rows"], do_not_specialize_on_alignment=["ids_ptr"])
def _embedding_kernel(  # type: ignore[no-untyped-def]
    ids_ptr,
    weight_ptr,
    out_ptr,
    first,
    num_rows,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # not before the wait: see above
    # One grid dimension, the blocks of a row side by side: the other dimensions hold 65535 programs at most.
    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    token = (program // blocks).to(tl.int64)
    cols = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    row = tl.minimum(tl.maximum(tl.load(ids_ptr + token) - first, 0), num_rows - 1)
    tl.store(out_ptr + token * N + cols, tl.load(weight_ptr + row * N + cols, mask=mask), mask=mask)


def embedding(input_ids: Tensor, weight: Tensor, first: int, *, block: int = 1024) -> Tensor:
    """The default gives a thread one 16-byte load in bf16."""
    assert input_ids.is_contiguous() and weight.is_contiguous()
    num_tokens, (num_rows, n) = len(input_ids), weight.shape
    block = min(block, max(32, triton.next_power_of_2(n)))
    out = weight.new_empty(num_tokens, n)
    pdl = use_pdl(weight.device)
    _embedding_kernel[(num_tokens * triton.cdiv(n, block),)](
        input_ids,
        weight,
        out,
        first,
        num_rows,
        N=n,
        BLOCK=block,
        PDL=pdl,
        num_warps=max(1, block // 256),
        launch_pdl=pdl,
    )
    return out
