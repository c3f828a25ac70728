"""What the Triton kernels compile to, for every target, dtype and constant, which needs no GPU: accesses, registers,
spills, and arithmetic that rounds each operation once."""

import collections
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from bench.budgets import ADAMW_BYTES, HESSIAN_BYTES, LAZY_BYTES, PERTURB_BYTES, SGD_BYTES, UPDATE_BYTES
from bench.bytes import VECTOR_BYTES, state_size
from bench.ptx import (
    FOLDER,
    ROOT,
    VECTOR,
    Accesses,
    accesses,
    amd_accesses,
    amd_code,
    compile_all,
    cubin_code,
    ptx_accesses,
    read,
    shown,
    traffic,
)
from bench.sass import NO_TOOL, MachineCode, find_cuobjdump, functions
from bench.triton_code import (
    BYTES,
    FEW_DTYPES,
    KINDS,
    SECONDS,
    STATES,
    TARGETS,
    WHOLE_TARGET,
    Compiled,
    is_nvidia,
    second_of,
)
from tests.support.rounding import amd_unrounded, has_general_power, unrounded
from tests.support.turns import turn

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from sassha_fused.triton_kernels.counts import SCALARS

pytestmark = pytest.mark.slow

# Has few variants, which are quick to compile.
QUICK_TARGET = "sm_80"
OTHER_TARGETS = [pytest.param(target, marks=pytest.mark.long) for target in TARGETS if target != QUICK_TARGET]

# What a thread may be given; more where a vector has eight elements, for a logarithm, and for sums of squares. With two
# of these a multiprocessor still runs four programs of 128 threads, with all three it runs three.
MOST_REGISTERS = 64
MORE_REGISTERS = 32
# A compute unit of gfx942 has 131,072 vector registers, twice of what launch.py shares out.
AMD_SHARE = 2

# Accesses narrower than 64 bits that are not of a stream: the guards, of any dtype.
GUARD_LOADS = {32: 1, 16: 2}

# 16-byte loads and stores of AMD's that are not of a stream: neighbours in the table, in the counts, in the settings
# and in what a parameter's elements share.
PAIRS = {"inspect_kernel": (3, 3), "update_kernel": (4, 1)}


def compiled_for(*targets: str) -> list[Compiled]:
    with turn(FOLDER):
        return compile_all(targets=targets)


@pytest.fixture(scope="module")
def everything() -> list[Compiled]:
    """Every variant for every target: tests that ask for it are long."""
    return compiled_for(*TARGETS)


@pytest.fixture(scope="module", params=[QUICK_TARGET, *OTHER_TARGETS])
def kernels(request: pytest.FixtureRequest) -> list[Compiled]:
    """Every variant, compiled for one target."""
    if request.param == QUICK_TARGET:
        return compiled_for(QUICK_TARGET)
    return [compiled for compiled in request.getfixturevalue("everything") if compiled.target == request.param]


@pytest.fixture(scope="module")
def codes(kernels: list[Compiled]) -> dict[str, tuple[Compiled, MachineCode]]:
    """With their registers and spills."""
    if is_nvidia(kernels[0].target) and find_cuobjdump() is None:
        pytest.skip(NO_TOOL)
    return {shown(compiled.variant): (compiled, read(compiled)) for compiled in kernels}


def text_of(compiled: Compiled) -> str:
    """PTX, or AMD's assembly."""
    return (FOLDER / compiled.files["ptx" if is_nvidia(compiled.target) else "amdgcn"]).read_text()


def the_update(kernels: list[Compiled], target: str) -> Compiled:
    """update_kernel for a target, of a lazy step with what most people use."""
    (compiled,) = [c for c in kernels if c.target == target and shown(c.variant) == "update_kernel<fp32, square root>"]
    return compiled


