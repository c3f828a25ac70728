"""Host time of a lazy step: many tensors of 8 elements, so that arithmetic and memory cost nothing."""

from statistics import median

import pytest

from bench.contenders import LAZY, Problem, adamw, sassha, sassha_in_groups, sassha_without_perturbation
from bench.interleave import interleaved, replay, replayed_seconds, spread

SECONDS = 12
GROUPS = 50
OURS, IN_GROUPS, WITHOUT, ADAMW = "sassha cpu", f"sassha cpu, {GROUPS} groups", "sassha cpu, rho 0", "AdamW fused"
CONTENDERS = (OURS, IN_GROUPS, WITHOUT, ADAMW, "AdamW foreach")


@pytest.fixture(scope="module", params=[161, 1000])
def measured(request, progress, report):
    tensors = request.param
    problem = Problem(((8,),) * tensors)
    contenders = [
        sassha(problem, "cpu"),
        sassha_in_groups(problem, GROUPS),
        sassha_without_perturbation(problem),
        adamw(problem, fused=True),
        adamw(problem, foreach=True),
    ]
    with progress(f"{tensors} small tensors") as done:
        samples = interleaved(contenders, SECONDS, done)
    typical = {name: median(samples[LAZY, name]) for name in CONTENDERS}
    rows = [("", "us", "spread", "us/tensor", "this / AdamW fused")]
    for name, seconds in typical.items():
        cells = (1e6 * seconds, 1e6 * seconds / tensors, seconds / typical[ADAMW])
        rows.append((name, f"{cells[0]:.0f}", spread(samples[LAZY, name]), f"{cells[1]:.2f}", f"{cells[2]:.2f}"))
    report.table(f"{tensors} tensors of 8 elements, {LAZY}, medians of {len(samples[LAZY, OURS])} rounds", rows)
    report.judge(f"host {tensors}", typical[OURS] / typical[ADAMW])
    report.judge(f"groups {tensors}", typical[IN_GROUPS] / typical[OURS])
    if tensors == 1000:
        report.judge("without perturbation", typical[WITHOUT] / typical[OURS])
    return tensors, samples


@pytest.mark.benchmark(timer=replayed_seconds)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_host_time(measured, contender, benchmark):
    tensors, samples = measured
    benchmark.group = f"{tensors} tensors of 8 elements, {LAZY}"
    replay(benchmark, samples[LAZY, contender])
