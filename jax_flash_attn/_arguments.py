"""From a user's arguments to canonical ones: every check that has a ValueError.

Nothing here depends on where the call will run.
"""

import contextlib
import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash_attn import _shapes, _spec, dropout

FLOAT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)
_FLOAT32 = np.finfo(np.float32)
_IN_PLACE_OF_TRACED = {
    "softmax_scale": "Multiply q by it instead.",
    "scale": "Multiply query by it instead.",
    "alibi_slopes": "Pass Python floats or a NumPy array.",
}
_STATIC_REMEDY = (
    "Name it in static_argnames of jax.jit, or bind it with functools.partial."
)
IMPLEMENTATIONS = ("auto", "cuda", "jax")
# Those of compute capability 8.0 and later that an NVRTC, CUDA 12's or 13's, compiles
# for.
ARCHITECTURES = tuple(
    f"sm_{number}"
    for number in (80, 86, 87, 88, 89, 90, 100, 101, 103, 107, 110, 120, 121)
)


def arrays(**given: Any) -> dict[str, jax.Array]:
    """The named arguments as JAX arrays; refuses what is none."""
    return {name: array(value, name) for name, value in given.items()}


def array(value: Any, name: str) -> jax.Array:
    """A named argument as a JAX array; refuses what is none."""
    if value is not None:
        with contextlib.suppress(TypeError, ValueError):
            return jnp.asarray(value)
    raise TypeError(f"{name} must be an array, got {value!r}.")


def struct(value: Any, name: str) -> jax.ShapeDtypeStruct:
    """The shape and dtype of what `array` would give; takes these alone, too."""
    if value is not None:
        with contextlib.suppress(TypeError, ValueError):
            found = jax.eval_shape(jnp.asarray, value)
            return jax.ShapeDtypeStruct(found.shape, found.dtype)
    raise TypeError(
        f"{name} must be an array or a jax.ShapeDtypeStruct, got {value!r}."
    )


def check_qkv(
    named: Mapping[str, _shapes.Shaped], packing: _spec.Packing, batched: bool = True
) -> None:
    """Checks ranks, dtypes and lengths of what carries q, k and v.

    Only what is not packed may lack a batch.
    """
    _check_ranks(named, packing, batched)
    names = list(named)
    first = names[0]
    for name, x in named.items():
        if x.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name} must be bfloat16, float16, float32 or float64, got {x.dtype}."
            )
        if x.dtype != named[first].dtype:
            raise TypeError(
                f"{name} must have the dtype of {first}, {named[first].dtype}, got "
                f"{x.dtype}."
            )
    if packing == "qkv":
        return
    q, k = named[names[0]], named[names[1]]
    for name, x in list(named.items())[1:]:
        if batched and x.shape[0] != q.shape[0]:
            raise ValueError(
                f"{name} must have the batch of {first}, {q.shape[0]}, got "
                f"{x.shape[0]}: {name}.shape is {x.shape}."
            )
        if x.shape[-1] != q.shape[-1]:
            raise ValueError(
                f"{name} must have the head dim of {first}, {q.shape[-1]}, got "
                f"{x.shape[-1]}: {name}.shape is {x.shape}."
            )
    heads, heads_k = q.shape[-2], k.shape[-2]
    if heads_k == 0 or heads % heads_k:
        raise ValueError(
            f"{names[1]} must have a number of heads that divides the {heads} heads of "
            f"{first}, got {heads_k}."
        )
    if packing == "none" and named[names[2]].shape != k.shape:
        raise ValueError(
            f"{names[2]} must have the shape of {names[1]}, {k.shape}, got "
            f"{named[names[2]].shape}."
        )


def _check_ranks(
    named: Mapping[str, _shapes.Shaped], packing: _spec.Packing, batched: bool
) -> None:
    packed = {"none": None, "kv": ("kv", 2), "qkv": ("qkv", 3)}[packing]
    for name, x in named.items():
        if packed is not None and name == packed[0]:
            parts = packed[1]
            if x.ndim != 5 or x.shape[2] != parts:
                raise ValueError(
                    f"{name} must have shape (batch, seqlen, {parts}, heads, "
                    f"head_dim), got {x.shape}."
                )
        elif x.ndim != (4 if batched else 3):
            shape = (
                "(batch, seqlen, heads, head_dim)"
                if batched
                else f"(seqlen, heads, head_dim), as {next(iter(named))} has no batch"
            )
            raise ValueError(f"{name} must have shape {shape}, got {x.shape}.")
        if x.shape[-1] == 0 or x.shape[-2] == 0:
            raise ValueError(
                f"{name} must have at least one head and one column, got shape "
                f"{x.shape}."
            )


