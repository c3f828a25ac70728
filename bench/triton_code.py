"""Compiles every Triton kernel of the package, in every variant, without a GPU.

    python -m bench.triton_code FOLDER [sm_90 gfx942 ...]

The folder gets, for each target and variant, a file per kind of code (ptx and cubin, or amdgcn and hsaco) and
index.json, a list of what Compiled holds. Triton keeps what it has compiled: a second run only writes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.bytes import quick_float64

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# The one that gets every variant; the others float32 and bfloat16 alone, and not the power 1, whose kernels are those
# of the square root less the root.
# What a direction adds to a step shows in float32: of bfloat16 they get one step for each use of D. And what the norm
# of m adds to a step shows at the square root.
WHOLE_TARGET = "sm_90"
FEW_DTYPES = ("fp32", "bf16")
INDEX = "index.json"

# By Triton's names; with the dtypes that the state of parameters has, and that of products.
STATES = {"fp64": "fp64", "fp32": "fp32", "bf16": "fp32", "fp16": "fp32"}
BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
# What the constants KIND (triton_kernels/arithmetic.py), SECOND (triton_kernels/step.py) and SUMS
# (triton_kernels/running_squares.py) of update_kernel mean.
KINDS = {0: "square root", 1: "identity", 2: "general", 3: "clipped", 4: "plain"}
SECONDS = {0: "read", 1: "of products", 2: "of gradients", 3: "by blocks"}
SUMS = {0: "no norm", 1: "norm in float64", 2: "norm in float32"}

_CODES = ("ptx", "cubin", "amdgcn", "hsaco")


@dataclass(frozen=True)
class Variant:
    """A kernel with its compile-time constants, dtypes by Triton's names, and the registers a thread is given."""

    kernel: str
    constants: dict[str, Any]
    registers: int

    @property
    def name(self) -> str:
        """Of the kernel and its constants, fit for a file."""
        return "-".join((self.kernel, *(f"{key}={value}" for key, value in self.constants.items()))).lower()


@dataclass(frozen=True)
class Compiled:
    """What a variant was compiled to.

    Attributes:
        target: the architecture.
        threads: of a program.
        shared: bytes of shared memory.
        symbol: the name of the kernel in the code.
        files: by kind of code, relative to the folder of the index.
    """

    variant: Variant
    target: str
    threads: int
    shared: int
    symbol: str
    files: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> list[Compiled]:
        """What the index of a folder lists."""
        entries = json.loads((folder / INDEX).read_text())
        return [cls(**{**entry, "variant": Variant(**entry["variant"])}) for entry in entries]


def is_nvidia(target: str) -> bool:
    return target.startswith("sm_")


def variants(target: str) -> Iterator[Variant]:
    """What is compiled for a target of the kernels that the operators launch, with the tiles that they get there."""
    steps_found = set()
    for variant in _every_variant(target):
        constants = variant.constants
        if target != WHOLE_TARGET:
            if constants.get("DTYPE", "fp32") not in FEW_DTYPES or constants.get("KIND") == 1:
                continue
            if constants.get("SUMS", 0) and KINDS[constants["KIND"]] == "general":
                continue
            if variant.kernel == "update_kernel" and constants["DTYPE"] != "fp32":
                step = constants["DTYPE"], constants["SECOND"]
                if step in steps_found:
                    continue
                steps_found.add(step)
        yield variant


