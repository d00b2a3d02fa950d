"""Published results: small per-seed data of finished runs, and the figures and tables that are made from it.

    python benchmarks/evidence.py collect "sweeps/asterix/*/*/*" --out results/asterix.csv
    python benchmarks/evidence.py draw                 # all figures of docs/evidence.md again, tables to stdout

A row of the csv file is a fiftieth of a run: the mean return of the training episodes that ended in it, or of the
evaluations of an offline run. The last row of a run also has the mean return of its final evaluation, and of a run with
`--diagnostics-every` the means of some of the diagnostics over the last fifth of training. A run's score is its mean
return over the last tenth of training.
"""

import argparse
import csv
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.analysis.results import LoggedRun, find_runs, warn  # noqa: E402
from utils.analysis.statistics import Estimate, bootstrap, mean  # noqa: E402
from utils.compare import OTHER, STYLES, sparsities_of  # noqa: E402
from utils.curves import styled  # noqa: E402
from utils.flags import fail  # noqa: E402
from utils.records import read_scalars  # noqa: E402

STRETCHES = 50  # of a run
DIAGNOSTICS = {  # logged tag, and what a table calls it
    "diagnostics/head.dense/dormant_0.025": "dormant units",
    "diagnostics/srank": "effective rank",
    "diagnostics/weight_norm": "weight norm",
    "diagnostics/target_variance": "target variance",
    "diagnostics/gradient_cosine": "gradient cosine",
}
LEARNING_RATES = {  # files of results/ that differ in their learning rate alone
    "DQN on MinAtar Asterix": {2.8e-5: "asterix_lr9", 8.3e-5: "asterix_lr", 2.5e-4: "asterix"},
    "DQN on MinAtar Breakout": {8.3e-5: "breakout_lr", 2.5e-4: "breakout", 7.5e-4: "breakout_lr3"},
    "Rainbow on MinAtar Asterix": {1e-4: "rainbow_asterix", 3e-4: "rainbow_asterix_lr"},
    "IQN on MinAtar Asterix": {1e-4: "iqn_asterix", 3e-4: "iqn_asterix_lr"},
}
LEARNING_RATE_PANELS = (  # a key of `LEARNING_RATES`, and whether its networks have biases
    ("DQN on MinAtar Asterix", True),
    ("DQN on MinAtar Asterix", False),
    ("DQN on MinAtar Breakout", True),
    ("Rainbow on MinAtar Asterix", True),
    ("IQN on MinAtar Asterix", True),
)
KEY = ("script", "env_id", "method", "sparsity", "width", "bias", "seed")  # what tells a run from others
COLUMNS = (*KEY, "step", "return", "evaluation", *DIAGNOSTICS)


class Cell(NamedTuple):
    """What runs that differ in their seeds alone have in common."""

    method: str
    sparsity: float
    width: int
    bias: bool

    @property
    def name(self) -> str:
        name = "dense" if self.method == "dense" else f"{self.method} {self.sparsity:g}"
        return name if self.bias else f"{name} without biases"


class Curve(NamedTuple):
    """One run: mean returns (n,) at the ends of its stretches (n,), that of its final evaluation, and its diagnostics
    (len(DIAGNOSTICS),); what was not logged is nan."""

    step: np.ndarray
    value: np.ndarray
    evaluation: float
    diagnostics: np.ndarray

    @property
    def score(self) -> float:
        """Mean return in the last tenth of training."""
        return float(self.value[self.step > 0.9 * self.step[-1]].mean())


# ---- Collecting ------------------------------------------------------------------------------------------------------


def rows_of(run: LoggedRun, steps: int) -> list[list]:
    """The rows of the first steps of one run; a stretch in which no episode ended has no row."""
    args, rows = run.args, []
    sparsities = sparsities_of(args)
    if len(sparsities) > 1:
        fail(f"{run.folder}: its networks differ in their sparsity {sparsities}, for which there is no column")
    key = (
        args["script"],
        args["env_id"],
        args["method"],
        sparsities[0],
        args["width"],
        int(args.get("bias", True)),
        args["seed"],
    )
    returns, ends = run.returns(), np.linspace(0, steps, STRETCHES + 1)
    for begin, end in itertools.pairwise(ends):
        inside = returns[(returns[:, 0] > begin) & (returns[:, 0] <= end), 1]
        if len(inside):
            rows.append([*key, int(end), f"{inside.mean():.4g}"] + [""] * (1 + len(DIAGNOSTICS)))
    evaluations = run.evaluations
    if rows and len(evaluations) and steps == run.total_steps:
        final = evaluations[evaluations[:, 0] == evaluations[-1, 0], 2].mean()
        rows[-1][COLUMNS.index("evaluation") :] = [f"{final:.4g}", *diagnostics_of(run)]
    return rows


