"""`launch.compile=true` through a whole run on a CPU, with the C++ compiler that is there."""

from pathlib import Path

import pytest
from torch._dynamo.utils import counters

from dflash_inference.fast_mode import missing_compiler
from dflash_train.config import LaunchConfig
from dflash_train.testing import tiny_target
from tests.test_train.launched_runs import Run, fit, losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_compiler() is not None, reason=f"needs {missing_compiler()}"),
]


def test_a_compiled_run_has_the_losses_of_the_plain_one(tmp_path: Path, answer_rows, write_split):
    rows = answer_rows(tiny_target(), [5, 9, 7, 12, 6, 8, 10])
    write_split(tmp_path / "uneven", rows)
    fit(tmp_path, Run(max_steps=20), "plain")
    before = counters["frames"]["ok"]
    launch = LaunchConfig(num_threads=1, compile=True)
    fit(tmp_path, Run(max_steps=20, launch=launch), "compiled")
    assert counters["frames"]["ok"] > before, "nothing was compiled"
    want = losses(tmp_path, "plain")
    assert len(want) == 20
    assert losses(tmp_path, "compiled") == pytest.approx(want, rel=1e-9)
