"""The tuner's choice of candidates and of a winner."""

import itertools

import pytest

from benchmarks import tune
from tests.support import tile_table

ROWS = [row for row in tile_table.rows() if row.family != "sm80"]


def table_of(row):
    """What the tuner calls the table of a row."""
    part = row.family.removeprefix("sm90")
    return f"{part}_{row.operation}" if part else row.operation


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_candidates_hold_every_row_of_the_table(row):
    tiles = tune.TILES[table_of(row)](*row.numbers)
    assert tiles in set(tune.CANDIDATES[table_of(row)](row.max_head_dim))
    assert tiles.text == row.text


@pytest.mark.parametrize(
    ("operation", "head_dim"),
    [
        *itertools.product(["forward", "backward", "split_backward"], [64, 96, 128]),
        *itertools.product(["forward", "split_backward"], [192, 256]),
        ("head_backward", 64),
        ("cluster_backward", 192),
    ],
)
def test_candidates_are_few_enough_to_try(operation, head_dim):
    found = list(tune.CANDIDATES[operation](head_dim))
    if operation == "backward" and head_dim > 64:
        assert len(found) == 1  # the table's row: shared memory holds no other
    else:
        assert 2 < len(found) < 200
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("row", ROWS[:2], ids=str)
def test_a_candidate_is_a_row_of_the_table(row):
    tiles = tune.TILES[row.operation](*row.numbers)
    text = tune.table_row(row.max_head_dim, row.features, tiles, row.max_seqlen_q)
    table = (tile_table.LAUNCHERS / "sm90_tiles.cc").read_text()
    assert text in table.splitlines()
    assert tiles.text == row.text


def test_the_winner_is_fastest_over_all_lengths():
    even, odd = list(tune.forward_candidates(64))[:2]
    assert tune.winner({even: [100.0, 100.0], odd: [190.0, 50.0]}) == even


def test_head_dims_without_candidates(capsys):
    assert tune.main(["--operation", "backward", "--head-dim", "256"]) == 1
    assert "No backward tiles fit 256" in capsys.readouterr().err


def test_without_a_gpu(capsys):
    assert tune.main([]) == 1
    assert "compute capability 9.0" in capsys.readouterr().err
