"""Sparse against dense at each width: one table and one figure.

    python -m utils.compare "runs/*" --out docs/comparison

The table goes to stdout as markdown, the figure to a PNG and a PDF. A run's score is the mean return of the episodes
that ended in its last tenth, exploration included, as the papers report it; runs without an end are left out. The
table has the interquartile mean over runs with its 95 % bootstrap interval. Atari games are taken together,
human-normalised, runs resampled within games; any other environment has a table and a panel of its own, and so has
each script.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

from utils.results import (
    Cost,
    Estimate,
    LoggedRun,
    cost,
    fail,
    find_runs,
    group_runs,
    human_normalised,
    improvement,
    load_model,
    save_figure,
    summarise,
    training_seconds,
    warn,
)

STYLES = {  # of each method, colours of Okabe and Ito (2008); in this order
    "dense": ("#000000", "o"),
    "random": ("#0072B2", "s"),
    "gmp": ("#D55E00", "^"),
    "set": ("#E69F00", "v"),
    "rigl": ("#009E73", "D"),
}
OTHER = ("#CC79A7", "P")  # one that you added
# Flags in which runs may differ and still be of one kind, or that the kind itself says
NOT_COMPARED = {"env_id", "seed", "cuda", "runs_dir", "track", "wandb_project_name", "wandb_entity", "checkpoint_every"}
NOT_COMPARED |= {"resume", "save_dataset", "eval_episodes", "eval_epsilon", "capture_video", "total_timesteps"}
NOT_COMPARED |= {"cuda_graph", "diagnostics_every", "mask_seed", "sparsity", "actor_sparsity", "critic_sparsity"}


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """folders of runs, or patterns of them in quotes"""
    out: Path = Path("comparison")
    """where to write the figure, without .png and .pdf"""


class Row(NamedTuple):
    """The runs of one kind: of one width, method and final sparsity."""

    width: int
    method: str
    sparsity: str
    runs: int
    score: Estimate
    better: Estimate | None  # the probability that a run beats a dense one of this width
    cost: Cost | None
    minutes: float


def order(width: int, method: str, sparsity: str) -> tuple:
    """For sorting: by width, then the methods as in STYLES and others after them, then sparsity."""
    return width, [*STYLES, method].index(method), method, sparsity


def sparsity_of(args: dict) -> str:
    """The final sparsity that a run's flags say; "0 / 0.9" if SAC's actor and critic differ, "0" of a dense run."""
    if args["method"] == "dense":
        return "0"
    own = [args.get(f"{net}_sparsity") for net in ("actor", "critic")]
    return " / ".join(dict.fromkeys(f"{args['sparsity'] if value is None else value:g}" for value in own))


def kinds_of(runs: Sequence[LoggedRun]) -> dict[tuple[int, str, str], list[LoggedRun]]:
    """The runs by width, method and final sparsity, in this order."""
    kinds: dict[tuple, list[LoggedRun]] = {}
    for run in runs:
        kinds.setdefault((run.args["width"], run.args["method"], sparsity_of(run.args)), []).append(run)
    return dict(sorted(kinds.items(), key=lambda item: order(*item[0])))


def label_of(method: str, sparsity: str) -> str:
    return method if method == "dense" else f"{method} {sparsity}"


def games_of(runs: Sequence[LoggedRun]) -> list[str]:
    return sorted({run.args["env_id"] for run in runs})


def scores_of(runs: Sequence[LoggedRun]) -> list[np.ndarray]:
    """One array (runs,) for each environment: final scores, human-normalised where they can be."""
    scores = []
    for (env_id,), members in group_runs(runs, ["env_id"]).items():
        raw = np.array([run.final_score() for run in members])
        normalised = human_normalised(raw, env_id)
        scores.append(raw if normalised is None else normalised)
    return scores


def cost_of(run: LoggedRun) -> Cost | None:
    try:
        return cost(load_model(run.folder))
    except ValueError as error:
        warn(f"{run.folder}: {error}; its cost is not known")
        return None


def rows_of(runs: Sequence[LoggedRun]) -> list[Row]:
    """The rows of one table, by width, dense first."""
    kinds, rows = kinds_of(runs), []
    for (width, method, sparsity), group in kinds.items():
        dense = kinds.get((width, "dense", "0"))
        better = None
        if dense and method != "dense" and games_of(dense) == games_of(group):
            better = improvement(scores_of(group), scores_of(dense))
        minutes = float(np.median([training_seconds(run.folder) for run in group])) / 60
        score, needs = summarise(scores_of(group)), next(filter(None, map(cost_of, group)), None)
        rows.append(Row(width, method, sparsity, len(group), score, better, needs, minutes))
    return rows


def markdown(rows: Sequence[Row], score_name: str) -> str:
    """The table."""
    lines = [
        f"| width | method | sparsity | runs | {score_name} | P(beats dense) | parameters kept | MFLOPs | minutes |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        score = f"{row.score.value:.3g} [{row.score.low:.3g}, {row.score.high:.3g}]"
        better = f"{row.better.value:.2f} [{row.better.low:.2f}, {row.better.high:.2f}]" if row.better else ""
        kept = f"{row.cost.kept:,} of {row.cost.total:,}" if row.cost else ""
        flops = f"{row.cost.flops / 1e6:.3g}" if row.cost else ""
        cells = (row.width, row.method, row.sparsity, row.runs, score, better, kept, flops, f"{row.minutes:.1f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def draw(axes: plt.Axes, rows: Sequence[Row], title: str, score_name: str) -> None:
    """Score against width, with its interval, a line for each method and sparsity."""
    lines = sorted({(row.method, row.sparsity) for row in rows}, key=lambda line: order(0, *line))
    widths = sorted({row.width for row in rows})
    highest = max(row.sparsity for row in rows)  # has filled marks
    for number, (name, sparsity) in enumerate(lines):
        color, marker = STYLES.get(name, OTHER)
        own = [row for row in rows if row.method == name and row.sparsity == sparsity]
        x = [widths.index(row.width) + 0.06 * (number - (len(lines) - 1) / 2) for row in own]  # side by side
        middle, low, high = np.array([row.score for row in own]).T
        axes.errorbar(
            x,
            middle,
            yerr=np.maximum([middle - low, high - middle], 0),
            color=color,
            marker=marker,
            capsize=3,
            linestyle="--" if name == "dense" else "-",
            markerfacecolor=None if sparsity in ("0", highest) else "white",
            label=label_of(name, sparsity),
        )
    axes.set_xticks(range(len(widths)), [f"{width}" for width in widths])
    axes.set(title=title, xlabel="width", ylabel=score_name)
    axes.legend(fontsize="small")


def comparable(runs: Sequence[LoggedRun]) -> list[LoggedRun]:
    """The runs that reached their end and say what a comparison asks; names the others."""
    kept = []
    for run in runs:
        if not {"env_id", "method", "width", "sparsity"} <= run.args.keys():
            warn(f"{run.folder}: its flags do not say method, width and sparsity; left out")
        elif not run.finished:
            warn(f"{run.folder} is not finished; left out")
        elif np.isnan(run.final_score()):
            warn(f"{run.folder}: no episode ended in the last tenth of the run; left out")
        else:
            kept.append(run)
    if not kept:
        fail("none of these runs can be compared")
    return kept


@plt.style.context(Path(__file__).with_name("style.mplstyle"))
def main(args: Args) -> dict[str, list[Row]]:
    """Prints the tables, writes the figure, and returns the rows of each table by its title."""
    tables: dict[str, list[LoggedRun]] = {}
    for run in comparable(find_runs(args.runs)):
        game = human_normalised(0.0, run.args["env_id"]) is not None
        task = "Atari" if game else run.args["env_id"]
        tables.setdefault(f"{task}, {run.args['script']}" if run.args["script"] else task, []).append(run)
    if len(tables) > 1:
        warn(f"runs of {'; '.join(tables)}: one table for each")
    figure, panels = plt.subplots(1, len(tables), figsize=(6.5 * len(tables), 4), squeeze=False)
    results = {}
    for axes, (name, runs) in zip(panels[0], tables.items()):
        games = games_of(runs)
        totals = sorted({run.total_steps for run in runs})
        if len(totals) > 1:
            warn(
                f"{name}: runs of different lengths ({', '.join(f'{total:,}' for total in totals)} steps) side by side"
            )
        for (width, method, sparsity), group in kinds_of(runs).items():
            which = f"{name}: {label_of(method, sparsity)} at width {width}"
            if games_of(group) != games:
                warn(f"{which} lacks games that others have")
            if len({(run.args["env_id"], run.args["seed"]) for run in group}) < len(group):
                warn(f"{which}: a seed is there more than once, and counts as often")
            first = group[0].args
            differing = {flag for run in group for flag in run.args | first if run.args.get(flag) != first.get(flag)}
            if differing - NOT_COMPARED:
                warn(f"{which}: runs that differ in {', '.join(sorted(differing - NOT_COMPARED))} are taken together")
        atari = name.startswith("Atari")
        title = f"{name}: {', '.join(games)}" if atari else name
        score_name = "human-normalised IQM" if atari else "IQM of final return"
        results[title] = rows_of(runs)
        counts = sorted({row.runs for row in results[title]})
        seeds = f"{counts[0]} runs each" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} runs each"
        print(f"{title}, {seeds}, {' or '.join(f'{total:,}' for total in totals)} steps\n")
        print(markdown(results[title], score_name) + "\n")
        draw(axes, results[title], f"{title} ({seeds})", score_name)
    print("MFLOPs: forward pass of one observation, two for each kept weight at each place where it is applied")
    print("minutes: wall-clock of a run, median; it tells methods apart only where runs had the machine alike")
    save_figure(figure, args.out)
    plt.close(figure)
    return results


if __name__ == "__main__":
    main(tyro.cli(Args))
