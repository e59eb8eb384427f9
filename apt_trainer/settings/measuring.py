"""Settings of what a run measures when it has ended."""

from __future__ import annotations

from dataclasses import dataclass

from apt_trainer.errors import UserError
from apt_trainer.settings.choices import setting


@dataclass
class MeasureSettings:
    """What is measured after training."""

    measure_latency: bool = setting(
        True,
        "Time the saved model against the dense one at the end: a forward pass, or generation if it can.",
    )
    latency_batch_sizes: list[int] = setting([1, 32], "Batch sizes at which latency is measured.")
    latency_length: int = setting(128, "Length of sequences or prompts in tokens at which latency is measured.")
    latency_new_tokens: int = setting(32, "Tokens that are generated when latency is measured, if the model can.")
    lm_eval_tasks: list[str] = setting(
        [], "Tasks of lm-evaluation-harness for the saved model at the end: names, or paths of YAML files."
    )
    export: list[str] = setting(
        [],
        "Formats in which the finished model is also written, to export/NAME in output_dir, and measured: onnx, "
        "onnx_int8, openvino, openvino_int8, gguf, gguf_f16, gguf_q8_0, gguf_q5_0, gguf_q4_0, gguf_q4_k_m, "
        "gguf_q5_k_m, gguf_q6_k; adapter, with keep_adapters.",
    )
    reference_metric: float | None = setting(
        None, "Metric of full fine-tuning on the validation data: the run records when its finished shape comes near."
    )
    reference_share: float = setting(0.97, "How near: this share of reference_metric. 0.97 (APT, Sec. 5.1).")
    dense_baseline: bool = setting(
        False, "Also fine-tune the dense model in full, in a process of its own and before, to compare with."
    )
    dense_learning_rate: float = setting(1e-4, "Learning rate of that full fine-tuning.")

    def check_measuring(self) -> None:
        """Raise :class:`UserError` for the first setting that cannot work."""
        for name in ("latency_length", "latency_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if not self.latency_batch_sizes or min(self.latency_batch_sizes) < 1:
            raise UserError(f"latency_batch_sizes={self.latency_batch_sizes} must be a list of numbers from 1.")
        if len(set(self.export)) < len(self.export):
            raise UserError(f"export={self.export} names a format twice. Remove one of them.")
        if not 0 < self.reference_share <= 1:
            raise UserError(f"reference_share={self.reference_share} must be above 0 and at most 1.")
