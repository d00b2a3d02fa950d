"""The agent and its sparsity methods: published numbers, brute force, invariants."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load
from gymnasium.spaces import Box, Discrete
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn

from dqn_sparse import (
    Args,
    cosine_drop_fraction,
    cubic_density,
    epsilon_greedy,
    initial_masks,
    linear_schedule,
    make_networks,
    make_policy,
    mask_schedule,
    mask_update_due,
    prune,
    rewire,
    td_loss,
)
from utils.masks import apply_masks, prunable, random_mask
from utils.replay import Batch
from utils.runs import Run

SCREEN = Box(0, 255, (4, 84, 84), np.uint8)
SPACES = {"impala": SCREEN, "nature": SCREEN, "minatar": Box(0, 1, (4, 10, 10), np.uint8), "mlp": Box(-1, 1, (4,))}


def make_network(name: str, n_actions: int, **flags) -> nn.Module:
    """The network of this name; spaces choose the last two."""
    args = Args(network=name if name in ("impala", "nature") else "impala", **flags)
    return make_networks(args, SPACES[name], Discrete(n_actions))["q_network"]


# Schedules


@pytest.mark.parametrize(
    ("update", "printed"),
    [
        (0, 0),
        (500_000, 0),
        (501_000, 0.0019),
        (875_000, 0.5492),
        (1_000_000, 0.6685),
        (1_250_000, 0.8313),
        (1_500_000, 0.9148),
        (1_750_000, 0.9456),
        (1_999_000, 0.9500),
        (2_500_000, 0.9500),
    ],
)
def test_cubic_schedule(update, printed):
    progress = min(max((update - 500_000) / 1_500_000, 0), 1)
    assert cubic_density(1.0, 0.05) == 0.05  # to the last bit: the final counts are those of the densities
    assert 1 - cubic_density(progress, 0.05) == pytest.approx(printed, rel=0, abs=0.5e-4 + 1e-9)


def test_cosine_schedule():
    assert [cosine_drop_fraction(p, 0.3) for p in (0, 0.5, 1)] == pytest.approx([0.3, 0.15, 0])
    assert cosine_drop_fraction(0.25, 0.3) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))


@pytest.mark.parametrize("method", ["gmp", "rigl", "set"])
@pytest.mark.parametrize("n_updates", [2, 3, 10, 997, 250_000])
@pytest.mark.parametrize(("start", "end"), [(0.2, 0.8), (0.5, 0.5001), (0.95, 1.0), (0.0, 1e-6)])
def test_every_schedule_completes_within_the_run(method, n_updates, start, end):
    args = Args(method=method, prune_start=start, prune_end=end, rewire_end=end)
    schedule = first, last, interval = mask_schedule(args, {"layer": None}, n_updates)
    due = [update for update in range(n_updates) if mask_update_due(update, *schedule)]
    assert 0 <= first < last == due[-1] < n_updates
    assert len(due) >= min(50, last - first) or interval == 1
    if n_updates == 250_000 and (start, end) == (0.2, 0.8):
        assert schedule == ((50_000, 200_000, 1_000) if method == "gmp" else (0, 200_000, 4_000))


@pytest.mark.parametrize("method", ["dense", "random"])
def test_a_fixed_mask_has_no_schedule(method):
    schedule = mask_schedule(Args(method=method), {"layer": None} if method == "random" else {}, 100)
    assert not any(mask_update_due(update, *schedule) for update in range(200))


@given(st.integers(0, 1000), st.integers(1, 1000), st.integers(1, 300))
def test_mask_updates_are_evenly_spaced_and_one_is_at_the_end(start, length, interval):
    end = start + length
    due = [update for update in range(end + 500) if mask_update_due(update, start, end, interval)]
    assert due == sorted({*range(start + interval, end + 1, interval), end})


def test_exploration():
    assert [linear_schedule(1.0, 0.01, p) for p in (-1, 0, 0.5, 1, 2)] == pytest.approx([1, 1, 0.505, 0.01, 0.01])
    rng = np.random.default_rng(0)
    actions = epsilon_greedy(lambda: torch.ones(30_000, dtype=torch.int64), 0.3, 30_000, 3, rng)
    assert chisquare(np.bincount(actions), [3_000, 24_000, 3_000]).pvalue > 0.001
    assert (epsilon_greedy(lambda: torch.ones(100, dtype=torch.int64), 0.0, 100, 3, rng) == 1).all()


def test_the_policy_of_evaluations():
    """Epsilon-greedy; the action in a row depends on that row's observation and generator alone."""
    q_network, obs = make_network("mlp", 3), np.random.default_rng(0).normal(size=(6_000, 4)).astype(np.float32)
    best = q_network(torch.from_numpy(obs)).argmax(1).numpy()

    def actions(epsilon: float, seeds) -> np.ndarray:
        policy = make_policy(Args(eval_epsilon=epsilon), {"q_network": q_network})
        return policy(obs[: len(seeds)], [np.random.default_rng(seed) for seed in seeds])

    assert (actions(0.0, range(100)) == best[:100]).all()
    changed = np.bincount((actions(0.3, range(6_000)) - best) % 3)
    assert chisquare(changed, [4_800, 600, 600]).pvalue > 0.001
    one, other = actions(0.9, [1, 2, 3, 4] * 10), actions(0.9, [1, 7, 3, 8] * 10)
    assert (one == other)[::2].all() and not (one == other).all()


