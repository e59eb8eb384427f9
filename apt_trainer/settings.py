"""Every setting of the method, the model and the data, validated once.

Plain standard-library dataclasses, so that ``apt-trainer train --help`` answers without importing torch.
:class:`apt_trainer.config.APTConfig` adds the settings of the Hugging Face ``TrainingArguments``.
Not for training settings such as batch size: those are inherited.

Units: *steps* are optimizer steps; a value below 1 where steps are expected is a fraction of all steps.
Sources: "APT" is the ICML 2024 paper (arXiv 2401.12200); "official" is its released code.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from apt_trainer.errors import UserError, unknown_choice

TASKS = (
    "classification",
    "regression",
    "token_classification",
    "question_answering",
    "language_modeling",
    "instruction_tuning",
    "summarization",
    "translation",
)
PRUNE_TARGETS = ("heads", "neurons", "hidden")
TUNE_MODES = ("adapters", "adapters_and_norms", "full")

CHOICES: dict[str, tuple[str, ...]] = {
    "task": TASKS,
    "sparsity_metric": ("params", "flops", "latency", "memory"),
    "pruning_time": ("before", "early", "late", "after"),
    "sparsity_schedule": ("cubic", "linear"),
    "importance": ("salience", "magnitude", "taylor", "random"),
    "outlier_scaling": ("none", "mean"),
    "rank_growth": ("salience", "uniform", "none"),
    "rank_rule": ("fill_budget", "paper"),
    "rank_score": ("signed", "absolute"),
    "tune": TUNE_MODES,
    "tune_after_pruning": TUNE_MODES,
    "tune_after_distillation": TUNE_MODES,
    "distillation": ("self", "model", "none"),
    "distillation_layer_map": ("dynamic", "static", "none"),
    "distillation_transform": ("lora", "identity"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its help text; lists are copied per instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class ModelSettings:
    """Which pretrained model is trained."""

    model_name_or_path: str | None = setting(
        None,
        "Hub name, local folder, or 'package:NAME/folder' for a folder inside an installed Python package; or the "
        "path of a GGUF file.",
    )
    gguf_file: str | None = setting(
        None, "GGUF file in that folder, for tokenizer, config and weights; these are de-quantised, to type dtype."
    )
    tokenizer_name_or_path: str | None = setting(None, "Tokenizer, if it is not beside the model.")
    model_revision: str = setting("main", "Branch, tag or commit on the hub.")
    trust_remote_code: bool = setting(False, "Run Python code that comes with the model.")
    dtype: str = setting("float32", "Type the weights are loaded in: auto, float32, bfloat16 or float16.")
    attn_implementation: str | None = setting(None, "Attention back end, for example sdpa or eager.")


@dataclass
class DataSettings:
    """Which data, and which column is what."""

    task: str = setting(
        "classification",
        "classification, regression, token_classification, question_answering; for decoders also language_modeling "
        "and instruction_tuning; for encoder-decoders summarization and translation.",
    )
    dataset_name: str | None = setting(None, "Data set on the hub, for example nyu-mll/glue.")
    dataset_config: str | None = setting(None, "Configuration of the hub data set, for example sst2.")
    train_file: str | None = setting(
        None,
        "Local json, jsonl, csv or parquet file; a folder whose sub-folders are the labels and hold text files; or a "
        "txt file with one running text (language_modeling). "
        "May start with 'package:NAME/' for a path inside an installed Python package.",
    )
    validation_file: str | None = setting(None, "As train_file. Without one, a part of the training data is held out.")
    test_file: str | None = setting(None, "As train_file. Without one, the validation data is what is reported on.")
    train_split: str = setting("train", "Split of the hub data set to train on.")
    validation_split: str = setting("validation", "Split of the hub data set to validate on.")
    test_split: str | None = setting(None, "Split of the hub data set to report on.")
    text_column: str | None = setting(None, "Column with the text, the tokens, the question or the source text.")
    text_pair_column: str | None = setting(None, "Column with the second text, or the context of a question.")
    label_column: str = setting("label", "Column with the label, the number, the tags or the answers.")
    target_column: str | None = setting(None, "Column with the summary or the translation.")
    prompt_column: str | None = setting(None, "Column with the prompt (instruction_tuning). Default: prompt.")
    input_column: str | None = setting(None, "Column with further input to the prompt; may be empty in some rows.")
    completion_column: str | None = setting(
        None, "Column with what follows the prompt. Default: the last column of the template, else completion."
    )
    messages_column: str | None = setting(
        None, "Column with conversations, lists of {role, content}. Default: messages or conversations, where present."
    )
    template: str | None = setting(
        None,
        "Text of a row with columns in braces, such as 'Question: {question}\\nAnswer: {answer}'; the completion "
        "starts at its column. Default: prompt, input and completion, each on its own line unless white space parts "
        "them.",
    )
    template_without_input: str | None = setting(None, "As template, for rows whose input_column is empty.")
    use_chat_template: bool = setting(False, "Put prompt and completion into the chat template of the tokenizer.")
    completion_only_loss: bool = setting(
        True, "Train on completions (what the assistant says) only; false: on all tokens (instruction_tuning)."
    )
    packing: bool = setting(
        False, "Put several rows into one of max_length tokens, none of which sees another (instruction_tuning)."
    )
    source_prefix: str = setting("", "Text before every source text, such as 'summarize: ' for T5.")
    max_target_length: int = setting(128, "Longest summary or translation in tokens; longer ones are cut.")
    max_length: int = setting(128, "Longest input in tokens; longer ones are cut (split with a stride for QA).")
    doc_stride: int = setting(64, "Overlap in tokens between the pieces of a long context (question answering).")
    max_train_samples: int | None = setting(None, "Use only the first rows after shuffling with data_seed or seed.")
    max_validation_samples: int | None = setting(None, "Use only the first rows.")
    max_test_samples: int | None = setting(None, "Use only the first rows.")
    validation_fraction: float = setting(0.1, "Share held out of the training data where no validation data is given.")
    test_fraction: float = setting(
        0.0, "Share held out of the training data as test data where no test data is given; 0: none."
    )
    metric: str | None = setting(
        None,
        "Metric to report; default by task: accuracy, pearson, f1 (tokens, QA), perplexity (language_modeling, "
        "instruction_tuning), rougeL (summarization), bleu (translation).",
    )


@dataclass
class PruningSettings:
    """What is removed, how much of it and when."""

    target_sparsity: float | None = setting(
        0.6, "Fraction of the prunable budget to remove, between 0 and 1; null: prune nothing. 0.6 (APT, Table 2)."
    )
    sparsity_metric: str = setting(
        "params", "What the budget counts: params or flops of the transformer blocks, measured latency, or memory."
    )
    prune_targets: list[str] = setting(
        list(PRUNE_TARGETS), "Kinds of units that may be removed: heads, neurons, hidden."
    )
    pruning_time: str = setting(
        "early",
        "before: once, before the first step (APT, for LLaMA); early: in the first part of training; late: in its "
        "second half; after: once, when training has ended.",
    )
    calibration_samples: int = setting(
        256, "Rows of the training data that score the units where pruning_time is before. 256 (APT)."
    )
    calibration_batch_size: int | None = setting(
        None, "Rows per batch of that scoring on one device. Default: per_device_train_batch_size."
    )
    pruning_start: float | None = setting(None, "First step of pruning (warm-up before it). Default by pruning_time.")
    pruning_end: float | None = setting(
        None,
        "Step at which the target is reached; with before, the one at which ranks stop growing. Default by "
        "pruning_time.",
    )
    num_pruning_events: int = setting(
        5, "How many times units are cut (with before: ranks grow). Official: 10 to 16 over far longer runs."
    )
    sparsity_schedule: str = setting("cubic", "Curve of sparsity over events: cubic (APT, App. C) or linear.")
    mask_window: float = setting(
        200, "Steps before each event in which masks fade; at most the interval between events. 200 (official)."
    )
    mask_step: float = setting(
        0.01, "Least change of a mask per step; raised so that a mask can fade within half a window. 0.01 (official)."
    )
    importance: str = setting("salience", "Scoring rule: salience (APT), magnitude, taylor or random.")
    salience_decay: float = setting(
        0.85, "Decay of the moving average of scores, per observation. 0.85 (APT, Sec. 4.2)."
    )
    observe_every: int = setting(
        4, "Optimizer steps between two observations of scores; less in short runs. 1: every step (official)."
    )
    outlier_term: bool = setting(True, "Add the square root of the kurtosis to the salience (APT, Eq. 5).")
    outlier_scaling: str = setting(
        "mean", "mean: bring the outlier term to the mean salience of its kind, times outlier_weight; none: as in APT."
    )
    outlier_weight: float = setting(0.1, "Weight of the outlier term where outlier_scaling is mean.")
    round_to: int = setting(8, "Neurons per layer and hidden dimensions are kept in multiples of this.")
    min_heads: int = setting(0, "Least heads kept per attention; 0: a whole attention may vanish (APT).")
    min_neurons: int = setting(0, "Least neurons kept per feed-forward; 0: a whole feed-forward may vanish (APT).")
    min_hidden: int = setting(64, "Least hidden dimensions kept.")
    reference_batch_size: int = setting(32, "Batch size at which flops, latency and memory budgets are counted.")
    reference_length: int = setting(128, "Sequence length in tokens at which flops, latency and memory are counted.")


@dataclass
class AdapterSettings:
    """LoRA adapters, how their ranks grow, and what else trains."""

    lora_r: int = setting(8, "Initial rank. 8 (official).")
    lora_alpha: float = setting(
        16, "Scaling is lora_alpha / lora_r and stays constant while ranks grow. 16 (official)."
    )
    lora_dropout: float = setting(0.0, "Dropout before the adapter. 0 (official).")
    lora_target_modules: list[str] | None = setting(
        None, "Names of the adapted linears. Default of the family: query, value and FFN-up (APT)."
    )
    rank_growth: str = setting("salience", "salience: the most salient half grows (APT); uniform: all grow; none.")
    rank_rule: str = setting(
        "fill_budget", "fill_budget: the top half takes all new parameters (official); paper: r' = r·Δ'/Δ."
    )
    rank_score: str = setting(
        "signed", "signed: |sum of A·grad A| per rank, mean over ranks (official); absolute: sum of |B·grad B| (APT)."
    )
    tuning_growth: float = setting(
        4.0, "Adapter parameters after the last event, relative to those put into the dense model. 4 (official)."
    )
    max_rank: int = setting(64, "Largest rank of one adapter. 64 (official).")
    tune: str = setting(
        "adapters", "What trains at first besides the task head: adapters, adapters_and_norms or full."
    )
    tune_after_pruning: str | None = setting(None, "What trains from pruning_end on. Default: as before.")
    tune_after_distillation: str | None = setting(None, "What trains once distillation has ended. Default: as before.")
    tune_embeddings: bool = setting(False, "Train the embeddings too where tune is full.")
    full_learning_rate: float | None = setting(
        None, "Learning rate of base weights where they train. Default: learning_rate (of adapters and head)."
    )
    train_head: bool = setting(True, "Train the task head. The official code keeps it frozen at random values.")


@dataclass
class DistillationSettings:
    """The student's own past, or another model, as its teacher."""

    distillation: str = setting("self", "self: snapshots of the student; model: teacher_name_or_path; none.")
    teacher_name_or_path: str | None = setting(
        None, "A fine-tuned model of the same task, where distillation is 'model'."
    )
    distillation_start: float | None = setting(None, "First step with a distillation loss. Default: pruning_start.")
    distillation_end: float | None = setting(
        None, "Last step with a distillation loss. Default: 0.6 of all steps, or pruning_end if later."
    )
    distillation_weight: float = setting(
        1.0, "Largest weight of the distillation loss against the task loss; reached at pruning_end. 1 (APT)."
    )
    distillation_temperature: float = setting(2.0, "Softening of the predictions. The official code divides by 2/3.")
    prediction_weight: float = setting(1.0, "Weight of the prediction loss. 1 (APT).")
    layer_weight: float = setting(0.9, "Weight of the layer loss. 0.9 (APT).")
    distillation_layers: int = setting(4, "Teacher layers compared per step. 4 (APT, Sec. 4.4).")
    distillation_layer_map: str = setting(
        "dynamic", "dynamic: one random layer per block of layers (APT); static: the last of each; none."
    )
    distillation_transform: str = setting(
        "lora", "Map from student to teacher dimensions: identity plus lora (APT), or identity."
    )
    heldout_fraction: float = setting(0.05, "Share of the training data on which teacher snapshots are chosen.")


