"""Lists for people: filters, orders, columns and short ids."""

from __future__ import annotations

import asyncio

import pytest

from dgx_music.storage import Database
from dgx_music.storage.models import Batch
from tests.cli.conftest import URL, Run, add

pytestmark = pytest.mark.usefixtures("migrated")


def add_batch(batch_id: str) -> str:
    async def store() -> None:
        database = Database(URL)
        async with database.session() as session:
            session.add(Batch(id=batch_id))
        await database.dispose()

    asyncio.run(store())
    return batch_id


def prompts(run: Run, *arguments: object) -> list[str]:
    return [row["prompt"] for row in run("list", "--json", *arguments).json]


@pytest.fixture
def five(migrated: None) -> None:
    """Five generations, each with something of its own."""
    batch = add_batch("aaaa1111-batch")
    add("pending", tags=["ambient", "warm"])
    add("failed", status="failed", is_starred=True, batch_id=batch)
    add("fast", status="completed", bpm=174.2, musical_key="F#m", generation_time_seconds=9.0)
    add("slow", status="completed", bpm=61.0, musical_key="C", generation_time_seconds=3.5)
    add("order", status="cancelled", metadata={"order": 4711}, tags=["warm"])


@pytest.mark.usefixtures("five")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--status", "failed", "-s", "cancelled"], ["order", "failed"]),
        (["--tag", "warm"], ["order", "pending"]),
        (["--tag", "warm", "--tag", "Ambient"], ["pending"]),
        (["--starred"], ["failed"]),
        (["--not-starred", "-s", "completed", "-s", "failed"], ["slow", "fast"]),
        (["--batch", "aaaa"], ["failed"]),
        (["--bpm-from", 60, "--bpm-to", 100], ["slow"]),
        (["--bpm-from", 100], ["fast"]),
        (["--key", "Gb minor"], ["fast"]),
        (["--meta", "order=4711"], ["order"]),
        (["--since", "2h"], ["order", "slow", "fast", "failed", "pending"]),
        (["--until", "2h"], []),
        (["--sort", "bpm"], ["fast", "slow"]),
        (["--sort", "run-time", "--reverse"], ["slow", "fast"]),
        (["--reverse", "-n", 2], ["pending", "failed"]),
    ],
)
def test_list_takes_each_filter_and_order(
    run: Run, options: list[object], expected: list[str]
) -> None:
    assert prompts(run, *options) == expected


@pytest.mark.usefixtures("five")
def test_local_times_are_said_once(run: Run) -> None:
    result = run("list", "--since", "yesterday", "--until", "2100-01-01", "--json")

    assert len(result.json) == 5
    assert result.err.count("In local time: since ") == 1
    assert "until 2100-01-01 00:00 UTC" in result.err
    assert "local time" not in run("list", "--since", "2h").err


@pytest.mark.usefixtures("five")
def test_the_count_is_that_of_all_statuses_asked_for(run: Run) -> None:
    err = run("list", "-s", "failed", "-s", "completed", "-n", 1).err
    assert err.startswith("1 of 3; the next ones: --after ")
    assert "There are no processing generations" in run("list", "-s", "processing").err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--bpm-from", 100, "--bpm-to", 90], "--bpm-from is 100 and --bpm-to is 90, so no tempo fits"),
        (["--since", "2026-01-02", "--until", "2026-01-01"], "use an earlier --since or a later --until"),
        (["--since", "2026-01-02", "--until", "2026-01-02"], "so no time fits"),
    ],
)  # fmt: skip
def test_a_range_in_which_nothing_can_lie_is_refused(
    run: Run, options: list[object], problem: str
) -> None:
    for command in (["list"], ["search", "rain"], ["cancel", "--yes"]):
        result = run(*command, *options)
        assert (result.code, problem in result.err) == (2, True)


@pytest.mark.usefixtures("five")
def test_pages_of_an_order_follow_each_other(run: Run) -> None:
    cursor = run("list", "--sort", "bpm", "-n", 1).err.split("--after ")[1].split()[0]

    assert prompts(run, "--sort", "bpm", "--after", cursor) == ["slow"]
    assert run("list", "--after", cursor).code == 2


@pytest.mark.usefixtures("five")
def test_a_program_gets_the_cursor_of_the_next_page_with_the_rows(run: Run) -> None:
    found, after = [], []
    while after != ["--after", None]:
        page = run("list", "--page", "-n", 2, *after).json
        found += page["generations"]
        after = ["--after", page["next"]]

    assert found == run("list", "--json").json


@pytest.mark.usefixtures("five")
def test_columns_are_those_asked_for_in_their_order(run: Run) -> None:
    lines = run("list", "--columns", "key,tempo,run-time, PROMPT", "--sort", "bpm").out.splitlines()

    assert [line.split() for line in lines] == [
        ["KEY", "TEMPO", "RUN", "TIME", "PROMPT"],
        ["F#m", "174.2", "9.0", "s", "fast"],
        ["C", "61.0", "3.5", "s", "slow"],
    ]


@pytest.mark.usefixtures("five")
@pytest.mark.parametrize("columns", ["", ",", "id,color"])
def test_a_column_that_there_is_not_ends_2_with_the_names(run: Run, columns: str) -> None:
    result = run("list", "--columns", columns)

    assert (result.code, "use some of id,status,star," in result.err) == (2, True)


