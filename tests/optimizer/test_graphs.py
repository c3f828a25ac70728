"""Steps replayed from CUDA graphs: what the host does around them, with graphs that play back on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sassha_fused import graphs
from sassha_fused import passes as operators
from sassha_fused.counts import Counts
from sassha_fused.graphs import GraphedStep
from tests.support.members import OfMember, each_member
from tests.support.problems import Problem, assert_same, parameter


class PlaybackGraph:
    """In place of torch.cuda.CUDAGraph: what was recorded runs again when it is replayed."""

    capturing = False

    def __init__(self) -> None:
        self.play: Callable[[], Any] = lambda: None
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.play()


class NoStream:
    def __init__(self, _: Any = None) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PlaybackGraph]]:
    """The graphs captured so far. Capturing runs nothing: what the step did is undone."""
    made: list[PlaybackGraph] = []

    class Graphed(GraphedStep):
        def _capture(self) -> Any:
            captured = super()._capture()
            optimizer = self._optimizer

            def play() -> None:
                # As on a device: what was recorded happens to tensors, and the host counts nothing of it.
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(Counts, "count", lambda counts, taken: None)
                    captured.loss.copy_(optimizer.step(self._closure))

            captured.graph.play = play
            return captured

    @contextmanager
    def capture(graph: PlaybackGraph, pool: Any, stream: Any) -> Iterator[None]:
        made.append(graph)
        (problem,) = problems
        buckets = problem.opt._run.flat.buckets
        live = [*problem.params]
        for bucket in buckets:
            state = [bucket.exp_avg, bucket.exp_hessian, bucket.backup, bucket.counts, bucket.skipped]
            live += [tensor for tensor in state if tensor is not None]
        before = [tensor.detach().clone() for tensor in live]
        numbers = [bucket.evaluation for bucket in buckets]
        for number in numbers:
            number.fill_(-1)
        PlaybackGraph.capturing = True
        try:
            yield
            # Each replay has a number of its own: one that was recorded would give all replays the same signs.
            assert all(number == -1 for number in numbers)
        finally:
            PlaybackGraph.capturing = False
            with torch.no_grad():
                for tensor, value in zip(live, before, strict=True):
                    tensor.copy_(value)

    @contextmanager
    def on(_: Any) -> Iterator[None]:
        yield

    problems: list[Problem] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PlaybackGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(GraphedStep, "_find_device", lambda self: torch.device("cpu"))
    monkeypatch.setattr(graphs, "GraphedStep", Graphed)
    monkeypatch.setattr(PlaybackGraph, "problems", problems, raising=False)
    yield made


def graphed(problem: Problem) -> GraphedStep:
    PlaybackGraph.problems[:] = [problem]  # type: ignore[attr-defined]
    return graphs.GraphedStep(problem.opt, problem.loss)


def run(problem: Problem, step: GraphedStep, count: int) -> list[Tensor]:
    losses = []
    for _ in range(count):
        losses.append(step().clone())
        problem.steps += 1
    return losses


@pytest.mark.parametrize("samples", [1, 3])
def test_graphed_steps_are_the_steps_without_graphs(recorded: list[PlaybackGraph], samples: int) -> None:
    usual, replayed = (Problem(hessian_samples=samples) for _ in range(2))
    expected = [usual.step().clone() for _ in range(20)]
    assert_same(run(replayed, graphed(replayed), 20), expected)
    assert_same(replayed.snapshot(), usual.snapshot())
    # Every third step is a Hessian step: two graphs, each after the step that makes the state and three of its kind.
    assert len(recorded) == 2
    assert sum(graph.replays for graph in recorded) == 20 - 1 - 2 * 3


def test_a_skipped_step_is_skipped_in_a_graph_too(recorded: list[PlaybackGraph]) -> None:
    usual, replayed = Problem(), Problem()
    step = graphed(replayed)
    for problem, take in ((usual, usual.step), (replayed, lambda: run(replayed, step, 1))):
        for i in range(24):
            # One lazy step and one Hessian step.
            kept = problem.inputs[i].clone()
            problem.steps = i
            if i in (16, 18):
                problem.inputs[i, 0, 0] = torch.inf
            take()
            problem.inputs[i] = kept
    assert usual.opt.skipped_steps == replayed.opt.skipped_steps == 2
    assert_same(replayed.snapshot(), usual.snapshot())


def test_a_tensor_learning_rate_may_change_and_a_recorded_number_may_not(recorded: list[PlaybackGraph]) -> None:
    usual, replayed = (Problem(lr=torch.tensor(0.05)) for _ in range(2))
    for problem in (usual, replayed):
        problem.opt.param_groups[1]["lr"] = torch.tensor(0.03)
    step = graphed(replayed)
    for i in range(12):
        for problem in (usual, replayed):
            for group in problem.opt.param_groups:
                group["lr"].fill_(0.05 / (i + 1))
        usual.step()
        run(replayed, step, 1)
    assert_same(replayed.snapshot()["weights"], usual.snapshot()["weights"])
    group = replayed.opt.param_groups[0]
    for name, other, message in (("rho", 0.123, r"rho was 0\.2"), ("lr", group["lr"].clone(), r"lr was tensor\(")):
        kept, group[name] = group[name], other
        with pytest.raises(ValueError, match=f"{message}.* when the step was captured"):
            step()
        group[name] = kept
    step()


def test_a_loaded_state_makes_new_graphs(recorded: list[PlaybackGraph]) -> None:
    usual, replayed = Problem(), Problem()
    step = graphed(replayed)
    usual.train(12)
    run(replayed, step, 12)
    for problem in (usual, replayed):
        problem.opt.load_state_dict(problem.opt.state_dict())
    before = len(recorded)
    usual.train(12)
    run(replayed, step, 12)
    assert len(recorded) == before + 2
    assert_same(replayed.snapshot(), usual.snapshot())


def test_a_group_that_joins_makes_new_graphs(recorded: list[PlaybackGraph]) -> None:
    usual, replayed = Problem(), Problem()
    step = graphed(replayed)
    usual.train(12)
    run(replayed, step, 12)
    for problem in (usual, replayed):
        late = parameter(0.5, -1.5)
        problem.opt.add_param_group({"params": [late]})
        problem.params.append(late)
        loss = problem.loss
        problem.loss = lambda loss=loss, late=late: loss() + (late**4).sum()  # type: ignore[method-assign]
    step._closure = replayed.loss
    usual.train(24)
    run(replayed, step, 24)
    assert_same(replayed.snapshot(), usual.snapshot())
    assert usual.params[-1].tolist() != [0.5, -1.5]


def test_graphs_need_one_cuda_device_and_say_so() -> None:
    problem = Problem()
    with pytest.raises(ValueError, match=r"params must be on one CUDA device.*got some on cpu"):
        GraphedStep(problem.opt, problem.loss)


@pytest.mark.parametrize("passes", [0, 1])
def test_a_capture_that_fails_changes_nothing(
    recorded: list[PlaybackGraph], monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    usual, problem = Problem(), Problem()
    step = graphed(problem)
    usual.train(12)
    left = passes
    put_back = operators.put_back

    def put_back_outside_of_captures(selections: Any) -> None:
        # In one nothing has run: the weights have not moved, and the backup is that of the step before.
        assert not isinstance(problem.opt._run.step, graphs._RecordedStep)
        put_back(selections)

    monkeypatch.setattr(operators, "put_back", put_back_outside_of_captures)

    def loss() -> Tensor:
        nonlocal left
        if PlaybackGraph.capturing:
            if left == 0:
                raise RuntimeError("operation not permitted when stream is capturing")
            left -= 1
        return problem.loss()

    step._closure = loss
    for _ in range(40):
        try:
            run(problem, step, 1)
        except RuntimeError as error:
            assert "not permitted" in str(error)
            break
    assert recorded and not PlaybackGraph.capturing and not problem.opt.perturbed
    assert problem.opt._run.step is None
    step._closure = problem.loss
    run(problem, step, 12 - problem.steps)
    assert_same(problem.snapshot(), usual.snapshot())


def test_a_replay_finds_the_numbers_that_the_groups_say(
    recorded: list[PlaybackGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem()
    step = graphed(problem)
    run(problem, step, 14)
    group, found = problem.opt.param_groups[0], []
    rate, group["lr"] = group["lr"], 0.5
    problem.step()  # as usual, such as of a last batch that is shorter
    group["lr"] = rate

    def replay(graph: PlaybackGraph) -> None:
        (bucket,) = problem.opt._run.flat.buckets
        found.append([row[0] for row in bucket.table.values.tolist()])
        graph.play()

    monkeypatch.setattr(PlaybackGraph, "replay", replay)
    run(problem, step, 1)
    assert found == [[each["lr"] for each in problem.opt.param_groups for _ in each["params"]]]


@each_member
def test_graphed_steps_of_every_member_are_those_without_graphs(member: str, recorded: list[PlaybackGraph]) -> None:
    usual, replayed = OfMember(member), OfMember(member)
    expected = [usual.step().clone() for _ in range(16)]
    assert_same(run(replayed, graphed(replayed), 16), expected)
    assert_same(replayed.snapshot(), usual.snapshot())
    assert sum(graph.replays for graph in recorded) >= 16 - 1 - 2 * 3
