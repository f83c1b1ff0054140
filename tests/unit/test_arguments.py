"""Bad input: the right exception, while tracing, with the argument's name."""

import dataclasses
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash_attn
from jax_flash_attn import _spec

pytestmark = pytest.mark.core

B, SQ, SK, H, HK, D = 2, 6, 8, 4, 2, 16
QUERIES, KEYS = (B, SQ, H, D), (B, SK, HK, D)


def struct(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def trace(function, arrays, **arguments):
    """Traces a call; nothing is computed, so every error is raised at trace time."""
    call = functools.partial(function, **arguments)
    return jax.eval_shape(lambda given: call(**given), arrays)


def plain(q=QUERIES, k=KEYS, v=None, dtypes=("bfloat16",) * 3, **arguments):
    v = k if v is None else v
    arrays = {
        name: struct(*shape, dtype=dtype)
        for name, shape, dtype in zip("qkv", (q, k, v), dtypes, strict=True)
    }
    return trace(jax_flash_attn.flash_attn_func, arrays, **arguments)


def test_good_arguments_are_taken():
    out, lse = plain(return_lse=True)
    assert (out.shape, out.dtype) == (QUERIES, jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((B, H, SQ), jnp.float32)


def named(name, *numbers):
    """A pattern: the argument first, then what it must have been told."""
    return "^" + name + r"\b" + "".join(f".*{number}" for number in numbers)


SHAPES = {
    "q_rank_3": ({"q": (SQ, H, D)}, named("q", "batch, seqlen, heads, head_dim")),
    "k_rank_5": ({"k": (1, *KEYS), "v": KEYS}, named("k", "batch, seqlen")),
    "v_rank_2": ({"v": (SK, D)}, named("v", "batch, seqlen")),
    "k_batch": ({"k": (3, SK, HK, D)}, named("k", "batch", "2", "3")),
    "v_batch": ({"v": (1, SK, HK, D)}, named("v", "batch", "2", "1")),
    "heads_do_not_divide": ({"k": (B, SK, 3, D)}, named("k", "heads", "4", "3")),
    "more_key_heads": ({"k": (B, SK, 8, D)}, named("k", "heads", "4", "8")),
    "no_heads": ({"q": (B, SQ, 0, D)}, named("q", "head")),
    "no_key_heads": ({"k": (B, SK, 0, D)}, named("k", "head")),
    "no_columns": ({"q": (B, SQ, H, 0)}, named("q", "column")),
    "k_head_dim": ({"k": (B, SK, HK, 32)}, named("k", "head dim", "16", "32")),
    "v_head_dim": ({"v": (B, SK, HK, 8)}, named("v", "head dim", "16", "8")),
    "v_length": ({"v": (B, 9, HK, D)}, named("v", "shape of k")),
    "v_heads": ({"v": (B, SK, H, D)}, named("v", "shape of k")),
}


@pytest.mark.parametrize(("shapes", "text"), SHAPES.values(), ids=SHAPES)
def test_shapes(shapes, text):
    with pytest.raises(ValueError, match=text):
        plain(**shapes)


BF16, FP16, FP32 = "bfloat16", "float16", "float32"
DTYPES = {
    "int_q": (("int32", BF16, BF16), named("q", "int32")),
    "int_everywhere": (("int32",) * 3, named("q", "int32")),
    "bool_k": ((BF16, "bool", BF16), named("k", "bool")),
    "complex": (("complex64",) * 3, named("q", "complex64")),
    "float8": (("float8_e4m3fn",) * 3, named("q", "float8")),
    "k_unlike_q": ((BF16, FP16, FP16), named("k", "bfloat16", "float16")),
    "v_unlike_q": ((BF16, BF16, FP32), named("v", "bfloat16", "float32")),
}


@pytest.mark.parametrize(("dtypes", "text"), DTYPES.values(), ids=DTYPES)
def test_dtypes(dtypes, text):
    with pytest.raises(TypeError, match=text):
        plain(dtypes=dtypes)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [None, "text", object()], ids=type)
def test_no_array(name, value):
    arrays = {"q": jnp.zeros(QUERIES), "k": jnp.zeros(KEYS), "v": jnp.zeros(KEYS)}
    with pytest.raises(TypeError, match=named(name, "array")):
        jax_flash_attn.flash_attn_func(**dict(arrays, **{name: value}))


KEY = jax.random.key(0)
VALUES = {
    "dropout_p_one": ({"dropout_p": 1.0, "dropout_rng": KEY}, "dropout_p"),
    "dropout_p_negative": ({"dropout_p": -0.1, "dropout_rng": KEY}, "dropout_p"),
    "dropout_p_nan": ({"dropout_p": float("nan"), "dropout_rng": KEY}, "dropout_p"),
    "dropout_without_key": ({"dropout_p": 0.1}, "dropout_rng"),
    "several_keys": (
        {"dropout_p": 0.1, "dropout_rng": jax.random.split(KEY)},
        "dropout_rng",
    ),
    "window_of_one": ({"window_size": (3,)}, "window_size"),
    "window_of_three": ({"window_size": (3, 3, 3)}, "window_size"),
    "window_below_minus_one": ({"window_size": (-2, 0)}, "window_size"),
    "slopes_heads": ({"alibi_slopes": np.ones(HK, np.float32)}, "alibi_slopes"),
    "slopes_scalar": ({"alibi_slopes": 0.5}, "alibi_slopes"),
    "slopes_batch": ({"alibi_slopes": np.ones((3, H), np.float32)}, "alibi_slopes"),
    "slopes_rank_3": ({"alibi_slopes": np.ones((B, H, 1))}, "alibi_slopes"),
    "scale_infinite": ({"softmax_scale": float("inf")}, "softmax_scale"),
    "softcap_negative": ({"softcap": -1.0}, "softcap"),
    "softcap_below_float32": ({"softcap": 1e-50}, "softcap"),
    "scale_below_float32": ({"softmax_scale": 1e-50}, "softmax_scale"),
    "scale_above_float64": ({"softmax_scale": 10**400}, "softmax_scale"),
    "softcap_nan": ({"softcap": float("nan")}, "softcap"),
    "implementation": ({"implementation": "triton"}, "implementation"),
    "implementation_none": ({"implementation": None}, "implementation"),
    "implementation_array": (
        {"implementation": np.array(["auto", "jax"])},
        "implementation",
    ),
    "idle_keys": ({"dropout_rng": jax.random.split(KEY)}, "dropout_rng"),
}


@pytest.mark.parametrize(("arguments", "name"), VALUES.values(), ids=VALUES)
def test_values(arguments, name):
    with pytest.raises(ValueError, match=named(name)):
        plain(**arguments)


TYPES = {
    "dropout_p_text": ({"dropout_p": "0.1"}, "dropout_p"),
    "dropout_p_bool": ({"dropout_p": True}, "dropout_p"),
    "key_int": ({"dropout_p": 0.1, "dropout_rng": 0}, "dropout_rng"),
    "key_text": ({"dropout_p": 0.1, "dropout_rng": "seed"}, "dropout_rng"),
    "key_floats": ({"dropout_p": 0.1, "dropout_rng": np.zeros(2)}, "dropout_rng"),
    "key_one_word": ({"dropout_p": 0.1, "dropout_rng": np.uint32(3)}, "dropout_rng"),
    "raw_keys": (
        {"dropout_p": 0.1, "dropout_rng": np.zeros((3, 2), np.uint32)},
        "dropout_rng",
    ),
    "idle_key_text": ({"dropout_rng": "seed"}, "dropout_rng"),
    "idle_key_floats": ({"dropout_rng": np.zeros(2)}, "dropout_rng"),
    "window_int": ({"window_size": 3}, "window_size"),
    "window_none": ({"window_size": None}, "window_size"),
    "window_text": ({"window_size": "ab"}, "window_size"),
    "window_floats": ({"window_size": (3.0, 3.0)}, "window_size"),
    "window_bools": ({"window_size": (True, False)}, "window_size"),
    "slopes_ints": ({"alibi_slopes": np.ones(H, np.int32)}, "alibi_slopes"),
    "slopes_text": ({"alibi_slopes": "steep"}, "alibi_slopes"),
    "scale_text": ({"softmax_scale": "1"}, "softmax_scale"),
    "scale_array": ({"softmax_scale": np.ones(2)}, "softmax_scale"),
    "scale_complex": ({"softmax_scale": 1j}, "softmax_scale"),
    "softcap_none": ({"softcap": None}, "softcap"),
    "causal_int": ({"causal": 1}, "causal"),
    "deterministic_none": ({"deterministic": None}, "deterministic"),
    "return_lse_text": ({"return_lse": "yes"}, "return_lse"),
    "unknown": ({"sliding_window": 3}, "sliding_window"),
}


@pytest.mark.parametrize(("arguments", "name"), TYPES.values(), ids=TYPES)
def test_types(arguments, name):
    with pytest.raises(TypeError, match=named(name)):
        plain(**arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("softmax_scale", 0.5),
        ("softcap", 2.0),
        ("dropout_p", 0.1),
        ("causal", True),
        ("deterministic", True),
        ("return_lse", True),
    ],
)
def test_traced_static_arguments(name, value):
    def call(traced):
        return plain(**{name: traced})

    with pytest.raises(TypeError, match=named(name)):
        jax.jit(call)(value)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("softmax_scale", "Multiply q by it"), ("softcap", "Pass a Python or NumPy")],
)
def test_remedy_for_a_traced_number(name, remedy):
    with pytest.raises(TypeError, match=named(name, remedy)):
        jax.jit(lambda traced: plain(**{name: traced}))(0.5)


