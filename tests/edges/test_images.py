"""Models of images, where something could take them for models of text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import invariants
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow
from tiny import LABELS, randomise
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

from apt_trainer import AdaptivePruner, APTConfig, UserError, cli, load_pruned
from apt_trainer.evaluate import compare
from apt_trainer.evaluate.predictions import PredictOptions, Predictor
from apt_trainer.evaluate.saved import LanguageRequest, evaluate_language
from apt_trainer.measure import count_flops
from apt_trainer.measure.latency import example_inputs
from apt_trainer.runs import dry_run, run
from apt_trainer.settings import ModelSettings
from apt_trainer.settings.recipe import load_recipe
from apt_trainer.studies.inputs import prepare
from apt_trainer.tasks import architecture_of

NAMES = ("zebra", "ant", "mole")
COLOURS = ((220, 40, 40), (40, 220, 40), (40, 40, 220))
SIDE = 8


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(label: int, row: int) -> Pillow.Image:
    """Of one colour, with a spot whose place changes."""
    image = Pillow.new("RGB", (SIDE + row % 3, SIDE), COLOURS[label])
    image.putpixel((row % SIDE, row // SIDE % SIDE), (255, 255, 255))
    return image


def folder_of(place: Path, rows: int = 30) -> str:
    """Images in a folder for each label; some have a palette, some see through."""
    for row in range(rows):
        image = picture(row % LABELS, row).convert(("RGB", "RGBA", "P")[row // LABELS % 3])
        file = place / NAMES[row % LABELS] / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    (place / NAMES[0] / "notes.txt").write_text("no image")
    return str(place)


def saved_model(place: Path, side: int = SIDE) -> str:
    """A ViT, and an image processor for images of ``side`` pixels."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=SIDE, patch_size=4))
    randomise(model, seed=4)
    model.save_pretrained(place)
    ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(place)
    return str(place)


def recipe(folder: Path, model: str, train: str, *words: str) -> Any:
    fixed = ["--output_dir", str(folder / "out"), "--model_name_or_path", model, "--train_file", train]
    fixed += ["--task", "image_classification", "--validation_fraction", "0.2", "--use_cpu", "--report_to", "none"]
    fixed += ["--per_device_train_batch_size", "8", "--max_steps", "40", "--disable_tqdm", "--min_hidden", "8"]
    fixed += ["--num_pruning_events", "2", "--learning_rate", "1e-2", "--lora_r", "2", "--round_to", "4"]
    return load_recipe(None, [*fixed, *words])


def accuracy(model: PreTrainedModel, processor: Any, files: Sequence[Path]) -> float:
    """By transformers and Pillow alone."""
    images = [Pillow.open(file).convert("RGB") for file in files]
    with torch.no_grad():
        found = model(**processor(images=images, return_tensors="pt")).logits.argmax(-1).tolist()
    names = [model.config.id2label[number] for number in found]
    return sum(name == file.parent.name for name, file in zip(names, files, strict=True)) / len(files)


