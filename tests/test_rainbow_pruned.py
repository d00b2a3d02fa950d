"""Rainbow's parts against slow or closed forms, its loop, and learning."""

import math

import numpy as np
import pytest
import torch
from conftest import load, run_main
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rainbow_pruned as rainbow
from utils.masks import erk_densities, prunable
from utils.priorities import Priorities
from utils.replay import Batch, Replay
from utils.runs import Run

CPU = torch.device("cpu")
ATARI = Box(0, 255, (4, 84, 84), np.uint8)
TINY = {
    "env_id": "CartPole-v1",
    "total_timesteps": 500,
    "learning_starts": 100,
    "target_network_frequency": 50,
    "eval_episodes": 2,
    "device": "cpu",
}


def make_args(**flags):
    return rainbow.Args(**rainbow.CLASSIC_CONTROL | flags)


def make_network(args, space, n_actions):
    return rainbow.make_networks(args, space, Discrete(n_actions))["q_network"]


def atari_network(**flags):
    torch.manual_seed(0)
    return make_network(rainbow.Args(**flags), ATARI, 18)


def projected_slowly(probability, place, support):
    """C51's projection as in algorithm 1 of Bellemare et al. (2017): atom by atom, split between its neighbours."""
    v_min, v_max, n = support[0], support[-1], len(support)
    mass = [0.0] * n
    for p, z in zip(probability, place):
        b = (min(max(z, v_min), v_max) - v_min) / (v_max - v_min) * (n - 1)
        lower = min(int(b), n - 2)
        mass[lower] += p * (lower + 1 - b)
        mass[lower + 1] += p * (b - lower)
    return mass


@settings(max_examples=200)
@given(
    st.floats(-50, 50),
    st.floats(0.5, 100),
    st.integers(2, 60),
    st.lists(st.tuples(st.floats(-200, 200), st.sampled_from([0.0, 0.9, 0.97, 1.0])), min_size=1, max_size=5),
    st.integers(0, 2**31),
)
def test_projection_is_that_of_a_loop_over_atoms(v_min, extent, n_atoms, transitions, seed):
    rng = np.random.default_rng(seed)
    support = np.linspace(v_min, v_min + extent, n_atoms)
    probability = rng.dirichlet(np.full(n_atoms, 0.5), size=len(transitions))
    reward, discount = np.array(transitions).T
    place = reward[:, None] + discount[:, None] * support  # a terminal has a discount of 0
    mass = rainbow.project(*map(torch.from_numpy, (probability, place, support))).numpy()
    for i in range(len(transitions)):
        assert mass[i] == pytest.approx(projected_slowly(probability[i], place[i], support), abs=1e-9)
    assert mass.sum(1) == pytest.approx(1.0, abs=1e-9)
    inside = ((place >= support[0]) & (place <= support[-1])).all(1)
    assert (mass @ support)[inside] == pytest.approx((probability * place).sum(1)[inside], abs=1e-7)


def test_projection_in_single_precision_keeps_mass_and_mean():
    support = torch.linspace(-10, 10, 51)
    probability = torch.rand(1_000, 51).softmax(1)
    place = torch.rand(1_000, 1) * 0.9**3 + 0.99**3 * support * 0.9
    mass = rainbow.project(probability, place, support)
    assert mass.sum(1).numpy() == pytest.approx(1.0, abs=1e-5)
    assert (mass @ support).numpy() == pytest.approx((probability * place).sum(1).numpy(), abs=1e-4)


