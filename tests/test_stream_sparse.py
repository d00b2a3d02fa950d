"""stream_sparse.py against a literal streaming agent: one sample, autograd, a trace for each parameter."""

import math
import signal
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import as_flags, run_main, run_script
from gymnasium.spaces import Box, Discrete
from torch.distributions import Categorical, Normal

import stream_sparse
from stream_sparse import Args, Networks, make_networks, random_masks, sparse_init
from utils.masks import erk_densities, layer_densities, prunable
from utils.records import read_episodes

SMALL = {"env_id": "CartPole-v1", "total_timesteps": 200, "eval_episodes": 1}
CASES = {
    "ac continuous": {"env_id": "InvertedPendulum-v5"},
    "ac discrete": {"env_id": "CartPole-v1"},
    "q": {"env_id": "CartPole-v1", "algorithm": "q", "start_e": 0.5, "end_e": 0.1, "exploration_fraction": 0.5},
}
METHODS = {"dense": {}, "random": {"method": "random", "sparsity": 0.8}}


@pytest.fixture
def float64():
    """In float32 the pendulum amplifies rounding, in 200 steps from 1e-8 to 1e-4."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def train(tmp_path, **flags):
    folder, _ = run_main(stream_sparse, tmp_path / "runs", **SMALL | flags)
    return torch.load(folder / "model.pt", weights_only=True)


def initial_networks(args, obs_space, action_space):
    """The networks that an agent of this seed begins with, and their masks."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    networks, masks = make_networks(args, obs_space, action_space), {}
    for name in [name for name in networks if name != "statistics"]:
        weights = prunable(networks[name])
        densities = layer_densities(weights, 0.0 if args.method == "dense" else args.sparsity, args.distribution)
        masks[name] = random_masks(weights, densities, generator)
        with torch.no_grad():
            sparse_init(weights, masks[name], args.init_sparsity, generator)
    return networks, masks


class Moments:
    """Mean and sample variance of all values so far, from a list of them."""

    def __init__(self):
        self.values = []

    def add(self, value):
        self.values.append(np.array(value, dtype=np.float64))

    @property
    def mean(self):
        return np.mean(self.values, axis=0)

    @property
    def variance(self):
        return np.var(self.values, axis=0, ddof=1) if len(self.values) > 1 else np.ones_like(self.values[0])


class ObGD:
    """Dense gradients and traces of everything, multiplied by the masks."""

    def __init__(self, network, masks, kappa):
        self.parameters, self.masks, self.kappa = dict(network.named_parameters()), masks, kappa
        self.traces = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def step(self, f, delta, reset, gamma=0.99, lamda=0.8, alpha=1.0):
        gradients = torch.autograd.grad(f, list(self.parameters.values()))
        norm = 0.0
        for (name, trace), gradient in zip(self.traces.items(), gradients):
            trace.copy_(gamma * lamda * trace + gradient * self.masks.get(name, 1.0))
            norm += trace.abs().sum().item()
        bound = alpha * self.kappa * max(abs(delta), 1.0) * norm
        step = alpha / bound if bound > 1 else alpha
        for name, parameter in self.parameters.items():
            parameter.data += step * delta * self.traces[name]
            if reset:
                self.traces[name].zero_()


