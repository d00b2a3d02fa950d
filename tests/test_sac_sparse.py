"""sac_sparse.py against published counts, closed forms, torch.distributions and a slow literal SAC."""

import copy
import importlib.util
import math
import re
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import run_python
from gymnasium.spaces import Box
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sac_sparse
from sac_sparse import CLEANRL, PENDULUM, Args, RSNorm, make_networks
from utils.envs import INSTALL_DM_CONTROL, make_envs, max_episode_steps, unknown_env
from utils.masks import erk_densities, layer_densities, prunable
from utils.replay import Batch, Replay
from utils.runs import Run

HUMANOID, DOG = (67, 21), (223, 38)  # lengths of observation and action in the DeepMind Control suite


def networks(observations=5, actions=2, seed=0, **flags):
    """Actor and critics."""
    torch.manual_seed(seed)
    args = replace(Args(num_critics=1), **flags)
    made = make_networks(args, Box(-1, 1, (observations,)), Box(-1, 1, (actions,)))
    return made["actor"], made["critic"]


def parameters(network):
    return sum(p.numel() for p in network.parameters())


# Sizes and densities


@pytest.mark.parametrize(
    ("width", "depth", "humanoid", "dog"),
    [
        (1, 1, 4_394_923, 4_507_853),
        (2, 1, 17_440_555, 17_666_381),
        (3, 1, 39_136_939, 39_475_661),
        (4, 1, 69_484_075, 69_935_693),
        (5, 1, 108_481_963, 109_046_477),
        (6, 1, 156_130_603, 156_808_013),
        (1, 4, 17_395_243, 17_508_173),
    ],
)
def test_parameter_counts_of_simba(width, depth, humanoid, dog):
    with torch.device("meta"):
        for lengths, total in ((HUMANOID, humanoid), (DOG, dog)):
            assert sum(map(parameters, networks(*lengths, width=width, depth=depth))) == total


def test_parameter_counts_of_humanoid_apart_and_of_twins():
    actor, critic = networks(*HUMANOID)
    assert (parameters(actor), parameters(critic)) == (146_346, 4_248_577)
    assert parameters(networks(*HUMANOID, num_critics=2)[1]) == 2 * 4_248_577


def leaf_shapes(network):
    """Every parameter's shape, as the authors' code sees it but for the order of the dimensions."""
    return {name.removeprefix("critics.0."): tuple(p.shape) for name, p in network.named_parameters()}


# (network, width, sparsity): input layer, block layers, heads, parameters kept of all; ERK over all leaves
PUBLISHED = {
    ("actor", 1, 0.5): (1.0, 0.442, 1.0, 73_174),
    ("actor", 1, 0.8): (0.359, 0.154, 0.874, 29_277),
    ("actor", 1, 0.9): (0.171, 0.073, 0.416, 14_640),
    ("actor", 1, 0.95): (0.077, 0.033, 0.188, 7_324),
    ("critic", 1, 0.5): (1.0, 0.494, 1.0, 2_124_289),
    ("critic", 1, 0.8): (1.0, 0.190, 1.0, 849_727),
    ("critic", 1, 0.9): (0.511, 0.0936, 1.0, 424_869),
    ("critic", 1, 0.95): (0.250, 0.0458, 1.0, 212_435),
    ("actor", 5, 0.8): (1.0, 0.181, 1.0, 670_602),
    ("actor", 5, 0.9): (0.701, 0.083, 1.0, 335_302),
    ("critic", 5, 0.8): (1.0, 0.198, 1.0, 21_025_793),
    ("critic", 5, 0.9): (1.0, 0.0977, 1.0, 10_512_896),
}


