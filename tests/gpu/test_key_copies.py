"""Calls whose key heads are so few that the backward gets copies of them."""

import dataclasses

import pytest

import jax_flash_attn
from tests.support import calls, cases, devices, inputs, oracle

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


def copies(case):
    arrays = inputs.make(case)
    q, k, v = (arrays[name] for name in "qkv")
    found = jax_flash_attn.explain(
        q, k, v, causal=case.causal, window_size=case.window_size
    )
    return "copies of each key head" in found.backward


@pytest.fixture(scope="module", autouse=True)
def hopper():
    devices.require_family("sm90")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, expected):
    assert copies(case)
    results = calls.run(case, implementation="cuda")
    oracle.check(results, expected[case])


def test_packed():
    case = dataclasses.replace(MQA, name="packed", causal=True)
    assert copies(case)
    results = calls.run(case, packing="kv", implementation="cuda")
    oracle.check(results, oracle.of(case, inputs.make(case)))
