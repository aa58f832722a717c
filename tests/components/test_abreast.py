"""Coders that take their steps at the same time end with the bits that each has alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from components.sae.architectures import architectures
from components.sae.coder import Column
from components.training.abreast import Abreast
from components.training.job import Training
from components.training.settings import TrainingSettings
from components.training.step import CoderInTraining, new_coder, take_step

CPU = torch.device("cpu")
WIDTH, FEATURES, SIZE, STEPS = 128, 1_024, 1_024, 6
DATA = torch.randn(4 * SIZE, WIDTH, generator=torch.Generator().manual_seed(0)).split(SIZE)
HOW = TrainingSettings(
    batch_size=SIZE, tokens=100 * SIZE, learning_rate=1e-3, clip_gradient_norm=1e-2, dead_after_tokens=2 * SIZE
)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def coders(width: int = WIDTH, features: int = FEATURES) -> list[CoderInTraining]:
    column, found = (Column("x", width),), []
    for kind in architectures().values():
        options = {"k": 12} if "k" in kind.Settings.model_fields else {}
        job = Training(
            url="", digest="", identity={}, settings=HOW, coder=kind.Settings(d_sae=features, **options), dataset_url="",
            reads=("x",), writes=("x",), seed=len(found), metadata={},
        )  # fmt: skip
        found.append(new_coder(job, column, column, CPU))
    return found


def step(training: CoderInTraining) -> None:
    batch = DATA[training.step % len(DATA)]
    take_step(training, HOW, batch, batch, torch.zeros(WIDTH), measured=training.step == 3)


def test_at_once_as_alone(threads: int):
    alone, together = coders(), coders()
    for _ in range(STEPS):
        for training in alone:
            step(training)
    with Abreast([training.coder for training in together], CPU) as abreast:
        for _ in range(STEPS):
            for taken in abreast.each(step, together):
                taken()
    for one, other in zip(alone, together, strict=True):
        expected, found = one.tensors(), other.tensors()
        assert all(torch.equal(expected[name], found[name]) for name in expected), type(one.coder).__name__
        assert one.curves == other.curves
    assert torch.get_num_threads() == threads


def test_each_in_a_thread_of_its_own_with_the_threads_of_one_alone_and_what_one_raises_reaches_no_other():
    before, meeting = torch.get_num_threads(), threading.Barrier(2)

    def work(number: int) -> tuple[int, int]:
        meeting.wait(timeout=30)  # which nobody passes who is alone
        if number == 0:
            raise FloatingPointError("the first diverged")
        return number, torch.get_num_threads()

    torch.set_num_threads(2)
    try:
        with Abreast([one.coder for one in coders()[:2]], CPU) as abreast:
            first, second = abreast.each(work, [0, 1])
            with pytest.raises(FloatingPointError, match="the first"):
                first()
            assert second() == (1, 2)
    finally:
        torch.set_num_threads(before)


def test_large_ones_and_one_alone_have_all_threads_for_themselves():
    caller = threading.get_ident()
    large = coders(256, 4_096)[:2]
    for some in (large, coders()[:1]):
        with Abreast([one.coder for one in some], CPU) as abreast:
            assert [one() for one in abreast.each(lambda _: threading.get_ident(), some)] == [caller] * len(some)
