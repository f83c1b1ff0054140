"""The forward kernel against the oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash_attn
from jax_flash_attn import testing
from tests.support import calls, cases, inputs, kernel_cases, oracle

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", kernel_cases.PARAMS)
def test_out_and_lse(case, kernel_results, expected):
    oracle.check(kernel_results(case), expected[case], ("out", "lse"))


@pytest.mark.parametrize("case", kernel_cases.PARAMS)
def test_portable_family(case, expected):
    """What runs where there is no family for the device alone."""
    arrays = inputs.make(case)
    attend = calls.attention(case, implementation="cuda")
    with testing.override_tiles("forward", "sm80"):
        out, lse = jax.jit(attend)(*(arrays[name] for name in calls.OPERANDS))
        jax.block_until_ready(out)
    oracle.check({"out": out, "lse": lse}, expected[case], ("out", "lse"))


def test_without_lse_and_gradients():
    """The program that inference runs."""
    case = cases.BY_NAME["causal_gqa"]
    arrays = inputs.make(case)

    def call(q, k, v):
        return jax_flash_attn.flash_attn_func(
            q, k, v, causal=True, implementation="cuda"
        )

    out = jax.jit(call)(*(arrays[name] for name in "qkv"))
    oracle.check({"out": out}, oracle.of(case, arrays), ("out",))


def test_results_have_their_dtypes(kernel_results):
    results = kernel_results(cases.BY_NAME["float16"])
    assert results.pop("lse").dtype == jnp.float32
    assert {x.dtype for x in results.values()} == {jnp.dtype("float16")}


def test_rows_of_ones_in_v_return_ones():
    arrays = inputs.make(cases.BY_NAME["ragged_tail"])
    out = jax_flash_attn.flash_attn_func(
        arrays["q"], arrays["k"], jnp.ones_like(arrays["v"]), implementation="cuda"
    )
    np.testing.assert_array_equal(out, jnp.ones_like(out))


def test_causal_prefix_equals_the_shorter_sequence():
    """No query sees past the diagonal, whatever tiles lie there."""
    arrays = inputs.make(cases.BY_NAME["causal"])
    length = 97

    def call(q, k, v):
        return jax_flash_attn.flash_attn_func(
            q, k, v, causal=True, implementation="cuda"
        )

    qkv = [arrays[name] for name in "qkv"]
    whole = call(*qkv)[:, :length]
    short = dataclasses.replace(
        cases.BY_NAME["causal"], seqlen_q=length, seqlen_k=length
    )
    sliced = {name: arrays[name][:, :length] for name in ("q", "k", "v", "dout")}
    sliced["dlse"] = arrays["dlse"][..., :length]
    right = oracle.of(short, arrays | sliced)
    oracle.check({"out": whole}, right, ("out",))
    oracle.check({"out": call(*(x[:, :length] for x in qkv))}, right, ("out",))


@pytest.mark.parametrize("empty", ["q", "k", "batch"])
def test_empty_operands(empty):
    case = dataclasses.replace(cases.BY_NAME["everything"], seqlen_q=20, seqlen_k=20)
    sizes = {"q": {"seqlen_q": 0}, "k": {"seqlen_k": 0}, "batch": {"batch": 0}}
    case = dataclasses.replace(case, **sizes[empty])
    results = calls.run(case, implementation="cuda")
    arrays = inputs.make(case)
    for name, like in zip(("out", "dq", "dk", "dv"), "qqkv", strict=True):
        assert results[name].shape == arrays[like].shape
        assert not np.asarray(results[name]).any()
    assert np.isneginf(np.asarray(results["lse"])).all()


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (5, 3)])
def test_more_heads_than_a_grid_dimension_holds(seqlen_q, seqlen_k):
    """vmap folds its axis into the batch: batch * heads exceeds 65535."""
    case = dataclasses.replace(
        cases.BY_NAME["one_query_one_key"],
        batch=2,
        heads=4,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        heads_k=2,
        head_dim=8,
    )
    count = 65536 // (case.batch * case.heads) + 3
    whole = dataclasses.replace(case, batch=case.batch * count)
    arrays = inputs.make(whole)
    split = {
        name: x.reshape(count, case.batch, *x.shape[1:])
        for name, x in arrays.items()
        if x is not None
    }
    run = calls.with_gradients(calls.attention(case, implementation="cuda"))
    axes = {name: 0 if name in split else None for name in arrays}
    mapped = jax.jit(jax.vmap(run, in_axes=(axes,)))(arrays | split)
    results = {name: x.reshape(whole.batch, *x.shape[2:]) for name, x in mapped.items()}
    oracle.check(results, oracle.of(whole, arrays))
