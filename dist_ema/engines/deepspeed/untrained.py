"""DeepSpeed engines of ZeRO-3 without an optimizer: a teacher, or a reference policy.

DeepSpeed cuts the weights of such a model as it cuts those of a model that trains (see ``masters.py``), but keeps no
masters. This file averages into the live pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from dist_ema.engines.deepspeed.masters import Masters, MasterSlice
from dist_ema.engines.deepspeed.zero import ZeroEngine
from dist_ema.engines.names import Slot, kind_of
from dist_ema.geometry.spec import TensorSpec


def is_untrained(engine: Any) -> bool:
    """Returns whether a DeepSpeed engine is one of ZeRO-3 without an optimizer. Local."""
    # deepspeed 0.19.8 sets engine.optimizer to an object of this class then (runtime/engine.py,
    # runtime/zero/parameter_offload.py).
    return type(engine.optimizer).__name__ == "DeepSpeedZeRoOffload"


class _NoMasters(Masters):
    """Implements :class:`Masters` for a model without masters."""

    shards_frozen = True

    def flats(self) -> Sequence[Tensor]:
        return ()

    def slices(self) -> dict[int, MasterSlice]:
        return {}

    def publish(self) -> None:
        """Drops the full copies that a forward pass left behind, so that the next one gathers anew. Local."""
        self._optimizer.partition_all_parameters()


class UntrainedZeroEngine(ZeroEngine):
    """Engine whose sources are the live pieces of each parameter (``ds_tensor``).

    A forward pass keeps full copies of small parameters (``stage3_param_persistence_threshold``), and the next one
    would compute with these copies. ``publish()`` and ``reshard()`` drop them with all others.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine, _NoMasters(engine.optimizer))
        self.publish_is_collective = False  # nothing is gathered before the next forward pass

    def reshard(self) -> None:
        self._masters.publish()

    def _trained_of(self, numbers: Sequence[int]) -> list[int]:
        held = self._binding.held
        return [number for number in numbers if held[number].requires_grad]

    def _spec(self, slot: Slot, piece: MasterSlice | None) -> TensorSpec:
        tensor = slot.get()
        spec = super()._spec(slot, piece)
        return spec if tensor is None else replace(spec, kind=kind_of(slot, tensor))
