"""Finds the fastest tiles for the device at hand, from a checkout of the project.

All arguments go to benchmarks/tune.py: `tune --help` lists them.
"""

import argparse

from jax_flash_attn.cli import bench


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: the tuner parses its own arguments."""


def main(options: argparse.Namespace) -> int:
    """Runs the tuner; returns its exit status, 1 where it is not there."""
    return bench.run_from_checkout("benchmarks.tune", options.arguments)
