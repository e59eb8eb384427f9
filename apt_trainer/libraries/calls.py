"""How a model of transformers is called: what a release names its arguments is read from the model, not assumed.

A key-value cache was called ``past_key_values`` until transformers 5.23 and is called ``cache`` since. For what is
inside a model: ``models.modeling_apt``.
"""

from __future__ import annotations

import inspect

from torch import nn


def cache_name(model: nn.Module) -> str:
    """The name under which ``model`` takes and returns its key-value cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