@pytest.mark.parametrize("double", [False, True])
def test_loss_is_that_of_a_loop_over_the_batch(double):
    torch.manual_seed(0)
    n_actions, n_atoms, size = 3, 11, 20
    q_network, target_network = (
        make_network(make_args(n_atoms=n_atoms), Box(-1, 1, (4,)), n_actions) for _ in range(2)
    )
    with torch.no_grad():
        for network in (q_network, target_network):
            network.head.out.weight.mul_(10)  # so that the two disagree on the best action
    support = torch.linspace(-3, 5, n_atoms)
    batch = Batch(
        torch.randn(size, 4),
        torch.randint(n_actions, (size,)),
        torch.randn(size) * 3,
        torch.tensor([0.0, 0.99, 0.9, 0.8]).repeat(5),
        torch.randn(size, 4),
    )
    losses, q_mean = rainbow.td_loss(q_network, target_network, batch, support, double)
    z, differs, q = support.double().numpy(), 0, []
    for i in range(size):
        softmax = {}
        for name, network, x in (
            ("online", q_network, batch.observation),
            ("next", q_network, batch.next_observation),
            ("target", target_network, batch.next_observation),
        ):
            logits = network(x[i : i + 1])[0].detach().double().numpy()
            softmax[name] = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        choices = [int((softmax[name] @ z).argmax()) for name in ("target", "next")]
        differs += choices[0] != choices[1]
        place = batch.reward[i].item() + batch.discount[i].item() * z
        target = projected_slowly(softmax["target"][choices[double]], place, z)
        chosen = softmax["online"][batch.action[i]]
        q.append(chosen @ z)
        assert losses[i].item() == pytest.approx(-np.sum(target * np.log(chosen)), rel=1e-4)
    assert differs
    assert q_mean.item() == pytest.approx(np.mean(q), rel=1e-4)


def test_prioritised_draws_reach_every_n_step_tail():
    """An episode of 5 steps that terminates, then one of 4 that is cut off by a time limit, then 6 steps of a third."""
    n_step, gamma, ends = 3, 0.9, {4: "terminated", 10: "truncated"}  # row 5 and row 11 only reset
    space = Box(-np.inf, np.inf, (1,), np.float32)
    replay = Replay(50, 1, space, Discrete(2), 1, n_step, gamma, CPU)
    priorities = Priorities(replay.length, CPU)
    episodes = []
    for t in range(18):
        resets = t - 1 in ends
        if t == 0 or resets:
            episodes.append([])
        if not resets:
            episodes[-1].append((float(t), 2.0**t, ends.get(t)))
        end = np.array([t in ends])
        terminal = end & (ends.get(t) == "terminated")
        changed = replay.add(
            torch.tensor([[float(t)]]), np.zeros(1, int), np.array([2.0**t]), terminal, end, torch.tensor([[t + 1.0]])
        )
        priorities.refresh(*changed, torch.tensor(1.0))

    expected = {}
    for episode in episodes:
        for i in range(len(episode)):
            window = episode[i : i + n_step]
            if len(window) < n_step and window[-1][2] is None:
                continue  # still being played
            ret = sum(gamma**k * reward for k, (_, reward, _) in enumerate(window))
            discount = 0.0 if window[-1][2] == "terminated" else gamma ** len(window)
            expected[episode[i][0]] = (ret, discount, window[-1][0] + 1)
    start, _ = priorities.sample(2_000)
    batch = replay.gather(start)
    drawn = set()
    for t, ret, discount, following in zip(
        batch.observation.flatten().tolist(),
        batch.reward.tolist(),
        batch.discount.tolist(),
        batch.next_observation.flatten().tolist(),
    ):
        drawn.add(t)
        assert (ret, discount, following) == pytest.approx(expected[t])
    assert drawn == set(expected)
    assert {2.0, 3.0, 4.0, 8.0, 9.0, 10.0} <= drawn


def test_importance_weights():
    probability = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    # Schaul et al. (2016): (1/N 1/P)^beta over its maximum
    expected = (1 / (4 * probability)) ** 0.5 / (1 / (4 * 0.1)) ** 0.5
    assert rainbow.importance_weights(probability, 0.5).numpy() == pytest.approx(expected.numpy())
    assert rainbow.importance_weights(probability, 0.0).tolist() == [1, 1, 1, 1]
    # with beta 1, the weighted mean over prioritised draws is, up to its scale, the mean over uniform ones
    value = torch.tensor([3.0, -1.0, 4.0, 1.5])
    weight = rainbow.importance_weights(probability, 1.0)
    assert (probability * weight * value).sum() / (probability * weight).sum() == pytest.approx(value.mean())


