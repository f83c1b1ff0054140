"""The native module and the custom calls: what the rest of the package sees of them."""

import dataclasses
import functools
import importlib.resources
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jax_flash_attn import _spec, _version

try:
    import jax_flash_attn._native as _native
except ImportError as error:
    native: Any = None
    native_missing = (
        "the native module jax_flash_attn._native cannot be imported "
        f"({error}): install jax_flash_attn on Linux x86-64 or aarch64 with a C++ "
        "compiler"
    )
else:
    native = _native
    native_missing = ""

FORWARD_TARGET = "flash_attention_forward"
BACKWARD_TARGET = "flash_attention_backward"
EMPTY_TARGET = "flash_attention_empty"

# Every environment variable of the library, read here and once (README.md lists them).
CACHE_DIRECTORY_VARIABLE = "JAX_FLASH_ATTN_CACHE_DIR"
NVRTC_PATH_VARIABLE = "JAX_FLASH_ATTN_NVRTC_PATH"
DUMP_DIRECTORY_VARIABLE = "JAX_FLASH_ATTN_DUMP_DIR"
_VARIABLES = (
    CACHE_DIRECTORY_VARIABLE,
    NVRTC_PATH_VARIABLE,
    DUMP_DIRECTORY_VARIABLE,
    "XDG_CACHE_HOME",
    "CUDA_HOME",
    "CUDA_PATH",
)


def attributes(spec: _spec.AttentionSpec) -> dict[str, Any]:
    """The attributes of a custom call: the fields of the spec, by name."""
    return dataclasses.asdict(spec)


def forward_call(
    operands: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    spec: _spec.AttentionSpec,
) -> list[jax.Array]:
    """Emits the forward custom call."""
    call = jax.ffi.ffi_call(FORWARD_TARGET, list(results))
    return list(call(*operands, **attributes(spec)))


def backward_call(
    operands: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    spec: _spec.AttentionSpec,
    has_dlse: bool,
) -> list[jax.Array]:
    """Emits the backward custom call."""
    call = jax.ffi.ffi_call(BACKWARD_TARGET, list(results))
    return list(call(*operands, **attributes(spec), has_dlse=has_dlse))


def empty_call(
    operands: Sequence[jax.Array], results: Sequence[jax.ShapeDtypeStruct]
) -> list[jax.Array]:
    """Emits a custom call that leaves its results as they are, on a GPU or a CPU.

    It costs what any custom call of these operands and results costs.
    """
    call = jax.ffi.ffi_call(EMPTY_TARGET, list(results))
    return list(call(*operands))


def cache_directory() -> str:
    """Where compiled kernels are kept; empty when the cache is switched off."""
    chosen = os.environ.get(CACHE_DIRECTORY_VARIABLE)
    if chosen == "0":
        return ""
    if chosen:
        return str(Path(chosen).expanduser().absolute())
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:  # a user without a home directory
        return ""
    return str(root / "jax_flash_attn")


def environment() -> dict[str, str]:
    """The environment variables that the library heeds, as far as they are set."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def nvrtc_directories() -> list[str]:
    """Folders of the NVIDIA wheels that hold NVRTC, newest CUDA first."""
    found = []
    for package in ("nvidia.cu13", "nvidia.cuda_nvrtc"):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for location in (spec and spec.submodule_search_locations) or ():
            found.append(str(Path(location) / "lib"))
    return found


@functools.cache
def initialize() -> None:
    """Configures the native module and registers the custom calls, once."""
    if native is None:
        return
    native.configure(
        kernel_directory=str(importlib.resources.files("jax_flash_attn.kernels")),
        cache_directory=cache_directory(),
        nvrtc_path=os.environ.get(NVRTC_PATH_VARIABLE, ""),
        nvrtc_directories=nvrtc_directories(),
        dump_directory=os.environ.get(DUMP_DIRECTORY_VARIABLE, ""),
        version=_version.__version__,
    )
    for target, stages in native.registrations().items():
        jax.ffi.register_ffi_target(target, stages, platform="CUDA")
        if target == EMPTY_TARGET:
            jax.ffi.register_ffi_target(target, stages, platform="cpu")


initialize()
