"""The check that a contender passes before it is timed.

Attention is independent for every batch entry and every group of heads, so one batch
entry and one key head, with the query heads that share it, are compared in full. The
rule is flash-attn's: an error of at most twice that of the plain computation done in
the input dtype, plus half a unit in the last place of the largest value.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from benchmarks.arrays import Operands
from benchmarks.contenders import Contender, alibi_slopes, dropout_rng
from benchmarks.modes import RESULTS, results
from benchmarks.workloads import Mode, Workload
from jax_flash_attn import reference
from jax_flash_attn._spec import AttentionSpec
from jax_flash_attn.dropout import philox_keys

ALLOWED_RATIO = 2.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a contender may be timed.

    `error_ratios` holds, for out and each gradient, the largest error over the error
    of the plain computation in the input dtype.
    """

    status: Literal["ok", "unsupported", "wrong", "out of memory", "error"]
    reason: str | None = None
    error_ratios: dict[str, float] = dataclasses.field(default_factory=dict)


def failure(error: Exception) -> Verdict:
    """Returns the verdict on a contender that raised."""
    first = (str(error).splitlines() or [""])[0]
    status: Literal["unsupported", "out of memory", "error"] = "error"
    if isinstance(error, NotImplementedError):
        status = "unsupported"
    elif "RESOURCE_EXHAUSTED" in str(error):
        status = "out of memory"
    return Verdict(status, f"{type(error).__name__}: {first[:300]}")


@dataclasses.dataclass(frozen=True)
class _Part:
    """The batch entry and the heads that are compared: the last ones."""

    batch: int
    heads: slice
    heads_k: slice

    def of(self, name: str, x: jax.Array) -> jax.Array:
        """Returns the compared part of an array in (B, S, H, D)."""
        heads = self.heads_k if name in ("k", "v", "dk", "dv") else self.heads
        return x[self.batch : self.batch + 1, :, heads]


def _part(workload: Workload) -> _Part:
    group = workload.heads // workload.heads_k
    return _Part(
        workload.batch - 1,
        slice(workload.heads - group, workload.heads),
        slice(workload.heads_k - 1, workload.heads_k),
    )


class Oracle:
    """The float32 result and the plain computation's error, for one workload."""

    def __init__(self, workload: Workload, operands: Operands) -> None:
        """Computes out, dq, dk and dv of the compared part, twice."""
        self._part = _part(workload)
        names = ("q", "k", "v", "dout")
        part = Operands(
            *(self._part.of(n, x) for n, x in zip(names, operands.every, strict=True))
        )
        self.exact = _reference(workload, self._part, part, exact=True)
        plain = _reference(workload, self._part, part, exact=False)
        self._plain_errors = {n: self._error(n, plain[n]) for n in RESULTS}

    def _error(self, name: str, actual: jax.Array) -> float:
        actual = actual.astype(jnp.float32)
        return float(jnp.max(jnp.abs(actual - self.exact[name])))

    def judge(self, found: dict[str, jax.Array]) -> Verdict:
        """Returns the verdict on a contender's results."""
        ratios, wrong = {}, []
        for name, array in found.items():
            error = self._error(name, self._part.of(name, array))
            plain = self._plain_errors[name]
            ratios[name] = error / plain if plain else math.inf * bool(error)
            largest = float(jnp.max(jnp.abs(self.exact[name])))
            floor = float(jnp.finfo(array.dtype).eps) / 2 * largest
            if not error <= ALLOWED_RATIO * plain + floor:
                wrong.append(f"{name} has {ratios[name]:.3g} times the plain error")
        return Verdict("wrong" if wrong else "ok", "; ".join(wrong) or None, ratios)


def _reference(
    workload: Workload, part: _Part, operands: Operands, exact: bool
) -> dict[str, jax.Array]:
    spec = AttentionSpec(
        softmax_scale=workload.head_dim**-0.5,
        window_left=workload.visible[0],
        window_right=workload.visible[1],
        softcap=workload.softcap,
        alibi=workload.alibi,
        dropout_p=workload.dropout_p,
    )
    slopes = alibi_slopes(workload.heads)[None, part.heads] if spec.alibi else None
    keys = None
    if spec.dropout:
        every = philox_keys(dropout_rng(), workload.batch, workload.heads)
        keys = every[part.batch : part.batch + 1, part.heads]

    function = reference.attention if exact else reference.naive

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return function(q, k, v, slopes, keys, spec=spec)[0]

    # Each product would be tuned for seconds, to run once.
    @functools.partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0})
    def compute(*operands: jax.Array) -> tuple[jax.Array, ...]:
        if exact:
            operands = tuple(x.astype(jnp.float32) for x in operands)
        *qkv, dout = operands
        out, vjp = jax.vjp(attend, *qkv)
        return out, *vjp(dout)

    return dict(zip(RESULTS, compute(*operands.every), strict=True))


def checked_workload(contender: Contender, workload: Workload) -> Workload:
    """Returns the workload that a contender is compared on.

    Another library's dropout mask cannot be replayed, so it is compared without.
    """
    if workload.dropout_p and not contender.replays_dropout:
        return dataclasses.replace(workload, dropout_p=0.0)
    return workload


class Checker:
    """Checks contenders on one workload; every oracle and verdict is computed once.

    Without operands nothing is compared, and every contender that supports the workload
    may be timed.
    """

    def __init__(self, workload: Workload, operands: Operands | None) -> None:
        self._workload, self._operands = workload, operands
        self._oracles: dict[Workload, Oracle] = {}
        self._verdicts: dict[tuple[str, bool], Verdict] = {}

    def verdict(self, contender: Contender, mode: Mode) -> Verdict:
        """Returns whether a contender may be timed in a mode.

        Forward alone is checked apart from forward with gradients: a library may run
        another kernel when nothing is to be differentiated.
        """
        reason = contender.supports(self._workload, mode)
        if reason:
            return Verdict("unsupported", reason)
        if self._operands is None:
            return Verdict("ok", "unchecked")
        key = contender.name, mode != "fwd"
        if key not in self._verdicts:
            try:
                self._verdicts[key] = self._judge(
                    contender, self._operands, gradients=key[1]
                )
            except Exception as error:
                self._verdicts[key] = failure(error)
        return self._verdicts[key]

    def _judge(
        self, contender: Contender, operands: Operands, gradients: bool
    ) -> Verdict:
        chosen = checked_workload(contender, self._workload)
        if chosen not in self._oracles:
            self._oracles[chosen] = Oracle(chosen, operands)
        found = results(contender, chosen, operands, gradients)
        return self._oracles[chosen].judge(found)
