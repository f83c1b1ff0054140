"""The Python snippets of a page run in order, as one program."""

import re
import warnings
from pathlib import Path

import jax
import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["sharding"])
def test_snippets_run(page):
    snippets = SNIPPET.findall((DOCS / f"{page}.md").read_text())
    assert snippets
    names = {}
    with jax.default_device(jax.devices("cpu")[0]), warnings.catch_warnings():
        warnings.simplefilter("error")
        for snippet in snippets:
            exec(compile(snippet, f"{page}.md", "exec"), names)
