"""The command line: what each command prints and the exit status it ends with."""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jax_flash_attn
from jax_flash_attn import _ffi, cli
from jax_flash_attn.cli import bench, doctor, progress, self_check
from jax_flash_attn.cli import compile as compile_command

ROOT = Path(__file__).resolve().parents[2]


class FakeNative:
    """Stands for the native module; a kernel is a file in the cache directory."""

    __file__ = "_native.so"

    def __init__(self, directory):
        self.directory = directory
        self.specs = set()
        self.reason_disabled = ""
        self.device_rows = []
        self.failing_head_dim = None
        self.can_write = True

    def cache(self):
        return {
            "directory": str(self.directory),
            "enabled": not self.reason_disabled,
            "reason_disabled": self.reason_disabled,
            "entries": 3,
            "bytes": 2**20,
        }

    def nvrtc(self):
        return {"path": "/lib/libnvrtc.so.13", "version": "13.0"}

    def driver_version(self):
        return 13010

    def devices(self):
        if not self.device_rows:
            raise RuntimeError("there is no driver")
        return self.device_rows

    seqlen_limits = (512, 1024)

    def tiles(self, operation, spec, dtype, head_dim, architecture, *, seqlen_q, **_):
        if not architecture.startswith("sm_"):
            raise ValueError(f"architecture must be sm_80 or newer, got {architecture}")
        is_masked = spec["window_right"] >= 0
        return "64x64" if is_masked and seqlen_q <= self.seqlen_limits[-1] else "128x64"

    def compile(self, operation, spec, dtype, head_dim, architecture, **sizes):
        if head_dim == self.failing_head_dim:
            raise RuntimeError("the compiler gave up")
        self.specs.add(tuple(spec.items()))
        tiles = self.tiles(operation, spec, dtype, head_dim, architecture, **sizes)
        source = "-".join(
            map(str, (operation, dtype, head_dim, tiles, hash(tuple(spec.items()))))
        )
        file = self.directory / f"{architecture}-{source}.cubin"
        from_disk = file.exists()
        if self.can_write:
            file.write_bytes(b"cubin")
        return [{"source": source, "from_disk": from_disk, "cubin": b"cubin"}]


DEVICE = {
    "ordinal": 0,
    "name": "a GPU",
    "compute_capability": 90,
    "multiprocessors": 132,
    "architecture": "sm_90",
}


@pytest.fixture
def native(monkeypatch, tmp_path):
    fake = FakeNative(tmp_path)
    monkeypatch.setattr(_ffi, "native", fake)
    return fake


@pytest.fixture
def one_case(monkeypatch):
    """One small case instead of all: they differ in what is computed, not in how."""
    case = self_check.Case("one case", 16, 24, 2, 8)
    monkeypatch.setattr(self_check, "CASES", (case,))


def compile_(*arguments):
    return cli.main(["compile", "--architecture=sm_90", "--head-dim=64", *arguments])


