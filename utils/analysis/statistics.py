"""What several runs say together: point estimates of scores and their bootstrap intervals.

Definitions as in Agarwal et al. (2021), Deep RL at the edge of the statistical precipice (arXiv:2108.13264), and its
library rliable. Scores are a matrix (runs, tasks) as there, or, where the tasks have unequal numbers of runs, a list
with one array (runs,) for each task. Every function reduces the runs' axis and keeps those before it, so that it takes
all resamples of a bootstrap at once.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Scores = np.ndarray | Sequence[np.ndarray]


class Estimate(NamedTuple):
    """A statistic's value, and the lower and upper end of its interval."""

    value: float
    low: float
    high: float


def by_task(scores: Scores) -> list[np.ndarray]:
    """One array (..., runs) for each task.

    Raises:
        ValueError: there are no tasks, or a task has no runs.
    """
    tasks = list(scores.T) if isinstance(scores, np.ndarray) else [np.asarray(task, dtype=float) for task in scores]
    if not tasks or any(task.ndim == 0 or task.shape[-1] == 0 for task in tasks):
        raise ValueError("scores are a matrix (runs, tasks) or one array (runs,) for each task, none of them empty")
    return tasks


def mean(scores: Scores) -> np.ndarray:
    """Mean over tasks of the mean over runs."""
    return np.mean([task.mean(-1) for task in by_task(scores)], axis=0)


def iqm(scores: Scores) -> np.ndarray:
    """Interquartile mean: of the n scores of all runs and tasks, the mean without the floor(n / 4) at either end."""
    flat = np.sort(np.concatenate(by_task(scores), axis=-1))
    cut = flat.shape[-1] // 4
    return flat[..., cut : flat.shape[-1] - cut].mean(-1)


def probability_of_improvement(x: Scores, y: Scores) -> np.ndarray:
    """Mean over tasks of the probability that a run of `x` scores higher than one of `y`; a tie counts one half.

    Raises:
        ValueError: `x` and `y` have different numbers of tasks.
    """
    x, y = by_task(x), by_task(y)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} tasks against {len(y)}")
    pairs = [(a[..., :, None], b[..., None, :]) for a, b in zip(x, y)]
    return np.mean([((a > b) + 0.5 * (a == b)).mean((-2, -1)) for a, b in pairs], axis=0)


def bootstrap(
    statistic: Callable[..., np.ndarray],
    *scores: Scores,
    reps: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """`statistic(*scores)` with its stratified bootstrap interval: runs are resampled within each task, tasks stay.

    The interval is between percentiles, as rliable's default. With one run for each task it has no width.

    Args:
        statistic: one of the functions above, or any other that keeps leading axes.
        scores: as the statistic takes them; each is resampled on its own.
        reps: resamples.
        confidence: fraction of intervals that should contain the true value, in (0, 1).
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    groups = [by_task(group) for group in scores]
    resampled = []
    for done in range(0, reps, 500):  # in parts, to bound the memory
        part = min(500, reps - done)
        drawn = [[task[rng.integers(len(task), size=(part, len(task)))] for task in group] for group in groups]
        resampled.append(statistic(*drawn))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.concatenate(resampled), [tail, 100 - tail], axis=0)
    return Estimate(statistic(*groups), low, high)
