"""Decides which tensors of one state dict belong to an average, and what they are called in the plain model.

It works on names alone, so it serves torch files, safetensors files and directories alike. Five layouts keep an average
in a dict with something else, or under other names than the model's:

- ``AveragedModel`` (torch; mmengine's copy counts ``steps``): ``module.`` before each name, and ``n_averaged``;
- ema-pytorch's ``EMA``: ``ema_model.`` before each name, beside ``online_model.``, ``initted`` and ``step``;
- ``LitEma`` (latent diffusion): ``model_ema.`` and the model's name without its dots, beside the live weights;
- mmcv: ``ema_`` and the model's name with underscores for dots, beside the model's own names. Either may be the
  average, depending on the order in which the trainer's hooks ran;
- wrappers: ``module.``, ``_orig_mod.`` and the like inside every name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dist_ema.errors import CheckpointError
from dist_ema.importers.foreign import WRAPPER_TOKENS

#: Counters of an AveragedModel, torch's and mmengine's.
COUNTERS = ("n_averaged", "steps")
#: Before the second name of each weight in mmcv's files, and what selects the first name.
EMA_PREFIX = "ema_"
OWN_NAMES = "."
_MODULE = "module."
_LIT = ("decay", "num_updates")


@dataclass(frozen=True)
class Names:
    """Holds the names of one state dict by what they mean.

    Attributes:
        average: the name in the dict, by the plain model's name; of the only weights if there is no average inside.
        live: likewise for tensors that are not part of the average beside them (buffers, frozen weights).
        counter: the name of the entry that counts updates; None if there is none.
        decay: the name of the entry with the decay; None if there is none.
        says_average: whether the names alone show that this is an average.
        note: one sentence on what was decided; None if there was no choice.
    """

    average: dict[str, str]
    live: dict[str, str] = field(default_factory=dict)
    counter: str | None = None
    decay: str | None = None
    says_average: bool = False
    note: str | None = None

    def cut(self, prefix: str, where: str) -> Names:
        """Returns the names that begin with ``prefix``, without it. Raises CheckpointError if no name of the average
        does.

        >>> Names({"net.weight": "module.net.weight", "loss.scale": "module.loss.scale"}).cut("net", "x.pt").average
        {'weight': 'module.net.weight'}
        """
        prefix = prefix.removesuffix(".") + "."
        average, live = (
            {name.removeprefix(prefix): held for name, held in names.items() if name.startswith(prefix)}
            for names in (self.average, self.live)
        )
        if not average:
            raise CheckpointError(f"{where}: --prefix {prefix} begins no name; names begin with {_beginnings(self)}")
        return replace(self, average=average, live=live)


def arrange(names: Collection[str], where: str, prefix: str | None = None) -> Names:
    """Sorts out the names of one state dict.

    Args:
        names: of its tensors.
        where: the file and the key of the dict, for errors.
        prefix: takes one module out of a larger one: ``"net"`` takes ``net.*``, and the names lose it. None takes all;
            of LitEma's the module that it averages. In mmcv's files ``"ema_"`` takes the names that begin so, and
            ``"."`` the model's own.

    Raises:
        CheckpointError: two names become one; LitEma's names are not those of the live weights beside them; or each
            weight has two of mmcv's names, and nothing says which is the average.

    >>> arrange(["n_averaged", "module.0.weight"], "x.pt").average
    {'0.weight': 'module.0.weight'}
    >>> arrange(["model.0.weight", "model_ema.decay", "model_ema.num_updates", "model_ema.0weight"], "x.pt").average
    {'0.weight': 'model_ema.0weight'}
    """
    mmcv = _mmcv(names, where, prefix)
    if mmcv is not None:
        return mmcv
    found = _averaged_model(names, where) or _ema_pytorch(names, where) or _lit_ema(names, where, prefix)
    if found is None:
        found = Names(_plain(names, where))
    return found if prefix is None else found.cut(prefix, where)


def _averaged_model(names: Collection[str], where: str) -> Names | None:
    counter = next((name for name in COUNTERS if name in names), None)
    rest = [name for name in names if name != counter]
    if counter is None or not rest or not all(name.startswith(_MODULE) for name in rest):
        return None
    return Names(_plain(rest, where), counter=counter, says_average=True)


def _ema_pytorch(names: Collection[str], where: str) -> Names | None:
    """Returns the names of ema-pytorch's module ``EMA``, which also holds the live weights, under ``online_model.``."""
    start = "ema_model."
    inside = [name for name in names if name.startswith(start)]
    if not inside or not {"initted", "step"} <= set(names):
        return None
    average = {plain.removeprefix(start): held for plain, held in _plain(inside, where).items()}
    note = f"the average is under {start!r}"
    return Names(average, counter="step", says_average=True, note=note)


