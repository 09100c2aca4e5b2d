"""The command line: ``dgx-music``, or ``main([...])`` from code.

Data goes to stdout, all talk to stderr. Exit codes:

=====  ====================================================================================
    0  all is well
    1  a generation failed or was cancelled (enqueue --wait, watch, demo), a question was answered
       with no (prune, delete, db reset and others), packages are missing (doctor), or an unexpected
       error
    2  bad input or a bad setting; nothing was stored
    3  no such generation or batch
    4  the status of a generation that was named does not allow it, or that of none that fit the
        filters does, or the idempotency key is another request's
    5  the database cannot be used, or is another version's
    6  the engine cannot be used
    7  audio cannot be written or read: the output folder, or the disk
       (doctor ends with what a worker would end with here)
   74  what was asked for is done, but stdout could not take all that was to be printed
  124  a --timeout passed; the generation goes on
  130  interrupted
=====  ====================================================================================

A command's module is imported when the command is asked for. At its top a module imports nothing
heavy (no SQLAlchemy, no NumPy, no torch): its functions do, when the command runs. So completion
and ``--help`` answer at once.
"""

from __future__ import annotations

import gc
import re
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from dgx_music import __version__
from dgx_music.cli.lazy import LazyCommand, group_of
from dgx_music.cli.streams import lasting_streams
from dgx_music.early import DAEMONS, restore_ctrl_c
from dgx_music.errors import DgxMusicError, unwrap

__all__ = ["COMMANDS", "app", "main"]

PROGRAM = "dgx-music"
OUTPUT_LOST = 74
"""The exit code if some output was lost; with 1 a script would think that the command failed."""
EXIT_CODES = (
    "Exit codes: 0 all is well · 1 a generation failed or was cancelled, a question was answered "
    "with no, packages are missing (doctor), or an unexpected error · 2 bad input or setting · "
    "3 no such generation or batch · 4 its status does not allow it · 5 database · 6 engine · "
    "7 output folder or disk · 74 done, but stdout is full · 75 the queue is full · 124 timeout · "
    "130 interrupted"
)
_LONG_QUOTE = re.compile(r"'[^']{80,}'")
_NO_THREAD = "can't start new thread"
"""The message of Python's ``RuntimeError``."""
_OBJECTS_BETWEEN_COLLECTIONS = 200_000
"""Imports make many objects and no garbage: by default Python looks for it after 700."""
_QUEUE, _WORK, _WEB, _CARE = "Generations", "Workers", "Web", "Care"

