"""`python -m utils.evaluate`, and the reading of models: real runs, hand-made networks, files that are no models."""

import dataclasses
import importlib

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

import dqn_sparse
import sac_sparse
from utils import evaluate as command
from utils.results import Model, atari_scores, cost, human_normalised, load_model


def play(*models, **flags):
    return command.main(command.Args(models, **flags))


def test_a_model_gives_the_figure_of_its_run(train, capsys):
    """A trained policy, through its file and the command, plays just the episodes of the run's own evaluation."""
    folder = train(total_timesteps=1_500, learning_rate=1e-3, eval_episodes=3, eval_epsilon=0.0, sparsity=0.5)
    printed = capsys.readouterr().out.splitlines()[-1]
    returns = play(folder, episodes=3)[folder]
    assert f"mean return {returns.mean():.1f} (sd {returns.std():.1f}) of 3 episodes" in printed
    out = capsys.readouterr().out
    assert f"| 3 | {returns.mean():.4g} [" in out and "epsilon 0, seed 1000001" in out


def test_epsilon_and_seed_are_played(train):
    folder = train(total_timesteps=1_500, learning_rate=1e-3)
    greedy = play(folder, episodes=20, epsilon=0.0)[folder]
    assert np.array_equal(greedy, play(folder / "model.pt", episodes=20, epsilon=0.0)[folder / "model.pt"])
    assert not np.array_equal(greedy, play(folder, episodes=20, epsilon=0.0, seed=5)[folder])
    random = play(folder, episodes=20, epsilon=1.0)[folder]
    assert 15 < random.mean() < 32  # a random policy balances for about 22 steps
    assert not np.array_equal(greedy, random)
    assert len(greedy) == len(random) == 20


def test_a_policy_acts_on_means_of_distributions():
    """Logits over three atoms: action 1 has the larger mean, action 0 the larger logit."""
    logits = torch.tensor([[[0.0, 5.0, 0.0], [-9.0, 1.0, 1.0]]])

    class Constant(nn.Module):
        def forward(self, x):
            return logits.expand(len(x), -1, -1)

    class Script:
        q_values = staticmethod(lambda logits, support: (logits.softmax(-1) * support).sum(-1))

    flags = type("Flags", (), {"v_min": -1.0, "v_max": 1.0})
    model = Model(Script, flags, {"q_network": Constant()}, {}, Box(-1, 1, (4,)), Discrete(2))
    assert command.make_policy(model, 0.0, 0)(np.zeros((3, 4), np.float32)).tolist() == [1, 1, 1]


def test_protocol_flags_reach_the_environment(train):
    model = load_model(train())
    assert command.environment_flags(model, command.Args(())) == {"sticky_actions": 0.25, "noop_max": 0}
    flags = command.environment_flags(model, command.Args((), sticky=0.0, noops=30))
    assert flags == {"sticky_actions": 0.0, "noop_max": 30}


def test_a_video_is_written(train, capsys):
    folder = train()
    play(folder, episodes=2, video=True)
    (video,) = (folder / "evaluation").glob("*.mp4")
    import cv2

    capture, frames = cv2.VideoCapture(str(video)), 0
    while capture.read()[0]:
        frames += 1
    assert frames >= 8  # the pole does not fall sooner
    assert "holds the video of an episode of return" in capsys.readouterr().out


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
        "checkpoint": content | {"rng": {}},
    }
    paths = [tmp_path / f"{name}.pt" for name in files]
    for path, value in zip(paths, files.values()):
        torch.save(value, path)
    torn = tmp_path / "torn.pt"
    torn.write_bytes((folder / "model.pt").read_bytes()[:1000])
    assert list(play(*paths, torn, tmp_path / "none", folder, episodes=1)) == [folder]
    lines = capsys.readouterr().err.splitlines()
    for path, why in zip(
        [*paths, torn, tmp_path / "none"],
        [
            "lacks script",
            "sarsa_sparse.py, which is not here",
            "dqn_sparse.py (RuntimeError",
            "--resume",
            "torn",
            "no model.pt",
        ],
    ):
        assert [why in line for line in lines if str(path) + ":" in line] == [True]
    with pytest.raises(SystemExit) as ended:
        play(torn)
    assert ended.value.code == 2 and capsys.readouterr().err.endswith("error: none of these can be played\n")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"episodes": 0}, "--episodes"),
        ({"epsilon": 2.0}, "--epsilon: got 2.0"),
        ({"sticky": -1.0}, "--sticky"),
        ({"noops": -1}, "--noops"),
    ],
)
def test_flags_without_a_meaning(flags, said, tmp_path, capsys):
    for models, words in (([tmp_path], said), ([], "no model given")):
        with pytest.raises(SystemExit) as ended:
            play(*models, **(flags if models else {}))
        assert ended.value.code == 2 and capsys.readouterr().err.startswith(f"error: {words}")


