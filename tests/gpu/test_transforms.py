"""JAX transforms of the kernels: the checks of tests/unit/test_transforms.py."""

import pytest

import jax_flash_attn
from tests.support import transforms

pytestmark = pytest.mark.gpu

CHECKS = transforms.Checks("cuda", "bfloat16")

SUBSETS = [
    pytest.param(
        subset,
        id="-".join(subset),
        marks=() if subset in transforms.PAIRWISE_SUBSETS else pytest.mark.long,
    )
    for subset in transforms.SUBSETS
]


@pytest.mark.parametrize(
    "check",
    [
        CHECKS.jit,
        CHECKS.eager,
        CHECKS.value_and_grad,
        CHECKS.grad_without_lse,
        CHECKS.grad_of_lse_alone,
        CHECKS.vmap_over_other_axes,
        CHECKS.vmap_out_axes,
        CHECKS.nested_vmap,
        CHECKS.vmap_of_vjp,
        CHECKS.vmapped_dropout_equals_loop,
        CHECKS.scan,
        CHECKS.second_derivatives_are_refused,
    ],
    ids=lambda check: check.__name__,
)
def test_transform(check):
    check()


@pytest.mark.parametrize("subset", SUBSETS)
def test_vmap_of_grad(subset):
    CHECKS.vmap_of_grad(subset)


@pytest.mark.parametrize(
    "subset",
    [("q", "slopes"), ("k", "v"), ("dropout_rng",), transforms.OPERANDS],
    ids="-".join,
)
def test_grad_of_vmap(subset):
    CHECKS.grad_of_vmap(subset)


@pytest.mark.parametrize(
    ("names", "num_forwards"),
    [((), 2), ((jax_flash_attn.OUT_NAME, jax_flash_attn.LSE_NAME), 1)],
    ids=["nothing", "out_and_lse"],
)
def test_checkpoint(names, num_forwards):
    CHECKS.checkpoint(names, num_forwards)


@pytest.mark.parametrize("packing", ["kv", "qkv"])
def test_packed(packing):
    CHECKS.packed(packing)


@pytest.mark.parametrize("packing", ["kv", "qkv"])
def test_vmap_of_packed(packing):
    CHECKS.vmap_of_packed(packing)
