"""Statistics of runs against values computed by hand, SciPy, rliable, and the coverage that an interval promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, trim_mean

from utils.analysis.statistics import (
    bootstrap,
    by_task,
    iqm,
    mean,
    probability_of_improvement,
)

RUNS_BY_TASKS = np.array([[1.0, 10.0, 0.0], [3.0, 20.0, 0.5]])  # two runs of three tasks


def test_values_by_hand():
    assert mean(RUNS_BY_TASKS) == pytest.approx((2 + 15 + 0.25) / 3)
    # sorted: 0, 0.5, 1, 3, 10, 20; six scores lose one at either end
    assert iqm(RUNS_BY_TASKS) == pytest.approx((0.5 + 1 + 3 + 10) / 4)
    assert iqm([np.array([5.0, 1.0, 9.0])]) == 5  # three scores lose none
    assert iqm([np.array([5.0, 1.0, 9.0, 6.0])]) == 5.5  # four lose one at either end
    # task 1: of the pairs (1, 1), (1, 2), (3, 1), (3, 2) the first is a tie, the second is lost; task 2: always lost
    x, y = np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([[1.0, 5.0], [2.0, 6.0]])
    assert probability_of_improvement(x, y) == pytest.approx((2.5 / 4 + 0) / 2)


def test_tasks_with_unequal_numbers_of_runs():
    scores = [np.array([1.0, 2.0, 3.0]), np.array([10.0])]
    assert mean(scores) == 6
    assert iqm(scores) == 2.5
    assert bootstrap(mean, scores).high == pytest.approx((3 + 10) / 2, abs=0.5)


@settings(max_examples=50)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 10_000))
def test_iqm_and_improvement_as_in_scipy(runs, tasks, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, (2, runs, tasks)).astype(float)  # small whole numbers: many ties
    assert iqm(x) == pytest.approx(trim_mean(x, 0.25, axis=None))
    u = [mannwhitneyu(x[:, task], y[:, task]).statistic / runs**2 for task in range(tasks)]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(u))


@pytest.mark.parametrize("statistic", [mean, iqm])
def test_all_resamples_at_once_are_as_one_by_one(statistic):
    resamples = np.random.default_rng(1).normal(size=(7, 5, 3))  # (resamples, runs, tasks)
    at_once = statistic([resamples[:, :, task] for task in range(3)])
    np.testing.assert_allclose(at_once, [statistic(matrix) for matrix in resamples])


@pytest.mark.parametrize("statistic", [mean, iqm])
def test_an_interval_covers_as_often_as_it_says(statistic):
    rng = np.random.default_rng(3)
    centre = np.array([0.0, 1.0, 4.0])  # the tasks differ far more than the runs: only a stratified interval is tight
    truth = statistic(rng.normal(centre, 1, (40_000, 3)))
    covered, widths = 0, []
    for trial in range(300):
        estimate = bootstrap(statistic, rng.normal(centre, 1, (20, 3)), reps=400, confidence=0.9, seed=trial)
        covered += estimate.low <= truth <= estimate.high
        widths.append(estimate.high - estimate.low)
    assert 0.83 < covered / 300 < 0.95  # 0.9, less a little for 20 runs, four standard errors of 0.017 about it
    if statistic is mean:
        assert np.mean(widths) == pytest.approx(2 * 1.645 / np.sqrt(60), rel=0.1)


def test_the_interval_of_an_improvement_resamples_both_sides():
    x, y = np.random.default_rng(4).normal(size=(2, 200, 1))
    estimate = bootstrap(probability_of_improvement, x, y, reps=1_000)
    # the variance of Mann-Whitney's U / (n m) without a difference: (n + m + 1) / (12 n m)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * np.sqrt(401 / 12 / 200**2), rel=0.15)


def test_the_seed_decides():
    scores = np.random.default_rng(5).normal(size=(5, 2))
    assert bootstrap(iqm, scores, seed=1) == bootstrap(iqm, scores, seed=1) != bootstrap(iqm, scores, seed=2)


@pytest.mark.parametrize("scores", [[], [np.array([])], [np.array([1.0]), np.array([])], np.zeros((0, 2))])
def test_no_scores_are_an_error(scores):
    with pytest.raises(ValueError, match="none of them empty"):
        by_task(scores)


def test_unequal_tasks_are_not_compared():
    with pytest.raises(ValueError, match="3 tasks against 2"):
        probability_of_improvement(RUNS_BY_TASKS, RUNS_BY_TASKS[:, :2])


def test_as_in_rliable():
    """Values of rliable 1.2.0, which is not installed: it takes pandas, arch, seaborn and statsmodels along."""
    x = np.array([[1.71, 0.03, 0.25], [1.67, 1.33, 1.03], [0.95, 0.40, 0.51], [1.98, 0.82, 0.37]])
    y = np.array([[0.89, 0.17, 1.08], [1.88, 1.05, 1.56], [1.75, 0.70, 1.28], [0.39, 0.62, 1.11]])
    assert mean(x) == pytest.approx(0.9208333333)
    assert iqm(x) == pytest.approx(0.84)
    assert probability_of_improvement(x, y) == pytest.approx(0.375)
    estimate = bootstrap(iqm, x)
    assert (estimate.low, estimate.high) == pytest.approx((0.5517, 1.18), abs=0.02)  # there of 50,000 resamples
