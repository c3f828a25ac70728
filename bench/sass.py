"""The machine code of the CUDA kernels: registers, spills, and how wide memory is accessed. Needs no GPU.

    python -m bench.sass [--arch sm_90]... [library]

What is counted are instructions as they stand, not as they run. A kernel's body has each access twice, a 16-byte one
for vectors and one per element for tails and pointers that are not aligned. So the 16-byte accesses are those of the
vector path alone, and they must be exactly as many as bench/bytes.py works out from the streams: loads and stores each
as many as streams times vectors in the unrolled body (twice that for state twice as wide as the parameters). In update_
there is one more of each, from the loop that restores the weights of a skipped step; in the norm, where float64 is
slow, there are twice as many, for what float32 does not hold is summed in a second loop. A stream read in narrower
pieces leaves too few of them, one read twice too many. Bytes per element are these 16-byte accesses, without the
restoring loop, over the elements that the loops serve.

Not seen: that a condition may leave an access out (hutchinson_ reads no estimate for the first sample, so moves less
than is printed), and 8-byte accesses beside the 16-byte ones; narrower ones the tests count as well.
"""

import argparse
import collections
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from bench.bytes import KINDS, VECTOR_BYTES, Kernel, kernels, quick_float64, traffic
from bench.loops import INSTRUCTION, Instruction, Loop, element_loops, float64_conversions, float64_operations

LIBRARY = Path(__file__).resolve().parents[1] / "sassha_fused" / "_cuda.abi3.so"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
WIDTHS = (128, 64, 32, 16, 8)  # bits

NO_TOOL = "cuobjdump was found neither on PATH nor in the triton wheel: pip install triton, or install the CUDA toolkit"

_FUNCTION = re.compile(r"\s*Function\s*:\s*(\w+)\s*$")
_RESOURCES = re.compile(r"\s*Function (\w+):\s*$")
_NUMBERS = re.compile(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_NARROWER = re.compile(r"[US](8|16)")


@dataclass
class MachineCode:
    """What a kernel is made of on one architecture.

    Attributes:
        stack: bytes; local: bytes of local memory outside it.
        spills: how many instructions load from and store to local memory.
        loads, stores: of global memory, by width in bits.
        loops: those over the elements.
    """

    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    spills: collections.Counter[str] = field(default_factory=collections.Counter)
    loads: collections.Counter[int] = field(default_factory=collections.Counter)
    stores: collections.Counter[int] = field(default_factory=collections.Counter)
    loops: list[Loop] = field(default_factory=list)

    def take(self, instructions: Sequence[Instruction]) -> None:
        """Counts a kernel's instructions."""
        for _, name, _ in instructions:
            operation, _, suffixes = name.partition(".")
            if operation in ("LDL", "STL"):
                self.spills[operation] += 1
            elif operation in ("LDG", "STG"):
                (self.loads if operation == "LDG" else self.stores)[width(suffixes)] += 1
        self.loops = element_loops(instructions)


def find_cuobjdump() -> str | None:
    """On PATH, or in the triton wheel, which is not imported for it."""
    triton = importlib.util.find_spec("triton")
    bundled = [f"{folder}/backends/nvidia/bin" for folder in triton.submodule_search_locations or ()] if triton else []
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(bundled))


def width(suffixes: str) -> int:
    """Bits of an access, from what follows its name, such as .E.EF.128 or .E.U16."""
    for suffix in suffixes.split("."):
        if suffix.isdecimal():
            return int(suffix)
        if narrower := _NARROWER.fullmatch(suffix):
            return int(narrower[1])
    return 32


def demangled(symbol: str) -> Kernel:
    """The name and the template arguments of a mangled kernel; of no other names than these."""
    matched = re.match(r"_ZN6sassha4cuda(\d+)", symbol)
    if matched is None:
        raise ValueError(f"{symbol} is no kernel of sassha::cuda")
    end = matched.end() + int(matched[1])
    name, rest = symbol[matched.end() : end], symbol[end:]
    arguments: list[str] = []
    if rest.startswith("I"):
        rest = rest[1:]
        while not rest.startswith("E"):
            argument, rest = _argument(rest, arguments)
            arguments.append(argument)
    return (name, *arguments)


def _argument(text: str, before: Sequence[str]) -> tuple[str, str]:
    """The template argument that a text begins with, and what follows it."""
    if text[0] in (builtin := {"v": "void", "f": "float", "d": "double"}):
        return builtin[text[0]], text[1:]
    if matched := re.match(r"\d+", text):
        end = matched.end() + int(matched[0])
        return text[matched.end() : end], text[end:]
    if matched := re.match(r"S2_", text):
        # S_ to S1_ are the namespaces and the template, so this is the first argument once more.
        return before[0], text[matched.end() :]
    if matched := re.match(r"Lb([01])E", text):
        return ("false", "true")[int(matched[1])], text[matched.end() :]
    if matched := re.match(r"Li(\d+)E", text):
        return matched[1], text[matched.end() :]
    if matched := re.match(r"LN\w*?4KindE(\d)E", text):
        return KINDS[int(matched[1])], text[matched.end() :]
    if matched := re.match(r"NS0_(\d+)", text):
        # One of this namespace's own.
        end = matched.end() + int(matched[1])
        return text[matched.end() : end], text[end:].removeprefix("E")
    raise ValueError(f"{text}: a template argument that is unknown here")


