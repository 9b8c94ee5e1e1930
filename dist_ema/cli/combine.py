"""Implements ``merge`` and ``synthesize``: weighted sums of checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from dist_ema.cli.app import AsJSON, Dtype, Name, app, torch_dtype
from dist_ema.cli.show import complain, line, many, print_json, print_table, progress

if TYPE_CHECKING:
    from dist_ema.offline.merging.merge import Merged

Out = Annotated[str, typer.Option("--out", "-o", help="Directory to make.", show_default=False)]
OfFloats = Annotated[
    Dtype | None,
    typer.Option(help="Dtype of floating-point tensors [that of the newest source].", show_default=False),
]
ShardSize = Annotated[str, typer.Option(help="Maximum size of a file, such as 5GB or 512MiB.")]
ConfigFrom = Annotated[
    str | None, typer.Option(help="File, or directory whose configuration files are copied.", show_default=False)
]
AsCheckpoint = Annotated[bool, typer.Option("--checkpoint", help="Make a checkpoint that load() reads.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a model that is at OUT.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Skip checksum verification of the sources.")]


@app.command()
def merge(
    sources: Annotated[
        list[str], typer.Argument(help="Checkpoints, in any order that their steps state.", show_default=False)
    ],
    out: Out,
    weights: Annotated[str | None, typer.Option(help="Of each source, such as .25,.25,.5.", show_default=False)] = None,
    scheme: Annotated[
        str | None,
        typer.Option(help="uniform, lawa:K, ema:ALPHA, wsm:linear|sqrt|cosine, wsm:W1,W2,...", show_default=False),
    ] = None,
    name: Name = None,
    dtype: OfFloats = None,
    max_shard_size: ShardSize = "5GB",
    config_from: ConfigFrom = None,
    checkpoint: AsCheckpoint = False,
    any_sum: Annotated[bool, typer.Option("--any-sum", help="Allow weights that do not sum to 1.")] = False,
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide the weights by their sum.")] = False,
    key: Annotated[
        str | None,
        typer.Option(help="Which dict of a file (a.b), or which file of a folder, is meant.", show_default=False),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Take the tensors of this module: 'net' takes net.*", show_default=False)
    ] = None,
    newest: Annotated[
        str | None,
        typer.Option(help="Regular expression: tensors that are the newest source's, not summed.", show_default=False),
    ] = None,
    force: Force = False,
    no_verify: NoVerify = False,
    as_json: AsJSON = False,
) -> None:
    """Write a weighted sum of checkpoints: of save(), safetensors folders, torch.distributed.checkpoint, torch.save.

    Also under torchrun: each process does its share.
    """
    from dist_ema.errors import EMAConfigError
    from dist_ema.offline.merging.merge import merge as run

    try:
        given = None if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise EMAConfigError(f"weights={weights!r}: allowed are numbers, with commas between them") from None
    with _group(), progress("merge") as begin:
        merged = run(
            sources,
            out,
            weights=given,
            scheme=scheme,
            name=name,
            dtype=torch_dtype(dtype),
            max_shard_size=max_shard_size,
            config_from=config_from,
            checkpoint=checkpoint,
            any_sum=any_sum,
            normalize=normalize,
            key=key,
            prefix=prefix,
            newest=newest,
            force=force,
            verify=not no_verify,
            begin=begin,
        )
    for note in merged.notes if not as_json else ():
        complain(note)
    _show([merged], as_json)


@app.command()
def synthesize(
    snapshots: Annotated[
        list[str], typer.Argument(help="Checkpoints of averages, or a folder of them.", show_default=False)
    ],
    out: Out,
    target: Annotated[
        list[str],
        typer.Option(
            help="sigma_rel=.05, gamma=6.94, half_life=1000ba, decay=.999, window=5000ba or wsm:sqrt@20000ba. Several: "
            "each has a directory in OUT.",
            show_default=False,
        ),
    ],
    at: Annotated[
        str | None, typer.Option(help="As of this moment, such as 80000ba; else the newest.", show_default=False)
    ] = None,
    name: Name = None,
    dtype: OfFloats = None,
    max_shard_size: ShardSize = "5GB",
    config_from: ConfigFrom = None,
    checkpoint: AsCheckpoint = False,
    force: Force = False,
    no_verify: NoVerify = False,
    as_json: AsJSON = False,
) -> None:
    """Write an average that was never kept, out of averages that were. Also under torchrun."""
    from dist_ema.offline.merging.synthesize import synthesize as run

    with _group(), progress("synthesize") as begin:
        made = run(
            snapshots,
            out,
            target=target if len(target) > 1 else target[0],
            at=at,
            name=name,
            dtype=torch_dtype(dtype),
            max_shard_size=max_shard_size,
            config_from=config_from,
            checkpoint=checkpoint,
            force=force,
            verify=not no_verify,
            begin=begin,
        )
    for note in dict.fromkeys(note for one in made for note in one.notes) if not as_json else ():
        complain(note)
    _show(made, as_json)


@contextmanager
def _group() -> Iterator[None]:
    """Makes a process group under torchrun, for the block."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()  # not after an error, when other ranks may wait for this one


def _show(made: list[Merged], as_json: bool) -> None:
    if int(os.environ.get("RANK", "0")):
        return
    if as_json:
        said = [
            {
                "out": one.out,
                "weights": one.weights,
                "sources": one.sources,
                "residual": one.residual,
                "notes": one.notes,
            }
            for one in made
        ]
        print_json(said)
        return
    for one in made:
        rows = [
            (str(source["path"]), source.get("average") or source["kind"], f"{weight:.6g}")
            for source, weight in zip(one.sources, one.weights, strict=True)
        ]
        print_table("Sources", ("path", "average", "weight:"), rows)
        fit = "" if one.residual is None else f", off the target by {one.residual:.2%}"
        typer.echo(line(f"{one.out}: of {many(len(rows), 'source')}{fit}"))
