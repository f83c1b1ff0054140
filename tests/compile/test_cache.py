"""The kernel cache on disk: whatever is in it or wrong with it, the right kernel."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jax_flash_attn import _ffi, _spec
from tests.support.native_child import compile_in_child, finish, start


@pytest.fixture(scope="module")
def right():
    """The kernel as a process without a cache makes it."""
    answer = compile_in_child("")
    assert not answer.cache["enabled"]
    assert "switched off" in answer.cache["reason_disabled"]
    return answer.forward["digest"]


@pytest.fixture
def filled(tmp_path, right):
    """A cache directory with one entry."""
    folder = tmp_path / "cache"
    answer = compile_in_child(folder)
    assert answer.forward["digest"] == right
    assert not answer.forward["from_disk"]
    return folder


def entry_of(folder):
    (entry,) = [path for path in folder.rglob("*") if path.is_file()]
    return entry


def assert_hit(folder, right):
    answer = compile_in_child(folder)
    assert answer.forward["from_disk"]
    assert answer.forward["digest"] == right


def assert_compiled(folder, right):
    answer = compile_in_child(folder)
    assert not answer.forward["from_disk"]
    assert answer.forward["digest"] == right
    return answer


def test_second_process_finds_the_kernel(filled, right):
    assert_hit(filled, right)
    cache = compile_in_child(filled).cache
    assert cache["enabled"]
    assert cache["directory"] == str(filled)
    assert cache["entries"] == 1
    assert cache["bytes"] == entry_of(filled).stat().st_size


def test_nothing_is_writable_by_others(filled):
    for path in (filled, *filled.rglob("*")):
        assert path.stat().st_mode & 0o022 == 0


def truncate(entry):
    os.truncate(entry, entry.stat().st_size - 1)


def empty(entry):
    entry.write_bytes(b"")


def flip_last_byte(entry):
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.write_bytes(content)


def flip_magic(entry):
    entry.write_bytes(b"X" + entry.read_bytes()[1:])


def append(entry):
    entry.write_bytes(entry.read_bytes() + b"\0")


def open_to_all(entry):
    entry.chmod(0o666)


def replace_by_directory(entry):
    entry.unlink()
    entry.mkdir()


def replace_by_link(entry):
    moved = entry.rename(entry.with_name("elsewhere"))
    entry.symlink_to(moved)


REPAIRED = (truncate, empty, flip_last_byte, flip_magic, append, open_to_all)


@pytest.mark.parametrize(
    "damage",
    [*REPAIRED, replace_by_directory, replace_by_link],
    ids=lambda damage: damage.__name__,
)
def test_damaged_entry_is_compiled_anew(filled, right, damage):
    damage(entry_of(filled))
    assert_compiled(filled, right)
    if damage in REPAIRED:
        assert_hit(filled, right)


def test_entry_of_another_kernel_is_not_taken(filled, right, tmp_path):
    other = tmp_path / "other"
    assert compile_in_child(other, head_dim=32).forward["digest"] != right
    entry_of(filled).write_bytes(entry_of(other).read_bytes())
    assert_compiled(filled, right)


@pytest.mark.parametrize("place", ["below_a_file", "file", "proc"])
def test_directory_that_cannot_be_made(tmp_path, right, place):
    file = tmp_path / "file"
    file.write_text("")
    folder = {"below_a_file": file / "cache", "file": file, "proc": "/proc/none/cache"}
    answer = assert_compiled(folder[place], right)
    # Root may write in /proc as far as its permissions say.
    if place != "proc":
        assert not answer.cache["enabled"]
        assert answer.cache["reason_disabled"]


def test_directory_that_others_may_write_is_not_used(filled, right):
    filled.chmod(0o777)
    answer = assert_compiled(filled, right)
    assert "chmod go-w" in answer.cache["reason_disabled"]


def test_directory_of_another_user_is_not_used(filled, right):
    """Root gives the directory away; another user takes one of root's."""
    folder = filled
    if os.geteuid() == 0:
        os.chown(filled, 12345, -1)
    else:
        folder = Path("/usr")
    before = sorted(filled.rglob("*"))
    answer = assert_compiled(folder, right)
    assert "owned by user" in answer.cache["reason_disabled"]
    assert sorted(filled.rglob("*")) == before


def test_processes_that_fill_one_directory_at_once(tmp_path, right):
    folder = tmp_path / "cache"
    answers = [finish(child) for child in [start(folder) for _ in range(4)]]
    assert {answer.forward["digest"] for answer in answers} == {right}
    entry_of(folder)
    assert_hit(folder, right)


def test_other_sources_are_other_entries(filled, right):
    answer = compile_in_child(filled, version="another")
    assert not answer.forward["from_disk"]
    assert answer.forward["digest"] == right
    assert answer.cache["entries"] == 2


def test_dump_directory_gets_source_log_and_cubin(tmp_path, right):
    folder = tmp_path / "dump"
    answer = compile_in_child("", dump_directory=str(folder))
    suffixes = {path.suffix: path for path in folder.iterdir()}
    assert set(suffixes) == {".cu", ".log", ".cubin"}
    assert suffixes[".cu"].read_text() == answer.forward["source"]


def test_threads_compile_each_kernel_once():
    """Two kernels, each asked for the first time by three threads at once."""
    spec = _ffi.attributes(_spec.AttentionSpec(0.125, softcap=3.0))
    head_dims = [8, 24] * 3
    start = threading.Barrier(len(head_dims))

    def request(head_dim):
        start.wait()
        return _ffi.native.compile("forward", spec, "bfloat16", head_dim, "sm_90")[0]

    with ThreadPoolExecutor(len(head_dims)) as pool:
        reports = list(pool.map(request, head_dims))
    for kernel in (reports[::2], reports[1::2]):
        assert len({(r["cubin"], r["seconds"]) for r in kernel}) == 1
    assert reports[0]["cubin"] != reports[1]["cubin"]


def test_missing_nvrtc_is_said_with_the_remedy(tmp_path):
    missing = tmp_path / "libnvrtc.so"
    answer = compile_in_child("", nvrtc_path=str(missing))
    assert answer.kernels == {}
    assert "JAX_FLASH_ATTN_NVRTC_PATH" in answer.error
    assert "pip install nvidia-cuda-nvrtc" in answer.error
    assert str(missing) in answer.error


def test_library_that_is_no_nvrtc_is_said(tmp_path):
    answer = compile_in_child("", nvrtc_path=_ffi.native.__file__)
    assert "lacks functions of NVRTC" in answer.error


@pytest.mark.parametrize(
    ("environment", "directory"),
    [
        ({"JAX_FLASH_ATTN_CACHE_DIR": "0"}, ""),
        ({"JAX_FLASH_ATTN_CACHE_DIR": "/a/b"}, "/a/b"),
        ({"JAX_FLASH_ATTN_CACHE_DIR": "~/b", "HOME": "/h"}, "/h/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/jax_flash_attn"),
        ({"JAX_FLASH_ATTN_CACHE_DIR": "", "HOME": "/h"}, "/h/.cache/jax_flash_attn"),
    ],
    ids=["off", "absolute", "home", "xdg", "default"],
)
def test_place_of_the_cache(monkeypatch, environment, directory):
    for name in ("JAX_FLASH_ATTN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _ffi.cache_directory() == directory
