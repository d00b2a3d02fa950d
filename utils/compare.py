"""Sparse against dense at each width: one table and one figure.

    python -m utils.compare "runs/*" --out docs/comparison
    python -m utils.compare "sweeps/E/*/*" --by bias

The table goes to stdout as markdown, the figure to a PNG and a PDF. A run's score is the mean return of the episodes
that ended in its last tenth, exploration included, as the value-based papers report it; with --evaluations, that of the
evaluations in its last tenth, as the continuous-control papers do. Runs that are not finished are left out. The table
has the interquartile mean over runs with its 95 % bootstrap interval. Atari games are taken together, human-normalised,
runs resampled within games; any other environment has a table and a panel of its own. Scripts, forks among them, share
the table of their environment. Runs of one script, method, sparsity and width are one row; --by splits it further.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from utils.analysis.results import (
    RUNNING_FLAGS,
    Cost,
    Estimate,
    LoggedRun,
    cost,
    find_runs,
    flag_names,
    group_runs,
    human_normalised,
    improvement,
    load_model,
    save_figure,
    summarise,
    warn,
    warn_of_mixed_flags,
)
from utils.command_line import Positional
from utils.curves import styled
from utils.flags import fail
from utils.launch import run_command
from utils.records import training_seconds

STYLES = {  # of each method, colours of Okabe and Ito (2008); in this order
    "dense": ("#000000", "o"),
    "random": ("#0072B2", "s"),
    "gmp": ("#D55E00", "^"),
    "set": ("#E69F00", "v"),
    "rigl": ("#009E73", "D"),
}
OTHER = ("#CC79A7", "P")  # a method of a fork
PARTS = ("encoder_sparsity", "actor_sparsity", "critic_sparsity")  # of --sparsity, for one network each


@dataclass
class Args:
    runs: Annotated[tuple[str, ...], Positional]
    """folders of runs, or patterns of them in quotes"""
    out: Path = Path("comparison")
    """path of the figure, which is written as a PNG and as a PDF"""
    by: str = ""
    """more flags that tell rows apart, separated by commas: algorithm or bias, for example"""
    evaluations: bool = False
    """score runs by their evaluations (--eval-every) instead of their training episodes"""


class Kind(NamedTuple):
    """What runs of one row have in common."""

    width: int
    script: str
    method: str
    sparsity: str
    more: str  # the values of the flags in --by

    def order(self) -> tuple:
        """By width, then script, then method as in STYLES and others after them, then sparsity and the rest."""
        return self.width, self.script, [*STYLES, self.method].index(self.method), *self[2:]

    def label(self, several_scripts: bool) -> str:
        method = self.method if self.method == "dense" else f"{self.method} {self.sparsity}"
        method += f", {self.more}" if self.more else ""
        return f"{self.script}: {method}" if several_scripts else method


class Row(NamedTuple):
    """The results of the runs of one kind."""

    kind: Kind
    runs: int
    score: Estimate
    better: Estimate | None  # the probability that a run beats a dense one of this width
    cost: Cost | None
    minutes: float


def sparsities_of(args: dict) -> tuple[float, ...]:
    """The final sparsity that a run's flags give: one number, or one for each of `PARTS` if they differ; 0 of a dense
    run."""
    if args["method"] == "dense":
        return (0.0,)
    own = [args[name] for name in PARTS if name in args] or [None]
    values = tuple(float(args["sparsity"] if value is None else value) for value in own)
    return values[:1] if len(set(values)) == 1 else values


def kinds_of(runs: Sequence[LoggedRun], by: Sequence[str]) -> dict[Kind, list[LoggedRun]]:
    """The runs by kind, in order."""
    kinds: dict[Kind, list[LoggedRun]] = {}
    for run in runs:
        script = run.args["script"] or "?"
        more = ", ".join(f"{name} {run.args.get(name)}" for name in by)
        sparsity = " / ".join(f"{value:g}" for value in sparsities_of(run.args))
        kind = Kind(run.args["width"], script, run.args["method"], sparsity, more)
        kinds.setdefault(kind, []).append(run)
    return dict(sorted(kinds.items(), key=lambda item: item[0].order()))


def games_of(runs: Sequence[LoggedRun]) -> list[str]:
    return sorted({run.args["env_id"] for run in runs})


def scores_of(runs: Sequence[LoggedRun], evaluations: bool) -> list[np.ndarray]:
    """One array (runs,) for each environment: final scores, human-normalised where they can be."""
    scores = []
    for (env_id,), members in group_runs(runs, ["env_id"]).items():
        raw = np.array([run.final_score(evaluations) for run in members])
        normalised = human_normalised(raw, env_id)
        scores.append(raw if normalised is None else normalised)
    return scores


def cost_of(run: LoggedRun) -> Cost | None:
    try:
        return cost(load_model(run.folder))
    except ValueError as error:
        warn(f"{run.folder} {error}; its cost is unknown")
        return None


def dense_kind(kind: Kind, kinds: Sequence[Kind]) -> Kind | None:
    """The dense runs to beat, of the same width: those that agree in the flags of --by too; if there are none, the only
    ones of this script, or of any."""
    dense = [other for other in kinds if (other.width, other.method) == (kind.width, "dense")]
    own = [other for other in dense if other.script == kind.script]
    alike = [other for other in own if other.more == kind.more]
    return next((found[0] for found in (alike, own, dense) if len(found) == 1), None)


def rows_of(runs: Sequence[LoggedRun], evaluations: bool = False, by: Sequence[str] = ()) -> list[Row]:
    """The rows of one table, by width, dense first."""
    kinds, rows = kinds_of(runs, by), []
    for kind, group in kinds.items():
        beaten = dense_kind(kind, list(kinds))
        dense, better = kinds.get(beaten), None
        if dense and kind.method != "dense" and games_of(dense) == games_of(group):
            if (beaten.script, beaten.more) != (kind.script, kind.more):
                warn(f"{kind.label(True)} at width {kind.width} is compared with {beaten.label(True)}")
            better = improvement(scores_of(group, evaluations), scores_of(dense, evaluations))
        minutes = float(np.median([training_seconds(run.folder) for run in group])) / 60
        score, needs = summarise(scores_of(group, evaluations)), next(filter(None, map(cost_of, group)), None)
        rows.append(Row(kind, len(group), score, better, needs, minutes))
    return rows


def markdown(rows: Sequence[Row], score_name: str) -> str:
    """The table."""
    several_scripts = len({row.kind.script for row in rows}) > 1
    lines = [
        f"| width | method | runs | {score_name} | P(beats dense) | active weights | MFLOPs | minutes |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        score = f"{rounded(row.score.value)} [{rounded(row.score.low)}, {rounded(row.score.high)}]"
        better = f"{row.better.value:.2f} [{row.better.low:.2f}, {row.better.high:.2f}]" if row.better else ""
        weights = f"{row.cost.active:,} of {row.cost.total:,}" if row.cost else ""
        flops = rounded(row.cost.flops / 1e6) if row.cost else ""
        method = row.kind.label(several_scripts)
        cells = (row.kind.width, method, row.runs, score, better, weights, flops, f"{row.minutes:.1f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def rounded(value: float) -> str:
    """Three significant digits, or from 1,000 on a whole number."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def draw(axes: plt.Axes, rows: Sequence[Row], title: str, score_name: str) -> None:
    """Score against width, with its interval, a line for each kind."""
    lines = list(
        dict.fromkeys(row.kind._replace(width=0) for row in sorted(rows, key=lambda row: row.kind.order()[1:]))
    )
    widths = sorted({row.kind.width for row in rows})
    groups = sorted({(line.script, line.more) for line in lines})
    for number, line in enumerate(lines):
        color, marker = STYLES.get(line.method, OTHER)
        group = line.script, line.more
        same_method = [other for other in lines if (other.method, other.script, other.more) == (line.method, *group)]
        own = [row for row in rows if row.kind._replace(width=0) == line]
        offset = 0.4 / len(lines) * (number - (len(lines) - 1) / 2)  # side by side
        middle, low, high = np.array([row.score for row in own]).T
        axes.errorbar(
            [widths.index(row.kind.width) + offset for row in own],
            middle,
            yerr=np.maximum([middle - low, high - middle], 0),
            color=color,
            marker=marker,
            capsize=3,
            linestyle=("-", "--", ":", "-.")[groups.index(group) % 4],
            markerfacecolor=color if line == same_method[-1] else "white",  # filled: its highest sparsity
            label=line.label(len({other.script for other in lines}) > 1),
        )
    axes.set_xticks(range(len(widths)), [f"{width}" for width in widths])
    axes.set_xlim(-0.5, len(widths) - 0.5)
    axes.set(title=title, xlabel="width", ylabel=score_name)
    axes.legend(fontsize="small")


