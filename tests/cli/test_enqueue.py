from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from dgx_music.audio import clips
from dgx_music.cli import prompt_to_audio as command
from dgx_music.errors import DatabaseUnavailableError
from tests.cli.conftest import Run, Spawn, add, count_rows
from tests.factories import audio_file

BAD_ARGUMENTS = {
    "no prompt": [],
    "a blank prompt": [" \n "],
    "a long prompt": ["x" * 2_001],
    "a control character": ["a\x07b"],
    "a NUL byte": ["a\0b"],
    "a lone surrogate": ["a\udc80b"],
    "an endless duration": ["x", "--duration", "inf"],
    "a duration that is not a number": ["x", "--duration", "nan"],
    "a duration of nothing": ["x", "--duration", "0"],
    "a negative duration": ["x", "--duration", "-3"],
    "a long duration": ["x", "--duration", "301"],
    "a duration in words": ["x", "--duration", "long"],
    "an unknown model": ["x", "--model", "musicgen-huge"],
    "a relative folder": ["x", "--model", "./model"],
    "three channels": ["x", "--channels", "3"],
    "a slow sample rate": ["x", "--sample-rate", "100"],
    "too much guidance": ["x", "--guidance-scale", "21"],
    "a negative temperature": ["x", "--temperature", "-1"],
    "a negative top-k": ["x", "--top-k", "-1"],
    "a top-p above 1": ["x", "--top-p", "1.5"],
    "a negative seed": ["x", "--seed", "-1"],
    "an endless seed": ["x", "--seed", "9" * 5_000],
    "a prompt that nobody can see": ["\u200b\U000e0041"],
    "a negative prompt that nobody can see": ["x", "--negative-prompt", "\u3164"],
    "a tenant that nobody can see": ["x", "--tenant", "\u202e"],
    "metadata that says a name twice": ["x", "--metadata", '{"a": 1, "a": 2}'],
    "a duration with a unit": ["x", "--duration", "30s"],
    "a duration with a comma": ["x", "--duration", "10,5"],
    "a home that nobody has": ["x", "--continuation", "~nobody-here/a.wav"],
    "a seed beyond 63 bits": ["x", "--seed", str(2**63)],
    "a fractional seed": ["x", "--seed", "1.5"],
    "an empty negative prompt": ["x", "--negative-prompt", ""],
    "a negative prompt without guidance": ["x", "--negative-prompt", "y", "--guidance-scale", "1"],
    "a clip that is not there": ["x", "--continuation", "nowhere.wav"],
    "a folder for a clip": ["x", "--continuation", "."],
    "a melody for a model that hears none": ["x", "--melody", "tune.wav"],
    "a priority beyond all": ["x", "--priority", "1001"],
    "no attempts": ["x", "--max-attempts", "0"],
    "a time in words": ["x", "--run-at", "tomorrow"],
    "a time without a zone": ["x", "--run-at", "2026-01-31T12:00:00"],
    "an empty key": ["x", "--idempotency-key", ""],
    "metadata that is not JSON": ["x", "--metadata", "{bpm: 140}"],
    "metadata that is a list": ["x", "--metadata", "[1]"],
    "metadata that holds NaN": ["x", "--metadata", '{"a": NaN}'],
    "metadata beyond 16 KiB": ["x", "--metadata", json.dumps({"a": "x" * 17_000})],
    "metadata nested too deeply": ["x", "--metadata", '{"a":' * 9 + "1" + "}" * 9],
    "metadata nested beyond the parser": ["x", "--metadata", '{"a":' + "[" * 100_000],
    "an unknown option": ["x", "--durations", "3"],
    "a prompt and a file": ["x", "--file", "prompts.txt"],
    "a file that is not there": ["--file", "prompts.txt"],
    "a folder for a file": ["--file", "."],
    "a timeout without a wait": ["x", "--timeout", "3"],
    "a negative timeout": ["x", "--wait", "--timeout", "-1"],
    "a folder for the audio": ["x", "--out", "."],
    "a format that cannot hold the sample rate": ["x", "--sample-rate", "96000", "--out", "a.mp3"],
    "audio in a folder that is not there": ["x", "--out", "nowhere/rain.wav"],
}

