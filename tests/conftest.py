"""Tiny runs of a script, for the tests: in this process, or in one of its own."""

import atexit
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import ModuleType
from unittest import mock

import hypothesis
import numpy as np
import pytest
import torch

import dqn_sparse
from utils import checkpoints, runs
from utils.flags import RunFlags
from utils.masks import active_count, layer_densities
from utils.runs import CSV_HEADERS, Run, stop_signal

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
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

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "torch._dynamo", "utils.curves", "shimmy", "pygame"])

DRAW_CURVE = Run._draw_curve

torch.set_num_threads(1)  # small tensors; and other processes want a core too
hypothesis.settings.register_profile("suite", deadline=None)  # machines may be busy
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    """Modules with long tests first, so that no process is left with one of them at the end."""
    long = ("test_sweep", "test_learning", "test_iqn_pruned", "test_stream_sparse", "test_golden")
    items.sort(key=lambda item: item.path.stem not in long)


def as_flags(values: dict) -> list[str]:
    """{"n_step": 3, "double": False} -> ["--n-step", "3", "--no-double"]"""
    flags = []
    for name, value in values.items():
        name = name.replace("_", "-")
        flags += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


def load(path: Path) -> dict:
    """What a checkpoint or a model holds."""
    return torch.load(path, weights_only=True)


def same(a: object, b: object) -> bool:
    """Equal to the last bit, whatever is inside of what."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def check_exact_masks(model: dict, method: str, sparsity: float) -> None:
    """The masks of a saved model have exactly the active weights of ERK, and the other weights are zero."""
    for net, masks in model["masks"].items():
        weights = {name: w for name, w in model["networks"][net].items() if w.ndim >= 2}
        assert set(masks) == (set() if method == "dense" else set(weights))
        densities = layer_densities(weights, sparsity, "erk")
        for name, mask in masks.items():
            assert mask.dtype == torch.bool
            assert int(mask.sum()) == active_count(mask.numel(), densities[name])
            assert not weights[name][~mask].any() and weights[name][mask].any()


def run_python(*command: str) -> subprocess.CompletedProcess:
    """`python <command>` from the repository's root, to its end; stdout and stderr as text."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=ENV, capture_output=True, text=True)


def run_script(script: str, *flags: str, code: str = "") -> subprocess.CompletedProcess:
    """As `run_python`, a script in a process of its own, after this code in which it is the module `script`.

    The process is a fork of a server that has imported what all scripts import, which takes longer than a tiny run.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = FORKS.Process(target=run_here, args=(script, flags, textwrap.dedent(code), folder))
        process.start()
        process.join()
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess([script, *flags], process.exitcode, out, err)


def run_here(script: str, flags: tuple[str, ...], code: str, folder: str) -> None:
    """The whole life of that process; its stdout and stderr are files in `folder`."""
    sys.stdout, sys.stderr = (open(f"{folder}/{name}", "a", buffering=1) for name in ("out", "err"))  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 1)  # for what is written from C
    os.dup2(sys.stderr.fileno(), 2)
    os.chdir(ROOT)
    sys.argv = [script, *flags]
    torch.set_num_threads(1)
    try:
        if code:
            module = importlib.import_module(script.removesuffix(".py"))
            exec(code, {"os": os, "signal": signal, "script": module, "checkpoints": checkpoints, "runs": runs})
            module.launch(module.main, module.Args, module.preset)
        else:
            runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing does not


def run_main(script: ModuleType, runs_dir: Path, **flags) -> tuple[Path, np.ndarray | None]:
    """`script.main` in this process, on the CPU: the run's folder, and the returns of its final evaluation (None if it
    was stopped)."""
    before = set(runs_dir.glob("*"))
    cpu = {"device": "cpu"} if issubclass(script.Args, RunFlags) else {}
    returns = None
    try:
        returns = script.main(script.Args(**{"runs_dir": str(runs_dir), "eval_episodes": 1} | cpu | flags))
    except SystemExit as ended:
        if ended.code != 128 + signal.SIGTERM:  # see `stop_at`
            raise
    (folder,) = [Path(flags["resume"]).parent] if "resume" in flags else set(runs_dir.glob("*")) - before
    return folder, returns


@pytest.fixture(scope="session", autouse=True)
def no_curves():
    """Runs in this process leave no curve.png, which takes a fifth of a tiny run; those in one of their own do."""
    with mock.patch.object(Run, "_draw_curve", lambda run: None):
        yield


@pytest.fixture
def curves(monkeypatch):
    """Unless a test asks for it."""
    monkeypatch.setattr(Run, "_draw_curve", DRAW_CURVE)


@pytest.fixture
def train(tmp_path):
    """Runs dqn_sparse on CartPole for a few hundred steps, in this process; gives the run's folder."""
    return lambda **flags: run_main(dqn_sparse, tmp_path / "runs", **CARTPOLE | flags)[0]


@pytest.fixture
def stop_at(monkeypatch):
    """Makes every run stop at a step, as SIGTERM would, with exit code 143; None lets runs play to their end."""
    advance = Run.advance

    def stop_at(last: int | None) -> None:
        def stopping(run, step, update):
            advance(run, step, update)
            if last is not None and step >= last:
                stop_signal.number = signal.SIGTERM

        monkeypatch.setattr(Run, "advance", stopping)

    return stop_at


@pytest.fixture
def logged_run(tmp_path):
    """Writes what a run leaves: flags, episodes as rows (step, return, length), scalars as tag: rows (step, value),
    evaluations as rows (step, episode, return, length); the last scalar comes after 90 seconds."""

    def logged_run(name: str, episodes, scalars=None, finished: bool = True, evaluations=(), **flags) -> Path:
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
        rows = {"episodes": episodes, "evaluations": evaluations}
        rows["scalars"] = [(step, 90, tag, value) for tag in scalars or {} for step, value in scalars[tag]]
        for name, header in CSV_HEADERS.items():
            lines = [",".join(map(str, row)) + "\n" for row in rows[name.removesuffix(".csv")]]
            (folder / name).write_text(header + "\n" + "".join(lines))
        if finished:
            (folder / "model.pt").touch()
        return folder

    return logged_run
