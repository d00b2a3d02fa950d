"""sac_sparse.py against published counts, closed forms, torch.distributions and a slow literal SAC."""

import importlib.util
import inspect
import math
import re
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dqn_sparse
import sac_sparse
from sac_sparse import CLEANRL, PENDULUM, Args, RSNorm, make_networks
from utils import checkpoints
from utils.envs import INSTALL_DM_CONTROL, make_envs, unknown_env
from utils.masks import erk_densities, prunable, random_mask
from utils.replay import Batch

HUMANOID, DOG = (67, 21), (223, 38)  # lengths of observation and action in the DeepMind Control suite


def networks(observations=5, actions=2, **flags):
    torch.manual_seed(0)
    return make_networks(replace(Args(num_critics=1), **flags), observations, actions)


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
    """Every parameter as the authors' code sees it: kernels (inputs, outputs), biases and norms (units,)."""
    return {name: tuple(p.shape[1:]) if p.ndim == 3 else tuple(p.shape) for name, p in network.named_parameters()}


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
        shapes = {name: tuple(w.shape[1:]) for name, w in prunable(network).items()}
        assert erk_densities(shapes, 0.9)["encoder.1.expand.weight"] == pytest.approx(density, abs=5e-5)


def test_initialisation():
    _, critic = networks(*HUMANOID, num_critics=2)
    first, expand, head = critic.encoder[0].weight, critic.encoder[1].expand.weight, critic.head.weight
    for i in range(2):
        torch.testing.assert_close(first[i] @ first[i].T, torch.eye(88), atol=1e-4, rtol=0)
        assert head[i].norm().item() == pytest.approx(1)
    assert expand.var().item() == pytest.approx(2 / 512, rel=0.01)
    assert expand.abs().max() <= 2 * math.sqrt(2 / 512) / 0.87962566
    assert not torch.equal(expand[0], expand[1])
    assert all((p == 0).all() for name, p in critic.named_parameters() if name.endswith("bias"))


# Normalisation and the policy's density


@settings(max_examples=50, deadline=None)
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

    features = actor.encoder(observation[None])
    mean, raw = actor.mean(features)[0], actor.log_std(features)[0]
    std = torch.exp(lowest + (raw.tanh() + 1) / 2 * (2 - lowest))
    normal = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)
    squashed = torch.distributions.TransformedDistribution(normal, [torch.distributions.TanhTransform(cache_size=1)])
    torch.manual_seed(1)
    expected = squashed.rsample()
    torch.testing.assert_close(action, expected)
    torch.testing.assert_close(log_pi, squashed.log_prob(expected))
    torch.testing.assert_close(actor.greedy(observation), mean.tanh())
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


