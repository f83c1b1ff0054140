"""Into how many parts the backward kernels split what each key head has to do.

A CTA that computes dk and dv walks the queries of all query heads that read its keys.
Where heads are few and keys not many, such walks are long and fewer than a GPU has
multiprocessors; under a causal mask the longest of them takes twice the mean besides.
Parts of a key head, each for some of its query heads or for some queries of one, are so
many more and shorter walks. dk and dv of a key head are then the sums over its parts.
"""

import heapq
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_flash_attn import _ffi, _shapes, _spec, _support

_ARCHITECTURE = "sm_90"
"""The one whose kernels were measured with parts (docs/tuning.md)."""
_MULTIPROCESSORS = 132
"""Of an H100 and of an H200."""
# Of its kernels' key tiles, up to head dim 128 and above it; a step of a walk is a
# query tile.
_TILE_K, _WIDE_TILE_K = 128, 64
_TILE_Q = 64
# What a key tile takes besides its walk, in steps, and what summing takes, and of how
# many key tiles' parts in another step: found from times of calls in different numbers
# of parts (docs/tuning.md).
_TILE_STEPS = 6.0
_SUM_STEPS = 1.0
_SUMMED_TILES = 128
_QUERY_PARTS = (2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128)
"""Of a query head, what is tried: each takes time when a program is lowered."""


def key_parts(
    dims: _shapes.Dimensions,
    spec: _spec.AttentionSpec,
    dtype: jnp.dtype,
    architecture: str,
    multiprocessors: int,
) -> int:
    """Returns into how many parts of each key head the backward is fastest.

    It divides the number of query heads that read a key head, or is a multiple of that:
    each query head then comes in parts, too. That is not for

    - deterministic calls: where CTAs add to dq in one order, parts of one head would
      wait for each other;
    - softcap and dropout together, for which the fused kernel has no tiles above head
      dim 96;
    - head dims above 128, which run by clusters where heads are few, if not windowed;
    - kernels that tests and tuning force.

    It is 1 for

    - calls with key tiles for two rounds of all multiprocessors, whose parts would
      take memory for little;
    - float16: each part's sum is rounded to the dtype, and might overflow where the
      sum of all does not;
    - lengths that are not known when the program is lowered;
    - packed q, k and v, whose gradients are one buffer;
    - other architectures than Hopper's.

    Args:
        dims: The call's shapes.
        spec: Its static options.
        dtype: Of q, k and v.
        architecture: That the kernels are compiled for, such as "sm_90".
        multiprocessors: Of the GPU; 0 where it is not known.
    """
    if architecture != _ARCHITECTURE or dtype != jnp.bfloat16:
        return 1
    if spec.packing == "qkv":
        return 1
    if not all(isinstance(length, int) and length > 0 for length in dims):
        return 1
    multiprocessors = multiprocessors or _MULTIPROCESSORS
    tiles = _key_tiles(dims)
    if tiles >= 2 * multiprocessors:
        return 1
    group = dims.heads // dims.heads_k
    candidates = [parts for parts in range(1, group + 1) if group % parts == 0]
    if _splits_queries(dims, spec):
        more = (group * number for number in _QUERY_PARTS)
        candidates += [parts for parts in more if tiles * parts <= 2 * multiprocessors]
    walks = _walks(dims, spec)

    def steps(parts: int) -> float:
        number = max(1, parts // group)  # of parts of a query head
        heads_of_part = max(1, group // parts)
        shorter = [heads_of_part * _part_of(walk, number, dims) for walk in walks]
        heads = dims.batch * dims.heads_k * parts
        summing = 0.0 if parts == 1 else _SUM_STEPS + tiles * parts / _SUMMED_TILES
        return _steps(shorter, heads, multiprocessors) + summing

    return min(candidates, key=steps)


def _splits_queries(dims: _shapes.Dimensions, spec: _spec.AttentionSpec) -> bool:
    if spec.deterministic or _ffi.native is None:
        return False
    if spec.softcap and spec.dropout_p:  # by the split form at some head dims
        return False
    if dims.head_dim > _ffi.native.part_head_dim:
        return False
    return not _ffi.native.is_overridden("backward")


def _part_of(walk: int, number: int, dims: _shapes.Dimensions) -> int:
    """The longest of so many parts of a walk along one query head, in whole tiles."""
    if number == 1:
        return walk
    # Narrow heads have tiles of two steps. -(-a // b) is rounded up.
    steps = 2 if dims.head_dim <= 64 else 1
    return -(-walk // (steps * number)) * steps


def _tile_k(dims: _shapes.Dimensions) -> int:
    return _TILE_K if dims.head_dim <= 128 else _WIDE_TILE_K


def _key_tiles(dims: _shapes.Dimensions) -> int:
    return dims.batch * dims.heads_k * -(-dims.seqlen_k // _tile_k(dims))


def _walks(dims: _shapes.Dimensions, spec: _spec.AttentionSpec) -> list[int]:
    """For each key tile of a head, how many query tiles of one head see it."""
    diagonal = spec.diagonal(dims.seqlen_q, dims.seqlen_k)
    walks = []
    for first_key in range(0, dims.seqlen_k, _tile_k(dims)):
        last_key = min(first_key + _tile_k(dims), dims.seqlen_k) - 1
        first, end = 0, dims.seqlen_q
        if spec.window_right != _spec.UNBOUNDED:
            first = max(first, first_key - diagonal - spec.window_right)
        if spec.window_left != _spec.UNBOUNDED:
            end = min(end, last_key - diagonal + spec.window_left + 1)
        walks.append(max(0, -(-end // _TILE_Q) - first // _TILE_Q))
    return walks


def _steps(walks: list[int], heads: int, multiprocessors: int) -> float:
    """After how many steps all are done, if who is free takes the longest walk left."""
    ends = [0.0] * multiprocessors
    for walk in sorted(walks * heads, reverse=True):
        heapq.heapreplace(ends, ends[0] + walk + _TILE_STEPS)
    return max(ends)


def target() -> tuple[str, int]:
    """Returns the architecture and multiprocessors to choose for.

    Where there is no GPU, Hopper's, and a number that is not known.
    """
    if _ffi.native is None or not _support.on_gpu():
        return _ARCHITECTURE, 0
    return _support.device()


def part_shape(shape: Sequence[int], parts: int) -> tuple[int, ...]:
    """Returns the shape of dk or dv, (..., Hk, D), with so many heads for each."""
    return (*shape[:-2], shape[-2] * parts, shape[-1])


def sum_parts(x: jax.Array, parts: int) -> jax.Array:
    """Returns the sums over parts of what has the shape of `part_shape`."""
    if parts == 1:
        return x
    apart = x.reshape(*x.shape[:-2], -1, parts, x.shape[-1])
    return apart.sum(axis=-2, dtype=jnp.float32).astype(x.dtype)
