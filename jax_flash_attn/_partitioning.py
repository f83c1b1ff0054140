"""How automatic sharding splits a call over batch and heads.

Batch entries and key heads do not depend on each other, so each device computes its own
from what it holds, and nothing is communicated:

- A batch axis is split as the operands that have it are. Those in which it has length 1
  are whole on every device.
- Key heads are split over as many of the query heads' mesh axes, outermost first, as
  divide their number. Over the remaining ones they are whole; each device takes the key
  heads that its query heads use, and the gradients of keys and values are summed over
  those mesh axes, in float32: the only communication there is.
- Mesh axes that don't divide what they split are not used, nor are those over which a
  device's query heads would use parts of several groups (12 query and 4 key heads over
  6 devices). Nor are those that split sequences and head dims: XLA gathers there.

On an Explicit mesh the operands' types say how they are split, so a call becomes a
`shard_map`. On an Auto mesh XLA says it while it compiles, to `custom_partitioning`.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jax_flash_attn import _compat, _shapes

MeshAxes = tuple[str, ...]
"""Mesh axes that split one axis of an array, outermost first."""

AnyMesh = Mesh | AbstractMesh

Function = Callable[..., list[jax.Array]]
Roles = Sequence[_shapes.Role]


class Plan(NamedTuple):
    """How one call is split over a mesh."""

    mesh: AnyMesh
    batch_shape: tuple[int, ...]
    heads: int
    heads_k: int
    batch_axes: tuple[MeshAxes, ...]
    """For each batch axis."""
    head_axes: MeshAxes
    key_axes: MeshAxes
    """Those of `head_axes`, from the first one on, that split key heads, too."""

    @property
    def shared_axes(self) -> MeshAxes:
        """The mesh axes that split query heads and leave key heads whole."""
        return self.head_axes[len(self.key_axes) :]

    def sharding(self, x: Any, role: _shapes.Role) -> NamedSharding:
        """How an operand or result is split."""
        axes: list[MeshAxes | None] = [None] * len(x.shape)
        for n, (length, split) in enumerate(
            zip(self.batch_shape, self.batch_axes, strict=True)
        ):
            if x.shape[n] == length:
                axes[n] = split or None
        split = self.head_axes if role.heads == "query" else self.key_axes
        axes[role.heads_axis] = split or None
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def on_each_device(
        self, function: Function, taken: Roles, given: Roles
    ) -> Function:
        """What a device computes of `function`, from its parts of the operands."""

        def local(*operands: jax.Array) -> list[jax.Array]:
            with _compat.no_mesh():
                results = function(
                    *(
                        self._take_key_heads(x) if role.heads == "key" else x
                        for x, role in zip(operands, taken, strict=True)
                    )
                )
                return [
                    self._sum_key_heads(x) if role.heads == "key" else x
                    for x, role in zip(results, given, strict=True)
                ]

        return local

    def _used_key_heads(self) -> tuple[jax.Array | int, int]:
        """The first key head that this device's query heads use, and how many."""
        if not self.shared_axes:
            return 0, self.heads_k // _size(self.mesh, self.key_axes)
        group = self.heads // self.heads_k
        heads = self.heads // _size(self.mesh, self.head_axes)
        first = jax.lax.axis_index(self.shared_axes) * heads // group
        return first, max(heads // group, 1)

    def _take_key_heads(self, x: jax.Array) -> jax.Array:
        first, count = self._used_key_heads()
        if count == x.shape[-2]:
            return x
        return jax.lax.dynamic_slice_in_dim(x, first, count, axis=-2)

    def _sum_key_heads(self, x: jax.Array) -> jax.Array:
        """Gradients of all key heads from those of the used ones, on every device."""
        if not self.shared_axes:
            return x
        first, count = self._used_key_heads()
        part = x.astype(np.promote_types(x.dtype, np.float32))
        whole = self.heads_k // _size(self.mesh, self.key_axes)
        if count != whole:
            zeros = jnp.zeros((*x.shape[:-2], whole, x.shape[-1]), part.dtype)
            part = jax.lax.dynamic_update_slice_in_dim(zeros, part, first, axis=-2)
        return jax.lax.psum(part, self.shared_axes).astype(x.dtype)


def plan(mesh: AnyMesh, arrays: Sequence[Any], roles: Roles) -> Plan:
    """Decides how to split a call from how its operands and results are split.

    Args:
        mesh: The mesh.
        arrays: Shapes with shardings; the first array that is split at all decides for
            each axis, as far as it can be followed.
        roles: The roles of the arrays.

    Returns:
        The plan, which may split nothing.
    """
    batch_shape = _shapes.common_batch_shape(arrays, roles)
    used: set[str] = set()

    def choose(length: int, wishes: Iterator[MeshAxes]) -> MeshAxes:
        wish = next((w for w in wishes if w), ())
        free = tuple(axis for axis in wish if axis not in used)
        return next(p for p in _prefixes(free) if _divides(mesh, p, length))

    batch_axes = []
    for n, length in enumerate(batch_shape):
        wishes = (mesh_axes(x, n) for x in arrays if x.shape[n] == length)
        batch_axes.append(choose(length, wishes))
        used.update(batch_axes[-1])

    # Query heads first: an operand with key heads can't say how to split a group.
    ordered = sorted(zip(arrays, roles, strict=True), key=lambda x: x[1].heads == "key")
    heads, heads_k = (_num_heads(arrays, roles, whose) for whose in ("query", "key"))
    heads_k = heads_k or heads
    head_axes = choose(heads, (mesh_axes(x, role.heads_axis) for x, role in ordered))
    head_axes = next(
        p for p in _prefixes(head_axes) if _uses_whole_heads(mesh, p, heads, heads_k)
    )
    key_axes = next(p for p in _prefixes(head_axes) if _divides(mesh, p, heads_k))
    return Plan(
        mesh, batch_shape, heads, heads_k, tuple(batch_axes), head_axes, key_axes
    )


def sharding_rule(
    mesh: Mesh, taken: Sequence[Any], given: Sequence[Any], roles: Roles
) -> SdyShardingRule:
    """Which axes Shardy splits alike.

    Args:
        mesh: The mesh.
        taken: Shapes of the operands.
        given: Shapes of the results.
        roles: The roles of operands and results.
    """
    arrays = [*taken, *given]
    batch_shape = _shapes.common_batch_shape(arrays, roles)
    heads, heads_k = (_num_heads(arrays, roles, whose) for whose in ("query", "key"))
    is_linked = _divide_alike(mesh, heads, heads_k or heads)
    names = {"query": "h", "key": "h" if is_linked else "k"}
    whole: list[str] = []

    def mapping(x: Any, role: _shapes.Role) -> ArrayMapping:
        factors = []
        for n, length in enumerate(x.shape):
            if n == len(x.shape) + role.heads_axis:
                factors.append(names[role.heads])
            elif n < len(batch_shape) and length == batch_shape[n]:
                factors.append(f"b{n}")
            else:
                whole.append(f"w{len(whole)}")
                factors.append(whole[-1])
        return ArrayMapping(*factors)

    mappings = [mapping(x, role) for x, role in zip(arrays, roles, strict=True)]
    return SdyShardingRule(
        tuple(mappings[: len(taken)]),
        tuple(mappings[len(taken) :]),
        need_replication_factors=tuple(whole),
    )


def lower(
    ctx: Any, function: Function, operands: Sequence[Any], taken: Roles, given: Roles
) -> Any:
    """Lowers a function of whole operands so that automatic sharding splits it.

    Args:
        ctx: The lowering context of the primitive.
        function: What the primitive computes; it may be traced for other batches and
            numbers of heads than the primitive's.
        operands: The operands, as values of the program that is lowered.
        taken: Their roles.
        given: The roles of the results.
    """
    roles, on_device = [*taken, *given], function
    explicit = _compat.explicit_mesh(ctx)
    if explicit is not None:
        chosen = plan(explicit, [*ctx.avals_in, *ctx.avals_out], roles)
        split = _split_as_typed(
            chosen, explicit, on_device, taken, given, ctx.avals_out
        )
        bare = ctx.replace(avals_in=_compat.without_varying_axes(ctx.avals_in))
        return mlir.lower_fun(split, multiple_results=True)(bare, *operands)
    if _compat.is_manual(ctx):
        return mlir.lower_fun(function, multiple_results=True)(ctx, *operands)

    def partition(mesh: Mesh, arguments: Any, results: Any) -> Any:
        chosen = plan(mesh, [*arguments, *results], roles)
        return (
            mesh,
            chosen.on_each_device(on_device, taken, given),
            [chosen.sharding(x, r) for x, r in zip(results, given, strict=True)],
            tuple(chosen.sharding(x, r) for x, r in zip(arguments, taken, strict=True)),
        )

    def infer(mesh: Mesh, arguments: Any, results: Any) -> Any:
        return partition(mesh, arguments, results)[2]

    def rule(mesh: Mesh, *unused: Any) -> SdyShardingRule:
        return sharding_rule(mesh, ctx.avals_in, ctx.avals_out, roles)

    if _compat.partitioned_mesh(ctx) is not None:
        function = _compat.partitioned(function, partition, infer, rule)

    def whole(*arrays: jax.Array) -> Any:
        with _compat.no_mesh():
            return function(*arrays)

    bare = ctx.replace(avals_in=_compat.without_shardings(ctx.avals_in))
    return mlir.lower_fun(whole, multiple_results=True)(bare, *operands)


def _split_as_typed(
    chosen: Plan,
    mesh: AbstractMesh,
    function: Function,
    taken: Roles,
    given: Roles,
    results: Sequence[Any],
) -> Function:
    """`function` of whole operands on an Explicit mesh, split by `shard_map`.

    What else the operands' types say is split is gathered before, and what those of
    the results say is split after.
    """

    def shardings(arrays: Sequence[Any], roles: Roles) -> list[NamedSharding]:
        return [chosen.sharding(x, r) for x, r in zip(arrays, roles, strict=True)]

    def place(arrays: Any, shardings: Sequence[Any]) -> list[jax.Array]:
        pairs = zip(arrays, shardings, strict=True)
        return [jax.sharding.reshard(x, sharding) for x, sharding in pairs]

    def run(*operands: jax.Array) -> list[jax.Array]:
        before, after = shardings(operands, taken), shardings(results, given)
        with jax.sharding.use_abstract_mesh(mesh):
            split = jax.shard_map(
                chosen.on_each_device(function, taken, given),
                in_specs=tuple(x.spec for x in before),
                out_specs=[x.spec for x in after],
                axis_names=_compat.explicit_axes(mesh),
                check_vma=False,
            )
            return place(split(*place(operands, before)), [x.sharding for x in results])

    return run


def repeat_unsplittable_heads(x: jax.Array, q: jax.Array) -> jax.Array:
    """Keys or values with a head for each query head, where groups can't be split.

    On an Explicit mesh, to group the heads of q is a reshape that keeps their split: it
    takes mesh axes that divide the number of groups, or one group.
    """
    sharding, heads, heads_k = jax.typeof(q).sharding, q.shape[-2], x.shape[-2]
    split = mesh_axes(jax.typeof(q), q.ndim - 2)
    if heads_k in (1, heads) or _divides(sharding.mesh, split, heads_k):
        return x
    batch = [mesh_axes(jax.typeof(x), n) or None for n in range(x.ndim - 3)]
    spec = PartitionSpec(*batch, None, split, None)
    x = jnp.repeat(x, heads // heads_k, axis=-2)
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def mesh_axes(x: Any, axis: int) -> MeshAxes:
    """The mesh axes that split an axis of an array."""
    spec = tuple(getattr(getattr(x, "sharding", None), "spec", ()))
    entries = (*spec, *[None] * (len(x.shape) - len(spec)))
    entry = entries[axis]
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _num_heads(arrays: Sequence[Any], roles: Roles, whose: str) -> int:
    """How many heads there are of this kind; 0 if no array has them."""
    found = (
        x.shape[role.heads_axis]
        for x, role in zip(arrays, roles, strict=True)
        if role.heads == whose
    )
    return next(found, 0)


def _size(mesh: AnyMesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _divides(mesh: AnyMesh, axes: Sequence[str], length: int) -> bool:
    return not axes or (length > 0 and length % _size(mesh, axes) == 0)


def _prefixes(axes: MeshAxes) -> Iterator[MeshAxes]:
    """All of the axes, then ever fewer, the last one left out first."""
    return (axes[:n] for n in range(len(axes), -1, -1))


def _uses_whole_heads(mesh: AnyMesh, axes: MeshAxes, heads: int, heads_k: int) -> bool:
    """Whether a device's query heads are groups, or all of one group."""
    if not axes:
        return True
    group, local = heads // heads_k, heads // _size(mesh, axes)
    return local % group == 0 or group % local == 0


def _divide_alike(mesh: Mesh, heads: int, heads_k: int) -> bool:
    """Whether all mesh axes that can split the query heads can split the key heads.

    Only then may Shardy split key heads as it does query heads: where it may not, a
    split that doesn't divide the key heads would leave some devices without any.
    """
    names = mesh.axis_names
    subsets = itertools.chain.from_iterable(
        itertools.combinations(names, count) for count in range(1, len(names) + 1)
    )
    return all(
        _divides(mesh, axes, heads_k) for axes in subsets if _divides(mesh, axes, heads)
    )