# Networks


def weights_of(name: str, width: int) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in prunable(make_network(name, 18, width=width)).values())


@pytest.mark.parametrize(
    ("width", "impala", "convolutions", "nature"),
    [
        (1, 2_089_024, 97_344, 4_051_968),
        (2, 4_362_368, 388_224, 8_233_984),
        (3, 6_829_248, 872_640, 12_555_264),
        (4, 9_489_664, 1_550_592, 17_015_808),
        (5, 12_343_616, 2_422_080, 21_615_616),
    ],
)
def test_weight_counts(width, impala, convolutions, nature):
    assert weights_of("impala", width) == impala
    assert weights_of("nature", width) == nature
    with torch.device("meta"):
        network = make_network("impala", 18, width=width)
    assert sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, nn.Conv2d)) == convolutions
    assert sum(isinstance(layer, nn.Conv2d) for layer in network.modules()) == 15


def test_which_layers_width_multiplies():
    with torch.device("meta"):
        shapes = {
            name: [tuple(weight.shape) for weight in prunable(make_network(name, 6, width=3)).values()]
            for name in SPACES
        }
    assert shapes["impala"][-2:] == [(512, 3 * 3872), (6, 512)]
    assert shapes["nature"][-2:] == [(512, 3 * 7744), (6, 512)]
    assert shapes["minatar"] == [(48, 4, 3, 3), (384, 3 * 1024), (6, 384)]
    assert shapes["mlp"] == [(1536, 4), (1536, 1536), (6, 1536)]


def test_parameters_of_minatars_network():
    """132,566 on Breakout's v0, as in Young & Tian (2019)."""
    assert sum(p.numel() for p in make_network("minatar", 6).parameters()) == 132_566


def feature_maps(network: nn.Module, layers: list[nn.Module]) -> list[tuple]:
    """The shapes that these layers put out, without the batch."""
    shapes = []
    handles = [layer.register_forward_hook(lambda m, i, out: shapes.append(tuple(out.shape[1:]))) for layer in layers]
    with torch.no_grad():
        assert network(torch.zeros(2, 4, 84, 84, dtype=torch.uint8)).shape == (2, 6)
    for handle in handles:
        handle.remove()
    return shapes


