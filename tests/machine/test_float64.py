"""No kernel of narrow parameters does anything in float64 for each element, which few chips are quick at.

Scalars of a parameter, of a block and of a step are worked out in float64. Told apart are they by the loops of the
machine code, and by what is executed more often where there are more elements.
"""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.bytes import QUICK_FLOAT64, kernels, quick_float64
from bench.loops import float64_conversions, float64_operations
from bench.sass import parsed, shown
from tests.support import backends
from tests.support.cases import Spec, each_narrow_dtype, make_case
from tests.support.machine_code import codes_of
from tests.support.ways import summed

pytestmark = [pytest.mark.slow, pytest.mark.long]

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
NAMES = sorted({kernel[0] for kernel in kernels() if len(kernel) > 1})


# ---------------------------------------------------------------------------------------------------------------------
# As it stands in the machine code


def float64_of(architecture: str) -> dict[tuple[str, ...], list[int]]:
    """The float64 instructions of each loop over the elements of a kernel, the fewest first."""
    return {
        kernel: sorted(float64_operations(loop) + float64_conversions(loop) for loop in code.loops)
        for kernel, code in codes_of(architecture).items()
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_loop_over_the_elements_has_a_float64_instruction(architecture: str, name: str) -> None:
    found = {
        kernel: loops
        for kernel, loops in float64_of(architecture).items()
        if kernel[0] == name and kernel[1] != "double"
    }
    assert all(found.values()), "a kernel without a loop over the elements"
    if name == "squares_kernel":
        # One loop in float64 that is quick; or one without, and a second one for what float32 has no room for.
        expected = [True] if quick_float64(architecture) else [False, True]
        assert {shown(kernel): [count > 0 for count in loops] for kernel, loops in found.items()} == {
            shown(kernel): expected for kernel in found
        }
    elif name == "update_and_squares_kernel":
        # The loop that takes the step, beside the one that restores, where that is quick.
        sums_in_float64 = quick_float64(architecture)
        assert {shown(kernel): any(loops) for kernel, loops in found.items()} == {
            shown(kernel): sums_in_float64 for kernel in found
        }
    else:
        assert {shown(kernel): loops for kernel, loops in found.items() if any(loops)} == {}


def test_where_float64_is_quick_the_sources_agree() -> None:
    numbers = {
        f"sm_{number[:-1]}" for number in re.findall(r"__CUDA_ARCH__ == (\d+)", (CSRC / "cuda/platform.h").read_text())
    }
    launch = pytest.importorskip("sassha_fused.triton_kernels.launch")
    assert numbers == {f"sm_{major}{minor}" for major, minor in launch._QUICK_FLOAT64} == set(QUICK_FLOAT64)


# What cuobjdump prints, in short: a loop over elements in another loop, and float64 in and behind each.
PRINTED = """
 Function _ZN6sassha4cuda14squares_kernelIfLi1EEEvNS0_16SquaresArgumentsIXT0_EEE:
  REG:66 STACK:0 SHARED:1088 LOCAL:0 CONSTANT[0]:33048 TEXTURE:0 SURFACE:0 SAMPLER:0
\t\tFunction : _ZN6sassha4cuda14squares_kernelIfLi1EEEvNS0_16SquaresArgumentsIXT0_EEE
        /*0000*/                   DADD R4, R4, R6 ;                 /* 0x0000000a00ff017b82 */
        /*0010*/                   DMUL R4, R4, R6 ;                 /* 0x0000000402047981 */
        /*0020*/              @!P0 LDG.E.EF.128 R4, desc[UR4][R2.64] ;  /* 0x0000000402047981 */
        /*0030*/                   F2F.F64.F32 R4, R5 ;              /* 0x0000000402047981 */
        /*0040*/             @!UP1 DFMA R4, R4, R4, R6 ;             /* 0x0000000402047981 */
        /*0050*/               @P0 MUFU.RCP64H R4, R5 ;              /* 0x0000000402047981 */
        /*0060*/                   MUFU.RCP R4, R5 ;                 /* 0x0000000402047981 */
        /*0070*/               @P0 BRA 0x20 ;                        /* 0x0000000402047981 */
        /*0080*/                   DSETP.MAX.AND P0, PT, R4, R6, PT ;  /* 0x0000000402047981 */
        /*0090*/              @!P0 BRA P2, 0x10 ;                    /* 0x0000000402047981 */
        /*00a0*/                   BRA 0xa0 ;                        /* 0x0000000402047981 */
"""


def test_float64_is_counted_in_the_innermost_loop_with_wide_accesses() -> None:
    ((_, code),) = parsed(PRINTED.splitlines())
    (loop,) = code.loops
    assert (float64_operations(loop), float64_conversions(loop)) == (2, 1)
    ((_, other),) = parsed(PRINTED.replace(".128", ".64").splitlines())
    assert other.loops == []


# ---------------------------------------------------------------------------------------------------------------------
# As it is executed

_ARITHMETIC = re.compile(
    r"\b(?:(?:add|sub|mul|fma|div|rcp|sqrt|rsqrt|neg|abs|min|max|setp)(?:\.\w+)*\.f64|cvt(?:\.\w+)*\.f64(?:\.\w+)?)\s"
)
# So many that each block has several chunks or tiles, and with twice as many there are no more blocks.
SIZE = 1 << 14
# On which Triton starts so few programs too.
MULTIPROCESSORS = 2


@pytest.fixture
def executed(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[collections.Counter[str]]:
    """How often threads have executed each float64 instruction, by its text."""
    ptxrun = pytest.importorskip("ptxrun")
    counts: collections.Counter[str] = collections.Counter()
    launch = ptxrun.Kernel.launch

    def counted(instruction: Any, original: Any, batch: Any, lanes: Any) -> None:
        counts[instruction.text] += len(batch.tids(lanes))
        original(batch, lanes)

    def launch_counted(kernel: Any, *arguments: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for each in kernel.m.code:
                if each.fn is not None and _ARITHMETIC.search(f"{each.text} "):
                    patch.setattr(each, "fn", functools.partial(counted, each, each.fn))
            return launch(kernel, *arguments, **options)

    monkeypatch.setattr(ptxrun.Kernel, "launch", launch_counted)
    if backend == "triton_ptx":
        monkeypatch.setattr(backends.executed(backend), "multiprocessors", MULTIPROCESSORS)
    yield counts


def executed_per_element(
    counts: collections.Counter[str], backend: str, operator: str, dtype: torch.dtype
) -> collections.Counter[str]:
    """What is executed more often for each more element."""
    from tests.support.floors import BY_BLOCKS, FLOORS

    found = []
    for size in (SIZE, 2 * SIZE):
        counts.clear()
        case = make_case(dtype, [Spec((size,))])
        if operator in FLOORS:
            FLOORS[operator][0](backend, case)
        else:
            BY_BLOCKS[operator.removesuffix(" by blocks")][0](backend, case, 8)
        found.append(counts.copy())
    return found[1] - found[0]


OPERATORS = (
    *("perturb", "adaptive perturb", "perturb along averages", "first sample", "last sample"),
    *("lazy update", "hessian update", "update of squared gradients", "plain update"),
    *("lazy update by blocks", "block average"),
)


@pytest.mark.parametrize("operator", ["norm", "adaptive norm", *OPERATORS])
@each_narrow_dtype
@backends.each_of(backends.EXECUTED)
def test_more_elements_execute_no_more_float64_instructions(
    executed: collections.Counter[str], backend: str, dtype: torch.dtype, operator: str
) -> None:
    # The only ones that are compiled otherwise where float64 is slow.
    with summed(backend, quick=False) if "norm" in operator else nullcontext():
        found = executed_per_element(executed, backend, operator, dtype)
    if backend == "triton_ptx" and "perturb" in operator:
        # In each tile, of 512 elements or twice as many, 128 threads work out rho over the norm, and round it; and ask
        # whether the norm is finite.
        assert found.total() <= 3 * SIZE // 4 and {text.split(".")[0] for text in found} == {"mul", "cvt", "setp"}
    else:
        assert found == {}


@backends.each_of(backends.EXECUTED)
def test_a_norm_in_float64_executes_two_for_each_element(executed: collections.Counter[str], backend: str) -> None:
    with summed(backend, quick=True):
        assert (
            executed_per_element(executed, backend, "norm", torch.float32).total()
            == (2 if backend == "cuda_ptx" else 3) * SIZE
        )
