"""The second pass of a Hessian step: gradients come with their graph, and nothing on the way loses it unnoticed."""

from __future__ import annotations

import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functions
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from .gradients import is_droppable, refuse_clearing
from .interrupts import held_back

NO_GRAPH = (
    "this is a Hessian step, and the gradients carry no graph to differentiate a second time. Ways out: run the second "
    "pass within opt.hessian_pass(), or call loss.backward(create_graph=opt.hessian_due) in it; or give step() a "
    "closure, and the optimizer sees to it. In a Trainer of transformers: sassha_fused.huggingface.two_pass(trainer)"
)


def _run_last_hook_first(param: Tensor) -> None:
    # Hooks run in the order in which they were put into this dict.
    hooks: dict[int, Any] = param._backward_hooks  # type: ignore[assignment]
    if len(hooks) > 1:
        *others, last = hooks.items()
        hooks.clear()
        hooks.update([last, *others])


class GradientWatch:
    """Notes for each parameter how its gradients arrive, before any other hook can detach or replace them.

    A gradient without a graph may be that of a parameter that enters the loss linearly, or one that has lost its graph:
    what arrives tells which.
    """

    def __init__(self, params: Iterable[Tensor], others: Sequence[RemovableHandle] = ()) -> None:
        """others: of hooks that are taken off with these."""
        self._with_graph: set[Tensor] = set()
        self._without_grad_mode: set[Tensor] = set()
        self._arrived: set[Tensor] = set()
        self._before: dict[Tensor, tuple[Tensor, int]] = {}
        self._coming: dict[Tensor, tuple[bool, bool]] = {}
        self._handles = [*others]
        for param in dict.fromkeys(params):  # one that is listed twice is one
            self._handles.append(param.register_hook(functools.partial(self._note_coming, param)))
            _run_last_hook_first(param)
            self._handles.append(param.register_post_accumulate_grad_hook(self._note_arrived))

    def next_micro_batch(self) -> None:
        """What has arrived has had its products taken, and stays in .grad without a graph."""
        left = ((param, param.grad) for param in self._arrived)
        before = {**self._before, **{param: (grad, grad._version) for param, grad in left if grad is not None}}
        self.forget()
        self._before = before

    def forget(self) -> None:
        """Nothing has arrived."""
        for noted in (self._with_graph, self._without_grad_mode, self._arrived, self._before):
            noted.clear()

    def _note_coming(self, param: Tensor, gradient: Tensor) -> None:
        before = self._before.get(param)
        if before is not None and (param.grad is not before[0] or before[0]._version != before[1]):
            refuse_clearing()
        self._coming[param] = torch.is_grad_enabled(), gradient.requires_grad

    def _note_arrived(self, param: Tensor) -> None:
        # Not so where torch.autograd.grad has only asked for a gradient.
        in_grad_mode, has_graph = self._coming.pop(param, (False, False))
        self._arrived.add(param)
        self._before.pop(param, None)
        if not in_grad_mode:
            self._without_grad_mode.add(param)
        elif has_graph:
            self._with_graph.add(param)

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def saw_graph(self) -> bool:
        """Whether some backward pass has built the graph of its gradients."""
        return bool(self._arrived - self._without_grad_mode)

    def fault(self, param: Tensor, gradient: Tensor) -> str | None:
        """Why this gradient's curvature is not known; None where it is, that of a linear parameter being 0."""
        if param in self._without_grad_mode:
            return (
                "came from a backward without create_graph=True: one of several, or one inside a reentrant checkpoint "
                "(use_reentrant=False works)"
            )
        if gradient.requires_grad:
            return None
        if param in self._with_graph:
            return (
                "has lost its graph since it arrived: a hook or an assignment detached it, or it was computed anew "
                "under no_grad (write into it in place, as clip_grad_norm_ does, or keep its graph)"
            )
        # One that was cleared in place, and reached by no backward since, is 0 whatever the weights are.
        if param not in self._arrived and param not in self._before and not is_droppable(gradient):
            return "was assigned without a graph"
        return None