def literal(args):
    """Stream AC(lambda) and Stream Q(lambda), step by step; the networks at the end, statistics and returns."""
    env = gym.make(args.env_id)
    discrete = isinstance(env.action_space, Discrete)
    if not discrete:
        env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    networks, masks = initial_networks(args, env.observation_space, env.action_space)
    kappas = {"actor": 3.0, "critic": 2.0, "q_network": 2.0}
    optimizers = {name: ObGD(networks[name], masks[name], kappas[name]) for name in masks}
    rng, observations, returns = np.random.default_rng(args.seed), Moments(), Moments()
    limit, discounted, episodes = env.spec.max_episode_steps, 0.0, []

    def features(obs, time):
        observations.add(obs)
        normal = (obs - observations.mean) / np.sqrt(observations.variance + 1e-8)
        return torch.tensor(np.append(normal, time), dtype=torch.get_default_dtype())

    def epsilon_at(step):
        return np.interp(step + 1, [0, args.exploration_fraction * args.total_timesteps], [args.start_e, args.end_e])

    def draw(x):
        """(action, whether it is greedy)"""
        if args.algorithm == "q":
            explore, q = rng.random() < epsilon, networks["q_network"](x)
            action = int(rng.integers(len(q))) if explore else int(q.argmax())
            return action, action == int(q.argmax())
        output = networks["actor"](x)
        if discrete:
            p = output.double().softmax(0)
            return int(np.searchsorted(p.cumsum(0).numpy(), rng.random())), True
        mean, deviation = output.chunk(2)
        noise = torch.from_numpy(rng.standard_normal(len(mean), dtype=np.float32))
        return mean + F.softplus(deviation) * noise, True

    def play(action):
        if discrete:
            return env.step(action)
        return env.step(np.clip(action.numpy(), -1, 1))

    obs, _ = env.reset(seed=args.seed)
    time, total, length = -0.5, 0.0, 0
    x = features(obs, time)
    for step in range(args.total_timesteps):
        epsilon = epsilon_at(step)
        with torch.no_grad():
            action, is_greedy = draw(x)
        obs, reward, terminated, truncated, _ = play(action)
        done = terminated or truncated
        next_x = features(obs, time)  # the time runs on only after it has been shown
        time += 1 / limit
        discounted = 0.99 * discounted * (1 - done) + reward
        returns.add(discounted)
        scaled = reward / np.sqrt(returns.variance + 1e-8)
        if args.algorithm == "q":
            q = networks["q_network"](x)
            delta = scaled + 0.99 * (1 - done) * networks["q_network"](next_x).max().item() - q[action].item()
            optimizers["q_network"].step(q[action], delta, reset=done or not is_greedy)
        else:
            value = networks["critic"](x)[0]
            delta = scaled + 0.99 * (1 - done) * networks["critic"](next_x).item() - value.item()
            output = networks["actor"](x)
            if discrete:
                policy = Categorical(logits=output)
            else:
                mean, deviation = output.chunk(2)
                policy = Normal(mean, F.softplus(deviation))
            log_p = policy.log_prob(torch.as_tensor(action)).sum()
            objective = log_p + 0.01 * np.sign(delta) * policy.entropy().sum()
            optimizers["actor"].step(objective, delta, reset=done)
            optimizers["critic"].step(value, delta, reset=done)
        x, total, length = next_x, total + reward, length + 1
        if done:
            episodes.append((step + 1, total, length))
            if step + 1 < args.total_timesteps:
                if not discrete:
                    rng.standard_normal(env.action_space.shape, dtype=np.float32)  # the turn that resets draws as well
                elif args.algorithm == "ac":
                    rng.random()
                elif rng.random() < epsilon_at(step + 1):
                    rng.integers(env.action_space.n)
                obs, _ = env.reset()
                time, total, length = -0.5, 0.0, 0
                x = features(obs, time)
    return networks, observations, episodes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_the_literal_agent(case, method, tmp_path, float64):
    """With a mask, the literal agent is dense and multiplies by it: so values alone are the same as masked tensors."""
    flags = SMALL | CASES[case] | METHODS[method] | {"seed": 3}
    folder, _ = run_main(stream_sparse, tmp_path, **flags)
    model = torch.load(folder / "model.pt", weights_only=True)
    networks, observations, episodes = literal(Args(**flags))
    for name in model["masks"]:
        for key, weight in networks[name].state_dict().items():
            torch.testing.assert_close(model["networks"][name][key], weight, atol=1e-5, rtol=1e-5)
    statistics = model["networks"]["statistics"]
    np.testing.assert_allclose(statistics["mean"], observations.mean, atol=1e-5)
    np.testing.assert_allclose(statistics["variance"], observations.variance, rtol=1e-4)
    np.testing.assert_allclose(read_episodes(folder), episodes, rtol=1e-6)
    assert len(episodes) > 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_agents_side_by_side_are_each_what_it_is_alone(case, method, tmp_path, float64):
    flags = SMALL | CASES[case] | METHODS[method]
    stream_sparse.main(Args(**flags, runs_dir=str(tmp_path / "together"), seed=5, num_seeds=3))
    together = {}
    for path in (tmp_path / "together").glob("*/model.pt"):
        model = torch.load(path, weights_only=True)
        together[model["args"]["seed"]] = model
    assert sorted(together) == [5, 6, 7]
    for seed, model in together.items():
        alone = train(tmp_path / str(seed), **flags | {"seed": seed})
        assert alone["args"] | {"runs_dir": ""} == model["args"] | {"runs_dir": ""}
        for name in model["networks"]:
            torch.testing.assert_close(model["networks"][name], alone["networks"][name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask_sparsity", [0.0, 0.5, 0.8, 0.95])
@pytest.mark.parametrize(("inputs", "width"), [(18, 1), (111, 2)])
def test_sparse_initialisation_has_exact_counts(mask_sparsity, inputs, width):
    method = "random" if mask_sparsity else "dense"
    args = Args(method=method, sparsity=mask_sparsity or 0.5, width=width)
    networks, masks = initial_networks(args, Box(-1, 1, (inputs,)), Box(-1, 1, (6,)))
    for name, layers in masks.items():
        for key, weight in prunable(networks[name]).items():
            masked = (layers[key] == 0).sum(1) if layers else torch.zeros(len(weight))
            expected = masked.clamp(min=math.ceil(0.9 * weight.shape[1]))
            assert torch.equal((weight == 0).sum(1), expected.long())
            assert weight.abs().max() <= 1 / math.sqrt(weight.shape[1])


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_networks_hold_exactly_their_active_weights(sparsity, distribution):
    args = Args(method="random", sparsity=sparsity, distribution=distribution)
    networks, masks = initial_networks(args, Box(-1, 1, (17,)), Discrete(4))
    for name, layers in masks.items():
        held = Networks([networks[name]] * 2, [layers] * 2)
        weights = prunable(networks[name])
        densities = dict.fromkeys(weights, 1 - sparsity)
        if distribution == "erk":
            densities = erk_densities({key: tuple(weight.shape) for key, weight in weights.items()}, sparsity)
        for (key, weight), (values, traces) in zip(weights.items(), held.blocks):
            assert values.shape == traces.shape == (2, max(1, round(weight.numel() * densities[key])))


def test_actor_and_critic_and_seeds_have_masks_of_their_own():
    spaces = Box(-1, 1, (17,)), Discrete(2)
    args = Args(method="random", algorithm="ac")
    masks = [initial_networks(replace(args, seed=seed), *spaces)[1] for seed in (1, 2)]
    drawn = [mask for each in masks for mask in (each["actor"]["hidden2.weight"], each["critic"]["hidden2.weight"])]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize("case", ["ac discrete", "q"])
def test_traces_are_empty_after_an_episode_and_after_a_random_action_of_q(case, tmp_path, monkeypatch):
    resets, reset = [], Networks.reset_traces

    def watch(self, agents):
        reset(self, agents)
        resets.append((bool(agents[0]), all(bool((traces == 0).all()) for _, traces in self.blocks)))

    monkeypatch.setattr(Networks, "reset_traces", watch)
    folder, _ = run_main(stream_sparse, tmp_path, **SMALL | CASES[case])
    assert all(asked == empty for asked, empty in resets)
    asked = sum(asked for asked, _ in resets)
    ends = len(read_episodes(folder))
    if case == "q":
        assert asked > 2 * ends + 5  # the end, the turn that resets, and random actions
    else:
        assert 4 * ends - 2 <= asked <= 4 * ends


def test_a_stopped_group_resumes_one_by_one(tmp_path, stop_at):
    flags = SMALL | {"num_seeds": 2, "method": "random"}
    stop_at(120)
    with pytest.raises(SystemExit) as ended:
        stream_sparse.main(Args(**flags, runs_dir=str(tmp_path)))
    assert ended.value.code == 128 + signal.SIGTERM
    stop_at(None)
    checkpoints = sorted(tmp_path.glob("*/checkpoint.pt"))
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        saved = torch.load(checkpoint, weights_only=True)
        assert 100 <= saved["step"] <= 120 and checkpoint.stat().st_size < 400_000
        ended = run_script("stream_sparse.py", "--resume", str(checkpoint))
        assert ended.returncode == 0, ended.stderr
        model = torch.load(checkpoint.with_name("model.pt"), weights_only=True)
        assert model["args"]["seed"] == saved["args"]["seed"]
        assert model["masks"]["actor"]["hidden2.weight"].float().mean() < 0.2


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("--env-id", {"env_id": "Pendulum-v1", "algorithm": "q"}),
        ("--env-id", {"env_id": "ALE/Pong-v5"}),
        ("--num-seeds", {"num_seeds": 0}),
        ("--sparsity", {"sparsity": 1.0}),
    ],
)
def test_bad_input_is_one_line(name, flags, tmp_path):
    ended = run_script("stream_sparse.py", *as_flags(SMALL | flags | {"runs_dir": str(tmp_path / "runs")}))
    assert ended.returncode == 2 and not list(tmp_path.iterdir())
    assert ended.stderr.startswith(f"error: {name}: ") and ended.stderr.count("\n") == 1


