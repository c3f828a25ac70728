"""The passes of a step on a GPU, the kernels each consists of, and what they should take: bytes over bandwidth.

``python -m bench.passes [float|double|__nv_bfloat16|__half]`` prints the table, and how much of the time that memory
takes the arithmetic would take by itself, by count of the instructions in the library built in place.
"""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from bench import loops
from bench.bytes import VECTOR_BYTES, Kernel, Traffic, traffic
from bench.report import aligned
from bench.sass import LIBRARY, MachineCode, read

BANDWIDTHS = (3.0e12, 3.35e12)  # bytes per second: what an H100 SXM5 reaches in a copy, and what its memory is rated at
PARAMETERS = (25.56e6, 124.44e6, 1e9)  # ResNet-50, GPT-2 small, a billion


@dataclass(frozen=True)
class Chip:
    """What its maker says of it: operations per clock and multiprocessor, among others.

    Attributes:
        functions: of float32, approximate: reciprocals, roots, logarithms and exponentials.
        conversions: from and to float64.
    """

    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second
    float32: float
    float64: float
    conversions: float
    functions: float = 16


CHIPS = {
    "H100 SXM5 (sm_90)": Chip(132, 1.70e9, 3.35e12, 128, 64, 16),
    "A100 (sm_80)": Chip(108, 1.41e9, 2.04e12, 64, 32, 16),
    "RTX 5090 (sm_120)": Chip(170, 2.41e9, 1.79e12, 128, 2, 2),
    "RTX 4090 (sm_89)": Chip(128, 2.52e9, 1.01e12, 128, 2, 2),
    "RTX 3090 (sm_86)": Chip(82, 1.70e9, 0.94e12, 128, 2, 2),
    "T4 (sm_75)": Chip(40, 1.59e9, 0.32e12, 64, 2, 2),
}


def architecture_of(chip: str) -> str:
    """The architecture that stands behind the name of a chip."""
    return chip.rpartition("(")[2].rstrip(")")


def passes(dtype: str) -> dict[str, list[tuple[str, ...]]]:
    """The kernels of each pass over parameters of a dtype."""
    norm, weighted = ("squares_kernel", dtype, "1"), ("squares_kernel", dtype, "2")
    check, perturb = ("inspect_kernel", dtype), ("perturb_kernel", dtype, dtype, "false")
    lazy, hessian = (("update_kernel", dtype, products, "kSquareRoot") for products in ("void", dtype))
    with_norm = ("update_and_squares_kernel", dtype, "void", "kSquareRoot")
    signs = ("rademacher_kernel", dtype)
    return {
        "grad_norm": [norm],
        "grad_norm, adaptive": [weighted],
        "perturb_": [perturb],
        "perturb_, its norm included": [norm, perturb],
        "rademacher_": [signs],
        "hutchinson_, behind the first sample": [("hutchinson_kernel", dtype)],
        "update_, lazy": [lazy],
        "update_, lazy, its check included": [check, lazy],
        "update_, Hessian": [hessian],
        "update_, Hessian, its checks included": [check, check, hessian],
        "update_, squares of gradients": [("update_kernel", dtype, "OfGradients", "kSquareRoot")],
        "update_, plain": [("update_kernel", dtype, "void", "kPlain")],
        "update_, lazy, the norm of m with it": [with_norm],
        "block_average_, beside the blocks": [("block_average_kernel", dtype)],
        "lazy step": [norm, perturb, check, lazy],
        "lazy step along m": [perturb, check, with_norm],
        "Hessian step": [norm, perturb, signs, check, check, hessian],
    }


def lazy_step(dtype: str) -> dict[str, Kernel]:
    """The kernels of lazy steps, by what they do."""
    names = ("grad_norm", "perturb_", "check", "update_, lazy")
    (with_norm,) = passes(dtype)["update_, lazy, the norm of m with it"]
    return {**dict(zip(names, passes(dtype)["lazy step"], strict=True)), "with the norm": with_norm}


def _traffic(kernels: list[tuple[str, ...]]) -> list[Traffic]:
    found = [traffic(kernel) for kernel in kernels]
    return [streams for streams in found if streams is not None]


def bytes_read(kernels: list[tuple[str, ...]]) -> int:
    """Bytes per parameter."""
    return sum(sum(streams.reads) for streams in _traffic(kernels))


def bytes_written(kernels: list[tuple[str, ...]]) -> int:
    """Bytes per parameter."""
    return sum(sum(streams.writes) for streams in _traffic(kernels))


def table(dtype: str) -> list[str]:
    """Bytes and predicted microseconds, a line for each pass."""
    sizes = [f"{count / 1e6:.4g} M" for count in PARAMETERS]
    rows = [("pass", "read", "written", *(f"{size}, us" for size in sizes))]
    for name, kernels in passes(dtype).items():
        read, written = bytes_read(kernels), bytes_written(kernels)
        times = [
            " / ".join(f"{1e6 * (read + written) * count / rate:.0f}" for rate in BANDWIDTHS) for count in PARAMETERS
        ]
        rows.append((name, str(read), str(written), *times))
    return aligned(rows)


def over_memory(chip: Chip, code: MachineCode) -> tuple[float, float]:
    """The time of a kernel's float32 and of its float64 arithmetic over that of its bytes, by count.

    Counted is the loop over the elements that runs where nothing is amiss: the one with all streams and, of two such
    loops, the one with less float64.
    """
    loop = max(code.loops, key=lambda loop: (loops.wide_accesses(loop), -loops.float64_operations(loop)))
    moved = VECTOR_BYTES * loops.wide_accesses(loop)
    float32 = loops.float32_operations(loop) / chip.float32 + loops.float32_functions(loop) / chip.functions
    float64 = loops.float64_operations(loop) / chip.float64 + loops.float64_conversions(loop) / chip.conversions
    of_memory = moved / chip.bandwidth * chip.multiprocessors * chip.clock
    return float32 / of_memory, float64 / of_memory


def arithmetic(dtype: str, found: Mapping[str, Mapping[Kernel, MachineCode]]) -> list[str]:
    """The time of the float32 and the float64 arithmetic over that of memory, a line for each chip there is code for.

    found: the kernels by architecture.
    """
    lazy = lazy_step(dtype)
    rows = [("chip", *lazy)]
    for name, chip in CHIPS.items():
        if codes := found.get(architecture_of(name)):
            ratios = [over_memory(chip, codes[kernel]) for kernel in lazy.values()]
            rows.append((name, *(f"{float32:.2f} + {float64:.2f}" for float32, float64 in ratios)))
    return aligned(rows)


if __name__ == "__main__":
    rates = " and ".join(f"{rate / 1e12:g}" for rate in BANDWIDTHS)
    print(f"bytes per parameter; microseconds at {rates} TB/s\n")
    dtype = sys.argv[1] if len(sys.argv) > 1 else "float"
    print("\n".join(table(dtype)))
    try:
        found = read(LIBRARY, [architecture_of(name) for name in CHIPS])
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"\nits arithmetic cannot be counted: {error}")
    print("\nfloat32 + float64 arithmetic over memory, by count\n")
    print("\n".join(arithmetic(dtype, found)))
