"""JAX transforms of the plain JAX path; tests/gpu checks the kernels likewise."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_flash_attn
from jax_flash_attn import reference
from tests.support import calls, closeness, inputs, oracle, partitioning, transforms
from tests.support.cases import Case

CHECKS = transforms.Checks("auto", "float32")


@pytest.fixture(autouse=True, scope="module")
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.mark.parametrize("check", transforms.BASIC_CHECKS)
def test_transform(check):
    getattr(CHECKS, check)()


@pytest.mark.parametrize(("check", "subset"), transforms.SUBSET_PARAMETERS)
def test_subset(check, subset):
    """Which operands are differentiated or mapped; `-m long` has the whole product."""
    getattr(CHECKS, check)(subset)


def test_subsets_of_the_default_run_hold_every_pair_of_choices():
    def pairs(products):
        choices = [
            (check, *(name in subset for name in calls.OPERANDS))
            for check, subset in products
        ]
        places = itertools.combinations(range(1 + len(calls.OPERANDS)), 2)
        return {(i, j, c[i], c[j]) for i, j in places for c in choices}

    every = itertools.product(transforms.SUBSET_CHECKS, transforms.SUBSETS)
    assert pairs(list(transforms.PAIRWISE)) == pairs(list(every))


@pytest.mark.parametrize(
    ("names", "num_forwards"),
    [
        ((), 2),
        ((jax_flash_attn.OUT_NAME,), 2),
        ((jax_flash_attn.OUT_NAME, jax_flash_attn.LSE_NAME), 1),
    ],
    ids=["nothing", "out", "out_and_lse"],
)
def test_checkpoint(names, num_forwards):
    CHECKS.checkpoint(names, num_forwards)


@pytest.mark.parametrize("packing", ["kv", "qkv"])
def test_packed(packing):
    CHECKS.packed(packing)


@pytest.mark.parametrize("packing", ["kv", "qkv"])
def test_vmap_of_packed(packing):
    CHECKS.vmap_of_packed(packing)


@pytest.mark.parametrize("packing", ["kv", "qkv"])
def test_packed_calls_read_and_write_one_buffer(packing):
    """No copy of the buffer, and its gradient comes whole out of the backward."""
    case = CHECKS.case
    lengths = (case.batch, case.seqlen_k)
    shape = (*lengths, len(packing), case.heads, case.head_dim)
    function = {
        "kv": jax_flash_attn.flash_attn_kvpacked_func,
        "qkv": jax_flash_attn.flash_attn_qkvpacked_func,
    }[packing]
    operands = [jnp.zeros((*lengths, case.heads, case.head_dim))] * (packing == "kv")
    operands.append(jnp.zeros(shape))

    def loss(*operands):
        return function(*operands).sum()

    gradient = jax.grad(loss, argnums=tuple(range(len(operands))))
    jaxpr = jax.make_jaxpr(gradient)(*operands).jaxpr
    backward = next(
        e for e in jaxpr.eqns if e.primitive.name == "flash_attention_backward"
    )
    assert backward.invars[: len(operands)] == jaxpr.invars
    assert backward.outvars == jaxpr.outvars


def test_forward_mode_raises():
    q = jnp.ones((1, 3, 2, 8))

    def attend(q):
        return jax_flash_attn.flash_attn_func(q, q, q)

    def linearized(q):
        return jax.linearize(attend, q)[1](q)

    forward = (lambda q: jax.jvp(attend, (q,), (q,)), jax.jacfwd(attend), linearized)
    for differentiate in forward:
        with pytest.raises(TypeError, match="custom_vjp"):
            differentiate(q)


def test_what_errors_name_for_other_derivatives_has_them():
    """The reference beside jax.nn, both in forward mode and differentiated twice."""
    random = np.random.default_rng(0)
    q, k = (random.standard_normal((1, n, 2, 4)).astype("f4") for n in (2, 3))

    def plain(q):
        return jax.nn.dot_product_attention(
            q, k.astype(q.dtype), k.astype(q.dtype), implementation="xla"
        )

    def through_the_reference(q):
        spec = jax_flash_attn.explain(q, k, k).spec
        return reference.attention(q, k, k, spec=spec)[0]

    def derivatives(attend, q):
        hessian = jax.hessian(lambda q: (attend(q) ** 2).sum())(q)
        return {"jvp": jax.jvp(attend, (q,), (jnp.cos(q),))[1], "hessian": hessian}

    ours, naive = derivatives(through_the_reference, q), derivatives(plain, q)
    with jax.enable_x64(True):
        exact = derivatives(plain, q.astype(np.float64))
    for name, actual in ours.items():
        closeness.assert_close_to_oracle(actual, exact[name], naive[name], what=name)


NUM_DEVICES = 8

SHARDED = Case(
    "sharded",
    "two batch entries for each device",
    batch=2 * NUM_DEVICES,
    seqlen_q=10,
    seqlen_k=14,
    heads=4,
    heads_k=2,
    head_dim=16,
    dtype="float32",
    causal=True,
    alibi="h",
)

BATCH, WHOLE = PartitionSpec("batch"), PartitionSpec()


def run_sharded(arrays, spec_kv, gradients_inside):
    """Returns a loss's gradients of q, k and v under shard_map, and the collectives."""
    mesh = jax.make_mesh(
        (NUM_DEVICES,), ("batch",), (AxisType.Auto,), devices=jax.devices("cpu")
    )
    attend = calls.attention(SHARDED)
    names = ("q", "k", "v", "slopes", "dout", "dlse")
    specs = (BATCH, spec_kv, spec_kv, WHOLE, BATCH, BATCH)

    def local_loss(q, k, v, slopes, dout, dlse):
        out, lse = attend(q, k, v, slopes)
        loss = (out * dout).sum() + (lse * dlse).sum()
        return jax.lax.psum(loss, "batch")

    share = functools.partial(jax.shard_map, mesh=mesh, in_specs=specs)
    gradient = functools.partial(jax.grad, argnums=(0, 1, 2))
    run = (
        share(gradient(local_loss), out_specs=specs[:3])
        if gradients_inside
        else gradient(share(local_loss, out_specs=WHOLE))
    )
    run = jax.jit(run, compiler_options=calls.FAST_COMPILE)
    operands = [arrays[name] for name in names]
    compiled = run.lower(*operands).compile()
    placed = jax.device_put(operands, [NamedSharding(mesh, spec) for spec in specs])
    return compiled(*placed), partitioning.collectives(compiled)


