"""The loops in which a kernel's machine code goes over the elements, and what these are made of.

A loop reaches from where a branch jumps back to up to the branch. One that goes over the elements accesses global
memory 16 bytes at a time, and none within it does. Its instructions are counted as they stand: those that take the tail
of a tensor, element by element, stand beside those that take vectors, and what is done with the numbers they read or
write stands there once, whichever way these came. Not seen: what a branch leaves the loop for, such as the division of
numbers that are nearly subnormal.
"""

import collections
import re
from collections.abc import Sequence

# An address, the name with its suffixes, the operands.
Instruction = tuple[int, str, str]
Loop = collections.Counter[str]

INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
_FLOAT64 = re.compile(
    r"D(ADD|MUL|FMA|SETP|SET|MNMX)\b.*|MUFU\..*64.*|(F2F|F2I|I2F|FRND)\..*F64.*|I2F\..*64.*|F2I\..*64.*"
)
_CONVERSION = re.compile(r"(F2F|F2I|I2F|FRND)\..*")
_FLOAT32 = re.compile(r"(FADD|FMUL|FFMA|FMNMX|FMNMX3|FSETP|FSET|FSEL|FCHK|HADD2)\b.*")
_FUNCTION = re.compile(r"MUFU\..*")


def _is_wide(instruction: Instruction) -> bool:
    return re.match(r"(LDG|STG)\b.*\.128\b", instruction[1]) is not None


def element_loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """The loops over the elements, each as the counts of its instructions by name."""
    ends: dict[int, int] = {}
    for address, name, operands in instructions:
        if name.startswith("BRA") and (target := _TARGET.search(operands)):
            start = int(target[1], 16)
            if start < address:
                ends[start] = max(ends.get(start, 0), address)
    bodies = {
        (start, end): [each for each in instructions if start <= each[0] <= end] for start, end in sorted(ends.items())
    }
    wide = [span for span, body in bodies.items() if any(map(_is_wide, body))]
    inner = [
        span
        for span in wide
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in wide)
    ]
    return [collections.Counter(name for _, name, _ in bodies[span]) for span in inner]


def wide_accesses(loop: Loop) -> int:
    """How often a loop accesses global memory 16 bytes at a time."""
    return sum(count for name, count in loop.items() if _is_wide((0, name, "")))


def float64_operations(loop: Loop) -> int:
    """Float64 arithmetic, conversions apart."""
    return sum(c for name, c in loop.items() if _FLOAT64.fullmatch(name) and not _CONVERSION.fullmatch(name))


def float64_conversions(loop: Loop) -> int:
    """Conversions from and to float64, and between floats and integers of 64 bits."""
    return sum(c for name, c in loop.items() if _FLOAT64.fullmatch(name) and _CONVERSION.fullmatch(name))


def float32_operations(loop: Loop) -> int:
    """Float32 arithmetic, comparisons and the widening of float16 among it, functions apart."""
    return sum(count for name, count in loop.items() if _FLOAT32.fullmatch(name))


def float32_functions(loop: Loop) -> int:
    """Approximate reciprocals, roots, logarithms and exponentials of float32."""
    return sum(c for name, c in loop.items() if _FUNCTION.fullmatch(name) and not _FLOAT64.fullmatch(name))
