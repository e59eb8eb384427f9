"""Records survive crashes, tables hold the right cells, pictures are written for every kind of run."""

from __future__ import annotations

import json
import math

import matplotlib.image
import pytest

from apt_trainer.errors import UserError
from apt_trainer.report.plots import Phase, find_phases, plot_run
from apt_trainer.report.sublayers import _short
from apt_trainer.report.tables import comparison_table, format_bytes, format_count, format_seconds, markdown_table
from apt_trainer.store.events import append_event, read_events, truncate_after, write_json


def event(step: int, kind: str = "prune", sparsity: float = 0.3, tune: str = "adapters", layers: int = 2) -> dict:
    names = [str(i) for i in range(layers)]
    return {
        "step": step,
        "kind": kind,
        "sparsity": sparsity,
        "block_params": 1000,
        "trainable_params": 100,
        "heads": dict.fromkeys(names, 3) | {"1": 0},
        "neurons": dict.fromkeys(names, 24),
        "hidden": 24,
        "dense": {"heads": dict.fromkeys(names, 4), "neurons": dict.fromkeys(names, 64), "hidden": 32},
        "ranks": {"a": 8, "b": 8 + step // 10},
        "seconds": 0.1,
        "loss_before": 0.5,
        "loss_after": None,
        "tune": tune,
    }


def logs(**extra: float) -> list[dict]:
    entries = [{"step": step, "loss": 1 / step, "epoch": step / 10} | extra for step in range(1, 41)]
    entries.append({"step": 20, "eval_loss": 0.6, "eval_runtime": 1.0, "eval_accuracy": 0.7})
    entries.append({"step": 40, "eval_loss": 0.5, "eval_runtime": 1.0, "eval_accuracy": 0.8})
    entries.append({"step": 40, "train_runtime": 9.0, "train_loss": 0.2})
    return entries


def test_events_come_back_in_order(tmp_path):
    path = tmp_path / "run" / "events.jsonl"
    assert read_events(path) == []
    for step in (10, 20):
        append_event(path, event(step))
    assert read_events(path) == [event(10), event(20)]


@pytest.mark.parametrize("torn", ['{"step": 30, "ki', '{"step": 30, "name": "é', "\x00\x00\x00", "{"])
def test_events_survive_a_torn_last_line(tmp_path, torn):
    path = tmp_path / "events.jsonl"
    append_event(path, event(10))
    with path.open("ab") as file:
        file.write(torn.encode()[:-1] if "é" in torn else torn.encode())  # cut within a character
    assert read_events(path) == [event(10)]
    append_event(path, event(20))
    assert read_events(path) == [event(10), event(20)]
    assert path.read_text().count("\n") == 2


def test_events_keep_a_last_line_that_lost_only_its_line_break(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text(json.dumps(event(10)))
    assert read_events(path) == [event(10)]
    append_event(path, event(20))
    assert [e["step"] for e in read_events(path)] == [10, 20]


@pytest.mark.parametrize("damaged", ['{"step": ', "17"])
def test_events_damaged_inside_are_an_error(tmp_path, damaged):
    path = tmp_path / "events.jsonl"
    path.write_text(f'{{"step": 1}}\n{damaged}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match="line 2"):
        read_events(path)


def test_truncate_after_drops_later_steps(tmp_path):
    path = tmp_path / "events.jsonl"
    assert truncate_after(path, 5) == 0
    assert not path.exists()
    for step in (10, 20, 20, 30):
        append_event(path, event(step))
    assert truncate_after(path, 20) == 1
    assert [e["step"] for e in read_events(path)] == [10, 20, 20]
    assert truncate_after(path, 0) == 3
    assert read_events(path) == []
    assert [p.name for p in tmp_path.iterdir()] == ["events.jsonl"]


def test_truncate_after_keeps_appending_possible_after_a_torn_line(tmp_path):
    path = tmp_path / "events.jsonl"
    append_event(path, event(10))
    with path.open("a") as file:
        file.write('{"step": 2')
    assert truncate_after(path, 10) == 0
    append_event(path, event(20))
    assert [e["step"] for e in read_events(path)] == [10, 20]


def test_write_json_replaces_the_whole_file_or_nothing(tmp_path):
    path = tmp_path / "new" / "metrics.json"
    write_json(path, {"a": 1})
    write_json(path, {"b": [1, None]})
    assert json.loads(path.read_text()) == {"b": [1, None]}
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert json.loads(path.read_text()) == {"b": [1, None]}
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_phases_are_cut_at_pruning_and_at_changes_of_what_trains():
    events = [event(10), event(20), event(20, "phase"), event(30, "phase", tune="full")]
    assert find_phases(events, 40) == [
        Phase(0, 10, "warm-up: adapters train"),
        Phase(10, 20, "pruning: adapters train"),
        Phase(20, 30, "recovery: adapters train"),
        Phase(30, 40, "recovery: all weights train"),
    ]
    assert [p.label for p in find_phases([event(10), event(20), event(30, "phase")], 40)] == [
        "warm-up",
        "pruning",
        "recovery",
    ]
    baseline = [event(0, "phase"), event(20, "phase", tune="full")]
    assert find_phases(baseline, 40) == [Phase(0, 20, "adapters train"), Phase(20, 40, "all weights train")]
    assert find_phases([], 40) == []
    assert find_phases([event(40)], 40) == []


RUNS = {
    "pruned": ([event(10), event(10, "teacher"), event(20, sparsity=0.6), event(30, "phase", tune="full")], logs()),
    "pruned before training": ([event(0), event(10, "grow"), event(20, "grow")], logs()),
    "parts of the loss": ([event(10)], logs(**{"task_loss": 0.4, "distillation_loss": 0.0})),
    "many layers": ([event(10, layers=60)], logs(**{"task_loss": 0.4, "distillation_loss": 90.0})),
    "loss not a number": ([event(10)], [{"step": 1, "loss": math.nan}, {"step": 2, "loss": None}]),
    "no adapters": ([event(10) | {"ranks": {}}], logs()),
    "phases only": ([event(10, "phase"), event(20, "phase", tune="full")], logs()),
    "no events": ([], logs()),
    "nothing at all": ([], []),
}


@pytest.mark.parametrize("name", RUNS)
def test_plot_is_a_picture_of_useful_size(tmp_path, name):
    events, log_history = RUNS[name]
    path = tmp_path / "plots" / "run.png"
    plot_run(events, log_history, path, title=name)
    image = matplotlib.image.imread(path)
    assert image.shape[0] >= 1000 and image.shape[1] >= 1500
    assert path.stat().st_size > 10_000
    assert image[..., :3].std() > 0.01  # something was drawn


def test_plot_draws_the_bars_of_the_last_event(tmp_path):
    """Blue (heads) covers 3/4 of the one layer that kept heads."""
    path = tmp_path / "run.png"
    plot_run([event(10)], [], path, title="run")
    image = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    right = image[:, int(image.shape[1] * 0.6) :]
    blue = (right == (0x00, 0x72, 0xB2)).all(-1).sum(1).max()
    grey = (right == (0xE4, 0xE4, 0xE4)).all(-1).sum(1).max()  # the layer without heads shows only background
    assert blue / grey == pytest.approx(0.75, abs=0.02)


def test_plot_takes_the_named_metric(tmp_path):
    log_history = [{"step": 1, "loss": 1.0}, {"step": 1, "eval_recall": 0.1, "eval_f1": 0.5}]
    default, named, absent = (tmp_path / f"{i}.png" for i in range(3))
    plot_run([], log_history, default, "t")
    plot_run([], log_history, named, "t", metric="f1")
    plot_run([], log_history, absent, "t", metric="accuracy")
    assert len({p.read_bytes() for p in (default, named, absent)}) == 3


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


METRICS = {
    "metric_name": "accuracy",
    "task_metric_dense": 0.9,
    "task_metric": 0.873,
    "block_params_dense": 85_054_464,
    "block_params": 34_021_785,
    "total_params_dense": 109_483_778,
    "total_params": 58_000_000,
    "disk_bytes_dense": 437_960_000,
    "disk_bytes": 232_000_000,
    "latency_ms": {
        "dense": {"1": {"median_ms": 20.0, "iqr_ms": 2.0}, "32": {"median_ms": 100.0, "iqr_ms": 2.0}},
        "pruned": {"1": {"median_ms": 19.0, "iqr_ms": 1.0}, "32": {"median_ms": 50.0, "iqr_ms": 1.0}},
    },
    "train_seconds": 725.0,
    "peak_memory_bytes": 1_500_000_000,
}


def test_comparison_table_cells():
    found = cells(comparison_table(METRICS))
    assert found["measure"] == ["dense", "pruned", "pruned / dense"]
    assert found["accuracy"] == ["0.9000", "0.8730", "97.0 %"]
    assert found["parameters in blocks"] == ["85.1 M", "34.0 M", "40.0 %"]
    assert found["parameters in total"] == ["109.5 M", "58.0 M", "53.0 %"]
    assert found["size on disk"] == ["438.0 MB", "232.0 MB", "53.0 %"]
    assert found["latency, batch 1"] == ["20.00 ms (IQR 2.00)", "19.00 ms (IQR 1.00)", "95.0 % (within noise)"]
    assert found["latency, batch 32"] == ["100.00 ms (IQR 2.00)", "50.00 ms (IQR 1.00)", "50.0 %"]
    assert found["training time"] == ["–", "12 min 05 s", "–"]
    assert found["peak memory in training"] == ["–", "1.5 GB", "–"]


def test_comparison_table_shows_a_dash_for_what_is_missing():
    found = cells(comparison_table({**METRICS, "task_metric_dense": None, "latency_ms": None}))
    assert found["accuracy"] == ["–", "0.8730", "–"]
    assert not any(label.startswith("latency") for label in found)
    rates = {"sequences_per_second": {"dense": {"8": 50.0}, "pruned": {"8": 125.0, "16": 130.0}}}
    found = cells(comparison_table(rates))
    assert found["sequences/s, batch 8"] == ["50.0", "125.0", "250.0 %"]
    assert found["sequences/s, batch 16"] == ["–", "130.0", "–"]
    one_sided = {"latency_ms": {"pruned": {"1": {"median_ms": 1.0, "iqr_ms": 0.0}}}}
    assert cells(comparison_table(one_sided))["latency, batch 1"] == ["–", "1.00 ms (IQR 0.00)", "–"]
    assert "task metric" not in cells(comparison_table({}))
    assert cells(comparison_table({"disk_bytes_dense": 0, "disk_bytes": 5}))["size on disk"] == ["0 B", "5 B", "–"]


def test_markdown_table_is_aligned_and_escaped():
    rows = [{"name": "a|b", "value": 0.5}, {"name": "long name"}]
    table = markdown_table(rows, [("name", "name", None), ("value", "value", "{:.2f}".format)])
    assert table.splitlines() == [
        "| name      | value |",
        "| --------- | ----: |",
        "| a\\|b      |  0.50 |",
        "| long name |     – |",
    ]
    assert markdown_table([], [("a", "a", None)]).splitlines() == ["| a   |", "| --- |"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "–"), (0, "0"), (999, "999"), (1500, "1.5 k"), (999_999, "1.0 M"), (7_200_000_000, "7.2 G")],
)
def test_format_count(value, expected):
    assert format_count(value) == expected


def test_format_bytes_and_seconds():
    assert [format_bytes(n) for n in (12, 1500, 437_960_000)] == ["12 B", "1.5 kB", "438.0 MB"]
    assert [format_seconds(s) for s in (9.54, 59.97, 725, 11_045, None)] == [
        "9.5 s",
        "1 min 00 s",
        "12 min 05 s",
        "3 h 04 min",
        "–",
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.3535, "0.35"), (68.43, "68"), (854.9, "855"), (2713, "2.7k"), (9.361e5, "936k"), (2e9, "2.0G")],
)
def test_numbers_in_cells_are_short(value, expected):
    assert _short(value) == expected
