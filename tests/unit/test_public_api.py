"""The interface: its names, flash-attn's and jax.nn's signatures, jax.nn's numbers."""

import importlib.metadata
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash_attn
from jax_flash_attn.integrations._options import Options
from tests.support import calls, cases, closeness, inputs, layers, oracle

FLASH_ATTN_ARGUMENTS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
}
"""Those of flash-attn's functions after the arrays, in order, with their defaults."""

ATTENTION = {
    jax_flash_attn.flash_attn_func: ("q", "k", "v"),
    jax_flash_attn.flash_attn_qkvpacked_func: ("qkv",),
    jax_flash_attn.flash_attn_kvpacked_func: ("q", "kv"),
}


def test_every_public_name_is_there():
    for name in jax_flash_attn.__all__:
        assert hasattr(jax_flash_attn, name)


def test_version_is_the_package_metadata():
    assert jax_flash_attn.__version__ == importlib.metadata.version("jax-flash-attn")


@pytest.mark.parametrize(("function", "arrays"), ATTENTION.items())
def test_signature_is_that_of_flash_attn(function, arrays):
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    names = tuple(p.name for p in positional)
    assert names == (*arrays, *FLASH_ATTN_ARGUMENTS)
    defaults = {p.name: p.default for p in positional[len(arrays) :]}
    assert defaults == FLASH_ATTN_ARGUMENTS
    ours = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}
    assert ours == {"dropout_rng": None, "return_lse": False, "implementation": "auto"}


def test_signature_is_that_of_jax_nn():
    def arguments(function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name: (p.kind, p.default) for p in parameters}

    ours = arguments(jax_flash_attn.dot_product_attention)
    theirs = arguments(jax.nn.dot_product_attention)
    ours.pop("implementation")
    theirs.pop("implementation")
    for name, argument in ours.items():
        assert argument == theirs.get(name, argument), name
    assert list(theirs)[:5] == list(ours)[:5]


QUICK = ("window_causal", "alibi_h", "everything_masked_rows")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.name, marks=() if c.name in QUICK else pytest.mark.long)
        for c in cases.CASES
    ],
)
def test_calls_give_what_the_oracle_gives(case):
    results = calls.run(case, implementation="jax")
    arrays = inputs.make(case)
    for name, operand in zip(("dq", "dk", "dv"), "qkv", strict=True):
        assert results[name].dtype == arrays[operand].dtype
        assert results[name].shape == arrays[operand].shape
    assert results["out"].dtype == arrays["q"].dtype
    assert results["lse"].dtype == jnp.float32
    oracle.check(results, oracle.of(case, arrays))


def test_results_without_and_with_lse():
    q = jnp.ones((2, 3, 2, 8), jnp.float16)
    out = jax_flash_attn.flash_attn_func(q, q, q, 0.0, None, True)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    out, lse = jax_flash_attn.flash_attn_func(q, q, q, causal=True, return_lse=True)
    assert (lse.shape, lse.dtype) == ((2, 2, 3), jnp.float32)


def test_rows_of_ones_in_v_return_ones():
    case = cases.BY_NAME["ragged_tail"]
    arrays = inputs.make(case)
    ones = jnp.ones_like(arrays["v"])
    out = jax_flash_attn.flash_attn_func(arrays["q"], arrays["k"], ones)
    np.testing.assert_array_equal(out, jnp.ones_like(out))


KEYWORDS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "window": {"local_window_size": (4, 2)},
    "window_int": {"local_window_size": 3},
    "causal_window": {"is_causal": True, "local_window_size": (4, 2)},
    "bias": {"bias": "1h"},
    "mask": {"mask": "bh"},
    "bias_mask_causal": {"bias": "bh", "mask": "b1", "is_causal": True},
}


def dense_operands(keywords, lengths):
    rng = np.random.default_rng(1)
    leading = {"1h": (1, 4), "bh": (2, 4), "b1": (2, 1)}
    made = dict(keywords)
    if "bias" in made:
        shape = (*leading[made["bias"]], *lengths)
        made["bias"] = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    if "mask" in made:
        made["mask"] = jnp.asarray(rng.random((*leading[made["mask"]], *lengths)) < 0.7)
    return made


