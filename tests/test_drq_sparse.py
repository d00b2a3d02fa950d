"""drq_sparse.py against published counts, a per-pixel loop and a literal DrQ-v2."""

import ctypes.util
import math
import os
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from conftest import load, run_main, run_python, run_script
from gymnasium.spaces import Box
from scipy.stats import chisquare, kstest

import drq_sparse
from drq_sparse import EASY_TASKS, Args, add_noise, linear_schedule, make_networks, random_shift
from utils.envs import Pixels, choose_renderer, make_envs, unknown_env
from utils.masks import layer_densities, prunable
from utils.replay import Batch, Replay
from utils.runs import Run

TINY = {
    "frame_size": 15,
    "hidden_dim": 8,
    "feature_dim": 4,
    "batch_size": 8,
    "learning_starts": 20,
    "total_timesteps": 60,
    "random_shift": 0,
}


def networks(actions=12, size=84, seed=0, **flags):
    torch.manual_seed(seed)
    return make_networks(replace(Args(), **flags), Box(0, 255, (9, size, size), np.uint8), Box(-1, 1, (actions,)))


def parameters(network):
    return sum(p.numel() for p in network.parameters())


# Networks


def test_parameter_counts():
    with torch.device("meta"):
        made = networks()
    counts = {name: parameters(network) for name, network in made.items()}
    assert counts == {"encoder": 30_368, "actor": 3_074_274, "critic": 4_190_424}
    assert made["encoder"].features == 39_200


@pytest.mark.parametrize("size", [15, 16, 21, 24, 84])
def test_the_encoder_knows_its_number_of_features(size):
    encoder = networks(size=size, hidden_dim=4)["encoder"]
    assert encoder(torch.zeros(2, 9, size, size, dtype=torch.uint8)).shape == (2, encoder.features)


def test_width_multiplies_channels_features_and_hidden_units():
    with torch.device("meta"):
        wide = networks(width=3)
    assert wide["encoder"].conv1.weight.shape == (96, 9, 3, 3) and wide["encoder"].conv4.weight.shape == (96, 96, 3, 3)
    assert wide["actor"].trunk[0].weight.shape == (150, 3 * 39_200)
    assert wide["critic"].heads[1][2].weight.shape == (3_072, 3_072)


def test_initialisation():
    made = networks(size=21)
    for network in made.values():
        for name, weight in network.named_parameters():
            if weight.ndim == 1:
                assert (weight == (1 if name == "trunk.1.weight" else 0)).all()
                continue
            rows = weight.flatten(1)
            rows = rows if len(rows) <= rows.shape[1] else rows.T
            gain = 2 if weight.ndim == 4 else 1  # squared
            torch.testing.assert_close(rows @ rows.T, gain * torch.eye(len(rows)), atol=1e-4, rtol=0)
    assert not torch.equal(*(head[2].weight for head in made["critic"].heads))


def test_table_of_densities_in_the_docs():
    page = (Path(__file__).parent.parent / "docs" / "drq_sparse.md").read_text()
    with torch.device("meta"):
        shapes = {name: prunable(network) for name, network in networks().items()}
    pooled = {f"{net}.{name}": weight for net, layers in shapes.items() for name, weight in layers.items()}
    rows = [
        line.split("|")[1:-1] for line in page.splitlines() if line.startswith(("| encoder.", "| actor.", "| critic."))
    ]
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    for name, (shape, size, *cells) in rows.items():
        net, layer = name.split(".", 1)
        weight = shapes[net][layer]
        assert shape == "x".join(map(str, weight.shape)) and int(size.replace(",", "")) == weight.numel()
        own = [layer_densities(shapes[net], sparsity, "erk")[layer] for sparsity in (0.5, 0.8, 0.9)]
        expected = [*own, layer_densities(pooled, 0.8, "erk")[name]]
        assert [float(cell) for cell in cells] == pytest.approx(expected, abs=5.1e-4)
    assert set(rows) | {name.replace("heads.0", "heads.1") for name in rows} == set(pooled)


