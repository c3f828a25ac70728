"""What the kernels, CUDA's and Triton's, must move per element, from the sizes of dtypes. The one place for it.

Each array that a kernel cannot avoid reading or writing once is a stream, given as its bytes per element. State
(exp_avg, exp_hessian, the Hessian estimate) is float64 beside float64 parameters and float32 beside all others.
"""

import functools
import itertools
from dataclasses import dataclass

SIZES = {"double": 8, "float": 4, "__nv_bfloat16": 2, "__half": 2}
KINDS = ("kSquareRoot", "kIdentity", "kGeneral", "kClipped", "kPlain")  # in the order of csrc/math/sassha.h

VECTOR_BYTES = 16

# As in csrc/cuda/platform.h and triton_kernels/launch.py.
QUICK_FLOAT64 = ("sm_70", "sm_80", "sm_90", "sm_100")

# A kernel's name without namespaces, and its template arguments.
Kernel = tuple[str, ...]


@dataclass(frozen=True)
class Traffic:
    """The streams of a kernel, and how its machine code holds them.

    Attributes:
        size: of a parameter's element; a vector has as many elements as make 16 bytes of it.
        reads, writes: bytes per element of each stream.
        vectors: how many vectors the unrolled loop body has, each with all streams.
        copies: vectors of parameters that the body of a second loop writes, in place of the first.
        per_copy: of how many it works out one.
        narrow: bytes per element of streams that are read, and others written, one element at a time: state by blocks.
        again: of streams that a loop of its own reads once more, where a sum in float32 was not enough.
    """

    size: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    vectors: int = 1
    copies: int = 0
    per_copy: int = 1
    narrow: tuple[int, ...] = ()
    again: tuple[int, ...] = ()

    @property
    def bytes_per_element(self) -> int:
        return sum(self.reads) + sum(self.writes)

    @property
    def elements(self) -> int:
        """How many elements the loop body serves."""
        return self.vectors * VECTOR_BYTES // self.size

    @property
    def vector_loads(self) -> int:
        """How many 16-byte loads make up all of that; more than one per vector of a wider stream."""
        return self.elements * sum(self.reads + self.again) // VECTOR_BYTES + self.copies * self.per_copy

    @property
    def vector_stores(self) -> int:
        return self.elements * sum(self.writes) // VECTOR_BYTES + self.copies

    def moved_per_element(self, vector_loads: int, vector_stores: int) -> float:
        """Bytes per element, if the machine code has this many 16-byte accesses."""
        others = self.copies * (self.per_copy + 1) + self.elements * sum(self.again) // VECTOR_BYTES
        return VECTOR_BYTES * (vector_loads + vector_stores - others) / self.elements


def state_size(size: int) -> int:
    return max(size, SIZES["float"])


