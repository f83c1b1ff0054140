"""Where a backward has many more CTAs than the GPU has room for.

On Hopper idle warps then prepare rows of heads to come and round dq of heads that are
done, in most heads; small problems leave both to the kernels before and behind.
"""

import dataclasses

import jax
import numpy as np
import pytest

from jax_flash_attn import testing
from tests.support import calls, cases, containment, devices, inputs, oracle

pytestmark = pytest.mark.gpu

PLAIN = dataclasses.replace(
    cases.BY_NAME["plain"], batch=10, heads=8, heads_k=8, seqlen_q=512, seqlen_k=512
)

MANY_CTAS = (
    PLAIN,
    dataclasses.replace(
        PLAIN, name="ragged", seqlen_q=433, seqlen_k=450, head_dim=72, dtype="float16"
    ),
    dataclasses.replace(PLAIN, name="more_queries", seqlen_q=900, seqlen_k=400),
    dataclasses.replace(PLAIN, name="more_keys", seqlen_q=120, seqlen_k=700),
    dataclasses.replace(PLAIN, name="gqa", heads=16, head_dim=128, seqlen_q=400),
    dataclasses.replace(
        PLAIN, name="causal", batch=6, seqlen_q=800, seqlen_k=820, causal=True
    ),
    # CTAs of the last heads start with the first ones here.
    dataclasses.replace(
        PLAIN,
        name="causal_last_heads",
        batch=3,
        heads=12,
        heads_k=12,
        seqlen_q=1024,
        seqlen_k=1024,
        causal=True,
    ),
    dataclasses.replace(
        PLAIN, name="window", seqlen_q=600, seqlen_k=600, window_size=(350, 250)
    ),
    dataclasses.replace(PLAIN, name="dropout", head_dim=128, dropout_p=0.2),
    dataclasses.replace(PLAIN, name="softcap", head_dim=96, softcap=10.0),
    dataclasses.replace(PLAIN, name="narrow", head_dim=24),
    # Key tiles without a step.
    dataclasses.replace(
        PLAIN, name="unseen_keys", seqlen_q=500, seqlen_k=1400, window_size=(400, 0)
    ),
    dataclasses.replace(
        PLAIN, name="one_step", seqlen_q=60, seqlen_k=700, dropout_p=0.2
    ),
    # So many rounds that rows are prepared and rounded closer to their use.
    dataclasses.replace(
        PLAIN,
        name="close",
        heads=12,
        heads_k=12,
        seqlen_q=1040,
        seqlen_k=1100,
        head_dim=24,
    ),
    # Its consumers need the idle warps' registers.
    dataclasses.replace(PLAIN, name="without_service", head_dim=128, softcap=10.0),
)


@pytest.fixture(scope="module", autouse=True)
def fused():
    devices.require_family("sm90")
    with testing.override_tiles("backward", "sm90"):
        yield


@pytest.mark.parametrize("case", MANY_CTAS, ids=str)
def test_every_head_is_right(case, expected):
    results = calls.run(case, implementation="cuda")
    oracle.check(results, expected[case])


def test_no_queries():
    """Nothing is prepared then, and nobody waits for it."""
    case = dataclasses.replace(PLAIN, name="no_queries", seqlen_q=0)
    results = calls.run(case, implementation="cuda")
    oracle.check(results, oracle.of(case, inputs.make(case)), ("dq", "dk", "dv"))


@pytest.mark.parametrize("packing", ["kv", "qkv"])
def test_packed(packing):
    results = calls.run(PLAIN, packing=packing, implementation="cuda")
    oracle.check(results, oracle.expected(PLAIN))


CAUSAL = next(case for case in MANY_CTAS if case.name == "causal")


@pytest.fixture(scope="module")
def run_causal():
    return containment.runner(CAUSAL, implementation="cuda")


@pytest.mark.parametrize("operand", containment.OPERANDS)
@pytest.mark.parametrize("row", [0, 401, 799])
def test_containment(operand, row, run_causal, expected):
    """Also of the heads whose dq the main kernel has rounded."""
    results = containment.results_with(run_causal, CAUSAL, operand, row, np.nan)
    containment.check(results, expected[CAUSAL], CAUSAL, operand, row)


@pytest.mark.parametrize("name", ["plain", "causal", "close"])
def test_repeated_runs(name, expected):
    """A row that was used before it was prepared would show in dk and dv.

    They are bitwise equal; dq is summed in any order, and right each time.
    """
    case = next(case for case in MANY_CTAS if case.name == name)
    run = calls.jit(calls.with_gradients(calls.attention(case, implementation="cuda")))
    arrays = inputs.make(case)
    first = jax.block_until_ready(run(arrays))
    for repetition in range(100):
        results = run(arrays)
        for gradient in ("dk", "dv"):
            np.testing.assert_array_equal(results[gradient], first[gradient])
        if repetition % 10 == 0:
            oracle.check(results, expected[case])