@pytest.mark.parametrize("gradients_inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("spec_kv", [BATCH, WHOLE], ids=["split_kv", "shared_kv"])
def test_gradients_under_shard_map(spec_kv, gradients_inside):
    """With varying axes checked: gradients of what devices share are their sums."""
    assert len(jax.devices("cpu")) == NUM_DEVICES
    arrays = inputs.make(SHARDED)
    full = dict(arrays)
    if spec_kv == WHOLE:
        for name in ("k", "v"):
            arrays[name] = arrays[name][:2]
            full[name] = jnp.tile(arrays[name], (NUM_DEVICES, 1, 1, 1))
    gradients, found = run_sharded(arrays, spec_kv, gradients_inside)
    # The loss is summed, too, but nobody asks for it.
    assert found == ({"all-reduce"} if spec_kv == WHOLE else set())
    arguments = (
        inputs.primitive_operands(SHARDED, full),
        full["dout"],
        full["dlse"],
        inputs.spec(SHARDED),
    )
    exact, naive = oracle.exact(*arguments), oracle.naive(*arguments)
    for name, gradient in zip(transforms.GRADIENTS, gradients, strict=True):
        right, yardstick = exact[name], naive[name]
        if spec_kv == WHOLE and name != "dq":
            by_device = (NUM_DEVICES, 2, *right.shape[1:])
            right, yardstick = (
                x.reshape(by_device).sum(axis=0) for x in (right, yardstick)
            )
        closeness.assert_close_to_oracle(gradient, right, yardstick, what=name)


def test_values_under_jit_equal_values_without():
    arrays = inputs.make(CHECKS.case)
    operands = [arrays[name] for name in calls.OPERANDS]
    jitted = jax.jit(CHECKS.attend)(*operands)
    for plain, compiled in zip(CHECKS.attend(*operands), jitted, strict=True):
        np.testing.assert_array_equal(plain, compiled)


def test_raw_key_draws_what_the_typed_key_draws():
    arrays = inputs.make(CHECKS.case)
    operands = [arrays[name] for name in calls.OPERANDS]
    raw = jax.random.key_data(operands.pop())
    typed_out, _ = CHECKS.attend(*operands, arrays["dropout_rng"])
    raw_out, _ = CHECKS.attend(*operands, raw)
    np.testing.assert_array_equal(typed_out, raw_out)
