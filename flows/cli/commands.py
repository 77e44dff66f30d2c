"""The command `quantmill`: the list of its commands, and how a command line is run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from flows.cli.command import CommandGroup, register
from flows.cli.doctor import doctor
from flows.cli.errors import UsageError, usage_error
from flows.cli.many_models import audit, batch, config, init, report
from flows.cli.one_model import benchmark, calibrate, compare, explain, info, quantize, validate
from flows.console import printing
from flows.runtime.import_path import forget_current_folder
from flows.runtime.process import exit_code, own_process
from flows.runtime.signals import stopped_in_order
from quant_core import __version__

# In the order of `quantmill --help`.
COMMANDS = (
    info,
    quantize,
    calibrate,
    validate,
    benchmark,
    explain,
    compare,
    batch,
    config,
    init,
    audit,
    report,
    doctor,
)

app = typer.Typer(
    name="quantmill",
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantmill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Smaller, faster ONNX models that are still right.

    Begin with `quantmill quantize MODEL --data SAMPLES.npz`, or `quantmill init DIR` for a folder.

    Exit codes: 0 all is met, 1 a model failed or missed its contract, 2 the request was wrong.
    """


for command in COMMANDS:
    register(app, command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's. Returns the exit code."""
    # onnx_ir would print a model's names with their control characters.
    logging.getLogger("onnx_ir").addHandler(logging.NullHandler())
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        forget_current_folder()
        own_process()
    try:
        with stopped_in_order():
            return exit_code(app(words, prog_name="quantmill", standalone_mode=False) or 0)
    except UsageError as error:
        wrong = usage_error(error)
        if wrong.problem:  # else there was no argument at all, and the help is printed
            as_json = "--format json" in " ".join(words).replace("=", " ")
            printing.print_error(wrong, as_json)
        return wrong.exit_code
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1


if __name__ == "__main__":
    sys.exit(main())
