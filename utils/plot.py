"""Figures of a run."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def learning_curve(episodes: list[tuple[int, float, int]], title: str, path: Path) -> None:
    """Draws return against agent steps to a PNG: every episode as a dot, a running mean as a line.

    Args:
        episodes: (step, return, length) in the order in which they ended.
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if episodes:
        step, value, _ = np.array(episodes).T
        window = max(1, len(value) // 20)
        smooth = np.convolve(value, np.ones(window) / window, mode="valid")
        axes.plot(step, value, ".", color="#56B4E9", markersize=3, alpha=0.5, label="episode")
        axes.plot(step[window - 1 :], smooth, color="#0072B2", linewidth=2, label=f"mean of {window} episodes")
        axes.legend(frameon=False)
    axes.set(title=title, xlabel="agent steps", ylabel="episodic return")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def offline_curve(
    episodes: list[tuple[int, float, int]], q_history: list[tuple[int, float, float]], title: str, path: Path
) -> None:
    """Draws two panels against updates to a PNG: the evaluations' returns; Q of the data's and of the greedy actions.

    Args:
        episodes: (update, return, length) of the evaluations' episodes.
        q_history: (update, data Q, policy Q), of single mini-batches.
    """
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    update, value, _ = np.array(episodes).T
    evaluations = np.unique(update)
    means = [value[update == evaluation].mean() for evaluation in evaluations]
    top.plot(update, value, ".", color="#56B4E9", markersize=3, alpha=0.5, label="episode")
    top.plot(evaluations, means, ".-", color="#0072B2", linewidth=2, label="mean of an evaluation")
    top.set(title=title, ylabel="episodic return")
    if q_history:
        update, data_q, policy_q = np.array(q_history).T
        bottom.plot(update, policy_q, color="#D55E00", linewidth=1, label="policy: max Q(s, a)")
        bottom.plot(update, data_q, color="#009E73", linewidth=1, label="data: Q(s, a)")
    bottom.set(xlabel="updates", ylabel="Q")
    for axes in (top, bottom):
        if axes.lines:
            axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
