"""What the optimizer may cost, and the bytes that a step cannot avoid moving. The one place for both."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    what: str
    limit: float
    unit: str = "x"
    at_least: bool = False
    aim: float | None = None

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        aim = f" (aim {self.aim:g})" if self.aim is not None else ""
        return f"{'>=' if self.at_least else '<='} {self.limit:g}{self.unit}{aim}"


BUDGETS = {
    "kernel, update_": Budget("update_, lazy, in cache, one thread: time of torch's fused AdamW kernel", 1.05),
    "kernel, check": Budget("the check of gradients, in cache, one thread: time of torch.sum", 1.3),
    "kernel, norm": Budget("grad_norm, in cache, one thread: time of torch.sum", 1.3),
    "GPT-2 small, loop": Budget("lazy step, GPT-2 small: speed-up over the per-tensor loop", 7, at_least=True, aim=8),
    "GPT-2 small, AdamW": Budget("lazy step, GPT-2 small: bytes/s of AdamW(fused)", 1.0, at_least=True),
    "ResNet-20, loop": Budget("lazy step, ResNet-20: speed-up over the per-tensor loop", 9, at_least=True),
    "ResNet-20, AdamW": Budget("lazy step, ResNet-20: time of AdamW(fused)", 0.85),
    "host 161": Budget("lazy step, 161 tensors of 8 elements: time of AdamW(fused)", 0.5),
    "host 1000": Budget("lazy step, 1000 tensors of 8 elements: time of AdamW(fused)", 0.5),
    "groups 161": Budget("lazy step, 161 tensors in 50 groups: time of one group", 1.1),
    "groups 1000": Budget("lazy step, 1000 tensors in 50 groups: time of one group", 1.1),
    "without perturbation": Budget("lazy step without perturbation, 1000 tensors: time of one with", 1.0),
    "CNN": Budget("whole training step, CNN, exact products, k = 10: time of SGD", 2.45),
    "transformer": Budget("whole training step, transformer, exact products, k = 10: time of SGD", 2.3),
    **{
        f"{member}, {model}": Budget(f"whole training step, {model}, {member}: time of {base}", limit)
        for member, base, limit in (
            ("M-Sassha", "SGD", 1.3),
            ("SAMSGD along the momentum", "SGD", 1.05),
            ("SAMAdamW along the momentum", "AdamW", 1.05),
        )
        for model in ("CNN", "transformer")
    },
    **{
        f"family, {model}, {kind}": Budget(f"the family, {model}, {kind}, worst row: time of the best by others", 1.0)
        for model in ("CNN", "transformer")
        for kind in ("optimizer's part", "whole step")
    },
    "import": Budget("import sassha_fused, beyond import torch", 100, " ms"),
    "memory, lazy": Budget("peak memory of a lazy step beyond parameters and gradients", 12, " bytes/parameter"),
    "memory, Hessian": Budget("peak memory of a Hessian step, its products included", 20, " bytes/parameter"),
}

# Bytes per fp32 parameter that one fused pass over each operand must read or write.
NORM_BYTES = 4  # g
PERTURB_BYTES = 16  # w, g -> backup, w'
CHECK_BYTES = 4  # g~
UPDATE_BYTES = 24  # backup, g~, m, D -> w, m
LAZY_BYTES = NORM_BYTES + PERTURB_BYTES + UPDATE_BYTES
HESSIAN_BYTES = 52  # the same, and update reads Hz and writes D
ADAMW_BYTES = 28  # w, g, m, v -> w, m, v
SGD_BYTES = 20  # w, g, m -> w, m

# What is really moved: the non-finite check reads g~ once more; a Hessian step also reads Hz so, and writes the signs.
LAZY_BYTES_MOVED = LAZY_BYTES + CHECK_BYTES
HESSIAN_BYTES_MOVED = HESSIAN_BYTES + 12
LAZY_BYTES_READ = 32  # of the bytes moved: g; w, g; g~ for the check; backup, g~, m, D
