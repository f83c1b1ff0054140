"""Programs in fresh processes: what depends on the environment or on a first use."""

import json
import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]

_PREAMBLE = """
import json, sys, warnings
sys.path.append({root!r})
warnings.simplefilter("always")
caught = warnings.catch_warnings(record=True)
caught_warnings = caught.__enter__()
answer = {{}}
"""

_END = """
answer["warnings"] = [str(w.message) for w in caught_warnings]
json.dump(answer, sys.stdout)
"""


def run(program, **environment):
    """Runs a program that fills the dict `answer`, and returns it.

    Args:
        program: Python source.
        **environment: variables to set, or to unset where None.

    Returns:
        answer, with the text of every Python warning under "warnings".
    """
    # The parent holds most of the device's memory.
    variables = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    for name, value in environment.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = str(value)
    source = _PREAMBLE.format(root=str(_ROOT)) + program + _END
    child = subprocess.run(
        [sys.executable, "-c", source],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)