@pytest.mark.parametrize("name", ["causal", "deterministic", "return_lse"])
def test_remedy_for_a_traced_flag(name):
    with pytest.raises(TypeError, match=named(name, "static_argnames", "partial")):
        jax.jit(lambda traced: plain(**{name: traced}))(True)


@pytest.mark.parametrize("window", [(3, 0), np.array([3, 0])], ids=["pair", "array"])
def test_traced_window(window):
    with pytest.raises(TypeError, match=named("window_size", "static_argnames")):
        jax.jit(lambda traced: plain(window_size=traced))(window)


def test_traced_local_window():
    with pytest.raises(TypeError, match=named("local_window_size", "static_argnames")):
        jax.jit(lambda traced: jax_nn_style(local_window_size=traced))(3)


def test_arrays_of_one_number_are_numbers():
    for number in (np.float32(0.5), np.array(0.5), jnp.float32(0.5), 1):
        plain(softmax_scale=number, softcap=number)
    plain(causal=np.bool_(True), window_size=[np.int64(3), 2])
    for size in (3, np.int64(3), (np.int32(3), 2)):
        jax_nn_style(local_window_size=size)


@pytest.mark.parametrize("key", [None, KEY, jax.random.key_data(KEY)], ids=type)
def test_a_key_that_nothing_is_drawn_from_is_taken(key):
    plain(dropout_rng=key)


