"""The offline agent: losses against slow literal versions, learning from a mixed log, resuming, bad input."""

import math
import re
import shutil
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_main
from gymnasium.spaces import Box, Discrete

import cql_pruned
import dqn_sparse
from cql_pruned import Args, cql_regularizer, loss_terms, make_networks, preset, project, q_values
from utils.flags import InputError, parse_args
from utils.offline.write import DatasetWriter
from utils.records import read_evaluations
from utils.replay import Batch

CARTPOLE = gym.make("CartPole-v1").observation_space


def make_network(args, space, n_actions):
    return make_networks(args, space, Discrete(n_actions))["q_network"]


def random_batch(size=7, actions=3, seed=0):
    torch.manual_seed(seed)
    discount = torch.where(torch.rand(size) < 0.3, 0.0, 0.97)
    return Batch(
        torch.randn(size, 4), torch.randint(actions, (size,)), 4 * torch.randn(size), discount, torch.randn(size, 4)
    )


def literal_q(output, support):
    """Q of one observation as a list, from its output (A, N) as lists."""
    if support is None:
        return [atoms[0] for atoms in output]
    means = []
    for logits in output:
        total = sum(math.exp(x) for x in logits)
        means.append(sum(z * math.exp(x) / total for z, x in zip(support, logits)))
    return means


def literal_loss(q_network, target_network, batch, support, double, alpha):
    """One transition after the other, one atom after the other."""
    total_td = total_cql = 0.0
    for i in range(len(batch.action)):
        one = slice(i, i + 1)
        reward, discount, action = float(batch.reward[i]), float(batch.discount[i]), int(batch.action[i])
        output = q_network(batch.observation[one])[0].tolist()
        next_target = target_network(batch.next_observation[one])[0].tolist()
        next_online = q_network(batch.next_observation[one])[0].tolist()
        choice = literal_q(next_online if double else next_target, support)
        best = choice.index(max(choice))
        if support is None:
            error = abs(output[action][0] - reward - discount * next_target[best][0])
            total_td += 0.5 * error**2 if error <= 1 else error - 0.5
        else:
            normal = sum(math.exp(x) for x in next_target[best])
            low, step, mass = support[0], support[1] - support[0], [0.0] * len(support)
            for z, x in zip(support, next_target[best]):
                place = (min(max(reward + discount * z, low), support[-1]) - low) / step
                below = min(math.floor(place + 1e-9), len(support) - 2)
                mass[below] += (below + 1 - place) * math.exp(x) / normal
                mass[below + 1] += (place - below) * math.exp(x) / normal
            log_normal = math.log(sum(math.exp(x) for x in output[action]))
            total_td -= sum(m * (x - log_normal) for m, x in zip(mass, output[action]))
        q = literal_q(output, support)
        total_cql += math.log(sum(math.exp(x) for x in q)) - q[action]
    return (total_td + alpha * total_cql) / len(batch.action)


