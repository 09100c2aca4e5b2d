"""Text that is not what it seems, in all that people read and in JSON."""

from __future__ import annotations

import logging

import pytest

from dgx_music.cli import output
from dgx_music.cli.progress import board
from dgx_music.storage import Generation
from dgx_music.worker.daemon import configure_logging
from tests.cli.conftest import Run, add

pytestmark = pytest.mark.usefixtures("migrated")

TRICK = "rain\u202e\u200b\U000e0041\u2028\x9b31mdrums"
SHOWN = r"rain\u202e\u200b\U000e0041\u2028\x9b31mdrums"
ON_ONE_LINE = SHOWN.replace(r"\u2028", " ")
PERSIAN = "می‌خواهم 👩‍💻"


@pytest.mark.parametrize("command", ["list", "show", "watch"])
def test_what_people_read_shows_what_a_text_hides(run: Run, command: str) -> None:
    (generation_id,) = add(
        TRICK, status="failed", attempt=1, error_message=f"no {TRICK}", tenant=TRICK
    )
    name, *words = command.split()

    result = run(name, *words, *([generation_id] if name in {"show", "watch"} else []))

    shown = result.out + result.err
    assert SHOWN in shown or ON_ONE_LINE in shown
    assert not [character for character in TRICK if not character.isascii() and character in shown]


@pytest.mark.parametrize("command", ["prompts", "search rain"])
def test_so_do_the_lists_of_prompts(run: Run, command: str) -> None:
    assert run("enqueue", "rain \u202esmurd").code == 0

    assert r"rain \u202esmurd" in run(*command.split()).out


def test_text_of_every_script_is_shown_as_it_is(run: Run) -> None:
    (generation_id,) = add(PERSIAN)

    for arguments in (["list"], ["show", generation_id], ["list", "--json"]):
        assert "خواهم" in run(*arguments).out
    assert PERSIAN in run("list").out


def test_json_escapes_it_and_means_the_same(run: Run) -> None:
    add(TRICK, metadata={TRICK: TRICK})

    result = run("list", "--json")

    assert (result.json[0]["prompt"], result.json[0]["metadata"]) == (TRICK, {TRICK: TRICK})
    assert result.out.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "arguments", [["frob\x1b[31m\u202e"], ["list", "--bog\u202eus"], ["show", "\x1b[2J\u202e12345"]]
)
def test_an_error_that_repeats_an_argument_hides_nothing(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)

    assert result.code in {2, 3}
    assert result.err.removesuffix("\n").isprintable()


def test_a_password_in_the_wrong_place_is_not_repeated(run: Run) -> None:
    result = run("list", "postgresql://ann:hun@ter2@host/music")

    assert (result.code, "ann:***@host/music" in result.err, "ter2" in result.err) == (
        2,
        True,
        False,
    )


def test_a_progress_bar_takes_no_prompt_for_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)

    with board(["id"]) as show:
        show(
            Generation(id="id", prompt="[/verse] [red]drums\u202e", progress=0.5, status="pending")
        )

    assert r"[/verse] [red]drums\u20…" in capsys.readouterr().err


def test_a_field_keeps_its_lines_and_a_table_has_one(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_fields([("prompt", "one\n\ttwo\r"), ("b\x1b", "x")])
    output.print_table(("A", "B"), [("one\ntwo", "three\x07")])

    told = capsys.readouterr().out.splitlines()
    assert told == [
        "prompt  one",
        r"            two\x0d",
        r"b\x1b   x",
        "A        B",
        r"one two  three\x07",
    ]


def test_an_event_is_one_line_of_the_log_whatever_an_engine_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    configure_logging("info")

    logging.getLogger("dgx_music.worker.worker").warning(
        "generation %s failed: %s", "id", "no\n2026 INFO fine\x1b[0m\u202e"
    )

    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r"WARNING generation id failed: no\x0a2026 INFO fine\x1b[0m\u202e")
