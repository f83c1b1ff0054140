"""A fresh process that has the native module alone: it starts without importing JAX."""

import dataclasses
import importlib.resources
import json
import subprocess
import sys

from jax_flash_attn import _ffi, _spec, _version

_CHILD = """
import hashlib, importlib.util, json, sys
given = json.load(sys.stdin)
spec = importlib.util.spec_from_file_location("jax_flash_attn._native", given["path"])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
native.configure(**given["settings"])
answer = {}
try:
    for operation in given["operations"]:
        for kernel in native.compile(operation, *given["request"]):
            cubin = kernel.pop("cubin")
            kernel["digest"] = hashlib.sha256(cubin).hexdigest()
            answer[kernel["entry"]] = kernel
except RuntimeError as error:
    answer["error"] = str(error)
answer["cache"] = native.cache()
json.dump(answer, sys.stdout)
"""


def start(
    cache_directory, operations=("forward",), head_dim=64, options=None, **settings
):
    """Starts a process that compiles into a cache directory; see `finish`.

    `options` are fields of the spec, `settings` those of the native module.
    """
    spec = _ffi.attributes(_spec.AttentionSpec(0.125, **(options or {})))
    given = {
        "path": _ffi.native.__file__,
        "settings": {
            "kernel_directory": str(
                importlib.resources.files("jax_flash_attn.kernels")
            ),
            "cache_directory": str(cache_directory),
            "nvrtc_path": "",
            "nvrtc_directories": _ffi.nvrtc_directories(),
            "dump_directory": "",
            "version": _version.__version__,
            **settings,
        },
        "operations": operations,
        "request": [spec, "bfloat16", head_dim, "sm_90"],
    }
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    child.stdin.write(json.dumps(given))
    child.stdin.close()
    child.stdin = None
    return child


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a child compiled, by entry, its error if any, and its view of the cache."""

    kernels: dict
    error: str
    cache: dict

    @property
    def forward(self):
        """The report on the forward kernel."""
        assert self.error == ""
        (name,) = (x for x in self.kernels if x.startswith("flash_forward"))
        return self.kernels[name]


def finish(child):
    """Waits for a started process and returns its `Answer`."""
    stdout, stderr = child.communicate(timeout=120)
    assert child.returncode == 0, stderr
    found = json.loads(stdout)
    return Answer(error=found.pop("error", ""), cache=found.pop("cache"), kernels=found)


def compile_in_child(cache_directory, **options):
    """Compiles in a fresh process; see `start` for the arguments."""
    return finish(start(cache_directory, **options))
