"""Parameter shapes of four well-known models, in the order in which their modules register them."""

from collections.abc import Iterator
from math import prod

Shape = tuple[int, ...]


def _batch_norm(channels: int) -> Iterator[Shape]:
    yield (channels,)
    yield (channels,)


_layer_norm = _batch_norm


def _linear(inputs: int, outputs: int) -> Iterator[Shape]:
    yield (outputs, inputs)
    yield (outputs,)


def _conv_norm(inputs: int, outputs: int, kernel: int) -> Iterator[Shape]:
    yield (outputs, inputs, kernel, kernel)
    yield from _batch_norm(outputs)


def _resnet20() -> Iterator[Shape]:
    """For CIFAR: shortcuts without parameters."""
    yield from _conv_norm(3, 16, 3)
    inputs = 16
    for width in (16, 32, 64):
        for _ in range(3):
            yield from _conv_norm(inputs, width, 3)
            yield from _conv_norm(width, width, 3)
            inputs = width
    yield from _linear(64, 10)


def _resnet50() -> Iterator[Shape]:
    """For ImageNet: a projection in the first block of each stage."""
    yield from _conv_norm(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from _conv_norm(inputs, width, 1)
            yield from _conv_norm(width, width, 3)
            yield from _conv_norm(width, 4 * width, 1)
            if block == 0:
                yield from _conv_norm(inputs, 4 * width, 1)
            inputs = 4 * width
    yield from _linear(2048, 1000)


def _transformer_block(width: int, transposed: bool) -> Iterator[Shape]:
    yield from _layer_norm(width)
    for inputs, outputs in ((width, 3 * width), (width, width)):
        yield (inputs, outputs) if transposed else (outputs, inputs)
        yield (outputs,)
    yield from _layer_norm(width)
    for inputs, outputs in ((width, 4 * width), (4 * width, width)):
        yield (inputs, outputs) if transposed else (outputs, inputs)
        yield (outputs,)


def _vit_small_32() -> Iterator[Shape]:
    """For 224 x 224 images: 49 patches and a class token."""
    width = 384
    yield (1, 1, width)
    yield (1, 50, width)
    yield (width, 3, 32, 32)
    yield (width,)
    for _ in range(12):
        yield from _transformer_block(width, transposed=False)
    yield from _layer_norm(width)
    yield from _linear(width, 1000)


def _gpt2_small() -> Iterator[Shape]:
    """The output layer is the token embedding; weights are stored (inputs, outputs)."""
    width = 768
    yield (50257, width)
    yield (1024, width)
    for _ in range(12):
        yield from _transformer_block(width, transposed=True)
    yield from _layer_norm(width)


def _checked(shapes: Iterator[Shape], tensors: int, parameters: int) -> tuple[Shape, ...]:
    listed = tuple(shapes)
    assert len(listed) == tensors, len(listed)
    assert count(listed) == parameters, count(listed)
    return listed


def count(shapes: tuple[Shape, ...]) -> int:
    """Number of parameters."""
    return sum(prod(shape) for shape in shapes)


MODELS: dict[str, tuple[Shape, ...]] = {
    "ResNet-20": _checked(_resnet20(), tensors=59, parameters=269_722),
    "ResNet-50": _checked(_resnet50(), tensors=161, parameters=25_557_032),
    "ViT-S/32": _checked(_vit_small_32(), tensors=152, parameters=22_878_952),
    "GPT-2 small": _checked(_gpt2_small(), tensors=148, parameters=124_439_808),
}
