"""The command line, checkpoints and a run's folder: what a user meets when things go well, and when they do not."""

import gzip
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CARTPOLE, ROOT, as_flags, run_script

import dqn_sparse
from dqn_sparse import CLASSIC_CONTROL, Args, preset
from utils import checkpoints
from utils.checkpoints import load_checkpoint, parse_args, save_atomically
from utils.masks import active_count
from utils.replay import Replay
from utils.runs import Run, read_episodes

TINY = as_flags({name: value for name, value in CARTPOLE.items() if name != "network"})


def same(a, b) -> bool:
    """Equal to the last bit, whatever is inside of what."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def files(folder: Path) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Bad input


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Runs the script with these flags; it must end with exit code 2 and one line on stderr, and leave no trace."""
    monkeypatch.chdir(tmp_path)

    def refused(*flags: str) -> str:
        before = files(tmp_path)
        monkeypatch.setattr(sys, "argv", ["dqn_sparse.py", *flags])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "dqn_sparse.py"), run_name="__main__")
        line = capfd.readouterr().err
        assert end.value.code == 2
        assert line.startswith("error: --") and line.count("\n") == 1 and line.endswith("\n")
        assert files(tmp_path) == before
        assert not (tmp_path / "runs").exists()
        return line.removeprefix("error: ")

    return refused


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--env-id", "ALE/Brekout-v5"], "--env-id: .*ALE/Breakout-v5"),
        (["--env-id", "BrekoutNoFrameskip-v4"], "--env-id: .*ALE/Breakout-v5"),
        (["--env-id", "NoSuchGame"], "--env-id: .*NoSuchGame"),
        (["--env-id", "Pendulum-v1"], "--env-id: Pendulum-v1 .*discrete actions"),
        (["--sparsity", "1"], r"--sparsity: got 1.0, takes .*\[0, 1\)"),
        (["--sparsity", "-0.1"], r"--sparsity: got -0.1, takes .*\[0, 1\)"),
        (["--sparsity", "95"], r"--sparsity: got 95.0, takes .*\[0, 1\)"),
        (["--sparsity", "nan"], r"--sparsity: got nan"),
        (["--learning-rate", "nan"], "--learning-rate: got nan, takes a finite number"),
        (["--learning-rate", "0"], "--learning-rate: got 0.0"),
        (["--replay-ratio", "inf"], "--replay-ratio: got inf"),
        (["--gamma", "2"], r"--gamma: got 2.0, takes .*\[0, 1\]"),
        (["--eval-epsilon", "-1"], "--eval-epsilon: got -1"),
        (["--adam-eps", "-1"], "--adam-eps: got -1"),
        (["--noop-max", "-1"], "--noop-max: got -1"),
        (["--checkpoint-every", "-1"], "--checkpoint-every: got -1"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--seed", "2147000000"], "--seed: got 2147000000"),
        (["--width", "0"], "--width: got 0, takes .* 1"),
        (["--width", "-3"], "--width: got -3, takes .* 1"),
        (["--num-envs", "0"], "--num-envs: got 0"),
        (["--batch-size", "0"], "--batch-size: got 0"),
        (["--n-step", "0"], "--n-step: got 0"),
        (["--buffer-size", "0"], "--buffer-size: got 0"),
        (["--eval-episodes", "0"], "--eval-episodes: got 0"),
        (["--target-network-frequency", "0"], "--target-network-frequency: got 0"),
        (["--prune-interval", "0"], "--prune-interval: got 0"),
        (["--replay-ratio", "0"], "--replay-ratio: got 0"),
        (["--replay-ratio", "-1"], "--replay-ratio: got -1"),
        (["--learning-starts", "0"], "--learning-starts: got 0, takes at least n-step"),
        (["--total-timesteps", "20000"], "--total-timesteps: got 20000, takes at least"),
        (["--drop-fraction", "1.5"], "--drop-fraction: got 1.5"),
        (["--sticky-actions", "1"], "--sticky-actions: got 1.0"),
        (["--prune-start", "0.9"], "--prune-start: got 0.9"),
        (["--prune-end", "1.1"], "--prune-end: got 1.1"),
        (["--rewire-end", "0"], "--rewire-end: got 0"),
        (["--network", "mlp"], "--network: got mlp"),
        (["--env-id", "CartPole-v1", "--network", "nature"], "--network: got nature"),
        (["--buffer-size", "10_000_000_000", "--total-timesteps", "10_000_000_000"], "--buffer-size: .* GB"),
        (["--resume", "nothing/checkpoint.pt"], "--resume: got nothing/checkpoint.pt, takes .*no such file"),
    ],
)
def test_bad_input_ends_with_one_line(refused, flags, names):
    line = refused(*flags)
    assert re.match(names, line), line


