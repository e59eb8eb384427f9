"""Attentions, their heads, feed-forwards and layers: which a model can do without, and the model without them.

Three sources: cosine importance of LLM-Drop (arXiv 2406.15786), the relative impact of a sublayer on perplexity per
cost, and layer similarity (arXiv 2407.09298). Not for neurons, nor for heads while a model trains
(``pruning``, ``scoring``), and not for reading models or files of text (``studies``).
"""