# Augmentation and exploration


def shifted_by_loops(image, dx, dy, pad):
    """Each pixel is that of the image (C, H, H) at the shifted place, or at the nearest edge."""
    size = image.shape[-1]
    out = torch.empty_like(image)
    for row in range(size):
        for column in range(size):
            y = min(max(row + dy - pad, 0), size - 1)
            x = min(max(column + dx - pad, 0), size - 1)
            out[:, row, column] = image[:, y, x]
    return out


@pytest.mark.parametrize(("size", "pad"), [(15, 4), (84, 4), (21, 2)])
def test_shift_against_a_loop_over_pixels(size, pad):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 2, size, size), dtype=torch.uint8)
    shifted, found = random_shift(images, pad), set()
    assert shifted.shape == images.shape and shifted.dtype == torch.float32
    shifts = [(dx, dy) for dx in range(2 * pad + 1) for dy in range(2 * pad + 1)]
    for image, ours in zip(images.float(), shifted):
        centre = ours[:, pad:-pad, pad:-pad]  # where no edge was repeated, to find the shift
        fits = [
            (dx, dy)
            for dx, dy in shifts
            if torch.allclose(image[:, dy : dy + size - 2 * pad, dx : dx + size - 2 * pad], centre, atol=0.05)
        ]
        assert len(fits) == 1
        torch.testing.assert_close(ours, shifted_by_loops(image, *fits[0], pad), atol=0.05, rtol=0)
        found.add(fits[0])
    assert len(found) > 1  # each image has its own


def test_all_shifts_are_equally_likely():
    torch.manual_seed(1)
    image = torch.zeros(1, 1, 15, 15)
    image[0, 0, 7, 7] = 255
    shifted = random_shift(image.expand(5_000, -1, -1, -1), 4)
    counts = torch.bincount(shifted.flatten(1).argmax(1), minlength=225).view(15, 15)
    assert counts[3:12, 3:12].sum() == 5_000
    assert chisquare(counts[3:12, 3:12].flatten().numpy()).pvalue > 1e-4
    assert random_shift(image, 0) is image


def test_noise_is_gaussian_clipped_and_lets_all_gradient_pass():
    torch.manual_seed(0)
    std = torch.tensor(0.2)
    action = torch.zeros(20_000, 1, requires_grad=True)
    free = add_noise(action, std)
    assert kstest(free.detach().flatten().numpy() / 0.2, "norm").pvalue > 1e-4
    clipped = add_noise(action, std, clip=0.3).detach()
    assert clipped.abs().max() == pytest.approx(0.3)
    expected = 2 * (1 - 0.5 * (1 + math.erf(1.5 / math.sqrt(2))))  # beyond 1.5 standard deviations
    assert (clipped.abs() > 0.2999).float().mean() == pytest.approx(expected, abs=0.01)
    edge = torch.full((1_000, 1), 0.95, requires_grad=True)
    noisy = add_noise(edge, std)
    assert noisy.max() <= 1 - 1e-6 and (noisy == noisy.max()).sum() > 300
    noisy.sum().backward()
    assert (edge.grad == 1).all()


def test_exploration_schedule_of_a_run(tmp_path, monkeypatch):
    """The standard deviation and the clip of every noise: acting once, and learning twice an update."""
    used = []

    def watching(action, std, clip=math.inf):
        used.append((len(action), std.item(), clip))
        return add_noise(action, std, clip)

    monkeypatch.setattr(drq_sparse, "add_noise", watching)
    run_main(drq_sparse, tmp_path, env_id="tests.dot:Dot-v0", **TINY | {"exploration_steps": 50})
    acting = [std for n, std, clip in used if clip == math.inf and n == 1]
    learning = [std for n, std, clip in used if clip == 0.3 and n == TINY["batch_size"]]
    assert len(acting) + len(learning) == len(used)
    rows = 60 + 5  # the row after each of 5 whole episodes repeats the step that it resets at
    assert rows - 20 - 2 <= len(acting) <= rows - 20 + 2
    assert sorted(set(np.round(acting, 6))) == sorted({round(max(1 - 0.9 * t / 50, 0.1), 6) for t in range(20, 60)})
    assert len(learning) == 2 * 20 and learning == sorted(learning, reverse=True)
    assert linear_schedule(1.0, 0.1, 0.5) == pytest.approx(0.55) and linear_schedule(1.0, 0.1, 7) == pytest.approx(0.1)


