"""Bytes of real text, cut into training batches and fixed validation windows."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 20  # one part in so many of every file, its end, is for validation
NOT_TEXT = {"__pycache__", "site-packages", "dist-packages", "test", "tests"}


@dataclass(frozen=True)
class Text:
    """Byte values as 1-D uint8 tensors on the CPU: what is trained on, and what is held out."""

    training: Tensor
    validation: Tensor

    @classmethod
    def read(cls, path: str | None, context: int) -> Text:
        """Reads a file, every text file of a folder, or by default the Python standard library's own sources.

        Raises:
            ValueError: there is too little text for one window of ``context`` bytes.
        """
        training, validation = [], []
        for file in _files(path):
            data = np.fromfile(file, dtype=np.uint8)
            if path is not None and Path(path).is_dir() and not data[:8192].all():
                continue  # a zero byte: not text, as git judges it
            held_out = len(data) // HELD_OUT
            training.append(data[: len(data) - held_out])
            validation.append(data[len(data) - held_out :])
        text = cls(
            *(torch.from_numpy(np.concatenate(part or [np.empty(0, np.uint8)])) for part in (training, validation))
        )
        if min(len(text.training), len(text.validation)) <= context:
            raise ValueError(
                f"data={path}: found {len(text.training)} bytes to train on and {len(text.validation)} to validate "
                f"with; both must be more than context={context}. Give more text or a smaller context"
            )
        return text

    def batch(self, step: int, size: int, context: int, seed: int, part: int = 0, parts: int = 1) -> Tensor:
        """One of ``parts`` equal parts of a step's ``size`` random windows: ``[size / parts, context + 1]``, int64.

        The windows follow from seed and step alone: they are the same at every world size, and after a restart.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.training) - context, (size,), generator=generator)
        return _windows(self.training, starts.view(parts, -1)[part], context)

    def windows(self, count: int, context: int) -> Tensor:
        """Evenly spread windows ``[count, context + 1]``, int64: the same on every rank and at every world size."""
        return _windows(self.validation, torch.linspace(0, len(self.validation) - context - 1, count).long(), context)


def _files(path: str | None) -> list[Path]:
    """The files to read, in an order that is the same on every rank."""
    root = Path(path or sysconfig.get_paths()["stdlib"])
    if root.is_file():
        return [root]
    pattern = "*" if path else "*.py"
    found = (file for file in root.rglob(pattern) if file.is_file())
    below = ((file, file.relative_to(root).parts) for file in found)
    if path:
        return sorted(file for file, parts in below if not any(part.startswith(".") for part in parts))
    return sorted(file for file, parts in below if NOT_TEXT.isdisjoint(parts))


def _windows(data: Tensor, starts: Tensor, context: int) -> Tensor:
    """The window of ``context + 1`` bytes at each start."""
    return data[starts[:, None] + torch.arange(context + 1)].long()
