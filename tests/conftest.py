"""Tiny runs of a script, for the tests: in this process, or in one of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import dqn_sparse

ROOT = Path(__file__).parent.parent
CARTPOLE = {
    "env_id": "CartPole-v1",
    "total_timesteps": 500,
    "learning_starts": 100,
    "buffer_size": 1_000,
    "target_network_frequency": 50,
    "exploration_steps": 200,
    "eval_episodes": 1,
    "device": "cpu",
}

torch.set_num_threads(1)  # small tensors; and other processes want a core too


def as_flags(values: dict) -> list[str]:
    """{"n_step": 3, "device": "cpu"} -> ["--n-step", "3", "--no-cuda"]"""
    flags = []
    for name, value in values.items():
        name = name.replace("_", "-")
        flags += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


def run_script(*command: str) -> subprocess.CompletedProcess:
    """`python <command>` from the repository's root, to its end; stdout and stderr as text."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


def run_main(script: ModuleType, runs_dir: Path, **flags) -> tuple[Path, np.ndarray]:
    """`script.main` in this process, on the CPU: the run's folder, and the returns of its last evaluation."""
    before = set(runs_dir.glob("*"))
    returns = script.main(script.Args(**{"runs_dir": str(runs_dir), "device": "cpu", "eval_episodes": 1} | flags))
    (folder,) = [Path(flags["resume"]).parent] if "resume" in flags else set(runs_dir.glob("*")) - before
    return folder, returns


@pytest.fixture
def train(tmp_path):
    """Runs dqn_sparse on CartPole for a few hundred steps, in this process; gives the run's folder."""
    return lambda **flags: run_main(dqn_sparse, tmp_path / "runs", **CARTPOLE | flags)[0]


@pytest.fixture
def stop_at(monkeypatch):
    """Makes every run stop at an agent step, as SIGTERM would; None lets runs go on to their end."""
    progress = dqn_sparse.Run.progress

    def stop_at(last: int | None) -> None:
        def stopping(run, step, **values):
            progress(run, step, **values)
            run.stopping = run.stopping or (last is not None and step >= last)

        monkeypatch.setattr(dqn_sparse.Run, "progress", stopping)

    return stop_at


@pytest.fixture
def logged_run(tmp_path):
    """Writes what a run leaves: flags, episodes as rows (step, return, length), scalars as tag: rows (step, value)."""

    def logged_run(name: str, episodes, scalars=None, finished: bool = True, **flags) -> Path:
        folder = tmp_path / "logged" / name
        folder.mkdir(parents=True)
        args = {
            "env_id": "CartPole-v1",
            "total_timesteps": 1_000,
            "width": 1,
            "method": "gmp",
            "sparsity": 0.9,
            "seed": 1,
        }
        (folder / "args.json").write_text(json.dumps(args | flags))
        lines = [f"{step},{value},{length}\n" for step, value, length in episodes]
        (folder / "episodes.csv").write_text("step,return,length\n" + "".join(lines))
        if scalars:
            writer = SummaryWriter(folder)
            for tag, rows in scalars.items():
                for step, value in rows:
                    writer.add_scalar(tag, value, step)
            writer.close()
        if finished:
            (folder / "model.pt").touch()
        return folder

    return logged_run
