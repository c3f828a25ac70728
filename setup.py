"""Builds sassha_fused._C, the operators' schemas and CPU kernels. Everything else stands in pyproject.toml.

Without a C++ compiler the install goes through without _C, and says so; a compiler that fails is an error.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    # Every backend rounds alike: no fused multiply-add that the source does not ask for.
    "-ffp-contract=off",
    # Neither changes a result; both let loops with square roots and selections vectorise.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # torch's headers have some.
    "-Wno-unused-parameter",
    # Error messages name csrc/..., not a folder of the machine that built the wheel.
    f"-ffile-prefix-map={os.getcwd()}/=",
    # The stable ABI of torch 2.10: a wheel built against a later torch loads in every one from 2.10 on.
    "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
]

NOT_BUILT = """
sassha_fused: *** NOT BUILT: _C, the fused C++ kernels for CPU tensors ***
sassha_fused: why: {reason}
sassha_fused: the package installs and works all the same, slower: every operator runs in plain torch (backend "eager").
"""


def find_compiler() -> str | None:
    return os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)


def extension_arguments(compiler: str) -> dict[str, object]:
    try:
        from torch import __version__ as torch_version
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ModuleNotFoundError as error:
        sys.exit(f"sassha_fused: the build needs the installed torch ({error}): pip install with --no-build-isolation")

    sources = ["csrc/schema.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]

    class Build(BuildExtension):
        def run(self) -> None:
            super().run()
            print(f"sassha_fused: built _C, the fused C++ kernels for CPU tensors ({compiler}, torch {torch_version})")

    # One compiler for compiling and linking, and the ninja that pip installed beside this Python.
    os.environ["CXX"] = compiler
    os.environ["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    extension = CppExtension(
        "sassha_fused._C",
        sources,
        include_dirs=[os.path.abspath("csrc")],
        depends=sorted(map(str, Path("csrc").rglob("*.h"))),
        extra_compile_args=COMPILE_FLAGS,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


compiler = find_compiler()
if sys.platform == "win32":
    reason = "there is no build for Windows yet"
elif compiler is None:
    reason = "no C++ compiler was found (c++, g++, clang++, or CXX in the environment)"
else:
    reason = None

if reason:
    print(NOT_BUILT.format(reason=reason), file=sys.stderr)
    setup()
else:
    setup(**extension_arguments(compiler))
