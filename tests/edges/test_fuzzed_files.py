"""Files that someone else made or that a disk has spoilt: they load as what they say, or one sentence refuses them.

Nothing is allocated that a file merely claims: the tests run with little more memory than they have.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from integration.factories import SHORT, make_trainer
from safetensors.torch import load_file, save_file
from texts import byte_tokenizer, word_tokenizer
from tiny import parts, random_plan, tiny_model
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from apt_trainer import UserError, load_pruned
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.settings import ModelSettings
from apt_trainer.store.events import read_events, read_json, truncate_after
from apt_trainer.store.export import export
from apt_trainer.store.pretrained import load_saved
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.store.starting_point import starting_point
from apt_trainer.surgery.cutting import apply_plan
from apt_trainer.training.checkpoints.state import STATE_FILE, WEIGHTS_FILE, check_complete, read_description
from apt_trainer.training.engines.optimizer_file import NUMBERS_FILE, TENSORS_FILE, read_optimizer

cheap = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "25")),
    phases=[Phase.generate],
    report_multiple_bugs=False,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WRONG = st.sampled_from(
    [None, True, -1, 0, 3, 10**9, 10**13, -(10**13), 2.5, float("nan"), "", "x", "-ff", "0x1f", "f" * 200]
    + [[], [1], [-1], [10**12], ["../x"], {}, {"a": 1}, [[]], "../../etc/passwd", "/etc/passwd"]
)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """A gigabyte more than there is in use."""
    logging.set_verbosity_error()
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    logging.set_verbosity_warning()


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """Path of everything inside a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (key,)
        yield from ((key, *rest) for rest in places(inner))


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy with ``new`` at ``place``; Ellipsis removes what is there."""
    value = copy.deepcopy(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    if new is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return value


def one_sentence(read: Callable[[], Any]) -> bool:
    """Whether ``read`` refuses; anything but a UserError of one line fails the test."""
    try:
        read()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1200
        return True
    return False


def spoilt(data: st.DataObject, file: Path, read: Callable[[], Any]) -> None:
    """Change one place of the JSON ``file``, read, and put the file back."""
    text = file.read_text()
    known = json.loads(text)
    place = data.draw(st.sampled_from(list(places(known))))
    new = data.draw(st.one_of(WRONG, st.just(...)))
    file.write_text(json.dumps(changed(known, place, new)))
    try:
        one_sentence(read)
    finally:
        file.write_text(text)


def shortened_or_flipped(data: st.DataObject, file: Path, read: Callable[[], Any]) -> None:
    """Cut the end of ``file`` off or change some of its first bytes, and read."""
    known = file.read_bytes()
    if data.draw(st.booleans()):
        spoiled = known[: data.draw(st.integers(0, len(known) - 1))]
    else:
        where = data.draw(st.integers(0, min(len(known), 400) - 1))
        spoiled = known[:where] + data.draw(st.binary(min_size=1, max_size=8)) + known[where + 1 :]
    file.write_bytes(spoiled)
    try:
        one_sentence(read)
    finally:
        file.write_bytes(known)


def cut(name: str, task: str, **extra: object) -> PreTrainedModel:
    model = tiny_model(name, task, **extra)
    family, spaces, dense = parts(model)
    apply_plan(model, family, spaces, dense, plan := random_plan(spaces, dense, 5, vanish=("layers.1.neurons",)))
    as_pruned(model, family, plan)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    cut("llama", "ForCausalLM", vocab_size=len(word_tokenizer())).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from a model in ``base`` that kept its adapters, with a checkpoint that has a teacher."""
    output = tmp_path_factory.mktemp("run")
    tiny_model("bert").save_pretrained(output / "base")
    model = AutoModelForSequenceClassification.from_pretrained(output / "base")
    trainer = make_trainer(output, model, **SHORT, save_strategy="steps", save_steps=6, keep_adapters=True)
    trainer.train()
    trainer.save_model()
    return output


# ---------------------------------------------------------------------------- saved models


@cheap
@given(data=st.data())
def test_a_config_of_any_content(data: st.DataObject, folder: Path) -> None:
    spoilt(data, folder / "config.json", lambda: starting_point(load_pruned(folder)))


@cheap
@given(data=st.data())
def test_spoilt_weights_and_configs(data: st.DataObject, folder: Path) -> None:
    name = data.draw(st.sampled_from(["model.safetensors", "config.json"]))
    shortened_or_flipped(data, folder / name, lambda: load_pruned(folder))


def test_names_that_are_given_twice(folder: Path) -> None:
    for file in ("model.safetensors.index.json", "config.json"):
        text = '{"weight_map": {}, "weight_map": {}}' if "index" in file else (folder / file).read_text()
        (folder / file).write_text(text.replace("{", '{"vocab_size": 8, "vocab_size": 9, ', 1))
        with pytest.raises(UserError, match=f"{file} .*'vocab_size' is given twice"):
            load_pruned(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 10**7}, "its config describes a model of"),
        ({"vocab_size": 10**10}, "its config describes a model of"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"apt_dense_sizes": {"num_hidden_layers": 10**9}}, "num_hidden_layers=1000000000"),
        ({"num_labels": 10**10}, "num_labels=10000000000"),
        ({"hidden_size": -4}, "The config of .* is damaged"),
        ({"intermediate_size": -4}, "no LlamaForCausalLM is made from its config"),
        ({"vocab_size": "many"}, "The config of .* is damaged"),
        ({"apt_kept": {"layers.0.heads": "-3"}}, "does not tell which units of layers.0.heads are left"),
        ({"apt_kept": {"layers.0.heads": "f" * 9}}, "beyond the 4 of the dense model"),
        ({"apt_kept": {"layers.9.heads": "3"}}, "'layers.9.heads', which its model does not have"),
        ({"apt_kept": ["layers.0.heads"]}, "does not tell which units are left"),
    ],
)
def test_sizes_that_no_file_holds(changes: dict[str, Any], said: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=said) as error:
        starting_point(load_pruned(folder))
    assert "\n" not in str(error.value)


