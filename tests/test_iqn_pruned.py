"""IQN's parts against slow or closed forms, its network, its policy, and learning."""

import copy
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from conftest import run_main
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import iqn_pruned as iqn
from utils.diagnostics import report
from utils.masks import active_count, layer_densities, prunable
from utils.replay import Batch

ATARI = Box(0, 255, (4, 84, 84), np.uint8)
VECTOR = Box(-1, 1, (4,))


def make_network(space=VECTOR, n_actions=2, **flags):
    torch.manual_seed(0)
    return iqn.make_networks(iqn.Args(**flags), space, Discrete(n_actions))["q_network"]


def small_network(inputs: int, n_actions: int) -> iqn.IQN:
    torso = nn.Sequential(nn.Linear(inputs, 32), nn.ReLU())
    torso.features = 32
    return iqn.IQN(torso, hidden=64, n_actions=n_actions, n_cosines=64, bias=True)


def loss_slowly(quantiles, tau, targets, kappa) -> float:
    """Dabney et al. (2018), eq. 3 and the loss above it, for one transition."""
    total = 0.0
    for estimate, fraction in zip(quantiles, tau):
        for target in targets:
            error = target - estimate
            huber = error**2 / 2 if abs(error) <= kappa else kappa * (abs(error) - kappa / 2)
            total += abs(fraction - (1 if error < 0 else 0)) * huber / kappa
    return total / len(targets)


# ---- Loss ------------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.floats(0.01, 10), st.integers(0, 2**31))
def test_quantile_huber_loss_is_that_of_a_triple_loop(size, n, n_targets, kappa, seed):
    rng = np.random.default_rng(seed)
    quantiles, tau, targets = rng.normal(0, 3, (size, n)), rng.random((size, n)), rng.normal(0, 3, (size, n_targets))
    losses = iqn.quantile_huber_loss(*map(torch.from_numpy, (quantiles, tau, targets)), kappa)
    expected = [loss_slowly(*one, kappa) for one in zip(quantiles, tau, targets)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def midpoints(rows: int, n: int, device=None) -> torch.Tensor:
    """Instead of torch.rand: the same fractions in every row and at every call."""
    return ((torch.arange(n) + 0.5) / n).repeat(rows, 1)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("munchausen", [False, True])
def test_loss_is_that_of_the_papers_equations(munchausen, double, monkeypatch):
    """For each transition, each quantile and each action in a loop, and in float64."""
    torch.manual_seed(0)
    n_actions, size, temperature, alpha, clip = 3, 24, 0.1, 0.9, 0.4
    flags = {"munchausen_temperature": temperature, "munchausen_alpha": alpha, "munchausen_clip": clip}
    args = iqn.Args(n_quantiles=5, n_target_quantiles=7, n_policy_quantiles=3, munchausen=munchausen, double=double,
                    kappa=0.7, **flags)  # fmt: skip
    networks = [small_network(4, n_actions) for _ in range(2)]
    with torch.no_grad():
        for network in networks:
            network.head.out.weight.mul_(20)  # so that actions and networks differ
    discount = torch.tensor([0.0, 0.99, 0.9, 0.8]).repeat(6)
    observation, next_observation = torch.randn(2, size, 4)
    batch = Batch(observation, torch.randint(n_actions, (size,)), torch.randn(size), discount, next_observation)
    monkeypatch.setattr(torch, "rand", midpoints)
    loss, q_mean = iqn.td_loss(*networks, batch, args)

    def quantiles(network, x, n):  # (n, A)
        return network(x[None], midpoints(1, n))[0].detach().double().numpy()

    def policy(q):
        weight = [math.exp((value - max(q)) / temperature) for value in q]
        return [value / sum(weight) for value in weight]

    online, target = networks
    selection = online if double else target
    losses, q, clipped, differs = [], [], 0, 0
    for i in range(size):
        following, reward = batch.next_observation[i], batch.reward[i].item()
        next_q = quantiles(selection, following, 3).mean(0)
        next_z = quantiles(target, following, 7)
        differs += quantiles(online, following, 3).mean(0).argmax() != quantiles(target, following, 3).mean(0).argmax()
        bootstrap = []
        for z in next_z:
            if munchausen:
                pi = policy(next_q)
                bootstrap.append(sum(pi[a] * (z[a] - temperature * math.log(pi[a])) for a in range(n_actions)))
            else:
                bootstrap.append(z[next_q.argmax()])
        if munchausen:
            pi = policy(quantiles(selection, batch.observation[i], 3).mean(0))
            log_pi = temperature * math.log(pi[batch.action[i]])
            clipped += log_pi < -clip
            reward += alpha * min(max(log_pi, -clip), 0)
        z = quantiles(online, batch.observation[i], 5)[:, batch.action[i]]
        targets = [reward + discount[i].item() * value for value in bootstrap]
        losses.append(loss_slowly(z, [0.1, 0.3, 0.5, 0.7, 0.9], targets, 0.7))
        q.append(z.mean())
    assert 0 < differs < size and (0 < clipped < size or not munchausen)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-4)
    assert q_mean.item() == pytest.approx(np.mean(q), rel=1e-4)


