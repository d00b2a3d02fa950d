"""Disturbs runs at random moments and checks that nothing is lost.

    python benchmarks/chaos.py [--runs 20] [--script dqn_sparse.py] [--env-id CartPole-v1] [--steps 4000] [--seed 0]

Each run is killed (SIGKILL) or asked to stop (SIGTERM, SIGINT, SIGHUP, once or twice) after a random time, resumed, and
disturbed again, until it ends by itself. Then its files are checked: a whole model, every episode once and in order,
and exit codes that told finished from stopped.
"""

import argparse
import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.records import read_episodes, read_evaluations

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--learning-starts 500 --eval-episodes 2 --sparsity 0.9"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def disturbed(command: list[str], rng: random.Random) -> tuple[str, int]:
    """Sends a command a signal after a random time; what was sent ("none" if it ended before), and its exit code."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        number, twice = rng.choice(SIGNALS), rng.random() < 0.3
        try:
            process.communicate(timeout=rng.uniform(3, 30))
            return "none", process.returncode
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            time.sleep(rng.uniform(0, 0.5))
            if twice and process.poll() is None:
                process.send_signal(number)
            process.communicate()
            return signal.Signals(number).name + (" twice" if twice else ""), process.returncode


def problems_of(folder: Path, resumes: int) -> list[str]:
    """What is wrong with the files of a finished run that was resumed so often; an empty list if nothing is."""
    problems = []
    try:
        torch.load(folder / "model.pt", weights_only=True)
    except Exception as error:
        problems.append(f"model.pt: {error}")
    ends, _, lengths = read_episodes(folder).T
    gaps = ends[1:] - lengths[1:] - ends[:-1]  # steps between two episodes: those that a resume cut off
    if (gaps < 0).any() or (gaps > 0).sum() > resumes:
        problems.append("episodes.csv: out of order, twice, or lost")
    if len(read_evaluations(folder)) != 2:
        problems.append("evaluations.csv: not the final evaluation")
    if list(folder.glob("*.part")):
        problems.append("a .part file is left")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--script", default="dqn_sparse.py")
    parser.add_argument("--env-id", default="CartPole-v1")
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rng, sent, problems = random.Random(args.seed), collections.Counter(), []
    flags = f"--env-id {args.env_id} --total-timesteps {args.steps} --checkpoint-every {args.steps // 8} {FLAGS}"
    for number in range(args.runs):
        resumes = 0
        with tempfile.TemporaryDirectory() as runs_dir:
            start = [sys.executable, args.script, *flags.split(), "--runs-dir", runs_dir]
            while True:
                checkpoints = list(Path(runs_dir).glob("*/checkpoint.pt"))
                command = [sys.executable, args.script, "--resume", str(checkpoints[0])] if checkpoints else start
                resumes += bool(checkpoints)
                what, code = disturbed(command, rng)
                sent[what] += 1
                expected = {0} | ({128 + n for n in SIGNALS} | {-n for n in SIGNALS} if what != "none" else set())
                if code not in expected:
                    problems.append(f"run {number}: {what}: exit code {code}")
                finished = [path.parent for path in Path(runs_dir).glob("*/model.pt")]
                if what == "none" or (finished and code == 0):
                    break
            if len(finished) != 1:
                problems.append(f"run {number}: {len(finished)} models")
            problems += [f"run {number}: {problem}" for folder in finished for problem in problems_of(folder, resumes)]
    print("| signal | sent |\n|---|--:|")
    for what, count in sorted(sent.items()):
        print(f"| {what} | {count} |")
    print(f"\n{args.runs} runs, {len(problems)} problems")
    print("\n".join(problems))


if __name__ == "__main__":
    main()
