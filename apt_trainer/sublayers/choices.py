"""The closed lists of names that users choose from. Imports nothing, so that a command line can show them at once."""

from __future__ import annotations

KINDS = ("attention", "mlp", "block", "joint", "consecutive")
METHODS = ("cosine", "nri", "reverse", "random")
COSTS = ("params", "latency", "memory", "none")
BASELINES = ("current", "dense")
STRATEGIES = ("one_shot", "iterative")
FRACTIONS = ("params", "latency")
CURVE_KINDS = KINDS[:4]  # a run of neighbouring layers is no prefix of a longer one
