"""Drops what a model has computed from its weights when an average replaces them.

* Caches that modules build in eval mode and drop in ``train()``: LeViT's attention biases, DoRA's weight norms, merged
  low-rank weights. Modules in eval mode whose class overrides ``train()`` or ``eval()`` are switched to training mode
  before the weights change, and back afterwards.
* ``torch.nn.utils.parametrize.cached()``: its cache is emptied.
* Weights that inductor's freezing has compiled in as constants: what is compiled is dropped, and compiled anew.

What cannot be noticed: a cache that no change of mode drops, what ``torch.export`` or ``torch.jit`` made of the model,
and freezing as an option of a ``torch.compile`` whose result was not given to us.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)
#: Overrides of ``train()`` that keep nothing of the weights: torch's own, and the one that all models of transformers
#: inherit, which would load their kernels anew (read in transformers 5.23).
_PLAIN = ("torch.", "deepspeed.", "transformers.modeling_utils")
_told: set[str] = set()


class DerivedState:
    """Finds and drops what the modules of one model have computed from its weights. Local.

    Args:
        roots: of the model. Which of their modules override ``train()`` is found out here.
        drops_compiled: whether compiled constants are dropped. If not, they are only logged: for weights that change
            at every step.
    """

    def __init__(self, roots: Sequence[nn.Module], drops_compiled: bool = True) -> None:
        self._modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
        self._switches = [module for module in self._modules if _overrides(module)]
        self._configurations = [found for module in self._modules for found in _configurations(module)]
        self._drops_compiled = drops_compiled

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Surrounds a change of the weights; afterwards the model computes with nothing left of the old ones."""
        modes = {module: module.training for module in self._modules} if self._switches else {}
        switched = self._to_training()
        try:
            yield
        finally:
            self._back(switched, modes)
            try:
                self._forget()
            except Exception as error:  # the weights are right, and other ranks would wait
                _tell(
                    "forget",
                    f"What torch keeps of the weights could not be dropped ({type(error).__name__}: {error}): under "
                    "parametrize.cached() or inductor's freezing the model may compute with other weights than it has.",
                )

    def _to_training(self) -> list[nn.Module]:
        """Switches the modules in eval mode that override ``train()``; returns them."""
        switched = []
        for module in self._switches:  # outer ones first, which usually switch those inside too
            if not module.training:
                switched.append(module)
                _switch(module, True)
        return switched

    def _back(self, switched: Sequence[nn.Module], modes: dict[nn.Module, bool]) -> None:
        """Every module has the mode that it had."""
        for module in switched:
            _switch(module, False)
        # A switch also reaches modules inside, of which some may have been in the other mode.
        for module in self._switches:
            if module.training != modes[module]:
                _switch(module, modes[module])
        for module, mode in modes.items():
            if module.training != mode:
                module.training = mode

    def _forget(self) -> None:
        """Empties what torch keeps. Read in torch 2.13."""
        parametrize: Any = sys.modules.get("torch.nn.utils.parametrize")
        if parametrize is not None and parametrize._cache:
            parametrize._cache.clear()
        if not self._is_frozen():
            return
        if self._drops_compiled:
            _tell(
                "freezing",
                "torch._inductor's option freezing=True compiles weights in as constants. So that the model computes "
                "with the weights that it has, everything that is compiled is dropped when the average comes in or "
                "goes out, and is compiled anew. Turn the option off while a model trains: otherwise what is compiled "
                "goes on with weights of an earlier step.",
            )
            torch.compiler.reset()
        else:
            _tell(
                "freezing of a teacher",
                "torch._inductor's option freezing=True compiles weights in as constants, so a compiled teacher "
                "(into=) will not follow the average. Turn the option off.",
            )

    def _is_frozen(self) -> bool:
        """Returns whether compiled code may have weights as constants. Imports nothing that was not imported."""
        if "torch._dynamo" not in sys.modules:
            return False
        config: Any = sys.modules.get("torch._inductor.config")
        if getattr(config, "freezing", False):
            return True
        return any((read() or {}).get("freezing") for read in self._configurations)


def _overrides(module: nn.Module) -> bool:
    kind = type(module)
    return any(
        method is not plain and not str(getattr(method, "__module__", "")).startswith(_PLAIN)
        for method, plain in ((kind.train, nn.Module.train), (kind.eval, nn.Module.eval))
    )


def _switch(module: nn.Module, mode: bool) -> None:
    """Calls a module's own ``train()`` or ``eval()``; what it raises is logged, since other ranks would wait."""
    try:
        if mode:
            module.train()
        else:
            module.eval()
    except Exception as error:
        _tell(
            f"{type(module).__module__}.{type(module).__qualname__}",
            f"{type(module).__name__}.{'train' if mode else 'eval'}() raised {type(error).__name__}: {error}. It was "
            "called to drop what the module keeps of its weights, since the average has come in or gone out: the "
            "module may compute with other weights than it has.",
        )


def _configurations(module: nn.Module) -> list[Callable[[], Any]]:
    """Returns the functions that give the options of ``torch.compile(module)`` or ``module.compile()``."""
    own = vars(module)
    found = [own.get("get_compiler_config"), getattr(own.get("_compiled_call_impl"), "get_compiler_config", None)]
    return [read for read in found if read is not None]


def _tell(what: str, text: str) -> None:
    """Logs a warning, once in a process."""
    if what not in _told:
        _told.add(what)
        logger.warning("%s", text)
