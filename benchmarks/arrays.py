"""The operands of a workload, and their way from JAX to PyTorch and back."""

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.workloads import Workload

DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Operands:
    """Standard normal q, k, v and the cotangent dout of one workload."""

    q: Any
    k: Any
    v: Any
    dout: Any

    @property
    def qkv(self) -> tuple[Any, Any, Any]:
        """The arguments of the forward pass."""
        return self.q, self.k, self.v

    @property
    def every(self) -> tuple[Any, Any, Any, Any]:
        """The arguments of the forward pass and the cotangent."""
        return *self.qkv, self.dout


def make(workload: Workload, seed: int = 0) -> Operands:
    """Returns the operands as JAX arrays; never zeros, which power draw rewards."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = (workload.q_shape, workload.k_shape, workload.k_shape, workload.q_shape)
    pairs = zip(keys, shapes, strict=True)
    return Operands(*(jax.random.normal(key, shape, DTYPE) for key, shape in pairs))


def to_torch(operands: Operands) -> Operands:
    """Returns the same operands as torch tensors on the same device."""
    torch = importlib.import_module("torch")
    arrays = jax.block_until_ready(operands.every)
    q, k, v, dout = (torch.from_dlpack(array).clone() for array in arrays)
    for leaf in (q, k, v):
        leaf.requires_grad_()
    return Operands(q, k, v, dout)


def from_torch(tensor: Any) -> jax.Array:
    """Returns a torch tensor as a JAX array."""
    tensor = tensor.detach().contiguous()
    if tensor.is_cuda:
        importlib.import_module("torch").cuda.synchronize()
    return jnp.from_dlpack(tensor)
