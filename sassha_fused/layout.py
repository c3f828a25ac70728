"""Where a parameter's elements lie: memory order where it is dense, row-major where it is not; and how its state is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# The types of devices that have no float64 at all.
WITHOUT_FLOAT64 = ("mps",)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in whatever order of dimensions."""
    return tensor.is_contiguous() or _fills_memory(tensor.shape, tensor.stride())


def _fills_memory(shape: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size == 1:
            continue
        if step != expected:
            return False
        expected *= size
    return True


def empty_dense(param: Tensor) -> Tensor:
    """An uninitialised tensor of the parameter's shape whose memory has the order of the parameter's elements."""
    memory_format = torch.preserve_format if is_dense(param) else torch.contiguous_format
    return torch.empty_like(param, memory_format=memory_format, requires_grad=False)


def view_of(flat: Tensor, offset: int, param: Tensor) -> Tensor:
    """The part of a flat buffer that belongs to a parameter, with its shape, element for element in its order."""
    return part_of(flat, offset, param.shape, param.stride())


def part_of(flat: Tensor, offset: int, shape: torch.Size, stride: Sequence[int]) -> Tensor:
    """The part that belongs to a parameter of this shape and these strides."""
    part = flat[offset : offset + shape.numel()]
    if not _fills_memory(shape, stride):
        return part.view(shape)
    return part.as_strided(shape, stride, part.storage_offset())


def flat_of(tensor: Tensor) -> Tensor:
    """The elements in a row, in the order of their memory where it is dense."""
    return tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.reshape(-1)


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's state, and of the arithmetic on it."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def has_memory(tensor: Tensor) -> bool:
    """Whether there are elements to work on: fake and meta tensors have a shape alone."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def lacks_float64(device: torch.device) -> bool:
    """Whether the device has no float64 at all."""
    return device.type in WITHOUT_FLOAT64


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest dtype of a device: of norms and of the numbers of a parameter."""
    return torch.float32 if lacks_float64(device) else torch.float64


def sent(device: torch.device, scalar: Tensor) -> Tensor:
    """A scalar on another device; waits for it only where it goes to the host, which may read it at once."""
    if lacks_float64(device) and scalar.dtype == torch.float64:
        scalar = scalar.float()
    return scalar.to(device, non_blocking=device.type != "cpu")


def block_index(element: int, block: int, blocked: int) -> int:
    """Where the flat state has the exp_hessian of an element: those below blocked share one by blocks."""
    return element // block if element < blocked else blocked // block + element - blocked


def layouts_of(params: Sequence[Tensor]) -> Tensor:
    """The dimensions, shape and strides of each, int64 ``[params, 1 + 2 most dimensions]`` on the CPU."""
    rows = [[param.dim(), *param.shape, *param.stride()] for param in params]
    width = max(map(len, rows), default=1)
    padded = [row + [0] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device="cpu").reshape(len(rows), width)


def check_layouts(params: Sequence[Tensor], layouts: Tensor, state: Tensor | None = None) -> None:
    """ValueError where one has another shape or other strides than layouts has, or is on another device than state."""
    if layouts.dtype != torch.int64 or layouts.dim() != 2 or not layouts.is_contiguous():
        raise ValueError(f"layouts must be a contiguous int64 matrix, got {layouts.dtype}, {tuple(layouts.shape)}")
    if len(layouts) != len(params):
        raise ValueError(f"layouts must have one row per tensor, {len(params)}, got {len(layouts)}")
    for i, (param, row) in enumerate(zip(params, layouts.tolist() if has_memory(layouts) else ())):
        if [param.dim(), *param.shape, *param.stride()] != row[: 1 + 2 * param.dim()]:
            raise ValueError(f"tensor {i} has another shape or other strides than when its state was made")
    for i, param in enumerate(params):
        if state is not None and (param.device != state.device or state_dtype(param) != state_dtype(state)):
            raise ValueError(f"tensor {i} is {param.dtype} on {param.device}, not as when its state was made")