@pytest.mark.usefixtures("one_case")
def test_doctor_reports_and_passes(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in ("JAX", "native module", "environment", "Self-check"):
        assert word in printed
    assert "pass  forward   one case" in printed
    assert "pass  backward  one case" in printed


@pytest.mark.usefixtures("one_case")
def test_doctor_fails_on_a_wrong_result(capsys, monkeypatch):
    right = self_check.flash_attn_func

    def scaled_value(q, k, v, **arguments):
        return right(q, k, 1.01 * v, **arguments)

    monkeypatch.setattr(self_check, "flash_attn_func", scaled_value)
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  forward   one case" in printed
    assert "A check FAILED." in printed


@pytest.mark.usefixtures("one_case")
def test_doctor_fails_where_a_call_raises(capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of order")

    monkeypatch.setattr(self_check, "flash_attn_func", broken)
    assert cli.main(["doctor"]) == 1
    assert "RuntimeError: out of order" in capsys.readouterr().out


def test_doctor_says_that_the_native_module_is_missing(monkeypatch):
    monkeypatch.setattr(_ffi, "native", None)
    monkeypatch.setattr(_ffi, "native_missing", "it was never built")
    assert ("native module", "missing: it was never built") in list(doctor._facts())


def test_doctor_prints_what_the_native_module_finds(monkeypatch, native):
    monkeypatch.setenv(_ffi.DUMP_DIRECTORY_VARIABLE, "/dump")
    native.device_rows = [DEVICE]
    facts = dict(doctor._facts())
    assert facts["driver"] == "for CUDA up to 13.1"
    assert facts["  0"].startswith("a GPU, compute capability 9.0, 132 multiproc")
    assert facts["NVRTC"] == "13.0, /lib/libnvrtc.so.13"
    assert facts["kernel cache"] == f"{native.directory}: 3 kernels, 1.0 MiB"
    assert "JAX_FLASH_ATTN_DUMP_DIR=/dump" in facts["environment"]


def test_doctor_says_why_the_cache_is_off(native):
    native.reason_disabled = "not a directory"
    facts = dict(doctor._facts())
    assert facts["kernel cache"] == f"off: {native.directory}: not a directory"


@pytest.mark.parametrize("option", [False, True])
def test_doctor_says_what_the_cache_of_jax_misses(monkeypatch, tmp_path, option):
    name = "jax_remove_custom_partitioning_ptr_from_cache_key"
    options = ("jax_compilation_cache_dir", name)
    before = {key: getattr(jax.config, key) for key in options}
    assert dict(doctor._facts())["JAX's cache"].startswith("off")
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        jax.config.update(name, option)
        said = dict(doctor._facts())["JAX's cache"]
    finally:
        for key, value in before.items():
            jax.config.update(key, value)
    assert said.startswith(str(tmp_path))
    assert (f"{name.upper()}=1" in said) == (not option)


def test_doctor_notices_a_gpu_that_jax_does_not_use(monkeypatch, native):
    native.device_rows = [DEVICE]
    monkeypatch.setattr(doctor._support, "on_gpu", lambda: False)
    assert "jax[cuda13]" in dict(doctor._facts())["note"]


def test_compile_counts_what_it_compiles_and_finds(capsys, native):
    assert compile_() == 0
    assert "2 compiled, 0 already there, 0 failed" in capsys.readouterr().out
    assert compile_("--forward-only") == 0
    assert "0 compiled, 1 already there, 0 failed" in capsys.readouterr().out


def test_compile_covers_short_lengths_where_they_have_tiles_of_their_own(
    capsys, native
):
    assert compile_("--causal", "--forward-only") == 0
    assert "3 compiled, 0 already there, 0 failed" in capsys.readouterr().out


def test_compile_covers_every_combination_of_features(native):
    assert compile_("--causal", "--dropout", "--forward-only") == 0
    features = {
        (dict(spec)["window_right"], dict(spec)["dropout_p"] > 0)
        for spec in native.specs
    }
    assert features == {(-1, False), (0, False), (-1, True), (0, True)}


@pytest.mark.parametrize(
    ("head_dim", "families"),
    [
        (64, {"split", "head", "128x128"}),
        (128, {"split", "64x128"}),
        (160, {"split", "cluster"}),
        (256, {"split", "cluster"}),
    ],
)
def test_compile_covers_few_and_many_heads(head_dim, families):
    """Of lengths, too: the fused form is named by its tiles."""
    features = dict.fromkeys(compile_command._FEATURES, False)
    asked = argparse.Namespace(
        architecture=["sm_90"],
        head_dim=[head_dim],
        dtype=None,
        forward_only=False,
        **features,
    )
    found = set()
    for job in compile_command._jobs(asked):
        if job.operation == "backward":
            target = (_ffi.attributes(job.spec), job.dtype, head_dim, "sm_90")
            tiles = _ffi.native.tiles("backward", *target, **dict(job.sizes))
            found.add(tiles.split()[1].rstrip(","))
    assert found == families


def test_compile_takes_the_architectures_of_the_devices(capsys, native):
    native.device_rows = [DEVICE, {**DEVICE, "architecture": "sm_120"}]
    assert cli.main(["compile", "--head-dim=64", "--forward-only"]) == 0
    assert {path.name.split("-")[0] for path in native.directory.iterdir()} == {
        "sm_90",
        "sm_120",
    }


def test_compile_asks_for_an_architecture_without_a_device(capsys, native):
    assert cli.main(["compile"]) == 1
    assert "--architecture must name" in capsys.readouterr().err


def test_compile_fails_with_the_compilers_text(capsys, native):
    native.failing_head_dim = 72
    assert compile_("--head-dim=72", "--forward-only") == 1
    captured = capsys.readouterr()
    assert "D=72 bfloat16: the compiler gave up" in captured.err
    assert "1 compiled, 0 already there, 1 failed" in captured.out


def test_compile_fails_where_kernels_cannot_be_written(capsys, native):
    native.can_write = False
    assert compile_() == 1
    assert "Only 0 of 2 compiled kernels" in capsys.readouterr().err


def test_compile_refuses_a_disabled_cache(capsys, native):
    native.reason_disabled = "switched off"
    assert compile_() == 1
    assert "is switched off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("--head-dim=300", "head dims from 1 to 256"),
        ("--architecture=90", "sm_80"),
        ("--architecture=sm_90a", "got 'sm_90a'"),
        ("--architecture=sm_900", "got 'sm_900'"),
    ],
)
def test_compile_refuses_wrong_arguments(capsys, native, argument, text):
    assert compile_(argument) == 2
    assert text in capsys.readouterr().err


def test_compile_fills_a_real_cache(tmp_path):
    command = [sys.executable, "-m", "jax_flash_attn", "compile", "--forward-only"]
    command += ["--architecture=sm_80", "--head-dim=32"]
    environment = {
        **os.environ,
        _ffi.CACHE_DIRECTORY_VARIABLE: str(tmp_path / "cache"),
        _ffi.DUMP_DIRECTORY_VARIABLE: "",
    }
    printed = [
        subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert "1 compiled, 0 already there, 0 failed" in printed[0]
    assert "0 compiled, 1 already there, 0 failed" in printed[1]


def test_progress_is_plain_lines_without_tqdm(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    bar = progress.start(2, "compile")
    bar.set_postfix_str("sm_90")
    bar.update()
    bar.update()
    bar.close()
    assert capsys.readouterr().out == "compile 1/2 sm_90\ncompile 2/2 sm_90\n"


def test_bench_hands_its_arguments_to_the_harness(capsys, monkeypatch):
    monkeypatch.setattr(bench, "checkout", lambda: ROOT)
    assert cli.main(["bench", "--list"]) == 0
    assert "d128_causal" in capsys.readouterr().out


def test_bench_says_where_the_harness_is(capsys, monkeypatch):
    monkeypatch.setattr(bench, "checkout", lambda: None)
    assert cli.main(["bench", "--list"]) == 1
    assert "checkout" in capsys.readouterr().err


def test_benchmarks_of_another_package_are_left_alone(monkeypatch, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "run.py").touch()
    package = tmp_path / "jax_flash_attn" / "__init__.py"
    monkeypatch.setattr(jax_flash_attn, "__file__", str(package))
    assert bench.checkout() is None


@pytest.mark.parametrize("arguments", [[], ["doctor", "--fast"], ["sing"]])
def test_wrong_arguments_end_with_status_2(arguments):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("doctor", "compile", "bench"))