def literal(module, i, n):
    """The i-th of `n` networks that lie side by side."""
    if isinstance(module, nn.Sequential):
        return nn.Sequential(*(literal(inner, i, n) for inner in module))
    if isinstance(module, sac_sparse.ResidualBlock):
        return Residual(
            *(literal(m, i, n) for m in (module.norm, module.expand)), nn.ReLU(), literal(module.project, i, n)
        )
    if isinstance(module, nn.ReLU):
        return nn.ReLU()
    if isinstance(module, sac_sparse.LayerNorm):
        layer, weight = nn.LayerNorm(module.weight.numel() // n, eps=1e-6), module.weight.view(n, -1)[i]
    else:
        layer, weight = nn.Linear(*module.weight.shape[1:]), module.weight[i].T
    layer.weight.data, layer.bias.data = weight.detach().clone(), module.bias.view(n, -1)[i].detach().clone()
    return layer


class SlowAgent:
    """Actor, critics and target critics as lists of plain networks."""

    def __init__(self, actor, critic, target_critic):
        self.encoder, self.mean = literal(actor.encoder, 0, 1), literal(actor.mean, 0, 1)
        self.log_std = literal(actor.log_std, 0, 1) if hasattr(actor, "log_std") else None
        self.lowest = getattr(actor, "min_log_std", None)
        self.critics, self.targets = (
            [nn.Sequential(literal(c.encoder, i, c.n), literal(c.head, i, c.n)) for i in range(c.n)]
            for c in (critic, target_critic)
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
        target_critic = make_networks(replace(Args(), **flags), 5, 2)[1]  # another draw
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
        torch.testing.assert_close(actor.mean.weight.grad[0].T, slow.mean.weight.grad)
        torch.testing.assert_close(actor.encoder[0].weight.grad[0].T, slow.encoder[0].weight.grad)
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
        for i, slow_critic in enumerate(slow.critics):
            torch.testing.assert_close(critic.encoder[0].weight.grad[i].T, slow_critic[0][0].weight.grad)
            torch.testing.assert_close(critic.head.weight.grad[i].T, slow_critic[1].weight.grad)
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
    """The observation counts the steps of the episode; it can end by itself, or send something that is not finite."""

    def __init__(self, ends_at=None, poison_at=None, poison="observation", low=-1.0):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gym.spaces.Box(low, 3.0, (1,), np.float32)
        self.ends_at, self.poison_at, self.poison, self.total = ends_at, poison_at, poison, 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.array([0.0, 1.0]), {}

    def step(self, action):
        self.t, self.total = self.t + 1, self.total + 1
        observation, reward = np.array([float(self.t), 1.0]), 1.0
        if self.total == self.poison_at:
            observation, reward = (
                (observation * np.nan, reward) if self.poison == "observation" else (observation, np.inf)
            )
        return observation, reward, self.t == self.ends_at, False, {}


def register(name, limit=5, **kwargs):
    if name not in gym.registry:
        gym.register(name, lambda: Line(**kwargs), max_episode_steps=limit)
    return name


def small(tmp_path, **flags):
    """Flags of a run that takes a second or two."""
    mlp = CLEANRL if flags.get("network", "mlp") == "mlp" else {}
    base = {"env_id": register("Line-v0"), "network": "mlp", "cuda": False, "runs_dir": str(tmp_path)}
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
    target = load(run_folder(tmp_path) / "checkpoint.pt")["networks"]["target_critic"]
    for net in ("actor", "critic"):
        state, masks = model["networks"][net], model["masks"][net]
        shapes = {name: tuple(mask.shape[1:]) for name, mask in masks.items()}
        assert list(shapes) == [name for name, p in state.items() if p.ndim == 3]
        for name, density in erk_densities(shapes, 0.8).items():
            for i, mask in enumerate(masks[name]):  # exact in every critic's matrix
                assert mask.sum() == max(1, round(density * mask.numel()))
                assert (state[name][i][~mask] == 0).all()
                assert (state[name][i][mask] != 0).float().mean() > 0.9 or method in ("rigl", "set")
                assert net == "actor" or (target[name][i][~mask] == 0).all()
    if method != "gmp":
        mask = model["masks"]["critic"]["encoder.2.weight" if network == "mlp" else "encoder.1.expand.weight"]
        assert not torch.equal(mask[0], mask[1])  # each critic has zeros of its own


def state_after(script, method, weight, grad, mask):
    """Weight, mask and Adam's moments after one AdamW step and one change of the mask to 10 (gmp: 7) weights."""
    weight = nn.Parameter(weight.clone())
    optimizer, mask = torch.optim.AdamW([weight], lr=0.1), mask.clone()
    weight.grad = grad.clone()
    optimizer.step()
    weight.data.mul_(mask)
    if method == "gmp":
        script.prune({"w": weight}, {"w": mask}, {"w": 7})
    else:
        script.rewire({"w": weight}, {"w": mask}, {"w": 10}, optimizer, 0.5, method)
    return weight.data, mask, optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]


@pytest.mark.parametrize("method", ["gmp", "rigl"])
def test_masks_of_a_critic_change_as_if_it_were_alone(method):
    torch.manual_seed(0)
    weight, grad = torch.randn(2, 6, 5), torch.randn(2, 6, 5) * torch.tensor([1.0, 100.0])[:, None, None]
    mask = torch.stack([random_mask((6, 5), 10, torch.Generator().manual_seed(i)) for i in range(2)])
    together = state_after(sac_sparse, method, weight * mask, grad, mask)
    for i in range(2):
        alone = state_after(dqn_sparse, method, (weight * mask)[i], grad[i], mask[i])
        assert all(torch.equal(a[i], b) for a, b in zip(together, alone))
    assert not torch.equal(together[1], mask)


@pytest.mark.parametrize("name", ["cubic_sparsity", "cosine_drop_fraction", "prune", "rewire", "mask_update_due"])
def test_the_method_is_the_same_text_as_in_dqn_sparse(name):
    ours, theirs = (inspect.getsource(getattr(script, name)) for script in (sac_sparse, dqn_sparse))
    assert ours.replace("largest_each(", "keep_largest(") == theirs


@pytest.mark.parametrize("sparse", ["actor", "critic"])
def test_either_network_alone_is_really_sparse(tmp_path, sparse):
    dense = {"actor": "critic", "critic": "actor"}[sparse]
    sac_sparse.main(small(tmp_path, sparsity=0.0, **{f"{sparse}_sparsity": 0.7}))
    model = load(run_folder(tmp_path) / "model.pt")

    def zeros(net):
        matrices = [p for p in model["networks"][net].values() if p.ndim == 3]
        return sum((p == 0).sum().item() for p in matrices) / sum(p.numel() for p in matrices)

    assert zeros(sparse) == pytest.approx(0.7, abs=1e-3)
    assert zeros(dense) == 0
    assert model["masks"][dense] == {}


def test_mask_seed_alone_decides_the_masks(tmp_path):
    found = []
    for i, (seed, mask_seed) in enumerate(((1, None), (2, 1), (2, None))):
        sac_sparse.main(small(tmp_path / str(i), seed=seed, mask_seed=mask_seed))
        found.append(load(run_folder(tmp_path / str(i)) / "model.pt")["masks"]["critic"]["encoder.2.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("env_id", "kwargs"), [("Ends-v0", {"ends_at": 5, "limit": 50}), ("TimesOut-v0", {"limit": 5})]
)
@pytest.mark.parametrize("num_envs", [1, 3])
def test_termination_ends_a_value_and_a_time_limit_does_not(tmp_path, monkeypatch, env_id, kwargs, num_envs):
    batches, critic_loss = [], sac_sparse.critic_loss
    monkeypatch.setattr(sac_sparse, "critic_loss", lambda *a: batches.append(a[3]) or critic_loss(*a))
    flags = {"gamma": 0.9, "num_envs": num_envs, "learning_starts": 30, "batch_size": 64}
    sac_sparse.main(small(tmp_path, env_id=register(env_id, **kwargs), **flags))
    batch = Batch(*(torch.cat(parts) for parts in zip(*batches)))
    now, after = batch.observation[:, 0], batch.next_observation[:, 0]
    torch.testing.assert_close(after, now + 1)  # never the first observation of the next episode
    assert set(now.tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    last = torch.where((now == 4) & (env_id == "Ends-v0"), 0.0, 0.9)
    torch.testing.assert_close(batch.discount, last)


@pytest.mark.parametrize(("utd", "num_envs"), [(1.0, 1), (2.0, 1), (0.5, 4)])
def test_updates_are_counted_in_environment_steps(tmp_path, monkeypatch, utd, num_envs):
    calls, actor_loss = [], sac_sparse.actor_loss
    monkeypatch.setattr(sac_sparse, "actor_loss", lambda *a: calls.append(1) or actor_loss(*a))
    sac_sparse.main(small(tmp_path, utd=utd, num_envs=num_envs, total_timesteps=100, checkpoint_every=100))
    saved = load(run_folder(tmp_path) / "checkpoint.pt")
    assert saved["update"] == len(calls) == int((saved["global_step"] - 20) * utd)
    assert 100 <= saved["global_step"] < 100 + num_envs


def test_order_of_an_update_and_polyak(tmp_path, monkeypatch):
    """Actor with the old critic, temperature, critic with the new actor and temperature, target with the new critic."""
    seen = []

    def snapshot(network):
        return torch.cat([p.detach().flatten().clone() for p in network.parameters()])

    actor_loss, critic_loss = sac_sparse.actor_loss, sac_sparse.critic_loss

    def on_actor(actor, critic, observation, alpha):
        seen.append(("actor", snapshot(actor), snapshot(critic), None, alpha.item()))
        return actor_loss(actor, critic, observation, alpha)

    def on_critic(actor, critic, target_critic, batch, alpha):
        seen.append(("critic", snapshot(actor), snapshot(critic), snapshot(target_critic), alpha.item()))
        return critic_loss(actor, critic, target_critic, batch, alpha)

    monkeypatch.setattr(sac_sparse, "actor_loss", on_actor)
    monkeypatch.setattr(sac_sparse, "critic_loss", on_critic)
    sac_sparse.main(small(tmp_path, tau=0.3, policy_lr=1e-3, q_lr=2e-3, weight_decay=0.5, init_alpha=0.1))
    assert [kind for kind, *_ in seen] == ["actor", "critic"] * 40
    first, second = (math.log(alpha) for *_, alpha in seen[:2])
    assert abs(second - first) == pytest.approx(2e-3, rel=1e-3)  # Adam's first step is its rate, and nothing decays
    for k in range(0, len(seen) - 2, 2):
        (_, actor0, critic0, _, alpha0), (_, actor1, critic1, target1, alpha1) = seen[k : k + 2]
        (_, actor2, critic2, _, alpha2), (_, _, _, target2, _) = seen[k + 2 : k + 4]
        assert not torch.equal(actor0, actor1) and alpha0 != alpha1
        assert torch.equal(critic0, critic1) and not torch.equal(critic1, critic2)
        assert torch.equal(actor1, actor2) and alpha1 == alpha2
        torch.testing.assert_close(target2, 0.7 * target1 + 0.3 * critic2, atol=1e-6, rtol=1e-5)


def test_same_seed_same_weights(tmp_path):
    states = []
    for i in range(2):
        sac_sparse.main(small(tmp_path / str(i), seed=7))
        states.append(load(run_folder(tmp_path / str(i)) / "model.pt")["networks"])
    for net, state in states[0].items():
        assert all(torch.equal(value, states[1][net][name]) for name, value in state.items())


@pytest.mark.parametrize("method", ["random", "gmp", "rigl"])
def test_resume_goes_on_exactly_where_the_checkpoint_was(tmp_path, monkeypatch, small_simba, method):
    first = small(tmp_path, method=method, network="simba", checkpoint_every=50, utd=1.0, seed=3)
    sac_sparse.main(first)
    path = run_folder(tmp_path) / "checkpoint.pt"
    saved = load(path)
    assert saved["global_step"] == 50 and saved["update"] == 30

    seen = {}
    actor_loss, save = sac_sparse.actor_loss, checkpoints.save_atomically

    def on_first_update(actor, critic, observation, alpha):
        if not seen:
            seen.update(actor=actor.state_dict(), critic=critic.state_dict(), alpha=alpha.item())
            seen.update({k: {n: v.clone() for n, v in seen[k].items()} for k in ("actor", "critic")})
        return actor_loss(actor, critic, observation, alpha)

    monkeypatch.setattr(sac_sparse, "actor_loss", on_first_update)
    monkeypatch.setattr(
        checkpoints, "save_atomically", lambda content, p: seen.setdefault(p.name, content) or save(content, p)
    )
    sac_sparse.main(replace(Args(**saved["args"]), resume=str(path), total_timesteps=60, checkpoint_every=60))

    for net in ("actor", "critic"):
        assert all(torch.equal(value, seen[net][name]) for name, value in saved["networks"][net].items())
    assert seen["alpha"] == pytest.approx(saved["log_alpha"].exp().item())
    end = seen["checkpoint.pt"]
    assert (end["global_step"], end["update"]) == (60, 40)
    assert end["networks"]["rsnorm"]["count"] == pytest.approx(60 + 1e-4)  # one observation for each agent step
    assert saved["replay"]["added"] == 50 + 9 and end["replay"]["added"] == 60 + 11  # steps and resets
    for net, parameters in (("actor", 14 + 1), ("critic", 18)):  # and the temperature
        steps = [state["step"].item() for state in end["optimizers"][net]["state"].values()]
        assert len(steps) == parameters and len(set(steps)) == 1
        assert steps[0] == 40 if method != "rigl" else steps[0] < 40  # rewirings stand in for weight updates
    if method == "random":
        for net, masks in saved["masks"].items():
            assert all(torch.equal(mask, end["masks"][net][name]) for name, mask in masks.items())


def test_networks_that_have_diverged_leave_the_last_checkpoint_alone(tmp_path, capsys):
    args = small(tmp_path, checkpoint_every=20, policy_lr=1e30, q_lr=1e30, total_timesteps=60)
    ends_with_one_line(capsys, args, "--policy-lr, --q-lr: the networks have diverged: an action at step")
    saved = load(run_folder(tmp_path) / "checkpoint.pt")
    assert all(weight.isfinite().all() for weight in saved["networks"]["actor"].values())


@pytest.mark.parametrize(
    "method, other, said",
    [
        ("set", {"method": "random"}, "--method random (it has set)"),
        ("set", {"critic_sparsity": 0.6}, "--critic-sparsity 0.6 (it has None)"),
        ("set", {"width": 2}, "--width 2 (it has 1)"),
        ("gmp", {"actor_sparsity": 0.0}, "--actor-sparsity 0.0 (it has None)"),  # its zeros would come alive
    ],
)
def test_resume_with_other_masks(tmp_path, capsys, method, other, said):
    sac_sparse.main(small(tmp_path, method=method, sparsity=0.5, checkpoint_every=60))
    saved = Args(**load(run_folder(tmp_path) / "checkpoint.pt")["args"])
    saved.resume = str(run_folder(tmp_path) / "checkpoint.pt")
    ends_with_one_line(capsys, replace(saved, **other), f"--resume: {saved.resume} does not fit {said}")


def test_evaluation_is_without_noise_and_uses_the_normaliser(tmp_path, monkeypatch, small_simba):
    policies = []
    evaluate = sac_sparse.evaluate
    monkeypatch.setattr(
        sac_sparse, "evaluate", lambda envs, policy, *a: policies.append(policy) or evaluate(envs, policy, *a)
    )
    sac_sparse.main(small(tmp_path, network="simba", eval_episodes=3))
    saved = load(run_folder(tmp_path) / "model.pt")["networks"]
    assert set(saved) == {"actor", "critic", "rsnorm"}
    assert saved["rsnorm"]["mean"][0] == pytest.approx(2.0, abs=0.1)  # 0, 1, 2, 3, 4: where actions are taken

    actor = make_networks(replace(Args(num_critics=2)), 2, 1)[0]
    actor.load_state_dict(saved["actor"])
    observation = np.array([[3.0, 1.0]])
    mean, var = saved["rsnorm"]["mean"].numpy(), saved["rsnorm"]["var"].numpy()
    normal = torch.tensor((observation - mean) / np.sqrt(var + 1e-8), dtype=torch.float32)
    expected = torch.tanh(actor.mean(actor.encoder(normal[None]))[0])
    np.testing.assert_allclose(policies[0](observation), expected.detach(), rtol=1e-5)


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


# Bad input


def ends_with_one_line(capsys, args, *words):
    with pytest.raises(SystemExit) as stopped:
        sac_sparse.main(args)
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"sparsity": 1.0}, ["--sparsity", "1.0"]),
        ({"actor_sparsity": -0.1}, ["--actor-sparsity", "-0.1"]),
        ({"critic_sparsity": 1.5}, ["--critic-sparsity", "1.5"]),
        ({"width": 0}, ["--width", "0"]),
        ({"depth": 0}, ["--depth", "0"]),
        ({"num_critics": 0}, ["--num-critics", "0"]),
        ({"gamma": 1.1}, ["--gamma", "1.1"]),
        ({"utd": 0.0}, ["--utd", "0.0"]),
        ({"total_timesteps": 25}, ["--total-timesteps", "25", "30"]),
        ({"env_id": "CartPole-v1"}, ["--env-id", "CartPole-v1", "Discrete"]),
        ({"env_id": "Pendlum-v1"}, ["--env-id", "Pendulum-v1"]),
        ({"resume": "nowhere.pt"}, ["--resume", "nowhere.pt"]),
    ],
)
def test_bad_flags(tmp_path, capsys, flags, words):
    ends_with_one_line(capsys, small(tmp_path, **flags), *words)
    assert not any(tmp_path.iterdir())


