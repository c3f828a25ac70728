"""The CPU's loops over the elements are vectorised: a condition too many and g++ gives that up without a word."""

import functools
import shutil

import pytest

from bench.bytes import KINDS
from bench.vectors import INSTRUCTION_SETS, LIBRARY, Copy, Widths, of_library, packed, parsed


@functools.cache
def copies() -> dict[Copy, Widths]:
    """Those of the library built in place; the test is skipped where there are none, or nothing to read them with."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not on PATH: install binutils")
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} was not built in place")
    if not (found := of_library(LIBRARY)):
        pytest.skip(f"{LIBRARY.name} has no copies per instruction set: it was not built by g++ for x86-64")
    return found


# A plain direction takes no products.
LOOPS = [(kind, products) for products in (False, True) for kind in KINDS if not (products and kind == "kPlain")]


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize(("kind", "products"), LOOPS)
def test_the_update_in_float32_is_vectorised(kind: str, products: bool, instruction_set: str) -> None:
    name = f"11update_tileIfLNS_4KindE{KINDS.index(kind)}ELb{int(products)}E"
    widths = copies()[name, instruction_set]
    assert packed(widths) >= 10, widths


# What objdump prints, in short.
PRINTED = """
000000000004ec80 <_ZN6sassha3cpu12_GLOBAL__N_111update_tileIfLNS_4KindE1ELb1EEEvPKT_S5_S5_PS3_.arch_x86_64_v4>:
   4ec80:\tvmulps %zmm1,%zmm2,%zmm3
   4ec86:\tvfmadd231ps (%rax),%ymm1,%ymm2
   4ec8c:\tvsqrtss %xmm1,%xmm1,%xmm1
   4ec92:\tvmovups %zmm1,(%rax)
   4ec98:\tvmulpd %zmm1,%zmm2,%zmm3
000000000004ed00 <_ZN6sassha3cpu12_GLOBAL__N_111update_tileIfLNS_4KindE1ELb1EEEvPKT_S5_S5_PS3_.default>:
   4ed00:\tvdivps %zmm1,%zmm2,%zmm3
"""


def test_what_objdump_prints_is_understood() -> None:
    ((copy, widths),) = parsed(PRINTED.splitlines())
    assert copy == ("11update_tileIfLNS_4KindE1ELb1E", "v4")
    assert widths == {512: 1, 256: 1, 32: 1} and packed(widths) == 2
