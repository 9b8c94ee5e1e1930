"""A DeepSpeed engine of ZeRO-3 that has no optimizer: a teacher, or a reference policy.

Its weights are cut as those of one that trains, and nothing but their pieces is kept: there are no masters.
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
    """Returns whether this DeepSpeed engine is one of ZeRO-3 without an optimizer. Local."""
    # What deepspeed 0.19.8 has as engine.optimizer then (runtime/engine.py, runtime/zero/parameter_offload.py).
    return type(engine.optimizer).__name__ == "DeepSpeedZeRoOffload"


class _NoMasters(Masters):
    """Stands for the masters of a model that nobody trains."""

    shards_frozen = True

    def flats(self) -> Sequence[Tensor]:
        return ()

    def slices(self) -> dict[int, MasterSlice]:
        return {}

    def publish(self) -> None:
        """Full copies that a forward pass left behind are dropped; the next one gathers anew. Local."""
        self._optimizer.partition_all_parameters()


class UntrainedZeroEngine(ZeroEngine):
    """The sources are the live pieces (``ds_tensor``). A forward pass keeps small parameters whole
    (``stage3_param_persistence_threshold``), and would go on computing with them: they are dropped with the others."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine, _NoMasters(engine.optimizer))
        self.publish_is_collective = False

    def reshard(self) -> None:
        self._masters.publish()

    def _trained_of(self, numbers: Sequence[int]) -> list[int]:
        held = self._binding.held
        return [number for number in numbers if held[number].requires_grad]

    def _spec(self, slot: Slot, piece: MasterSlice | None) -> TensorSpec:
        tensor = slot.get()
        spec = super()._spec(slot, piece)
        return spec if tensor is None else replace(spec, kind=kind_of(slot, tensor))