def noise_of(layer):
    """One draw of the noise on each weight and bias, read off a forward pass of the unit vectors."""
    out = layer(torch.cat([torch.eye(layer.weight_mu.shape[1]), torch.zeros(1, layer.weight_mu.shape[1])])).detach()
    bias = out[-1]
    weight = (out[:-1] - bias).T
    return (weight - layer.weight_mu) / layer.weight_sigma, (bias - layer.bias_mu) / layer.bias_sigma


def test_noise_is_factorised_fresh_and_off_in_evaluation():
    torch.manual_seed(0)
    inputs, outputs, draws = 7, 5, 3_000
    layer = rainbow.NoisyLinear(inputs, outputs, sigma=0.5, bias=True).double()
    torch.set_default_dtype(torch.float64)
    try:
        noise = [tuple(x.detach() for x in noise_of(layer)) for _ in range(draws)]
    finally:
        torch.set_default_dtype(torch.float32)
    weight, bias = (torch.stack(x) for x in zip(*noise))
    assert torch.linalg.matrix_rank(weight[:20], rtol=1e-6).tolist() == [1] * 20
    assert len({round(w[0, 0].item(), 6) for w in weight[:20]}) == 20
    # E f(e) = 0 and E f(e)^2 = E|e| = sqrt(2 / pi), for each of the two factors
    deviation = math.sqrt(2 / math.pi)
    assert weight.mean(0).abs().max() < 5 * deviation / math.sqrt(draws)
    assert (weight**2).mean().item() == pytest.approx(deviation**2, rel=0.05)
    assert (bias**2).mean().item() == pytest.approx(deviation, rel=0.05)
    # the bias has the output's factor: the weights' noise is a multiple of it
    assert torch.linalg.matrix_rank(torch.cat([weight[0], bias[0][:, None]], 1), rtol=1e-6) == 1

    x = torch.randn(3, inputs, dtype=torch.float64)
    layer.eval()
    assert torch.equal(layer(x), x @ layer.weight_mu.T + layer.bias_mu)


def test_noisy_layers_begin_as_in_the_paper():
    """Fortunato et al. (2018), sec. 3.2: mu uniform within 1/sqrt(p), sigma constant sigma_0/sqrt(p)."""
    layer = rainbow.NoisyLinear(400, 300, sigma=0.1, bias=True)
    assert layer.weight_sigma.unique().item() == layer.bias_sigma.unique().item() == pytest.approx(0.1 / 20)
    assert layer.weight_mu.abs().max() <= 1 / 20
    assert layer.weight_mu.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)


