"""What the integrations share: imports, options, arrays that no kernel reads."""

import functools
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash_attn import _support, attention, explain
from jax_flash_attn._primitives import Operands
from jax_flash_attn.integrations._options import Options
from tests.support import calls, cases, inputs, layers, oracle

FRAMEWORKS = {
    "linen": ("flax", "flax"),
    "nnx": ("flax", "flax"),
    "haiku": ("haiku", "dm-haiku"),
    "equinox": ("equinox", "equinox"),
}
"""Module and distribution that each integration needs."""

IMPORTS = """
import importlib, sys
import jax_flash_attn
print(*({"flax", "haiku", "equinox"} & set(sys.modules)), sep=",")
for name in ("flax", "haiku", "equinox"):
    sys.modules[name] = None
for name in ("linen", "nnx", "haiku", "equinox"):
    try:
        importlib.import_module(f"jax_flash_attn.integrations.{name}")
    except ImportError as error:
        print(error)
"""


def test_frameworks_are_imported_by_their_integration_alone():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
    )
    frameworks, *refusals = done.stdout.splitlines()
    assert frameworks == ""
    assert refusals == [
        f"jax_flash_attn.integrations.{name} needs {distribution}: "
        f"pip install {distribution}"
        for name, (_, distribution) in FRAMEWORKS.items()
    ]


def heads(seqlen, num_heads=2, head_dim=8, batch=(2,), seed=0):
    return jnp.asarray(layers.normal(*batch, seqlen, num_heads, head_dim, seed=seed))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("dense", [(), ("mask",), ("bias", "mask")], ids="-".join)
def test_options_compute_what_the_oracle_does(dense, dtype):
    """With and without dense arrays that change nothing."""
    with jax.enable_x64(dtype == "float64"):
        check_options(dense, dtype)


def check_options(dense, dtype):
    case = cases.Case(
        "every_option",
        "each option on both routes",
        seqlen_q=24,
        seqlen_k=31,
        heads=4,
        heads_k=2,
        head_dim=16,
        dtype=dtype,
        softmax_scale=0.3,
        causal=True,
        window_size=(9, -1),
        softcap=2.0,
        alibi="h",
        dropout_p=0.2,
    )
    arrays = inputs.make(case)
    options = Options(
        causal=True,
        window_size=(9, -1),
        softcap=2.0,
        softmax_scale=0.3,
        alibi_slopes=arrays["slopes"],
    )
    neutral = {"bias": jnp.zeros((24, 31)), "mask": jnp.ones((1, 1, 31))}

    def attend(q, k, v):
        return options.attend(
            q,
            k,
            v,
            **{name: neutral[name] for name in dense},
            dropout_p=0.2,
            dropout_rng=arrays["dropout_rng"],
        )

    def with_gradients(q, k, v, dout):
        out, pullback = jax.vjp(attend, q, k, v)
        return dict(zip(names, (out, *pullback(dout)), strict=True))

    names = ("out", "dq", "dk", "dv")
    operands = (arrays[name] for name in ("q", "k", "v", "dout"))
    results = calls.jit(with_gradients)(*operands)
    without_dlse = {**arrays, "dlse": jnp.zeros_like(arrays["dlse"])}
    oracle.check(results, oracle.of(case, without_dlse), names)


STRICT = {
    "dtypes": functools.partial(jax.numpy_dtype_promotion, "strict"),
    "ranks": functools.partial(jax.numpy_rank_promotion, "raise"),
}