BAD_LINES = {
    "a blank prompt": '{"prompt": " "}',
    "no prompt": '{"duration": 3}',
    "a number for a prompt": '{"prompt": 3}',
    "a long duration": '{"prompt": "x", "duration": 301}',
    "a duration in words": '{"prompt": "x", "duration": "3"}',
    "a clip that is not there": '{"prompt": "x", "continuation": "nowhere.wav"}',
    "a number for a clip": '{"prompt": "x", "continuation": 7}',
    "an unknown option": '{"prompt": "x", "durations": 3}',
    "broken JSON": '{"prompt": "x"',
    "a name twice": '{"prompt": "x", "prompt": "y"}',
    "a name twice within": '{"prompt": "x", "metadata": {"a": {"b": 1, "b": 1}}}',
    "a duration as text": '{"prompt": "x", "duration": "16"}',
    "a prompt that is a number": '{"prompt": 7}',
    "a prompt that nobody can see": '{"prompt": "\\u200b"}',
    "metadata that holds NaN": '{"prompt": "x", "metadata": {"a": NaN}}',
    "a number beyond all bounds": '{"prompt": "x", "seed": ' + "9" * 5_000 + "}",
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_input_ends_2_with_one_sentence_and_stores_nothing(
    run: Run, arguments: list[str]
) -> None:
    result = run("enqueue", *arguments)

    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("Error: ")
    assert result.err.count("\n") == 1
    assert len(result.err) < 500
    assert not Path("data").exists()


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_one_bad_line_refuses_the_whole_file_and_is_named(run: Run, line: str) -> None:
    Path("prompts.jsonl").write_text(f'{{"prompt": "lofi rain"}}\n\n{line}\n')

    result = run("enqueue", "--file", "prompts.jsonl")

    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Error: line 3: ")
    assert result.err.count("\n") == 1
    assert count_rows() == 0


def test_a_refused_request_leaves_an_existing_database_unchanged(run: Run) -> None:
    add("lofi rain")
    before = run("list", "--json").json

    run("enqueue", "x", "--duration", 999)

    assert run("list", "--json").json == before


def test_prints_the_id_on_stdout_and_all_else_on_stderr(run: Run) -> None:
    result = run("enqueue", "lofi rain")

    assert run("show", result.out.strip(), "--json").json["prompt"] == "lofi rain"
    assert "place 1" in result.err
    assert "No worker serves musicgen-small" in result.err


def test_json_is_the_row_with_every_option_that_was_given(run: Run) -> None:
    options = (
        "--duration 16 --model musicgen-stereo-small --seed 7 --priority 5 --max-attempts 1 "
        "--idempotency-key k --guidance-scale 4 --temperature 0.5 --top-k 10 --top-p 0.9 "
        "--sample-rate 48000 --channels 1 --run-at 2030-01-31T12:00:00+01:00"
    )
    words = (*options.split(), "--metadata", '{"bpm": 140}')
    row = run("enqueue", "lofi rain", "--json", *words).json

    assert (row["duration_seconds"], row["model_name"], row["channels"]) == (
        16.0,
        "musicgen-stereo-small",
        1,
    )
    assert row["sampling"] == {
        "guidance_scale": 4.0,
        "temperature": 0.5,
        "top_k": 10,
        "top_p": 0.9,
        "seed": 7,
    }
    assert (row["priority"], row["max_attempts"], row["idempotency_key"]) == (5, 1, "k")
    assert (row["metadata"], row["sample_rate"]) == ({"bpm": 140}, 48_000)
    assert row["run_at"] == "2030-01-31T11:00:00+00:00"


def test_a_text_file_is_a_prompt_in_each_line_with_the_options_as_defaults(run: Run) -> None:
    Path("prompts.txt").write_text(
        '\ufefflofi rain\n\n  trap beat \r\n{"prompt": "pads", "duration": 2}\n'
    )

    rows = run("enqueue", "--file", "prompts.txt", "--duration", 5, "--json").json

    assert [(row["prompt"], row["duration_seconds"]) for row in rows] == [
        ("lofi rain", 5),
        ("trap beat", 5),
        ("pads", 2),
    ]


def test_prompts_come_from_stdin_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.stdin",
        SimpleNamespace(buffer=io.BytesIO("лофи\nrain\n".encode()), isatty=lambda: False),
    )

    result = run("enqueue", "--file", "-", "--json")

    assert [row["prompt"] for row in result.json] == ["лофи", "rain"]


