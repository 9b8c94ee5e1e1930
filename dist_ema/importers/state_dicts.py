"""Finds the dicts of tensors in a file, chooses the average among them, and names its tensors.

Import and merge choose with the same :func:`choose`, so that both take the same tensors of a file, say the same about
it, and know the same options: ``--key a.b`` names a dict inside the file, ``--prefix net`` a module inside that dict.

What is taken, in this order:

1. what ``key`` names;
2. the only dict whose key, or whose place among others, says that it is an average;
3. the only dict of tensors, unless ``average_only``.

Everything else is refused, with a list of the dicts and the option that selects each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dist_ema.errors import CheckpointError
from dist_ema.formats.strict_json import is_count
from dist_ema.formats.tensors import Content, LazyTensor
from dist_ema.formats.torch_stand_ins import StandIn
from dist_ema.importers.foreign import Model, name_by_position
from dist_ema.importers.names import Names, arrange

#: Words of a key that say that an average is below it, and words that say so together with one of the second list.
_AVERAGE = {"ema", "swa", "polyak", "shadow"}
_AVERAGED = {"average", "averaged", "avg"}
_WEIGHTS = {"model", "net", "state", "params", "parameters", "weights"}
#: Words of a key below an average that say that these are live weights all the same.
_LIVE = {"online", "live", "current", "collected", "backup"}
#: Words of a key below which there is nothing of a model.
_OTHERS = {"opt", "optim", "optimizer", "optimizers", "scheduler", "schedulers", "scaler", "rng", "loops"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
#: Entries that count updates beside the tensors of an average: torch_ema's, torch's, RT-DETR's.
_COUNTERS = ("num_updates", "n_averaged", "updates")
#: Levels of dicts, and dicts, that are looked into.
_DEPTH = 8
_LOOKED_INTO = 10_000
_LISTED = 12
_WHOLE = "--format state-dict takes them"

Holds = Literal["average", "live", "unknown"]


@dataclass(frozen=True)
class StateDict:
    """Describes a dict of tensors in a file, or a list of tensors without names.

    Attributes:
        key: the keys that lead to it, joined by dots; empty for the file itself.
        values: the dict or the list.
        holds: what it is, according to its key, its place in the file or its names.
        beside: the dict that contains it.
    """

    key: str
    values: Mapping[Any, Any] | Sequence[Any]
    holds: Holds
    beside: Mapping[Any, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Counts the tensors."""
        values = self.values.values() if isinstance(self.values, Mapping) else self.values
        return sum(isinstance(value, (Tensor, LazyTensor)) for value in values)

    def __str__(self) -> str:
        text = f"{self.count} tensor{'' if self.count == 1 else 's'}"
        text += "" if isinstance(self.values, Mapping) else " without names"
        return f"{self.key!r}: {text}" if self.key else text


@dataclass(frozen=True)
class Choice:
    """Describes the tensors that were taken from a file.

    Attributes:
        key: the keys that lead to the dict; empty for the file itself.
        tensors: the tensors of the average, or the only ones, by the plain model's name.
        live: tensors of the same dict that are not averaged: buffers and frozen weights beside LitEma's names.
        is_average: whether something in the file says that this is an average.
        updates: the number of updates; None if the file does not say.
        decay: the fraction kept per update; None if it is not beside the tensors.
        notes: one sentence each on what was taken and why, for the user.
    """

    key: str
    tensors: dict[str, LazyTensor]
    live: dict[str, LazyTensor] = field(default_factory=dict)
    is_average: bool = False
    updates: int | None = None
    decay: float | None = None
    notes: tuple[str, ...] = ()


