"""What random masks, gradual magnitude pruning and RigL do to the weights while DQN learns CartPole: docs/methods.png.

    python -m docs.methods_figure [--out docs/methods.png]

Trains three agents with dqn_sparse.py, half a minute each, and records their masks on the way.
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

import dqn_sparse
from utils.runs import Run

METHODS = {
    "random": "Random mask\ndrawn once, never changes",
    "gmp": "Gradual magnitude pruning\nremoves the smallest weights for good",
    "rigl": "RigL\nreplaces the smallest by new ones",
}
STEPS, EVERY, LAYER, WEIGHTS = 20_000, 100, "head.dense.weight", 100
STATES = {"never active": "#FFFFFF", "removed": "#D9D9D9", "active from the start": "#0072B2", "grown later": "#E69F00"}


def masks_over_time(method: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Agent steps (n,), and at each of them all masks of a run of `method`, flat, with those of LAYER first."""
    steps, masks = [], []
    advance = Run.advance

    def record(run: Run, step: int, update: int) -> None:
        advance(run, step, update)
        if run.due(EVERY):
            layers = sorted(run.state["masks"], key=lambda name: name != LAYER)
            masks.append(torch.cat([run.state["masks"][name].flatten() > 0 for name in layers]).numpy())
            steps.append(step)

    Run.advance = record
    flags = dqn_sparse.CLASSIC_CONTROL | {"env_id": "CartPole-v1", "total_timesteps": STEPS, "eval_episodes": 1}
    flags |= {"method": method, "sparsity": 0.8, "device": "cpu"}
    try:
        with tempfile.TemporaryDirectory() as folder:
            dqn_sparse.main(dqn_sparse.Args(**flags, runs_dir=folder))
    finally:
        Run.advance = advance
    return np.array(steps), masks


def states(alive: np.ndarray) -> np.ndarray:
    """Which of STATES each weight is in, from whether it is active (n, weights): uint8 of the same shape."""
    ever = np.logical_or.accumulate(alive)
    return np.where(alive, np.where(np.logical_and.accumulate(alive), 2, 3), ever).astype(np.uint8)


def draw(axes: np.ndarray, steps: np.ndarray, masks: list[np.ndarray], title: str) -> None:
    """One column: single weights of LAYER above, all weights of the network below."""
    chosen = np.random.default_rng(0).choice(512 * 512, WEIGHTS, replace=False)
    alive = np.array([mask[chosen] for mask in masks])
    first = np.where(alive.any(0), alive.argmax(0), len(alive))
    picture = states(alive)[:, np.lexsort((-alive.sum(0), first))]
    look = {"cmap": ListedColormap(STATES.values()), "vmin": 0, "vmax": 3, "interpolation": "nearest"}
    axes[0].imshow(picture.T, extent=(0, steps[-1], WEIGHTS, 0), aspect="auto", **look)
    axes[0].set_title(title, fontsize="medium")
    axes[0].set_yticks([])

    ever = np.zeros_like(masks[0])
    fractions = []
    for mask in masks:
        ever |= mask
        fractions.append((mask.mean(), ever.mean()))
    now, so_far = 100 * np.array(fractions).T
    axes[1].fill_between(steps, now, color="#0072B2", alpha=0.25, linewidth=0)
    axes[1].plot(steps, now, color="#0072B2", linewidth=2, label="active now")
    axes[1].plot(steps, so_far, "--", color="#D55E00", linewidth=2, label="ever active so far")
    axes[1].set(xlabel="agent steps", xlim=(0, steps[-1]), ylim=(0, 105), xticks=(0, STEPS // 2, STEPS))
    axes[1].xaxis.set_major_formatter("{x:,.0f}")
    axes[1].get_xticklabels()[-1].set_ha("right")
    axes[1].spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("methods.png"))
    args = parser.parse_args()
    figure, panels = plt.subplots(
        2, 3, figsize=(10, 5.4), sharex="col", height_ratios=(3, 2), layout="constrained", sharey="row"
    )
    for column, (method, title) in zip(panels.T, METHODS.items()):
        draw(column, *masks_over_time(method), title)
    panels[0, 0].set_ylabel(f"{WEIGHTS} weights of one layer")
    panels[1, 0].set_ylabel("% of all weights")
    panels[1, 0].legend(frameon=False, loc="upper left")
    patches = [Patch(facecolor=color, edgecolor="grey", label=name) for name, color in STATES.items()]
    figure.legend(handles=patches, loc="outside upper center", ncols=4, frameon=False, title="each row is one weight")
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
