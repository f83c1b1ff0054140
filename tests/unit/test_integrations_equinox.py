"""Equinox's layer on our attention: Equinox's own cases, and Equinox's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import calls, devices, layers
from tests.support.layers import normal

eqx = devices.imported("equinox", "equinox")
integration = devices.imported("jax_flash_attn.integrations.equinox", "equinox")
attend = integration.multihead_attention


def make(**options):
    sizes = {"num_heads": 2, "query_size": 6, **options}
    return eqx.nn.MultiheadAttention(**sizes, key=jax.random.key(0))


def check(layer, inputs, ours=None, theirs=None, dtype="float32"):
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)

    def plain(arrays, inputs):
        return eqx.combine(arrays, static)(*inputs, **(theirs or {}))

    def flash(arrays, inputs):
        return attend(eqx.combine(arrays, static), *inputs, **(ours or {}))

    layers.assert_equal(flash, plain, (arrays, inputs), dtype)


CAUSAL = np.tril(np.ones((5, 5), bool))


def test_causal_kernel_equals_equinox_with_a_causal_mask():
    x = normal(5, 6)
    check(make(), (x, x, x), {"causal": True}, {"mask": CAUSAL}, "bfloat16")


def test_other_lengths_and_sizes():
    layer = make(
        num_heads=3,
        query_size=5,
        key_size=4,
        value_size=3,
        output_size=7,
        qk_size=6,
        vo_size=2,
        use_query_bias=True,
        use_key_bias=True,
        use_value_bias=True,
        use_output_bias=True,
    )
    check(layer, (normal(4, 5), normal(6, 4), normal(6, 3)))


def test_mask_array_for_each_head():
    mask = np.random.default_rng(0).random((2, 5, 5)) < 0.5
    mask[..., 0] = True
    x = normal(5, 6)
    check(make(), (x, x, x), {"mask": mask}, {"mask": mask})


def test_heads_are_processed_as_equinox_does():
    def process_heads(q, k, v):
        return q * 2, k + 1, v - 1

    x, call = normal(5, 6), {"process_heads": process_heads}
    check(make(), (x, x, x), call, call)


def test_inference_drops_nothing():
    x, call = normal(5, 6), {"inference": True}
    check(make(dropout_p=0.5), (x, x, x), call, call)
    check(eqx.nn.inference_mode(make(dropout_p=0.5)), (x, x, x))


def test_dropout_depends_on_its_key_and_differs_over_a_batch():
    layer, x = make(dropout_p=0.5), np.stack([normal(5, 6)] * 3)

    @calls.jit
    def run(keys):
        return jax.vmap(lambda x, key: attend(layer, x, x, x, key=key))(x, keys)

    keys = jax.random.split(jax.random.key(1), 3)
    out = run(keys)
    np.testing.assert_array_equal(out, run(keys))
    assert not np.array_equal(out[0], out[1])
    alone = run(jnp.stack([keys[1]] * 3))
    np.testing.assert_array_equal(alone[0], alone[1])


@pytest.mark.parametrize(
    ("options", "call", "error", "text"),
    [
        ({"dropout_p": 0.1}, {}, ValueError, "key must be a JAX PRNG key"),
        ({}, {"inference": 1}, TypeError, "inference must be True or False"),
        ({}, {"mask": jnp.ones((1, 1, 5, 5))}, ValueError, "mask must have shape"),
        ({}, {"softcap": -1.0}, ValueError, "softcap must be 0"),
        (
            {},
            {"process_heads": lambda q, k, v: (q[:2], k, v)},
            ValueError,
            "process_heads must return",
        ),
    ],
    ids=["key", "inference", "mask", "softcap", "process_heads"],
)
def test_what_cannot_be_done_is_refused(options, call, error, text):
    layer, x = make(**options), normal(5, 6)
    with pytest.raises(error, match=text):
        attend(layer, x, x, x, **call)


@pytest.mark.parametrize(
    ("arrays", "error", "text"),
    [
        ({"query": normal(2, 5, 6)}, ValueError, r"query must have shape.*\(2, 5, 6\)"),
        ({"key_": normal(2, 7, 6)}, ValueError, "key_ must have shape.*jax.vmap adds"),
        ({"value": normal(6)}, ValueError, "value must have shape"),
        ({"value": normal(5, 6)}, ValueError, "value must have the length of key_, 7"),
        ({"query": None}, TypeError, "query must be an array"),
        ({"mask": "causal"}, TypeError, "mask must be an array"),
    ],
    ids=["query", "key_", "value", "length", "none", "mask"],
)
def test_wrong_arrays_are_refused_by_name(arrays, error, text):
    given = {"query": normal(5, 6), "key_": normal(7, 6), "value": normal(7, 6)}
    with pytest.raises(error, match=text):
        attend(make(), **{**given, **arrays})


def test_another_layer_is_refused():
    with pytest.raises(
        TypeError, match=r"layer must be an eqx\.nn\.MultiheadAttention"
    ):
        attend(object(), *[normal(5, 6)] * 3)
