"""The command line: ``dgx-music``, or ``main([...])`` from code.

Data goes to stdout, all talk to stderr. Exit codes:

=====  ====================================================================================
    0  all is well
    1  a generation failed or was cancelled (enqueue --wait, watch, demo), a question was answered
       with no (prune, db reset), packages are missing (doctor), or an unexpected error
    2  bad input or a bad setting; nothing was stored
    3  no such generation
    4  the generation's status does not allow it, or the idempotency key is another request's
    5  the database cannot be used, or is another version's
    6  the engine cannot be used
    7  audio cannot be written or read: the output folder, or the disk
       (doctor ends with what a worker would end with here)
   74  what was asked for is done, but stdout could not take all that was to be printed
  124  a --timeout passed; the generation goes on
  130  interrupted
=====  ====================================================================================

Nothing heavy is imported before a command needs it: completion and ``--help`` must answer at once.
"""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from dgx_music import __version__
from dgx_music.cli import database, demo, doctor, enqueue, generations, prune, search, show, worker
from dgx_music.cli.output import fail
from dgx_music.cli.streams import lasting_streams
from dgx_music.early import stand_back
from dgx_music.errors import DgxMusicError
from dgx_music.groups import unwrap

__all__ = ["app", "main"]

PROGRAM = "dgx-music"
_LONG_QUOTE = re.compile(r"'[^']{80,}'")
OUTPUT_LOST = 74
"""The exit code where something was not printed: never 1, or a script would take what it asked for as not done."""
_NO_THREAD = "can't start new thread"
"""Python's words for it, as a ``RuntimeError``."""
EXIT_CODES = (
    "Exit codes: 0 all is well · 1 a generation failed or was cancelled, a question was answered with no, packages are missing "
    "(doctor), or an unexpected error · 2 bad input or setting · 3 no such generation · 4 its status does not allow it · "
    "5 database · 6 engine · 7 output folder or disk · 74 done, but stdout is full · 124 timeout · 130 interrupted"
)

app = typer.Typer(
    help="A durable queue for AI music generation: enqueue prompts, run workers, collect audio.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_QUEUE, _WORK, _CARE = "Generations", "Workers", "Care"
app.command("enqueue", rich_help_panel=_QUEUE)(enqueue.enqueue)
app.command("list", rich_help_panel=_QUEUE)(generations.list_generations)
app.command("search", rich_help_panel=_QUEUE)(search.search)
app.command("show", rich_help_panel=_QUEUE)(show.show)
app.command("watch", rich_help_panel=_QUEUE)(generations.watch)
app.command("cancel", rich_help_panel=_QUEUE)(generations.cancel)
app.command("retry", rich_help_panel=_QUEUE)(generations.retry)
app.command("stats", rich_help_panel=_QUEUE)(generations.stats)
app.command("prompts", rich_help_panel=_QUEUE)(generations.prompts)
app.command("worker", rich_help_panel=_WORK, epilog=EXIT_CODES)(worker.worker)
app.command("workers", rich_help_panel=_WORK)(worker.workers)
app.command("pause", rich_help_panel=_WORK)(worker.pause)
app.command("resume", rich_help_panel=_WORK)(worker.resume)
app.command("demo", rich_help_panel=_CARE)(demo.demo)
app.command("doctor", rich_help_panel=_CARE)(doctor.doctor)
app.command("prune", rich_help_panel=_CARE)(prune.prune)
app.add_typer(database.app, name="db", rich_help_panel=_CARE)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; ``argv`` are the arguments, by default this process's.

    A reader of stdout that leaves early changes nothing: the command goes on to its end.
    """
    if (sys.argv[1:] if argv is None else argv)[:1] != ["worker"]:  # which has yet to import its own
        stand_back()
    with lasting_streams() as output:
        code = _run(argv)
        if (loss := output.find_loss()) is not None:
            rest = "; what was asked for is done all the same." if code == 0 else "."
            code = fail(f"Not all could be printed, because of stdout ({loss}){rest}", code or OUTPUT_LOST)
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
    """Print what went wrong in one line and return the exit code; an unexpected error keeps its traceback."""
    match error:
        case DgxMusicError():
            return fail(str(error), error.exit_code)
        case TyperException():
            return _explain_usage(error)
        case MemoryError() | RuntimeError() if isinstance(error, MemoryError) or str(error) == _NO_THREAD:
            return fail(f"There is no memory to go on ({error}); raise the limit (`ulimit -v`).", 1)
    raise error


def _explain_usage(error: TyperException) -> int:
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    message = _LONG_QUOTE.sub("'…'", message)
    if message:  # empty where the help was printed instead
        context = getattr(error, "ctx", None)
        fail(f"{message}; see `{context.command_path if context else PROGRAM} --help`.", 2)
    return 2


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A durable queue for AI music generation: enqueue prompts, run workers, collect audio."""
