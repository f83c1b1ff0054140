"""Forward and backward of a few small calls against the reference.

A result passes when its largest error is at most twice that of the naive computation,
in which every step is rounded to the input dtype, plus a floor that follows from the
dtype: two roundings of the largest value, and what a sum of 256 products of order one
leaves in float32 where it cancels (docs/numerics.md).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash_attn import reference
from jax_flash_attn.attention import canonicalize, flash_attn_func

_NAMES = ("out", "lse", "dq", "dk", "dv")
_ALLOWED_RATIO = 2.0
_CANCELLED = float(jnp.finfo(jnp.float32).eps) * 256**0.5

_Results = dict[str, np.ndarray[Any, Any]]
_Implementation = Literal["cuda", "jax"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One small call: its shape and the arguments of `flash_attn_func`."""

    name: str
    seqlen_q: int
    seqlen_k: int
    heads_k: int
    head_dim: int
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    alibi: bool = False


_BATCH = 2
_HEADS = 4
CASES = (
    Case("full, odd lengths", 77, 131, 4, 64),
    Case("causal, grouped heads", 192, 192, 2, 128, {"causal": True}),
    Case("window, head dim 72", 160, 160, 4, 72, {"window_size": (48, 16)}),
    Case(
        "softcap, ALiBi, dropout",
        128,
        160,
        1,
        64,
        {"causal": True, "softcap": 20.0, "dropout_p": 0.2, "deterministic": True},
        alibi=True,
    ),
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How one pass of one case went; prints as a line."""

    case: str
    operation: str
    ratios: dict[str, float]
    """Error over allowed error, by result."""
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether every error is within what is allowed."""
        # A NaN is not.
        return not self.failure and all(ratio <= 1.0 for ratio in self.ratios.values())

    def __str__(self) -> str:
        word = "pass" if self.passed else "FAIL"
        figures = ", ".join(f"{n} {ratio:.2f}" for n, ratio in self.ratios.items())
        text = self.failure or f"{figures} of the allowed error"
        return f"{word}  {self.operation:9} {self.case:24} {text}"


def run(implementation: _Implementation) -> Iterator[Verdict]:
    """Yields a verdict for the forward and the backward of every case.

    Args:
        implementation: "cuda" checks the kernels in bfloat16, "jax" the plain JAX path
            in float32.
    """
    for case in CASES:
        try:
            results = _results(case, implementation)
        except Exception as error:  # whatever it is, the report has to tell
            failure = f"{type(error).__name__}: {error}"
            yield Verdict(case.name, "both", {}, failure)
            continue
        ratios = {name: _ratio(*(r[name] for r in results)) for name in _NAMES}
        yield Verdict(case.name, "forward", {n: ratios[n] for n in _NAMES[:2]})
        yield Verdict(case.name, "backward", {n: ratios[n] for n in _NAMES[2:]})


def _results(
    case: Case, implementation: _Implementation
) -> tuple[_Results, _Results, _Results]:
    """What the library, the oracle and the naive computation make of a case."""
    dtype = "bfloat16" if implementation == "cuda" else "float32"
    wide = "float32" if implementation == "cuda" else "float64"
    qkv, cotangents = _inputs(case, dtype)
    arguments = dict(case.arguments)
    if case.alibi:
        arguments["alibi_slopes"] = 2.0 ** -np.arange(1.0, _HEADS + 1.0)
    if "dropout_p" in arguments:
        arguments["dropout_rng"] = np.asarray([0, 7], np.uint32)
    attention = functools.partial(
        flash_attn_func, return_lse=True, implementation=implementation, **arguments
    )
    ours = _evaluate(attention, qkv, cotangents)
    plain = functools.partial(_reference, arguments)
    qkv, cotangents = jax.device_put((qkv, cotangents), _reference_device())
    with jax.enable_x64(wide == "float64"):
        exact = _evaluate(plain, [x.astype(wide) for x in qkv], cotangents, fast=True)
    naive = _evaluate(plain, qkv, cotangents, fast=True)
    if implementation == "cuda":
        # lse is float32 and judged as such.
        in_float32 = functools.partial(_reference, arguments, dtype="float32")
        naive["lse"] = _evaluate(in_float32, qkv, cotangents, fast=True)["lse"]
    return ours, exact, naive


def _reference_device() -> jax.Device:
    """A CPU where there is one: for a GPU, XLA would time every product's kernels."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return jax.devices()[0]


def _inputs(case: Case, dtype: str) -> tuple[list[jax.Array], list[jax.Array]]:
    random = np.random.default_rng(case.seqlen_q)
    q_shape = (_BATCH, case.seqlen_q, _HEADS, case.head_dim)
    k_shape = (_BATCH, case.seqlen_k, case.heads_k, case.head_dim)
    q, k, v, dout = (
        jnp.asarray(random.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)))
        for shape in (q_shape, k_shape, k_shape, q_shape)
    )
    lse_shape = (_BATCH, _HEADS, case.seqlen_q)
    dlse = jnp.asarray(random.standard_normal(lse_shape, np.float32))
    return [q, k, v], [dout, dlse]


def _reference(
    arguments: dict[str, Any],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dtype: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The reference for the arguments of `flash_attn_func`, in the dtype of q."""
    slopes, keys, spec, _ = canonicalize({"q": q, "k": k, "v": v}, "none", **arguments)
    if slopes is not None:
        slopes = jnp.broadcast_to(slopes, (_BATCH, _HEADS))
    return reference.attention(q, k, v, slopes, keys, spec=spec, dtype=dtype or q.dtype)


def _evaluate(
    attention: Callable[..., Any],
    qkv: list[jax.Array],
    cotangents: list[jax.Array],
    fast: bool = False,
) -> _Results:
    """out, lse, dq, dk and dv; `fast` compiles quickly instead of well."""

    def evaluate(*qkv: jax.Array) -> tuple[jax.Array, ...]:
        (out, lse), pullback = jax.vjp(attention, *qkv)
        dout, dlse = cotangents
        gradients = pullback((dout.astype(out.dtype), dlse.astype(lse.dtype)))
        return out, lse, *gradients

    options = {"xla_backend_optimization_level": 0} if fast else None
    compiled = jax.jit(evaluate, compiler_options=options)
    return dict(zip(_NAMES, map(np.asarray, compiled(*qkv)), strict=True))


def _ratio(
    ours: np.ndarray[Any, Any],
    exact: np.ndarray[Any, Any],
    naive: np.ndarray[Any, Any],
) -> float:
    """The largest error as a share of the allowed one; NaN where a result is NaN."""
    dtype = jnp.dtype(ours.dtype)
    ours, exact, naive = (x.astype(np.float64) for x in (ours, exact, naive))
    floor = float(jnp.finfo(dtype).eps) * np.abs(exact).max() + _CANCELLED
    allowed = _ALLOWED_RATIO * np.abs(naive - exact).max() + floor
    return float(np.abs(ours - exact).max() / allowed)