@pytest.mark.parametrize("strict", STRICT.values(), ids=STRICT)
@pytest.mark.parametrize("seqlen", [24, 600], ids=["one_tile", "many_tiles"])
@pytest.mark.parametrize("dense", [(), ("bias", "mask")], ids=["kernel", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_promoted_silently(dtype, dense, seqlen, strict):
    options = Options(
        causal=True, window_size=(9, -1), softcap=2.0, alibi_slopes=[0.1] * 4
    )
    q, k = (heads(n, num_heads=h, batch=(2, 1)) for n, h in ((24, 4), (seqlen, 2)))
    q, k = q.astype(dtype), k.astype(dtype)
    arrays = {
        "bias": jnp.ones((2, 1, 1, 24, seqlen), dtype),
        "mask": jnp.ones((1, 1, 1, 1, seqlen), bool),
    }

    def loss(q, k):
        out = options.attend(
            q,
            k,
            k,
            **{name: arrays[name] for name in dense},
            dropout_p=0.2,
            dropout_rng=jax.random.key(0),
        )
        return out.sum()

    with strict():
        jax.jit(jax.grad(loss, (0, 1))).lower(q, k)


@pytest.mark.parametrize("shape", [(3, 2, 1, 5, 7), (2, 4, 5, 7), (7,)])
def test_dense_arrays_follow_the_batch_axes(shape):
    random = np.random.default_rng(0)
    bias = random.standard_normal(shape).astype(np.float32)
    mask = random.random(shape) < 0.8
    mask[..., 0] = True
    full = (3, 2, 4, 5, 7)

    def ours(q, k):
        return Options().attend(q, k, k, jnp.asarray(bias), jnp.asarray(mask))

    def theirs(q, k):
        spread = [jnp.broadcast_to(x, full).reshape(6, *full[2:]) for x in (bias, mask)]
        q, k = (x.reshape(6, *x.shape[2:]) for x in (q, k))
        out = jax.nn.dot_product_attention(
            q, k, k, spread[0].astype(q.dtype), spread[1]
        )
        return out.reshape(3, 2, 5, 4, 8)

    leading = {"num_heads": 4, "batch": (3, 2)}
    layers.assert_equal(
        ours, theirs, (heads(5, **leading), heads(7, seed=1, **leading))
    )


@pytest.mark.parametrize(("head_dim", "value_dim"), [(8, 5), (5, 8)])
def test_values_of_another_head_dim(head_dim, value_dim):
    q, k = heads(5, head_dim=head_dim), heads(7, head_dim=head_dim, seed=1)
    v = heads(7, head_dim=value_dim, seed=2)

    def theirs(q, k, v):
        probs = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * head_dim**-0.5)
        return jnp.einsum("bhqk,bkhd->bqhd", probs, v)

    layers.assert_equal(Options().attend, theirs, (q, k, v))


def test_options_are_hashable_and_equal_by_value():
    options = [
        Options(causal=True, window_size=[3, 0], alibi_slopes=slopes)
        for slopes in ([0.5, 0.25], np.array([0.5, 0.25]), jnp.array([0.5, 0.25]))
    ]
    assert len(set(options)) == 1
    assert options[0] != Options(causal=True)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"causal": 1}, TypeError, "causal must be True or False"),
        ({"window_size": 4}, TypeError, "window_size must be a pair"),
        ({"softcap": -1.0}, ValueError, "softcap must be 0"),
        ({"softmax_scale": "big"}, TypeError, "softmax_scale must be a number"),
        ({"alibi_slopes": 0.5}, TypeError, "alibi_slopes must be a sequence"),
        ({"alibi_slopes": ["a"]}, TypeError, "alibi_slopes must be a number"),
        (
            {"deterministic_gradients": None},
            TypeError,
            "deterministic_gradients must be True or False",
        ),
        ({"implementation": "fast"}, ValueError, "implementation must be one of"),
    ],
)
def test_wrong_options_are_refused_when_a_layer_is_made(fields, error, text):
    with pytest.raises(error, match=text):
        Options(**fields)


def test_traced_slopes_are_refused():
    text = "alibi_slopes must be a Python number.* Pass Python floats or a NumPy array"
    for slopes in (lambda s: s, lambda s: [s[0], 0.5]):
        with pytest.raises(TypeError, match=text):
            jax.eval_shape(
                lambda s, make=slopes: Options(alibi_slopes=make(s)), jnp.ones(2)
            )


def test_dense_arrays_may_be_lists():
    q, k = heads(5), heads(3, seed=1)
    bias, mask = [0.5, 0.25, 0.0], [[True, True, False]]

    def theirs(q, k):
        added = jnp.asarray(bias, q.dtype)[None, None, None]
        return jax.nn.dot_product_attention(
            q, k, k, added, jnp.asarray(mask)[None, None]
        )

    layers.assert_equal(
        lambda q, k: Options().attend(q, k, k, bias, mask), theirs, (q, k)
    )