def test_cost_of_an_mlp_by_hand(train):
    """CartPole: 4 x 512 + 512 x 512 + 512 x 2 weights, of which each layer keeps its exact share."""
    dense = cost(load_model(train(method="dense")))
    assert dense == (265_216, 265_216, 2 * 265_216)
    sparse = cost(load_model(train(method="random", sparsity=0.75, distribution="uniform")))
    assert sparse == (66_304, 265_216, 2 * 66_304)


def test_cost_of_convolutions_by_hand():
    args = dataclasses.replace(dqn_sparse.Args(), network="nature")
    space = Box(0, 255, (4, 84, 84), np.uint8)
    network = dqn_sparse.make_network(args, space, 6)
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in network.named_parameters()}
    masks["conv2.weight"][1:] = False  # one of 64 filters stays
    model = Model(dqn_sparse, args, {"q_network": network}, {"q_network": masks}, space, Discrete(6))
    layers = {"conv1": (32 * 4 * 64, 21 * 21), "conv2": (32 * 16, 121), "conv3": (64 * 64 * 9, 121)}
    layers |= {"dense": (7_744 * 512, 1), "head": (512 * 6, 1)}
    assert cost(model).kept == sum(weights for weights, _ in layers.values())
    assert cost(model).total == cost(model).kept + 63 * 32 * 16
    assert cost(model).flops == 2 * sum(weights * places for weights, places in layers.values())


def test_human_normalised_scores():
    assert len(atari_scores()) == 57
    assert human_normalised(30.5, "ALE/Breakout-v5") == 1 and human_normalised(1.7, "BreakoutNoFrameskip-v4") == 0
    np.testing.assert_allclose(human_normalised(np.array([-20.7, -3.05]), "ALE/Pong-v5"), [0, 0.5])
    assert human_normalised(500.0, "CartPole-v1") is None
    assert human_normalised(1.0, "ALE/Carnival-v5") is None  # no human has a score in the table


def save(path, module, args, networks):
    content = {"script": module.__name__, "args": dataclasses.asdict(args), "masks": {}}
    torch.save(content | {"networks": {name: network.state_dict() for name, network in networks.items()}}, path)


@pytest.mark.parametrize(
    ("script", "flags"),
    [("dqn_sparse", {}), ("rainbow_pruned", {}), ("cql_pruned", {"loss": "huber"}), ("cql_pruned", {"loss": "c51"})],
)
def test_value_agents_act_as_their_scripts_do(script, flags, tmp_path):
    torch.manual_seed(0)
    module = importlib.import_module(script)
    args = module.Args(env_id="CartPole-v1", network="mlp", **flags)
    network = module.make_network(args, Box(-1, 1, (4,)), 2)
    save(tmp_path / "model.pt", module, args, {"q_network": network})
    observation = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    network.eval()
    q = network(torch.from_numpy(observation)).detach()
    if script != "dqn_sparse":
        distributional = flags.get("loss") == "c51" or script == "rainbow_pruned"
        q = module.q_values(q, torch.linspace(args.v_min, args.v_max, args.n_atoms) if distributional else None)
    expected = q.argmax(1)
    assert 0 < expected.float().mean() < 1  # both actions are chosen
    found = command.make_policy(load_model(tmp_path), 0.0, 0)(observation)
    assert found.tolist() == expected.tolist()
    assert len(play(tmp_path, episodes=2)[tmp_path]) == 2


def test_sac_acts_as_its_script_does(tmp_path):
    torch.manual_seed(0)
    args = sac_sparse.Args(env_id="Pendulum-v1", network="mlp", action_repeat=2, gamma=0.9, num_critics=2)
    actor, critic = sac_sparse.make_networks(args, 3, 1)
    rsnorm = sac_sparse.RSNorm(3)
    rsnorm.update(5 + 3 * torch.randn(50, 3))
    save(tmp_path / "model.pt", sac_sparse, args, {"actor": actor, "critic": critic, "rsnorm": rsnorm})
    model = load_model(tmp_path)
    observation = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    expected = actor.greedy(rsnorm(torch.from_numpy(observation))).detach().numpy()
    np.testing.assert_allclose(command.make_policy(model, 0.0, 0)(observation), expected, rtol=1e-6)
    assert command.environment_flags(model, command.Args(())) == {"action_repeat": 2}
    assert len(play(tmp_path, episodes=2)[tmp_path]) == 2
    assert cost(model).total == sum(p.numel() for n in (actor, critic) for p in n.parameters() if p.ndim >= 2)
    assert cost(model).flops == 2 * cost(model).total
