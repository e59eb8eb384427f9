"""Numbers about a model: parameters, bytes on disk, operations, seconds and memory.

Knows nothing about training or pruning. Every function takes a plain :class:`torch.nn.Module` and leaves it as it was.
"""

from __future__ import annotations

from apt_trainer.measure.flops import count_flops
from apt_trainer.measure.generation import Generation, compare_generation, generate_once
from apt_trainer.measure.latency import Latency, compare_latency, evaluating, example_inputs, placed, ratio_is_noise
from apt_trainer.measure.memory import (
    PeakMemory,
    current_memory_bytes,
    peak_memory_bytes,
    reset_peak,
    return_freed_memory,
)
from apt_trainer.measure.params import count_parameters, dtype_on_disk, size_on_disk, trainable_parameters

__all__ = [
    "Generation",
    "Latency",
    "PeakMemory",
    "compare_generation",
    "compare_latency",
    "count_flops",
    "count_parameters",
    "current_memory_bytes",
    "dtype_on_disk",
    "evaluating",
    "example_inputs",
    "generate_once",
    "peak_memory_bytes",
    "placed",
    "ratio_is_noise",
    "reset_peak",
    "return_freed_memory",
    "size_on_disk",
    "trainable_parameters",
]