@pytest.mark.parametrize(("net", "width", "sparsity"), PUBLISHED)
def test_erk_over_all_leaves_is_the_authors_and_over_matrices_is_a_little_denser(net, width, sparsity):
    with torch.device("meta"):
        network = dict(zip(("actor", "critic"), networks(*HUMANOID, width=width)))[net]
    first, block, head, total = PUBLISHED[net, width, sparsity]
    shapes = leaf_shapes(network)
    density = erk_densities(shapes, sparsity)
    assert density["encoder.0.weight"] == pytest.approx(first, abs=5e-4)
    assert density["encoder.1.expand.weight"] == pytest.approx(block, abs=5e-4)
    assert density["mean.weight" if net == "actor" else "head.weight"] == pytest.approx(head, abs=5e-4)
    assert all(density[name] == 1 for name, shape in shapes.items() if len(shape) == 1)  # never masked there either
    assert sum(d * math.prod(shapes[name]) for name, d in density.items()) == pytest.approx(total, abs=2)

    ours = erk_densities({name: shape for name, shape in shapes.items() if len(shape) == 2}, sparsity)
    assert all(ours[name] >= density[name] - 1e-9 for name in ours)
    kept = sum(d * math.prod(shapes[name]) for name, d in ours.items())
    size = sum(math.prod(shapes[name]) for name in ours)
    assert kept == pytest.approx((1 - sparsity) * size, abs=len(ours))


def test_erk_over_matrices_at_90_percent():
    for network, density in zip(networks(*HUMANOID), (0.0799, 0.0954)):
        densities = layer_densities(prunable(network), 0.9, "erk")
        (expand,) = {densities[name] for name in densities if name.endswith("encoder.1.expand.weight")}
        assert expand == pytest.approx(density, abs=5e-5)


def test_every_critic_has_the_densities_that_it_would_have_alone():
    alone, twins = (networks(*HUMANOID, num_critics=n)[1] for n in (1, 2))
    alone, twins = (layer_densities(prunable(net), 0.9, "erk") for net in (alone, twins))
    for name, density in alone.items():
        for i in range(2):
            assert twins[name.replace("critics.0", f"critics.{i}")] == pytest.approx(density, rel=1e-6)


def test_initialisation_of_simba():
    actor, critics = networks(*HUMANOID, num_critics=2)
    for critic in critics.critics:
        first, expand = critic.encoder[0].weight, critic.encoder[1].expand.weight
        torch.testing.assert_close(first.T @ first, torch.eye(88), atol=1e-4, rtol=0)
        assert critic.head.weight.norm().item() == pytest.approx(1)
        assert expand.var().item() == pytest.approx(2 / 512, rel=0.01)
        assert expand.abs().max() <= 2 * math.sqrt(2 / 512) / 0.87962566
    assert not torch.equal(*(critic.encoder[1].expand.weight for critic in critics.critics))
    for head in (actor.mean, actor.log_std):
        torch.testing.assert_close(head.weight @ head.weight.T, torch.eye(21), atol=1e-4, rtol=0)
    assert all((p == 0).all() for name, p in critics.named_parameters() if name.endswith("bias"))


# Normalisation and the policy's density


@settings(max_examples=50)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.floats(-1e4, 1e4), st.floats(0.1, 1e3))
def test_rsnorm_against_two_passes(sizes, offset, scale):
    torch.manual_seed(sum(sizes))
    batches = [offset + scale * torch.randn(size, 3) for size in sizes]
    rsnorm = RSNorm(3)
    for batch in batches:
        rsnorm.update(batch)
    # the start counts like 1e-4 observations of mean 0 and variance 1
    data, prior = torch.cat(batches).double().numpy(), 1e-4
    mean = data.sum(0) / (len(data) + prior)
    var = (((data - mean) ** 2).sum(0) + prior * (1 + mean**2)) / (len(data) + prior)
    np.testing.assert_allclose(rsnorm.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(rsnorm.var, var, rtol=1e-9)
    np.testing.assert_allclose(
        rsnorm(batches[0]), (batches[0].numpy() - mean) / np.sqrt(var + 1e-8), rtol=1e-4, atol=1e-5
    )
    assert rsnorm(batches[0]).dtype == torch.float32


@pytest.mark.parametrize(("network", "lowest"), [("simba", -10), ("mlp", -5)])
def test_density_of_actions_against_torch_distributions(network, lowest):
    actor = networks(network=network)[0].double()
    with torch.no_grad():
        actor.log_std.weight.mul_(5)
    observation = torch.randn(200, 5, dtype=torch.float64)
    torch.manual_seed(1)
    action, log_pi = actor(observation)

    features = actor.encoder(observation)
    mean, raw = actor.mean(features), actor.log_std(features)
    std = torch.exp(lowest + (raw.tanh() + 1) / 2 * (2 - lowest))
    normal = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)
    squashed = torch.distributions.TransformedDistribution(normal, [torch.distributions.TanhTransform(cache_size=1)])
    torch.manual_seed(1)
    expected = squashed.rsample()
    torch.testing.assert_close(action, expected)
    torch.testing.assert_close(log_pi, squashed.log_prob(expected))
    torch.testing.assert_close(actor.mode(observation), mean.tanh())
    for got, wanted in ((action, expected), (log_pi, squashed.log_prob(expected))):  # and the same gradient
        gradients = [torch.autograd.grad(y.sum(), actor.mean.weight, retain_graph=True)[0] for y in (got, wanted)]
        torch.testing.assert_close(*gradients)