def test_return_attn_probs_is_refused_by_name():
    with pytest.raises(NotImplementedError, match=named("return_attn_probs")):
        plain(return_attn_probs=True)


ARRAYS = {
    jax_flash_attn.flash_attn_func: (QUERIES, KEYS, KEYS),
    jax_flash_attn.flash_attn_qkvpacked_func: ((B, SQ, 3, H, D),),
    jax_flash_attn.flash_attn_kvpacked_func: (QUERIES, (B, SK, 2, HK, D)),
    jax_flash_attn.dot_product_attention: (QUERIES, KEYS, KEYS),
}
PUBLIC = inspect.signature(jax_flash_attn.flash_attn_func).parameters
INTERNAL = [
    field.name
    for field in dataclasses.fields(_spec.AttentionSpec)
    if field.name not in PUBLIC
]


@pytest.mark.parametrize("name", [*INTERNAL, "named"])
def test_what_a_call_is_made_of_is_no_argument(name):
    assert "top_left" in INTERNAL
    for function, shapes in ARRAYS.items():
        call = functools.partial(function, **{name: True})
        with pytest.raises(TypeError, match=name):
            jax.eval_shape(call, *(struct(*shape) for shape in shapes))
    arrays = [struct(*shape) for shape in (QUERIES, KEYS, KEYS)]
    with pytest.raises(TypeError, match=named(name)):
        jax_flash_attn.explain(*arrays, architecture="sm_90", **{name: True})


QKVPACKED = {
    "rank_4": ((B, SQ, H, D), {}, "qkv"),
    "two_parts": ((B, SQ, 2, H, D), {}, "qkv"),
    "parts_after_heads": ((B, SQ, H, 3, D), {}, "qkv"),
    "slopes": (
        (B, SQ, 3, H, D),
        {"alibi_slopes": np.ones(H + 1, np.float32)},
        "alibi_slopes",
    ),
}


@pytest.mark.parametrize(
    ("shape", "arguments", "name"), QKVPACKED.values(), ids=QKVPACKED
)
def test_qkvpacked(shape, arguments, name):
    with pytest.raises(ValueError, match=named(name)):
        trace(
            jax_flash_attn.flash_attn_qkvpacked_func,
            {"qkv": struct(*shape)},
            **arguments,
        )


