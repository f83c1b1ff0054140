"""NaN and infinity stay in the rows, heads and batch entries that they belong to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import calls, cases, closeness, inputs, oracle

pytestmark = pytest.mark.gpu

CASE = dataclasses.replace(
    cases.BY_NAME["fully_masked_rows"],
    seqlen_q=220,
    seqlen_k=170,
    heads=4,
    heads_k=2,
    head_dim=40,
    window_size=(60, -1),
)
"""Rows without keys, tiles cut on both sides, a head dim padded in the kernel."""

OPERANDS = ("q", "k", "v", "dout", "dlse")


@pytest.fixture(scope="module")
def visible():
    aligned = np.arange(CASE.seqlen_q)[:, None] + CASE.seqlen_k - CASE.seqlen_q
    j = np.arange(CASE.seqlen_k)
    return (j >= aligned - 60) & (j <= aligned)


@pytest.fixture(scope="module")
def run():
    attend = calls.attention(CASE, implementation="cuda", deterministic=True)
    return jax.jit(calls.with_gradients(attend))


@pytest.fixture(scope="module")
def right():
    return oracle.expected(CASE)


def assert_rows_right(results, right, rows):
    for name, axis in (("out", 1), ("lse", 2)):
        closeness.assert_close_to_oracle(
            *(np.compress(rows, x, axis) for x in (results[name], *right[name])),
            what=name,
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("row", [0, 70, 219])
def test_row_of_q(run, right, visible, row, value):
    arrays = inputs.make(CASE)
    arrays["q"] = arrays["q"].at[:, row].set(value)
    results = run(arrays)
    rows = np.arange(CASE.seqlen_q) == row
    assert_rows_right(results, right, ~rows)
    if visible[row].any() and np.isnan(value):
        assert np.isnan(np.asarray(results["out"], np.float32)[:, row]).all()
        assert np.isnan(np.asarray(results["lse"])[..., row]).all()
    if not visible[row].any():
        assert not np.asarray(results["out"], np.float32)[:, row].any()
        assert np.isneginf(np.asarray(results["lse"])[..., row]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("row", [0, 70, 169])
def test_row_of_k(run, right, visible, row, value):
    arrays = inputs.make(CASE)
    arrays["k"] = arrays["k"].at[:, row].set(value)
    results = run(arrays)
    assert_rows_right(results, right, ~visible[:, row])
    if np.isnan(value):
        out = np.asarray(results["out"], np.float32)
        assert np.isnan(out[:, visible[:, row]]).all()


def poisoned(arrays, select):
    """Puts NaN where `select` of an operand's name gives an index."""
    return arrays | {
        name: arrays[name].at[select(name)].set(jnp.nan) for name in OPERANDS
    }


def assert_equal_at(clean, dirty, select):
    for name in clean:
        index = select(name)
        np.testing.assert_array_equal(
            np.asarray(clean[name])[index], np.asarray(dirty[name])[index], err_msg=name
        )


@pytest.mark.parametrize("batch", [0, 1])
def test_batch_entry(run, batch):
    """What lies in memory before and after an entry never counts."""
    arrays = inputs.make(CASE)
    dirty = run(poisoned(arrays, lambda _: (batch,)))
    assert_equal_at(run(arrays), dirty, lambda _: (1 - batch,))


@pytest.mark.parametrize("head_k", [0, 1])
def test_head(run, head_k):
    """A row of one head lies between rows of the others, next to padded columns."""
    group = CASE.heads // CASE.heads_k

    def of_head(name, head):
        heads = (
            slice(head, head + 1)
            if name in ("k", "v", "dk", "dv")
            else slice(head * group, (head + 1) * group)
        )
        by_rows = name in ("lse", "dlse")
        return (slice(None), heads) if by_rows else (slice(None), slice(None), heads)

    arrays = inputs.make(CASE)
    dirty = run(poisoned(arrays, lambda name: of_head(name, head_k)))
    assert_equal_at(run(arrays), dirty, lambda name: of_head(name, 1 - head_k))
