"""The passes of a step on a GPU, the kernels each consists of, and what they should take: bytes over bandwidth.

``python -m bench.passes [float|double|__nv_bfloat16|__half]`` prints the table, and how much of the time that memory
takes the float64 arithmetic would take by itself, by count.
"""

import sys
from dataclasses import dataclass

from bench.bytes import Traffic, traffic
from bench.report import aligned

BANDWIDTHS = (3.0e12, 3.35e12)  # bytes per second: what an H100 SXM5 reaches in a copy, and what its memory is rated at
PARAMETERS = (25.56e6, 124.44e6, 1e9)  # ResNet-50, GPT-2 small, a billion

# Float64 operations per element, conversions from and to it included, as make sass shows them for float parameters.
FLOAT64 = {"grad_norm": 2}


@dataclass(frozen=True)
class Chip:
    """What its maker says of it: float64 operations and conversions per clock and multiprocessor, among others."""

    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second
    float64: float
    conversions: float


CHIPS = {
    "H100 SXM5 (sm_90)": Chip(132, 1.70e9, 3.35e12, 64, 16),
    "A100 (sm_80)": Chip(108, 1.41e9, 2.04e12, 32, 16),
    "RTX 5090 (sm_120)": Chip(170, 2.41e9, 1.79e12, 2, 2),
    "RTX 4090 (sm_89)": Chip(128, 2.52e9, 1.01e12, 2, 2),
    "RTX 3090 (sm_86)": Chip(82, 1.70e9, 0.94e12, 2, 2),
    "T4 (sm_75)": Chip(40, 1.59e9, 0.32e12, 2, 2),
}
CONVERSIONS = {"grad_norm": 1}


def passes(dtype: str) -> dict[str, list[tuple[str, ...]]]:
    """The kernels of each pass over parameters of a dtype."""
    norm, weighted = ("squares_kernel", dtype, "1"), ("squares_kernel", dtype, "2")
    check, perturb = ("inspect_kernel", dtype), ("perturb_kernel", dtype, "false")
    lazy, hessian = (("update_kernel", dtype, products, "kSquareRoot") for products in ("void", dtype))
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
        "lazy step": [norm, perturb, check, lazy],
        "Hessian step": [norm, perturb, signs, check, check, hessian],
    }


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


def arithmetic(dtype: str) -> list[str]:
    """The time of the float64 arithmetic over that of memory, a line for each chip."""
    rows = [("chip", *FLOAT64)]
    for name, chip in CHIPS.items():
        cells = []
        for called, operations in FLOAT64.items():
            kernels = passes(dtype)[called]
            memory = (bytes_read(kernels) + bytes_written(kernels)) / chip.bandwidth
            slots = (operations - CONVERSIONS[called]) / chip.float64 + CONVERSIONS[called] / chip.conversions
            cells.append(f"{slots / (chip.multiprocessors * chip.clock) / memory:.2f}")
        rows.append((name, *cells))
    return aligned(rows)


if __name__ == "__main__":
    rates = " and ".join(f"{rate / 1e12:g}" for rate in BANDWIDTHS)
    print(f"bytes per parameter; microseconds at {rates} TB/s\n")
    dtype = sys.argv[1] if len(sys.argv) > 1 else "float"
    print("\n".join(table(dtype)))
    print("\nfloat64 arithmetic over memory, by count\n")
    print("\n".join(arithmetic(dtype)))