KVPACKED = {
    "rank_4": (QUERIES, KEYS, "kv"),
    "three_parts": (QUERIES, (B, SK, 3, HK, D), "kv"),
    "q_rank_5": ((B, SQ, 1, H, D), (B, SK, 2, HK, D), "q"),
    "batch": (QUERIES, (3, SK, 2, HK, D), "kv"),
    "heads": (QUERIES, (B, SK, 2, 3, D), "kv"),
    "head_dim": (QUERIES, (B, SK, 2, HK, 2 * D), "kv"),
}


@pytest.mark.parametrize(("q", "kv", "name"), KVPACKED.values(), ids=KVPACKED)
def test_kvpacked(q, kv, name):
    arrays = {"q": struct(*q), "kv": struct(*kv)}
    with pytest.raises(ValueError, match=named(name)):
        trace(jax_flash_attn.flash_attn_kvpacked_func, arrays)


def test_packed_dtypes():
    function = jax_flash_attn.flash_attn_qkvpacked_func
    with pytest.raises(TypeError, match=named("qkv", "int32")):
        trace(function, {"qkv": struct(B, SQ, 3, H, D, dtype="int32")})
    kv = struct(B, SK, 2, HK, D, dtype=FP16)
    with pytest.raises(TypeError, match=named("kv", "bfloat16", "float16")):
        trace(
            jax_flash_attn.flash_attn_kvpacked_func, {"q": struct(*QUERIES), "kv": kv}
        )


def jax_nn_style(query=QUERIES, key=KEYS, value=None, dtype=BF16, **arguments):
    shapes = {"query": query, "key": key, "value": key if value is None else value}
    arrays = {name: struct(*shape, dtype=dtype) for name, shape in shapes.items()}
    return trace(jax_flash_attn.dot_product_attention, arrays, **arguments)


DENSE = np.zeros((B, H, SQ, SK), np.float32)
DOT_PRODUCT = {
    "query_rank": ({"query": (SQ, D)}, ValueError, "query"),
    "key_rank": ({"key": (SK, HK, D)}, ValueError, "key"),
    "unbatched_query_alone": ({"query": (SQ, H, D)}, ValueError, "key"),
    "key_heads": ({"key": (B, SK, 3, D)}, ValueError, "key"),
    "value_length": ({"value": (B, SQ, HK, D)}, ValueError, "value"),
    "ints": ({"dtype": "int32"}, TypeError, "query"),
    "scale": ({"scale": "1"}, TypeError, "scale"),
    "is_causal": ({"is_causal": 1}, TypeError, "is_causal"),
    "return_residual": ({"return_residual": 1}, TypeError, "return_residual"),
    "window_of_three": (
        {"local_window_size": (1, 2, 3)},
        ValueError,
        "local_window_size",
    ),
    "window_negative": (
        {"local_window_size": (-1, 2)},
        ValueError,
        "local_window_size",
    ),
    "window_float": ({"local_window_size": 2.0}, TypeError, "local_window_size"),
    "window_bool": ({"local_window_size": True}, TypeError, "local_window_size"),
    "implementation": ({"implementation": "cudnn"}, ValueError, "implementation"),
    "bias_rank": ({"bias": DENSE[None]}, ValueError, "bias"),
    "bias_shape": ({"bias": DENSE[..., 1:]}, ValueError, "bias"),
    "bias_ints": ({"bias": DENSE.astype(int)}, TypeError, "bias"),
    "mask_rank": ({"mask": DENSE[None] == 0}, ValueError, "mask"),
    "mask_shape": ({"mask": DENSE[:, :3] == 0}, ValueError, "mask"),
    "mask_floats": ({"mask": DENSE}, TypeError, "mask"),
    "query_seq_lengths": (
        {"query_seq_lengths": np.ones(B, int)},
        NotImplementedError,
        "query_seq_lengths",
    ),
    "key_value_seq_lengths": (
        {"key_value_seq_lengths": np.ones(B, int)},
        NotImplementedError,
        "key_value_seq_lengths",
    ),
}


@pytest.mark.parametrize(
    ("arguments", "error", "name"), DOT_PRODUCT.values(), ids=DOT_PRODUCT
)
def test_dot_product_attention(arguments, error, name):
    with pytest.raises(error, match=named(name)):
        jax_nn_style(**arguments)


