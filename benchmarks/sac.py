"""Agent steps per second of sac_sparse.py in its learning phase, dense and masked, beside another script's.

    python benchmarks/sac.py [--peer path/to/sac_continuous_action.py --peer-flags "..."] [--rounds 5]

Everything runs on HalfCheetah-v5 with MLPs of 2 x 256, one environment, batch 256, one update per agent step; the
scripts take turns, so that a machine whose speed drifts slows all of them. An update has three optimiser steps: actor,
temperature, critics; a peer must have as many on average.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = "--env-id HalfCheetah-v5 --network mlp --learning-starts 500 --total-timesteps 1000000 --runs-dir runs"


def ms_per_step(script: str, flags: str, steps: int) -> float:
    limits = ["--skip", "150", "--updates", str(3 * steps)]
    command = [sys.executable, str(ROOT / "benchmarks/time_updates.py"), *limits, script, *shlex.split(flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return 3 * json.loads(done.stdout.strip().splitlines()[-1])["ms_per_update"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="another training script that makes one update per agent step")
    parser.add_argument("--peer-flags", default="", help="its flags, in one string")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()

    script = str(ROOT / "sac_sparse.py")
    contenders = {
        "dense": (script, f"{OURS} --method dense"),
        "random 0.9": (script, f"{OURS} --method random --sparsity 0.9"),
    }
    if args.peer:
        contenders["peer"] = (args.peer, args.peer_flags)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, (path, flags) in contenders.items():
            times[name].append(ms_per_step(path, flags, args.steps))

    print("| script | ms per agent step | agent steps/s | time over dense (min, median, max) |\n|---|--:|--:|--:|")
    for name, values in times.items():
        ratios = sorted(value / dense for value, dense in zip(values, times["dense"]))
        middle = statistics.median(values)
        spread = f"{ratios[0]:.3f}, {statistics.median(ratios):.3f}, {ratios[-1]:.3f}"
        print(f"| {name} | {middle:.1f} | {1e3 / middle:.0f} | {spread} |")


if __name__ == "__main__":
    main()
