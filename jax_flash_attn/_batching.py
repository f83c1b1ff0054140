"""How vmap folds into the batch of a call.

Every operand and result of the primitives has its batch first, and an operand's batch
may be any divisor of the call's (`_shapes.common_batch`). A mapped axis goes in front
of the batch and is merged with it; operands that are not mapped stay as they are.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching

from jax_flash_attn import _shapes


def fold(
    operands: Sequence[jax.Array], dims: Sequence[int | None]
) -> tuple[list[jax.Array], int]:
    """Merges the mapped axes into the batches; also returns the batch of one example.

    A mapped operand is first repeated to the full batch: with the mapped axis in front
    the index b % batch would otherwise run over examples.
    """
    examples = [
        x.shape[0] if d is None else (x.shape[1] if d == 0 else x.shape[0])
        for x, d in zip(operands, dims, strict=True)
    ]
    batch = _shapes.common_batch(examples)
    folded = []
    for x, d in zip(operands, dims, strict=True):
        if d is None:
            folded.append(x)
            continue
        mapped = jnp.moveaxis(x, d, 0)
        full = jax.vmap(lambda example: _shapes.repeat_batch(example, batch))(mapped)
        folded.append(full.reshape(full.shape[0] * batch, *full.shape[2:]))
    return folded, batch


def register(primitive: Primitive) -> None:
    """Gives a primitive the batching rule of this module."""

    def rule(
        operands: Sequence[jax.Array], dims: Sequence[int | None], **params: Any
    ) -> tuple[list[jax.Array], list[int]]:
        size = next(
            x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None
        )
        folded, batch = fold(operands, dims)
        results = primitive.bind(*folded, **params)
        return [x.reshape(size, batch, *x.shape[1:]) for x in results], [0] * len(
            results
        )

    batching.primitive_batchers[primitive] = rule