@dataclass
class MeasureSettings:
    """What is measured after training."""

    measure_latency: bool = setting(True, "Time the saved model against the dense one at the end.")
    latency_batch_sizes: list[int] = setting([1, 32], "Batch sizes at which latency is measured.")
    latency_length: int = setting(128, "Sequence length in tokens at which latency is measured.")
    dense_baseline: bool = setting(
        False, "Also fine-tune the dense model in full, in a process of its own and before, to compare with."
    )
    dense_learning_rate: float = setting(1e-4, "Learning rate of that full fine-tuning.")


@dataclass
class MethodSettings(PruningSettings, AdapterSettings, DistillationSettings):
    """Everything that the method itself needs; :meth:`check` validates it."""

    def check(self) -> None:
        """Raise :class:`UserError` for the first setting that cannot work."""
        check_choices(self)
        _check_pruning(self)
        _check_adapters(self)
        _check_distillation(self)

    @property
    def prunes(self) -> bool:
        return self.target_sparsity is not None

    @property
    def prunes_before(self) -> bool:
        """The dense model is cut before the first step; while it trains only ranks change."""
        return self.prunes and self.pruning_time == "before"

    @property
    def uses_adapters(self) -> bool:
        """Adapters are made unless every base weight trains from the first step."""
        return self.tune != "full"


