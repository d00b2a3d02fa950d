"""What holds of every script alike: reproducible, exact masks, stopped and resumed, refusing bad input in one line."""

import importlib
import shutil
import signal
from functools import cache
from typing import ClassVar, get_type_hints

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CARTPOLE, as_flags, check_exact_masks, load, run_main, run_script, same

from utils.flags import RunFlags, check_flags, flag, parse_args, rules_of
from utils.records import read_episodes, read_evaluations, read_scalars
from utils.runs import Run

ONLINE = CARTPOLE | {"total_timesteps": 300, "batch_size": 16, "sparsity": 0.9}
FLAGS = {
    "dqn_sparse": ONLINE,
    "rainbow_pruned": ONLINE | {"n_atoms": 11, "v_min": 0.0, "v_max": 100.0, "noisy": True},
    "iqn_pruned": ONLINE | {"n_quantiles": 8, "n_target_quantiles": 8, "n_policy_quantiles": 8, "munchausen": True},
    "cql_pruned": {
        "dataset": "",  # see `flags_of`
        "env_id": "CartPole-v1",
        "total_updates": 100,
        "eval_every": 40,
        "eval_episodes": 1,
        "data_fraction": 1.0,
        "batch_size": 16,
        "sparsity": 0.9,
        "device": "cpu",
    },
    "sac_sparse": {
        "env_id": "Pendulum-v1",
        "network": "mlp",
        "total_timesteps": 450,
        "learning_starts": 400,
        "batch_size": 16,
        "num_critics": 2,
        "eval_episodes": 1,
        "sparsity": 0.9,
        "device": "cpu",
    },
    "drq_sparse": {
        "env_id": "tests.dot:Dot-v0",
        "frame_size": 15,
        "hidden_dim": 16,
        "feature_dim": 8,
        "total_timesteps": 160,
        "learning_starts": 100,
        "batch_size": 4,
        "eval_episodes": 1,
        "sparsity": 0.9,
        "device": "cpu",
    },
}
SCRIPTS = list(FLAGS)
PRESET_ENVS = {script: FLAGS[script]["env_id"] for script in SCRIPTS} | {"drq_sparse": "Pendulum-v1"}
STOP = {"cql_pruned": 60, "sac_sparse": 425, "drq_sparse": 130}  # a step in the middle of learning


@cache
def dataset() -> str:
    """300 logged steps of random actions."""
    import atexit
    import tempfile
    from pathlib import Path

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    flags = CARTPOLE | {"total_timesteps": 300, "start_e": 1.0, "end_e": 1.0, "save_dataset": str(folder / "data")}
    run_main(importlib.import_module("dqn_sparse"), folder / "runs", **flags)
    return str(folder / "data")


def flags_of(script: str, **flags) -> dict:
    return FLAGS[script] | ({"dataset": dataset()} if script == "cql_pruned" else {}) | flags