def test_feature_maps():
    impala = make_network("impala", 6)
    layers = [impala.torso.convs[0], *impala.torso.blocks]
    assert feature_maps(impala, layers) == [(16, 84, 84), (16, 42, 42), (32, 21, 21), (32, 11, 11)]
    nature = make_network("nature", 6)
    layers = [nature.torso.conv1, nature.torso.conv2, nature.torso.conv3]
    assert feature_maps(nature, layers) == [(32, 21, 21), (64, 11, 11), (64, 11, 11)]


def same_pad(x: torch.Tensor, kernel: int, stride: int, value: float) -> torch.Tensor:
    """TensorFlow's SAME: ceil(size / stride) outputs, the odd row of padding at the far side."""
    size = x.shape[-1]
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    before = total // 2
    return F.pad(x, (before, total - before) * 2, value=value)


def test_padding_is_dopamines():
    """Both networks against a forward pass with every padding written out."""
    torch.manual_seed(0)
    screens = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    impala = make_network("impala", 6)
    for bias in [p for p in impala.parameters() if p.ndim == 1]:
        nn.init.uniform_(bias, -1, 1)  # so that maps are negative too, and zero padding would show
    x = screens / 255
    for conv, blocks in zip(impala.torso.convs, impala.torso.blocks):
        x = F.conv2d(same_pad(x, 3, 1, 0.0), conv.weight, conv.bias)
        x = F.max_pool2d(same_pad(x, 3, 2, -math.inf), 3, 2)
        for block in blocks:
            y = F.conv2d(same_pad(x.relu(), 3, 1, 0.0), block.conv1.weight, block.conv1.bias)
            x = x + F.conv2d(same_pad(y.relu(), 3, 1, 0.0), block.conv2.weight, block.conv2.bias)
    expected = impala.head(x.relu().flatten(1))
    torch.testing.assert_close(impala(screens), expected)

    nature = make_network("nature", 6)
    torso = nature.torso
    x = screens / 255
    for conv, kernel, stride in ((torso.conv1, 8, 4), (torso.conv2, 4, 2), (torso.conv3, 3, 1)):
        x = F.conv2d(same_pad(x, kernel, stride, 0.0), conv.weight, conv.bias, stride).relu()
    torch.testing.assert_close(nature(screens), nature.head(x.flatten(1)))


@pytest.mark.parametrize("name", SPACES)
def test_initial_weights(name):
    """Xavier's bound for all but the residual convolutions, which are LeCun normal; zero biases."""
    torch.manual_seed(0)
    network = make_network(name, 6, width=2)
    for path, layer in network.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        assert not layer.bias.any(), path
        size = layer.weight[0, 0].numel()
        fan_in, fan_out = layer.weight.shape[1] * size, layer.weight.shape[0] * size
        std = math.sqrt(1 / fan_in) if "blocks" in path else math.sqrt(2 / (fan_in + fan_out))
        bound = 2 * std / 0.8796 if "blocks" in path else math.sqrt(6 / (fan_in + fan_out))
        n = layer.weight.numel()
        assert layer.weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(n)), path
        assert 0.98 * bound * (1 - 10 / n) < layer.weight.abs().max() <= bound * 1.0001, path


@pytest.mark.parametrize("name", SPACES)
def test_without_bias_there_are_only_weights(name):
    network = make_network(name, 6, bias=False)
    assert all(parameter.ndim >= 2 for parameter in network.parameters())
    assert not network(torch.zeros(1, *SPACES[name].shape)).any()


# The loss


class Table(nn.Module):
    """Q-values looked up: observation (B, 1) holds the state's number."""

    def __init__(self, states: int, actions: int) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(states, actions))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q[x[:, 0].long()]


