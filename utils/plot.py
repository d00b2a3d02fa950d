"""Learning curves of many runs, with bands over seeds.

    python -m utils.plot "runs/*" --by width,method
    python -m utils.plot "runs/*" --by method --scalars "sparsity/*"

It writes a PNG and a PDF. Runs whose flags in `--by` agree are one line, the mean over them, with a band: the 95 %
bootstrap interval of that mean. Each environment has a row of panels, each logged scalar a panel. Every line is
a running mean over one twentieth of the run; with --evaluations, the returns are those of the evaluations.
"""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np

from utils.analysis.results import (
    RUNNING_FLAGS,
    LoggedRun,
    find_runs,
    flag_names,
    group_runs,
    mean_curve,
    save_figure,
    warn,
    warn_of_mixed_flags,
)
from utils.command_line import Positional
from utils.curves import WINDOW, evaluation_means, smooth_curve, styled
from utils.launch import run_command
from utils.records import read_scalars

POINTS = 100  # of a curve


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
    runs: Annotated[tuple[str, ...], Positional]
    """folders of runs, or patterns of them in quotes"""
    by: str = "method"
    """flags that tell runs apart, separated by commas; "script" is one too. Runs that agree in them are averaged"""
    scalars: tuple[str, ...] = ()
    """also draw these logged scalars; * matches anything"""
    out: Path = Path("curves")
    """path of the figure, which is written as a PNG and as a PDF"""
    evaluations: bool = False
    """draw the evaluations (--eval-every) instead of the training episodes"""


def label_of(names: Sequence[str], run: LoggedRun) -> str:
    """The run's values of these flags; of a dense run without its sparsity, which means nothing."""
    dense = run.args.get("method") == "dense"
    values = [(name, run.args.get(name)) for name in names if not (dense and name == "sparsity")]
    return ", ".join(str(value) if isinstance(value, str) else f"{name} {value}" for name, value in values) or "dense"


def figure_of(
    runs: Sequence[LoggedRun], by: Sequence[str], patterns: Sequence[str] = (), evaluations: bool = False
) -> plt.Figure:
    """Panels for each environment: the returns, then each scalar whose tag fits one of the patterns, in their order."""
    logged = {run.folder: read_scalars(run.folder) for run in runs} if patterns else {}
    all_tags = sorted({tag for scalars in logged.values() for tag in scalars})
    tags = []
    for pattern in patterns:
        found = fnmatch.filter(all_tags, pattern)
        tags += [tag for tag in found if tag not in tags]
        if not found:
            warn(f"--scalars: no run has logged {pattern}")
    environments: dict[tuple, list[LoggedRun]] = {}
    for run in sorted(runs, key=lambda run: (run.args["env_id"], run.offline)):
        environments.setdefault((run.args["env_id"], run.offline), []).append(run)
    columns = min(1 + len(tags), 3)
    rows = math.ceil((1 + len(tags)) / columns)  # of one environment
    width, height = (7, 4) if columns == 1 else (4.4, 3)
    size = (width * columns, height * rows * len(environments))
    figure, panels = plt.subplots(rows * len(environments), columns, figsize=size, squeeze=False)
    for row, ((env_id, offline), members) in zip(panels.reshape(len(environments), -1), environments.items()):
        groups: dict[str, list[LoggedRun]] = {}
        for group in group_runs(members, by).values():
            groups.setdefault(label_of(by, group[0]), []).extend(group)
        for label, group in groups.items():
            warn_of_mixed_flags(f"{env_id}: {label}", group, RUNNING_FLAGS | set(by))
        steps = max(run.total_steps for run in members)
        for axes, tag in zip(row, ["episodic return", *tags]):
            curves = {
                label: [series(run, tag, logged, evaluations) for run in group] for label, group in groups.items()
            }
            draw(axes, curves, steps)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.set(title=env_id, ylabel=tag, xlabel="updates" if offline else "agent steps")
        row[0].legend(fontsize="small", title=", ".join(by) + " (runs)", title_fontsize="small")
        for axes in row[1 + len(tags) :]:
            axes.remove()
    return figure


def series(run: LoggedRun, tag: str, logged: dict[Path, dict], evaluations: bool) -> np.ndarray:
    """Rows (n, 2) of step and value."""
    if tag != "episodic return":
        return logged[run.folder].get(tag, np.empty((0, 2)))
    return evaluation_means(run.evaluations) if evaluations or run.offline else run.returns()


@styled
def main(args: Args) -> None:
    """Draws the runs' curves to `args.out`.png and .pdf."""
    runs = find_runs(args.runs)
    by = flag_names(args.by, runs)
    if "script" not in by and len({run.args["script"] for run in runs}) > 1:
        by = ["script", *by]
    for run in runs:
        if not run.finished:
            returns = run.returns()
            last, unit = returns[-1, 0] if len(returns) else 0, "updates" if run.offline else "steps"
            warn(f"{run.folder} is not finished: {last:,.0f} of {run.total_steps:,} {unit}; drawn as far as it goes")
    figure = figure_of(runs, by, args.scalars, args.evaluations)
    save_figure(figure, args.out)
    plt.close(figure)


if __name__ == "__main__":
    run_command(main, Args)
