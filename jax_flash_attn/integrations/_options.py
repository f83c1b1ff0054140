"""What a layer asks of the kernel, fixed when the layer is made."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_flash_attn import _arguments, _spec, attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `flash_attn_func` that a layer holds; hashable, equal by value."""

    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    softmax_scale: float | None = None
    alibi_slopes: tuple[float, ...] | None = None
    deterministic_gradients: bool = False
    implementation: _spec.Implementation = "auto"

    def __post_init__(self) -> None:
        """Refuses what is wrong before a layer runs; brings the rest into one form.

        A list or an array would keep a layer from being hashed.
        """
        _arguments.static_flag(self.causal, "causal")
        _arguments.static_flag(self.deterministic_gradients, "deterministic_gradients")
        _arguments.implementation(self.implementation)
        _arguments.window(self.window_size, self.causal)
        scale = self.softmax_scale
        if scale is not None:
            scale = _arguments.static_number(scale, "softmax_scale")
        canonical = {
            "window_size": tuple(int(side) for side in self.window_size),
            "softcap": _arguments.softcap(self.softcap),
            "softmax_scale": scale,
            "alibi_slopes": _slopes(self.alibi_slopes),
        }
        for name, value in canonical.items():
            object.__setattr__(self, name, value)

    @property
    def limits_keys(self) -> bool:
        """Whether causal or a window hides keys by their distance."""
        return self.causal or self.window_size != (_spec.UNBOUNDED, _spec.UNBOUNDED)

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        dropout_p: float = 0.0,
        dropout_rng: jax.Array | None = None,
        top_left: bool = False,
        causal: bool = False,
    ) -> jax.Array:
        """Returns attention, (..., Sq, H, Dv), over any number of batch axes.

        Args:
            query: (..., Sq, H, D).
            key: (..., Sk, Hk, D).
            value: (..., Sk, Hk, Dv); where Dv is not D, the narrower ones are padded.
            bias: Added to the scores, broadcastable to (..., H, Sq, Sk).
            mask: Nonzero where a query sees a key, broadcastable likewise.
            dropout_p: Share of probabilities that is dropped.
            dropout_rng: The key that they are drawn from.
            top_left: Aligns causal and the window top-left.
            causal: Limits the keys as if the layer had been made with causal=True.
        """
        named = _arguments.arrays(query=query, key=key, value=value)
        query, key, value = named.values()
        _check_batch(named)
        if mask is not None:
            mask = _arguments.array(mask, "mask").astype(bool)
        self._refuse_window_of_cache(query, key, mask)
        head_dim, value_dim = query.shape[-1], value.shape[-1]
        widest = max(head_dim, value_dim)
        scale = self.softmax_scale
        slopes = self.alibi_slopes
        out = attention.attend(
            {name: _widen(x, widest) for name, x in named.items()},
            bias,
            mask,
            top_left,
            dropout_p=dropout_p,
            softmax_scale=head_dim**-0.5 if scale is None else scale,
            causal=self.causal or causal,
            window_size=self.window_size,
            softcap=self.softcap,
            alibi_slopes=None if slopes is None else jnp.asarray(slopes, jnp.float32),
            deterministic=self.deterministic_gradients,
            dropout_rng=dropout_rng,
            implementation=self.implementation,
        )
        return out[..., :value_dim]

    def _refuse_window_of_cache(
        self, query: jax.Array, key: jax.Array, mask: jax.Array | None
    ) -> None:
        """The mask alone knows where in a cache the one query of a step stands."""
        is_step = mask is not None and query.shape[-3] == 1 < key.shape[-3]
        if is_step and self.window_size[0] != _spec.UNBOUNDED:
            raise NotImplementedError(
                f"window_size={self.window_size} and a mask over {key.shape[-3]} keys "
                "of one query: a decode cache is longer than what it holds, and a "
                "window counts from its end. Pass the window in the mask, to a layer "
                "made without window_size."
            )


def _slopes(value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    sized = isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1
    if isinstance(value, str) or not sized:
        raise TypeError(f"alibi_slopes must be a sequence of floats, got {value!r}.")
    return tuple(_arguments.static_number(slope, "alibi_slopes") for slope in value)


def _check_batch(named: dict[str, jax.Array]) -> None:
    query = named["query"]
    for name, x in named.items():
        if x.ndim < 3:
            raise ValueError(
                f"{name} must have shape (..., length, heads, head_dim), got {x.shape}."
            )
        if x.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name} must have the batch axes of query, {query.shape[:-3]}, got "
                f"{x.shape[:-3]}: {name}.shape is {x.shape}."
            )


def _widen(x: jax.Array, head_dim: int) -> jax.Array:
    missing = head_dim - x.shape[-1]
    if missing == 0:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
