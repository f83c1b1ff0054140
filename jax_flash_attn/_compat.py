"""The one place that looks at which JAX this is."""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.sharding import AbstractMesh, AxisType, Mesh

# Private, and without them a call is right and unsplit.
try:
    from jax._src.dispatch import prim_requires_devices_during_lowering
except ImportError:
    prim_requires_devices_during_lowering = set()
try:
    from jax._src.mesh import thread_resources as _entered
except ImportError:
    thread_resources: Any = None
else:
    thread_resources = _entered


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


CACHE_KEY_OPTION = "jax_remove_custom_partitioning_ptr_from_cache_key"
"""What lets a second process find, in JAX's compilation cache, programs with
`custom_partitioning`; JAX may drop it."""


def needs_cache_key_option() -> bool:
    """Whether JAX's compilation cache misses automatically split programs."""
    return not getattr(jax.config, CACHE_KEY_OPTION, True)


def require_devices_to_lower(primitive: Primitive) -> None:
    """Has JAX say, to the lowering of a primitive, for which devices it lowers."""
    prim_requires_devices_during_lowering.add(primitive)


def is_manual(ctx: Any) -> bool:
    """Whether a lowering is inside `shard_map` or `pmap`, over any mesh axis."""
    return bool(getattr(ctx.module_context.axis_context, "manual_axes", ()))


def is_export_of_automatic_sharding(ctx: Any) -> bool:
    """Whether this lowers for `jax.export` what XLA is to split over devices."""
    context = ctx.module_context.axis_context
    return (
        ctx.module_context.lowering_parameters.for_export
        and getattr(context, "num_devices", 1) > 1
        and not is_manual(ctx)
        and explicit_mesh(ctx) is None
    )


def partitioned_mesh(ctx: Any) -> Mesh | None:
    """The mesh over which XLA splits the program that is lowered.

    None for a single device, and for `jax.export`, which cannot store a partition rule.
    """
    context = ctx.module_context.axis_context
    devices = getattr(context, "device_assignment", None)
    if devices is None or len(devices) == 1:
        return None
    if ctx.module_context.lowering_parameters.for_export:
        return None
    mesh = getattr(context, "abstract_mesh", None)
    if mesh is not None and not mesh.empty:
        return Mesh(np.array(devices).reshape(mesh.axis_sizes), mesh.axis_names)
    if thread_resources is None or thread_resources.env.physical_mesh.empty:
        return None
    return thread_resources.env.physical_mesh  # of `with mesh:`


def explicit_mesh(ctx: Any) -> AbstractMesh | None:
    """The mesh that types split operands over; None where XLA, too, may split them."""
    meshes = (x.sharding.mesh for x in ctx.avals_in)
    mesh = next((mesh for mesh in meshes if explicit_axes(mesh)), None)
    if mesh is None or AxisType.Auto in mesh.axis_types:
        return None
    return mesh


def explicit_axes(mesh: AbstractMesh) -> set[str]:
    """The mesh axes over which types say what is split."""
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in axes if kind == AxisType.Explicit}


def no_mesh() -> contextlib.AbstractContextManager[Any]:
    """Inside, arrays are one device's: an Explicit mesh around has no say in them."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def without_shardings(avals: Any) -> list[Any]:
    """The abstract values with shape and dtype alone."""
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in avals]


def without_varying_axes(avals: Any) -> list[Any]:
    """The abstract values with shape, dtype and sharding alone."""
    return [jax.core.ShapedArray(x.shape, x.dtype, sharding=x.sharding) for x in avals]


def partitioned(
    function: Callable[..., Any],
    partition: Callable[..., Any],
    infer_results: Callable[..., Any],
    sharding_rule: Callable[..., Any],
) -> Callable[..., Any]:
    """A function that `custom_partitioning` splits, under Shardy and under GSPMD."""
    result = custom_partitioning(function)
    optional = {"infer_sharding_from_operands": infer_results}  # GSPMD's, going away
    known = inspect.signature(result.def_partition).parameters
    result.def_partition(
        partition,
        sharding_rule=sharding_rule,
        **{name: rule for name, rule in optional.items() if name in known},
    )
    return result
