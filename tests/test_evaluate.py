"""`python -m utils.evaluate`, and the reading of models: real runs, hand-made networks, files that are no models."""

import dataclasses
import importlib

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

import dqn_sparse
import rainbow_pruned
from utils import evaluate as command
from utils.analysis.results import Model, atari_scores, cost, human_normalised, load_model
from utils.records import read_evaluations


def play(*models, **flags):
    return command.main(command.Args(models, **flags))


def test_a_model_gives_the_figure_of_its_run(train, capsys):
    """A trained policy, through its file and the command, plays just the episodes of the run's own evaluation."""
    folder = train(total_timesteps=1_500, learning_rate=1e-3, eval_episodes=3, eval_epsilon=0.0, sparsity=0.5)
    own = read_evaluations(folder)[:, 2]
    assert play(folder, episodes=5)[folder][:3].tolist() == own.tolist()
    assert f"{own.mean():.4g} [" not in capsys.readouterr().err


def test_epsilon_and_seed_are_played(train):
    folder = train(total_timesteps=1_500, learning_rate=1e-3)
    greedy = play(folder, episodes=20, epsilon=0.0)[folder]
    assert np.array_equal(greedy, play(folder / "model.pt", episodes=20, epsilon=0.0)[folder / "model.pt"])
    assert not np.array_equal(greedy, play(folder, episodes=20, epsilon=0.0, seed=5)[folder])
    random = play(folder, episodes=20, epsilon=1.0)[folder]
    assert 15 < random.mean() < 32  # a random policy balances for about 22 steps
    assert not np.array_equal(greedy, random)
    assert len(greedy) == len(random) == 20


def test_protocol_flags_reach_the_environment(train, monkeypatch):
    played = []
    monkeypatch.setattr(command, "evaluate", lambda args, *rest: played.append(args) or (np.ones(1), np.ones(1)))
    folder = train()
    play(folder, episodes=1)
    play(folder, episodes=1, sticky=0.0, noops=30, epsilon=0.5)
    assert [(args.sticky_actions, args.noop_max, args.eval_epsilon) for args in played] == [
        (0.25, 0, 0.001),
        (0.0, 30, 0.5),
    ]


def test_a_video_is_written(train, capsys):
    folder = train()
    play(folder, episodes=2, video=True)
    (video,) = (folder / "evaluation").glob("*.mp4")
    import cv2

    capture, frames = cv2.VideoCapture(str(video)), 0
    while capture.read()[0]:
        frames += 1
    assert frames >= 8  # the pole does not fall sooner
    assert str(folder / "evaluation") in capsys.readouterr().out


def test_a_pattern_of_models(train, tmp_path):
    folders = [train(seed=seed) for seed in (1, 2)]
    assert sorted(play(tmp_path / "runs" / "*", episodes=1)) == sorted(folders)


def test_what_is_no_model_is_named_and_the_rest_is_played(train, tmp_path, capsys):
    folder = train()
    content = torch.load(folder / "model.pt", weights_only=True)
    files = {
        "older": content["networks"]["q_network"],  # a bare state_dict
        "other": content | {"script": "sarsa_sparse"},
        "unfitting": content | {"args": content["args"] | {"width": 2}},
    }
    paths = [tmp_path / f"{name}.pt" for name in files]
    for path, value in zip(paths, files.values()):
        torch.save(value, path)
    torn = tmp_path / "torn.pt"
    torn.write_bytes((folder / "model.pt").read_bytes()[:1000])
    assert list(play(*paths, torn, tmp_path / "none", folder / "episodes.csv", folder, episodes=1)) == [folder]
    notes = capsys.readouterr().err.splitlines()
    for path in [*paths, torn, tmp_path / "none", folder / "episodes.csv"]:
        assert sum(str(path) in line for line in notes) == 1, path
    with pytest.raises(SystemExit) as ended:
        play(torn)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"episodes": 0}, "--episodes"),
        ({"epsilon": 2.0}, "--epsilon"),
        ({"sticky": -1.0}, "--sticky"),
        ({"noops": -1}, "--noops"),
    ],
)
def test_flags_without_a_meaning(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        play(tmp_path, **flags)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(f"error: {said}: ")


def test_no_model_given():
    with pytest.raises(SystemExit) as ended:
        play()
    assert ended.value.code == 2


def test_cost_of_an_mlp_by_hand(train):
    """CartPole: 4 x 512 + 512 x 512 + 512 x 2 weights, of which each layer keeps its exact share."""
    dense = cost(load_model(train(method="dense")))
    assert dense == (265_216, 265_216, 2 * 265_216)
    sparse = cost(load_model(train(method="random", sparsity=0.75, distribution="uniform")))
    assert sparse == (66_304, 265_216, 2 * 66_304)


def test_cost_of_convolutions_by_hand():
    args = dataclasses.replace(dqn_sparse.Args(), network="nature")
    space = Box(0, 255, (4, 84, 84), np.uint8)
    network = dqn_sparse.make_networks(args, space, Discrete(6))["q_network"]
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in network.named_parameters()}
    masks["torso.conv2.weight"][1:] = False  # one of 64 filters stays
    model = Model(dqn_sparse, args, {"q_network": network}, {"q_network": masks}, space)
    layers = {"conv1": (32 * 4 * 64, 21 * 21), "conv2": (32 * 16, 121), "conv3": (64 * 64 * 9, 121)}
    layers |= {"dense": (7_744 * 512, 1), "head": (512 * 6, 1)}
    assert cost(model).active == sum(weights for weights, _ in layers.values())
    assert cost(model).total == cost(model).active + 63 * 32 * 16
    assert cost(model).flops == 2 * sum(weights * places for weights, places in layers.values())