# Losses against a slow literal version, made of PyTorch's own layers, one network and one sample at a time


class Residual(nn.Module):
    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x):
        return x + self.inner(x)


def literal(module):
    """A copy made of PyTorch's own layers."""
    if isinstance(module, nn.Sequential):
        return nn.Sequential(*map(literal, module))
    if isinstance(module, sac_sparse.ResidualBlock):
        return Residual(*map(literal, (module.norm, module.expand, nn.ReLU(), module.project)))
    return copy.deepcopy(module)


class SlowAgent:
    """Actor, critics and target critics as lists of plain networks."""

    def __init__(self, actor, critics, target_critics):
        self.encoder, self.mean = literal(actor.encoder), literal(actor.mean)
        self.log_std = literal(actor.log_std) if hasattr(actor, "log_std") else None
        self.lowest = getattr(actor, "min_log_std", None)
        self.critics, self.targets = (
            [nn.Sequential(literal(critic.encoder), literal(critic.head)) for critic in ensemble.critics]
            for ensemble in (critics, target_critics)
        )

    def act(self, s, noise):
        features = self.encoder(s)
        if self.log_std is None:
            return torch.clamp(torch.tanh(self.mean(features)) + 0.1 * noise, -1, 1), 0.0
        std = torch.exp(self.lowest + (2 - self.lowest) * (torch.tanh(self.log_std(features)) + 1) / 2)
        x = self.mean(features) + std * noise
        log_pi = 0.0
        for j in range(len(x)):
            gaussian = torch.exp(-((x[j] - self.mean(features)[j]) ** 2) / (2 * std[j] ** 2)) / (
                std[j] * math.sqrt(2 * math.pi)
            )
            log_pi = log_pi + torch.log(gaussian / (1 - torch.tanh(x[j]) ** 2))
        return torch.tanh(x), log_pi

    def q(self, networks, s, a):
        return [network(torch.cat([s, a])) for network in networks]

    def actor_loss(self, observation, noise, alpha):
        total, entropy = 0.0, 0.0
        for s, e in zip(observation, noise):
            a, log_pi = self.act(s, e)
            total = total + (alpha * log_pi - min(self.q(self.critics, s, a)))
            entropy -= float(log_pi.detach()) if torch.is_tensor(log_pi) else log_pi
        return total / len(observation), entropy / len(observation)

    def critic_losses(self, batch, noise, alpha):
        losses = [0.0] * len(self.critics)
        for s, a, r, discount, s2, e in zip(*batch, noise):
            a2, log_pi2 = self.act(s2, e)
            y = r + discount * (min(self.q(self.targets, s2, a2)) - alpha * log_pi2)
            for i, q in enumerate(self.q(self.critics, s, a)):
                losses[i] = losses[i] + (q - y.detach()) ** 2 / len(batch.reward)
        return torch.cat(losses)


