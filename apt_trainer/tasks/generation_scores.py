"""ROUGE and BLEU of generated texts against references, as fractions: 0.25 is what others print as 25.

ROUGE is that of the package rouge_score with stemming; BLEU and chrF are those of sacrebleu with its defaults (13a
tokens, which suit languages that put spaces between words). Both are imported when used. Not for token scores.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def rouge_scores(predicted: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Mean F1 over texts; rougeLsum compares sentence by sentence, parted after ., ! and ? and at line breaks."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    pairs = zip(predicted, expected, strict=True)
    scores = [scorer.score(_by_sentence(reference), _by_sentence(text)) for text, reference in pairs]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in ROUGE}


def _by_sentence(text: str) -> str:
    return _SENTENCE_END.sub("\n", text.strip())


def translation_scores(predicted: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """BLEU and chrF of the whole corpus, one reference per text."""
    import sacrebleu

    references = [list(expected)]
    return {
        "bleu": sacrebleu.corpus_bleu(list(predicted), references).score / 100,
        "chrf": sacrebleu.corpus_chrf(list(predicted), references).score / 100,
    }
