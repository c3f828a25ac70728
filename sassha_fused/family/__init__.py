"""The optimizers, one file for each: constructor, equation, arguments, source."""

from .adahessian import AdaHessian
from .msassha import MSassha
from .samadamw import SAMAdamW
from .samsgd import SAMSGD
from .sassha import Sassha
from .sophiah import SophiaH

__all__ = ["SAMSGD", "AdaHessian", "MSassha", "SAMAdamW", "Sassha", "SophiaH"]
