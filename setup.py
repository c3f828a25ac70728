"""Builds the compiled halves of sassha_fused; everything else stands in pyproject.toml.

_C: the operators' schemas and CPU kernels. Without a C++ compiler the install goes through without it, and says so.
_cuda: the CUDA kernels, wherever nvcc is, also with a CPU build of torch and without a GPU.

A compiler that fails is an error. Read from the environment: CXX; SASSHA_FUSED_CUDA=0 leaves _cuda out, =1 makes its
absence an error; TORCH_CUDA_ARCH_LIST, such as "8.0 9.0+PTX", chooses its targets; CUDA_HOME says where nvcc is.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

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

NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    # As -ffp-contract=off above.
    "-fmad=false",
    # A kernel's 32 KiB of arguments make 32 KiB of zeros in every cubin.
    "-Xfatbin=-compress-all",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Icsrc",
]
# Kernel arguments of 32,764 bytes.
OLDEST_NVCC = (12, 1)
DEFAULT_ARCHITECTURES = "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"

NOT_BUILT = """
sassha_fused: *** NOT BUILT: {what} ***
sassha_fused: why: {reason}
sassha_fused: the package installs and works all the same, slower: {instead}.
"""
CPU_KERNELS = "_C, the fused C++ kernels for CPU tensors"
CUDA_KERNELS = "_cuda, the fused kernels for CUDA tensors"


def find_compiler() -> str | None:
    return os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)


class NoCuda(Exception):
    """Why _cuda is not built."""


def find_nvcc() -> tuple[str, str]:
    """nvcc and its version; NoCuda where there is none to build with."""
    if os.environ.get("SASSHA_FUSED_CUDA") == "0":
        raise NoCuda("SASSHA_FUSED_CUDA=0 asks for that")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if nvcc is None:
        raise NoCuda(f"nvcc was not found (tried: {', '.join(places)}); install the CUDA toolkit, or set CUDA_HOME")
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", printed)
    if version is None or tuple(map(int, version.groups())) < OLDEST_NVCC:
        found = version[0] if version else printed.strip()
        raise NoCuda(f"{nvcc} is too old ({found}): the kernels need CUDA {'.'.join(map(str, OLDEST_NVCC))} or later")
    return nvcc, ".".join(version.groups())


def architecture_flags(nvcc: str) -> list[str]:
    """What TORCH_CUDA_ARCH_LIST asks for, or all that we support and this nvcc knows."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    flags = []
    for item in re.split(r"[\s;,]+", (asked or DEFAULT_ARCHITECTURES).strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", item)
        if match is None:
            sys.exit(f'sassha_fused: TORCH_CUDA_ARCH_LIST: {item!r} is no architecture, such as "9.0" or "12.0+PTX"')
        if int(match[1]) < 7:
            sys.exit(f"sassha_fused: TORCH_CUDA_ARCH_LIST: {item} is too old, the kernels need 7.0 or later")
        number = match[1] + match[2]
        if f"compute_{number.rstrip('af')}" not in listed:
            if asked:
                sys.exit(
                    f"sassha_fused: TORCH_CUDA_ARCH_LIST: {nvcc} does not know {item}; it knows {' '.join(listed)}"
                )
            continue
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not asked and "code=compute_" not in flags[-1]:
        # An older nvcc: PTX of the last architecture it knows serves those that came after.
        flags.append(re.sub(r"code=sm_", "code=compute_", flags[-1]))
    return flags


def run(command: Sequence[str]) -> None:
    print(*command, flush=True)
    if subprocess.run(command).returncode != 0:
        sys.exit(f"sassha_fused: {command[0]} failed; SASSHA_FUSED_CUDA=0 builds without the CUDA kernels")


def build_cuda(nvcc: str, architectures: Sequence[str], compiler: str, library: Path, objects: Path) -> None:
    """Compiles what changed, and links it: kernels by nvcc, without torch's headers; the glue by the C++ compiler."""
    # Not torch's CUDAExtension: it refuses a CPU build of torch.
    from torch.utils.cpp_extension import include_paths, library_paths

    host = ["-ccbin", compiler.split()[0]]
    headers = [*Path("csrc").rglob("*.h"), Path("setup.py")]
    newest_header = max(path.stat().st_mtime for path in headers)
    includes = [f"-isystem{path}" for path in include_paths()]

    def compile_one(source: Path) -> str:
        output = objects / f"{source.name}.o"
        if source.suffix == ".cu":
            command = [nvcc, *NVCC_FLAGS, *architectures, *host]
        else:
            command = [*compiler.split(), *COMPILE_FLAGS, "-DUSE_CUDA", "-fPIC", "-Icsrc", *includes]
        command += ["-c", str(source), "-o", str(output)]
        # The command stands beside the object: other targets or flags make another object.
        made_by = output.with_suffix(".command")
        written = made_by.read_text() if made_by.exists() else None
        fresh = output.exists() and output.stat().st_mtime > max(newest_header, source.stat().st_mtime)
        if not fresh or written != " ".join(command):
            made_by.unlink(missing_ok=True)
            run(command)
            made_by.write_text(" ".join(command))
        return str(output)

    objects.mkdir(parents=True, exist_ok=True)
    sources = sorted(path for path in Path("csrc/cuda").iterdir() if path.suffix in (".cu", ".cpp"))
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        compiled = list(pool.map(compile_one, sources))
    library.parent.mkdir(parents=True, exist_ok=True)
    torch_libraries = [f"-L{path}" for path in library_paths()]
    # Entries for libtorch, as needed or not: without them the library does not load.
    torch_libraries += ["-Xlinker=--no-as-needed,-ltorch,-ltorch_cpu,--exclude-libs=ALL"]
    # Nothing here calls device code of another file; the step would leave an empty cubin and the link line's paths.
    run([nvcc, "-shared", "-cudart=static", "--no-device-link", *host, *compiled, *torch_libraries, "-o", str(library)])


def extension_arguments(compiler: str) -> dict[str, object]:
    try:
        from torch import __version__ as torch_version
        from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
    except ModuleNotFoundError as error:
        sys.exit(f"sassha_fused: the build needs the installed torch ({error}): pip install with --no-build-isolation")

    # Nor one in torch's headers.
    COMPILE_FLAGS.extend(f"-ffile-prefix-map={path}/=" for path in include_paths())
    extensions = [
        CppExtension(
            "sassha_fused._C",
            ["csrc/schema.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))],
            include_dirs=[os.path.abspath("csrc")],
            depends=sorted(map(str, Path("csrc").rglob("*.h"))),
            extra_compile_args=COMPILE_FLAGS,
            py_limited_api=True,
        )
    ]
    report = f"sassha_fused: built {CPU_KERNELS} ({compiler}, torch {torch_version})\n"
    try:
        nvcc, nvcc_version = find_nvcc()
    except NoCuda as reason:
        if os.environ.get("SASSHA_FUSED_CUDA") == "1":
            sys.exit(f"sassha_fused: SASSHA_FUSED_CUDA=1, but _cuda cannot be built: {reason}")
        instead = 'operators on CUDA tensors run in Triton (backend "triton"), or without that in plain torch ("eager")'
        report += NOT_BUILT.format(what=CUDA_KERNELS, reason=reason, instead=instead)
    else:
        extensions.append(Extension("sassha_fused._cuda", [], py_limited_api=True))
        architectures = architecture_flags(nvcc)
        targets = re.findall(r",code=(\w+)", " ".join(architectures))
        report += f"sassha_fused: built {CUDA_KERNELS} (nvcc {nvcc_version}: {' '.join(targets)})"

    class Build(BuildExtension):
        def run(self) -> None:
            super().run()
            print(report, flush=True)

        def build_extension(self, extension: Extension) -> None:
            if extension.name != "sassha_fused._cuda":
                return super().build_extension(extension)
            library = Path(self.get_ext_fullpath(extension.name))
            build_cuda(nvcc, architectures, compiler, library, Path(self.build_temp) / "cuda")

    # One compiler for compiling and linking, and the ninja that pip installed beside this Python.
    os.environ["CXX"] = compiler
    os.environ["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    return {
        "ext_modules": extensions,
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

if reason and os.environ.get("SASSHA_FUSED_CUDA") == "1":
    sys.exit(f"sassha_fused: SASSHA_FUSED_CUDA=1, but _cuda cannot be built: {reason}")
elif reason:
    everything = (
        'every operator runs in plain torch (backend "eager"), on CUDA tensors in Triton where that is installed'
    )
    print(NOT_BUILT.format(what=CPU_KERNELS, reason=reason, instead=everything), file=sys.stderr)
    setup()
else:
    setup(**extension_arguments(compiler))
