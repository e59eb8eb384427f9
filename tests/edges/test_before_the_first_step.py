"""What is said before a step is trained: of steps and fractions, of budgets that leave nothing, of numbers that cannot
be meant and packages that are missing; and how a run goes on that was ended early."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import warm
import yaml
from integration.factories import DEFAULTS, Rows, events_of
from texts import save_dense, words
from tiny import tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from apt_trainer import APTConfig, APTTrainer, UserError, cli
from apt_trainer.plan.schedule import fewer_events, make_schedule
from apt_trainer.pruning.budget import least_model
from apt_trainer.pruning.pruner import AdaptivePruner
from apt_trainer.runs.dense_baseline import dense_settings
from apt_trainer.runs.run import train
from apt_trainer.settings import MethodSettings
from apt_trainer.settings.packages import check_packages
from apt_trainer.settings.recipe import load_recipe
from apt_trainer.training.termination import finishing

FILM = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a", "the"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder, its tokenizer, and texts with two labels that the words tell."""
    folder = tmp_path_factory.mktemp("classifier")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(FILM)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder / "model")
    BertForSequenceClassification(tiny_config("bert", num_labels=2)).save_pretrained(folder / "model")
    rows = [{"text": f"a {FILM[4 + i % 2]} film", "label": FILM[4 + i % 2]} for i in range(80)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe_file(classifier: Path, folder: Path, **changes: Any) -> str:
    """A recipe of a run of 8 steps that measures nothing at its end."""
    values: dict[str, Any] = {
        "model_name_or_path": str(classifier / "model"),
        "train_file": str(classifier / "rows.jsonl"),
        "max_length": 16,
        "output_dir": str(folder / "out"),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "round_to": 4,
        "min_hidden": 8,
        "use_cpu": True,
        "disable_tqdm": True,
        "measure_latency": False,
        **changes,
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not ...}))
    return str(file)


# ---------------------------------------------------------------------------- steps or a fraction of all steps


@pytest.mark.parametrize(("value", "step"), [(1.0, 100), (0.5, 50), (1, 1), (50, 50), (50.0, 50), (0.01, 1)])
def test_a_float_up_to_1_is_a_fraction_and_1_is_the_whole_run(value: float, step: int) -> None:
    schedule = make_schedule(MethodSettings(pruning_start=0, pruning_end=value, distillation="none"), 100)
    assert schedule.end == step
    ends = MethodSettings(pruning_start=0, pruning_end=1, distillation_start=0, distillation_end=value)
    assert make_schedule(ends, 100).distillation_end == step
    masks = MethodSettings(pruning_start=0, pruning_end=100, num_pruning_events=1, mask_window=value)
    assert make_schedule(masks, 100).window == step


@pytest.mark.parametrize(
    "key", ["pruning_start", "pruning_end", "distillation_start", "distillation_end", "mask_window"]
)
@pytest.mark.parametrize("value", [-1, -0.5, 2.5, float("nan"), float("inf")])
def test_what_is_neither_steps_nor_a_fraction_is_refused(key: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{key}=.* must be a number of steps"):
        MethodSettings(**{key: value}).check()


@pytest.mark.parametrize("how", ["file", "command line"])
@pytest.mark.parametrize(("text", "steps"), [("1.0", 40), ("1", 1), ("0.5", 20), ("20", 20)])
def test_recipe_and_command_line_tell_1_from_the_whole_run(tmp_path: Path, how: str, text: str, steps: int) -> None:
    """Of the keys of transformers too, for which it would be one step."""
    keys = ("warmup_steps", "eval_steps", "save_steps", "logging_steps", "pruning_end")
    file = tmp_path / "recipe.yaml"
    settings = "".join(f"{key}: {text}\n" for key in keys) if how == "file" else ""
    file.write_text(f"output_dir: {tmp_path / 'out'}\neval_strategy: steps\nsave_strategy: steps\n{settings}")
    given = [word for key in keys for word in (f"--{key}", text)] if how == "command line" else []
    args = load_recipe(str(file), [*given, "--use_cpu"]).training
    assert args.get_warmup_steps(40) == steps
    state = APTTrainer(tiny_model("bert"), APTConfig(str(tmp_path / "out"), **DEFAULTS), Rows()).state
    state.compute_steps(args, 40)
    assert (state.eval_steps, state.save_steps, state.logging_steps) == (steps, steps, steps)
    assert make_schedule(MethodSettings(pruning_start=0, pruning_end=args.pruning_end), 40).end == steps


# ---------------------------------------------------------------------------- short runs


@pytest.mark.parametrize("when", ["early", "late", "before", "after"])
@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 6, 8, 10, 17, 40])
def test_defaults_fit_a_run_of_any_length(when: str, total: int) -> None:
    settings = MethodSettings(pruning_time=when, distillation="self" if when in ("early", "late") else "none")
    schedule = make_schedule(settings, total)
    assert 1 <= len(schedule.events) <= settings.num_pruning_events
    assert list(schedule.events) == sorted(set(schedule.events)) and schedule.start < schedule.end <= total
    said = fewer_events(settings, schedule)
    assert (said is not None) == (len(schedule.events) < 5 and when != "after")


