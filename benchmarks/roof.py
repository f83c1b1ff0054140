"""The two floors under every time: the device's matmul rate and its copy bandwidth."""

import dataclasses

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.arrays import DTYPE
from benchmarks.contenders import on_gpu
from benchmarks.workloads import Mode, Workload, flops, least_bytes

_SAMPLES = 5
_GPU_MATMUL_SIZE = 8192
_GPU_COPY_BYTES = 2**30
_CPU_MATMUL_SIZE = 256
_CPU_COPY_BYTES = 2**24
_GUESSED_RATE = {"gpu": 5e14, "cpu": 1e10}
_GUESSED_BANDWIDTH = {"gpu": 2e12, "cpu": 5e9}


@dataclasses.dataclass(frozen=True)
class Roof:
    """What the device does at best, measured in the run that uses it."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, workload: Workload, mode: Mode) -> float:
        """Returns the larger of the time for the FLOPs and the time for the bytes."""
        return max(
            flops(workload, mode) / self.flops_per_second,
            least_bytes(workload, mode) / self.bytes_per_second,
        )


def measure() -> Roof:
    """Returns the roof of the default device, on random normal data."""
    platform = "gpu" if on_gpu() else "cpu"
    size = _GPU_MATMUL_SIZE if on_gpu() else _CPU_MATMUL_SIZE
    a, b = (
        jax.random.normal(key, (size, size), DTYPE)
        for key in jax.random.split(jax.random.key(0))
    )
    work = 2.0 * size**3
    product = _median(jnp.matmul, a, (b,), work / _GUESSED_RATE[platform])

    num_bytes = _GPU_COPY_BYTES if on_gpu() else _CPU_COPY_BYTES
    x = jax.random.normal(jax.random.key(1), (num_bytes // 4,))
    traffic = 2.0 * num_bytes
    copy = _median(jnp.negative, x, (), traffic / _GUESSED_BANDWIDTH[platform])
    return Roof(work / product, traffic / copy)


def _median(
    step: timing.Step, first: jax.Array, rest: tuple[jax.Array, ...], guess: float
) -> float:
    sampler = timing.JaxSampler(step, first, rest, guess=guess)
    samples = [sampler.sample() for _ in range(_SAMPLES)]
    return timing.summarise(samples, sampler).seconds
