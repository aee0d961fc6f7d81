"""The gated product of many rows in Triton: silu(g) * u of [g | u] = x @ weight.T, the activation in registers.

What this saves over a product and an activation: writing both halves and reading them again, half as many bytes as the
product has to move at all. One program a multiprocessor takes tile after tile, a tile of g and the tile of u beside it
from the same x; operands come through the tensor memory accelerator, several steps ahead and across tiles, so that they
are on their way while the activation of the tile before is computed. Sums are in float32 and rounded once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm_bento.kernels.launch import num_sms, use_pdl
from nanovllm_bento.kernels.many_rows import Config


@triton.jit(do_not_specialize=["m", "n"])
def _gate_up_kernel(
    x,  # descriptors: of [m, K] in tiles of BLOCK_M by BLOCK_K,
    weight,  # of [2n, K] in tiles of BLOCK_N by BLOCK_K,
    out,  # of [m, n] in tiles of BLOCK_M by BLOCK_N // PIECES
    m,
    n,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,  # rows of tiles that are worked on side by side, so that the L2 cache holds their operands
    STAGES: tl.constexpr,
    PIECES: tl.constexpr,  # that a tile is stored in: one takes less code, two less shared memory
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), n // BLOCK_N
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True, num_stages=STAGES):
        band, place = tile // (BAND * tiles_n), tile % (BAND * tiles_n)
        height = tl.minimum(tiles_m - band * BAND, BAND)
        row, column = (band * BAND + place % height) * BLOCK_M, place // height * BLOCK_N
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            values = x.load([row, k])
            gate = tl.dot(values, weight.load([column, k]).T, gate)
            up = tl.dot(values, weight.load([n + column, k]).T, up)
        if PIECES == 1:
            out.store([row, column], (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype))
        else:
            HALF: tl.constexpr = BLOCK_N // 2
            gate_0, gate_1 = gate.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
            up_0, up_1 = up.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
            out.store([row, column], (gate_0 / (1.0 + tl.exp(-gate_0)) * up_0).to(out.dtype))
            out.store([row, column + HALF], (gate_1 / (1.0 + tl.exp(-gate_1)) * up_1).to(out.dtype))


def launch(x: Tensor, weight: Tensor, out: Tensor, config: Config, programs: int | None = None) -> Tensor:
    """Fill ``out`` [m, n] and return it. x: [m, k], weight: [2n, k]; all contiguous, n a multiple of config.block_n."""
    (m, k), n = x.shape, out.shape[1]
    assert weight.shape == (2 * n, k) and out.shape[0] == m and n % config.block_n == 0
    pdl = use_pdl(x.device)
    _gate_up_kernel[(programs or num_sms(x.device),)](
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
        TensorDescriptor.from_tensor(out, [config.block_m, config.block_n // config.pieces]),
        *(m, n, k, config.block_m, config.block_n, config.block_k),
        *(config.band, config.stages, config.pieces, pdl),
        num_warps=config.num_warps,
        launch_pdl=pdl,
    )
    return out