def test_a_run_of_8_steps_with_defaults_prunes_and_says_that_it_has_one_event(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = recipe_file(classifier, tmp_path)
    said = "num_pruning_events=5 do not fit between step 1 and 2 of 8: there will be 1."
    assert cli.main(["plan", "--config", file]) == 0
    assert said in capsys.readouterr().out
    assert cli.main(["train", "--config", file]) == 0
    assert said in caplog.text
    assert [event["step"] for event in events_of(tmp_path / "out", "prune")] == [2]
    assert json.loads((tmp_path / "out/metrics.json").read_text())["sparsity"] >= 0.6


# ---------------------------------------------------------------------------- budgets that leave nothing


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
@pytest.mark.parametrize("metric", ["params", "flops", "memory"])
@pytest.mark.parametrize("targets", [["heads", "neurons", "hidden"], ["heads", "neurons"], ["sublayers"]])
def test_a_target_that_leaves_nothing_names_the_largest_that_keeps_a_model(
    family: str, metric: str, targets: list[str]
) -> None:
    settings: dict[str, Any] = {"prune_targets": targets, "sparsity_metric": metric, "round_to": 4, "min_hidden": 8}

    def pruner(target: float) -> AdaptivePruner:
        return AdaptivePruner(tiny_model(family), MethodSettings(target_sparsity=target, **settings))

    with pytest.raises(UserError, match="Lower target_sparsity") as refused:
        pruner(0.9999)
    largest = float(str(refused.value).partition("largest that does not is ")[2].partition(". ")[0])
    with pytest.raises(UserError, match="Lower target_sparsity"):
        pruner(largest + 2e-4)
    kept = pruner(largest)
    counts = least_model(kept.spaces, kept.sublayers, kept.dense_plan, kept.budget.cost, kept.budget.limits)
    total = kept.budget.cost.total
    assert total(counts) <= (1 - largest) * total(kept.dense_plan.counts) * (1 + 1e-9)
    for kind in ("attention", "mlp"):
        left = [counts[sublayer.space] > 0 for sublayer in kept.sublayers if sublayer.kind == kind]
        assert 3 * sum(left) >= len(left)


def test_a_latency_budget_is_checked_once_it_is_measured() -> None:
    settings = MethodSettings(
        target_sparsity=0.9999, sparsity_metric="latency", reference_batch_size=2, reference_length=16
    )
    pruner = AdaptivePruner(tiny_model("bert"), settings)
    with pytest.raises(UserError, match="Lower target_sparsity|take time that can be measured"):
        pruner.start(make_schedule(settings, 100))


def test_plan_and_train_refuse_a_target_that_leaves_nothing(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe_file(classifier, tmp_path, target_sparsity=0.9999)
    for verb in ("plan", "train"):
        assert cli.main([verb, "--config", file]) == 2
        assert "target_sparsity=0.9999 takes more than" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------- numbers that cannot be meant


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("target_sparsity", 60, "between 0 and 1 .* For 60 % write 0.6"),
        ("target_sparsity", -0.5, "between 0 and 1"),
        ("target_sparsity", 0, "null prunes nothing"),
        ("target_sparsity", 1.0, "between 0 and 1"),
        ("target_sparsity", float("nan"), "between 0 and 1"),
        ("learning_rate", 0, "must be above 0"),
        ("full_learning_rate", 0, "must be above 0"),
        ("num_train_epochs", 0, "num_train_epochs=0 must be above 0"),
        ("max_steps", 0, "max_steps=0 must be at least 1"),
        ("max_steps", -5, "max_steps=-5 must be at least 1"),
        ("per_device_train_batch_size", 0, "must be at least 1"),
        ("per_device_eval_batch_size", 0, "must be at least 1"),
        ("gradient_accumulation_steps", 0, "must be at least 1"),
        ("eval_accumulation_steps", 0, "must be at least 1"),
        ("eval_steps", 0, "must be a number of steps"),
        ("save_steps", 0, "must be a number of steps"),
        ("logging_steps", 0, "must be a number of steps"),
        ("warmup_steps", -1, "must be a number of steps"),
        ("save_total_limit", 0, "must be at least 1; null keeps all"),
        ("weight_decay", -0.1, "must be at least 0"),
        ("max_grad_norm", -1.0, "must be at least 0"),
        ("adam_beta1", 1.0, "from 0 to below 1"),
        ("label_smoothing_factor", 1.5, "from 0 to below 1"),
        ("seed", -1, r"from 0 to 2\*\*32 - 1"),
        ("dataloader_num_workers", -1, "must be at least 0"),
        ("max_length", 0, "max_length=0 must be at least 1"),
        ("max_length", -3, "max_length=-3 must be at least 1"),
        ("max_train_samples", 0, "must be at least 1"),
        ("validation_fraction", 1.5, "must lie between 0 and 1"),
        ("latency_length", 0, "must be at least 1"),
        ("latency_batch_sizes", [0], "numbers from 1"),
        ("distillation_temperature", 0, "must be positive"),
        ("lora_r", 0, "must be at least 1"),
    ],
)
def test_a_number_that_cannot_be_meant_is_one_sentence_of_plan(
    classifier: Path, tmp_path: Path, key: str, value: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    left_out = {"max_steps": ...} if key == "num_train_epochs" else {}
    file = recipe_file(classifier, tmp_path, **{**left_out, key: value})
    assert cli.main(["plan", "--config", file]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1 and key in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"label_names": ["label"]},
            r"label_names=\['label'\], but a batch of this task holds .*labels.*label_column",
        ),
        ({"metric_for_best_model": "f2"}, "metric_for_best_model='f2' is not known.*loss, accuracy, f1"),
        ({"metric_for_best_model": "eval_acuracy"}, "Did you mean 'accuracy'"),
    ],
)
def test_a_name_that_no_batch_or_evaluation_has_is_one_sentence_of_plan(
    classifier: Path, tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, **changes}
    assert cli.main(["plan", "--config", recipe_file(classifier, tmp_path, **changes)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said.splitlines()[-1]) and said.count("error:") == 1
    good = {"label_names": ["labels"], "metric_for_best_model": "eval_f1_macro"}
    assert cli.main(["plan", "--config", recipe_file(classifier, tmp_path, **{**changes, **good})]) == 0


def test_an_attention_without_gradients_on_this_device_is_refused_by_plan(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--config", recipe_file(classifier, tmp_path, attn_implementation="flex_attention")]) == 2
    assert "'flex_attention' has no gradients on a CPU" in capsys.readouterr().err


# ---------------------------------------------------------------------------- packages that are missing


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Hides installed packages, as if they had never been installed."""
    found = importlib.util.find_spec

    def hide(*names: str) -> None:
        def spec(name: str, package: str | None = None) -> ModuleSpec | None:
            return None if name.partition(".")[0] in names else found(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", spec)
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


@pytest.mark.parametrize(
    ("settings", "package", "pip"),
    [
        ({"report_to": "wandb"}, "wandb", "wandb"),
        ({"report_to": ["tensorboard", "mlflow"]}, "mlflow", "mlflow"),
        ({"report_to": "comet_ml"}, "comet_ml", "comet_ml"),
        ({"optim": "adamw_8bit"}, "bitsandbytes", r"'apt-trainer\[quantize\]'"),
        ({"optim": "paged_adamw_32bit"}, "bitsandbytes", r"'apt-trainer\[quantize\]'"),
        ({"optim": "adamw_torch_8bit"}, "torchao", r"'apt-trainer\[quantize\]'"),
        ({"attn_implementation": "flash_attention_2"}, "flash_attn", "flash-attn --no-build-isolation"),
        ({"attn_implementation": "kernels-community/flash-attn2"}, "kernels", "kernels"),
        ({"task": "instruction_tuning"}, "trl", r"'apt-trainer\[lm\]'"),
        ({"task": "language_modeling"}, "trl", r"'apt-trainer\[lm\]'"),
        ({"task": "summarization"}, "rouge_score", r"'apt-trainer\[lm\]'"),
        ({"task": "translation"}, "sacrebleu", r"'apt-trainer\[lm\]'"),
        ({"lm_eval_tasks": ["piqa"]}, "lm_eval", r"'apt-trainer\[lm_eval\]'"),
        ({"model_name_or_path": "/no/model.gguf"}, "gguf", r"'apt-trainer\[lm\]'"),
        ({"deepspeed": "ds.json"}, "deepspeed", r"'apt-trainer\[deepspeed\]'"),
    ],
)
def test_a_missing_package_is_named_before_anything_loads(
    classifier: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    package: str,
    pip: str,
    without: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The model and the data are not there either: the package comes first."""
    nothing = {"model_name_or_path": "/no/model", "train_file": "/no/rows.jsonl"}
    file = recipe_file(classifier, tmp_path, **{**nothing, **settings})
    without(package, "kernels")
    for verb in ("plan", "train"):
        assert cli.main([verb, "--config", file]) == 2
        said = capsys.readouterr().err
        assert re.search(
            f"needs the package {package}, which is not installed. Install it: pip install {pip}\n$", said
        )
        assert said.count("\n") == 1 and next(iter(settings)).partition("_")[0] in said
    assert not (tmp_path / "out").exists()


def test_a_launch_says_so_before_it_starts_processes(
    classifier: Path, tmp_path: Path, without: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe_file(classifier, tmp_path, report_to="wandb")
    without("deepspeed", "wandb")
    assert cli.main(["train", "--config", file, "--accelerate_config", "ddp_cpu"]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert cli.main(["train", "--config", file, "--report_to", "none", "--accelerate_config", "zero2_cpu"]) == 2
    assert "pip install 'apt-trainer[deepspeed]'" in capsys.readouterr().err


def test_what_measures_a_finished_model_says_so_before_it_loads(
    tmp_path: Path, without: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    saved = save_dense(tmp_path, words(100))
    without("torchao", "bitsandbytes", "lm_eval")
    weights = next((saved / "model").glob("*.safetensors"))
    weights.unlink()  # nothing loads without
    text = ["evaluate", str(saved / "model"), "--perplexity", str(saved / "text.txt")]
    for words_, pip in (
        ([*text, "--quantize", "int8"], "quantize"),
        ([*text, "--quantize", "nf4"], "quantize"),
        (["evaluate", str(saved / "model"), "--lm_eval", "piqa"], "lm_eval"),
    ):
        assert cli.main(words_) == 2
        assert f"pip install 'apt-trainer[{pip}]'" in capsys.readouterr().err


@pytest.mark.parametrize(("family", "file"), [("t5", "spiece.model"), ("llama", "tokenizer.model")])
def test_a_tokenizer_that_needs_a_package_names_it(
    tmp_path: Path, family: str, file: str, without: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(b"not read")
    without("sentencepiece", "tiktoken")
    words_ = ["--model_name_or_path", str(tmp_path), "--train_file", "x.jsonl", "--output_dir", str(tmp_path / "out")]
    assert cli.main(["plan", *words_, "--use_cpu"]) == 2
    said = capsys.readouterr().err
    assert "needs the package sentencepiece" in said and "pip install sentencepiece tiktoken protobuf" in said


def test_the_trainer_says_so_at_construction(tmp_path: Path, without: Callable[..., None]) -> None:
    without("bitsandbytes")
    args = APTConfig(output_dir=str(tmp_path), **{**DEFAULTS, "optim": "adamw_8bit"})
    with pytest.raises(UserError, match="needs the package bitsandbytes"):
        APTTrainer(tiny_model("bert"), args, Rows())


def test_a_folder_that_is_called_like_a_package_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As wandb leaves one where it ran."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="pip install wandb"):
        check_packages({"report_to": "wandb"})


@pytest.mark.parametrize("name", [name for name in INTEGRATION_TO_CALLBACK if name != "kubeflow"])
def test_every_tracker_of_transformers_has_a_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for kubeflow, which is reached over the network."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"report_to: {name} needs the package .* Install it: pip install"):
        check_packages({"report_to": name})


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_every_optimizer_that_transformers_refuses_is_refused(tmp_path: Path, name: str) -> None:
    given = {**DEFAULTS, "optim": name, "optim_target_modules": ["query"], "optim_args": "rank=2"}
    try:
        args = APTConfig(str(tmp_path), **given)
    except UserError as error:
        assert "none of which survives a change of shape" in str(error)
        return
    missing = False
    try:
        APTTrainer.get_optimizer_cls_and_kwargs(args, tiny_model("bert"))
    except (ImportError, ValueError) as error:
        missing = "install" in str(error) or isinstance(error, ImportError)
    try:
        check_packages({"optim": name})
        assert not missing
    except UserError:
        assert missing or importlib.util.find_spec("torch_xla") is None


def test_a_tracker_that_nobody_knows_is_refused(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe_file(classifier, tmp_path, report_to="wanbd")
    for verb in ("plan", "train"):
        assert cli.main([verb, "--config", file]) == 2
        assert "Did you mean 'wandb'" in capsys.readouterr().err


# ---------------------------------------------------------------------------- a run that was ended early


def until(found: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not found():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_ended_before_its_first_checkpoint_is_begun_anew(
    classifier: Path, tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an event behind it; in a process of its own, as Ctrl-C and a cluster end it."""
    long = recipe_file(
        classifier,
        tmp_path,
        max_steps=100_000,
        pruning_start=1,
        pruning_end=9,
        distillation_end=20,
        save_strategy="no",
    )
    command = [warm.python(), "-m", "apt_trainer", "train", "--config", long]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True)
    until((tmp_path / "out/events.jsonl").exists, process)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    if number == signal.SIGTERM:  # which writes a checkpoint
        assert process.returncode == 143 and "resume_from_checkpoint: true" in said
        assert cli.main(["train", "--config", recipe_file(classifier, tmp_path)]) == 2
        assert "resume_from_checkpoint: auto, which goes on" in capsys.readouterr().err
        return
    assert process.returncode == 130 and "Traceback" not in said
    assert "resume_from_checkpoint: auto, which goes on from the last checkpoint and begins anew" in said
    assert (tmp_path / "out/events.jsonl").exists()
    short = recipe_file(classifier, tmp_path)
    assert cli.main(["train", "--config", short, "--resume_from_checkpoint", "true"]) == 2
    assert "holds no checkpoint. To begin, set resume_from_checkpoint: auto" in capsys.readouterr().err
    for go_on in ([], ["--resume_from_checkpoint", "auto"]):
        assert cli.main(["plan", "--config", short, *go_on]) == 0
    assert cli.main(["train", "--config", short, "--resume_from_checkpoint", "auto"]) == 0
    assert [event["step"] for event in events_of(tmp_path / "out", "prune")] == [2]  # of this run alone
    assert json.loads((tmp_path / "out/metrics.json").read_text())["train_steps"] == 8


def test_a_begun_run_whose_settings_change_is_begun_anew_without_its_events(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/recipe.json").write_text(json.dumps({"seed": 9}))
    (tmp_path / "out/events.jsonl").write_text(json.dumps({"step": 0, "kind": "prune"}) + "\n")
    train(load_recipe(recipe_file(classifier, tmp_path)))
    assert [event["step"] for event in events_of(tmp_path / "out", "prune")] == [2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_the_save_loses_no_model(
    classifier: Path, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from apt_trainer import load_pruned
    from apt_trainer.store import saving

    check = saving.reload_difference

    def told_while_it_checks(model: Any, path: Path) -> float:
        os.kill(os.getpid(), number)
        return check(model, path)

    monkeypatch.setattr(saving, "reload_difference", told_while_it_checks)
    before = signal.getsignal(number)
    code = cli.main(["train", "--config", recipe_file(classifier, tmp_path)])
    assert code == (130 if number == signal.SIGINT else 143)
    assert "holds the finished model" in capfd.readouterr().err
    assert load_pruned(tmp_path / "out").num_labels == 2
    assert not list((tmp_path / "out").glob(".saving-*")) and signal.getsignal(number) == before


def test_a_second_ctrl_c_does_not_wait() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), finishing("saving"):
        for step in range(3):
            steps.append(step)
            os.kill(os.getpid(), signal.SIGINT)
    assert steps == [0, 1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_while_the_dense_model_is_tuned_leaves_no_process_behind(classifier: Path, tmp_path: Path) -> None:
    import psutil

    file = recipe_file(classifier, tmp_path, max_steps=100_000, dense_baseline=True)
    command = [sys.executable, "-m", "apt_trainer", "train", "--config", file]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=-1, stderr=-1, text=True)
    until((tmp_path / "out/dense/recipe.json").exists, process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.terminate()
    assert process.wait(120) == 143
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert cli.main(["train", "--config", recipe_file(classifier, tmp_path, dense_baseline=True)]) == 0


def test_a_dense_baseline_has_no_teacher_and_does_not_stop_early(classifier: Path, tmp_path: Path) -> None:
    taught = {"distillation": "model", "teacher_name_or_path": str(classifier / "model"), "dense_baseline": True}
    waits = {"early_stopping_patience": 1, "eval_strategy": "epoch"}
    recipe = load_recipe(recipe_file(classifier, tmp_path, **taught, **waits), [])
    (tmp_path / "dense.json").write_text(json.dumps(dense_settings(recipe, tmp_path / "out/dense")))
    dense = load_recipe(str(tmp_path / "dense.json"), []).training
    assert dense.teacher_name_or_path is None and dense.early_stopping_patience is None and not dense.prunes
