"""The one rule by which a result is right (numerics.md).

Its largest error is at most twice that of the plain computation in the input dtype,
plus a floor that follows from the dtype.
"""

import jax.numpy as jnp
import numpy as np

_ALLOWED_RATIO = 2.0

_MAX_HEAD_DIM = 256


def assert_close_to_oracle(actual, oracle, naive, *, what="out"):
    """Asserts that `actual` is as near to `oracle` as the naive computation allows.

    Args:
        actual: array under test, in the dtype that it was computed in.
        oracle: the same quantity in a wider dtype.
        naive: the same quantity with every step rounded to the input dtype.
        what: name of the quantity, for the message.

    Raises:
        AssertionError: the shapes differ, the non-finite patterns differ, or the
            largest error exceeds the bound.
    """
    dtype = jnp.asarray(actual).dtype
    actual, oracle, naive = (_float64(x) for x in (actual, oracle, naive))
    assert actual.shape == oracle.shape == naive.shape, (
        f"{what}: shapes {actual.shape}, {oracle.shape}, {naive.shape}"
    )
    _assert_same_non_finite(actual, oracle, what)
    finite = np.isfinite(oracle)
    if not finite.any():
        return
    # The naive computation may overflow where a wider one does not.
    naive_error = _error(naive, oracle, finite & np.isfinite(naive)).max()
    bound = _ALLOWED_RATIO * naive_error + _floor(dtype, oracle[finite])
    error = _error(actual, oracle, finite)
    if error.max() > bound:
        raise AssertionError(_report(actual, oracle, error, bound, naive_error, what))


def _floor(dtype, oracle):
    """What rounding alone may cost where the naive computation happens to be exact."""
    # Two roundings of half a unit in the last place, one of the probabilities and one
    # of the result, at the largest magnitude there is.
    stored = float(jnp.finfo(dtype).eps) * np.abs(oracle).max()
    # A gradient that is zero by cancellation, dprobs - delta, leaves the rounding of
    # two sums of head_dim products of order one, which grows like a random walk.
    compute_dtype = jnp.float64 if dtype == jnp.float64 else jnp.float32
    cancelled = float(jnp.finfo(compute_dtype).eps) * np.sqrt(_MAX_HEAD_DIM)
    return stored + cancelled


def _error(a, b, where):
    return np.abs(np.where(where, a, 0) - np.where(where, b, 0))


def _float64(x):
    return np.asarray(x).astype(np.float64)


def _assert_same_non_finite(actual, oracle, what):
    for name, pattern in (
        ("NaN", np.isnan),
        ("inf", np.isposinf),
        ("-inf", np.isneginf),
    ):
        wrong = pattern(actual) != pattern(oracle)
        if wrong.any():
            where = tuple(int(x[0]) for x in np.nonzero(wrong))
            raise AssertionError(
                f"{what}: {name} differs at {int(wrong.sum())} of {wrong.size} "
                f"elements, first at {where}: "
                f"got {actual[where]}, expected {oracle[where]}"
            )


def _report(actual, oracle, error, bound, naive_error, what):
    worst = tuple(int(x) for x in np.unravel_index(error.argmax(), error.shape))
    finite = np.isfinite(oracle)
    return (
        f"{what}: error {error.max():.3e} exceeds {bound:.3e} "
        f"(naive error {naive_error:.3e})\n"
        f"  worst at {worst}: got {actual[worst]!r}, expected {oracle[worst]!r}\n"
        f"  within the bound: {100 * (error <= bound).mean():.2f}% of {error.size}\n"
        f"  cosine difference: {_cosine_difference(actual[finite], oracle[finite]):.3e}"
    )


def _cosine_difference(a, b):
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return 1.0 - float(a @ b) / norms if norms > 0 else float("nan")
