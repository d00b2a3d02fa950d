"""Diagnostics with known answers: scalings, spectra, gradients and masks that were constructed."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_main
from gymnasium.spaces import Box, Discrete
from torch import nn

import cql_pruned
import dqn_sparse
import iqn_pruned
import rainbow_pruned
import sac_sparse
from utils.diagnostics import (
    EverActive,
    dormant_ratios,
    feature_norm,
    gradient_cosines,
    has_inputs,
    interference,
    relu_activations,
    report,
    srank,
    stable_rank,
    target_variance,
    unit_scores,
    weight_norm,
)
from utils.records import read_scalars


def test_scores_and_ratios_by_hand():
    activation = torch.tensor([[0.0, 2.0, 0.0, 7.5, 0.2], [0.0, 0.0, 0.1, 9.9, 0.3]])  # means 0, 1, 0.05, 8.7, 0.25
    assert unit_scores(activation).tolist() == pytest.approx([0, 0.5, 0.025, 4.35, 0.125])
    activation[1, 2] = 0.09
    assert dormant_ratios(activation) == pytest.approx(
        {"dormant_0": 0.2, "dormant_0.025": 0.4, "dormant_0.1": 0.4, "unconnected": 0}
    )


def test_a_channel_is_a_unit():
    activation = torch.zeros(3, 4, 5, 5)
    activation[:, 1] = 1
    activation[0, 2, 0, 0] = 75  # as much as the whole of channel 1
    assert unit_scores(activation).tolist() == pytest.approx([0, 2, 2, 0])


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_dormancy_does_not_change_with_a_layers_scale(scale):
    """Scaling a layer's weights and bias scales all its units; it leaves every ratio."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 2))
    x = torch.randn(64, 8)
    with torch.no_grad():
        network[0].bias.zero_()
        network[0].bias[:50] = -100
        network[0].weight[50:100] *= 0.01
        network[0].weight[100:150] *= 0.05
    before = dormant_ratios(relu_activations(network, x)["0"])
    with torch.no_grad():
        network[0].weight *= scale
        network[0].bias *= scale
    assert dormant_ratios(relu_activations(network, x)["0"]) == pytest.approx(before)
    assert 0 < before["dormant_0"] < before["dormant_0.025"] < before["dormant_0.1"] < 1


def test_units_without_a_weight_are_counted_apart():
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[0, 1] = mask[2, 0] = True
    assert has_inputs(mask).tolist() == [True, False, True, False]
    activation = torch.tensor([[1.0, 100.0, 0.0, 0.0]])  # unit 1 shows a large bias, which would make unit 0 dormant
    ratios = dormant_ratios(activation, has_inputs(mask))
    assert ratios == {"dormant_0": 0.5, "dormant_0.025": 0.5, "dormant_0.1": 0.5, "unconnected": 0.5}
    assert has_inputs(torch.zeros(2, 3, 3, 3, dtype=torch.bool)).tolist() == [False, False]
    assert dormant_ratios(activation, torch.zeros(4, dtype=torch.bool)) == {"unconnected": 1}


def test_activations_are_those_after_the_relus():
    network = dqn_sparse.make_networks(dqn_sparse.Args(), Box(-1, 1, (4,)), Discrete(2))["q_network"]
    x = torch.randn(5, 4)
    found = relu_activations(network, x)
    assert list(found) == ["torso.dense", "head.dense"]  # the outputs have none
    first = F.relu(network.torso.dense(x))
    torch.testing.assert_close(found["torso.dense"], first)
    torch.testing.assert_close(found["head.dense"], F.relu(network.head.dense(first)))
    in_place = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 3), nn.ReLU())
    torch.testing.assert_close(relu_activations(in_place, x)["0"], F.relu(in_place[0](x)))