@pytest.mark.parametrize("lengths", [(9, 14), (14, 9)], ids=["more_keys", "fewer_keys"])
@pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS)
def test_dot_product_attention_equals_jax_nn(keywords, lengths):
    """Where every query sees a key; jax.nn averages the values where one sees none."""
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.standard_normal((2, lengths[0], 4, 8)), jnp.float32)
    key, value = (
        jnp.asarray(rng.standard_normal((2, lengths[1], 2, 8)), jnp.float32)
        for _ in range(2)
    )
    keywords = dense_operands(keywords, lengths)
    arguments = (query, key, value)

    def run(function, **more):
        def call(*arguments):
            return function(*arguments, return_residual=True, **keywords, **more)

        return calls.jit(call)(*arguments)

    out, lse = run(jax_flash_attn.dot_product_attention)
    naive = run(jax.nn.dot_product_attention, implementation="xla")
    with jax.enable_x64(True):
        arguments = tuple(np.asarray(x, np.float64) for x in arguments)
        exact = run(jax.nn.dot_product_attention, implementation="xla")
    assert lse.dtype == jnp.float32
    sees_some = np.isfinite(np.asarray(lse))
    for what, actual, right, yardstick in zip(
        ("out", "lse"), (out, lse), exact, naive, strict=True
    ):
        rows = (np.asarray(x)[sees_some] for x in (actual, right, yardstick))
        closeness.assert_close_to_oracle(*rows, what=what)
    assert not np.asarray(out)[~sees_some].any()


def test_dot_product_attention_without_a_batch():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((n, 2, 8)), jnp.float32) for n in (5, 7))
    out, lse = jax_flash_attn.dot_product_attention(
        q, k, k, is_causal=True, return_residual=True
    )
    batched, batched_lse = jax_flash_attn.dot_product_attention(
        q[None], k[None], k[None], is_causal=True, return_residual=True
    )
    np.testing.assert_array_equal(out, batched[0])
    np.testing.assert_array_equal(lse, batched_lse[0])
    assert lse.shape == (5, 2)


@pytest.mark.parametrize("dense", [False, True], ids=["window", "mask"])
def test_dot_product_attention_of_rows_that_see_no_key(dense):
    q, k = jnp.ones((2, 6, 2, 8)), jnp.ones((2, 3, 2, 8))
    visible = jnp.arange(3) >= jnp.arange(6)[:, None] - 1
    keywords = {"mask": visible} if dense else {"local_window_size": (1, 100)}

    def call(q, k, v):
        return jax_flash_attn.dot_product_attention(
            q, k, v, return_residual=True, **keywords
        )

    (out, lse), pullback = jax.vjp(call, q, k, k)
    masked = ~np.asarray(visible.any(axis=1))
    assert masked.any()
    assert not np.asarray(out)[:, masked].any()
    assert np.isneginf(np.asarray(lse)[:, masked]).all()
    dq, dk, dv = pullback((jnp.ones_like(out), jnp.ones_like(lse)))
    assert not np.asarray(dq)[:, masked].any()
    assert all(np.isfinite(x).all() for x in (dq, dk, dv))


def test_keep_mask_is_what_a_call_drops():
    seqlen, rng = 32, jax.random.key(3)
    q = jnp.zeros((2, 20, 2, seqlen))
    k = jnp.zeros((2, seqlen, 2, seqlen))
    v = jnp.broadcast_to(jnp.eye(seqlen)[:, None], k.shape)
    out = jax_flash_attn.flash_attn_func(q, k, v, 0.3, dropout_rng=rng)
    keep = jax_flash_attn.testing.dropout_keep_mask(rng, 0.3, 2, 2, 20, seqlen)
    assert keep.shape == (2, 2, 20, seqlen)
    np.testing.assert_array_equal(out.swapaxes(1, 2) != 0, keep)


