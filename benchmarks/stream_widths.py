"""Return against steps of finished or running stream_sparse.py runs: one row per agent and 10,000 steps, and a figure.

    python benchmarks/stream_widths.py 'runs/Walker2d*stream*' --out results/stream/walker2d --figure docs/walker2d.png

A row's return is the mean over the episodes that ended in its 10,000 steps. Later steps of a running agent are missing.
"""

import argparse
import csv
import glob
import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.records import read_episodes  # noqa: E402

EVERY = 10_000


def rows_of(folder: Path) -> list[tuple]:
    """(method, sparsity, width, seed, step, return) for each stretch of 10,000 steps that is complete."""
    args = json.loads((folder / "args.json").read_text())
    sparsity = args["sparsity"] if args["method"] != "dense" else 0.0
    key = (args["method"], sparsity, args["width"], args["seed"])
    episodes = read_episodes(folder)
    last = args["total_timesteps"] if (folder / "model.pt").exists() else int(episodes[-1, 0]) if len(episodes) else 0
    rows = []
    for end in range(EVERY, last + 1, EVERY):
        inside = (episodes[:, 0] > end - EVERY) & (episodes[:, 0] <= end)
        rows += [(*key, end, round(float(episodes[inside, 1].mean()), 1))] if inside.any() else []
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", help="pattern of run folders")
    parser.add_argument("--out", required=True, help="write OUT.csv")
    parser.add_argument("--figure", help="write a figure there")
    args = parser.parse_args()
    rows = sorted(row for folder in sorted(glob.glob(args.runs)) for row in rows_of(Path(folder)))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{args.out}.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [("method", "sparsity", "width", "seed", "step", "return"), *rows]
        )

    cells = defaultdict(lambda: defaultdict(list))
    for method, sparsity, width, _, step, value in rows:
        cells[method, sparsity, width][step].append(value)
    plt.style.use(ROOT / "utils" / "style.mplstyle")
    figure, axes = plt.subplots(figsize=(6, 4))
    for (method, sparsity, width), by_step in cells.items():
        agents = max(map(len, by_step.values()))
        steps = [step for step, values in by_step.items() if len(values) == agents]
        values = np.array([by_step[step] for step in steps])  # (steps, agents)
        print(f"\n{method} {sparsity:g}, hidden {128 * width}, {agents} agents")
        for step, each in zip(steps, values):
            print(f"| {step:,} | {each.mean():.0f} | {', '.join(f'{value:.0f}' for value in each)} |")
        label = f"{method}{f' {sparsity:g}' if sparsity else ''}, hidden {128 * width}"
        (line,) = axes.plot(steps, values.mean(1), label=label)
        axes.fill_between(steps, values.min(1), values.max(1), alpha=0.2, color=line.get_color())
    axes.set(xlabel="agent steps", ylabel="return (mean; smallest to largest)")
    axes.legend()
    if args.figure:
        figure.savefig(args.figure)


if __name__ == "__main__":
    main()
