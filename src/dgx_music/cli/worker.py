"""``dgx-music worker``: the daemon."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dgx_music.cli import EXIT_CODES
from dgx_music.cli.daemons import run_daemon
from dgx_music.cli.options import given, setting_options, taking
from dgx_music.config import QUEUE_SETTINGS, SETTINGS, load_settings

app = typer.Typer(add_completion=False)


_OPTIONS = [name for name in SETTINGS if name not in QUEUE_SETTINGS]


@app.command(epilog=EXIT_CODES)
@taking(setting_options(_OPTIONS, has_panels=True))
def worker(
    drain: Annotated[bool, typer.Option("--drain", help="Stop when the queue is empty.")] = False,
    **settings: Any,
) -> None:
    """Run the daemon that makes the queue's music.

    Every option is also a variable of the environment, named beside it.

    SIGTERM or Ctrl-C (or SIGHUP, SIGQUIT) lets running generations finish within the
    grace, a second one gives them back to the queue at once. Either way the exit code
    is 0.
    """
    loaded = load_settings(**given(**settings))
    from dgx_music.worker.daemon import configure_logging, run_worker

    configure_logging(loaded.log_level)
    run_daemon(run_worker(loaded, drain=drain))