def test_every_column_can_be_shown_of_any_row(run: Run) -> None:
    from dgx_music.cli.columns import COLUMNS

    add("plain")
    add(
        "full", title="A title", notes="a\nnote", tags=["a"], take=2, tenant="acme", is_starred=True
    )

    result = run("list", "--columns", ",".join(COLUMNS))

    assert result.code == 0
    assert all(word in result.out for word in ("A title", "a note", "acme", "★"))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.usefixtures("terminal")
def test_a_terminal_gets_the_shortest_end_of_each_id_that_means_it_alone(run: Run) -> None:
    add("a", id="111111111aaaa")
    add("b", id="22222222baaaa")
    add("c", id="333333333cccc")

    lines = run("list").out.splitlines()[1:]

    assert [line.split()[0] for line in lines] == ["3cccc", "baaaa", "1aaaa"]
    for line in lines:
        assert run("show", line.split()[0]).code == 0


@pytest.mark.usefixtures("terminal")
def test_an_end_is_unique_among_all_and_not_only_those_shown(run: Run) -> None:
    add("hidden", id="x-9-5555")
    add("shown", id="x-8-5555")

    assert run("list", "-n", 1).out.splitlines()[1].split()[0] == "8-5555"


@pytest.mark.usefixtures("terminal")
def test_80_columns_hold_the_star_the_title_and_the_prompt(run: Run) -> None:
    add("warm pads " * 9, title="Night drive", is_starred=True, status="completed")

    heading, line = run("list").out.splitlines()

    assert heading.split() == ["ID", "STATUS", "★", "DURATION", "CREATED", "PROMPT"]
    assert "Night drive · warm pads" in line
    assert len(line) <= 80


@pytest.mark.usefixtures("terminal")
def test_search_shows_short_ids_and_titles_too(run: Run) -> None:
    (generation_id,) = [run("enqueue", "snow", "--title", "Night drive").out.strip()]

    line = run("search", "night").out.splitlines()[1]
    assert line.startswith(f"{generation_id[-4:]} ")
    assert "Night drive · snow" in line


def test_a_row_of_a_list_as_json_is_small_and_has_no_waveform(run: Run) -> None:
    audio = {
        "duration_seconds": 30.0,
        "sample_rate": 32_000,
        "channels": 2,
        "format": "flac",
        "peak": 0.9876543,
        "loudness_lufs": -14.123456,
        "waveform": [0.123] * 1_000,
    }
    (made,) = add(
        "a warm ambient pad with a slow lofi beat under it, recorded on tape",
        status="completed",
        metadata={"audio": audio},
        attempt=1,
        sha256="ab" * 32,
        file_path="/data/outputs/ab/cd/" + "x" * 40,
        generation_time_seconds=3.25,
        sampling={"guidance_scale": 3.0, "temperature": 1.0, "top_k": 250, "seed": 2**53 - 1},
        take=2,
        title="Night drive",
        tags=["ambient"],
        bpm=92.5,
        musical_key="F#m",
    )

    for command in (["list"], ["search", "night drive"]):
        result = run(*command, "--json")
        assert result.json[0]["metadata"]["audio"] == {"duration_seconds": 30.0, "format": "flac"}
        assert len(result.out) <= 1_100
    assert "waveform" not in run("show", made, "--json").json["metadata"]["audio"]
    shown = run("show", made, "--json", "--waveform").json
    assert shown["metadata"]["audio"]["waveform"] == audio["waveform"]


def test_titles_and_notes_are_given_shown_and_taken_away(run: Run) -> None:
    made = run(
        "enqueue", "pads", "--tag", "Warm", "--tag", "a", "--star", "--title", "One"
    ).out.strip()
    row = run("show", made, "--json").json
    assert (row["title"], row["tags"], row["starred"]) == ("One", ["a", "warm"], True)

    assert run("title", made[-4:], "Night", "drive", "--json").json["title"] == "Night drive"
    assert "has these notes" in run("note", made, "for the café scene").err
    shown = run("show", made).out
    for line in ("title  ", "Night drive", "for the café scene", "a, warm", "starred"):
        assert line in shown
    assert "has no title now" in run("title", made, "").err
    assert run("show", made, "--json").json["title"] is None


@pytest.mark.parametrize(
    ("arguments", "code"), [(["title", "nothing", "x"], 3), (["note", "ID", "\0"], 2)]
)
def test_a_label_that_cannot_be_given_says_why(run: Run, arguments: list[str], code: int) -> None:
    (made,) = add("pads")
    result = run(*(made if each == "ID" else each for each in arguments))

    assert (result.code, result.err.count("\n")) == (code, 1)


def test_the_children_of_a_deleted_generation_are_still_listed(run: Run) -> None:
    (parent,) = add("lofi rain")
    (child,) = add("lofi rain", parent_id=parent)
    run("delete", parent, "--yes")

    assert [row["id"] for row in run("list", "--parent", parent, "--json").json] == [child]
    assert run("list", "--parent", parent[:-1]).code == 3


@pytest.mark.parametrize(
    ("option", "value"), [("--bpm-from", "nan"), ("--bpm-to", "-1"), ("--key", "H")]
)
def test_a_filter_that_cannot_be_names_its_option(run: Run, option: str, value: str) -> None:
    result = run("list", option, value)

    assert (result.code, result.err.startswith(f"Error: {option} is ")) == (2, True)


def test_a_pause_and_its_end_say_what_they_are_of(run: Run) -> None:
    assert "musicgen-small is paused now; " in run("pause", "--model", "musicgen-small").err
    assert "Everything is paused now; " in run("pause").err

    assert run("resume").err.splitlines() == [
        "Resumed: musicgen-small.",
        "Resumed: everything.",
        "Nothing is paused.",
    ]
