"""What the compiler is asked for and can't do: one sentence with the remedy."""

import dataclasses

import pytest

from jax_flash_attn import _ffi, _spec, testing

SPEC = _ffi.attributes(_spec.AttentionSpec(0.125))


def compile_forward(dtype="bfloat16", head_dim=64, architecture="sm_90", **spec):
    return _ffi.native.compile(
        "forward", SPEC | spec, dtype, head_dim, architecture, fresh=True
    )


@pytest.mark.parametrize("architecture", ["sm_75", "compute_90", "90", ""])
def test_wrong_architecture(architecture):
    with pytest.raises(ValueError, match="architecture must be sm_80 or newer"):
        compile_forward(architecture=architecture)


def test_architecture_that_the_compiler_does_not_know():
    with pytest.raises(RuntimeError, match="does not know the architecture"):
        compile_forward(architecture="sm_999")


@pytest.mark.parametrize("head_dim", [0, -8, 20, 264])
def test_wrong_head_dim(head_dim):
    with pytest.raises(NotImplementedError, match=f"head_dim.*got {head_dim}"):
        compile_forward(head_dim=head_dim)


def test_wrong_dtype():
    with pytest.raises(ValueError, match=r"dtype must be .* got 'float32'"):
        compile_forward(dtype="float32")


def test_wrong_operation():
    with pytest.raises(ValueError, match="operation must be"):
        _ffi.native.compile("sideways", SPEC, "bfloat16", 64, "sm_90")
    with (
        pytest.raises(ValueError, match="operation must be"),
        testing.override_tiles("sideways", "sm80:64,64,4,4,2"),
    ):
        pass


@pytest.mark.parametrize(
    "tiles",
    [
        "sm70",
        "64,64,4,4,2",
        "sm80:",
        "sm80:64",
        "sm80:64,64,4,x",
        "sm80:64,64,4,4,4,4,4,4,4,4",
        "sm80:-1",
        "sm90:128,128",
    ],
)
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_wrong_tiles(operation, tiles):
    with (
        pytest.raises(ValueError, match="tiles must be"),
        testing.override_tiles(operation, tiles),
    ):
        pass


def test_every_field_of_the_spec_is_read():
    for field in dataclasses.fields(_spec.AttentionSpec):
        lacking = {name: SPEC[name] for name in SPEC if name != field.name}
        with pytest.raises(KeyError, match=field.name):
            _ffi.native.tiles("forward", lacking, "bfloat16", 64, "sm_90")


def test_nvrtc_says_which_it_is():
    found = _ffi.native.nvrtc()
    assert "libnvrtc" in found["path"]
    major, minor = map(int, found["version"].split("."))
    assert (major, minor) >= (12, 3)