def test_an_environment_whose_package_is_absent(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "Box2D", None)
    assert refused("--env-id", "LunarLander-v3").startswith(
        "--env-id: cannot make LunarLander-v3: Box2D is not installed"
    )


def test_an_unwritable_run_folder(refused, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert refused(*TINY, "--runs-dir", "file/runs").startswith("--runs-dir: cannot write")


def test_a_data_set_is_never_written_over(refused, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "add_count_ckpt.0.gz").write_bytes(b"somebody's")
    assert refused(*TINY, "--save-dataset", "data").startswith("--save-dataset: ")
    assert refused(*TINY, "--save-dataset", "data/add_count_ckpt.0.gz").startswith("--save-dataset: ")


def test_tracking_without_the_package(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert refused(*TINY, "--track") == "--track: needs Weights & Biases; pip install wandb\n"


@pytest.fixture
def stopped(train, stop_at, tmp_path):
    """The folder of a run that was stopped at step 300 of 500, outside of runs/."""
    stop_at(300)
    shutil.move(train(method="gmp", sparsity=0.9), tmp_path / "stopped")
    shutil.rmtree(tmp_path / "runs")
    stop_at(None)
    return tmp_path / "stopped"


def test_what_cannot_be_resumed(refused, stopped):
    good = (stopped / "checkpoint.pt").read_bytes()
    for length in (0, 1, 1_000, len(good) // 2, len(good) - 1):
        (stopped / "torn.pt").write_bytes(good[:length])
        assert "torn" in refused("--resume", "stopped/torn.pt")
    (stopped / "notes.txt").write_text("not a checkpoint\n" * 100)
    assert "torn or no checkpoint" in refused("--resume", "stopped/notes.txt")
    torch.save([1, 2], stopped / "list.pt")
    assert "something else" in refused("--resume", "stopped/list.pt")
    torch.save(load(stopped / "checkpoint.pt") | {"script": "sac_sparse"}, stopped / "other.pt")
    assert "this one is of sac_sparse" in refused("--resume", "stopped/other.pt")
    assert "no such file" in refused("--resume", "stopped")  # a folder

    checkpoint = "stopped/checkpoint.pt"
    for flags, said in (
        (["--width", "2"], "--width 2 (it has 1)"),
        (["--no-bias"], "--bias False (it has True)"),
        (["--env-id", "Acrobot-v1"], "--env-id Acrobot-v1 (it has CartPole-v1)"),
        (["--num-envs", "2", "--width", "1"], "--num-envs 2 (it has 1)"),
        (["--n-step", "3"], "--n-step 3 (it has 1)"),
    ):
        assert refused("--resume", checkpoint, *flags) == f"--resume: {checkpoint} does not fit {said}\n", flags
    assert "--method dense" in refused("--resume", checkpoint, "--method", "dense")


def test_a_model_is_no_checkpoint(refused, train, tmp_path):
    shutil.move(train() / "model.pt", tmp_path / "model.pt")
    shutil.rmtree(tmp_path / "runs")
    assert "takes a checkpoint" in refused("--resume", "model.pt")


@pytest.mark.parametrize("script", ["dqn_sparse", "rainbow_pruned", "sac_sparse", "cql_pruned"])
def test_bad_input_in_a_process_of_its_own(tmp_path, script):
    needed = ["--env-id", "Pendulum-v1" if script == "sac_sparse" else "CartPole-v1", "--network", "mlp"]
    needed += ["--dataset", "data"] if script == "cql_pruned" else []
    ended = run_script(f"{script}.py", *needed, "--sparsity", "1", "--runs-dir", str(tmp_path / "runs"))
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.endswith("error: --sparsity: got 1.0, takes a number in [0, 1)\n")
    assert not list(tmp_path.iterdir())


# Flags


def parsed(monkeypatch, *flags: str) -> Args:
    monkeypatch.setattr(sys, "argv", ["dqn_sparse.py", *flags])
    return parse_args(Args, preset)


def test_presets_stand_below_the_command_line(monkeypatch):
    assert parsed(monkeypatch) == Args()
    args = parsed(monkeypatch, "--env-id", "CartPole-v1", "--learning-rate", "0.5", "--no-bias")
    assert {name: getattr(args, name) for name in CLASSIC_CONTROL} == CLASSIC_CONTROL | {"learning_rate": 0.5}
    assert not args.bias and args.gamma == Args().gamma
    at_default = parsed(monkeypatch, "--env-id", "CartPole-v1", "--learning-rate", str(Args().learning_rate))
    assert at_default.learning_rate == Args().learning_rate  # given, though it is the other default


def test_a_resumed_run_keeps_its_flags(monkeypatch, stopped):
    path = str(stopped / "checkpoint.pt")
    args = parsed(monkeypatch, "--resume", path, "--learning-rate", "0.5")
    assert args.sparsity == 0.9 and args.total_timesteps == 500 and args.resume == path
    assert args.learning_rate == 0.5


# A run from beginning to end


def test_the_folder_of_a_run(tmp_path):
    ended = run_script("dqn_sparse.py", *TINY, "--method", "rigl", "--runs-dir", str(tmp_path), "--eval-episodes", "3")
    assert ended.returncode == 0, ended.stderr
    (folder,) = tmp_path.iterdir()
    env, script, seed, started = folder.name.split("__")
    assert (env, script, seed) == ("CartPole-v1", "dqn_sparse", "1") and started.isdigit()
    names = {path.name for path in folder.iterdir()}
    assert names >= {"args.json", "episodes.csv", "curve.png", "model.pt"}
    assert any(name.startswith("events") for name in names) and not any(name.endswith(".part") for name in names)
    args = json.loads((folder / "args.json").read_text())
    assert args["method"] == "rigl" and args["total_timesteps"] == 500 and args["width"] == 1
    episodes = read_episodes(folder / "episodes.csv")
    assert len(episodes) > 5 and all(value == length for _, value, length in episodes)  # a reward of 1 a step
    assert episodes[-1][0] == sum(length for *_, length in episodes) <= 500  # steps that only reset are not counted
    assert "of 3 episodes" in ended.stdout

    model = load(folder / "model.pt")
    assert model["args"] == args and model["script"] == "dqn_sparse"
    assert model["networks"].keys() == model["masks"].keys() == {"q_network"}
    assert_masked(model["networks"]["q_network"], model["masks"]["q_network"], 0.95)


def assert_masked(network: dict, masks: dict, sparsity: float) -> None:
    """Weights are zero under the masks, and CartPole's only sparse layer has the count that ERK gives it."""
    assert masks.keys() == {"dense1.weight", "dense2.weight", "head.weight"}
    for name, mask in masks.items():
        assert mask.dtype == torch.bool and mask.shape == network[name].shape
        assert not network[name][~mask].any() and network[name][mask].any()
    sizes = {name: mask.numel() for name, mask in masks.items()}
    zeros = sum(math.floor(sparsity * size) for size in sizes.values())  # the two small layers are dense
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    assert counts == sizes | {"dense2.weight": sizes["dense2.weight"] - zeros}


@pytest.mark.parametrize("method", ["random", "gmp", "set"])
def test_the_model_has_exact_masks(train, method):
    model = load(train(method=method, sparsity=0.9) / "model.pt")
    assert_masked(model["networks"]["q_network"], model["masks"]["q_network"], 0.9)


def test_atari_from_beginning_to_end(tmp_path, train, monkeypatch):
    """Two environments, the old protocol's terminals, the experience logged."""
    monkeypatch.setattr("utils.envs.MAX_FRAMES", 400)
    flags = {"env_id": "BreakoutNoFrameskip-v4", "network": "nature", "total_timesteps": 160, "num_envs": 2}
    folder = train(**flags, terminal_on_life_loss=True, save_dataset=str(tmp_path / "data"), checkpoint_every=150)
    masks = load(folder / "model.pt")["masks"]["q_network"]
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        # 4 actions: every layer but the head has density epsilon x (sum of dimensions / size), by hand
        name: active_count(mask.numel(), density)
        for (name, mask), density in zip(masks.items(), by_hand([(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]))
    }
    saved = load(folder / "checkpoint.pt")
    for network in saved["networks"].values():
        assert all(not network[name][~mask].any() for name, mask in saved["masks"].items())
    logged = []
    for path in sorted((tmp_path / "data").glob("*terminal*")):
        with gzip.open(path) as file:
            logged.append(np.load(file))
    assert len(logged) == 2 and sum(map(len, logged)) == 160 + 3 * (2 + sum(map(sum, logged)))


def by_hand(convolutions: list) -> list[float]:
    shapes = [*convolutions, (512, 7744)]
    zeros = sum(math.floor(0.95 * math.prod(shape)) for shape in [*shapes, (4, 512)])
    epsilon = (sum(map(math.prod, shapes)) - zeros) / sum(map(sum, shapes))
    return [epsilon * sum(shape) / math.prod(shape) for shape in shapes] + [1.0]


def test_same_seed_same_weights(tmp_path):
    """To the last bit, in two processes."""
    flags = ["--seed", "3", "--method", "set", "--num-envs", "2", "--total-timesteps", "300"]
    models = []
    for name in ("a", "b"):
        ended = run_script("dqn_sparse.py", *TINY, *flags, "--runs-dir", str(tmp_path / name))
        assert ended.returncode == 0, ended.stderr
        models.append(load(next((tmp_path / name).glob("*/model.pt"))))
    assert same(models[0]["networks"], models[1]["networks"]) and same(models[0]["masks"], models[1]["masks"])


def test_another_seed_other_weights(train):
    one, other = (load(train(seed=seed, method="random", total_timesteps=150) / "model.pt") for seed in (3, 4))
    assert not torch.equal(*(model["masks"]["q_network"]["dense2.weight"] for model in (one, other)))
    assert not torch.equal(*(model["networks"]["q_network"]["dense1.weight"] for model in (one, other)))


# Stopping and going on


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_resume_goes_on_to_the_end(tmp_path, number):
    """The process sends the signal to itself, so that it comes at a known step."""
    code = f"""
import os, sys
sys.argv = ["dqn_sparse.py", *sys.argv[1:]]
import dqn_sparse
progress = dqn_sparse.Run.progress
def kill(run, step, **values):
    progress(run, step, **values)
    if step == 200 and not values:
        os.kill(os.getpid(), {int(number)})
dqn_sparse.Run.progress = kill
dqn_sparse.main(dqn_sparse.parse_args(dqn_sparse.Args, dqn_sparse.preset))
"""
    stopped = run_script("-c", code, *TINY, "--total-timesteps", "300", "--runs-dir", str(tmp_path))
    assert stopped.returncode == 0, stopped.stderr
    (folder,) = tmp_path.iterdir()
    assert not (folder / "model.pt").exists()
    saved = load(folder / "checkpoint.pt")
    assert saved["global_step"] == 200 and saved["update"] == 25
    assert f"--resume {folder}/checkpoint.pt" in stopped.stdout.splitlines()[-1]

    if number == signal.SIGTERM:
        ended = run_script("dqn_sparse.py", "--resume", str(folder / "checkpoint.pt"))
        assert ended.returncode == 0, ended.stderr
        assert list(tmp_path.iterdir()) == [folder]
        assert_masked(*(load(folder / "model.pt")[key]["q_network"] for key in ("networks", "masks")), 0.95)
        steps = [step for step, *_ in read_episodes(folder / "episodes.csv")]
        assert steps == sorted(steps) and steps[0] < 200 < steps[-1] <= 300


@pytest.mark.parametrize("method", ["dense", "gmp", "rigl"])
def test_resume_restores_everything(train, stop_at, method):
    """A run that is resumed and stopped again at once saves what it loaded, but for the cut in the replay."""
    flags = {"method": method, "sparsity": 0.9, "num_envs": 2, "n_step": 3, "buffer_size": 100}
    flags |= {"target_network_frequency": 10_000}
    stop_at(300)
    folder = train(**flags)
    first = load(folder / "checkpoint.pt")
    assert first["global_step"] >= 300 and first["update"] >= 50 and first["replay"]["added"] > 100
    if method == "gmp":
        assert 23_451 < first["kept"]["dense2.weight"] < 512 * 512  # in the middle of the schedule
    for name, mask in first["masks"].items():  # the target network's too, which was not copied since
        assert not any(network[name][~mask].any() for network in first["networks"].values())
    moments = first["optimizer"]["state"].values()
    assert all(state["exp_avg"].any() and state["step"] > 0 for state in moments)

    init = dqn_sparse.Run.__init__

    def stopping(run, *args):
        init(run, *args)
        run.stopping = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dqn_sparse.Run, "__init__", stopping)
        train(**flags, resume=str(folder / "checkpoint.pt"))
    second = load(folder / "checkpoint.pt")
    assert second.keys() == first.keys()
    for key in first.keys() - {"replay", "args"}:
        assert same(first[key], second[key]), key
    assert first["args"] | {"resume": str(folder / "checkpoint.pt")} == second["args"]

    space, actions = dqn_sparse.gym.make("CartPole-v1").observation_space, dqn_sparse.gym.spaces.Discrete(2)
    expected = Replay(100, 2, space, actions, 1, 3, Args().gamma, torch.device("cpu"))
    expected.load_state_dict(first["replay"])
    expected.cut()
    assert same(expected.state_dict(), second["replay"])


@pytest.mark.parametrize("method", ["gmp", "rigl"])
def test_two_resumed_runs_are_the_same(train, stop_at, tmp_path, method):
    stop_at(300)
    folder = train(method=method)
    stop_at(None)
    models = []
    for name in ("a", "b"):
        shutil.copytree(folder, tmp_path / name)
        train(method=method, resume=str(tmp_path / name / "checkpoint.pt"))
        models.append(load(tmp_path / name / "model.pt"))
    assert same(models[0]["networks"], models[1]["networks"]) and same(models[0]["masks"], models[1]["masks"])
    assert_masked(models[0]["networks"]["q_network"], models[0]["masks"]["q_network"], 0.95)
    start = load(folder / "checkpoint.pt")["networks"]
    assert not same(models[0]["networks"], {"q_network": start["q_network"]})


def test_a_longer_run_from_a_checkpoint(train, stop_at):
    """The schedule is that of the new length: what was pruned stays pruned, and the final sparsity is reached."""
    stop_at(300)
    folder = train(method="gmp", sparsity=0.9)
    stop_at(None)
    old = load(folder / "checkpoint.pt")["masks"]
    with (folder / "episodes.csv").open("a") as file:
        file.write("310,-7,10\n")  # as if it had been killed some time after the checkpoint
    train(method="gmp", sparsity=0.9, total_timesteps=900, resume=str(folder / "checkpoint.pt"))
    model = load(folder / "model.pt")
    assert_masked(model["networks"]["q_network"], model["masks"]["q_network"], 0.9)
    assert not any((model["masks"]["q_network"][name] & ~mask).any() for name, mask in old.items())
    episodes = read_episodes(folder / "episodes.csv")
    assert episodes == sorted(episodes) and min(value for _, value, _ in episodes) > 0
    assert episodes[0][0] < 300 < episodes[-1][0]


# Writing files


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "os.replace"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_previous_one(tmp_path, moment):
    """SIGKILL in the middle of the bytes, before they are on the disk, and before the rename."""
    path = tmp_path / "checkpoint.pt"
    code = f"""
import io, os, signal, sys, torch
from utils.checkpoints import save_atomically
from pathlib import Path
path = Path(sys.argv[1])
save_atomically({{"script": "dqn_sparse", "number": 1, "rng": {{}}, "weights": torch.ones(1000)}}, path)
save = torch.save
def die(*args):
    if "{moment}" == "torch.save":
        whole = io.BytesIO()
        save(args[0], whole)
        args[1].write(whole.getvalue()[: whole.tell() // 2])
        args[1].flush()
    os.kill(os.getpid(), signal.SIGKILL)
{moment} = die
save_atomically({{"script": "dqn_sparse", "number": 2, "weights": torch.zeros(1000)}}, path)
"""
    ended = run_script("-c", code, str(path))
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    saved = load_checkpoint(str(path), "dqn_sparse")
    assert saved["number"] == 1 and saved["weights"].all()
    save_atomically({"script": "dqn_sparse", "number": 3}, path)  # what the dead one left is not in the way
    assert load(path)["number"] == 3 and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_checkpoints_on_the_way(train, monkeypatch):
    steps = []
    save = checkpoints.save_atomically

    def watching(content, path):
        steps.append(content.get("global_step", path.name))
        save(content, path)

    monkeypatch.setattr(checkpoints, "save_atomically", watching)
    train(checkpoint_every=120)
    assert steps == [120, 240, 360, 480, "model.pt"]


def test_a_run_does_not_die_of_its_logger(train, monkeypatch, capfd):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    class FullFile:
        write = close = full

    monkeypatch.setattr("utils.runs.SummaryWriter.add_scalar", full)
    monkeypatch.setattr("utils.runs.SummaryWriter.close", full)
    monkeypatch.setattr("utils.runs.Run._open_episodes", lambda run, step: FullFile())
    folder = train()
    assert (folder / "model.pt").exists()
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 2  # each said once
    assert sum("TensorBoard" in line for line in warnings) == sum("episodes.csv" in line for line in warnings) == 1


def test_the_progress_line_of_several_environments_ends_at_its_end(tmp_path, capfd):
    run = Run(Args(env_id="CartPole-v1", runs_dir=str(tmp_path)), "dqn_sparse", total=10)
    run.progress(12)  # three environments step over 10
    run.close()
    assert "10/10" in capfd.readouterr().err


def test_a_run_does_not_die_of_a_full_disk(train, stop_at, monkeypatch, capfd):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.runs.os.fsync", full)
    folder = train(checkpoint_every=400)
    assert not list(folder.glob("*.pt*"))
    lines = [line for line in capfd.readouterr().err.splitlines() if "not saved" in line]
    assert [name in line for name, line in zip(("checkpoint.pt", "model.pt"), lines)] == [True, True]
    stop_at(300)
    train()
    assert capfd.readouterr().out.endswith("stopped at step 300\n")  # nothing to go on from


def test_a_resumed_run_has_the_flags_learning_rate(train, stop_at, stopped):
    path = str(stopped / "checkpoint.pt")
    stop_at(301)
    saved = load(train(method="gmp", sparsity=0.9, resume=path, learning_rate=0.5, adam_eps=0.25) / "checkpoint.pt")
    assert [saved["optimizer"]["param_groups"][0][name] for name in ("lr", "eps")] == [0.5, 0.25]
    assert saved["optimizer"]["state"][0]["step"] >= 25  # and the checkpoint's moments


def test_a_resumed_run_lets_no_weight_grow_back(train, stop_at, stopped):
    """A longer run's schedule is behind that of the run before, which had more zeros by now."""
    first = load(stopped / "checkpoint.pt")
    stop_at(330)
    second = load(
        train(method="gmp", sparsity=0.9, resume=str(stopped / "checkpoint.pt"), total_timesteps=700) / "checkpoint.pt"
    )
    assert second["update"] > first["update"]
    for name, mask in first["masks"].items():
        assert not (second["masks"][name] & ~mask).any()


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--prune-end", "0.3"], "--resume: .* after the end of the pruning"),
        (["--total-timesteps", "250"], "--total-timesteps: got 250, takes 300 or more"),
    ],
)
def test_a_resumed_run_must_reach_its_sparsity(refused, stopped, flags, names):
    assert re.match(names, refused("--resume", "stopped/checkpoint.pt", *flags))


def test_a_resumed_run_adds_to_no_other_data_set(refused, stopped, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text("{}")
    assert refused("--resume", "stopped/checkpoint.pt", "--save-dataset", "data").startswith("--save-dataset: ")


def test_episodes_of_a_killed_run(tmp_path):
    path = tmp_path / "episodes.csv"
    assert read_episodes(path) == []
    path.write_text("step,return,length\n10,1.5,10\n25,-2,15\n30,7")
    assert read_episodes(path) == [(10, 1.5, 10), (25, -2.0, 15)]


@pytest.mark.parametrize("flags", [{"method": "rigl"}, {"sparsity": 0.5}], ids=["method", "sparsity"])
def test_resume_refuses_masks_of_another_kind_or_count(train, flags, capsys):
    run = train(method="random", sparsity=0.9, checkpoint_every=400)
    with pytest.raises(SystemExit) as end:
        train(**{"method": "random", "sparsity": 0.9} | flags, resume=str(run / "checkpoint.pt"))
    assert end.value.code == 2
    assert "--resume" in capsys.readouterr().err
