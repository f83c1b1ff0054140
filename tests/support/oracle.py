"""What a case's results ought to be, and what the plain computation makes of them."""

import functools

import jax
import numpy as np

from jax_flash_attn import reference
from tests.support import closeness, inputs

NAMES = ("out", "lse", "dq", "dk", "dv")


def exact(operands, dout, dlse, spec, dtype="float64"):
    """Returns out, lse, dq, dk and dv by name, computed in a wide dtype, in NumPy.

    Args:
        operands: q, k, v, slopes (B, H) or None, dropout_keys or None.
        dout: cotangent of out.
        dlse: cotangent of lse.
        spec: the `AttentionSpec`.
        dtype: dtype of every step: float64, or float32 where float64 is too slow.
    """
    with jax.enable_x64(dtype == "float64"):
        return _compute(operands, dout, dlse, spec, dtype)


def naive(operands, dout, dlse, spec):
    """Returns the yardsticks: as `exact`, with every step in the input dtype.

    lse alone is computed in float32, the dtype that it is judged in.
    """
    dtype = operands[0].dtype
    results = _compute(operands, dout, dlse, spec, str(dtype))
    if dtype.itemsize < 4:
        results["lse"] = np.asarray(_lse(*operands, spec=spec))
    return results


def of(case, arrays):
    """Returns (exact, naive) by name for the arrays of a case, computed on the CPU.

    On a GPU the many small programs would take too long to compile.
    """
    arrays = jax.device_put(arrays, jax.devices("cpu")[0])
    arguments = (
        inputs.primitive_operands(case, arrays),
        arrays["dout"],
        arrays["dlse"],
        inputs.spec(case),
    )
    right, yardstick = exact(*arguments), naive(*arguments)
    return {name: (right[name], yardstick[name]) for name in NAMES}


def expected(case, seed=0):
    """Returns `of` a case and the arrays that a seed makes for it."""
    return of(case, inputs.make(case, seed))


def check(results, right, names=NAMES):
    """Asserts that results by name are as close to `expected` ones as they must be."""
    for name in names:
        closeness.assert_close_to_oracle(results[name], *right[name], what=name)


def _compute(operands, dout, dlse, spec, dtype):
    results = _jitted(*operands, dout, dlse, spec=spec, dtype=dtype)
    return dict(zip(NAMES, map(np.asarray, results), strict=True))


# These small programs take longer to optimise than to run.
_jit = functools.partial(
    jax.jit,
    static_argnames=("spec", "dtype"),
    compiler_options={"xla_backend_optimization_level": 0},
)


@_jit
def _lse(q, k, v, slopes, dropout_keys, *, spec, dtype="float32"):
    return reference.attention(q, k, v, slopes, dropout_keys, spec=spec, dtype=dtype)[1]


@_jit
def _jitted(q, k, v, slopes, dropout_keys, dout, dlse, *, spec, dtype):
    def attention(q, k, v):
        return reference.attention(
            q, k, v, slopes, dropout_keys, spec=spec, dtype=dtype
        )

    q, k, v = (x.astype(dtype) for x in (q, k, v))
    (out, lse), pullback = jax.vjp(attention, q, k, v)
    gradients = pullback((dout.astype(out.dtype), dlse.astype(lse.dtype)))
    return out, lse, *gradients