def shared_by_elements(compiled: Compiled, name: str) -> int:
    """How many numbers that a parameter's elements share are loaded or stored."""
    kernel, constants = compiled.variant.kernel, compiled.variant.constants
    if (kernel, name) == ("inspect_kernel", "stores"):
        return SCALARS
    if (kernel, name) != ("update_kernel", "loads"):
        return 0
    # In each way through a tile; the perturbation in a skipped step too. A clipped quotient has no factor, narrow
    # parameters no perturbation to undo.
    unused = 2 * (KINDS[constants["KIND"]] == "clipped") + (constants["DTYPE"] != constants["STATE"])
    return 2 * (SCALARS - unused) + 1


def of_blocks(compiled: Compiled, name: str) -> int:
    """How many numbers of blocks a thread loads or stores for a tile, one for each of its elements: in each way through
    the tile, and in a step those that it takes over from averaged.
    """
    step, average = second_of(compiled.variant) == "by blocks", compiled.variant.kernel == "block_average_kernel"
    # On AMD those that are not side by side are no accesses of streams (bench/ptx.py).
    ways = 2 * (average or (step and name == "loads")) if is_nvidia(compiled.target) else 0
    streams = traffic(compiled)
    return (ways + step) * streams.elements if streams else 0


def others_of(compiled: Compiled, name: str) -> dict[int, int]:
    """The narrow loads or stores that are not of a stream, by width in bits, as PTX has them."""
    guards = collections.Counter(GUARD_LOADS if (compiled.variant.kernel, name) == ("inspect_kernel", "loads") else {})
    state = compiled.variant.constants.get("STATE")
    return guards + collections.Counter({32: shared_by_elements(compiled, name) * (state == "fp32")})


def found_and_expected(compiled: Compiled, found: Accesses) -> dict[str, tuple[object, object]]:
    """Where the accesses are not those of the streams: what was found and what was expected, by what is counted."""
    streams = traffic(compiled)
    vectors = (streams.vector_loads, streams.vector_stores) if streams else (0, 0)
    wrong: dict[str, tuple[object, object]] = {}
    if (found[0][VECTOR], found[1][VECTOR]) != vectors:
        wrong["vectors"] = ((found[0][VECTOR], found[1][VECTOR]), vectors)
    if widest := [bits for counts in found for bits in counts if bits > VECTOR]:
        wrong["wider"] = (widest, [])
    if streams is None:
        return wrong
    # One by one, each stream as often as the tile has elements for a thread; 64 bits at a time there are many others.
    for name, sizes, counts in (("loads", streams.reads, found[0]), ("stores", streams.writes, found[1])):
        expected: collections.Counter[int] = collections.Counter()
        for size in (*sizes, *(streams.again if name == "loads" else ())):
            expected[8 * size] += streams.elements
        copied = streams.per_copy if name == "loads" else 1
        expected[8 * streams.size] += streams.copies * copied * VECTOR_BYTES // streams.size
        expected[8 * state_size(streams.size)] += of_blocks(compiled, name)
        if is_nvidia(compiled.target):
            if counts[64] < expected[64]:
                wrong[f"{name} of 64"] = (counts[64], expected[64])
            expected.update(others_of(compiled, name))
        elif counts[64] != expected[64]:
            wrong[f"{name} of 64"] = (counts[64], expected[64])
        wrong |= {
            f"{name} of {bits}": (counts[bits], expected[bits])
            for bits in (32, 16, 8)
            if counts[bits] != expected[bits]
        }
    return wrong


def spilled(code: MachineCode) -> tuple[int, int, Mapping[str, int]] | None:
    """Stack, local memory and accesses to it, if there are any."""
    return (code.stack, code.local, code.spills) if code.stack or code.local or code.spills.total() else None


def test_every_kernel_of_the_sources_is_compiled(kernels: list[Compiled]) -> None:
    sources = "".join(path.read_text() for path in sorted((ROOT / "triton_kernels").glob("*.py")))
    assert {compiled.variant.kernel for compiled in kernels} == set(re.findall(r"\ndef (\w+_kernel)\(", sources))