def comparable(runs: Sequence[LoggedRun], evaluations: bool) -> list[LoggedRun]:
    """The finished runs whose flags say what a comparison needs; names the others."""
    found = []
    for run in runs:
        flags = [run.args.get(name) for name in ("width", "method", "sparsity")]
        if not (isinstance(flags[0], int) and isinstance(flags[1], str) and isinstance(flags[2], int | float)):
            warn(f"{run.folder}: its flags do not say width, method and sparsity; left out")
        elif not run.finished:
            warn(f"{run.folder} is not finished; left out")
        elif np.isnan(run.final_score(evaluations)):
            warn(
                f"{run.folder}: no {'evaluation' if evaluations else 'episode'} in the last tenth of the run; left out"
            )
        else:
            found.append(run)
    if not found:
        fail("none of these runs can be compared")
    return found


def in_words(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


@styled
def main(args: Args) -> dict[str, list[Row]]:
    """Prints the tables, writes the figure, and returns the rows of each table by its title."""
    tables: dict[str, list[LoggedRun]] = {}
    found = comparable(find_runs(args.runs), args.evaluations)
    by = flag_names(args.by, found)
    for run in found:
        task = "Atari" if human_normalised(0.0, run.args["env_id"]) is not None else run.args["env_id"]
        tables.setdefault(f"{task}, offline" if run.offline else task, []).append(run)
    figure, panels = plt.subplots(1, len(tables), figsize=(6.5 * len(tables), 4), squeeze=False)
    results = {}
    for axes, (name, runs) in zip(panels[0], tables.items()):
        games = games_of(runs)
        totals = sorted({run.total_steps for run in runs})
        if len(totals) > 1:
            steps = ", ".join(f"{total:,}" for total in totals)
            warn(f"{name}: runs of different lengths ({steps} steps) side by side")
        for kind, group in kinds_of(runs, by).items():
            which = f"{name}: {kind.label(True)} at width {kind.width}"
            if games_of(group) != games:
                warn(f"{which} lacks games that others have")
            if len({(run.args["env_id"], run.args["seed"]) for run in group}) < len(group):
                warn(f"{which}: some seeds occur more than once, and each run counts")
            warn_of_mixed_flags(which, group, RUNNING_FLAGS | {"sparsity", *PARTS})
        atari = name.startswith("Atari")
        title = f"{name}: {', '.join(games)}" if atari else name
        score_name = "human-normalised IQM" if atari else "IQM of final return"
        results[title] = rows_of(runs, args.evaluations, by)
        counts = sorted({row.runs for row in results[title]})
        each = f"{in_words(counts[-1], 'run')} each" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} runs each"
        print(f"{title}, {each}, {' or '.join(f'{total:,}' for total in totals)} steps\n")
        print(markdown(results[title], score_name) + "\n")
        draw(axes, results[title], f"{title} ({each})", score_name)
    print("MFLOPs: forward pass of one observation, two for each active weight at each place where it is applied")
    print("minutes: median wall-clock of training; comparable only between runs that had the machine to themselves")
    save_figure(figure, args.out)
    plt.close(figure)
    return results


if __name__ == "__main__":
    run_command(main, Args)
