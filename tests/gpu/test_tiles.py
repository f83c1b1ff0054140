"""Every row of the tile table, those for less shared memory included."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import jax_flash_attn
from jax_flash_attn import testing
from tests.support import (
    calls,
    cases,
    devices,
    inputs,
    kernel_cases,
    oracle,
    tile_table,
)

pytestmark = pytest.mark.gpu

PLAIN = ("causal_gqa", "ragged_tail")
MANY_TILES = "many_tiles"
DROPOUT = "dropout_causal"
ALIBI = "alibi_bh"
SOFTCAP = "softcap"
FEATURES = ("everything_masked_rows", "float16_everything")

CELLS = [
    pytest.param(
        row,
        dataclasses.replace(cases.BY_NAME[name], head_dim=head_dim),
        id=f"{row}-{name}-{head_dim}",
    )
    for row in tile_table.rows()
    if devices.has_family(row.family)
    for name, head_dim in (
        *(((PLAIN[0], row.max_head_dim),) if row.serves_masks else ()),
        *(((MANY_TILES, row.max_head_dim),) if row.serves_masks else ()),
        (PLAIN[1], row.max_head_dim - 24),
        *(((DROPOUT, row.max_head_dim),) if row.serves_dropout else ()),
        *(((ALIBI, row.max_head_dim - 24),) if row.serves_alibi else ()),
        *(((SOFTCAP, row.max_head_dim),) if row.serves_softcap else ()),
        *(((FEATURES[0], row.max_head_dim),) if row.serves_features else ()),
        *(((FEATURES[1], row.max_head_dim - 24),) if row.serves_features else ()),
    )
    if row.family != "sm90head"
    or kernel_cases.fits_head(cases.BY_NAME[name], passes=row.numbers[5])
]


@functools.cache
def program(case, deterministic):
    """A program that is compiled once and run with the tiles of many rows."""
    attend = calls.attention(case, implementation="cuda", deterministic=deterministic)
    return jax.jit(calls.with_gradients(attend))


@pytest.mark.parametrize(("row", "case"), CELLS)
def test_row(row, case, expected):
    # Of the fused backward the fast form; test_determinism.py has the other one.
    run = program(
        case,
        deterministic=row.operation == "forward"
        or row.family not in ("sm90", "sm90cluster"),
    )
    with testing.override_tiles(row.operation, row.text):
        results = jax.block_until_ready(run(inputs.make(case)))
    oracle.check(results, expected[case])


@pytest.mark.parametrize(
    ("tiles", "case"),
    [
        pytest.param(
            f"sm90:64,128,{query_stages},{dout_stages}",
            dataclasses.replace(cases.BY_NAME[MANY_TILES], head_dim=64),
            id=f"{query_stages}-{dout_stages}",
        )
        for query_stages, dout_stages in ((3, 2), (2, 3), (3, 3))
        if devices.has_family("sm90")
    ],
)
def test_fused_backward_with_other_stages(tiles, case, expected):
    """Its producer fetches and sends in turns that fit any number of them."""
    run = program(case, deterministic=False)
    with testing.override_tiles("backward", tiles):
        results = jax.block_until_ready(run(inputs.make(case)))
    oracle.check(results, expected[case])


@pytest.mark.parametrize(
    ("seqlens", "batch", "heads", "mask"),
    [
        ((448, 448), 12, 16, {"causal": True}),  # every key tile
        ((900, 300), 12, 8, {"causal": True}),
        ((640, 640), 16, 8, {"window_size": (200, 70)}),  # tiles that hide nothing
        ((300, 900), 12, 8, {"window_size": (100, 0)}),  # and some that no row sees
    ],
    ids=["causal", "rows_without_keys", "window", "keys_that_none_sees"],
)
def test_consumers_a_step_ahead(seqlens, batch, heads, mask, expected):
    """CTAs have several key tiles, of some of which a consumer skips a step."""
    devices.require_family("sm90")
    case = dataclasses.replace(
        cases.BY_NAME["plain"],
        name=f"step_ahead_{'_'.join(mask)}_{seqlens[0]}",
        batch=batch,
        seqlen_q=seqlens[0],
        seqlen_k=seqlens[1],
        heads=heads,
        heads_k=8,
        head_dim=128,
        **mask,
    )
    arrays = inputs.make(case)
    run = program(case, deterministic=True)
    with testing.override_tiles("backward", "sm90split"):
        first = jax.block_until_ready(run(arrays))
        for _ in range(50):
            again = jax.block_until_ready(run(arrays))
            jax.tree.map(np.testing.assert_array_equal, first, again)
    oracle.check(first, expected[case])


@pytest.mark.parametrize("heads_k", [1, 4])
def test_many_heads_are_taken_whole(heads_k, expected):
    """As the tables choose, each CTA with more than one."""
    devices.require_family("sm90")
    case = dataclasses.replace(
        cases.BY_NAME["ragged_tail"],
        name=f"many_heads_{heads_k}",
        seqlen_q=110,
        batch=264 // heads_k,
        heads=4,
        heads_k=heads_k,
    )
    arrays = inputs.make(case)
    found = jax_flash_attn.explain(*(arrays[name] for name in "qkv"))
    assert found.backward.startswith("sm90 head")
    results = jax.block_until_ready(program(case, deterministic=False)(arrays))
    oracle.check(results, expected[case])


def test_long_causal_heads_are_taken_in_passes(expected):
    """As the tables choose, each CTA with more than one."""
    devices.require_family("sm90")
    case = dataclasses.replace(
        cases.BY_NAME["causal"],
        name="heads_in_passes",
        batch=66,
        heads=4,
        heads_k=4,
        seqlen_q=840,
        seqlen_k=840,
    )
    arrays = inputs.make(case)
    found = jax_flash_attn.explain(*(arrays[name] for name in "qkv"), causal=True)
    assert found.backward.startswith("sm90 head")
    assert found.backward.endswith("passes")
    results = jax.block_until_ready(program(case, deterministic=False)(arrays))
    oracle.check(results, expected[case])


def test_passes_that_the_workspace_has_no_room_for_are_refused():
    devices.require_family("sm90")
    case = dataclasses.replace(
        cases.BY_NAME["plain"], batch=1, heads=1, heads_k=1, seqlen_q=520, seqlen_k=2000
    )
    with (
        testing.override_tiles("backward", "sm90head"),
        pytest.raises(jax.errors.JaxRuntimeError, match="too small"),
    ):
        jax.block_until_ready(program(case, True)(inputs.make(case)))


def test_a_head_that_does_not_fit_is_refused_by_each_call():
    """Also where one that fits has run before."""
    devices.require_family("sm90")
    # In bfloat16 the group would come in parts that fit.
    case = dataclasses.replace(cases.BY_NAME["plain"], dtype="float16")
    large = dataclasses.replace(case, seqlen_q=500, heads=4)
    with testing.override_tiles("backward", "sm90head"):
        jax.block_until_ready(program(case, True)(inputs.make(case)))
        with pytest.raises(jax.errors.JaxRuntimeError, match="there are 16"):
            jax.block_until_ready(program(large, True)(inputs.make(large)))


def test_tiles_that_do_not_fit_are_an_error_with_the_reason():
    case = dataclasses.replace(cases.BY_NAME["plain"], head_dim=256)
    largest = next(row for row in tile_table.rows() if row.operation == "forward")
    large = dataclasses.replace(largest, numbers=(512, 512, *largest.numbers[2:]))
    with (
        testing.override_tiles("forward", large.text),
        pytest.raises(jax.errors.JaxRuntimeError, match="shared memory"),
    ):
        jax.block_until_ready(program(case, True)(inputs.make(case)))
    jax.block_until_ready(program(case, True)(inputs.make(case)))