COMMANDS = {
    "enqueue": (_QUEUE, "enqueue:enqueue", "Add a prompt, or a file of prompts, to the queue."),
    "list": (_QUEUE, "generations:list_generations", "List generations, newest first."),
    "search": (
        _QUEUE,
        "search:search",
        "Find words in prompts, titles, notes and tags, best first.",
    ),
    "show": (
        _QUEUE,
        "show:show",
        "Show all of one generation: fields, labels, attempts, waveform.",
    ),
    "get": (
        _QUEUE,
        "get:get",
        "Save the audio of generations to files: by their ids, or by filters such as --batch.",
    ),
    "title": (_QUEUE, "labels:title", "Give a generation a title."),
    "note": (_QUEUE, "labels:note", "Keep a note with a generation."),
    "again": (
        _QUEUE,
        "again:again",
        "Make a generation again, with another seed or other options.",
    ),
    "continue": (
        _QUEUE,
        "again:continue_",
        "Make music that goes on from a completed generation.",
    ),
    "watch": (_QUEUE, "watch:watch", "Watch a generation or a batch until it is finished."),
    "batches": (_QUEUE, "batches:batches", "List batches, newest first, and how far each is."),
    "cancel": (_QUEUE, "changes:cancel", "Cancel generations: by their ids, or by filters."),
    "retry": (
        _QUEUE,
        "changes:retry",
        "Put failed or cancelled generations back into the queue: by their ids, or by filters.",
    ),
    "delete": (
        _QUEUE,
        "changes:delete",
        "Delete generations with their audio for good: by their ids, or by filters.",
    ),
    "star": (
        _QUEUE,
        "changes:star",
        "Give generations a star, or take it away: by their ids, or by filters.",
    ),
    "tag": (
        _QUEUE,
        "changes:tag",
        "Add tags to generations, and remove others: by their ids, or by filters.",
    ),
    "stats": (_QUEUE, "generations:stats", "Count generations by status, and distinct prompts."),
    "prompts": (_QUEUE, "generations:prompts", "List the prompts that are used most."),
    "analyse": (
        _QUEUE,
        "analyse:analyse",
        "Measure audio files: length, peak, loudness, tempo and key.",
    ),
    "worker": (_WORK, "worker:app", "Run the daemon that makes the queue's music."),
    "workers": (
        _WORK,
        "fleet:workers",
        "List the workers: which are alive, on which host and device, and what they run.",
    ),
    "top": (
        _WORK,
        "top:top",
        "Show workers, queue and rates live; keys cancel, pause and resume.",
    ),
    "pause": (_WORK, "fleet:pause", "Let no worker claim anything, or anything of one model."),
    "resume": (
        _WORK,
        "fleet:resume",
        "Let workers claim again: everything, or what one model has waiting.",
    ),
    "web": (_WEB, "web:app", "Serve the page and the API over HTTP, for people and programs."),
    "token": (_WEB, "token:app", "Make, list and revoke the tokens of the web API."),
    "demo": (_CARE, "demo:demo", "See it work: three prompts, the real worker, audio."),
    "doctor": (
        _CARE,
        "doctor:doctor",
        "Check what a worker needs: packages, device, model, disk, database.",
    ),
    "prune": (
        _CARE,
        "prune:prune",
        "Delete old generations and their audio, and clips that nobody uses.",
    ),
    "db": (_CARE, "database:app", "Create, migrate, empty or look at the database."),
}
"""For each command its heading in the help, its place, and the first line of its help."""

app = typer.Typer(
    cls=group_of([LazyCommand(name, *about) for name, about in COMMANDS.items()]),
    help="A durable queue for AI music generation: enqueue prompts, run workers, collect audio.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; by default with this process's arguments.

    If the reader of stdout leaves early, the command still runs to its end.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] in DAEMONS:  # its signals wait until it is there, and it runs for long
        return _main(argv)
    restore_ctrl_c()
    if argv is not None:
        return _main(argv)
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    try:
        return _main(argv)
    finally:
        gc.freeze()  # or the end of the process would look for garbage among all that was imported


def _main(argv: list[str] | None) -> int:
    with lasting_streams() as output:
        code = _run(argv)
        if (loss := output.find_loss()) is not None:
            rest = "; what was asked for is done all the same." if code == 0 else "."
            code = _fail(
                f"Not all could be printed, because of stdout ({loss}){rest}", code or OUTPUT_LOST
            )
        return code


def _run(argv: list[str] | None) -> int:
    try:
        code = app(args=argv, prog_name=PROGRAM, standalone_mode=False)
    except SystemExit as end:  # from shell completion
        return end.code if isinstance(end.code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        return _explain(unwrap(error))
    return code if isinstance(code, int) else 0


def _explain(error: BaseException) -> int:
    """Print what went wrong in one line and return the exit code; raises an unexpected error."""
    match error:
        case DgxMusicError():
            return _fail(str(error), error.exit_code)
        case TyperException():
            return _explain_usage(error)
        case MemoryError() | RuntimeError() if (
            isinstance(error, MemoryError) or str(error) == _NO_THREAD
        ):
            return _fail(
                f"There is no memory to go on ({error}); raise the limit (`ulimit -v`).", 1
            )
    raise error


def _explain_usage(error: TyperException) -> int:
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    message = _LONG_QUOTE.sub("'…'", message)
    if message:  # it is empty if the help was printed instead
        context = getattr(error, "ctx", None)
        _fail(f"{message}; see `{context.command_path if context else PROGRAM} --help`.", 2)
    return 2


def _fail(message: str, exit_code: int) -> int:
    from dgx_music.cli.output import fail

    return fail(message, exit_code)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """A durable queue for AI music generation: enqueue prompts, run workers, collect audio."""
