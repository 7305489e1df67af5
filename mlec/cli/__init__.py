"""The command line. One file for each group of commands; this one joins them and decides how a command ends.

Exit codes: 0 done; 1 a clear error (message and hint, no traceback); 2 wrong usage of arguments and options; 130 interrupted, 143 ended by
SIGTERM, 129 by a terminal that was closed: then, too, nothing half-written is left. Modules of this package import nothing heavy: what a
command needs is imported when it runs.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import click

from mlec import __version__
from mlec.cli.bundling import bundle_command
from mlec.cli.compiling import compile_command, with_value
from mlec.cli.demonstration import demo_command
from mlec.cli.inspecting import inspect_command, recover_command, report_command
from mlec.cli.optimizing import opt_command
from mlec.cli.output import as_options, print_error, print_json
from mlec.cli.running import bench_command, run_command, verify_command
from mlec.cli.signing import keygen_command, sign_command, trust_command
from mlec.cli.tables import frontends_command, ops_command, passes_command, targets_command
from mlec.errors import MlecError, UsageError

ERROR, USAGE, INTERRUPTED = 1, 2, 130
USAGE_CODES = ("E_USAGE", "E_PIPELINE", "E_USAGE_TRUST")
"""Of errors that say how an option should read; those about models, files and inputs have codes of their own."""

DEFECT_HINT = "this is a defect of mlec: run again with --debug and report what it shows"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def commands() -> None:
    """A compiler for trained models: exact, fast, and it says what it did."""


def _use_key(context: click.Context, option: click.Parameter, path: Path | None) -> None:
    """Files that the command opens are decrypted with the key in this one."""
    if path is not None:
        from mlec.artifact.encryption import EncryptionKey, use_key

        use_key(EncryptionKey.of(path))
        context.call_on_close(lambda: use_key(None))


for _command in (
    run_command,
    inspect_command,
    verify_command,
    bench_command,
    report_command,
    opt_command,
    bundle_command,
    recover_command,
):
    _command.params.append(
        click.Option(
            ["--key-file"], type=click.Path(path_type=Path), expose_value=False, callback=_use_key,
            help="Key of an encrypted .mle file. [default: the environment variable MLEC_KEY]",
        )
    )  # fmt: skip
for _command in (
    compile_command, run_command, inspect_command, verify_command, bench_command, report_command,
    opt_command, passes_command, ops_command, targets_command, frontends_command, demo_command,
    bundle_command, recover_command, keygen_command, sign_command, trust_command, *trust_command.commands.values(),
):  # fmt: skip
    # Every command takes --debug, so that it can be added to a line that has just failed.
    _command.params.append(
        click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error.")
    )
    if _command not in trust_command.commands.values():
        commands.add_command(_command)


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        args: what follows ``mlec``; that of this process by default.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if args is None else args)
    if args is None:
        for ending in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(ending) is signal.SIG_DFL:  # `nohup` has the second one ignored
                signal.signal(ending, _end)
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks is no reason to fail.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s", stream=sys.stderr)
    try:
        code = _run(words)
    except BrokenPipeError:
        code = ERROR
    if sys.stdout is not None:  # as it is where the shell closed it
        try:
            sys.stdout.flush()
        except OSError as error:
            # Nothing more can be written, not even when Python ends. Who reads a pipe has seen enough (`| head`).
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(error, BrokenPipeError):
                print_error(_of_system(error))
            code = code or ERROR
    return code


class _EndedError(KeyboardInterrupt):
    """The system wants this process to end: what is half-written is removed first, as when the user interrupts it."""


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # the next one ends the process at once
    raise _EndedError(number)


def _of_system(error: OSError) -> MlecError:
    """What the system refused where nobody expected it, such as writing the output to a full disk."""
    try:
        os.getcwd()
    except FileNotFoundError:
        hint = "change to another one, or give paths that begin with /"
        return MlecError("the current directory was deleted", code="E_SYSTEM", hint=hint)
    return MlecError(f"the system refuses: {error}", code="E_SYSTEM", hint="check the disk, and where the output goes")


def _run(words: list[str]) -> int:
    as_json, debug = "--json" in words, "--debug" in words
    error: MlecError
    try:
        result = commands.main(with_value(words), prog_name="mlec", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as wrong:
        if as_json:
            print_json(UsageError(wrong.format_message(), hint="`mlec COMMAND --help` lists the options").to_dict())
        else:
            wrong.show()
        return USAGE
    except (click.Abort, KeyboardInterrupt) as stopped:
        click.echo("interrupted: nothing half-written is left behind", err=True)
        cause = stopped.__cause__  # click has an exception of its own for all interruptions
        return 128 + int(cause.args[0]) if isinstance(cause, _EndedError) else INTERRUPTED
    except BrokenPipeError:
        raise
    except MlecError as known:
        if debug:
            raise
        error = known
        error.hint = as_options(error.hint or "") or None
    except MemoryError as full:
        if debug:
            raise
        error = MlecError(f"there is not enough memory: {full}", code="E_NO_MEMORY", hint="take fewer rows at a time")
    except OSError as refused:
        if debug:
            raise
        error = _of_system(refused)
    except Exception as defect:
        if debug:
            raise
        error = MlecError(f"{type(defect).__name__}: {defect}", code="E_DEFECT", hint=DEFECT_HINT)
    if as_json:
        print_json(error.to_dict())
    else:
        print_error(error)
    return USAGE if error.code in USAGE_CODES else ERROR
