"""Bitwise equal from run to run: the forward always, gradients when asked for."""

import dataclasses
import itertools
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash_attn import testing
from tests.support import calls, cases, devices, inputs, oracle

pytestmark = pytest.mark.gpu

NUM_RUNS = 20


def large(edge, **changes):
    """A case with enough tiles for their order to vary."""
    sizes = {"seqlen_q": 1000, "seqlen_k": 1100, **changes}
    return dataclasses.replace(cases.BY_NAME[edge], **sizes)


CASES = (
    large("plain", heads=8, heads_k=8),
    large("causal_gqa", heads=8, heads_k=2, head_dim=128),
    large("window_two_sided", head_dim=96),
    large("everything", dtype="float16"),
    large("head_dim_256", seqlen_q=1100, seqlen_k=500),
)


def distinct(runs):
    return len({np.asarray(x).tobytes() for x in runs})


@pytest.mark.parametrize("deterministic_case", CASES, ids=str)
def test_every_result_when_asked_for(deterministic_case):
    attend = calls.attention(
        deterministic_case, implementation="cuda", deterministic=True
    )
    run = jax.jit(calls.with_gradients(attend))
    arrays = inputs.make(deterministic_case)
    runs = [run(arrays) for _ in range(NUM_RUNS)]
    for name in runs[0]:
        assert distinct(results[name] for results in runs) == 1, name


ORDERED = (
    large("plain", batch=4, heads=16, heads_k=16),
    large("plain", name="few_tiles", heads=2, heads_k=2, seqlen_q=300, seqlen_k=300),
    large("plain", name="one_part", head_dim=24, heads=8, heads_k=8),
    large("causal_gqa", batch=6, heads=16, heads_k=4, head_dim=64),
    large("causal_gqa", name="more_queries", seqlen_q=1500, seqlen_k=700),
    large("window_two_sided", name="unseen_keys", seqlen_q=500, seqlen_k=1400),
    large("everything", head_dim=40),
)
"""For the fused backward, where CTAs add to one query tile in one order."""

WIDE = large("plain", name="wide", head_dim=128, heads=8, heads_k=8)

TILES = ("sm90", "sm90:64,128,3,2", "sm90:64,128,2,3")


HEADS = (
    large("plain", name="heads", batch=4, heads=70, heads_k=70, seqlen_q=512),
    large("causal_gqa", batch=75, heads=8, heads_k=4, seqlen_q=100, seqlen_k=330),
    large("plain", name="one_step", batch=75, heads=4, heads_k=4, seqlen_q=40),
    large("window_two_sided", batch=70, heads=4, heads_k=4, seqlen_q=300),
    large("causal", batch=70, heads=4, heads_k=4, seqlen_q=500, seqlen_k=450),
    # Where consumer 1 is the first to add, and consumer 0 skips the first step of all.
    large("window_own_key", batch=70, heads=4, heads_k=4, seqlen_q=128, seqlen_k=256),
    large(
        "window_own_key",
        name="own_key",
        batch=70,
        heads=4,
        heads_k=4,
        seqlen_q=256,
        seqlen_k=256,
    ),
)
"""For the backward whose CTAs take whole heads, several each."""

PASSES = (
    large("causal", name="passes", batch=70, heads=4, heads_k=4, seqlen_q=1000),
    large("plain", name="full", batch=40, heads=8, heads_k=8, seqlen_q=777),
    large("window_two_sided", name="both_sides", seqlen_q=900, seqlen_k=1000),
    large("causal", name="fewer_keys", seqlen_q=1024, seqlen_k=600),
)
"""The same by two passes."""


@pytest.mark.parametrize(
    ("case", "tiles"),
    [
        *itertools.product(ORDERED, TILES),
        (WIDE, "sm90"),
        (dataclasses.replace(WIDE, name="wide_causal", causal=True), "sm90"),
        *itertools.product((*HEADS, *PASSES), ["sm90head"]),
    ],
    ids=str,
)
def test_additions_in_order(tiles, case, expected):
    devices.require_family("sm90")
    attend = calls.attention(case, implementation="cuda", deterministic=True)
    run = jax.jit(calls.with_gradients(attend))
    arrays = inputs.make(case)
    with testing.override_tiles("backward", tiles):
        runs = [jax.block_until_ready(run(arrays)) for _ in range(NUM_RUNS)]
    oracle.check(runs[0], expected[case])
    for name in runs[0]:
        assert distinct(results[name] for results in runs) == 1, name


