# ruff: noqa: RUF001 - the tables have dashes and signs of multiplication
"""The benchmarks of engine and queue run, at toy size; what they measure is nobody's promise here."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import arrivals, cells, inference, listening, measures, queue, roofline
from benchmarks.comparison import Comparison
from benchmarks.musicgen_models import SHAPES
from benchmarks.ours import DgxMusic, DgxMusicThroughPsycopg
from benchmarks.places import SqlitePlace
from benchmarks.raw_sqlite import RawSqlite

OPTIONS = (
    "--device cpu --sizes toy --seconds 0.04 --room 1 --batches 2 --codec-seconds 0.1 --requests 3 "
    "--slots 2 --threads 1"
)


@pytest.fixture
def one_thread(monkeypatch):
    """Two would wait for each other wherever other tests keep the cores busy."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(roofline, "_CPU_BYTES", 2**20)
    monkeypatch.setattr(cells, "SHORTEST_SECONDS", 0.04)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_the_inference_benchmark_fills_every_table(capsys, tmp_path):
    inference.main([*OPTIONS.split(), "--json", str(tmp_path / "numbers.json")])

    shown, numbers = capsys.readouterr().out, json.loads((tmp_path / "numbers.json").read_text())
    assert [line for line in shown.splitlines() if line.startswith("| toy | 2 | slots |")]
    assert shown.count("### ") == 5
    assert [cell["loop"] for cell in numbers["cells"]] == ["`generate`", "slots"]
    assert [cell["way"] for cell in numbers["codec"]] == ["one pass", "windows"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["--channels 1", "--channels 2 --melody"])
def test_the_listening_benchmark_compares_both_ways(capsys, kind):
    options = f"--device cpu --size toy --seconds 2.1 --clips 2 --rounds 1 {kind}"

    listening.main(options.split())

    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    cells = {(line[0], line[1]): line for line in lines if len(line) == len(listening.TITLES)}
    for clips in ("| 2 at once", "| 2 slots, a full queue"):
        early, late = cells[clips, "while codes are made"], cells[clips, "after the codes"]
        seconds = [float(cell.removesuffix(" s")) for cell in (*early[2:6], *late[2:6])]
        assert min(seconds) > 0
        assert early[7].endswith(" ×")


@pytest.mark.usefixtures("one_thread")
def test_with_nobody_listening_a_clip_is_made_after_its_codes():
    engine = listening.load("toy", 1, 2, torch.device("cpu"))
    with listening.nobody_listens(engine):
        late = listening.make_clips(engine, [2.1, 1.1, 2.1], 2)
    engine.close()

    assert all(clip.parts[0] >= clip.codes > 0 for clip in late)
    assert [len(clip.parts) for clip in late] == [3, 2, 3]


