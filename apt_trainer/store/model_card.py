"""The model card beside a finished model: what it was made from, its sizes, how to load it.

Not for uploading (``hub``).
"""

from __future__ import annotations

import os

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from apt_trainer.measure import count_parameters
from apt_trainer.store.saved_model import dense_copy

CARD_FILE = "README.md"
_CARD = """---
{metadata}
---

# {title}

{made} with [APT](https://arxiv.org/abs/2401.12200) by `apt_trainer`{source}{data}.

| | dense | this model |
|---|---:|---:|
| parameters | {dense:,} | {own:,} |

Load it with

```python
{load}
```
"""


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
) -> ModelCard:
    """Card of a ``model`` that is finished; its base is named in the metadata where that is a name on the hub.

    All else as ``Trainer.create_model_card``.
    """
    stock = not hasattr(model.config, "apt_structure")
    base = _hub_name(finetuned_from or getattr(model.config, "_name_or_path", None))
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        base_model=base,
        tags=["apt_trainer", *([] if stock else ["pruned"]), *_listed(tags)],
        pipeline_tag=next(iter(_listed(tasks)), None),
        datasets=_listed(dataset_tags) or None,
    )
    name, trained_on = type(model).__name__, [*_listed(dataset), *_listed(dataset_args)]
    return ModelCard(
        _CARD.format(
            metadata=data.to_yaml(),
            title=model_name or ("Fine-tuned model" if stock else "Pruned model"),
            made="Fine-tuned" if stock else "Fine-tuned and pruned",
            source="" if base is None else f" from [{base}](https://huggingface.co/{base})",
            data=f" on {', '.join(trained_on)}" if trained_on else "",
            dense=count_parameters(dense_copy(model, "meta")),
            own=count_parameters(model),
            load=f'from transformers import {name}\n\nmodel = {name}.from_pretrained("PATH")'
            if stock
            else 'from apt_trainer import load_pruned\n\nmodel = load_pruned("PATH")',
        )
    )


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