def streams(
    name: str,
    size: int,
    *,
    lists: int = 1,
    first: bool = False,
    product: int | None = None,
    along: int | None = None,
    backup: bool = True,
    second: str | None = "read",
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes per element of each stream that a kernel reads, and of each that it writes.

    Args:
        size: of a parameter's element.
        lists: for squares_kernel, 2 where weights are read beside the gradients.
        first: for hutchinson_kernel, whether no estimate is there to be read.
        product: the size of a product's element, where there are products beside the gradients.
        along: for perturb_kernel, the size of what the perturbation points along, where that is not the gradient.
        backup: for perturb_kernel, whether the weights are saved.
        second: for update_kernel, what becomes of D: it is "read", or "written" too, which it is wherever there are
            products; None where there is none, or where it has its bytes by blocks (block_bytes).
    """
    state = state_size(size)
    products = () if product is None else (product,)
    match name:
        case "squares_kernel":  # gradients; weights beside them if adaptive
            return (size,) * lists, ()
        case "inspect_kernel":  # gradients, products
            return (size, *products), ()
        case "perturb_kernel":  # weights, gradients or m -> backup, weights
            return (size, along or size), (size,) * (2 if backup else 1)
        case "rademacher_kernel":  # -> signs
            return (), (size,)
        case "hutchinson_kernel":  # products, estimate (not of the first sample) -> estimate
            return (size,) if first else (size, state), (state,)
        case "block_average_kernel":  # products; beside these by blocks
            return (size,), ()
        # Backup (or weights, where there is none), gradients, m, D, products on a Hessian step -> weights, m, D on one.
        case "update_kernel" | "update_and_squares_kernel":
            read, written = second is not None, second == "written" or bool(products)
            return (size, size, state, *(state,) * read, *products), (size, state, *(state,) * written)
    raise KeyError(f"{name} is unknown here: add what it must move")


def block_bytes(name: str, size: int, *, averaged: bool = False) -> int:
    """Bytes that a kernel moves of each block of D: reads it, and if averaged writes it as well."""
    return state_size(size) * (2 if averaged or name == "block_average_kernel" else 1)


def quick_float64(architecture: str) -> bool:
    """Whether csrc/cuda sums the norm in float64 there: kQuickFloat64 of platform.h."""
    return architecture in QUICK_FLOAT64


def traffic(kernel: Kernel, quick_float64: bool = True) -> Traffic | None:
    """What a kernel of csrc/cuda moves, on a chip that is quick at float64 or not; None if it has no part per element.

    Raises:
        KeyError: it is none of kernels().
    """
    if kernel not in kernels():
        raise KeyError(f"{kernel} is unknown here: add what it must move")
    name, *arguments = kernel
    if name == "norm_kernel":
        return None
    p = SIZES[arguments[0]]
    state = state_size(p)
    # A warp's chunk of 512 elements is p vectors for each thread: 512 / 32 elements, 16 / p in a vector.
    chunk = p
    match name:
        case "squares_kernel":
            reads, writes = streams(name, p, lists=int(arguments[1]))
            again = () if quick_float64 or arguments[0] == "double" else reads
            return Traffic(p, reads, writes, vectors=min(chunk, 4), again=again)
        case "inspect_kernel":  # one list at a time
            return Traffic(p, *streams(name, p), vectors=min(chunk, 4))
        case "perturb_kernel":
            return Traffic(p, *streams(name, p, along=SIZES[arguments[1]]))
        case "rademacher_kernel" | "hutchinson_kernel":
            return Traffic(p, *streams(name, p), vectors=chunk)
        case "block_average_kernel":
            return Traffic(p, *streams(name, p), vectors=min(chunk, 4), narrow=(state,))
        # A skipped step writes the backup to the weights instead, or what it works out from m.
        case "update_kernel" | "update_and_squares_kernel":
            products, kind = arguments[1:]
            plain, lazy = kind == "kPlain", products == "void"
            second = None if plain else "read" if lazy else "written"
            return Traffic(
                p,
                *streams(name, p, product=SIZES.get(products), second=second),
                copies=1,
                per_copy=2 if p == state else 1,
                narrow=(state,) if lazy and not plain else (),
            )
    raise AssertionError(name)


@functools.cache
def kernels() -> set[Kernel]:
    """Every kernel that csrc/cuda promises, for every dtype."""
    found: set[Kernel] = {("norm_kernel",)}
    for dtype, size in SIZES.items():
        state = next(name for name, bytes_each in SIZES.items() if bytes_each == state_size(size))
        found |= {(f"{name}_kernel", dtype) for name in ("inspect", "rademacher", "hutchinson", "block_average")}
        found |= {("squares_kernel", dtype, lists) for lists in ("1", "2")}
        found |= {("perturb_kernel", dtype, *rest) for rest in ((dtype, "false"), (dtype, "true"), (state, "false"))}
        found |= {("update_kernel", dtype, *rest) for rest in itertools.product(("void", dtype, state), KINDS[:-1])}
        lazy = {("OfGradients", "kSquareRoot"), ("void", "kPlain")}
        found |= {("update_kernel", dtype, *rest) for rest in lazy}
        lazy |= {("void", kind) for kind in KINDS if kind != "kClipped"}
        found |= {("update_and_squares_kernel", dtype, *rest) for rest in lazy}
    return found
