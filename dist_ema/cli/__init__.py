"""``dist-ema``: looks at checkpoints, checks, exports, compares, imports and merges them; plans. No accelerator.

Exit status: 0 good; 1 a finding (damage, a difference); 2 it could not be done (bad usage, no checkpoint, a full
disk), with one line on stderr. What is asked for goes to stdout, progress and complaints to stderr. torch and rich are
imported by the commands that need them, so that ``--help`` is quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from dist_ema import __version__
from dist_ema.cli import check, combine, convert, plan, profile  # noqa: F401 - each adds its commands to the program
from dist_ema.cli.app import app
from dist_ema.cli.show import complain
from dist_ema.errors import CheckpointCorruptError, EMAError

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status.

    Args:
        arguments: of the command line; None means those of this process.
    """
    try:
        status = app(args=arguments, prog_name="dist-ema", standalone_mode=False)
    except typer.Abort:
        return 130
    except CheckpointCorruptError as error:
        complain(error)
        return 1
    except EMAError as error:
        complain(error)
        return 2
    except OSError as error:
        complain(sentence(error))
        return 2
    except Exception as error:
        # What typer raises for a wrong option; the class has different homes in different versions of it.
        if not hasattr(error, "format_message"):
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", "dist-ema")
        complain(f"{error.format_message()} (see {where} --help)")
        return 2
    return status if isinstance(status, int) else 0


def sentence(error: OSError) -> str:
    """What Python says as ``[Errno 20] Not a directory: 'x'``."""
    if error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None: ...
