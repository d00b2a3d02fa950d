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