@pytest.mark.usefixtures("one_thread")
def test_a_clip_that_fails_holds_up_no_other(monkeypatch):
    engine = listening.load("toy", 1, 2, torch.device("cpu"))

    with monkeypatch.context() as patch:
        patch.setattr(engine, "generate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            listening.make_clips(engine, [1.0] * 6, 2)
    engine.close()


@pytest.mark.parametrize(
    ("size", "gigabytes"), [("small", 0.72), ("medium", 3.20), ("large", 5.67)]
)
def test_a_step_reads_the_weights_of_the_true_sizes(size, gigabytes):
    assert roofline.weight_bytes(SHAPES[size], 2.0, 2) / 1e9 == pytest.approx(gigabytes, abs=0.01)


def test_a_cache_is_read_for_both_halves_and_a_prompt_for_one():
    layers, both, hidden, bytes_per_number = 24, 2, 1024, 2
    line = layers * both * hidden * bytes_per_number

    assert roofline.cache_bytes(SHAPES["small"], 2, 3, 100, 10) == 3 * line * (2 * 100 + 10)


def test_a_static_batch_takes_whoever_waits_and_ends_as_a_whole():
    stock = FakeStock()
    requests = [arrivals.Request(0.0, 1.0), arrivals.Request(0.0, 3.0), arrivals.Request(0.0, 2.0)]

    ends = arrivals.serve_static(stock, requests, batch=2)

    assert stock.batches == [[1.0, 3.0], [2.0]]
    assert ends[0] == ends[1] < ends[2]


def test_percentiles_lie_between_the_values():
    assert [arrivals.percentile([3, 1, 2], share) for share in (0.0, 0.25, 0.5, 1.0)] == [
        1,
        1.5,
        2,
        3,
    ]


TINY = queue.Size(
    rounds=1,
    one_by_one=3,
    at_once=16,
    bulk=10,
    one_slot=3,
    drain=20,
    pickups=2,
    claim_turns=1,
    kept=(0, 10),
    idle_seconds=0.1,
    soak_seconds=0.5,
)


ROWS = [
    "enqueue, one at a time, /s",
    "enqueue, 16 at a time in one process, /s",
    "enqueue, 10 in one transaction, /s",
    "drain, 1 slot, /s",
    "CPU of the worker process, 16 slots, ms",
    "pickup by an idle worker, p95, ms",
    "claim one row, 10 finished kept, ms",
    "idle worker, CPU of one core",
]


async def test_the_queue_benchmark_fills_its_table_on_sqlite(tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "WARM_UP", 1)

    shown = await queue.run(["sqlite"], TINY, tmp_path, with_peers=True)

    check_table(shown, "raw sqlite3")


async def test_the_queue_benchmark_fills_its_table_on_postgres(postgres, tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "WARM_UP", 1)

    shown = await queue.run([postgres.url("postgres")], TINY, tmp_path, with_peers=True)

    check_table(shown, "raw asyncpg")


def check_table(shown, floor):
    # a worker may pick up what its producer has not yet been told is stored: that takes less than no time
    assert f"| measurement | dgx-music | {floor} | ratio |" in shown
    assert [
        name for name in ROWS if not re.search(rf"^\| {name} \| -?\d", shown, re.MULTILINE)
    ] == []


def test_a_library_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "huey", None)
    monkeypatch.delitem(sys.modules, "benchmarks.peers.huey", raising=False)

    field = queue.field_of(SqlitePlace(Path()), with_peers=True)

    assert "huey" in field.missing


@pytest.fixture
def comparison():
    compared = Comparison(DgxMusic, RawSqlite, peers=[DgxMusicThroughPsycopg])
    for number, (ours, floor, peer) in enumerate([(10, 20, 40), (30, 40, 40), (20, 80, 40)]):
        for kind, value in ((DgxMusic, ours), (RawSqlite, floor), (DgxMusicThroughPsycopg, peer)):
            compared.add(kind, number, {"drain, /s": value})
    return compared


def test_a_row_has_medians_their_spread_and_the_median_of_the_rounds_ratios(comparison):
    row = comparison.table().splitlines()[-1]

    assert (
        row
        == "| drain, /s | 20.0 (10.0–30.0) | 40.0 (20.0–80.0) | 0.50 × | 40.0 (40.0–40.0) | 0.50 × |"
    )


@pytest.mark.parametrize(("unit", "ratio"), [("/s", "0.50 ×"), ("ms", "2.00 ×")])
def test_the_best_of_the_others_is_the_fastest(unit, ratio):
    compared = Comparison(DgxMusic, RawSqlite, peers=[RawSqlite, DgxMusicThroughPsycopg])
    for kind, value in ((DgxMusic, 4), (RawSqlite, 2), (DgxMusicThroughPsycopg, 8)):
        compared.add(kind, 0, {f"pickup, {unit}": value})

    assert compared.table().endswith(f"| {ratio} |")


def test_a_queue_that_cannot_do_something_has_an_empty_cell(comparison):
    comparison.add(DgxMusic, 0, {"bulk, /s": 5})

    assert comparison.table().splitlines()[-1] == "| bulk, /s | 5.00 (5.00–5.00) |  |  |  |  |"


def test_workers_are_counted_while_all_of_them_work():
    assert measures.rate_of_all([[0.0, 1.0, 2.0, 3.0], [1.0, 1.5, 9.0]]) == 1.5
    assert measures.rate_of_all([[0.0, 1.0], [2.0, 3.0]]) == 0.0


class FakeStock:
    def __init__(self):
        self.batches = []

    def generate(self, durations):
        self.batches.append(list(durations))
