"""Figures of runs: the curve that each run leaves, and a command that draws many.

    python -m utils.plot "runs/*" --by width,method
    python -m utils.plot "runs/*" --by method --scalars "sparsity/*"

It writes a PNG and a PDF. Runs whose flags in `--by` agree are one line, the mean over them, with a band: the 95 %
bootstrap interval of that mean. Each environment has a row of panels, each logged scalar a panel. Every line is
a running mean over one twentieth of the run.
"""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

from utils.results import LoggedRun, fail, find_runs, group_runs, mean_curve, read_scalars, save_figure, warn

POINTS = 100  # of a curve
WINDOW = 0.05  # share of the run over which returns are averaged
styled = plt.style.context(Path(__file__).with_name("style.mplstyle"))


@styled
def learning_curve(episodes: list[tuple[int, float, int]], title: str, path: Path) -> None:
    """Draws return against agent steps to a PNG: every episode as a dot, a running mean as a line.

    Args:
        episodes: (step, return, length) in the order in which they ended.
    """
    figure, axes = plt.subplots(figsize=(7, 4))
    if episodes:
        step, value, _ = np.array(episodes).T
        window = max(1, len(value) // 20)
        smooth = np.convolve(value, np.ones(window) / window, mode="valid")
        axes.plot(step, value, ".", color="#56B4E9", markersize=3, alpha=0.5, label="episode")
        axes.plot(step[window - 1 :], smooth, color="#0072B2", label=f"mean of {window} episodes")
        axes.legend()
    axes.set(title=title, xlabel="agent steps", ylabel="episodic return")
    figure.savefig(path)
    plt.close(figure)


@styled
def offline_curve(
    episodes: list[tuple[int, float, int]], q_history: list[tuple[int, float, float]], title: str, path: Path
) -> None:
    """Draws two panels against updates to a PNG: the evaluations' returns; Q of the data's and of the greedy actions.

    Args:
        episodes: (update, return, length) of the evaluations' episodes.
        q_history: (update, data Q, policy Q), of single mini-batches.
    """
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True)
    update, value, _ = np.array(episodes).T
    evaluations = np.unique(update)
    means = [value[update == evaluation].mean() for evaluation in evaluations]
    top.plot(update, value, ".", color="#56B4E9", markersize=3, alpha=0.5, label="episode")
    top.plot(evaluations, means, ".-", color="#0072B2", label="mean of an evaluation")
    top.set(title=title, ylabel="episodic return")
    if q_history:
        update, data_q, policy_q = np.array(q_history).T
        bottom.plot(update, policy_q, color="#D55E00", linewidth=1, label="policy: max Q(s, a)")
        bottom.plot(update, data_q, color="#009E73", linewidth=1, label="data: Q(s, a)")
    bottom.set(xlabel="updates", ylabel="Q")
    for axes in (top, bottom):
        if axes.lines:
            axes.legend()
    figure.savefig(path)
    plt.close(figure)


def smooth_curve(step: np.ndarray, value: np.ndarray, grid: np.ndarray, window: float) -> np.ndarray:
    """Mean of the values in the `window` steps up to each point of `grid` (points,); of the latest one if it is empty.

    nan before the first value, and a window or more after the last one: nothing is drawn beyond what was measured.

    Args:
        step, value: (n,), in the order of the steps.
    """
    last = np.searchsorted(step, grid, side="right")
    first = np.minimum(np.searchsorted(step, grid - window, side="right"), np.maximum(last - 1, 0))
    total = np.concatenate([[0.0], np.cumsum(value)])
    with np.errstate(invalid="ignore"):
        curve = (total[last] - total[first]) / (last - first)
    return np.where(grid < step[-1] + window, curve, np.nan) if len(step) else np.full(len(grid), np.nan)


