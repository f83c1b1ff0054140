"""flax nnx's layer on our attention: flax's own cases, and flax's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_flash_attn.integrations.nnx import attention_fn
from tests.support import layers
from tests.support.layers import normal


def layer(ours=None, **options):
    """A layer whose parameters do not depend on its attention."""
    options = {"num_heads": 4, "in_features": 8, "qkv_features": 24, **options}
    if ours is not None:
        options["attention_fn"] = attention_fn(**ours)
    return nnx.MultiHeadAttention(rngs=nnx.Rngs(0), **{"decode": False, **options})


def function(module, **call):
    """The layer as a function of its parameters and its inputs."""
    graph, _, rest = nnx.split(module, nnx.Param, ...)

    def run(params, inputs):
        return nnx.merge(graph, params, rest)(*inputs, **call)

    return run


def check(inputs, ours=None, our_call=None, call=None, dtype="float32", **options):
    flash, plain = layer(ours or {}, **options), layer(**options)
    arguments = (nnx.state(plain, nnx.Param), inputs)
    ours, theirs = function(flash, **(our_call or {})), function(plain, **(call or {}))
    layers.assert_equal(ours, theirs, arguments, dtype)


def test_causal_kernel_equals_flax_told_to_be_causal():
    x = (normal(3, 7, 8),)
    check(x, {"causal": True}, {}, {"is_causal": True}, normalize_qk=True)


def test_is_causal_of_the_call_is_aligned_as_nnx_has_it():
    inputs, call = (normal(2, 9, 8), normal(2, 5, 8, seed=1)), {"is_causal": True}
    check(inputs, {}, call, call, dtype="bfloat16")


def test_grouped_heads_and_a_mask_array():
    call = {"mask": nnx.make_causal_mask(np.ones((3, 7)))}
    check((normal(3, 7, 8),), {}, call, call, num_kv_heads=2)


def test_decoding_step_by_step_equals_one_causal_call():
    inputs = normal(2, 4, 8)
    flash, plain = layer({"causal": True}, decode=True), layer()
    flash.init_cache(inputs.shape)
    step = nnx.jit(lambda module, x: module(x))
    outs = jnp.concatenate([step(flash, inputs[:, i : i + 1]) for i in range(4)], 1)
    theirs = function(plain, is_causal=True)
    arguments = (nnx.state(plain, nnx.Param), (inputs,))
    layers.assert_equal(lambda *_: outs, theirs, arguments, gradients=False)


def test_dropout_draws_from_the_layer_or_from_the_call():
    flash = layer({}, dropout_rate=0.5, deterministic=False)
    x = normal(2, 5, 8)
    run = nnx.jit(lambda module, x, rngs: module(x, rngs=rngs))
    first, second = run(flash, x, None), run(flash, x, None)
    assert not np.array_equal(first, second)
    once, again = (run(flash, x, nnx.Rngs(dropout=3)) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, first)


def test_deterministic_layer_drops_nothing():
    call = {"deterministic": True}
    check((normal(2, 5, 8),), {}, call, call, dropout_rate=0.5)


def test_layers_made_alike_share_a_compiled_program():
    traces = []

    @nnx.jit
    def run(module, x):
        traces.append(x.shape)
        return module(x)

    for _ in range(2):
        run(layer({"causal": True, "alibi_slopes": [0.1] * 4}), normal(2, 5, 8))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("ours", "options", "call", "error", "text"),
    [
        ({}, {}, {"sow_weights": True}, NotImplementedError, "sow_weights=True"),
        (
            {"causal": True},
            {},
            {"is_causal": True, "inputs_k": normal(2, 9, 8)},
            ValueError,
            "aligns 5 queries and 9 keys top-left, and causal and window_size",
        ),
        (
            {"alibi_slopes": [0.1] * 4},
            {},
            {"is_causal": True, "inputs_k": normal(2, 3, 8)},
            ValueError,
            "aligns 5 queries and 3 keys top-left, and alibi_slopes",
        ),
        ({}, {}, {"is_causal": 1}, TypeError, "is_causal must be True or False"),
        (
            {},
            {"dropout_rate": 1.0, "deterministic": False},
            {},
            ValueError,
            "dropout_rate must be at least 0 and below 1",
        ),
    ],
    ids=["sow", "alignment", "alibi_alignment", "is_causal", "dropout_rate"],
)
def test_what_cannot_be_done_is_refused(ours, options, call, error, text):
    module = layer(ours, **options)
    with pytest.raises(error, match=text):
        nnx.eval_shape(lambda module, x: module(x, **call), module, normal(2, 5, 8))


def test_dropout_without_a_key_is_refused():
    x = jnp.ones((2, 5, 4, 8))
    with pytest.raises(ValueError, match="dropout_rng must be a JAX PRNG key"):
        attention_fn()(x, x, x, dropout_rate=0.1)


@pytest.mark.long
def test_vmap_of_a_layer_equals_its_batch():
    flash, plain = layer({"causal": True}), layer()
    one = function(flash)
    layers.assert_equal(
        lambda params, x: jax.vmap(lambda row: one(params, (row,)))(x),
        lambda params, x: function(plain, is_causal=True)(params, (x,)),
        (nnx.state(plain, nnx.Param), normal(3, 5, 8)),
    )
