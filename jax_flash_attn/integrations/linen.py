"""Flash attention in flax linen's `MultiHeadDotProductAttention`."""

from collections.abc import Sequence
from typing import Any

import jax

from jax_flash_attn import _arguments, _spec
from jax_flash_attn.integrations import _options

try:
    from flax.linen.dtypes import promote_dtype
except ModuleNotFoundError as error:
    raise ImportError(
        "jax_flash_attn.integrations.linen needs flax: pip install flax"
    ) from error


class AttentionFn(_options.Options):
    """What `attention_fn` returns: a function of what linen's layer passes."""

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: jax.typing.DTypeLike | None = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
    ) -> jax.Array:
        """Returns attention with the arguments of `nn.dot_product_attention`.

        Args:
            query: (..., queries, heads, head_dim).
            key: (..., keys, heads, head_dim).
            value: (..., keys, heads, value_dim).
            bias: Floats added to the scores; ints are refused. Broadcastable to (...,
                heads, queries, keys). Takes the JAX path and quadratic memory, with a
                warning on a GPU.
            mask: Nonzero where a query sees a key; otherwise as bias.
            broadcast_dropout: Not followed: every batch entry and head draws its own
                mask, as flax does with False.
            dropout_rng: JAX PRNG key, needed where dropout is on.
            dropout_rate: Share of probabilities that is dropped.
            deterministic: Drops nothing.
            dtype: Of the computation; inferred from the arrays by default.
            precision: Met by any value: products are exact to the dtype, sums float32.
            module: Refused: there are no weights to sow.
            force_fp32_for_softmax: Met by either value: the softmax is in float32.
            einsum_dot_general: Refused, as the next two: products are the kernel's.
            qk_attn_weights_einsum: Refused.
            attn_weights_value_einsum: Refused.

        Returns:
            (..., queries, heads, value_dim). A query that sees no key gets 0 (flax
            averages the values there).

        Raises:
            ValueError, TypeError: an argument is wrong; the text names it.
            NotImplementedError: an argument is not supported.

        Source: `flax.linen.dot_product_attention`.
        """
        refused = {
            "einsum_dot_general": einsum_dot_general,
            "qk_attn_weights_einsum": qk_attn_weights_einsum,
            "attn_weights_value_einsum": attn_weights_value_einsum,
        }
        for name, given in refused.items():
            if given is not None:
                raise NotImplementedError(
                    f"{name} is not supported: the products are the kernel's. Use "
                    "nn.dot_product_attention."
                )
        if module is not None:
            raise NotImplementedError(
                "sow_weights=True is not supported: the attention weights are never "
                "in memory. Use nn.dot_product_attention."
            )
        drops = not _arguments.static_flag(deterministic, "deterministic")
        rate = dropout_rate if drops else 0.0
        rate = _arguments.dropout_p(rate, dropout_rng, "dropout_rate")
        query, key, value = promote_dtype(query, key, value, dtype=dtype)
        return self.attend(
            query, key, value, bias, mask, dropout_p=rate, dropout_rng=dropout_rng
        )


def attention_fn(
    *arrays: Any,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    alibi_slopes: Sequence[float] | None = None,
    deterministic_gradients: bool = False,
    implementation: _spec.Implementation = "auto",
) -> AttentionFn:
    """Returns an `attention_fn` for linen's `MultiHeadDotProductAttention`.

        nn.MultiHeadDotProductAttention(
            num_heads=8, attention_fn=attention_fn(causal=True)
        )

    The layer's mask argument stays free: an array passed there takes the plain JAX
    path, as every step of `decode=True` does, which passes one.

    Args:
        *arrays: Nothing: what is passed here is refused.
        causal: See `flash_attn_func`; aligned bottom-right, so that it holds for
            `decode=True` as well.
        window_size: See `flash_attn_func`; not with `decode=True`.
        softcap: See `flash_attn_func`.
        softmax_scale: See `flash_attn_func`.
        alibi_slopes: One float for each query head.
        deterministic_gradients: `deterministic` of `flash_attn_func`.
        implementation: See `flash_attn_func`.

    Returns:
        An `AttentionFn`; two made with the same options are equal.

    Raises:
        ValueError, TypeError: an argument is wrong; the text names it.

    Numerics: dropout draws a mask for each batch entry and head, by Philox
    (docs/numerics.md): flax's broadcast_dropout=True, its default, is not followed.

    Source: flax's `MultiHeadDotProductAttention.attention_fn`.
    """
    if arrays:
        raise TypeError(
            f"attention_fn takes options by name, got {len(arrays)} positional "
            "arguments: it makes the function that a layer takes, as in "
            "attention_fn=attention_fn(causal=True)."
        )
    return AttentionFn(
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        softmax_scale=softmax_scale,
        alibi_slopes=alibi_slopes,  # type: ignore[arg-type]  # becomes a tuple
        deterministic_gradients=deterministic_gradients,
        implementation=implementation,
    )
