"""What the machine under test has; the only place that skips a test."""

import functools
import importlib.util
import os
from types import ModuleType

import jax
import pytest

IS_GPU_REQUIRED = os.environ.get("JAX_FLASH_ATTN_REQUIRE_GPU") == "1"
"""Whether a skip counts as a failure: set where a GPU is known to be there."""

SM80 = (8, 0)
"""The compute capability that the portable kernel family starts at."""


@functools.cache
def cuda_devices() -> tuple[jax.Device, ...]:
    """Returns the CUDA devices that JAX can use, none when it has no CUDA backend."""
    try:
        return tuple(jax.devices("cuda"))
    except RuntimeError:
        return ()


def compute_capability(device: jax.Device) -> tuple[int, int]:
    """Returns a CUDA device's compute capability as (major, minor)."""
    major, minor = device.compute_capability.split(".")
    return int(major), int(minor)


def has_gpu(count: int = 1, capability: tuple[int, int] = (0, 0)) -> bool:
    """Returns whether there are `count` CUDA devices of `capability` or later."""
    capable = [d for d in cuda_devices() if compute_capability(d) >= capability]
    return len(capable) >= count


def require_gpu(count: int = 1, capability: tuple[int, int] = (0, 0)) -> None:
    """Skips the calling test unless `has_gpu(count, capability)`."""
    if not has_gpu(count, capability):
        major, minor = capability
        pytest.skip(
            f"needs {count} CUDA device(s) of compute capability {major}.{minor} or "
            f"later; JAX has {list(cuda_devices())}"
        )


def num_split_gpus() -> int:
    """Returns how many CUDA devices a test splits over: four, or two of fewer."""
    return 4 if has_gpu(4) else 2


def imported(module: str, package: str) -> ModuleType:
    """Returns a module; skips the calling test file where its package is missing."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}", allow_module_level=True)
    return importlib.import_module(module)


def has_family(family: str) -> bool:
    """Returns whether a kernel family runs here, or there is no GPU at all."""
    capabilities = {compute_capability(device) for device in cuda_devices()}
    return not family.startswith("sm90") or not capabilities or (9, 0) in capabilities


def require_family(family: str) -> None:
    """Skips the calling test unless a kernel family runs here."""
    if not has_family(family):
        pytest.skip(f"needs a GPU that runs the {family} kernels")
