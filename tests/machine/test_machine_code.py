"""Budgets of the CUDA kernels' machine code, which needs no GPU to be read: registers, spills, width of accesses."""

import collections
import re
from pathlib import Path

import pytest

from bench import passes
from bench.budgets import ADAMW_BYTES, HESSIAN_BYTES, LAZY_BYTES, SGD_BYTES
from bench.bytes import KINDS, SIZES, VECTOR_BYTES, Kernel, block_bytes, kernels, quick_float64, streams, traffic
from bench.sass import ARCHITECTURES, MachineCode, demangled, parsed, shown
from tests.support.machine_code import codes_of

pytestmark = pytest.mark.slow

CSRC = Path(__file__).resolve().parents[2] / "csrc"
VECTOR = 8 * VECTOR_BYTES  # bits

MOST_REGISTERS = 64  # of 65,536 on a multiprocessor: four blocks of 256 threads
MOST_OF_NARROW_SQUARES = 80  # three, each of whose threads has 96 bytes on their way in place of 64

# Of a kernel's arithmetic over its bytes, by count, for float32 parameters on every chip of docs/kernels.md.
MOST_ARITHMETIC = 0.6

# Loads narrower than 64 bits that are not of a stream, by kernel and bits: the learning rate and the guards, of any
# dtype; the count of evaluations, as much of it as the signs depend on; the factor that w is worked out with, in a step
# and in one that is skipped.
OTHER_LOADS = {
    ("inspect_kernel", 16): 8,
    ("inspect_kernel", 32): 6,
    ("rademacher_kernel", 32): 1,
    ("hutchinson_kernel", 32): 1,
    ("update_kernel", 32): 2,
    ("update_and_squares_kernel", 32): 3,  # and m, of which float32 had no room for the sum
}
# And such stores: seven scalars, in two places.
OTHER_STORES = {("inspect_kernel", 32): 14}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def codes(architecture: str) -> dict[Kernel, MachineCode]:
    """The kernels of one architecture."""
    return codes_of(architecture)


def test_every_kernel_is_there_for_every_dtype(codes: dict[Kernel, MachineCode]) -> None:
    assert {shown(kernel) for kernel in codes} == {shown(kernel) for kernel in kernels()}


def test_every_kernel_of_the_sources_is_known_here() -> None:
    sources = "".join(path.read_text() for path in sorted((CSRC / "cuda").glob("*.cu")))
    named = re.findall(r"__global__[^{;]*?\b(\w+)\(const __grid_constant__", sources)
    assert len(named) == sources.count("__global__")
    assert set(named) == {kernel[0] for kernel in kernels()}


def test_the_kinds_are_those_of_the_sources() -> None:
    (named,) = re.findall(r"enum class Kind \{([^}]*)\}", (CSRC / "math" / "sassha.h").read_text())
    assert tuple(named.replace(" ", "").split(",")) == KINDS


def test_no_kernel_has_a_stack_or_spills(codes: dict[Kernel, MachineCode]) -> None:
    assert {
        shown(kernel): (code.stack, code.local, code.spills)
        for kernel, code in codes.items()
        if code.stack or code.local or code.spills.total()
    } == {}


def test_enough_registers_are_left_for_four_blocks(codes: dict[Kernel, MachineCode]) -> None:
    registers = {kernel: code.registers for kernel, code in codes.items()}
    most = {kernel: MOST_OF_NARROW_SQUARES if is_narrow_with_squares(kernel) else MOST_REGISTERS for kernel in codes}
    assert {shown(kernel): count for kernel, count in registers.items() if count > most[kernel]} == {}


def is_narrow_with_squares(kernel: Kernel) -> bool:
    return kernel[0] == "update_and_squares_kernel" and SIZES[kernel[1]] == 2


