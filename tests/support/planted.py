"""A plugin of pytest: the Triton kernels are those of a copy that an environment variable names (tests only)."""

import os
import sys

import sassha_fused
from tests.support.faults import KERNELS_VARIABLE

assert "sassha_fused.triton_kernels" not in sys.modules, "the repository's own are loaded already"
sassha_fused.__path__.insert(0, os.environ[KERNELS_VARIABLE])
