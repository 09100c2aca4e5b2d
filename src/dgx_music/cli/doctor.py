"""``dgx-music doctor``: is everything here that a worker needs, and if not, what to do."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from dgx_music.cli.options import AsJson, given, setting_options, taking
from dgx_music.cli.output import print_json, print_table, tell

Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Load the model and compare it with what is publicly known of its numbers; slow.",
    ),
]
Files = Annotated[
    bool,
    typer.Option(
        "--files",
        help="Count the completed generations whose file is gone, or not of the size that it had.",
    ),
]


@taking(setting_options(["engine", "model", "device", "output", "database_url"]), before="verify")
def doctor(
    verify: Verify = False,
    files: Files = False,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Check what a worker needs: packages, device, model, disk, database.

    Ends with 0 if a worker can run here, else with the exit code that a worker would end with.
    """
    from dgx_music.cli.examination import examine, exit_code_of

    findings = list(examine(given(**settings), is_verified=verify, are_files_counted=files))
    exit_code = exit_code_of(findings)
    if as_json:
        told = [asdict(finding) for finding in findings]
        print_json({"is_usable": exit_code == 0, "exit_code": exit_code, "findings": told})
    else:
        rows = [(finding.verdict, finding.subject, finding.detail) for finding in findings]
        print_table(("CHECK", "SUBJECT", "DETAIL"), rows, is_cut=False)
        tell(
            "A worker can run here."
            if exit_code == 0
            else "A worker cannot run here until what failed is mended."
        )
    if exit_code != 0:
        raise typer.Exit(exit_code)