def test_dense_mask_of_ones_changes_nothing():
    """With lse and gradients, in a dtype where a rounded lse would show."""
    q, k, v = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in enumerate(((2, 9, 4, 8), (2, 11, 2, 8), (2, 11, 2, 8)))
    )
    mask = jnp.ones((1, 1, 9, 11), bool)

    def loss(q, k, v, mask):
        out, lse = jax_flash_attn.dot_product_attention(
            q, k, v, mask=mask, return_residual=True, implementation="jax"
        )
        return out.astype(jnp.float32).sum() + lse.sum(), lse

    for with_mask, without in zip(
        jax.tree.leaves(jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v, mask)),
        jax.tree.leaves(jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v, None)),
        strict=True,
    ):
        eps = float(jnp.finfo(with_mask.dtype).eps)
        difference = jnp.abs(
            with_mask.astype(jnp.float32) - without.astype(jnp.float32)
        ).max()
        assert difference <= 4 * eps * jnp.abs(without.astype(jnp.float32)).max()


def test_bias_of_minus_infinity_hides_a_row():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    bias = jnp.zeros((3, 3)).at[1].set(-jnp.inf)

    def attend(x):
        return jax_flash_attn.dot_product_attention(
            x, x, x, bias=bias, return_residual=True, implementation="jax"
        )

    out, lse = attend(x)
    assert (out[:, 1] == 0).all()
    assert (lse[:, 1] == -jnp.inf).all()
    assert jnp.isfinite(jax.grad(lambda x: attend(x)[0].sum())(x)).all()


LARGE = {
    "bias_1e4": -1e4,
    "bias_1e9": -1e9,
    "bias_finfo_min": float(jnp.finfo(jnp.float32).min),
    "scores": None,
}
"""The bias of every key of the second batch entry; None: large scores and a mask."""


@pytest.mark.parametrize("layer", [False, True], ids=["function", "layer"])
@pytest.mark.parametrize("row", LARGE.values(), ids=LARGE)
def test_dense_probabilities_add_up_to_one_where_lse_is_large(row, layer):
    q, k, v = (layers.normal(2, n, 4, 8, seed=n) for n in (5, 7, 8))
    v = v[:, :7]
    if row is None:
        # Values of one show the sum of the probabilities and nothing of the scores.
        q[..., 0], k[..., 0], v[:] = 1, 1e5, 1
        dense = {"mask": np.ones((1, 1, 5, 7), bool)}
    else:
        dense = {"bias": np.zeros((2, 1, 1, 7), np.float32)}
        dense["bias"][1] = row

    def ours(q, k, v):
        if layer:
            return Options().attend(q, k, v, **dense)
        return jax_flash_attn.dot_product_attention(q, k, v, **dense)

    def theirs(q, k, v):
        """jax.nn's, whose scores and softmax are in the input dtype as the bias is."""
        bias = dense.get("bias")
        bias = bias if bias is None else bias.astype(q.dtype)
        return jax.nn.dot_product_attention(q, k, v, bias, dense.get("mask"))

    layers.assert_equal(ours, theirs, (q, k, v))


@pytest.mark.parametrize("axis", [0, 2], ids=["batch", "heads"])
def test_operands_of_an_explicit_mesh(axis):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = [None] * 4
    spec[axis] = "x"
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    x = jax.random.normal(jax.random.key(0), (2, 16, 4, 8))

    def loss(x):
        out = jax_flash_attn.flash_attn_func(x, x, x, causal=True)
        return (out.astype(jnp.float32) ** 2).sum()

    sharded = jax.jit(jax.value_and_grad(loss))(jax.device_put(x, sharding))
    for actual, right in zip(sharded, jax.value_and_grad(loss)(x), strict=True):
        difference = np.abs(np.asarray(actual) - np.asarray(right)).max()
        # The sums of the loss and of the gradient add in another order.
        assert difference <= 16 * np.finfo(np.float32).eps * np.abs(right).max()
