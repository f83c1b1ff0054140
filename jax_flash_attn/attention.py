"""The public attention functions: flash-attn's and jax.nn's interfaces."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash_attn import (
    _arguments,
    _partitioning,
    _shapes,
    _spec,
    _support,
    _vjp,
    dense,
)
from jax_flash_attn._primitives import Operands

Result = jax.Array | tuple[jax.Array, jax.Array]


def flash_attn_func(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: jax.Array | None = None,
    deterministic: bool = False,
    *,
    dropout_rng: jax.Array | None = None,
    return_lse: bool = False,
    implementation: _spec.Implementation = "auto",
    **unsupported: Any,
) -> Result:
    """Returns exact attention of q over k and v, in memory linear in the lengths.

    out[i] = sum_j probs[i, j] v[j], probs = softmax_j(scores[i, j]),
    scores[i, j] = softmax_scale * q[i].k[j], capped, biased and masked as asked.

    Args:
        q: Queries, (batch, seqlen_q, heads, head_dim), bfloat16 or float16 for the
            kernels; float32 and float64 take the plain JAX path in that precision.
        k: Keys, (batch, seqlen_k, heads_k, head_dim); heads_k divides heads, and query
            head h uses key head h // (heads // heads_k).
        v: Values, the shape of k.
        dropout_p: Share of probabilities set to 0, in [0, 1); the rest is divided by
            1 - dropout_p.
        softmax_scale: Finite Python float; 1 / sqrt(head_dim) by default.
        causal: Query i sees keys j <= i + seqlen_k - seqlen_q (aligned bottom-right).
        window_size: (left, right): query i sees keys from i + seqlen_k - seqlen_q -
            left to i + seqlen_k - seqlen_q + right; -1 is no limit.
        softcap: c > 0 replaces scores by c * tanh(scores / c); 0 is off.
        alibi_slopes: (heads,) or (batch, heads): scores get
            -slope * |i + seqlen_k - seqlen_q - j|. Constants: no gradient flows to
            them.
        deterministic: Gradients are bitwise equal from run to run of one program, at
            some cost. The output always is.
        dropout_rng: JAX PRNG key, typed or raw; needed when dropout_p > 0. The mask
            depends on the key, batch, head, i and j alone. Inside `jax.shard_map` fold
            the axis index into it.
        return_lse: Also return the log-sum-exp of the scores; its cotangent counts.
        implementation: "auto" runs the CUDA kernel where it can and plain JAX
            elsewhere, with a warning on a GPU; "cuda" raises instead; "jax" asks for
            plain JAX.
        **unsupported: Arguments of flash-attn that do not exist here, refused by name.

    Returns:
        out, the shape and dtype of q; with return_lse also lse, (batch, heads,
        seqlen_q) float32 (float64 for float64 inputs), natural log. A query that sees
        no key has out 0, lse -inf and gradients 0.

    Raises:
        ValueError, TypeError: an argument is wrong; the text names it.
        NotImplementedError: implementation="cuda" and no kernel can run the call.

    Numerics: float32 scores, softmax, accumulation and lse; probabilities are rounded
    to the input dtype before the product with v (docs/numerics.md).

    Source: FlashAttention-2 (Dao 2023), algorithms 1 and 2; flash-attn's
    `flash_attn_func`.
    """
    return _flash_attn(
        _arguments.arrays(q=q, k=k, v=v),
        "none",
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        dropout_rng,
        return_lse,
        implementation,
        unsupported,
    )


def flash_attn_qkvpacked_func(
    qkv: jax.Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: jax.Array | None = None,
    deterministic: bool = False,
    *,
    dropout_rng: jax.Array | None = None,
    return_lse: bool = False,
    implementation: _spec.Implementation = "auto",
    **unsupported: Any,
) -> Result:
    """Returns `flash_attn_func` of q, k and v that share one buffer.

    out = flash_attn_func(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], ...), reading the
    one buffer and writing one gradient buffer: nothing is split or concatenated.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim).
        dropout_p: See `flash_attn_func`, as for every other argument.
        softmax_scale: See `flash_attn_func`.
        causal: See `flash_attn_func`.
        window_size: See `flash_attn_func`.
        softcap: See `flash_attn_func`.
        alibi_slopes: See `flash_attn_func`.
        deterministic: See `flash_attn_func`.
        dropout_rng: See `flash_attn_func`.
        return_lse: See `flash_attn_func`.
        implementation: See `flash_attn_func`.
        **unsupported: See `flash_attn_func`.

    Returns:
        out, (batch, seqlen, heads, head_dim); with return_lse also lse.

    Raises:
        ValueError, TypeError: an argument is wrong; the text names it.
        NotImplementedError: implementation="cuda" and no kernel can run the call.

    Source: flash-attn's `flash_attn_qkvpacked_func`.
    """
    return _flash_attn(
        _arguments.arrays(qkv=qkv),
        "qkv",
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        dropout_rng,
        return_lse,
        implementation,
        unsupported,
    )


def flash_attn_kvpacked_func(
    q: jax.Array,
    kv: jax.Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: jax.Array | None = None,
    deterministic: bool = False,
    *,
    dropout_rng: jax.Array | None = None,
    return_lse: bool = False,
    implementation: _spec.Implementation = "auto",
    **unsupported: Any,
) -> Result:
    """Returns `flash_attn_func` of q and of k and v that share one buffer.

    out = flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], ...), reading the one buffer and
    writing one gradient buffer for it.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        kv: (batch, seqlen_k, 2, heads_k, head_dim).
        dropout_p: See `flash_attn_func`, as for every other argument.
        softmax_scale: See `flash_attn_func`.
        causal: See `flash_attn_func`.
        window_size: See `flash_attn_func`.
        softcap: See `flash_attn_func`.
        alibi_slopes: See `flash_attn_func`.
        deterministic: See `flash_attn_func`.
        dropout_rng: See `flash_attn_func`.
        return_lse: See `flash_attn_func`.
        implementation: See `flash_attn_func`.
        **unsupported: See `flash_attn_func`.

    Returns:
        out, the shape and dtype of q; with return_lse also lse.

    Raises:
        ValueError, TypeError: an argument is wrong; the text names it.
        NotImplementedError: implementation="cuda" and no kernel can run the call.

    Source: flash-attn's `flash_attn_kvpacked_func`.
    """
    return _flash_attn(
        _arguments.arrays(q=q, kv=kv),
        "kv",
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        dropout_rng,
        return_lse,
        implementation,
        unsupported,
    )


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: _spec.Implementation = "auto",
    return_residual: bool = False,
) -> Result:
    """Returns attention with the arguments of `jax.nn.dot_product_attention`.

    Masks are aligned top-left, as there: query i sees keys j <= i when `is_causal`.

    Args:
        query: (batch, seqlen_q, heads, head_dim), or without the batch.
        key: (batch, seqlen_k, heads_k, head_dim), or without the batch.
        value: The shape of key.
        bias: Floats added to the scores; broadcastable to (batch, heads, seqlen_q,
            seqlen_k). Takes the JAX path and quadratic memory, with a warning on a GPU.
        mask: True where a query sees a key; broadcastable likewise, and likewise on
            the JAX path.
        scale: Finite Python float; 1 / sqrt(head_dim) by default.
        is_causal: Query i sees keys j <= i.
        query_seq_lengths: Not supported yet.
        key_value_seq_lengths: Not supported yet.
        local_window_size: (left, right), or one int for both: query i sees keys from
            i - left to i + right.
        implementation: "auto", "cuda" or "jax", see `flash_attn_func`; not jax.nn's
            names.
        return_residual: Also return the log-sum-exp of the scores.

    Returns:
        out, the shape and dtype of query; with return_residual also lse, (batch,
        seqlen_q, heads) float32 (jax.nn rounds it to the dtype of query). A query that
        sees no key has out 0 and lse -inf (jax.nn averages the values there).

    Raises:
        ValueError, TypeError: an argument is wrong; the text names it.
        NotImplementedError: an argument is not supported, or implementation="cuda" and
            no kernel can run the call.

    Source: `jax.nn.dot_product_attention`.
    """
    _refuse_lengths(query_seq_lengths, key_value_seq_lengths)
    chosen = _arguments.implementation(implementation)
    arrays = _arguments.arrays(query=query, key=key, value=value)
    return_lse = _arguments.static_flag(return_residual, "return_residual")
    batched = arrays["query"].ndim != 3
    _arguments.check_qkv(arrays, "none", batched)
    if not batched:
        arrays = {name: x[None] for name, x in arrays.items()}
    causal = _arguments.static_flag(is_causal, "is_causal")
    limits = _local_window(local_window_size, causal)
    scale = _arguments.softmax_scale(scale, arrays["query"].shape[-1], "scale")
    spec = _arguments.make_spec(
        tuple(arrays.values()), "none", scale=scale, limits=limits, top_left=True
    )
    operands = Operands(tuple(arrays.values()), None, None)
    results = _dispatch(operands, bias, mask, spec, chosen, return_lse)
    out, lse = results[0], results[-1]
    if return_lse:
        lse = lse.swapaxes(1, 2)
        return (out, lse) if batched else (out[0], lse[0])
    return out if batched else out[0]


def attend(
    named: dict[str, jax.Array],
    bias: jax.Array | None,
    mask: jax.Array | None,
    top_left: bool,
    /,
    **arguments: Any,
) -> jax.Array:
    """Returns attention over any number of batch axes, with a bias and a mask array.

    The batch axes stay apart, as what a mesh splits must not be merged.

    Args:
        named: q, k and v, (..., S, H, D), under the names that errors call them by.
        bias: Added to the scores; broadcastable to (..., H, Sq, Sk).
        mask: True where a query sees a key; broadcastable likewise.
        top_left: Aligns causal and the window top-left.
        **arguments: Those of `canonicalize`; alibi_slopes has shape (H,).
    """
    batch = next(iter(named.values())).shape[:-3]
    # The arguments, and the entries that dropout counts, are those of one batch axis.
    merged = {
        name: jax.ShapeDtypeStruct((math.prod(batch), *x.shape[-3:]), x.dtype)
        for name, x in named.items()
    }
    slopes, keys, spec, chosen = canonicalize(merged, "none", top_left, **arguments)
    if slopes is not None:
        slopes = slopes.reshape(*[1] * len(batch), *slopes.shape[1:])
    if keys is not None:
        keys = keys.reshape(*batch, *keys.shape[1:])
    operands = Operands(tuple(named.values()), slopes, keys)
    return _dispatch(operands, bias, mask, spec, chosen, return_lse=False)[0]


def dense_obstacle(bias: Any, mask: Any) -> str | None:
    """Why no kernel runs a call with these arrays, or None without them."""
    if bias is None and mask is None:
        return None
    given = "bias" if bias is not None else "mask"
    return f"a {given} array is passed, which no kernel reads"


def _flash_attn(
    named: dict[str, jax.Array],
    packing: _spec.Packing,
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    deterministic: Any,
    dropout_rng: Any,
    return_lse: Any,
    implementation: Any,
    unsupported: dict[str, Any],
) -> Result:
    slopes, keys, spec, chosen = canonicalize(
        named,
        packing,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        dropout_rng=dropout_rng,
        implementation=implementation,
        **unsupported,
    )
    return_lse = _arguments.static_flag(return_lse, "return_lse")
    operands = Operands(tuple(named.values()), slopes, keys)
    results = _run(operands, spec, chosen, return_lse)
    return (results[0], results[1]) if return_lse else results[0]


def canonicalize(
    named: Mapping[str, _shapes.Shaped],
    packing: _spec.Packing,
    top_left: bool = False,
    /,
    *,
    dropout_p: Any = 0.0,
    softmax_scale: Any = None,
    causal: Any = False,
    window_size: Any = (-1, -1),
    softcap: Any = 0.0,
    alibi_slopes: Any = None,
    deterministic: Any = False,
    dropout_rng: Any = None,
    implementation: Any = "auto",
    **unsupported: Any,
) -> tuple[
    jax.Array | None, jax.Array | None, _spec.AttentionSpec, _spec.Implementation
]:
    """Checks flash-attn's arguments and brings them into canonical form.

    Those by position are not a user's: by name they are refused as any unknown one.

    Returns:
        Slopes (1 or B, H), Philox keys (B, H, 2), spec and implementation.
    """
    _refuse_unknown(unsupported)
    chosen = _arguments.implementation(implementation)
    _arguments.check_qkv(named, packing)
    qkv = tuple(named.values())
    dims = _shapes.dimensions(qkv, packing)
    p = _arguments.dropout_p(dropout_p, dropout_rng)
    slopes = _arguments.slopes(alibi_slopes, dims.batch, dims.heads)
    keys = _arguments.dropout_keys(dropout_rng, p, dims.batch, dims.heads)
    spec = _arguments.make_spec(
        qkv,
        packing,
        scale=_arguments.softmax_scale(softmax_scale, dims.head_dim),
        limits=_arguments.window(window_size, _arguments.static_flag(causal, "causal")),
        top_left=top_left,
        cap=_arguments.softcap(softcap),
        alibi=slopes is not None,
        p=p,
        deterministic=_arguments.static_flag(deterministic, "deterministic"),
    )
    return slopes, keys, spec, chosen


def _run(
    operands: Operands,
    spec: _spec.AttentionSpec,
    implementation: _spec.Implementation,
    return_lse: bool,
) -> tuple[jax.Array, ...]:
    if implementation == "cuda":
        q = operands.qkv[0]
        obstacle = _support.call_obstacle(q.dtype, q.shape[-1], spec.softcap)
        if obstacle is not None:
            raise NotImplementedError(obstacle)
    return _vjp.attend(operands, spec, implementation, return_lse)


def _refuse_unknown(unsupported: dict[str, Any]) -> None:
    for name in unsupported:
        if name == "return_attn_probs":
            raise NotImplementedError(
                "return_attn_probs is not supported: the probabilities are never in "
                "memory. return_lse=True gives the log-sum-exp, and "
                "jax_flash_attn.testing.dropout_keep_mask the dropout mask."
            )
        raise TypeError(f"{name} is not an argument of flash attention.")


def _refuse_lengths(query_seq_lengths: Any, key_value_seq_lengths: Any) -> None:
    given = {
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
    }
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(
                f"{name} is not supported: pass a mask, or use "
                "jax.nn.dot_product_attention."
            )


def _local_window(value: Any, causal: bool) -> tuple[int, int]:
    if value is None:
        return _arguments.window((-1, -1), causal)
    if _arguments.is_int(value):
        value = (value, value)
    limits = _arguments.window(value, causal, "local_window_size")
    if min(value) < 0:
        raise ValueError(
            "local_window_size must hold sizes of at least 0 (jax.nn has no sign for "
            f"an unlimited side: pass a long window), got {value!r}."
        )
    return limits


def _dispatch(
    operands: Operands,
    bias: jax.Array | None,
    mask: jax.Array | None,
    spec: _spec.AttentionSpec,
    implementation: _spec.Implementation,
    return_lse: bool,
) -> tuple[jax.Array, ...]:
    """Attention, visibly on the JAX path where a bias or a mask array is passed."""
    obstacle = dense_obstacle(bias, mask)
    if obstacle is None:
        return _run(operands, spec, implementation, return_lse)
    if implementation == "cuda":
        raise NotImplementedError(obstacle)
    if implementation == "auto" and _support.on_gpu():
        _support.warn_of_fallback(obstacle)
    return _with_dense_arrays(operands, bias, mask, spec)


def _with_dense_arrays(
    operands: Operands,
    bias: jax.Array | None,
    mask: jax.Array | None,
    spec: _spec.AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    query, key, value = operands.qkv
    *batch, seqlen_q, heads, _ = query.shape
    seqlen_k = key.shape[-3]
    # As many axes as the scores: JAX may be told to promote no ranks.
    unit = (1,) * (len(batch) + 1)
    offset = jnp.arange(seqlen_k)[None, :] - jnp.arange(seqlen_q)[:, None]
    offset = offset.reshape(*unit, seqlen_q, seqlen_k)
    diagonal = spec.diagonal(seqlen_q, seqlen_k)
    visible = jnp.ones(offset.shape, bool)
    if spec.window_left >= 0:
        visible &= offset >= diagonal - spec.window_left
    if spec.window_right >= 0:
        visible &= offset <= diagonal + spec.window_right
    scores = (*batch, heads, seqlen_q, seqlen_k)
    bias = _arguments.dense(bias, "bias", scores)
    mask = _arguments.dense(mask, "mask", scores)
    if mask is not None:
        visible &= mask
    shift = None
    if operands.slopes is not None:
        dtype = np.promote_types(query.dtype, np.float32)
        slopes = jax.lax.stop_gradient(operands.slopes)[..., None, None].astype(dtype)
        distance = jnp.abs(offset - (seqlen_k - seqlen_q))
        # Counted from the nearest visible key: in a decode cache that is far away, and
        # slope * distance would leave the scores no digits.
        nearest = jnp.where(visible, distance, seqlen_q + seqlen_k)
        nearest = nearest.min(axis=-1, keepdims=True)
        shift = (slopes * nearest.astype(dtype))[..., 0]
        alibi = -slopes * (distance - nearest).astype(dtype)
        bias = alibi if bias is None else bias.astype(dtype) + alibi
    out, lse = dense.attention(
        query,
        _partitioning.repeat_unsplittable_heads(key, query),
        _partitioning.repeat_unsplittable_heads(value, query),
        bias,
        visible,
        softmax_scale=spec.softmax_scale,
        softcap=spec.softcap,
        dropout_keys=operands.dropout_keys,
        dropout_p=spec.dropout_p,
    )
    return out, lse if shift is None else lse - shift