def draw(axes: plt.Axes, groups: dict[str, list[np.ndarray]], steps: float) -> None:
    """One line with a band for each group of series; a series has rows (n, 2) of step and value."""
    grid = np.linspace(0, steps, POINTS + 1)[1:]
    for number, (label, series) in enumerate(groups.items()):
        curves = np.stack([smooth_curve(*rows.T, grid, WINDOW * steps) for rows in series])
        middle, low, high = mean_curve(curves)
        style = ("-", "--", ":", "-.")[number // 7 % 4]  # the colours repeat after seven
        (line,) = axes.plot(grid, middle, style, label=f"{label} ({len(series)})")
        axes.fill_between(grid, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """folders of runs, or patterns of them in quotes"""
    by: str = "method"
    """flags by which runs are told apart, with commas, and "script"; the others are averaged over"""
    scalars: tuple[str, ...] = ()
    """also draw these TensorBoard scalars; * stands for anything"""
    out: Path = Path("curves")
    """where to write, without .png and .pdf"""


def label_of(names: Sequence[str], values: Sequence[object]) -> str:
    return ", ".join(str(value) if isinstance(value, str) else f"{name} {value}" for name, value in zip(names, values))


def figure_of(runs: Sequence[LoggedRun], by: Sequence[str], patterns: Sequence[str] = ()) -> plt.Figure:
    """Panels for each environment: the returns, then each scalar whose tag fits one of the patterns, in their order."""
    logged = {run.folder: read_scalars(run.folder) for run in runs} if patterns else {}
    all_tags = sorted({tag for scalars in logged.values() for tag in scalars})
    tags = []
    for pattern in patterns:
        found = fnmatch.filter(all_tags, pattern)
        tags += [tag for tag in found if tag not in tags]
        if not found:
            warn(f"--scalars: no run has logged {pattern}")
    environments = group_runs(runs, ["env_id"])
    columns = min(1 + len(tags), 3)
    rows = math.ceil((1 + len(tags)) / columns)  # of one environment
    width, height = (7, 4) if columns == 1 else (4.4, 3)
    size = (width * columns, height * rows * len(environments))
    figure, panels = plt.subplots(rows * len(environments), columns, figsize=size, squeeze=False)
    for row, ((env_id,), members) in zip(panels.reshape(len(environments), -1), environments.items()):
        groups = {label_of(by, values): group for values, group in group_runs(members, by).items()}
        steps = max(run.total_steps for run in members)
        for axes, tag in zip(row, ["episodic return", *tags]):
            draw(axes, {label: [series(run, tag, logged) for run in group] for label, group in groups.items()}, steps)
            axes.set(title=env_id, ylabel=tag)
            kinds = {"updates" if "total_updates" in run.args else "agent steps" for run in members}
            axes.set_xlabel(" or ".join(sorted(kinds)))
        row[0].legend(fontsize="small", title=", ".join(by) + " (runs)", title_fontsize="small")
        for axes in row[1 + len(tags) :]:
            axes.remove()
    return figure


def series(run: LoggedRun, tag: str, logged: dict[Path, dict]) -> np.ndarray:
    return run.episodes[:, :2] if tag == "episodic return" else logged[run.folder].get(tag, np.empty((0, 2)))


@styled
def main(args: Args) -> None:
    """Draws the runs' curves to `args.out`.png and .pdf."""
    runs = find_runs(args.runs)
    by = [name.strip().replace("-", "_") for name in args.by.split(",")]
    for name in by:
        if all(name not in run.args for run in runs):
            fail(f"--by: got {name}, takes names of flags, such as width,method,seed")
    if "script" not in by and len({run.args["script"] for run in runs}) > 1:
        by = ["script", *by]  # their steps and returns are not of one kind
    for run in runs:
        if not run.finished:
            last = run.episodes[-1, 0] if len(run.episodes) else 0
            warn(f"{run.folder} is not finished: step {last:,.0f} of {run.total_steps:,}; drawn as far as it goes")
    figure = figure_of(runs, by, args.scalars)
    save_figure(figure, args.out)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Args))
