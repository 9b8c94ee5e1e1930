"""The model inside its wrappers, for what asks about its class or its configuration rather than about its weights."""

from __future__ import annotations

from torch import nn

from dist_ema.engines.loaded import loaded
from dist_ema.engines.names import walk_modules


def unwrapped(module: nn.Module) -> nn.Module:
    """The innermost module whose state dict has the canonical names: without FSDP1, DDP, torch.compile. Local."""
    inner = module
    for name, found in walk_modules(module):
        if name:
            break
        inner = found
    return inner


def plain_type(module: nn.Module) -> type:
    """The class that the user wrote: ``fully_shard`` gives a module another, made of that and its own."""
    fsdp = loaded("torch.distributed.fsdp", "FSDPModule")
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, fsdp))
