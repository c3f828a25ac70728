"""Starting a kernel: how large its tiles are, how many programs walk over them, and on which device."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton.language as tl
from triton import knobs

from .table import UNIT, Table

# Whether these run as Python: asked of Triton, which has decided it by now.
INTERPRETED: bool = knobs.runtime.interpret

WARPS = 4
VECTOR_BYTES = 16

# Of a multiprocessor, shared out among the threads that it holds.
_REGISTERS = 65536

# Interpreted, a tile costs the same time whatever its size, up to some thousands of elements.
_INTERPRETED_UNITS = 32
_INTERPRETED_PROGRAMS = 2

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# What a kernel calls the dtype of a one-element tensor.
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


def tile_units(dtype: torch.dtype, streams: int, warp_size: int) -> int:
    """The size of the tiles, in units, of a kernel over so many streams of tensors of a dtype.

    Each thread takes one vector of 16 bytes of a tile from each stream, two where the stream is alone: with those of
    the other programs enough bytes are on their way to keep the memory busy, and the registers are enough to hold them.
    """
    return WARPS * warp_size * (VECTOR_BYTES // dtype.itemsize) * (2 if streams == 1 else 1) // UNIT


def registers_for(
    dtype: torch.dtype, *, state: bool = False, general_power: bool = False, squares: bool = False
) -> int:
    """The registers of a thread: 64, and 32 more for a logarithm and an exponential.

    Where a vector holds eight elements 16 more, and with state, which fills two vectors of its own, another 16. For
    the sums of squares on the way 16 for every four elements.
    """
    eight = dtype.itemsize == 2
    return 64 + 16 * eight + 16 * (eight and state) + 32 * general_power + 16 * squares * (1 + eight)


def options_for(registers: int, nvidia: bool) -> dict[str, Any]:
    """How a kernel is compiled: without contraction, and for so many registers a thread (not said to AMD's)."""
    limit = {"maxnreg": registers} if nvidia else {}
    return {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False, **limit}


def units_on(device: torch.device, dtype: torch.dtype, streams: int) -> int:
    """tile_units on a device."""
    if device.type != "cuda":
        return _INTERPRETED_UNITS
    return tile_units(dtype, streams, torch.cuda.get_device_properties(device).warp_size)


# Of NVIDIA's architectures those that do float64 at half the rate of float32; all others at a 32nd or a 64th.
_QUICK_FLOAT64 = ((7, 0), (8, 0), (9, 0), (10, 0))


def quick_float64(device: torch.device) -> bool:
    """Whether a device is as quick at float64 as at its memory; AMD's are taken to be, and what is interpreted is."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) in _QUICK_FLOAT64


def programs(table: Table, registers: int) -> int:
    """How many programs walk over a table: as many as a device runs at the same time, or one for each of few tiles."""
    device = table.memory.device
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    properties = torch.cuda.get_device_properties(device)
    threads = WARPS * properties.warp_size
    resident = properties.multi_processor_count * (_REGISTERS // (registers * threads))
    return max(min(table.tiles, resident), 1)


def launch(kernel: Any, device: torch.device, programs: int, *arguments: Any, registers: int, **constants: Any) -> None:
    """Starts a kernel on the current stream of a device."""
    options = options_for(registers, torch.version.hip is None)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, **constants, **options)


def launch_over(table: Table, kernel: Any, *arguments: Any, registers: int, **constants: Any) -> None:
    """Starts a kernel over all tiles of a table, its first arguments."""
    device, count = table.memory.device, programs(table, registers)
    numbers = (table.memory, table.entries, table.tiles)
    launch(kernel, device, count, *numbers, *arguments, registers=registers, **constants, UNITS=table.units)
