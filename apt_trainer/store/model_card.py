"""The model card beside a finished model: what it was made from, what was kept, its sizes and results, how to load it.

Not for uploading (``hub``), nor for how results are measured and laid out (``report``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from apt_trainer.measure import count_parameters
from apt_trainer.models import HIDDEN, family_of
from apt_trainer.models.modeling_apt import carries_code
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.store.saved_model import dense_copy
from apt_trainer.store.stock import DENSE_SIZES

CARD_FILE = "README.md"
BAR = 16
"""Characters of the bar that stands for all units of a sublayer."""
_CARD = """---
{{ card_data }}
---

# {{ title }}

{{ made }} with [APT](https://arxiv.org/abs/2401.12200) by `apt_trainer`{% if base %} from \
[{{ base }}](https://huggingface.co/{{ base }}){% endif %}{% if trained_on %} on {{ trained_on }}{% endif %}.

## Model Details

- **Model type:** {{ model_type }}
{%- if base %}
- **Finetuned from model:** [{{ base }}](https://huggingface.co/{{ base }})
{%- endif %}
- **License:** {{ license }}

| | dense | this model |
|---|---:|---:|
| parameters | {{ "{:,}".format(dense) }} | {{ "{:,}".format(own) }} |
{% if kept %}
### What was kept

```text
{{ kept }}
```
{% endif %}
## How to Get Started with the Model

```python
{{ load }}
```
{% if elsewhere %}
{{ elsewhere }}
{% endif %}
{%- if results %}
## Evaluation

{{ results }}
{% endif %}
{%- if recipe %}
## Training Details

```yaml
{{ recipe }}
```
{% endif %}"""


def model_card(
    model: PreTrainedModel,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
    *,
    plan: PruningPlan | None = None,
    results: str | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> ModelCard:
    """Card of a ``model`` that is finished; its base is named in the metadata where that is a name on the hub.

    ``plan``: the units of the dense model that are left, for the picture. ``results``: tables in Markdown. ``recipe``:
    the settings of the run; paths on this machine are left out. The licence is by default that of the base, if its own
    card is at hand. All else as ``Trainer.create_model_card``.
    """
    stock = not hasattr(model.config, "apt_structure")
    whole = stock and not hasattr(model.config, DENSE_SIZES)
    given = str(finetuned_from or getattr(model.config, "_name_or_path", None) or "")
    base = _hub_name(given)
    license = license or _license_of(given)
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        base_model=base,
        tags=["apt_trainer", *([] if whole else ["pruned"]), *_listed(tags)],
        pipeline_tag=next(iter(_listed(tasks)), None),
        datasets=_listed(dataset_tags) or None,
    )
    dense = dense_copy(model, "meta")
    return ModelCard.from_template(
        data,
        template_str=_CARD,
        title=model_name or ("Fine-tuned model" if whole else "Pruned model"),
        made="Fine-tuned" if whole else "Fine-tuned and pruned",
        base=base,
        trained_on=", ".join([*_listed(dataset), *_listed(dataset_args)]),
        model_type=f"{type(model).__name__}{'' if stock else ', with layers of different size'}",
        license=license or "not stated by its base",
        dense=count_parameters(dense),
        own=count_parameters(model),
        kept=None if plan is None or whole else picture(dense, plan),
        load=_load(model, stock),
        elsewhere=None if whole else _elsewhere(model, stock),
        results=results,
        recipe=None if recipe is None else yaml.safe_dump(_portable(recipe), sort_keys=False).strip(),
    )


def picture(dense: PreTrainedModel, plan: PruningPlan) -> str:
    """What ``plan`` keeps of ``dense``, in text: a line for each layer, with a bar for its heads, neurons, experts."""
    family = family_of(dense.config)
    lines: dict[str, dict[str, str]] = {}
    hidden = ""
    for space in family.spaces(dense):
        count = plan.counts[space.name]
        if space.name == HIDDEN:
            hidden = f"hidden dimensions: {count} of {space.size}\n\n"
        else:
            full = round(BAR * count / space.size) if count == 0 else max(1, round(BAR * count / space.size))
            bar = "█" * full + "·" * (BAR - full)
            if space.within is not None and plan.counts[space.within] == 0:
                count, bar = 0, "·" * BAR
            lines.setdefault(space.label, {})[space.kind] = f"{bar} {count:>6} of {space.size:<6}"
    kinds = [kind for kind in ("heads", "neurons", "experts") if any(kind in line for line in lines.values())]
    wide = max(map(len, lines), default=0)
    head = " " * (wide + 2) + "".join(f"{kind:<{BAR + 19}}" for kind in kinds)
    rows = [
        f"{label:>{wide}}  " + "".join(f"{line.get(kind, ''):<{BAR + 19}}" for kind in kinds)
        for label, line in lines.items()
    ]
    return hidden + "\n".join(row.rstrip() for row in [head, *rows])


def _load(model: PreTrainedModel, stock: bool) -> str:
    """Code that loads the model where apt_trainer is installed, or anywhere if it is a stock model."""
    name = type(model).__name__
    if stock:
        return f'from transformers import {name}\n\nmodel = {name}.from_pretrained("PATH")'
    return 'from apt_trainer import load_pruned\n\nmodel = load_pruned("PATH")'


def _elsewhere(model: PreTrainedModel, stock: bool) -> str:
    """How other programs take the model."""
    found = []
    if stock:
        found.append("It is a stock checkpoint: whatever loads its base loads it.")
    elif carries_code(model.config):
        places: dict[str, str] = model.config.auto_map
        auto = next((name for name, place in places.items() if place.endswith(type(model).__name__)), "AutoModel")
        found.append(
            f"Where `apt_trainer` is not installed, `{auto}.from_pretrained(PATH, trust_remote_code=True)` loads it "
            "by the code in this folder."
        )
    family = family_of(model.config)
    formats = "onnx|openvino|gguf" if family.head(model).next_token else "onnx|openvino"
    if not (model.config.is_encoder_decoder or family.has_experts):
        found.append(f"`apt-trainer export PATH --format {formats} --output DIR` writes it for other run times.")
    return "\n".join(found)


def _portable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """``recipe`` without paths, which say nothing to others."""
    return {name: value for name, value in recipe.items() if not (isinstance(value, str) and _is_path(value))}


def _is_path(value: str) -> bool:
    return os.path.isabs(value) or value.startswith(("~", ".")) or (os.sep in value and os.path.exists(value))


def _license_of(base: str) -> str | None:
    """The licence that the card of ``base`` states, a folder or a name on the hub whose card was downloaded before."""
    if os.path.isdir(base):
        card: Any = Path(base) / CARD_FILE
    else:
        card = try_to_load_from_cache(base, CARD_FILE) if _hub_name(base) else None
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    try:
        return ModelCard.load(card).data.license  # type: ignore[no-any-return]
    except (OSError, ValueError, yaml.YAMLError):  # someone's notes, which are no card
        return None


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _hub_name(name: str | None) -> str | None:
    """``name`` if it is one on the hub; None for a folder, whose path says nothing to others."""
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
