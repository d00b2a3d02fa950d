"""A run's notebook: its folder, logs, progress line, checkpoints and end."""

import contextlib
import fcntl
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType, ModuleType
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.checkpoints import all_finite, load_checkpoint, load_state, save_atomically, state_of
from utils.envs import EVALUATION_SEED, Policy, evaluate
from utils.files import write_atomically
from utils.flags import CpuRunFlags, Diverged, RunFlags, fail, first_line
from utils.masks import active_count, sparsity_scalars

REPEATED_SIGNAL = 2.0  # seconds in which a second signal is taken for an echo of the first
CSV_HEADERS = {
    "episodes.csv": "step,return,length",
    "evaluations.csv": "step,episode,return,length",
    "scalars.csv": "step,seconds,tag,value",
}


def choose_device(args: RunFlags) -> torch.device:
    """The device of `--device`, with TF32 set as `--tf32` says; prints its name."""
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.tf32
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device  # with its number
    except (RuntimeError, AssertionError):  # unknown, absent, or torch without CUDA
        device = None
    if device is None or device.type not in ("cpu", "cuda"):  # mps has no float64, which the replay needs
        fail(f"--device: expected auto, cpu, or an available GPU (cuda, cuda:1, ...), got {args.device}")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA graphs are captured on the current device
        print(f"device: {torch.cuda.get_device_name(device)}")
    else:
        threads = torch.get_num_threads()
        hint = "one thread" if threads == 1 else f"{threads} threads (for several runs at once: OMP_NUM_THREADS=1)"
        print(f"device: CPU, {hint}")
    return device


