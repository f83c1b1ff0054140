"""JAX transforms of the kernels: the checks of tests/unit/test_transforms.py."""

import pytest

import jax_flash_attn
from tests.support import transforms

pytestmark = pytest.mark.gpu

CHECKS = transforms.Checks("cuda", "bfloat16")


@pytest.mark.parametrize("check", transforms.BASIC_CHECKS)
def test_transform(check):
    getattr(CHECKS, check)()


@pytest.mark.parametrize(("check", "subset"), transforms.SUBSET_PARAMETERS)
def test_subset(check, subset):
    getattr(CHECKS, check)(subset)


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
