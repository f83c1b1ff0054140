"""flax linen's layer on our attention: flax's own cases, and flax's numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jax_flash_attn import testing
from jax_flash_attn.integrations.linen import attention_fn
from tests.support import calls, layers
from tests.support.layers import normal

KEY = jax.random.key(1)


def pair(ours=None, **options):
    """The layer on our attention and on flax's, of the same options."""
    theirs = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=24, **options)
    return theirs.clone(attention_fn=attention_fn(**(ours or {}))), theirs


def check(inputs, ours=None, mask=None, our_mask=None, dtype="float32", **options):
    flash, plain = pair(ours, **options)
    variables = layers.parameters(plain.init, KEY, *inputs)

    def of(layer, mask):
        return lambda variables, inputs: layer.apply(variables, *inputs, mask=mask)

    arguments = (variables, inputs)
    layers.assert_equal(of(flash, our_mask), of(plain, mask), arguments, dtype)


PADDING = (np.arange(7) < np.array([[5], [7], [1]]))[:, None, None]


def test_causal_kernel_equals_flax_with_a_causal_mask():
    x = normal(3, 7, 10)
    check((x,), {"causal": True}, nn.make_causal_mask(x[..., 0]), dtype="bfloat16")


@pytest.mark.parametrize(
    "lead", [pytest.param((), marks=pytest.mark.long), (2, 3)], ids=str
)
def test_cross_attention_over_any_batch_axes(lead):
    inputs = (normal(*lead, 7, 10), normal(*lead, 9, 10, seed=1))
    check((*inputs, normal(*lead, 9, 6, seed=2)))


def test_causal_kernel_and_a_mask_array_of_padding():
    x = normal(3, 7, 10)
    mask = nn.combine_masks(nn.make_causal_mask(x[..., 0]), PADDING)
    assert mask.dtype == jnp.float32
    check((x,), {"causal": True}, mask, PADDING, normalize_qk=True, use_bias=False)


def test_options_that_change_no_number_are_taken():
    options = {"dropout_rate": 0.5, "deterministic": True}
    options["force_fp32_for_softmax"] = True
    check((normal(3, 7, 10),), dtype="bfloat16", precision="highest", **options)


def test_dtype_of_the_layer_is_the_dtype_of_the_kernel():
    flash, plain = pair(dtype=jnp.bfloat16)
    variables = layers.parameters(plain.init, KEY, normal(2, 5, 8))
    traced = jax.make_jaxpr(flash.apply)(variables, normal(2, 5, 8))
    (attention,) = (e for e in traced.eqns if "custom_vjp" in e.primitive.name)
    assert {x.aval.dtype for x in attention.invars} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("ours", [{}, {"causal": True}], ids=["mask_only", "causal"])
def test_decoding_step_by_step_equals_one_causal_call(ours):
    inputs = normal(2, 5, 8)
    flash, plain = pair(ours, decode=True)
    variables = layers.parameters(flash.init, KEY, inputs)
    params, cache = variables["params"], variables["cache"]

    def step(cache, x):
        out, state = flash.apply(
            {"params": params, "cache": cache}, x[:, None], mutable=["cache"]
        )
        return state["cache"], out[:, 0]

    _, outs = calls.jit(functools.partial(jax.lax.scan, step))(
        cache, inputs.swapaxes(0, 1)
    )
    whole = plain.clone(decode=False)
    mask = nn.make_causal_mask(inputs[..., 0])

    def theirs(params, inputs):
        return whole.apply({"params": params}, inputs, mask=mask)

    def stepped(params, inputs):
        return outs.swapaxes(0, 1)

    layers.assert_equal(stepped, theirs, (params, inputs), gradients=False)


def test_receptive_field_of_a_causal_layer():
    flash, _ = pair({"causal": True})
    x = normal(1, 6, 8)
    variables = layers.parameters(flash.init, KEY, x)

    def rows(x):
        return flash.apply(variables, x)[0].sum(-1)

    reached = np.abs(calls.jit(jax.jacrev(rows))(x)[:, 0]).max(-1) > 0
    np.testing.assert_array_equal(reached, np.tril(np.ones((6, 6), bool)))


class Twice(nn.Module):
    """One layer called twice, with one dropout key or one each."""

    @nn.compact
    def __call__(self, x, dropout_rng=None):
        layer = nn.MultiHeadDotProductAttention(
            num_heads=4,
            dropout_rate=0.5,
            deterministic=False,
            attention_fn=attention_fn(),
        )
        return [layer(x, dropout_rng=dropout_rng) for _ in range(2)]


