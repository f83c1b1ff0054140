"""The benchmark's arithmetic and its files; nothing here is timed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import (
    arrays,
    correctness,
    dispatch,
    report,
    results,
    run,
    scaling,
    timing,
    workloads,
)
from benchmarks.contenders import contenders
from benchmarks.modes import RESULTS
from benchmarks.roof import Roof
from benchmarks.workloads import UNBOUNDED, Workload

TINY = Workload("tiny", 2, 24, 4, 2, 8)


def test_forward_flops_are_two_products_of_two_flops_per_pair():
    expected = 2 * 2 * TINY.batch * TINY.heads * TINY.seqlen**2 * TINY.head_dim
    assert workloads.flops(TINY, "fwd") == expected


def test_causal_halves_the_flops():
    causal = dataclasses.replace(TINY, causal=True)
    for mode in workloads.MODES:
        assert 2 * workloads.flops(causal, mode) == workloads.flops(TINY, mode)


def test_backward_takes_two_and_a_half_forwards():
    forward = workloads.flops(TINY, "fwd")
    assert workloads.flops(TINY, "bwd") == 2.5 * forward
    assert workloads.flops(TINY, "both") == 3.5 * forward


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(5, -1), (-1, 3), (5, 3), (0, 0), (100, 100)])
def test_windows_count_their_visible_pairs(causal, window):
    workload = dataclasses.replace(TINY, causal=causal, window=window)
    left, right = (TINY.seqlen if side < 0 else side for side in workload.visible)
    offset = np.arange(TINY.seqlen) - np.arange(TINY.seqlen)[:, None]
    visible = (offset >= -left) & (offset <= right)
    assert workloads.score_pairs(workload) == visible.sum()


def test_least_bytes_count_each_array_once():
    operands = arrays.make(TINY)
    q, k, v, dout = (x.nbytes for x in operands.every)
    lse = 4 * TINY.batch * TINY.heads * TINY.seqlen
    forward = q + k + v + dout + lse  # out is as large as dout
    backward = 2 * (q + k + v) + 2 * dout + lse
    assert workloads.least_bytes(TINY, "fwd") == forward
    assert workloads.least_bytes(TINY, "bwd") == backward
    assert workloads.least_bytes(TINY, "both") == forward + backward


def test_roof_is_the_slower_of_compute_and_memory():
    flops = workloads.flops(TINY, "fwd")
    num_bytes = workloads.least_bytes(TINY, "fwd")
    assert Roof(flops, 10 * num_bytes).seconds(TINY, "fwd") == 1.0
    assert Roof(10 * flops, num_bytes).seconds(TINY, "fwd") == 1.0


def test_grid_keeps_tokens_and_width():
    grid = workloads.select(r"^d(64|128|256)_(full|causal)_s\d+$")
    assert len(grid) == 36
    assert {w.batch * w.seqlen for w in grid} == {workloads.GRID_TOKENS}
    assert {w.heads * w.head_dim for w in grid} == {workloads.GRID_WIDTH}


def test_every_workload_has_a_name_of_its_own_and_a_source():
    names = [workload.name for workload in workloads.WORKLOADS]
    assert len(set(names)) == len(names)
    assert all(workload.source for workload in workloads.WORKLOADS)


def test_smoke_workloads_run_only_when_named():
    assert not any(w.name.startswith("smoke") for w in workloads.select(None))
    assert len(workloads.select("^smoke_")) == 3
    with pytest.raises(ValueError, match="nothing_like_it"):
        workloads.select("nothing_like_it")


@pytest.mark.parametrize(
    ("name", "fields", "lacks"),
    [
        ("jax-xla", {"dropout_p": 0.1}, "dropout"),
        ("jax-cudnn", {"softcap": 30.0}, "softcap"),
        ("fa4-jax", {"alibi": True}, "alibi"),
        ("torch-flash", {"window": (8, -1)}, "window"),
        ("flash-attn3-jax", {}, "head_dim 8"),
    ],
)
def test_contenders_say_what_they_lack(name, fields, lacks):
    workload = dataclasses.replace(TINY, **fields)
    assert lacks in contenders()[name].supports(workload, "fwd")


def test_ours_takes_every_workload():
    ours = contenders()["ours"]
    for workload in workloads.WORKLOADS:
        assert ours.supports(workload, "both") is None


def test_summary_is_the_median_and_the_spread():
    class Sampler:
        trips = 7

        def sample(self):
            return 0.0

    summary = timing.summarise(list(range(1, 12)), Sampler())
    assert summary == timing.Summary(6.0, (10 - 2) / 6, 11, 7)


def test_trips_fill_a_sample():
    assert timing.trips_for(1e-4, 0.03) == 300
    assert timing.trips_for(10.0, 0.03) == 2


def test_a_sample_leaves_out_what_a_run_costs_once(monkeypatch):
    """And nothing for each call: the GPU does not wait for the loop around it."""
    monkeypatch.setattr(timing, "empty_run_seconds", lambda *_: 0.25)
    monkeypatch.setattr(timing, "_seconds", lambda *_: 2.25)
    sampler = timing.JaxSampler(
        jnp.cos, jnp.zeros((2, 2)), (), guess=0.5, sample_seconds=2.0
    )
    assert sampler.trips == 4
    assert sampler.sample() == 2.0 / 4


def test_loop_chains_its_steps():
    first, rest = jnp.zeros((4, 3)), jnp.full((2,), 0.25)
    stepped = timing.loop(lambda first, rest: first[:1, :1] + rest, 3)(first, rest)
    expected = np.zeros((4, 3))
    expected[0, 0] = 0.75
    np.testing.assert_array_equal(stepped, expected)


def test_oracle_takes_the_exact_result_and_refuses_a_wrong_one():
    operands = arrays.make(TINY)
    shapes = (TINY.q_shape, TINY.q_shape, TINY.k_shape, TINY.k_shape)
    oracle = correctness.Oracle(TINY, operands)
    exact = {
        name: jnp.zeros(shape).at[-1:, :, -x.shape[2] :].set(x).astype(arrays.DTYPE)
        for name, shape, x in zip(RESULTS, shapes, oracle.exact.values(), strict=True)
    }
    assert oracle.judge(exact).status == "ok"
    verdict = oracle.judge({**exact, "dk": exact["dk"] * 1.1})
    assert verdict.status == "wrong"
    assert "dk" in verdict.reason
    assert oracle.judge({"out": exact["out"] * jnp.nan}).status == "wrong"


def test_what_is_not_compared_says_so(monkeypatch):
    operands = arrays.make(TINY)
    wrong = {"out": jnp.zeros(TINY.q_shape, arrays.DTYPE)}
    monkeypatch.setattr(correctness, "results", lambda *_: wrong)
    ours = contenders()["ours"]
    compared = correctness.Checker(TINY, operands).verdict(ours, "fwd")
    assert compared.status == "wrong"
    verdict = correctness.Checker(TINY, None).verdict(ours, "fwd")
    assert (verdict.status, verdict.reason) == ("ok", "unchecked")


def _cell_line(run_id, contender, tflops, name="gpt2", **fields):
    workload = next(w for w in workloads.WORKLOADS if w.name == name)
    figures = {}
    if tflops:
        roof = {"roof_tflops": 100.0, "roof_fraction": tflops / 100}
        figures = {"tflops": tflops, **roof}
    return {
        "kind": "cell",
        "run": run_id,
        "workload": dataclasses.asdict(workload),
        "mode": "fwd",
        "contender": contender,
        "status": "ok",
        "spread": 0.015,
        **figures,
        **fields,
    }


def _write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_report_reads_back_what_a_run_writes(tmp_path):
    refusal = {"status": "unsupported", "reason": "has no luck"}
    path = _write(
        tmp_path / "run.jsonl",
        [
            _cell_line("a", "jax-cudnn", 40.0),
            _cell_line("a", "ours", 80.0),
            _cell_line("a", "tokamax", None, **refusal),
            _cell_line("a", "ours", 50.5, name="bert_large"),
            _cell_line("a", "jax-cudnn", 50.0, name="bert_large"),
        ],
    )
    rows = results.read_rows(path)
    assert list(rows) == [("bert_large", "fwd"), ("gpt2", "fwd")]
    assert rows["gpt2", "fwd"]["ours"].workload.window == UNBOUNDED
    lines = report.table(rows, "fwd", "jax-cudnn").splitlines()
    assert lines[0] == "| workload | roof | ours | jax-cudnn | ours / jax-cudnn |"
    assert lines[2] == "| bert_large | 100 | 50.5 (50%) | 50 (50%) | 1.010 level |"
    assert lines[3] == "| gpt2 | 100 | 80 (80%) | 40 (40%) | 2.000 |"
    assert "tokamax: unsupported: has no luck (gpt2 fwd)" in report.refusals(rows)
    assert report.table(rows, "bwd") == ""


def test_report_never_mixes_two_runs_in_a_row(tmp_path):
    path = _write(
        tmp_path / "run.jsonl",
        [
            _cell_line("a", "ours", 80.0),
            _cell_line("a", "jax-cudnn", 40.0),
            _cell_line("b", "ours", 90.0),
        ],
    )
    (row,) = results.read_rows(path).values()
    assert list(row) == ["ours"]
    assert row["ours"].tflops == 90.0


def test_comparison_gives_the_ratio_of_speeds(tmp_path):
    before = _write(tmp_path / "before.jsonl", [_cell_line("a", "ours", 40.0)])
    after = _write(tmp_path / "after.jsonl", [_cell_line("b", "ours", 50.0)])
    rows, earlier = results.read_rows(after), results.read_rows(before)
    (line,) = report.comparison(rows, earlier).splitlines()[2:]
    assert line == "| gpt2 | fwd | ours | 40 (40%) | 50 (50%) | 1.250 | 1.250 |"


def test_plots_are_written(tmp_path):
    from benchmarks import plot

    path = _write(
        tmp_path / "run.jsonl",
        [
            _cell_line("a", "ours", 80.0),
            _cell_line("a", "ours", 50.0, name="d64_full_s512"),
            _cell_line("a", "ours", 60.0, name="d64_full_s1024"),
        ],
    )
    written = plot.save(results.read_rows(path), tmp_path / "speed.png")
    names = [file.name for file in written]
    assert names == ["speed_fwd.png", "speed_fwd_other.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written)


@pytest.mark.parametrize(
    "argv", [["--filter=^$"], ["--modes=sideways"], ["--contenders=nobody"]]
)
def test_wrong_arguments_are_refused_before_anything_runs(argv, tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    assert run.main([*argv, f"--out={out}"]) == 2
    assert capsys.readouterr().err
    assert not out.exists()


def test_dispatch_writes_the_medians_of_both(tmp_path, capsys):
    out = tmp_path / "dispatch.jsonl"
    assert dispatch.main(["--calls=20", "--quiet", f"--out={out}"]) == 0
    header, line = results.read_lines(out)
    assert header["command"][:3] == ["python", "-m", "benchmarks.dispatch"]
    assert (line["kind"], line["run"]) == ("dispatch", header["run"])
    assert line["calls"] == 20
    assert line["ours_us"] > 0
    assert line["empty_us"] > 0
    assert line["ratio"] == pytest.approx(line["ours_us"] / line["empty_us"])
    assert "difference" in capsys.readouterr().out


def test_dispatch_takes_turns_and_leaves_waiting_out():
    order, now = [], [0]

    class Result:
        def block_until_ready(self):
            now[0] += 1_000_000

    def call(name, nanoseconds):
        def run(x):
            order.append(name)
            now[0] += nanoseconds
            return Result()

        return run

    calls = {"ours": call("ours", 3000), "empty": call("empty", 2000)}
    taken = dispatch.sample(calls, [0], 4, clock=lambda: now[0], quiet=True)
    assert order[-8:] == ["ours", "empty"] * 4
    taken |= dispatch.sample_queued(calls, [0], clock=lambda: now[0])
    # Of 500 calls in a row one is waited for, which takes 1,000 us.
    expected = {
        "ours_us": 3.0,
        "empty_us": 2.0,
        "ours_ready_us": 1003.0,
        "empty_ready_us": 1002.0,
        "ours_queued_us": 5.0,
        "empty_queued_us": 4.0,
        "difference_us": 1.0,
        "ratio": 1.5,
    }
    summary = dispatch.summarise(taken)
    assert {name: summary[name] for name in expected} == expected
    assert {summary[name] for name in summary.keys() - expected.keys()} == {0.0}


def test_dispatch_refuses_no_calls(tmp_path, capsys):
    out = tmp_path / "dispatch.jsonl"
    assert dispatch.main(["--calls=0", f"--out={out}"]) == 2
    assert "--calls takes 1 or more, got 0" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("split", "count", "grid"),
    [
        ("batch", 8, (8, 1)),
        ("heads", 8, (1, 8)),
        ("both", 8, (4, 2)),
        ("both", 4, (2, 2)),
        ("both", 3, (3, 1)),
    ],
)
def test_scaling_splits_all_devices(split, count, grid):
    assert scaling.grid_of(split, count) == grid


def test_scaling_gives_ratios_to_what_each_device_does_alone(monkeypatch):
    """Each device has one device's work, so equal times are a ratio of 1."""
    seconds = iter([2.0, 2.0, 4.0, 2.0, 2.0, 4.0])
    given = []

    class Sampler:
        trips = 7

        def __init__(self, *unused, **timed):
            given.append(timed["trips"])
            self._seconds = next(seconds)

        def sample(self):
            return self._seconds

    monkeypatch.setattr(scaling, "sampler", Sampler)
    devices = jax.devices("cpu")
    meshes = {str(n): scaling.make_mesh(devices[n:], (1, 1)) for n in range(4)}
    meshes |= {"batch": scaling.make_mesh(devices, (4, 1))}
    meshes |= {"both": scaling.make_mesh(devices, (2, 2))}
    lines = scaling.measure(TINY, "fwd", meshes, "jit", 2, 0.01)
    assert given == [None, 7, 7, 7, 7, 7]
    assert [line["devices"] for line in lines] == [1, 1, 1, 1, 4, 4]
    work = workloads.flops(TINY, "fwd") / 1e12
    rates = pytest.approx([work / 2, work / 2, work / 4, work / 2, 2 * work, work])
    assert [line["tflops"] for line in lines] == rates
    # Alone they do 7 / 4 of the work per second, the slowest 1 / 4.
    expected = pytest.approx([1, 1, 1, 1, 8 / 7, 4 / 7])
    assert [line["ratio"] for line in lines] == expected
    expected = pytest.approx([1, 1, 1, 1, 2, 1])
    assert [line["ratio_to_slowest"] for line in lines] == expected
    assert "| 0.571 | 1.000 |" in scaling.table(lines)


