"""Assembles all tensors of a model from a foreign file: the averaged ones, the live ones, and tied names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dist_ema.errors import CheckpointCorruptError, CheckpointMismatchError, EMAConfigError
from dist_ema.formats.stored import is_tensor_name
from dist_ema.formats.tensors import LazyTensor, Tensors
from dist_ema.importers.foreign import Foreign, Model, check_shapes, ties
from dist_ema.schedules.checks import AVERAGE_NAME


class Assembly:
    """Holds the tensors of a model.

    Args:
        foreign: the contents of the file.
        model: supplies what the file lacks; None if nothing does.
        frozen: matches the names of parameters that are not averaged, wherever they are in the file.

    Attributes:
        averages: the tensors of each average, by the name of the average; all averages have the same tensors.
        live: the tensors that are not averaged.
        aliases: the other names of a (tied) tensor, by the name under which it is kept.

    Raises:
        CheckpointCorruptError: the file has no average, or averages of different tensors, or a name cannot be stored.
        CheckpointMismatchError: the file is not of that model.
        EMAConfigError: ``frozen`` matches nothing.
    """

    def __init__(self, foreign: Foreign, model: Model | None, frozen: re.Pattern[str] | None) -> None:
        self.averages = {name: dict(tensors) for name, tensors in foreign.averages.items()}
        self.live = dict(foreign.live)
        first = next(iter(self.averages.values()))
        groups = list(foreign.tied)
        if model is not None:
            _check_model(first, model.tensors)
            groups += ties(model.tensors)
            self._complete(model.tensors)
        # In this order: ``frozen`` may match any name of a tied tensor, and merging drops all but one.
        self._set_apart(frozen)
        self._merge(groups)
        self._check()

    def _complete(self, model: Tensors) -> None:
        """Adds from the model what the file lacks: mostly buffers, which an average has in common with the model."""
        for tensors in self.averages.values():
            tensors.update({name: model[name] for name in model if name not in tensors and name not in self.live})

    def _set_apart(self, frozen: re.Pattern[str] | None) -> None:
        """Moves frozen parameters out of the averages. If several averages have one, that of the first is kept."""
        if frozen is None:
            return
        names = {name for name in (*self._first, *self.live) if frozen.search(name)}
        if not names:
            raise EMAConfigError(f"frozen={frozen.pattern!r} matches no name; names are {', '.join(self._first)[:200]}")
        for tensors in reversed(self.averages.values()):
            self.live |= {name: tensors.pop(name) for name in names & tensors.keys()}

    def _merge(self, groups: Iterable[tuple[str, ...]]) -> None:
        """Keeps one name of each tied tensor, an averaged one if there is one; the others become its aliases."""
        self.aliases: dict[str, tuple[str, ...]] = {}
        for group in groups:
            known = [name for name in group if name in self._first] + [name for name in group if name in self.live]
            others = tuple(name for name in group if name != known[0]) if known else ()
            for name in others:
                self.live.pop(name, None)
                for tensors in self.averages.values():
                    tensors.pop(name, None)
            if known:
                self.aliases[known[0]] = tuple(dict.fromkeys((*self.aliases.get(known[0], ()), *others)))

    @property
    def _first(self) -> dict[str, LazyTensor]:
        return next(iter(self.averages.values()))

    def _check(self) -> None:
        if not self._first:
            raise CheckpointCorruptError("the file has no averaged tensors")
        described = {name: (tensor.shape, tensor.dtype) for name, tensor in self._first.items()}
        for average, tensors in self.averages.items():
            if not AVERAGE_NAME.fullmatch(average):
                raise CheckpointCorruptError(f"invalid average name {average!r}; expected A-Z a-z 0-9 _ . -")
            if {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} != described:
                raise CheckpointCorruptError(f"average {average!r} has other tensors than the averages before it")
        for name in (*self._first, *self.live, *(alias for names in self.aliases.values() for alias in names)):
            if not is_tensor_name(name):
                raise CheckpointCorruptError(f"invalid tensor name {name!r}; expected text of one line")


def _check_model(average: Tensors, model: Tensors) -> None:
    check_shapes(average, model, "the average")
    if missing := [name for name in average if name not in model]:
        raise CheckpointMismatchError(f"the model has no {', '.join(map(repr, missing[:8]))}; it has {list(model)[:8]}")