SETTING_GROUPS = (ModelSettings, DataSettings, PruningSettings, AdapterSettings, DistillationSettings, MeasureSettings)


def check_choices(settings: Any) -> None:
    for name, allowed in CHOICES.items():
        optional = name in ("tune_after_pruning", "tune_after_distillation")
        value = getattr(settings, name, allowed[0])
        if value not in allowed and not (optional and value is None):
            raise unknown_choice(name, value, allowed)


def resolve_path(path: str) -> str:
    """Turn ``package:NAME/folder`` into the folder inside the installed package; other paths are returned as given."""
    if not path.startswith("package:"):
        return path
    import importlib.util

    name, _, rest = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{path}: Python package {name!r} is not installed. Install it, or give a local path.")
    return str(Path(next(iter(spec.submodule_search_locations))) / rest)


def known_settings() -> dict[str, str]:
    """All settings of this package with their help texts, in order."""
    return {f.name: f.metadata["help"] for group in SETTING_GROUPS for f in fields(group)}


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _check_pruning(s: PruningSettings) -> None:
    if s.target_sparsity is not None:
        _require(
            0 < s.target_sparsity < 1,
            f"target_sparsity={s.target_sparsity} must lie between 0 and 1 (0.6 removes 60 %); null prunes nothing.",
        )
        _require(len(s.prune_targets) > 0, "prune_targets is empty. Name at least one of: " + ", ".join(PRUNE_TARGETS))
    for target in s.prune_targets:
        if target not in PRUNE_TARGETS:
            raise unknown_choice("prune_targets", target, PRUNE_TARGETS)
    counts = ("num_pruning_events", "observe_every", "round_to", "min_hidden", "calibration_samples")
    for name in (*counts, "calibration_batch_size", "reference_batch_size", "reference_length"):
        value = getattr(s, name)
        _require(value is None or value >= 1, f"{name}={value} must be at least 1.")
    for name in ("min_heads", "min_neurons"):
        _require(getattr(s, name) >= 0, f"{name}={getattr(s, name)} must not be negative.")
    for name in ("pruning_start", "pruning_end"):
        value = getattr(s, name)
        _require(value is None or value >= 0, f"{name}={value} must be a number of steps or a fraction of all steps.")
    _require(
        s.pruning_time != "before" or s.pruning_start is None,
        f"pruning_time: before cuts before the first step, so pruning_start={s.pruning_start} has no meaning. "
        "Remove it.",
    )
    _require(0 <= s.salience_decay < 1, f"salience_decay={s.salience_decay} must lie in [0, 1).")
    _require(0 < s.mask_step <= 1, f"mask_step={s.mask_step} must lie in (0, 1].")
    _require(s.mask_window >= 0, f"mask_window={s.mask_window} must not be negative; 0 cuts without fading.")


