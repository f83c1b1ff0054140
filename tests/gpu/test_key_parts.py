"""Calls whose key heads are so few that the backward splits them into parts."""

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
)


def has_parts(case):
    arrays = inputs.make(case)
    q, k, v = (arrays[name] for name in "qkv")
    found = jax_flash_attn.explain(
        q, k, v, causal=case.causal, window_size=case.window_size
    )
    return " parts" in found.backward


@pytest.fixture(scope="module", autouse=True)
def hopper():
    devices.require_family("sm90")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, expected):
    assert has_parts(case)
    results = calls.run(case, implementation="cuda")
    oracle.check(results, expected[case])


def test_packed():
    case = dataclasses.replace(MQA, name="packed", causal=True)
    assert has_parts(case)
    results = calls.run(case, packing="kv", implementation="cuda")
    oracle.check(results, oracle.of(case, inputs.make(case)))


SMALL = dataclasses.replace(
    cases.BY_NAME["causal_gqa"], seqlen_q=200, seqlen_k=230, heads=8, heads_k=2
)
PASSES = dataclasses.replace(SMALL, name="passes", head_dim=64, seqlen_q=900)
"""Whole heads come in two passes where a part has one query head."""
FAMILY_CASES = (
    ("sm80", SMALL, 2),
    ("sm90", SMALL, 2),
    ("sm90", dataclasses.replace(SMALL, name="head_dim_128", head_dim=128), 4),
    ("sm90split", SMALL, 2),
    ("sm90split", dataclasses.replace(SMALL, name="wide", head_dim=192), 4),
    ("sm90head", dataclasses.replace(SMALL, head_dim=64), 2),
    ("sm90head", PASSES, 4),
    ("sm90cluster", dataclasses.replace(SMALL, head_dim=256), 2),
)
"""A backward, a case, and into how many parts its key heads are split."""


@pytest.fixture
def run_in(monkeypatch):
    """Runs a case with a family's backward, its key heads in so many parts."""

    def run(arrays, family, case, parts, **more):
        monkeypatch.setattr(_key_parts, "key_parts", lambda *_: parts)
        function = containment.runner(case, implementation="cuda", **more)
        with testing.override_tiles("backward", family):
            return jax.block_until_ready(function(arrays))

    return run


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
    arrays = inputs.make(case)
    arrays[operand] = arrays[operand].at[:, row].set(np.nan)
    results = run_in(arrays, family, case, parts)
    containment.check(results, expected[case], case, operand, row)


@pytest.mark.parametrize(
    ("family", "case", "parts"),
    [row for row in FAMILY_CASES if row[0] != "sm90cluster"],
    ids=str,
)
def test_deterministic(run_in, family, case, parts, expected):
    arrays = inputs.make(case)
    runs = [run_in(arrays, family, case, parts, deterministic=True) for _ in range(3)]
    oracle.check(runs[0], expected[case])
    for name, first in runs[0].items():
        for other in runs[1:]:
            np.testing.assert_array_equal(first, other[name], err_msg=name)


@pytest.mark.parametrize("subset", [("q",), ("k", "v"), ("q", "slopes")], ids=str)
@pytest.mark.parametrize("check", ["vmap_of_grad", "grad_of_vmap"])
def test_vmap(monkeypatch, check, subset):
    """Batch entries share keys, or queries, that are not mapped."""
    monkeypatch.setattr(_key_parts, "key_parts", lambda *_: 2)
    getattr(transforms.Checks("cuda", "bfloat16"), check)(subset)