def choose(
    content: Content,
    where: str,
    *,
    key: str | None = None,
    prefix: str | None = None,
    model: Model | None = None,
    average_only: bool = False,
) -> Choice:
    """Takes the average from a file or directory of any library, or its only weights. Runs no code, reads no tensor.

    Args:
        content: the file as :func:`dist_ema.importers.files.open_foreign` opened it.
        where: the path, for errors.
        key: the dict inside the file, such as ``"callbacks.EMA.ema_state_dict"``. Names in directories and safetensors
            files are not nested; there it is a prefix of the names.
        prefix: takes one module out of a larger one: ``"net"`` takes ``net.*``, and the names lose it.
        model: gives names to the tensors of a list. Without it, a model's dict beside the list does, if there is one.
        average_only: refuse weights that nothing marks as an average. A ``key`` marks them.

    Raises:
        CheckpointError: there is no such key or prefix, nothing to take, or more than one possibility. Lists what there
            is.
        CheckpointCorruptError: a tensor is incomplete.
    """
    # Directories and safetensors files have a flat list of names; files of torch.save have nested dicts.
    if content.kind != "file":
        return _choose_flat(content, where, key, prefix, average_only)
    found = list(find(content.values))
    if not found and (objects := _objects(content.values)):
        raise CheckpointError(f"{where} has no dict of tensors, but {objects}")
    chosen = _at(content.values, key, where, found) if key is not None else _only(found, where, average_only)
    notes = []
    if len(found) > 1 and key is None:
        others = [str(one) for one in found if one is not chosen]
        why = "the average" if chosen.holds == "average" else "the only model"
        notes.append(f"{where}: taken is {chosen}, {why}; not taken: {_some(others)} (--key takes another)")
    # A list of tensors gets its names from the model, a dict from its own keys.
    if not isinstance(chosen.values, Mapping):
        return _of_list(chosen, found, where, prefix, model, notes)
    names = arrange(_tensor_names(chosen.values), f"{where}{_at_key(chosen.key)}", prefix)
    is_average = chosen.holds == "average" or names.says_average or key is not None
    return Choice(
        chosen.key,
        {plain: LazyTensor.of(held, chosen.values[held]) for plain, held in names.average.items()},
        {plain: LazyTensor.of(held, chosen.values[held]) for plain, held in names.live.items()},
        is_average,
        _count(chosen.values.get(names.counter)) if names.counter else _counted_beside(chosen),
        _fraction(chosen.values.get(names.decay)) if names.decay else _fraction(chosen.beside.get("decay")),
        (*notes, *([f"{where}: {names.note}"] if names.note else ())),
    )


def find(values: Mapping[Any, Any]) -> Iterator[StateDict]:
    """Yields all dicts and lists of tensors in a file, except those of optimizers and the like.

    >>> import torch
    >>> weights = {"weight": torch.zeros(2, 2)}
    >>> [str(found) for found in find({"model": weights, "ema": {"module": weights, "updates": 3}, "epoch": 4})]
    ["'model': 1 tensor", "'ema.module': 1 tensor"]
    """
    yield from _find(values, (), "unknown", {}, iter(range(_LOOKED_INTO)))


def _find(
    values: Mapping[Any, Any], path: tuple[str, ...], holds: Holds, beside: Mapping[Any, Any], left: Iterator[int]
) -> Iterator[StateDict]:
    # A file may hold one dict at many places, or a dict in itself: levels and dicts are bounded.
    if len(path) > _DEPTH or "param_groups" in values or next(left, None) is None:
        return
    if _is_state_dict(values):
        names = _tensor_names(values)
        if holds == "unknown" and _says_average(names):
            holds = "average"
        yield StateDict(".".join(path), values, holds, beside)
        return
    for key, value in values.items():
        if not isinstance(key, str) or _words(key) & _OTHERS:
            continue
        inner = (*path, key)
        meant = _meaning(key, value, values, holds)
        if isinstance(value, Mapping):
            yield from _find(value, inner, meant, values, left)
        elif _is_list(value):
            yield StateDict(".".join(inner), value, meant, values)


def _meaning(key: str, value: Any, beside: Mapping[Any, Any], above: Holds) -> Holds:
    """Returns what the key of an entry says about the tensors in it."""
    # Three layouts in which the average has taken the model's place in the file, and the live weights are elsewhere.
    if {"state_dict", "current_model_state"} <= beside.keys():  # Lightning's WeightAveraging
        return {"state_dict": "average", "current_model_state": "live"}.get(key, above)  # type: ignore[return-value]
    if beside.get("ema_weights_active"):  # Composer's EMA
        return "live"
    if {"state_dict", "ema_state_dict"} <= beside.keys():
        if _is_mmengine(beside["ema_state_dict"]):
            return {"state_dict": "average", "ema_state_dict": "live"}.get(key, above)  # type: ignore[return-value]
        if key == "ema_state_dict":  # the average in other libraries' files, but nothing in the file says so
            return "unknown"
    words = _words(key)
    if words & _LIVE:
        return "live"
    if words & _AVERAGE or (words & _AVERAGED and words & _WEIGHTS):
        return "average"
    return above