def test_cost_of_noisy_layers_is_that_of_their_means():
    """The weights of the noise count as weights; an evaluation multiplies by none of them."""
    args = dataclasses.replace(rainbow_pruned.Args(), noisy=True, n_atoms=5)
    space = Box(-1, 1, (4,))
    networks = rainbow_pruned.make_networks(args, space, Discrete(2))
    torso, head = 4 * 512, 512 * 512 + 512 * 2 * 5
    assert cost(Model(rainbow_pruned, args, networks, {}, space)) == (torso + 2 * head,) * 2 + (2 * (torso + head),)


def test_human_normalised_scores():
    assert len(atari_scores()) == 57
    assert human_normalised(30.5, "ALE/Breakout-v5") == 1 and human_normalised(1.7, "BreakoutNoFrameskip-v4") == 0
    np.testing.assert_allclose(human_normalised(np.array([-20.7, -3.05]), "ALE/Pong-v5"), [0, 0.5])
    assert human_normalised(500.0, "CartPole-v1") is None
    assert human_normalised(1.0, "ALE/Carnival-v5") is None  # no human has a score in the table


FORK = """
import torch
from dataclasses import dataclass
from torch import nn
from utils.flags import RunFlags

@dataclass
class Args(RunFlags):
    env_id: str = "CartPole-v1"
    seed: int = 1
    total_timesteps: int = 10
    layers: tuple[int, ...] = (3,)

def make_networks(args, obs_space, action_space):
    return {"brain": nn.Linear(obs_space.shape[0], int(action_space.n)), "mood": nn.Linear(1, 1)}

def make_policy(args, networks):
    return lambda obs, rngs: networks["brain"](torch.from_numpy(obs)).argmax(1).numpy()
"""


def test_a_fork_with_other_networks_is_played_from_the_copy_in_its_run(tmp_path):
    (tmp_path / "my-fork.py").write_text(FORK)
    brain = nn.Linear(4, 2)
    with torch.no_grad():
        brain.weight.copy_(torch.tensor([[0.0, 0, 0, 0], [0, 0, 1, 1]]))  # leans against the fall
        brain.bias.zero_()
    networks = {"brain": brain.state_dict(), "mood": nn.Linear(1, 1).state_dict()}
    masks = {"brain": {"weight": torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]]).bool()}}
    content = {"script": "my-fork", "args": {"env_id": "CartPole-v1", "layers": [3, 4], "gone": 1}}
    torch.save(content | {"networks": networks, "masks": masks}, tmp_path / "model.pt")
    assert play(tmp_path, episodes=3)[tmp_path].mean() > 100
    assert cost(load_model(tmp_path)) == (2 + 1, 8 + 1, 2 * (2 + 1))


@pytest.mark.parametrize("script", ["dqn_sparse", "rainbow_pruned", "sac_sparse"])
def test_models_act_as_their_networks(script, tmp_path):
    """Greedy actions from the file against those of the networks that were saved, by hand."""
    torch.manual_seed(0)
    module = importlib.import_module(script)
    flags = {"env_id": "CartPole-v1", "eval_epsilon": 0.0}
    spaces = Box(-1, 1, (4,)), Discrete(2)
    if script == "sac_sparse":
        flags, spaces = (
            {"env_id": "Pendulum-v1", "network": "mlp", "num_critics": 2},
            (Box(-1, 1, (3,)), Box(-1, 1, (1,))),
        )
        flags |= {"action_repeat": 2, "gamma": 0.9}
    args = module.Args(**flags)
    networks = module.make_networks(args, *spaces)
    obs = torch.randn(200, *spaces[0].shape)
    if script == "sac_sparse":
        networks["rsnorm"].update(5 + 3 * torch.randn(50, 3))
        normal = (obs - networks["rsnorm"].mean) / (networks["rsnorm"].var + 1e-8).sqrt()
        expected = torch.tanh(networks["actor"].mean(networks["actor"].encoder(normal.float())))
    else:
        output = networks["q_network"](obs)
        if script == "rainbow_pruned":
            output = (output.softmax(-1) * torch.linspace(args.v_min, args.v_max, args.n_atoms)).sum(-1)
        expected = output.argmax(1)
        assert 0 < expected.float().mean() < 1  # both actions are chosen
    content = {"script": script, "args": dataclasses.asdict(args), "masks": {}}
    content["networks"] = {name: network.state_dict() for name, network in networks.items()}
    torch.save(content, tmp_path / "model.pt")
    model = load_model(tmp_path)
    rngs = [np.random.default_rng(i) for i in range(200)]
    np.testing.assert_allclose(
        model.script.make_policy(model.args, model.networks)(obs.numpy(), rngs), expected.detach()
    )
