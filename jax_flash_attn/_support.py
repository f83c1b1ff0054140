"""Whether a kernel can run a call, and if not, why not."""

import warnings

import jax
import jax.numpy as jnp

from jax_flash_attn import _ffi

MAX_HEAD_DIM = 256
# The kernels' capped score has an absolute error of softcap * 2**-23.
MAX_SOFTCAP = 1e4
OLDEST_COMPUTE_CAPABILITY = 8.0

_warned: set[str] = set()


def padded_head_dim(head_dim: int) -> int:
    """The head dim that the kernel sees: the next multiple of 8."""
    return -(-head_dim // 8) * 8


def call_obstacle(dtype: jnp.dtype, head_dim: int, softcap: float) -> str | None:
    """Why no kernel computes such calls on any device."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernels take bfloat16 and float16 inputs, got {jnp.dtype(dtype)}"
    if not 0 < head_dim <= MAX_HEAD_DIM:
        return f"the kernels take head dims from 1 to {MAX_HEAD_DIM}, got {head_dim}"
    if softcap > MAX_SOFTCAP:
        return f"the kernels take softcap up to {MAX_SOFTCAP:g}, got {softcap:g}"
    return None


def machine_obstacle() -> str | None:
    """Why no kernel runs on the CUDA devices of this process.

    A process without a CUDA device has no obstacle: it may lower for another machine.
    """
    devices = _cuda_devices()
    if not devices:
        return None
    for device in devices:
        capability = float(getattr(device, "compute_capability", "0"))
        if capability < OLDEST_COMPUTE_CAPABILITY:
            return (
                f"{device.device_kind} has compute capability {capability}; the "
                f"kernels need {OLDEST_COMPUTE_CAPABILITY} (Ampere) or newer"
            )
    if _ffi.native is None:
        return _ffi.native_missing
    try:
        _ffi.native.driver_version()
        _ffi.native.nvrtc()
    except RuntimeError as error:
        return str(error)
    return None


def warn_of_fallback(reason: str) -> None:
    """Says that a call on a GPU takes the JAX path, once per reason and process."""
    _warn_once(
        f"jax_flash_attn takes the plain JAX path on a GPU: {reason}. Pass "
        'implementation="jax" to choose it, or implementation="cuda" to get an error '
        "instead."
    )


def warn_of_unsplit_export() -> None:
    """Says that an exported kernel call is not split over devices, once per process."""
    _warn_once(
        "jax_flash_attn: jax.export can't store how automatic sharding splits a call, "
        "so the exported program gathers its operands on every device. Export with "
        "Explicit mesh axes, or use shard_map."
    )


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=3)


def on_gpu() -> bool:
    """Whether JAX's default backend is a CUDA GPU."""
    return jax.default_backend() == "gpu" and bool(_cuda_devices())


def device() -> tuple[str, int]:
    """The first CUDA device's architecture for kernels, and its multiprocessors."""
    found = _ffi.native.devices()[0]
    return str(found["architecture"]), int(found["multiprocessors"])


def _cuda_devices() -> list[jax.Device]:
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []
