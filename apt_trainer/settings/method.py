"""Settings of the method: pruning, adapters and distillation, and what makes them possible together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.settings.choices import PRUNE_TARGETS, RULES, TUNE_MODES, check_choices, rules_help, setting
from apt_trainer.settings.presets import Preset, resolve


@dataclass
class PruningSettings:
    """What is removed, how much of it and when."""

    preset: str = setting(
        "ours",
        "Details that differ. ours: the outlier term at a tenth of the mean salience of its kind, the most salient "
        "half of the adapters takes all new parameters, the task head trains; paper (APT): the outlier term as it is, "
        "r' = r·Δ'/Δ for the most salient half by sums of |B·grad B|, in one process or under DDP; official: as ours, "
        "but the outlier term as it is and a task head that stays at random values.",
    )
    preset_overrides: dict[str, Any] | None = setting(None, "Single values other than those of the preset.")
    target_sparsity: float | None = setting(
        0.6,
        "Fraction of the prunable budget to remove, between 0 and 1; null: prune nothing. 0.6 (APT, Table 2). For a "
        "model that was pruned before: of its dense original, what is gone already included.",
    )
    sparsity_metric: str = setting(
        "params",
        "What the budget counts: params or flops of the transformer blocks, total_params (embeddings and head too), "
        "measured latency, or memory (all weights, and the keys and values that a model which generates keeps).",
    )
    prune_targets: list[str] = setting(
        ["heads", "neurons", "hidden"],
        "Kinds of units that may be removed: heads, neurons, hidden; experts of a mixture, down to as many as a token "
        "uses; sublayers: whole attentions and feed-forwards.",
    )
    post_norm_policy: str = setting(
        "remove_norm",
        "What is left of an attention or a feed-forward that vanishes. remove_norm: nothing, y = x; keep_norm, for "
        "models with a norm after each residual (BERT, RoBERTa, XLM-RoBERTa, DistilBERT): the norm, y = norm(x).",
    )
    shape: str = setting(
        "free",
        "free: each layer loses what it needs least. uniform: all layers keep as many heads and neurons (which ones "
        "differs), and sublayers means whole layers, so that the result is a stock checkpoint of its family, which "
        "transformers, vLLM, TensorRT-LLM and llama.cpp's converter read as any other.",
    )
    pruning_time: str = setting(
        "early",
        "before: once, before the first step (APT, for LLaMA); early: in the first part of training; late: in its "
        "second half; after: once, when training has ended.",
    )
    refit: bool | None = setting(
        None,
        "At a cut, solve the weights that read what is left for anew by least squares, on calibration_samples rows; "
        "units then go at once, without masks. Default: at a cut before training alone, where it wins; while an "
        "encoder trains it did not (recipes/README.md).",
    )
    calibration_samples: int = setting(
        256, "Rows of the training data that score the units where pruning_time is before, or by nri. 256 (APT)."
    )
    calibration_batch_size: int | None = setting(
        None, "Rows per batch of that scoring on one device. Default: per_device_train_batch_size."
    )
    pruning_start: float | None = setting(
        None,
        "First step of pruning (warm-up before it), or a fraction of all steps. Default by pruning_time.",
    )
    pruning_end: float | None = setting(
        None,
        "Step at which the target is reached, or a fraction of all steps, 1.0 being the last; with before, the one at "
        "which ranks stop growing. Default by pruning_time.",
    )
    num_pruning_events: int = setting(
        5,
        "How many times units are cut (with before: ranks grow); fewer where there are fewer steps. Official: 10 to "
        "16 over far longer runs.",
    )
    sparsity_schedule: str = setting("cubic", "Curve of sparsity over events: cubic (APT, App. C) or linear.")
    mask_window: float = setting(
        200,
        "Steps before each event in which masks fade; at most the interval between events. 200 (official). None with "
        "importance: nri or refit.",
    )
    mask_step: float = setting(
        0.01, "Least change of a mask per step; raised so that a mask can fade within half a window. 0.01 (official)."
    )
    importance: str = setting("salience", rules_help())
    nri_cost: str = setting("params", "What nri divides the loss by: params, latency (measured), memory, none.")
    salience_decay: float = setting(
        0.85, "Decay of the moving average of scores, per observation. 0.85 (APT, Sec. 4.2)."
    )
    observe_every: int = setting(
        4, "Optimizer steps between two observations of scores; less in short runs. 1: every step (official)."
    )
    outlier_term: bool = setting(True, "Add the square root of the kurtosis to the salience (APT, Eq. 5).")
    round_to: int = setting(
        8,
        "Neurons per layer and hidden dimensions are kept in multiples of this. Servers like 32 (llama.cpp Q8_0), 64 "
        "(half precision on tensor cores), 128 (vLLM and TensorRT-LLM: FP8, AWQ and GPTQ groups) or 256 (llama.cpp "
        "Q4_K).",
    )
    min_heads: int = setting(0, "Least heads kept per attention; 0: a whole attention may vanish (APT).")
    min_neurons: int = setting(0, "Least neurons kept per feed-forward; 0: a whole feed-forward may vanish (APT).")
    min_hidden: int = setting(64, "Least hidden dimensions kept.")
    reference_batch_size: int = setting(
        32, "Batch size at which flops, latency and memory are counted, in budgets and in nri_cost."
    )
    reference_length: int = setting(128, "Sequence length in tokens at which flops, latency and memory are counted.")

    @property
    def details(self) -> Preset:
        """Values of the preset."""
        return resolve(self.preset, self.preset_overrides)


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
    tuning_growth: float = setting(
        4.0, "Adapter parameters after the last event, relative to those put into the dense model. 4 (official)."
    )
    max_rank: int = setting(64, "Largest rank of one adapter. 64 (official).")
    base_quantization: str | None = setting(
        None,
        "nf4 or int8, with pruning_time: before: once the model is cut and refitted, the linear layers of its blocks "
        "are quantised (bitsandbytes), and adapters train on them; the finished model has weights of the usual type.",
    )
    tune: str = setting(
        "adapters", "What trains at first besides the task head: adapters, adapters_and_norms or full."
    )
    tune_after_pruning: str | None = setting(None, "What trains from pruning_end on. Default: as before.")
    tune_after_distillation: str | None = setting(None, "What trains once distillation has ended. Default: as before.")
    tune_embeddings: bool = setting(False, "Train the embeddings too where tune is full.")
    full_learning_rate: float | None = setting(
        None, "Learning rate of base weights where they train. Default: learning_rate (of adapters and head)."
    )
    recompute_norms: bool = setting(
        True,
        "In half precision, keep the input of each RMS norm for the backward pass instead of its float32 copy, and "
        "normalise again there: the same numbers in less memory.",
    )
    keep_adapters: bool = setting(
        False, "Save the adapters beside the model too, as they were before they were merged: for export: [adapter]."
    )


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
        0.5,
        "Largest weight of the distillation loss against the task loss; reached at pruning_end. With 1 (APT) labels "
        "are soon left out, and only a teacher that is no good yet, or was not tuned on the data, is learnt from.",
    )
    distillation_temperature: float = setting(2.0, "Softening of the predictions. The official code divides by 2/3.")
    prediction_weight: float = setting(1.0, "Weight of the prediction loss. 1 (APT).")
    layer_weight: float = setting(0.9, "Weight of the layer loss. 0.9 (APT).")
    distillation_layers: int = setting(4, "Teacher layers compared per step. 4 (APT, Sec. 4.4).")
    distillation_layer_map: str = setting(
        "dynamic", "dynamic: one random layer per block of layers (APT); static: the last of each; none."
    )
    heldout_fraction: float = setting(0.05, "Share of the training data on which teacher snapshots are chosen.")
    remote_code: bool = setting(
        True,
        "Save the code with the model by which transformers, with trust_remote_code, loads it where this package is "
        "not installed.",
    )


@dataclass
class MethodSettings(PruningSettings, AdapterSettings, DistillationSettings):
    """Everything that the method itself needs; :meth:`check` validates it."""

    def check(self) -> None:
        """Raise :class:`UserError` for the first setting that cannot work."""
        check_choices(self)
        resolve(self.preset, self.preset_overrides)
        _check_pruning(self)
        _check_adapters(self)
        _check_distillation(self)
        _check_base(self)

    @property
    def prunes(self) -> bool:
        return self.target_sparsity is not None

    @property
    def prunes_before(self) -> bool:
        """The dense model is cut before the first step; while it trains only ranks change."""
        return self.prunes and self.pruning_time == "before"

    @property
    def refits(self) -> bool:
        """Weights that read what a cut leaves are solved for anew."""
        return self.prunes and (self.prunes_before if self.refit is None else self.refit)

    @property
    def uses_adapters(self) -> bool:
        """Adapters are made unless every base weight trains from the first step."""
        return self.tune != "full"


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _require_steps(name: str, value: float | None) -> None:
    _require(
        value is None or (value >= 0 and (value <= 1 or float(value).is_integer())),
        f"{name}={value} must be a number of steps (a whole number), or a fraction of all steps up to 1.0.",
    )


def _check_pruning(s: PruningSettings) -> None:
    if s.target_sparsity is not None:
        given = s.target_sparsity
        percent = f" For {given:g} % write {given / 100:g}." if 1 < given < 100 else ""
        _require(
            0 < given < 1,
            f"target_sparsity={given} must lie between 0 and 1 (0.6 removes 60 %); null prunes nothing.{percent}",
        )
        _require(len(s.prune_targets) > 0, "prune_targets is empty. Name at least one of: " + ", ".join(PRUNE_TARGETS))
    for target in s.prune_targets:
        if target not in PRUNE_TARGETS:
            raise unknown_choice("prune_targets", target, PRUNE_TARGETS)
    if s.target_sparsity is not None and RULES[s.importance].sublayers:
        _check_sublayer_scores(s)
    counts = ("num_pruning_events", "observe_every", "round_to", "min_hidden", "calibration_samples")
    for name in (*counts, "calibration_batch_size", "reference_batch_size", "reference_length"):
        value = getattr(s, name)
        _require(value is None or value >= 1, f"{name}={value} must be at least 1.")
    for name in ("min_heads", "min_neurons"):
        _require(getattr(s, name) >= 0, f"{name}={getattr(s, name)} must not be negative.")
    for name in ("pruning_start", "pruning_end", "mask_window"):
        _require_steps(name, getattr(s, name))
    _require(
        s.pruning_time != "before" or s.pruning_start is None,
        f"pruning_time: before cuts before the first step, so pruning_start={s.pruning_start} has no meaning. "
        "Remove it.",
    )
    _require(0 <= s.salience_decay < 1, f"salience_decay={s.salience_decay} must lie in [0, 1).")
    _require(0 < s.mask_step <= 1, f"mask_step={s.mask_step} must lie in (0, 1].")


def _check_sublayer_scores(s: PruningSettings) -> None:
    _require(
        set(s.prune_targets) == {"sublayers"},
        f"importance: {s.importance} scores whole sublayers, but prune_targets={s.prune_targets}. "
        "Set prune_targets: [sublayers], or another importance.",
    )


def _check_adapters(s: AdapterSettings) -> None:
    _require(s.lora_alpha > 0, f"lora_alpha={s.lora_alpha} must be above 0.")
    _require(0 <= s.lora_dropout < 1, f"lora_dropout={s.lora_dropout} must lie in [0, 1).")
    _require(s.lora_target_modules != [], "lora_target_modules is empty. Name linears, or leave it out.")
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
    _require(
        not s.keep_adapters or "full" not in modes,
        "keep_adapters: true keeps what is added to frozen weights, but tune: full trains all weights. Use tune: "
        "adapters or adapters_and_norms, or leave keep_adapters out.",
    )


def _check_base(s: MethodSettings) -> None:
    if s.base_quantization is None:
        return
    named = f"base_quantization: {s.base_quantization}"
    _require(
        s.prunes_before,
        f"{named} quantises what a cut before training leaves, which no later cut can follow. Set pruning_time: "
        "before and a target_sparsity, or leave it out.",
    )
    modes = (s.tune, s.tune_after_pruning, s.tune_after_distillation)
    _require(
        "full" not in modes,
        f"{named} freezes the weights that tune: full trains. Use tune: adapters or adapters_and_norms, or leave it "
        "out.",
    )


def _check_distillation(s: DistillationSettings) -> None:
    _require(
        (s.distillation == "model") == (s.teacher_name_or_path is not None),
        "distillation: model and teacher_name_or_path belong together; "
        f"given distillation={s.distillation!r}, teacher_name_or_path={s.teacher_name_or_path!r}.",
    )
    for name in ("prediction_weight", "layer_weight"):
        _require(getattr(s, name) >= 0, f"{name}={getattr(s, name)} must not be negative; 0 leaves that loss out.")
    for name in ("distillation_start", "distillation_end"):
        _require_steps(name, getattr(s, name))
    _require(0 <= s.distillation_weight <= 1, f"distillation_weight={s.distillation_weight} must lie in [0, 1].")
    _require(
        s.distillation_temperature > 0, f"distillation_temperature={s.distillation_temperature} must be positive."
    )
    _require(0 < s.heldout_fraction < 0.5, f"heldout_fraction={s.heldout_fraction} must lie between 0 and 0.5.")
    _require(
        s.distillation_layers >= 1,
        f"distillation_layers={s.distillation_layers} must be at least 1; to drop the layer loss use layer_weight: 0.",
    )