def test_dueling_identity():
    """The mean over the actions is the value, and the rest is the advantages, centred (Wang et al. 2016, eq. 9)."""
    torch.manual_seed(0)
    head = rainbow.Head(16, hidden=32, n_actions=6, n_atoms=51, dueling=True, linear=nn.Linear)
    x = torch.randn(8, 16)
    hidden = head.dense(x).relu()
    logits, value, advantage = head(x), head.value(hidden), head.out(hidden).view(8, 6, 51)
    assert torch.allclose(logits.mean(1), value, atol=1e-6)
    assert torch.allclose(logits - value[:, None], advantage - advantage.mean(1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("network", ["nature", "impala"])
@pytest.mark.parametrize("flags", [{}, {"dueling": True}, {"dueling": True, "noisy": True}])
def test_shapes_and_prunable_weights(network, flags):
    net = atari_network(network=network, **flags)
    assert net(torch.zeros(2, *ATARI.shape, dtype=torch.uint8)).shape == (2, 18, 51)
    names = set(prunable(net))
    linear = {"head.dense", "head.out"} | ({"head.value"} if "dueling" in flags else set())
    suffixes = ("weight_mu", "weight_sigma") if "noisy" in flags else ("weight",)
    assert {name for name in names if "conv" not in name and "blocks" not in name} == {
        f"{layer}.{suffix}" for layer in linear for suffix in suffixes
    }
    assert not any("bias" in name for name in names)
    assert len(names) - len(linear) * len(suffixes) == {"nature": 3, "impala": 15}[network]
    bare = atari_network(network=network, bias=False, **flags)
    assert set(dict(bare.named_parameters())) == names


@pytest.mark.parametrize(("sparsity", "expected"), [(0.9, 0.861), (0.95, 0.930), (0.99, 0.986)])
def test_erk_sparsity_of_the_head_at_width_3(sparsity, expected):
    shapes = {name: tuple(weight.shape) for name, weight in prunable(atari_network(width=3)).items()}
    assert shapes["head.out.weight"] == (18 * 51, 512)
    assert 1 - erk_densities(shapes, sparsity)["head.out.weight"] == pytest.approx(expected, abs=5e-4)


def test_nature_network_begins_as_in_dopamine():
    """Variance scaling by 1/sqrt(3), fan-in, uniform: a variance of 1 / (sqrt(3) fan-in)."""
    net = atari_network(network="nature")
    layers = {net.torso.conv2: 32 * 4 * 4, net.torso.conv3: 64 * 3 * 3, net.head.dense: 7744, net.head.out: 512}
    for layer, fan_in in layers.items():
        assert layer.weight.var().item() == pytest.approx(1 / (math.sqrt(3) * fan_in), rel=0.03)
        assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(math.sqrt(3) / fan_in), rel=0.01)
        assert not layer.bias.any()


def trained(tmp_path, **flags):
    """The model of a tiny run, and the state at each of its steps, by `on_step(run)`."""
    folder, _ = run_main(rainbow, tmp_path, **rainbow.CLASSIC_CONTROL | TINY | flags)
    return load(folder / "model.pt")


def test_new_transitions_get_the_maximum_priority_and_drawn_ones_that_of_their_loss(tmp_path, monkeypatch):
    """Against the losses that td_loss gave, in order."""
    losses, drawn, largest = [], [], 1.0
    td_loss, gather, advance = rainbow.td_loss, Replay.gather, Run.advance

    def recording_loss(*args):
        result = td_loss(*args)
        losses.append(result[0].detach())
        return result

    def recording_gather(self, index):
        drawn.append(index.clone())
        return gather(self, index)

    def check(run, step, update):
        nonlocal largest
        advance(run, step, update)
        replay, values = run.state["replay"], run.state["priorities"].values
        newest = (replay.added - replay.n_step) % replay.length
        assert (values > 0).sum() == len(replay)  # a transition waits until its n-step window is complete
        if losses:
            priority = np.sqrt(losses[-1].numpy() + 1e-10)
            largest = max(largest, priority.max())
            last = {int(slot): p for slot, p in zip(drawn[-1], priority)}
            for slot, p in last.items():
                assert values[slot] == pytest.approx(p, rel=1e-5) or slot == newest or values[slot] == 0
        if replay.is_start[newest, 0] and replay.added > replay.n_step:
            assert values[newest] == pytest.approx(largest, rel=1e-5)

    monkeypatch.setattr(rainbow, "td_loss", recording_loss)
    monkeypatch.setattr(Replay, "gather", recording_gather)
    monkeypatch.setattr(Run, "advance", check)
    trained(tmp_path)
    assert len(losses) == len(drawn) == 100 and largest > 1


def test_the_loss_is_weighted(tmp_path, monkeypatch):
    monkeypatch.setattr(rainbow, "importance_weights", lambda probability, beta: torch.zeros(len(probability)))
    model = trained(tmp_path, method="dense")["networks"]["q_network"]
    torch.manual_seed(1)
    untrained = make_network(make_args(**TINY), Box(-1, 1, (4,)), 2).state_dict()
    assert all(torch.equal(model[name], untrained[name]) for name in untrained)


def test_a_noisy_agent_explores_by_noise_and_is_evaluated_without(tmp_path):
    model = trained(tmp_path, noisy=True, method="random", sparsity=0.8)
    for name, mask in model["masks"]["q_network"].items():
        assert not model["networks"]["q_network"][name][~mask].any()
    assert "head.dense.weight_sigma" in model["masks"]["q_network"]
    network = make_network(make_args(noisy=True), Box(-1, 1, (4,)), 2)
    policy = rainbow.make_policy(make_args(noisy=True, eval_epsilon=0.0), {"q_network": network})
    obs, before = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32), torch.get_rng_state()
    rngs = [np.random.default_rng(i) for i in range(50)]
    assert policy(obs, rngs).tolist() == policy(obs, rngs).tolist()
    assert torch.equal(before, torch.get_rng_state()) and network.training