@pytest.mark.parametrize(
    ("shapes", "given"),
    [
        ({"key": KEYS}, KEYS),
        ({"key": KEYS[1:], "value": KEYS}, KEYS),
        ({"key": (SK, HK, 32)}, (SK, HK, 32)),
        ({"key": KEYS[1:], "value": (SQ, HK, D)}, (SQ, HK, D)),
    ],
    ids=["key_rank", "value_rank", "head_dim", "value_length"],
)
def test_errors_without_a_batch_name_shapes_that_were_passed(shapes, given):
    name = "value" if "value" in shapes else "key"
    with pytest.raises(ValueError, match=named(name, re.escape(str(given)))) as error:
        jax_nn_style(query=QUERIES[1:], **shapes)
    assert "(1, " not in str(error.value)


def test_dot_product_attention_traced_scale():
    with pytest.raises(TypeError, match=named("scale")):
        jax.jit(lambda scale: jax_nn_style(scale=scale))(0.5)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "text"),
    [(FP32, D, "float32"), (BF16, 264, "264")],
    ids=["float32", "head_dim"],
)
def test_cuda_refuses_what_no_kernel_takes_while_tracing(dtype, head_dim, text):
    queries, keys = (B, SQ, H, head_dim), (B, SK, HK, head_dim)
    with pytest.raises(NotImplementedError, match=text):
        plain(queries, keys, dtypes=(dtype,) * 3, implementation="cuda")


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_cuda_refuses_dense_operands(name):
    dense = DENSE if name == "bias" else DENSE == 0
    with pytest.raises(NotImplementedError, match=name):
        jax_nn_style(implementation="cuda", **{name: dense})


def test_cuda_refuses_other_platforms():
    q, k = (jnp.zeros(shape, jnp.bfloat16) for shape in (QUERIES, KEYS))
    call = functools.partial(jax_flash_attn.flash_attn_func, implementation="cuda")
    cpu = jax.devices("cpu")[0]
    with pytest.raises(NotImplementedError, match="CUDA GPU"):
        jax.jit(call)(*(jax.device_put(x, cpu) for x in (q, k, k)))


LENGTHS = {"batch": B, "heads": H, "seqlen_q": SQ, "seqlen_k": SK}


def test_keep_mask_arguments():
    keep_mask = jax_flash_attn.testing.dropout_keep_mask
    with pytest.raises(ValueError, match="dropout_p"):
        keep_mask(KEY, 0.0, B, H, SQ, SK)
    with pytest.raises(TypeError, match="dropout_rng"):
        keep_mask(0, 0.5, B, H, SQ, SK)


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-1, ValueError, "at least 0"),
        (2.0, TypeError, "an int"),
        (True, TypeError, "an int"),
        ("2", TypeError, "an int"),
        (None, TypeError, "an int"),
    ],
)
def test_keep_mask_lengths(name, value, error, text):
    keep_mask = jax_flash_attn.testing.dropout_keep_mask
    with pytest.raises(error, match=named(name, text)):
        keep_mask(KEY, 0.5, **dict(LENGTHS, **{name: value}))


def test_keep_mask_of_a_traced_length():
    keep_mask = jax_flash_attn.testing.dropout_keep_mask
    with pytest.raises(TypeError, match=named("seqlen_k", "static_argnames")):
        jax.jit(lambda length: keep_mask(KEY, 0.5, B, H, SQ, length))(SK)


def test_keep_mask_takes_numpy_ints_and_no_rows():
    keep_mask = jax_flash_attn.testing.dropout_keep_mask
    ints = {name: np.int64(value) for name, value in LENGTHS.items()}
    assert keep_mask(KEY, 0.5, **ints).shape == (B, H, SQ, SK)
    assert keep_mask(KEY, 0.5, **dict(ints, seqlen_q=0)).shape == (B, H, 0, SK)


OVERRIDES = {
    "no_tiles": (("backward", ""), ValueError, "tiles", "family"),
    "tiles_none": (("backward", None), TypeError, "tiles", "str"),
    "tiles_numbers": (("forward", (64, 64)), TypeError, "tiles", "str"),
    "operation_none": ((None, "sm80"), TypeError, "operation", "str"),
    "operation": (("sideways", "sm80"), ValueError, "operation", "forward"),
    "family": (("forward", "sm70"), ValueError, "tiles", "family"),
}


@pytest.mark.parametrize(
    ("arguments", "error", "name", "text"), OVERRIDES.values(), ids=OVERRIDES
)
def test_override_tiles_arguments(arguments, error, name, text):
    with (
        pytest.raises(error, match=named(name, text)),
        jax_flash_attn.testing.override_tiles(*arguments),
    ):
        pass
