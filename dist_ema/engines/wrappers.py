"""Recognises objects that a trainer puts around a model or an optimizer, and takes them off.

Nothing is imported for this: a wrapper can only be there if its package was imported already. This file also tells real
optimizer steps from other calls of ``step()``.

Private names were read in lightning 2.6.6, accelerate 1.15 and torch 2.13. ``lightning_fabric`` has the same code as
``lightning.fabric``, under the name of the older package.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import nn

from dist_ema.runtime.untraced import untraced

_TRAINERS = frozenset({"accelerate", "lightning", "lightning_fabric", "pytorch_lightning", "deepspeed"})
_FABRIC = ("lightning.fabric.wrappers", "lightning_fabric.wrappers")


def loaded(module: str, name: str) -> Any:
    """Returns a class for ``isinstance``, or () if its module was not imported. Local.

    An object of the class can only exist if the module was imported. To import it here would take seconds (DeepSpeed,
    torch.distributed.fsdp) or fail where the package is not installed (Lightning).
    """
    return getattr(sys.modules.get(module), name, ())


def is_fabric(module: object) -> bool:
    """Returns whether this is the wrapper that ``Fabric.setup()`` returns for a model. Local.

    It has the model twice: ``_forward_module`` is the model as the strategy has wrapped it (DDP, FSDP, a DeepSpeed
    engine), and ``_original_module`` is the model that the user gave.
    """
    return any(isinstance(module, loaded(name, "_FabricModule")) for name in _FABRIC)


def unwrap_module(target: Any) -> Any:
    """Returns the model inside Fabric's wrapper, still wrapped by the strategy; other objects unchanged. Local."""
    while is_fabric(target):
        target = target._forward_module
    return target


def stage_module(target: object) -> nn.Module | None:
    """Returns the module of a ``torch.distributed.pipelining.PipelineStage``; None for other objects. Local.

    ``build_stage()`` returns an object of another class. Their common base class is private (read in torch 2.13); the
    module is their public attribute ``submod``.
    """
    base = loaded("torch.distributed.pipelining.stage", "_PipelineStageBase")
    module = getattr(target, "submod", None)
    return module if isinstance(target, base) and isinstance(module, nn.Module) else None


def unwrap_optimizer(optimizer: object) -> torch.optim.Optimizer | None:
    """Returns the outermost optimizer whose step hooks fire; None if there is none. Local.

    Looks through any number of wrappers that have the next object as ``.optimizer``. The wrappers of Accelerate, Fabric
    and Lightning are a ``torch.optim.Optimizer`` for ``isinstance``, but their hooks do not fire: their own ``step()``
    steps the optimizer inside only if gradients were accumulated and did not overflow.
    """
    seen: list[object] = []  # a wrapper may hold itself
    while _steps(optimizer) and not any(optimizer is one for one in seen):
        if isinstance(optimizer, torch.optim.Optimizer) and _fires_hooks(optimizer):
            return optimizer
        seen.append(optimizer)
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def _steps(optimizer: object) -> bool:
    """Returns whether an object is an optimizer or a wrapper of one.

    Learning-rate schedulers and trainers also have an ``optimizer``, but not both ``step()`` and ``param_groups``.
    """
    return callable(getattr(optimizer, "step", None)) and hasattr(optimizer, "param_groups")


def _fires_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether the step hooks of an optimizer are called."""
    # torch.optim.Optimizer.__init__ wraps step() of the class in a function that calls the hooks, and sets its
    # attribute `hooked` (read in torch 2.13; the same at least since 2.0). A wrapper does not call __init__.
    return "_optimizer_step_post_hooks" in vars(optimizer) and _is_hooked(type(optimizer).step)


def _is_hooked(step: object) -> bool:
    """Returns whether a ``step()`` is torch's function around the one of a class."""
    return bool(getattr(step, "hooked", False))


def is_other_wrapper(optimizer: object, inner: torch.optim.Optimizer) -> bool:
    """Returns whether the object around ``inner`` may change the weights after the step of ``inner``. Local.

    Lookahead usually does. The wrappers of Accelerate, Fabric and Lightning do not.
    """
    return optimizer is not inner and type(optimizer).__module__.partition(".")[0] not in _TRAINERS


