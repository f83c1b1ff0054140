"""The differentiated function: a `jax.custom_vjp` over the two primitives."""

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jax_flash_attn import _compat, _spec
from jax_flash_attn._primitives import Operands, backward_p, forward_p

OUT_NAME = "flash_attention_out"
LSE_NAME = "flash_attention_lse"
"""The names under which a remat policy can keep the two residuals of the backward."""


def attend(
    operands: Operands,
    spec: _spec.AttentionSpec,
    implementation: _spec.Implementation,
    return_lse: bool,
) -> tuple[jax.Array, ...]:
    """Returns (out,) or (out, lse), differentiable with respect to q, k and v."""
    count = len(operands.qkv)
    varying = _compat.cast_to_common_varying(
        *operands.qkv, operands.slopes, operands.dropout_keys
    )
    qkv, (slopes, dropout_keys) = varying[:count], varying[count:]
    return _attend(spec, implementation, return_lse, qkv, slopes, dropout_keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
    spec: _spec.AttentionSpec,
    implementation: _spec.Implementation,
    return_lse: bool,
    qkv: tuple[jax.Array, ...],
    slopes: jax.Array | None,
    dropout_keys: jax.Array | None,
) -> tuple[jax.Array, ...]:
    results, _ = _forward(spec, implementation, return_lse, qkv, slopes, dropout_keys)
    return results


def _forward(
    spec: _spec.AttentionSpec,
    implementation: _spec.Implementation,
    return_lse: bool,
    qkv: tuple[jax.Array, ...],
    slopes: jax.Array | None,
    dropout_keys: jax.Array | None,
) -> tuple[tuple[jax.Array, ...], Any]:
    operands = Operands(qkv, slopes, dropout_keys)
    out, lse = forward_p.bind(
        *operands.flat(), spec=spec, implementation=implementation
    )
    out = checkpoint_name(out, OUT_NAME)
    lse = checkpoint_name(lse, LSE_NAME)
    return ((out, lse) if return_lse else (out,)), (operands, out, lse)


def _backward(
    spec: _spec.AttentionSpec,
    implementation: _spec.Implementation,
    return_lse: bool,
    residuals: tuple[Operands, jax.Array, jax.Array],
    cotangents: tuple[jax.Array, ...],
) -> tuple[Any, None, None]:
    operands, out, lse = residuals
    gradients = backward_p.bind(
        *operands.flat(),
        out,
        lse,
        *cotangents,
        spec=spec,
        implementation=implementation,
        has_dlse=return_lse,
    )
    # As in flash-attn, slopes are constants: no gradient flows to them.
    return tuple(gradients), None, None


_attend.defvjp(_forward, _backward)