def _is_mmengine(values: Any) -> bool:
    names = list(values) if isinstance(values, Mapping) else []
    return "steps" in names and all(name == "steps" or str(name).startswith("module.") for name in names)


def _objects(values: Mapping[Any, Any]) -> str:
    """Lists objects of other classes at the top of a file; their tensors cannot be read without the file's code."""
    found = [f"{key!r}, a {value.name}" for key, value in values.items() if isinstance(value, StandIn)]
    return (
        found
        and (
            f"{_some(found)}: no code of a file is run. If you trust it, load it where that class is installed, "
            "torch.save(module.state_dict(), FILE), and import FILE with --format state-dict"
        )
    ) or ""


def _says_average(names: Sequence[str]) -> bool:
    """Returns whether the names of a dict alone show that an average is in it."""
    try:
        return arrange(names, "").says_average
    except CheckpointError:  # it does, in a way that has to be refused; choose() says why
        return True


def _is_state_dict(values: Mapping[Any, Any]) -> bool:
    """Returns whether most entries are tensors, and one of them has dimensions. A dict of losses has none."""
    counted = [value for key, value in values.items() if not str(key).endswith("_extra_state")]
    tensors = [value for value in counted if isinstance(value, Tensor)]
    return 2 * len(tensors) > len(counted) and any(tensor.dim() for tensor in tensors)


def _is_list(value: Any) -> bool:
    whole = isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, Tensor) for one in value)
    return whole and any(one.dim() for one in value)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(_tensor_names(value))


def _words(key: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(key)}


def _tensor_names(values: Mapping[Any, Any]) -> list[str]:
    return [name for name, value in values.items() if isinstance(name, str) and isinstance(value, (Tensor, LazyTensor))]


def _only(found: Sequence[StateDict], where: str, average_only: bool) -> StateDict:
    """Returns the only average, or the only weights."""
    averages = [one for one in found if one.holds == "average"]
    if len(averages) == 1:
        return averages[0]
    if len(averages) > 1:
        raise CheckpointError(f"{where} has several averages: {_options(averages)}")
    if average_only:
        raise _unknown(where, _options(found))
    if not found:
        raise CheckpointError(f"{where} has no dict of tensors")
    if len(found) > 1:
        raise CheckpointError(f"{where} has several dicts of tensors, and nothing says which one: {_options(found)}")
    return found[0]


def _unknown(where: str, has: str) -> CheckpointError:
    return CheckpointError(
        f"{where} has none of the known formats, and nothing in it says what is an average: it has "
        f"{has or 'no dict of tensors'}"
    )


def _at(values: Mapping[Any, Any], key: str, where: str, found: Sequence[StateDict]) -> StateDict:
    """Returns what is at a key. A key of the file may contain dots."""
    there = list(_reach(values, key))
    taken = [(value, beside) for value, beside in there if _is_list(value) or _has_tensors(value)]
    if not taken:
        inner = [one for value, _ in there if isinstance(value, Mapping) for one in find(value)]
        if inner:
            below = [StateDict(f"{key}.{one.key}", one.values, one.holds) for one in inner]
            raise CheckpointError(f"{where}: --key {key} is not a dict of tensors; below it are {_options(below)}")
        has = f"it has {_options(found)}" if found else "it has no dict of tensors"
        raise CheckpointError(f"{where}: there are no tensors at --key {key}; {has}")
    # "a.b" is an entry of that name, or "b" inside of "a". If the file has both, only its author knows which is meant.
    if len({id(value) for value, _ in taken}) > 1:
        raise CheckpointError(
            f"{where}: --key {key} is ambiguous: {len(taken)} dicts of tensors in the file can be reached by it, "
            "because keys of the file contain dots. Save the dict that is meant alone, and give that file"
        )
    value, beside = taken[0]
    return StateDict(key, value, next((one.holds for one in found if one.key == key), "unknown"), beside)