@pytest.mark.parametrize("network", ["simba", "mlp"])
@pytest.mark.parametrize("algorithm", ["sac", "ddpg"])
@pytest.mark.parametrize("num_critics", [1, 2])
def test_losses_and_gradients_against_a_slow_literal_version(network, algorithm, num_critics):
    torch.set_default_dtype(torch.float64)
    try:
        flags = {"network": network, "algorithm": algorithm, "num_critics": num_critics}
        actor, critic = networks(**flags)
        target_critic = networks(**flags, seed=1)[1]
        for parameter in (*actor.parameters(), *critic.parameters(), *target_critic.parameters()):
            parameter.data += 0.02 * torch.randn_like(parameter)  # or biases and norms would not matter
        b, alpha = 3, torch.tensor(0.3)
        discount = torch.tensor([0.99, 0.0, 0.99])
        batch = Batch(torch.randn(b, 5), torch.rand(b, 2) * 2 - 1, torch.randn(b), discount, torch.randn(b, 5))
        slow = SlowAgent(actor, critic, target_critic)

        torch.manual_seed(3)
        loss, entropy = sac_sparse.actor_loss(actor, critic, batch.observation, alpha)
        torch.manual_seed(3)
        expected, expected_entropy = slow.actor_loss(batch.observation, torch.randn(b, 2), alpha)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
        assert entropy.item() == pytest.approx(expected_entropy, rel=1e-9)
        loss.backward(inputs=list(actor.parameters()))
        expected.backward()
        torch.testing.assert_close(actor.mean.weight.grad, slow.mean.weight.grad)
        torch.testing.assert_close(actor.encoder[0].weight.grad, slow.encoder[0].weight.grad)
        assert all(parameter.grad is None for parameter in critic.parameters())

        torch.manual_seed(4)
        losses, values = sac_sparse.critic_loss(actor, critic, target_critic, batch, alpha)
        torch.manual_seed(4)
        for slow_critic in slow.critics:
            slow_critic.zero_grad()
        expected = slow.critic_losses(batch, torch.randn(b, 2), alpha)
        torch.testing.assert_close(losses, expected)
        means = [torch.stack([c(torch.cat(sa)) for sa in zip(*batch[:2])]).mean() for c in slow.critics]
        torch.testing.assert_close(values, torch.stack(means).detach())
        losses.sum().backward()
        expected.sum().backward()
        for one, slow_critic in zip(critic.critics, slow.critics):
            torch.testing.assert_close(one.encoder[0].weight.grad, slow_critic[0][0].weight.grad)
            torch.testing.assert_close(one.head.weight.grad, slow_critic[1].weight.grad)
        assert all(parameter.grad is None for parameter in target_critic.parameters())
    finally:
        torch.set_default_dtype(torch.float32)


def test_temperature_rises_below_the_target_entropy_by_the_gradient_of_its_loss():
    for entropy, target in ((-4.0, -3.0), (-1.0, -3.0)):
        log_alpha = torch.tensor(math.log(0.2), requires_grad=True)
        sac_sparse.temperature_loss(log_alpha, torch.tensor(entropy), target).backward()
        assert log_alpha.grad.item() == pytest.approx(0.2 * (entropy - target))


@pytest.mark.parametrize(
    ("steps", "gamma"), [(500, 0.99), (1000, 0.995), (200, 0.975), (50, 0.95), (None, 0.99), (10_000, 0.995)]
)
def test_discount_from_the_length_of_an_episode(steps, gamma):
    assert sac_sparse.discount_for(steps) == pytest.approx(gamma)


# Whole runs


