"""Memory held by an optimizer."""

from collections.abc import Iterator, Mapping
from types import ModuleType

import torch
from torch import Tensor


def state_bytes(optimizer: object, parameters: list[Tensor]) -> int:
    """Bytes of all tensors reachable from the optimizer, but for parameters and gradients; views count once."""
    theirs = {id(tensor) for parameter in parameters for tensor in (parameter, parameter.grad)}
    storages = {}
    for tensor in _tensors(optimizer, set()):
        if id(tensor) not in theirs:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(item: object, seen: set[int]) -> Iterator[Tensor]:
    if id(item) in seen or isinstance(item, (type, ModuleType, torch.nn.Module, str, bytes)):
        return
    seen.add(id(item))
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from _tensors(value, seen)
    elif isinstance(item, (list, tuple, set)):
        for value in item:
            yield from _tensors(value, seen)
    else:
        for value in list(getattr(item, "__dict__", {}).values()):
            yield from _tensors(value, seen)
        for name in getattr(type(item), "__slots__", ()):
            yield from _tensors(getattr(item, name, None), seen)
