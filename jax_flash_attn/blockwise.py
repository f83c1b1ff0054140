"""Attention and its gradients in plain JAX, in memory linear in sequence length.

Forward, for each tile of queries, over the tiles of keys:

    scores = transform(scale * q k^T);  top' = max(top, rowmax(scores))
    weights = exp(scores - top')
    total = total * exp(top - top') + rowsum(weights)
    accum = accum * exp(top - top') + (weights * keep / (1 - p)) v
    out = accum / total;  lse = top + log(total)

Backward, over the same tiles, with delta = rowsum(dout * out):

    probs = exp(scores - lse);  dv += (probs * keep / (1 - p))^T dout
    dprobs = (dout v^T) * keep / (1 - p)
    dscores = transform'(probs * (dprobs - delta + dlse))
    dq += scale * dscores k;  dk += scale * dscores^T q

A sequence no longer than a tile is one tile and needs no loop. Inside this file the
layout is (B, Hk, g, S, D) for queries and (B, Hk, S, D) for keys, g = H // Hk; tiles
of one operand are stacked along a leading axis.

A NaN or an infinity in one row of an operand reaches only the rows that attend to it
or that it attends to, as if masked products were never formed.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jax_flash_attn import _compat, _spec, dropout

MAX_TILE = 512
"""The most rows a tile of queries, or of keys, has; a longer sequence is cut evenly."""

_TILE_MULTIPLE = 16

_Arrays = tuple[jax.Array, ...]

_State = TypeVar("_State")


class _Problem(NamedTuple):
    """What every tile of one call has in common."""

    spec: _spec.AttentionSpec
    seqlen_q: int
    seqlen_k: int
    tile_q: int
    tile_k: int
    input_dtype: jnp.dtype
    slopes: jax.Array | None  # (B, Hk, g, 1, 1)
    dropout_keys: jax.Array | None  # (B, H, 2)

    @property
    def compute_dtype(self) -> jnp.dtype:
        return _compute_dtype(self.input_dtype)

    @property
    def diagonal(self) -> int:
        return self.spec.diagonal(self.seqlen_q, self.seqlen_k)


class _Tile(NamedTuple):
    """One rectangle of the scores: its first query and its first key index."""

    row: int | jax.Array
    col: int | jax.Array


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array | None,
    dropout_keys: jax.Array | None,
    *,
    spec: _spec.AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """Returns attention and its log-sum-exp.

    Args:
        q: queries; (B, Sq, H, D).
        k: keys; (B, Sk, Hk, D), where Hk divides H.
        v: values; (B, Sk, Hk, D).
        slopes: ALiBi slopes; (B, H).
        dropout_keys: Philox keys; (B, H, 2) uint32.
        spec: what to compute; its packing is ignored.

    Returns:
        out (B, Sq, H, D) in the dtype of q, and lse (B, H, Sq) in float32, or in
        float64 for float64 inputs. A query that sees no key has out 0, lse -inf.

    Numerics: scores, softmax and accumulation in float32 (float64 for float64
    inputs); probabilities rounded to the input dtype before the second product.
    """
    problem = _problem(q, k, slopes, dropout_keys, spec)
    num_batch, seqlen_q, heads, _ = q.shape
    if q.size == 0 or k.size == 0:
        lse = jnp.full_like(q[..., 0], -math.inf, dtype=problem.compute_dtype)
        return jnp.zeros_like(q), lse.transpose(0, 2, 1)
    zero = _zero(problem.compute_dtype, q, k, v, slopes, dropout_keys)

    q_tiles = _split(_queries_inward(q, k.shape[2]), problem.tile_q, axis=3)
    kv_tiles = tuple(_split(_keys_inward(x), problem.tile_k, axis=2) for x in (k, v))
    kv_tiles = (_starts(kv_tiles[0]), *kv_tiles)

    def attend(query_tile: _Arrays) -> _Arrays:
        row, q_tile = query_tile
        rows = q_tile.shape[:-1]
        state: _Arrays = (
            jnp.zeros(q_tile.shape, problem.compute_dtype) + zero,
            jnp.full(rows, -math.inf, problem.compute_dtype) + zero,
            jnp.zeros(rows, problem.compute_dtype) + zero,
        )

        def step(state: _Arrays, kv_tile: _Arrays) -> tuple[_Arrays, None]:
            col, k_tile, v_tile = kv_tile
            tile = _Tile(row, col)
            update = functools.partial(_forward_tile, problem, tile, q_tile)
            state = _where_visible(problem, tile, update, state, k_tile, v_tile)
            return state, None

        (accum, top, total), _ = _scan(step, state, kv_tiles)
        total_or_one = jnp.where(total == 0, 1, total)
        out = accum / total_or_one[..., None]
        return out.astype(problem.input_dtype), top + jnp.log(total_or_one)

    out, lse = _map(attend, (_starts(q_tiles), q_tiles))
    return (
        _queries_outward(_join(out, seqlen_q, axis=3), q.shape),
        _join(lse, seqlen_q, axis=3).reshape(num_batch, heads, seqlen_q),
    )


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
    slopes: jax.Array | None,
    dropout_keys: jax.Array | None,
    *,
    spec: _spec.AttentionSpec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of q, k and v.

    Args:
        q: queries; (B, Sq, H, D).
        k: keys; (B, Sk, Hk, D), where Hk divides H.
        v: values; (B, Sk, Hk, D).
        out: what `forward` returned.
        lse: what `forward` returned.
        dout: cotangent of out.
        dlse: cotangent of lse; None means zero.
        slopes: ALiBi slopes; (B, H).
        dropout_keys: Philox keys; (B, H, 2) uint32.
        spec: what to compute; its packing is ignored.

    Returns:
        dq, dk and dv, of the shapes and dtype of q, k and v; zero for a query that
        sees no key and for a key that no query sees.

    Numerics: as in `forward`; probabilities and score gradients are rounded to the
    input dtype before the products that consume them.
    """
    problem = _problem(q, k, slopes, dropout_keys, spec)
    if q.size == 0 or k.size == 0:
        return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)
    zero = _zero(problem.compute_dtype, q, k, v, lse, dout, dlse, slopes, dropout_keys)
    heads_k = k.shape[2]

    delta = (
        (_widen(dout, problem) * _widen(out, problem)).sum(axis=-1).transpose(0, 2, 1)
    )
    shift = -delta if dlse is None else dlse.astype(problem.compute_dtype) - delta
    # A row that sees no key then has probs exp(scores - inf) = 0, like any masked one.
    lse = jnp.where(lse == -math.inf, math.inf, lse)
    by_group = (q.shape[0], heads_k, q.shape[2] // heads_k, q.shape[1])

    q_tiles, dout_tiles, lse_tiles, shift_tiles = (
        _split(x, problem.tile_q, axis=3, fill=fill)
        for x, fill in (
            (_queries_inward(q, heads_k), 0),
            (_queries_inward(dout, heads_k), 0),
            (lse.reshape(by_group), math.inf),
            (shift.reshape(by_group), 0),
        )
    )
    k_tiles, v_tiles = (_split(_keys_inward(x), problem.tile_k, axis=2) for x in (k, v))
    row_tiles = (_starts(q_tiles), q_tiles, dout_tiles, lse_tiles, shift_tiles)
    starts_k = _starts(k_tiles)

    def query_step(dkv_tiles: _Arrays, row_tile: _Arrays) -> tuple[_Arrays, jax.Array]:
        row, q_tile, dout_tile, lse_tile, shift_tile = row_tile

        def key_step(
            dq_tile: jax.Array, col_tile: _Arrays
        ) -> tuple[jax.Array, _Arrays]:
            col, k_tile, v_tile, dk_tile, dv_tile = col_tile
            tile = _Tile(row, col)
            update = functools.partial(
                _backward_tile, problem, tile, q_tile, dout_tile, lse_tile, shift_tile
            )
            state: _Arrays = (dq_tile, dk_tile, dv_tile)
            state = _where_visible(problem, tile, update, state, k_tile, v_tile)
            return state[0], state[1:]

        dq_tile = jnp.zeros(q_tile.shape, problem.compute_dtype) + zero
        col_tiles = (starts_k, k_tiles, v_tiles, *dkv_tiles)
        dq_tile, dkv_tiles = _scan(key_step, dq_tile, col_tiles)
        return dkv_tiles, (dq_tile * spec.softmax_scale).astype(q.dtype)

    dkv_tiles: _Arrays = tuple(
        jnp.zeros(x.shape, problem.compute_dtype) + zero for x in (k_tiles, v_tiles)
    )
    dkv_tiles, dq_tiles = _scan(query_step, dkv_tiles, row_tiles)
    dk, dv = (_join(x, k.shape[1], axis=2).transpose(0, 2, 1, 3) for x in dkv_tiles)
    return (
        _queries_outward(_join(dq_tiles, q.shape[1], axis=3), q.shape),
        (dk * spec.softmax_scale).astype(k.dtype),
        dv.astype(v.dtype),
    )


def _forward_tile(
    problem: _Problem,
    tile: _Tile,
    q_tile: jax.Array,
    state: _Arrays,
    k_tile: jax.Array,
    v_tile: jax.Array,
) -> _Arrays:
    """One step of the online softmax."""
    accum, top, total = state
    scores, _ = _scores(problem, tile, q_tile, k_tile)
    visible = _visible(problem, tile)
    scores = _keep_where(visible, scores, -math.inf)
    new_top = jnp.maximum(top, scores.max(axis=-1))
    # Before the first visible key the top is -inf, and -inf - -inf would be NaN.
    base = jnp.where(new_top == -math.inf, 0, new_top)
    weights = _keep_where(visible, jnp.exp(scores - base[..., None]), 0)
    rescale = jnp.exp(top - base)
    total = total * rescale + weights.sum(axis=-1)
    weights = _drop(problem, tile, weights)
    product = _product(problem, "bagij,bajd->bagid", weights, visible, v_tile)
    return accum * rescale[..., None] + product, new_top, total


def _backward_tile(
    problem: _Problem,
    tile: _Tile,
    q_tile: jax.Array,
    dout_tile: jax.Array,
    lse_tile: jax.Array,
    shift_tile: jax.Array,
    state: _Arrays,
    k_tile: jax.Array,
    v_tile: jax.Array,
) -> _Arrays:
    """Adds what one rectangle of the scores contributes to the gradients."""
    dq_tile, dk_tile, dv_tile = state
    scores, transform_vjp = _scores(problem, tile, q_tile, k_tile)
    visible = _visible(problem, tile)
    probs = _keep_where(visible, jnp.exp(scores - lse_tile[..., None]), 0)
    dropped = _drop(problem, tile, probs)
    dprobs = _einsum("bagid,bajd->bagij", dout_tile, v_tile)
    dprobs = _drop(problem, tile, dprobs)
    dscores = probs * (dprobs + shift_tile[..., None])
    (dscores,) = transform_vjp(dscores)
    dscores = _keep_where(visible, dscores, 0)

    product = functools.partial(_product, problem)
    dv_tile += product("bagij,bagid->bajd", dropped, visible, dout_tile)
    dk_tile += product("bagij,bagid->bajd", dscores, visible, q_tile)
    dq_tile += product("bagij,bajd->bagid", dscores, visible, k_tile)
    return dq_tile, dk_tile, dv_tile


def _scores(
    problem: _Problem, tile: _Tile, q_tile: jax.Array, k_tile: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array]]]:
    """Scores of a tile before the mask, and the pullback to scale * q k^T."""
    spec = problem.spec

    def transform(scores: jax.Array) -> jax.Array:
        if spec.softcap > 0:
            scores = spec.softcap * jnp.tanh(scores / spec.softcap)
        if problem.slopes is not None:
            i, j = _indices(problem, tile)
            distance = jnp.abs(i + (problem.seqlen_k - problem.seqlen_q) - j)
            scores -= problem.slopes * distance.astype(scores.dtype)
        return scores

    scaled = _einsum("bagid,bajd->bagij", q_tile, k_tile) * spec.softmax_scale
    return jax.vjp(transform, scaled)


