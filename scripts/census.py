"""Which model types of the installed transformers a table fits: python scripts/census.py [MODEL_TYPE …] [--json FILE]

Builds a tiny model of each type that has a class for causal, masked or sequence-to-sequence language modelling or for
sequence classification, tries its own table or the nearest ones on it, and runs what must hold
(``tests/invariants.py``). Each type is tried in a process of its own, since some take gigabytes even when tiny.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import invariants
import torch
import transformers
from transformers import AutoModel

from apt_trainer.models import FAMILIES
from apt_trainer.models.nearest import difference

TABLES_TRIED = 3
MOST_BYTES = 8 << 30
MOST_SECONDS = 120


def types() -> list[str]:
    """Those that may be fine-tuned as language models or classifiers."""
    found = {config.model_type for auto in invariants.AUTO for config in auto._model_mapping}
    return sorted(found)


def attempt(model_type: str) -> tuple[str, str]:
    """(verdict, table or reason) of one type."""
    if model_type in FAMILIES:
        invariants.check(model_type)
        return "supported", FAMILIES[model_type].model_types[0]
    with torch.device("meta"):
        model = AutoModel.from_config(invariants.config_of(model_type))
    tables = list(dict.fromkeys(id(family) for family in FAMILIES.values()))
    families = [next(f for f in FAMILIES.values() if id(f) == key) for key in tables]
    nearest = sorted((difference(model, family) for family in families), key=lambda found: found.size)
    if nearest[0].elsewhere or nearest[0].size > 4:
        return "differs", f"{nearest[0].family.model_types[0]}: {nearest[0]}"
    failures = []
    for found in nearest[:TABLES_TRIED]:
        FAMILIES[model_type] = replace(found.family, model_types=(model_type,))
        try:
            invariants.check(model_type)
        except Exception as error:  # whatever a model of an unknown layout raises
            failures.append(f"{found.family.model_types[0]}: {found}. {_last(error)}")
        else:
            return "fits", found.family.model_types[0]
    return "nearly", failures[0]


def _last(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).strip().split("\n")[0][:150]
    return f"{type(error).__name__} in {frame.name}: {text}"


def _send(model_type: str, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    try:
        pipe.send(attempt(model_type))
    except Exception as error:
        pipe.send(("no", _last(error)))


def apart(model_type: str) -> tuple[str, str]:
    """:func:`attempt` in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(model_type, theirs))
    process.start()
    verdict = ("no", f"no answer within {MOST_SECONDS} seconds")
    try:
        if ours.poll(MOST_SECONDS):
            verdict = ours.recv()
    except EOFError:
        verdict = ("no", "the process died")
    process.kill()
    process.join()
    return verdict


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found = {}
    for model_type in args.model_types or types():
        found[model_type] = verdict, reason = apart(model_type)
        print(f"{model_type:<28} {verdict:<10} {reason}", flush=True)
    verdicts = [verdict for verdict, _ in found.values()]
    print(f"{len(found)} types: " + ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
