"""Micro-batches that are built ahead in a thread: in order, no more than asked for, and with their errors."""

import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from dstrain.data.rows.order import SampleOrder
from dstrain.data.rows.packing import PackedRows, TokenStream
from dstrain.engine.interface import MicroBatch
from dstrain.planning.batch import Batch
from dstrain.train import prefetch as prefetch_module
from dstrain.train.batches import TrainBatches
from dstrain.train.prefetch import Prefetch
from dstrain.train.validation import Validation

CPU = torch.device("cpu")


@contextmanager
def told(seen):
    seen.append("begin")
    yield
    seen.append("end")


def prefetch(build, first=1, last=10, **choices):
    choices = {"device": CPU, "late": lambda: told([]), **choices}
    return Prefetch(build, first, last, **choices)


def wait_until(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def packed_rows():
    tokens = np.arange(4000, dtype=np.uint16)
    lengths = np.full(40, 100, np.int64)
    return PackedRows(TokenStream(tokens, np.cumsum(lengths) - lengths, lengths), 16)


def test_the_steps_are_those_that_are_built_between_steps():
    rows = packed_rows()
    order = SampleOrder(len(rows), 8, seed=3)
    batches = TrainBatches(rows, Batch(8, 2, 2, 2, 16), order=order, replica=1)
    with prefetch(batches.micro_batches, 4, 30) as ahead:
        for step in range(4, 31):
            for found, expected in zip(ahead.take(step), batches.micro_batches(step), strict=True):
                for name in ("input_ids", "position_ids", "labels", "weight"):
                    assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_no_more_is_built_than_is_said(ahead):
    built = []
    with prefetch(lambda step: built.append(step) or [], ahead=ahead, last=20) as steps:
        time.sleep(0.01)
        assert built == [], "nothing before the first step"
        for step in range(1, 11):
            steps.take(step)
            wait_until(lambda: len(built) >= step + ahead)  # noqa: B023 - it is called here
            time.sleep(0.002)
            assert built == list(range(1, step + ahead + 1))


def test_it_ends_at_the_last_step():
    with prefetch(lambda step: [], 8, 10) as steps:
        for step in (8, 9, 10):
            steps.take(step)
        wait_until(lambda: not steps._thread.is_alive())
        with pytest.raises(ValueError, match="no step to take"):
            steps.take(11)


def test_steps_are_taken_in_their_order():
    with prefetch(lambda step: []) as steps:
        steps.take(1)
        for step in (1, 3):
            with pytest.raises(ValueError, match=f"step {step} is no step to take after step 1"):
                steps.take(step)


def test_an_error_comes_at_its_step_and_again():
    def build(step):
        if step == 3:
            raise OSError("no such disk")
        return [step]

    with prefetch(build) as steps:
        steps.take(1)
        wait_until(lambda: steps._error is not None)
        assert steps.take(2) == [2], "what was built before it is taken first"
        for _ in range(2):
            with pytest.raises(OSError, match="no such disk"):
                steps.take(3)


def test_a_step_that_waits_long_is_told_of(monkeypatch):
    monkeypatch.setattr(prefetch_module, "_LATE", 0.02)
    seen, there = [], threading.Event()

    def build(step):
        assert step == 1 or there.wait(20)
        return [step]

    with prefetch(build, late=lambda: told(seen)) as steps:
        steps.take(1)
        assert seen == []
        threading.Timer(0.1, there.set).start()
        assert steps.take(2) == [2]
        assert seen == ["begin", "end"]


def test_it_ends_while_it_builds_or_waits(monkeypatch):
    monkeypatch.setattr(prefetch_module, "_LATE", 0.05)
    there = threading.Event()
    with prefetch(lambda step: there.wait(20)) as stuck:
        threading.Thread(target=lambda: stuck.take(1), daemon=True).start()
        wait_until(stuck._thread.is_alive)
    there.set()
    wait_until(lambda: not stuck._thread.is_alive())
    with prefetch(lambda step: []) as full:
        full.take(1)
        wait_until(lambda: len(full._ready) == 2)
    assert not full._thread.is_alive()
    with prefetch(lambda step: []) as unused:
        pass
    assert not unused._thread.is_alive()


def test_an_error_of_the_training_goes_its_way():
    with pytest.raises(KeyError), prefetch(lambda step: []) as steps:
        steps.take(1)
        raise KeyError("training")
    assert not steps._thread.is_alive()


def test_for_a_gpu_they_lie_in_pinned_memory_of_its_device(monkeypatch):
    """There is none here: what is asked of torch is noted."""
    asked = []

    class Accelerator:
        def set_device(self, index):
            asked.append((threading.current_thread().name, index))

    def pin(tensor):
        asked.append("pin")
        return tensor + 0

    monkeypatch.setattr(prefetch_module, "get_accelerator", Accelerator)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    one = MicroBatch(*(torch.full((2, 3), number) for number in range(3)), torch.ones(1))
    with prefetch(lambda step: [one], last=1, device=torch.device("cuda", 5)) as steps:
        [found] = steps.take(1)
    assert asked == [("prefetch", 5), *["pin"] * 4]
    assert found is not one and torch.equal(found.labels, one.labels)


def test_validation_samples_are_pinned_once_for_a_gpu(monkeypatch):
    class Sets:
        name, rows = "", packed_rows()

    class Engine:
        fewest_micro_batches = 1

        def eval_loss(self, micro_batches):
            self.given = micro_batches
            return 1.0

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor + 0)
    batch = Batch(4, 2, 2, 1, 16)
    for device, number in (("cpu", 0), ("cuda", 2 * 5)):
        engine = Engine()
        validation = Validation([Sets], engine, batch, samples=4, replica=0, device=torch.device(device))
        for _ in range(2):
            validation.losses()
        assert len(pinned) == number, "four tensors and where documents lie, of two micro-batches, once"
        assert len(engine.given) == 2 and engine.given[0].documents.edges.dtype == torch.int32