class Line(gym.Env):
    """The observation counts the steps of the episode; it can end by itself."""

    def __init__(self, ends_at=None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gym.spaces.Box(-1.0, 3.0, (1,), np.float32)
        self.ends_at = ends_at

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.array([0.0, 1.0]), {}

    def step(self, action):
        self.t += 1
        return np.array([float(self.t), 1.0]), 1.0, self.t == self.ends_at, False, {}


def register(name, limit=5, **kwargs):
    if name not in gym.registry:
        gym.register(name, lambda: Line(**kwargs), max_episode_steps=limit)
    return name


def small(tmp_path, **flags):
    """Flags of a run that takes a second or two."""
    mlp = CLEANRL if flags.get("network", "mlp") == "mlp" else {}
    base = {"env_id": register("Line-v0"), "network": "mlp", "device": "cpu", "runs_dir": str(tmp_path)}
    base |= {"learning_starts": 20, "total_timesteps": 60, "batch_size": 8, "eval_episodes": 1}
    return replace(Args(), **(mlp | base | flags))


@pytest.fixture
def small_simba(monkeypatch):
    monkeypatch.setitem(sac_sparse.SIZES, "simba", ((16, 1), (32, 2)))


def run_folder(tmp_path):
    (folder,) = tmp_path.iterdir()
    return folder


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("method", ["random", "gmp", "rigl", "set"])
@pytest.mark.parametrize("network", ["simba", "mlp"])
def test_masked_weights_are_zero_after_adamw_and_in_the_target(tmp_path, small_simba, method, network):
    args = small(
        tmp_path, method=method, network=network, sparsity=0.8, num_critics=2, weight_decay=0.1, checkpoint_every=60
    )
    sac_sparse.main(args)
    model = load(run_folder(tmp_path) / "model.pt")
    target = load(run_folder(tmp_path) / "checkpoint.pt")["state"]["target_critic"]
    for net in ("actor", "critic"):
        state, masks = model["networks"][net], model["masks"][net]
        assert list(masks) == [name for name, p in state.items() if p.ndim == 2]
        densities = layer_densities({name: state[name] for name in masks}, 0.8, "erk")
        for name, mask in masks.items():
            assert mask.sum() == max(1, round(densities[name] * mask.numel()))
            assert (state[name][~mask] == 0).all()
            assert (state[name][mask] != 0).float().mean() > 0.9 or method in ("rigl", "set")
            assert net == "actor" or (target[name][~mask] == 0).all()
    if method != "gmp":
        layer = "encoder.2.weight" if network == "mlp" else "encoder.1.expand.weight"
        first, second = (model["masks"]["critic"][f"critics.{i}.{layer}"] for i in range(2))
        assert not torch.equal(first, second)  # each critic has zeros of its own


@pytest.mark.parametrize("sparse", ["actor", "critic"])
def test_either_network_alone_is_really_sparse(tmp_path, sparse):
    dense = {"actor": "critic", "critic": "actor"}[sparse]
    sac_sparse.main(small(tmp_path, sparsity=0.0, **{f"{sparse}_sparsity": 0.7}))
    model = load(run_folder(tmp_path) / "model.pt")

    def zeros(net):
        matrices = [p for p in model["networks"][net].values() if p.ndim == 2]
        return sum((p == 0).sum().item() for p in matrices) / sum(p.numel() for p in matrices)

    assert zeros(sparse) == pytest.approx(0.7, abs=1e-3)
    assert zeros(dense) == 0
    assert model["masks"][dense] == {}


def test_mask_seed_alone_decides_the_masks(tmp_path):
    found = []
    for i, (seed, mask_seed) in enumerate(((1, None), (2, 1), (2, None))):
        sac_sparse.main(small(tmp_path / str(i), seed=seed, mask_seed=mask_seed))
        found.append(load(run_folder(tmp_path / str(i)) / "model.pt")["masks"]["critic"]["critics.0.encoder.2.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("env_id", "kwargs"), [("Ends-v0", {"ends_at": 5, "limit": 50}), ("TimesOut-v0", {"limit": 5})]
)
@pytest.mark.parametrize("num_envs", [1, 3])
def test_termination_ends_a_value_and_a_time_limit_does_not(tmp_path, monkeypatch, env_id, kwargs, num_envs):
    batches, sample = [], Replay.sample
    monkeypatch.setattr(Replay, "sample", lambda *args: batches.append(sample(*args)) or batches[-1])
    flags = {"gamma": 0.9, "num_envs": num_envs, "learning_starts": 30, "batch_size": 64}
    sac_sparse.main(small(tmp_path, env_id=register(env_id, **kwargs), **flags))
    batch = Batch(*(torch.cat(parts) for parts in zip(*batches)))
    now, after = batch.observation[:, 0], batch.next_observation[:, 0]
    torch.testing.assert_close(after, now + 1)  # never the first observation of the next episode
    assert set(now.tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    last = torch.where((now == 4) & (env_id == "Ends-v0"), 0.0, 0.9)
    torch.testing.assert_close(batch.discount, last)


@pytest.mark.parametrize(("replay_ratio", "num_envs"), [(1.0, 1), (2.0, 1), (0.5, 4)])
def test_updates_are_counted_in_environment_steps(tmp_path, replay_ratio, num_envs):
    flags = {"replay_ratio": replay_ratio, "num_envs": num_envs, "total_timesteps": 100, "checkpoint_every": 100}
    sac_sparse.main(small(tmp_path, method="dense", **flags))
    saved = load(run_folder(tmp_path) / "checkpoint.pt")
    assert saved["update"] == int((saved["step"] - 20) * replay_ratio)
    for net in ("actor", "critic", "temperature"):
        steps = {int(state["step"]) for state in saved["state"]["optimizers"][net]["state"].values()}
        assert steps == {saved["update"]}
    assert 100 <= saved["step"] < 100 + num_envs


def test_an_update_against_a_literal_one(tmp_path, monkeypatch):
    """One update of main, its state before and after, against the losses and torch's own optimizers: the actor with the
    old critics, the temperature, the critics with the new actor and temperature, the target with the new critics."""
    states, draws = [], []
    advance, sample = Run.advance, Replay.sample

    def watch(run, step, update):
        advance(run, step, update)
        state = {name: copy.deepcopy(run.state[name]) for name in ("networks", "target_critic", "log_alpha")}
        states.append(state | {"update": update})

    def recorded(replay, batch_size):
        draws.append((sample(replay, batch_size), torch.get_rng_state()))
        return draws[-1][0]

    monkeypatch.setattr(Run, "advance", watch)
    monkeypatch.setattr(Replay, "sample", recorded)
    flags = {"tau": 0.3, "policy_lr": 1e-3, "q_lr": 2e-3, "weight_decay": 0.5, "init_alpha": 0.1, "method": "dense"}
    sac_sparse.main(small(tmp_path, total_timesteps=22, **flags))
    before = next(state for state in reversed(states) if state["update"] == 0)
    after = next(state for state in states if state["update"] == 1)
    batch, rng_state = draws[0]

    torch.set_rng_state(rng_state)
    actor, critic, target = before["networks"]["actor"], before["networks"]["critic"], before["target_critic"]
    log_alpha = before["log_alpha"].detach().requires_grad_()
    optimizers = [torch.optim.AdamW(actor.parameters(), 1e-3, weight_decay=0.5), torch.optim.Adam([log_alpha], 2e-3)]
    optimizers += [torch.optim.AdamW(critic.parameters(), 2e-3, weight_decay=0.5)]
    loss, entropy = sac_sparse.actor_loss(actor, critic, batch.observation, log_alpha.detach().exp())
    loss.backward(inputs=list(actor.parameters()))
    optimizers[0].step()
    (log_alpha.exp() * (entropy + 1)).backward()  # the target entropy of one action dimension is -1
    optimizers[1].step()
    losses, _ = sac_sparse.critic_loss(actor, critic, target, batch, log_alpha.detach().exp())
    losses.sum().backward()
    optimizers[2].step()
    for name, network in {"actor": actor, "critic": critic}.items():
        for ours, expected in zip(after["networks"][name].parameters(), network.parameters()):
            torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(after["log_alpha"], log_alpha.detach().requires_grad_())
    for ours, old, new in zip(after["target_critic"].parameters(), target.parameters(), critic.parameters()):
        torch.testing.assert_close(ours, 0.7 * old + 0.3 * new, atol=1e-6, rtol=1e-5)


def test_the_normaliser_has_seen_where_actions_were_taken(tmp_path, small_simba):
    sac_sparse.main(small(tmp_path, network="simba", rsnorm=True))
    saved = load(run_folder(tmp_path) / "model.pt")["networks"]
    assert set(saved) == {"actor", "critic", "rsnorm"}
    assert saved["rsnorm"]["mean"][0] == pytest.approx(2.0, abs=0.1)  # 0, 1, 2, 3, 4
    assert saved["rsnorm"]["count"] == pytest.approx(60 + 1e-4)  # one observation for each agent step


def test_table_of_sizes_in_the_docs():
    page = (Path(__file__).parent.parent / "docs" / "sac_sparse.md").read_text()
    for line in re.findall(r"^\| x(\d) \|(.*)\|$", page, re.M):
        width, (_, _, *counts) = int(line[0]), [int(cell.replace(",", "")) for cell in line[1].split("|")]
        for lengths, found in ((HUMANOID, counts[:3]), (DOG, counts[3:])):
            assert found == [parameters_kept(lengths, width, sparsity) for sparsity in (0.0, 0.8, 0.9)]


def parameters_kept(lengths, width, sparsity):
    with torch.device("meta"):
        pair = networks(*lengths, width=width)
    total = 0
    for network in pair:
        shapes = leaf_shapes(network)
        matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
        densities = erk_densities(matrices, sparsity)
        total += sum(round(math.prod(shape) * densities.get(name, 1)) for name, shape in shapes.items())
    return total


@pytest.mark.parametrize("package", ["shimmy", "dm_control"])
def test_an_absent_package_is_named_with_the_line_that_installs_it(tmp_path, capsys, monkeypatch, package):
    find_spec = unknown_env.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == package else find_spec(name, *a))
    with pytest.raises(SystemExit) as ended:
        sac_sparse.main(small(tmp_path, env_id="dm_control/cheetah-run-v0"))
    assert ended.value.code == 2 and INSTALL_DM_CONTROL in capsys.readouterr().err


# Real environments

needs_dm_control = pytest.mark.skipif(
    importlib.util.find_spec("dm_control") is None, reason="DeepMind Control is not installed"
)


@needs_dm_control
def test_deepmind_control_as_in_the_paper():
    assert unknown_env("dm_control/cheetah-run-v0") is None
    envs = make_envs("dm_control/cheetah-run-v0", 2, action_repeat=2)
    assert envs.single_observation_space.shape == (17,) and envs.single_action_space.shape == (6,)
    assert envs.single_action_space.low.min() == -1 and envs.single_action_space.high.max() == 1
    first = envs.reset(seed=3)[0]
    assert not np.array_equal(first[0], first[1])
    np.testing.assert_array_equal(envs.reset(seed=3)[0], first)
    for step in range(1, 501):  # 1,000 steps of physics
        _, _, terminated, truncated, infos = envs.step(np.zeros((2, 6), np.float32))
        assert not terminated.any() and truncated.all() == (step == 500)
    assert infos["episode"]["l"].tolist() == [500, 500]
    envs.close()


@needs_dm_control
def test_every_episode_of_deepmind_control_ends():
    """lqr's have no time limit of their own."""
    envs = make_envs("dm_control/lqr-lqr_2_1-v0", 1, action_repeat=2)
    assert max_episode_steps("dm_control/lqr-lqr_2_1-v0") == 1_000
    assert max_episode_steps("dm_control/CmuHumanoidRunWalls-v0") is None  # not of the suite
    envs.reset(seed=1)
    ended = [envs.step(np.zeros((1, 1), np.float32))[2:4] for _ in range(500)]
    assert [bool(terminated[0] or truncated[0]) for terminated, truncated in ended] == [False] * 499 + [True]


@needs_dm_control
def test_deepmind_control_in_a_process_that_has_not_looked_for_it():
    """As `python -m utils.evaluate` makes it."""
    made = run_python("-c", "from utils.envs import make_envs; make_envs('dm_control/cheetah-run-v0', 1)")
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize(
    "env_id", ["HalfCheetah-v5", "Humanoid-v5", pytest.param("dm_control/cheetah-run-v0", marks=needs_dm_control)]
)
def test_real_environments_train(tmp_path, small_simba, env_id):
    flags = {"network": "simba", "sparsity": 0.8, "total_timesteps": 30, "batch_size": 4, "replay_ratio": 1.0}
    returns = sac_sparse.main(small(tmp_path, env_id=env_id, **flags))
    args = load(run_folder(tmp_path) / "model.pt")["args"]
    dm_control = env_id.startswith("dm_control")
    assert len(returns) == 1 and np.isfinite(returns).all()
    assert args["num_critics"] == (2 if env_id == "Humanoid-v5" else 1)
    assert args["gamma"] == pytest.approx(0.99 if dm_control else 0.995)
    assert args["action_repeat"] == (2 if dm_control else 1)


def test_learns_to_move_a_dot_at_80_percent_sparsity(tmp_path):
    """The id names a module, as that of a user's own environment does."""
    flags = PENDULUM | CLEANRL | {"total_timesteps": 1_000, "learning_starts": 200, "batch_size": 64, "sparsity": 0.8}
    returns = sac_sparse.main(Args(**flags, env_id="tests.dot:Dot-v0", device="cpu", runs_dir=str(tmp_path)))
    assert len(returns) == 20 and returns.mean() > -1.5  # a random policy has about -5.2
