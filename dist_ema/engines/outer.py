"""Weights that a wrapper outside of a model has taken: what lies in the model is a part of them, or a passing copy."""

from __future__ import annotations

import sys

from torch import nn

from dist_ema.engines.names import walk_slots
from dist_ema.errors import EMAEngineError


def refuse_sharded(model: nn.Module) -> None:
    """Raises EMAEngineError if a model that is taken for a plain one holds a part of some weight only. Local.

    Modules that nobody has imported have wrapped nothing, so they are not imported here either.
    """
    if "torch.distributed.fsdp" in sys.modules:
        from dist_ema.engines.fsdp1 import refuse_outer_unit

        refuse_outer_unit(model)
    slots = walk_slots(model)
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import DTensor

        for slot in slots:
            if isinstance(slot.get(), DTensor):
                raise EMAEngineError(
                    f"{slot.name!r} is a DTensor now: the model was sharded after the average was made. Make a new "
                    "ShardedEMA of the sharded model"
                )
