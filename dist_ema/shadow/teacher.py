"""An average that is a model: its memory is a teacher's weights, which compute at any time between two steps.

Where a teacher's tensor has the shadow's dtype, lies together and on the same device, it *is* the shadow. Else the
shadow is kept as ever (fp32, for a bf16 teacher), and the teacher's tensor is written from it after each update.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dist_ema import kernels
from dist_ema.engines import detect_in
from dist_ema.engines.base import Engine
from dist_ema.engines.counterpart import Counterpart
from dist_ema.engines.names import walk_modules
from dist_ema.engines.wrappers import unwrap_optimizer
from dist_ema.errors import EMAConfigError, EMAEngineError, EMAStateError
from dist_ema.options import Options
from dist_ema.shadow.device import Shadow
from dist_ema.sharding.shares import Share

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
        EMAEngineError: it cannot be a teacher.
    """

    def __init__(self, target: object, into: object, options: Options, group: object) -> None:
        if into is target and not options.rename:
            raise EMAConfigError("into= is the model that is averaged: pass a second one, such as a deep copy of it")
        self._target, self._into = target, into
        self._options, self._group = options, group
        self._shares: Sequence[Share] = ()
        self._counterpart: Counterpart | None = None
        self._claimed = False

    def match(self, shares: Sequence[Share]) -> Counterpart:
        """The teacher's tensors beside these shares. Local.

        Raises EMAEngineError for one that is sharded or named otherwise, trains, or has its weights where the averaged
        model has its own.
        """
        if self._counterpart is None or self._shares is not shares:
            self._refuse_shared_memory(shares)  # by engines of its own: weights may still be loaded or replaced
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
        return Counterpart(engine, shares, self._options.renamed, OPTION)

    def _refuse_shared_memory(self, shares: Sequence[Share]) -> None:
        student = detect_in(self._target, self._group)
        student.specs()
        refuse_shared_memory(student, self._see(shares), shares, OPTION)

    def shadow(self, names: Iterable[str], shares: Sequence[Share], skip_nonfinite: bool, seed: int | None) -> Shadow:
        """A new average, which lies in memory of its own until it is installed. Local. Raises as :meth:`match`."""
        return TeacherShadow(names, shares, skip_nonfinite, seed, self, self.match(shares))

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
        for module, key in places:
            known = _fillers.get(module, {}).get(key)
            other = None if known is None else known()
            if other is not None and other is not self:
                raise EMAStateError(
                    f"another ShardedEMA averages into {key!r} of {OPTION}, a {type(module).__name__}, already: a "
                    "teacher has one average. close() the other one before"
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
        """The modules that hold the tensors which the average fills, and their keys there."""
        counterpart = self._counterpart
        if counterpart is None:
            return
        filled = {name for spec in counterpart.specs_of if spec is not None for name in (spec.name, *spec.aliases)}
        for root in counterpart.modules():
            for prefix, module in walk_modules(root):
                for key in (*module._parameters, *module._buffers):
                    if (f"{prefix}.{key}" if prefix else key) in filled:
                        yield module, key


def counterpart(engine: Engine, into: object, shares: Sequence[Share], options: Options, group: object) -> Counterpart:
    """A third model beside the averaged one, of ``engine``, into which an average is copied once. Local.

    Raises EMAEngineError for one that does not fit, or whose memory is that of the averaged model.
    """
    option = "the model to copy into (into=)"
    other = Counterpart(detect_in(into, group, trains=False), shares, options.renamed, option)
    refuse_shared_memory(engine, other, shares, option)
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


class TeacherShadow(Shadow):
    """The average that a teacher computes with, once it is installed.

    Args:
        names: of the average; there is one.
        shares: what this rank keeps of each tensor.
        skip_nonfinite: leave out NaN and Inf.
        seed: of stochastic rounding.
        teacher: the model.
        counterpart: its tensors, in the order of the shares.
    """

    def __init__(
        self,
        names: Iterable[str],
        shares: Sequence[Share],
        skip_nonfinite: bool,
        seed: int | None,
        teacher: Teacher,
        counterpart: Counterpart,
    ) -> None:
        super().__init__(names, shares, skip_nonfinite, seed)
        self._teacher = teacher
        self._counterpart = counterpart
        self._installed = False
        self._own: frozenset[int] = frozenset()  # shares whose shadow is not the teacher's memory
        self._tensors: list[Tensor] = []  # the teacher's
        self._nothing = torch.empty(0)
        self._addresses: list[int] = []

    @property
    def fixed(self) -> frozenset[int]:
        """Shares whose shadow the teacher computes with, so that nothing may change places with it."""
        kept = frozenset(self._averaged + self._copied)
        return kept - self._own if self._installed and self.started else frozenset()

    def install(self) -> None:
        """From now on the average lies in the teacher; what it is already is copied there. Local."""
        if self._installed:
            return
        self._installed = True
        if self.started:
            values = self._by_share()
            self._lie_down([values.get(index, self._nothing) for index in range(len(self._shares))], values)
            self.hand_on()

    def allocate(self, sources: Sequence[Tensor]) -> None:
        """See :meth:`Shadow.allocate`; once installed, only for what cannot lie in the teacher."""
        if self._installed:
            self._lie_down(sources)
        else:
            super().allocate(sources)

    def update(self, sources: Sequence[Tensor], weights: Sequence[float], number: int) -> None:
        """See :meth:`Shadow.update`."""
        self._find()
        super().update(sources, weights, number)
        self.hand_on()

    def fill(self, sources: Sequence[Tensor]) -> None:
        """See :meth:`Shadow.fill`."""
        super().fill(sources)
        self.hand_on()

    def loaded(self) -> None:
        """See :meth:`Shadow.loaded`."""
        super().loaded()
        self.hand_on()

    def tensors(self, name: str) -> list[Tensor | None]:
        """See :meth:`Shadow.tensors`."""
        self._find()
        return super().tensors(name)

    def hand_on(self) -> None:
        """Writes into the teacher what does not lie there. Local."""
        if self._installed and self._own:
            values = self._by_share()
            for index in sorted(self._own):
                kernels.write(self._tensors[index], 0, self._shares[index].numel, values[index])

    def nbytes(self) -> dict[torch.device, int]:
        """See :meth:`Shadow.nbytes`; without the teacher's own memory."""
        sizes = super().nbytes()
        for index in self.fixed:
            sizes[self._tensors[index].device] -= self._tensors[index].nbytes
        return sizes

    def notes(self) -> list[str]:
        size = sum(self._tensors[index].nbytes for index in self.fixed)
        return [f"the teacher's own weights are {size / 2**20:.1f} MiB of the average, in no other memory"]

    def close(self) -> None:
        super().close()
        self._teacher.release()

    def _by_share(self) -> dict[int, Tensor]:
        """The shadow of each share that has one."""
        (average,) = self._averages.values()
        return dict(zip(self._averaged + self._copied, [*average, *self._buffers], strict=True))

    def _look(self) -> list[Tensor]:
        """The teacher's tensors as they are now. Local.

        A forward pass without a backward leaves full weights behind (FSDP's root, ZeRO-3's small parameters), which the
        next one would take as they are: they are dropped first, so that it sees what is written.
        """
        self._teacher.claim()
        self._counterpart.reshard()
        return self._counterpart.sources()

    def _find(self) -> None:
        """Follows the teacher's memory, which may have moved. Local; no host sync."""
        if not (self._installed and self.started):
            return
        tensors = self._look()
        if list(map(Tensor.data_ptr, tensors)) == self._addresses:
            return
        for index in self._averaged + self._copied:
            if index not in self._own and not self._lies_in(tensors[index], self._tensors[index], index):
                raise EMAStateError(
                    f"{self._shares[index].spec.name!r} of {OPTION} has another dtype, layout or device than it had "
                    "when the average was begun. Call reset() to begin anew"
                )
        self._take_views(tensors, self._by_share())

    def _lie_down(self, beside: Sequence[Tensor], values: dict[int, Tensor] | None = None) -> None:
        """Finds where each shadow lies: in the teacher, or ``beside`` the tensors given. Copies ``values`` there."""
        kept = self._averaged + self._copied
        tensors = self._look()
        for index in kept:
            if tensors[index].is_meta:
                raise EMAStateError(
                    f"{self._shares[index].spec.name!r} of {OPTION} is on the meta device: materialise it before "
                    "update() or load()"
                )
        self._own = frozenset(index for index in kept if not self._lies_in(tensors[index], beside[index], index))
        own = sorted(self._own)
        if values is not None and len(own) == len(kept):
            self._take_views(tensors, values)  # in the memory that they have
            return
        self._take_views(tensors, dict(zip(own, self._allocate(beside, own), strict=True)))
        found = self._by_share()
        for index, value in (values or {}).items():
            found[index].copy_(value)

    def _lies_in(self, tensor: Tensor, beside: Tensor, index: int) -> bool:
        here = tensor.device == beside.device and tensor.dtype == self._shares[index].dtype
        return here and tensor.is_contiguous()

    def _take_views(self, tensors: list[Tensor], own: dict[int, Tensor]) -> None:
        views = {
            index: own[index] if index in self._own else tensors[index].view(-1)
            for index in self._averaged + self._copied
        }
        self._averages = {name: [views[index] for index in self._averaged] for name in self._names}
        self._buffers = [views[index] for index in self._copied]
        self._tensors, self._addresses, self._spans = tensors, list(map(Tensor.data_ptr, tensors)), None