def _lit_ema(names: Collection[str], where: str, prefix: str | None) -> Names | None:
    """Returns LitEma's names with their dots, which are found by the live names. Live names may have a further
    prefix.
    """
    # Each LitEma has a counter and a decay, and no other of its names has a dot behind its own prefix.
    known = set(names)
    marks = (name.removesuffix(_LIT[0]) for name in names if name.endswith("." + _LIT[0]))
    owners: dict[str, list[str]] = {}
    for owner in marks:
        inside = [name for name in names if name.startswith(owner) and name[len(owner) :] not in _LIT]
        if owner + _LIT[1] in known and inside and not any("." in name[len(owner) :] for name in inside):
            owners[owner] = inside
    if not owners:
        return None
    if len(owners) > 1:
        raise CheckpointError(f"{where} has several averages in one dict, under {', '.join(map(repr, owners))}")
    ((owner, averaged),) = owners.items()
    live, start = _live_names(names, owner, averaged, where)
    average = {_one(live, name[len(owner) :], where): name for name in averaged}
    others = {held[0]: held[0] for held in live.values() if len(held) == 1 and held[0] not in average}
    note = f"the average is under {owner!r}; its names are those of the live weights"
    found = Names(average, others, owner + _LIT[1], owner + _LIT[0], True, note)
    if prefix is None and start:
        found = replace(found.cut(start, where), note=f"{note} under {start!r}")
    return found


def _live_names(
    names: Collection[str], owner: str, averaged: Sequence[str], where: str
) -> tuple[dict[str, list[str]], str]:
    """Returns the live names by what LitEma made of them, and the prefix that they share: the module that it
    averages.
    """
    beside = [name for name in names if not name.startswith(owner)]
    first = averaged[0][len(owner) :]
    # LitEma may average a module of the model. Candidates for its prefix are what precedes the live name that would
    # become the first averaged name without its dots.
    starts = {
        name[:place]: None
        for name in beside
        for place in (0, *(dot + 1 for dot, letter in enumerate(name) if letter == "."))
        if name[place:].replace(".", "") == first
    }
    fitting = {}
    for start in starts:
        live = _flattened([name for name in beside if name.startswith(start)], start, "")
        if all(name[len(owner) :] in live for name in averaged):
            fitting[start] = live
    if not fitting:
        raise CheckpointError(
            f"{where}: the names under {owner!r} have no dots, and no live weights in the same dict give them back"
        )
    # If several prefixes fit, LitEma's usual naming decides: model_ema averages model.
    start = owner.replace("_ema", "", 1) if len(fitting) > 1 else next(iter(fitting))
    if start not in fitting:
        raise CheckpointError(
            f"{where}: the average under {owner!r} may be that of any of {', '.join(map(repr, fitting))}"
        )
    return fitting[start], start


def _mmcv(names: Collection[str], where: str, prefix: str | None) -> Names | None:
    """Returns the names of mmcv's EMAHook. Each weight has two, and only the user knows which one is the average."""
    marked = [name for name in names if name.startswith(EMA_PREFIX) and "." not in name]
    apart = set(marked)
    own = [name for name in names if name not in apart]
    live = _flattened(own, "", "_")
    if not marked or not all(name.removeprefix(EMA_PREFIX) in live for name in marked):
        return None
    average = {_one(live, name.removeprefix(EMA_PREFIX), where): name for name in marked}
    if prefix == OWN_NAMES:
        return Names(_plain(own, where), note=f"taken are the model's own names, and not those under {EMA_PREFIX!r}")
    if prefix == EMA_PREFIX:
        others = {held[0]: held[0] for held in live.values() if len(held) == 1 and held[0] not in average}
        note = f"taken are the names under {EMA_PREFIX!r}, whose dots the model's own names give back"
        return Names(average, others, note=note)
    first, flat = next(iter(average.items()))
    raise CheckpointError(
        f"{where} has {len(average)} weights twice, such as {first!r} and {flat!r}, and does not say which is the "
        f"average: mmcv's EMAHook exchanges the two where it runs before the checkpoint is written (priority=49). "
        f"--prefix {OWN_NAMES} takes the model's own names (the average with priority=49), --prefix {EMA_PREFIX} the "
        f"names that begin with {EMA_PREFIX!r} (the average without it)"
    )


def _flattened(names: Iterable[str], start: str, dot: str) -> dict[str, list[str]]:
    """Groups names by what they become if ``start`` is removed and each dot is replaced."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.removeprefix(start).replace(".", dot), []).append(name)
    return found


def _one(names: Mapping[str, list[str]], flat: str, where: str) -> str:
    """Returns the live name that became ``flat``. Raises CheckpointError if several did."""
    if len(names[flat]) > 1:
        raise CheckpointError(f"{where}: {flat!r} may be {' or '.join(map(repr, names[flat]))}, without its dots")
    return names[flat][0]


def _plain(names: Iterable[str], where: str) -> dict[str, str]:
    """Returns the names without what wrappers have added. Raises CheckpointError if two names become one."""
    names = list(names)
    plain = [WRAPPER_TOKENS.sub("", name) for name in names]
    # Only where all names have it: a model may have an attribute called "module" itself.
    while plain and all(name.startswith(_MODULE) and name != _MODULE for name in plain):
        plain = [name.removeprefix(_MODULE) for name in plain]
    found: dict[str, str] = {}
    for name, held in zip(plain, names, strict=True):
        if name in found:
            raise CheckpointError(f"{where}: two names are {name!r} without the parts that wrappers have added")
        found[name] = held
    return found


def _beginnings(names: Names) -> str:
    counts: dict[str, int] = {}
    for name in names.average:
        first = name.partition(".")[0] + ("." if "." in name else "")
        counts[first] = counts.get(first, 0) + 1
    shown = [f"{first!r} ({count})" for first, count in counts.items()]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")