def diagnostics_of(run: LoggedRun) -> list[str]:
    """The mean of each of `DIAGNOSTICS` over the last fifth of training; empty if it was not logged."""
    logged = read_scalars(run.folder)
    last = {tag: logged[tag][logged[tag][:, 0] > 0.8 * run.total_steps, 1] for tag in DIAGNOSTICS if tag in logged}
    return [f"{last[tag].mean():.4g}" if tag in last else "" for tag in DIAGNOSTICS]


def collect(patterns: list[str], out: Path, steps: int | None) -> None:
    """Adds the runs to `out`; a run that is there already, with the same flags and seed, is replaced.

    Args:
        steps: of each run take these first ones only; None takes whole runs.
    """
    collected: dict[tuple, list] = {}
    if out.exists():
        with out.open() as file:
            for row in csv.DictReader(file):
                row = [row.get(column, "") for column in COLUMNS]  # files may be older than a column
                collected.setdefault(identity(row), []).append(row)
    new: dict[tuple, LoggedRun] = {}
    for run in find_runs(patterns):
        if run.finished or (steps and len(run.episodes) and run.episodes[-1, 0] >= steps):
            if rows := rows_of(run, steps or run.total_steps):
                key = identity(rows[0])
                if key in new:
                    fail(f"{new[key].folder} and {run.folder} differ in flags that have no column: give each a file")
                collected[key], new[key] = rows, run
        else:
            warn(f"{run.folder} has not come so far; left out")
    rows = [row for key in sorted(collected) for row in collected[key]]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    print(f"wrote {out}: {len(collected)} runs, {len(rows)} rows")


def identity(row: list) -> tuple:
    """The values of `KEY`, with numbers as such: 0.90 is 0.9."""
    script, env_id, method, *numbers = row[: len(KEY)]
    return script, env_id, method, *map(float, numbers)


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[tuple[str, str], dict[Cell, dict[int, Curve]]]:
    """For each script and environment, the curves of each cell by seed."""
    points = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            cell = Cell(row["method"], float(row["sparsity"]), int(row["width"]), row["bias"] == "1")
            last = [float(row.get(column) or "nan") for column in ("evaluation", *DIAGNOSTICS)]
            value = (int(row["step"]), float(row["return"]), *last)
            points[(row["script"], row["env_id"]), cell, int(row["seed"])].append(value)
    tasks: dict = {}
    for (task, cell, seed), rows in points.items():
        step, value, evaluation, *diagnostics = np.array(rows).T
        curve = Curve(step, value, evaluation[-1], np.array([column[-1] for column in diagnostics]))
        tasks.setdefault(task, {}).setdefault(cell, {})[seed] = curve
    return tasks


def table(cells: dict[Cell, dict[int, Curve]]) -> str:
    """Markdown: the score of each cell with the 95 % bootstrap interval of its mean, and of each run."""
    lines = [
        "| method | width | runs | score [95 % interval] | each run | final evaluation |",
        "|---|--:|--:|--:|---|--:|",
    ]
    for cell in in_order(cells):
        curves = [cells[cell][seed] for seed in sorted(cells[cell])]
        scores = [curve.score for curve in curves]
        estimate = interval(cells[cell])
        shown = f"{estimate.value:.4g}"
        if len(scores) > 1:
            shown += f" [{estimate.low:.4g}, {estimate.high:.4g}]"
        each = ", ".join(f"{score:.4g}" for score in scores)
        evaluation = np.mean([curve.evaluation for curve in curves])
        evaluation = "" if np.isnan(evaluation) else f"{evaluation:.4g}"
        lines.append(f"| {cell.name} | {cell.width} | {len(scores)} | {shown} | {each} | {evaluation} |")
    return "\n".join(lines)


