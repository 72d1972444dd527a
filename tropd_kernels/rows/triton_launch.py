"""Launch configurations of the Triton kernels: a pure function of sizes and precision.

No autotuning: it costs start-up time, and a kernel that overwrites its input would tune on garbage.

Chosen by what the kernels compile to (`python -m benchmarks.cubins`: registers, spills, loads and
instructions of each loop); no GPU was at hand to time them.
"""

from __future__ import annotations

import torch

#: A fused multiply-add rounds once where two operations round twice, so fusing differently in two
#: kernels would let an entry pass the top-k threshold in one and miss it in the other.
FUSION_OFF = {"enable_fp_fusion": False}
#: Threads of a warp, or of AMD's wave.
WARP = 64 if torch.version.hip else 32
#: Of the kernels that reduce rows: warps of 32 threads in a program, and stretches of LANES ids in
#: a tile, for the statistics and for the sums.
WARPS, STATISTICS_UNROLL, SUMS_UNROLL = 8, 4, 2
#: Warps of the sums that a gate asks for in a tenth of the rows: each of those few programs has a
#: processor to itself, and only its own threads hide its loads.
ASKED_WARPS = 16
#: Registers of a processor, and the most of a thread. Without a limit, NVIDIA's compiler may make
#: room for a second program next to one of 16 warps, and spill.
REGISTERS, REGISTERS_A_THREAD = 65_536, 255
#: Ids of a tile of the gradient kernel, 8 of them a thread.
GRADIENT_BLOCK = 2048
#: Of the kernel that sums columns: a thread reads 16 bytes of two rows of half precision, and a
#: vocabulary of 150,000 fills a GPU.
COLUMNS = {"BLOCK": 4 * WARP, "ROWS": 16, "num_warps": 4, **FUSION_OFF}
#: Programs that fill a GPU a few times over, so that the last of them do not leave it idle.
PROGRAMS = 1024
#: Tiles of a row that one program should have at least, to make up for its start and end.
TILES = 4


def tile_options(
    vocab_size: int, dtype: torch.dtype, logit_size: int, unroll: int, warps: int | None = None
) -> dict:
    """For the kernels that reduce rows, in `dtype`, with logits of `logit_size` bytes. Every thread
    reads 16 bytes of each of `unroll` stretches of LANES ids, or of fewer stretches where 16 bytes
    hold more logits."""
    each = 16 // logit_size
    threads, unroll = 32 * (warps or WARPS), unroll * 4 // max(each, 4)
    if dtype == torch.float64:
        threads, unroll = threads // 2, unroll // 2
    lanes = min(threads * each, power_of_two(vocab_size))
    threads = max(WARP, min(threads, lanes // each))
    options = {
        "LANES": lanes,
        "UNROLL": max(1, min(unroll, power_of_two(-(-vocab_size // lanes), least=1))),
        "num_warps": threads // WARP,
        **FUSION_OFF,
    }
    if warps == ASKED_WARPS and WARP == 32:
        options["maxnreg"] = min(REGISTERS // threads, REGISTERS_A_THREAD)
    return options


def block_options(vocab_size: int, dtype: torch.dtype) -> dict:
    """For the gradient kernel, which reduces nothing."""
    widest = GRADIENT_BLOCK // 2 if dtype == torch.float64 else GRADIENT_BLOCK
    block = min(widest, power_of_two(vocab_size))
    return {"BLOCK": block, "num_warps": max(1, block // (8 * WARP)), **FUSION_OFF}


def parts_of_row(n: int, vocab_size: int, tile: int) -> int:
    """How many programs share a row, a power of two: more where there are few rows."""
    parts = 1
    while n * parts < PROGRAMS and 2 * parts * TILES * tile <= vocab_size:
        parts *= 2
    return parts


def lanes_hold(top_k: int, lanes: int) -> bool:
    """The three largest of every lane likely hold the top k: four of them share a lane in some
    k^4 / (24 lanes^3) of the rows, in one of a hundred at most."""
    return 8 * top_k <= lanes


def power_of_two(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())
