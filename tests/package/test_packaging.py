"""What a user installs: one version, types, the promised names, one dependency, and no need of a compiler.

And how the build with compilers goes, with fake ones that only write down how they were called.
"""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest

import sassha_fused
from sassha_fused.version import __version__

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

FILES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")

# Runs in the unpacked wheel, and prints the backends after one step that must go down the hill.
ONE_STEP = """
import json, torch, sassha_fused
w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
optimizer = sassha_fused.Sassha([w], lr=0.1)
before = optimizer.step(lambda: (w**4).sum())
assert (w**4).sum() < before
print(json.dumps(sassha_fused.available_backends()))
"""


def run(*command: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs this Python, free of what the environment says of compiler, backend, path and coverage."""
    unwanted = ("CUDA_HOME", "CUDA_PATH", "CXX", "COVERAGE_", "PYTHONPATH", "SASSHA_", "TORCH_CUDA_ARCH_LIST")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return subprocess.run(
        [sys.executable, *command],
        cwd=directory,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def copy_sources(directory: Path) -> None:
    for file in FILES:
        shutil.copy(ROOT / file, directory)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("csrc", "sassha_fused", "triton_kernels"):
        shutil.copytree(ROOT / folder, directory / folder, ignore=ignored, symlinks=True)


@pytest.fixture(scope="module")
def build_without_compiler(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The wheel that a machine without a C++ compiler builds, and what the build printed."""
    directory = tmp_path_factory.mktemp("without_compiler")
    copy_sources(directory)
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    done = run("-c", build, directory=directory, PATH=str(directory))
    assert done.returncode == 0, done.stderr
    (wheel,) = (directory / "dist").glob("*.whl")
    return wheel, done.stdout + done.stderr


@pytest.fixture(scope="module")
def metadata(build_without_compiler: tuple[Path, str]) -> Message:
    with zipfile.ZipFile(build_without_compiler[0]) as wheel:
        return email.message_from_bytes(wheel.read(f"sassha_fused-{__version__}.dist-info/METADATA"))


def test_the_public_names_are_the_promised_ones() -> None:
    members = {"Sassha", "MSassha", "SAMSGD", "SAMAdamW", "AdaHessian", "SophiaH"}
    others = {"__version__", "available_backends", "data_parallel", "running_stats_once"}
    assert set(sassha_fused.__all__) == members | others
    assert all(hasattr(sassha_fused, name) for name in sassha_fused.__all__)


def test_the_version_stands_in_one_place(metadata: Message) -> None:
    assert sassha_fused.__version__ == metadata["Version"] == __version__
    places = [ROOT / "pyproject.toml", ROOT / "setup.py", *(ROOT / "sassha_fused").glob("*.py")]
    assert [path.name for path in places if f'"{__version__}"' in path.read_text()] == ["version.py"]


def test_the_changelog_tells_of_this_version() -> None:
    assert f"\n## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_torch_is_the_only_dependency(metadata: Message) -> None:
    assert [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line] == ["torch>=2.10"]
    assert metadata["Requires-Python"] == ">=3.10"


def test_the_types_are_shipped(build_without_compiler: tuple[Path, str]) -> None:
    assert "sassha_fused/py.typed" in zipfile.ZipFile(build_without_compiler[0]).namelist()


def test_without_a_compiler_the_build_succeeds_and_says_what_is_missing(
    build_without_compiler: tuple[Path, str],
) -> None:
    wheel, printed = build_without_compiler
    assert wheel.name == f"sassha_fused-{__version__}-py3-none-any.whl"
    assert "NOT BUILT: _C" in printed
    assert "no C++ compiler was found" in printed


def test_without_the_extension_the_optimizer_works_and_says_why_it_is_slower(
    build_without_compiler: tuple[Path, str], tmp_path: Path
) -> None:
    zipfile.ZipFile(build_without_compiler[0]).extractall(tmp_path)
    done = run("-c", ONE_STEP, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    backends = json.loads(done.stdout)
    assert backends["eager"] is None
    assert "_C" in backends["cpu"]


def test_a_compiler_that_fails_is_an_error(tmp_path: Path) -> None:
    copy_sources(tmp_path)
    done = run("setup.py", "build_ext", "--inplace", directory=tmp_path, CXX="false", SASSHA_FUSED_CUDA="0")
    assert done.returncode != 0
    assert "built _C" not in done.stdout


# Makes an empty file of what it is asked for, and writes its arguments into a file beside itself.
FAKE_COMPILER = """#!/bin/sh
echo "$@" >> "$0.calls"
case "$1" in
  --version) echo "{version}"; exit ;;
  --list-gpu-arch) printf "%s\\n" {architectures}; exit ;;
esac
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  shift
done
"""
NVCC_13 = "Cuda compilation tools, release 13.0, V13.0.88"
KNOWN_13 = ("75", "80", "86", "87", "88", "89", "90", "100", "103", "110", "120", "121")


def make_compiler(path: Path, version: str = "g++ 12.2.0", architectures: tuple[str, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = " ".join(f"compute_{number}" for number in architectures)
    path.write_text(FAKE_COMPILER.format(version=version, architectures=listed))
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources, and an empty folder "cuda" where a toolkit may be put, on a machine with a fake C++ compiler."""
    directory = tmp_path_factory.mktemp("fake_compilers")
    copy_sources(directory)
    make_compiler(directory / "c++")
    return directory


@pytest.fixture
def toolkit(sources: Path) -> Iterator[Path]:
    """An empty CUDA_HOME."""
    yield sources / "cuda"
    for folder in ("cuda", "build"):
        shutil.rmtree(sources / folder, ignore_errors=True)
    for library in (sources / "sassha_fused").glob("*.so"):
        library.unlink()


def build(sources: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ("setup.py", "build_ext", "--inplace")
    environment = {"CUDA_HOME": str(sources / "cuda"), "CXX": str(sources / "c++")} | environment
    return run(*command, directory=sources, **environment)


def targets(nvcc: Path) -> set[tuple[str, ...]]:
    """What nvcc was asked to compile for; one element if every file was compiled for the same."""
    calls = [call for call in Path(f"{nvcc}.calls").read_text().splitlines() if ".cu " in call and " -c " in call]
    assert len(calls) == len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    return {tuple(re.findall(r"arch=compute_\w+,code=(\w+)", call)) for call in calls}


def test_cuda_can_be_left_out_and_the_build_says_so(sources: Path, toolkit: Path) -> None:
    nvcc = make_compiler(toolkit / "bin" / "nvcc", NVCC_13, KNOWN_13)
    done = build(sources, SASSHA_FUSED_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "built _C" in done.stdout
    assert "NOT BUILT: _cuda" in done.stdout
    assert "why: SASSHA_FUSED_CUDA=0" in done.stdout
    assert [path.name for path in (sources / "sassha_fused").glob("*.so")] == ["_C.abi3.so"]
    assert not Path(f"{nvcc}.calls").exists()


def test_without_nvcc_the_build_says_what_is_missing_and_where_it_looked(sources: Path, toolkit: Path) -> None:
    done = build(sources)
    assert done.returncode == 0, done.stderr
    assert "built _C" in done.stdout
    assert "NOT BUILT: _cuda" in done.stdout
    assert f"nvcc was not found (tried: {toolkit}/bin/nvcc)" in done.stdout


def test_cuda_that_is_asked_for_is_an_error_without_nvcc(sources: Path, toolkit: Path) -> None:
    done = build(sources, SASSHA_FUSED_CUDA="1")
    assert done.returncode != 0
    assert "SASSHA_FUSED_CUDA=1, but _cuda cannot be built: nvcc was not found" in done.stderr
    assert not (sources / "build").exists()


def test_cuda_that_is_asked_for_is_an_error_without_a_compiler(sources: Path) -> None:
    done = run("setup.py", "build_ext", directory=sources, PATH=str(sources / "cuda"), SASSHA_FUSED_CUDA="1")
    assert done.returncode != 0
    assert "_cuda cannot be built: no C++ compiler was found" in done.stderr


def test_an_nvcc_that_is_too_old_is_named(sources: Path, toolkit: Path) -> None:
    nvcc = make_compiler(toolkit / "bin" / "nvcc", "Cuda compilation tools, release 11.8, V11.8.89", ("80", "90"))
    done = build(sources, SASSHA_FUSED_CUDA="1")
    assert done.returncode != 0
    assert f"{nvcc} is too old (release 11.8): the kernels need CUDA 12.1 or later" in done.stderr


def test_all_architectures_are_built_and_ptx_for_those_to_come(sources: Path, toolkit: Path) -> None:
    nvcc = make_compiler(toolkit / "bin" / "nvcc", NVCC_13, KNOWN_13)
    done = build(sources, SASSHA_FUSED_CUDA="1")
    assert done.returncode == 0, done.stderr
    supported = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120")
    assert targets(nvcc) == {supported}
    assert f"built _cuda, the fused kernels for CUDA tensors (nvcc 13.0: {' '.join(supported)})" in done.stdout
    assert (sources / "sassha_fused" / "_cuda.abi3.so").exists()


def test_an_older_nvcc_builds_what_it_knows_and_ptx_for_the_rest(sources: Path, toolkit: Path) -> None:
    known = tuple(number for number in KNOWN_13 if int(number) <= 90)
    nvcc = make_compiler(toolkit / "bin" / "nvcc", "Cuda compilation tools, release 12.4, V12.4.131", known)
    done = build(sources)
    assert done.returncode == 0, done.stderr
    assert targets(nvcc) == {("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "compute_90")}


@pytest.mark.parametrize(
    ("asked", "built"),
    [
        ("9.0", ("sm_90",)),
        ("8.0;9.0a 12.0+PTX", ("sm_80", "sm_90a", "sm_120", "compute_120")),
    ],
)
def test_the_architectures_can_be_chosen(sources: Path, toolkit: Path, asked: str, built: tuple[str, ...]) -> None:
    nvcc = make_compiler(toolkit / "bin" / "nvcc", NVCC_13, KNOWN_13)
    done = build(sources, TORCH_CUDA_ARCH_LIST=asked)
    assert done.returncode == 0, done.stderr
    assert targets(nvcc) == {built}
    assert f"(nvcc 13.0: {' '.join(built)})" in done.stdout


@pytest.mark.parametrize("asked", ["5.2", "9.0 6.1+PTX"])
def test_an_architecture_before_the_kernels_is_refused(sources: Path, toolkit: Path, asked: str) -> None:
    make_compiler(toolkit / "bin" / "nvcc", NVCC_13, ("52", "61", "90"))
    done = build(sources, TORCH_CUDA_ARCH_LIST=asked)
    assert done.returncode != 0
    assert f"TORCH_CUDA_ARCH_LIST: {asked.split()[-1]} is too old" in done.stderr


@pytest.mark.parametrize("asked", ["8.5", "9.0 13.0"])
def test_an_architecture_that_nvcc_does_not_know_is_refused_with_those_it_knows(
    sources: Path, toolkit: Path, asked: str
) -> None:
    nvcc = make_compiler(toolkit / "bin" / "nvcc", NVCC_13, KNOWN_13)
    done = build(sources, TORCH_CUDA_ARCH_LIST=asked)
    assert done.returncode != 0
    known = " ".join(f"compute_{number}" for number in KNOWN_13)
    assert f"TORCH_CUDA_ARCH_LIST: {nvcc} does not know {asked.split()[-1]}; it knows {known}" in done.stderr


@pytest.mark.parametrize("asked", ["Hopper", "9"])
def test_what_is_no_architecture_is_refused_with_an_example(sources: Path, toolkit: Path, asked: str) -> None:
    make_compiler(toolkit / "bin" / "nvcc", NVCC_13, KNOWN_13)
    done = build(sources, TORCH_CUDA_ARCH_LIST=asked)
    assert done.returncode != 0
    assert f"TORCH_CUDA_ARCH_LIST: '{asked}' is no architecture, such as \"9.0\"" in done.stderr