def _reach(values: Mapping[Any, Any], key: str) -> Iterator[tuple[Any, Mapping[Any, Any]]]:
    """Yields everything that a key with dots may stand for, each with the dict that contains it."""
    for name, value in values.items():
        if name == key:
            yield value, values
        elif isinstance(name, str) and key.startswith(name + ".") and isinstance(value, Mapping):
            yield from _reach(value, key.removeprefix(name + "."))


def _of_list(
    chosen: StateDict, found: Sequence[StateDict], where: str, prefix: str | None, model: Model | None, notes: list[str]
) -> Choice:
    """Names the tensors of a list in the order of the model's parameters."""
    beside = [one for one in found if one.holds != "average" and isinstance(one.values, Mapping)]
    if model is None and len(beside) == 1 and isinstance(values := beside[0].values, Mapping):
        names = arrange(_tensor_names(values), f"{where}{_at_key(beside[0].key)}")
        tensors = {plain: LazyTensor.of(held, values[held]) for plain, held in names.average.items()}
        model = Model(tensors, ordered=True)
        notes.append(f"{where}: the names are those of {beside[0]}, in its order")
    shadows = [LazyTensor.of(f"{chosen.key}[{place}]", value) for place, value in enumerate(chosen.values)]
    named = name_by_position(shadows, model, f"{where}{_at_key(chosen.key)}")
    names = Names({name: name for name in named})
    names = names if prefix is None else names.cut(prefix, where)
    return Choice(
        chosen.key,
        {plain: named[held] for plain, held in names.average.items()},
        is_average=True,
        updates=_counted_beside(chosen),
        decay=_fraction(chosen.beside.get("decay")),
        notes=tuple(notes),
    )


def _choose_flat(content: Content, where: str, key: str | None, prefix: str | None, average_only: bool) -> Choice:
    """Chooses among names that are not nested. Entries of optimizers in DCP directories are left out."""
    names = [name for name in content.tensors if content.kind != "dcp" or not _words(name.partition(".")[0]) & _OTHERS]
    if not names:
        raise _unknown(where, "") if average_only else CheckpointError(f"{where} has no tensors of a model")
    start = ".".join(part.strip(".") for part in (key, prefix) if part)
    found = arrange(names, where, start or prefix)
    if average_only and key is None and not found.says_average:
        raise _unknown(where, f"{len(names)} tensors ({_WHOLE})")
    return Choice(
        "",
        {plain: content.tensors[held] for plain, held in found.average.items()},
        {plain: content.tensors[held] for plain, held in found.live.items()},
        found.says_average or key is not None,
        notes=(f"{where}: {found.note}",) if found.note else (),
    )


def _counted_beside(chosen: StateDict) -> int | None:
    """Returns the number of updates, if the average's own dict has it beside the tensors."""
    inside = chosen.values if isinstance(chosen.values, Mapping) else {}
    values = (beside.get(name) for beside in (inside, chosen.beside) for name in _COUNTERS)
    return next((count for value in values if (count := _count(value)) is not None), None)


def _count(value: Any) -> int | None:
    plain = _number(value)
    return plain if is_count(plain) else None


def _fraction(value: Any) -> float | None:
    plain = _number(value)
    return float(plain) if isinstance(plain, float) and 0 <= plain < 1 else None


def _number(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1 or value.device.type != "cpu":
        return None
    # A decay of .9999 that was kept in fp32 is .99989998 as a Python number.
    return float(f"{value.item():.7g}") if value.dtype == torch.float32 else value.item()


def _at_key(key: str) -> str:
    return f" at {key!r}" if key else ""


def _options(found: Sequence[StateDict]) -> str:
    """``'ema': 390 tensors (--key ema), 'model': 390 tensors (--key model)``."""
    return _some([f"{one} (--key {one.key})" if one.key else f"{one} ({_WHOLE})" for one in found])


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:_LISTED]) + (f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else "")