@pytest.mark.parametrize("way", scaling.WAYS)
@pytest.mark.parametrize("mode", scaling.MODES)
def test_scaling_loops_on_every_device_without_communication(mode, way):
    attend = contenders()["ours"].build(TINY)
    mesh = scaling.make_mesh(jax.devices("cpu"), (2, 2))
    found = scaling.sampler(attend, TINY, mode, mesh, way, sample_seconds=1e-3)
    assert found.sample() > 0
    assert scaling.communication(found.program) == set()
    assert "while(" in found.program.as_text()


def test_scaling_measures_each_device_alone_first():
    whole = dataclasses.replace(TINY, heads=8, heads_k=8)
    meshes = scaling._meshes([2, 4], whole)
    assert [mesh.devices.shape for mesh in meshes.values()] == [
        *[(1, 1)] * 4,
        (2, 1),
        (1, 2),
        (4, 1),
        (1, 4),
        (2, 2),
    ]
    alone = [mesh.devices.item() for mesh in list(meshes.values())[:4]]
    assert alone == jax.devices()[:4]


def test_scaling_stops_where_a_program_communicates():
    def attend(q, k, v):
        return q - q.astype(jnp.float32).mean().astype(q.dtype)

    mesh = scaling.make_mesh(jax.devices("cpu"), (2, 2))
    with pytest.raises(RuntimeError, match="all-reduce"):
        scaling.sampler(attend, TINY, "fwd", mesh, "jit", trips=2)


