"""Haiku's layer on our attention: Haiku's own cases, and Haiku's numbers."""

import inspect

import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest

from jax_flash_attn.integrations.haiku import MultiHeadAttention
from tests.support import calls, closeness, layers
from tests.support.layers import normal

W_INIT = hk.initializers.VarianceScaling(1.0)


def transformed(layer, ours=None, **options):
    options = {
        "num_heads": 3,
        "key_size": 8,
        "w_init": W_INIT,
        **options,
        **(ours or {}),
    }

    def run(*inputs, **call):
        return layer(**options)(*inputs, **call)

    return hk.transform(run)


def check(inputs, ours=None, our_mask=None, mask=None, dtype="float32", **options):
    flash = transformed(MultiHeadAttention, ours, **options)
    plain = transformed(hk.MultiHeadAttention, **options)
    key = jax.random.key(0)
    params = layers.parameters(plain.init, key, *inputs)
    mine = layers.parameters(flash.init, key, *inputs)
    assert jax.tree.map(np.shape, mine) == jax.tree.map(np.shape, params)

    def of(layer, mask):
        return lambda params, inputs: layer.apply(params, key, *inputs, mask=mask)

    layers.assert_equal(of(flash, our_mask), of(plain, mask), (params, inputs), dtype)


def causal(length):
    return np.tril(np.ones((length, length), np.float32))


def test_causal_kernel_equals_haiku_with_a_causal_mask():
    x = normal(2, 7, 5)
    check((x, x, x), {"causal": True}, None, causal(7)[None, None], "bfloat16")


@pytest.mark.parametrize(
    "lead", [pytest.param((), marks=pytest.mark.long), (2, 3)], ids=str
)
def test_other_lengths_value_and_model_sizes_over_any_batch_axes(lead):
    inputs = (normal(*lead, 2, 5), normal(*lead, 6, 4, seed=1), normal(*lead, 6, 3))
    check(inputs, value_size=13, model_size=15, with_bias=False)


def test_mask_array_of_floats():
    x, mask = normal(2, 5, 3), causal(5)[None, None]
    check((x, x, x), {"window_size": (-1, 0)}, mask, mask)


def test_default_sizes():
    def sizes():
        layer = MultiHeadAttention(num_heads=5, key_size=3, w_init=W_INIT)
        return layer.value_size, layer.model_size, layer.name

    assert hk.testing.transform_and_run(sizes)() == (3, 15, "multi_head_attention")


def test_signature_begins_with_that_of_haiku():
    ours = inspect.signature(MultiHeadAttention.__init__).parameters
    theirs = inspect.signature(hk.MultiHeadAttention.__init__).parameters
    assert [(p.name, p.kind, p.default) for p in theirs.values()] == [
        (p.name, p.kind, p.default) for p in list(ours.values())[: len(theirs)]
    ]


def test_mixed_precision_policy_of_the_class():
    policy = jmp.get_policy("params=float32,compute=bfloat16,output=float32")
    x, key = normal(2, 5, 4), jax.random.key(0)

    params = layers.parameters(transformed(hk.MultiHeadAttention).init, key, x, x, x)
    exact = transformed(hk.MultiHeadAttention).apply(params, key, x, x, x)

    def run(cls):
        layer = transformed(cls)
        with hk.mixed_precision.push_policy(cls, policy):
            traced = jax.make_jaxpr(layer.apply)(params, key, x, x, x)
            return traced, layer.apply(params, key, x, x, x)

    (traced, ours), (_, theirs) = run(MultiHeadAttention), run(hk.MultiHeadAttention)
    (attention,) = (e for e in traced.eqns if "custom_vjp" in e.primitive.name)
    assert {x.aval.dtype for x in attention.invars} == {jnp.dtype(jnp.bfloat16)}
    closeness.assert_close_to_oracle(ours, exact, theirs)


@pytest.mark.long
def test_vmap_of_a_layer_equals_its_batch():
    flash = transformed(MultiHeadAttention, {"causal": True})
    plain = transformed(hk.MultiHeadAttention)
    x, key = normal(3, 5, 4), jax.random.key(0)
    params = layers.parameters(plain.init, key, x, x, x)

    def ours(params, x):
        return jax.vmap(lambda row: flash.apply(params, key, row, row, row))(x)

    def theirs(params, x):
        return plain.apply(params, key, x, x, x, mask=causal(5)[None, None])

    layers.assert_equal(ours, theirs, (params, x))


def test_dropout_draws_from_haikus_keys():
    flash = transformed(MultiHeadAttention)
    x = normal(2, 5, 4)
    params = layers.parameters(flash.init, jax.random.key(0), x, x, x)

    @calls.jit
    def run(key, x):
        return flash.apply(params, key, x, x, x, dropout_rate=0.5)

    once, again, other = (run(jax.random.PRNGKey(seed), x) for seed in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other)


@pytest.mark.parametrize(
    ("options", "call", "error", "text"),
    [
        ({"w_init": None}, {}, ValueError, "weight initializer"),
        ({"window_size": 3}, {}, TypeError, "window_size must be a pair"),
        ({}, {"mask": jnp.ones((5, 5))}, ValueError, "mask must have 4 axes"),
        ({}, {"mask": "causal"}, TypeError, "mask must be an array"),
        ({}, {"dropout_rate": 1.5}, ValueError, "dropout_rate must be at least 0"),
        (
            {"implementation": "cuda"},
            {"mask": jnp.ones((1, 1, 5, 5))},
            NotImplementedError,
            "a mask array is passed",
        ),
    ],
    ids=["w_init", "window", "mask", "no_mask", "dropout_rate", "cuda"],
)
def test_what_cannot_be_done_is_refused(options, call, error, text):
    flash = transformed(MultiHeadAttention, options)
    x = normal(2, 5, 4)
    with pytest.raises(error, match=text):
        jax.eval_shape(lambda key: flash.init(key, x, x, x, **call), jax.random.key(0))
