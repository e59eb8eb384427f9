"""The method on Trainers of other libraries and of the user's own."""

from __future__ import annotations

import copy
import importlib
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from texts import llama_config, tiny_llama, word_tokenizer, words
from tiny import WIDTH, randomise, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForSequenceClassification, Seq2SeqTrainer, Trainer, set_seed
from trl import SFTConfig, SFTTrainer

import apt_trainer
from apt_trainer import APTConfig, APTTrainer, UserError, load_pruned, load_pruned_into, with_pruning
from integration.factories import Rows, SaveAt, events_of, losses_of, weights_of
from integration.test_processes import two_processes

SETTINGS: dict[str, Any] = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "target_sparsity": 0.4,
    "num_pruning_events": 2,
    "pruning_start": 1,
    "pruning_end": 5,
    "distillation_end": 7,
    "mask_window": 1,
    "observe_every": 1,
    "round_to": 4,
    "min_hidden": 8,
    "lora_r": 2,
    "max_rank": 8,
    "heldout_fraction": 0.1,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "use_cpu": True,
    "report_to": [],
    "logging_steps": 1,
    "disable_tqdm": True,
    "seed": 7,
}
CHAT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' ' + eos_token + ' ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
)


def tokenizer() -> Any:
    made = word_tokenizer()
    made.chat_template = CHAT
    return made


def turn(row: int, answers: bool = True) -> list[dict[str, str]]:
    question = {"role": "user", "content": words(4 + row % 3, seed=row)}
    return [question, {"role": "assistant", "content": words(5, seed=row + 100)}] if answers else [question]


