"""Grids of runs on Ray, from a laptop to a cluster.

    python -m utils.sweep dqn_sparse.py --env-id CartPole-v1 --width 1 2 --method dense gmp --seed 1 2 --out sweeps/dqn

Every flag of the script may have several values; each combination is a cell, with a folder of its own in --out. The
same command starts, resumes and repairs a sweep: a cell with model.pt is skipped, one with checkpoint.pt is resumed,
any other is started. Ctrl-C or SIGTERM stops all runs with checkpoints; a second one kills them.
"""

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Annotated

from utils import cells as grid
from utils.analysis.results import import_file, warn
from utils.cells import Cell
from utils.command_line import Positional, known_flags
from utils.flags import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_flags,
    expect,
    fail,
    first_line,
)
from utils.launch import run_program
from utils.runs import versions

TAKEN = 1_000  # instead of an exit code: a run of another sweep has the cell
# Linux sends a run this signal when its parent dies, whatever kills it: no run is left behind without a sweep
DIE_WITH_PARENT = (
    "import ctypes, os, sys; sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, 15); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


@dataclass
class Args:
    """Flags that are not listed here go to the script; with several values, one becomes an axis of the grid."""

    script: Annotated[Path, Positional]
    """the training script, ours or a fork"""
    out: Path
    """folder of the sweep, on a disk that all machines share"""
    jobs: PositiveInt | None = None
    """maximum number of concurrent runs; by default as many as the resources below allow"""
    cpus_per_run: PositiveFloat = 1.0
    """cores, and threads of torch, for each run"""
    gpus_per_run: NonNegativeFloat | None = None
    """GPUs for each run, such as 0.25; by default 1 if there are GPUs"""
    memory_per_run: NonNegativeFloat = 0.0
    """GB of memory for each run (the replay of Atari takes 7.1); 0 does not limit the number of runs"""
    retries: NonNegativeInt = 1
    """times that a failed cell is tried again"""
    grace: PositiveFloat = 600.0
    """seconds that stopped runs have to write their checkpoints"""
    shard: str = "0/1"
    """i/n: only the i-th of n parts of the grid, counted from 0, for a job array"""
    address: str | None = None
    """Ray cluster to join, or auto; by default Ray starts on this machine"""
    dry_run: bool = False
    """print the cells and their commands, and start nothing"""
    status: bool = False
    """print how far the sweep is, from the disk"""


class Worker:
    """A Ray actor with two threads: one waits for the run, the other can stop it."""

    def __init__(self, folder: str) -> None:
        os.chdir(folder)  # of the sweep, for relative paths
        self.process, self.stopping = None, False

    def run(self, cell: Cell, script: Path, threads: int) -> int:
        """Starts or resumes the cell's run, or does nothing if it is done; returns its exit code, or TAKEN."""
        lock = grid.lock(cell)
        if lock is None:
            return TAKEN
        with lock:
            rest = grid.unfinished(cell)
            if rest is None:
                grid.set_aside(cell)
                grid.write_flags(cell)
            for flags in [command(cell)] if rest is None else [["--resume", f"{run}/checkpoint.pt"] for run in rest]:
                if self.stopping:
                    return 128 + signal.SIGTERM
                with (cell.folder / "log.txt").open("a") as log:
                    self.process = subprocess.Popen(
                        [sys.executable, "-c", DIE_WITH_PARENT, str(script), *flags],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                        pass_fds=[lock.fileno()],  # the lock is the run's own too, see `grid.lock`
                        start_new_session=True,  # a terminal's Ctrl-C is for the sweep alone
                    )
                code = self.process.wait()
                (cell.folder / "exit_code").write_text(f"{code}\n")
                if code:
                    return code
        return 0

    def stop(self, number: int) -> None:
        self.stopping = True
        if self.process is not None:
            self.process.send_signal(number)


def command(cell: Cell) -> list[str]:
    return [*cell.flags, "--runs-dir", str(cell.folder)]


def concurrency(args: Args, resources: dict[str, float]) -> int:
    """How many runs go at once, printed with the reason; ends the program if not even one does."""
    units = {"CPU": 1, "GPU": 1, "memory": 1e9}  # of the flags, in those of Ray, which counts bytes
    counts = {}
    for name, field in zip(units, ("cpus_per_run", "gpus_per_run", "memory_per_run")):
        need, there = getattr(args, field), resources.get(name, 0) / units[name]
        expect(args, field, need <= there, f"at most {there:.3g}, which is all there is")
        if need:
            counts[name] = math.floor(there / need + 1e-9)
    if args.jobs:
        counts["--jobs"] = args.jobs
    at_once = min(counts.values())
    reasons = ", ".join(f"{name} allows {count}" for name, count in counts.items())
    print(f"{at_once} runs at once ({reasons})")
    return at_once


class Sweep:
    """The loop that gives cells to workers, and what it knows of them."""

    def __init__(self, args: Args, cells: list[Cell], ray: object) -> None:
        self.args, self.cells, self.ray = args, cells, ray
        self.waiting = deque(cells)
        self.running: dict = {}  # Ray's reference of the result -> (cell, worker)
        self.attempts: Counter[Path] = Counter()
        self.failed: dict[Path, str] = {}
        self.signals: list[int] = []
        self.table = Table(cells)

    def run(self, at_once: int) -> None:
        options = {"num_cpus": self.args.cpus_per_run, "num_gpus": self.args.gpus_per_run, "max_concurrency": 2}
        if self.args.memory_per_run:
            options["memory"] = int(self.args.memory_per_run * 1e9)
        worker = self.ray.remote(Worker).options(**options)
        threads = max(1, int(self.args.cpus_per_run))
        while (self.waiting or self.running) and not self.signals:
            while len(self.running) < at_once and (cell := self.next_cell()) is not None:
                actor = worker.remote(os.getcwd())
                self.running[actor.run.remote(cell, self.args.script.resolve(), threads)] = cell, actor
            self.collect()
            self.table.show()
        if self.signals:
            self.stop()

    def next_cell(self) -> Cell | None:
        """The next one that no other sweep is at, if the disk has room for its checkpoints."""
        for _ in range(len(self.waiting)):
            cell = self.waiting.popleft()
            now = grid.state(cell)
            if now == "done":
                continue
            if now != "running" and self.disk_has_room():
                return cell
            self.waiting.append(cell)
        return None

    def disk_has_room(self) -> bool:
        """Each run needs room for its checkpoint, and for the one before it while it is written."""
        free = shutil.disk_usage(self.args.out).free
        needed = 2 * grid.checkpoint_bytes(self.cells) * (len(self.running) + 1)
        if free < needed:
            text = f"{free / 1e9:.1f} GB are free at {self.args.out}, and one more run needs {needed / 1e9:.1f} GB"
            if not self.running:
                raise SystemExit(f"error: {text}")
            self.table.say(f"waiting for disk space: {text}")
        return free >= needed

    def collect(self, seconds: float = 2.0) -> None:
        """Waits for runs to end, for at most `seconds`, and records each as done, failed, or to be tried again."""
        if not self.running:
            time.sleep(seconds)
            return
        ended, _ = self.ray.wait(list(self.running), timeout=seconds)
        for reference in ended:
            cell, actor = self.running.pop(reference)
            try:
                code = self.ray.get(reference)
                reason = grid.why_failed(cell, code)
            except self.ray.exceptions.RayError as error:
                code, reason = 1, f"its worker died: {first_line(error)}"
            self.ray.kill(actor)
            if code == TAKEN:
                self.waiting.append(cell)
            elif code and not self.signals:
                again = self.attempts[cell.folder] < self.args.retries and code != 2  # 2: bad input stays bad
                self.attempts[cell.folder] += 1
                self.table.say(f"{cell.folder.name}: {reason}" + ("; it is tried again" if again else ""))
                if again:
                    self.waiting.append(cell)
                else:
                    self.failed[cell.folder] = reason

    def stop(self) -> None:
        """One SIGTERM to each run, and time to write checkpoints; a second signal to the sweep kills them."""
        began, cells = time.time(), [cell for cell, _ in self.running.values()]
        self.table.say(f"stopping {len(cells)} runs: each writes a checkpoint; a second signal kills them")
        self.tell(signal.SIGTERM)
        while self.running and len(self.signals) < 2 and time.time() < began + self.args.grace:
            self.collect(0.5)
        self.tell(signal.SIGKILL)
        for cell in cells:
            fresh = [path for path in cell.folder.glob("*/checkpoint.pt") if path.stat().st_mtime >= began]
            done = grid.unfinished(cell) == []
            what = "is done" if done else "has a new checkpoint" if fresh else "HAS NO NEW CHECKPOINT"
            self.table.say(f"{cell.folder.name} {what}")

    def tell(self, number: int) -> None:
        for _, actor in self.running.values():
            actor.stop.remote(number)


class Table:
    """What is shown while a sweep runs: rewritten in place on a terminal; in a log, only when something changes."""

    def __init__(self, cells: list[Cell]) -> None:
        self.cells, self.lines, self.last, self.next = cells, 0, "", 0.0

    def show(self, last: bool = False) -> None:
        if (now := time.time()) < self.next and not last:
            return
        text = render(self.cells)
        self.next = now + 20 * (time.time() - now)  # a slow disk is not read all the time
        summary = text.splitlines()[-1]
        if sys.stdout.isatty():
            self.say(text)
            self.lines = text.count("\n") + 1
        elif summary != self.last:
            self.say(text)
            self.last = summary

    def say(self, message: str) -> None:
        self.clear()
        print(message, flush=True)

    def clear(self) -> None:
        if self.lines:
            print(f"\033[{self.lines}F\033[J", end="")
        self.lines = 0


def render(cells: list[Cell]) -> str:
    """The cells that run or failed, one a line, and the number in each state."""
    states = {cell.folder: grid.state(cell) for cell in cells}
    width = max(len(cell.folder.name) for cell in cells)
    lines = []
    for cell in cells:
        if states[cell.folder] == "running":
            now = grid.progress(cell)
            line = f"{cell.folder.name:{width}}  step {now.step:,} of {cell.total:,}"
            if math.isfinite(now.latest_return):
                line += f"  return {now.latest_return:.4g}"
            if math.isfinite(now.seconds_left):
                line += f"  {now.per_second:,.0f} steps/s  {timedelta(seconds=round(now.seconds_left))} left"
            lines.append(line)
        elif states[cell.folder] == "failed":
            lines.append(f"{cell.folder.name:{width}}  failed: {grid.why_failed(cell, grid.exit_code(cell))}")
    counts = Counter(states.values())
    return "\n".join(
        [*lines, ", ".join(f"{counts[name]} {name}" for name in ("done", "running", "stopped", "failed", "waiting"))]
    )


def print_next_commands(out: Path) -> None:
    """Those that show the sweep's results."""
    pattern = shlex.quote(f"{out}/*/*")
    print(f"python -m utils.compare {pattern}\npython -m utils.plot {pattern}")


def take_shard(cells: list[Cell], shard: str) -> list[Cell]:
    index, _, parts = shard.partition("/")
    if not (index.isdecimal() and parts.isdecimal() and int(index) < int(parts)):
        fail(f"--shard: expected i/n with 0 <= i < n, got {shard}")
    return cells[int(index) :: int(parts)]


def start_ray(args: Args) -> object:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        fail("utils.sweep needs Ray: pip install -r requirements-sweep.txt")
    if args.address is None:  # the runs share no objects, for which Ray would take 30 % of the memory
        own = {"include_dashboard": False, "object_store_memory": 100_000_000, "num_cpus": os.cpu_count()}
    else:
        own = {}
    try:
        ray.init(address=args.address or "local", log_to_driver=False, logging_level="ERROR", **own)
    except Exception as error:  # Ray raises plain ones too, on a machine that is too busy to start it in time
        if args.address:
            fail(f"--address: Ray does not answer: {first_line(error)}")
        raise SystemExit(f"error: Ray does not start: {first_line(error)}; the same command tries again") from None
    return ray


def main(args: Args, words: list[str]) -> None:
    """Runs what is left of the grid; ends with 0 if all is done, 1 if a cell failed, 128 + n if signal n stopped it."""
    check_flags(args)
    if not args.script.is_file():
        fail(f"script: expected a training script, got {args.script}, which is not a file")
    script = import_file(args.script)
    axes = grid.find_axes(words, script)
    cells = take_shard(grid.make_cells(axes, script, args.out), args.shard)
    if args.dry_run:
        for cell in cells:
            print(shlex.join(["python", str(args.script), *command(cell)]))
        print(f"{len(cells)} cells")
        return
    for cell in cells:
        grid.check_folder(cell)
    if args.status or all(grid.state(cell) == "done" for cell in cells):
        print(render(cells))
        print_next_commands(args.out)
        return

    ray = start_ray(args)
    resources = ray.cluster_resources()
    takes_gpu = "device" in {field.name for field in fields(script.Args)}
    if args.gpus_per_run is None:
        args.gpus_per_run = 1.0 if takes_gpu and resources.get("GPU") else 0.0
    if takes_gpu and args.gpus_per_run == 0 and "device" not in axes:  # Ray does not hide GPUs from runs that have none
        cells = [cell._replace(flags=(*cell.flags, "--device", "cpu")) for cell in cells]
    at_once = concurrency(args, resources)
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"command": sys.argv[1:], **versions(args.script), "ray": ray.__version__}
    with (args.out / "sweep.jsonl").open("a") as file:  # the sweeps of a job array share the folder and start at once
        file.write(json.dumps(record) + "\n")

    sweep = Sweep(args, cells, ray)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # after ray.init, which sets its own
        signal.signal(number, lambda number, frame: sweep.signals.append(number))
    sweep.run(at_once)
    with contextlib.suppress(Exception):
        ray.shutdown()
    sweep.table.show(last=True)
    print_next_commands(args.out)
    if sweep.signals:
        print("stopped; the same command resumes the sweep")
        raise SystemExit(128 + sweep.signals[0])
    for cell in cells:
        if cell.folder in sweep.failed:
            warn(f"{cell.folder.name}: {sweep.failed[cell.folder]}; this cell alone:")
            warn(shlex.join(["python", str(args.script), *command(cell)]))
    if sweep.failed:
        raise SystemExit(1)


def run_from_command_line() -> None:
    given, words = known_flags(Args, sys.argv[1:])
    main(Args(**given), words)


if __name__ == "__main__":
    run_program(run_from_command_line)
