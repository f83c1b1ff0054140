"""The rows of the tile tables, read from the text of csrc/launchers/*_tiles.cc."""

import dataclasses
import re
from pathlib import Path

LAUNCHERS = Path(__file__).resolve().parents[2] / "csrc" / "launchers"
_ARRAYS = {
    "kForward": ("forward", ""),
    "kBackward": ("backward", ""),
    "kSplitBackward": ("backward", "split"),
    "kHeadBackward": ("backward", "head"),
    "kClusterBackward": ("backward", "cluster"),
}
"""The operation of a table, and what follows its family's name in an override."""
_ARRAY = re.compile(r"constexpr Row\S* (\w+)\[\] = \{(.*?)\n\};", re.DOTALL)
_ROW = re.compile(
    r"\{(?P<head_dim>\w+), (?:Chips::\w+, )?Features::(?P<features>\w+), "
    r"\{(?P<numbers>[\d, ]+)\}(?:, (?P<max_seqlen_q>\d+))?\}"
)
_ANY_HEAD_DIM = 256


@dataclasses.dataclass(frozen=True)
class Row:
    """One choice of tiles: the largest head dim and the features that it serves."""

    family: str
    operation: str
    max_head_dim: int
    features: str
    numbers: tuple[int, ...]
    max_seqlen_q: int | None

    def __str__(self) -> str:
        parts = (self.operation, self.max_head_dim, self.features, self.text)
        limit = f"_{self.max_seqlen_q}" if self.max_seqlen_q else ""
        return "_".join(map(str, parts)) + limit

    @property
    def text(self) -> str:
        """The tiles as `testing.override_tiles` takes them."""
        return f"{self.family}:{','.join(map(str, self.numbers))}"

    @property
    def described(self) -> tuple[str, ...]:
        """What `explain` says of the tiles, in parts."""
        tiles = "{}x{},".format(*self.numbers[:2])
        if self.family == "sm90split":
            dq_tiles = "dq {}x{},".format(*self.numbers[4:6])
            return f"sm90 split, dk and dv {tiles}", dq_tiles
        if self.family == "sm90head":
            return (f"sm90 head, {tiles}", f"{self.numbers[4]} query tiles")
        if self.family == "sm90cluster":
            return (f"sm90 cluster, {tiles}",)
        return (f"{self.family} {tiles}",)

    @property
    def serves_masks(self) -> bool:
        """Whether the row is for calls with a mask."""
        return self.features != "kFull"

    @property
    def serves_alibi(self) -> bool:
        """Whether the row is for ALiBi, too."""
        return self.features in ("kMasked", "kNoDropout", "kNoSoftcap", "kAny")

    @property
    def serves_dropout(self) -> bool:
        """Whether the row is for dropout, too."""
        return self.features in ("kMasked", "kNoSoftcap", "kAny")

    @property
    def serves_softcap(self) -> bool:
        """Whether the row is for softcap, too."""
        return self.features in ("kMasked", "kNoDropout", "kAny")

    @property
    def serves_features(self) -> bool:
        """Whether the row is for all of them at a time."""
        return self.features in ("kMasked", "kAny")


def _rows_of(family):
    table = (LAUNCHERS / f"{family}_tiles.cc").read_text()
    for array, body in _ARRAY.findall(table):
        found = [match.groupdict() for match in _ROW.finditer(body)]
        assert len(found) == body.count("Features::") > 0
        for row in found:
            any_head_dim = row["head_dim"] == "kAnyHeadDim"
            operation, suffix = _ARRAYS[array]
            yield Row(
                family + suffix,
                operation,
                _ANY_HEAD_DIM if any_head_dim else int(row["head_dim"]),
                row["features"],
                tuple(map(int, row["numbers"].split(","))),
                int(row["max_seqlen_q"]) if row["max_seqlen_q"] else None,
            )


def rows():
    """Returns every row of every table, in order."""
    return (*_rows_of("sm80"), *_rows_of("sm90"))
