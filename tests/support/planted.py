"""A plugin of pytest: the Triton kernels are those of a copy that an environment variable names (tests only)."""

import os
import sys

import sassha_fused

VARIABLE = "SASSHA_TEST_TRITON_KERNELS"

assert "sassha_fused.triton_kernels" not in sys.modules, "the repository's own are loaded already"
sassha_fused.__path__.insert(0, os.environ[VARIABLE])