def _indices(problem: _Problem, tile: _Tile) -> tuple[jax.Array, jax.Array]:
    # As many axes as the scores: JAX may be told to promote no ranks.
    shape = (1, 1, 1, problem.tile_q, problem.tile_k)
    i = jax.lax.broadcasted_iota(jnp.int32, shape, 3) + tile.row
    j = jax.lax.broadcasted_iota(jnp.int32, shape, 4) + tile.col
    return i, j


def _visible(problem: _Problem, tile: _Tile) -> jax.Array | None:
    """Which scores of a tile count; None where the call masks and pads nothing."""
    left, right = problem.spec.window_left, problem.spec.window_right
    i, j = _indices(problem, tile)
    conditions = []
    if left != _spec.UNBOUNDED:
        conditions.append(j >= i + (problem.diagonal - left))
    if right != _spec.UNBOUNDED:
        conditions.append(j <= i + (problem.diagonal + right))
    if problem.seqlen_k % problem.tile_k:
        conditions.append(j < problem.seqlen_k)
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def _where_visible(
    problem: _Problem,
    tile: _Tile,
    update: Callable[..., _Arrays],
    state: _Arrays,
    *operands: jax.Array,
) -> _Arrays:
    """Applies the update unless the window hides the whole tile."""
    left, right = problem.spec.window_left, problem.spec.window_right
    first_col = tile.row + problem.diagonal - left
    last_col = tile.row + (problem.tile_q - 1) + problem.diagonal + right
    conditions = []
    if left != _spec.UNBOUNDED:
        conditions.append(tile.col + (problem.tile_k - 1) >= first_col)
    if right != _spec.UNBOUNDED:
        conditions.append(tile.col <= last_col)
    if isinstance(tile.row, int) and isinstance(tile.col, int):
        return update(state, *operands) if all(conditions) else state
    if not conditions:
        return update(state, *operands)
    condition = functools.reduce(jnp.logical_and, conditions)
    return jax.lax.cond(condition, update, lambda state, *_: state, state, *operands)


