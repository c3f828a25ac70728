"""The operators in Triton, one file each: where no wheel of the CUDA kernels fits, on NVIDIA and AMD GPUs.

Same names, arguments and meaning as the schemas in csrc/schema.cpp; the arithmetic, operation for operation, is that of
csrc/math. With TRITON_INTERPRET=1 in the environment before this is imported they run on the CPU, slowly.
"""

from .block_average import block_average_
from .hutchinson import hutchinson_
from .launch import INTERPRETED
from .norm import grad_norm
from .perturb import perturb_
from .rademacher import rademacher_
from .update import update_

__all__ = ["INTERPRETED", "block_average_", "grad_norm", "hutchinson_", "perturb_", "rademacher_", "update_"]