def test_activations_of_a_resnet():
    args = dqn_sparse.Args()
    network = dqn_sparse.make_networks(args, Box(0, 255, (4, 84, 84), np.uint8), Discrete(6))["q_network"]
    x = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    found = relu_activations(network, x)
    layers = {f"blocks.{i}.{j}.conv{k}" for i in range(3) for j in range(2) for k in (1, 2)}
    layers |= {"convs.0", "convs.1", "convs.2"}
    without = {"blocks.0.1.conv2", "blocks.1.1.conv2"}  # the next thing is a convolution
    assert set(found) == {f"torso.{layer}" for layer in layers - without} | {"head.dense"}
    assert found["torso.convs.0"].shape == (2, 16, 42, 42) and found["head.dense"].shape == (2, 512)
    masks = {"head.dense.weight": torch.zeros(512, 3872), "torso.convs.1.weight": torch.zeros(32, 16, 3, 3)}
    scalars = report(network, x, masks=masks)
    assert scalars["diagnostics/head.dense/unconnected"] == 1
    assert scalars["diagnostics/torso.convs.1/unconnected"] == 0  # its ReLU is after a pooling


def test_twin_critics():
    """Layers by their own names; ranks and norms are means over the critics' encoders."""
    torch.manual_seed(0)
    args = sac_sparse.Args(network="mlp", num_critics=2)
    critics = sac_sparse.make_networks(args, Box(-1, 1, (3,)), Box(-1, 1, (1,)))["critic"]
    first, second = critics.critics
    with torch.no_grad():
        first.encoder[0].bias[:64] = -100
    obs, action = torch.randn(32, 3), torch.randn(32, 1)
    mask = torch.ones(256, 4)
    mask[250:] = 0
    masks = {"critics.1.encoder.0.weight": mask}
    scalars = report(critics, obs, action, masks=masks, prefix="diagnostics/critic")
    assert scalars["diagnostics/critic/critics.0.encoder.0/dormant_0"] == 64 / 256
    assert scalars["diagnostics/critic/critics.1.encoder.0/unconnected"] == pytest.approx(6 / 256)
    features = [critic.encoder(torch.cat([obs, action], 1)) for critic in (first, second)]
    assert scalars["diagnostics/critic/srank"] == sum(map(srank, features)) / 2
    norms = [each.norm(dim=1).mean().item() for each in features]
    assert scalars["diagnostics/critic/feature_norm"] == pytest.approx(sum(norms) / 2, rel=1e-5)


def test_the_last_features_of_simba_are_what_its_encoder_gives():
    torch.manual_seed(0)
    actor = sac_sparse.make_networks(sac_sparse.Args(num_critics=1), Box(-1, 1, (3,)), Box(-1, 1, (1,)))["actor"]
    x = torch.randn(40, 3)
    scalars = report(actor, x, masks={})
    assert list(relu_activations(actor, x)) == ["encoder.1.expand"]
    assert scalars["diagnostics/feature_norm"] == pytest.approx(128**0.5, rel=1e-3)  # they come from a LayerNorm
    assert scalars["diagnostics/srank"] == srank(actor.encoder(x))


def test_a_noisy_unit_has_inputs_if_its_mean_or_its_noise_has():
    args = rainbow_pruned.Args(noisy=True)
    network = rainbow_pruned.make_networks(args, Box(-1, 1, (4,)), Discrete(2))["q_network"]
    masks = {f"head.dense.weight_{part}": torch.zeros(512, 512) for part in ("mu", "sigma")}
    masks["head.dense.weight_mu"][:100, 0] = masks["head.dense.weight_sigma"][50:128, 7] = 1
    scalars = report(network, torch.randn(8, 4), masks=masks)
    assert scalars["diagnostics/head.dense/unconnected"] == 0.75
    assert scalars["diagnostics/torso.dense/unconnected"] == 0  # without a mask


def matrix(values, rows=40, columns=30):
    """A matrix with these singular values."""
    torch.manual_seed(1)
    left, _ = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64))
    return left[:, : len(values)] @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right[: len(values)]


