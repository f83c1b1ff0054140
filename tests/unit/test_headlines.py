"""The headline benchmarks: their data and arithmetic, and tiny runs of each command."""

import dataclasses
import importlib
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    correctness,
    headline_report,
    headlines,
    memory,
    modes,
    results,
    tasks,
    timing,
    training,
    transformer,
)
from benchmarks.contenders import contenders
from benchmarks.workloads import Workload
from tests.support import calls, closeness

P = "--dropout=0.1"
TINY = ["--tiny", "--quiet", "--rounds=1", "--sample-ms=1"]
TOKENS = {"MIN": 11, "MAX": 12, "MED": 13, "SM": 14, "]": 15}


def run(command, path, *options, plots=True):
    """Runs a command and returns its lines."""
    path = path / "run.jsonl"
    assert headlines.main([command, *TINY, f"--out={path}", *options]) == 0
    if plots:
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["kind"] == "run"
    assert lines[0]["command"][:4] == ["python", "-m", "benchmarks.headlines", command]
    return lines[1:]


def test_bert_times_a_step_with_dropout_and_one_without_attention(tmp_path, capsys):
    names = ("ours", "jax-xla-dropout", training.WITHOUT)
    lines = run("bert", tmp_path, f"--contenders=jax-xla,{','.join(names[:2])}", P)
    found = {line["contender"]: line for line in lines if line["kind"] == "step"}
    assert found["jax-xla"]["reason"] == "has no dropout"
    assert found["ours"]["loss"] == pytest.approx(
        found["jax-xla-dropout"]["loss"], rel=0.01
    )
    assert [x["contender"] for x in lines if x["kind"] == "sample"] == list(names)
    for name in names:
        assert found[name]["status"] == "ok"
        assert found[name]["steps_per_second"] == 1 / found[name]["seconds"]
        assert found[name]["planned_bytes"] > 0
    printed = capsys.readouterr().out
    assert "| bert_large | 32 | 0.1 | ours |" in printed
    assert "- jax-xla: unsupported: has no dropout" in printed


@pytest.mark.long
def test_gpt2_times_both_models(tmp_path):
    lines = run("gpt2", tmp_path, "--contenders=ours", "--unchecked")
    steps = [line for line in lines if line["kind"] == "step"]
    done = {(x["model"], x["dropout_p"]) for x in steps if x["status"] == "ok"}
    models = ("gpt2_small", "gpt2_medium")
    assert done == {(model, p) for model in models for p in (0.0, 0.1)}


def test_lra_compares_accuracies_of_one_seed(tmp_path):
    """Steps are timed as those of bert are, so not here."""
    options = ("--task=listops", "--seeds=1", "--lengths=")
    lines = run("lra", tmp_path, *options, plots=False)
    found = {x["contender"]: x for x in lines if x["kind"] == "accuracy"}
    assert found.keys() == {"ours", "jax-xla"}
    ours, exact = (found[name]["loss"] for name in ("ours", "jax-xla"))
    assert ours == pytest.approx(exact, rel=1e-4)


@pytest.mark.long
def test_lra_runs_both_tasks_unless_one_is_named(tmp_path, capsys):
    lines = run("lra", tmp_path, "--seeds=1", "--contenders=ours,jax-xla")
    for kind in ("step", "accuracy"):
        assert {x["model"] for x in lines if x["kind"] == kind} == {"text", "listops"}
    printed = capsys.readouterr().out
    assert "- listops, S=32, dropout 0: ours is " in printed
    assert "| text | jax-xla |" in printed


@pytest.mark.long
def test_curves_of_ours_and_of_exact_attention_agree(tmp_path):
    lines = run("curves", tmp_path)
    curves = headline_report.curves_of(lines)
    assert list(curves) == ["ours", "jax-xla", "jax-xla-float32"]
    assert {len(losses) for losses in curves.values()} == {6}
    assert curves["ours"][0] == pytest.approx(np.log(256), rel=0.1)
    found = {x["contender"]: x for x in lines if x["kind"] == "difference"}
    assert found.keys() == {"ours", "jax-xla-float32"}
    assert 0 <= found["ours"]["largest_relative"] < 0.01
    (settings,) = (x for x in lines if x["kind"] == "training")
    assert (settings["batch"], settings["steps"]) == (2, 6)
    assert settings["model"]["name"] == "byte_gpt"
    left_out = {x["contender"] for x in lines if x["kind"] == "left_out"}
    assert left_out == {"jax-cudnn", "dew-fa3"}


