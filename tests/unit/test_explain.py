"""What `explain` says of a call, from shapes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash_attn import Explanation, _spec, explain, testing

pytestmark = pytest.mark.core

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def structs(head_dim=64, dtype=jnp.bfloat16, heads_k=2, seqlen_q=100, batch=2):
    q = jax.ShapeDtypeStruct((batch, seqlen_q, 4, head_dim), dtype)
    k = jax.ShapeDtypeStruct((batch, 120, heads_k, head_dim), dtype)
    return q, k, k


@pytest.fixture
def cpu_only(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiles_of_a_named_architecture(architecture):
    found = explain(*structs(), architecture=architecture, causal=True)
    assert isinstance(found, Explanation)
    assert found.implementation == "cuda"
    assert found.reason == ""
    assert found.architecture == architecture
    assert found.padded_head_dim == 64
    assert found.spec == _spec.AttentionSpec(64**-0.5, window_right=0)
    family = "sm90" if architecture == "sm_90" else "sm80"
    assert found.forward.startswith(f"{family} ")
    assert found.backward.startswith(f"{family} ")
    text = str(found)
    assert architecture in text
    assert found.forward in text
    assert found.backward in text


def test_short_masked_sequences_have_tiles_of_their_own():
    short, longest_short, long, unmasked = (
        explain(*structs(seqlen_q=seqlen), architecture="sm_90", causal=causal).forward
        for seqlen, causal in ((100, True), (1024, True), (1025, True), (100, False))
    )
    assert short == longest_short != long
    assert long == unmasked


@pytest.mark.parametrize(
    ("head_dim", "seqlen", "options", "is_split"),
    [
        (64, 512, {}, True),
        (64, 513, {}, False),
        (64, 512, {"dropout_p": 0.1, "dropout_rng": 0}, False),
        (64, 1024, {"deterministic": True}, True),
        (64, 1025, {"deterministic": True}, False),
        (128, 1025, {"deterministic": True}, True),
        (128, 4096, {"deterministic": True, "causal": True}, True),
        (128, 4097, {"deterministic": True, "causal": True}, False),
        (128, 4097, {"deterministic": True, "causal": True, "softcap": 5.0}, True),
        (128, 768, {}, True),
        (128, 769, {}, False),
        (128, 1024, {"window_size": (900, 900)}, True),
        (128, 1025, {"window_size": (900, 900)}, False),
        (128, 1024, {"causal": True}, True),
        (128, 1025, {"causal": True}, False),
        (256, 16384, {"window_size": (900, 900)}, True),
    ],
)
def test_when_dq_is_computed_by_itself(head_dim, seqlen, options, is_split):
    if "dropout_rng" in options:
        options = {**options, "dropout_rng": jax.random.key(0)}
    operands = structs(head_dim=head_dim, seqlen_q=seqlen, batch=132)
    found = explain(*operands, architecture="sm_90", **options)
    assert found.backward.startswith("sm90 split" if is_split else "sm90 ")
    assert ("split" in found.backward) == is_split


def many_heads(batch=33, seqlen_q=512, heads=4, heads_k=4, head_dim=64):
    """132 key heads: as many as the multiprocessors of a named sm_90."""
    q = jax.ShapeDtypeStruct((batch, seqlen_q, heads, head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((batch, 300, heads_k, head_dim), jnp.bfloat16)
    return q, k, k


@pytest.mark.parametrize(
    ("sizes", "options", "is_split"),
    [
        ({"batch": 11}, {}, False),  # 132 key tiles
        ({"batch": 12}, {}, True),
        ({"batch": 12, "seqlen_q": 1025}, {}, False),  # too long
        ({"batch": 11, "seqlen_q": 512}, {}, False),
        ({"batch": 11, "seqlen_q": 511}, {}, True),
        ({"batch": 11, "head_dim": 72}, {}, False),
        ({"batch": 11, "head_dim": 64, "seqlen_q": 512}, {}, False),
        ({"batch": 11, "head_dim": 64, "seqlen_q": 511}, {}, True),
        ({"batch": 12, "head_dim": 64, "seqlen_q": 512}, {}, True),
        ({"batch": 11, "heads": 8}, {"deterministic": True}, True),
        ({"batch": 5, "heads": 8}, {"dtype": jnp.float16}, True),  # no parts
        ({"batch": 11, "seqlen_q": 768}, {"causal": False}, True),
        ({"batch": 11}, {"causal": False, "window_size": (900, 900)}, True),
        ({"batch": 11}, {"deterministic": True}, True),
    ],
)
def test_one_causal_round_of_key_tiles_is_fused(sizes, options, is_split):
    sizes = {"seqlen_q": 1024, "head_dim": 128, **sizes}
    options = {"causal": True, **options}
    dtype = options.pop("dtype", jnp.bfloat16)
    operands = (jax.ShapeDtypeStruct(x.shape, dtype) for x in many_heads(**sizes))
    found = explain(*operands, architecture="sm_90", **options)
    assert ("split" in found.backward) == is_split


@pytest.mark.parametrize(
    ("operands", "options", "takes_heads"),
    [
        (many_heads(), {}, True),
        (many_heads(), {"causal": True, "window_size": (30, 0)}, True),
        (many_heads(), {"deterministic": True}, True),
        (many_heads(), {"softcap": 5.0}, False),
        (many_heads(head_dim=72), {}, False),
        (many_heads(seqlen_q=513), {}, False),
        (many_heads(seqlen_q=256, heads=8), {}, True),
        (many_heads(seqlen_q=257, heads=8), {}, False),
        (many_heads(batch=34), {}, False),  # 128 multiprocessors would idle
        (many_heads(batch=28), {}, True),
        (many_heads(batch=27), {}, False),  # and here 24
        (many_heads(seqlen_q=1024), {"causal": True}, True),  # by two passes
        (many_heads(seqlen_q=769), {"causal": True, "deterministic": True}, True),
        (many_heads(seqlen_q=769), {"deterministic": True}, True),
        (many_heads(seqlen_q=768), {"causal": True}, False),
        (many_heads(seqlen_q=1025), {"causal": True}, False),
        (many_heads(seqlen_q=1024), {"window_size": (9, 9)}, False),
        (many_heads(seqlen_q=1024, heads=8), {"causal": True}, False),
    ],
)
def test_when_ctas_take_whole_heads(operands, options, takes_heads):
    found = explain(*operands, architecture="sm_90", **options)
    assert found.backward.startswith("sm90 head" if takes_heads else "sm90 ")
    assert ("head" in found.backward) == takes_heads


def long_heads(batch=1, seqlen_q=16384, seqlen_k=16384, heads=8, head_dim=256):
    q = jax.ShapeDtypeStruct((batch, seqlen_q, heads, head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((batch, seqlen_k, heads, head_dim), jnp.bfloat16)
    return q, k, k


@pytest.mark.parametrize(
    ("operands", "options", "takes_clusters"),
    [
        (long_heads(), {}, True),
        (long_heads(head_dim=200), {"dropout_rng": jax.random.key(0)}, True),
        (long_heads(head_dim=192), {}, False),
        (long_heads(), {"deterministic": True}, False),
        (long_heads(), {"causal": True}, True),
        (long_heads(), {"window_size": (9000, 0)}, False),
        (long_heads(4, 2048, 4096), {}, True),
        (long_heads(4, 2047, 4096), {}, False),
        (long_heads(4, 8192, 4096), {"causal": True}, True),
        (long_heads(4, 8191, 4096), {"causal": True}, False),
        (long_heads(1, 4096, 192, heads=30), {}, True),
        (long_heads(1, 4096, 192, heads=31), {}, False),  # 29 of 30 clusters would idle
        # Heads so few that the split form leaves more idle.
        (long_heads(1, 100, 192, heads=30, head_dim=136), {}, True),
        (long_heads(1, 100, 192, heads=30, head_dim=128), {}, False),
        (long_heads(1, 100, 192, heads=31, head_dim=136), {}, False),
        (long_heads(1, 1024, 1024, heads=10, head_dim=168), {}, True),  # two rounds
        (long_heads(1, 1024, 1024, heads=10, head_dim=160), {}, False),
        (long_heads(1, 1024, 1024, heads=11, head_dim=168), {}, False),
        (long_heads(1, 512, 960, heads=12), {}, False),
        (long_heads(1, 512, 512, heads=30), {"causal": True}, True),  # three
        (long_heads(1, 512, 512, heads=31), {"causal": True}, False),
        (long_heads(1, 512, 512, heads=20, head_dim=192), {"causal": True}, True),
        (long_heads(1, 512, 512, heads=21, head_dim=192), {"causal": True}, False),
        (long_heads(1, 384, 384, heads=15), {"causal": True}, True),
        (long_heads(1, 384, 384, heads=16), {"causal": True}, False),
        (long_heads(1, 512, 512, heads=8), {"window_size": (300, 0)}, False),
        (long_heads(1, 512, 512, heads=8), {"deterministic": True}, False),
    ],
)
def test_when_ctas_work_together(operands, options, takes_clusters):
    options = {"dropout_p": 0.1 if "dropout_rng" in options else 0.0, **options}
    found = explain(*operands, architecture="sm_90", **options)
    family = "sm90 cluster" if takes_clusters else "sm90 split"
    assert found.backward.startswith(family)


@pytest.mark.parametrize(
    ("operands", "options", "match"),
    [
        (long_heads(head_dim=128), {}, "above 128, got 128"),
        (long_heads(), {"deterministic": True}, "any order"),
    ],
)
def test_what_clusters_do_not_compute_is_an_error(operands, options, match):
    with (
        testing.override_tiles("backward", "sm90cluster"),
        pytest.raises(NotImplementedError, match=match),
    ):
        explain(*operands, architecture="sm_90", **options)


def test_a_head_that_does_not_fit_is_an_error_with_the_numbers():
    with (
        testing.override_tiles("backward", "sm90head"),
        pytest.raises(NotImplementedError, match="there are 18"),
    ):
        explain(*many_heads(seqlen_q=513, heads=8), architecture="sm_90")


def test_takes_every_argument_of_a_call():
    found = explain(
        *structs(),
        architecture="sm_90",
        dropout_p=0.1,
        softmax_scale=0.5,
        window_size=(10, 20),
        softcap=3.0,
        alibi_slopes=jnp.ones(4),
        deterministic=True,
        dropout_rng=jax.random.key(0),
        return_lse=True,
        implementation="cuda",
    )
    assert found.spec == _spec.AttentionSpec(
        softmax_scale=0.5,
        window_left=10,
        window_right=20,
        softcap=3.0,
        alibi=True,
        dropout_p=0.1,
        deterministic=True,
    )


def test_takes_arrays():
    arrays = [jnp.zeros(x.shape, x.dtype) for x in structs()]
    found = explain(*arrays, architecture="sm_90")
    assert found == explain(*structs(), architecture="sm_90")


def test_takes_shapes_and_dtypes_for_every_array():
    key = jax.random.key(0)
    for rng in (key, jax.random.key_data(key)):
        arrays = {"alibi_slopes": jnp.ones(4), "dropout_rng": rng}
        shapes = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()
        }
        found, right = (
            explain(*structs(), architecture="sm_90", dropout_p=0.1, **given)
            for given in (shapes, arrays)
        )
        assert found == right
        assert (found.spec.alibi, found.spec.dropout) == (True, True)


def test_limits_that_hide_nothing_are_dropped():
    found = explain(*structs(), architecture="sm_90", window_size=(119, 99))
    assert found.spec == _spec.AttentionSpec(64**-0.5)


def test_padding_is_named():
    found = explain(*structs(head_dim=20), architecture="sm_90")
    assert found.implementation == "cuda"
    assert found.padded_head_dim == 24
    assert "head_dim 20 is padded to 24" in found.reason
    assert found.reason in str(found)


@pytest.mark.parametrize(
    ("arrays", "arguments", "reason"),
    [
        (structs(dtype=jnp.float32), {}, "float32"),
        (structs(head_dim=257), {}, "257"),
        (structs(), {"implementation": "jax"}, 'implementation="jax"'),
    ],
    ids=["dtype", "head_dim", "asked_for"],
)
def test_reason_why_no_kernel_runs(arrays, arguments, reason):
    found = explain(*arrays, architecture="sm_90", **arguments)
    assert found.implementation == "jax"
    assert reason in found.reason
    assert (found.forward, found.backward) == ("", "")
    assert str(found) == f"plain JAX: {found.reason}"


@pytest.mark.usefixtures("cpu_only")
def test_without_a_gpu_and_an_architecture():
    found = explain(*structs())
    assert found.implementation == "jax"
    assert "'cpu'" in found.reason
    assert found.architecture == ""


def test_wrong_arguments_are_refused_as_by_the_call():
    with pytest.raises(ValueError, match=r"^k must"):
        explain(*structs(heads_k=3), architecture="sm_90")
    with pytest.raises(TypeError, match=r"^causal must"):
        explain(*structs(), architecture="sm_90", causal=1)
    with pytest.raises(NotImplementedError, match="return_attn_probs"):
        explain(*structs(), architecture="sm_90", return_attn_probs=True)
    with pytest.raises(TypeError, match=r"^return_lse must"):
        explain(*structs(), architecture="sm_90", return_lse="yes")
    for value, error in ((0, ValueError), ("steep", TypeError), ([1], ValueError)):
        with pytest.raises(error, match=r"^alibi_slopes must"):
            explain(*structs(), architecture="sm_90", alibi_slopes=value)
    for value in (0, "seed", jax.ShapeDtypeStruct((2,), jnp.float32)):
        with pytest.raises(TypeError, match=r"^dropout_rng must"):
            explain(*structs(), architecture="sm_90", dropout_rng=value)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, TypeError),
        ("text", TypeError),
        (object(), TypeError),
        ([[1.0]], ValueError),
        (np.float32(1.0), ValueError),
    ],
)
def test_what_is_no_such_array_is_refused_by_name(name, value, error):
    arrays = dict(zip("qkv", structs(dtype=jnp.float32), strict=True))
    with pytest.raises(error, match=f"^{name} must"):
        explain(**{**arrays, name: value}, architecture="sm_90")


def test_a_call_that_is_too_large_for_the_kernels():
    for sizes, text in (
        ({"seqlen_q": 2**28 + 1}, r"2\^28 rows, got 268435457"),
        ({"batch": 2**20, "seqlen_q": 2**14}, "1048576 .* split the batch"),
    ):
        with pytest.raises(NotImplementedError, match=text):
            explain(*structs(**sizes), architecture="sm_90")
        found = explain(*structs(**sizes), implementation="jax")
        assert found.implementation == "jax"
    assert explain(*structs(seqlen_q=2**28), architecture="sm_90").forward
    x = jax.ShapeDtypeStruct((1, 1, 2**23, 65), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"heads \* head_dim of .* 2\^29"):
        explain(x, x, x, architecture="sm_90")


def test_a_bias_of_other_than_floats():
    array = jax.ShapeDtypeStruct((120,), jnp.int32)
    with pytest.raises(TypeError, match=r"^bias must be floats, got int32"):
        explain(*structs(), architecture="sm_90", bias=array)
    with pytest.raises(TypeError, match=r"^mask must be an array"):
        explain(*structs(), architecture="sm_90", mask="causal")


def test_overrides_of_tiles_nest():
    def families():
        found = explain(*structs(), architecture="sm_90")
        return found.forward.split(" ")[0], found.backward.split(" ")[0]

    chosen = families()
    with testing.override_tiles("forward", "sm80"):
        outer = families()
        with testing.override_tiles("backward", "sm80"):
            both = families()
            with testing.override_tiles("forward", "sm90"):
                assert families() == ("sm90", "sm80")
            assert families() == both
        assert families() == outer
    assert families() == chosen
    assert (chosen, outer, both) == (
        ("sm90", "sm90"),
        ("sm80", "sm90"),
        ("sm80", "sm80"),
    )


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_dense_arrays_have_the_shape_of_the_scores(name):
    for shape in ((120,), (100, 1), (2, 1, 100, 120)):
        array = jax.ShapeDtypeStruct(shape, jnp.float32)
        found = explain(*structs(), architecture="sm_90", **{name: array})
        assert found.reason == f"a {name} array is passed, which no kernel reads"
    for shape in ((100,), (3, 1, 1, 120), (1, 2, 4, 100, 120)):
        with pytest.raises(ValueError, match=f"^{name} must be broadcastable"):
            explain(*structs(), architecture="sm_90", **{name: jnp.zeros(shape)})


@pytest.mark.parametrize(
    "architecture",
    [
        "sm_75",
        "hopper",
        "",
        "90",
        "sm_90a",
        "sm_99",
        "sm_900",
        "sm_",
        "sm_090",
    ],
)
def test_wrong_architecture(architecture):
    with pytest.raises(ValueError, match="architecture must be sm_80 or newer"):
        explain(*structs(), architecture=architecture)
    with pytest.raises(ValueError, match="architecture must be sm_80 or newer"):
        explain(*structs(), architecture=architecture, implementation="jax")


@pytest.mark.parametrize("architecture", [90, 9.0, b"sm_90", ("sm_90",)])
def test_architecture_that_is_no_name(architecture):
    with pytest.raises(TypeError, match=r"^architecture must be a str, got"):
        explain(*structs(), architecture=architecture)
