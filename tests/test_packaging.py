"""What a user installs: one version, types, the promised names, one dependency, and no need of a compiler."""

import email
import json
import os
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import sassha_fused
from sassha_fused.version import __version__

ROOT = Path(__file__).resolve().parents[1]
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
    unwanted = ("CXX", "COVERAGE_", "PYTHONPATH", "SASSHA_")
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
    for folder in ("csrc", "sassha_fused"):
        shutil.copytree(ROOT / folder, directory / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))


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
    assert set(sassha_fused.__all__) == {"Sassha", "__version__", "available_backends", "running_stats_once"}
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
    done = run("setup.py", "build_ext", "--inplace", directory=tmp_path, CXX="false")
    assert done.returncode != 0
    assert "built _C" not in done.stdout