def test_every_kernel_is_compiled_for_every_dtype(kernels: list[Compiled]) -> None:
    with_dtype = [compiled.variant for compiled in kernels if "DTYPE" in compiled.variant.constants]
    found = {(variant.kernel, variant.constants["DTYPE"]) for variant in with_dtype}
    dtypes = STATES if kernels[0].target == WHOLE_TARGET else FEW_DTYPES
    assert found == {(variant.kernel, dtype) for variant in with_dtype for dtype in dtypes}
    steps = {(v.constants["DTYPE"], v.constants["SECOND"]) for v in with_dtype if v.kernel == "update_kernel"}
    assert steps == {(dtype, second) for dtype in dtypes for second in SECONDS}
    assert len({shown(compiled.variant) for compiled in kernels}) == len(kernels)


def test_every_stream_is_read_and_written_once_16_bytes_at_a_time_or_one_by_one(kernels: list[Compiled]) -> None:
    wrong = {shown(compiled.variant): found_and_expected(compiled, accesses(compiled, FOLDER)) for compiled in kernels}
    assert {name: differences for name, differences in wrong.items() if differences} == {}


def test_the_bytes_in_vectors_are_the_floor(kernels: list[Compiled]) -> None:
    floor, found = {}, {}
    for compiled in kernels:
        if streams := traffic(compiled):
            loads, stores = accesses(compiled, FOLDER)
            floor[shown(compiled.variant)] = streams.bytes_per_element
            found[shown(compiled.variant)] = streams.moved_per_element(loads[VECTOR], stores[VECTOR])
    assert found == floor
    norms = [
        found[name] for name in ("squares_kernel<fp32>", "squares_kernel<fp32, summed in float32>") if name in found
    ]
    norm, perturb = norms[0], found["perturb_kernel<fp32>"]
    assert norm + perturb + found["update_kernel<fp32, square root>"] == LAZY_BYTES
    assert norm + perturb + found["update_kernel<fp32, square root, products fp32>"] == HESSIAN_BYTES
    lazy = {
        words: found[f"update_kernel<fp32, {words}>"] for words in ("clipped", "square root, of gradients", "plain")
    }
    assert lazy == {"clipped": UPDATE_BYTES, "square root, of gradients": ADAMW_BYTES, "plain": SGD_BYTES}
    # And what blocks have, which is not in vectors.
    assert found["update_kernel<fp32, square root, by blocks>"] == UPDATE_BYTES - 4
    assert found["block_average_kernel<fp32>"] == 4
    # Of narrow parameters, whose exp_avg is float32, two bytes more.
    assert (perturb, found["perturb_kernel<bf16>"], found["perturb_kernel<bf16, along fp32>"]) == (PERTURB_BYTES, 8, 10)
    assert found["rademacher_kernel<fp32>"] == 4
    assert (found["hutchinson_kernel<fp32, first>"], found["hutchinson_kernel<fp32>"]) == (8, 12)


@pytest.mark.long
def test_what_else_amd_reads_and_writes_16_bytes_at_a_time_are_pairs_of_the_table_and_the_counts(
    everything: list[Compiled],
) -> None:
    wrong = {}
    for compiled in everything:
        if not is_nvidia(compiled.target):
            lines = text_of(compiled).splitlines()
            loads, stores = amd_accesses(lines, "global")
            flat = amd_accesses(lines, "flat")
            most = PAIRS.get(compiled.variant.kernel, (0, 0))
            if loads[VECTOR] > most[0] or stores[VECTOR] > most[1] or any(counts.total() for counts in flat):
                wrong[shown(compiled.variant)] = (loads, stores, flat)
    assert wrong == {}


@pytest.mark.long
def test_ptxas_leaves_the_vectors_as_they_are(everything: list[Compiled]) -> None:
    if find_cuobjdump() is None:
        pytest.skip(NO_TOOL)
    # Disassembling takes as long as compiling, so not all of them.
    expected, found = {}, {}
    for compiled in everything:
        if compiled.target == "sm_90" and compiled.variant.constants.get("DTYPE") == "fp32":
            code = cubin_code(FOLDER / compiled.files["cubin"], disassemble=True)
            loads, stores = accesses(compiled, FOLDER)
            expected[shown(compiled.variant)] = (loads[VECTOR], stores[VECTOR])
            found[shown(compiled.variant)] = (code.loads[VECTOR], code.stores[VECTOR])
    assert found == expected
    assert found


