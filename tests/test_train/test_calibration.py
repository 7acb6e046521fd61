from pathlib import Path

import pytest

from dflash_train.training.calibration import (
    Calibration,
    calibrate,
    read_calibration,
    steps_within,
    write_calibration,
)


def test_steps_and_validations_fit_into_the_minutes():
    for validate_every in (1, 7, 100):
        steps = steps_within(600.0, step_s=0.9, validation_s=5.0, validate_every=validate_every)

        def cost(steps: int, every: int = validate_every) -> float:
            return steps * 0.9 + 5.0 * -(-steps // every)

        assert cost(steps) <= 600.0 < cost(steps + 1)
    assert steps_within(1.0, step_s=3.0, validation_s=9.0, validate_every=5) == 1


def test_the_median_step_counts_and_warm_up_does_not():
    now = 0.0
    durations = iter([50.0, 40.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0])

    def step() -> None:
        nonlocal now
        now += next(durations)

    def validate() -> None:
        nonlocal now
        now += 10.0

    measured = calibrate(step, validate, minutes=2.0, validate_every=50, clock=lambda: now)
    assert measured == Calibration(
        minutes=2.0, seconds_per_step=1.0, validation_s=10.0, max_steps=100
    )


def test_a_stored_calibration_is_read_by_its_own_run_only(tmp_path: Path):
    measured = Calibration(minutes=1.0, seconds_per_step=0.5, validation_s=2.0, max_steps=90)
    write_calibration(tmp_path / "state", measured, key="sha256:1")
    assert read_calibration(tmp_path / "state", key="sha256:1") == measured
    assert read_calibration(tmp_path / "state", key="sha256:2") is None
    assert read_calibration(tmp_path / "other", key="sha256:1") is None
    (tmp_path / "state" / "calibration.json").write_text("{")
    with pytest.raises(ValueError, match=r"calibration\.json is damaged.*Delete it"):
        read_calibration(tmp_path / "state", key="sha256:1")