def _every_variant(target: str) -> Iterator[Variant]:
    import torch

    from sassha_fused.triton_kernels.launch import registers_for, tile_units
    from sassha_fused.triton_kernels.norm import streams_of_tile

    warp_size = 32 if is_nvidia(target) else 64
    dtypes = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    yield Variant("norm_kernel", {}, 64)
    for dtype, state in STATES.items():

        def units(streams: int) -> int:
            return tile_units(dtypes[dtype], streams, warp_size)

        # Of AMD's none is slow at float64. One that is quick also runs, in tests, what slow ones do.
        ways = (dtype == "fp64" or not is_nvidia(target) or quick_float64(target),)
        if dtype != "fp64" and target == WHOLE_TARGET:
            ways = (True, False)
        for weighted, quick in itertools.product((False, True), ways):
            tile = units(streams_of_tile(dtypes[dtype], 1 + weighted, quick))
            constants = {"WEIGHTED": weighted, "QUICK_FLOAT64": quick, "DTYPE": dtype, "UNITS": tile}
            yield Variant("squares_kernel", constants, registers_for(dtypes[dtype]))
        for adaptive, along in dict.fromkeys(((False, dtype), (True, dtype), (False, state))):
            constants = {"ADAPTIVE": adaptive, "ALONG": along, "DTYPE": dtype, "STATE": state, "UNITS": units(3)}
            yield Variant("perturb_kernel", constants, registers_for(dtypes[dtype]))
        yield Variant("rademacher_kernel", {"DTYPE": dtype, "UNITS": units(1)}, registers_for(dtypes[dtype]))
        for first in (True, False):
            constants = {"FIRST": first, "DTYPE": dtype, "STATE": state, "UNITS": units(2)}
            yield Variant("hutchinson_kernel", constants, registers_for(dtypes[dtype], state=True))
        constants = {"DTYPE": dtype, "STATE": state, "UNITS": units(3)}
        yield Variant("block_average_kernel", constants, registers_for(dtypes[dtype], state=True))
        products = tuple(dict.fromkeys((dtype, state)))
        for product in (None, *products):
            constants = {"PRODUCT": product, "DTYPE": dtype, "STATE": state, "UNITS": units(1)}
            yield Variant("inspect_kernel", constants, registers_for(dtypes[dtype]))
        for kind, second, product in steps(products):
            general = KINDS[kind] == "general"
            for sums in ways_of_norm(kind, product, ways):
                registers = registers_for(dtypes[dtype], state=True, general_power=general, squares=sums > 0)
                constants = {"KIND": kind, "SECOND": second, "SUMS": sums, "PRODUCT": product}
                constants |= {"DTYPE": dtype, "STATE": state, "UNITS": units(5)}
                yield Variant("update_kernel", constants, registers)


def second_of(variant: Variant) -> str:
    """What a kernel does with D, by the names of SECONDS; "none" where it has nothing to do with it."""
    constants = variant.constants
    if "SECOND" not in constants or KINDS[constants["KIND"]] == "plain":
        return "none"
    return SECONDS[constants["SECOND"]]


def steps(products: Sequence[str]) -> Iterator[tuple[int, int, str | None]]:
    """KIND, SECOND and PRODUCT of every step that a member of the family takes, with products of these dtypes."""
    for kind, name in KINDS.items():
        yield kind, 0, None
        if name == "square root":  # SAMAdamW
            yield kind, 2, None
        if name not in ("plain", "clipped"):  # SophiaH has no blocks
            yield kind, 3, None
        if name != "plain":
            yield from ((kind, 1, product) for product in products)


def ways_of_norm(kind: int, product: str | None, quick: Sequence[bool]) -> list[int]:
    """SUMS of such a step: none, and of those that come before a perturbation along m what a chip may be quick at."""
    if product is not None or KINDS[kind] == "clipped":
        return [0]
    return [0, *(1 if in_float64 else 2 for in_float64 in quick)]


def compile_variant(variant: Variant, target: str, folder: Path) -> Compiled:
    """Compiles a variant for a target and writes its code to a folder."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sassha_fused.triton_kernels import (
        block_average,
        hutchinson,
        inspection,
        norm,
        perturb,
        rademacher,
        step,
    )
    from sassha_fused.triton_kernels.launch import options_for

    modules = (norm, perturb, rademacher, hutchinson, block_average, inspection, step)
    kernel = next(getattr(module, variant.kernel) for module in modules if hasattr(module, variant.kernel))
    nvidia = is_nvidia(target)
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    constants = {
        name: tl.str_to_ty(value, None) if value in STATES else value for name, value in variant.constants.items()
    }
    signature = {p.name: "constexpr" if p.is_constexpr else p.annotation_type for p in kernel.params}
    source = ASTSource(
        kernel, signature, constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()}
    )
    made = triton.compile(source, target=gpu, options=options_for(variant.registers, nvidia))
    files = {}
    for kind in _CODES:
        if kind in made.asm:
            files[kind] = f"{target}-{variant.name}.{kind}"
            code = made.asm[kind]
            (folder / files[kind]).write_bytes(code.encode() if isinstance(code, str) else code)
    return Compiled(
        variant, target, made.metadata.num_warps * gpu.warp_size, made.metadata.shared, made.metadata.name, files
    )


def _compile_one(arguments: tuple[Variant, str, Path]) -> Compiled:
    return compile_variant(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.triton_code", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="sm_90", help=f"default: {' '.join(TARGETS)}")
    arguments = parser.parse_args()
    from sassha_fused.triton_kernels import INTERPRETED

    if INTERPRETED:
        sys.exit("TRITON_INTERPRET is set in the environment: interpreted kernels cannot be compiled")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    jobs = [(variant, target, arguments.folder) for target in arguments.targets for variant in variants(target)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        done = list(tqdm(pool.map(_compile_one, jobs), total=len(jobs), unit=" kernels", mininterval=0.5))
    (arguments.folder / INDEX).write_text(json.dumps([asdict(compiled) for compiled in done], indent=1))


if __name__ == "__main__":
    main()