def _drop(problem: _Problem, tile: _Tile, probs: jax.Array) -> jax.Array:
    """Drops probabilities, or their gradients, and scales up what is kept."""
    if problem.dropout_keys is None:
        return probs
    keep = dropout.keep_mask(
        problem.dropout_keys,
        problem.tile_q,
        problem.tile_k,
        problem.spec.dropout_p,
        row_start=tile.row,
        col_start=tile.col,
    )
    scale = 1 / (1 - problem.spec.dropout_p)
    return jnp.where(keep.reshape(probs.shape), probs * scale, 0)


def _product(
    problem: _Problem,
    subscripts: str,
    weights: jax.Array,
    visible: jax.Array | None,
    values: jax.Array,
) -> jax.Array:
    """The product of weights, 0 where not visible, with values, as einsum has it.

    Zero times NaN is NaN, so a plain product would carry a NaN of `values` to rows
    that do not see it.
    """
    weights = weights.astype(problem.input_dtype)
    if visible is None:
        return _einsum(subscripts, weights, values)

    def contained(weights: jax.Array, values: jax.Array) -> jax.Array:
        finite = jnp.isfinite(values)
        product = _einsum(subscripts, weights, jnp.where(finite, values, 0))
        seen = jnp.broadcast_to(visible, weights.shape).astype(product.dtype)
        hits = _einsum(subscripts, seen, (~finite).astype(product.dtype))
        return jnp.where(hits > 0, math.nan, product)

    plain = functools.partial(_einsum, subscripts)
    return jax.lax.cond(jnp.isfinite(values).all(), plain, contained, weights, values)