def test_dropout_draws_from_the_keys_that_flax_gives():
    module, x = Twice(), normal(2, 5, 8)
    keys = [jax.random.key(seed) for seed in range(3)]
    variables = layers.parameters(module.init, {"params": KEY, "dropout": KEY}, x)
    apply = calls.jit(module.apply)
    a, b = apply(variables, x, rngs={"dropout": keys[1]})
    c, d = apply(variables, x, rngs={"dropout": keys[1]})
    e, f = apply(variables, x, rngs={"dropout": keys[2]})
    np.testing.assert_array_equal(a, c)
    np.testing.assert_array_equal(b, d)
    assert not any(np.array_equal(*two) for two in ((a, b), (a, e), (b, f)))
    g, h = apply(variables, x, dropout_rng=keys[1])
    np.testing.assert_array_equal(g, h)


def test_dropout_drops_what_the_keep_mask_says():
    """And is off where flax says deterministic."""
    q, k = np.zeros((2, 3, 5, 2, 16), "f4"), np.zeros((2, 3, 16, 2, 16), "f4")
    v = np.broadcast_to(np.eye(16, dtype="f4")[:, None], k.shape)
    key = jax.random.key(3)
    attend = calls.jit(functools.partial(attention_fn(), dropout_rate=0.4))
    keep = testing.dropout_keep_mask(key, 0.4, 6, 2, 5, 16).reshape(2, 3, 2, 5, 16)
    np.testing.assert_array_equal(
        attend(q, k, v, dropout_rng=key).swapaxes(-2, -3) != 0, keep
    )
    assert (attention_fn()(q, k, v, dropout_rate=0.4, deterministic=True) > 0).all()


def test_layer_is_equal_to_one_made_alike_and_rematerialises():
    x = normal(2, 5, 8)
    assert pair({"causal": True})[0] == pair({"causal": True})[0]
    flash, plain = pair({"causal": True})
    variables = layers.parameters(plain.init, KEY, x)
    remat = nn.remat(nn.MultiHeadDotProductAttention)(
        num_heads=4, qkv_features=24, attention_fn=attention_fn(causal=True)
    )

    def gradient(layer):
        return calls.jit(jax.grad(lambda v: layer.apply(v, x).sum()))(variables)

    jax.tree.map(np.testing.assert_array_equal, gradient(remat), gradient(flash))


def test_vmap_of_a_layer_equals_its_batch():
    flash, plain = pair({"causal": True})
    x = normal(3, 5, 8)
    variables = layers.parameters(plain.init, KEY, x)
    mask = nn.make_causal_mask(x[0, :, 0])
    layers.assert_equal(
        lambda variables, x: jax.vmap(lambda one: flash.apply(variables, one))(x),
        lambda variables, x: plain.apply(variables, x, mask=mask),
        (variables, x),
    )


@pytest.mark.parametrize(
    ("options", "call", "error", "text"),
    [
        ({}, {"sow_weights": True}, NotImplementedError, "sow_weights=True"),
        (
            {"qk_attn_weights_einsum_cls": lambda: jnp.einsum},
            {},
            NotImplementedError,
            "qk_attn_weights_einsum is not supported",
        ),
        (
            {"attn_weights_value_einsum_cls": lambda: jnp.einsum},
            {},
            NotImplementedError,
            "attn_weights_value_einsum is not supported",
        ),
        (
            {"dropout_rate": 1.0, "deterministic": False},
            {"dropout_rng": jax.random.key(0)},
            ValueError,
            "dropout_rate must be at least 0 and below 1",
        ),
        ({"attention_fn": attention_fn}, {}, TypeError, "attention_fn takes options"),
    ],
    ids=["sow", "scores_einsum", "values_einsum", "dropout_rate", "not_called"],
)
def test_what_cannot_be_done_is_refused(options, call, error, text):
    layer = pair()[0].clone(**options)
    with pytest.raises(error, match=text):
        jax.eval_shape(functools.partial(layer.init, **call), KEY, normal(2, 5, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"einsum_dot_general": jax.lax.dot_general},
            NotImplementedError,
            "einsum_dot",
        ),
        ({"dropout_rate": 0.1}, ValueError, "dropout_rng must be a JAX PRNG key"),
        ({"deterministic": 0}, TypeError, "deterministic must be True or False"),
        ({"dtype": jnp.complex64}, TypeError, "query must be bfloat16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_of_a_direct_call_are_refused(arguments, error, text):
    x = normal(2, 5, 4, 8)
    with pytest.raises(error, match=text):
        attention_fn()(x, x, x, **arguments)
