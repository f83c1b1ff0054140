"""The documentation's pictures, and what its pages refer to."""

import importlib.util
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

import jax_flash_attn

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.fixture(scope="module")
def draw():
    spec = importlib.util.spec_from_file_location("draw", DOCS / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_show_what_masks_mean(draw):
    i, j = np.ogrid[:3, :6]
    flash, nn = jax_flash_attn.flash_attn_func, jax_flash_attn.dot_product_attention
    for seen, right in (
        (draw.visible(flash, 3, 6, causal=True), j <= i + 3),
        (draw.visible(nn, 3, 6, is_causal=True), j <= i),
    ):
        np.testing.assert_array_equal(seen, right)


def test_every_picture_that_a_page_shows_can_be_drawn(draw, tmp_path):
    shown = {
        name
        for page in PAGES
        for name in re.findall(r"\(pictures/(\w+)\.svg\)", page.read_text())
    }
    assert shown == set(draw.DRAWINGS)
    draw.save(tmp_path)
    for name in shown:
        assert (tmp_path / f"{name}.svg").stat().st_size > 0
        assert (draw.PICTURES / f"{name}.svg").is_file()


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    listed = re.findall(r": (\w+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES]


def public(module):
    members = inspect.getmembers(module, inspect.isfunction)
    here = {name for name, x in members if x.__module__ == module.__name__}
    return {name for name in here if not name.startswith("_")}


def test_every_function_is_in_the_reference():
    page = (DOCS / "api.md").read_text()
    documented = set(re.findall(r"^::: jax_flash_attn\.([\w.]+)", page, re.MULTILINE))
    undocumented = {"LSE_NAME", "OUT_NAME", "__version__", "testing"}
    assert set(jax_flash_attn.__all__) - undocumented <= documented
    assert {f"testing.{name}" for name in public(jax_flash_attn.testing)} <= documented
    layers = ("linen.attention_fn", "nnx.attention_fn", "haiku.MultiHeadAttention")
    assert {f"integrations.{name}" for name in layers} <= documented
    assert "integrations.equinox.multihead_attention" in documented