def train(script: str, runs_dir, **flags):
    return run_main(importlib.import_module(script), runs_dir, **flags_of(script, **flags))[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_seed_same_weights_in_two_processes(script, tmp_path):
    module, models = importlib.import_module(script), {}
    for place, seed in (("here", 3), ("there", 3), ("other", 4)):
        flags = as_flags(flags_of(script, method="set", seed=seed, runs_dir=str(tmp_path / place)))
        if place == "there":
            ended = run_script(f"{script}.py", *flags)
            assert ended.returncode == 0, ended.stderr
        else:
            module.main(parse_args(module.Args, module.preset, flags))
        models[place] = load(next((tmp_path / place).glob("*/model.pt")))
    check_exact_masks(models["here"], "set", 0.9)
    for part in ("networks", "masks"):
        assert same(models["here"][part], models["there"][part])
        assert not same(models["here"][part], models["other"][part])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_continues_from_the_whole_state(script, tmp_path, stop_at, monkeypatch):
    stop_at(STOP.get(script, 200))
    folder = train(script, tmp_path, method="rigl", diagnostics_every=50)
    saved = load(folder / "checkpoint.pt")
    assert not (folder / "model.pt").exists() and saved["update"] > 0
    assert active(saved["state"]["ever_active"]) > active(saved["state"]["masks"])  # which have the same size always
    stop_at(None)

    found = {}
    init = Run.__init__

    def restored(run, *args, **kwargs):
        init(run, *args, **kwargs)
        run.checkpoint()
        found.update(load(folder / "checkpoint.pt"))

    monkeypatch.setattr(Run, "__init__", restored)
    before = read_episodes(folder)
    train(script, tmp_path, method="rigl", diagnostics_every=50, resume=str(folder / "checkpoint.pt"))
    for name in ("state", "step", "update", "rng"):
        assert same(found[name], saved[name]), name
    model = load(folder / "model.pt")
    for net, masks in model["masks"].items():
        assert all(not model["networks"][net][name][~mask].any() for name, mask in masks.items())
    episodes = read_episodes(folder)
    np.testing.assert_array_equal(episodes[: len(before)], before)
    assert (np.diff(episodes[:, 0]) > 0).all() and read_evaluations(folder)[-1, 0] == run_length(script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_sparsity_no_mask_updates_are_announced_or_logged(script, tmp_path, capsys):
    flags = flags_of(script, method="rigl", sparsity=0.0)
    capsys.readouterr()  # of the run that logged the dataset
    folder = run_main(importlib.import_module(script), tmp_path, **flags)[0]
    assert "mask updates" not in capsys.readouterr().out
    assert "sparsity/drop_fraction" not in read_scalars(folder)
    assert not any(load(folder / "model.pt")["masks"].values())


def active(part: dict | torch.Tensor) -> int:
    """The number of ones in a mask, or in all masks of a nest of dicts."""
    return sum(map(active, part.values())) if isinstance(part, dict) else int(part.count_nonzero())


def run_length(script: str) -> int:
    return FLAGS[script].get("total_timesteps") or FLAGS[script]["total_updates"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_resumed_runs_are_the_same(script, tmp_path, stop_at):
    stop_at(STOP.get(script, 200))
    folder = train(script, tmp_path / "first", method="set")
    stop_at(None)
    copy = tmp_path / "second" / folder.name
    shutil.copytree(folder, copy)
    models = []
    for each in (folder, copy):
        train(script, each.parent, method="set", resume=str(each / "checkpoint.pt"))
        models.append(load(each / "model.pt"))
    assert same(models[0]["networks"], models[1]["networks"])
    assert (folder / "episodes.csv").exists() == (script != "cql_pruned")
    assert read_episodes(folder).tolist() == read_episodes(copy).tolist()


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluations_during_training_change_nothing_of_it(script, tmp_path):
    every = {"cql_pruned": 25, "drq_sparse": 40}.get(script, 100)
    looked = train(script, tmp_path / "a", method="rigl", eval_every=every)
    plain = train(script, tmp_path / "b", method="rigl", eval_every=0)
    assert same(load(looked / "model.pt")["networks"], load(plain / "model.pt")["networks"])
    steps = read_evaluations(looked)[:, 0]  # one episode at each
    assert steps.tolist() == [*range(every, run_length(script), every), run_length(script)]
    last, only = read_evaluations(looked), read_evaluations(plain)
    np.testing.assert_array_equal(last[last[:, 0] == run_length(script)][-1], only[-1])  # the same episode


class Diary(gym.Env):
    """Shows the episode, the step in it and the last action; episodes terminate after 5 steps, or are truncated after
    7, by turns, and a life is lost at step 3. The reward of a step is its number, from 1 on."""

    seeds: ClassVar[list[int]] = []

    observation_space, action_space = gym.spaces.Box(-1, 1e6, (3,)), gym.spaces.Discrete(3)
    episode = 0

    def reset(self, *, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        self.seeds.extend([seed] if seed is not None else [])
        return np.float32([self.episode, 0, -1]), {"lives": 2}

    def step(self, action):
        self.t += 1
        terminated, truncated = (self.episode % 2 == 1 and self.t == 5), self.t == 7
        lives = 2 - (self.t >= 3)
        return np.float32([self.episode, self.t, action]), float(self.t), terminated, truncated, {"lives": lives}


@pytest.mark.parametrize("flags", [{}, {"clip_rewards": False, "terminal_on_life_loss": True}])
@pytest.mark.parametrize("script", ["dqn_sparse", "rainbow_pruned", "iqn_pruned"])
def test_learns_from_what_the_environment_played(script, flags, tmp_path, monkeypatch, stop_at):
    """All that td_loss is given, also after a resume: transitions as the environment's rules have them, and earlier
    networks as targets."""
    module, gamma, drawn, online, targets = importlib.import_module(script), 0.9, set(), [], []
    td_loss = module.td_loss

    def watching(q_network, target_network, batch, *rest):
        for parts, network in ((online, q_network), (targets, target_network)):
            parts.append(torch.cat([weight.detach().flatten() for weight in network.parameters()]))
        rows = zip(*(part.tolist() for part in batch))
        drawn.update((*obs, action, *next_obs, reward, discount) for obs, action, reward, discount, next_obs in rows)
        return td_loss(q_network, target_network, batch, *rest)

    monkeypatch.setattr(module, "td_loss", watching)
    gym.register("Diary-v0", Diary) if "Diary-v0" not in gym.registry else None
    monkeypatch.setattr(Diary, "seeds", [])
    flags = {"env_id": "Diary-v0", "num_envs": 2, "method": "random", "n_step": 1, "gamma": gamma} | flags
    flags |= {"total_timesteps": 500, "batch_size": 64} | ({"noisy": False} if script == "rainbow_pruned" else {})
    stop_at(300)
    folder = train(script, tmp_path, **flags)
    stop_at(None)
    train(script, tmp_path, resume=str(folder / "checkpoint.pt"), **flags)
    assert len(set(Diary.seeds)) == len(Diary.seeds)  # no episode is played twice
    steps = set()
    for episode, t, before, action, next_episode, next_t, after, reward, discount in drawn:
        assert (next_episode, next_t, after) == (episode, t + 1, action) and (t == 0) == (before == -1)
        assert reward == (1 if flags.get("clip_rewards", True) else next_t)
        terminal = (episode % 2 == 1 and next_t == 5) or ("terminal_on_life_loss" in flags and next_t == 3)
        assert discount == pytest.approx(0 if terminal else gamma)
        steps.add((episode % 2, t))
    assert steps == {(1, t) for t in range(5)} | {(0, t) for t in range(7)}
    changes = [i for i in range(1, len(targets)) if not torch.equal(targets[i - 1], targets[i])]
    assert len(changes) == 7  # every 50 steps of 500; the first updates are after step 100, the last copy is at the end
    for i in changes:
        assert any(torch.equal(targets[i], weights) for weights in online[: i + 1])


SIGNALS = [(script, signal.SIGTERM) for script in SCRIPTS] + [
    ("dqn_sparse", signal.SIGINT),
    ("dqn_sparse", signal.SIGHUP),
]


@pytest.mark.parametrize(("script", "number"), SIGNALS)
def test_a_signal_leaves_a_checkpoint_from_which_the_run_ends(script, number, tmp_path, curves):
    """Sent by the process itself, so that it comes in the middle of learning; and once more, as nervous users do."""
    code = f"""
    advance = runs.Run.advance
    def signalled(run, step, update):
        advance(run, step, update)
        if step >= {STOP.get(script, 200)}:
            os.kill(os.getpid(), {int(number)})
            os.kill(os.getpid(), {int(number)})
    runs.Run.advance = signalled
    """
    stopped = run_script(f"{script}.py", *as_flags(flags_of(script, runs_dir=str(tmp_path))), code=code)
    assert stopped.returncode == 128 + number and "Traceback" not in stopped.stderr
    (folder,) = tmp_path.iterdir()
    assert not (folder / "model.pt").exists() and load(folder / "checkpoint.pt")["step"] == STOP.get(script, 200)
    module = importlib.import_module(script)
    module.main(parse_args(module.Args, module.preset, ["--resume", str(folder / "checkpoint.pt")]))
    assert (folder / "model.pt").exists() and (folder / "curve.png").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_that_diverges_is_an_error_and_keeps_the_last_checkpoint(script, tmp_path):
    rate = {"policy_lr": 1e30, "q_lr": 1e30} if script == "sac_sparse" else {"learning_rate": 1e30}
    first = {"cql_pruned": 1, "sac_sparse": 100}.get(script, 50)
    length = {} if script == "cql_pruned" else {"total_timesteps": 1_500}
    flags = flags_of(script, checkpoint_every=first, runs_dir=str(tmp_path), **rate, **length)
    if script == "cql_pruned":
        flags |= {"total_updates": 300, "eval_every": 0}
    ended = run_script(f"{script}.py", *as_flags(flags))
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    (folder,) = tmp_path.iterdir()
    assert not (folder / "model.pt").exists()
    state = load(folder / "checkpoint.pt")["state"]
    networks = state.get("networks", {"q_network": state.get("q_network")})
    assert all(weight.isfinite().all() for network in networks.values() for weight in network.values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_input_in_a_process_of_its_own(script, tmp_path):
    flags = flags_of(script, sparsity=1.0, runs_dir=str(tmp_path / "runs"))
    ended = run_script(f"{script}.py", *as_flags(flags))
    assert ended.returncode == 2 and not list(tmp_path.iterdir())
    assert ended.stderr.startswith("error: --sparsity: ") and ended.stderr.count("\n") == 1


BAD = {int: (-1, -(10**9)), float: (-1.0, float("nan"), float("inf"))}
FREE = {"v_min", "v_max", "target_entropy"}  # may be negative


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_among_the_flags_has_a_range_that_refuses(script, capsys):
    args_class = importlib.import_module(script).Args
    checked = 0
    for name, kind in get_type_hints(args_class).items():
        number = next((number for number in (int, float) if kind in (number, number | None)), None)
        if number is None:
            continue
        assert name in FREE or rules_of(get_type_hints(args_class, include_extras=True)[name]), name
        for value in BAD[number][name in FREE :]:
            with pytest.raises(SystemExit) as ended:
                check_flags(args_class(**{name: value}))
            assert ended.value.code == 2 and capsys.readouterr().err.startswith(f"error: {flag(name)}: ")
            checked += 1
    assert checked > 30


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("low", "high"),
    [("prune_start", "prune_end"), ("v_min", "v_max"), ("learning_starts", "total_timesteps")],
)
def test_flags_that_must_exceed_another(script, low, high, capsys):
    args_class = importlib.import_module(script).Args
    if not hasattr(args_class, low):
        pytest.skip("it has no such flags")
    value = getattr(args_class, high)
    with pytest.raises(SystemExit):
        check_flags(args_class(**{low: value}))
    assert capsys.readouterr().err.startswith(f"error: {flag(high)}: ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_presets_yield_to_the_command_line(script):
    module = importlib.import_module(script)
    given = ["--dataset", dataset()] if script == "cql_pruned" else []
    given += ["--env-id", PRESET_ENVS[script]]
    preset = module.preset(parse_args(module.Args, module.preset, given))
    args = parse_args(module.Args, module.preset, [*given, "--batch-size", "7"])
    assert args.batch_size == 7
    assert {name: getattr(args, name) for name in preset if name != "batch_size"} == {
        name: value for name, value in preset.items() if name != "batch_size"
    }
    default = module.Args.batch_size
    assert parse_args(module.Args, module.preset, [*given, "--batch-size", str(default)]).batch_size == default


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_defaults_of_the_environment_that_is_given(script, capsys):
    module = importlib.import_module(script)
    given = ["--dataset", dataset()] if script == "cql_pruned" else ["--env-id", PRESET_ENVS[script]]
    episodes = module.preset(parse_args(module.Args, module.preset, given))["eval_episodes"]
    with pytest.raises(SystemExit) as ended:
        parse_args(module.Args, module.preset, [*given, "--help"])
    assert ended.value.code == 0 and f"(default: {episodes})" in capsys.readouterr().out


def test_running_flags_are_the_same_in_every_script():
    for script in SCRIPTS:
        assert issubclass(importlib.import_module(script).Args, RunFlags)


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "cql_pruned"])
def test_learning_waits_for_the_first_whole_transitions(script, tmp_path):
    """More environments, and longer returns, than steps before learning: there is nothing to draw at first."""
    flags = {"num_envs": 16, "learning_starts": 1, "total_timesteps": 200}
    flags |= {} if script == "sac_sparse" else {"n_step": 5}
    model = load(train(script, tmp_path, **flags) / "model.pt")
    assert all(weight.isfinite().all() for network in model["networks"].values() for weight in network.values())
