"""Times attention beside other libraries, from a checkout of the project.

All arguments go to the harness in benchmarks/: `bench --help` lists them.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import jax_flash_attn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: the harness parses its own arguments."""


def main(options: argparse.Namespace) -> int:
    """Runs the harness; returns its exit status, 1 where it is not there."""
    return run_from_checkout("benchmarks.run", options.arguments)


def run_from_checkout(module: str, arguments: Sequence[str]) -> int:
    """Runs a module's `main(arguments)`; returns its status, 1 without a checkout."""
    root = checkout()
    if root is None:
        print(
            "The benchmarks are not part of the installed package. In a checkout of "
            'the project run: pip install -e ".[bench]" && python -m jax_flash_attn '
            "bench (or tune)",
            file=sys.stderr,
        )
        return 1
    if str(root) not in sys.path:
        sys.path.append(str(root))
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        print(
            f'{error}. The benchmarks need: pip install -e ".[bench]"', file=sys.stderr
        )
        return 1
    status: int = found.main(arguments)
    return status


def checkout() -> Path | None:
    """The checkout that the package is run from, or None."""
    root = Path(jax_flash_attn.__file__).resolve().parents[1]
    # Some packages leave a `benchmarks` of theirs in site-packages.
    is_ours = (root / "csrc").is_dir() and (root / "benchmarks" / "run.py").is_file()
    return root if is_ours else None
