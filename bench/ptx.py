"""What the Triton kernels are compiled to: registers, spills, and how wide memory is accessed. Needs no GPU.

    python -m bench.ptx [--folder build/triton] [sm_90 gfx942 ...]

What bench/sass.py counts in the machine code of the CUDA kernels is counted here in PTX, and for AMD in the assembly
text: instructions as they stand, not as they run. A kernel has each access twice, a 16-byte one for tiles that can be
taken in vectors and one per element for all others, so the 16-byte accesses must be exactly as many as the streams of
bench/bytes.py call for. Bytes per element are these accesses, without the loop that restores the weights of a skipped
step, over the elements that a thread has of a tile.

Registers and stack are those that cuobjdump prints of NVIDIA's machine code, which is disassembled only where there is
a stack: without one nothing can be spilled. For AMD they are the vector registers and the scratch memory that the
metadata of the assembly names. The shared memory is what Triton asks for.

Not seen: that ptxas might make other accesses than those of PTX, which tests/machine/test_triton_code.py looks at for
some kernels; and 8-byte accesses beside the 16-byte ones. Of AMD, scalar registers that are kept in lanes of vector
registers, for which no memory is moved, are not counted as spills, nor global_* instructions as accesses: they reach
tables, counts and sums, the streams are reached by buffer_*.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench.bytes import VECTOR_BYTES, Traffic, streams
from bench.sass import NO_TOOL, WIDTHS, MachineCode, find_cuobjdump, functions
from bench.triton_code import BYTES, KINDS, SECONDS, SUMS, TARGETS, Compiled, Variant, is_nvidia, second_of

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "triton"

UNIT = 128  # elements, as in triton_kernels/table.py
VECTOR = 8 * VECTOR_BYTES  # bits

_PTX_ACCESS = re.compile(r"\b(ld|st)((?:\.[\w:]+)+)\s")
_PTX_VECTOR = re.compile(r"v(\d+)")
_PTX_TYPE = re.compile(r"[busf](\d+)")
_ELSEWHERE = ("param", "shared", "const", "local")

_AMD_ACCESS = re.compile(r"\s*(buffer|global|flat|scratch)_(load|store)_(\w+)")
_AMD_WIDTHS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}
_AMD_NUMBER = re.compile(r"\s*\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)\s*$")

Accesses = tuple[collections.Counter[int], collections.Counter[int]]


def compile_all(
    folder: Path = FOLDER, targets: Sequence[str] = TARGETS, *, cache: Path | None = None
) -> list[Compiled]:
    """Every variant for these targets. What Triton compiled before it takes from the cache, by default the folder's.

    In a process of its own: where kernels are interpreted, as in the tests, they cannot be compiled.

    Raises:
        subprocess.CalledProcessError: a kernel could not be compiled; the reason is on stderr.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache or folder / "cache")
    subprocess.run(
        [sys.executable, "-m", "bench.triton_code", str(folder), *targets], cwd=ROOT, env=environment, check=True
    )
    return Compiled.read(folder)


def traffic(compiled: Compiled) -> Traffic | None:
    """What a kernel moves, and in how many vectors a thread; None for one without a part per element."""
    variant = compiled.variant
    constants = variant.constants
    if "UNITS" not in constants:
        return None
    size = BYTES[constants["DTYPE"]]
    vectors, rest = divmod(constants["UNITS"] * UNIT * size, compiled.threads * VECTOR_BYTES)
    if rest:
        raise ValueError(f"{shown(variant)}: {compiled.threads} threads cannot share a tile in vectors")
    product, second = constants.get("PRODUCT"), second_of(variant)
    reads, writes = streams(
        variant.kernel,
        size,
        lists=2 if constants.get("WEIGHTED") else 1,
        first=constants.get("FIRST", False),
        product=None if product is None else BYTES[product],
        along=BYTES[constants.get("ALONG", constants["DTYPE"])],
        second={"read": "read", "of products": "written", "of gradients": "written"}.get(second),
    )
    update = variant.kernel == "update_kernel"
    again = () if constants.get("QUICK_FLOAT64", True) else reads
    if SUMS[constants.get("SUMS", 0)] == "norm in float32":
        again = (BYTES[constants["STATE"]],)  # m
    return Traffic(
        size,
        reads,
        writes,
        vectors,
        # A skipped step copies the backup to the weights instead, or works these out from themselves and m.
        copies=vectors if update else 0,
        per_copy=2 if update and constants["STATE"] == constants["DTYPE"] else 1,
        again=again,
    )


def shown(variant: Variant) -> str:
    """A kernel and its constants, but for those that the others or the target decide."""
    words: list[str] = []
    for name, value in variant.constants.items():
        if name == "DTYPE":
            words.insert(0, value)
        elif name == "KIND":
            words.append(KINDS[value])
        elif name == "SECOND" and SECONDS[value] in ("of gradients", "by blocks"):
            words.append(SECONDS[value])
        elif name == "SUMS" and value:
            words.append(SUMS[value])
        elif name == "ALONG" and value != variant.constants["DTYPE"]:
            words.append(f"along {value}")
        elif name == "PRODUCT" and value is not None:
            words.append(f"products {value}")
        elif name == "QUICK_FLOAT64" and not value:
            words.append("summed in float32")
        elif name in ("ADAPTIVE", "FIRST", "WEIGHTED") and value:
            words.append(name.lower())
    return f"{variant.kernel}<{', '.join(words)}>" if words else variant.kernel


