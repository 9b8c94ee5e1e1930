"""A second model beside the averaged one: a teacher whose weights are the average, or one that a copy is made into."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.comm.catalogue import FullTensor
from dist_ema.engines import detect_in
from dist_ema.engines.base import Engine
from dist_ema.engines.counterpart import Counterpart
from dist_ema.engines.names import walk_modules
from dist_ema.engines.wrappers import unwrap_optimizer
from dist_ema.errors import EMAConfigError, EMAEngineError, EMAStateError
from dist_ema.geometry.shares import Share
from dist_ema.options import Options
from dist_ema.shadow.device import Shadow
from dist_ema.teacher.gathered import GatheredTeacherShadow
from dist_ema.teacher.shadow import TeacherShadow

#: Who fills which tensors of which module. Of the whole process.
_fillers: WeakKeyDictionary[nn.Module, dict[str, weakref.ref[Teacher]]] = WeakKeyDictionary()
OPTION = "the teacher (into=)"


class Teacher:
    """The model into which one ``ShardedEMA`` averages.

    Args:
        target: the model that is averaged.
        into: the teacher.
        options: names, and which tensors are averaged.
        group: the ranks of both.

    Raises:
        EMAConfigError: the teacher is the averaged model.

    Attributes:
        target: the model that is averaged; another wrapping of it after a ``rebind()``.
    """

    def __init__(self, target: object, into: object, options: Options, group: object) -> None:
        if into is target and not options.rename:
            raise EMAConfigError("into= is the model that is averaged: pass a second one, such as a deep copy of it")
        self.target = target
        self._into = into
        self._options = options
        self._group = group
        self._shares: Sequence[Share] = ()
        self._counterpart: Counterpart | None = None
        self._claimed = False

    def match(self, shares: Sequence[Share], target: object) -> Counterpart:
        """Returns the teacher's tensors beside these shares, of ``target``. Local.

        Raises EMAEngineError for one that is sharded or named otherwise, trains, or has its weights where the averaged
        model has its own.
        """
        if self._counterpart is None or self._shares is not shares:
            self._refuse_shared_memory(shares, target)  # by engines of its own: weights may still be loaded or replaced
            counterpart = self._see(shares)
            for share, spec in zip(shares, counterpart.specs_of, strict=True):
                if spec is not None and spec.kind == "parameter":
                    raise EMAEngineError(
                        f"{OPTION} trains: its parameter {spec.name!r} requires a gradient, and what an optimizer does "
                        f"to it, the next average of {share.spec.name!r} would undo. Call requires_grad_(False) on it"
                    )
            self.release()
            self._shares, self._counterpart = shares, counterpart
            self.claim()
        return self._counterpart

    def _see(self, shares: Sequence[Share]) -> Counterpart:
        engine = detect_in(self._into, self._group, trains=False)
        return Counterpart(engine, shares, self._options.renamed, OPTION, alike=self._options.sync is None)

    def _refuse_shared_memory(self, shares: Sequence[Share], target: object) -> None:
        student = detect_in(target, self._group)
        student.specs()
        refuse_shared_memory(student, self._see(shares), shares, OPTION)

    def shadow(
        self,
        names: Iterable[str],
        shares: Sequence[Share],
        skip_nonfinite: bool,
        seed: int | None,
        group: dist.ProcessGroup | None,
        prove: Callable[[Sequence[Share]], list[FullTensor]],
        target: object = None,
    ) -> Shadow:
        """Returns a new average, which lies in memory of its own until it is installed. Local. Raises as :meth:`match`.

        ``prove`` lists full tensors after the proof of the layout, see :class:`GatheredTeacherShadow`. ``target`` is
        whose shares they are; None means the averaged model.
        """
        found = self.match(shares, self.target if target is None else target)
        given = names, shares, skip_nonfinite, seed, found, self.claim, self.release
        if self._options.sync is None:
            return TeacherShadow(*given)
        return GatheredTeacherShadow(*given, group, prove)

    def check_optimizer(self, optimizer: object) -> None:
        """Raises EMAConfigError if an optimizer steps a parameter that the average fills. Local."""
        inner = unwrap_optimizer(optimizer) or getattr(optimizer, "optimizer", None) or optimizer
        groups = getattr(inner, "param_groups", ())
        stepped = {id(parameter) for group in groups for parameter in group["params"]}
        for module, key in self._places():
            if id(module._parameters.get(key)) in stepped:
                raise EMAConfigError(
                    f"attach(): the {type(inner).__name__} also has {key!r} of {OPTION}, a {type(module).__name__}: "
                    "give it the parameters of the averaged model only"
                )

    def claim(self) -> None:
        """Says that this average fills the teacher. Local. Raises EMAStateError if another does."""
        if self._claimed:
            return
        places = list(self._places())
        if (other := _other_filler(places, self)) is not None:
            module, key = other
            raise EMAStateError(
                f"another ShardedEMA averages into {key!r} of {OPTION}, a {type(module).__name__}, already: a teacher "
                "has one average. close() the other one before"
            )
        for module, key in places:
            _fillers.setdefault(module, {})[key] = weakref.ref(self)
        self._claimed = True

    def release(self) -> None:
        """Another average may fill the teacher; this one claims it again when it next writes there. Local."""
        for module, key in self._places():
            known = _fillers.get(module, {})
            if (found := known.get(key)) is not None and found() is self:
                del known[key]
        self._claimed = False

    def _places(self) -> Iterator[tuple[nn.Module, str]]:
        """Yields the modules that hold the tensors which the average fills, and their keys there."""
        return iter(()) if self._counterpart is None else _places(self._counterpart)


def _places(counterpart: Counterpart) -> Iterator[tuple[nn.Module, str]]:
    """Yields the modules that hold the tensors beside the averaged ones, and their keys there."""
    filled = {name for spec in counterpart.specs_of if spec is not None for name in (spec.name, *spec.aliases)}
    for root in counterpart.modules():
        for prefix, module in walk_modules(root):
            for key in (*module._parameters, *module._buffers):
                if (f"{prefix}.{key}" if prefix else key) in filled:
                    yield module, key


def _other_filler(places: Iterable[tuple[nn.Module, str]], own: Teacher | None) -> tuple[nn.Module, str] | None:
    """Returns the first place that another average fills; None if there is none."""
    for module, key in places:
        known = _fillers.get(module, {}).get(key)
        other = None if known is None else known()
        if other is not None and other is not own:
            return module, key
    return None


def counterpart(
    engine: Engine, into: object, shares: Sequence[Share], options: Options, group: object, own: Teacher | None
) -> Counterpart:
    """Returns a third model beside the averaged one, of ``engine``, into which an average is copied once. Local.

    Raises EMAEngineError for one that does not fit, or whose memory is that of the averaged model; EMAStateError for a
    teacher that another average than ``own`` fills.
    """
    option = "the model to copy into (into=)"
    other = Counterpart(detect_in(into, group, trains=False), shares, options.renamed, option)
    refuse_shared_memory(engine, other, shares, option)
    if (place := _other_filler(_places(other), own)) is not None:
        module, key = place
        raise EMAStateError(
            f"copy_to(into=...): another ShardedEMA averages into {key!r} of this model, a {type(module).__name__}, "
            "and would have this average for its own: close() the other one before, or copy into another model"
        )
    return other


def refuse_shared_memory(student: Engine, other: Counterpart, shares: Sequence[Share], option: str) -> None:
    """Raises EMAEngineError if both models have a tensor in the same memory. Local."""
    student.reshard()
    other.reshard()
    taken: dict[tuple[torch.device, int], str] = {}
    for share, source in zip(shares, student.sources(), strict=True):
        if source.numel() and not source.is_meta and share.mode != "live":
            taken[source.device, source.data_ptr()] = share.spec.name
    for share, tensor in zip(shares, other.sources(), strict=True):
        name = taken.get((tensor.device, tensor.data_ptr())) if tensor.numel() and not tensor.is_meta else None
        if name is not None:
            raise EMAEngineError(
                f"{option} shares the memory of {share.spec.name!r} with {name!r} of the averaged model, so that it "
                "would change with every step: give it weights of its own, such as copy.deepcopy() makes"
            )