def test_unbounded_actions(tmp_path, capsys):
    args = small(tmp_path, env_id=register("Unbounded-v0", low=-np.inf))
    ends_with_one_line(capsys, args, "--env-id", "Unbounded-v0", "bounded")


@pytest.mark.parametrize("poison", ["observation", "reward"])
def test_what_is_not_finite_stops_the_run_and_keeps_a_checkpoint(tmp_path, capsys, poison):
    env_id = register(f"Poison-{poison}-v0", poison_at=43, poison=poison)
    ends_with_one_line(capsys, small(tmp_path, env_id=env_id), "--env-id", "step 43", "checkpoint.pt")
    saved = load(run_folder(tmp_path) / "checkpoint.pt")
    assert saved["global_step"] == 42
    assert torch.isfinite(saved["replay"]["frames"][: saved["replay"]["added"] + 1]).all()
    assert all(torch.isfinite(p).all() for network in saved["networks"].values() for p in network.values())


@pytest.mark.parametrize("package", ["shimmy", "dm_control"])
def test_an_absent_package_is_named_with_the_line_that_installs_it(tmp_path, capsys, monkeypatch, package):
    find_spec = unknown_env.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == package else find_spec(name, *a))
    args = small(tmp_path, env_id="dm_control/cheetah-run-v0")
    ends_with_one_line(capsys, args, f"needs DeepMind Control; {INSTALL_DM_CONTROL}")


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
def test_deepmind_control_in_a_process_that_has_not_looked_for_it():
    """As `python -m utils.evaluate` makes it."""
    made = run_script("-c", "from utils.envs import make_envs; make_envs('dm_control/cheetah-run-v0', 1)")
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize(
    "env_id", ["HalfCheetah-v5", "Humanoid-v5", pytest.param("dm_control/cheetah-run-v0", marks=needs_dm_control)]
)
def test_real_environments_train(tmp_path, small_simba, env_id):
    flags = {"network": "simba", "sparsity": 0.8, "total_timesteps": 30, "batch_size": 4, "utd": 1.0}
    returns = sac_sparse.main(small(tmp_path, env_id=env_id, **flags))
    args = load(run_folder(tmp_path) / "model.pt")["args"]
    dm_control = env_id.startswith("dm_control")
    assert len(returns) == 1 and np.isfinite(returns).all()
    assert args["num_critics"] == (2 if env_id == "Humanoid-v5" else 1)
    assert args["gamma"] == pytest.approx(0.99 if dm_control else 0.995)
    assert args["action_repeat"] == (2 if dm_control else 1)


def test_learns_pendulum_at_80_percent_sparsity(tmp_path):
    args = replace(
        Args(), **(PENDULUM | CLEANRL), env_id="Pendulum-v1", sparsity=0.8, cuda=False, runs_dir=str(tmp_path)
    )
    returns = sac_sparse.main(replace(args, total_timesteps=6_000, batch_size=64))
    assert len(returns) == 20 and returns.mean() > -200
