"""Sassha and its family: sharpness-aware and second-order optimizers, each pass over the parameters a fused kernel."""

from .batch_norm import running_stats_once
from .family import SAMSGD, AdaHessian, MSassha, SAMAdamW, Sassha, SophiaH
from .ops import available_backends
from .processes import data_parallel
from .version import __version__

__all__ = [
    "SAMSGD",
    "AdaHessian",
    "MSassha",
    "SAMAdamW",
    "Sassha",
    "SophiaH",
    "__version__",
    "available_backends",
    "data_parallel",
    "running_stats_once",
]
