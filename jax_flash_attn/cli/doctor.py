"""Tells what this installation has and checks it against the reference.

Lists versions, devices, driver, NVRTC, the kernel cache and the environment variables
in force, then runs forward and backward: the CUDA kernels in bfloat16 where JAX has a
CUDA GPU, the plain JAX path in float32 elsewhere. The exit status is 1 where a check
failed.
"""

import argparse
import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

import jax_flash_attn
from jax_flash_attn import _compat, _ffi, _support
from jax_flash_attn.cli import self_check

_JAX_PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: there is nothing to choose."""


def main(options: argparse.Namespace) -> int:
    """Prints the report; returns 0 where every check passed, else 1."""
    for name, text in _facts():
        print(f"{name:14} {text}", flush=True)
    print()
    return int(not _checks_pass())


def _facts() -> Iterator[tuple[str, str]]:
    folder = Path(jax_flash_attn.__file__).parent
    yield "jax_flash_attn", f"{jax_flash_attn.__version__} in {folder}"
    yield "JAX", f"{_versions()}; default backend {jax.default_backend()}"
    for device in jax.devices():
        yield f"  {device}", _describe(device)
    if _ffi.native is None:
        yield "native module", f"missing: {_ffi.native_missing}"
    else:
        yield "native module", str(_ffi.native.__file__)
        yield "driver", _or_reason(_driver)
        for device in _driver_devices():
            yield f"  {device['ordinal']}", _describe_native(device)
        yield "NVRTC", _or_reason(_nvrtc)
        yield "kernel cache", _cache()
    yield "JAX's cache", _compilation_cache()
    variables = [f"{name}={value}" for name, value in _ffi.environment().items()]
    yield "environment", " ".join(variables) or "no variable of the library is set"
    hint = _gpu_hint()
    if hint:
        yield "note", hint


def _versions() -> str:
    versions = []
    for name in _JAX_PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(versions)


def _describe(device: jax.Device) -> str:
    capability = getattr(device, "compute_capability", None)
    suffix = f", compute capability {capability}" if capability else ""
    return f"{device.device_kind}{suffix}"


def _describe_native(device: dict[str, Any]) -> str:
    major, minor = divmod(device["compute_capability"], 10)
    return (
        f"{device['name']}, compute capability {major}.{minor}, "
        f"{device['multiprocessors']} multiprocessors, kernels for "
        f"{device['architecture']}"
    )


def _or_reason(text: Callable[[], str]) -> str:
    try:
        return text()
    except (RuntimeError, NotImplementedError) as error:
        return f"none: {error}"


def _driver() -> str:
    major, rest = divmod(_ffi.native.driver_version(), 1000)
    return f"for CUDA up to {major}.{rest // 10}"


def _nvrtc() -> str:
    found = _ffi.native.nvrtc()
    return f"{found['version']}, {found['path']}"


def _cache() -> str:
    cache = _ffi.native.cache()
    if not cache["enabled"]:
        where = f"{cache['directory']}: " if cache["directory"] else ""
        return f"off: {where}{cache['reason_disabled']}"
    size = cache["bytes"] / 2**20
    return f"{cache['directory']}: {cache['entries']} kernels, {size:.1f} MiB"


def _compilation_cache() -> str:
    """Where JAX keeps compiled programs, and which of ours it can't find again."""
    directory = getattr(jax.config, "jax_compilation_cache_dir", None)
    if not directory:
        return "off: JAX_COMPILATION_CACHE_DIR is not set"
    if not _compat.needs_cache_key_option():
        return str(directory)
    return (
        f"{directory}; misses programs that automatic sharding splits on Auto mesh "
        f"axes, unless {_compat.CACHE_KEY_OPTION.upper()}=1 is set (docs/sharding.md)"
    )


def _driver_devices() -> list[dict[str, Any]]:
    """The driver's devices; none where it, or NVRTC, is missing."""
    try:
        devices: list[dict[str, Any]] = _ffi.native.devices()
    except (RuntimeError, NotImplementedError):
        return []
    return devices


def _gpu_hint() -> str:
    """What to do where the driver has a GPU and JAX does not use it."""
    if _ffi.native is None or _support.on_gpu() or not _driver_devices():
        return ""
    extra = "cuda13" if _ffi.native.driver_version() >= 13000 else "cuda12"
    return (
        f'the driver has a GPU and JAX does not use it: pip install "jax[{extra}]", '
        "and leave JAX_PLATFORMS unset"
    )


def _checks_pass() -> bool:
    on_gpu = _support.on_gpu()
    obstacle = _support.machine_obstacle() if on_gpu else None
    if obstacle:
        print(f"FAIL  the kernels cannot run here: {obstacle}")
    use_kernels = on_gpu and not obstacle
    print(
        "Self-check of the CUDA kernels in bfloat16:"
        if use_kernels
        else "Self-check of the plain JAX path in float32:"
    )
    passed = obstacle is None
    for verdict in self_check.run("cuda" if use_kernels else "jax"):
        print(verdict, flush=True)
        passed &= verdict.passed
    print("All checks passed." if passed else "A check FAILED.")
    return passed
