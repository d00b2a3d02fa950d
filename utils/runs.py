"""A run's bookkeeping: device, folder, progress line, TensorBoard, episode log and signals."""

import csv
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.flags import fail


def choose_device(cuda: bool, tf32: bool = True) -> torch.device:
    """The GPU if there is one and it is wanted, else the CPU; says which.

    Args:
        tf32: let a GPU round the factors of float32 products and convolutions to 10 bits, which is JAX's default too.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    device = torch.device("cuda" if cuda and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU, {torch.get_num_threads()} threads (for several runs at once, OMP_NUM_THREADS=1 is fastest)"
    print(f"device: {name}")
    return device


def median_seconds(action: Callable[[], object], repeats: int = 3) -> float:
    """How long one call takes, after a first one that is not counted."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def in_words(seconds: float) -> str:
    """A duration in the unit in which a person would say it."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.0f} seconds"


class Run:
    """The folder `runs/<env>__<script>__<seed>__<time>/` and everything that is written there while training goes on.

    Holds `args.json`, TensorBoard events, `episodes.csv` (step, return, length), `checkpoint.pt`, and at the end
    `model.pt`. A full disk or a lost logger is reported once and never ends the run. The first Ctrl-C or SIGTERM sets
    `stopping`, for the loop to act on; a second one ends the program at once.
    """

    def __init__(self, args: object, script: str, step: int = 0, total: int | None = None, unit: str = "step") -> None:
        """Makes the folder, or goes on in the one of `args.resume`, forgetting what was logged after `step`.

        Args:
            total: steps of the whole run, `args.total_timesteps` unless given.
            unit: what a step is called on the progress line.
        """
        self.script, self.unit = script, unit
        wandb = import_wandb() if args.track else None
        if args.resume:
            self.folder = Path(args.resume).resolve().parent
        else:
            name = f"{args.env_id.replace('/', '-')}__{script}__{args.seed}__{int(time.time())}"
            self.folder = unused(Path(args.runs_dir) / name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
        except OSError as error:
            fail(f"--runs-dir: cannot write to {self.folder}: {error.strerror}")
        print(f"run folder: {os.path.relpath(self.folder)}")
        if wandb:
            try:
                wandb.init(
                    project=args.wandb_project_name,
                    entity=args.wandb_entity,
                    name=self.folder.name,
                    config=asdict(args),
                    sync_tensorboard=True,
                    save_code=True,
                )
            except Exception as error:  # no network, no login, ...: its own errors are many
                fail(f"--track: Weights & Biases does not start: {error}")

        self.lost: set[str] = set()
        self.writer = SummaryWriter(self.folder, purge_step=step + 1 if step else None)
        rows = "\n".join(f"| {name} | {value} |" for name, value in asdict(args).items())
        self.text("hyperparameters", f"| flag | value |\n|---|---|\n{rows}")
        self.episodes = self._open_episodes(step)

        self.start_step, self.start_time, self.latest_return = step, time.time(), float("nan")
        # A terminal gets a living line; a log file gets one twice a minute.
        self.bar = tqdm(
            total=total or args.total_timesteps,
            initial=step,
            unit=unit,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        )
        self.stopping = False
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._on_signal)

    def _open_episodes(self, step: int):
        path = self.folder / "episodes.csv"
        earlier = [row for row in read_episodes(path) if row[0] <= step] if step else []
        file = path.open("w", newline="", buffering=1)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("step", "return", "length"))
        writer.writerows(earlier)
        return file

    def _on_signal(self, number: int, frame: object) -> None:
        if self.stopping or self.bar.n >= self.bar.total:
            raise SystemExit(128 + number)
        self.stopping = True

    def _log(self, what: str, action: Callable, *args: object) -> None:
        try:
            action(*args)
        except Exception as error:  # a run of days must not die of its logger
            if what not in self.lost:
                self.lost.add(what)
                tqdm.write(f"warning: {what} cannot be written any more: {error}", file=sys.stderr)

    def text(self, tag: str, markdown: str) -> None:
        """Logs a markdown text to TensorBoard."""
        self._log("TensorBoard", self.writer.add_text, tag, markdown)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Logs scalars to TensorBoard."""
        for tag, value in values.items():
            self._log("TensorBoard", self.writer.add_scalar, tag, value, step)

    def episode(self, episode_return: float, length: int, step: int) -> None:
        """Logs an episode that ended at agent step `step`."""
        self.latest_return = float(episode_return)
        self.scalars({"charts/episodic_return": episode_return, "charts/episodic_length": length}, step)
        self._log("episodes.csv", self.episodes.write, f"{step},{float(episode_return):g},{int(length)}\n")

    def progress(self, step: int, **values: float) -> None:
        """Moves the progress line to `step`; `values` are shown on it."""
        if values:
            shown = {"return": self.latest_return} | values
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
        self.bar.update(min(step, self.bar.total) - self.bar.n)  # several environments may step over the end

    def steps_per_second(self, step: int) -> float:
        """Agent steps per second since this process began to train."""
        return (step - self.start_step) / (time.time() - self.start_time)

    def close(self) -> None:
        """Flushes and closes the logs."""
        self.bar.close()
        self._log("TensorBoard", self.writer.close)
        self._log("episodes.csv", self.episodes.close)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def stop(self, step: int) -> None:
        """Closes the logs before the end, and says how to go on."""
        self.close()
        checkpoint = self.folder / "checkpoint.pt"
        how = f"; go on with: python {self.script}.py --resume {checkpoint}" if checkpoint.exists() else ""
        print(f"stopped at {self.unit} {step}{how}")

    def finish(self, returns: np.ndarray) -> None:
        """Logs the final evaluation's returns (episodes,), closes the logs, and says where everything is."""
        for episode, value in enumerate(returns):
            self.scalars({"eval/episodic_return": value}, episode)
        self.close()
        print(f"model.pt, curve.png and the logs are in {self.folder}")
        print(f"final evaluation: mean return {returns.mean():.1f} (sd {returns.std():.1f}) of {len(returns)} episodes")


def import_wandb() -> ModuleType:
    """Weights & Biases, an optional package."""
    try:
        import wandb
    except ImportError:
        fail("--track: needs Weights & Biases; pip install wandb")
    return wandb


def unused(folder: Path) -> Path:
    """`folder`, or with -2, -3, ... behind it if two runs start in the same second."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def read_episodes(path: Path) -> list[tuple[int, float, int]]:
    """The rows (step, return, length) of an `episodes.csv`; the torn last line of a killed run is passed over."""
    rows = []
    if path.exists():
        for line in path.read_text().split("\n")[1:-1]:
            try:
                step, episode_return, length = line.split(",")
                rows.append((int(step), float(episode_return), int(length)))
            except ValueError:
                continue
    return rows
