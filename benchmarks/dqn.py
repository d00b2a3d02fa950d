"""Agent steps per second of dqn_sparse.py in its learning phase, dense and masked, beside another script's.

    python benchmarks/dqn.py [--peer path/to/dqn_atari.py --peer-flags "..."] [--rounds 5]

Everything runs on Breakout with the Nature network, one environment, batch 32, one update per 4 agent steps; the
scripts take turns, so that a machine whose speed drifts slows all of them.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = "--env-id ALE/Breakout-v5 --network nature --learning-starts 1000 --total-timesteps 1000000 --runs-dir runs"


def ms_per_update(script: str, flags: str, updates: int) -> float:
    command = [sys.executable, str(ROOT / "benchmarks/time_updates.py"), "--updates", str(updates), script]
    done = subprocess.run([*command, *shlex.split(flags)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["ms_per_update"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="another training script that makes one update per 4 agent steps")
    parser.add_argument("--peer-flags", default="", help="its flags, in one string")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=300)
    args = parser.parse_args()

    script = str(ROOT / "dqn_sparse.py")
    contenders = {
        "dense": (script, f"{OURS} --method dense"),
        "random 0.9": (script, f"{OURS} --method random --sparsity 0.9"),
    }
    if args.peer:
        contenders["peer"] = (args.peer, args.peer_flags)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, (path, flags) in contenders.items():
            times[name].append(ms_per_update(path, flags, args.updates))

    print("| script | ms per update cycle | agent steps/s | time over dense (min, median, max) |\n|---|--:|--:|--:|")
    for name, values in times.items():
        ratios = sorted(value / dense for value, dense in zip(values, times["dense"]))
        middle = statistics.median(values)
        spread = f"{ratios[0]:.3f}, {statistics.median(ratios):.3f}, {ratios[-1]:.3f}"
        print(f"| {name} | {middle:.1f} | {4e3 / middle:.0f} | {spread} |")


if __name__ == "__main__":
    main()
