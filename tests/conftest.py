"""How every test runs: the machine's devices, the markers and what a skip means.

The tests import the installed package, so the project root joins the import path
last: there it serves `tests` and `benchmarks` and hides nothing. So does `examples`,
whose scripts import each other by name, as they do when one is run.
"""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import hypothesis
import jax
import pytest

import jax_flash_attn
from tests.support import devices

HOST_DEVICES_FLAG = "--xla_force_host_platform_device_count"
NUM_HOST_DEVICES = 8
ROOT = Path(__file__).resolve().parents[1]

# XLA reads the flags when its first backend starts, which no import does.
if HOST_DEVICES_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} {HOST_DEVICES_FLAG}={NUM_HOST_DEVICES}"
    ).strip()

# The first call of an example compiles, so no deadline fits; a fixed seed makes a
# failure repeat.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


def pytest_configure() -> None:
    """Refuses to test an unbuilt tree, where every kernel test would fail alike."""
    folder = Path(jax_flash_attn.__file__).parent
    if folder.parent == ROOT and not list(folder.glob("_native.*.so")):
        raise pytest.UsageError(
            f"{folder} is under test and has no native module: run "
            '`pip install -e ".[test]"` first, or call `pytest` without `python -m`.'
        )


def pytest_report_header() -> str:
    """Says what is under test, and where."""
    folder = Path(jax_flash_attn.__file__).parent
    kinds = sorted({device.device_kind for device in jax.devices()})
    return (
        f"jax_flash_attn {jax_flash_attn.__version__} from {folder}, "
        f"jax {jax.__version__}, {jax.device_count()} x {', '.join(kinds)}"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a marked test where the machine lacks what the marker asks for."""
    if item.get_closest_marker("gpu"):
        devices.require_gpu()
    if item.get_closest_marker("sm80"):
        devices.require_gpu(capability=devices.SM80)
    if item.get_closest_marker("multi_gpu"):
        devices.require_gpu(count=2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Counts a skipped test as failed where a GPU is required."""
    report = yield
    return _fail_if_skipped(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    """Counts a skipped test file as failed where a GPU is required."""
    report = yield
    return _fail_if_skipped(report)


def _fail_if_skipped(report):
    is_expected_failure = hasattr(report, "wasxfail")
    if devices.IS_GPU_REQUIRED and report.skipped and not is_expected_failure:
        report.outcome = "failed"
        report.longrepr = f"JAX_FLASH_ATTN_REQUIRE_GPU=1 forbids: {report.longrepr[2]}"
    return report
