"""Execution plans: in which order, how often and which of them side by side the layers of a frozen model run.

After "Transformer Layers as Painters" (arXiv 2407.09298). A plan is data (``plan``); the paper's plans by name are in
``named``; ``layers`` runs one on a stock model, with a slot of the key-value cache for each run of a layer; ``scores``
makes benchmarks comparable. Not for reading models or text, nor for sweeps over plans (``depth``), nor for saving
(``painted_model``).
"""
