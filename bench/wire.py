"""Prints the bytes that replicas under DistributedDataParallel reduce in each step, against what the method needs.

    python -m bench.wire

Counted by torch's profiler as the backend's collectives run, whoever calls them. The floor is a gradient for each pass,
in closure style one float32 by which the replicas agree on whether to skip the step, and on Hessian steps the Hessian
products, once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from bench.report import aligned
from sassha_fused import SAMSGD, AdaHessian, MSassha, SAMAdamW, Sassha, SophiaH, data_parallel
from tests.support.ranks import ranks

K = 3
WIDTH = 64
CONTENDERS: dict[str, tuple[Callable[..., Any], dict[str, Any], int]] = {  # constructor, options, passes
    "AdamW": (torch.optim.AdamW, {}, 1),
    "Sassha": (Sassha, {"hessian_interval": K}, 2),
    "MSassha": (MSassha, {"hessian_interval": K}, 1),
    "AdaHessian": (AdaHessian, {"hessian_interval": K}, 1),
    "SophiaH": (SophiaH, {"hessian_interval": K}, 1),
    "SAMSGD": (SAMSGD, {"lr": 0.1}, 2),
    "SAMAdamW": (SAMAdamW, {}, 2),
}
STEPS = 2 * K


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))


def gradient_bytes() -> int:
    return sum(param.numel() * param.element_size() for param in network().parameters())


def floor(name: str, step: int) -> int:
    """The bytes that a step has to reduce."""
    kind, options, passes = CONTENDERS[name]
    is_hessian_step = "hessian_interval" in options and step % K == 0
    agreement = 0 if kind is torch.optim.AdamW else 4
    return (passes + is_hessian_step) * gradient_bytes() + agreement


def bytes_of_steps(rank: int, name: str) -> list[int]:
    """The bytes that this rank hands to reductions in each step."""
    torch.manual_seed(0)
    kind, options, _ = CONTENDERS[name]
    model = DistributedDataParallel(network())
    opt = kind(model.parameters(), **options)
    if kind is not torch.optim.AdamW:
        data_parallel(model, opt)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = model(torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(rank))).square().mean()
        loss.backward()
        return loss

    counts = []
    for _ in range(STEPS):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            opt.step(closure)
        reductions = [event for event in recorded.events() if event.name == "gloo:all_reduce"]
        # Everything here is float32, which the profiler does not say.
        counts.append(sum(4 * torch.Size(shape).numel() for event in reductions for shape in event.input_shapes))
    return counts


def main() -> None:
    rows = [("", "lazy step", "floor", "Hessian step", "floor")]
    with ranks(2) as two:
        for name in CONTENDERS:
            counts, _ = two.run(bytes_of_steps, name)
            has_hessian = floor(name, 0) != floor(name, 1)
            lazy, hessian = (counts[K + 1], floor(name, K + 1)), (counts[K], floor(name, K))
            rows.append((name, *map(str, lazy), *(map(str, hessian) if has_hessian else ("-", "-"))))
    print(f"bytes reduced in a step by each of two replicas of {gradient_bytes() // 4} float32 parameters")
    print("\n".join(aligned(rows)))


if __name__ == "__main__":
    main()
