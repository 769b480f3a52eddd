"""The statistics of benchmark/tamiyo.py, through which every claim of its table goes."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmark"))
import tamiyo as experiment


def test_rows_are_paired_over_hosts_images_and_controllers():
    rng = np.random.default_rng(0)
    row = rng.normal(size=(5, 30, 7))
    one, other = (experiment.resampled(stack, 50, number=3) for stack in (row, row + 2))
    np.testing.assert_allclose(other - one, 2)
    hosts = rng.normal(size=(1, 30, 1))  # the same in both rows, whose controllers are drawn apart
    one, other = (
        experiment.resampled(hosts + effects[:, None, None], 50, number)
        for number, effects in enumerate((np.zeros(5), np.full(5, 2.0)))
    )
    np.testing.assert_allclose(other - one, 2)


def test_the_bootstrap_of_few_controllers_varies_as_their_mean_does():
    effects = np.random.default_rng(1).normal(size=5)
    drawn = experiment.resampled(np.tile(effects[:, None, None], (1, 30, 1)), 20_000, number=0)
    assert drawn.std() == pytest.approx(effects.std(ddof=1) / 5**0.5, rel=0.03)


def test_intervals_of_few_controllers_are_student_s():
    effects = np.random.default_rng(1).normal(size=5)
    standard_error = effects.std(ddof=1) / 5**0.5
    drawn = np.random.default_rng(2).normal(size=100_000) * standard_error
    text = experiment.beyond(1.0, drawn, [effects, np.zeros(1)], digits=4)
    half = t.ppf(0.975, 4) * standard_error
    low, high = (float(x) for x in text[len("+1.0000 (") : -1].split(" to "))
    assert (low, high) == pytest.approx((1 - half, 1 + half), abs=0.02)
    assert experiment.beyond(1.0, drawn / drawn.std(), [np.zeros(1)], digits=2) == "+1.00 (-0.96 to +2.96)"
