"""The forward and backward primitives: abstract values, lowering for each platform.

A primitive takes operands with any number of batch axes (`_batching`), is split over
the devices of a mesh where XLA splits the program (`_partitioning`), and each part is
computed by a function of operands with one batch axis: the kernel or plain JAX.

Operands of `forward_p` are those of an `Operands` value in order; those of `backward_p`
add out, lse, dout and, when `has_dlse`, dlse. Results are (out, lse) and the gradients
of the operands that carry q, k and v.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir, xla

from jax_flash_attn import (
    _batching,
    _compat,
    _ffi,
    _key_parts,
    _partitioning,
    _shapes,
    _spec,
    _support,
    blockwise,
)


class Operands(NamedTuple):
    """The array operands of a call: what carries q, k and v, then the optional ones."""

    qkv: tuple[jax.Array, ...]
    slopes: jax.Array | None
    dropout_keys: jax.Array | None

    def flat(self) -> list[jax.Array]:
        """The operands in the order in which the primitives take them."""
        optional = [x for x in (self.slopes, self.dropout_keys) if x is not None]
        return [*self.qkv, *optional]


def _split(
    flat: Sequence[jax.Array], spec: _spec.AttentionSpec
) -> tuple[Operands, list[jax.Array]]:
    """Inverts `Operands.flat`; also returns the operands that follow."""
    rest = list(flat)
    qkv = tuple(rest.pop(0) for _ in range(_shapes.num_qkv(spec.packing)))
    slopes = rest.pop(0) if spec.alibi else None
    dropout_keys = rest.pop(0) if spec.dropout else None
    return Operands(qkv, slopes, dropout_keys), rest


def _results(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    return primitive


forward_p = _results("flash_attention_forward")
backward_p = _results("flash_attention_backward")


# Results take shape, sharding and varying axes from the operands they are shaped like,
# by tracing the functions below: building abstract values by hand would tie us to how
# each JAX spells those.


def _with_whole_batch(
    x: jax.Array, role: _shapes.Role, others: Sequence[tuple[jax.Array, _shapes.Role]]
) -> jax.Array:
    """`x` with every batch axis as long, and as sharded, as in the operand that has it.

    For abstract values alone: the values are no use.

    Raises:
        ValueError: the operand that has it splits it over a mesh axis that splits
            another axis of `x`.
    """
    for axis, length in enumerate(_shapes.batch_shape(x, role)):
        for other, other_role in others:
            if length == 1 and _shapes.batch_shape(other, other_role)[axis] != 1:
                rest = [n for n in range(other.ndim) if n != axis]
                along = other.sum(axis=rest).astype(x.dtype)
                _refuse_axis_used_twice(x, role, along, axis)
                behind = [1] * (x.ndim - axis - 1)
                x = x * along.reshape(*[1] * axis, along.shape[0], *behind)
                break
    return x


def _refuse_axis_used_twice(
    x: jax.Array, role: _shapes.Role, along: jax.Array, axis: int
) -> None:
    """Refuses what no type can say: two axes of a result over one mesh axis."""
    for n in range(x.ndim):
        given = _partitioning.mesh_axes(jax.typeof(x), n)
        for name in _partitioning.mesh_axes(jax.typeof(along), 0):
            if name in given:
                raise ValueError(
                    f"mesh axis {name!r} splits both {_axis_name(x, role, axis)} of "
                    f"one operand and {_axis_name(x, role, n)} of another, and out or "
                    "a gradient has both axes: split one of the two over another mesh "
                    "axis, or over none (jax.sharding.reshard)."
                )


def _axis_name(x: jax.Array, role: _shapes.Role, axis: int) -> str:
    last = len(_shapes.batch_shape(x, role)) - 1
    if axis <= last:
        return "the batch" if axis == last else "the mapped axis"
    return "the heads" if axis == x.ndim + role.heads_axis else f"axis {axis}"


def _forward_like(*flat: jax.Array, spec: _spec.AttentionSpec) -> list[jax.Array]:
    roles, (q_role, _) = _shapes.forward_roles(spec)
    q = flat[0][..., 0, :, :] if spec.packing == "qkv" else flat[0]
    out = _with_whole_batch(q, q_role, list(zip(flat, roles, strict=True)))
    lse_dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    return [out, out.sum(axis=-1).astype(lse_dtype).swapaxes(-1, -2)]


def _backward_like(
    *flat: jax.Array, spec: _spec.AttentionSpec, has_dlse: bool
) -> list[jax.Array]:
    roles, results = _shapes.backward_roles(spec, has_dlse)
    operands = list(zip(flat, roles, strict=True))
    return [
        _with_whole_batch(x, role, operands) for x, role in operands[: len(results)]
    ]


@functools.lru_cache(maxsize=1024)
def _avals(
    like: Callable[..., list[jax.Array]], avals: tuple[Any, ...], **static: Any
) -> list[Any]:
    return list(jax.make_jaxpr(functools.partial(like, **static))(*avals).out_avals)


def _plain_forward(*flat: jax.Array, spec: _spec.AttentionSpec) -> list[jax.Array]:
    batch = _shapes.common_batch([x.shape[0] for x in flat])
    operands, _ = _split([_shapes.repeat_batch(x, batch) for x in flat], spec)
    q, k, v = _shapes.unpack(operands.qkv, spec.packing)
    return list(
        blockwise.forward(q, k, v, operands.slopes, operands.dropout_keys, spec=spec)
    )


def _plain_backward(
    *flat: jax.Array, spec: _spec.AttentionSpec, has_dlse: bool
) -> list[jax.Array]:
    batch = _shapes.common_batch([x.shape[0] for x in flat])
    operands, rest = _split([_shapes.repeat_batch(x, batch) for x in flat], spec)
    q, k, v = _shapes.unpack(operands.qkv, spec.packing)
    out, lse, dout = rest[:3]
    dlse = rest[3] if has_dlse else None
    gradients = blockwise.backward(
        q, k, v, out, lse, dout, dlse, operands.slopes, operands.dropout_keys, spec=spec
    )
    return list(_shapes.pack(*gradients, spec.packing))


def _pad_head_dim(x: jax.Array, head_dim: int) -> jax.Array:
    missing = head_dim - x.shape[-1]
    if missing == 0:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def _struct(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _kernel_forward(*flat: jax.Array, spec: _spec.AttentionSpec) -> list[jax.Array]:
    operands, _ = _split(flat, spec)
    head_dim = operands.qkv[0].shape[-1]
    padded = _support.padded_head_dim(head_dim)
    qkv = tuple(_pad_head_dim(x, padded) for x in operands.qkv)
    dims = _shapes.dimensions(qkv, spec.packing)
    batch = _shapes.common_batch([x.shape[0] for x in flat])
    results = [
        _struct((batch, dims.seqlen_q, dims.heads, padded), qkv[0].dtype),
        _struct((batch, dims.heads, dims.seqlen_q), jnp.float32),
    ]
    arrays = operands._replace(qkv=qkv).flat()
    out, lse = _ffi.forward_call(arrays, results, spec)
    return [out[..., :head_dim], lse]


def _kernel_backward(
    *flat: jax.Array, spec: _spec.AttentionSpec, has_dlse: bool
) -> list[jax.Array]:
    operands, (out, lse, dout, *dlse) = _split(flat, spec)
    head_dim = operands.qkv[0].shape[-1]
    padded = _support.padded_head_dim(head_dim)
    qkv = tuple(_pad_head_dim(x, padded) for x in operands.qkv)
    batch = _shapes.common_batch([x.shape[0] for x in flat])
    dims = _shapes.dimensions(qkv, spec.packing)._replace(batch=batch)
    parts = _key_parts.key_parts(dims, spec, qkv[0].dtype, *_key_parts.target())
    # The first operand has queries: with keys and values in it, too, parts is 1.
    shapes = [
        qkv[0].shape,
        *(_key_parts.part_shape(x.shape, parts) for x in qkv[1:]),
    ]
    gradients = [_struct((batch, *shape[1:]), qkv[0].dtype) for shape in shapes]
    results = [*gradients, *_shapes.workspace(dims, spec.deterministic)]
    arrays = [
        *operands._replace(qkv=qkv).flat(),
        _pad_head_dim(out, padded),
        lse,
        _pad_head_dim(dout, padded),
        *dlse,
    ]
    computed = _ffi.backward_call(arrays, results, spec, has_dlse)
    dq, *dk_dv = (x[..., :head_dim] for x in computed[: len(qkv)])
    return [dq, *(_key_parts.sum_parts(x, parts) for x in dk_dv)]


def _register(
    primitive: Primitive,
    roles: Callable[..., tuple[list[_shapes.Role], list[_shapes.Role]]],
    like: Callable[..., list[jax.Array]],
    plain: Callable[..., list[jax.Array]],
    kernel: Callable[..., list[jax.Array]],
) -> None:
    def abstract_eval(*avals: Any, implementation: str, **static: Any) -> list[Any]:
        return _avals(like, avals, **static)

    def lower(
        function: Callable[..., list[jax.Array]],
        ctx: Any,
        operands: Sequence[Any],
        implementation: str,
        **static: Any,
    ) -> Any:
        taken, given = roles(**static)
        folded = _batching.fold(functools.partial(function, **static), taken)
        return _partitioning.lower(ctx, folded, operands, taken, given)

    def lower_anywhere(ctx: Any, *operands: Any, **params: Any) -> Any:
        if params["implementation"] == "cuda":
            raise NotImplementedError(
                'implementation="cuda" needs a CUDA GPU, and this program is lowered '
                'for another platform: pass "auto" or "jax".'
            )
        return lower(plain, ctx, operands, **params)

    def lower_for_cuda(ctx: Any, *operands: Any, **params: Any) -> Any:
        chosen = plain
        if params["implementation"] != "jax":
            q = ctx.avals_in[0]
            obstacle = _support.call_obstacle(
                q.dtype, q.shape[-1], params["spec"].softcap
            )
            obstacle = obstacle or _support.machine_obstacle()
            if obstacle is None:
                chosen = kernel
                if _compat.is_export_of_automatic_sharding(ctx):
                    _support.warn_of_unsplit_export()
            elif params["implementation"] == "cuda":
                raise NotImplementedError(obstacle)
            else:
                _support.warn_of_fallback(obstacle)
        return lower(chosen, ctx, operands, **params)

    def differentiate_again(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            "the gradient of flash attention can't be differentiated again: for second "
            "derivatives (jax.hessian, jax.grad of jax.grad) use "
            "jax_flash_attn.reference.attention or jax.nn.dot_product_attention with "
            'implementation="xla", which have forward mode (jax.jvp) as well.'
        )

    primitive.def_abstract_eval(abstract_eval)
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    mlir.register_lowering(primitive, lower_anywhere)
    mlir.register_lowering(primitive, lower_for_cuda, platform="cuda")
    ad.primitive_jvps[primitive] = differentiate_again
    _batching.register(primitive)
    _compat.require_devices_to_lower(primitive)


_register(
    forward_p, _shapes.forward_roles, _forward_like, _plain_forward, _kernel_forward
)
_register(
    backward_p,
    _shapes.backward_roles,
    _backward_like,
    _plain_backward,
    _kernel_backward,
)
