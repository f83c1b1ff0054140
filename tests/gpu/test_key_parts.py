"""Calls whose heads are so few that the backward splits key heads into parts."""

import dataclasses

import jax
import numpy as np
import pytest

import jax_flash_attn
from jax_flash_attn import _key_parts, testing
from tests.support import (
    calls,
    cases,
    containment,
    devices,
    inputs,
    oracle,
    transforms,
)

pytestmark = pytest.mark.gpu

MQA = dataclasses.replace(
    cases.BY_NAME["plain"],
    name="mqa",
    batch=1,
    seqlen_q=1024,
    seqlen_k=1024,
    heads=8,
    heads_k=1,
    head_dim=128,
)
CASES = (
    MQA,
    dataclasses.replace(MQA, name="causal", causal=True),
    dataclasses.replace(MQA, name="odd_group", heads=6, heads_k=2, causal=True),
    dataclasses.replace(MQA, name="more_queries", seqlen_k=300, head_dim=64),
    dataclasses.replace(MQA, name="padded", head_dim=60, causal=True),
    dataclasses.replace(MQA, name="wide", head_dim=192, causal=True),
    dataclasses.replace(
        MQA, name="features", window_size=(300, 20), alibi="h", dropout_p=0.1
    ),
    # Queries of a head in parts, too.
    dataclasses.replace(MQA, name="few_heads", batch=2, heads=3, heads_k=3),
    dataclasses.replace(MQA, name="few_causal_heads", heads=4, heads_k=4, causal=True),
    dataclasses.replace(
        MQA, name="few_narrow_heads", heads=4, heads_k=2, head_dim=64, seqlen_q=500
    ),
    dataclasses.replace(
        MQA, name="few_windows", heads=2, heads_k=2, window_size=(300, 400)
    ),
)


def number_of_parts(case):
    arrays = inputs.make(case)
    q, k, v = (arrays[name] for name in "qkv")
    found = jax_flash_attn.explain(
        q, k, v, causal=case.causal, window_size=case.window_size
    )
    *_, number, word = found.backward.split()
    return int(number) if word == "parts" else 1


@pytest.fixture(scope="module", autouse=True)
def hopper():
    devices.require_family("sm90")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, expected):
    group = case.heads // case.heads_k
    assert number_of_parts(case) > (group if case.name.startswith("few") else 1)
    results = calls.run(case, implementation="cuda")
    oracle.check(results, expected[case])


def test_packed():
    case = dataclasses.replace(MQA, name="packed", heads_k=2, causal=True)
    assert number_of_parts(case) > 1
    results = calls.run(case, packing="kv", implementation="cuda")
    oracle.check(results, oracle.of(case, inputs.make(case)))


SMALL = dataclasses.replace(
    cases.BY_NAME["causal_gqa"], seqlen_q=200, seqlen_k=230, heads=8, heads_k=2
)
SMALL_FULL = dataclasses.replace(SMALL, name="full", causal=False)
PASSES = dataclasses.replace(SMALL, name="passes", head_dim=64, seqlen_q=900)
"""Whole heads come in two passes where a part has one query head."""
WIDE, WIDE_FULL = (
    dataclasses.replace(case, name=f"wide_{case.name}", head_dim=256)
    for case in (SMALL, SMALL_FULL)
)
QUERIES = dataclasses.replace(SMALL, name="queries", seqlen_q=700)
FAMILY_CASES = (
    ("sm80", SMALL, 2),
    ("sm80", SMALL_FULL, 12),
    ("sm80", QUERIES, 12),
    ("sm90", SMALL, 2),
    ("sm90", SMALL_FULL, 2),
    ("sm90", dataclasses.replace(SMALL, name="head_dim_128", head_dim=128), 4),
    ("sm90", QUERIES, 12),
    ("sm90", dataclasses.replace(SMALL, name="empty", head_dim=128), 32),
    ("sm90", dataclasses.replace(SMALL_FULL, name="full_empty", head_dim=128), 32),
    ("sm90split", SMALL, 2),
    ("sm90split", SMALL_FULL, 8),
    ("sm90split", QUERIES, 12),
    ("sm90split", dataclasses.replace(WIDE, head_dim=192), 4),
    ("sm90split", WIDE_FULL, 2),
    ("sm90head", dataclasses.replace(SMALL, name="heads", head_dim=64), 2),
    ("sm90head", dataclasses.replace(SMALL_FULL, name="full_heads", head_dim=64), 4),
    ("sm90head", PASSES, 4),
    ("sm90cluster", WIDE, 2),
    ("sm90cluster", WIDE_FULL, 4),
)
"""A backward, a case, and into how many parts its key heads are split: where they are
more than a group has heads, 4, queries of each come in parts. Of 32 some are empty."""


@pytest.fixture
def run_in(monkeypatch):
    """Runs a case with a family's backward, its key heads in so many parts."""

    def run(arrays, family, case, parts, **more):
        monkeypatch.setattr(_key_parts, "key_parts", lambda *_: parts)
        function = containment.runner(case, implementation="cuda", **more)
        with testing.override_tiles("backward", family):
            return jax.block_until_ready(function(arrays))

    return run