@pytest.mark.parametrize(
    ("values", "rank", "stable"),
    [
        ([3.0], 1, 1),
        ([2.0] * 7, 7, 7),
        ([98.0, 1.0, 1.0], 2, (98**2 + 2) / 98**2),  # 98 % after one value, 99 % after two
        ([90.0, 5.0, 4.5, 0.5], 3, (8100 + 25 + 20.25 + 0.25) / 8100),
    ],
)
def test_ranks_of_known_spectra(values, rank, stable):
    for scale in (1.0, 1e-3, 1e3):
        assert srank(scale * matrix(values)) == rank
        assert stable_rank(scale * matrix(values)) == pytest.approx(stable)


def test_ranks_of_nothing():
    assert srank(torch.zeros(4, 3)) == 0 and stable_rank(torch.zeros(4, 3)) == 0


def test_norms_by_hand():
    assert feature_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]])) == 3
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, 3.0]]))
        layer.bias.fill_(6.0)
    assert weight_norm(layer) == pytest.approx(7)  # 4 + 9 + 36


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_cosines_of_constructed_gradients(chunk):
    """Of w x without a bias, the gradient with respect to w is x: the cosines are those of the inputs."""
    layer = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[1.0, 0.0], [0.0, 5.0], [2.0, 2.0], [-3.0, 0.0], [0.0, 0.0]])
    half = math.sqrt(0.5)
    expected = torch.tensor(
        [
            [1, 0, half, -1, 0],
            [0, 1, half, 0, 0],
            [half, half, 1, -half, 0],
            [-1, 0, -half, 1, 0],
            [0, 0, 0, 0, 0],
        ]
    )
    found = gradient_cosines(layer, lambda forward, x: forward(x).sum(), [x], chunk)
    torch.testing.assert_close(found, expected)


def test_interference_is_the_mean_over_pairs():
    layer = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-3.0, 0.0], [1.0, 1.0]])
    loss = lambda forward, x: forward(x).sum()  # noqa: E731
    assert interference(layer, loss, [x], samples=3) == pytest.approx(-1 / 3)  # 0, 0 and -1
    assert interference(layer, loss, [x[:1].expand(16, 2)]) == pytest.approx(1)


def test_cosines_of_the_agents_loss_against_one_backward_a_sample():
    torch.manual_seed(2)
    args = dqn_sparse.Args(network="nature")
    spaces = Box(0, 255, (4, 84, 84), np.uint8), Discrete(3)
    network, target = (dqn_sparse.make_networks(args, *spaces)["q_network"] for _ in range(2))
    frames = torch.randint(0, 256, (2, 3, 4, 84, 84), dtype=torch.uint8)
    batch = dqn_sparse.Batch(frames[0], torch.tensor([0, 2, 2]), torch.randn(3), torch.full((3,), 0.9), frames[1])

    def loss(forward, *sample):
        return dqn_sparse.td_loss(forward, target, dqn_sparse.Batch(*sample), double=False)[0]

    rows = []
    for i in range(3):
        network.zero_grad()
        loss(network, *(part[i : i + 1] for part in batch)).backward()
        rows.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    rows = F.normalize(torch.stack(rows))
    torch.testing.assert_close(gradient_cosines(network, loss, batch, 2), rows @ rows.T, atol=1e-4, rtol=1e-4)


def test_weights_that_were_ever_active():
    masks = {"a": torch.tensor([1.0, 0.0, 0.0, 0.0]), "b": torch.ones(4)}
    ever = EverActive(masks)
    assert ever.fraction() == 5 / 8
    masks["a"].copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))  # masks change in place
    ever.update(masks)
    assert ever.fraction() == 6 / 8
    assert EverActive({}).fraction() == 1


def test_target_variance_by_hand():
    assert target_variance(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.0]), torch.tensor([4.0, 9.0])) == 2.25


