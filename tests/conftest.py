"""Tiny runs of a script, for the tests: in this process, or in one of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dqn_sparse

ROOT = Path(__file__).parent.parent
CARTPOLE = {
    "env_id": "CartPole-v1",
    "network": "mlp",
    "total_timesteps": 500,
    "learning_starts": 100,
    "buffer_size": 1_000,
    "target_network_frequency": 50,
    "exploration_steps": 200,
    "eval_episodes": 1,
    "cuda": False,
}

torch.set_num_threads(1)  # small tensors; and other processes want a core too


def as_flags(values: dict) -> list[str]:
    """{"n_step": 3, "cuda": False} -> ["--n-step", "3", "--no-cuda"]"""
    flags = []
    for name, value in values.items():
        name = name.replace("_", "-")
        flags += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


def run_script(*command: str) -> subprocess.CompletedProcess:
    """`python <command>` from the repository's root, to its end; stdout and stderr as text."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture
def train(tmp_path):
    """Runs dqn_sparse on CartPole for a few hundred steps, in this process; gives the run's folder."""

    def train(**flags) -> Path:
        runs_dir = tmp_path / "runs"
        before = set(runs_dir.glob("*"))
        dqn_sparse.main(dqn_sparse.Args(**CARTPOLE | {"runs_dir": str(runs_dir)} | flags))
        if "resume" in flags:
            return Path(flags["resume"]).parent
        return (set(runs_dir.glob("*")) - before).pop()

    return train


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
