"""Steady-state speed of any training script, ours or a peer's: the time between its optimiser's steps.

    python benchmarks/time_updates.py [--skip 100] [--updates 300] script.py [its flags ...]

Runs the script in this process, ends it after skip + updates optimiser steps, and prints one line of JSON. Whatever the
script does between two updates counts: acting, environment, replay, logging.
"""

import argparse
import json
import os
import resource
import runpy
import statistics
import sys
import time

from torch.optim.optimizer import register_optimizer_step_post_hook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip", type=int, default=100, help="updates before the clock starts")
    parser.add_argument("--updates", type=int, default=300, help="updates that are timed")
    parser.add_argument("script")
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    args = parser.parse_args()

    moments, cpu_moments = [], []

    def on_step(optimizer: object, *_: object) -> None:
        moments.append(time.perf_counter())
        cpu_moments.append(time.process_time())
        if len(moments) == args.skip + args.updates + 1:
            intervals = [b - a for a, b in zip(moments[args.skip :], moments[args.skip + 1 :])]
            result = {
                "ms_per_update": 1e3 * sum(intervals) / len(intervals),
                "median_ms_per_update": 1e3 * statistics.median(intervals),
                "cpu_ms_per_update": 1e3 * (cpu_moments[-1] - cpu_moments[args.skip]) / len(intervals),
                "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            }
            print("\n" + json.dumps(result), flush=True)
            os._exit(0)  # the script has nothing left that we want

    register_optimizer_step_post_hook(on_step)
    sys.argv = [args.script, *args.flags]
    sys.path.insert(0, os.path.dirname(os.path.abspath(args.script)))
    runpy.run_path(args.script, run_name="__main__")


if __name__ == "__main__":
    main()
