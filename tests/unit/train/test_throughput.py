"""Figures of speed against counts by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medforge.models.encode import IGNORE, Encoded
from medforge.models.load import load_model
from medforge.models.rows import Batch, Item, collate_rows, cut
from medforge.train import throughput
from medforge.train.throughput import Meter, Size, counts_of, device_peak, flops, peak_memory

IMAGE, MERGE = 7, 2


def item(question: str, answer: str, image: str = "") -> Item:
    """Letters as tokens; an image is four tokens before them."""
    ids = [IMAGE] * (4 if image else 0) + [ord(letter) for letter in question + answer]
    labels = [IGNORE] * (len(ids) - len(answer)) + [ord(letter) for letter in answer]
    grid = np.asarray([[1, 4, 4]] if image else np.zeros((0, 3)), np.int64)
    encoded = Encoded(np.asarray(ids), np.asarray(labels), np.zeros((0, 1), np.float32), grid, 4 if image else 0, ())
    return Item(encoded, (image,) if image else ())


def batch_of(items: list[Item], packed: bool = False) -> Batch:
    (rows,) = cut(items, IMAGE, MERGE, 10_000, share=True, buckets=False, packed=packed)
    return collate_rows(rows, IMAGE, 0, packed)


@pytest.fixture(params=[False, True], ids=["padded", "packed"])
def batch(request: pytest.FixtureRequest) -> Batch:
    """Two questions that share an image, and one without: 4 + 3 + 2 and 3 tokens run, of 8 + 7 + 4."""
    return batch_of([item("ab", "YE", "i"), item("c", "NE", "i"), item("xy", "ZE")], bool(request.param))


def test_pairs_by_hand(batch: Batch) -> None:
    prefix, first, second, alone = 4 * 5 // 2, 3 * 4 // 2 + 3 * 4, 2 * 3 // 2 + 2 * 4, 3 * 4 // 2
    assert throughput._pairs(batch) == prefix + first + second + alone


words = st.text("abcd", min_size=2, max_size=6)


@settings(max_examples=60, deadline=None)
@given(drawn=st.lists(st.tuples(words, st.sampled_from(["", "i", "j"])), min_size=1, max_size=6), packed=st.booleans())
def test_pairs_are_the_masks(drawn: list[tuple[str, str]], packed: bool) -> None:
    """As many as the mask lets through, padding left out."""
    import torch

    found = batch_of([item(question, "YE", image) for question, image in drawn], packed)
    length = found.rows.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(len(found.rows), -1, -1)
    visible = causal if found.visible is None else found.visible[:, 0]
    assert throughput._pairs(found) == int((visible & (found.segments >= 0)[:, :, None]).sum())


@pytest.mark.parametrize(("full", "each"), [(False, 4), (True, 6)])
def test_flops_by_hand(batch: Batch, full: bool, each: int) -> None:
    size = Size(language=1000, tower=500, head=70, layers=3, width=16)
    pairs = 10 + 18 + 11 + 6
    expected = each * 1000 * 12 + 12 * 3 * 16 * pairs + 4 * 70 * 6 + 2 * 500 * 32
    assert (batch.real_tokens, len(batch.targets)) == (12, 6)
    assert flops(size, batch, 32, full) == expected


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_the_size_of_a_model(tiny_models: dict[str, Path], family: str) -> None:
    """Of the language model by hand: 3 layers of 4 query heads and 2 key-value heads of 32, hidden 128, inner 256."""
    model = load_model(tiny_models[family], "float32")
    size = Size.of(model)
    projections = 128 * 128 * 2 + 128 * 64 * 2  # queries and output, keys and values
    biases = 0 if family == "qwen3-vl" else 128 + 64 * 2
    norms = 2 * 128 + (2 * 32 if family == "qwen3-vl" else 0)
    assert size.language == 3 * (projections + biases + norms + 3 * 128 * 256) + 128
    words = model.config.text_config.vocab_size
    assert (size.head, size.layers, size.width) == (128 * words, 3, 128)
    assert size.tower == sum(parameter.numel() for parameter in model.model.visual.parameters())
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert size.language + size.tower + words * 128 == everything


def test_adapters_do_not_count(tiny_models: dict[str, Path]) -> None:
    from tests.unit.models.passes import adapted

    plain = Size.of(load_model(tiny_models["qwen3-vl"], "float32"))
    model = adapted(load_model(tiny_models["qwen3-vl"], "float32"), "qwen3-vl")
    assert Size.of(model) == plain


def test_counts_by_hand(batch: Batch) -> None:
    assert counts_of([batch]) == {"image_tokens": 4, "text_tokens": 8, "sample_tokens": 8 + 7 + 4}
    assert counts_of([batch, batch]) == {"image_tokens": 8, "text_tokens": 16, "sample_tokens": 38}
    assert counts_of([]) == {"image_tokens": 0, "text_tokens": 0, "sample_tokens": 0}


# --- the meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    yield now


def test_rates_by_hand(clock: list[float]) -> None:
    meter = Meter(peak=1000.0)
    clock[0] += 2
    meter.add({"samples": 6.0, "flops": 4000.0})
    clock[0] += 2
    meter.add({"samples": 2.0, "flops": 2000.0})
    clock[0] += 6
    meter.leave_out(6.0)  # a validation
    rates = meter.read(devices=3)
    assert rates == {"samples_per_second": 8 / 4, "mfu": 6000 / 4 / (1000 * 3)}
    assert meter.seconds == 4


def test_each_reading_starts_anew(clock: list[float]) -> None:
    meter = Meter(peak=100.0)
    meter.add({"samples": 9.0, "flops": 50.0})
    clock[0] += 3
    meter.leave_out(1.0)
    assert meter.read(1)["samples_per_second"] == 4.5
    clock[0] += 5
    meter.add({"samples": 10.0, "flops": 250.0})
    assert meter.read(1) == {"samples_per_second": 2.0, "mfu": 0.5}
    assert meter.seconds == 7


def test_nothing_done_is_no_rate(clock: list[float]) -> None:
    meter = Meter(peak=100.0)
    clock[0] += 1
    assert meter.read(1) == {"mfu": 0.0}


# --- the device


def test_the_cpus_peak_is_measured() -> None:
    import torch

    peak = device_peak(torch.device("cpu"), "float32")
    assert 1e8 < peak < 1e15


@pytest.mark.parametrize(
    ("name", "peaks"),
    [
        ("NVIDIA H200", (989e12, 67e12)),
        ("NVIDIA H100 80GB HBM3", (989e12, 67e12)),
        ("NVIDIA H100 PCIe", (756e12, 51e12)),
        ("NVIDIA A100-SXM4-80GB", (312e12, 19.5e12)),
        ("NVIDIA A10", (125e12, 31.2e12)),
        ("NVIDIA L40S", (362e12, 91.6e12)),
        ("NVIDIA L4", (121e12, 30.3e12)),
    ],
)
def test_known_cards(monkeypatch: pytest.MonkeyPatch, name: str, peaks: tuple[float, float]) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    device = torch.device("cuda")
    assert (device_peak(device, "bfloat16"), device_peak(device, "float32")) == peaks


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA A10G"])
def test_a_card_is_not_taken_for_another(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Its name holds a known one's, its speed is another: it has to be measured."""
    import torch

    class MeasuredError(Exception):
        pass

    def measure(*_: Any, **__: Any) -> Any:
        raise MeasuredError

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch, "ones", measure)
    with pytest.raises(MeasuredError):
        device_peak(torch.device("cuda"), "bfloat16")


def test_the_peak_of_memory_grows_with_use() -> None:
    import psutil
    import torch

    device = torch.device("cpu")
    before = peak_memory(device)
    assert before > 10 << 20
    # more than was ever held at a time, so that the peak has to move
    block = np.ones(before - psutil.Process().memory_info().rss + (64 << 20), np.uint8)
    assert peak_memory(device) > before
    del block
    assert peak_memory(device) > before  # and stays
