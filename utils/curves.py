"""Learning curves: the picture that each run leaves, and the smoothing that all figures share."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from utils.records import read_episodes, read_evaluations, read_scalars

WINDOW = 0.05  # of the run's steps: returns are averaged over it
styled = plt.style.context(Path(__file__).with_name("style.mplstyle"))


def smooth_curve(step: np.ndarray, value: np.ndarray, grid: np.ndarray, window: float) -> np.ndarray:
    """Mean of the values in the `window` steps up to each point of `grid` (points,); of the latest one if it is empty.

    nan before the first value and beyond the last one: nothing is drawn where nothing was measured.

    Args:
        step, value: (n,), in the order of the steps.
    """
    if not len(step):
        return np.full(len(grid), np.nan)
    last = np.searchsorted(step, grid, side="right")
    first = np.minimum(np.searchsorted(step, grid - window, side="right"), np.maximum(last - 1, 0))
    total = np.concatenate([[0.0], np.cumsum(value)])
    with np.errstate(invalid="ignore"):
        curve = (total[last] - total[first]) / (last - first)
    spacing = grid[1] - grid[0] if len(grid) > 1 else 0.0
    return np.where(grid < step[-1] + spacing, curve, np.nan)


def evaluation_means(evaluations: np.ndarray) -> np.ndarray:
    """Rows (m, 2) of step and mean return of each evaluation, from rows (n, 4) of its episodes."""
    steps = np.unique(evaluations[:, 0])
    return np.array([(step, evaluations[evaluations[:, 0] == step, 2].mean()) for step in steps]).reshape(-1, 2)


@styled
def save_curve(folder: Path, title: str) -> None:
    """Draws `curve.png` of a run: its returns; of an offline run also Q of the data's and of the greedy actions."""
    episodes, evaluations, scalars = read_episodes(folder), read_evaluations(folder), read_scalars(folder)
    offline = not len(episodes)
    figure, panels = plt.subplots(1 + offline, 1, figsize=(7, 6 if offline else 4), sharex=True, squeeze=False)
    returns = panels[0, 0]
    dots = evaluations[:, [0, 2]] if offline else episodes[:, :2]
    returns.plot(*dots.T, ".", color="#56B4E9", markersize=3, alpha=0.5, label="episode")
    if not offline:
        grid = np.linspace(0, episodes[-1, 0], 201)[1:]
        curve = smooth_curve(*episodes[:, :2].T, grid, WINDOW * episodes[-1, 0])
        returns.plot(grid, curve, color="#0072B2", label=f"mean over {WINDOW:.0%} of the run")
    means = evaluation_means(evaluations)
    if offline or len(means) > 1:
        returns.plot(*means.T, ".-", color="#D55E00", label="mean of an evaluation")
    returns.set(title=title, ylabel="episodic return")
    if offline:
        for tag, label, color in (
            ("losses/policy_q_values", "policy: max Q(s, a)", "#D55E00"),
            ("losses/q_values", "data: Q(s, a)", "#009E73"),
        ):
            if tag in scalars:
                panels[1, 0].plot(*scalars[tag].T, color=color, linewidth=1, label=label)
        panels[1, 0].set(ylabel="Q")
    panels[-1, 0].set_xlabel("updates" if offline else "agent steps")
    panels[-1, 0].xaxis.set_major_formatter("{x:,.0f}")
    for axes in panels[:, 0]:
        if axes.lines:
            axes.legend()
    figure.savefig(folder / "curve.png")
    plt.close(figure)
