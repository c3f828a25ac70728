"""What Triton would compile in a training run, without a GPU: python -m tests.support.specializations.

Kernels are not interpreted here, and not launched either: for each launch, what Triton knows a compiled kernel by is
worked out. Prints a list of steps, each a list of these keys; from one to the next everything changes that may.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from sassha_fused import Sassha, ops
from sassha_fused.triton_kernels import launch, norm

STEPS = 100

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


def main() -> None:
    launch.launch = norm.launch = note
    ops.BACKENDS["triton"] = ops.Backend(("cpu",), lambda: None, ops.BACKENDS["triton"].load)
    rate = torch.tensor(0.1)
    params = [nn.Parameter(torch.ones(count)) for count in (1, 16, 17, 4096, 100_003)]
    # What is counted of a state stays the same.
    groups = [{"params": params[:3]}, {"params": params[3:], "bias_correction": "update"}]
    opt = Sassha(groups, backend="triton", hessian_interval=3, hessian_samples=2, lr=rate)
    steps = []
    for step in range(STEPS):
        for group in opt.param_groups:
            # 0, 1 and multiples of 16 are what Triton likes to compile anew for.
            group["lr"] = rate if step % 2 else 0.1 + step / 100
            group["betas"] = (step % 7 / 8, 1 - 1 / (2 + step))
            group["eps"], group["weight_decay"], group["rho"] = (0.0, 1.0, 16.0, 1e-4)[step % 4], step % 3, step / 10
            group["maximize"] = step % 5 == 0
        rate.fill_(0.1 / (step + 1))
        # Parameters come and go, so that all counts change.
        present = params[step % 3 :] if step % 4 else params
        keys.clear()
        opt.step(lambda: sum((w**3).sum() for w in present))
        steps.append(sorted(set(keys)))
    print(json.dumps(steps))


if __name__ == "__main__":
    main()
