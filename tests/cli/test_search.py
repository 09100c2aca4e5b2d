from __future__ import annotations

import re

import pytest

from tests.cli.conftest import Run, add

pytestmark = pytest.mark.usefixtures("migrated")


@pytest.fixture
def asked(migrated: None, run: Run) -> None:
    """Three prompts; the second one was asked for twice."""
    for prompt in ("lofi rain with vocals", "lofi rain", "lofi rain", "trap beat"):
        run("enqueue", prompt)


@pytest.mark.usefixtures("asked")
def test_search_json_is_an_array_of_rows_with_their_rank_best_first(run: Run) -> None:
    hits = run("search", "lofi", "rain", "--json").json

    assert [(hit["prompt"], hit["used_count"]) for hit in hits] == [
        ("lofi rain", 2),
        ("lofi rain with vocals", 1),
    ]
    assert hits[0]["rank"] > hits[1]["rank"]
    assert {"id", "status", "created_at"} <= hits[0].keys()


@pytest.mark.usefixtures("asked")
def test_search_takes_filters_and_a_limit(run: Run) -> None:
    assert "trap beat" in run("search", "beat", "--status", "pending", "--limit", 1).out
    assert run("search", "beat", "--tenant", "acme", "--json").json == []
    assert run("search", "beat", "--model", "musicgen-large", "--json").json == []
    assert run("search", "beat", "--before", "2001-01-01T00:00:00Z", "--json").json == []


@pytest.mark.usefixtures("asked")
def test_one_argument_may_hold_phrases_and_excluded_words(run: Run) -> None:
    assert [hit["prompt"] for hit in run("search", '"lofi rain" -vocals', "--json").json] == [
        "lofi rain"
    ]


def test_search_that_finds_nothing_says_so(run: Run) -> None:
    result = run("search", "rain")

    assert (result.code, result.out, result.err) == (0, "", "Nothing was found.\n")


@pytest.mark.parametrize("words", ["", "!?", "x" * 10_000, "a\x07b"])
def test_words_that_cannot_be_looked_for_end_2(run: Run, words: str) -> None:
    result = run("search", words)

    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)


def test_list_tells_where_the_next_page_starts(run: Run) -> None:
    first, second, third = add("a", "b", "c")

    result = run("list", "--json", "--limit", 2)
    (cursor,) = re.findall(r"^2 of 3; the next ones: --after (\S+)$", result.err, re.MULTILINE)
    rest = run("list", "--json", "--limit", 2, "--after", cursor)

    assert [row["id"] for row in result.json] == [third, second]
    assert ([row["id"] for row in rest.json], rest.err) == ([first], "")


def test_list_takes_filters(run: Run) -> None:
    (wanted,) = add("a", tenant="acme", model_name="musicgen-large")
    add("b", tenant="acme")
    add("c", model_name="musicgen-large")

    rows = run(
        "list",
        "--json",
        "--tenant",
        "acme",
        "--model",
        "musicgen-large",
        "--since",
        "2001-01-01T00:00:00Z",
    ).json

    assert [row["id"] for row in rows] == [wanted]
    assert run("list", "--json", "--before", "2001-01-01T00:00:00Z").json == []


def test_a_filtered_page_tells_the_next_one_without_counting(run: Run) -> None:
    add("a", "b", "c", tenant="acme")

    assert re.search(
        r"^2; the next ones: --after \S+$",
        run("list", "--tenant", "acme", "--limit", 2).err,
        re.MULTILINE,
    )
    assert "There are no such generations" in run("list", "--tenant", "other").err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--offset", 1, "--after", "x"],
            "--offset goes with one --status and --limit only; leave it out and go on with",
        ),
        (
            ["--offset", 1, "--tenant", "x"],
            "--offset goes with one --status and --limit only; leave it out and go on with",
        ),
        (["--after", "x"], "after is not a page's cursor; give the next page's"),
        (["--since", "tomorrow"], "--since is 'tomorrow'; use yesterday, 2h, 3d, 2026-01-31 or"),
        (["--until", "0001-01-01T00:00:00+14:00"], "--until is 0001-01-01"),
        (["--meta", "order"], "--meta is 'order'; use KEY=VALUE"),
        (["--tag", " "], "tag is only white space; use tags of"),
        (["--key", "H"], "--key is 'H'; use a key such as"),
        (["--tenant", ""], "--tenant is empty; name a tenant, or leave it out"),
        (["--model", ""], "model is empty"),
    ],
)
def test_options_that_cannot_be_end_2_with_a_sentence(
    run: Run, options: list[object], sentence: str
) -> None:
    result = run("list", *options)

    assert (result.code, result.out) == (2, "")
    assert f"Error: {sentence}" in result.err
