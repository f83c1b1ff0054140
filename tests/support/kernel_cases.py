"""The calls that test the kernels: every named edge and head dim, a random sample."""

import dataclasses

import pytest

from tests.support import cases

NUM_RANDOM = 30
NUM_RANDOM_LONG = 600

_FLOAT16 = (
    "ragged_tail",
    "gqa_odd_group",
    "fully_masked_rows",
    "window_two_sided",
    "softcap",
    "dropout",
    "head_dim_256",
)
"""Named edges that are also run in the other dtype; `long` runs all of them."""


def _with_dtype(case, dtype):
    return dataclasses.replace(case, name=f"{case.name}_{dtype}", dtype=dtype)


def _of_head_dim(head_dim, dtype):
    case = cases.BY_NAME["causal_gqa"]
    return dataclasses.replace(
        case, name=f"width_{head_dim}", head_dim=head_dim, dtype=dtype
    )


def _head_dims():
    """Every multiple of 8 up to 256 and a few others, in alternating dtypes."""
    named = {case.head_dim for case in cases.CASES if case.name.startswith("head_dim")}
    others = [d for d in range(8, 257, 8) if d not in named]
    for n, head_dim in enumerate([*others, 1, 20, 100, 255]):
        yield _of_head_dim(head_dim, ("bfloat16", "float16")[n % 2])


def _params():
    other_dtype = [
        _with_dtype(case, "float16") for case in cases.CASES if case.dtype == "bfloat16"
    ]
    quick = [
        *cases.CASES,
        *(case for case in other_dtype if _base(case) in _FLOAT16),
        *_head_dims(),
        *cases.random_cases(NUM_RANDOM, seed=1),
    ]
    names = {case.name for case in quick}
    long = [
        *(case for case in other_dtype if case.name not in names),
        *cases.random_cases(NUM_RANDOM_LONG, seed=2),
    ]
    yield from (pytest.param(case, id=case.name) for case in quick)
    yield from (
        pytest.param(case, id=case.name, marks=pytest.mark.long) for case in long
    )


def _base(case):
    return case.name.removesuffix(f"_{case.dtype}")


PARAMS = tuple(_params())


def serves_backward(family, case):
    """Returns whether a kernel family has a backward for a case."""
    fits_fused = case.head_dim <= 96 or (
        case.head_dim <= 128 and not (case.dropout_p > 0 and case.softcap > 0)
    )
    if family == "sm90head":
        return fits_head(case)
    if family == "sm90cluster":
        return case.head_dim > 128
    return family != "sm90" or fits_fused


def fits_head(case, passes=None):
    """Returns whether a CTA of the backward can take whole heads of a case.

    By how many passes, or by those of the table.
    """
    if passes is None:
        passes = 1 if case.seqlen_q <= 512 else 2
    query_tiles = case.heads // case.heads_k * _multiple(case.seqlen_q, 64) // 64
    if case.head_dim > 64 or case.softcap > 0 or query_tiles > 8 * passes:
        return False
    # Between passes dk and dv of a head wait in the workspace.
    held = 2 * _multiple(case.seqlen_k, 128) * _multiple(case.head_dim, 16)
    rows = case.batch * case.heads * _multiple(case.seqlen_q, 128)
    return query_tiles <= 8 or held <= rows * _multiple(case.head_dim, 64)


def _multiple(value, of):
    return -(-value // of) * of
