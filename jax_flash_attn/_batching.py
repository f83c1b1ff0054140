"""How vmap adds batch axes to a call, and how they become the one batch of a kernel.

Every operand and result of the primitives has its batch axes first, as many as the
others have. `vmap` puts the mapped axis in front of them; where an operand is not
mapped, that axis has length 1, so nothing is copied or reshaped while tracing, and
automatic sharding sees every axis by itself. The axes are merged where the call is
computed, on each device by itself.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching

from jax_flash_attn import _shapes


def fold(
    function: Callable[..., list[jax.Array]], roles: Sequence[_shapes.Role]
) -> Any:
    """Lets a function of operands with one batch axis take any number of them."""

    def folded(*operands: jax.Array) -> list[jax.Array]:
        batch_shape = _shapes.common_batch_shape(operands, roles)
        if len(batch_shape) == 1:
            return function(*operands)
        merged = [_merge(x, batch_shape) for x in operands]
        return [x.reshape(*batch_shape, *x.shape[1:]) for x in function(*merged)]

    return folded


def _merge(x: jax.Array, batch_shape: tuple[int, ...]) -> jax.Array:
    """Merges the batch axes of an operand into one that divides the call's batch.

    Leading axes that the operand lacks need no copy: batch b % n of the operand is
    the right one. Axes it lacks behind one that it has are repeated.
    """
    num_axes, lacking = len(batch_shape), 0
    while lacking < num_axes and x.shape[lacking] != batch_shape[lacking]:
        lacking += 1
    x = x.reshape(x.shape[lacking:])
    kept, trailing = batch_shape[lacking:], x.shape[num_axes - lacking :]
    return jnp.broadcast_to(x, (*kept, *trailing)).reshape(math.prod(kept), *trailing)


def register(primitive: Primitive) -> None:
    """Gives a primitive the batching rule of this module."""

    def rule(
        operands: Sequence[jax.Array], dims: Sequence[int | None], **params: Any
    ) -> tuple[list[jax.Array], list[int]]:
        results = primitive.bind(
            *(
                x[None] if d is None else jnp.moveaxis(x, d, 0)
                for x, d in zip(operands, dims, strict=True)
            ),
            **params,
        )
        return results, [0] * len(results)

    batching.primitive_batchers[primitive] = rule
