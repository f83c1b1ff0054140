"""What would run a call, or why no kernel can."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_flash_attn import _arguments, _ffi, _key_parts, _shapes, _spec, _support
from jax_flash_attn.attention import canonicalize, dense_obstacle


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a short text."""

    implementation: str
    """"cuda" or "jax"."""
    reason: str
    """Why the JAX path runs; empty when the kernel does."""
    architecture: str
    """The architecture that kernels are compiled for; empty without a CUDA device."""
    forward: str
    """The forward kernel's tiles; empty when no kernel runs."""
    backward: str
    """The backward kernels' tiles, and the parts that each key head is split into, if
    any; empty when no kernel runs."""
    spec: _spec.AttentionSpec
    """The call in canonical form."""
    padded_head_dim: int
    """The head dim the kernel works on; differs from the call's when it is padded."""

    def __str__(self) -> str:
        if self.implementation == "jax":
            return f"plain JAX: {self.reason}"
        lines = [
            f"CUDA kernels for {self.architecture}",
            f"  forward:  {self.forward}",
            f"  backward: {self.backward}",
        ]
        if self.reason:
            lines.append(f"  note:     {self.reason}")
        return "\n".join(lines)


def explain(
    q: jax.Array | jax.ShapeDtypeStruct,
    k: jax.Array | jax.ShapeDtypeStruct,
    v: jax.Array | jax.ShapeDtypeStruct,
    *,
    architecture: str | None = None,
    bias: Any = None,
    mask: Any = None,
    **arguments: Any,
) -> Explanation:
    """Returns what `flash_attn_func` would run for these arguments.

    Nothing is computed or compiled, so that every array may be given by its shape and
    dtype, as a `jax.ShapeDtypeStruct`.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        architecture: Explain for this architecture ("sm_90") instead of the first CUDA
            device.
        bias: Explain a call that passes this bias to `dot_product_attention` or to a
            layer of `jax_flash_attn.integrations`.
        mask: Likewise, a mask, of any dtype: layers take those that are not bools.
        **arguments: Those of `flash_attn_func`.

    Returns:
        An `Explanation`, which prints as text.

    Raises:
        ValueError, TypeError: as `flash_attn_func`, or architecture is none that
            kernels are compiled for.
        NotImplementedError: as `flash_attn_func`, or the call is too large for the
            kernels, which would refuse it when it runs.

    Source: csrc/launchers/sm80_tiles.cc and sm90_tiles.cc have the tables that tiles
    come from, _key_parts.py the rule for parts of key heads.
    """
    structs = {
        name: _arguments.struct(x, name) for name, x in {"q": q, "k": k, "v": v}.items()
    }
    # lse is computed in any case.
    _arguments.static_flag(arguments.pop("return_lse", False), "return_lse")
    spec, chosen = _canonical(structs, arguments)
    dims = _shapes.dimensions(tuple(structs.values()), "none")
    scores = (dims.batch, dims.heads, dims.seqlen_q, dims.seqlen_k)
    _check_dense({"bias": bias, "mask": mask}, scores)
    head_dim = dims.head_dim
    padded = _support.padded_head_dim(head_dim)
    dtype = structs["q"].dtype
    target, multiprocessors, reason = _target(architecture)
    obstacle = (
        'implementation="jax" was passed'
        if chosen == "jax"
        else dense_obstacle(bias, mask)
        or _support.call_obstacle(dtype, head_dim, spec.softcap)
        or reason
    )
    if obstacle:
        return Explanation("jax", obstacle, target, "", "", spec, padded)
    dims = dims._replace(head_dim=padded)
    sizes = {
        "batch": dims.batch,
        "seqlen_q": dims.seqlen_q,
        "seqlen_k": dims.seqlen_k,
        "heads": dims.heads,
    }
    _ffi.native.check_sizes(**sizes, head_dim=padded)
    parts = _key_parts.key_parts(dims, spec, dtype, target, multiprocessors)
    heads_k = {"forward": dims.heads_k, "backward": dims.heads_k * parts}
    tiles = {
        operation: _ffi.native.tiles(
            operation,
            _ffi.attributes(spec),
            str(jnp.dtype(dtype)),
            padded,
            target,
            **sizes,
            heads_k=heads_k[operation],
            multiprocessors=multiprocessors,
        )
        for operation in ("forward", "backward")
    }
    if parts > 1:
        tiles["backward"] += f", each key head in {parts} parts"
    note = ""
    if padded != head_dim:
        note = (
            f"head_dim {head_dim} is padded to {padded} around the kernel, which "
            "copies every operand; a multiple of 8 is not"
        )
    return Explanation(
        "cuda", note, target, tiles["forward"], tiles["backward"], spec, padded
    )


def _canonical(
    structs: dict[str, jax.ShapeDtypeStruct], arguments: dict[str, Any]
) -> tuple[_spec.AttentionSpec, _spec.Implementation]:
    optional = {
        name: _arguments.struct(arguments[name], name)
        for name in ("alibi_slopes", "dropout_rng")
        if arguments.get(name) is not None
    }
    found: list[Any] = []

    def canonical(arrays: dict[str, jax.Array]) -> None:
        found.extend(canonicalize(structs, "none", **{**arguments, **arrays})[2:])

    jax.eval_shape(canonical, optional)
    spec, chosen = found
    return spec, chosen


def _check_dense(given: dict[str, Any], scores: tuple[int, ...]) -> None:
    for name, value in given.items():
        if value is not None:
            array = _arguments.struct(value, name)
            if name != "mask":  # of which layers make bools
                _arguments.check_dense_dtype(array.dtype, name)
            _arguments.dense_shape(array.shape, name, scores)


def _target(architecture: str | None) -> tuple[str, int, str]:
    """The architecture, its multiprocessors if known or 0, or why there is none."""
    if architecture is not None:
        architecture = _arguments.architecture(architecture)
    if _ffi.native is None:
        return "", 0, _ffi.native_missing
    if architecture is not None:
        return architecture, 0, ""
    if not _support.on_gpu():
        backend = jax.default_backend()
        return "", 0, f"JAX's default backend is {backend!r}, not a CUDA GPU"
    obstacle = _support.machine_obstacle()
    if obstacle:
        return "", 0, obstacle
    return (*_support.device(), "")