class StopSignal:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request: `number` is set, for the training loop to act on.

    A second one within two seconds is ignored, as wrappers and nervous users send them in pairs; a later one ends the
    program at once. With `immediate` set, the first one already ends the program, and says that text.
    """

    def __init__(self) -> None:
        self.number, self.time, self.immediate, self.previous = 0, 0.0, "", {}

    def install(self) -> None:
        if not self.previous and threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self.previous[number] = signal.signal(number, self.receive)

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.__init__()

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.number and time.monotonic() - self.time < REPEATED_SIGNAL:
            return
        if self.number or self.immediate:
            tqdm.write(self.immediate or "stopped before the checkpoint was complete", file=sys.stderr)
            raise SystemExit(128 + number)
        self.number, self.time = number, time.monotonic()
        tqdm.write("stopping: writing checkpoint.pt; a second signal abandons it", file=sys.stderr)


stop_signal = StopSignal()


class Run:
    """What one training run leaves in `runs/<env>__<script>__<seed>__<time>/`.

    args.json, versions.json and a copy of the script; TensorBoard events; `episodes.csv`, `evaluations.csv` and
    `scalars.csv`; `checkpoint.pt`; at the end `model.pt` and `curve.png`. It records and restores; of the agent it
    calls nothing but the policy that it is given. A log that cannot be written is reported once and never ends a run.

    `step` and `update` are 0, or those of the checkpoint that was resumed.
    """

    open: ClassVar[list["Run"]] = []  # for the entry point, which saves what it can if training fails

    def __init__(
        self,
        args: CpuRunFlags,
        script: str,
        state: dict[str, object],
        rng: np.random.Generator,
        total: int | None = None,
        unit: str = "step",
        progress: bool = True,
    ) -> None:
        """Makes the run's folder; with `--resume`, restores the state in place and continues in the same folder.

        Args:
            script: `__file__` of the script.
            state: everything that a checkpoint holds, by name: networks, optimizers, the replay, masks, other tensors;
                dictionaries of them too. The state of torch's random numbers is added.
            rng: the script's own random number generator.
            total: length of the run, `args.total_timesteps` unless given.
            unit: what a step is called on the progress line.
            progress: show that line; of several runs in one process, one does.
        """
        wandb = import_wandb() if args.track else None
        self.args, self.state, self.rng, self.unit = args, state, rng, unit
        self.script = Path(script)
        self.total = total or args.total_timesteps
        self.step = self.previous_step = self.update = 0
        earlier_seconds = 0.0
        if args.resume:
            self.folder = Path(args.resume).resolve().parent
            self.lock = lock_folder(self.folder)
            earlier_seconds = self._restore(load_checkpoint(args.resume))
        else:
            self.folder = new_folder(Path(args.runs_dir).expanduser(), args.env_id, self.script.stem, args.seed)
            self.lock = lock_folder(self.folder)
        self.log_every = max(100, self.total // 1_000)
        self.latest_return, self.failed_logs = math.nan, set()
        if wandb:
            self._start_wandb(wandb)
        self._open_logs()
        stop_signal.install()
        print(f"run folder: {os.path.relpath(self.folder)}")
        self.start_step, self.start_time = self.step, time.time()
        self.time_zero = self.start_time - earlier_seconds
        self.bar = tqdm(
            total=self.total,
            initial=self.step,
            unit=unit,
            disable=not progress,
            unit_scale=True,
            bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt} [<{remaining}, {rate_fmt}{postfix}]",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,  # a log file gets a line twice a minute
        )
        Run.open.append(self)

    def _restore(self, saved: dict) -> float:
        """Gives the state, the counters and all random numbers the values of a checkpoint; returns its seconds."""
        if saved["script"] != self.script.stem:
            fail(f"--resume: expected a checkpoint of {self.script.name}, got one of {saved['script']}.py")
        if saved["step"] > self.total:
            fail(f"--resume: the checkpoint is at {self.unit} {saved['step']}, but the run ends at {self.total}")
        try:
            load_state(self.state, saved["state"])
            torch.set_rng_state(saved["rng"]["torch"])
            if len(saved["rng"]["cuda"]) == torch.cuda.device_count() > 0:
                torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
            self.rng.bit_generator.state = saved["rng"]["numpy"]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            fail(f"--resume: {self.args.resume} does not fit this version of {self.script.name}: {first_line(error)}")
        self.step = self.previous_step = saved["step"]
        self.update = saved["update"]
        return saved["seconds"]

    def _open_logs(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(json.dumps(asdict(self.args), indent=2) + "\n", self.folder / "args.json")
            if not self.args.resume:
                write_atomically(json.dumps(versions(self.script), indent=2) + "\n", self.folder / "versions.json")
                shutil.copyfile(self.script, self.folder / self.script.name)
            self.files = {}
            for name in CSV_HEADERS:
                final = name == "evaluations.csv" and self.step >= self.total  # the final evaluation is played again
                drop_rows_after(self.step - final, self.folder / name)
            self.writer = SummaryWriter(self.folder, purge_step=self.step + 1 if self.step else None)
        except OSError as error:
            fail(f"--runs-dir: cannot write to {self.folder}: {error.strerror or error}")
        rows = "\n".join(f"| {name} | {value} |" for name, value in asdict(self.args).items())
        self.text("hyperparameters", f"| flag | value |\n|---|---|\n{rows}")

    def _start_wandb(self, wandb: ModuleType) -> None:
        """Starts Weights & Biases; a resumed run continues the same W&B run."""
        try:
            wandb.init(
                project=self.args.wandb_project_name,
                entity=self.args.wandb_entity,
                name=self.folder.name,
                id=self.folder.name,
                resume="allow",
                config=asdict(self.args),
                sync_tensorboard=True,  # of the writer that is made after this
                save_code=True,
            )
        except Exception as error:  # no network, no login, ...: its own errors are many
            fail(f"--track: Weights & Biases does not start: {first_line(error)}")

    def _try(self, what: str, action: Callable, *args: object) -> None:
        """A run of days must not die of a full disk or a lost logger."""
        try:
            action(*args)
        except Exception as error:
            if what not in self.failed_logs:
                self.failed_logs.add(what)
                tqdm.write(f"warning: {what} cannot be written: {first_line(error)}", file=sys.stderr)

    def _row(self, name: str, *values: object) -> None:
        def write() -> None:
            if name not in self.files:
                self.files[name] = (self.folder / name).open("a", buffering=1)
                if not self.files[name].tell():
                    self.files[name].write(CSV_HEADERS[name] + "\n")
            self.files[name].write(",".join(map(str, values)) + "\n")

        self._try(name, write)

    @property
    def stopping(self) -> bool:
        """Whether a signal asks the run to stop."""
        return stop_signal.number != 0

    def advance(self, step: int, update: int) -> None:
        """Records that the run has come to this step (agent steps, or updates of an offline run) and update."""
        self.previous_step, self.step, self.update = self.step, step, update
        self.bar.update(min(step, self.total) - self.bar.n)  # several environments may step over the end

    def due(self, every: int) -> bool:
        """Whether the last step reached or crossed a multiple of `every`; never if it is 0."""
        return every > 0 and self.step // every > self.previous_step // every

    def text(self, tag: str, markdown: str) -> None:
        """Logs a markdown text to TensorBoard."""
        self._try("TensorBoard", self.writer.add_text, tag, markdown)

    def log(self, scalars: dict[str, float], weights: dict | None = None, masks: dict | None = None) -> None:
        """Logs scalars at the current step.

        Args:
            weights, masks: also logs the steps per second, and the sparsity of these weights, in total and by layer;
                shows the first scalar, a loss, on the progress line.

        Raises:
            Diverged: a scalar is not finite.
        """
        seconds = time.time() - self.time_zero
        if weights is not None:
            sparsity, loss = sparsity_scalars(weights, masks), next(iter(scalars.values()))
            shown = {"return": self.latest_return, "sparsity": sparsity["sparsity/global"], "loss": loss}
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
            speed = (self.step - self.start_step) / (time.time() - self.start_time)
            scalars = scalars | sparsity | {"charts/SPS": speed}
        for tag, value in scalars.items():
            self._try("TensorBoard", self.writer.add_scalar, tag, value, self.step)
            self._row("scalars.csv", self.step, f"{seconds:.1f}", tag, f"{value:.6g}")
        for tag, value in scalars.items():
            if not math.isfinite(value):
                raise Diverged(f"{tag} is {value} at {self.unit} {self.step}")

    def log_episodes(self, infos: dict, done: np.ndarray) -> None:
        """Logs the episodes that ended in this step.

        Args:
            infos: of the vector environment, with the returns and lengths of `RecordEpisodeStatistics`.
            done: (num_envs,) bool.
        """
        for i in np.flatnonzero(done):
            self.log_episode(float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i]))

    def log_episode(self, episodic_return: float, length: int) -> None:
        """Logs one episode that ended in this step."""
        self.latest_return = episodic_return
        self._try("TensorBoard", self.writer.add_scalar, "charts/episodic_return", episodic_return, self.step)
        self._try("TensorBoard", self.writer.add_scalar, "charts/episodic_length", length, self.step)
        self._row("episodes.csv", self.step, f"{episodic_return:g}", length)

    def evaluate(self, policy: Policy) -> None:
        """Plays `--eval-episodes` episodes, the same ones at each call, and logs them; not after the last step, since
        `finish` does so."""
        if self.step < self.total:
            self._evaluate(policy)

    def _evaluate(self, policy: Policy, video_folder: Path | None = None) -> np.ndarray:
        seed = self.args.seed + EVALUATION_SEED
        returns, lengths = evaluate(self.args, policy, self.args.eval_episodes, seed, video_folder)
        for episode, (value, length) in enumerate(zip(returns, lengths)):
            self._row("evaluations.csv", self.step, episode, f"{value:g}", length)
        self._try("TensorBoard", self.writer.add_scalar, "eval/episodic_return", returns.mean(), self.step)
        if self.unit == "update":  # an offline run has no other returns to show
            self.latest_return = returns.mean()
        return returns

    def checkpoint(self) -> None:
        """Writes `checkpoint.pt`.

        Raises:
            Diverged: a network's weights are not finite; the last checkpoint stays.
        """
        if not all_finite(self.state):
            raise Diverged(f"the networks' weights are not finite at {self.unit} {self.step}")
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        content = {
            "script": self.script.stem,
            "args": asdict(self.args),
            "state": state_of(self.state),
            "step": self.step,
            "update": self.update,
            "seconds": time.time() - self.time_zero,
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": self.rng.bit_generator.state},
        }
        save_atomically(content, self.folder / "checkpoint.pt")

    def try_checkpoint(self) -> None:
        """`checkpoint`, but a full disk is only reported: training continues, and the last checkpoint stays."""
        try:
            self.checkpoint()
        except (OSError, RuntimeError) as error:  # torch has its own for a write that fails
            tqdm.write(f"warning: checkpoint.pt not saved: {disk_error(error, self.folder)}", file=sys.stderr)

    def close(self) -> None:
        """Flushes and closes the logs."""
        self.bar.close()
        self._try("TensorBoard", self.writer.close)
        for name, file in self.files.items():
            self._try(name, file.close)
        os.close(self.lock)
        Run.open.remove(self)
        if not Run.open:
            stop_signal.restore()

    def stop(self) -> None:
        """Ends a run that a signal asked to stop: writes the checkpoint, says how to resume, and exits, unless other
        runs in this process are still open."""
        number = stop_signal.number
        self.bar.close()
        try:
            self.checkpoint()
        except (OSError, RuntimeError) as error:
            self.close()
            raise SystemExit(f"error: checkpoint.pt not saved: {disk_error(error, self.folder)}") from None
        self.close()
        checkpoint = os.path.relpath(self.folder / "checkpoint.pt")
        print(f"stopped at {self.unit} {self.step}; resume with: python {self.script.name} --resume {checkpoint}")
        if not Run.open:
            raise SystemExit(128 + number)

    def save_model(self, networks: dict[str, nn.Module], masks: dict[str, dict]) -> None:
        """Writes `model.pt`: the networks by name, and their masks by the weights' names (a dense network has none).

        Raises:
            Diverged: a network's weights are not finite.
        """
        if not all_finite(networks):
            raise Diverged("the networks' weights are not finite")
        content = {
            "script": self.script.stem,
            "args": asdict(self.args),
            "networks": state_of(networks),
            "masks": {net: {name: mask.bool() for name, mask in masks[net].items()} for net in masks},
        }
        try:
            save_atomically(content, self.folder / "model.pt")
        except (OSError, RuntimeError) as error:
            elsewhere = Path(tempfile.gettempdir()) / f"{self.folder.name}__model.pt"
            print(f"error: model.pt not saved: {disk_error(error, self.folder)}", file=sys.stderr)
            try:
                save_atomically(content, elsewhere)
            except (OSError, RuntimeError) as second:
                raise SystemExit(f"error: nor as {elsewhere}: {disk_error(second, elsewhere.parent)}") from None
            raise SystemExit(f"error: saved as {elsewhere} instead; not evaluated") from None

    def finish(
        self, policy: Policy, networks: dict[str, nn.Module], masks: dict[str, dict], densities: dict[str, dict]
    ) -> np.ndarray:
        """Saves `model.pt`, draws `curve.png` and plays the final evaluation; returns its (episodes,) returns.

        Args:
            networks, masks: see `save_model`.
            densities: fraction of active weights that each masked weight should have by now.
        """
        self.bar.close()
        self.save_model(networks, masks)
        saved = f"model.pt is saved; evaluate it with: python -m utils.evaluate {os.path.relpath(self.folder)}"
        if stop_signal.number:
            number = stop_signal.number
            self.close()
            print(f"stopped: {saved}")
            raise SystemExit(128 + number)
        stop_signal.immediate = f"stopped: {saved}"
        print(f"playing {self.args.eval_episodes} episodes with the final network")
        returns = self._evaluate(policy, self.folder / "videos" if self.args.capture_video else None)
        self._try("curve.png", self._draw_curve)
        self.close()
        print(f"model.pt, curve.png and the logs are in {os.path.relpath(self.folder)}")
        print(f"final evaluation: mean return {returns.mean():.1f} (sd {returns.std():.1f}) of {len(returns)} episodes")
        missed = [
            f"{net}.{name}"
            for net, layers in masks.items()
            for name, mask in layers.items()
            if int(mask.count_nonzero()) != active_count(mask.numel(), densities[net][name])
        ]
        if missed:
            raise SystemExit(f"error: the final sparsity is not the one asked for in {', '.join(missed)}")
        return returns

    def _draw_curve(self) -> None:
        from utils.curves import save_curve  # matplotlib is slow to import

        names = ["method", "sparsity", "width", "seed"]
        if getattr(self.args, "method", None) == "dense":
            names.remove("sparsity")
        flags = [f"{name} {getattr(self.args, name)}" for name in names if hasattr(self.args, name)]
        save_curve(self.folder, f"{self.args.env_id}, {self.script.stem}: {', '.join(flags)}".replace("method ", ""))


def disk_error(error: Exception, folder: Path) -> str:
    """Why a file could not be written; torch hides a full disk behind errors of its own."""
    full = isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < 2**20
    return f"{folder}: {'No space left on device' if full else first_line(error)}"


def new_folder(runs_dir: Path, env_id: str, script: str, seed: int) -> Path:
    """Makes a run's folder, with -2, -3, ... behind its name if several runs start in the same second."""
    name, number = f"{re.sub('[/:]', '-', env_id)}__{script}__{seed}__{int(time.time())}", 1
    while True:
        folder = runs_dir / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.is_dir():
                fail(f"--runs-dir: cannot make {folder}: a file is in its way")
            number += 1
        except OSError as error:
            fail(f"--runs-dir: cannot write to {folder}: {error.strerror}")


