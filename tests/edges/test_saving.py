"""What was trained is not lost: what a save needs is tried before the first step; what fails later leaves weights."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from integration.factories import Rows, SaveAt, config, losses_of, make_trainer
from integration.test_processes import two_processes
from texts import tiny_llama, word_tokenizer
from tiny import LANGUAGE_MODELS, gap, logits, tiny_batch, tiny_model
from transformers import BertForSequenceClassification, GenerationConfig, TrainerCallback

import apt_trainer
from apt_trainer import APTTrainer, UserError, load_pruned
from apt_trainer.errors import RunError
from apt_trainer.runs.run import train
from apt_trainer.settings.recipe import load_recipe
from apt_trainer.settings.refused import REFUSED
from apt_trainer.store.rescue import RESCUED
from apt_trainer.store.saving import reload_difference
from apt_trainer.training.compiled import compile_options
from apt_trainer.training.event_callback import EventCallback
from apt_trainer.training.progress import use_run_progress
from apt_trainer.training.rehearsal import check_output, check_room

TESTS = Path(__file__).parents[1]
FEW: dict[str, Any] = {"max_steps": 3, "num_pruning_events": 1, "pruning_start": 0, "pruning_end": 2, "mask_window": 1}
FEW |= {"distillation": "none", "save_strategy": "no"}
"""One cut after step 2 of 3, without a teacher."""


def few(folder: Path, model: Any = None, data: Any = None, **changes: Any) -> APTTrainer:
    names = ("processing_class", "callbacks", "eval_dataset", "compute_metrics")
    options = {name: changes.pop(name) for name in names if name in changes}
    return make_trainer(folder, model or tiny_model("bert", layers=2), data, options, **{**FEW, **changes})


class Unsaved(type(word_tokenizer())):  # type: ignore[misc]
    """A tokenizer that cannot be saved from the call on that is named in ``failing``."""

    failing = 1

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        self.failing -= 1
        if self.failing <= 0:
            raise KeyError("a file of the tokenizer is gone")
        return super().save_pretrained(*args, **kwargs)


def unsaved_tokenizer(failing: int) -> Any:
    tokenizer = word_tokenizer()
    tokenizer.__class__, tokenizer.failing = Unsaved, failing
    return tokenizer


# ---------------------------------------------------------------------------- generation configs


def greedy_with_temperature(model: Any, **changes: Any) -> Any:
    """As copies of LLaMA 2 have it on disk."""
    model.generation_config = GenerationConfig.from_model_config(model.config)
    for name, value in {"do_sample": False, "temperature": 0.9, "top_p": 0.6, **changes}.items():
        setattr(model.generation_config, name, value)
    return model


def test_a_temperature_without_do_sample_is_saved_as_it_was_loaded(tmp_path: Path) -> None:
    """The padding token of the tokenizer, which the Trainer writes into the config, makes it a changed one."""
    tokenizer = word_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = greedy_with_temperature(tiny_llama(pad_token_id=None))
    trainer = few(tmp_path, model, Rows(task="text"), processing_class=tokenizer)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "by_hand")
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "by_hand"):
        saved = json.loads((folder / "generation_config.json").read_text())
        assert (saved["temperature"], saved["top_p"], saved["pad_token_id"]) == (0.9, 0.6, tokenizer.eos_token_id)
        small, ids = load_pruned(folder).eval(), torch.tensor([[1, 5, 9, 4]])
        options = {"max_new_tokens": 5, "attention_mask": torch.ones_like(ids)}
        expected = trainer.model.eval().generate(ids, do_sample=False, **options)
        assert torch.equal(small.generate(ids, **options), expected)


def test_a_generation_config_that_cannot_be_loaded_again_stops_before_the_first_step(tmp_path: Path) -> None:
    model = greedy_with_temperature(tiny_llama(), num_return_sequences=3)
    trainer = few(tmp_path, model, Rows(task="text"))
    with pytest.raises(UserError, match="nothing was trained: ValueError: .*num_return_sequences"):
        trainer.train()
    assert trainer.state.global_step == 0 and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- before the first step


def test_a_tokenizer_that_cannot_be_saved_stops_before_the_first_step(tmp_path: Path) -> None:
    trainer = few(tmp_path, processing_class=unsaved_tokenizer(failing=1))
    with pytest.raises(UserError, match="nothing was trained: KeyError"):
        trainer.train()
    assert trainer.state.global_step == 0 and list(tmp_path.iterdir()) == []


class LocalBertForSequenceClassification(BertForSequenceClassification):
    """A class that no other program has."""


def test_a_tokenizer_that_moves_positions_stops_before_the_first_step(tmp_path: Path) -> None:
    """RoBERTa counts positions from the padding token; a run writes that of the tokenizer into the config."""
    model, tokenizer = tiny_model("roberta"), word_tokenizer()
    trainer = few(tmp_path, model, processing_class=tokenizer)
    with pytest.raises(UserError, match=r"counts positions from its padding token, 1, and .* pads with '<pad>', 0"):
        trainer.train()
    assert trainer.state.global_step == 0
    tokenizer.pad_token = "<s>"
    few(tmp_path / "again", tiny_model("roberta"), processing_class=tokenizer).train()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "modernbert"])
def test_a_model_that_was_brought_to_half_a_type_is_saved_as_it_trained(name: str, tmp_path: Path) -> None:
    """Which rounds the frequencies of its positions too; a model that loads has them exact."""
    model = tiny_model(name, LANGUAGE_MODELS[name]).to(torch.bfloat16)
    trainer = few(tmp_path, model, Rows(task="text"))
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    small, batch = load_pruned(tmp_path / "small", dtype="auto").eval(), tiny_batch(trainer.model)
    assert small.dtype == torch.bfloat16
    assert torch.equal(logits(trainer.model.eval(), batch), logits(small, batch))


def test_a_class_that_no_program_could_load_stops_before_the_first_step(tmp_path: Path) -> None:
    model = tiny_model("bert", layers=2)
    model.__class__ = LocalBertForSequenceClassification
    with pytest.raises(UserError, match="LocalBertForSequenceClassification"):
        few(tmp_path, model).train()
    assert list(tmp_path.iterdir()) == []


def _file(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file"


def _inside_a_file(folder: Path) -> Path:
    return _file(folder) / "out"


def _long(folder: Path) -> Path:
    return folder / ("n" * 300)


def _long_inside_a_new_one(folder: Path) -> Path:
    return folder / "new" / ("n" * 300)


def _no_file_system(folder: Path) -> Path:
    return Path("/proc/none/out")


def _dangling(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "unmounted")
    return folder / "link" / "out"


@pytest.mark.parametrize("place", [_file, _inside_a_file, _long, _long_inside_a_new_one, _no_file_system, _dangling])
def test_an_output_folder_that_cannot_be_is_refused(tmp_path: Path, place: Any) -> None:
    output = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"^output_dir='.*Choose"):
        check_output(output)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_folder_that_can_be_made_leaves_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b")
    check_output(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_the_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = few(tmp_path)
    check_room(tmp_path, trainer.pruner)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("apt_trainer.training.rehearsal.shutil.disk_usage", lambda place: usage)
    with pytest.raises(UserError, match=r"takes about .*, but .* are free"):
        trainer.train()
    assert trainer.state.global_step == 0


# ---------------------------------------------------------------------------- after the last step


@pytest.mark.parametrize("sparsity", [0.5, None])
def test_a_tokenizer_that_fails_at_the_end_leaves_weights_that_load(tmp_path: Path, sparsity: float | None) -> None:
    cut = {} if sparsity is not None else {"target_sparsity": None}
    trainer = few(tmp_path, processing_class=unsaved_tokenizer(failing=2), **cut)
    trainer.train()
    with pytest.raises(RunError, match="a file of the tokenizer is gone") as failed:
        trainer.save_model()
    (rescued,) = tmp_path.glob(f"{RESCUED}*")
    assert str(rescued) in str(failed.value)
    load = load_pruned if sparsity is not None else BertForSequenceClassification.from_pretrained
    batch = tiny_batch(trainer.model)
    assert torch.equal(logits(load(rescued).eval(), batch), logits(trainer.model.eval(), batch))


def test_an_output_folder_that_became_a_file_leaves_weights_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = tmp_path / "spare"
    spare.mkdir()
    trainer = few(tmp_path / "out")
    trainer.train()
    (tmp_path / "model").write_text("a file")
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    with pytest.raises(RunError, match="could not be saved"):
        trainer.save_model(str(tmp_path / "model"))
    (rescued,) = spare.glob(f"{RESCUED}*")
    batch = tiny_batch(trainer.model)
    assert torch.equal(logits(load_pruned(rescued).eval(), batch), logits(trainer.model.eval(), batch))


FULL = """
import resource, signal, sys
from pathlib import Path
from edges.test_saving import few
from apt_trainer.errors import RunError
trainer = few(Path(sys.argv[1]))
trainer.train()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    trainer.save_model()
except RunError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(error)
    trainer.save_model()
