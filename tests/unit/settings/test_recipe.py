"""Recipes: reading YAML, overrides, types, and the text of every error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from apt_trainer.errors import UserError
from apt_trainer.settings.config import APTConfig
from apt_trainer.settings.presets import PRESETS
from apt_trainer.settings.recipe import check_recipe, load_recipe, read_values

REPOSITORY = Path(__file__).resolve().parents[3]
OTHERS = ("accelerate", "ablations", "depth", "lm_eval")  # folders of files that are no recipes
SHIPPED = sorted(p for p in (REPOSITORY / "recipes").rglob("*.yaml") if p.parent.name not in OTHERS)


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str, output_dir: str | None = "out") -> str:
        path = tmp_path / "r.yaml"
        path.write_text(text + (f"\noutput_dir: {tmp_path / output_dir}\n" if output_dir else ""), encoding="utf-8")
        return str(path)

    return write


def error_of(path: str | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).removeprefix(f"{path}: ")


def test_keys_reach_their_group(recipe_file):
    path = recipe_file("dtype: bfloat16\ntask: regression\ntarget_sparsity: 0.5\nlatency_length: 64\nseed: 7")
    recipe = load_recipe(path, ["--max_steps", "3"])
    assert isinstance(recipe.training, APTConfig)
    assert (recipe.model.dtype, recipe.data.task) == ("bfloat16", "regression")
    training = recipe.training
    assert (training.target_sparsity, training.latency_length, training.seed) == (0.5, 64, 7)
    assert training.max_steps == 3
    assert recipe.path == path
    assert set(recipe.given) == {
        *("dtype", "task", "target_sparsity", "latency_length", "seed", "max_steps", "output_dir")
    }


def test_command_line_wins_over_file_and_its_last_word_counts(recipe_file):
    recipe = load_recipe(recipe_file("seed: 1\nlora_r: 4"), ["--seed", "2", "--seed=3"])
    assert (recipe.training.seed, recipe.training.lora_r) == (3, 4)


def test_without_a_file(tmp_path):
    recipe = load_recipe(None, ["--output_dir", str(tmp_path)])
    assert recipe.path is None
    assert recipe.training.output_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--learning_rate", "2e-4"], "learning_rate", 2e-4),
        (["--learning-rate=2E-4"], "learning_rate", 2e-4),
        (["--warmup_steps", "1e2"], "warmup_steps", 100.0),
        (["--seed", "-1"], "seed", -1),
        (["--target_sparsity", "null"], "target_sparsity", None),
        (["--target_sparsity", "1"], "target_sparsity", 1),
        (["--tune_embeddings"], "tune_embeddings", True),
        (["--tune_embeddings", "--seed", "1"], "tune_embeddings", True),
        (["--preset_overrides", "{train_head: false}"], "preset_overrides", {"train_head": False}),
        (["--prune_targets", "heads", "neurons"], "prune_targets", ["heads", "neurons"]),
        (["--prune_targets", "heads"], "prune_targets", ["heads"]),
        (["--prune_targets", "[heads, neurons]"], "prune_targets", ["heads", "neurons"]),
        (["--latency_batch_sizes", "1", "8"], "latency_batch_sizes", [1, 8]),
        (["--latency_batch_sizes", "4"], "latency_batch_sizes", [4]),
        (["--lora_target_modules", "1", "2"], "lora_target_modules", ["1", "2"]),
        (["--lora_target_modules", "null"], "lora_target_modules", None),
        (["--lr_scheduler_kwargs", "{num_cycles: 2}"], "lr_scheduler_kwargs", {"num_cycles": 2}),
        (["--report_to", "none"], "report_to", "none"),
        (["--report_to", "tensorboard", "wandb"], "report_to", ["tensorboard", "wandb"]),
        (["--resume_from_checkpoint", "true"], "resume_from_checkpoint", True),
        (["--resume_from_checkpoint", "out/checkpoint-1"], "resume_from_checkpoint", "out/checkpoint-1"),
        (["--eval_strategy", "no"], "eval_strategy", "no"),
        (["--run_name", "5"], "run_name", "5"),
        (["--run_name=a=b # c"], "run_name", "a=b # c"),
        (["--run_name", '"5"'], "run_name", "5"),
        (["--text_column", "*x: [y"], "text_column", "*x: [y"),
        (["--label_column", "true"], "label_column", "true"),
        (["--text_column="], "text_column", None),
    ],
)
def test_override_forms(words, key, value):
    read = read_values(None, words)[key]
    assert read == value
    assert type(read) is type(value)


def test_keys_that_a_preset_holds_now_are_read_with_one_warning(recipe_file):
    recipe = recipe_file("preset: paper\nrank_score: signed\noutlier_weight: 0.2")
    with pytest.warns(FutureWarning, match="rank_score, outlier_weight, train_head are values of a") as told:
        training = load_recipe(recipe, ["--train_head", "false"]).training
    assert len(told) == 1 and not hasattr(training, "rank_score")
    assert training.details == replace(PRESETS["paper"], rank_score="signed", outlier_weight=0.2, train_head=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank_rule", "papers"], "rank_rule='papers' is not known.*Did you mean 'paper'"),
        (["--outlier_weight", "-1"], "outlier_weight=-1 must be a number from 0"),
        (["--train_head", "3"], "train_head=3 has the wrong type"),
        (["--preset_overrides", "{train_heads: false}"], "key='train_heads' is not known.*Did you mean 'train_head'"),
        (["--preset", "papers"], "preset='papers' is not known.*Did you mean 'paper'"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_values_that_no_preset_can_have(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        check_recipe(None, ["--output_dir", str(tmp_path), *words])


def test_null_unsets_a_list(recipe_file):
    recipe = recipe_file("lm_eval_tasks: [piqa]\nprune_targets: [heads]")
    values = read_values(recipe, ["--lm_eval_tasks", "null", "--prune_targets", "null"])
    assert (values["lm_eval_tasks"], values["prune_targets"]) == ([], ["heads", "neurons", "hidden"])


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("2.0e-4", 2e-4), (".5", 0.5), ("1.", 1.0), ("-1E+2", -100.0), ("1", 1), (".inf", float("inf"))],
)
def test_number_forms_in_a_file(recipe_file, text, value):
    assert read_values(recipe_file(f"learning_rate: {text}"))["learning_rate"] == value


def test_words_that_yaml_once_took_for_something_else(recipe_file):
    text = "eval_strategy: no\nrun_name: off\ntext_column: 2024-01-01\nmodel_revision: 010\nlabel_column: 1:30"
    values = read_values(recipe_file(text, output_dir=None))
    assert values == {
        "eval_strategy": "no",
        "run_name": "off",
        "text_column": "2024-01-01",
        "model_revision": "010",
        "label_column": "1:30",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target_sparsty: 0.5", "unknown key 'target_sparsty'. Did you mean 'target_sparsity'?"),
        ("evaluation_strategy: no", "unknown key 'evaluation_strategy'. Did you mean 'eval_strategy'?"),
        ("qqqq: 1", "unknown key 'qqqq'. All keys: apt-trainer train --help."),
        ("3: 1", "unknown key '3'. All keys: apt-trainer train --help."),
        ("learning_rate: fast", "learning_rate='fast' has the wrong type: expected a number."),
        ("lora_r: true", "lora_r=true has the wrong type: expected a whole number."),
        ("lora_r: 2.5", "lora_r=2.5 has the wrong type: expected a whole number."),
        ("max_length: null", "max_length=null has the wrong type: expected a whole number."),
        ("tune_embeddings: yes", "tune_embeddings='yes' has the wrong type: expected true or false."),
        ("prune_targets: heads", "prune_targets='heads' has the wrong type: expected a list of texts."),
        ("prune_targets: [heads, 3]", 'prune_targets=["heads", 3] has the wrong type: expected a list of texts.'),
        (
            "lora_target_modules: {a: 1}",
            'lora_target_modules={"a": 1} has the wrong type: expected a list of texts or null.',
        ),
        ("target_sparsity: high", "target_sparsity='high' has the wrong type: expected a number or null."),
        ("model_revision: 1.0", "model_revision=1.0 has the wrong type: expected text. Put it in quotes."),
        ("run_name: 5", "run_name=5 has the wrong type: expected text or null. Put it in quotes."),
        ("eval_strategy: 5", "eval_strategy=5 has the wrong type: expected text. Put it in quotes."),
        (
            "dtype: int8",
            "dtype='int8' is not known. Choose one of: auto, float32, bfloat16, float16.",
        ),
        (
            "task: clasification",
            "task='clasification' is not known. Choose one of: classification, multi_label_classification, "
            "regression, embedding, image_classification, token_classification, question_answering, "
            "language_modeling, masked_language_modeling, instruction_tuning, summarization, translation. "
            "Did you mean 'classification'?",
        ),
    ],
)
def test_wrong_key_or_value_in_a_file(recipe_file, text, message):
    assert error_of(recipe_file(text)) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe is empty. Write one 'key: value' per line, for example output_dir: out/run1."),
        ("# nothing\n", "the recipe is empty. Write one 'key: value' per line, for example output_dir: out/run1."),
        ("- a\n", "a recipe is a mapping, one 'key: value' per line, but the file holds a list."),
        ("seed\n", "a recipe is a mapping, one 'key: value' per line, but the file holds only 'seed'."),
        ("seed: 1\nlora_r: 2\nseed: 3\n", "not a valid YAML file: line 3: key 'seed' appears twice."),
        ("seed: 1\n", "output_dir is missing. Say where to write, for example --output_dir out/run1."),
        ("output_dir: null\n", "output_dir is missing. Say where to write, for example --output_dir out/run1."),
    ],
)
def test_wrong_file(recipe_file, text, message):
    assert error_of(recipe_file(text, output_dir=None)) == message


def test_broken_yaml_names_the_line(recipe_file):
    assert error_of(recipe_file("seed: 1\nlora_r: [2", output_dir=None)).startswith("not a valid YAML file: line 2: ")


def test_missing_file():
    assert error_of("nowhere.yaml").startswith("no such file. Give a recipe with --config, or one that comes with")


def test_file_that_is_not_text(tmp_path):
    assert "cannot be read as a recipe" in error_of(str(tmp_path))
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as a recipe" in error_of(str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0.5"], "unexpected argument '0.5'. Overrides are written --key value."),
        (["--lern_rate", "1"], "unknown key 'lern_rate'. Did you mean 'learning_rate'?"),
        (["--learning_rate", "x"], "learning_rate='x' has the wrong type: expected a number."),
        (["--seed", "1", "2"], "seed=[1, 2] has the wrong type: expected a whole number."),
        (["--max_length", "null"], "max_length=null has the wrong type: expected a whole number."),
        (["--max_length"], "max_length=true has the wrong type: expected a whole number."),
    ],
)
def test_wrong_override(words, message):
    assert error_of(None, *words) == f"command line: {message}"


def test_errors_of_the_settings_name_the_recipe(recipe_file):
    path = recipe_file("target_sparsity: 2")
    with pytest.raises(UserError, match=r"r\.yaml: target_sparsity=2 must lie between 0 and 1"):
        load_recipe(path)


def test_errors_of_training_arguments_name_the_recipe(recipe_file):
    path = recipe_file("eval_strategy: sometimes")
    with pytest.raises(UserError, match=r"r\.yaml: sometimes is not a valid IntervalStrategy"):
        load_recipe(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_shipped_recipes_are_valid(path):
    assert check_recipe(str(path))["output_dir"].startswith("out/")