@pytest.mark.parametrize("loss", ["huber", "c51"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dueling", [False, True])
def test_total_loss_against_a_literal_version(loss, double, dueling):
    args = Args(loss=loss, double=double, dueling=dueling, cql_alpha=0.3, n_atoms=11, v_min=-5, v_max=5)
    torch.manual_seed(1)
    networks = [make_network(args, CARTPOLE, 3) for _ in range(2)]
    for network in networks:  # outputs far apart, so that a wrong choice of action shows
        network.head.out.weight.data.mul_(20)
    support = torch.linspace(args.v_min, args.v_max, args.n_atoms) if loss == "c51" else None
    batch = random_batch()
    terms = loss_terms(*networks, batch, support, args)
    with torch.no_grad():
        atoms = None if support is None else support.tolist()
        expected = literal_loss(*networks, batch, atoms, double, args.cql_alpha)
        q = [literal_q(output, atoms) for output in networks[0](batch.observation).tolist()]
    assert terms[0].item() == pytest.approx(expected, rel=1e-4)
    assert terms[3].item() == pytest.approx(np.mean([row[a] for row, a in zip(q, batch.action)]), rel=1e-4)
    assert terms[4].item() == pytest.approx(np.mean([max(row) for row in q]), rel=1e-4)


@pytest.mark.parametrize("loss", ["huber", "c51"])
def test_regularizer_is_the_cross_entropy_of_the_data_actions(loss):
    args = Args(loss=loss)
    batch, network = random_batch(), make_network(args, CARTPOLE, 3)
    support = torch.linspace(-10, 10, 51) if loss == "c51" else None
    q = q_values(network(batch.observation), support)
    assert cql_regularizer(q, batch.action).item() == pytest.approx(F.cross_entropy(q, batch.action).item(), rel=1e-5)
    # ... of which plain Q-learning has none
    target = make_network(args, CARTPOLE, 3)
    plain, td, *_ = loss_terms(network, target, batch, support, replace(args, cql_alpha=0.0))
    assert plain.item() == td.item()


def test_cloning_minimises_the_cross_entropy_alone():
    args = Args(loss="bc")
    batch, networks = random_batch(), [make_network(args, CARTPOLE, 3) for _ in range(2)]
    output = networks[0](batch.observation)[:, :, 0]
    loss = loss_terms(*networks, batch, None, args)[0]
    assert loss.item() == pytest.approx(F.cross_entropy(output, batch.action).item(), rel=1e-5)


def test_projection_keeps_mass_and_mean():
    support = torch.linspace(-10, 10, 51)
    torch.manual_seed(0)
    probability, place = torch.rand(20, 51).softmax(1), 19 * torch.rand(20, 51) - 9.5
    projected = project(probability, place, support)
    assert torch.allclose(projected.sum(1), torch.ones(20))
    assert torch.allclose((projected * support).sum(1), (probability * place).sum(1), atol=1e-4)
    assert torch.allclose(project(probability, support.expand(20, -1), support), probability, atol=1e-6)


def test_dueling_advantages_are_centred():
    network = make_network(Args(loss="huber", dueling=True), CARTPOLE, 3)
    observation = torch.randn(5, 4)
    features = F.relu(network.head.dense(network.torso(observation)))
    assert torch.allclose(network(observation).mean(1), network.head.value(features), atol=1e-5)


@pytest.mark.parametrize("network", ["impala", "nature"])
def test_atari_networks_give_a_distribution_for_each_action(network):
    space = Box(0, 255, (4, 84, 84), np.uint8)
    net = make_network(Args(network=network, loss="c51", dueling=True), space, 6)
    assert net(torch.zeros(2, 4, 84, 84, dtype=torch.uint8)).shape == (2, 6, 51)


# Table 3 of Obando-Ceron et al. 2024; target periods and Huber are those of Dopamine's offline configurations
PAPER = {
    "huber": {"learning_rate": 5e-5, "adam_eps": 3.125e-4, "n_step": 1, "double": False, "dueling": False},
    "c51": {"learning_rate": 6.25e-5, "adam_eps": 1.5e-4, "n_step": 3, "double": True, "dueling": True},
}
BOTH = {"batch_size": 32, "gamma": 0.99, "cql_alpha": 0.1, "total_updates": 200 * 62_500, "eval_every": 62_500}
TARGET = {"huber": 2_000, "c51": 100}


@pytest.mark.parametrize("loss", ["huber", "c51"])
def test_values_of_the_paper(loss, tmp_path):
    DatasetWriter(str(tmp_path / "set"), 1, CARTPOLE, 1, env_id="ALE/Pong-v5").close()
    flags = ["--dataset", str(tmp_path / "set"), "--loss", loss]
    args = vars(parse_args(Args, preset, flags))
    expected = PAPER[loss] | BOTH | {"target_network_frequency": TARGET[loss]}
    assert {name: args[name] for name in expected} == expected
    args = parse_args(Args, preset, [*flags, "--env-id", "CartPole-v1", "--n-step", "2"])
    assert (args.n_step, args.dueling) == (2, loss == "c51")


RANDOMNESS = (0.3, 0.6, 1.0)


def controller(observation, rng, randomness):
    """Pushes the cart to where the pole falls, but for some of the time to anywhere."""
    return int(rng.integers(2) if rng.random() < randomness else observation[2] + observation[3] > 0)


@pytest.fixture(scope="module")
def mixed_log(tmp_path_factory):
    """Episodes of CartPole by policies from random to fair; the folder and the returns."""
    folder = tmp_path_factory.mktemp("mixed")
    env, rng, returns = gym.make("CartPole-v1"), np.random.default_rng(0), []
    writer = DatasetWriter(str(folder), 1, CARTPOLE, 1, env_id="CartPole-v1")
    for episode in range(120):
        observation, _ = env.reset(seed=episode)
        length, over = 0, False
        while not over:
            action = controller(observation, rng, randomness=RANDOMNESS[episode % 3])
            following, reward, terminated, truncated, _ = env.step(action)
            row = observation[None], [action], [reward], np.array([terminated]), np.array([truncated])
            writer.add(*map(np.asarray, row))
            observation, length, over = following, length + 1, terminated or truncated
        writer.end_episodes()
        returns.append(length)
    writer.close()
    return str(folder), np.array(returns)


def learn(folder, runs, **flags):
    flags = {"env_id": "CartPole-v1", "eval_episodes": 2, "dataset": folder} | flags
    return run_main(cql_pruned, runs, **cql_pruned.CLASSIC_CONTROL | flags)


@pytest.mark.parametrize("flags", [{"method": "dense"}, {"method": "gmp", "sparsity": 0.9}])
def test_beats_the_policies_that_made_its_data(mixed_log, tmp_path, curves, flags):
    folder, behaviour = mixed_log
    run, returns = learn(folder, tmp_path, total_updates=1_000, eval_episodes=10, **flags)
    assert returns.mean() > 2 * behaviour.mean()
    assert returns.mean() > 1.2 * behaviour[:: len(RANDOMNESS)].mean()  # the best of the policies
    model = torch.load(run / "model.pt", weights_only=True)
    for name, mask in model["masks"]["q_network"].items():
        assert (model["networks"]["q_network"][name][~mask] == 0).all()
    if flags["method"] == "gmp":
        masks = model["masks"]["q_network"].values()
        assert 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks) == pytest.approx(
            0.9, abs=1e-4
        )
    assert (run / "curve.png").stat().st_size > 10_000


def test_learns_from_the_pixels_of_minatar(tmp_path):
    pytest.importorskip("minatar")
    data = str(tmp_path / "data")
    flags = {"env_id": "MinAtar/Breakout-v0", "total_timesteps": 300, "learning_starts": 299, "buffer_size": 300}
    run_main(dqn_sparse, tmp_path / "log", method="dense", save_dataset=data, clip_rewards=False, **flags)
    given = ["--dataset", data, "--total-updates", "20", "--eval-episodes", "1", "--runs-dir", str(tmp_path / "runs")]
    returns = cql_pruned.main(parse_args(Args, preset, [*given, "--device", "cpu", "--loss", "c51"]))
    (model,) = (tmp_path / "runs").glob("*/model.pt")
    weights = torch.load(model, weights_only=True)["networks"]["q_network"]
    assert np.isfinite(returns).all() and weights["torso.conv.weight"].shape == (16, 4, 3, 3)


def test_a_resumed_run_ends_with_the_same_weights(mixed_log, tmp_path):
    folder, _ = mixed_log
    flags = {"total_updates": 120, "checkpoint_every": 70, "eval_every": 50, "loss": "c51", "batch_size": 8}
    run, _ = learn(folder, tmp_path, **flags)
    whole = torch.load(run / "model.pt", weights_only=True)
    evaluations = read_evaluations(run)
    (run / "model.pt").unlink()
    learn(folder, tmp_path, **flags, resume=f"{run}/checkpoint.pt")
    again = torch.load(run / "model.pt", weights_only=True)
    for name, weight in whole["networks"]["q_network"].items():
        assert torch.equal(weight, again["networks"]["q_network"][name]), name
    for name, mask in whole["masks"]["q_network"].items():
        assert torch.equal(mask, again["masks"]["q_network"][name]), name
    assert read_evaluations(run).tolist() == evaluations.tolist()


def test_the_progress_line_shows_the_latest_evaluation(mixed_log, tmp_path, capsys):
    learn(mixed_log[0], tmp_path, total_updates=300, eval_every=100)  # a line after each 100 updates
    last = capsys.readouterr().err.split("\r")[-1]
    assert "100%" in last and re.search(r"return=\d", last), last


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"dataset": ""}, "--dataset"),
        ({"dataset": "nowhere"}, "--dataset"),
        ({"env_id": "CartPool-v1"}, "--env-id"),
        ({"env_id": "Acrobot-v1"}, "observation_ckpt.0.gz"),
        ({"env_id": "ALE/Pong-v5"}, "observation_ckpt.0.gz"),
    ],
)
def test_data_that_do_not_fit_end_the_run_before_it_leaves_a_trace(mixed_log, tmp_path, capsys, flags, says):
    with pytest.raises((SystemExit, InputError)) as caught:
        learn(mixed_log[0], tmp_path / "runs", **flags)
    assert says in capsys.readouterr().err + str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_environment_must_be_named(mixed_log, tmp_path, capsys):
    folder = tmp_path / "set"
    shutil.copytree(mixed_log[0], folder)
    (folder / "dataset.json").unlink()
    with pytest.raises(SystemExit):
        learn(str(folder), tmp_path / "runs", env_id=None)
    assert "--env-id" in capsys.readouterr().err


def test_actions_that_the_environment_does_not_have(tmp_path, capsys):
    writer = DatasetWriter(str(tmp_path / "set"), 1, CARTPOLE, 1, "CartPole-v1")
    for action in (0, 1, 2, 0):
        row = np.zeros((1, 4), np.float32), np.array([action]), np.zeros(1), np.zeros(1, bool), np.zeros(1, bool)
        writer.add(*row)
    writer.close()
    with pytest.raises(SystemExit):
        learn(str(tmp_path / "set"), tmp_path / "runs")
    assert "--env-id" in capsys.readouterr().err