def test_the_quantile_functions_of_known_distributions_are_recovered():
    """Of two actions that end the episode: one with a reward of -1 or 2, one with a Gaussian reward. A batch holds
    both distributions whole, each as 50 equally likely rewards."""
    torch.manual_seed(0)
    p, gaussian = 0.3, NormalDist(1.0, 0.5)
    network, steps = small_network(1, 2), 1_000
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    args = iqn.Args(n_quantiles=16, n_target_quantiles=1, n_policy_quantiles=1, kappa=0.02)
    grid = [(i + 0.5) / 50 for i in range(50)]
    reward = torch.tensor([-1.0 if u < p else 2.0 for u in grid] + [gaussian.inv_cdf(u) for u in grid])
    zeros, action = torch.zeros(100, 1), torch.arange(2).repeat_interleave(50)
    batch = Batch(zeros, action, reward, torch.zeros(100), zeros)
    for _ in range(steps):
        optimizer.zero_grad()
        iqn.td_loss(network, network, batch, args)[0].backward()
        optimizer.step()
        schedule.step()

    fractions = [0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95]
    found = network(zeros[:1], torch.tensor([fractions]))[0].tolist()
    for fraction, (first, second) in zip(fractions, found):
        assert abs(fraction - p) < 0.06 or first == pytest.approx(-1 if fraction < p else 2, abs=0.2)
        assert second == pytest.approx(gaussian.inv_cdf(fraction), abs=0.15)
    q = iqn.q_values(network, zeros[:1], 20_000)[0].tolist()
    assert q == pytest.approx([p * -1 + (1 - p) * 2, 1.0], abs=0.1)


# ---- Fractions -------------------------------------------------------------------------------------------------------


def test_fractions_are_uniform_and_new_for_each_observation_and_call():
    network = small_network(4, 2)
    (_, first), (_, second) = (iqn.draw_quantiles(network, torch.zeros(50, 4), 200) for _ in range(2))
    assert len(torch.cat([first, second]).unique()) > 19_900  # float32 has 2^24 values in [0, 1)
    counts, _ = np.histogram(first.numpy(), bins=10, range=(0, 1))
    assert ((counts - 1_000) ** 2 / 1_000).sum() < 45  # chi-square with 9 degrees of freedom: p = 1e-6


def test_a_fraction_is_embedded_by_its_cosines():
    """Dabney et al. (2018), eq. 4, with i from 1 as in Dopamine."""
    torch.manual_seed(0)
    network = small_network(4, 3)
    obs, tau = torch.randn(2, 4), torch.rand(2, 5)
    found = network(obs, tau)
    for b in range(2):
        features = network.torso(obs[b])
        for n in range(5):
            cosines = torch.tensor([math.cos(math.pi * i * tau[b, n].item()) for i in range(1, 65)])
            phi = (network.embedding.weight @ cosines + network.embedding.bias).clamp(min=0)
            expected = network.head.out((network.head.dense(features * phi)).clamp(min=0))
            torch.testing.assert_close(found[b, n], expected, rtol=1e-3, atol=1e-4)


def test_the_policy_draws_from_the_generators_of_its_episodes_alone():
    network = make_network(**iqn.CLASSIC_CONTROL)
    policy = iqn.make_policy(iqn.Args(n_policy_quantiles=1, eval_epsilon=0.0), {"q_network": network})
    obs = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    obs[:] = obs[0]  # what differs between the rows is their random numbers
    before = torch.get_rng_state()
    actions = [policy(obs, [np.random.default_rng(seed + i) for i in range(50)]).tolist() for seed in (0, 0, 1)]
    assert actions[0] == actions[1] and actions[2][:-1] == actions[0][1:]
    assert torch.equal(before, torch.get_rng_state())