@pytest.mark.parametrize("double", [False, True])
def test_td_loss_is_the_literal_one(double):
    torch.manual_seed(0)
    online, target = Table(7, 4), Table(7, 4)
    states, following = torch.randint(7, (32,)), torch.randint(7, (32,))
    action, reward = torch.randint(4, (32,)), torch.randn(32)
    discount = torch.where(torch.rand(32) < 0.3, 0.0, 0.99)
    batch = Batch(states[:, None].float(), action, reward, discount, following[:, None].float())

    total, gradient = 0.0, np.zeros((7, 4))
    q, q_target = online.q.detach().numpy().astype(float), target.q.detach().numpy().astype(float)
    for s, a, r, d, s2 in zip(states.tolist(), action.tolist(), reward.tolist(), discount.tolist(), following.tolist()):
        goal = r
        if d > 0:
            best = max(range(4), key=lambda b: q[s2][b] if double else q_target[s2][b])
            goal += d * q_target[s2][best]
        total += (q[s][a] - goal) ** 2 / 32
        gradient[s][a] += 2 * (q[s][a] - goal) / 32

    loss, q_mean = td_loss(online, target, batch, double)
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert q_mean.item() == pytest.approx(np.mean(q[states, action]), rel=1e-5)
    np.testing.assert_allclose(online.q.grad, gradient, atol=1e-6)
    assert target.q.grad is None


# Pruning and rewiring