def test_several_agents_are_not_tracked(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_main(stream_sparse, tmp_path, **SMALL | {"num_seeds": 2, "track": True})
    assert ended.value.code == 2 and "one agent" in capsys.readouterr().err


def test_an_environment_of_ones_own(tmp_path):
    """Its id names a module, and its time limit is found by it."""
    _, returns = run_main(stream_sparse, tmp_path, **SMALL | {"env_id": "tests.dot:Dot-v0"})
    assert np.isfinite(returns).all() and stream_sparse.time_limit("tests.dot:Dot-v0") == 10


def test_the_policy_sees_the_times_of_training(tmp_path, monkeypatch):
    """The time feature at each step of an episode: -0.5 at the first two, as published."""
    features, training, playing = stream_sparse.features, [], []

    def recorded(*args):
        training.append(features(*args))
        return training[-1]

    monkeypatch.setattr(stream_sparse, "features", recorded)
    flags = {"env_id": "tests.dot:Dot-v0", "total_timesteps": 10}
    run_main(stream_sparse, tmp_path, **SMALL | flags)

    args = Args(**flags)
    networks = make_networks(args, Box(-1, 1, (1,)), Box(-2, 2, (1,)))
    networks["actor"].register_forward_pre_hook(lambda _, inputs: playing.append(inputs[0]))
    policy, rngs = stream_sparse.make_policy(args, networks), [np.random.default_rng(0)]
    for _ in range(10):
        policy(np.zeros((1, 1), np.float32), rngs)
    assert [x[0, -1].item() for x in playing] == [x[0, -1].item() for x in training[:10]]
    assert playing[0][0, -1] == playing[1][0, -1] == -0.5


def test_stream_q_learns_cartpole(tmp_path):
    """Random actions have a return of about 22."""
    flags = SMALL | {"algorithm": "q", "total_timesteps": 20_000, "eval_episodes": 10}
    _, returns = run_main(stream_sparse, tmp_path, **flags)
    assert returns.mean() > 60
