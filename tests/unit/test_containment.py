"""NaN and infinity reach no row of the JAX path that does not attend to them."""

import functools

import pytest

from jax_flash_attn import blockwise
from tests.support import containment, oracle

SMALL_TILE = 48
"""Small enough for the mask to cut some tiles and to hide others."""


@pytest.fixture(scope="module")
def run():
    @functools.cache
    def of_case(case):
        return containment.runner(case, implementation="jax")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "MAX_TILE", SMALL_TILE)
        yield of_case


@pytest.fixture(scope="module")
def expected():
    return functools.cache(oracle.expected)


@pytest.mark.parametrize(("case", "operand", "row", "value"), containment.PARAMS)
def test_row(run, expected, case, operand, row, value):
    results = containment.results_with(run(case), case, operand, row, value)
    containment.check(results, expected(case), case, operand, row)
