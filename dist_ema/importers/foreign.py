"""Defines what every importer returns: named tensors, which are read when they are needed, and a clock."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dist_ema.engines.names import TOKENS
from dist_ema.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError
from dist_ema.formats.strict_json import is_count, shown
from dist_ema.formats.tensors import LazyTensor, Tensors
from dist_ema.schedules import Schedule
from dist_ema.schedules.clock import Progress

#: Matches what wrappers add to names, with the dot behind it; see :mod:`dist_ema.engines.names`.
WRAPPER_TOKENS = re.compile(rf"({'|'.join(sorted(TOKENS))})\.")
#: Buffers that a state dict does not tell from parameters of the same shape.
BATCH_NORM = re.compile(r"(^|\.)(running_mean|running_var|num_batches_tracked)$")


@dataclass(frozen=True)
class Model:
    """Holds a state dict of the model: it gives names, and tensors that the average's file lacks.

    Attributes:
        tensors: the tensors by name.
        ordered: whether they are in the model's order. Those of a safetensors file are sorted by name.
        frozen: matches the names of parameters that are not averaged.
    """

    tensors: Tensors
    ordered: bool
    frozen: re.Pattern[str] | None = None


@dataclass(frozen=True)
class Foreign:
    """Describes an average of another library.

    Attributes:
        averages: its tensors, including buffers, by the name of the average and of the tensor.
        usual: the schedule that its library uses by default.
        schedule: the schedule that the file gives; None if it gives none.
        live: tensors that are known not to be averaged.
        tied: groups of names of one tensor, the first name first.
        clock: the training clock; its ``updates`` are ignored.
        start: the clock at the first copy.
        updates: the number of updates; 0 if averaging had not started.
        notes: sentences for the user.
    """

    averages: Mapping[str, Tensors]
    usual: Schedule
    schedule: Schedule | None = None
    live: Tensors = field(default_factory=dict)
    tied: Sequence[tuple[str, ...]] = ()
    clock: Progress = field(default_factory=Progress)
    start: Progress = field(default_factory=Progress)
    updates: int = 1
    notes: Sequence[str] = ()


def search(values: Mapping[str, Any], keys: Iterable[str]) -> Mapping[str, Any] | None:
    """Returns the mapping that has all of the keys: ``values`` itself or one of its values; None if there is none.

    Raises CheckpointError if several of its values have them, as in the file of a GAN with two averages.
    """
    wanted = set(keys)
    if wanted <= values.keys():
        return values
    found = {key: value for key, value in values.items() if isinstance(value, Mapping) and wanted <= value.keys()}
    if len({id(value) for value in found.values()}) > 1:
        names = list(map(str, found))
        raise CheckpointError(
            f"the file has several averages, under {', '.join(map(repr, names))}: --key {names[0]} takes the first of "
            "them"
        )
    return next(iter(found.values()), None)


def read_tensors(values: Any, what: str) -> dict[str, LazyTensor]:
    """Returns the tensors of a state dict by canonical name; other values (``_extra_state``) are left out.

    Raises CheckpointCorruptError if there are none, CheckpointError if two have one canonical name.
    """
    found = values if isinstance(values, Mapping) else {}
    names = [name for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)]
    if not names:
        raise CheckpointCorruptError(f"{what} is not a state dict: there are no tensors in it")
    # Only where all names have it: a model may have an attribute called "module" itself.
    prefix = "module." if all(name.startswith("module.") for name in names) else ""  # of DistributedDataParallel
    tensors: dict[str, LazyTensor] = {}
    for name in names:
        plain = WRAPPER_TOKENS.sub("", name.removeprefix(prefix))
        if plain in tensors:
            raise CheckpointError(f"{what}: two names are {plain!r} without the parts that wrappers have added")
        tensors[plain] = LazyTensor.of(name, found[name])
    return tensors


def ties(*states: Tensors) -> list[tuple[str, ...]]:
    """Returns groups of names that are one tensor in any of the state dicts, the first name first.

    Groups of one name are left out.

    >>> import torch
    >>> weight = torch.ones(3)
    >>> ties(read_tensors({"embed.weight": weight, "head.weight": weight, "bias": torch.ones(3)}, "the state dict"))
    [('embed.weight', 'head.weight')]
    """
    groups: dict[str, list[str]] = {}
    for state in states:
        by_place: dict[object, str] = {}
        for name, tensor in state.items():
            first = by_place.setdefault(tensor.place, name) if tensor.place is not None else name
            group = groups.setdefault(first, [first])
            if name not in group:
                group.append(name)
                groups[name] = group
    return [tuple(group) for name, group in groups.items() if name == group[0] and len(group) > 1]


def name_by_position(tensors: Sequence[LazyTensor], model: Model | None, what: str) -> dict[str, LazyTensor]:
    """Names the tensors of a list in the order of ``model.parameters()``, by a state dict of the same model.

    Raises:
        CheckpointError: there is no state dict, or its order is not the model's.
        CheckpointMismatchError: it is of another model. Lists the shapes that differ.
    """
    if model is None or not model.ordered:
        raise CheckpointError(
            f"{what} has {len(tensors)} tensors without names: give --model, a file of torch.save(model.state_dict()) "
            "of the same model" + ("" if model is None else "; safetensors files do not keep the model's order")
        )
    # model.parameters() gives a tied tensor once, under its first name, and no buffers.
    aliases = {name for group in ties(model.tensors) for name in group[1:]}
    names = [
        name
        for name, tensor in model.tensors.items()
        if name not in aliases and tensor.dtype.is_floating_point and not BATCH_NORM.search(name)
    ]
    if len(names) != len(tensors) and model.frozen is not None:
        names = [name for name in names if not model.frozen.search(name)]
    if len(names) != len(tensors):
        raise CheckpointMismatchError(
            f"{what} has {len(tensors)} tensors, and the model has {len(names)} parameters: {', '.join(names[:8])}. "
            "If only trained parameters were averaged, name the others by --frozen"
        )
    check_shapes(dict(zip(names, tensors, strict=True)), model.tensors, what)
    return dict(zip(names, tensors, strict=True))


def check_shapes(tensors: Tensors, model: Tensors, what: str) -> None:
    """Raises CheckpointMismatchError, which lists every tensor that has another shape in the model."""
    problems = [
        f"{name!r} is {tensor.shape} and in the model {model[name].shape}"
        for name, tensor in tensors.items()
        if name in model and tensor.shape != model[name].shape
    ]
    if problems:
        raise CheckpointMismatchError(f"{what} is not of this model: {'; '.join(problems)}")


def integer(value: Any, what: str) -> int:
    """Returns a count from a file, given as a number or a tensor of one element.

    Raises CheckpointCorruptError for anything else.
    """
    plain = value.item() if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta else value
    if not is_count(plain):
        raise CheckpointCorruptError(f"{what} is {shown(plain)}; expected a count")
    return int(plain)
