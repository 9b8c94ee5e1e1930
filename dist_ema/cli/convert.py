"""Implements ``export`` and ``import``: write other libraries' files, and read them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dist_ema.cli.app import AsJSON, Checkpoint, Dtype, Name, app, torch_dtype
from dist_ema.cli.contents import complain_of_lacks, contents, describe, totals
from dist_ema.cli.show import complain, line, many, one_thread_an_operation, print_json, progress, size


@app.command()
def export(
    path: Checkpoint,
    out: Annotated[str, typer.Argument(help="Directory to make; must not exist.", show_default=False)],
    name: Name = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of floating-point tensors; else that of the checkpoint.", show_default=False)
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Bytes of one file at most, such as 5GB or 512MiB.")] = "5GB",
    config_from: Annotated[
        str | None,
        typer.Option(help="File, or directory whose configuration files are copied.", show_default=False),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="Names of the files: transformers (a tied tensor once) or diffusers.", show_default=False),
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Write an average, and all that is not averaged, as a Hugging Face directory of safetensors files.

    Tensors have the names that they have in the module: a checkpoint does not know its class.
    """
    from dist_ema.offline.export import export_checkpoint

    with progress("export") as begin, one_thread_an_operation():
        manifest = export_checkpoint(
            path,
            out,
            name=name,
            dtype=torch_dtype(dtype),
            max_shard_size=max_shard_size,
            config_from=config_from,
            layout=layout,
            begin=lambda _, size: begin(size),
        )
    files = {file.name: file.stat().st_size for file in sorted(Path(out).iterdir()) if file.is_file()}
    if as_json:
        print_json({"path": path, "out": str(out), "started": manifest.started, "files": files})
        return
    complain_of_lacks(path, manifest)
    if not manifest.started:
        complain(f"{path} was saved before the first update: these are the live weights of that moment")
    weights = {file: size for file, size in files.items() if file.endswith(".safetensors")}
    others = [file for file in files if file not in weights]
    typer.echo(
        line(f"{out}: {size(sum(weights.values()))} in {many(len(weights), 'file')}, {', '.join([*weights][:2])}")
        + (", ..." if len(weights) > 2 else "")
        + (f"; and {', '.join(others[:8])}" if others else "")
    )


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="File or directory of another library.", show_default=False)],
    path: Annotated[str, typer.Argument(help="The checkpoint to write: a directory, or a URL.", show_default=False)],
    format: Annotated[
        str,
        typer.Option(help="auto, composer, diffusers, timm, ema-pytorch, lightning, nemo, torchtitan or state-dict."),
    ] = "auto",
    key: Annotated[
        str | None,
        typer.Option(help="Import this dict of tensors inside SOURCE, such as ema or a.b.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="State dict of the same model, for names and buffers that SOURCE lacks.", show_default=False),
    ] = None,
    frozen: Annotated[
        str | None, typer.Option(help="Regular expression: parameters that are not trained.", show_default=False)
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Import this module of a larger one: 'net' takes net.*", show_default=False)
    ] = None,
    decay: Annotated[
        float | None, typer.Option(help="Kept per batch, where SOURCE does not say.", show_default=False)
    ] = None,
    half_life: Annotated[str | None, typer.Option(help="In its place, such as 1000ba.", show_default=False)] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of floating-point tensors; else that of SOURCE.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is at PATH.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Make a checkpoint of an average that another library saved. Runs no code of the file.

    `load` then reads it under any engine. Few files tell frozen parameters from trained ones: see --frozen.
    """
    from dist_ema.checkpoints.versions import read_manifest
    from dist_ema.importers.convert import import_checkpoint

    with progress("import") as begin, one_thread_an_operation():
        imported = import_checkpoint(
            source,
            path,
            format=format,
            key=key,
            model=model,
            frozen=frozen,
            prefix=prefix,
            decay=decay,
            half_life=half_life,
            dtype=torch_dtype(dtype),
            overwrite=overwrite,
            begin=begin,
        )
    manifest = read_manifest(path)
    if as_json:
        print_json(describe(path, manifest) | {"format": imported.format, "notes": list(imported.notes)})
        return
    for note in imported.notes:
        complain(note)
    typer.echo(line(f"{path}: {contents(totals(manifest))}; from {imported.format}"))