@pytest.mark.parametrize(
    ("arrays", "error", "text"),
    [
        ({"query": jnp.ones((5, 8))}, ValueError, "query must have shape"),
        ({"key": heads(7, batch=(3,))}, ValueError, "key must have the batch axes"),
        ({"value": heads(6)}, ValueError, "value must have the shape of key"),
        ({"mask": jnp.ones((1, 2, 1, 5, 7))}, ValueError, "mask must be broadcastable"),
        ({"mask": jnp.ones((3, 1, 5, 7))}, ValueError, "mask must be broadcastable"),
        ({"bias": jnp.ones((5, 6))}, ValueError, "bias must be broadcastable"),
        ({"bias": jnp.ones((5, 7), int)}, TypeError, "bias must be floats"),
        ({"query": None}, TypeError, "query must be an array"),
        ({"mask": "causal"}, TypeError, "mask must be an array"),
        ({"bias": object()}, TypeError, "bias must be an array"),
    ],
)
def test_wrong_arrays_are_refused_by_name(arrays, error, text):
    taken = {"query": heads(5), "key": heads(7), "value": heads(7), **arrays}
    with pytest.raises(error, match=re.escape(text)):
        Options().attend(**taken)


def test_window_is_refused_for_a_step_of_a_cache():
    q, k = heads(1), heads(7)
    mask = jnp.arange(7) <= 3
    with pytest.raises(NotImplementedError, match=r"window_size=\(2, 0\) and a mask"):
        Options(window_size=(2, 0)).attend(q, k, k, mask=mask)
    assert Options(window_size=(-1, 0)).attend(q, k, k, mask=mask).shape == q.shape


@pytest.mark.parametrize("length", [1024, 8192, 65536])
def test_slopes_of_a_cache_cost_no_digits_however_long_it_is(length):
    """Eleven keys of a cache beside those eleven alone."""
    case = cases.Case(
        "step",
        "one query after ten others",
        seqlen_q=1,
        seqlen_k=11,
        heads=4,
        heads_k=2,
        head_dim=16,
        dtype="float32",
        alibi="h",
    )
    arrays = inputs.make(case)
    right = oracle.of(case, arrays)
    padding = [(0, 0), (0, length - 11), (0, 0), (0, 0)]
    k, v = (jnp.pad(arrays[name], padding, constant_values=1) for name in "kv")
    mask = (jnp.arange(length) < 11)[None, None, None]
    slopes = arrays["slopes"][None]
    spec = inputs.spec(case)

    def attend(q, k, v):
        operands = Operands((q, k, v), slopes, None)
        return attention._with_dense_arrays(operands, None, mask, spec)

    def with_gradients(q, k, v):
        (out, lse), pullback = jax.vjp(attend, q, k, v)
        return out, lse, *pullback((arrays["dout"], arrays["dlse"]))

    out, lse, dq, dk, dv = calls.jit(with_gradients)(arrays["q"], k, v)
    results = (out, lse, dq, dk[:, :11], dv[:, :11])
    # A query stands behind the last key: the eleven are that much farther away.
    farther = np.asarray(slopes, np.float64)[..., None] * (length - 11)
    shifted = right["lse"][0] - farther
    right["lse"] = (shifted, shifted.astype(np.float32))
    oracle.check(dict(zip(oracle.NAMES, results, strict=True)), right)
    assert not dk[:, 11:].any()
    assert not dv[:, 11:].any()
    options = Options(causal=True, alibi_slopes=slopes[0])
    out = options.attend(arrays["q"], k, v, mask=mask)
    oracle.check({"out": out}, right, ("out",))


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_dense_array_on_a_gpu_warns_once_and_is_explained(name, monkeypatch):
    monkeypatch.setattr(_support, "on_gpu", lambda: True)
    monkeypatch.setattr(_support, "_warned", set())
    x, array = heads(5), jnp.ones((5, 5))
    reason = f"a {name} array is passed, which no kernel reads"
    with pytest.warns(UserWarning, match=reason):
        Options().attend(x, x, x, **{name: array})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Options().attend(x, x, x, **{name: array})
        Options(implementation="jax").attend(x, x, x, **{name: array})
    with pytest.raises(NotImplementedError, match=reason):
        Options(implementation="cuda").attend(x, x, x, **{name: array})
    found = explain(x, x, x, architecture="sm_90", **{name: array})
    assert (found.implementation, found.reason) == ("jax", reason)
