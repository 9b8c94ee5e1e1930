"""Drops values that a model has cached from its weights, when an average replaces the weights.

Without this, a model could go on computing with values of the weights that it had before. Three kinds are dropped:

* Caches that modules build in eval mode and drop in ``train()``: LeViT's attention biases, DoRA's weight norms, merged
  low-rank weights. Modules in eval mode whose class overrides ``train()`` or ``eval()`` are switched to training mode
  before the weights change, and back afterwards.
* The cache of ``torch.nn.utils.parametrize.cached()``. It is emptied.
* Weights that inductor's freezing has compiled in as constants. All compiled code is dropped and compiled again.

Three kinds cannot be noticed: a cache that no change of mode drops, a program that ``torch.export`` or ``torch.jit``
made of the model, and freezing as an option of ``torch.compile`` if the compiled model was not given to this library.
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
#: Modules whose overrides of ``train()`` cache nothing from the weights. The override that all models of transformers
#: inherit would load their kernels again (read in transformers 5.23).
_WITHOUT_CACHE = ("torch.", "deepspeed.", "transformers.modeling_utils")
#: Subjects of the warnings that were logged in this process.
_warned: set[str] = set()


class DerivedState:
    """Finds and drops values that the modules of one model have cached from its weights. Local.

    Args:
        roots: the outermost modules of the model.
        drops_compiled: whether compiled code with constants is dropped. False for weights that change at every step,
            which would be compiled again each time: then a warning is logged.
    """

    def __init__(self, roots: Sequence[nn.Module], drops_compiled: bool = True) -> None:
        self._modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
        self._with_caches = [module for module in self._modules if _overrides_train(module)]
        self._configurations = [found for module in self._modules for found in _configurations(module)]
        self._drops_compiled = drops_compiled

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Surrounds a change of the weights. Afterwards the model has no cached value of the old weights."""
        modes = {module: module.training for module in self._modules} if self._with_caches else {}
        switched = self._switch_to_training()
        try:
            yield
        finally:
            self._restore_modes(switched, modes)
            try:
                self._drop_caches_of_torch()
            except Exception as error:
                # Only logged: the weights themselves are right, and an error on one rank would make the others wait.
                _warn_once(
                    "caches of torch",
                    f"Values that torch has cached from the weights could not be dropped ({type(error).__name__}: "
                    f"{error}): under parametrize.cached() or inductor's freezing the model may compute with other "
                    "weights than it has.",
                )

    def _switch_to_training(self) -> list[nn.Module]:
        """Switches the modules in eval mode that override ``train()`` to training mode, and returns them."""
        switched = []
        # Outer modules come first, and usually switch the modules inside as well.
        for module in self._with_caches:
            if not module.training:
                switched.append(module)
                _switch(module, True)
        return switched

    def _restore_modes(self, switched: Sequence[nn.Module], modes: dict[nn.Module, bool]) -> None:
        """Gives every module the mode that it had before."""
        for module in switched:
            _switch(module, False)
        # To switch a module also switches the modules inside, and some of these may have had the other mode.
        for module in self._with_caches:
            if module.training != modes[module]:
                _switch(module, modes[module])
        # The other modules have no caches, so their flag can be set without calling train().
        for module, mode in modes.items():
            if module.training != mode:
                module.training = mode

    def _drop_caches_of_torch(self) -> None:
        """Empties the cache of ``parametrize.cached()``, and drops compiled code with constants."""
        # Both attributes are private: parametrize._cache and _inductor.config.freezing, read in torch 2.13.
        parametrize: Any = sys.modules.get("torch.nn.utils.parametrize")
        if parametrize is not None and parametrize._cache:
            parametrize._cache.clear()
        if not self._is_frozen():
            return
        if self._drops_compiled:
            _warn_once(
                "freezing",
                "torch._inductor's option freezing=True compiles weights in as constants. So all compiled code is "
                "dropped and compiled again whenever the average is put into the model or taken out of it. Turn the "
                "option off while a model trains: otherwise compiled code keeps the weights of an earlier step.",
            )
            torch.compiler.reset()
        else:
            _warn_once(
                "freezing of a teacher",
                "torch._inductor's option freezing=True compiles weights in as constants, so a compiled teacher "
                "(into=) will not follow the average. Turn the option off.",
            )

    def _is_frozen(self) -> bool:
        """Returns whether compiled code may have weights as constants. Imports no module."""
        if "torch._dynamo" not in sys.modules:
            return False
        config: Any = sys.modules.get("torch._inductor.config")
        if getattr(config, "freezing", False):
            return True
        return any((read() or {}).get("freezing") for read in self._configurations)


def _overrides_train(module: nn.Module) -> bool:
    """Returns whether the class of a module overrides ``train()`` or ``eval()`` and may drop a cache there."""
    kind = type(module)
    for method, plain in ((kind.train, nn.Module.train), (kind.eval, nn.Module.eval)):
        written_in = str(getattr(method, "__module__", ""))
        if method is not plain and not written_in.startswith(_WITHOUT_CACHE):
            return True
    return False


def _switch(module: nn.Module, mode: bool) -> None:
    """Calls a module's own ``train()`` or ``eval()``. Logs its exceptions.

    An exception on one rank would leave the others waiting in the next collective call.
    """
    try:
        if mode:
            module.train()
        else:
            module.eval()
    except Exception as error:
        _warn_once(
            f"{type(module).__module__}.{type(module).__qualname__}",
            f"{type(module).__name__}.{'train' if mode else 'eval'}() raised {type(error).__name__}: {error}. It was "
            "called to drop values that the module has cached from its weights, because the weights have changed: the "
            "module may compute with other weights than it has.",
        )


def _configurations(module: nn.Module) -> list[Callable[[], Any]]:
    """Returns the functions that return the options of ``torch.compile(module)`` or ``module.compile()``."""
    # Private attributes, read in torch 2.13: torch/_dynamo/eval_frame.py and torch/nn/modules/module.py.
    own = vars(module)
    found = [own.get("get_compiler_config"), getattr(own.get("_compiled_call_impl"), "get_compiler_config", None)]
    return [read for read in found if read is not None]


def _warn_once(subject: str, text: str) -> None:
    """Logs a warning, once in a process for each subject."""
    if subject not in _warned:
        _warned.add(subject)
        logger.warning("%s", text)
