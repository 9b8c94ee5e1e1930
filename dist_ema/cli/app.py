"""Defines the program, and the options that several commands share."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    help="Checkpoints of averages written by dist_ema. Status: 0 good, 1 a finding, 2 it could not be done.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Dtype(str, Enum):
    """Lists the dtypes that ``export`` may write."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"
    fp64 = "fp64"


_TORCH_NAMES = {Dtype.bf16: "bfloat16", Dtype.fp16: "float16", Dtype.fp32: "float32", Dtype.fp64: "float64"}
Checkpoint = Annotated[str, typer.Argument(help="Directory of a checkpoint, or a URL.", show_default=False)]
AsJSON = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Name = Annotated[str | None, typer.Option(help="Which average.", show_default=False)]


def torch_dtype(dtype: Dtype | None) -> torch.dtype | None:
    import torch

    return getattr(torch, _TORCH_NAMES[dtype]) if dtype else None
