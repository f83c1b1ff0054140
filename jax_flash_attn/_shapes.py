"""Shapes of operands, results and workspace, from shapes alone."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jax_flash_attn import _spec

# The workspace is padded to the largest tile of any kernel, so that its shape follows
# from the call and not from the tiles (csrc/kernels/params/backward_params.h).
WORKSPACE_ROW_MULTIPLE = 128
WORKSPACE_COLUMN_MULTIPLE = 64
SMALLEST_QUERY_TILE = 16
HEAD_STATES = 5


Shaped = jax.Array | jax.ShapeDtypeStruct
"""What has a shape and a dtype."""


class Dimensions(NamedTuple):
    """The lengths of one call: B, Sq, Sk, H, Hk and D of the glossary."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    heads_k: int
    head_dim: int


class Role(NamedTuple):
    """What the axes of an operand or result are; its batch axes come first."""

    num_trailing: int
    """How many axes follow the batch axes."""
    heads_axis: int
    heads: Literal["query", "key"]


_QUERIES, _KEYS = Role(3, -2, "query"), Role(3, -2, "key")
_PACKED_KEYS = Role(4, -2, "key")
# There are as many key heads as query heads.
_PACKED_QUERIES = Role(4, -2, "query")
_ROWS = Role(2, -2, "query")
_SLOPES = Role(1, -1, "query")
_DROPOUT_KEYS = Role(2, -2, "query")

_QKV: dict[_spec.Packing, list[Role]] = {
    "none": [_QUERIES, _KEYS, _KEYS],
    "kv": [_QUERIES, _PACKED_KEYS],
    "qkv": [_PACKED_QUERIES],
}


def forward_roles(spec: _spec.AttentionSpec) -> tuple[list[Role], list[Role]]:
    """The roles of the operands and of the results of the forward primitive."""
    optional = [_SLOPES] * spec.alibi + [_DROPOUT_KEYS] * spec.dropout
    return [*_QKV[spec.packing], *optional], [_QUERIES, _ROWS]


def backward_roles(
    spec: _spec.AttentionSpec, has_dlse: bool
) -> tuple[list[Role], list[Role]]:
    """The roles of the operands and of the results of the backward primitive."""
    operands, results = forward_roles(spec)
    return [*operands, *results, _QUERIES, *[_ROWS] * has_dlse], _QKV[spec.packing]


def batch_shape(x: jax.Array, role: Role) -> tuple[int, ...]:
    """The lengths of an operand's batch axes."""
    return x.shape[: x.ndim - role.num_trailing]


def common_batch_shape(
    arrays: Sequence[jax.Array], roles: Sequence[Role]
) -> tuple[int, ...]:
    """The batch axes of a call with these arrays: in each an axis is as long, or 1."""
    shapes = [batch_shape(x, role) for x, role in zip(arrays, roles, strict=True)]
    return tuple(common_batch(lengths) for lengths in zip(*shapes, strict=True))


def num_qkv(packing: _spec.Packing) -> int:
    """How many operands carry q, k and v."""
    return len(_QKV[packing])


def dimensions(qkv: Sequence[Shaped], packing: _spec.Packing) -> Dimensions:
    """Reads the lengths off the operands that carry q, k and v."""
    q, k = qkv[0], qkv[min(1, len(qkv) - 1)]
    return Dimensions(
        batch=common_batch([x.shape[0] for x in qkv]),
        seqlen_q=q.shape[1],
        seqlen_k=k.shape[1],
        heads=q.shape[-2],
        heads_k=k.shape[-2],
        head_dim=q.shape[-1],
    )


def common_batch(batches: Sequence[int]) -> int:
    """The batch of a call whose operands have these batches.

    Each divides the largest: batch b of the call uses batch b % batches[i] of operand
    i, so an operand that vmap leaves unmapped is never copied.
    """
    return 0 if 0 in batches else max(batches)


def repeat_batch(x: jax.Array, batch: int) -> jax.Array:
    """Repeats `x` along its batch until it has `batch` entries."""
    if x.shape[0] == batch:
        return x
    if batch == 0:
        return x[:0]
    repeats = batch // x.shape[0]
    tiled = jnp.broadcast_to(x[None], (repeats, *x.shape))
    return tiled.reshape(batch, *x.shape[1:])


def unpack(
    qkv: Sequence[jax.Array], packing: _spec.Packing
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Slices q, k and v out of the operands that carry them."""
    if packing == "qkv":
        return qkv[0][:, :, 0], qkv[0][:, :, 1], qkv[0][:, :, 2]
    if packing == "kv":
        return qkv[0], qkv[1][:, :, 0], qkv[1][:, :, 1]
    q, k, v = qkv
    return q, k, v


def pack(
    q: jax.Array, k: jax.Array, v: jax.Array, packing: _spec.Packing
) -> tuple[jax.Array, ...]:
    """The inverse of `unpack`."""
    if packing == "qkv":
        return (jnp.stack([q, k, v], axis=2),)
    if packing == "kv":
        return q, jnp.stack([k, v], axis=2)
    return q, k, v


def workspace(
    dims: Dimensions, deterministic: bool
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The workspace of the backward: dq sums, row statistics, head states, turns."""
    rows = _round_up(dims.seqlen_q, WORKSPACE_ROW_MULTIPLE)
    columns = _round_up(dims.head_dim, WORKSPACE_COLUMN_MULTIPLE)
    heads = (dims.batch, dims.heads)
    arrays = [
        jax.ShapeDtypeStruct((*heads, rows, columns), jnp.float32),
        jax.ShapeDtypeStruct((2, *heads, rows), jnp.float32),
        jax.ShapeDtypeStruct((HEAD_STATES, *heads), jnp.int32),
    ]
    if deterministic:
        turns = (*heads, rows // SMALLEST_QUERY_TILE)
        arrays.append(jax.ShapeDtypeStruct(turns, jnp.int32))
    return tuple(arrays)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