def test_actions_are_random_before_learning(tmp_path, monkeypatch):
    actions, add = [], Replay.add

    def watching(replay, obs, action, *rest):
        actions.append(action.copy())
        return add(replay, obs, action, *rest)

    monkeypatch.setattr(Replay, "add", watching)
    run_main(
        drq_sparse, tmp_path, env_id="tests.dot:Dot-v0", **TINY | {"learning_starts": 1_500, "total_timesteps": 1_501}
    )
    uniform = np.concatenate(actions)[:1_500].flatten()
    assert kstest(uniform, "uniform", args=(-1, 2)).pvalue > 1e-4


# Five updates against a literal version


def conv(x, weight, bias, stride):
    """A convolution as a matrix product over patches."""
    size = (x.shape[-1] - 3) // stride + 1
    patches = F.unfold(x, 3, stride=stride)  # (B, C * 9, positions)
    return (weight.flatten(1) @ patches + bias[:, None]).view(len(x), -1, size, size)


def relu(x):
    """The gradient at 0 is 0: a unit without inputs is there until its bias moves."""
    return torch.where(x > 0, x, 0.0)


class Literal:
    """DrQ-v2 as its paper has it: parameters by name, forward passes written out, Adam by its formulas."""

    def __init__(self, networks, target, masks, rate, tau):
        self.p = {f"{net}.{k}": v.detach().clone() for net in networks for k, v in networks[net].items()}
        self.target = {k: v.detach().clone() for k, v in target.items()}
        self.masks = {f"{net}.{k}": v for net in masks for k, v in masks[net].items()}
        self.m = {k: torch.zeros_like(v) for k, v in self.p.items()}
        self.v = {k: torch.zeros_like(v) for k, v in self.p.items()}
        self.rate, self.tau, self.t = rate, tau, 0

    def encode(self, images):
        h = images.double() / 255 - 0.5
        for i, stride in ((1, 2), (2, 1), (3, 1), (4, 1)):
            h = relu(conv(h, self.p[f"encoder.conv{i}.weight"], self.p[f"encoder.conv{i}.bias"], stride))
        return h.reshape(len(h), -1)

    def trunk(self, p, prefix, features):
        z = features @ p[f"{prefix}trunk.0.weight"].T + p[f"{prefix}trunk.0.bias"]
        mean = z.mean(1, keepdim=True)
        variance = ((z - mean) ** 2).mean(1, keepdim=True)
        z = (z - mean) / torch.sqrt(variance + 1e-5) * p[f"{prefix}trunk.1.weight"] + p[f"{prefix}trunk.1.bias"]
        return torch.tanh(z)

    def layers(self, p, prefix, x):
        for i in (0, 2, 4):
            x = x @ p[f"{prefix}.{i}.weight"].T + p[f"{prefix}.{i}.bias"]
            x = relu(x) if i < 4 else x
        return x

    def action(self, features, noise, std, clip):
        mu = torch.tanh(self.layers(self.p, "actor.head", self.trunk(self.p, "actor.", features)))
        raw = mu + torch.clamp(std * noise, -clip, clip)
        return mu + (torch.clamp(raw, -1 + 1e-6, 1 - 1e-6) - mu).detach()

    def q(self, p, prefix, features, action):
        x = torch.cat([self.trunk(p, prefix, features), action], 1)
        return [self.layers(p, f"{prefix}heads.{i}", x)[:, 0] for i in range(2)]

    def adam(self, nets, loss):
        names = [k for k in self.p if k.split(".")[0] in nets]
        for k, gradient in zip(names, torch.autograd.grad(loss, [self.p[k] for k in names])):
            self.m[k] = 0.9 * self.m[k] + 0.1 * gradient
            self.v[k] = 0.999 * self.v[k] + 0.001 * gradient**2
            m, v = self.m[k] / (1 - 0.9**self.t), self.v[k] / (1 - 0.999**self.t)
            new = self.p[k].detach() - self.rate * m / (torch.sqrt(v) + 1e-8)
            self.p[k] = new * self.masks.get(k, 1)

    def require(self, *nets):
        self.p = {k: v.detach().requires_grad_(k.split(".")[0] in nets) for k, v in self.p.items()}

    def update(self, batch, noises, std, clip):
        self.t += 1
        self.require("encoder", "critic")
        features = self.encode(batch.observation)
        with torch.no_grad():
            next_features = self.encode(batch.next_observation)
            next_q = self.q(self.target, "", next_features, self.action(next_features, noises[0], std, clip))
            y = batch.reward + batch.discount * torch.minimum(*next_q)
        q1, q2 = self.q(self.p, "critic.", features, batch.action)
        self.adam(("encoder", "critic"), ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean())

        self.require("actor")
        features = features.detach()
        actions = self.action(features, noises[1], std, clip)
        self.adam(("actor",), -torch.minimum(*self.q(self.p, "critic.", features, actions)).mean())
        for k in self.target:
            self.target[k] = (1 - self.tau) * self.target[k] + self.tau * self.p[f"critic.{k}"].detach()


