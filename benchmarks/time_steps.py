"""Steady-state speed of any training script, ours or a peer's, by the clock of its environments' steps.

    python benchmarks/time_steps.py [--skip 1400] [--seconds 10] script.py [its flags ...]

Runs the script in this process, skips agent steps, times the next ones, ends it and prints one line of JSON. Everything
that the script does in that time counts: acting, environments, replay, updates, logging.
"""

import argparse
import json
import os
import runpy
import sys
import time
from pathlib import Path

import psutil
import torch
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import AddRenderObservation, RecordEpisodeStatistics

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.runs import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", type=int, default=1_400, help="agent steps before the clock starts")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long it runs")
    parser.add_argument("--multiple", type=int, default=4, help="the number of timed steps is a multiple of this")
    parser.add_argument("--offline", action="store_true", help="count the updates of a script without environments")
    parser.add_argument("script")
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    args = parser.parse_args()

    steps, first, first_time, first_cpu, startup = 0, 0, 0.0, 0.0, 0.0
    rendering = first_rendering = 0.0

    def synchronize() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def count(new_steps: int) -> None:
        nonlocal steps, first, first_time, first_cpu, first_rendering, startup
        if steps == 0:
            startup = time.time() - psutil.Process().create_time()
        steps += new_steps
        if first == 0 and steps >= args.skip:
            synchronize()
            first, first_time, first_cpu = steps, time.perf_counter(), time.process_time()
            first_rendering = rendering
        timed = steps - first
        if first and timed % args.multiple == 0 and timed and time.perf_counter() - first_time >= args.seconds:
            synchronize()
            result = {
                "ms_per_step": 1e3 * (time.perf_counter() - first_time) / timed,
                "cpu_ms_per_step": 1e3 * (time.process_time() - first_cpu) / timed,  # of all threads
                "rendering_ms_per_step": 1e3
                * (rendering - first_rendering)
                / timed,  # of observations; part of the above
                "startup_s": startup,
                "memory_gb": psutil.Process().memory_info().rss / 1e9,  # ru_maxrss would be no less than the parent's
                "peak_gpu_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0,
            }
            print("\n" + json.dumps(result), flush=True)
            os._exit(0)  # the script has nothing left that we want

    def counting(cls: type, method: str, size) -> None:
        original = getattr(cls, method)

        def counted(self, *values, **keywords):
            count(size(self))
            return original(self, *values, **keywords)

        setattr(cls, method, counted)

    render = AddRenderObservation.observation

    def timed_render(env, observation):
        nonlocal rendering
        start = time.perf_counter()
        frame = render(env, observation)
        rendering += time.perf_counter() - start
        return frame

    AddRenderObservation.observation = timed_render
    if args.offline:
        counting(Run, "advance", lambda run: 1)
    else:
        for envs in (AtariVectorEnv, SyncVectorEnv):
            counting(envs, "step", lambda envs: envs.num_envs)
        counting(RecordEpisodeStatistics, "step", lambda env: 1)  # of a peer with a single environment
    sys.argv = [args.script, *args.flags]
    sys.path.insert(0, os.path.dirname(os.path.abspath(args.script)))
    runpy.run_path(args.script, run_name="__main__")


if __name__ == "__main__":
    main()
