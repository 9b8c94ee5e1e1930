"""A second model beside the one that is averaged: its tensors in the order of the first one's shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dist_ema.engines.base import Engine
from dist_ema.errors import EMAEngineError, EMAStateError
from dist_ema.geometry.shares import Share
from dist_ema.geometry.spec import TensorSpec
from dist_ema.geometry.subclasses import CachedScale


class Counterpart(Engine):
    """The engine of a second model, asked for what belongs to the shares of the first.

    Each rank has to hold the same elements of the same tensors in both, so that nothing has to be sent. What is live in
    the first model (frozen, excluded) has no partner.

    Args:
        engine: of the second model.
        shares: what this rank keeps of the first one's tensors.
        renamed: the name there of a name here.
        option: what the user calls the second model, for errors.
        alike: whether each rank has to hold the same elements in both; if not, only of the same shapes.

    Raises:
        EMAEngineError: names the first tensor of which the two hold something else on this rank.

    Attributes:
        specs_of: the second model's spec for each share; None where there is no partner.
    """

    def __init__(
        self,
        engine: Engine,
        shares: Sequence[Share],
        renamed: Callable[[str], str],
        option: str,
        alike: bool = True,
    ) -> None:
        self.group = engine.group
        self.publish_is_collective = engine.publish_is_collective
        self._engine = engine
        self._option = option
        self._alike = alike
        specs = engine.specs()
        self._places = self._match(specs, shares, renamed)
        self.specs_of = [None if place is None else specs[place] for place in self._places]
        self._parameters = [place for place in self._places if place is not None and specs[place].kind != "buffer"]
        self._empty = torch.empty(0)

    def sources(self) -> list[Tensor]:
        """See :meth:`Engine.sources`; in the order of the shares, empty where there is no partner. Local."""
        try:
            tensors = self._engine.sources()
        except EMAStateError as error:
            raise EMAStateError(f"{self._option}: {error}") from error
        return [self._empty if place is None else tensors[place] for place in self._places]

    def refuse_trained(self) -> None:
        """Raises EMAStateError if a partner is trained now. Local; to be called after ``sources()``."""
        trained = self._engine.trained(self._parameters)
        if trained:
            name = self._engine.announced()[trained[0]].name
            raise EMAStateError(
                f"{self._option}: parameter {name!r} was frozen when the average was made and is trained now, so that "
                "an optimizer and the average would undo each other's work. Call requires_grad_(False) on it"
            )

    def modules(self) -> list[nn.Module]:
        return self._engine.modules()

    def ranks(self) -> frozenset[int]:
        return self._engine.ranks()

    def reshard(self) -> None:
        self._engine.reshard()

    def caches(self) -> list[CachedScale]:
        return self._engine.caches()

    def publish(self) -> None:
        self._engine.publish()

    def _read_specs(self) -> list[TensorSpec]:
        return self._engine.specs()

    def _read_sources(self) -> list[Tensor]:
        return self.sources()

    def _read_spec(self, number: int) -> TensorSpec:
        return self._engine.describe(number)

    def _trained_of(self, numbers: Sequence[int]) -> list[int]:
        return self._engine.trained(numbers)

    # The comparison.

    def _match(
        self, specs: Sequence[TensorSpec], shares: Sequence[Share], renamed: Callable[[str], str]
    ) -> list[int | None]:
        """Returns for each share the number of its partner among the second model's specs."""
        found = {name: number for number, spec in enumerate(specs) for name in (spec.name, *spec.aliases)}
        places: list[int | None] = []
        taken: dict[int, str] = {}
        known: set[str] = set()
        for share in shares:
            names = [share.spec.name, *share.spec.aliases]
            there = [renamed(name) for name in names]
            known.update(names, there)
            if share.mode == "live":
                places.append(None)
                continue
            numbers = [found.get(name) for name in there]
            for name, other, number in zip(names, there, numbers, strict=True):
                if number is None:
                    raise self._differs(name, other, f"has no tensor of that name{_some(found)}")
            place = numbers[0]
            if place is None or len(set(numbers)) > 1:
                raise self._differs(names[0], there[0], f"does not tie it to {', '.join(map(repr, there[1:]))}")
            if place in taken:
                raise self._differs(names[0], there[0], f"holds {taken[place]!r} there too, by a tie or by rename=")
            taken[place] = names[0]
            self._compare(share, specs[place])
            places.append(place)
        for spec in specs:
            if spec.kind != "buffer" and known.isdisjoint((spec.name, *spec.aliases)):
                raise EMAEngineError(
                    f"{self._option} has a parameter {spec.name!r}, which the averaged model has not: give both the "
                    "same names, or rename="
                )
        return places

    def _compare(self, share: Share, spec: TensorSpec) -> None:
        own = share.spec
        if (own.kind == "buffer") != (spec.kind == "buffer"):
            raise self._differs(own.name, spec.name, "has a buffer where the other has a parameter")
        if own.shape != spec.shape:
            raise self._differs(own.name, spec.name, f"has the shape {tuple(spec.shape)} and not {tuple(own.shape)}")
        if spec.hidden:
            raise self._differs(own.name, spec.name, f"holds it as a {spec.hidden}, which hides its elements")
        if self._alike and own.runs != spec.runs:
            what = "holds other elements on this rank"
            if own.local_numel != spec.local_numel:
                what = f"holds {spec.local_numel} of {spec.numel} elements on this rank, and not {own.local_numel}"
            if spec.local_numel == spec.numel:
                what += (
                    " (a whole model can only stand beside one that is whole on every rank: a plain module, DDP, "
                    "ZeRO-0. ZeRO-1 and 2 cut their masters as no other model is cut: use ZeRO-3 for both, or "
                    "sync='gather', which sends the average to every rank at each update)"
                )
            raise self._differs(own.name, spec.name, what)

    def _differs(self, name: str, other: str, what: str) -> EMAEngineError:
        shown = repr(name) if name == other else f"{name!r} ({other!r} there)"
        return EMAEngineError(
            f"{self._option} is not sharded and named as the averaged model is: of {shown} it {what}. Build and shard "
            "both in the same way"
        )


def _some(names: dict[str, int]) -> str:
    shown = list(names)[:5]
    return f" (it has {', '.join(map(repr, shown))}{', ...' if len(names) > len(shown) else ''})"