DATA = {
    "text": [{"text": words(8 + row % 5, seed=row)} for row in range(48)],
    "prompt": [
        {"prompt": words(4 + row % 3, seed=row), "completion": " " + words(5, seed=row + 99)} for row in range(48)
    ],
    "chat": [{"messages": turn(row)} for row in range(48)],
}
PLAIN: dict[str, Any] = {"distillation": "none", "distillation_end": None}
BEFORE: dict[str, Any] = {"pruning_time": "before", "pruning_start": None, "calibration_samples": 16}
BEFORE |= PLAIN
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("text", {}),
    "completion only": ("prompt", {}),
    "conversations": ("chat", {}),
    "assistant only": ("chat", {"assistant_only_loss": True}),
    "packed": ("text", {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
    "before": ("text", BEFORE),
    "float32, no checkpointing": ("text", {"bf16": False, "gradient_checkpointing": False}),
}


def sft(folder: Path, kind: str = "text", steps: tuple[int, ...] = (), options: Any = None, **changes: Any) -> Any:
    data, own = KINDS[kind]
    set_seed(3)
    trainer_class = apt_trainer.APTSFTTrainer
    args = trainer_class.Config(str(folder), **{**SETTINGS, **own, **changes})
    given = {"processing_class": tokenizer(), "callbacks": [SaveAt(steps)], **(options or {})}
    return trainer_class(tiny_llama(), args=args, train_dataset=Dataset.from_list(DATA[data]), **given)


def assert_reloads(trainer: Any, folder: Path) -> None:
    """The saved model is smaller and gives the same outputs."""
    trainer.save_model(str(folder))
    loaded, ids = load_pruned(folder), torch.arange(4, 16)[None]
    model = trainer.model.eval()
    assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert trainer.pruner.sparsity() >= trainer.args.target_sparsity
    dense = type(model).__mro__[1](copy.deepcopy(tiny_llama().config))
    assert sum(p.numel() for p in loaded.parameters()) < 0.95 * sum(p.numel() for p in dense.parameters())


# ---------------------------------------------------------------------------- the classes


def test_with_pruning_joins_classes_and_settings() -> None:
    assert with_pruning(Seq2SeqTrainer) is APTTrainer and APTTrainer.Config is APTConfig
    made = with_pruning(SFTTrainer)
    assert made is apt_trainer.APTSFTTrainer and issubclass(made, SFTTrainer) and issubclass(made.Config, SFTConfig)
    args = made.Config("out", target_sparsity=0.3, pruning_time="before", max_length=64, use_cpu=True)
    again = pickle.loads(pickle.dumps(args))
    assert type(again) is made.Config and (again.max_length, again.target_sparsity) == (64, 0.3)
    assert pickle.loads(pickle.dumps(made)) is made
    with pytest.raises(UserError, match=r"target_sparsity=30 must lie between 0 and 1"):
        made.Config("out", target_sparsity=30, use_cpu=True)
    with pytest.raises(UserError, match="prunes already"):
        with_pruning(APTTrainer)
    with pytest.raises(UserError, match="takes a class"):
        with_pruning(tiny_model)  # type: ignore[arg-type]


def test_settings_of_another_class_are_an_error(tmp_path: Path) -> None:
    data = Dataset.from_list(DATA["text"])
    for args in (SFTConfig(str(tmp_path), use_cpu=True), APTConfig(str(tmp_path), use_cpu=True)):
        with pytest.raises(UserError, match=r"Give an APTSFTTrainer.Config, which has all of SFTConfig too"):
            apt_trainer.APTSFTTrainer(tiny_llama(), args=args, train_dataset=data)
    with pytest.raises(UserError, match=r"model is a name, 'org/model'"):
        apt_trainer.APTSFTTrainer("org/model", args=apt_trainer.APTSFTTrainer.Config(str(tmp_path), use_cpu=True))


# ---------------------------------------------------------------------------- plain Trainer and subclasses


class Own(Trainer):
    """As users have it: a loss and a log of its own."""

    calls = 0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        Own.calls += 1
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def classifier(folder: Path, trainer_class: type, steps: tuple[int, ...] = (), **changes: Any) -> Any:
    made = with_pruning(trainer_class)
    set_seed(3)
    args = made.Config(str(folder), **{**SETTINGS, **changes})
    return made(tiny_model("bert", dropout=0.1), args, train_dataset=Rows(64), callbacks=[SaveAt(steps)])


@pytest.mark.parametrize("trainer_class", [Trainer, Own])
def test_a_trainer_of_ones_own_trains_as_apt_trainer(trainer_class: type, tmp_path: Path) -> None:
    Own.calls = 0
    trainer = classifier(tmp_path / "own", trainer_class)
    trainer.train()
    set_seed(3)
    args = APTConfig(str(tmp_path / "apt"), **SETTINGS, warmup_steps=0)
    other = APTTrainer(tiny_model("bert", dropout=0.1), args, Rows(64))
    other.train()
    assert losses_of(trainer) == losses_of(other) and len(losses_of(trainer)[4]) == 3
    assert trainer_class is Trainer or 8 < Own.calls < 24  # once per step; then held-out rows and probes
    assert all(torch.equal(value, weights_of(other.model)[name]) for name, value in weights_of(trainer.model).items())
    assert trainer.pruner.sparsity() >= 0.4


def test_what_a_class_under_the_method_overrides_is_followed(tmp_path: Path) -> None:
    prepared: list[int] = []

    class Prepares(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:
                self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.5)
            return self.optimizer

        def _prepare_for_training(self, *args: Any) -> Any:
            prepared.append(self.state.global_step)
            return super()._prepare_for_training(*args)

    trainer = classifier(tmp_path, Prepares)
    trainer.train()
    cuts = [event["step"] for event in events_of(tmp_path, "prune")]
    assert len(cuts) == 2 and set(cuts) < set(prepared) and prepared[0] == 0
    assert trainer.optimizer.param_groups[0]["lr"] != trainer.args.learning_rate


class Measures(Trainer):
    """Of a model without logits."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = (outputs.last_hidden_state.mean((1, 2)) - inputs["labels"]).square().mean()
        return (loss, outputs) if return_outputs else loss


def test_a_model_without_logits_learns_from_the_hidden_states_of_its_teacher(tmp_path: Path) -> None:
    made = with_pruning(Measures)
    targets = {"prune_targets": ["hidden"], "remove_unused_columns": False, "target_sparsity": 0.3}
    for named in (None, ["labels"]):  # no argument of the model's forward is a label
        args = made.Config(str(tmp_path), **{**SETTINGS, **targets, "label_names": named})
        trainer = made(tiny_model("bert").bert, args, train_dataset=Rows(64))
        if named is None:
            with pytest.raises(
                UserError, match=r"label_names=\[\] names nothing in a batch, which has attention_mask"
            ):
                trainer.train()
            continue
        trainer.train()
    assert trainer.pruner.plan.counts["hidden"] < WIDTH and trainer.pruner.sparsity() >= 0.3
    assert events_of(tmp_path, "teacher") and {len(values) for values in losses_of(trainer).values()} == {2, 3}


def test_a_teacher_of_embeddings_has_to_be_as_wide(tmp_path: Path) -> None:
    made = with_pruning(Measures)
    args = made.Config(str(tmp_path), **{**SETTINGS, "distillation": "model", "teacher_name_or_path": "x"})
    given = {"train_dataset": Rows(64), "teacher": tiny_model("bert").bert}
    with pytest.raises(UserError, match=r"whose width has to stay. Set prune_targets: \[heads, neurons\]"):
        made(tiny_model("bert").bert, args, **given)


# ---------------------------------------------------------------------------- a transformer inside


class Pooled(nn.Module):
    """An encoder with a head of the user's own that reads its hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = tiny_model("bert").bert
        self.head = nn.Linear(WIDTH, 3)
        randomise(self.head, seed=5)

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> dict[str, Any]:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.head(hidden.mean(1))
        return (
            {"loss": F.cross_entropy(logits, labels), "logits": logits} if labels is not None else {"logits": logits}
        )


INSIDE: dict[str, Any] = {"prune_targets": ["heads", "neurons"]}


def pooled(folder: Path, steps: tuple[int, ...] = (), **changes: Any) -> Any:
    set_seed(3)
    made = with_pruning(Trainer)
    args = made.Config(str(folder), **{**SETTINGS, **INSIDE, **changes})
    return made(Pooled(), args, train_dataset=Rows(64), callbacks=[SaveAt(steps)])


@pytest.mark.parametrize(
    "changes", [{}, {"tune_after_pruning": "full"}, {**PLAIN, "pruning_time": "before", "pruning_start": None}]
)
def test_a_transformer_inside_of_a_users_module_is_cut(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer = pooled(tmp_path / "run", **changes)
    before = weights_of(trainer.model.head)
    trainer.train()
    assert trainer.pruner.sparsity() >= 0.4 and not torch.equal(before["weight"], trainer.model.head.weight)
    trainer.save_model(str(tmp_path / "model"))
    loaded = load_pruned_into(Pooled(), tmp_path / "model").eval()
    batch = {"input_ids": Rows(4).ids, "attention_mask": Rows(4).mask}
    assert torch.equal(trainer.model.eval()(**batch)["logits"], loaded(**batch)["logits"])
    assert sum(p.numel() for p in loaded.parameters()) < 0.8 * sum(p.numel() for p in Pooled().parameters())


def test_state_of_an_optimizer_follows_a_cut_inside(tmp_path: Path) -> None:
    straight = pooled(tmp_path / "run", steps=(2, 4), tune="full")
    moments: dict[int, int] = {}
    follow = straight._change_shape

    def spy(decision: Any, step: int, started: float) -> None:
        follow(decision, step, started)
        state = straight.optimizer.state
        moments[step] = sum(
            bool(state[p]["exp_avg"].abs().sum() > 0) for p in straight.model.parameters() if p in state
        )

    straight._change_shape = spy
    straight.train()
    trained = len([name for name, _ in straight.model.named_parameters()])
    assert len(moments) == 2 and min(moments.values()) > 0.5 * trained
    for step in (2, 4):
        resumed = pooled(tmp_path / f"from{step}", tune="full")
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        weights = weights_of(resumed.model)
        assert all(torch.equal(value, weights[name]) for name, value in weights_of(straight.model).items())


def test_what_does_not_go_with_a_transformer_inside_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reads its hidden states, so their number has to stay"):
        pooled(tmp_path, prune_targets=["hidden"])

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = tiny_model("bert").bert, tiny_model("bert").bert

    made = with_pruning(Trainer)
    with pytest.raises(UserError, match=r"Two holds 2 transformers \(left, right\)"):
        made(Two(), made.Config(str(tmp_path), **{**SETTINGS, **INSIDE}), train_dataset=Rows(64))


# ---------------------------------------------------------------------------- TRL: SFT


@pytest.mark.parametrize("kind", KINDS)
def test_sft_gives_a_smaller_model_that_reloads(kind: str, tmp_path: Path) -> None:
    trainer = sft(tmp_path / "run", kind)
    trainer.train()
    losses = losses_of(trainer)
    assert all(math.isfinite(value) for values in losses.values() for value in values)
    assert kind == "before" or (3 in {len(values) for values in losses.values()})  # some are against a teacher
    assert max(trainer.pruner.state()[0]["ranks"].values(), default=0) == 0  # merged
    assert_reloads(trainer, tmp_path / "model")
    trainer.evaluate(Dataset.from_list(DATA[KINDS[kind][0]][:8]))


def test_sft_resumed_is_sft_straight(tmp_path: Path) -> None:
    straight = sft(tmp_path / "run", steps=(2, 4))
    straight.train()
    for step in (2, 4):
        resumed = sft(tmp_path / f"from{step}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        weights = weights_of(resumed.model)
        assert all(torch.equal(value, weights[name]) for name, value in weights_of(straight.model).items())


def test_sft_trains_as_apt_trainer_on_the_same_rows(tmp_path: Path) -> None:
    """Against a teacher too: what TRL reads of its fused head is the same from logits."""
    trainer = sft(tmp_path / "sft", "float32, no checkpointing", lr_scheduler_type="constant")
    trainer.train()
    set_seed(3)
    args = APTConfig(str(tmp_path / "apt"), **SETTINGS, warmup_steps=0, lr_scheduler_type="constant")
    again = sft(tmp_path / "again", "float32, no checkpointing")
    set_seed(3)
    given = {"heldout_dataset": again.heldout_dataset, "data_collator": again.data_collator}
    other = APTTrainer(tiny_llama(), args, again.train_dataset, **given)
    other.train()
    losses = losses_of(other)
    assert {len(values) for values in losses.values()} == {2, 3}
    for step, values in losses_of(trainer).items():
        assert values == pytest.approx(losses[step], rel=1e-4), step
    assert trainer.pruner.plan == other.pruner.plan
    logs = [entry for entry in trainer.state.log_history if "entropy" in entry]
    assert len(logs) == 8 and [entry["num_tokens"] for entry in logs] == sorted(entry["num_tokens"] for entry in logs)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    assert logs[0]["num_tokens"] < 3 * batch["attention_mask"].sum() and logs[0]["entropy"] > 0  # of one batch


@pytest.mark.parametrize("accumulation", [1, 3])
def test_sft_with_nothing_pruned_is_trls(accumulation: int, tmp_path: Path) -> None:
    plain: dict[str, Any] = {"target_sparsity": None, "distillation": "none", "tune": "full", "tune_embeddings": True}
    plain |= {"distillation_end": None, "pruning_start": None, "pruning_end": None, "adam_epsilon": 1e-4}
    plain |= {"gradient_accumulation_steps": accumulation, "lr_scheduler_type": "constant"}
    ours = sft(tmp_path / "ours", "completion only", bf16=False, max_grad_norm=0.0, **plain)
    names = {"use_cpu", "report_to", "logging_steps", "disable_tqdm", "seed", "max_steps", "learning_rate"}
    names |= {"per_device_train_batch_size"}
    args = {name: SETTINGS[name] for name in names} | {name: plain[name] for name in plain if hasattr(SFTConfig, name)}
    config = SFTConfig(
        str(tmp_path / "trl"), bf16=False, max_grad_norm=0.0, weight_decay=0.0, save_strategy="no", **args
    )
    data = Dataset.from_list(DATA["prompt"])
    theirs = SFTTrainer(tiny_llama(), args=config, train_dataset=data, processing_class=tokenizer())
    for each in (ours, theirs):
        each.train()
    found, expected = ([e["loss"] for e in each.state.log_history if "loss" in e] for each in (ours, theirs))
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_sft_takes_adapters_of_a_peft_config(targets: Any, tmp_path: Path) -> None:
    given = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.1, target_modules=targets, use_rslora=targets == "all-linear")
    trainer = sft(tmp_path / "run", lora_r=8, options={"peft_config": given})
    layers = {name: module for name, module in trainer.model.named_modules() if hasattr(module, "lora_A")}
    of_class = {name.rpartition(".")[2] for name in layers}
    assert of_class == (
        {"q_proj", "v_proj"}
        if isinstance(targets, list)
        else {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    )
    one = next(iter(layers.values()))
    assert one.r["default"] == 3 and one.lora_dropout["default"].p == 0.1
    assert one.scaling["default"] == pytest.approx(6 / math.sqrt(3) if given.use_rslora else 2.0)
    trainer.train()
    assert max(events_of(tmp_path / "run", "prune")[-1]["ranks"].values()) > 3
    assert_reloads(trainer, tmp_path / "model")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_dora": True}, "peft_config sets use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, r"peft_config sets modules_to_save=\['lm_head'\]"),
        ({"target_modules": ".*q_proj"}, "is a pattern"),
        ({"r": 4}, "lora_r=2, but peft_config says 4"),
        ({"target_modules": ["nowhere"]}, "names 'nowhere', which is no linear in a layer"),
    ],
)
def test_sft_refuses_adapters_that_cannot_grow(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj"], **given}
    with pytest.raises(UserError, match=message):
        sft(tmp_path, options={"peft_config": LoraConfig(**given)})


def test_sft_makes_its_rows_of_data_that_is_held_out(tmp_path: Path) -> None:
    raw = Dataset.from_list(DATA["text"][:8])
    trainer = sft(tmp_path, options={"heldout_dataset": raw, "eval_dataset": raw}, eval_strategy="steps", eval_steps=4)
    assert len(trainer.train_dataset) == 48
    assert trainer.heldout_dataset["input_ids"] == trainer.eval_dataset["input_ids"]
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 2
    assert events_of(tmp_path, "teacher")


# ---------------------------------------------------------------------------- TRL: preferences


PAIRS = [
    {"prompt": words(4, seed=row), "chosen": " " + words(4, seed=row + 50), "rejected": " " + words(5, seed=row + 90)}
    for row in range(40)
]


def dpo(folder: Path, options: Any = None, model: Any = None, steps: tuple[int, ...] = (), **changes: Any) -> Any:
    set_seed(3)
    trainer_class = apt_trainer.APTDPOTrainer
    args = trainer_class.Config(str(folder), **{**SETTINGS, **changes})
    given = {"processing_class": tokenizer(), "callbacks": [SaveAt(steps)], **(options or {})}
    return trainer_class(model or tiny_llama(), args=args, train_dataset=Dataset.from_list(PAIRS), **given)


def test_dpo_compares_with_the_dense_model_all_along(tmp_path: Path) -> None:
    """Log-probabilities that were computed before the cut, or those of a reference model: the same run."""
    one = dpo(tmp_path / "one", precompute_ref_log_probs=True)
    other = dpo(tmp_path / "other", options={"ref_model": tiny_llama()})
    for each in (one, other):
        each.train()
    losses = losses_of(other)
    assert {len(values) for values in losses.values()} == {2, 3}
    for step, values in losses_of(one).items():
        assert values == pytest.approx(losses[step], rel=1e-3), step
    assert losses[1][1] == pytest.approx(math.log(2), rel=1e-3)  # the model is its reference at first
    assert_reloads(other, tmp_path / "model")


def test_dpo_resumed_is_dpo_straight(tmp_path: Path) -> None:
    straight = dpo(tmp_path / "run", steps=(4,), precompute_ref_log_probs=True)
    straight.train()
    resumed = dpo(tmp_path / "resumed", precompute_ref_log_probs=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    weights = weights_of(resumed.model)
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(straight.model).items())


def test_dpo_without_a_reference_is_an_error_at_the_start(tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(UserError, match="none was given. Set precompute_ref_log_probs=True"):
        dpo(tmp_path, options={"peft_config": LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj"])})
    with pytest.raises(UserError, match="ref_model is the model itself"):
        dpo(tmp_path, model=model, options={"ref_model": model})
    with pytest.raises(UserError, match="sync_ref_model copies"):
        dpo(tmp_path, options={"ref_model": tiny_llama()}, sync_ref_model=True)


def test_a_reward_model_is_pruned(tmp_path: Path) -> None:
    set_seed(3)
    trainer_class = apt_trainer.APTRewardTrainer
    model = LlamaForSequenceClassification(llama_config(num_labels=1))
    trainer = trainer_class(
        model,
        args=trainer_class.Config(str(tmp_path / "run"), **SETTINGS),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer(),
    )
    trainer.train()
    assert {len(values) for values in losses_of(trainer).values()} == {2, 3}
    trainer.save_model(str(tmp_path / "model"))
    loaded, ids = load_pruned(tmp_path / "model"), torch.arange(4, 16)[None]
    assert torch.equal(trainer.model.eval()(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert trainer.pruner.sparsity() >= 0.4


LABELLED = [
    {"prompt": row["prompt"], "completion": row["chosen" if number % 2 else "rejected"], "label": bool(number % 2)}
    for number, row in enumerate(PAIRS)
]


def preferring(folder: Path, name: str, model: Any = None, options: Any = None, **changes: Any) -> Any:
    """KTO, which compares with a reference, or ORPO, which has none."""
    module = importlib.import_module("trl" if name == "KTOTrainer" else "trl.experimental.orpo")
    trainer_class, rows = with_pruning(getattr(module, name)), LABELLED if name == "KTOTrainer" else PAIRS
    set_seed(3)
    args = trainer_class.Config(str(folder), **{**SETTINGS, **changes})
    given = {"processing_class": tokenizer(), "train_dataset": Dataset.from_list(rows), **(options or {})}
    return trainer_class(model or tiny_llama(), args=args, **given)


@pytest.mark.parametrize("name", ["KTOTrainer", "ORPOTrainer"])
def test_other_preferences_are_learnt_while_pruning(name: str, tmp_path: Path) -> None:
    kto: dict[str, Any] = {"precompute_ref_log_probs": True} if name == "KTOTrainer" else {}
    trainer = preferring(tmp_path / "run", name, **kto)
    trainer.train()
    losses = losses_of(trainer)
    assert {len(values) for values in losses.values()} == {2, 3}
    assert all(math.isfinite(value) for values in losses.values() for value in values)
    assert_reloads(trainer, tmp_path / "model")
    if kto:
        with pytest.raises(UserError, match=r"none was given. Set precompute_ref_log_probs=True"):
            preferring(tmp_path / "none", name)


@pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer"])
def test_a_class_that_generates_is_an_error_when_the_class_is_made(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} generates with the model while it trains, which is not supported"):
        with_pruning(getattr(importlib.import_module("trl"), name))


# ---------------------------------------------------------------------------- two processes

WORKER = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from integration import test_any_trainer as here
from integration.factories import losses_of

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
found = {{}}
for name in ("of_sft", "of_pooled"):
    trainer = getattr(here, name)(folder / name, 2, ddp_backend="gloo")
    trainer.train()
    found[name] = {{"losses": losses_of(trainer), "sparsity": trainer.pruner.sparsity()}}
assert trainer.args.world_size == 2
(folder / f"result.{{rank}}.json").write_text(json.dumps(found))
os._exit(0)
"""


def of_sft(folder: Path, size: int, **changes: Any) -> Any:
    return sft(folder, "float32, no checkpointing", per_device_train_batch_size=size, **changes)


def of_pooled(folder: Path, size: int, **changes: Any) -> Any:
    return pooled(folder, per_device_train_batch_size=size, max_grad_norm=0.0, **changes)


@pytest.mark.distributed
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    two_processes(tmp_path, WORKER, "result.0.json", "result.1.json")
    for name, of in (("of_sft", of_sft), ("of_pooled", of_pooled)):
        alone = of(tmp_path / f"{name}-alone", 4)
        alone.train()
        for rank in (0, 1):
            found = json.loads((tmp_path / f"result.{rank}.json").read_text())[name]
            assert found["sparsity"] == alone.pruner.sparsity()
            for step, values in losses_of(alone).items():
                assert found["losses"][str(step)] == pytest.approx(values, rel=1e-3, abs=1e-6), (name, step)
