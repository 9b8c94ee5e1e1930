"""Writes the model card of an export: what the average is, as ``README.md`` and in the metadata of the files."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dist_ema import __version__
from dist_ema.schedules import Schedule, UnknownSchedule
from dist_ema.schedules.clock import Time
from dist_ema.schedules.state import EMAState
from dist_ema.storage.local import write_text

NAME = "README.md"
#: The file that says how a merge was made, for programs.
PROVENANCE = "merge.json"
#: Libraries whose versions a card states, if the program has imported them.
_LIBRARIES = ("torch", "transformers", "diffusers", "peft", "deepspeed", "lightning", "composer")
#: Bisection steps after which an interval does not change any more in double precision.
_HALVINGS = 60


@dataclass(frozen=True)
class ModelCard:
    """Holds the facts about an exported average.

    Attributes:
        average: the name of the average.
        schedule: the schedule of the average.
        state: clocks and counts at the time of the export, the same on every rank.
        source: the checkpoint that was exported; None for the average of a running training.
    """

    average: str
    schedule: Schedule
    state: EMAState
    source: str | None = None

    def metadata(self) -> dict[str, str]:
        """Returns the entries for the headers of the files. safetensors allows only strings there."""
        facts = {
            "average": self.average,
            "schedule": self.schedule.to_dict(),
            "started": self.state.started,
            "updates": self.state.averaged.updates,
            "training": str(self.state.training),
            "library": f"dist_ema {__version__}",
        }
        return {"dist_ema": json.dumps(facts, sort_keys=True)}

    def rows(self) -> list[tuple[str, str]]:
        """Returns the rows of the card's table."""
        rows = [("average", f"`{self.average}`"), ("schedule", f"`{json.dumps(self.schedule.to_dict())}`")]
        if self.state.started:
            rows += [("half life", text) for text in half_life(self.schedule, self.state)]
            rows.append(("updates", f"{self.state.averaged.updates:,}"))
            rows.append(("averaged since", str(self.state.first_copy)))
        else:
            rows.append(("updates", "0: averaging has not begun, so these are the live weights"))
        rows.append(("training", str(self.state.training)))
        if self.source is not None:
            rows.append(("exported from", f"`{self.source}`"))
        return rows

    def write(self, directory: Path) -> None:
        """Writes the card into a directory, unless ``config_from`` has put one there. Raises OSError."""
        if not (directory / NAME).exists():
            title = "Averaged weights"
            text = "These weights are an average of the weights of a training run; the schedule says which."
            if not self.state.started:
                title = "Weights"
                text = "These are the live weights of a training run. Averaging had not begun when they were exported."
            write_text(directory / NAME, card(title, text, [*self.rows(), ("versions", versions())]))


def card(title: str, text: str, rows: Sequence[tuple[str, str]]) -> str:
    """Returns the text of a model card, with the tags of the Hub at the top."""
    lines = ["---", "tags:", "- ema", "- dist_ema", "---", "", f"# {title}", "", text, "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Escapes text so that it cannot end a cell or a row of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def versions() -> str:
    """Returns the versions of this library and of those that the program has imported."""
    found = [f"dist_ema {__version__}"]
    for name in _LIBRARIES:
        if name in sys.modules:
            try:
                found.append(f"{name} {metadata.version(name)}")
            except metadata.PackageNotFoundError:  # for example, imported from a source tree
                continue
    return ", ".join(found)


def half_life(schedule: Schedule, state: EMAState) -> list[str]:
    """Returns the half life of an average at its present length, as text; "" if it cannot be computed.

    Half of the average is younger than this. It is found by bisection, because the weight of everything up to a moment
    grows with that moment. A schedule whose windows depend on the training clock, or that is not registered in this
    program, has no answer.
    """
    if isinstance(schedule, UnknownSchedule) or schedule.begun(state.first_copy, Time(1, "ba")) is not schedule:
        return []
    unit = schedule.position_unit
    now = float(state.averaged.updates - 1) if unit == "updates" else float(state.averaged.value(unit))
    if now <= 0 or schedule.retain(0.0, now) > 0.5:
        return [f"longer than the {now:g}{_suffix(unit)} since the first copy"]
    low = 0.0
    high = now
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if schedule.retain(middle, now) > 0.5:
            high = middle
        else:
            low = middle
    return [f"{now - (low + high) / 2:.6g}{_suffix(unit)}"]


def _suffix(unit: str) -> str:
    return " updates" if unit == "updates" else unit


def merged_card(provenance: Mapping[str, Any]) -> str:
    """Returns the card of a merge: its scheme, and the weight of each source."""
    rows = [("scheme", str(provenance["scheme"]))]
    for source in provenance["sources"]:
        rows.append((f"`{_cell(source['path'])}`", f"weight {source['weight']:.6g}"))
    text = f"These weights are a weighted sum of checkpoints. `{PROVENANCE}` says the same for programs."
    return card("Merged weights", text, [*rows, ("versions", versions())])