def diagnostics_table(cells: dict[Cell, dict[int, Curve]]) -> str:
    """Markdown: the mean of each diagnostic over the runs of a cell, and their range; empty if none were logged."""
    lines = [
        f"| method | width | runs | {' | '.join(DIAGNOSTICS.values())} |",
        f"|---|--:|--:|{'--:|' * len(DIAGNOSTICS)}",
    ]
    for cell in in_order(cells):
        values = np.array([curve.diagnostics for curve in cells[cell].values()])  # (runs, diagnostics)
        values = values[~np.isnan(values).all(1)]
        if len(values):
            shown = (f"{column.mean():.3g} ({column.min():.3g} to {column.max():.3g})" for column in values.T)
            lines.append(f"| {cell.name} | {cell.width} | {len(values)} | {' | '.join(shown)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def read_learning_rates(task: str) -> dict[float, dict[Cell, dict[int, Curve]]]:
    """The cells of each learning rate of a task of `LEARNING_RATES`."""
    rates = {}
    for rate, name in LEARNING_RATES[task].items():
        (rates[rate],) = read(ROOT / "results" / f"{name}.csv").values()
    return rates


def learning_rates_table(rates: dict[float, dict[Cell, dict[int, Curve]]]) -> str:
    """Markdown: the score of each cell with each learning rate; the best in bold, if there are several."""
    lines = [f"| method | width | {' | '.join(map(scientific, rates))} |", f"|---|--:|{'--:|' * len(rates)}"]
    for cell in in_order({cell for cells in rates.values() for cell in cells}):
        measured = {rate: interval(cells[cell]) for rate, cells in rates.items() if cell in cells}
        shown = dict.fromkeys(rates, "")
        for rate, estimate in measured.items():
            several = len(rates[rate][cell]) > 1
            spread = f"[{estimate.low:.1f}, {estimate.high:.1f}]" if several else "(one run)"
            shown[rate] = f"{estimate.value:.1f} {spread}"
        if len(measured) > 1:
            best = max(measured, key=lambda rate: measured[rate].value)
            shown[best] = f"**{shown[best]}**"
        lines.append(f"| {cell.name} | {cell.width} | {' | '.join(shown.values())} |")
    return "\n".join(lines)


def scientific(rate: float) -> str:
    return f"{rate:.1e}".replace("e-0", "e-")


def in_order(cells: Iterable[Cell]) -> list[Cell]:
    """Methods as in `STYLES` and a fork's after them; then by sparsity, biases and width."""
    place = {cell: [*STYLES, cell.method].index(cell.method) for cell in cells}
    return sorted(cells, key=lambda cell: (place[cell], cell.method, cell.sparsity, not cell.bias, cell.width))


def shade(color: str, place: int, number: int) -> tuple[float, ...]:
    """The colour of one of `number` sparsities of a method: lighter for the first, darker for the last."""
    rgb = np.array(to_rgb(color))
    tint = 0.0 if number == 1 else 0.45 - 0.9 * place / (number - 1)
    return tuple(rgb + tint * (1 - rgb) if tint > 0 else rgb * (1 + tint))


def interval(curves: dict[int, Curve]) -> Estimate:
    """The mean score of runs, and its 95 % bootstrap interval."""
    return bootstrap(mean, [np.array([curves[seed].score for seed in sorted(curves)])])


def mean_scores(groups: list[dict[int, Curve]]) -> tuple[np.ndarray, np.ndarray]:
    """The mean score (n,) of each group of runs, and how far its interval reaches below and above (2, n)."""
    value, low, high = np.array([interval(curves) for curves in groups]).T
    return value, np.maximum([value - low, high - value], 0)


@styled
def draw(tasks: dict, out: Path) -> None:
    """A row of panels for each task: score against width with a dot for each run, and learning curves.

    Colours are methods, their shades sparsities; dashes and hollow markers mean no biases; wide networks have thick
    curves. One legend serves both panels.
    """
    figure, panels = plt.subplots(len(tasks), 2, figsize=(13, 4 * len(tasks)), squeeze=False)
    for (left, right), ((script, env_id), cells) in zip(panels, tasks.items()):
        widths = sorted({cell.width for cell in cells})
        thickness = dict(zip(widths, np.linspace(0.8, 2.4, len(widths))))
        lines = list(dict.fromkeys(cell._replace(width=0) for cell in in_order(cells)))
        for line in lines:
            color, marker = STYLES.get(line.method, OTHER)
            sparsities = sorted({other.sparsity for other in lines if other.method == line.method})
            color = shade(color, sparsities.index(line.sparsity), len(sparsities))
            style, fill = ("-", "full") if line.bias else ("--", "none")
            own = [cell for cell in in_order(cells) if cell._replace(width=0) == line]
            places = []
            for cell in own:
                scores = np.array([curve.score for curve in cells[cell].values()])
                # Side by side with the other lines that have this width
                beside = [other for other in lines if other._replace(width=cell.width) in cells]
                places.append(widths.index(cell.width) + 0.06 * (beside.index(line) - (len(beside) - 1) / 2))
                left.plot([places[-1]] * len(scores), scores, ".", color=color, alpha=0.4, markersize=5)
                step = next(iter(cells[cell].values())).step
                curves = np.array([np.interp(step, c.step, c.value) for c in cells[cell].values()])
                right.plot(step, curves.mean(0), style, color=color, linewidth=thickness[cell.width])
            value, error = mean_scores([cells[cell] for cell in own])
            looks = {"color": color, "marker": marker, "fillstyle": fill, "linestyle": style}
            left.errorbar(places, value, error, capsize=3, label=line.name, **looks)
        left.set_xticks(range(len(widths)), [str(width) for width in widths])
        left.set_xlim(-0.5, len(widths) - 0.5)
        left.set(title=f"{script} on {env_id}", xlabel="width", ylabel="return, last tenth of training")
        steps = "updates" if script == "cql_pruned" else "agent steps"
        right.set(title="mean over the runs", xlabel=steps, ylabel="return")
        right.xaxis.set_major_formatter("{x:,.0f}")
        handles, _ = left.get_legend_handles_labels()
        for width in widths:
            handles.append(Line2D([], [], color="gray", linewidth=thickness[width], label=f"width {width}"))
        right.legend(handles=handles, fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(out)
    plt.close(figure)
    print(f"wrote {out}")


@styled
def draw_learning_rates(out: Path) -> None:
    """The panels of `LEARNING_RATE_PANELS`: score against learning rate of dense networks and of those pruned to 90 %;
    wide networks have thick lines."""
    figure, panels = plt.subplots(2, 3, figsize=(14, 8), sharey=True)
    for panel, (task, bias) in zip(panels.flat, LEARNING_RATE_PANELS):
        rates = read_learning_rates(task)
        for method, sparsity, width in (("dense", 0.0, 1), ("dense", 0.0, 3), ("gmp", 0.9, 1), ("gmp", 0.9, 3)):
            cell = Cell(method, sparsity, width, bias)
            measured = {rate: cells[cell] for rate, cells in rates.items() if cell in cells}
            value, error = mean_scores(list(measured.values()))
            color, marker = STYLES[method]
            looks = {"color": color, "marker": marker, "linestyle": "-", "linewidth": 0.8 * width}
            name = cell._replace(bias=True).name  # the title says which have biases
            panel.errorbar(list(measured), value, error, capsize=3, label=f"{name}, width {width}", **looks)
        panel.set(title=task if bias else f"{task}, without biases", xlabel="learning rate", xscale="log")
        panel.set_xticks(list(rates), map(scientific, rates))
        panel.minorticks_off()
        panel.margins(x=0.12)
    for panel in panels[:, 0]:
        panel.set_ylabel("return, last tenth of training")
    panels[1, 2].set_axis_off()
    panels[1, 2].legend(*panels[0, 0].get_legend_handles_labels(), loc="center")
    figure.savefig(out)
    plt.close(figure)
    print(f"wrote {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="write the data of finished runs to a csv file")
    collecting.add_argument("runs", nargs="+", help="folders of runs, or patterns of them in quotes")
    collecting.add_argument("--out", type=Path, required=True)
    collecting.add_argument("--steps", type=int, help="of each run take these first steps, even if it is not finished")
    commands.add_parser("draw", help="draw all docs/evidence_*.png from results/*.csv, and print tables")
    args = parser.parse_args()
    if args.command == "collect":
        collect(args.runs, args.out, args.steps)
        return
    draw_learning_rates(ROOT / "docs" / "evidence_learning_rates.png")
    for task in LEARNING_RATES:
        print(f"\n{task} by learning rate\n\n{learning_rates_table(read_learning_rates(task))}\n")
    for path in sorted((ROOT / "results").glob("*.csv")):
        tasks = read(path)
        draw(tasks, ROOT / "docs" / f"evidence_{path.stem}.png")
        for (script, env_id), cells in tasks.items():
            print(f"\n{path.stem}: {script} on {env_id}\n\n{table(cells)}\n\n{diagnostics_table(cells)}\n")


if __name__ == "__main__":
    main()
