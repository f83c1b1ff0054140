"""Transforms of a stack of layers over a mesh: results, and what is communicated."""

import functools

import jax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

import jax_flash_attn
from tests.support import calls, layered, partitioning
from tests.support.partitioning import Split
from tests.support.programs import CASE

pytestmark = pytest.mark.core

SPLIT = Split(batch="data", heads="model", heads_k="model")
X, KV = Spec("data", None, "model"), Spec(None, "data", None, "model")
SPECS = (X, KV, KV, X)

POLICIES = jax.checkpoint_policies
KEEP = POLICIES.save_only_these_names(jax_flash_attn.OUT_NAME, jax_flash_attn.LSE_NAME)
WRAPS = {
    "plain": lambda layer: layer,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "remat_by_name": functools.partial(jax.checkpoint, policy=KEEP),
}


@pytest.fixture(autouse=True, scope="module")
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def make_mesh(axis_type=AxisType.Auto):
    return SPLIT.make_mesh(axis_type, jax.devices("cpu"))


def attend(q, k, v):
    return calls.attention(CASE)(q, k, v)[0]


def run_on(mesh, function, specs=SPECS):
    """Returns the results of a function of the case's arrays, and its collectives."""
    return partitioning.compile_and_run(function, layered.make(CASE).every, specs, mesh)


@pytest.mark.parametrize(
    ("wrap", "axis_type"),
    [
        pytest.param("plain", AxisType.Explicit, id="plain-explicit"),
        pytest.param("jit", AxisType.Auto, id="jit-auto"),
        pytest.param("jit", AxisType.Explicit, id="jit-explicit"),
        pytest.param("remat", AxisType.Explicit, id="remat-explicit"),
        pytest.param("remat_by_name", AxisType.Auto, id="remat_by_name-auto"),
    ],
)
def test_jit(wrap, axis_type):
    run = layered.with_gradients(layered.network(attend, WRAPS[wrap]))
    results, found = run_on(make_mesh(axis_type), run)
    assert found == set()
    layered.check(CASE, results)


def shard(function, mesh, in_specs, out_specs, **options):
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options
    )


@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
@pytest.mark.parametrize("wrap", ["plain", "remat_by_name"])
def test_scan_and_gradients_inside_shard_map(wrap, check_vma):
    """The whole step is in `shard_map`, the loop over layers too."""
    mesh = make_mesh()
    run = layered.with_gradients(layered.network(attend, WRAPS[wrap]))
    sharded = shard(run, mesh, SPECS, (X, X, KV, KV), check_vma=check_vma)
    results, found = run_on(mesh, sharded)
    assert found == set()
    layered.check(CASE, results)


@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
def test_shard_map_inside_scan(check_vma):
    """Attention alone is in `shard_map`, differentiated from outside."""
    mesh = make_mesh()
    sharded = shard(attend, mesh, (X, X, X), X, check_vma=check_vma)
    run = layered.with_gradients(layered.network(sharded, jax.checkpoint))
    results, found = run_on(mesh, run)
    assert found == set()
    layered.check(CASE, results)


@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
def test_shard_map_over_axes_one_by_one(check_vma):
    """Each level is manual over one mesh axis.

    JAX stores no residuals of an inner `shard_map(check_vma=True)`, so those are
    computed again.
    """
    mesh = make_mesh()
    inside = jax.checkpoint(attend) if check_vma else attend
    heads, batch = Spec(None, None, "model"), Spec("data")
    share = functools.partial(shard, check_vma=check_vma)
    inner = share(inside, None, (heads,) * 3, heads, axis_names={"model"})
    outer = share(inner, mesh, (batch,) * 3, batch, axis_names={"data"})
    results, found = run_on(mesh, layered.with_gradients(layered.network(outer)))
    assert found == set()
    layered.check(CASE, results)


@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
@pytest.mark.parametrize(
    ("specs", "communication"),
    [
        pytest.param(
            (Spec("data"), Spec(None, "data"), Spec(None, "data"), Spec("data")),
            set(),
            id="split_by_it_alone",
        ),
        pytest.param(SPECS, {"all-gather", "all-reduce"}, id="split_by_both"),
    ],
)
def test_shard_map_over_one_axis(specs, communication, axis_type, check_vma):
    """What the other axis splits XLA gathers, or at the border of `shard_map` JAX."""
    mesh = make_mesh(axis_type)
    run = layered.with_gradients(layered.network(attend))
    batch, layers = Spec("data"), Spec(None, "data")
    sharded = shard(
        run,
        mesh,
        (batch, layers, layers, batch),
        (batch, batch, layers, layers),
        axis_names={"data"},
        check_vma=check_vma,
    )
    results, found = run_on(mesh, sharded, specs)
    if axis_type == AxisType.Explicit:
        communication = communication - {"all-reduce"}
    assert found <= communication
    layered.check(CASE, results)


def test_pmap():
    """Two batch entries for each of four devices."""
    devices = jax.devices("cpu")[:4]
    arrays = layered.make(CASE)
    x, k, v, dout = arrays.every

    def parts(array, axis):
        shape = (*array.shape[:axis], 4, 2, *array.shape[axis + 1 :])
        return array.reshape(shape)

    run = jax.pmap(
        layered.with_gradients(layered.network(attend, jax.checkpoint)),
        axis_name="devices",
        in_axes=(0, 1, 1, 0),
        out_axes=(0, 0, 1, 1),
        devices=devices,
    )
    operands = parts(x, 0), parts(k, 1), parts(v, 1), parts(dout, 0)
    assert partitioning.collectives(run.lower(*operands).compile()) == set()
    results = run(*operands)
    layered.check(
        CASE, [y.reshape(z.shape) for y, z in zip(results, (x, x, k, v), strict=True)]
    )


def test_vmap_with_spmd_axis_name():
    """What is constrained inside is split over the mapped axis, too."""
    mesh = make_mesh()
    inside = NamedSharding(mesh, Spec(None, None, "model"))

    def constrained(q, k, v):
        return attend(jax.lax.with_sharding_constraint(q, inside), k, v)

    mapped = jax.vmap(constrained, spmd_axis_name="data")

    def pairs(q, k, v):
        grouped = (x.reshape(4, 2, *x.shape[1:]) for x in (q, k, v))
        return mapped(*grouped).reshape(q.shape)

    results, found = run_on(mesh, layered.with_gradients(layered.network(pairs)))
    assert found == set()
    layered.check(CASE, results)
