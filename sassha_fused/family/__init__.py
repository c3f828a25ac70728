"""The optimizers, one file for each: constructor, equation, arguments, source."""

from .sassha import Sassha

__all__ = ["Sassha"]