def _traced(value: Any, name: str, taken: str, remedy: str = _STATIC_REMEDY) -> str:
    return (
        f"{name} must be {taken}, known when the program is traced, got a traced value "
        f"{value}. {remedy}"
    )


def static_number(value: Any, name: str) -> float:
    """A finite Python float; refuses what is only known at run time."""
    if isinstance(value, jax.core.Tracer):
        remedy = _IN_PLACE_OF_TRACED.get(name, "Pass a Python or NumPy number.")
        raise TypeError(_traced(value, name, "a Python number", remedy))
    if isinstance(value, np.ndarray | jax.Array) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}.")
    smallest, largest = float(_FLOAT32.tiny), float(_FLOAT32.max)
    if number != 0.0 and not smallest <= abs(number) <= largest:
        raise ValueError(
            f"{name} must be 0 or in the range of float32, {smallest:.2g} to "
            f"{largest:.2g} in size, got {value}."
        )
    return number


def static_flag(value: Any, name: str) -> bool:
    """A Python bool; refuses what is only known at run time."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, jax.core.Tracer):
        raise TypeError(_traced(value, name, "True or False"))
    raise TypeError(f"{name} must be True or False, got {value!r}.")


def length(value: Any, name: str) -> int:
    """A Python int of at least 0; refuses what is only known at run time."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(_traced(value, name, "an int"))
    number: int | None = None
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            number = operator.index(value)
    if number is None:
        raise TypeError(f"{name} must be an int, got {value!r}.")
    if number < 0:
        raise ValueError(f"{name} must be at least 0, got {number}.")
    return number


def text(value: Any, name: str) -> str:
    """A str; what it says is for others to judge."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {value!r}.")
    return value


def softmax_scale(value: Any, head_dim: int, name: str = "softmax_scale") -> float:
    """The scale of the scores; 1 / sqrt(D) by default."""
    if value is None:
        return 1.0 / math.sqrt(head_dim)
    return static_number(value, name)


def softcap(value: Any) -> float:
    """The cap of the scores; 0 is none."""
    cap = static_number(value, "softcap")
    if cap < 0.0:
        raise ValueError(f"softcap must be 0 (off) or positive, got {cap}.")
    return cap


def dropout_p(
    value: Any, dropout_rng: Any, name: str = "dropout_p", rng_name: str = "dropout_rng"
) -> float:
    """The share of probabilities that is dropped."""
    p = static_number(value, name)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name} must be at least 0 and below 1, got {p}.")
    if p > 0.0 and dropout_rng is None:
        raise ValueError(
            f"{rng_name} must be a JAX PRNG key when {name} is {p}, got None."
        )
    return p


def is_int(value: Any) -> bool:
    """Whether a value is an int of Python's or NumPy's, and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def window(value: Any, causal: bool, name: str = "window_size") -> tuple[int, int]:
    """The window as (left, right); causal limits the right side to 0."""
    sides = value if isinstance(value, Sequence) else (value,)
    if any(isinstance(side, jax.core.Tracer) for side in sides):
        raise TypeError(_traced(value, name, "a pair (left, right) of ints"))
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a pair (left, right) of ints, got {value!r}.")
    if len(value) != 2:
        raise ValueError(
            f"{name} must be a pair (left, right), got {len(value)} values: {value!r}."
        )
    for side in value:
        if not is_int(side):
            raise TypeError(f"{name} must hold two ints, got {value!r}.")
        if side < -1:
            raise ValueError(
                f"{name} must hold sizes of at least 0, or -1 for no limit, got "
                f"{value!r}."
            )
    left, right = map(int, value)
    return left, 0 if causal else right


