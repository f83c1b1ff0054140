"""Flash attention with the interface of Haiku's `MultiHeadAttention`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_flash_attn import _arguments, _spec
from jax_flash_attn.integrations import _options

try:
    import haiku as hk
except ModuleNotFoundError as error:
    raise ImportError(
        "jax_flash_attn.integrations.haiku needs dm-haiku: pip install dm-haiku"
    ) from error


class MultiHeadAttention(hk.MultiHeadAttention):
    """`hk.MultiHeadAttention` on flash attention, with the same parameters.

    Arguments, names and shapes of parameters are Haiku's, so that a checkpoint of one
    layer loads into the other. What the kernel should do is said by name.

    Haiku keeps mixed-precision policies by class, so one of `hk.MultiHeadAttention`
    does not count here: pass this class to `hk.mixed_precision.set_policy`.
    """

    def __init__(
        self,
        num_heads: int,
        key_size: int,
        w_init_scale: float | None = None,
        *,
        w_init: hk.initializers.Initializer | None = None,
        with_bias: bool = True,
        b_init: hk.initializers.Initializer | None = None,
        value_size: int | None = None,
        model_size: int | None = None,
        name: str | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        softmax_scale: float | None = None,
        alibi_slopes: Sequence[float] | None = None,
        deterministic_gradients: bool = False,
        implementation: _spec.Implementation = "auto",
    ) -> None:
        """Makes the layer.

        Args:
            num_heads: Number of heads.
            key_size: Head dim of queries and keys.
            w_init_scale: See `hk.MultiHeadAttention`, as for the next five.
            w_init: Initialiser of the weights.
            with_bias: Adds biases to the projections.
            b_init: Initialiser of the biases.
            value_size: Head dim of the values; key_size by default. Where it differs,
                the narrower of the two is padded with zeros around the kernel.
            model_size: Features of the output; num_heads * key_size by default.
            name: Name of the module.
            causal: See `flash_attn_func`, as for all that follow.
            window_size: See `flash_attn_func`.
            softcap: See `flash_attn_func`.
            softmax_scale: See `flash_attn_func`.
            alibi_slopes: One float for each head.
            deterministic_gradients: `deterministic` of `flash_attn_func`.
            implementation: See `flash_attn_func`.

        Raises:
            ValueError, TypeError: an argument is wrong; the text names it.
        """
        super().__init__(
            num_heads,
            key_size,
            w_init_scale,
            w_init=w_init,
            with_bias=with_bias,
            b_init=b_init,
            value_size=value_size,
            model_size=model_size,
            name=name,
        )
        self.options = _options.Options(
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            softmax_scale=softmax_scale,
            alibi_slopes=alibi_slopes,  # type: ignore[arg-type]  # becomes a tuple
            deterministic_gradients=deterministic_gradients,
            implementation=implementation,
        )

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array | None = None,
        *,
        dropout_rate: float = 0.0,
    ) -> jax.Array:
        """Returns the projected attention of query over key and value.

        Args:
            query: (..., queries, features).
            key: (..., keys, features).
            value: (..., keys, features).
            mask: Nonzero where a query sees a key; (..., heads or 1, queries, keys),
                with the batch axes of query. Takes the JAX path and quadratic memory,
                with a warning on a GPU.
            dropout_rate: Share of attention weights that is dropped, drawn from
                `hk.next_rng_key()`; Haiku's own layer has none.

        Returns:
            (..., queries, model_size). A query that sees no key attends to nothing
            (Haiku's averages the values there).

        Raises:
            ValueError, TypeError: an argument is wrong; the text names it.
            NotImplementedError: an argument is not supported.

        Source: `hk.MultiHeadAttention`.
        """
        q = self._project(query, self.key_size, "query")
        k = self._project(key, self.key_size, "key")
        v = self._project(value, self.value_size, "value")
        if mask is not None:
            mask = _arguments.array(mask, "mask")
            if mask.ndim != query.ndim + 1:
                raise ValueError(
                    f"mask must have {query.ndim + 1} axes, (..., heads, queries, "
                    f"keys), got shape {mask.shape}."
                )
        dtype = jnp.result_type(q, k, v)
        rate = _arguments.static_number(dropout_rate, "dropout_rate")
        rng = hk.next_rng_key() if rate > 0 else None
        out = self.options.attend(
            q.astype(dtype),
            k.astype(dtype),
            v.astype(dtype),
            mask=mask,
            dropout_p=_arguments.dropout_p(rate, rng, "dropout_rate"),
            dropout_rng=rng,
        )
        return self._linear(self.model_size)(out.reshape(*query.shape[:-1], -1))

    @hk.transparent
    def _linear(self, size: int, name: str | None = None) -> hk.Linear:
        return hk.Linear(
            size,
            w_init=self.w_init,
            with_bias=self.with_bias,
            b_init=self.b_init,
            name=name,
        )

    @hk.transparent
    def _project(self, x: jax.Array, head_dim: int, name: str) -> jax.Array:
        projected = self._linear(self.num_heads * head_dim, name)(x)
        return projected.reshape(*x.shape[:-1], self.num_heads, head_dim)
