"""One program with gradients, split over devices in each of the ways there are.

Fresh processes build them, too, so everything needed is made here.
"""

import contextlib

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

from tests.support import calls, inputs
from tests.support.cases import Case
from tests.support.partitioning import Split

CASE = Case(
    "program",
    "two batch entries and a group of heads for each device",
    batch=8,
    seqlen_q=10,
    seqlen_k=10,
    heads=4,
    heads_k=2,
    head_dim=16,
    dtype="float32",
    causal=True,
)
RESULTS = ("out", "dq", "dk", "dv")
WAYS = ("one_device", "shard_map", "explicit", "auto")

_SPEC = Spec("data", None, "model")


def arrays(case=CASE):
    """Returns a case's arrays; lse has no cotangent."""
    made = inputs.make(case)
    return made | {"dlse": jnp.zeros_like(made["dlse"])}


def mesh_of(way, devices=None, grid=(4, 2)):
    """Returns the mesh of a way, batch by heads, or None for one device."""
    if way == "one_device":
        return None
    split = Split((("data", grid[0]), ("model", grid[1])))
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    return split.make_mesh(kind, devices or jax.devices("cpu"))


def build(way, case=CASE, devices=None, grid=(4, 2), layers=1, **more):
    """Returns a jitted program, its operands in their place, and a context manager.

    Args:
        way: one of `WAYS`, or "pmap", which splits the batch alone.
        case: a `cases.Case` without slopes and dropout.
        devices: those to use; default: the CPU's.
        grid: how many parts of batch and heads there are.
        layers: how often what attends is passed on as queries.
        **more: keyword arguments of the calls.

    Returns:
        The program takes the operands and gives `RESULTS`. The context manager is for
        tracing, exporting and calling it.
    """

    def network(x, k, v):
        for _ in range(layers):
            x = calls.attention(case, **more)(x, k, v)[0]
        return x

    def run(q, k, v, dout):
        out, pullback = jax.vjp(network, q, k, v)
        return (out, *pullback(dout))

    devices = devices or jax.devices("cpu")
    context = contextlib.nullcontext()
    given = arrays(case)
    operands = [given[name] for name in ("q", "k", "v", "dout")]
    if way == "pmap":
        parts = [x.reshape(grid[0], -1, *x.shape[1:]) for x in operands]
        return jax.pmap(run, devices=devices[: grid[0]]), parts, context
    mesh = mesh_of(way, devices, grid)
    place = devices[0] if mesh is None else NamedSharding(mesh, _SPEC)
    operands = jax.device_put(operands, place)
    if way == "explicit":
        context = jax.set_mesh(mesh)
    if way == "shard_map":
        specs = (_SPEC,) * 4
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs)
    return calls.jit(run), operands, context


def bits(way, **options):
    """Returns the bytes of each result of a way's program; see `build`."""
    program, operands, context = build(way, **options)
    with context:
        results = program(*operands)
    return {
        name: jax.device_get(x).tobytes()
        for name, x in zip(RESULTS, results, strict=True)
    }