def drop_idle_limits(
    left: int, right: int, top_left: bool, seqlen_q: int, seqlen_k: int
) -> tuple[int, int]:
    """Replaces limits that hide no key of any query by -1.

    Kernels for different limits are different programs; this keeps causal attention of
    one query, say, from being one of its own.
    """
    diagonal = 0 if top_left else seqlen_k - seqlen_q
    if left >= seqlen_q - 1 + diagonal:
        left = _spec.UNBOUNDED
    if right >= seqlen_k - 1 - diagonal:
        right = _spec.UNBOUNDED
    return left, right


def slopes(value: Any, batch: int, heads: int) -> jax.Array | None:
    """ALiBi slopes as (1 or batch, heads) float32, or None."""
    if value is None:
        return None
    given = array(value, "alibi_slopes")
    if given.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}), got "
            f"{given.shape}."
        )
    if not jnp.issubdtype(given.dtype, jnp.floating):
        raise TypeError(f"alibi_slopes must be floats, got {given.dtype}.")
    return jnp.atleast_2d(given.astype(jnp.float32))


def dropout_keys(value: Any, p: float, batch: int, heads: int) -> jax.Array | None:
    """One Philox key per (batch, head), (batch, heads, 2) uint32, or None."""
    if value is None:
        return None
    given = array(value, "dropout_rng")
    if jnp.issubdtype(given.dtype, jax.dtypes.prng_key):
        if given.ndim != 0:
            raise ValueError(
                f"dropout_rng must be one PRNG key, got an array of keys of shape "
                f"{given.shape}."
            )
    elif given.dtype != jnp.uint32 or given.ndim != 1 or given.size == 0:
        raise TypeError(
            "dropout_rng must be a JAX PRNG key (jax.random.key, or raw uint32 key "
            f"data of rank 1), got {given.dtype} of shape {given.shape}."
        )
    return dropout.philox_keys(given, batch, heads) if p > 0.0 else None


def dense(value: Any, name: str, scores: tuple[int, ...]) -> jax.Array | None:
    """A bias or a mask with the rank of the scores, (..., H, Sq, Sk), or None."""
    if value is None:
        return None
    given = array(value, name)
    check_dense_dtype(given.dtype, name)
    return given.reshape(dense_shape(given.shape, name, scores))


def check_dense_dtype(dtype: Any, name: str) -> None:
    """Checks that a bias holds floats, or a mask bools."""
    right = jnp.bool_ if name == "mask" else jnp.floating
    if not jnp.issubdtype(dtype, right):
        kind = "bools" if name == "mask" else "floats"
        raise TypeError(f"{name} must be {kind}, got {dtype}.")


def dense_shape(
    given: tuple[int, ...], name: str, scores: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of a bias or a mask with as many axes as the scores have."""
    shape = (1,) * (len(scores) - len(given)) + given
    if len(shape) != len(scores) or any(
        length not in (1, full) for length, full in zip(shape, scores, strict=True)
    ):
        raise ValueError(
            f"{name} must be broadcastable to (batch, heads, seqlen_q, seqlen_k), "
            f"{scores}, got shape {given}."
        )
    return shape


def implementation(value: Any) -> _spec.Implementation:
    """Which implementation runs."""
    # An array would be compared element by element.
    if not isinstance(value, str) or value not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, "
            f"got {value!r}."
        )
    return cast(_spec.Implementation, value)


def architecture(value: Any) -> str:
    """The architecture to compile kernels for, by its name."""
    name = text(value, "architecture")
    if name not in ARCHITECTURES:
        raise ValueError(
            "architecture must be sm_80 or newer, one of "
            f"{', '.join(ARCHITECTURES)}, got {name!r}."
        )
    return name


def make_spec(
    qkv: Sequence[_shapes.Shaped],
    packing: _spec.Packing,
    *,
    scale: float,
    limits: tuple[int, int],
    top_left: bool = False,
    cap: float = 0.0,
    alibi: bool = False,
    p: float = 0.0,
    deterministic: bool = False,
) -> _spec.AttentionSpec:
    """The spec of a call from checked arguments."""
    dims = _shapes.dimensions(qkv, packing)
    left, right = drop_idle_limits(*limits, top_left, dims.seqlen_q, dims.seqlen_k)
    return _spec.AttentionSpec(
        softmax_scale=scale,
        window_left=left,
        window_right=right,
        top_left=top_left,
        softcap=cap,
        alibi=alibi,
        dropout_p=p,
        deterministic=deterministic,
        packing=packing,
    )
