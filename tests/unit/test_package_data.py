"""What an installation carries: the device sources, the native module, the version."""

import importlib.metadata
import importlib.resources
import importlib.util
import platform
import sys
import tomllib
from importlib.resources.abc import Traversable
from pathlib import Path

import pytest

import jax_flash_attn

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "kernels"
DEVICE_SOURCES = [
    path.relative_to(KERNELS)
    for path in sorted(KERNELS.rglob("*"))
    if path.suffix in {".cuh", ".h"}
]
BUILDS_NATIVE_MODULE = f"{sys.platform}-{platform.machine()}" in {
    "linux-x86_64",
    "linux-aarch64",
}


def installed(source: Path) -> Traversable:
    return importlib.resources.files("jax_flash_attn.kernels").joinpath(*source.parts)


@pytest.mark.parametrize("source", DEVICE_SOURCES, ids=str)
def test_device_source_is_installed(source: Path):
    assert installed(source).read_bytes() == (KERNELS / source).read_bytes(), (
        "the installed package is older than this tree: install it again"
    )


@pytest.mark.parametrize("source", DEVICE_SOURCES, ids=str)
def test_device_source_is_declared_for_the_wheel(source: Path):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["jax_flash_attn.kernels"]
    assert any(source.match(p) and len(source.parts) == 2 for p in patterns)


def test_native_module_is_installed():
    found = importlib.util.find_spec("jax_flash_attn._native") is not None
    assert found == BUILDS_NATIVE_MODULE, (
        "the package under test was not installed: pip install -e '.[test]' builds it"
    )


def test_type_information_is_installed():
    package = importlib.resources.files("jax_flash_attn")
    assert package.joinpath("py.typed").is_file()
    assert package.joinpath("_native.pyi").is_file()


def test_version_is_the_installed_one():
    installed_version = importlib.metadata.version("jax-flash-attn")
    assert jax_flash_attn.__version__ == installed_version
