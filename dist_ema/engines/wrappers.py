"""Objects that a trainer puts around a model or an optimizer: recognised without being imported, and taken off.

Names read in lightning 2.6.6 (``lightning.fabric``; ``lightning_fabric`` is the same code under the name of the older
package), accelerate 1.15 and torch 2.13.
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
    """Returns the class for ``isinstance``, or () as long as nobody has imported its module. Local.

    Whoever has an object of the class has imported it, and importing it for the others would cost them seconds
    (DeepSpeed, torch.distributed.fsdp), or a package that they may not have (Lightning).
    """
    return getattr(sys.modules.get(module), name, ())


def is_fabric(module: object) -> bool:
    """Returns whether this is what ``Fabric.setup()`` gives for a model.

    It holds the model twice: ``_forward_module`` as the strategy has wrapped it (DDP, FSDP, a DeepSpeed engine), and
    ``_original_module`` as the user gave it.
    """
    return any(isinstance(module, loaded(name, "_FabricModule")) for name in _FABRIC)


def unwrap_module(target: Any) -> Any:
    """Returns the model inside Fabric's wrapper, wrappers of the strategy included; anything else as it is. Local."""
    while is_fabric(target):
        target = target._forward_module
    return target


def stage_module(target: object) -> nn.Module | None:
    """Returns the module of a ``torch.distributed.pipelining.PipelineStage``, also of ``build_stage()``. Local.

    Their common base is private; the module is their public ``submod``.
    """
    base = loaded("torch.distributed.pipelining.stage", "_PipelineStageBase")
    module = getattr(target, "submod", None)
    return module if isinstance(target, base) and isinstance(module, nn.Module) else None


def unwrap_optimizer(optimizer: object) -> torch.optim.Optimizer | None:
    """Returns the outermost optimizer whose step hooks fire, through any number of wrappers that hold it as
    ``.optimizer``.

    Those of Accelerate, Fabric and Lightning count as a ``torch.optim.Optimizer`` for ``isinstance``, but their
    ``step()`` is their own: they step what they hold when gradients have been accumulated and did not overflow, or not
    at all. None where there is no such optimizer. Local.
    """
    seen: list[object] = []
    while _steps(optimizer) and not any(optimizer is one for one in seen):
        if isinstance(optimizer, torch.optim.Optimizer) and _fires_hooks(optimizer):
            return optimizer
        seen.append(optimizer)
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def _steps(optimizer: object) -> bool:
    """Not so a learning-rate scheduler or a trainer, which have an ``optimizer`` too."""
    return callable(getattr(optimizer, "step", None)) and hasattr(optimizer, "param_groups")


def _fires_hooks(optimizer: torch.optim.Optimizer) -> bool:
    # torch.optim.Optimizer.__init__ wraps the class's step() and marks it so (torch 2.13, and at least since 2.0).
    return "_optimizer_step_post_hooks" in vars(optimizer) and _is_hooked(type(optimizer).step)


def _is_hooked(step: object) -> bool:
    return bool(getattr(step, "hooked", False))


def is_other_wrapper(optimizer: object, inner: torch.optim.Optimizer) -> bool:
    """Returns whether something else than a trainer's wrapper steps ``inner``, and may change the weights afterwards.
    Local.

    Lookahead does, in its usual form. Accelerate's, Fabric's and Lightning's wrappers do not.
    """
    return optimizer is not inner and type(optimizer).__module__.partition(".")[0] not in _TRAINERS


class OuterStep:
    """A wrapper's ``step`` that calls back when it is over, if the optimizer inside has really stepped. A handle.

    Args:
        wrapper: whose ``step()`` users call.
        inner: the optimizer inside.
        callback: called after each step.
    """

    def __init__(self, wrapper: Any, inner: torch.optim.Optimizer, callback: Callable[[], object]) -> None:
        self._wrapper = wrapper
        self._step = wrapper.step
        self._was_patched = "step" in vars(wrapper)
        self._callback: Callable[[], object] | None = callback
        self._inside = False
        self._stepped = False
        self._hook = inner.register_step_post_hook(self._note)
        self._mine = self._call
        wrapper.step = self._mine

    @untraced
    def _note(self, stepped: torch.optim.Optimizer, *_: object) -> None:
        if not is_training_step(stepped):
            return
        if self._inside:
            self._stepped = True
        elif self._callback is not None:  # stepped by other hands than the wrapper's
            self._callback()

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        self._inside, self._stepped = True, False
        try:
            result = self._step(*args, **kwargs)
        finally:
            self._inside = False
        if self._stepped and self._callback is not None:
            self._callback()
        return result

    def remove(self) -> None:
        """Stops the calls. Where another wrapper came on top, this one stays below it and only passes on. Local."""
        self._callback = None
        self._hook.remove()
        if vars(self._wrapper).get("step") is self._mine:
            if self._was_patched:
                self._wrapper.step = self._step
            else:
                del self._wrapper.step


def is_training_step(optimizer: torch.optim.Optimizer) -> bool:
    """Asked by a step hook: is this a step of the training, to be counted now? Local; no host sync.

    Two kinds are not. ``torch.distributed.checkpoint`` steps an optimizer that has no state yet, to have it made, with
    learning rates and gradients of zero: to read its state and to load it, so under FSDP2 in Accelerate and Lightning
    too. And an optimizer class that overrides ``step()`` and calls its parent's runs its hooks once for each: only the
    outer one comes when the step is over.

    A learning rate of zero alone says nothing: a warm-up may begin with it, and such a step counts. Neither do the
    gradients: reading them would wait for the device, and a rank that holds no element of the model must come to the
    same answer as the others. So in a step that has no other learning rate than zero it is asked who makes it. That is
    a walk over the stack, some microseconds, and no other step pays for it.
    """
    if _may_be_nested(type(optimizer)) and _is_nested(optimizer):
        return False
    return _has_learning_rate(optimizer) or not _is_in_checkpointing()


def _has_learning_rate(optimizer: torch.optim.Optimizer) -> bool:
    # A tensor may lie on a device, and reading it would wait for that: it counts as unknown.
    rates = (group.get("lr") for group in optimizer.param_groups)
    return any(isinstance(rate, (int, float)) and rate != 0 for rate in rates)


def _is_in_checkpointing() -> bool:
    """Returns whether the code that runs was called by torch.distributed.checkpoint (its ``_init_optim_state``)."""
    frame = inspect.currentframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("torch.distributed.checkpoint."):
            return True
        frame = frame.f_back
    return False


def _may_be_nested(kind: type) -> bool:
    return sum(_is_hooked(vars(base).get("step")) for base in kind.__mro__) > 1


def _is_nested(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether more than one hooked ``step()`` of this optimizer is running.

    Each is a frame of torch's wrapper, which is the same for all classes. It is known by where it is written: where
    ``torch.compile`` has been, its code is another object.
    """
    code: CodeType = type(optimizer).step.__code__
    running = 0
    frame = inspect.currentframe()
    while frame is not None and running < 2:
        at = frame.f_code.co_filename, frame.f_code.co_firstlineno
        if at == (code.co_filename, code.co_firstlineno):
            running += any(first is optimizer for first in frame.f_locals.get("args", ())[:1])
        frame = frame.f_back
    return running > 1