def test_a_folder_of_images_is_learned_pruned_measured_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = folder_of(tmp_path / "train", 60), folder_of(tmp_path / "test", 18)
    given = recipe(
        tmp_path, saved_model(tmp_path / "model"), train, "--test_file", test, "--prune_targets", "heads", "neurons",
        "hidden", "--target_sparsity", "0.5", "--sparsity_metric", "flops",
        "--class_weights", "balanced", "--measure_latency", "false",
    )  # fmt: skip
    text = dry_run.plan(given)
    assert "block FLOPs at 1×5" in text and '"zebra" × 16' in text and "image" not in text.partition("steps")[2]
    metrics = run.train(given)
    folder = tmp_path / "out"
    files = sorted(Path(test).glob("*/*.png"))
    model, processor = load_pruned(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    assert metrics["task_metric"] == accuracy(model, processor, files) >= 0.8
    assert metrics["task_metric_low"] <= metrics["task_metric"] <= metrics["task_metric_high"]
    assert run.evaluate(str(folder))["test_accuracy"] == metrics["task_metric"]
    predictor = Predictor(ModelSettings(str(folder)), {}, PredictOptions(batch_size=5, device="cpu"))
    said = list(predictor.predict(predictor.given.read(test)))
    right = [Path(one["image"]).parent.name == one["label"] for one in said]
    assert [one["image"] for one in said] == [str(file) for file in files] and sum(right) / 18 == metrics[
        "task_metric"
    ]
    assert len(list(predictor.predict(predictor.given.read(str(files[0]))))) == 1
    monkeypatch.setattr(compare, "MAX_SECONDS", 0.0)
    speed = compare.measure_speed(model, [2], 4, 1)
    assert speed["flops"] == count_flops(model, {"pixel_values": torch.zeros(1, 3, SIDE, SIDE)})
    assert speed["flops"] < speed["flops_dense"] and speed["latency_ms"]["pruned"]["2"]["median_ms"] > 0
    assert "latency_length" not in speed
    assert {path.name for path in folder.iterdir()} >= {"preprocessor_config.json", "modeling_apt.py"}
    card = (folder / "README.md").read_text()
    assert "load_pruned" in card and "tokenizer" not in card.lower()


def test_a_first_recipe_of_images_and_what_the_model_says_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipeline of transformers says the same."""
    model, train = saved_model(tmp_path / "model"), folder_of(tmp_path / "pictures")
    file = str(tmp_path / "r.yaml")
    words = ["--model", model, "--train_file", train, "--output_dir", str(tmp_path / "out"), "--output", file]
    assert cli.main(["init", *words]) == 0
    given = load_recipe(file).given
    assert f"apt-trainer predict {tmp_path / 'out'} --file IMAGE\n" in Path(file).read_text(encoding="utf-8")
    assert given["task"] == "image_classification" and given["label_column"] == "label" and "max_length" not in given
    capsys.readouterr()
    assert cli.main(["predict", model, "--file", train]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    theirs = pipeline("image-classification", model, top_k=None)
    assert len(told) == 30
    for one in told[:3]:
        other = {each["label"]: each["score"] for each in theirs(one["image"])}
        assert one["scores"] == pytest.approx(other, abs=1e-5) and one["label"] == max(other, key=other.__getitem__)
    for verb in (["predict", model, "--text", "a"], ["chat", model, "--prompt", "a"]):
        assert cli.main(verb) == 2
    said = capsys.readouterr().err
    assert "The model takes images. Give --file" in said and "which does not converse" in said


def test_a_column_of_images_is_read_as_bytes_too_and_labels_are_matched_by_name(tmp_path: Path) -> None:
    cells = []
    for row in range(12):
        file = BytesIO()
        picture(row % LABELS, row).convert("L" if row == 5 else "RGB").save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    columns = {"photo": cells, "kind": [row % LABELS for row in range(12)]}
    kinds = {"kind": ClassLabel(names=list(NAMES))}
    plain = {"photo": {"bytes": Value("binary"), "path": Value("string")}}
    for name, features in (("plain", {**plain, "kind": Value("int64")}), ("images", {"photo": Image(), **kinds})):
        Dataset.from_dict(columns, features=Features(features)).to_parquet(tmp_path / f"{name}.parquet")
    model = saved_model(tmp_path / "model")
    data = {}
    for name in ("plain", "images"):
        given = recipe(tmp_path, model, str(tmp_path / f"{name}.parquet"), "--label_column", "kind")
        _, _, data[name] = run.load_inputs(given.model, given)
    assert data["images"].label_names == NAMES and data["plain"].label_names == ("0", "1", "2")
    assert data["plain"].fingerprint == data["images"].fingerprint
    batches = [found.collator([found.train[i] for i in range(4)]) for found in data.values()]
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
    assert batches[0]["pixel_values"].shape == (4, 3, SIDE, SIDE) and batches[0]["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--text_column", "label"], "text_column='label' has no meaning for task: image_classification"),
        (["--image_column", "label"], "must hold images"),
        (["--packing", "true"], "packing=True has no meaning"),
        (["--lm_eval_tasks", "piqa"], "language model"),
        (["--vocabulary", "used"], "vocabulary"),
        (["--export", "gguf"], "cannot be written as GGUF"),
        (["--tokenizer_name_or_path", "wide"], "images of 3 × 12 × 12"),
        (["--tokenizer_name_or_path", "nowhere"], "nowhere"),
        (["--task", "classification"], "needs a model that is a encoder or decoder or encoder-decoder"),
        (["--train_file", "broken"], r"row \d+ of those used .* cannot be read as an image"),
        (["--train_file", "cut"], r"row \d+ of those used .*cut.jpg, cannot be read as an image"),
        (["--train_file", "empty"], "no sub-folders with image files"),
    ],
)
def test_what_cannot_work_is_said_before_a_step(words: list[str], said: str, place: Path, tmp_path: Path) -> None:
    words = [str(place / word) if word in ("wide", "nowhere", "broken", "cut", "empty") else word for word in words]
    given = recipe(tmp_path, str(place / "model"), str(place / "train"), *words)
    for verb in (dry_run.plan, run.train):
        with pytest.raises(UserError, match=said):
            verb(given)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, one with a processor for other sizes, and folders of images, of which one has a file that
    is none, and one a file that is cut short."""
    place = tmp_path_factory.mktemp("images")
    saved_model(place / "model")
    saved_model(place / "wide", side=12)
    folder_of(place / "train")
    folder_of(place / "broken")
    (place / "broken" / NAMES[0] / "3.png").write_bytes(b"no image at all")
    folder_of(place / "cut")
    cut = place / "cut" / NAMES[0] / "cut.jpg"
    Pillow.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:-500])
    (place / "empty" / "zebra").mkdir(parents=True)
    return place