def _check_adapters(s: AdapterSettings) -> None:
    _require(s.lora_r >= 1, f"lora_r={s.lora_r} must be at least 1; to train without adapters use tune: full.")
    _require(s.max_rank >= s.lora_r, f"max_rank={s.max_rank} is below lora_r={s.lora_r}. Raise max_rank.")
    _require(
        s.tuning_growth >= 1,
        f"tuning_growth={s.tuning_growth} must be at least 1; for constant ranks use rank_growth: none.",
    )
    order = {mode: i for i, mode in enumerate(TUNE_MODES)}
    modes = [m for m in (s.tune, s.tune_after_pruning, s.tune_after_distillation) if m is not None]
    _require(
        all(order[a] <= order[b] for a, b in zip(modes, modes[1:], strict=False)),
        "tune, tune_after_pruning and tune_after_distillation can only widen (adapters, adapters_and_norms, full), "
        f"but were given as {' → '.join(modes)}.",
    )


def _check_distillation(s: DistillationSettings) -> None:
    _require(
        (s.distillation == "model") == (s.teacher_name_or_path is not None),
        "distillation: model and teacher_name_or_path belong together; "
        f"given distillation={s.distillation!r}, teacher_name_or_path={s.teacher_name_or_path!r}.",
    )
    _require(0 <= s.distillation_weight <= 1, f"distillation_weight={s.distillation_weight} must lie in [0, 1].")
    _require(
        s.distillation_temperature > 0, f"distillation_temperature={s.distillation_temperature} must be positive."
    )
    _require(0 < s.heldout_fraction < 0.5, f"heldout_fraction={s.heldout_fraction} must lie between 0 and 0.5.")
    _require(
        s.distillation_layers >= 1,
        f"distillation_layers={s.distillation_layers} must be at least 1; to drop the layer loss use layer_weight: 0.",
    )