def test_no_kernel_has_a_stack_or_spills(codes: dict[str, tuple[Compiled, MachineCode]]) -> None:
    assert {name: spilled(code) for name, (_, code) in codes.items() if spilled(code)} == {}


def test_no_kernel_has_more_registers_than_it_is_given(codes: dict[str, tuple[Compiled, MachineCode]]) -> None:
    # On AMD nothing limits them, but launch.py starts as many programs as fit if there are no more.
    assert {
        name: (code.registers, compiled.variant.registers)
        for name, (compiled, code) in codes.items()
        if code.registers > compiled.variant.registers * (1 if is_nvidia(compiled.target) else AMD_SHARE)
    } == {}


@pytest.mark.long
def test_ptx_limits_the_registers_to_those_that_a_kernel_is_given(everything: list[Compiled]) -> None:
    nvidia = [compiled for compiled in everything if is_nvidia(compiled.target)]
    found = {c.files["ptx"]: re.findall(r"^\.maxnreg (\d+)$", text_of(c), re.MULTILINE) for c in nvidia}
    assert found == {c.files["ptx"]: [str(c.variant.registers)] for c in nvidia}


def test_kernels_are_given_few_registers(kernels: list[Compiled]) -> None:
    def most(compiled: Compiled) -> int:
        narrow = BYTES[compiled.variant.constants.get("DTYPE", "fp64")] == 2
        squares = compiled.variant.constants.get("SUMS", 0) > 0
        return MOST_REGISTERS + MORE_REGISTERS * (narrow + has_general_power(compiled) + squares)

    given = {shown(compiled.variant): (compiled.variant.registers, most(compiled)) for compiled in kernels}
    assert {name: (registers, limit) for name, (registers, limit) in given.items() if registers > limit} == {}


def test_every_operation_rounds_once(kernels: list[Compiled]) -> None:
    check = unrounded if is_nvidia(kernels[0].target) else amd_unrounded
    wrong = {shown(c.variant): check(text_of(c), c) for c in kernels}
    assert {name: counts for name, counts in wrong.items() if counts} == {}


def test_divisions_and_square_roots_are_there(kernels: list[Compiled]) -> None:
    # One of each for an element, in vectors and one by one: so the tests above look at what they mean to.
    division, root = (
        ("div.rn.f32", "sqrt.rn.f32") if is_nvidia(kernels[0].target) else ("v_div_fixup_f32", "v_sqrt_f32")
    )
    compiled = the_update(kernels, kernels[0].target)
    words = collections.Counter(word for line in text_of(compiled).splitlines() for word in line.split()[:1])
    assert (words[division], words[root] + words[f"{root}_e32"]) == (8, 8)


@pytest.mark.long
def test_amd_keeps_subnormal_numbers_and_rounds_to_nearest(everything: list[Compiled]) -> None:
    modes = ("float_denorm_mode_32 3", "float_denorm_mode_16_64 3", "float_round_mode_32 0", "float_round_mode_16_64 0")
    for compiled in everything:
        if not is_nvidia(compiled.target):
            text = text_of(compiled)
            assert [mode for mode in modes if f".amdhsa_{mode}\n" not in text] == [], shown(compiled.variant)


@pytest.mark.long
def test_amd_gets_a_binary_with_the_kernel_in_it(everything: list[Compiled]) -> None:
    binaries = [compiled for compiled in everything if not is_nvidia(compiled.target)]
    for compiled in binaries:
        binary = (FOLDER / compiled.files["hsaco"]).read_bytes()
        # An ELF file, for AMD's GPUs; a kernel's descriptor has its name with this ending.
        assert (binary[:4], int.from_bytes(binary[18:20], "little")) == (b"\x7fELF", 224)
        assert f"\0{compiled.symbol}.kd\0".encode() in binary, shown(compiled.variant)
        assert compiled.symbol == compiled.variant.kernel
    assert binaries


# From here on: that the checks above notice what they are there for.


@pytest.fixture(params=["sm_90", "gfx942"])
def update(request: pytest.FixtureRequest, everything: list[Compiled]) -> Compiled:
    """A kernel that passes, for each maker."""
    return the_update(everything, request.param)