def _einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    compute_dtype = _compute_dtype(a.dtype)
    exact = a.dtype == compute_dtype
    return jnp.einsum(
        subscripts,
        a,
        b,
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=compute_dtype,
    )


def _problem(
    q: jax.Array,
    k: jax.Array,
    slopes: jax.Array | None,
    dropout_keys: jax.Array | None,
    spec: _spec.AttentionSpec,
) -> _Problem:
    num_batch, seqlen_q, heads, _ = q.shape
    seqlen_k, heads_k = k.shape[1:3]
    if slopes is not None:
        slopes = slopes.reshape(num_batch, heads_k, heads // heads_k, 1, 1)
        slopes = slopes.astype(_compute_dtype(q.dtype))
    return _Problem(
        spec=spec,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        tile_q=_tile_length(seqlen_q),
        tile_k=_tile_length(seqlen_k),
        input_dtype=q.dtype,
        slopes=slopes,
        dropout_keys=dropout_keys,
    )


def _compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _tile_length(seqlen: int) -> int:
    if seqlen <= MAX_TILE:
        return seqlen
    even = -(-seqlen // -(-seqlen // MAX_TILE))
    return -(-even // _TILE_MULTIPLE) * _TILE_MULTIPLE


def _zero(dtype: jnp.dtype, *operands: jax.Array | None) -> jax.Array:
    """A zero that varies over every mesh axis that an operand varies over.

    A loop inside shard_map wants its first carry to vary as its later ones do.
    """
    zero = _compat.cast_to_common_varying(jnp.zeros((), dtype), *operands)[0]
    assert zero is not None
    return zero


def _keep_where(visible: jax.Array | None, x: jax.Array, other: float) -> jax.Array:
    return x if visible is None else jnp.where(visible, x, other)


def _widen(x: jax.Array, problem: _Problem) -> jax.Array:
    return x.astype(problem.compute_dtype)


def _queries_inward(x: jax.Array, heads_k: int) -> jax.Array:
    num_batch, seqlen_q, heads, head_dim = x.shape
    x = x.transpose(0, 2, 1, 3)
    return x.reshape(num_batch, heads_k, heads // heads_k, seqlen_q, head_dim)


def _queries_outward(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    num_batch, seqlen_q, heads, head_dim = shape
    return x.reshape(num_batch, heads, seqlen_q, head_dim).transpose(0, 2, 1, 3)


def _keys_inward(x: jax.Array) -> jax.Array:
    return x.transpose(0, 2, 1, 3)


def _split(x: jax.Array, tile: int, axis: int, fill: float = 0) -> jax.Array:
    """Stacks the tiles along an axis in front, the last one filled up."""
    num_tiles = -(-x.shape[axis] // tile)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, num_tiles * tile - x.shape[axis])
    x = jnp.pad(x, padding, constant_values=fill)
    x = x.reshape(*x.shape[:axis], num_tiles, tile, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(tiles: jax.Array, length: int, axis: int) -> jax.Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(tiles, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def _starts(tiles: jax.Array) -> jax.Array:
    return jnp.arange(tiles.shape[0], dtype=jnp.int32) * tiles.shape[-2]


def _scan(
    step: Callable[[_State, _Arrays], tuple[_State, Any]],
    state: _State,
    stacked: _Arrays,
) -> tuple[_State, Any]:
    """lax.scan, except that a single step needs no loop and has static indices."""
    starts, *operands = stacked
    if starts.shape[0] > 1:
        return jax.lax.scan(step, state, (starts, *operands))
    only: Any = (0, *(x[0] for x in operands))
    state, result = step(state, only)
    return state, jax.tree.map(lambda x: x[None], result)


def _map(function: Callable[[_Arrays], _Arrays], stacked: _Arrays) -> _Arrays:
    results: _Arrays
    _, results = _scan(lambda _, x: (None, function(x)), None, stacked)
    return results
