"""The one place that looks at which JAX this is."""

from typing import Any

import jax


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes over which `x` varies inside `shard_map(check_vma=True)`."""
    aval = jax.typeof(x)
    manual_axis_type = getattr(aval, "manual_axis_type", None)
    if manual_axis_type is not None:  # JAX 0.10 and later
        return frozenset(manual_axis_type.varying)
    return frozenset(getattr(aval, "vma", ()))


def _to_varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    lax: Any = jax.lax  # which of the two it has depends on the version
    if hasattr(lax, "pcast"):
        return lax.pcast(x, axes, to="varying")
    return lax.pvary(x, axes)  # JAX 0.8


def cast_to_common_varying(*operands: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """Casts every operand to the union of the operands' varying mesh axes.

    The cast's own transpose then sums the gradient of an operand that is replicated
    over an axis the others vary on. Outside `shard_map` this does nothing.
    """
    given = [x for x in operands if x is not None]
    union = frozenset().union(*(varying_axes(x) for x in given))
    if not union:
        return operands
    return tuple(
        x
        if x is None or varying_axes(x) == union
        else _to_varying(x, tuple(sorted(union - varying_axes(x))))
        for x in operands
    )
