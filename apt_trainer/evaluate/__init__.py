"""How good a finished model is: perplexity on a text, tasks of lm-evaluation-harness, and how sure the numbers are.

Every function takes a live model. Not for the metrics of a recipe's task (``tasks``), nor for size and speed
(``measure``).
"""