def test_a_run_logs_them_and_learns_the_same(train):
    looked, plain = train(diagnostics_every=100), train()
    scalars = read_scalars(looked)
    assert scalars["diagnostics/srank"][:, 0].tolist() == [200, 300, 400, 500]
    expected = {f"diagnostics/{name}" for name in ("srank", "stable_rank", "feature_norm", "weight_norm")}
    expected |= {f"diagnostics/{name}" for name in ("ever_active", "target_variance", "gradient_cosine")}
    kinds = ("dormant_0", "dormant_0.025", "dormant_0.1", "unconnected")
    expected |= {f"diagnostics/{layer}/{kind}" for layer in ("torso.dense", "head.dense") for kind in kinds}
    assert {tag for tag in scalars if tag.startswith("diagnostics/")} == expected
    assert not any(tag.startswith("diagnostics/") for tag in read_scalars(plain))
    first, second = (torch.load(folder / "model.pt")["networks"]["q_network"] for folder in (looked, plain))
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


def test_a_resumed_run_remembers_which_weights_were_active(train, stop_at):
    """The fraction of a SET run never falls, and continues where it was."""
    flags = {"method": "set", "sparsity": 0.9, "diagnostics_every": 50, "drop_fraction": 1.0}
    whole = read_scalars(train(**flags))["diagnostics/ever_active"]
    stop_at(300)
    stopped = train(**flags)
    stop_at(None)
    train(resume=str(stopped / "checkpoint.pt"), **flags)
    resumed = read_scalars(stopped)["diagnostics/ever_active"]
    assert 0.1 < whole[0, 1] < whole[-1, 1] < 1 and (np.diff(whole[:, 1]) >= 0).all()
    assert np.array_equal(resumed[:, 0], whole[:, 0]) and (np.diff(resumed[:, 1]) >= 0).all()


def runs_of(script, tmp_path, name, **flags):
    """The scalars and the networks that a run leaves."""
    folder, _ = run_main(script, tmp_path / name, **flags)
    return read_scalars(folder), torch.load(folder / "model.pt")["networks"]


@pytest.mark.parametrize(
    "script", [rainbow_pruned, iqn_pruned, sac_sparse, cql_pruned], ids=lambda script: script.__name__
)
def test_the_other_scripts_log_them_and_learn_the_same(script, tmp_path, train):
    steps = {"total_timesteps": 200, "learning_starts": 100}
    flags = {
        rainbow_pruned: rainbow_pruned.CLASSIC_CONTROL | steps | {"env_id": "CartPole-v1", "noisy": True},
        iqn_pruned: iqn_pruned.CLASSIC_CONTROL | steps | {"env_id": "CartPole-v1", "munchausen": True},
        sac_sparse: sac_sparse.PENDULUM | steps | {"env_id": "Pendulum-v1", "method": "rigl", "num_critics": 2},
        cql_pruned: cql_pruned.CLASSIC_CONTROL | {"dataset": str(tmp_path / "data"), "total_updates": 200},
    }[script]
    if script is cql_pruned:
        train(save_dataset=flags["dataset"])
    looked, networks = runs_of(script, tmp_path, "looked", diagnostics_every=50, **flags)
    plain, same_networks = runs_of(script, tmp_path, "plain", **flags)
    for net, state in networks.items():
        for name, value in state.items():
            assert torch.equal(value, same_networks[net][name]), (net, name)
    assert not any(tag.startswith("diagnostics/") for tag in plain)
    both = ("srank", "gradient_cosine", "ever_active")
    expected = {
        rainbow_pruned: {"srank", "head.dense/unconnected", "gradient_cosine", "target_variance"},
        iqn_pruned: {"srank", "embedding/unconnected", "gradient_cosine", "target_variance"},
        sac_sparse: {f"{net}/{name}" for net in ("actor", "critic") for name in both},
        cql_pruned: {"srank", "head.dense/unconnected", "gradient_cosine", "target_variance"},
    }[script]
    for tag in expected:
        assert looked[f"diagnostics/{tag}"][-1, 0] == 200, tag