def test_memory_is_measured_by_length(tmp_path, monkeypatch):
    def here(name, seqlens, mode, heads):
        return [memory.measure(name, n, mode == "both", heads) for n in seqlens]

    monkeypatch.setattr(memory, "measure_elsewhere", here)
    lines = run("memory", tmp_path)
    planned = {(x["contender"], x["seqlen"]): x["planned_bytes"] for x in lines}
    assert planned.keys() == {(n, s) for n in ("ours", "jax-xla") for s in (64, 128)}


def test_memory_is_measured_with_fewer_key_heads():
    every, few = (memory.measure("ours", 64, True, 4, heads_k) for heads_k in (None, 2))
    assert (every["heads_k"], few["heads_k"]) == (4, 2)
    assert few["planned_bytes"] < every["planned_bytes"]  # dk and dv


def test_memory_says_why_a_process_gave_nothing(monkeypatch):
    monkeypatch.setattr(memory.sys, "executable", "false")
    lines = list(memory.measure_elsewhere("ours", (128, 64), "both"))
    assert [line["seqlen"] for line in lines] == [64, 128]
    assert {line["status"] for line in lines} == {"error"}


@pytest.mark.long
def test_memory_runs_all_lengths_in_one_process():
    lines = list(memory.measure_elsewhere("ours", (128, 64), "both", heads=1))
    assert [(line["seqlen"], line["status"]) for line in lines] == [
        (64, "ok"),
        (128, "ok"),
    ]


@pytest.mark.parametrize(
    "argv", [["--contenders=nobody"], ["--contenders=torch-flash"]]
)
def test_wrong_contenders_are_refused_before_anything_runs(argv, tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    assert headlines.main(["bert", "--tiny", *argv, f"--out={out}"]) == 2
    assert "--contenders takes ours" in capsys.readouterr().err
    assert not out.exists()


def test_full_sizes_are_refused_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(headlines, "on_gpu", lambda: False)
    out = tmp_path / "run.jsonl"
    assert headlines.main(["bert", f"--out={out}"]) == 2
    assert "--tiny" in capsys.readouterr().err


def parameters(architecture):
    params = jax.eval_shape(lambda: transformer.init(architecture, 0))
    return sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("architecture", "published"),
    [
        (headlines.BERT_LARGE, 335e6),
        (headlines.GPT2[0], 124e6),
        (headlines.GPT2[1], 355e6),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_models_have_the_published_number_of_parameters(architecture, published):
    assert parameters(architecture) == pytest.approx(published, rel=0.01)
    assert architecture.head_dim == 64


@pytest.mark.parametrize("name", ["flax", "jax-xla-dropout"])
def test_plain_contenders_compute_attention(name):
    workload = Workload("tiny", 2, 9, 2, 2, 8, causal=True)
    q, k, v = (
        jnp.asarray(np.random.default_rng(i).standard_normal(workload.q_shape), "f4")
        for i in range(3)
    )
    attend = contenders()[name].build(workload)
    naive = calls.jit(contenders()["jax-xla"].build(workload))(q, k, v)
    with jax.enable_x64(True):
        wide = (np.asarray(x, np.float64) for x in (q, k, v))
        exact = calls.jit(contenders()["jax-xla"].build(workload))(*wide)
    closeness.assert_close_to_oracle(calls.jit(attend)(q, k, v), exact, naive)


@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_is_asked_to_drop_forward_and_backward(monkeypatch, causal):
    contender = contenders()["jax-cudnn-dropout"]
    cudnn = importlib.import_module(contender.module)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
    workload = Workload("tiny", 2, 64, 2, 2, 64, causal=causal, dropout_p=0.25)
    assert contender.supports(workload, "both") is None
    step = modes.forward_and_backward(contender.build(workload))
    x = jax.ShapeDtypeStruct(workload.q_shape, jnp.bfloat16)
    lowered = jax.jit(step).trace(x, x, x, x).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    for target in ("fmhaSoftmaxDropout", "fmhaSoftmaxDropoutBackward"):
        assert f"__cudnn${target}(" in text
    assert text.count(r"\22dropout_rate\22: 0.25") == 2
    assert (r"\22mask_type\22: \22CAUSAL" in text) == causal


def test_state_sampler_runs_the_step_as_often_as_it_says():
    state = transformer.State(jnp.zeros(()), None, jnp.zeros(()), jnp.zeros(()))
    sampler = timing.StateSampler(
        lambda s, x: s._replace(params=s.params + x, loss=s.params + x),
        state,
        (jnp.float32(2),),
        sample_seconds=1e-6,
    )
    assert sampler.trips >= 2
    assert sampler._run(jnp.int32(5), state, jnp.float32(2)) == 10


def tokens(text):
    words = text.replace("[", "").replace("]", " ]").split()
    return [TOKENS[word] if word in TOKENS else int(word) + 1 for word in words]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MAX 2 9 [MIN 4 7] 0]", 9),
        ("[MIN 5 [SM 9 9 9] 8]", 5),
        ("[SM 9 [MED 1 8 3] 9]", 1),
        ("[MED 1 2]", 1),
    ],
)
def test_listops_are_evaluated(text, value):
    assert tasks.evaluate(tokens(text)) == value