def accesses_of(compiled: Compiled, text: str) -> Accesses:
    return (ptx_accesses if is_nvidia(compiled.target) else amd_accesses)(text.splitlines())


@pytest.mark.long
@pytest.mark.parametrize(
    ("nvidia", "amd", "noticed"),
    [
        (("ld.global.v4.b32", "ld.global.v2.b32"), ("buffer_load_dwordx4", "buffer_load_dwordx2"), "vectors"),
        (("st.global.v4.b32", "st.global.v2.b32"), ("buffer_store_dwordx4", "buffer_store_dwordx2"), "vectors"),
        (("ld.global.b32", "ld.global.v4.b32"), ("buffer_load_dword ", "buffer_load_dwordx4 "), "vectors"),
        (("ld.global.b32", "ld.global.b16"), ("buffer_load_dword ", "buffer_load_ushort "), "loads of 32"),
        (("st.global.b32", "st.global.b8"), ("buffer_store_dword ", "buffer_store_byte "), "stores of 32"),
    ],
)
def test_another_access_is_noticed(
    update: Compiled, nvidia: tuple[str, str], amd: tuple[str, str], noticed: str
) -> None:
    text = text_of(update)
    assert found_and_expected(update, accesses_of(update, text)) == {}
    changed = text.replace(*(nvidia if is_nvidia(update.target) else amd), 1)
    assert changed != text
    assert noticed in found_and_expected(update, accesses_of(update, changed))


@pytest.mark.long
def test_an_access_that_is_wider_is_noticed(everything: list[Compiled]) -> None:
    compiled = the_update(everything, "sm_100")
    changed = text_of(compiled).replace("ld.global.v4.b32", "ld.global.v8.b32", 1)
    assert set(found_and_expected(compiled, accesses_of(compiled, changed))) == {"vectors", "wider"}


@pytest.mark.long
def test_an_access_that_is_repeated_is_noticed(update: Compiled) -> None:
    text = text_of(update)
    nvidia = is_nvidia(update.target)
    for name in ("ld.global.v4.b32", "st.global.b32") if nvidia else ("buffer_load_dwordx4", "buffer_store_dword "):
        line = next(line for line in text.splitlines() if name in line)
        assert found_and_expected(update, accesses_of(update, text.replace(line, f"{line}\n{line}", 1))), line


@pytest.mark.long
def test_an_access_of_bytes_is_noticed(update: Compiled) -> None:
    line = "ld.global.u8 %rs1, [%rd1];" if is_nvidia(update.target) else "buffer_load_ubyte v1, off, s[0:3], 0"
    wrong = found_and_expected(update, accesses_of(update, f"{text_of(update)}\n\t{line}\n"))
    assert wrong == {"loads of 8": (1, 0)}


@pytest.mark.long
@pytest.mark.parametrize(
    ("rounded", "other"),
    [
        ("div.rn.f32", "div.full.f32"),
        ("div.rn.f32", "div.approx.f32"),
        ("sqrt.rn.f32", "sqrt.approx.f32"),
        ("sqrt.rn.f32", "sqrt.rn.ftz.f32"),
        ("add.rn.f64", "fma.rn.f64"),
        ("add.rn.f64", "add.f64"),
        ("mul.rn.f32", "mul.rz.f32"),
        ("cvt.rn.f32.f64", "cvt.rz.f32.f64"),
    ],
)
def test_another_rounding_is_noticed(everything: list[Compiled], rounded: str, other: str) -> None:
    compiled = the_update(everything, "sm_80")
    ptx = text_of(compiled)
    assert rounded in ptx
    assert unrounded(ptx.replace(rounded, other, 1), compiled) == {other: 1}


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "after", "more"), [("fma.rn.f32", "mul.rn.f32", -1), ("mul.rn.f32", "fma.rn.f32", 1)]
)
def test_a_fused_multiply_add_more_or_less_is_noticed(
    everything: list[Compiled], before: str, after: str, more: int
) -> None:
    compiled = the_update(everything, "sm_80")
    changed = text_of(compiled).replace(before, after, 1)
    assert unrounded(changed, compiled) == {"fma of f32": more}


