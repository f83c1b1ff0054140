"""The backward kernels against the oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash_attn
from jax_flash_attn import testing
from tests.support import calls, cases, devices, inputs, kernel_cases, oracle

pytestmark = pytest.mark.gpu

GRADIENTS = ("dq", "dk", "dv")

DETERMINISTIC = (
    "plain",
    "ragged_tail",
    "long_query",
    "gqa_odd_group",
    "fully_masked_rows",
    "window_two_sided",
    "float16_everything",
    "head_dim_256",
)


@pytest.mark.parametrize("case", kernel_cases.PARAMS)
def test_gradients(case, kernel_results, expected):
    oracle.check(kernel_results(case), expected[case], GRADIENTS)


def _family_params():
    families = ("sm80", "sm90", "sm90split", "sm90head", "sm90cluster")
    for family in filter(devices.has_family, families):
        for param in kernel_cases.PARAMS:
            (case,) = param.values
            if kernel_cases.serves_backward(family, case):
                name = f"{family}-{param.id}"
                yield pytest.param(family, case, id=name, marks=param.marks)


@pytest.mark.parametrize(("family", "case"), tuple(_family_params()))
def test_family(family, case, expected):
    """Whichever the tables choose at the length of these cases."""
    with testing.override_tiles("backward", family):
        results = calls.run(case, implementation="cuda")
        jax.block_until_ready(results)
    oracle.check(results, expected[case], GRADIENTS)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("name", ["no_queries", "no_keys"])
def test_nothing_to_compute(name, head_dim):
    case = dataclasses.replace(cases.BY_NAME[name], head_dim=head_dim)
    results = calls.run(case, implementation="cuda")
    oracle.check(results, oracle.of(case, inputs.make(case)), GRADIENTS)


@pytest.mark.parametrize(
    "case", [cases.BY_NAME[name] for name in DETERMINISTIC], ids=str
)
def test_deterministic_gradients(case, expected):
    results = calls.run(case, implementation="cuda", deterministic=True)
    oracle.check(results, expected[case], GRADIENTS)


def test_gradients_without_a_cotangent_of_lse():
    case = cases.BY_NAME["causal_gqa"]
    arrays = inputs.make(case)
    arrays["dlse"] = jnp.zeros_like(arrays["dlse"])

    def call(q, k, v):
        return jax_flash_attn.flash_attn_func(
            q, k, v, causal=True, implementation="cuda"
        )

    _, pullback = jax.vjp(call, *(arrays[name] for name in "qkv"))
    gradients = jax.jit(pullback)(arrays["dout"])
    results = dict(zip(GRADIENTS, gradients, strict=True))
    oracle.check(results, oracle.of(case, arrays), GRADIENTS)


@pytest.mark.parametrize("packing", ["kv", "qkv"])
@pytest.mark.parametrize("name", ["everything", "ragged_tail", "head_dim_40"])
def test_packed(name, packing):
    """One buffer in, one gradient buffer out, read and written by strides."""
    case = cases.BY_NAME[name]
    if packing == "qkv":
        case = dataclasses.replace(case, seqlen_q=case.seqlen_k, heads_k=case.heads)
    results = calls.run(case, packing=packing, implementation="cuda")
    oracle.check(results, oracle.expected(case))


def test_more_heads_than_a_product_of_head_counts_holds():
    """46,341 heads squared pass 32 bits."""
    case = dataclasses.replace(
        cases.BY_NAME["plain"],
        **{"batch": 1, "seqlen_q": 16, "seqlen_k": 16, "head_dim": 8},
        **{"heads": 50_000, "heads_k": 50_000},
    )
    arrays = inputs.make(case)
    results = calls.run(case, implementation="cuda")
    oracle.check(results, oracle.of(case, arrays))


def test_masked_rows_get_and_give_nothing():
    """However large the cotangents of rows that see no key are."""
    case = cases.BY_NAME["fully_masked_rows"]
    masked = case.seqlen_q - case.seqlen_k
    arrays = inputs.make(case)
    run = jax.jit(
        calls.with_gradients(
            calls.attention(case, implementation="cuda", deterministic=True)
        )
    )
    clean = run(arrays)
    arrays["dout"] = arrays["dout"].at[:, :masked].set(1e30)
    arrays["dlse"] = arrays["dlse"].at[..., :masked].set(1e30)
    loud = run(arrays)
    for name in GRADIENTS:
        np.testing.assert_array_equal(loud[name], clean[name], err_msg=name)
    assert not np.asarray(loud["dq"])[:, :masked].any()