def test_listops_that_are_not_closed_are_refused():
    with pytest.raises(ValueError, match="not closed"):
        tasks.evaluate(tokens("[MAX 2 9"))


def test_listops_follow_the_grammar():
    source = random.Random(0)
    made = [tasks.expression(source, 200) for _ in range(200)]
    kept = [expression for expression in made if expression]
    assert 50 < len(kept) < 200
    assert max(map(len, kept)) <= 200
    assert {tasks.evaluate(expression) for expression in kept} == set(range(10))
    deepest = 0
    for expression in kept:
        opened = [11 <= token < 15 for token in expression]
        closed = [token == tasks.CLOSE for token in expression]
        assert sum(opened) == sum(closed)
        deepest = max(deepest, *(np.cumsum(opened) - np.cumsum(closed)))
    # An expression's digits are the tenth level.
    assert deepest == 9


def test_listops_have_the_lengths_of_the_arena():
    assert headlines._LISTOPS.seqlen == 2048
    task = tasks.listops_task(2048, 30, 10)
    rows = [*task.training.tokens, *task.held_out.tokens]
    assert all(500 <= np.count_nonzero(row) <= 2000 for row in rows)


@pytest.mark.parametrize("make", [tasks.text_task, tasks.listops_task])
def test_tasks_keep_training_and_held_out_apart(make):
    task = make(64, 40, 16)
    assert task.training.tokens.shape == (40, 64)
    assert task.held_out.tokens.shape == (16, 64)
    rows = [{row.tobytes() for row in s.tokens} for s in (task.training, task.held_out)]
    assert not rows[0] & rows[1]
    assert max(task.training.labels) < task.num_classes
    again = make(64, 40, 16)
    np.testing.assert_array_equal(task.training.tokens, again.training.tokens)


def step_line(contender, seconds, **fields):
    line = {"kind": "step", "model": "m", "seqlen": 8, "dropout_p": 0.0}
    figures = {"seconds": seconds, "spread": 0.01, "planned_bytes": 2**30, "loss": 2.0}
    return {**line, "contender": contender, "status": "ok", **figures, **fields}


def test_table_tells_attentions_share_and_its_own_factor():
    lines = [
        step_line(results.OURS, 0.5),
        step_line("jax-xla", 1.0),
        step_line(training.WITHOUT, 0.4),
    ]
    ours, exact, without = headline_report.steps_table(lines).splitlines()[2:]
    assert ours == "| m | 8 | 0 | ours | 2 | 1.0% | 20% | 1 | 2.0000 | 1.00 | 1.00 |"
    assert (
        exact == "| m | 8 | 0 | jax-xla | 1 | 1.0% | 60% | 1 | 2.0000 | 2.00 | 6.00 |"
    )
    assert without.endswith("|  | 1 | 2.0000 | 0.80 |  |")
    assert headline_report.factors(lines) == (
        "- m, S=8, dropout 0: ours is 2.00 times jax-xla; attention alone 6.00 times, "
        "20% of our step and 60% of jax-xla's; without any attention 2.50 times"
    )


