"""A run's folder, and what can go wrong around it: kills, signals, full disks, closed pipes, damaged files."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CARTPOLE, ENV, ROOT, as_flags, load, run_script

import dqn_sparse
from dqn_sparse import Args, preset
from utils import runs
from utils.checkpoints import all_finite, load_state, save_atomically, state_of
from utils.files import write_atomically
from utils.flags import parse_args
from utils.records import last_row, read_episodes, read_evaluations, read_scalars, training_seconds
from utils.runs import Run, StopSignal

TINY = as_flags(CARTPOLE)


def files(folder) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def only_folder(tmp_path):
    (folder,) = tmp_path.iterdir()
    return folder


# What a run leaves


def test_the_folder_of_a_run(tmp_path):
    ended = run_script("dqn_sparse.py", *TINY, "--method", "rigl", "--runs-dir", str(tmp_path), "--eval-episodes", "3")
    assert ended.returncode == 0, ended.stderr
    folder = only_folder(tmp_path)
    env, script, seed, started = folder.name.split("__")
    assert (env, script, seed) == ("CartPole-v1", "dqn_sparse", "1") and started.isdigit()
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events")}
    assert names == {
        *("args.json", "versions.json", "dqn_sparse.py", "episodes.csv", "evaluations.csv", "scalars.csv"),
        *("curve.png", "model.pt"),
    }
    args = json.loads((folder / "args.json").read_text())
    assert args["method"] == "rigl" and args["total_timesteps"] == 500 and args["width"] == 1
    assert (folder / "dqn_sparse.py").read_text() == (ROOT / "dqn_sparse.py").read_text()
    assert json.loads((folder / "versions.json").read_text())["torch"] == torch.__version__
    episodes = read_episodes(folder)
    assert len(episodes) > 5 and (episodes[:, 1] == episodes[:, 2]).all()  # a reward of 1 a step
    assert episodes[-1, 0] == episodes[:, 2].sum() <= 500  # steps that only reset are not counted
    assert read_evaluations(folder)[:, :2].tolist() == [[500, 0], [500, 1], [500, 2]]
    scalars = read_scalars(folder)
    assert scalars["sparsity/global"][-1].tolist() == [500, pytest.approx(0.95, abs=1e-4)]
    # from 1 at step 100 to the preset's 0.01 at step 300, when the action of the step was chosen
    epsilon = [[step, pytest.approx(1 - 0.99 * (step - 1 - 100) / 200)] for step in (200, 300)]
    assert scalars["charts/epsilon"][:2].tolist() == epsilon
    assert {"losses/td_loss", "sparsity/head.dense.weight", "sparsity/drop_fraction", "charts/SPS"} <= set(scalars)
    assert training_seconds(folder) > 0
    model = load(folder / "model.pt")
    assert model["args"] == args and model["script"] == "dqn_sparse"


def test_atari_from_beginning_to_end(tmp_path, train, monkeypatch):
    """Two environments, the old protocol's terminals, the experience logged."""
    monkeypatch.setattr("utils.envs.MAX_FRAMES", 400)
    flags = {"env_id": "BreakoutNoFrameskip-v4", "network": "nature", "total_timesteps": 160, "num_envs": 2}
    data = tmp_path / "data"
    folder = train(**flags, terminal_on_life_loss=True, save_dataset=str(data), checkpoint_every=150)
    masks = load(folder / "model.pt")["masks"]["q_network"]
    assert len(masks) == 5
    state = load(folder / "checkpoint.pt")["state"]
    for name, mask in masks.items():
        assert not state["target_network"][name][state["masks"][name] == 0].any()
        assert mask.sum() <= (state["masks"][name] > 0).sum()
    assert len(list(data.glob("*terminal*"))) == 2 and (data / "dataset.json").exists()


def test_two_runs_that_start_in_the_same_second_have_two_folders(tmp_path):
    folders = [runs.new_folder(tmp_path, "ALE/Pong-v5", "s", 1) for _ in range(3)]
    assert len(set(folders)) == 3 and all(folder.is_dir() for folder in folders)


