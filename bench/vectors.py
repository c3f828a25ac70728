"""How the compiler has vectorised the CPU's loops: the float32 arithmetic in a function's machine code, by width.

Of each function there is a copy per instruction set. A loop over the elements that is vectorised has its arithmetic
packed in whole registers, and beside it, for the last few elements, as scalars; one that is not has scalars alone.
"""

import collections
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[1] / "sassha_fused" / "_C.abi3.so"
# As they stand in the names of copies; their whole registers have 256 and 512 bits, of which compilers may use half.
INSTRUCTION_SETS = ("v3", "v4")

Widths = collections.Counter[int]
# A mangled name without what follows its template arguments, and the instruction set.
Copy = tuple[str, str]

_COPY = re.compile(r"[0-9a-f]+ <_ZN6sassha3cpu(?:12_GLOBAL__N_1)?(\w+?)EEvP\w+\.arch_x86_64_(v[34])>:")
_ARITHMETIC = re.compile(r"\tv(?:add|sub|mul|div|sqrt|fn?m(?:add|sub)\d+)(ps|ss)\s(.*)")
_REGISTERS = {"zmm": 512, "ymm": 256, "xmm": 128}


def of_library(library: Path) -> dict[Copy, Widths]:
    """The copies for x86-64 in a library, each with its float32 operations by their bits; 32 are those of scalars."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(library)]
    return dict(parsed(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()))


def packed(widths: Widths) -> int:
    """How many operations are on whole registers."""
    return widths[256] + widths[512]


def parsed(lines: Iterable[str]) -> Iterator[tuple[Copy, Widths]]:
    """The copies in what objdump prints."""
    widths: Widths = collections.Counter()
    for line in lines:
        if line.endswith(">:"):
            widths = collections.Counter()  # of what is no copy nobody hears
            if copy := _COPY.match(line):
                yield (copy[1], copy[2]), widths
        elif operation := _ARITHMETIC.search(line):
            kind, operands = operation.groups()
            register = next(name for name in _REGISTERS if name in operands)
            widths[32 if kind == "ss" else _REGISTERS[register]] += 1