@pytest.mark.parametrize("missing", [results.OURS, "jax-xla", training.WITHOUT])
def test_factors_need_all_three_steps(missing):
    names = {results.OURS, "jax-xla", training.WITHOUT} - {missing}
    refused = {**step_line(missing, None), "status": "error"}
    assert not headline_report.factors([*(step_line(n, 1.0) for n in names), refused])


def test_accuracies_stand_beside_guessing():
    lines = [
        {"kind": "accuracy", "model": "m", "contender": "ours", "accuracy": accuracy}
        for accuracy in (0.25, 0.5)
    ]
    lines[1]["guessing"] = 0.125
    table = headline_report.accuracy_table(lines).splitlines()
    assert table[2:] == ["| m | ours | 0.375 | 0.125 | 2 | 0.125 |"]
    labels = np.array([3, 1, 3, 0])
    assert tasks.Split(np.zeros((4, 2)), labels).commonest() == 0.5


def test_difference_of_curves_is_of_their_means():
    first, second = np.full(120, 1.02), np.full(120, 1.0)
    first[::2] += 0.5
    first[1::2] -= 0.5
    difference = headline_report.largest_difference(first, second[:110])
    assert difference == pytest.approx(0.02)


def test_curves_of_controls_stand_beside_ours():
    exact = np.full(60, 2.0)
    parting = exact.copy()
    parting[7:] = 2.01
    curves = {"ours": exact * 0.99, "jax-xla": exact, "a": parting, "b": exact * 1.03}
    table = headline_report.curves_table(curves).splitlines()
    assert table[4:8] == [
        "| ours | 1.9800 | 1.000% | -1.000% | 0 |",
        "| jax-xla | 2.0000 |  |  |  |",
        "| a | 2.0100 | 0.500% | +0.500% | 7 |",
        "| b | 2.0600 | 3.000% | +3.000% | 0 |",
    ]
    assert table[-1].endswith("two without ours: 3.000%")


def test_report_shows_a_control_that_failed(tmp_path, capsys, monkeypatch):
    """It does not end a run, and the others go on."""
    started = []

    def train(trainer, seed):
        started.append(trainer)
        if len(started) == 3:
            raise RuntimeError("RESOURCE_EXHAUSTED: too large")
        yield None, [2.0] * 6

    monkeypatch.setattr(training.Trainer, "run", train)
    lines = run("curves", tmp_path)
    assert set(headline_report.curves_of(lines)) == {"ours", "jax-xla"}
    reason = "- jax-xla-float32: out of memory: RuntimeError: RESOURCE_EXHAUSTED"
    assert reason in capsys.readouterr().out
    assert headline_report.main([str(tmp_path / "run.jsonl")]) == 0
    assert reason in capsys.readouterr().out


def test_report_counts_the_samples_of_a_run_that_ended_early(tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    done = step_line("ours", 0.5)
    lines = [{**done, "kind": "contender", "seconds": 9.0}, done]
    for name in ("jax-xla", "jax-cudnn"):
        lines.append(step_line(name, 4.0, kind="contender", dropout_p=0.1))
    lines += [
        {**step_line("jax-xla", seconds, dropout_p=0.1), "kind": "sample"}
        for seconds in (1.0, 2.0, 3.0)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert headline_report.main([str(path)]) == 0
    table = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| m ")]
    assert [row.split(" | ")[3:5] for row in table] == [
        ["ours", "2"],
        ["jax-xla", "0.5"],
        ["jax-cudnn", "0.25"],
    ]
    assert path.with_suffix(".png").exists()


def test_running_out_of_memory_is_told_apart():
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 52 GiB")
    assert correctness.failure(error).status == "out of memory"
    assert correctness.failure(RuntimeError("no")).status == "error"


@pytest.mark.long
def test_a_trainer_repeats_itself_from_the_same_seed():
    architecture = headlines.shrunk(headlines.BERT_LARGE)
    architecture = dataclasses.replace(architecture, objective="next")
    examples = training.Examples(jnp.arange(200) % 7, None, architecture.seqlen)
    attend = contenders()["jax-xla"].build(architecture.attention(2, 0.0))
    trainer = training.Trainer(
        architecture, attend, examples, batch_size=2, steps=3, learning_rate=1e-3
    )
    (first,), (again,), (other,) = (
        [losses for _, losses in trainer.run(seed)] for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
