"""What PTX and AMD's assembly do with floats: whether each operation rounds once, as csrc/math says (tests only)."""

from __future__ import annotations

import collections
import re

from bench.ptx import traffic
from bench.triton_code import KINDS, SUMS, Compiled, second_of

# The fused multiply-adds for an element of float32 arithmetic: of each average, of the new weight, of the denominator,
# where D is corrected or clipped; and of a general power.
FUSED_AVERAGE, FUSED_MOVED, FUSED_DENOMINATOR = 3, 3, 1
FUSED_POWER = 20
# Of a plain direction: the gradient with the decay in it, and one step ahead; the new weight, whose factor is 1.
FUSED_PLAIN = 2 + FUSED_AVERAGE + 2 + 2

# Each of these is one IEEE rounding (f32x2: for either of two numbers; f32.bf16: one summand is narrower), and ptxas
# fuses none that says how it rounds.
ROUNDED = re.compile(r"(add|sub|mul|div|sqrt)\.rn\.f(32|32x2|64)|(add|sub)\.rn\.f32\.b?f16")
# What the logarithm and the exponential in float64 are made of besides.
GENERAL_POWER = {"fma.rn.f64", "rcp.approx.ftz.f64"}

_FLOATS = r"(?:b?f16(?:x2)?|f32(?:x2)?|f64)"
_ARITHMETIC = re.compile(
    rf"\b((?:add|sub|mul|fma|mad|div|rcp|sqrt|rsqrt|ex2|lg2|sin|cos|tanh)(?:\.\w+)*\.{_FLOATS}|call)[\s.]"
)
_CONVERSION = re.compile(rf"\b(cvt(?:\.\w+)*\.{_FLOATS}\.{_FLOATS})\s")
_CONVERSION_ROUNDED = re.compile(rf"cvt(\.rn)?\.{_FLOATS}\.{_FLOATS}")
_FUSED = {"fma.rn.f32": 1, "fma.rn.f32x2": 2}

# How many fused multiplications and additions a correctly rounded division and square root take on AMD.
AMD_DIVISION = {"f32": 5, "f64": 5}
AMD_ROOT = {"f32": 2, "f64": 7}
_AMD_FUSED = re.compile(r"\s*v_(pk_|dot\w*_)?(?:fma|fmac|fmaak|fmamk|mad|mac)_(?:legacy_)?(b?f\d+)")
# As a plain product or sum: the addend is -0, or a factor is 1.
_AMD_MIXED = re.compile(r"\s*v_fma_mix\w*\s+(.*)")
_AMD_PLAIN = re.compile(r"v\d+, \S+ \S+ neg\(0\)( .*)?|v\d+, \S+ 1\.0, \S+( .*)?")


def has_general_power(compiled: Compiled) -> bool:
    """Whether a kernel raises to a power that is neither a root nor 1."""
    return KINDS.get(compiled.variant.constants.get("KIND", 0)) == "general"


def takes_logarithms(compiled: Compiled) -> bool:
    """Whether a kernel takes a logarithm and an exponential, which are float64's alone."""
    return has_general_power(compiled) and compiled.variant.constants["STATE"] == "fp64"


def fused_of(compiled: Compiled) -> int:
    """How many fused multiply-adds of float32 the arithmetic asks for, in vectors and one by one."""
    streams, constants = traffic(compiled), compiled.variant.constants
    if streams is None:
        return 0
    if compiled.variant.kernel == "update_kernel" and constants["STATE"] == "fp32":
        of_norm = (
            SUMS[constants["SUMS"]] == "norm in float32"
        )  # what squares lose, once whatever the way through a tile
        return streams.elements * (2 * _fused_of_element(compiled) + of_norm)
    if compiled.variant.kernel == "block_average_kernel" and constants["STATE"] == "fp32":
        return 2 * streams.elements * FUSED_AVERAGE
    if constants.get("QUICK_FLOAT64", True):
        return 0
    # Those that find what squares and products have lost. The square of a product of two floats is that of two floats
    # once more; narrower squares are exact.
    wide, weighted = constants["DTYPE"] == "fp32", constants["WEIGHTED"]
    return streams.elements * (4 if wide and weighted else int(wide or weighted))


def _fused_of_element(compiled: Compiled) -> int:
    second = second_of(compiled.variant)
    if second == "none":
        return FUSED_PLAIN
    averages = 2 if second in ("of products", "of gradients") else 1
    others = FUSED_MOVED + FUSED_DENOMINATOR + FUSED_POWER * has_general_power(compiled)
    return averages * FUSED_AVERAGE + others


def unrounded(ptx: str, compiled: Compiled) -> dict[str, int]:
    """The instructions that do something else than one operation of floats with one rounding to nearest; and how many
    fused multiply-adds there are beyond or below those that the arithmetic asks for.
    """
    code = "\n".join(line.partition("//")[0] for line in ptx.splitlines())
    found = collections.Counter(name for name in _ARITHMETIC.findall(code) if not ROUNDED.fullmatch(name))
    found.update(name for name in _CONVERSION.findall(code) if not _CONVERSION_ROUNDED.fullmatch(name))
    fused = sum(count * found.pop(name, 0) for name, count in _FUSED.items())
    found["fma of f32"] = fused - fused_of(compiled)
    exempt = GENERAL_POWER if takes_logarithms(compiled) else ()
    return {name: count for name, count in found.items() if count and name not in exempt}


def amd_unrounded(text: str, compiled: Compiled) -> dict[str, int]:
    """How many instructions of AMD's there are, by kind, beyond or below those that the arithmetic asks for, correctly
    rounded divisions and square roots among them.
    """
    lines = [line.partition(";")[0].rstrip() for line in text.splitlines()]
    names = collections.Counter(line.split()[0].removesuffix("_e32").removesuffix("_e64") for line in lines if line)
    fused = collections.Counter(f32=-fused_of(compiled))
    for line in lines:
        if matched := _AMD_FUSED.match(line):
            fused[matched[2]] += 2 if matched[1] == "pk_" else 1
    # Of float16 numbers as they are, and rounded once as well.
    mixed = [matched[1] for line in lines if (matched := _AMD_MIXED.match(line))]
    fused["f32"] += sum(not _AMD_PLAIN.fullmatch(operands) for operands in mixed)
    found = {f"fma of {kind}": count for kind, count in fused.items() if kind not in AMD_DIVISION}
    for kind in ("f32",) if takes_logarithms(compiled) else ("f32", "f64"):
        divisions = names[f"v_div_fixup_{kind}"]
        roots = names["v_sqrt_f32" if kind == "f32" else "v_rsq_f64"]
        found[f"fma of {kind}"] = fused[kind] - AMD_DIVISION[kind] * divisions - AMD_ROOT[kind] * roots
        found[f"reciprocals of {kind}"] = names[f"v_rcp_{kind}"] - divisions
    for name in ("v_rsq_f32", "v_exp_f32", "v_log_f32", "v_sin_f32", "v_cos_f32"):
        found[name] = names[name]
    return {name: count for name, count in found.items() if count}