def test_tensors_of_another_place(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    one, other = "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="2 mismatched keys"):
        load_pruned(folder)


def test_code_that_was_changed(folder: Path) -> None:
    """That of another version, of which the config tells, is no change."""
    code, config = folder / "modeling_apt.py", json.loads((folder / "config.json").read_text())
    code.write_text(code.read_text() + "\nprint('run me')\n")
    with pytest.raises(UserError, match="modeling_apt.py is not the file that was saved with the model"):
        load_pruned(folder)
    other = config | {"apt_code_sha256": hashlib.sha256(code.read_bytes()).hexdigest()}
    (folder / "config.json").write_text(json.dumps(other))
    load_pruned(folder).save_pretrained(folder)
    assert "run me" not in code.read_text() and json.loads((folder / "config.json").read_text()) == config


# ---------------------------------------------------------------------------- plans, records, checkpoints


@cheap
@given(data=st.data())
def test_a_plan_of_any_content(data: st.DataObject, tmp_path: Path) -> None:
    dense = PruningPlan({"layers.0.heads": (0, 1, 2), "layers.0.neurons": (0, 1, 2, 3)})
    written = PruningPlan({"layers.0.heads": (0, 2), "layers.0.neurons": (1,)}).to_json()
    file = tmp_path / "pruning_plan.json"
    file.write_text(json.dumps(written))
    spoilt(data, file, lambda: PruningPlan.from_json(read_json(file)).check_within(dense))
    shortened_or_flipped(data, file, lambda: PruningPlan.from_json(read_json(file)).check_within(dense))


@cheap
@given(data=st.data())
def test_events_of_any_content(data: st.DataObject, tmp_path: Path) -> None:
    file, records = tmp_path / "events.jsonl", [{"step": 1, "loss": 2.5}, {"step": 4, "units": {"heads": [1]}}]
    wrong = data.draw(WRONG)
    records[data.draw(st.integers(0, 1))][data.draw(st.sampled_from(["step", "loss"]))] = wrong
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    if not one_sentence(lambda: truncate_after(file, 2)):
        assert [record["step"] <= 2 for record in read_events(file)] == [True] * len(read_events(file))
    file.write_text('{"step": 1}\n{"step": 2}\n')
    shortened_or_flipped(data, file, lambda: truncate_after(file, 1))


@cheap
@given(data=st.data())
def test_a_checkpoint_of_any_content(data: st.DataObject, run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run / "checkpoint-6", tmp_path / "checkpoint", dirs_exist_ok=True))
    spoilt(data, copied / STATE_FILE, lambda: check_complete(copied))
    spoilt(data, copied / NUMBERS_FILE, lambda: read_optimizer(copied))
    name = data.draw(st.sampled_from([STATE_FILE, WEIGHTS_FILE, NUMBERS_FILE, TENSORS_FILE]))
    shortened_or_flipped(data, copied / name, lambda: (check_complete(copied), read_optimizer(copied)))


@cheap
@given(data=st.data())
def test_an_adapter_of_any_content(data: st.DataObject, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    if not folder.exists():
        export(str(run), "adapter", folder)
    name = data.draw(st.sampled_from(["config.json", "apt_base.json", "pruning_plan.json"]))
    spoilt(data, folder / name, lambda: load_pruned(folder))
    name = data.draw(st.sampled_from([name, "apt_difference.safetensors"]))
    shortened_or_flipped(data, folder / name, lambda: load_pruned(folder))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("pruner", "ranks", ...), 10**9, "an adapter of rank 1000000000"),
        (("pruner", "ranks"), {"nowhere": 2}, "an adapter of rank 2 that"),
        (("pruner", "plan"), None, "pruner: plan is missing"),
        (("distillation",), [], "distillation is missing"),
        (("distillation", "num_student"), -1, "distillation: num_student is missing or not"),
        (("processes",), "two", "processes is missing or not"),
    ],
)
def test_what_a_checkpoint_cannot_say(
    place: tuple[Any, ...], value: Any, said: str, run: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(run / "checkpoint-6", tmp_path / "checkpoint"))
    known = json.loads((copied / STATE_FILE).read_text())
    if place[-1] is ...:
        place = (*place[:-1], next(iter(known["pruner"]["ranks"])))
    (copied / STATE_FILE).write_text(json.dumps(changed(known, place, value)))
    for read in (check_complete, read_description):
        with pytest.raises(UserError, match=said):
            read(copied)


# ---------------------------------------------------------------------------- files of other runtimes


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock model that transformers reads back."""
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny_model("llama", "ForCausalLM", vocab_size=300, hidden_size=32, attention_bias=False)
    export(model, "gguf", folder / "out", tokenizer=byte_tokenizer())
    return next((folder / "out").glob("*.gguf"))


@settings(cheap, max_examples=8)
@given(data=st.data())
def test_a_gguf_file_of_any_content(data: st.DataObject, gguf_file: Path) -> None:
    shortened_or_flipped(data, gguf_file, lambda: load_saved(ModelSettings(str(gguf_file))))