@pytest.mark.long
@pytest.mark.parametrize(
    ("line", "noticed"),
    [
        ("v_fma_f32 v0, v1, v2, v3", {"fma of f32": 1}),
        ("v_fmac_f64_e32 v[0:1], v[2:3], v[4:5]", {"fma of f64": 1}),
        ("v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]", {"fma of f32": 2}),
        ("v_fma_f16 v0, v1, v2, v3", {"fma of f16": 1}),
        ("v_rcp_f32_e32 v0, v1", {"reciprocals of f32": 1}),
        ("v_exp_f32_e32 v0, v1", {"v_exp_f32": 1}),
        ("v_fma_mix_f32 v0, v1, v2, v3 op_sel_hi:[1,1,0]", {"fma of f32": 1}),
        ("v_fma_mix_f32 v0, v6, 1.0, v0 op_sel:[1,0,0] op_sel_hi:[1,1,0]", {}),
        ("v_fma_mix_f32 v1, v1, v16, neg(0) op_sel_hi:[1,0,0]", {}),
        ("v_mad_u64_u32 v[0:1], s[0:1], v2, v3, 0", {}),
    ],
)
def test_another_rounding_is_noticed_on_amd(everything: list[Compiled], line: str, noticed: dict[str, int]) -> None:
    compiled = the_update(everything, "gfx942")
    assert amd_unrounded(f"{text_of(compiled)}\n\t{line}\n", compiled) == noticed


# What cuobjdump prints of a kernel with a stack, in short, with its code and without.
RESOURCES = """
 Function update_kernel:
  REG:80 STACK:40 SHARED:1024 LOCAL:0 CONSTANT[0]:672 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
DISASSEMBLED = f"""{RESOURCES}
\t\tFunction : update_kernel
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0000000402047981 */
        /*0020*/                   STL.64 [R1], R4 ;                 /* 0x0000000402047981 */
"""


@pytest.mark.parametrize(("printed", "spills", "loads"), [(RESOURCES, {}, {}), (DISASSEMBLED, {"STL": 1}, {128: 1})])
def test_a_stack_is_noticed(printed: str, spills: dict[str, int], loads: dict[int, int]) -> None:
    ((symbol, code),) = functions(printed.splitlines())
    assert (symbol, code.registers, code.shared, code.loads) == ("update_kernel", 80, 1024, loads)
    assert spilled(code) == (40, 0, spills)
    ((_, none),) = functions(printed.replace("STACK:40", "STACK:0").replace("STL", "STG").splitlines())
    assert spilled(none) is None


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (".private_segment_fixed_size: 0", ".private_segment_fixed_size: 16"),
        (".vgpr_spill_count: 0", ".vgpr_spill_count: 3"),
        ("\ts_endpgm", "\tscratch_store_dword off, v0, off\n\ts_endpgm"),
    ],
)
def test_scratch_memory_is_noticed_on_amd(everything: list[Compiled], before: str, after: str) -> None:
    text = re.sub(r":\s+", ": ", next(text_of(c) for c in everything if not is_nvidia(c.target)))
    assert spilled(amd_code(text)) is None
    assert before in text
    assert spilled(amd_code(text.replace(before, after, 1)))


def test_a_kernel_without_a_tool_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.ptx.find_cuobjdump", lambda: None)
    with pytest.raises(FileNotFoundError, match="cuobjdump"):
        cubin_code(tmp_path / "none.cubin")


def test_the_words_of_ptx_are_understood() -> None:
    lines = """
    ld.param.b64 %rd1, [kernel_param_0]; // ld.global.b8
    @%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.nc.v2.f64 {%fd1, %fd2}, [%rd1];
    st.shared::cta.v4.b32 [%r1], {%r2, %r3, %r4, %r5};
    st.v2.b16 [%rd1], {%rs1, %rs2};
    st.global.u8 [%rd1], %rs1;
    """
    loads, stores = ptx_accesses(lines.splitlines())
    assert (loads, stores) == ({128: 2}, {32: 1, 8: 1})
