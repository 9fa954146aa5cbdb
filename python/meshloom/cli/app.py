"""The commands, and how they end: one line for an error, exit code 0 only on success."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from meshloom import launch
from meshloom.cli import (
    autotune,
    convert,
    doctor,
    gradients,
    planning,
    report,
    simulation,
    strategies,
    training,
)

app = typer.Typer(
    name="meshloom",
    help="Train large language models on data whose samples differ wildly in length.",
    epilog="Start with [bold]meshloom doctor[/bold]. Every command has its own --help with examples;"
    " --debug anywhere shows the whole traceback of an error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (
    training, gradients, convert, planning, simulation, autotune, report, strategies, doctor
):
    commands.register(app)

UsageError: type[Any] = typer.BadParameter.__mro__[1]


def _version(value: bool) -> None:
    if value:
        from meshloom import __version__

        print(f"meshloom {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole traceback of an error.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    del debug, version  # --debug is read in `run`, wherever it stands


def _error_line(error: BaseException) -> str:
    """One line, whatever the error's text looks like."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and not text.startswith("["):
        text = f"{error.strerror}: {error.filename}" if error.filename else text
    elif isinstance(error, (KeyError, ImportError, AssertionError)) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text


def run(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits the process."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    arguments = [a for i, a in enumerate(arguments) if a != "--debug" or i > end]
    try:
        code = app(args=arguments, prog_name="meshloom", standalone_mode=False)
        sys.stdout.flush()
    except UsageError as error:
        path = error.ctx.command_path if error.ctx else "meshloom"
        message = error.format_message()
        if not message:  # no arguments: the help was printed
            sys.exit(2)
        print(f"error: {message} (see {path} --help)", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        print("error: aborted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `meshloom ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        rank = launch.rank_of_launcher()
        who = f"rank {rank}: " if rank is not None else ""
        print(f"error: {who}{_error_line(error)}", file=sys.stderr)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
