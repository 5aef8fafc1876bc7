"""The times and waits of steps on a GPU, on a stand-in that counts seconds itself."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from benchmarks.step_meter import StepMeter
from tests.helpers.device import SYNC


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose `now` the test sets, and the sync debug modes that were set."""
    gpu = SimpleNamespace(now=0.0, modes=[])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = gpu.now

        def elapsed_time(self, later):
            return 1000 * (later.at - self.at)

    for name, stand_in in {
        "Event": Event, "synchronize": lambda: None, "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 3, "max_memory_allocated": lambda: 7, "set_sync_debug_mode": gpu.modes.append,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return gpu


def train(meter, gpu, seconds, stop=None):
    """Steps of so many seconds, with two waits each, of which number `stop` fails."""
    args, state = SimpleNamespace(device=torch.device("cuda")), SimpleNamespace(global_step=0, max_steps=len(seconds))
    for number, lasts in enumerate(seconds):
        meter.on_step_begin(args, state, None)
        for _ in range(2):
            warnings.warn(SYNC, stacklevel=1)
        if number == stop:
            return
        gpu.now += lasts
        state.global_step += 1
        meter.on_step_end(args, state, None)
    warnings.warn("of the log", stacklevel=1)


@pytest.mark.filterwarnings("ignore")
def test_steps_are_timed_from_the_third_on(gpu):
    meter = StepMeter()
    train(meter, gpu, [50.0, 9.0, 2.0, 3.0, 4.0])
    meter.close()
    assert meter.seconds == [2.0, 3.0, 4.0] and meter.waits == 2
    assert (meter.before, meter.peak) == (3, 7) and gpu.modes == ["warn", "default"]


@pytest.mark.parametrize(("stop", "modes"), [(1, []), (3, ["warn", "default"])])
def test_after_a_step_that_fails_warnings_are_as_before(gpu, stop, modes):
    meter = StepMeter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(meter, gpu, [1.0] * 5, stop=stop)
        meter.close()
        before = len(caught)
        warnings.warn("later", stacklevel=1)
    assert gpu.modes == modes and len(caught) == before + 1
