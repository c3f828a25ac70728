"""``python -m sassha_fused``: versions, devices and backends. ``python -m sassha_fused selftest``: conformance here."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from . import __version__, available_backends, selftest


def describe() -> None:
    """Prints what there is, and why what there is not is missing."""
    print(f"sassha_fused {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print("\ndevices")
    print(
        f"  cpu     {platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    for i in range(torch.cuda.device_count()):
        print(f"  cuda:{i}  {torch.cuda.get_device_name(i)}")
    print("\nbackends")
    for name, reason in available_backends().items():
        print(f"  {name:6}  {'available' if reason is None else f'not available: {reason}'}")
    print("\nCheck the kernels on this machine: python -m sassha_fused selftest")


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m sassha_fused", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("info", "selftest"), default="info")
    if parser.parse_args().command == "selftest":
        return selftest.main()
    describe()
    return 0


if __name__ == "__main__":
    sys.exit(main())
