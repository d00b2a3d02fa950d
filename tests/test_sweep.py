"""Grids of runs on Ray: what a kill, a signal or a failure anywhere leaves, and what the same command then does."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ENV, ROOT, run_python

import dqn_sparse
from utils import cells as grid
from utils.sweep import Args, concurrency, start_ray, take_shard

pytest.importorskip("ray", reason="ray is not installed: pip install -r requirements-sweep.txt")

# A script that counts instead of learning, so that a test takes seconds. It notes each of its starts.
COUNT = """
import csv, json, os, signal, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path
from utils.flags import PositiveInt, RunFlags, Seed, parse_args

@dataclass
class Args(RunFlags):
    env_id: str = "Count-v0"
    seed: Seed = 1
    total_timesteps: PositiveInt = 20
    method: str = "dense"
    hold: str | None = None  # without this file, a run waits in the middle

def preset(args):
    return {}

def main():
    if "--resume" in sys.argv:
        folder = Path(sys.argv[sys.argv.index("--resume") + 1]).parent
        args, step = Args(**json.loads((folder / "args.json").read_text())), int((folder / "checkpoint.pt").read_text())
    else:
        args, step = parse_args(Args, preset), 0
        folder = Path(args.runs_dir) / f"Count-v0__count__{args.seed}__{os.getpid()}"
        folder.mkdir()
        (folder / "args.json").write_text(json.dumps(asdict(args)))

    def save():
        (folder / f"{step}").write_text(str(step))
        os.replace(folder / f"{step}", folder / "checkpoint.pt")

    def stop(number, frame):
        save()
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    with (folder / "starts").open("a") as file:
        file.write(f"{step}\\n")
    while step < args.total_timesteps:
        time.sleep(0.01)
        if step == 10 and args.hold and not Path(args.hold).exists():
            continue
        step += 1
        if step % args.checkpoint_every == 0:
            save()
    if args.method == "broken":
        raise SystemExit("error: it is broken")
    (folder / "model.pt").write_text("")

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def sweep(tmp_path):
    """Starts sweeps of the counting script, and ends those that a test leaves."""
    (tmp_path / "count.py").write_text(COUNT)
    started = []

    def start(*flags: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "utils.sweep", str(tmp_path / "count.py"), "--out", str(tmp_path / "out")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([*command, *flags], cwd=ROOT, env=ENV, start_new_session=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def runs_of(tmp_path) -> list[psutil.Process]:
    """The processes of runs."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(tmp_path / "count.py") in words and "utils.sweep" not in words:
            found.append(process)
    return found


def wait_for(condition, seconds: float = 60):
    """What `condition` returns, once it is true."""
    end = time.time() + seconds
    while time.time() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("timeout")


def held_runs(tmp_path, number: int) -> list[psutil.Process]:
    """Waits until so many runs are held in their middle, and returns their processes."""
    wait_for(lambda: sum(path.read_text() == "10" for path in tmp_path.glob("out/*/*/checkpoint.pt")) == number)
    return runs_of(tmp_path)


def starts(tmp_path) -> dict[str, list[int]]:
    """For each cell that is done, the steps at which its run was started and resumed."""
    found = {}
    for model in tmp_path.glob("out/*/*/model.pt"):
        cell = model.parent.parent.name
        assert cell not in found, "a cell ran twice"
        found[cell] = [int(step) for step in (model.parent / "starts").read_text().split()]
    return found


GRID = ("--seed", "1", "2", "--method", "dense", "gmp")
CELLS = {f"seed={seed},method={method}" for seed in (1, 2) for method in ("dense", "gmp")}


# ---- Cells -----------------------------------------------------------------------------------------------------------


def cells_of(line: str) -> list[grid.Cell]:
    return grid.make_cells(grid.find_axes(shlex.split(line), dqn_sparse), dqn_sparse, Path("out"))


def test_every_combination_is_a_cell_and_seeds_vary_slowest():
    cells = cells_of("--env-id CartPole-v1 MinAtar/Breakout-v0 --seed 1 2 --width=1 --width 2 --bias --no-bias")
    found = [(cell.args["seed"], cell.args["env_id"], cell.args["width"], cell.args["bias"]) for cell in cells]
    games = ("CartPole-v1", "MinAtar/Breakout-v0")
    assert found == [(s, e, w, b) for s in (1, 2) for e in games for w in (1, 2) for b in (True, False)]
    assert cells[0].folder == Path("out/env-id=CartPole-v1,seed=1,width=1,bias")
    assert cells[-1].folder == Path("out/env-id=MinAtar-Breakout-v0,seed=2,width=2,no-bias")
    assert {cell.total for cell in cells} == {60_000, 1_000_000}  # of the games' presets


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--wdth 1 2", "--wdth"),
        ("1 2 --width 3", "1"),
        ("--width 1 two", "two"),
        ("--sparsity 0.9 1.0", "--sparsity"),
        ("--method dense best", "best"),
        ("--seed 1 1", "--seed"),
        ("--runs-dir a b", "--runs-dir"),
        ("--resume x", "--resume"),
        ("--env-id A/B A-B", "folder"),
    ],
)
def test_bad_flags_are_refused_before_anything_starts(line, named, capsys):
    with pytest.raises(SystemExit) as ended:
        cells_of(line)
    assert ended.value.code == 2 and named in "".join(capsys.readouterr())


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 30])
def test_shards_cover_the_grid_exactly(parts):
    cells = cells_of("--seed 1 2 3 --width 1 2 3")
    shards = [take_shard(cells, f"{i}/{parts}") for i in range(parts)]
    assert sorted(cell.folder for shard in shards for cell in shard) == sorted(cell.folder for cell in cells)


@pytest.mark.parametrize("shard", ["2/2", "-1/2", "1", "a/b", "1/0"])
def test_bad_shards_are_refused(shard):
    with pytest.raises(SystemExit) as ended:
        take_shard([], shard)
    assert ended.value.code == 2


# ---- Sweeps ----------------------------------------------------------------------------------------------------------


def test_a_grid_of_a_real_script_and_the_same_command_again(tmp_path):
    out = tmp_path / "out"
    # This script fills in flags that follow from the environment
    flags = "--env-id Pendulum-v1 --total-timesteps 250 --learning-starts 100 --eval-episodes 1"
    command = ["-m", "utils.sweep", "sac_sparse.py", *flags.split(), "--seed", "1", "2", "--out", str(out)]
    ended = run_python(*command)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("2 done") == 1 and f"utils.compare '{out}/*/*'" in ended.stdout
    models = {path: path.stat().st_mtime_ns for path in out.glob("*/*/model.pt")}
    assert {path.parents[1].name for path in models} == {"seed=1", "seed=2"}
    again = run_python(*command)
    assert again.returncode == 0 and models == {path: path.stat().st_mtime_ns for path in out.glob("*/*/model.pt")}
    assert "2 done" in again.stdout and "at once" not in again.stdout  # nothing is left to start Ray for


def test_what_a_worker_imports_is_light():
    """There is one for each run; torch would take seconds and hundreds of megabytes in each."""
    code = "import sys, utils.cells; print({'torch', 'gymnasium', 'matplotlib'} & set(sys.modules))"
    assert run_python("-c", code).stdout == "set()\n"


def test_a_killed_run_is_resumed_and_a_failing_one_is_reported(tmp_path, sweep):
    process = sweep("--seed", "1", "2", "--method", "dense", "broken", "--jobs", "2", "--hold", str(tmp_path / "go"))
    held_runs(tmp_path, 2)[0].kill()
    (tmp_path / "go").touch()
    out, err = process.communicate()
    assert process.returncode == 1
    assert set(starts(tmp_path)) == {"seed=1,method=dense", "seed=2,method=dense"}
    attempts = [path.read_text().split() for path in tmp_path.glob("out/*/*/starts")]
    assert len(attempts) == 4 and all(steps[0] == "0" and len(steps) <= 2 for steps in attempts)
    assert "signal 9" in out and "it is broken" in out and "2 done" in out and "2 failed" in out
    assert "count.py --seed 1 --method broken" in err  # the command for that cell alone


def test_signals_stop_the_runs_with_checkpoints_and_the_same_command_completes(tmp_path, sweep):
    flags = (*GRID, "--hold", str(tmp_path / "go"), "--jobs", "2")
    for number in (signal.SIGINT, signal.SIGTERM):
        process = sweep(*flags)
        wait_for(lambda: len(runs_of(tmp_path)) == 2)
        held_runs(tmp_path, 2)
        process.send_signal(number)
        out, _ = process.communicate()
        assert process.returncode == 128 + number
        assert out.count("has a new checkpoint") == 2 and not runs_of(tmp_path)
        assert "2 stopped" in out and "2 waiting" in out
    (tmp_path / "go").touch()
    process = sweep(*flags)
    assert process.communicate() and process.returncode == 0
    done = starts(tmp_path)
    assert set(done) == CELLS
    assert sorted(done.values()) == [[0], [0], [0, 10, 10], [0, 10, 10]]


@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_a_kill_of_ray_leaves_no_orphans_and_loses_nothing(victim, tmp_path, sweep):
    flags = (*GRID, "--hold", str(tmp_path / "go"), "--jobs", "2")
    process = sweep(*flags)
    run = held_runs(tmp_path, 2)[0]
    (run.parent() if victim == "worker" else process).kill()
    if victim == "worker":
        wait_for(lambda: not run.is_running())
    else:
        process.communicate()
        wait_for(lambda: not runs_of(tmp_path))
    (tmp_path / "go").touch()
    if victim == "driver":
        process = sweep(*flags)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    done = starts(tmp_path)
    assert set(done) == CELLS
    resumed = [steps[1] for steps in done.values() if len(steps) == 2]
    assert resumed == [10] * (1 if victim == "worker" else 2)  # where they were: the run got a signal, and saved


def test_two_sweeps_in_one_folder_share_its_cells(tmp_path, sweep):
    both = [sweep(*GRID), sweep(*GRID)]
    for process in both:
        out, err = process.communicate()
        assert process.returncode == 0, out + err
    assert {cell: len(steps) for cell, steps in starts(tmp_path).items()} == dict.fromkeys(CELLS, 1)
    records = [json.loads(line) for line in (tmp_path / "out" / "sweep.jsonl").read_text().splitlines()]
    assert [record["command"][-len(GRID) :] for record in records] == [list(GRID)] * 2


def test_status_reads_the_disk(tmp_path, sweep):
    states = ("done", "failed", "stopped", "held", "waiting")
    cells = {state: tmp_path / "out" / f"seed={seed}" for seed, state in enumerate(states, 1)}
    for seed, state in enumerate(states[:-1], 1):
        folder = cells[state] / "Count-v0__count__1__1"
        folder.mkdir(parents=True)
        args = {"env_id": "Count-v0", "seed": seed, "total_timesteps": 20, "hold": None, "method": "dense"}
        (folder / "args.json").write_text(json.dumps(args))
    (cells["done"] / "Count-v0__count__1__1" / "model.pt").touch()
    (cells["stopped"] / "Count-v0__count__1__1" / "checkpoint.pt").touch()
    (cells["failed"] / "exit_code").write_text("-9")
    (cells["held"] / "Count-v0__count__1__1" / "scalars.csv").write_text("step,seconds,tag,value\n10,5.0,loss,1\n")
    held = grid.lock(grid.Cell(cells["held"], (), {}))
    process = sweep("--seed", "1", "2", "3", "4", "5", "--status")
    text, err = process.communicate()
    held.close()
    assert process.returncode == 0, err
    assert "1 done, 1 running, 1 stopped, 1 failed, 1 waiting" in text
    assert "signal 9" in text and "step 10 of 20" in text and "2 steps/s" in text and "0:00:05 left" in text


def test_progress_of_a_run_that_has_its_model_and_is_still_drawing_its_curve(tmp_path):
    run = tmp_path / "seed=1" / "Count-v0__count__1__1"
    run.mkdir(parents=True)
    (run / "args.json").touch()
    (run / "scalars.csv").write_text("step,seconds,tag,value\n20,5.0,loss,1\n")
    (run / "model.pt").touch()
    assert grid.progress(grid.Cell(run.parent, (), {"total_timesteps": 20})).step == 20


def test_a_folder_keeps_its_flags_once_it_holds_a_run(tmp_path, capsys):
    first, other = (
        grid.make_cells(grid.find_axes(["--width", width], dqn_sparse), dqn_sparse, tmp_path)[0] for width in "12"
    )
    assert first.folder == other.folder
    first.folder.mkdir()
    grid.write_flags(first)
    grid.check_folder(other)  # nothing has been trained here
    run = first.folder / "a_run"
    run.mkdir()
    (run / "args.json").touch()
    grid.check_folder(first)
    with pytest.raises(SystemExit) as ended:
        grid.check_folder(other)
    assert ended.value.code == 2 and "width 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, 2),
        ({"cpus_per_run": 2.0}, 1),
        ({"gpus_per_run": 0.25, "cpus_per_run": 0.1}, 4),
        ({"memory_per_run": 9.0, "cpus_per_run": 0.1}, 3),
        ({"jobs": 1}, 1),
    ],
)
def test_concurrency_follows_from_what_there_is(flags, expected):
    args = Args(Path("count.py"), Path("out"), **{"gpus_per_run": 0.0} | flags)
    assert concurrency(args, {"CPU": 2.0, "GPU": 1.0, "memory": 30e9}) == expected


@pytest.mark.parametrize(("name", "there"), [("cpus_per_run", "2"), ("gpus_per_run", "1"), ("memory_per_run", "30")])
def test_a_run_that_needs_more_than_there_is_is_refused(name, there, capsys):
    args = Args(Path("count.py"), Path("out"), **{"gpus_per_run": 0.0, name: 40.0})
    with pytest.raises(SystemExit) as ended:
        concurrency(args, {"CPU": 2.0, "GPU": 1.0, "memory": 30e9})
    said = capsys.readouterr().err
    assert ended.value.code == 2 and name.replace("_", "-") in said and f" {there}, " in said and "40" in said


def test_ray_that_does_not_start_is_one_line(monkeypatch, tmp_path, capsys):
    def init(**kwargs):
        raise Exception("The current node timed out during startup.\nmore")

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(SystemExit, match=r"timed out during startup\.; the same command") as here:
        start_ray(Args(script=tmp_path / "count.py", out=tmp_path))
    assert "\n" not in here.value.code
    with pytest.raises(SystemExit) as elsewhere:
        start_ray(Args(script=tmp_path / "count.py", out=tmp_path, address="auto"))
    assert elsewhere.value.code == 2 and "--address" in capsys.readouterr().err