def test_text_and_images_are_not_taken_for_each_other(place: Path) -> None:
    with pytest.raises(UserError, match="reads text, and vit takes images"):
        evaluate_language(ModelSettings(str(place / "model")), LanguageRequest(tasks=["piqa"]))
    given = Predictor(ModelSettings(str(place / "model")), {}, PredictOptions()).given
    for read in (lambda: given.rows_of_texts(["a"], None), lambda: given.read(str(place / "empty"))):
        with pytest.raises(UserError, match="image"):
            read()
    with pytest.raises(UserError, match="takes images"):
        prepare(ModelSettings(str(place / "model")), None)
    bert = invariants.model_of("bert")
    assert architecture_of(bert.config) == "encoder" and "input_ids" in example_inputs(bert, 1, 4)


def test_a_head_that_reads_two_vectors_gets_both_of_their_widths(tmp_path: Path) -> None:
    """DINOv2's: under other labels, in a class of its own and in that of the base."""
    model = invariants.model_of("dinov2")
    _, spaces, _ = invariants.parts(model)
    plan = invariants.a_plan(spaces, "hidden", gone=True)
    invariants.pruned_copy(model, plan).save_pretrained(tmp_path)
    hidden = plan.counts["hidden"]
    again = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert again.classifier.weight.shape == (7, 2 * hidden) and again.classifier.in_features == 2 * hidden
    assert again(**invariants.tiny_batch(again)).logits.shape == (4, 7)


@pytest.mark.parametrize("metric", ["latency", "memory"])
def test_budgets_of_seconds_and_bytes_count_images(metric: str, tmp_path: Path) -> None:
    model = invariants.model_of("deit")
    args = APTConfig(str(tmp_path), use_cpu=True, sparsity_metric=metric, target_sparsity=0.1, min_hidden=8)
    pruner = AdaptivePruner(model, args)
    assert pruner.budget.cost.total(pruner.plan.counts) > 0


def test_a_class_that_cannot_be_trained_is_not_chosen(place: Path, tmp_path: Path) -> None:
    """DeiT is published with two heads, which have no loss."""
    model = invariants.model_of("deit")
    model.config.architectures = ["DeiTForImageClassificationWithTeacher"]
    model.save_pretrained(tmp_path / "deit")
    saved = json.loads((tmp_path / "deit" / "config.json").read_text())
    (tmp_path / "deit" / "config.json").write_text(
        json.dumps(saved | {"architectures": ["DeiTForImageClassificationWithTeacher"]})
    )
    ViTImageProcessorPil(size={"height": 6, "width": 6}).save_pretrained(tmp_path / "deit")
    given = recipe(tmp_path, str(tmp_path / "deit"), str(place / "train"))
    assert "DeiTForImageClassification, " in dry_run.plan(given)
