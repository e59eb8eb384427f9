"""The closed lists of names that users choose from. Imports nothing, so that a command line can show them at once."""

from __future__ import annotations

KINDS = ("attention", "mlp", "block", "joint", "consecutive", "heads")
METHODS = ("cosine", "nri", "reverse", "random")
COSTS = ("params", "latency", "memory", "none")
BASELINES = ("current", "dense")
STRATEGIES = ("one_shot", "iterative")
FRACTIONS = ("params", "latency")
CURVE_KINDS = (*KINDS[:4], "heads")  # a run of neighbouring layers is no prefix of a longer one
DEFAULT_CURVE_KINDS = KINDS[:4]  # heads are many, and each has to be measured
NO_COSINE = (
    "kind heads is ranked by nri, reverse or random: cosine compares what goes into a whole sublayer with what comes "
    "out of it."
)