@pytest.mark.parametrize("case", [*HEADS, *PASSES], ids=str)
def test_whole_heads_add_as_the_split_form_does(case):
    """So a deterministic row does not depend on how many heads there are."""
    devices.require_family("sm90")
    attend = calls.attention(case, implementation="cuda", deterministic=True)
    run = jax.jit(calls.with_gradients(attend))
    arrays = inputs.make(case)
    results = {}
    for tiles in ("sm90head", "sm90split"):
        with testing.override_tiles("backward", tiles):
            results[tiles] = jax.block_until_ready(run(arrays))
    for name in results["sm90head"]:
        both = [np.asarray(results[tiles][name]) for tiles in results]
        differ = np.count_nonzero(both[0] != both[1])
        assert differ == 0, f"{differ} of {both[0].size} elements of {name}"


def test_wide_heads_with_softcap_have_no_order():
    devices.require_family("sm90")
    case = dataclasses.replace(cases.BY_NAME["plain"], head_dim=128, softcap=10.0)
    attend = calls.attention(case, implementation="cuda", deterministic=True)
    with (
        testing.override_tiles("backward", "sm90"),
        pytest.raises(jax.errors.JaxRuntimeError, match="up to head dim 96"),
    ):
        jax.block_until_ready(jax.jit(calls.with_gradients(attend))(inputs.make(case)))


@pytest.mark.parametrize("large_case", CASES[:2], ids=str)
def test_forward_dk_and_dv_always(large_case):
    attend = calls.attention(large_case, implementation="cuda")
    run = jax.jit(calls.with_gradients(attend))
    arrays = inputs.make(large_case)
    runs = [run(arrays) for _ in range(NUM_RUNS)]
    for name in ("out", "lse", "dk", "dv"):
        assert distinct(results[name] for results in runs) == 1, name


MANY_TILES = dataclasses.replace(
    cases.BY_NAME["many_tiles"], head_dim=128, causal=False
)


@pytest.mark.parametrize(
    ("case", "tiles"),
    [
        (MANY_TILES, ""),
        (dataclasses.replace(MANY_TILES, name="causal", causal=True), ""),
        # The fused backward, with additions in order; those before are split.
        (
            dataclasses.replace(
                MANY_TILES, name="in_order", head_dim=64, seqlen_q=1100, seqlen_k=1100
            ),
            "",
        ),
        (HEADS[0], "sm90head"),
        (HEADS[1], "sm90head"),
        (HEADS[3], "sm90head"),
        (PASSES[0], "sm90head"),
    ],
    ids=str,
)
def test_a_thousand_runs(case, tiles):
    """A race between the warps of a pipeline shows in few of them, if at all."""
    if tiles:
        devices.require_family(tiles)
    arrays = inputs.make(case)
    attend = calls.attention(case, implementation="cuda", deterministic=True)
    jitted = jax.jit(calls.with_gradients(attend))

    def run(arrays):
        forced = testing.override_tiles("backward", tiles) if tiles else nullcontext()
        with forced:
            return jax.block_until_ready(jitted(arrays))

    first = run(arrays)

    @jax.jit
    def same(results):
        equal = [jnp.array_equal(first[name], results[name]) for name in first]
        return jnp.stack(equal).all()

    equal = [same(run(arrays)) for _ in range(1000)]
    assert np.asarray(jnp.stack(equal)).all()


def test_a_row_does_not_depend_on_the_batch_around_it():
    case = cases.BY_NAME["causal_gqa"]
    attend = calls.attention(case, implementation="cuda", deterministic=True)
    run = jax.jit(calls.with_gradients(attend))
    arrays = inputs.make(case)
    whole = run(arrays)
    first = run({name: x if x is None else x[:1] for name, x in arrays.items()})
    for name, result in first.items():
        np.testing.assert_array_equal(result, whole[name][:1], err_msg=name)
