"""NaN and infinity stay in the rows, heads and batch entries that they belong to."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash_attn import testing
from tests.support import containment, devices, inputs, kernel_cases, oracle

pytestmark = pytest.mark.gpu

CASE = containment.CASES[0]
"""Rows without keys, tiles cut on both sides, a head dim padded in the kernel."""

FAMILIES = tuple(
    filter(devices.has_family, ("sm80", "sm90", "sm90split", "sm90head", "sm90cluster"))
)
HEAD_DIMS = {"sm90cluster": 136}
"""Of families that do not have the cases' own."""

OPERANDS = ("q", "k", "v", "dout", "dlse")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def run_case(family):
    """Of a case, its run with a family's backward."""
    # Two key tiles add to equal sums in any order.
    deterministic = family not in ("sm90", "sm90cluster")

    @functools.cache
    def of_case(case):
        run = containment.runner(
            case, implementation="cuda", deterministic=deterministic
        )

        def run_with_family(arrays):
            with testing.override_tiles("backward", family):
                return jax.block_until_ready(run(arrays))

        return run_with_family

    return of_case


@pytest.fixture(scope="module")
def right():
    return functools.cache(oracle.expected)


@pytest.fixture(scope="module")
def case(family):
    """CASE, as the family has it."""
    return dataclasses.replace(CASE, head_dim=HEAD_DIMS.get(family, CASE.head_dim))


@pytest.fixture(scope="module")
def run(run_case, case):
    return run_case(case)


def _row_params():
    for family, param in itertools.product(FAMILIES, containment.PARAMS):
        case, *where = param.values
        if not kernel_cases.serves_backward(family, case):
            head_dim = HEAD_DIMS.get(family, 64)
            case = dataclasses.replace(case, softcap=0.0, head_dim=head_dim)
        yield pytest.param(family, case, *where, id=f"{family}-{param.id}")


@pytest.mark.parametrize(
    ("family", "case", "operand", "row", "value"),
    tuple(_row_params()),
    indirect=["family"],
)
def test_row(run_case, right, case, operand, row, value):
    results = containment.results_with(run_case(case), case, operand, row, value)
    containment.check(results, right(case), case, operand, row)


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
def test_batch_entry(run, case, batch):
    """What lies in memory before and after an entry never counts."""
    arrays = inputs.make(case)
    dirty = run(poisoned(arrays, lambda _: (batch,)))
    assert_equal_at(run(arrays), dirty, lambda _: (1 - batch,))


@pytest.mark.parametrize("head_k", [0, 1])
def test_head(run, case, head_k):
    """A row of one head lies between rows of the others, next to padded columns."""
    group = case.heads // case.heads_k

    def of_head(name, head):
        heads = (
            slice(head, head + 1)
            if name in ("k", "v", "dk", "dv")
            else slice(head * group, (head + 1) * group)
        )
        by_rows = name in ("lse", "dlse")
        return (slice(None), heads) if by_rows else (slice(None), slice(None), heads)

    arrays = inputs.make(case)
    dirty = run(poisoned(arrays, lambda name: of_head(name, head_k)))
    assert_equal_at(run(arrays), dirty, lambda name: of_head(name, 1 - head_k))