def test_scaling_refuses_devices_that_are_not_there(capsys, tmp_path):
    out = tmp_path / "scaling.jsonl"
    assert scaling.main(["--devices=99", f"--out={out}"]) == 2
    assert "got 99" in capsys.readouterr().err
    assert not out.exists()


def test_loop_over_a_mesh_feeds_each_part():
    mesh = scaling.make_mesh(jax.devices("cpu"), (2, 2))
    sharding = NamedSharding(mesh, PartitionSpec("batch", "heads"))
    first = jax.device_put(jnp.zeros((4, 6)), sharding)
    stepped = timing.loop(lambda first: first + 0.25, 3, sharding)(first)
    expected = np.zeros((4, 6))
    expected[::2, ::3] = 0.75
    np.testing.assert_array_equal(stepped, expected)
    assert stepped.sharding == sharding


def test_mesh_sampler_settles_its_calls():
    mesh = scaling.make_mesh(jax.devices("cpu"), (1, 1))
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    first = jax.device_put(jnp.zeros((2, 2)), sharding)
    settled = timing.MeshSampler(jnp.cos, [first], sample_seconds=1e-4)
    assert settled.trips >= 2
    assert timing.MeshSampler(jnp.cos, [first], trips=5).trips == 5
    assert settled.sample() > 0