def lock_folder(folder: Path) -> int:
    """Locks a run's folder for this process; closing the file descriptor, or the process's end, unlocks it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--resume: another process is writing to {os.path.relpath(folder)}")
    except OSError:  # a file system without locks
        pass
    return descriptor


def drop_rows_after(step: int, path: Path) -> None:
    """Rewrites a csv file, whose first column is the step, without later rows and without a torn last line."""
    if path.exists():
        header, *rows = path.read_text().split("\n")[:-1] or [CSV_HEADERS[path.name]]
        kept = [row for row in rows if row.partition(",")[0].isdigit() and int(row.partition(",")[0]) <= step]
        write_atomically("\n".join([header, *kept]) + "\n", path)


def versions(script: Path) -> dict[str, str | None]:
    """What a run was made with: versions of the packages, and the commit if the script is in a git repository."""
    git = ["git", "-C", str(script.resolve().parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    packages = {"torch": torch.__version__, "numpy": np.__version__, "gymnasium": gym.__version__}
    return {"script": script.stem, "commit": commit, "python": platform.python_version(), **packages}


def import_wandb() -> ModuleType:
    """Weights & Biases, an optional package."""
    try:
        import wandb
    except ImportError:
        fail("--track: needs Weights & Biases; pip install wandb")
    return wandb
