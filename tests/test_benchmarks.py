"""The benchmark of the engine runs, at toy size; what it measures is nobody's promise here."""

import json

import pytest
import torch

from benchmarks import arrivals, cells, inference, roofline
from benchmarks.musicgen_models import SHAPES

OPTIONS = "--device cpu --sizes toy --seconds 0.04 --room 1 --batches 2 --requests 3 --slots 2 --threads 1"


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


class FakeStock:
    def __init__(self):
        self.batches = []

    def generate(self, durations):
        self.batches.append(list(durations))
