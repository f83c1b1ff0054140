"""Which results a row that is not finite may reach, and that it reaches no other.

A result depends on a row only through the queries that see it: out, lse and dq of those
queries, and, through their lse and delta, dk and dv of every key that they see.
"""

import dataclasses

import numpy as np
import pytest

from tests.support import calls, cases, closeness, inputs

CASES = (
    dataclasses.replace(
        cases.BY_NAME["fully_masked_rows"],
        name="masked_rows_and_window",
        seqlen_q=220,
        seqlen_k=170,
        heads=4,
        heads_k=2,
        head_dim=40,
        window_size=(60, -1),
    ),
    dataclasses.replace(cases.BY_NAME["causal_gqa"], seqlen_q=200, seqlen_k=230),
    cases.BY_NAME["everything"],
)
"""Tiles cut on one side and on both; rows that see no key; every score feature."""

OPERANDS = ("q", "k", "v", "dout")

_ROW_AXES = {"out": 1, "lse": 2, "dq": 1, "dk": 1, "dv": 1}


def _parameters():
    for case in CASES:
        for operand in OPERANDS:
            length = case.seqlen_q if operand in ("q", "dout") else case.seqlen_k
            for row in (0, length // 2, length - 1):
                for value in (np.nan, np.inf):
                    name = f"{case.name}-{operand}-{row}-{value}"
                    yield pytest.param(case, operand, row, value, id=name)


PARAMS = tuple(_parameters())
"""Case, operand, row and value of every test."""


def results_with(run, case, operand, row, value):
    """Returns the results of a case with one row of an operand set to a value."""
    arrays = inputs.make(case)
    arrays[operand] = arrays[operand].at[:, row].set(value)
    return run(arrays)


def runner(case, **more):
    """Returns a jitted function of `inputs.make` arrays that gives the results."""
    return calls.jit(calls.with_gradients(calls.attention(case, **more)))


def reached(case, operand, row):
    """Returns, by name, which rows of a result depend on a row of an operand."""
    visible = cases.visible(case)
    if operand in ("q", "dout"):
        queries = (np.arange(case.seqlen_q) == row) & visible.any(axis=1)
    else:
        queries = visible[:, row]
    keys = visible[queries].any(axis=0)
    rows = {"out": queries, "lse": queries, "dq": queries, "dk": keys, "dv": keys}
    independent = {"v": ("lse", "dv"), "dout": ("out", "lse")}
    for name in independent.get(operand, ()):
        rows[name] = np.zeros_like(rows[name])
    return rows


def check(results, right, case, operand, row):
    """Asserts that a row has reached all that depends on it and nothing else.

    Args:
        results: what `results_with` gave for the same case, operand and row.
        right: `oracle.expected` of the case.
        case: a `cases.Case`.
        operand: name of the operand.
        row: the row that is not finite.
    """
    for name, rows in reached(case, operand, row).items():
        result, axis = np.asarray(results[name]), _ROW_AXES[name]
        closeness.assert_close_to_oracle(
            *(np.compress(~rows, x, axis) for x in (result, *right[name])), what=name
        )
        # A probability that is dropped is 0 in dv, whatever it was.
        if name == "dv" and case.dropout_p > 0 and operand in ("q", "k"):
            continue
        hit = np.compress(rows, result, axis).astype(np.float32)
        assert not np.isfinite(hit).any(), name