class _Backward(TorchFunctionMode):
    """Has every ``loss.backward()`` build the graph of its gradients."""

    def __init__(self, around: Callable[[Tensor], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self._around = around

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is not Tensor.backward:
            return func(*args, **(kwargs or {}))
        with self._around(args[0]):
            return func(*args, **{**(kwargs or {}), "create_graph": True})


class _Block:
    """Lives as long as a block, whose end Ctrl-C may cut off anywhere."""


# Both settings are the process's: the first block to come makes them, the last to go, of any thread, undoes them, or
# the next one, should Ctrl-C come just then. A thread that was interrupted within the lock may take it once more.
_settings, _lock = ExitStack(), threading.RLock()
_inside: weakref.WeakSet[_Block] = weakref.WeakSet()


def _leave() -> None:
    with _lock:
        if not _inside:
            _settings.close()


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention by torch's own arithmetic, and compiled models as written: both can be differentiated twice."""
    block = _Block()
    at_last = weakref.finalize(block, _leave)
    try:
        with held_back(), _lock:
            if not _inside:
                _settings.close()
                _settings.enter_context(sdpa_kernel(SDPBackend.MATH))
                # Only where somebody has compiled something: the first import of torch._dynamo takes seconds.
                if "torch._dynamo" in sys.modules:
                    _settings.enter_context(torch.compiler.set_stance("force_eager"))
            _inside.add(block)
        yield
    finally:
        with held_back():
            _inside.discard(block)
            _leave()
            at_last.detach()  # in which Ctrl-C would be lost


@contextmanager
def building_graphs(around: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext) -> Iterator[None]:
    """Within it, ``backward()`` gives gradients their graph; around is entered with the loss for each."""
    with twice_differentiable(), _Backward(around):
        yield


def nodes_of(tensors: Iterable[Tensor]) -> list[Any]:
    """The nodes of the graph behind these, but for those inside reentrant checkpoints."""
    seen = {tensor.grad_fn for tensor in tensors} - {None}
    nodes: list[Any] = [*seen]
    seen.add(None)
    see, append = seen.add, nodes.append
    for node in nodes:
        for following, _ in node.next_functions:
            if following not in seen:
                see(following)
                append(following)
    return nodes


def leaves_of(nodes: Iterable[Any]) -> list[Tensor]:
    """The leaf tensors among them, which a backward gives gradients."""
    accumulation = _functions.AccumulateGrad  # type: ignore[attr-defined]
    return [node.variable for node in nodes if type(node) is accumulation]


@contextmanager
def warning_of_constants(nodes: Iterable[Any]) -> Iterator[None]:
    """Warns of custom functions whose backward, when it runs, breaks the graph: to double backward it is a constant."""
    handles = [
        node.register_hook(functools.partial(_warn_of_constant, node))
        for node in nodes
        # What a reentrant checkpoint does to its parameters is seen at these.
        if isinstance(node, BackwardCFunction) and node._forward_cls is not CheckpointFunction  # type: ignore[attr-defined]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _warn_of_constant(node: Any, to_inputs: Sequence[Tensor | None], of_outputs: Sequence[Tensor | None]) -> None:
    given = [gradient for gradient in to_inputs if gradient is not None]
    if not given or any(gradient.requires_grad for gradient in given):
        return
    # A function that is linear gives gradients without a graph where it gets such; it has nothing to save.
    if any(gradient is not None and gradient.requires_grad for gradient in of_outputs) or node.saved_tensors:
        _warn_once(type(node).__name__.removesuffix("Backward"))


@functools.cache
def _warn_once(function: str) -> None:
    warnings.warn(
        f"the backward of {function} is not made of differentiable operations: its part of the Hessian is taken for 0. "
        "opt.check_products(closure) says which parameters that concerns; write its backward with torch's operations",
        stacklevel=2,
    )


@contextmanager
def set_aside(params: Sequence[Tensor]) -> Iterator[None]:
    """What the block does to the gradients of these is undone: they have had theirs in the first pass."""
    before = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        yield
    finally:
        for param, gradient in zip(params, before, strict=True):
            param.grad = gradient


@functools.cache
def show_no_warning_of_cycles() -> None:
    """Torch warns once per process that create_graph=True makes cycles, which steps break as soon as they can.

    Done at a time when no model is running: to filter warnings around every backward would have Python forget which
    warnings of the model it has shown.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ones((), device="cpu", requires_grad=True).backward(create_graph=True)
