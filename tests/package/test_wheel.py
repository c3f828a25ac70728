"""The wheel with its compiled halves: what it is called, what is in it, and that it works where it is installed."""

import collections
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.bytes import kernels
from bench.sass import NO_TOOL, demangled, find_cuobjdump, shown
from sassha_fused.ops import NAMES
from sassha_fused.version import __version__
from tests.support.turns import turn

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
KERNEL_SOURCES = len(list((ROOT / "csrc" / "cuda").glob("*.cu")))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not list((ROOT / "sassha_fused").glob("_C*.so")),
        reason="_C was not built: a wheel would compile it for minutes",
    ),
]

Ask = Callable[[str], Any]


def run(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command; what the environment says of compilers stays, so that objects in build/ serve again."""
    unwanted = ("COVERAGE_", "PYTHONPATH", "SASSHA_FUSED_BACKEND")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made as make wheel does it, from the objects in build/; all else goes elsewhere, so nothing stale is left."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(directory)]
    command += ["build", "--build-lib", str(directory / "lib")]
    # Built once is enough; the second time other flags would compile _C anew.
    command += [
        "bdist_wheel",
        "--skip-build",
        "--bdist-dir",
        str(directory / "bdist"),
        "--dist-dir",
        str(directory / "dist"),
    ]
    with turn(ROOT / "build"):
        run(command, ROOT)
    (built,) = (directory / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def libraries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """_C and, where nvcc is, _cuda, as they lie in the wheel."""
    directory = tmp_path_factory.mktemp("libraries")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        return {Path(name).name.partition(".")[0]: Path(archive.extract(name, directory)) for name in names}


@pytest.fixture(scope="module")
def cuda(libraries: dict[str, Path]) -> Path:
    if "_cuda" not in libraries:
        pytest.skip("the wheel is without _cuda: nvcc is not here, or SASSHA_FUSED_CUDA=0")
    return libraries["_cuda"]


@pytest.fixture(scope="module")
def cuobjdump(cuda: Path) -> Callable[..., str]:
    """What cuobjdump prints of _cuda."""
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip(NO_TOOL)
    return lambda *options, directory=ROOT: run([tool, *options, str(cuda)], directory).stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """ask(code) runs code where the wheel is installed beside this torch, and returns the JSON that it prints."""
    directory = tmp_path_factory.mktemp("installed")
    venv, elsewhere = directory / "venv", directory / "elsewhere"
    elsewhere.mkdir()
    run([sys.executable, "-m", "venv", "--without-pip", str(venv)], directory)
    python = str(venv / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], directory)
    # Only now: pip would take what lies there for its own. A .pth file in those folders does not count in this one.
    site_packages = Path(json.loads(run([python, "-c", _SITE_PACKAGES], directory).stdout))
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "torch.pth").write_text("\n".join(shared))
    return lambda code: json.loads(run([python, "-c", code], elsewhere).stdout)


_SITE_PACKAGES = "import json, sysconfig; print(json.dumps(sysconfig.get_path('purelib')))"

_REGISTERED = f"""
def registered(key):
    name = "sassha_fused::{{}}".format
    return [torch._C._dispatch_has_kernel_for_dispatch_key(name(operator), key) for operator in {NAMES}]
"""


def test_one_wheel_serves_every_python_from_3_10_on(wheel: Path) -> None:
    assert re.fullmatch(rf"sassha_fused-{re.escape(__version__)}-cp310-abi3-\w+\.whl", wheel.name)


def test_every_file_of_the_package_is_in_the_wheel_and_nothing_else(wheel: Path, libraries: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "sassha_fused"
    expected = {path.relative_to(ROOT).as_posix() for path in [*package.rglob("*.py"), package / "py.typed"]}
    expected |= {f"sassha_fused/triton_kernels/{path.name}" for path in (ROOT / "triton_kernels").glob("*.py")}
    assert found == expected | {f"sassha_fused/{library.name}" for library in libraries.values()}
    assert {library.name for library in libraries.values()} <= {"_C.abi3.so", "_cuda.abi3.so"}


def test_the_triton_kernels_load_from_where_the_wheel_is_installed(installed: Ask) -> None:
    pytest.importorskip("triton")
    # Interpreted, as conftest.py says in the environment, or on a GPU.
    backends = "import json, sassha_fused; print(json.dumps(sassha_fused.available_backends()))"
    assert installed(backends)["triton"] is None


def test_every_kernel_is_there_for_every_architecture(cuobjdump: Callable[..., str]) -> None:
    if "TORCH_CUDA_ARCH_LIST" in os.environ:
        pytest.skip("TORCH_CUDA_ARCH_LIST chooses other architectures")
    found = collections.defaultdict(set)
    architecture = ""
    for line in cuobjdump("-res-usage").splitlines():
        if matched := re.match(r"arch = (\w+)", line):
            architecture = matched[1]
        elif matched := re.match(r" Function (\w+):", line):
            found[architecture].add(shown(demangled(matched[1])))
    assert found == {architecture: {shown(kernel) for kernel in kernels()} for architecture in ARCHITECTURES}


def test_ptx_is_there_for_the_architectures_to_come(cuobjdump: Callable[..., str]) -> None:
    if "TORCH_CUDA_ARCH_LIST" in os.environ:
        pytest.skip("TORCH_CUDA_ARCH_LIST chooses other architectures")
    targets = re.findall(r"\.(sm_\w+)\.ptx$", cuobjdump("-lptx"), re.MULTILINE)
    assert collections.Counter(targets) == {"sm_120": KERNEL_SOURCES}


def folders_in(contents: bytes) -> list[str]:
    """Folders of this machine that stand in a file."""
    folders = {ROOT, Path(sys.prefix), Path(sysconfig.get_path("purelib"))}
    if nvcc := shutil.which("nvcc"):
        folders.add(Path(nvcc).resolve().parents[1])
    # Not / or /usr, which are the same everywhere.
    folders = {folder for folder in folders if len(folder.parts) > 2} | ({Path.home()} - {Path("/")})
    return sorted(str(folder) for folder in folders if f"{folder}/".encode() in contents)


def test_no_folder_of_the_building_machine_is_in_the_libraries(libraries: dict[str, Path]) -> None:
    assert {name: found for name, library in libraries.items() if (found := folders_in(library.read_bytes()))} == {}


def test_no_folder_of_the_building_machine_is_in_the_machine_code(
    cuobjdump: Callable[..., str], tmp_path: Path
) -> None:
    # Compressed in the library.
    cuobjdump("-xelf", "all", directory=tmp_path)
    cuobjdump("-xptx", "all", directory=tmp_path)
    extracted = sorted(tmp_path.iterdir())
    assert len(extracted) > KERNEL_SOURCES
    assert {path.name: found for path in extracted if (found := folders_in(path.read_bytes()))} == {}


def test_the_installed_optimizer_takes_a_step(installed: Ask) -> None:
    backends, file, base = installed(
        """
import json, sys, torch, sassha_fused
w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
optimizer = sassha_fused.Sassha([w], lr=0.1)
before = optimizer.step(lambda: (w**4).sum())
assert (w**4).sum() < before
print(json.dumps([sassha_fused.available_backends(), sassha_fused.__file__, sys.prefix]))
"""
    )
    assert Path(base) in Path(file).parents
    assert backends["cpu"] is None and backends["eager"] is None


def test_importing_it_imports_no_more_of_torch_than_torch_did(installed: Ask) -> None:
    imported = installed(
        """
import json, sys, torch
before = set(sys.modules)
import sassha_fused
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    )
    heavy = ("torch._dynamo", "torch._inductor", "triton", "numpy")
    assert [name for name in imported if name.startswith(heavy)] == []


def test_the_cuda_kernels_are_not_loaded_before_they_are_needed(installed: Ask) -> None:
    after_import, after_use, has_cuda = installed(
        "import json, torch, sassha_fused"
        + _REGISTERED
        + """
after_import = any(registered("CUDA"))
sassha_fused.available_backends()
print(json.dumps([after_import, any(registered("CUDA")), torch.version.cuda is not None]))
"""
    )
    assert not after_import
    assert after_use == has_cuda


def test_the_cuda_kernels_load_in_any_torch(installed: Ask, cuda: Path) -> None:
    on_cpu, on_cuda = installed(
        "import json, torch, sassha_fused, pathlib"
        + _REGISTERED
        + f"""
torch.ops.load_library(pathlib.Path(sassha_fused.__file__).parent / "{cuda.name}")
print(json.dumps([registered("CPU"), registered("CUDA")]))
"""
    )
    assert on_cpu == on_cuda == [True] * len(NAMES)
