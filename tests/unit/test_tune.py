"""The tuner's choice of candidates and of a winner."""

import pytest

from benchmarks import tune
from tests.support import tile_table

ROWS = [row for row in tile_table.rows() if row.family == "sm90"]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_candidates_hold_every_row_of_the_table(row):
    tiles = tune.TILES[row.operation](*row.numbers)
    assert tiles in set(tune.CANDIDATES[row.operation](row.max_head_dim))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_candidates_are_few_enough_to_try(operation, head_dim):
    found = list(tune.CANDIDATES[operation](head_dim))
    assert 2 < len(found) < 200
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("row", ROWS[:2], ids=str)
def test_a_candidate_is_a_row_of_the_table(row):
    tiles = tune.TILES[row.operation](*row.numbers)
    short = row.lengths == "kShort"
    text = tune.table_row(row.max_head_dim, row.features, tiles, short=short)
    table = (tile_table.LAUNCHERS / "sm90_tiles.cc").read_text()
    assert text in table.splitlines()
    assert tiles.text == row.text


def test_the_winner_is_fastest_over_all_lengths():
    even, odd = list(tune.forward_candidates(64))[:2]
    assert tune.winner({even: [100.0, 100.0], odd: [190.0, 50.0]}) == even


def test_without_a_gpu(capsys):
    assert tune.main([]) == 1
    assert "compute capability 9.0" in capsys.readouterr().err
