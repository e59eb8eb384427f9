"""Bytes of the tensors that live in this process, of which torch keeps no count on CPUs.

Every storage counts once, however many tensors share it. Not for what no tensor holds: workspaces inside an operation,
buffers of gloo, what the allocator keeps for later.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Watches what is done within it; afterwards ``before``, ``most`` and ``after`` are bytes.

    Tensors from before are found through the garbage collector, from which ``gc.freeze`` hides nothing any longer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: WeakValueDictionary[int, torch.UntypedStorage] = WeakValueDictionary()
        self._sizes: dict[int, int] = {}
        self.before = self.most = self.after = 0

    def __enter__(self) -> LiveBytes:
        gc.unfreeze()
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor):
                self._note(thing)
        self.forget_most()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.after = self._now()

    def forget_most(self) -> None:
        """Begin anew: what is there now is ``before``."""
        self.before = self.most = self._now()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):  # made of other tensors, as DTensors are
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        changed = [self._note(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if any(changed):
            self.most = max(self.most, self._now())
        return result

    def _note(self, tensor: torch.Tensor) -> bool:
        """Whether its storage is new, or of another size than when it was last seen."""
        if hasattr(tensor, "__tensor_flatten__"):
            return False
        storage = tensor.untyped_storage()
        if storage.device.type == "meta":  # also of fake tensors, which name another device
            return False
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages and self._sizes[key] == size:
            return False
        self._storages[key], self._sizes[key] = storage, size
        return True

    def _now(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())
