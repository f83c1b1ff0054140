"""Programs that XLA splits over a mesh: results, and what they communicate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec

from tests.support import calls, inputs, oracle, partitioning
from tests.support.cases import Case
from tests.support.partitioning import Split

pytestmark = pytest.mark.core

CASE = Case(
    "partitioned",
    "a batch and heads for every mesh",
    batch=8,
    seqlen_q=10,
    seqlen_k=10,
    heads=8,
    heads_k=2,
    head_dim=16,
    dtype="float32",
    causal=True,
)

BOTH = Split(batch="data", heads="model", heads_k="model")
WIDE = (("data", 2), ("model", 4))
ONE = (("model", 8),)

SUM, GATHER = {"all-reduce"}, {"all-gather"}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def make_mesh(split, axis_type=AUTO):
    return split.make_mesh(axis_type, jax.devices("cpu"))


@pytest.fixture(autouse=True, scope="module")
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def variant(**changes):
    return dataclasses.replace(CASE, **changes)


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    ("case", "split", "gradients"),
    [
        pytest.param(CASE, Split(batch="data"), set(), id="batch"),
        pytest.param(CASE, BOTH, set(), id="batch_and_heads"),
        pytest.param(
            CASE, Split(WIDE, batch="data", heads="model"), SUM, id="gqa_not_dividing"
        ),
        pytest.param(
            variant(
                heads_k=4, alibi="bh", dropout_p=0.3, softcap=8.0, window_size=(5, 0)
            ),
            BOTH,
            set(),
            id="everything",
        ),
        pytest.param(
            variant(heads_k=1, alibi="h"),
            Split(WIDE, batch="data", heads="model"),
            SUM,
            id="mqa_slopes",
        ),
    ],
)
def test_mesh(case, split, gradients, axis_type):
    partitioning.check(case, split, make_mesh(split, axis_type), gradients=gradients)


@pytest.mark.parametrize(
    ("case", "split", "gradients"),
    [
        pytest.param(
            CASE, Split(batch=("data", "model")), set(), id="batch_over_two_axes"
        ),
        pytest.param(
            variant(heads_k=8),
            Split(ONE, heads="model", heads_k="model"),
            set(),
            id="heads",
        ),
        pytest.param(
            CASE,
            Split(WIDE, heads=("data", "model"), heads_k="data"),
            SUM,
            id="heads_over_two_axes_keys_over_the_first",
        ),
        pytest.param(
            variant(heads_k=4),
            Split(heads=("model", "data"), heads_k="model"),
            SUM,
            id="axes_in_the_other_order",
        ),
        pytest.param(
            variant(heads=16, heads_k=2),
            Split(WIDE, heads="model"),
            SUM,
            id="device_has_part_of_a_group",
        ),
        pytest.param(
            variant(heads=12, heads_k=6),
            Split((("model", 2),), heads="model", heads_k="model"),
            set(),
            id="device_has_odd_number_of_groups",
        ),
    ],
)
def test_split(case, split, gradients):
    partitioning.check(case, split, make_mesh(split), gradients=gradients)


def test_deterministic():
    partitioning.check(CASE, BOTH, make_mesh(BOTH), deterministic=True)


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    ("case", "split"),
    [
        pytest.param(
            variant(heads=12, heads_k=6),
            Split(WIDE, batch="data", heads="model"),
            id="device_would_have_parts_of_groups",
        ),
        pytest.param(CASE, Split(batch="data", heads_k="model"), id="key_heads_alone"),
        pytest.param(CASE, Split(batch="data", heads="model"), id="query_heads_alone"),
    ],
)
def test_what_is_gathered_is_right(case, split, axis_type):
    mesh = make_mesh(split, axis_type)
    partitioning.check(case, split, mesh, forward=GATHER, gradients=GATHER | SUM)


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    ("packing", "case", "split", "gradients"),
    [
        pytest.param("qkv", variant(heads_k=8), BOTH, set(), id="qkv"),
        pytest.param("kv", CASE, BOTH, set(), id="kv"),
        pytest.param(
            "kv",
            variant(heads_k=1),
            Split(WIDE, batch="data", heads="model"),
            SUM,
            id="kv_mqa",
        ),
    ],
)
def test_packed(packing, case, split, gradients, axis_type):
    mesh = make_mesh(split, axis_type)
    partitioning.check(case, split, mesh, packing, gradients=gradients)


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "split",
    [
        pytest.param(Split(batch="data", seqlen="model"), id="queries"),
        pytest.param(Split(batch="data", seqlen_k="model"), id="keys"),
        pytest.param(
            Split(batch="data", seqlen="model", seqlen_k="model"), id="queries_and_keys"
        ),
        pytest.param(Split(batch="data", head_dim="model"), id="head_dim"),
    ],
)
def test_sequences_and_head_dims_are_gathered(split, axis_type):
    """Never attended to in part."""
    mesh = make_mesh(split, axis_type)
    allowed = GATHER | SUM
    partitioning.check(CASE, split, mesh, forward=allowed, gradients=allowed)


# vmap, scan, remat, shard_map: examples stacked, each judged by itself

SMALL = variant(batch=2, heads=4)
EXAMPLES = [inputs.make(SMALL, seed) for seed in range(4)]
ATTEND = calls.attention(SMALL)


def stack(axes):
    return {
        name: EXAMPLES[0][name]
        if axis is None
        else jnp.stack([example[name] for example in EXAMPLES], axis)
        for name, axis in axes.items()
    }


def assert_each_right(results, mapped):
    for n in range(len(EXAMPLES)):
        arrays = EXAMPLES[0] | {name: EXAMPLES[n][name] for name in mapped}
        one = {name: np.asarray(result)[n] for name, result in results.items()}
        oracle.check(one, oracle.of(SMALL, arrays))


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    ("mapped", "mapped_split", "rest_split"),
    [
        pytest.param(("q", "k", "v", "dout", "dlse"), "data", None, id="mapped_axis"),
        pytest.param(("q", "k", "v", "dout", "dlse"), None, "model", id="batch"),
        pytest.param(("q", "dout", "dlse"), "data", "model", id="queries_and_batch"),
        pytest.param(("k", "v"), "data", "model", id="keys_and_batch"),
    ],
)
def test_vmap(mapped, mapped_split, rest_split, axis_type):
    """The axis that `vmap` adds is split, or the batch behind it, or both."""
    names = ("q", "k", "v", "dout", "dlse")
    axes = {name: 0 if name in mapped else None for name in names}
    rest = {"slopes": None, "dropout_rng": None}
    specs = {
        name: Spec(mapped_split, rest_split) if name in mapped else Spec(rest_split)
        for name in names
    }

    def run(arrays):
        attend = calls.with_gradients(ATTEND)
        return jax.vmap(lambda given: attend(given | rest), in_axes=(axes,))(arrays)

    mesh = make_mesh(BOTH, axis_type)
    results, found = partitioning.compile_and_run(run, [stack(axes)], specs, mesh)
    assert found == set()
    assert_each_right(results, mapped)


@pytest.mark.parametrize(
    ("mapped_split", "rest", "text"),
    [
        pytest.param(
            "data",
            Spec("data"),
            "mesh axis 'data' splits both the mapped axis of one operand and the batch",
            id="batch",
        ),
        pytest.param(
            "model",
            Spec(None, None, "model"),
            "mesh axis 'model' splits both the mapped axis of one operand and the head",
            id="heads",
        ),
    ],
)
def test_mesh_axis_that_splits_two_axes_of_a_gradient(mapped_split, rest, text):
    """Auto axes have no types that would have to say it."""
    mesh = Split().make_mesh(EXPLICIT, jax.devices("cpu"))
    arrays = inputs.make(CASE)
    q = jnp.stack([arrays["q"]] * 4)

    def gradients(q, k, v):
        def loss(q, k, v):
            attend = calls.attention(CASE)
            return jax.vmap(lambda q: attend(q, k, v)[0])(q).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    with pytest.raises(ValueError, match=text):
        partitioning.compile_and_run(
            gradients,
            [q, arrays["k"], arrays["v"]],
            [Spec(mapped_split), rest, rest],
            mesh,
        )


@pytest.mark.parametrize("transform", ["scan", "checkpoint", "shard_map", "some_axes"])
def test_transform(transform):
    """`some_axes`: shard_map over one mesh axis, XLA splits over the other."""
    mesh = make_mesh(BOTH)
    arrays = inputs.make(CASE)
    spec = Spec("data", None, "model")
    attend = calls.attention(CASE)
    allowed = set()

    def once(q, k, v):
        return attend(q, k, v)[0]

    if transform == "scan":

        def once(q, k, v):
            return jax.lax.scan(lambda _, x: (0, attend(*x)[0]), 0, (q, k, v))[1]

        arrays = {name: x[None] for name, x in arrays.items() if x is not None}
        spec = Spec(None, *spec)
    elif transform == "checkpoint":
        once = jax.checkpoint(once)
    else:
        manual = {"data"} if transform == "some_axes" else {"data", "model"}
        part = Spec("data") if transform == "some_axes" else spec
        once = jax.shard_map(
            once, mesh=mesh, in_specs=part, out_specs=part, axis_names=manual
        )
        allowed = SUM | GATHER if transform == "some_axes" else set()

    def run(q, k, v, dout):
        out, pullback = jax.vjp(once, q, k, v)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *pullback(dout)), strict=True))

    operands = [arrays[name] for name in ("q", "k", "v", "dout")]
    results, found = partitioning.compile_and_run(run, operands, [spec] * 4, mesh)
    assert found <= allowed
    if transform == "scan":
        results = {name: x[0] for name, x in results.items()}
    arrays = inputs.make(CASE) | {"dlse": jnp.zeros((8, 8, 10))}
    oracle.check(results, oracle.of(CASE, arrays), tuple(results))


def test_results_are_split_as_the_operands():
    mesh = make_mesh(BOTH)
    arrays = inputs.make(CASE)
    operands = [arrays[name] for name in "qkv"]
    spec = Spec("data", None, "model")
    run = jax.grad(lambda *x: calls.attention(CASE)(*x)[0].sum(), (0, 1, 2))
    gradients, found = partitioning.compile_and_run(run, operands, [spec] * 3, mesh)
    assert found == set()
    assert [x.sharding.spec for x in gradients] == [spec] * 3


def test_export_of_a_split_program():
    """No partition rule can be stored: XLA splits it as it likes."""
    mesh = make_mesh(BOTH)
    arrays = inputs.make(CASE)
    sharding = jax.sharding.NamedSharding(mesh, Spec("data"))
    q, k, v = (jax.device_put(arrays[name], sharding) for name in "qkv")
    attend = calls.attention(CASE)
    exported = jax.export.export(calls.jit(attend))(q, k, v)
    assert exported.nr_devices == mesh.size
    out, lse = exported.call(q, k, v)
    names = ("out", "lse")
    oracle.check({"out": out, "lse": lse}, oracle.of(CASE, arrays), names)