def test_the_policy_takes_random_actions_with_eval_epsilon():
    network = make_network(n_actions=5)
    policy = iqn.make_policy(iqn.Args(eval_epsilon=1.0), {"q_network": network})
    actions = policy(np.zeros((500, 4), np.float32), [np.random.default_rng(i) for i in range(500)])
    assert (np.bincount(actions, minlength=5) > 60).all()


# ---- Network ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "weights"), [(1, 2_089_024), (2, 4_362_368), (3, 6_829_248), (5, 12_343_616)])
def test_weights_of_the_impala_network(width, weights):
    """The published network with 18 actions, and the embedding of the fractions besides."""
    layers = prunable(make_network(ATARI, 18, width=width))
    assert layers["embedding.weight"].shape == (3872 * width, 64)
    assert sum(weight.numel() for weight in layers.values()) == weights + 3872 * width * 64


def test_layers_of_the_nature_network():
    network = make_network(ATARI, 18, network="nature")
    assert {name: tuple(weight.shape) for name, weight in prunable(network).items()} == {
        "torso.conv1.weight": (32, 4, 8, 8),
        "torso.conv2.weight": (64, 32, 4, 4),
        "torso.conv3.weight": (64, 64, 3, 3),
        "embedding.weight": (7744, 64),
        "head.dense.weight": (512, 7744),
        "head.out.weight": (18, 512),
    }
    assert network(torch.zeros(2, *ATARI.shape, dtype=torch.uint8), torch.rand(2, 7)).shape == (2, 7, 18)
    bare = make_network(ATARI, 18, network="nature", bias=False)
    assert set(dict(bare.named_parameters())) == set(prunable(bare)) == set(prunable(network))


@pytest.mark.parametrize("network", ["nature", "impala"])
def test_layers_begin_as_in_dopamine(network):
    """Variance scaling by 1/sqrt(3), fan-in, uniform: a variance of 1 / (sqrt(3) fan-in)."""
    net = make_network(ATARI, 18, network=network)
    layers = {net.embedding: 64, net.head.dense: net.torso.features, net.head.out: 512}
    layers |= {net.torso.conv2: 32 * 4 * 4, net.torso.conv3: 64 * 3 * 3} if network == "nature" else {}
    for layer, fan_in in layers.items():
        assert layer.weight.var().item() == pytest.approx(1 / (math.sqrt(3) * fan_in), rel=0.05)
        assert not layer.bias.any()


def test_diagnostics_see_every_unit():
    """A layer's units, and not its fractions, are what can be dormant."""
    network = make_network()
    with torch.no_grad():
        for layer in (network.embedding, network.head.dense):
            layer.weight[:128], layer.bias[:128] = 0, -1.0
    scalars = report(network, torch.randn(20, 4), masks={})
    for layer in ("embedding", "head.dense"):
        assert scalars[f"diagnostics/{layer}/dormant_0"] == pytest.approx(0.25, abs=0.02)


# ---- Learning --------------------------------------------------------------------------------------------------------


def test_cartpole_is_learned_at_90_percent_sparsity(tmp_path):
    """With a threshold that holds for any seed; and what is pruned is exactly zero."""
    args = iqn.CLASSIC_CONTROL | {"env_id": "CartPole-v1", "sparsity": 0.9, "total_timesteps": 8_000}
    folder, returns = run_main(iqn, tmp_path, **args)
    assert len(returns) == 20 and returns.mean() > 60  # a random policy has 22
    model = torch.load(folder / "model.pt", weights_only=True)
    network, masks = model["networks"]["q_network"], model["masks"]["q_network"]
    weights = {name: network[name] for name in masks}
    assert set(weights) == {"torso.dense.weight", "embedding.weight", "head.dense.weight", "head.out.weight"}
    densities = layer_densities(weights, 0.9, "erk")
    for name, mask in masks.items():
        assert int(mask.sum()) == active_count(mask.numel(), densities[name])
        assert not weights[name][~mask].any()


def test_the_target_network_gets_no_gradient():
    online = small_network(4, 2)
    target = copy.deepcopy(online)
    batch = Batch(torch.randn(8, 4), torch.zeros(8).long(), torch.zeros(8), torch.ones(8), torch.randn(8, 4))
    iqn.td_loss(online, target, batch, iqn.Args(munchausen=True))[0].backward()
    assert all(weight.grad is None for weight in target.parameters())
    assert all(weight.grad.abs().sum() > 0 for name, weight in online.named_parameters() if name != "head.out.bias")