def test_every_stream_is_read_and_written_16_bytes_at_a_time(
    codes: dict[Kernel, MachineCode], architecture: str
) -> None:
    expected, found = {}, {}
    for kernel, code in codes.items():
        streams = traffic(kernel, quick_float64(architecture))
        expected[shown(kernel)] = (streams.vector_loads, streams.vector_stores) if streams else (0, 0)
        found[shown(kernel)] = (code.loads[VECTOR], code.stores[VECTOR])
        # Wider ones, should a compiler make some, would need another count.
        assert max(code.loads | code.stores) <= VECTOR, shown(kernel)
    assert found == expected


def test_no_byte_is_moved_twice(codes: dict[Kernel, MachineCode], architecture: str) -> None:
    expected, found = {}, {}
    for kernel, code in codes.items():
        if streams := traffic(kernel, quick_float64(architecture)):
            expected[shown(kernel)] = streams.bytes_per_element
            found[shown(kernel)] = streams.moved_per_element(code.loads[VECTOR], code.stores[VECTOR])
    assert found == expected


def test_tails_are_read_and_written_one_element_at_a_time(codes: dict[Kernel, MachineCode], architecture: str) -> None:
    # As often as the vectors have elements: a narrow access beside the wide ones would be one too many. Not looked at
    # in 64 bits, where there are many others: sums, counts, scalars.
    for kernel, code in codes.items():
        streams = traffic(kernel, quick_float64(architecture))
        if streams is None:
            continue
        of_kinds = (
            (streams.reads, code.loads, OTHER_LOADS, streams.copies * streams.per_copy),
            (streams.writes, code.stores, OTHER_STORES, streams.copies),
        )
        for sizes, counts, others, copies in of_kinds:
            expected: collections.Counter[int] = collections.Counter()
            for size in (*sizes, *streams.narrow, *(streams.again if counts is code.loads else ())):
                expected[8 * size] += streams.elements
            expected[8 * streams.size] += copies * VECTOR_BYTES // streams.size
            for bits in (32, 16, 8):
                most = expected[bits] + others.get((kernel[0], bits), 0)
                assert expected[bits] <= counts[bits] <= most, (shown(kernel), bits)


def test_the_bytes_are_those_of_the_design() -> None:
    def moved(*kernel: str) -> int:
        found = traffic(kernel)
        assert found is not None
        return found.bytes_per_element

    norm, perturb = moved("squares_kernel", "float", "1"), moved("perturb_kernel", "float", "float", "false")
    assert norm + perturb + moved("update_kernel", "float", "void", "kSquareRoot") == LAZY_BYTES
    assert norm + perturb + moved("update_kernel", "float", "float", "kSquareRoot") == HESSIAN_BYTES
    assert moved("rademacher_kernel", "float") == 4
    assert moved("hutchinson_kernel", "float") == 12
    assert moved("update_kernel", "float", "OfGradients", "kSquareRoot") == ADAMW_BYTES
    assert moved("update_kernel", "float", "void", "kPlain") == SGD_BYTES
    assert sum(map(sum, streams("perturb_kernel", 4, backup=False))) == 12
    # By blocks, beside so many bytes of each element.
    assert (sum(map(sum, streams("update_kernel", 4, second=None))), block_bytes("update_kernel", 4)) == (20, 4)
    assert (moved("block_average_kernel", "float"), block_bytes("block_average_kernel", 4)) == (4, 8)


# What cuobjdump prints, in short.
PRINTED = """
 Function _ZN6sassha4cuda13update_kernelI6__halfS2_LNS_4KindE2EEEvNS0_15UpdateArgumentsIT0_EE:
  REG:66 STACK:16 SHARED:1088 LOCAL:8 CONSTANT[0]:33048 TEXTURE:0 SURFACE:0 SAMPLER:0
\t\tFunction : _ZN6sassha4cuda13update_kernelI6__halfS2_LNS_4KindE2EEEvNS0_15UpdateArgumentsIT0_EE
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x00000a00ff017b82 */
                                                                     /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.EF.128 R4, desc[UR4][R2.64] ;  /* 0x0000000402047981 */
        /*0020*/                   LDG.E.64.CONSTANT R4, [R2.64] ;   /* 0x0000000402047981 */
        /*0030*/             @!UP1 LDG.E.U16 R4, [R2.64] ;           /* 0x0000000402047981 */
        /*0040*/               @P0 STG.E R4, [R2.64] ;               /* 0x0000000402047981 */
        /*0050*/                   STG.E.S8 R4, [R2.64] ;            /* 0x0000000402047981 */
        /*0060*/                   STL.64 [R1], R4 ;                 /* 0x0000000402047981 */
        /*0070*/                   LDL R4, [R1] ;                    /* 0x0000000402047981 */
"""


