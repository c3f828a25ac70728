"""What Triton would compile in a training run, without a GPU: python -m tests.support.specializations.

Kernels are not interpreted here, and not launched either: for each launch, what Triton knows a compiled kernel by is
worked out. Prints for each optimizer a list of steps, each a list of these keys; from one to the next all changes
that may.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from sassha_fused import SAMSGD, AdaHessian, MSassha, SAMAdamW, Sassha, SophiaH, ops
from sassha_fused.triton_kernels import launch, norm

# Of Sassha, and of the others, which have most of their kernels from it.
STEPS, FEW_STEPS = 100, 24

_BACKEND = make_backend(GPUTarget("cuda", 90, 32))
keys: list[str] = []


def note(
    kernel: Any,
    device: torch.device,
    programs: int,
    *arguments: Any,
    registers: int,
    **constants: Any,
) -> None:
    """Takes the place of launch.launch."""
    bind = create_function_from_signature(kernel.signature, kernel.params, _BACKEND)
    options = launch.options_for(registers, nvidia=True)
    _, specialization, rest = bind(*arguments, **constants, **options)
    keys.append(f"{kernel.fn.__name__} {specialization} {rest}")


# By name: an optimizer of some parameters with this learning rate, and what a step changes of its own hyperparameters.
Groups = list[dict[str, Any]]
MEMBERS: dict[str, tuple[Callable[[Groups, Tensor], Any], Callable[[int], dict[str, Any]]]] = {
    "Sassha": (
        lambda groups, rate: Sassha(groups, backend="triton", hessian_interval=3, hessian_samples=2, lr=rate),
        lambda step: {"rho": (1 + step) / 10},
    ),
    "MSassha": (
        lambda groups, rate: MSassha(groups, backend="triton", hessian_interval=3, exact_restore=False, lr=rate),
        lambda step: {"rho": (1 + step) / 10},
    ),
    "SAMSGD": (
        lambda groups, rate: SAMSGD(groups, backend="triton", momentum=0.9, ascent="momentum", lr=rate),
        lambda step: {
            "momentum": (1 + step % 7) / 8,
            "nesterov": step % 2 == 1,
            "dampening": 0.0 if step % 2 else step % 3 / 8,
        },
    ),
    "SAMAdamW": (
        lambda groups, rate: SAMAdamW(groups, backend="triton", lr=rate),
        lambda step: {"rho": (1 + step) / 10},
    ),
    "AdaHessian": (
        lambda groups, rate: AdaHessian(groups, backend="triton", hessian_interval=3, hessian_block=8, lr=rate),
        lambda step: {},
    ),
    "SophiaH": (
        lambda groups, rate: SophiaH(groups, backend="triton", hessian_interval=3, lr=rate),
        lambda step: {"clip_threshold": step % 5 / 10},
    ),
}


def steps_of(name: str) -> list[list[str]]:
    """The keys of each step of an optimizer."""
    make, changes = MEMBERS[name]
    rate = torch.tensor(0.1)
    params = [nn.Parameter(torch.ones(shape)) for shape in ((1,), (16,), (17,), (64, 64), (100_003, 1))]
    # What is counted of a state stays the same.
    groups: Groups = [{"params": params[:3]}, {"params": params[3:]}]
    if name == "Sassha":
        groups[1]["bias_correction"] = "update"
    opt = make(groups, rate)
    steps = []
    for step in range(STEPS if name == "Sassha" else FEW_STEPS):
        for group in opt.param_groups:
            # 0, 1 and multiples of 16 are what Triton likes to compile anew for.
            new = {
                "lr": rate if step % 2 else 0.1 + step / 100,
                "betas": (step % 7 / 8, 1 - 1 / (2 + step)),
                "eps": (0.0, 1.0, 16.0, 1e-4)[step % 4],
                "weight_decay": step % 3,
                "maximize": step % 5 == 0,
                **changes(step),
            }
            group.update({key: value for key, value in new.items() if key in group})
        rate.fill_(0.1 / (step + 1))
        # Parameters come and go, so that all counts change.
        present = params[step % 3 :] if step % 4 else params
        keys.clear()
        opt.zero_grad()
        opt.step(lambda: sum((w**3).sum() for w in present))
        steps.append(sorted(set(keys)))
    return steps


def main() -> None:
    launch.launch = norm.launch = note
    ops.BACKENDS["triton"] = ops.Backend(("cpu",), lambda: None, ops.BACKENDS["triton"].load)
    print(json.dumps({name: steps_of(name) for name in MEMBERS}))


if __name__ == "__main__":
    main()
