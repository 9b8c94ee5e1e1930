"""A second model beside the averaged one, such as a teacher or a model for evaluation.

The average is written into the second model. For this its tensors are matched by name with the shares of the first
model. Nothing is sent, so each rank has to hold the same elements in both models::

    shares of the averaged model     [ a.weight   a.bias   b.weight (live) ]
    specs of the second model        [ a.weight   b.weight   a.bias        ]
    specs_of                         [ a.weight   a.bias   None            ]

A share with mode "live" (frozen, excluded) is not averaged, and so has no partner in the second model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dist_ema.engines.base import Engine
from dist_ema.errors import EMAEngineError, EMAStateError
from dist_ema.geometry.shares import Share
from dist_ema.geometry.spec import TensorSpec
from dist_ema.geometry.subclasses import CachedScale

#: Names that an error lists.
_SHOWN_NAMES = 5


class Counterpart(Engine):
    """Wraps the engine of a second model, and returns its tensors in the order of the first model's shares.

    Args:
        engine: engine of the second model.
        shares: this rank's shares of the averaged model.
        renamed: maps a name in the averaged model to the name in the second model.
        option: the option that the user gave the second model with, for errors.
        alike: whether each rank has to hold the same elements in both models. If not, only names and shapes have to be
            the same.

    Raises:
        EMAEngineError: if the second model does not match. The error names the first tensor that differs.

    Attributes:
        specs_of: for each share the spec of its partner in the second model; None if it has no partner.
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
        # For each share, the number of its partner among the specs.
        self._places = self._match(specs, shares, renamed)
        self.specs_of = [None if place is None else specs[place] for place in self._places]
        self._parameters = [place for place in self._places if place is not None and specs[place].kind != "buffer"]
        self._empty = torch.empty(0)

    def sources(self) -> list[Tensor]:
        """Returns the source of each share's partner, an empty tensor for a share without partner. Local; no copy.

        Raises EMAStateError, as :meth:`Engine.sources` does.
        """
        try:
            tensors = self._engine.sources()
        except EMAStateError as error:
            raise EMAStateError(f"{self._option}: {error}") from error
        return [self._empty if place is None else tensors[place] for place in self._places]

    def refuse_trained(self) -> None:
        """Raises EMAStateError if a partner is trained now. Local; call it after ``sources()``."""
        trained = self._engine.trained(self._parameters)
        if trained:
            name = self._engine.announced()[trained[0]].name
            raise EMAStateError(
                f"{self._option}: parameter {name!r} was frozen when the average was made and is trained now. An "
                "optimizer and the average would overwrite each other's values. Call requires_grad_(False) on it"
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

    def _match(
        self, specs: Sequence[TensorSpec], shares: Sequence[Share], renamed: Callable[[str], str]
    ) -> list[int | None]:
        """Returns for each share the number of its partner among the second model's specs; None if it has none.

        Raises EMAEngineError unless averaged tensors and partners match one to one.
        """
        number_of = {name: number for number, spec in enumerate(specs) for name in (spec.name, *spec.aliases)}
        places: list[int | None] = []
        taken: dict[int, str] = {}  # the name of the share that has each partner
        known: set[str] = set()  # names of all tensors of the averaged model, in either model's spelling
        for share in shares:
            names = [share.spec.name, *share.spec.aliases]
            other_names = [renamed(name) for name in names]
            known.update(names, other_names)
            if share.mode == "live":
                places.append(None)
                continue

            # All names of a tied tensor have to lead to one tensor of the second model.
            numbers = [number_of.get(name) for name in other_names]
            for name, other_name, number in zip(names, other_names, numbers, strict=True):
                if number is None:
                    raise self._differs(name, other_name, f"has no tensor with that name{_examples(number_of)}")
            place = numbers[0]
            if place is None or len(set(numbers)) > 1:
                tied = ", ".join(map(repr, other_names[1:]))
                raise self._differs(names[0], other_names[0], f"does not tie it to {tied}")
            # Two shares must not lead to one tensor, which would get both averages in turn.
            if place in taken:
                raise self._differs(names[0], other_names[0], f"has the same tensor as for {taken[place]!r}")
            taken[place] = names[0]
            self._compare(share, specs[place])
            places.append(place)

        # A parameter without a counterpart in the averaged model would keep its first values unnoticed.
        for spec in specs:
            if spec.kind != "buffer" and known.isdisjoint((spec.name, *spec.aliases)):
                raise EMAEngineError(
                    f"{self._option} has a parameter {spec.name!r}, which the averaged model does not have: give both "
                    "the same names, or rename="
                )
        return places

    def _compare(self, share: Share, spec: TensorSpec) -> None:
        """Raises EMAEngineError unless a share and its partner have the same kind, shape and elements on this rank."""
        own = share.spec
        if (own.kind == "buffer") != (spec.kind == "buffer"):
            raise self._differs(own.name, spec.name, "has a buffer where the other has a parameter")
        if own.shape != spec.shape:
            raise self._differs(own.name, spec.name, f"has the shape {tuple(spec.shape)} and not {tuple(own.shape)}")
        if spec.hidden:
            raise self._differs(own.name, spec.name, f"stores it as a {spec.hidden}, whose elements cannot be written")
        if self._alike and own.runs != spec.runs:
            difference = "holds other elements on this rank"
            if own.local_numel != spec.local_numel:
                difference = (
                    f"holds {spec.local_numel} of {spec.numel} elements on this rank, and not {own.local_numel}"
                )
            if spec.local_numel == spec.numel:
                difference += (
                    " (a model that is whole on every rank needs an averaged model that is so too: a plain module, "
                    "DDP, ZeRO-0. No other model is cut as ZeRO-1 and 2 cut their masters: use ZeRO-3 for both, or "
                    "sync='gather', which sends the average to every rank at each update)"
                )
            raise self._differs(own.name, spec.name, difference)

    def _differs(self, name: str, other_name: str, difference: str) -> EMAEngineError:
        """Returns the error for one tensor. ``difference`` is a clause whose subject is the second model."""
        shown = repr(name) if name == other_name else f"{name!r} ({other_name!r} in the second model)"
        return EMAEngineError(
            f"{self._option} does not match the averaged model: for the tensor {shown} it {difference}. Build and "
            "shard both models in the same way"
        )


def _examples(names: dict[str, int]) -> str:
    """Returns a clause that lists the first names of the second model."""
    shown = list(names)[:_SHOWN_NAMES]
    return f" (it has {', '.join(map(repr, shown))}{', ...' if len(names) > len(shown) else ''})"
