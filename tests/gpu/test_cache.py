"""The kernel cache under a running program: the right answer whatever is on disk."""

import pytest

from tests.support import ahead, calls, cases, jax_child

pytestmark = pytest.mark.gpu

PROGRAM = """
from tests.support import calls, cases, oracle
from jax_flash_attn import _ffi

case = cases.BY_NAME["causal_gqa"]
oracle.check(calls.run(case, implementation="cuda"), oracle.expected(case))
answer["cache"] = _ffi.native.cache()
"""


def run(directory):
    return jax_child.run(PROGRAM, JAX_FLASH_ATTN_CACHE_DIR=directory)["cache"]


@pytest.fixture(scope="module")
def kernels():
    """How many kernels the program runs."""
    return calls.compile_kernels(cases.BY_NAME["causal_gqa"])


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache directory that one process has filled."""
    folder = tmp_path_factory.mktemp("filled") / "cache"
    assert run(folder)["entries"] > 0
    return folder


def entries(folder):
    return sorted(folder.rglob("*.cubin"))


def test_filled_once(filled, kernels):
    before = [(path, path.stat().st_mtime_ns) for path in entries(filled)]
    assert len(before) == kernels > 2  # the forward's, and the backward's two or three
    assert run(filled)["entries"] == kernels
    assert before == [(path, path.stat().st_mtime_ns) for path in entries(filled)]


def test_damaged_entries_are_replaced(filled):
    contents = [path.read_bytes() for path in entries(filled)]
    for n, path in enumerate(entries(filled)):
        damaged = bytearray(contents[n])
        damaged[-100] ^= 255
        path.write_bytes(damaged[: len(damaged) - n])
    run(filled)
    assert [path.read_bytes() for path in entries(filled)] == contents


def test_processes_share_a_cold_cache(tmp_path, kernels):
    """Each gives the right results, whoever writes an entry first."""
    folder = tmp_path / "cache"
    answers = ahead.Ahead(lambda _: run(folder), range(3))
    assert {answers[n]["enabled"] for n in range(3)} == {True}
    answers.close()
    assert len(entries(folder)) == kernels


THREADS_PROGRAM = """
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
from tests.support import calls, cases, inputs, oracle
from jax_flash_attn import _ffi

case = cases.BY_NAME["causal_gqa"]
arrays = inputs.make(case)
right = oracle.of(case, arrays)
start = threading.Barrier(4)
devices = jax.devices()[:{num_devices}]

def compile_and_run(n):
    placed = jax.device_put(arrays, devices[n % len(devices)])
    attend = calls.attention(case, implementation="cuda")
    program = calls.jit(calls.with_gradients(attend)).lower(placed).compile()
    start.wait()
    return jax.block_until_ready(program(placed))

with ThreadPoolExecutor(4) as pool:
    for results in pool.map(compile_and_run, range(4)):
        oracle.check(results, right)
answer["cache"] = _ffi.native.cache()
"""


@pytest.mark.parametrize(
    "num_devices",
    [
        pytest.param(1, id="one_gpu"),
        pytest.param(4, id="several_gpus", marks=pytest.mark.multi_gpu),
    ],
)
def test_threads_run_new_kernels_at_once(num_devices, tmp_path, kernels):
    """Four programs of their own need the same kernels, compiled at the first run."""
    folder = tmp_path / "cache"
    program = THREADS_PROGRAM.format(num_devices=num_devices)
    found = jax_child.run(program, JAX_FLASH_ATTN_CACHE_DIR=folder)
    assert found["cache"]["entries"] == kernels


def off(_):
    return "0"


def below_a_file(folder):
    file = folder / "file"
    file.write_text("")
    return file / "cache"


def writable_by_others(folder):
    folder.chmod(0o777)
    return folder


PLACES = {place.__name__: place for place in (off, below_a_file, writable_by_others)}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folders = {name: PLACES[name](tmp_path_factory.mktemp(name)) for name in PLACES}
    results = ahead.Ahead(lambda name: (folders[name], run(folders[name])), PLACES)
    yield results
    results.close()


@pytest.mark.parametrize("name", PLACES)
def test_no_cache_to_use(name, answers):
    folder, cache = answers[name]
    assert cache["entries"] == 0
    if name == "writable_by_others":
        assert "chmod go-w" in cache["reason_disabled"]
        assert list(folder.iterdir()) == []