@pytest.mark.parametrize("method", ["dense", "random"])
def test_five_updates_against_a_literal_version(tmp_path, monkeypatch, method):
    """The weights that main has after each of its first updates, given its batches and its noise, in float64."""
    states, batches = [], []
    advance, sample = Run.advance, Replay.sample

    def snapshot(run):
        nets = {
            net: {k: v.detach().clone() for k, v in run.state["networks"][net].state_dict().items()}
            for net in run.state["networks"]
        }
        target = {k: v.clone() for k, v in run.state["target_critic"].state_dict().items()}
        return nets, target, run.state["masks"]

    def watch(run, step, update):
        advance(run, step, update)
        if update == len(states) and update <= 5:
            states.append(snapshot(run))

    def recorded(replay, batch_size):
        batch = sample(replay, batch_size)
        batches.append((batch, torch.get_rng_state()))
        return batch

    monkeypatch.setattr(Run, "advance", watch)
    monkeypatch.setattr(Replay, "sample", recorded)
    flags = TINY | {"learning_rate": 1e-3, "tau": 0.3, "n_step": 2, "total_timesteps": 40, "exploration_steps": 40}
    torch.set_default_dtype(torch.float64)
    try:
        flags |= {"replay_ratio": 1.0, "end_std": 0.5}
        run_main(drq_sparse, tmp_path, env_id="tests.dot:Dot-v0", method=method, **flags)
        nets, target, masks = states[0]
        assert bool(masks["encoder"]) == (method == "random")
        agent = Literal(nets, target, masks, rate=1e-3, tau=0.3)
        std_of_update = [1 - 0.5 * t / 40 for t in range(20, 40)]
        for i in range(5):
            batch, rng_state = batches[i]
            torch.set_rng_state(rng_state)
            noises = [torch.randn(8, 1) for _ in range(2)]
            agent.update(batch, noises, std_of_update[i], 0.3)
            expected_nets, expected_target, _ = states[i + 1]
            for net in expected_nets:
                for k, v in expected_nets[net].items():
                    torch.testing.assert_close(agent.p[f"{net}.{k}"].detach(), v, rtol=1e-6, atol=1e-9)
            for k, v in expected_target.items():
                torch.testing.assert_close(agent.target[k], v, rtol=1e-6, atol=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


# What is learned from


class Counter(gym.Env):
    """Frames of one colour, 10 x episode + step; episodes terminate after 5 steps, or are truncated after 7, by turns.
    The reward of a step is its number, from 1 on."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}
    episode = 0

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(1, np.float32), float(self.t), self.episode % 2 == 1 and self.t == 5, self.t == 7, {}

    def render(self):
        return np.full((15, 15, 3), 10 * self.episode + self.t, np.uint8)


@pytest.mark.parametrize(("n_step", "stack", "num_envs"), [(3, 3, 1), (1, 4, 2), (5, 2, 1)])
def test_stacks_and_returns_across_the_ends_of_episodes(tmp_path, monkeypatch, n_step, stack, num_envs):
    """All that is learned from, and all observations acted on, as the environment's rules have them."""
    if "Counter-v0" not in gym.registry:
        gym.register("Counter-v0", Counter)
    batches, acted, sample, add = [], [], Replay.sample, Replay.add
    monkeypatch.setattr(Replay, "sample", lambda *args: batches.append(sample(*args)) or batches[-1])
    monkeypatch.setattr(Replay, "add", lambda replay, obs, *rest: acted.append(obs.clone()) or add(replay, obs, *rest))
    flags = {"env_id": "Counter-v0", "n_step": n_step, "frame_stack": stack, "num_envs": num_envs, "gamma": 0.9}
    flags |= {"total_timesteps": 120, "learning_starts": 60, "batch_size": 32, "replay_ratio": 1.0, "frame_size": 15}
    run_main(drq_sparse, tmp_path, **TINY | flags)

    def observation(episode, t):
        return [10 * episode + max(t - k, 0) for k in range(stack - 1, -1, -1)]

    def colours(images):  # (B, stack), of frames that have one colour each
        frames = images.view(len(images), stack, -1)
        assert (frames == frames[:, :, :1]).all()
        return frames[:, :, 0].tolist()

    possible = {tuple(observation(episode, t)) for episode in range(1, 25) for t in range(8)}
    assert all(tuple(stack) in possible for obs in acted for stack in colours(obs))
    batch = Batch(*(torch.cat(parts) for parts in zip(*batches)))
    starts = set()
    rows = zip(
        colours(batch.observation), colours(batch.next_observation), batch.reward.tolist(), batch.discount.tolist()
    )
    for obs, next_obs, reward, discount in rows:
        episode, t = divmod(obs[-1], 10)
        last = 5 if episode % 2 == 1 else 7
        m = min(n_step, last - t)
        assert obs == observation(episode, t) and next_obs == observation(episode, t + m)
        assert reward == pytest.approx(sum(0.9**k * (t + k + 1) for k in range(m)))
        terminated = t + m == 5 and episode % 2 == 1
        assert discount == pytest.approx(0 if terminated else 0.9**m)
        starts.add((episode % 2, t))
    assert starts == {(1, t) for t in range(5)} | {(0, t) for t in range(7)}


# Sparsity


@pytest.mark.parametrize("method", ["random", "gmp", "rigl", "set"])
def test_masked_weights_are_zero_in_the_target_too(tmp_path, method):
    flags = TINY | {"method": method, "sparsity": 0.8, "checkpoint_every": 60, "replay_ratio": 1.0}
    folder, _ = run_main(drq_sparse, tmp_path, env_id="tests.dot:Dot-v0", **flags)
    model = load(folder / "model.pt")
    target = load(folder / "checkpoint.pt")["state"]["target_critic"]
    assert set(model["masks"]) == {"encoder", "actor", "critic"}
    for name, mask in model["masks"]["critic"].items():
        assert not target[name][~mask].any() and target[name][mask].any()
    assert not torch.equal(*(model["masks"]["critic"][f"heads.{i}.2.weight"] for i in range(2)))


@pytest.mark.parametrize("sparse", ["encoder", "actor", "critic"])
def test_each_network_alone_can_be_sparse(tmp_path, sparse):
    flags = TINY | {"sparsity": 0.0, f"{sparse}_sparsity": 0.7, "total_timesteps": 30}
    folder, _ = run_main(drq_sparse, tmp_path, env_id="tests.dot:Dot-v0", **flags)
    model = load(folder / "model.pt")
    for net, state in model["networks"].items():
        weights = [p for p in state.values() if p.ndim >= 2]
        zeros = sum((p == 0).sum().item() for p in weights) / sum(p.numel() for p in weights)
        assert zeros == pytest.approx(0.7 if net == sparse else 0.0, abs=0.02)
        assert bool(model["masks"][net]) == (net == sparse)


# Environments and memory


def test_the_presets_are_those_of_the_tasks():
    for task in EASY_TASKS:
        preset = drq_sparse.preset(Args(env_id=f"dm_control/{task}-v0"))
        assert preset == drq_sparse.EASY | (drq_sparse.WALKER if task.startswith("walker") else {})
    for env_id, expected in {
        "dm_control/humanoid-walk-v0": drq_sparse.HUMANOID,
        "dm_control/quadruped-run-v0": drq_sparse.QUADRUPED_RUN,
        "dm_control/quadruped-walk-v0": {},
        "dm_control/hopper-hop-v0": {},
        "dm_control/walker-run-v0": {"n_step": 1, "batch_size": 512},
        "Pendulum-v1": drq_sparse.PENDULUM,
    }.items():
        assert drq_sparse.preset(Args(env_id=env_id)) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"env_id": "CartPole-v1"}, "bounded continuous actions"),
        ({"env_id": "Blind-v0"}, "cannot make Blind-v0"),
        ({"env_id": "dm_control/none-v0"}, "dm_control/none-v0"),
    ],
)
def test_bad_environments_end_with_one_line(tmp_path, capsys, flags, message):
    if "Blind-v0" not in gym.registry:
        gym.register("Blind-v0", lambda render_mode=None: gym.make("tests.dot:Dot-v0").unwrapped)
    with pytest.raises(SystemExit) as ended:
        run_main(drq_sparse, tmp_path, **TINY | flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and not list(tmp_path.iterdir())
    assert error.startswith("error: --env-id: ") and message in error and error.count("\n") == 1


def test_frames_too_small_for_the_convolutions_are_refused():
    ended = run_script("drq_sparse.py", "--env-id", "tests.dot:Dot-v0", "--frame-size", "14")
    assert ended.returncode == 2 and ended.stderr == "error: --frame-size: expected an integer of at least 15, got 14\n"


def test_frames_are_resized_and_the_first_one_is_repeated():
    for size in (21, 16):
        envs = make_envs("tests.dot:Dot-v0", 2, action_repeat=2, pixels=Pixels(size, 3, 0))
        assert envs.single_observation_space == Box(0, 255, (9, size, size), np.uint8)
        first = envs.reset(seed=1)[0].reshape(2, 3, 3, size, size)
        assert first.dtype == np.uint8 and first.any() and (first == first[:, :1]).all()
        assert not np.array_equal(first[0], first[1])
        second, reward, *_ = envs.step(np.full((2, 1), 1, np.float32))
        second = second.reshape(2, 3, 3, size, size)
        assert (second[:, :2] == first[:, :2]).all() and (second[:, 2] != first[:, 2]).any()
        assert (reward < 0).all()
        envs.close()


def test_a_replay_that_does_not_fit_is_smaller_and_says_so(tmp_path, monkeypatch, capsys, stop_at):
    row = 3 * 15 * 15 + 30
    memory = psutil.virtual_memory()._replace(available=int(40.5 * row / 0.8))  # four rows beside the transitions
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    flags = TINY | {"env_id": "tests.dot:Dot-v0", "total_timesteps": 100}
    stop_at(80)
    folder, _ = run_main(drq_sparse, tmp_path, **flags)
    assert "note: the replay has 36 rows (0.0 GB): 100 need 0.0 GB of memory\n" in capsys.readouterr().out
    assert load(folder / "checkpoint.pt")["args"]["buffer_size"] == 36
    monkeypatch.undo()  # more memory is free when it is resumed
    run_main(drq_sparse, tmp_path, **flags | {"resume": str(folder / "checkpoint.pt"), "buffer_size": 36})
    assert (folder / "model.pt").exists()


@pytest.mark.parametrize(
    ("gpu", "installed", "given", "expected"),
    [
        (True, {"EGL", "OSMesa"}, None, "egl"),
        (False, {"EGL", "OSMesa"}, None, "osmesa"),
        (True, {"OSMesa"}, None, "osmesa"),
        (False, {"EGL"}, None, "egl"),
        (False, set(), None, None),
        (True, {"EGL"}, "glfw", "glfw"),
    ],
)
def test_the_renderer_that_is_chosen(monkeypatch, gpu, installed, given, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: name if name in installed else None)
    monkeypatch.setattr("sys.platform", "linux")
    environment = {"MUJOCO_GL": given} if given else {}
    monkeypatch.setattr(os, "environ", environment)
    choose_renderer()
    assert environment.get("MUJOCO_GL") == expected


def test_without_a_renderer_the_packages_are_named(tmp_path):
    """MUJOCO_GL=off draws nothing on any machine."""
    if unknown_env("dm_control/hopper-hop-v0"):
        pytest.skip("DeepMind Control is not installed")
    code = "import os, sys; os.environ['MUJOCO_GL'] = 'off'; import drq_sparse as d; "
    code += f"d.main(d.Args(env_id='dm_control/hopper-hop-v0', device='cpu', runs_dir={str(tmp_path)!r}))"
    ended = run_python("-c", code)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: --env-id: ")
    assert "libosmesa6" in ended.stderr and "libegl1" in ended.stderr and not list(tmp_path.iterdir())


def test_deepmind_control_as_in_drqv2():
    """Frames of the task's camera; in a process of its own, since this one may have MuJoCo without a renderer."""
    code = """
    import numpy as np
    from utils.envs import Pixels, make_envs, unknown_env, choose_renderer
    choose_renderer()
    problem = unknown_env("dm_control/quadruped-run-v0")
    frames = []
    for camera in (2, 0) if problem is None else ():
        try:
            envs = make_envs("dm_control/quadruped-run-v0", 1, action_repeat=2, pixels=Pixels(84, 3, camera))
        except Exception as error:
            problem = str(error)
            break
        first = envs.reset(seed=1)[0][0]
        second, *_ = envs.step(np.ones((1, 12), np.float32))
        assert first.shape == (9, 84, 84) and first.dtype == np.uint8 and first.std() > 5
        assert (first[:3] == first[6:]).all() and (second[0, :6] == first[:6]).all()
        assert (second[0, 6:] != first[6:]).any()
        frames.append(first)
        envs.close()
    print(f"no renderer: {problem}" if problem else (frames[0] != frames[1]).mean() > 0.5)
    """
    ended = run_python("-c", textwrap.dedent(code))
    assert ended.returncode == 0, ended.stderr
    if "no renderer" in ended.stdout:
        pytest.skip(ended.stdout.strip())
    assert ended.stdout.strip().endswith("True")


def test_learns_to_move_a_dot_at_80_percent_sparsity(tmp_path):
    flags = {"frame_size": 15, "random_shift": 1, "hidden_dim": 64, "learning_rate": 3e-4, "batch_size": 64}
    flags |= {"gamma": 0.5, "n_step": 1, "tau": 0.02, "replay_ratio": 1.0, "eval_episodes": 20, "sparsity": 0.8}
    flags |= {"learning_starts": 200, "total_timesteps": 900, "exploration_steps": 900}
    _, returns = run_main(drq_sparse, tmp_path, env_id="tests.dot:Dot-v0", **flags)
    assert len(returns) == 20 and returns.mean() > -3.5  # a random policy has about -5