class OuterStep:
    """Replaces the ``step()`` of an optimizer's wrapper by one that calls back at its end. Also a removable handle.

    The callback is called only if the inner optimizer has made a real step::

        wrapper.step()  ->  inner.step()  ->  hook: notes the step  ->  wrapper changes the weights  ->  callback

    Args:
        wrapper: the object whose ``step()`` the user calls.
        inner: the optimizer inside.
        callback: called after each real step.
    """

    def __init__(self, wrapper: Any, inner: torch.optim.Optimizer, callback: Callable[[], object]) -> None:
        self._wrapper = wrapper
        self._step = wrapper.step
        self._was_patched = "step" in vars(wrapper)
        self._callback: Callable[[], object] | None = callback
        self._inside = False
        self._stepped = False
        self._hook = inner.register_step_post_hook(self._note_step)
        # Each access to self._call makes a new bound method. remove() compares with this one.
        self._replacement = self._call
        wrapper.step = self._replacement

    @untraced
    def _note_step(self, stepped: torch.optim.Optimizer, *_: object) -> None:
        if not is_training_step(stepped):
            return
        if self._inside:
            self._stepped = True
        elif self._callback is not None:  # the user has called inner.step() directly
            self._callback()

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        self._inside = True
        self._stepped = False
        try:
            result = self._step(*args, **kwargs)
        finally:
            self._inside = False
        if self._stepped and self._callback is not None:
            self._callback()
        return result

    def remove(self) -> None:
        """Stops the callbacks and puts the original ``step()`` back. Local.

        If other code has wrapped ``step()`` since, this wrapper stays inside of that one and only passes calls on.
        """
        self._callback = None
        self._hook.remove()
        if vars(self._wrapper).get("step") is self._replacement:
            if self._was_patched:
                self._wrapper.step = self._step
            else:
                del self._wrapper.step


def is_training_step(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether a step hook was called at the end of a step of the training. Local; no host sync.

    Two kinds of calls do not count:

    - ``torch.distributed.checkpoint`` steps an optimizer that has no state yet, with learning rates and gradients of
      zero, to create the state. It does so to read or load the state, for example under FSDP2 in Accelerate and
      Lightning.
    - An optimizer class that overrides ``step()`` and calls the ``step()`` of its parent class runs the hooks once for
      each. Only the outer call comes at the end of the step.

    Values do not tell the first kind for sure. A learning rate of zero may be the start of a warm-up, and such a step
    counts. To read gradients would wait for the device, and a rank that holds no element of the model has to get the
    same answer as the others. So if all learning rates are zero, the function looks for the caller on the stack. This
    takes some microseconds, and no other step has to do it.
    """
    if _may_be_nested(type(optimizer)) and _is_nested(optimizer):
        return False
    return _has_learning_rate(optimizer) or not _is_in_checkpointing()


def _has_learning_rate(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether a learning rate is known to differ from zero."""
    # To read a tensor could wait for its device, so a tensor counts as unknown.
    rates = (group.get("lr") for group in optimizer.param_groups)
    return any(isinstance(rate, (int, float)) and rate != 0 for rate in rates)


def _is_in_checkpointing() -> bool:
    """Returns whether torch.distributed.checkpoint is on the stack: its ``_init_optim_state``, read in torch 2.13."""
    frame = inspect.currentframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("torch.distributed.checkpoint."):
            return True
        frame = frame.f_back
    return False


def _may_be_nested(kind: type) -> bool:
    """Returns whether several classes of an optimizer have a ``step()`` that calls hooks."""
    return sum(_is_hooked(vars(base).get("step")) for base in kind.__mro__) > 1


def _is_nested(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether more than one hooked ``step()`` of this optimizer is running.

    Each running one has a frame of torch's function around ``step()``, which is the same function for all classes. The
    frames are recognised by file and line, and not by their code object, because ``torch.compile`` replaces that.
    """
    code: CodeType = type(optimizer).step.__code__
    running = 0
    frame = inspect.currentframe()
    while frame is not None and running < 2:
        place = frame.f_code.co_filename, frame.f_code.co_firstlineno
        if place == (code.co_filename, code.co_firstlineno):
            # The function takes *args, of which the first is the optimizer.
            running += any(first is optimizer for first in frame.f_locals.get("args", ())[:1])
        frame = frame.f_back
    return running > 1