def layers(sizes: list[tuple], seed: int, levels: int = 1000) -> dict[str, nn.Parameter]:
    """Weights with ties in their size if there are few levels."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(-levels, levels + 1, size, generator=generator) / levels for size in sizes]
    return {str(i): nn.Parameter(values) for i, values in enumerate(draw)}


def largest(score: np.ndarray, allowed: np.ndarray, count: int) -> set[int]:
    """The flat indices of the `count` largest among those allowed, by a full sort; ties to the lower index."""
    order = sorted(np.flatnonzero(allowed).tolist(), key=lambda i: -score[i])
    return set(order[:count])


some_layers = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=3)


@given(
    some_layers,
    st.integers(0, 1000),
    st.sampled_from([2, 1000]),
    st.floats(0.01, 1),
    st.lists(st.floats(0, 1), min_size=1),
)
def test_pruning_is_monotone_and_exact(sizes, seed, levels, final, fractions):
    weights = layers(sizes, seed, levels)
    masks = {name: torch.ones_like(weight) for name, weight in weights.items()}
    densities = {name: final if name == "0" else min(1, 2 * final) for name in weights}
    noise = torch.Generator().manual_seed(seed)
    for progress in [*sorted(fractions), 1.0]:
        before = {name: mask.bool() for name, mask in masks.items()}
        values = {name: weight.detach().clone() for name, weight in weights.items()}
        prune(weights, masks, densities, progress)
        apply_masks(weights, masks)
        for name, weight in weights.items():
            density = 1 - (1 - densities[name]) * (1 - (1 - progress) ** 3)
            count = max(1, round(weight.numel() * density))
            assert masks[name].sum() == count
            assert not (masks[name].bool() & ~before[name]).any()  # nothing comes back
            expected = largest(values[name].abs().flatten().numpy(), before[name].flatten().numpy(), count)
            assert set(masks[name].flatten().nonzero().flatten().tolist()) == expected
            with torch.no_grad():  # an update, after which pruned weights may be anything
                weight.add_(torch.randn(weight.shape, generator=noise), alpha=0.3)


def test_pruning_never_revives_weights_when_the_schedule_is_behind():
    """As after a resume with a longer run."""
    weights = {"w": nn.Parameter(torch.arange(1.0, 11).view(2, 5))}
    masks = {"w": (torch.arange(10) >= 7).float().view(2, 5)}
    prune(weights, masks, {"w": 0.1}, progress=0.1)
    assert masks["w"].flatten().nonzero().flatten().tolist() == [7, 8, 9]


@pytest.mark.parametrize("method", ["dense", "random", "gmp", "rigl", "set"])
def test_initial_masks(method):
    weights = layers([(8, 9), (3, 5)], seed=0)
    masks = initial_masks(weights, {"0": 0.25, "1": 1.0}, method, seed=1)
    counts = {"dense": {}, "gmp": {"0": 72, "1": 15}}.get(method, {"0": 18, "1": 15})
    assert {name: int(mask.sum()) for name, mask in masks.items()} == counts
    assert initial_masks(weights, {"0": 1.0, "1": 1.0}, method, seed=1) == {}
    if method == "random":
        same, other = (initial_masks(weights, {"0": 0.25, "1": 1.0}, method, seed=seed) for seed in (1, 2))
        assert torch.equal(same["0"], masks["0"]) and not torch.equal(other["0"], masks["0"])


def adam_with_moments(weights: dict, seed: int) -> torch.optim.Adam:
    """Fused Adam after one step with random gradients, which stay in place."""
    optimizer = torch.optim.Adam(weights.values(), lr=0.01, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()
    return optimizer


@given(
    some_layers,
    st.integers(0, 1000),
    st.sampled_from([2, 1000]),
    st.floats(0.05, 1),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
    st.sampled_from(["rigl", "set"]),
)
def test_rewiring(sizes, seed, levels, density, fractions, method):
    weights = layers(sizes, seed, levels)
    active = {name: max(1, round(weight.numel() * density)) for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    masks = {name: random_mask(weight.detach(), active[name], generator) for name, weight in weights.items()}
    optimizer = adam_with_moments(weights, seed)
    for fraction in fractions:  # nothing is masked in between: what is in inactive places must not matter
        old = {name: mask.bool().flatten().numpy() for name, mask in masks.items()}
        before = copy.deepcopy({name: (w.data, optimizer.state[w]) for name, w in weights.items()})
        rewire(weights, masks, optimizer, fraction, method)
        for name, weight in weights.items():
            new_mask = masks[name].bool().flatten().numpy()
            assert new_mask.sum() == active[name]  # the count is conserved, layer by layer

            n_drop = int(fraction * active[name])
            survivors = largest(np.abs(before[name][0].flatten().numpy()), old[name], active[name] - n_drop)
            now_active = set(np.flatnonzero(new_mask).tolist())
            assert survivors <= now_active  # RigL and SET drop the same
            if method == "rigl":
                candidates = np.array([i not in survivors for i in range(weight.numel())])
                assert now_active - survivors == largest(weight.grad.abs().flatten().numpy(), candidates, n_drop)

            fresh = torch.from_numpy(new_mask & ~old[name]).view(weight.shape)
            assert not weight[fresh].any()
            assert torch.equal(weight[~fresh], before[name][0][~fresh])  # dropped and regrown: the value stays
            for moment in ("exp_avg", "exp_avg_sq"):
                now, then = optimizer.state[weight][moment], before[name][1][moment]
                assert not now[fresh].any()
                assert torch.equal(now[~fresh], then[~fresh])
            assert optimizer.state[weight]["step"] == before[name][1]["step"]


def test_what_was_dropped_may_grow_back_with_its_value_and_moments():
    weights = {"w": nn.Parameter(torch.tensor([[5.0, 0.1, 0.0, 0.0]]))}
    masks = {"w": torch.tensor([[1.0, 1.0, 0.0, 0.0]])}
    optimizer = adam_with_moments(weights, 0)
    apply_masks(weights, masks)
    value, moments = weights["w"][0, 1].item(), optimizer.state[weights["w"]]["exp_avg"].clone()
    weights["w"].grad = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    rewire(weights, masks, optimizer, 0.5, "rigl")
    assert masks["w"].tolist() == [[1, 1, 0, 0]]
    assert weights["w"][0, 1].item() == value != 0
    assert torch.equal(optimizer.state[weights["w"]]["exp_avg"], moments) and moments[0, 1] != 0
    weights["w"].grad = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    rewire(weights, masks, optimizer, 0.5, "rigl")
    assert masks["w"].tolist() == [[1, 0, 0, 1]]


def test_set_grows_anywhere_with_the_same_chance():
    torch.manual_seed(0)
    weights = {"w": nn.Parameter(torch.linspace(1, 2, 40).view(5, 8))}
    optimizer = adam_with_moments(weights, 0)
    grown = np.zeros(40)
    for _ in range(1_000):
        masks = {"w": (torch.arange(40) % 4 == 3).float().view(5, 8)}  # 10 active; the largest weights are the last
        with torch.no_grad():
            weights["w"].copy_(torch.linspace(1, 2, 40).view(5, 8) * masks["w"])
        rewire(weights, masks, optimizer, 0.4, "set")
        grown += masks["w"].flatten().numpy()
    staying = [i for i in range(40) if i % 4 == 3][4:]
    assert (grown[staying] == 1_000).all()
    candidates = np.delete(grown, staying)  # 34 places for 4 connections: a binomial each, anticorrelated by 1/33
    p = 4 / 34
    chi2 = ((candidates - 1_000 * p) ** 2).sum() / (1_000 * p * (1 - p) * 34 / 33)
    assert chi2 < 63.9  # 99.9 % of the distribution with 33 degrees of freedom


def test_the_grow_score_is_the_gradient_of_the_weights_that_are_not_there():
    """Finite differences in float64, on inactive weights of every layer."""
    torch.manual_seed(0)
    online, target = (make_networks(Args(), Box(-1, 1, (3,)), Discrete(2))["q_network"].double() for _ in range(2))
    for layer in (online.torso.dense, online.head.dense):
        nn.init.uniform_(layer.bias, -0.1, 0.1)  # a unit without any input would be on ReLU's kink
    weights = prunable(online)
    generator = torch.Generator().manual_seed(0)
    masks = {n: random_mask(w.detach(), max(1, w.numel() // 5), generator) for n, w in weights.items()}
    apply_masks(weights, masks)
    observations = torch.randn(2, 16, 3, dtype=torch.float64)
    reward, discount = torch.randn(2, 16, dtype=torch.float64)
    batch = Batch(observations[0], torch.randint(2, (16,)), reward, discount, observations[1])
    td_loss(online, target, batch, False)[0].backward()
    for name, weight in weights.items():
        inactive = (masks[name] == 0).flatten().nonzero().flatten()
        largest = inactive[weight.grad.flatten()[inactive].abs().topk(10).indices]
        assert weight.grad.flatten()[largest].all()
        for i in [*largest.tolist(), *inactive[:: len(inactive) // 10].tolist()]:
            losses = []
            for change in (1e-6, -1e-6):
                with torch.no_grad():
                    weight.view(-1)[i] = change
                losses.append(td_loss(online, target, batch, False)[0].item())
            with torch.no_grad():
                weight.view(-1)[i] = 0.0
            assert weight.grad.flatten()[i].item() == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_masked_weights_are_zero_after_every_step_of_adam_and_in_the_target():
    torch.manual_seed(0)
    online = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    target = copy.deepcopy(online)
    weights, target_weights = prunable(online), prunable(target)
    generator = torch.Generator().manual_seed(0)
    masks = {name: random_mask(w.detach(), w.numel() // 10, generator) for name, w in weights.items()}
    optimizer = torch.optim.Adam(online.parameters(), lr=0.01, fused=True)
    apply_masks(weights, masks)
    for step in range(1_000):
        optimizer.zero_grad()
        (online(torch.randn(8, 6)) - torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        assert any(weights[name][mask == 0].any() for name, mask in masks.items())  # Adam alone would revive them
        apply_masks(weights, masks)
        if step % 100 == 0:
            target.load_state_dict(online.state_dict())
        for name, mask in masks.items():
            assert not weights[name][mask == 0].any() and not target_weights[name][mask == 0].any()
    assert all(weights[name][mask > 0].all() for name, mask in masks.items())


# The same in a run


@pytest.fixture
def watch(train, monkeypatch):
    """Trains; gives the masks and the weights after the start and after each update."""

    def watch(**flags) -> list[tuple[dict, dict]]:
        seen = []
        advance = Run.advance

        def watching(run, step, update):
            advance(run, step, update)
            if update == len(seen):
                masks = {name: mask.bool() for name, mask in run.state["masks"].items()}
                weights = {name: w.detach().clone() for name, w in prunable(run.state["q_network"]).items()}
                for name, mask in masks.items():
                    assert not weights[name][~mask].any()
                    assert not prunable(run.state["target_network"])[name][~mask].any()
                seen.append((masks, weights))

        monkeypatch.setattr(Run, "advance", watching)
        train(total_timesteps=900, **flags)  # 200 updates
        assert len(seen) == 201
        return seen

    return watch


def counts(masks: dict) -> dict:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def changed(before: dict, after: dict) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


SIZE = {"torso.dense.weight": 4 * 512, "head.dense.weight": 512 * 512, "head.out.weight": 512 * 2}


def test_gradual_pruning_in_a_run(watch):
    seen = watch(method="gmp", sparsity=0.9)
    large = "head.dense.weight"  # the two small layers stay dense, so this one has all the zeros
    budget = sum(n - math.floor(0.9 * n) for n in SIZE.values()) - sum(SIZE.values()) + SIZE[large]
    final = 1 - budget / SIZE[large]
    moves = []
    for update in range(200):
        (before, old), (after, new) = seen[update], seen[update + 1]
        assert not any((after[name] & ~before[name]).any() for name in SIZE)  # monotone
        assert all((old[name] != new[name])[after[name]].any() for name in SIZE)  # every update is a gradient step
        if changed(before, after):
            moves.append(update)
            progress = (update - 40) / 120
            assert counts(after)[large] == round(SIZE[large] * (1 - final * (1 - (1 - progress) ** 3)))
    assert moves[0] > 40 and moves[-1] == 160 and len(moves) >= 50  # nothing before prune_start or after prune_end
    assert counts(seen[-1][0]) == SIZE | {large: round(SIZE[large] * (1 - final))}


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_rewiring_in_a_run(watch, method):
    seen = watch(method=method, sparsity=0.9)
    moves, replaced = [], []
    for update in range(200):
        (before, old), (after, new) = seen[update], seen[update + 1]
        assert counts(after) == counts(before)
        if changed(before, after):
            moves.append(update)
            replaced.append(sum(int((before[name] & ~after[name]).sum()) for name in before))
            for name in before:  # the gradient step was replaced
                survivors = before[name] & after[name]
                assert torch.equal(old[name][survivors], new[name][survivors])
        elif update < 100:
            assert changed(old, new)
    assert moves[0] <= 5 and 150 <= moves[-1] < 160 and len(moves) > 40
    # Annealed from 0.3 of the connections; SET may regrow what it dropped, RigL does so more often
    assert replaced[0] <= 0.3 * sum(counts(seen[0][0]).values()) and replaced[-1] < 0.2 * replaced[0]


def test_a_random_mask_never_moves(watch):
    seen = watch(method="random", sparsity=0.9, distribution="uniform")
    assert counts(seen[0][0]) == {"torso.dense.weight": 205, "head.dense.weight": 26214, "head.out.weight": 102}
    assert not any(changed(seen[0][0], masks) for masks, _ in seen)


def test_one_shot_pruning(train):
    folder = train(method="gmp", sparsity=0.9, prune_start=0.5, prune_end=0.5001)
    masks = load(folder / "model.pt")["masks"]["q_network"]
    assert sum(counts(masks).values()) == sum(n - math.floor(0.9 * n) for n in SIZE.values())


def test_dense_has_no_masks(train):
    model = load(train(method="dense") / "model.pt")
    assert model["masks"] == {"q_network": {}}
    assert all(weight.all() for name, weight in model["networks"]["q_network"].items() if name.endswith("weight"))