def test_an_unwritable_run_folder(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    ended = run_script("dqn_sparse.py", *TINY, "--runs-dir", str(tmp_path / "file" / "runs"))
    assert ended.returncode == 2 and ended.stderr.splitlines()[-1].startswith("error: --runs-dir: ")


def test_tracking_without_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as ended:
        dqn_sparse.main(Args(**CARTPOLE, track=True, runs_dir=str(tmp_path)))
    assert ended.value.code == 2 and "--track" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_resumed_run_continues_its_run_in_weights_and_biases(train, stop_at, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **keywords: calls.append(keywords)))
    stop_at(300)
    folder = train(track=True)
    stop_at(None)
    train(track=True, resume=str(folder / "checkpoint.pt"))
    assert [call["id"] for call in calls] == [folder.name] * 2 and all(call["resume"] == "allow" for call in calls)


def test_a_run_does_not_die_of_its_logs(train, curves, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    monkeypatch.setattr("utils.curves.save_curve", full)
    folder = train()
    error = capsys.readouterr().err
    assert (folder / "model.pt").exists() and len(read_episodes(folder)) > 5
    assert error.count("TensorBoard") == 1 and error.count("curve.png") == 1


# Resuming


@pytest.fixture
def stopped(train, stop_at):
    """The folder of a run that was stopped at step 300 of 500."""
    stop_at(300)
    folder = train(method="gmp", sparsity=0.9)
    stop_at(None)
    return folder


def refused(capsys, *flags: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        args = parse_args(Args, preset, list(flags))
        dqn_sparse.main(args)
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    return line


@pytest.mark.parametrize(
    "flags",
    [
        *(["--width", "2"], ["--no-bias"], ["--env-id", "Acrobot-v1"], ["--num-envs", "2"], ["--n-step", "3"]),
        *(["--method", "rigl"], ["--sparsity", "0.5"], ["--replay-ratio", "4"], ["--learning-starts", "50"]),
        *(["--seed", "7"], ["--runs-dir", "elsewhere"], ["--distribution", "uniform"], ["--learning-rate", "0.1"]),
        *(["--total-timesteps", "299"], ["--save-dataset", "data"]),
    ],
)
def test_a_resumed_run_keeps_its_flags(stopped, capsys, flags):
    before = files(stopped)
    line = refused(capsys, "--resume", str(stopped / "checkpoint.pt"), *flags)
    assert flags[0] in line or "--total-timesteps" in flags or (flags == ["--no-bias"] and "--bias" in line)
    assert files(stopped) == before


def test_what_is_not_a_checkpoint_is_refused(stopped, tmp_path, capsys):
    good = (stopped / "checkpoint.pt").read_bytes()
    bad = {f"short{n}": good[:n] for n in (0, 1, 1_000, len(good) // 2, len(good) - 1)}
    rng = np.random.default_rng(0)
    for i in range(5):  # flipped bits
        place = int(rng.integers(len(good)))
        bad[f"flipped{i}"] = good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :]
    bad["notes"] = b"not a checkpoint\n" * 100
    for name, content in bad.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
    content = load(stopped / "checkpoint.pt")
    others = {"list": [1, 2], "script": content | {"script": "sac_sparse"}, "negative": content | {"step": -5}}
    others |= {f"without {key}": {k: v for k, v in content.items() if k != key} for key in content}
    others |= {"args": content | {"args": {"seed": 1}}, "state": content | {"state": {}}}
    state = content["state"]
    others["mask"] = content | {"state": state | {"masks": {}}}
    for name, other in others.items():
        torch.save(other, tmp_path / f"{name}.pt")
    paths = [tmp_path / f"{name}.pt" for name in (*bad, *others)] + [tmp_path, tmp_path / "none.pt"]
    before = files(stopped)
    for path in paths:
        assert "--resume" in refused(capsys, "--resume", str(path)), path
    assert "--resume" in refused(capsys, "--resume", "")
    assert files(stopped) == before


def test_two_processes_do_not_resume_one_run(stopped, capsys):
    before, lock = files(stopped), runs.lock_folder(stopped)
    assert "another process" in refused(capsys, "--resume", str(stopped / "checkpoint.pt"))
    assert files(stopped) == before
    os.close(lock)
    dqn_sparse.main(parse_args(Args, preset, ["--resume", str(stopped / "checkpoint.pt")]))
    assert (stopped / "model.pt").exists()


def test_a_run_is_resumed_by_the_name_of_its_folder(stopped):
    dqn_sparse.main(parse_args(Args, preset, ["--resume", f"{stopped}/"]))
    assert (stopped / "model.pt").exists()


def test_a_finished_run_is_not_resumed_without_a_checkpoint(train, capsys):
    folder = train()
    assert "is of a finished run" in refused(capsys, "--resume", str(folder))  # its path has the word too
    assert "model.pt of a finished run" in refused(capsys, "--resume", str(folder / "model.pt"))
    assert "not there" in refused(capsys, "--resume", str(folder / "chekpoint.pt"))


def test_a_longer_run_from_a_checkpoint(train, stopped):
    """The schedule is that of the new length: what was pruned stays pruned, and the final sparsity is reached. Rows of
    the logs that came after the checkpoint are dropped."""
    old = load(stopped / "checkpoint.pt")["state"]["masks"]
    for name, rows in (("episodes.csv", "310,-7,10\n311"), ("scalars.csv", "310,9.0,losses/td_loss,5\n")):
        with (stopped / name).open("a") as file:
            file.write(rows)
    train(method="gmp", sparsity=0.9, total_timesteps=900, resume=str(stopped / "checkpoint.pt"))
    masks = load(stopped / "model.pt")["masks"]["q_network"]
    assert sum(map(torch.sum, masks.values())) / sum(map(torch.numel, masks.values())) == pytest.approx(0.1, abs=1e-4)
    assert not any((masks[name] & (mask == 0)).any() for name, mask in old.items())
    episodes = read_episodes(stopped)
    assert (np.diff(episodes[:, 0]) > 0).all() and episodes[:, 1].min() > 0
    assert episodes[0, 0] < 300 < episodes[-1, 0] <= 900
    assert 310 not in read_scalars(stopped)["losses/td_loss"][:, 0]


def test_the_gpu_of_a_run_is_the_current_one(monkeypatch):
    """CUDA graphs are captured there; on a GPU that is not the run's they would capture nothing."""
    current = []

    def empty(size, device):
        return SimpleNamespace(device=torch.device("cuda:0" if device == "cuda" else device))

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    for name, index in (("cuda", 0), ("cuda:1", 1)):
        assert runs.choose_device(Args(device=name)).index == index == current[-1].index


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta"])
def test_devices_that_cannot_train_are_refused(name, capsys):
    with pytest.raises(SystemExit) as ended:
        runs.choose_device(Args(device=name))
    assert ended.value.code == 2 and f"got {name}" in capsys.readouterr().err


def test_what_is_not_finite_in_a_state():
    """An infinite tensor may be meant (the logarithm of a temperature of 0); a parameter that is infinite is not."""
    good, bad = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    torch.nn.init.constant_(bad.bias, torch.inf)
    assert all_finite({"network": good, "log_alpha": torch.tensor(-torch.inf), "weights": {"0": torch.zeros(2)}})
    assert not all_finite({"network": bad}) and not all_finite({"weights": {"0": torch.tensor([0.0, torch.nan])}})


def test_the_last_row_of_a_log(tmp_path):
    """A header is not one, nor is a line that a kill has torn."""
    path = tmp_path / "scalars.csv"
    assert last_row(path) is None
    path.write_text("step,value\n")
    assert last_row(path) is None
    path.write_text("step,value\n1,2.5\n2,3")
    assert last_row(path) == ["1", "2.5"]


def test_a_restored_optimizer_keeps_its_own_settings():
    """A run may continue on a CPU that began on a GPU, where Adam is `capturable`: with that it refuses to step."""

    def stepped(gradient, **settings):
        weight = torch.nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.Adam([weight], **settings)
        weight.grad = torch.full((3,), gradient)
        optimizer.step()
        return weight, optimizer

    weight, saved = stepped(2.0, lr=0.5)
    state = state_of(saved)
    state["param_groups"][0]["capturable"] = True
    own_weight, own = stepped(7.0, lr=0.1)
    load_state(own, state)
    assert own.param_groups[0]["lr"] == 0.1 and not own.param_groups[0]["capturable"]
    torch.testing.assert_close(own.state[own_weight]["exp_avg"], saved.state[weight]["exp_avg"])
    own.step()


def test_a_finished_run_is_lengthened(train):
    """Its replay is full and stays as long as it was, since the new length makes a longer one possible."""
    folder = train(method="gmp", buffer_size=1_000_000, checkpoint_every=500)
    before = load(folder / "checkpoint.pt")["state"]["replay"]
    flags = {"total_timesteps": 1_200, "checkpoint_every": 600, "resume": str(folder / "checkpoint.pt")}
    train(method="gmp", buffer_size=1_000_000, **flags)
    assert read_episodes(folder)[-1, 0] > 1_000
    after = load(folder / "checkpoint.pt")["state"]["replay"]
    assert len(after["is_start"]) == len(before["is_start"]) == 501


def test_a_checkpoint_of_the_last_step_has_its_final_evaluation_once(train):
    folder = train(checkpoint_every=250, eval_every=250, eval_episodes=2)
    rows = read_evaluations(folder)
    assert rows[:, 0].tolist() == [250, 250, 500, 500]
    train(resume=str(folder / "checkpoint.pt"), eval_every=250, eval_episodes=2)
    np.testing.assert_array_equal(read_evaluations(folder), rows)


def test_a_run_cut_too_short_to_reach_its_sparsity_is_an_error(train, stopped):
    """The end of its pruning would have been before the checkpoint."""
    with pytest.raises(SystemExit) as ended:
        train(method="gmp", sparsity=0.9, total_timesteps=320, resume=str(stopped / "checkpoint.pt"))
    assert ended.value.code and (stopped / "model.pt").exists()


def test_a_new_method_of_a_fork_resumes(tmp_path):
    """utils knows no method by name."""
    source = (ROOT / "dqn_sparse.py").read_text()
    fork = source.replace('"gmp", "rigl"', '"gmp", "linear", "rigl"')
    fork = fork.replace('method == "gmp"', 'method in ("gmp", "linear")')
    (tmp_path / "linear_dqn.py").write_text(fork)
    flags = [*TINY, "--method", "linear", "--sparsity", "0.9", "--runs-dir", str(tmp_path / "runs")]
    flags += ["--checkpoint-every", "300"]
    assert run_script(str(tmp_path / "linear_dqn.py"), *flags).returncode == 0
    folder = only_folder(tmp_path / "runs")
    (folder / "model.pt").unlink()
    ended = run_script(str(tmp_path / "linear_dqn.py"), "--resume", str(folder / "checkpoint.pt"))
    assert ended.returncode == 0, ended.stderr
    assert (folder / "model.pt").exists() and (folder / "linear_dqn.py").exists()


# Kills, signals, full disks


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "os.replace"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_previous_one(tmp_path, moment):
    code = f"""
    module, name = {moment!r}.split(".")
    module = {{"torch": checkpoints.torch, "os": os}}[module]
    original, count = getattr(module, name), 0
    def die(*args):
        global count
        if name == "fsync" or str(args[-1]).endswith("checkpoint.pt") or name == "save":
            count += runs.Run.open != []
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    setattr(module, name, die)
    """
    ended = run_script("dqn_sparse.py", *TINY, "--checkpoint-every", "100", "--runs-dir", str(tmp_path), code=code)
    assert ended.returncode == -signal.SIGKILL
    checkpoint = only_folder(tmp_path) / "checkpoint.pt"
    assert load(checkpoint)["step"] == 200
    ended = run_script("dqn_sparse.py", "--resume", str(checkpoint))
    assert ended.returncode == 0, ended.stderr


def test_a_killed_and_resumed_run_logs_every_step_of_its_dataset(tmp_path):
    """A checkpoint brings the dataset up to date: what comes after it is lost with a kill, and played again."""
    data = tmp_path / "data"
    code = """
    advance = runs.Run.advance
    def die(run, step, update):
        advance(run, step, update)
        if step == 350:
            os.kill(os.getpid(), signal.SIGKILL)
    runs.Run.advance = die
    """
    flags = [*TINY, "--checkpoint-every", "100", "--save-dataset", str(data), "--runs-dir", str(tmp_path / "runs")]
    assert run_script("dqn_sparse.py", *flags, code=code).returncode == -signal.SIGKILL
    checkpoint = only_folder(tmp_path / "runs") / "checkpoint.pt"
    assert load(checkpoint)["step"] == 300
    dqn_sparse.main(parse_args(Args, preset, ["--resume", str(checkpoint)]))
    counts = []
    for path in data.glob("add_count_*"):
        with gzip.open(path) as file:
            counts.append(int(np.load(file)))
    assert sorted(counts) == [200, 300]


@pytest.mark.parametrize("name", ["args.json", "episodes.csv", "scalars.csv"])
def test_a_kill_while_a_resume_rewrites_a_file_loses_nothing(tmp_path, stopped, name):
    before = files(stopped)
    code = f"""
    replace = os.replace
    def die(a, b):
        if str(b).endswith({name!r}):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(a, b)
    os.replace = die
    """
    ended = run_script("dqn_sparse.py", *TINY, "--resume", str(stopped / "checkpoint.pt"), code=code)
    assert ended.returncode == -signal.SIGKILL
    after = {path: content for path, content in files(stopped).items() if path in before}
    for path, content in before.items():
        if path.name.endswith(".csv"):
            assert after[path] == content, path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_is_written_does_not_lose_it(tmp_path, number):
    code = f"""
    save = checkpoints.torch.save
    def interrupted(content, file):
        if "networks" in content:
            os.kill(os.getpid(), {int(number)})
            os.kill(os.getpid(), {int(number)})
        save(content, file)
    checkpoints.torch.save = interrupted
    """
    ended = run_script("dqn_sparse.py", *TINY, "--runs-dir", str(tmp_path), code=code)
    assert ended.returncode == 128 + number and "model.pt" in ended.stdout
    assert load(only_folder(tmp_path) / "model.pt")["script"] == "dqn_sparse"


def test_a_signal_in_the_final_evaluation_says_where_the_model_is(tmp_path):
    code = """
    evaluate = runs.evaluate
    runs.evaluate = lambda *args: os.kill(os.getpid(), signal.SIGINT) or evaluate(*args)
    """
    ended = run_script("dqn_sparse.py", *TINY, "--runs-dir", str(tmp_path), code=code)
    assert ended.returncode == 130 and "model.pt" in ended.stderr
    assert (only_folder(tmp_path) / "model.pt").exists()


def test_signals_ask_once_and_echoes_are_ignored(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stop = StopSignal()
    for _ in range(3):
        stop.receive(signal.SIGTERM, None)
    assert stop.number == signal.SIGTERM
    now += 5
    with pytest.raises(SystemExit) as ended:
        stop.receive(signal.SIGINT, None)
    assert ended.value.code == 130


def test_a_disk_that_is_full_at_the_end_is_an_error_and_the_model_is_saved_elsewhere(tmp_path):
    """A file size limit stands in for the disk; the temporary directory is not limited."""
    (tmp_path / "elsewhere").mkdir()
    code = f"""
    import resource, tempfile
    tempfile.tempdir = {str(tmp_path / "elsewhere")!r}
    save = runs.save_atomically
    def full(content, path):
        limit = 100_000 if "runs" in str(path) else resource.RLIM_INFINITY
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        save(content, path)
    runs.save_atomically = full
    """
    ended = run_script("dqn_sparse.py", *TINY, "--runs-dir", str(tmp_path / "runs"), code=code)
    folder = only_folder(tmp_path / "runs")
    assert ended.returncode == 1 and "final evaluation" not in ended.stdout and "Traceback" not in ended.stderr
    assert not (folder / "model.pt").exists() and not list(folder.glob("*.part"))
    (saved,) = (tmp_path / "elsewhere").glob("*.pt")
    assert str(saved) in ended.stderr and load(saved)["script"] == "dqn_sparse"


def test_a_checkpoint_that_cannot_be_written_does_not_end_training(train, monkeypatch, capsys):
    def full(content, path):
        if path.name == "checkpoint.pt":
            raise OSError(28, "No space left on device")
        save_atomically(content, path)

    monkeypatch.setattr(runs, "save_atomically", full)
    folder = train(checkpoint_every=100)
    assert (folder / "model.pt").exists() and "No space left" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically("old", path)
    with pytest.raises(TypeError):
        write_atomically(None, path)
    with pytest.raises(Exception):  # noqa: B017  it cannot be pickled
        save_atomically({"a": lambda: 0}, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# The entry point

BROKEN = """
import gymnasium as gym, numpy as np
class Broken(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(4, np.float32), {}
    def step(self, action):
        self.t += 1
        if self.t > 330:
            raise FloatingPointError("the simulation exploded")
        return np.zeros(4, np.float32), 1.0, False, self.t == 1_000, {}
gym.register("Broken-v0", Broken)
"""


def test_an_environment_that_fails_leaves_a_checkpoint(tmp_path):
    ended = run_script("dqn_sparse.py", *TINY, "--env-id", "Broken-v0", "--runs-dir", str(tmp_path), code=BROKEN)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    line = ended.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "exploded" in line and "checkpoint.pt" in line
    assert load(only_folder(tmp_path) / "checkpoint.pt")["step"] == 330


def test_an_error_in_the_code_shows_its_traceback_and_leaves_a_checkpoint(tmp_path):
    code = """
    def broken(*args):
        if runs.Run.open and runs.Run.open[0].step >= 250:
            raise KeyError("a bug")
        return td_loss(*args)
    td_loss, script.td_loss = script.td_loss, broken
    """
    ended = run_script("dqn_sparse.py", *TINY, "--runs-dir", str(tmp_path), code=code)
    assert ended.returncode == 1 and "error: KeyError" in ended.stderr and "Traceback" in ended.stderr
    assert load(only_folder(tmp_path) / "checkpoint.pt")["step"] >= 250


@pytest.mark.parametrize(
    "flags",
    [
        ["--width", "100000"],
        ["--batch-size", "1000000000000"],
        ["--buffer-size", "10000000000000", "--total-timesteps", "10000000000000"],
        ["--num-envs", "1000000000000"],
    ],
)
def test_sizes_that_cannot_be_allocated_are_one_line(tmp_path, flags):
    ended = run_script("dqn_sparse.py", *TINY, "--runs-dir", str(tmp_path), *flags)
    assert ended.returncode in (1, 2) and "Traceback" not in ended.stderr
    assert re.search(r"^error: .*memory", ended.stderr.splitlines()[-1]), ended.stderr[-500:]


@pytest.mark.parametrize("pipe", ["| head -1", "2>&1 | head -2"])
def test_a_closed_pipe_does_not_end_training(tmp_path, pipe):
    command = f"{sys.executable} dqn_sparse.py {' '.join(TINY)} --runs-dir {tmp_path} {pipe}; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] == "0", ended.stderr
    assert (only_folder(tmp_path) / "model.pt").exists()


def test_a_terminal_that_cannot_show_a_character(tmp_path):
    env = ENV | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "dqn_sparse.py", *TINY, "--runs-dir", str(tmp_path / "ü—☃")]
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr


def test_progress_fits_80_columns_and_shows_the_sparsity(train, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    train(num_envs=3)
    last = capsys.readouterr().err.split("\r")[-1].rstrip()
    assert "sparsity" in last and "100%" in last and len(last) <= 80


def test_a_finished_run_lets_go_of_its_signals(train):
    before = signal.getsignal(signal.SIGTERM)
    train()
    assert signal.getsignal(signal.SIGTERM) is before and not Run.open
