"""A feature that is switched off costs nothing: its code is not in the kernel."""

import importlib.resources
import re
import shutil
from pathlib import Path

import pytest

from tests.support.native_child import finish, start

KERNELS = str(importlib.resources.files("jax_flash_attn.kernels"))
GUARD = re.compile(r"if constexpr \(Config::k(Softcap|Alibi|Dropout)\)")


def end_of_statement(text, position):
    """The index behind the statement at a position, a block or up to its semicolon."""
    depth = 0
    for i in range(position, len(text)):
        depth += {"(": 1, "{": 1, ")": -1, "}": -1}.get(text[i], 0)
        if depth == 0 and text[i] in "};":
            return i + 1
    raise AssertionError("the file ends within a statement")


def without_features(text):
    """A kernel file without the statements that a feature guards."""
    while guard := GUARD.search(text):
        end = end_of_statement(text, guard.end())
        assert not text[end:].lstrip().startswith("else")
        text = text[: guard.start()] + ";" + text[end:]
    return text


@pytest.fixture(scope="module")
def stripped(tmp_path_factory):
    """A copy of the kernels without the code of the features."""
    removed = 0
    folder = tmp_path_factory.mktemp("kernels") / "stripped"
    for path in Path(shutil.copytree(KERNELS, folder)).rglob("*.cuh"):
        text = path.read_text()
        removed += len(GUARD.findall(text))
        path.write_text(without_features(text))
    assert removed
    return str(folder)


def digests(stripped, operation, **options):
    """What each kernel compiles to, as it is and without the features' code."""
    children = [
        start("", (operation,), head_dim=128, options=options, kernel_directory=folder)
        for folder in (KERNELS, stripped)
    ]
    answers = [finish(child) for child in children]
    assert [answer.error for answer in answers] == ["", ""]
    return [{k: v["digest"] for k, v in a.kernels.items()} for a in answers]


@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_a_build_without_the_code_is_the_same(operation, stripped):
    whole, without = digests(stripped, operation)
    assert whole == without


def test_a_feature_in_use_needs_its_code(stripped):
    whole, without = digests(stripped, "forward", softcap=30.0)
    assert whole != without