def test_what_cuobjdump_prints_is_understood() -> None:
    ((kernel, code),) = parsed(PRINTED.splitlines())
    assert shown(kernel) == "update_kernel<__half, __half, kGeneral>"
    assert (code.registers, code.stack, code.local, code.shared) == (66, 16, 8, 1088)
    assert (code.spills["LDL"], code.spills["STL"]) == (1, 1)
    assert code.loads == {128: 1, 64: 1, 16: 1}
    assert code.stores == {32: 1, 8: 1}


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN6sassha4cuda11norm_kernelENS0_13NormArgumentsE", "norm_kernel"),
        ("_ZN6sassha4cuda14squares_kernelIdLi2EEEvNS0_16SquaresArgumentsIXT0_EEE", "squares_kernel<double, 2>"),
        ("_ZN6sassha4cuda14perturb_kernelIffLb1EEEvNS0_16PerturbArgumentsE", "perturb_kernel<float, float, true>"),
        (
            "_ZN6sassha4cuda13update_kernelI13__nv_bfloat16vLNS_4KindE3EEEvNS0_15UpdateArgumentsIT0_EE",
            "update_kernel<__nv_bfloat16, void, kClipped>",
        ),
        (
            "_ZN6sassha4cuda13update_kernelIfNS0_11OfGradientsELNS_4KindE0EEEvNS0_15UpdateArgumentsIT_T0_EE",
            "update_kernel<float, OfGradients, kSquareRoot>",
        ),
    ],
)
def test_mangled_names_are_read(symbol: str, name: str) -> None:
    assert shown(demangled(symbol)) == name


def test_every_dtype_has_a_size() -> None:
    assert {kernel[1] for kernel in kernels() if len(kernel) > 1} == set(SIZES)


DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"


def test_the_predictions_in_the_docs_are_those_that_the_bench_prints() -> None:
    assert "\n".join(passes.table("float")) in DOCS.read_text()


def test_the_arithmetic_in_the_docs_is_that_of_the_machine_code() -> None:
    of_chips = {architecture: codes_of(architecture) for architecture in map(passes.architecture_of, passes.CHIPS)}
    assert "\n".join(passes.arithmetic("float", of_chips)) in DOCS.read_text()


@pytest.mark.parametrize("of_step", ["grad_norm", "perturb_", "check", "update_, lazy", "with the norm"])
@pytest.mark.parametrize("chip", passes.CHIPS)
def test_arithmetic_leaves_time_to_spare_beside_memory(chip: str, of_step: str) -> None:
    kernel = passes.lazy_step("float")[of_step]
    codes = codes_of(passes.architecture_of(chip))
    assert sum(passes.over_memory(passes.CHIPS[chip], codes[kernel])) <= MOST_ARITHMETIC


def test_arithmetic_is_counted_by_the_rates_of_a_chip() -> None:
    chip = passes.Chip(1, 1.0, 16.0, float32=4, float64=2, conversions=1, functions=0.5)
    slow = collections.Counter({"LDG.E.128": 1, "DFMA": 4, "F2F.F64.F32": 4})
    quick = collections.Counter({"LDG.E.128": 1, "FADD": 6, "FFMA": 2, "MUFU.RCP": 1, "IADD3": 9})
    assert passes.over_memory(chip, MachineCode(loops=[slow])) == (0, 4 / 2 + 4 / 1)
    assert passes.over_memory(chip, MachineCode(loops=[slow, quick])) == (8 / 4 + 1 / 0.5, 0)
