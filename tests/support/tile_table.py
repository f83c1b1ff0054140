"""The rows of csrc/launchers/sm80_tiles.cc, read from its text."""

import dataclasses
import re
from pathlib import Path

_TABLE = Path(__file__).resolve().parents[2] / "csrc" / "launchers" / "sm80_tiles.cc"
_ARRAYS = {"forward": "kForward", "backward": "kBackward"}
_ROW = re.compile(r"\{(\w+), Chips::\w+, Features::(\w+), \{([\d, ]+)\}\}")
_ANY_HEAD_DIM = 256


@dataclasses.dataclass(frozen=True)
class Row:
    """One choice of tiles: the largest head dim and the features that it serves."""

    operation: str
    max_head_dim: int
    serves_features: bool
    numbers: tuple[int, ...]

    def __str__(self) -> str:
        kind = "any" if self.serves_features else "plain"
        return f"{self.operation}_{self.max_head_dim}_{kind}_{self.text}"

    @property
    def text(self) -> str:
        """The tiles as `testing.override_tiles` takes them."""
        return ",".join(map(str, self.numbers))


def rows():
    """Returns every row of the table, in order."""
    table = _TABLE.read_text()
    found = []
    for operation, array in _ARRAYS.items():
        (body,) = re.findall(rf"> {array}\[\] = \{{(.*?)\n\}};", table, re.DOTALL)
        for head_dim, features, numbers in _ROW.findall(body):
            found.append(
                Row(
                    operation,
                    _ANY_HEAD_DIM if head_dim == "kAnyHeadDim" else int(head_dim),
                    features == "kAny",
                    tuple(map(int, numbers.split(","))),
                )
            )
        assert len(_ROW.findall(body)) == body.count("Features::")
    return tuple(found)
