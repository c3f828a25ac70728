"""Which backend serves, and why another cannot."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha, available_backends, eager, ops
from tests.support.problems import Problem, assert_same, naming, parameter, single_threaded

one_thread = pytest.fixture(autouse=True)(single_threaded)


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> str:
    reason = "the extension was left at home"
    monkeypatch.setattr(ops, "_EXTENSION_MISSING", reason)
    monkeypatch.setattr(ops, "_warned", set())
    return reason


def spy_on_eager(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the eager operators as they are called from now on."""
    called: list[str] = []
    for name in ops.NAMES:
        original = getattr(eager, name)
        monkeypatch.setattr(eager, name, lambda *a, name=name, original=original: called.append(name) or original(*a))
    return called


def test_a_backend_that_cannot_serve_is_refused_with_its_reason(without_extension: str) -> None:
    backends = available_backends()
    assert (backends["cpu"], backends["eager"]) == (without_extension, None)
    with pytest.raises(ValueError, match=rf"backend 'cpu'.*{without_extension}"):
        Sassha([parameter(1.0)], backend="cpu")


@pytest.mark.parametrize(
    "names, reason",
    [
        ((), "this torch was built without CUDA"),
        (("version",), "_cuda was not built"),
        (("version", "loaded"), "no CUDA device is available"),
        (("version", "loaded", "available"), None),
        (("version", "loaded", "available", "initialized"), "do not run on cuda:0: no kernel image"),
    ],
    ids=str,
)
def test_why_the_cuda_kernels_cannot_be_used_is_told(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], reason: str | None
) -> None:
    def refuses(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.version, "cuda", "13.0" if "version" in names else None)
    not_built = "the extension sassha_fused._cuda was not built"
    monkeypatch.setattr(ops, "_load_cuda", lambda: None if "loaded" in names else not_built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "available" in names)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: "initialized" in names)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "ones", refuses)
    ops._refusal.cache_clear()
    found = available_backends()["cuda"]
    ops._refusal.cache_clear()
    assert found is None if reason is None else found is not None and reason in found


def test_auto_falls_back_to_eager_and_says_so_once(without_extension: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = spy_on_eager(monkeypatch)
    with pytest.warns(UserWarning, match=without_extension) as caught:
        problem = Problem("auto").train(4)
        Problem("auto").train(1)
    assert len(caught) == 1
    assert set(called) >= {"grad_norm", "perturb_", "update_", "rademacher_"}
    assert_same(problem.snapshot(), Problem("eager").train(4).snapshot())


def test_the_environment_takes_the_place_of_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    called = spy_on_eager(monkeypatch)
    for value in ("", "auto", "cpu"):
        monkeypatch.setenv("SASSHA_FUSED_BACKEND", value)
        Problem("auto").train(1)
        assert not called
    monkeypatch.setenv("SASSHA_FUSED_BACKEND", "eager")
    Problem("cpu").train(1)
    assert not called
    Problem("auto").train(1)
    assert called


@pytest.mark.parametrize("value", ["tpu", "CPU", "cpu,eager"])
def test_an_unknown_backend_in_the_environment_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASSHA_FUSED_BACKEND", value)
    with pytest.raises(ValueError, match=naming("SASSHA_FUSED_BACKEND", value)):
        Problem("auto").train(1)


def test_an_unavailable_backend_in_the_environment_is_refused_with_its_reason(
    without_extension: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SASSHA_FUSED_BACKEND", "cpu")
    with pytest.raises(ValueError, match=without_extension):
        Problem("auto").train(1)


def test_a_backend_refused_in_the_first_step_can_be_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("auto")
    monkeypatch.setenv("SASSHA_FUSED_BACKEND", "tpu")
    for _ in range(2):
        with pytest.raises(ValueError, match="SASSHA_FUSED_BACKEND"):
            problem.step()
    monkeypatch.delenv("SASSHA_FUSED_BACKEND")
    assert_same(problem.train(4).snapshot(), Problem().train(4).snapshot())


def test_a_backend_is_refused_for_a_device_it_does_not_serve() -> None:
    w = nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match=r"backend 'cpu'.*meta"):
        opt = Sassha([w], backend="cpu")
        opt.step(lambda: (w**3).sum())
