"""What prioritised replay costs in rainbow_pruned.py: its fraction of an update, and sampling against the capacity.

    python benchmarks/prioritised_replay.py [--capacity 1000000]

Nature network, batch 32. Whatever is compared takes turns, so that a machine whose speed drifts slows all of it. Writes
docs/rainbow_sampling.png.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import psutil
import torch
from gymnasium.spaces import Box, Discrete

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rainbow_pruned as rainbow
from utils import priorities as tree
from utils.replay import Replay

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def alternating_medians(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median microseconds of processor time of each action; they take turns."""
    times = {name: [] for name in actions}
    for i in range(rounds + 3):
        for name, action in actions.items():
            start = time.process_time()
            action()
            if i >= 3:
                times[name].append(1e6 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def filled_tree(size: int, fan_out: int) -> tree.Priorities:
    tree.FAN_OUT = fan_out
    priorities = tree.Priorities(size, CPU)
    priorities.load_state_dict({"values": torch.rand(size, dtype=torch.float64)})
    return priorities


def sampling_against_capacity(path: Path) -> None:
    sizes, fan_outs = [10_000, 100_000, 1_000_000, 10_000_000], [2, 16, 64, 128, 256, 1024]
    chosen = tree.FAN_OUT
    plt.style.use(ROOT / "utils" / "style.mplstyle")
    figure, axes = plt.subplots(figsize=(8, 4))
    rows = {fan_out: [] for fan_out in fan_outs}
    for size in sizes:
        actions = {}
        for fan_out in fan_outs:
            priorities = filled_tree(size, fan_out)
            priority = torch.rand(32)

            def both(priorities=priorities, priority=priority, fan_out=fan_out) -> None:
                tree.FAN_OUT = fan_out
                slots, _ = priorities.sample(32)
                priorities.update(slots, priority)

            actions[fan_out] = both
        for fan_out, median in alternating_medians(actions, 300).items():
            rows[fan_out].append(median)
    tree.FAN_OUT = chosen
    print("\n| fan-out | " + " | ".join(f"{size:,}" for size in sizes) + " |\n|--:|" + "--:|" * len(sizes))
    for fan_out, values in rows.items():
        print(f"| {fan_out} | " + " | ".join(f"{value:.0f}" for value in values) + " |")
        style = {"color": "#0072B2", "linewidth": 2.5} if fan_out == chosen else {"linewidth": 1, "alpha": 0.7}
        axes.plot(sizes, values, "o-", markersize=4, label=f"fan-out {fan_out}", **style)
    axes.set(xscale="log", xlabel="capacity", ylabel="µs for 32 draws and 32 updates", ylim=(0, None))
    axes.set(title="Prioritised sampling, one CPU core")
    figure.legend(loc="outside right center")
    figure.savefig(path)


def fraction_of_an_update(capacity: int) -> None:
    """Times the parts of an update on a replay of `capacity` frames, all written."""
    before = psutil.Process().memory_info().rss
    space = Box(0, 255, (4, 84, 84), np.uint8)
    args = rainbow.Args(network="nature")
    replay = Replay(capacity, 1, space, Discrete(4), 4, args.n_step, args.gamma, CPU)
    replay.frames.fill_(1)
    for name in ("action", "reward", "discount", "ahead", "age", "starts"):
        getattr(replay, name).fill_(0)
    priorities = filled_tree(replay.length, tree.FAN_OUT)
    memory = psutil.Process().memory_info().rss - before
    network = rainbow.make_networks(args, space, Discrete(4))["q_network"]
    target = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True)
    support = rainbow.make_support(args, CPU)
    one, two, largest = np.array([1]), np.array([2]), torch.ones(())
    priority = torch.rand(args.batch_size)

    def prioritise() -> None:
        index, probability = priorities.sample(args.batch_size)
        rainbow.importance_weights(probability, args.per_beta)
        priorities.update(index, priority)

    def refresh() -> None:
        for _ in range(4):  # agent steps per update
            priorities.refresh(one, two, largest)

    def gather() -> None:
        replay.gather(priorities.sample(args.batch_size)[0])

    batch = replay.gather(priorities.sample(args.batch_size)[0])

    def learn() -> None:
        losses, _ = rainbow.td_loss(network, target, batch, support, args.double)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()

    parts = {"sample, weights, update": prioritise, "4 x refresh": refresh, "gather": gather, "learn": learn}
    medians = alternating_medians(parts, 100)
    update = medians["sample, weights, update"] + medians["gather"] + medians["learn"]
    print(f"\nreplay of {capacity:,} with priorities: {memory / 1e9:.2f} GB\n")
    print("| part | µs | of an update |\n|---|--:|--:|")
    for name, median in medians.items():
        print(f"| {name} | {median:.0f} | {100 * median / update:.1f} % |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", type=int, default=1_000_000, help="frames in the replay whose parts are timed")
    args = parser.parse_args()
    fraction_of_an_update(args.capacity)  # first: it grows the heap to the size that it has in training
    sampling_against_capacity(ROOT / "docs" / "rainbow_sampling.png")


if __name__ == "__main__":
    main()