"""


def test_a_full_disk_tells_both_places_and_a_second_try_works(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{Path(apt_trainer.__file__).parents[1]}"}
    command = [warm.python(), "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = done.stdout
    assert "could not be written elsewhere either" in printed and str(tmp_path) in printed
    assert not list(tmp_path.glob(f"{RESCUED}*"))
    load_pruned(tmp_path)


def test_a_device_without_room_for_two_models_compares_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("of the device")

    trainer = few(tmp_path)
    trainer.train()
    trainer.save_model()
    monkeypatch.setattr("apt_trainer.store.saving.example_inputs", full)
    assert reload_difference(trainer.model, tmp_path) == 0.0
    with torch.no_grad():
        trainer.model.classifier.bias.add_(1)
    with pytest.raises(RuntimeError, match=r"another classifier\.bias"):
        reload_difference(trainer.model, tmp_path)


class FailsAtTheEnd(TrainerCallback):
    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("the tracker does not answer")


def _metric(prediction: Any) -> dict[str, float]:
    raise ZeroDivisionError("no row of this class")


@pytest.mark.parametrize(
    "options",
    [
        {"callbacks": [FailsAtTheEnd()]},
        {"compute_metrics": _metric, "eval_dataset": Rows(8), "eval_strategy": "steps", "eval_steps": 3},
    ],
)
def test_what_fails_after_the_last_step_leaves_a_finished_model(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = few(tmp_path, **options)
    with pytest.raises(RunError, match=r"Training is done, .*(tracker|no row)") as failed:
        trainer.train()
    assert f"load_pruned({str(tmp_path)!r})" in str(failed.value)
    batch = tiny_batch(trainer.model)
    assert gap(logits(load_pruned(tmp_path).eval(), batch), logits(trainer.model.eval(), batch)) == 0.0


class FailsAtACut(EventCallback):
    def on_model_event(self, *args: Any) -> None:
        raise KeyError("a name that no line has")


def test_telling_of_a_cut_does_not_end_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = few(tmp_path, callbacks=[FailsAtACut()], sparsity_metric="total_params")
    use_run_progress(trainer, logs_too=True)
    trainer.train()
    assert trainer.state.global_step == 3 and "Step 2 goes on, but telling of it failed" in caplog.text
    assert " % of the parameters gone" in capsys.readouterr().err


def test_a_damaged_best_checkpoint_leaves_the_final_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Damage(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            file = Path(state.best_model_checkpoint) / "apt_training.safetensors"
            file.write_bytes(file.read_bytes()[:100])

    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1}
    best |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "pruning_end": 2}
    trainer = few(tmp_path, eval_dataset=Rows(8), callbacks=[Damage()], **best)
    trainer.train()
    assert "the final model is kept" in caplog.text
    trainer.save_model(str(tmp_path / "model"))
    load_pruned(tmp_path / "model")


# ---------------------------------------------------------------------------- a run of the command line


@pytest.fixture
def recipe(tmp_path: Path) -> list[str]:
    """Words of a small run on texts."""
    tiny_llama().save_pretrained(tmp_path / "dense")
    word_tokenizer().save_pretrained(tmp_path / "dense")
    rows = [{"text": f"w{i % 7} w{i % 5} w{i % 3} w{i % 11}", "label": i % 2} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"model_name_or_path": tmp_path / "dense", "train_file": tmp_path / "rows.jsonl"}
    words |= {"output_dir": tmp_path / "out", "task": "classification", "max_length": 8, "round_to": 4, "lora_r": 2}
    words |= {"use_cpu": "true", "report_to": "none", "measure_latency": "false", "min_hidden": 8, **FEW}
    return [word for key, value in words.items() for word in (f"--{key}", str(value))]


def test_a_metric_or_picture_that_fails_finds_the_model_saved(
    tmp_path: Path, recipe: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("apt_trainer.runs.run.plot_run", broken)
    with pytest.raises(RunError, match=r"saved in .*, but measuring it failed \(RuntimeError: no font\)"):
        train(load_recipe(None, [*recipe, "--hub_token", "secret"]))
    load_pruned(tmp_path / "out")
    assert "task_metric" in json.loads((tmp_path / "out/metrics.json").read_text())
    assert "secret" not in (tmp_path / "out/recipe.json").read_text()


# ---------------------------------------------------------------------------- options of TrainingArguments


@pytest.mark.parametrize(
    "changes",
    [
        {"use_liger_kernel": True},
        {"auto_find_batch_size": True},
        {"enable_jit_checkpoint": True},
        {"optim": "schedule_free_adamw"},
        {"optim": "galore_adamw", "optim_target_modules": ["query"]},
        {"optim": "apollo_adamw", "optim_target_modules": ["query"]},
        {"optim": "lomo"},
        {"optim": "adalomo"},
        {"debug": "underflow_overflow"},
        {"lr_scheduler_type": "greedy", "metric_for_best_model": "loss", "eval_strategy": "epoch"},
    ],
)
def test_an_option_under_which_shapes_cannot_change_is_refused_as_settings(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """So that a plan tells it too."""
    with pytest.raises(UserError, match=f"^{next(iter(changes))}"):
        config(tmp_path, **changes)
    assert next(iter(changes)) in {name for name, _, _ in REFUSED}


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adafactor"},
        {"optim": "sgd"},
        {"optim": "rmsprop"},
        {"optim": "adamw_torch_fused"},
        {"neftune_noise_alpha": 5.0},
        {"torch_empty_cache_steps": 1, "save_only_model": True, "save_strategy": "steps", "save_steps": 2},
        {"bf16_full_eval": True, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": Rows(8)},
        {"label_smoothing_factor": 0.1, "gradient_checkpointing": True, "include_num_input_tokens_seen": "all"},
        {"ddp_static_graph": True, "full_determinism": True, "eval_on_start": True, "eval_dataset": Rows(8)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_that_touches_model_or_optimizer_trains_and_saves(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = few(tmp_path, **options)
    trainer.train()
    trainer.save_model()
    batch = tiny_batch(trainer.model)
    assert trainer.pruner.sparsity() >= 0.5
    assert torch.equal(logits(load_pruned(tmp_path).eval(), batch), logits(trainer.model.eval(), batch))


@pytest.mark.parametrize("name", ["prediction_loss_only", "batch_eval_metrics"])
def test_an_option_that_leaves_the_metric_of_a_run_out_is_refused(
    tmp_path: Path, recipe: list[str], name: str
) -> None:
    with pytest.raises(UserError, match=f"^{name}"):
        train(load_recipe(None, [*recipe, f"--{name}", "true"]))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------- torch_compile


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path: Path, checkpointing: bool) -> None:
    """Compiled where no unit is observed: before pruning begins and after the cut."""
    changes = {"max_steps": 6, "pruning_start": 1, "pruning_end": 3, "gradient_checkpointing": checkpointing}
    runs = {}
    for name, compiled in (("eager", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "aot_eager"})):
        trainer = runs[name] = few(tmp_path / name, **changes, **compiled)
        calls: list[int] = []
        running = trainer.compiled.running

        def noted(model: Any, observed: bool, calls: list[int] = calls, running: Any = running) -> Any:
            calls.append(observed)
            return running(model, observed)

        trainer.compiled.running = noted  # type: ignore[method-assign]
        trainer.train()
        trainer.save_model()
        assert calls == [False, True, True, False, False, False]
    for step, losses in losses_of(runs["eager"]).items():
        assert losses_of(runs["compiled"])[step] == pytest.approx(losses, rel=1e-5)
    batch = tiny_batch(runs["eager"].model)
    small = [load_pruned(tmp_path / name).eval() for name in runs]
    assert gap(*(logits(model, batch) for model in small)) < 1e-5
    assert not any("_orig_mod" in name for model in small for name in model.state_dict())


def test_a_compiled_run_goes_on_as_it_would_have(tmp_path: Path) -> None:
    changes = {"max_steps": 5, "torch_compile_backend": "aot_eager"}
    straight = few(tmp_path, callbacks=[SaveAt([3])], **changes)
    straight.train()
    resumed = few(tmp_path, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, one), other in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch_compile_backend": "inductr"}, "Did you mean 'inductor'"),
        ({"torch_compile_backend": "inductor", "torch_compile_mode": "fast"}, "does not work on this machine"),
    ],
)
def test_a_compiler_that_is_not_there_is_told_before_training(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compile_options(config(tmp_path, **changes))


TWO = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from apt_trainer.errors import RunError, UserError
from apt_trainer.training.engines.agreement import failing_together
from edges.test_saving import few, unsaved_tokenizer
from integration.factories import losses_of
folder, first, losses = Path(sys.argv[1]), os.environ["RANK"] == "0", []
for backend in (None, "aot_eager"):
    trainer = few(folder / str(backend), per_device_train_batch_size=4, torch_compile_backend=backend)
    trainer.train()
    losses.append(losses_of(trainer))
assert all(abs(a - b) < 1e-5 for step in losses[0] for a, b in zip(losses[0][step], losses[1][step], strict=True))
def told(call):
    try:
        call()
    except (UserError, RunError) as error:
        name = f"{{type(error).__name__}}: {{error}}"
        (folder / f"{{call.__name__}}{{os.environ['RANK']}}").write_text(name)
def rehearse():
    few(folder / "early", processing_class=unsaved_tokenizer(1) if first else None).train()
def save():
    trainer = few(folder / "late", processing_class=unsaved_tokenizer(2) if first else None)
    trainer.train()
    with failing_together():
        trainer.save_model()
told(rehearse)
told(save)
os._exit(0)
"""


@pytest.mark.distributed
def test_two_processes_compile_and_fail_together(tmp_path: Path) -> None:
    """A tokenizer of the first process alone cannot be saved: before training, and after it."""
    two_processes(tmp_path, TWO, *(f"{name}{rank}" for name in ("rehearse", "save") for rank in (0, 1)))
    for rank in (0, 1):
        assert (tmp_path / f"rehearse{rank}").read_text().startswith("UserError: The finished model could")
        assert "rescued-" in (tmp_path / f"save{rank}").read_text()
