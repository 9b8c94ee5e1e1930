"""Provides ``dist-ema``: shows, checks, exports, compares, imports and merges checkpoints; plans. Needs no accelerator.

Exit status: 0 success; 1 a finding (damage, a difference); 2 failure (bad usage, no checkpoint, a full disk), with one
line on stderr and, with ``--json``, an object on stdout that has the line as ``error``. If a reader closes the output
early, that is no error. Results go to stdout, progress and errors to stderr. torch and rich are imported by the
commands that need them, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from dist_ema import __version__
from dist_ema.cli import check, combine, convert, plan, profile  # noqa: F401 - each adds its commands to the program
from dist_ema.cli.app import app
from dist_ema.cli.show import complain, print_json
from dist_ema.errors import CheckpointCorruptError, EMAError

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program, and returns its exit status.

    Args:
        arguments: the arguments on the command line; None means those of this process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = _run(given)
        sys.stdout.flush()  # a reader that has gone is noticed here, and not when the interpreter ends
    except BrokenPipeError:
        # The reader has all it wanted (`| head`). The interpreter flushes once more, into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _run(arguments: list[str]) -> int:
    try:
        status = app(args=arguments, prog_name="dist-ema", standalone_mode=False)
    except typer.Abort:
        return 130
    except SystemExit as error:
        # typer ends the process where the reader of its output has gone.
        if isinstance(error.__context__, BrokenPipeError):
            raise error.__context__ from None
        raise
    except BrokenPipeError:
        raise
    except CheckpointCorruptError as error:
        return _fail(arguments, str(error), error, status=1)
    except EMAError as error:
        return _fail(arguments, in_words_of(arguments, str(error)), error)
    except OSError as error:
        return _fail(arguments, sentence(error), error)
    except Exception as error:
        # What typer raises for a wrong option; the class has different homes in different versions of it.
        if not hasattr(error, "format_message"):
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", "dist-ema")
        return _fail(arguments, f"{error.format_message()} (see {where} --help)", error)
    return status if isinstance(status, int) else 0


def _fail(arguments: Sequence[str], text: str, error: Exception, status: int = 2) -> int:
    """Prints the error: one line on stderr, and one JSON object on stdout if ``--json`` was given."""
    complain(text)
    if "--json" in arguments:
        print_json({"error": text, "type": type(error).__name__, "status": status})
    return status


def in_words_of(arguments: Sequence[str], text: str) -> str:
    """Replaces the names of Python's parameters in an error by the options of the command that was called.

    >>> in_words_of(["export", "c", "out"], "name=None: the checkpoint has 'fast', 'slow'")
    "--name is missing: the checkpoint has 'fast', 'slow'"
    >>> in_words_of(["export", "c", "out"], "max_shard_size='much': allowed are bytes")
    "--max-shard-size 'much': allowed are bytes"
    """
    commands = getattr(typer.main.get_command(app), "commands", {})
    command = commands.get(next((word for word in arguments if not word.startswith("-")), None))
    flags = {} if command is None else {one.name: one.opts[0] for one in command.params if one.opts[0].startswith("--")}

    def replaced(found: re.Match[str]) -> str:
        flag = flags.get(found["name"])
        value = found["value"]
        if flag is None:
            return found[0]
        if value == "None":
            return f"{flag} is missing"
        return flag if value == "True" else f"{flag} {value}"

    return re.sub(r"\b(?P<name>[a-z_]+)=(?P<value>'[^']*'|\[[^]]*\]|[\w.]+)", replaced, text)


def sentence(error: OSError) -> str:
    """Rewords Python's ``[Errno 20] Not a directory: 'x'`` as a sentence."""
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
