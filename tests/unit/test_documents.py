"""The Python snippets of a page run in order, as one program."""

import re
import warnings
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ("index", "jax_users", "sharding", "torch_users", "tuning")
PAGES = ("README", *(f"docs/{name}" for name in GUIDES))
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_page_with_snippets_is_run():
    found = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
    with_snippets = {p for p in found if SNIPPET.search(p.read_text())}
    assert with_snippets == {ROOT / f"{page}.md" for page in PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page):
    snippets = SNIPPET.findall((ROOT / f"{page}.md").read_text())
    assert snippets
    names = {}
    with jax.default_device(jax.devices("cpu")[0]), warnings.catch_warnings():
        warnings.simplefilter("error")
        for snippet in snippets:
            exec(compile(snippet, f"{page}.md", "exec"), names)