def shown(kernel: Kernel) -> str:
    name, *arguments = kernel
    return f"{name}<{', '.join(arguments)}>" if arguments else name


def functions(lines: Iterable[str]) -> Iterator[tuple[str, MachineCode]]:
    """The symbols and the code in what cuobjdump -res-usage prints of one architecture, with -sass or without.

    With -sass each comes when its code is complete; without, nothing is known of it but its resources.
    """
    found: dict[str, MachineCode] = {}
    described = ""
    disassembled: str | None = None
    instructions: list[Instruction] = []
    for line in lines:
        if matched := INSTRUCTION.match(line):
            instructions.append((int(matched[1], 16), matched[2], matched[3]))
        elif matched := _NUMBERS.match(line):
            registers, stack, shared, local = map(int, matched.groups())
            found[described] = MachineCode(registers, stack, local, shared)
        elif matched := _RESOURCES.match(line):
            described = matched[1]
        elif matched := _FUNCTION.match(line):
            if disassembled is not None:
                found[disassembled].take(instructions)
                yield disassembled, found.pop(disassembled)
            disassembled, instructions = matched[1], []
    if disassembled is not None:
        found[disassembled].take(instructions)
    yield from found.items()


def parsed(lines: Iterable[str]) -> Iterator[tuple[Kernel, MachineCode]]:
    """The kernels in what cuobjdump -sass -res-usage prints of one architecture, each when its code is complete."""
    for symbol, code in functions(lines):
        yield demangled(symbol), code


def read(library: Path, architectures: Sequence[str] = ARCHITECTURES) -> dict[str, dict[Kernel, MachineCode]]:
    """The kernels of a library by architecture; none where it has no code for one.

    Raises:
        FileNotFoundError: the library is not there, or cuobjdump is not.
        subprocess.CalledProcessError: cuobjdump fails, such as on a file that is no library.
    """
    if not library.exists():
        raise FileNotFoundError(f"{library} is not there: it is built where nvcc is found (make build)")
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise FileNotFoundError(NO_TOOL)
    found: dict[str, dict[Kernel, MachineCode]] = {}
    with tqdm(total=len(architectures) * len(kernels()), unit=" kernels", mininterval=0.5) as progress:
        for architecture in architectures:
            progress.set_description(architecture)
            found[architecture] = {}
            command = [cuobjdump, "-sass", "-res-usage", "-arch", architecture, str(library)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None and process.stderr is not None
                for kernel, code in parsed(process.stdout):
                    found[architecture][kernel] = code
                    progress.update()
                errors = process.stderr.read()
            # Without code for this architecture it fails as well, and only says so.
            if process.returncode != 0 and found[architecture]:
                raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)
    return found


def table(found: dict[str, dict[Kernel, MachineCode]]) -> list[Sequence[str]]:
    """A row for each kernel and architecture; the first one is the header."""
    accesses = "/".join(map(str, WIDTHS))
    header = (
        "kernel",
        "arch",
        "regs",
        "stack",
        "LDL/STL",
        "shared",
        f"LDG {accesses}",
        f"STG {accesses}",
        "float64",
        "B",
        "floor",
    )
    rows: list[Sequence[str]] = [header]
    for kernel in sorted({kernel for codes in found.values() for kernel in codes}):
        for architecture, codes in found.items():
            if kernel not in codes:
                rows.append((shown(kernel), architecture, "absent", *[""] * (len(header) - 3)))
                continue
            code, streams = codes[kernel], traffic(kernel, quick_float64(architecture))
            cells: list[str] = [shown(kernel), architecture, str(code.registers), str(code.stack + code.local)]
            cells += [f"{code.spills['LDL']}/{code.spills['STL']}", str(code.shared)]
            cells += ["/".join(str(counts[bits]) for bits in WIDTHS) for counts in (code.loads, code.stores)]
            cells.append(
                "/".join(str(float64_operations(loop) + float64_conversions(loop)) for loop in code.loops) or "-"
            )
            if streams is None:
                cells += ["-", "-"]
            else:
                bits = 8 * VECTOR_BYTES
                moved = streams.moved_per_element(code.loads[bits], code.stores[bits])
                cells += [f"{moved:g}", str(streams.bytes_per_element)]
            rows.append(cells)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sass", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY, help="default: the one built in place")
    parser.add_argument("--arch", action="append", metavar="sm_90", help=f"default: {' '.join(ARCHITECTURES)}")
    arguments = parser.parse_args()
    # Here, so that reading machine code does not need torch.
    from bench.report import aligned

    try:
        found = read(arguments.library, arguments.arch or ARCHITECTURES)
    except FileNotFoundError as error:
        sys.exit(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error}\n{error.stderr}")
    if any(found.values()):
        print(*aligned(table(found)), sep="\n")
        print("\nfloat64: instructions of each loop over the elements, conversions included (bench/loops.py).")
        print("B: bytes per element in 16-byte accesses; floor: what the streams come to (bench/bytes.py).")
    if missing := [architecture for architecture, codes in found.items() if not codes]:
        sys.exit(f"{arguments.library} has no kernels for {' '.join(missing)}")


if __name__ == "__main__":
    main()
