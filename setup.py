"""Builds the native module; everything else is declared in pyproject.toml."""

import importlib.util
import platform
import sys
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, naive_recompile
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
HEADERS = [str(path) for path in sorted(CSRC.rglob("*.h"))]
SOURCES = [str(path) for path in sorted(CSRC.rglob("*.cc"))]

HOST = f"{sys.platform}-{platform.machine()}"
IS_SUPPORTED_HOST = HOST in ("linux-x86_64", "linux-aarch64")
# The stable ABI that nanobind needs starts at 3.12 and excludes free threading.
IS_FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
USES_STABLE_ABI = sys.version_info >= (3, 12) and not IS_FREE_THREADED

MACROS = [("NDEBUG", None), ("NB_COMPACT_ASSERTIONS", None)]
if USES_STABLE_ABI:
    MACROS.append(("Py_LIMITED_API", "0x030C0000"))


def package_folder(name: str) -> Path:
    """Returns the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"building jax_flash_attn needs the package {name!r}")
    return Path(spec.submodule_search_locations[0])


def needs_recompile(obj: str, src: str) -> bool:
    """Returns whether the source or any of our headers is newer than the object."""
    return any(naive_recompile(obj, path) for path in [src, *HEADERS])


class BuildNative(build_ext):
    """Adds what lies outside this tree when building, so that no sdist lists it."""

    def build_extension(self, ext: Extension) -> None:
        nanobind, jaxlib = package_folder("nanobind"), package_folder("jaxlib")
        ext.sources = [*ext.sources, str(nanobind / "src" / "nb_combined.cpp")]
        for root in (nanobind, nanobind / "ext" / "robin_map", jaxlib):
            ext.extra_compile_args += ["-isystem", str(root / "include")]
        with ParallelCompile(needs_recompile=needs_recompile):
            super().build_extension(ext)


native = Extension(
    "jax_flash_attn._native",
    sources=SOURCES,
    include_dirs=["csrc", "csrc/kernels"],
    depends=HEADERS,
    define_macros=MACROS,
    extra_compile_args=[
        *["-std=c++17", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
        *["-fno-strict-aliasing", "-ffunction-sections", "-fdata-sections"],
    ],
    # Symbols of a static libstdc++ must not mix with another copy in the process.
    extra_link_args=[
        *["-Wl,--gc-sections", "-Wl,--exclude-libs,ALL", "-Wl,-s"],
        *["-ldl", "-lpthread"],
    ],
    language="c++",
    py_limited_api=USES_STABLE_ABI,
)

setup(
    packages=[*find_packages(include=["jax_flash_attn*"]), "jax_flash_attn.kernels"],
    package_dir={"jax_flash_attn.kernels": "csrc/kernels"},
    ext_modules=[native] if IS_SUPPORTED_HOST else [],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp312"}} if USES_STABLE_ABI else {},
)
