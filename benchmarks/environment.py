"""What a run ran on: device, driver, versions, commit."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from benchmarks.contenders import Contender

ROOT = Path(__file__).resolve().parents[1]

_PACKAGES = (
    "jax",
    "jaxlib",
    "jax-flash-attn",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)
_SMI_FIELDS = ("name", "driver_version", "power.limit", "clocks.max.sm")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions(contenders: Iterable[Contender]) -> dict[str, str]:
    names = {*_PACKAGES, *(c.distribution for c in contenders if c.distribution)}
    found = {}
    for name in sorted(names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _smi() -> dict[str, str]:
    query = f"--query-gpu={','.join(_SMI_FIELDS)}"
    answer = _output("nvidia-smi", query, "--format=csv,noheader")
    if not answer:
        return {}
    values = (value.strip() for value in answer.splitlines()[0].split(","))
    return dict(zip(_SMI_FIELDS, values, strict=False))


def describe(
    contenders: Iterable[Contender], module: str = "benchmarks.run"
) -> dict[str, Any]:
    """Returns a JSON object with all that a reader needs to judge a run's figures.

    Args:
        contenders: what is measured.
        module: what the command line runs.
    """
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "platform": device.platform,
        "runtime": " ".join(device.client.platform_version.split()),
        "nvidia_smi": _smi(),
        "python": platform.python_version(),
        "versions": _versions(contenders),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "command": ["python", "-m", module, *sys.argv[1:]],
    }
