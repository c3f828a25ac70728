"""The device's side of the numbers that come with a call: kernels read them by the names of sassha_fused/settings.py.

A field more is a line more here, and nothing in the arguments of a kernel.
"""

import triton
import triton.language as tl

from ..checks import ASCENTS, BIAS_CORRECTIONS, BLOCKS
from ..settings import DIRECTIONS, SECOND_AVERAGES, RowSettings, Settings

BETA1 = tl.constexpr(Settings._fields.index("beta1"))
BETA2 = tl.constexpr(Settings._fields.index("beta2"))
EPS = tl.constexpr(Settings._fields.index("eps"))
HESSIAN_POWER = tl.constexpr(Settings._fields.index("hessian_power"))
MAXIMIZE = tl.constexpr(Settings._fields.index("maximize"))
BIAS_CORRECTION = tl.constexpr(Settings._fields.index("bias_correction"))
ASCENT = tl.constexpr(Settings._fields.index("ascent"))
SECOND_AVERAGE = tl.constexpr(Settings._fields.index("second_average"))
DIRECTION = tl.constexpr(Settings._fields.index("direction"))
CLIP_THRESHOLD = tl.constexpr(Settings._fields.index("clip_threshold"))
DAMPENING = tl.constexpr(Settings._fields.index("dampening"))
NESTEROV = tl.constexpr(Settings._fields.index("nesterov"))

LR = tl.constexpr(RowSettings._fields.index("lr"))
WEIGHT_DECAY = tl.constexpr(RowSettings._fields.index("weight_decay"))
RHO = tl.constexpr(RowSettings._fields.index("rho"))
_ROW = tl.constexpr(len(RowSettings._fields))

# Values of those that are modes.
BY_STEP = tl.constexpr(BIAS_CORRECTIONS.index("step"))
UNCORRECTED = tl.constexpr(BIAS_CORRECTIONS.index("none"))
ALONG_MOMENTUM = tl.constexpr(ASCENTS.index("momentum"))
SQUARE = tl.constexpr(SECOND_AVERAGES.index("square"))
SIGNED = tl.constexpr(SECOND_AVERAGES.index("signed"))
IN_PLAIN_DIRECTION = tl.constexpr(DIRECTIONS.index("plain"))

# Its base-2 logarithm.
LONGEST_BLOCK = tl.constexpr(BLOCKS[-1].bit_length() - 1)


@triton.jit
def setting(settings, FIELD: tl.constexpr):
    """What all parameters of a call share of a field, in float64."""
    return tl.load(settings + FIELD)


@triton.jit
def row_setting(per_row, row, FIELD: tl.constexpr, inside=None):
    """What a row of per_row has in a field, in float64; of a block of rows only those inside are read."""
    return tl.load(per_row + row * _ROW + FIELD, mask=inside)