def ptx_accesses(lines: Iterable[str]) -> Accesses:
    """How often PTX loads from and stores to global memory, by width in bits."""
    loads: collections.Counter[int] = collections.Counter()
    stores: collections.Counter[int] = collections.Counter()
    for line in lines:
        for operation, suffixes in _PTX_ACCESS.findall(line.partition("//")[0]):
            parts = suffixes.split(".")
            # An address of no named space is counted as one of global memory.
            if any(part.partition("::")[0] in _ELSEWHERE for part in parts):
                continue
            (bits,) = [int(matched[1]) for part in parts if (matched := _PTX_TYPE.fullmatch(part))]
            vector = [int(matched[1]) for part in parts if (matched := _PTX_VECTOR.fullmatch(part))]
            (loads if operation == "ld" else stores)[bits * (vector[0] if vector else 1)] += 1
    return loads, stores


def amd_accesses(lines: Iterable[str], kind: str = "buffer") -> Accesses:
    """How often AMD's assembly loads and stores by instructions of a kind, by width in bits; buffer: the streams."""
    loads: collections.Counter[int] = collections.Counter()
    stores: collections.Counter[int] = collections.Counter()
    for line in lines:
        if (matched := _AMD_ACCESS.match(line)) and matched[1] == kind:
            # ushort and sbyte, short_d16 and short_d16_hi.
            named = matched[3].partition("_")[0]
            bits = _AMD_WIDTHS[named if named in _AMD_WIDTHS else named[1:]]
            (loads if matched[2] == "load" else stores)[bits] += 1
    return loads, stores


def amd_code(text: str) -> MachineCode:
    """What AMD's assembly says of a kernel: vector registers, scratch memory as stack, spills, and its accesses."""
    lines = text.splitlines()
    numbers = {matched[1]: int(matched[2]) for line in lines if (matched := _AMD_NUMBER.fullmatch(line))}
    code = MachineCode(registers=numbers["vgpr_count"], stack=numbers["private_segment_fixed_size"])
    loads, stores = amd_accesses(lines, "scratch")
    spills = {"LDL": loads.total(), "STL": stores.total(), "registers": numbers["vgpr_spill_count"]}
    code.spills.update({name: count for name, count in spills.items() if count})
    code.loads, code.stores = amd_accesses(lines)
    return code


def cubin_code(cubin: Path, disassemble: bool = False) -> MachineCode:
    """What cuobjdump says of a kernel: resources; spills where it has a stack; accesses where asked to disassemble.

    Raises:
        FileNotFoundError: there is no cuobjdump.
    """
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise FileNotFoundError(NO_TOOL)
    options = ["-res-usage", *(["-sass"] if disassemble else [])]
    printed = subprocess.run([cuobjdump, *options, str(cubin)], capture_output=True, text=True, check=True).stdout
    ((_, code),) = functions(printed.splitlines())
    if (code.stack or code.local) and not disassemble:
        return cubin_code(cubin, disassemble=True)
    return code


def accesses(compiled: Compiled, folder: Path) -> Accesses:
    """Of the streams, and for NVIDIA of all else in global memory, by width in bits."""
    if is_nvidia(compiled.target):
        return ptx_accesses((folder / compiled.files["ptx"]).read_text().splitlines())
    return amd_accesses((folder / compiled.files["amdgcn"]).read_text().splitlines())


def read(compiled: Compiled, folder: Path = FOLDER) -> MachineCode:
    """What a kernel is made of, its shared memory left to Compiled.

    Raises:
        FileNotFoundError: it is for NVIDIA, and there is no cuobjdump.
    """
    if not is_nvidia(compiled.target):
        return amd_code((folder / compiled.files["amdgcn"]).read_text())
    code = cubin_code(folder / compiled.files["cubin"])
    code.loads, code.stores = accesses(compiled, folder)
    return code


def table(kernels: Sequence[Compiled], folder: Path = FOLDER) -> Iterator[Sequence[str]]:
    """A row for each kernel and target; the first one is the header."""
    widths = "/".join(map(str, WIDTHS))
    first = ("kernel", "target", "tile", "regs", "of", "stack", "spills", "shared")
    yield (*first, f"loads {widths}", f"stores {widths}", "B", "floor")
    for compiled in sorted(kernels, key=lambda compiled: shown(compiled.variant)):
        code, expected = read(compiled, folder), traffic(compiled)
        variant = compiled.variant
        yield (
            shown(variant),
            compiled.target,
            str(variant.constants["UNITS"] * UNIT) if expected else "-",
            str(code.registers),
            str(variant.registers) if is_nvidia(compiled.target) else "-",
            str(code.stack + code.local),
            f"{code.spills['LDL']}/{code.spills['STL']}",
            str(compiled.shared),
            *("/".join(str(counts[bits]) for bits in WIDTHS) for counts in (code.loads, code.stores)),
            f"{expected.moved_per_element(code.loads[VECTOR], code.stores[VECTOR]):g}" if expected else "-",
            str(expected.bytes_per_element) if expected else "-",
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ptx", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the code goes; default: build/triton")
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="sm_90", help=f"default: {' '.join(TARGETS)}")
    arguments = parser.parse_args()
    # Here, so that reading code does not need torch.
    from bench.report import aligned

    folder = arguments.folder.resolve()
    try:
        rows = list(table(compile_all(folder, arguments.targets), folder))
    except FileNotFoundError as error:
        sys.exit(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error}\n{error.stderr or ''}".rstrip())
    print(*aligned(rows), sep="\n")
    print(
        "\ntile: elements; regs: registers of a thread, of those it is given; spills: loads/stores of local memory; "
        "B: bytes per element in 16-byte accesses; floor: what the streams come to (bench/bytes.py)."
    )


if __name__ == "__main__":
    main()
