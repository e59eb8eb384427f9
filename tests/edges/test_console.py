"""What a run says: one story on standard error, its table on standard output, and nothing of what is not used."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pty
import re
import socket
import subprocess
import sys
import termios
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import warm
from integration.factories import events_of
from texts import word_tokenizer, words
from tiny import tiny_model
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as of_transformers

from apt_trainer import cli
from apt_trainer.libraries.quiet import quiet
from apt_trainer.settings import DataSettings, ModelSettings
from apt_trainer.store.pretrained import load_model
from apt_trainer.tasks import load_task

STEPS = 40
SETTINGS: dict[str, Any] = {
    "max_length": 16,
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "pruning_start": 4,
    "pruning_end": 12,
    "num_pruning_events": 2,
    "learning_rate": 1e-2,
    "round_to": 4,
    "min_hidden": 8,
    "eval_strategy": "steps",
    "eval_steps": 20,
    "logging_steps": 5,
    "test_fraction": 0.2,
    "train_sampling_strategy": "group_by_length",  # which reorders evaluations too
    "use_cpu": True,
    "measure_latency": False,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def words_of_run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Train a tiny encoder without a head on 100 texts; the folder to write to comes next."""
    folder = tmp_path_factory.mktemp("console")
    tokenizer, model = word_tokenizer(), tiny_model("bert", pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.resize_token_embeddings(len(tokenizer))
    for saved in (tokenizer, model.base_model):
        saved.save_pretrained(folder / "model")
    labels = ["no", "yes"]  # told by the first word
    rows = [{"text": f"w{seed % 2} {words(5, seed)}", "label": labels[seed % 2]} for seed in range(100)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model_name_or_path": str(folder / "model"), "train_file": str(folder / "rows.jsonl"), **SETTINGS}
    (folder / "recipe.json").write_text(json.dumps(given))
    subprocess.run([warm.python(), "-c", ""], check=True)  # what is imported there warns, before any run
    return ["train", "--config", str(folder / "recipe.json"), "--output_dir"]


STORY = [
    r"Reading .*/rows.jsonl",
    r"Training .*/model \(bert, [\d.]+ k parameters\) for classification",
    r"  on 70 rows of .*/rows.jsonl \(10 to validate, 20 to test, 2 labels\)",
    rf"  in {STEPS} steps of 4 rows on cpu",
    r"  60 % of the block parameters will go \(heads, neurons, hidden\); taught by its own past",
    r"First the dense model, all of whose weights train on the same data, in .*/dense",
    r"Now the model that is pruned",
    r"step \d+ · new teacher: the model as it is, loss \d\.\d\d on held-out rows",
    r"step \d+ · cut [^·]+ · \d+\.\d % of the block parameters gone · loss \d\.\d\d → \d\.\d\d.*",
    r"step \d+ · \d\.\d\d s a step: about [\d.]+ s of training left(, less once units are gone)?",
    r"step \d+ · \d\.\d\d s a step since the last cut: about [\d.]+ s of training left",
    rf"step \d+ of {STEPS} · loss [\d.]+ · learning rate [\d.e-]+( · [\d.]+ % gone)?",
    r"step \d+ · validation data: accuracy \d\.\d{4}, .* loss \d\.\d{4}",
    r"step \d+ · (pruning and tuning|fine-tuning) has ended after [\d.]+ s",
    r"test data: accuracy \d\.\d{4}, .* loss \d\.\d{4}",
]


def test_a_run_and_its_dense_baseline_tell_one_story(
    words_of_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each line is one of the story, as often as it has to be; its numbers are those of the records."""
    monkeypatch.setattr(sys, "executable", warm.python())  # of the dense model's process
    capfd.readouterr()
    assert cli.main([*words_of_run, str(tmp_path / "out"), "--dense_baseline"]) == 0
    table, said = capfd.readouterr()
    lines = said.splitlines()
    told = Counter(next((form for form in STORY if re.fullmatch(form, line)), line) for line in lines)
    events = events_of(tmp_path / "out")
    cuts, teachers = ([e for e in events if e["kind"] == kind] for kind in ("prune", "teacher"))
    counts = [1, 1, 1, 1, 1, 1, 1, len(teachers), len(cuts), 2, 1, 2 * STEPS // 5, 4, 2, 2]
    assert told == dict(zip(STORY, counts, strict=True)), said
    assert len(cuts) == 2 and teachers
    before = cuts[0]["dense"]
    for cut in cuts:
        line = next(line for line in lines if line.startswith(f"step {cut['step']} · cut "))
        for kind in ("heads", "neurons"):
            changed = {n: (old, cut[kind].get(n, 0)) for n, old in before[kind].items() if old != cut[kind].get(n, 0)}
            one = " in layer " + "".join(changed) if len(changed) == 1 else ""
            sums = next(iter(changed.values())) if one else [sum(of[kind].values()) for of in (before, cut)]
            assert (f"{sums[0]} → {sums[1]} {kind}{one}" in line) == bool(changed)
        whole = json.loads((tmp_path / "out/metrics.json").read_text())["block_params_dense"]
        assert f"{100 * (1 - cut['block_params'] / whole):.1f} % of the block parameters gone" in line
        assert f" · loss {cut['loss_before']:.2f} → {cut['loss_after']:.2f} · ranks " in line
        assert f"{min(cut['ranks'].values())}–{max(cut['ranks'].values())}" in line
        before = cut
    assert "| accuracy " in table and "load_pruned(" in table and "'loss'" not in table
    check_differences(tmp_path / "out", words_of_run[2], table)
    capfd.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "out")]) == 0
    assert [line for line in capfd.readouterr().err.splitlines() if not re.fullmatch(STORY[-1], line)] == []


def check_differences(out: Path, recipe: str, table: str) -> None:
    """What is kept of the test rows, and told of those where the two models differ, is what these say of them."""
    given = json.loads(Path(recipe).read_text())
    names = {f.name for f in dataclasses.fields(DataSettings)}
    data = load_task(DataSettings(**{k: v for k, v in given.items() if k in names}), word_tokenizer(), 42)
    said = {}
    for name, path in (("pruned", out), ("dense", out / "dense")):
        model = AutoModelForSequenceClassification.from_pretrained(path).eval()
        with torch.no_grad():
            ids = [model(**data.collator([row])).logits.argmax(-1).item() for row in data.test]
        said[name] = [model.config.id2label[i] for i in ids]
        kept = json.loads((path / "predictions.json").read_text())
        assert kept["prediction"] == said[name] and kept["label"] == [["no", "yes"][i] for i in data.test["labels"]]
    found = json.loads((out / "differences.json").read_text())
    rows = [i for i, (a, b) in enumerate(zip(said["dense"], said["pruned"], strict=True)) if a != b]
    assert found["rows"] == len(data.test) and found["differ"] == len(rows) > 0
    assert sorted(example["row"] for example in found["examples"]) == rows
    for example in found["examples"]:
        row = example["row"]
        assert [example["dense"], example["pruned"], example["label"]] == [
            said["dense"][row],
            said["pruned"][row],
            kept["label"][row],
        ]
        assert example["text"] == word_tokenizer().decode(data.test[row]["input_ids"], skip_special_tokens=True)
        assert example["right"] == ("dense" if said["dense"][row] == kept["label"][row] else "pruned")
    assert (
        f"apt-trainer predict {out} --text" in table and f"The model says {said['pruned'][0]}, and right is" in table
    )
    assert cli.main(["report", str(out), "--output", str(out / "report.html")]) == 0
    page = (out / "report.html").read_text()
    assert f"On <strong>{len(rows)} of {len(data.test)}</strong> test rows the two say something else." in page


def test_a_terminal_shows_one_bar_with_a_name(words_of_run: list[str], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    command = [warm.python(), "-m", "apt_trainer", *words_of_run, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    read = b""
    with contextlib.suppress(OSError):  # once the other end is closed
        while True:
            read += os.read(ours, 65536)
    os.close(ours)
    shown = read.decode()
    assert process.wait(60) == 0, shown
    frames = [frame.strip() for frame in re.split(r"[\r\n]|\x1b\[A", shown) if "%|" in frame]
    assert {frame.partition(":")[0] for frame in frames} <= {"pruning and tuning", "evaluating"}
    assert any("loss=" in frame or "loss " in frame for frame in frames) and f"of {STEPS} · loss" not in shown
    assert re.search(r"step 12 · cut .* gone", shown)


@pytest.mark.distributed
def test_of_two_processes_one_speaks(words_of_run: list[str], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = os.environ | {name: str(number) for name, number in place.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
        words = [*words_of_run, str(tmp_path / "out"), "--pruning_end", "5"]  # two events do not fit
        command = [warm.python(), "-m", "apt_trainer", *words]
        ranks.append(subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True))
    (table, said), (nothing, neither) = (rank.communicate(timeout=200) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], said + neither
    assert nothing == neither == "" and "| accuracy " in table
    told = [line for line in said.splitlines() if not any(re.fullmatch(form, line) for form in STORY)]
    assert told[0].startswith(f"  in {STEPS} steps of 8 rows on cpu")
    assert told[1:] == ["warning: num_pruning_events=2 do not fit between step 4 and 5 of 40: there will be 1."]


def test_weights_that_begin_at_random_are_told_unless_they_are_those_of_a_new_head(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    tiny_model("bert").base_model.save_pretrained(tmp_path)
    rows = [{"text": words(6, seed), "label": seed % 2} for seed in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_task(DataSettings(train_file=str(tmp_path / "rows.jsonl"), max_length=8), word_tokenizer(), 1)
    load_model(ModelSettings(str(tmp_path)), data)
    assert caplog.messages == []
    of_transformers.set_verbosity_info()
    load_model(ModelSettings(str(tmp_path)), data)
    assert any("LOAD REPORT" in message for message in caplog.messages)  # asked for more
    of_transformers.set_verbosity_warning()
    caplog.clear()
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if name.endswith("query.weight"))
    save_file({n: v for n, v in weights.items() if n != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    load_model(ModelSettings(str(tmp_path)), data)
    assert (
        len(caplog.messages) == 1
        and f"1 weights begin at random, since they are not in it: bert.{gone}" in (caplog.messages[0])
    )
    caplog.clear()
    tiny_model("bert").save_pretrained(tmp_path)  # of three labels
    load_model(ModelSettings(str(tmp_path)), data)
    assert "have other shapes there: classifier.bias, classifier.weight" in caplog.messages[-1]


@pytest.mark.filterwarnings("error")
def test_logging_is_as_it_was_after_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("apt_trainer", "torchao", "bitsandbytes", "DeepSpeed", "torch.utils._pytree")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.level, [*logger.filters], [*logger.handlers], logger.propagate) for logger in loggers]
    with quiet(["train"]):
        assert datasets.are_progress_bars_disabled() and not of_transformers.is_progress_bar_enabled()
        with quiet(["train"]):
            pass
        assert datasets.are_progress_bars_disabled() and not logging.getLogger("torchao").isEnabledFor(logging.WARNING)
        warnings.warn("for developers", FutureWarning, stacklevel=1)  # an error where it is shown
    assert not datasets.are_progress_bars_disabled() and of_transformers.is_progress_bar_enabled()
    assert [(logger.level, logger.filters, logger.handlers, logger.propagate) for logger in loggers] == before
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "0")
    with quiet(["evaluate", "--quantize", "int8"]):  # what is used may warn
        assert not datasets.are_progress_bars_disabled() and logging.getLogger("torchao").level == logging.NOTSET
