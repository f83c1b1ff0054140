"""Flash attention with the parameters of Equinox's `MultiheadAttention`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_flash_attn import _arguments, _spec
from jax_flash_attn.integrations import _options

try:
    import equinox as eqx
except ModuleNotFoundError as error:
    raise ImportError(
        "jax_flash_attn.integrations.equinox needs equinox: pip install equinox"
    ) from error

ProcessHeads = Callable[
    [jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]
]
"""From query, key and value heads to others of the same shapes."""


def multihead_attention(
    layer: eqx.nn.MultiheadAttention,
    query: jax.Array,
    key_: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
    inference: bool | None = None,
    process_heads: ProcessHeads | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    alibi_slopes: Sequence[float] | None = None,
    deterministic_gradients: bool = False,
    implementation: _spec.Implementation = "auto",
) -> jax.Array:
    """Returns what `layer(query, key_, value)` computes, on flash attention.

    `multihead_attention(layer, x, x, x, causal=True)` stands for
    `layer(x, x, x, mask)` with a causal mask; `jax.vmap` adds a batch, as for layers.

    Args:
        layer: Its projections, sizes and dropout are used.
        query: (queries, query_size).
        key_: (keys, key_size).
        value: (keys, value_size).
        mask: True where a query sees a key; (queries, keys) or (heads, queries, keys).
            Takes the JAX path and quadratic memory, with a warning on a GPU.
        key: JAX PRNG key, needed where the layer drops attention weights.
        inference: Drops nothing; the layer's own by default.
        process_heads: See `eqx.nn.MultiheadAttention`; rotary embeddings go here.
        causal: See `flash_attn_func`, as for all that follow.
        window_size: See `flash_attn_func`.
        softcap: See `flash_attn_func`.
        softmax_scale: See `flash_attn_func`.
        alibi_slopes: One float for each head.
        deterministic_gradients: `deterministic` of `flash_attn_func`.
        implementation: See `flash_attn_func`.

    Returns:
        (queries, output_size). A query that sees no key attends to nothing (Equinox
        averages the values there). Where qk_size is not vo_size, the narrower is padded
        with zeros around the kernel.

    Raises:
        ValueError, TypeError: an argument is wrong; the text names it.
        NotImplementedError: an argument is not supported.

    Numerics: dropout is drawn by Philox (docs/numerics.md), not by Equinox's generator.

    Source: `eqx.nn.MultiheadAttention.__call__`.
    """
    if not isinstance(layer, eqx.nn.MultiheadAttention):
        raise TypeError(f"layer must be an eqx.nn.MultiheadAttention, got {layer!r}.")
    options = _options.Options(
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        softmax_scale=softmax_scale,
        alibi_slopes=alibi_slopes,  # type: ignore[arg-type]  # becomes a tuple
        deterministic_gradients=deterministic_gradients,
        implementation=implementation,
    )
    named = _arguments.arrays(query=query, key_=key_, value=value)
    query, key_, value = named.values()
    _check_rows(named)
    heads = (
        _project(layer.query_proj, query, layer.num_heads),
        _project(layer.key_proj, key_, layer.num_heads),
        _project(layer.value_proj, value, layer.num_heads),
    )
    if process_heads is not None:
        shapes = [x.shape for x in heads]
        heads = process_heads(*heads)
        if [x.shape for x in heads] != shapes:
            raise ValueError(
                f"process_heads must return heads of shapes {shapes}, got "
                f"{[x.shape for x in heads]}."
            )
    if mask is not None:
        mask = _arguments.array(mask, "mask")
        if mask.ndim not in (2, 3):
            raise ValueError(
                "mask must have shape (queries, keys) or (heads, queries, keys), got "
                f"{mask.shape}."
            )
    q, k, v = (x.astype(jnp.result_type(*heads)) for x in heads)
    p = _dropout_p(layer.dropout, key, inference)
    out = options.attend(q, k, v, mask=mask, dropout_p=p, dropout_rng=key)
    return jax.vmap(layer.output_proj)(out.reshape(query.shape[0], -1))


def _check_rows(named: dict[str, jax.Array]) -> None:
    for name, x in named.items():
        if x.ndim != 2:
            raise ValueError(
                f"{name} must have shape (length, features), got {x.shape}: jax.vmap "
                "adds a batch."
            )
    length = named["key_"].shape[0]
    if named["value"].shape[0] != length:
        raise ValueError(
            f"value must have the length of key_, {length}, got "
            f"{named['value'].shape[0]}."
        )


def _project(linear: Any, x: jax.Array, num_heads: int) -> jax.Array:
    return jax.vmap(linear)(x).reshape(x.shape[0], num_heads, -1)


def _dropout_p(dropout: Any, key: jax.Array | None, inference: bool | None) -> float:
    if inference is None:
        inference = dropout.inference
    if _arguments.static_flag(inference, "inference"):
        return 0.0
    return _arguments.dropout_p(dropout.p, key, "layer.dropout.p", "key")
