"""Lets FSDP2 run on CPUs, for tests only: accelerate switches it on for accelerators alone and trains under DDP else.

Call :func:`enable` in a worker before training arguments are made. Not for any other use: nothing but small models
was ever tried this way.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from apt_trainer.engines import fsdp_checks


def enable() -> None:
    """Make this process take its CPU for an accelerator, as far as FSDP is concerned."""
    original = AcceleratorState.__init__

    def initialise(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            # each later state is filled from the partial one
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = initialise  # type: ignore[method-assign]
    fsdp_checks.has_accelerators = lambda args: True  # type: ignore[assignment]
