"""The optimizer's part of a step, outside forward and backward, for the parameter shapes of four models.

Timed are `perturb()` and `step()` of Sassha and `step()` of the others; gradients and Hessian products are ready, and
assigning them, as backward would, is never timed. A Hessian step of Sassha also draws its signs; the loop's does not.
"""

import os
from statistics import median

import pytest

from bench.budgets import (
    ADAMW_BYTES,
    HESSIAN_BYTES,
    HESSIAN_BYTES_MOVED,
    LAZY_BYTES,
    LAZY_BYTES_MOVED,
    LAZY_BYTES_READ,
    SGD_BYTES,
)
from bench.contenders import HESSIAN, LAZY, Problem, Reads, adamw, per_tensor_loop, sassha, sgd
from bench.interleave import Samples, interleaved, replay, replayed_seconds, spread
from bench.report import Report
from bench.shapes import MODELS

SECONDS = {"ResNet-20": 15, "ResNet-50": 40, "ViT-S/32": 40, "GPT-2 small": 120}
TENSORS_HELD = 26  # copies of the parameters alive at once: all states, gradients, products and temporaries

SASSHA = ("sassha cpu", "sassha eager", "per-tensor loop")
OTHERS = ("AdamW fused", "AdamW foreach", "SGD momentum", Reads.name)

BYTES = {(LAZY, name): LAZY_BYTES for name in SASSHA}
BYTES |= {(HESSIAN, name): HESSIAN_BYTES for name in SASSHA}
BYTES |= dict.fromkeys([(LAZY, "AdamW fused"), (LAZY, "AdamW foreach")], ADAMW_BYTES)
BYTES |= {(LAZY, "SGD momentum"): SGD_BYTES, (LAZY, Reads.name): LAZY_BYTES_READ}
MOVED = {(LAZY, "sassha cpu"): LAZY_BYTES_MOVED, (HESSIAN, "sassha cpu"): HESSIAN_BYTES_MOVED}


@pytest.fixture(scope="module", params=MODELS)
def measured(request, progress, report) -> tuple[str, Samples]:
    model = request.param
    shapes = MODELS[model]
    problem = Problem(shapes)
    needed = TENSORS_HELD * 4 * problem.count
    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < needed:
        pytest.skip(f"{model} needs {needed / 1e9:.0f} GB of memory for all contenders at once")
    contenders = [
        sassha(problem, "cpu"),
        sassha(problem, "eager"),
        per_tensor_loop(problem),
        adamw(problem, fused=True),
        adamw(problem, foreach=True),
        sgd(problem),
        Reads(problem),
    ]
    with progress(f"{model}, optimizer step") as done:
        samples = interleaved(contenders, SECONDS[model], done)
    describe(report, model, problem.count, samples)
    return model, samples


def describe(report: Report, model: str, parameters: int, samples: Samples) -> None:
    typical = {key: median(values) for key, values in samples.items()}
    adamw_fused = typical[LAZY, "AdamW fused"]
    for kind in (LAZY, HESSIAN):
        loop = typical[kind, "per-tensor loop"]
        rows = [
            (
                "",
                "ms",
                "rounds",
                "spread",
                "loop / this",
                "AdamW fused / this",
                "bytes/parameter",
                "GB/s",
                "moved",
                "GB/s moved",
            )
        ]
        for name in (*SASSHA, *OTHERS):
            if (kind, name) not in typical:
                continue
            seconds = typical[kind, name]
            moved = MOVED.get((kind, name))
            rows.append(
                (
                    name,
                    f"{1e3 * seconds:.3f}",
                    str(len(samples[kind, name])),
                    spread(samples[kind, name]),
                    f"{loop / seconds:.2f}",
                    f"{adamw_fused / seconds:.2f}",
                    str(BYTES[kind, name]),
                    f"{BYTES[kind, name] * parameters / seconds / 1e9:.1f}",
                    str(moved or ""),
                    f"{moved * parameters / seconds / 1e9:.1f}" if moved else "",
                )
            )
        # bytes that one fused step cannot avoid, and beside them those that the kernels move
        report.table(
            f"{model} ({parameters / 1e6:.2f} M parameters, {len(MODELS[model])} tensors), {kind}, medians", rows
        )

    ours = typical[LAZY, "sassha cpu"]
    if model in ("GPT-2 small", "ResNet-20"):
        report.judge(f"{model}, loop", typical[LAZY, "per-tensor loop"] / ours)
    if model == "GPT-2 small":
        report.judge("GPT-2 small, AdamW", (LAZY_BYTES_MOVED / ours) / (ADAMW_BYTES / adamw_fused))
    if model == "ResNet-20":
        report.judge("ResNet-20, AdamW", ours / adamw_fused)


@pytest.mark.benchmark(timer=replayed_seconds)
@pytest.mark.parametrize("contender", [*SASSHA, *OTHERS])
def test_lazy_step(measured, contender, benchmark):
    publish(measured, LAZY, contender, benchmark)


@pytest.mark.benchmark(timer=replayed_seconds)
@pytest.mark.parametrize("contender", SASSHA)
def test_hessian_step(measured, contender, benchmark):
    publish(measured, HESSIAN, contender, benchmark)


def publish(measured: tuple[str, Samples], kind: str, contender: str, benchmark) -> None:
    model, samples = measured
    benchmark.group = f"{model}, {kind}"
    benchmark.extra_info["bytes per parameter"] = BYTES[kind, contender]
    replay(benchmark, samples[kind, contender])
