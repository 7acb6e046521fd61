import itertools
import time

import pytest
import torch

from dflash_train.training.step_timers import (
    BACKWARD,
    COMMUNICATION,
    DATA,
    FORWARD,
    OTHER,
    PHASES,
    StepTimers,
)


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> StepTimers:
    """Timers whose clock goes on by one second each time it is read."""
    seconds = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))
    return StepTimers(torch.device("cpu"))


def test_phases_and_the_rest_add_up_to_the_step(timers: StepTimers):
    with timers.step():
        with timers.phase(DATA):
            pass
        with timers.phase(FORWARD):
            pass
    found = timers.seconds()
    assert found == dict.fromkeys(PHASES, 0.0) | {DATA: 1, FORWARD: 1, OTHER: 3, "step": 5}


def test_an_inner_phase_takes_its_time_from_the_outer_one(timers: StepTimers):
    with timers.step(), timers.phase(BACKWARD), timers.phase(COMMUNICATION):
        pass
    found = timers.seconds()
    assert (found[BACKWARD], found[COMMUNICATION], found[OTHER], found["step"]) == (2, 1, 2, 5)


def test_seconds_are_means_over_the_steps_of_a_window(timers: StepTimers):
    for _ in range(3):
        with timers.step(), timers.phase(DATA):
            pass
    assert timers.seconds()[DATA] == 1
    timers.new_window()
    assert timers.seconds()["step"] == 0


def test_work_between_steps_is_not_measured(timers: StepTimers):
    with timers.phase(DATA):
        pass
    assert sum(timers.seconds().values()) == 0


def test_a_step_that_fails_leaves_the_timers_usable(timers: StepTimers):
    with pytest.raises(RuntimeError, match="broken"), timers.step(), timers.phase(DATA):
        raise RuntimeError("broken")
    timers.new_window()
    with timers.step():
        pass
    assert timers.seconds()["step"] == 1


@pytest.mark.gpu
def test_on_a_gpu_a_phase_holds_the_time_of_its_kernels():
    device = torch.device("cuda")
    timers = StepTimers(device)
    x = torch.randn(4096, 4096, device=device)
    for _ in range(3):
        timers.new_window()
        with timers.step():
            with timers.phase(FORWARD):
                for _ in range(20):
                    x.matmul(x)
            with timers.phase(DATA):
                pass
    found = timers.seconds()
    assert found[FORWARD] > 0.9 * found["step"]
    assert sum(found[name] for name in PHASES) == pytest.approx(found["step"], abs=1e-5)