def test_a_name_that_ends_in_jsonl_means_json_however_it_is_written(run: Run) -> None:
    Path("PROMPTS.JSONL").write_text('\ufeff{"prompt": "lofi rain"}\r\n["a"]\r\n')

    assert run("enqueue", "--file", "PROMPTS.JSONL").err.startswith(
        "Error: line 2: request is JSON, but not an object"
    )


@pytest.mark.parametrize("option", ["--file", "--continuation", "--out"])
def test_a_home_that_the_shell_left_is_found(
    run: Run, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setenv("HOME", "/home/ann/not-there")
    prompt = [] if option == "--file" else ["x"]

    result = run("enqueue", *prompt, f"{option}=~/a.wav")

    assert (result.code, "'/home/ann/not-there/a.wav'" in result.err) == (2, True)


@pytest.mark.parametrize("option", ["--file", "--continuation", "--out", "--model"])
def test_a_home_that_nobody_has_is_refused(run: Run, option: str) -> None:
    prompt = [] if option == "--file" else ["x"]

    result = run("enqueue", *prompt, option, "~nobody-here/a.wav")

    told = "begins with ~nobody-here, whose home is not known; write the path in full.\n"
    assert (result.code, result.err.endswith(told), list(Path().iterdir())) == (2, True, [])


def test_a_line_that_is_not_utf8_is_named(run: Run) -> None:
    Path("prompts.txt").write_bytes(b"lofi rain\n\xff\n")

    result = run("enqueue", "--file", "prompts.txt")

    assert (result.code, result.err) == (
        2,
        "Error: line 2 is not UTF-8 text; save the file as UTF-8.\n",
    )


def test_a_file_without_prompts_is_refused(run: Run) -> None:
    Path("prompts.txt").write_text("\n \n")

    assert run("enqueue", "--file", "prompts.txt").code == 2


def test_one_key_for_a_whole_file_is_refused(run: Run) -> None:
    Path("prompts.txt").write_text("a\nb\n")

    assert run("enqueue", "--file", "prompts.txt", "--idempotency-key", "k").code == 2


def test_one_audio_file_for_many_prompts_is_refused(run: Run) -> None:
    Path("prompts.txt").write_text("a\nb\n")

    assert run("enqueue", "--file", "prompts.txt", "--out", "rain.wav").code == 2
    assert count_rows() == 0


def test_an_audio_file_that_exists_is_refused_before_anything_is_made(run: Run) -> None:
    Path("rain.wav").write_text("mine")

    result = run("enqueue", "lofi rain", "--out", "rain.wav")

    assert (result.code, Path("rain.wav").read_text()) == (2, "mine")
    assert "--force" in result.err
    assert not Path("data").exists()


def test_the_same_request_under_its_key_is_the_same_row_and_another_one_ends_4(run: Run) -> None:
    first = run("enqueue", "lofi rain", "--idempotency-key", "k").out

    assert run("enqueue", "lofi rain", "--idempotency-key", "k").out == first
    assert run("enqueue", "trap beat", "--idempotency-key", "k").code == 4


def test_noise_is_announced_where_a_model_is_untrained(run: Run) -> None:
    assert "the audio is noise" in run("enqueue", "x", "--model", "musicgen-tiny-untrained").err


def test_a_wait_that_takes_too_long_ends_124_and_leaves_the_row(run: Run) -> None:
    result = run("enqueue", "lofi rain", "--wait", "--timeout", 0.1)

    assert result.code == 124
    assert "still pending" in result.err
    assert count_rows() == 1


def test_a_database_that_is_no_database_ends_5_in_one_sentence(run: Run) -> None:
    Path("notes.txt").write_text("not a database, but long enough to look at" * 50)

    result = run("enqueue", "lofi rain", "--database-url", "sqlite:///notes.txt")

    assert result.code == 5
    assert (
        result.err
        == "Error: The database sqlite:///notes.txt cannot be used: file is not a database.\n"
    )


def test_a_folder_that_cannot_be_made_ends_5(run: Run) -> None:
    Path("data").write_text("a file")

    result = run("enqueue", "lofi rain")

    assert (result.code, result.out, result.err.count("\n")) == (5, "", 1)


# what is enqueued is said first, and nothing that comes after it unsays it


async def fail(*_arguments: object, **_options: object) -> None:
    raise DatabaseUnavailableError("sqlite:///x.db", "it went away")


@pytest.mark.parametrize("advice", ["estimate_generation", "ServiceTeller.tell"])
def test_advice_that_cannot_be_had_does_not_fail_what_is_enqueued(
    run: Run, monkeypatch: pytest.MonkeyPatch, advice: str
) -> None:
    monkeypatch.setattr(f"dgx_music.cli.prompt_to_audio.{advice}", fail)

    as_id, as_json = run("enqueue", "lofi rain"), run("enqueue", "trap beat", "--json")

    assert (as_id.code, as_json.code) == (0, 0)
    assert {as_id.out.strip(), as_json.json["id"]} == {
        row["id"] for row in run("list", "--json").json
    }
    assert "it went away" in as_id.err


@pytest.mark.parametrize(("failure", "code"), [(fail, 5), (None, 124)])
def test_json_of_a_wait_that_fails_is_what_is_known_of_the_row(
    run: Run, monkeypatch: pytest.MonkeyPatch, failure: object, code: int
) -> None:
    if failure is not None:
        monkeypatch.setattr(command, "follow", failure)

    result = run("enqueue", "lofi rain", "--wait", "--timeout", 0.1, "--json")

    assert result.code == code
    assert (result.json["prompt"], result.json["status"]) == ("lofi rain", "pending")


# what a request may bring


def write_clip(name: str = "clip.wav", seconds: float = 1.0) -> str:
    Path(name).write_bytes(audio_file(seconds))
    return name


def test_an_empty_prompt_is_shown_as_unconditional(run: Run) -> None:
    generation_id = run("enqueue", "").out.strip()

    assert run("show", generation_id, "--json").json["prompt"] == ""
    assert "prompt            (unconditional)\n" in run("show", generation_id).out
    for name in ("list", "prompts"):
        assert run(name).out.endswith("(unconditional)\n")


def test_a_file_may_ask_for_unconditional_music_as_json_only(run: Run) -> None:
    Path("prompts.jsonl").write_text('{"prompt": ""}\n\n')

    assert [row["prompt"] for row in run("enqueue", "--file", "prompts.jsonl", "--json").json] == [
        ""
    ]


def test_what_the_request_brings_is_shown(run: Run) -> None:
    options = (
        "--negative-prompt",
        "drums",
        "--continuation",
        write_clip(),
        "--melody",
        write_clip("tune.wav", 50),
    )
    generation_id = run("enqueue", "rain", *options, "--model", "musicgen-melody").out.strip()

    shown = run("show", generation_id).out

    assert "negative prompt   drums\n" in shown
    assert shown.count("drums") == 1
    assert "continuation      1 s, clip " in shown
    assert "melody            50 s, clip " in shown
    assert run("list").out.endswith("rain (with continuation and melody)\n")


@pytest.mark.usefixtures("migrated")
def test_what_is_mended_in_a_clip_is_told_on_one_line(spawn: Spawn) -> None:
    Path("silence.wav").write_bytes(audio_file(hertz=0))

    _, err = spawn("enqueue", "x", "--continuation", "silence.wav").communicate(timeout=60)

    assert err.count("continuation: it holds no sound, only silence or a constant level\n") == 1


@pytest.mark.usefixtures("migrated")
@pytest.mark.parametrize("is_file", [False, True])
def test_a_clip_is_decoded_once(run: Run, monkeypatch: pytest.MonkeyPatch, is_file: bool) -> None:
    decoded, make = list[str](), clips._make
    monkeypatch.setattr(
        clips, "_make", lambda name, *more: decoded.append(name) or make(name, *more)
    )
    Path("all.jsonl").write_text(f'{{"prompt": "x", "continuation": "{write_clip()}"}}\n')

    result = run(
        "enqueue", *(["--file", "all.jsonl"] if is_file else ["x", "--continuation", "clip.wav"])
    )

    assert (result.code, decoded) == (0, ["continuation"])


def test_clips_of_a_file_are_found_from_here(run: Run) -> None:
    Path("prompts").mkdir()
    Path("prompts/all.jsonl").write_text(f'{{"prompt": "x", "continuation": "{write_clip()}"}}\n')

    assert run("enqueue", "--file", "prompts/all.jsonl", "--json").json[0]["continuation_sha256"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--continuation", "clip.wav", "--duration", 1],
            "continuation is 1 s long, and the duration of 1 s counts from",
        ),
        (
            ["--continuation", "long.wav"],
            "continuation is 31 s long; use a clip of 0.08 to 30 seconds.",
        ),
        (
            ["--continuation", "short.wav"],
            "continuation is 0.05 s long; use a clip of 0.08 to 30 seconds.",
        ),
        (
            ["--continuation", "text.wav"],
            "continuation is not audio that can be read; use WAV, FLAC, MP3 or OGG.",
        ),
        (
            ["--melody", "clip.wav"],
            "melody is given for musicgen-small, which hears none; use musicgen-melody.",
        ),
    ],
)
def test_a_bad_clip_ends_2_with_one_sentence_and_makes_no_database(
    run: Run, arguments: list[str], sentence: str
) -> None:
    for name, seconds in (("clip.wav", 1), ("long.wav", 31), ("short.wav", 0.05)):
        write_clip(name, seconds)
    Path("text.wav").write_text("no music")

    result = run("enqueue", "x", *arguments)

    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"Error: {sentence}")
    assert result.err.count("\n") == 1
    assert not Path("data").exists()


def test_a_bad_clip_in_a_file_is_named_by_its_line(run: Run) -> None:
    Path("text.wav").write_text("no music")
    Path("prompts.jsonl").write_text(
        '{"prompt": "a"}\n\n{"prompt": "b", "continuation": "text.wav"}\n'
    )

    assert run("enqueue", "--file", "prompts.jsonl").err.startswith(
        "Error: line 3: continuation is not audio"
    )


def test_a_full_queue_is_told_in_one_sentence_and_a_code_of_its_own(
    run: Run, migrated: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DGX_MUSIC_MAX_PENDING", "2")
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")

    many = run("enqueue", "--file", "prompts.txt")
    codes = [run("enqueue", prompt).code for prompt in "ab"]
    one = run("enqueue", "c")

    assert (many.code, codes, one.code) == (75, [0, 0], 75)
    assert many.err == (
        "Error: The queue has no room for 3 more generations: DGX_MUSIC_MAX_PENDING lets 2 wait; "
        "send fewer at a time.\n"
    )
    assert one.out == ""