def assert_same(results, others, select=lambda name: ...):
    for name, result in results.items():
        index = select(name)
        np.testing.assert_array_equal(
            np.asarray(result)[index], np.asarray(others[name])[index], err_msg=name
        )


@pytest.mark.parametrize(("family", "case", "parts"), FAMILY_CASES, ids=str)
def test_every_family(run_in, family, case, parts, expected):
    results = run_in(inputs.make(case), family, case, parts)
    oracle.check(results, expected[case])


@pytest.mark.parametrize("operand", containment.OPERANDS)
@pytest.mark.parametrize(("family", "case", "parts"), FAMILY_CASES, ids=str)
def test_what_is_not_finite_stays_in_its_rows(
    run_in, family, case, parts, operand, expected
):
    row = 150
    if case.seqlen_q > 230 and operand in ("q", "dout"):
        row = case.seqlen_q - 100  # it sees some of the keys of a tile, not others
    arrays = inputs.make(case)
    arrays[operand] = arrays[operand].at[:, row].set(np.nan)
    results = run_in(arrays, family, case, parts)
    containment.check(results, expected[case], case, operand, row)


# Two key tiles, which add to equal sums of dq in any order.
@pytest.mark.parametrize(
    ("family", "case", "parts"),
    [row for row in FAMILY_CASES if row[1].causal],
    ids=str,
)
def test_what_is_not_finite_stays_in_its_key_head(run_in, family, case, parts):
    arrays = inputs.make(case)
    clean = run_in(arrays, family, case, parts)
    dirty = run_in(
        arrays | {"k": arrays["k"].at[:, :, 0].set(np.nan)}, family, case, parts
    )

    def of_last(name):
        if name in ("dk", "dv"):
            return (slice(None), slice(None), slice(1, None))
        heads = slice(4, None)
        return (
            (slice(None), heads) if name == "lse" else (slice(None), slice(None), heads)
        )

    assert_same(clean, dirty, of_last)


LONG, LONG_FULL, LONG_WIDE, LONG_PASSES = (
    dataclasses.replace(case, name=f"long_{case.name}", seqlen_q=seqlen_q, seqlen_k=700)
    for case, seqlen_q in ((SMALL, 500), (SMALL_FULL, 500), (WIDE, 500), (PASSES, 900))
)
ORDERED = (
    ("sm80", LONG, (2, 4)),
    ("sm90", LONG, (2, 4)),
    ("sm90split", LONG_FULL, (1, 4, 8)),
    ("sm90split", LONG_WIDE, (2, 4)),
    ("sm90head", LONG_PASSES, (4,)),
)
"""More key tiles than two add to a query tile, whose order then shows in the sums."""


@pytest.mark.parametrize(("family", "case", "numbers"), ORDERED, ids=str)
def test_deterministic(run_in, family, case, numbers, expected):
    """dq has the same bits in any number of parts, and all results from run to run."""
    arrays = inputs.make(case)
    every = [
        [run_in(arrays, family, case, parts, deterministic=True) for _ in range(5)]
        for parts in numbers
    ]
    for runs in every:
        oracle.check(runs[0], expected[case])
        assert_same({"dq": every[0][0]["dq"]}, runs[0])
        for other in runs[1:]:
            assert_same(runs[0], other)


def test_rows_are_served_beside_parts(run_in):
    """Groups for more than the rounds of CTAs that the kernel before prepares for."""
    case = dataclasses.replace(
        cases.BY_NAME["plain"],
        name="many_groups",
        batch=4,
        heads=32,
        heads_k=8,
        seqlen_q=512,
        seqlen_k=512,
    )
    results = run_in(inputs.make(case), "sm90", case, 2)
    oracle.check(results, oracle.expected(case))


@pytest.mark.parametrize(
    ("family", "case", "deterministic"),
    [
        ("sm90head", dataclasses.replace(SMALL, head_dim=64), False),
        ("sm90cluster", WIDE, False),
        ("sm90split", WIDE, False),
        ("sm90", SMALL, True),
        ("sm80", SMALL, True),
    ],
    ids=str,
)
def test_what_has_no_parts_of_query_heads_refuses_them(
    run_in, family, case, deterministic
):
    with pytest.raises(jax.errors.JaxRuntimeError, match="a part of a query head"):
        run_in(inputs.make(case), family, case, 8, deterministic=deterministic)


def test_parts_that_are_not_of_whole_heads_are_refused(run_in):
    with pytest.raises(jax.errors.JaxRuntimeError, match="neither a divisor nor"):
        run_in(inputs.make(SMALL), "sm90", SMALL, 3)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("subset", [("q",), ("k", "v"), ("q", "slopes")], ids=str)
@pytest.mark.parametrize("check", ["vmap_of_grad", "grad_of_vmap"])
def test_vmap(monkeypatch, check, subset, parts):
    """Batch entries share keys, or queries, that are not mapped."""
    monkeypatch.setattr(_key_parts, "key_parts", lambda *_: parts)
    getattr(transforms.Checks("cuda", "bfloat16"), check)(subset)
