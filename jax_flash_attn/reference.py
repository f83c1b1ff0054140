"""The definition: attention as the textbook writes it, with the S x S scores in full.

    scores = scale * q k^T;  scores = c * tanh(scores / c) if c > 0
    scores = scores - slope * |i + Sk - Sq - j|
    probs = softmax(scores where key j is visible to query i)
    out = (probs * keep / (1 - dropout_p)) v
    lse = log sum_j exp(scores_j)

Gradients are JAX's own. A query that sees no key has out 0, lse -inf, gradients 0.
"""

import math

import jax
import jax.numpy as jnp

from jax_flash_attn import _spec, dropout


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array | None = None,
    dropout_keys: jax.Array | None = None,
    *,
    spec: _spec.AttentionSpec,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns attention and its log-sum-exp, with every step in one dtype.

    Args:
        q: queries; (B, Sq, H, D).
        k: keys; (B, Sk, Hk, D), where Hk divides H.
        v: values; (B, Sk, Hk, D).
        slopes: ALiBi slopes; (B, H).
        dropout_keys: Philox keys; (B, H, 2) uint32.
        spec: what to compute; its packing is ignored.
        dtype: dtype of every step; None means float64 for float64 inputs and
            float32 for all others.

    Returns:
        out (B, Sq, H, D) and lse (B, H, Sq), both of `dtype`.
    """
    if dtype is None:
        dtype = _at_least_float32(q.dtype)
    dtype = jnp.dtype(dtype)
    q, k, v = (_store(x, dtype) for x in (q, k, v))
    num_batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, heads_k = k.shape[1:3]
    group = heads // heads_k
    by_group = (num_batch, heads_k, group)

    q = q.reshape(num_batch, seqlen_q, heads_k, group, head_dim)
    scores = _store(_einsum("biagd,bjad->bagij", q, k), dtype)
    scores = _times(scores, spec.softmax_scale, dtype)
    if spec.softcap > 0:
        scores = _store(jnp.tanh(_times(scores, 1 / spec.softcap, dtype)), dtype)
        scores = _times(scores, spec.softcap, dtype)
    offset = _offset(seqlen_q, seqlen_k)
    if slopes is not None:
        slopes = slopes.astype(_at_least_float32(dtype)).reshape(*by_group, 1, 1)
        distance = jnp.abs(offset - (seqlen_k - seqlen_q))
        bias = -slopes * distance.astype(slopes.dtype)
        scores = _store(scores + _store(jax.lax.stop_gradient(bias), dtype), dtype)

    visible = _visible(offset - spec.diagonal(seqlen_q, seqlen_k), spec)
    probs, lse = _softmax(scores, visible, dtype)
    if dropout_keys is not None:
        keep = dropout.keep_mask(dropout_keys, seqlen_q, seqlen_k, spec.dropout_p)
        probs = _times(probs, 1 / (1 - spec.dropout_p), dtype)
        probs = jnp.where(keep.reshape(probs.shape), probs, 0)
    out = _store(_einsum("bagij,bjad->biagd", probs, v), dtype)
    return (
        out.reshape(num_batch, seqlen_q, heads, head_dim),
        lse.reshape(num_batch, heads, seqlen_q),
    )


def naive(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array | None,
    dropout_keys: jax.Array | None,
    *,
    spec: _spec.AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """Returns attention with every step rounded to the dtype of the inputs.

    The yardstick of the error: what a model loses by the plain computation.

    Args:
        q: queries; (B, Sq, H, D).
        k: keys; (B, Sk, Hk, D), where Hk divides H.
        v: values; (B, Sk, Hk, D).
        slopes: ALiBi slopes; (B, H).
        dropout_keys: Philox keys; (B, H, 2) uint32.
        spec: what to compute; its packing is ignored.

    Returns:
        out (B, Sq, H, D) in the dtype of q; lse (B, H, Sq), rounded like every
        other step and then widened to float32.
    """
    out, lse = attention(q, k, v, slopes, dropout_keys, spec=spec, dtype=q.dtype)
    return out, lse.astype(_at_least_float32(q.dtype))


def _at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _store(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rounds x to dtype; XLA may drop a cast that another cast undoes, but not this."""
    info = jnp.finfo(dtype)
    x = x.astype(dtype)
    return jax.lax.reduce_precision(
        x, exponent_bits=info.nexp, mantissa_bits=info.nmant
    )


def _einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)


def _times(x: jax.Array, factor: float, dtype: jnp.dtype) -> jax.Array:
    """Rounds the product, not the factor, which is no step of the computation."""
    return _store(x.astype(_at_least_float32(dtype)) * factor, dtype)


def _offset(seqlen_q: int, seqlen_k: int) -> jax.Array:
    i = jax.lax.broadcasted_iota(jnp.int32, (seqlen_q, seqlen_k), 0)
    j = jax.lax.broadcasted_iota(jnp.int32, (seqlen_q, seqlen_k), 1)
    return j - i


def _visible(offset: jax.Array, spec: _spec.AttentionSpec) -> jax.Array:
    visible = jnp.ones(offset.shape, jnp.bool_)
    if spec.window_left != _spec.UNBOUNDED:
        visible &= offset >= -spec.window_left
    if spec.window_right != _spec.UNBOUNDED:
        visible &= offset <= spec.window_right
    return visible


def _softmax(
    scores: jax.Array, visible: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    sees_key = visible.any(axis=-1, keepdims=True)
    top = jnp.max(scores, axis=-1, keepdims=True, where=visible, initial=-math.inf)
    top = jax.lax.stop_gradient(jnp.where(sees_key, top, 0))
    # Both branches of each where stay finite, or their gradients would be NaN.
    below_top = _store(jnp.where(visible, scores, top) - top, dtype)
    weights = jnp.where(visible, _store(jnp.exp(below_top), dtype), 0)
    total = _store(weights.sum(axis=-1, keepdims=True), dtype)
    total = jnp.where(sees_key, total, 1)
    lse = _store(top + _store(jnp.log(total), dtype), dtype)
    lse = jnp.where(sees_key, lse, -math.inf)
    return _store(weights / total, dtype), lse.squeeze(-1)
