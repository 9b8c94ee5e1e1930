"""Averages the fp32 masters that an optimizer keeps for bf16 or fp16 parameters: ``ShardedEMA(model, masters=...)``.

Such an optimizer steps a master of each parameter, and casts the master into the parameter. The source of the average
is then the master, as under DeepSpeed. :meth:`MastersEngine.publish` casts masters into the parameters, as the
optimizer's own step does::

    step()                 gradient -> master (fp32) -> parameter (bf16)
    update()               shadow <- master
    average_parameters()   master <-> shadow, then parameter <- master; the same on the way back

Where the masters are:

- TransformerEngine 2.9, optimizers/fused_adam.py: ``state[parameter]["master_param"]``. It is made at the first step,
  as a copy of the parameter, for parameters that are not fp32.
- apex, optimizers/fused_adam.py: ``param_groups_master``, lists that are parallel to ``param_groups``.
- any other optimizer: the user gives a function from a parameter to its master.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dist_ema.engines.base import Engine, write_count
from dist_ema.engines.pipeline import CompositeEngine
from dist_ema.engines.plain import PlainEngine
from dist_ema.engines.wrappers import loaded, unwrap_optimizer
from dist_ema.errors import EMAConfigError, EMAEngineError

logger = logging.getLogger(__name__)

#: Returns the master of a parameter; None for one that has none.
Find: TypeAlias = Callable[[nn.Parameter], Tensor | None]

_MASTER_DTYPES = (torch.float32, torch.float64)
_ALLOWED = "allowed are an optimizer that keeps masters, and a function that returns the master of a parameter or None"


class MastersEngine(CompositeEngine):
    """Averages a plain, DDP, FSDP2 or tensor-parallel model whose optimizer keeps master weights.

    A master has the shape and the device of this rank's part of its parameter. Before the first step of the optimizer
    there are no masters. Until then the parameters are the sources, which is the same: masters start as copies of them.
    """

    def __init__(self, inner: PlainEngine, masters: object) -> None:
        super().__init__([inner])
        self._inner = inner
        self._optimizer, self._find = finder(masters)
        self._live: list[Tensor] = []  # the parameters' own parts, in the order of the specs
        self._sources: list[Tensor] = []  # the same list with masters in place of their parameters
        self._first_counts: list[int] | None = None  # counters of writes to the parameters at the first read
        self._warned = False

    @property
    def is_part(self) -> bool:
        return self._inner.is_part

    def _read_sources(self) -> list[Tensor]:
        """Returns masters where there are some, and the parameters' own parts elsewhere. Local; no copy, no host sync.

        Raises EMAEngineError, naming the parameter, if a master is missing or does not fit.
        """
        self._live = super()._read_sources()
        self._sources = list(self._live)
        missing: list[str] = []
        has_masters = False
        for number, parameter in enumerate(self._inner.held()):
            if self._announced[number].kind != "parameter" or not isinstance(parameter, nn.Parameter):
                continue  # frozen parameters and buffers have no master
            master = self._find(parameter)
            if master is not None:
                self._sources[number] = self._check_master(number, master)
                has_masters = True
            elif parameter.dtype not in _MASTER_DTYPES:
                missing.append(self._announced[number].name)
        if missing and (has_masters or self._has_stepped()):
            raise EMAEngineError(
                f"masters=: the parameter {missing[0]!r} and {len(missing) - 1} more with fewer bits than fp32 have no "
                "master in the optimizer. Create the optimizer with master weights for all averaged parameters, or "
                "leave masters= out to average the parameters themselves"
            )
        if missing and self._optimizer is None:
            self._warn_without_masters(missing)
        return list(self._sources)

    def _warn_without_masters(self, missing: list[str]) -> None:
        """Warns once if a function has found no master although parameters were written since the first read. Local.

        The state of an optimizer tells whether it has made a step. For a function only writes to the parameters show
        it, and to load weights before the first step is a write as well. So this is a warning and not an error.
        """
        counts = list(map(write_count, self._live))
        if self._first_counts is None:
            self._first_counts = counts
        elif counts != self._first_counts and not self._warned:
            self._warned = True
            logger.warning(
                "masters=: the function has returned None for %r and for every other parameter with fewer bits than "
                "fp32 (%d in all), so the parameters themselves are averaged, without what their rounding drops. If "
                "the optimizer has made a step, let the function return its masters, or leave masters= out.",
                missing[0],
                len(missing),
            )

    def _check_master(self, number: int, master: object) -> Tensor:
        """Returns this rank's part of a master. Local; no copy.

        Raises EMAEngineError if its class, dtype, shape or device does not fit the parameter.
        """
        live = self._live[number]
        name = self._announced[number].name
        if not isinstance(master, Tensor):
            raise EMAEngineError(f"masters=: the master of {name!r} is a {type(master).__name__}, not a tensor")
        if isinstance(master, loaded("torch.distributed.tensor", "DTensor")):
            local: Tensor = master.to_local()
        else:
            local = master.detach()
        if local.dtype not in _MASTER_DTYPES:
            raise EMAEngineError(
                f"masters=: the master of {name!r} is {local.dtype}, but only fp32 and fp64 are allowed. Masters that "
                "are stored as remainders or scaled (TransformerEngine's store_param_remainders, master_weight_dtype) "
                "cannot be read: create the optimizer without this option"
            )
        if local.shape != live.shape:
            raise EMAEngineError(
                f"masters=: the master of {name!r} has the shape {tuple(local.shape)} on this rank, and its parameter "
                f"has {tuple(live.shape)}"
            )
        if local.device != live.device:
            raise EMAEngineError(
                f"masters=: the master of {name!r} is on {local.device}, and its parameter on {live.device}: masters "
                "that an optimizer offloads cannot be averaged"
            )
        return local

    def _has_stepped(self) -> bool:
        """Returns whether the optimizer has made a step. If it keeps masters, it has them from then on. Local."""
        return isinstance(self._optimizer, torch.optim.Optimizer) and bool(self._optimizer.state)

    def publish(self) -> None:
        """Casts the masters into the parameters, rounding to nearest as the optimizer's step does. Local.

        A write to a parameter that did not also change its master is lost, as it would be in the optimizer's next step.
        """
        super().publish()
        with torch.no_grad():
            for live, source in zip(self._live, self._sources, strict=True):
                if source is not live:
                    live.copy_(source)

    def write_counts(self) -> list[int]:
        """Counts the writes to masters and parameters together. Local; no host sync."""
        counts = super().write_counts()
        self.sources()
        for number, (live, source) in enumerate(zip(self._live, self._sources, strict=True)):
            if source is not live:
                counts[number] += write_count(source)
        return counts


def with_masters(engine: Engine, masters: object) -> Engine:
    """Returns an engine that averages the masters of an optimizer; ``engine`` itself for ``masters=None``. Local.

    Raises EMAEngineError for engines that are not built on ``nn.Module``'s parameters (FSDP1, DeepSpeed, lists of
    modules).
    """
    if masters is None:
        return engine
    if not isinstance(engine, PlainEngine):
        raise EMAEngineError(
            f"masters= is for plain modules, DDP, FSDP2 and tensor parallelism, and not for {type(engine).__name__}. "
            "Leave it out: under DeepSpeed the masters are found without it, and FSDP1 keeps fp32 parameters itself"
        )
    return MastersEngine(engine, masters)


def finder(masters: object) -> tuple[torch.optim.Optimizer | None, Find]:
    """Returns the optimizer, None if ``masters`` is a function, and the function that finds masters. Local.

    Raises EMAConfigError if ``masters`` is neither an optimizer nor a function.
    """
    optimizer = unwrap_optimizer(masters)
    if optimizer is not None:
        return optimizer, partial(_master_in, optimizer)
    if callable(masters):
        return None, masters
    raise EMAConfigError(f"masters={type(masters).__name__}: {_ALLOWED}")


def _master_in(optimizer: Any, parameter: nn.Parameter) -> Tensor | None:
    """Returns the master that TransformerEngine's or apex's FusedAdam keeps for a parameter, or None."""
    state = optimizer.state.get(parameter)
    if state and "master_param" in state:
        master: Tensor = state["master_param"]
        return master
    # apex. Where a parameter is fp32, its list of masters has the parameter itself.
    groups_of_masters = getattr(optimizer, "param_groups_master", None) or ()
    for group, group_of_masters in zip(optimizer.param_groups, groups_of_masters, strict=False):
        for candidate, master in zip(group["params"], group_of_masters["params"], strict=True):
            if candidate is parameter and master is not candidate:
                return master
    return None
