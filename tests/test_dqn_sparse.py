"""The agent and its sparsity methods: published numbers, brute force, invariants."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn

import dqn_sparse
from dqn_sparse import (
    MLP,
    Args,
    cosine_drop_fraction,
    cubic_sparsity,
    epsilon_greedy,
    linear_schedule,
    make_network,
    mask_update_due,
    prune,
    rewire,
    td_loss,
)
from utils.masks import apply_masks, prunable, random_mask
from utils.replay import Batch

SCREEN = Box(0, 255, (4, 84, 84), np.uint8)


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
    assert cubic_sparsity(update, 500_000, 2_000_000, 0.95) == pytest.approx(printed, rel=0, abs=0.5e-4 + 1e-9)


def test_cubic_schedule_arrives():
    assert cubic_sparsity(500, 500, 900, 0.95) == 0
    assert cubic_sparsity(900, 500, 900, 0.95) == cubic_sparsity(10**9, 500, 900, 0.95) == 0.95


def test_cosine_schedule():
    assert cosine_drop_fraction(0, 800, 0.3) == 0.3
    assert cosine_drop_fraction(400, 800, 0.3) == pytest.approx(0.15)
    assert cosine_drop_fraction(200, 800, 0.3) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))
    assert cosine_drop_fraction(800, 800, 0.3) == cosine_drop_fraction(10_000, 800, 0.3) == 0
    falling = [cosine_drop_fraction(update, 800, 0.3) for update in range(801)]
    assert falling == sorted(falling, reverse=True)


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


# Networks


def weights_of(network_name: str, width: int) -> int:
    with torch.device("meta"):
        network = make_network(Args(network=network_name, width=width), SCREEN, 18)
    return sum(weight.numel() for weight in prunable(network).values())


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
        network = make_network(Args(width=width), SCREEN, 18)
    assert sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, nn.Conv2d)) == convolutions
    assert sum(isinstance(layer, nn.Conv2d) for layer in network.modules()) == 15


def test_width_leaves_the_dense_layer_alone_unless_asked():
    with torch.device("meta"):
        assert make_network(Args(width=3), SCREEN, 6).dense.weight.shape == (512, 3 * 3872)
        assert make_network(Args(width=3, scale_dense=True), SCREEN, 6).dense.weight.shape == (1536, 3 * 3872)
        assert make_network(Args(width=3, network="nature"), SCREEN, 6).dense.weight.shape == (512, 3 * 7744)
        mlp = make_network(Args(width=3, network="mlp"), Box(-1, 1, (8,)), 4)
    assert [tuple(weight.shape) for weight in prunable(mlp).values()] == [(1536, 8), (1536, 1536), (4, 1536)]


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
    impala = make_network(Args(), SCREEN, 6)
    layers = [impala.convs[0], impala.blocks[0], impala.blocks[1], impala.blocks[2]]
    assert feature_maps(impala, layers) == [(16, 84, 84), (16, 42, 42), (32, 21, 21), (32, 11, 11)]
    nature = make_network(Args(network="nature"), SCREEN, 6)
    layers = [nature.conv1, nature.conv2, nature.conv3]
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
    impala = make_network(Args(), SCREEN, 6)
    for bias in [p for p in impala.parameters() if p.ndim == 1]:
        nn.init.uniform_(bias, -1, 1)  # so that maps are negative too, and zero padding would show
    x = screens / 255
    for conv, blocks in zip(impala.convs, impala.blocks):
        x = F.conv2d(same_pad(x, 3, 1, 0.0), conv.weight, conv.bias)
        x = F.max_pool2d(same_pad(x, 3, 2, -math.inf), 3, 2)
        for block in blocks:
            y = F.conv2d(same_pad(x.relu(), 3, 1, 0.0), block.conv1.weight, block.conv1.bias)
            x = x + F.conv2d(same_pad(y.relu(), 3, 1, 0.0), block.conv2.weight, block.conv2.bias)
    expected = impala.head(impala.dense(x.relu().flatten(1)).relu())
    torch.testing.assert_close(impala(screens), expected)

    nature = make_network(Args(network="nature"), SCREEN, 6)
    x = screens / 255
    for conv, kernel, stride in ((nature.conv1, 8, 4), (nature.conv2, 4, 2), (nature.conv3, 3, 1)):
        x = F.conv2d(same_pad(x, kernel, stride, 0.0), conv.weight, conv.bias, stride).relu()
    torch.testing.assert_close(nature(screens), nature.head(nature.dense(x.flatten(1)).relu()))


@pytest.mark.parametrize("name", ["impala", "nature", "mlp"])
def test_initial_weights(name):
    """Xavier's bound for all but the residual convolutions, which are LeCun normal; zero biases."""
    torch.manual_seed(0)
    space = SCREEN if name != "mlp" else Box(-1, 1, (4,))
    network = make_network(Args(network=name, width=2), space, 6)
    for path, layer in network.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        assert not layer.bias.any(), path
        size = layer.weight[0, 0].numel()
        fan_in, fan_out = layer.weight.shape[1] * size, layer.weight.shape[0] * size
        std = math.sqrt(1 / fan_in) if path.startswith("blocks") else math.sqrt(2 / (fan_in + fan_out))
        bound = 2 * std / 0.8796 if path.startswith("blocks") else math.sqrt(6 / (fan_in + fan_out))
        n = layer.weight.numel()
        assert layer.weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(n)), path
        assert 0.98 * bound * (1 - 10 / n) < layer.weight.abs().max() <= bound * 1.0001, path


@pytest.mark.parametrize("name", ["impala", "nature", "mlp"])
def test_without_bias_there_are_only_weights(name):
    space = SCREEN if name != "mlp" else Box(-1, 1, (4,))
    network = make_network(Args(network=name, bias=False), space, 6)
    assert all(parameter.ndim >= 2 for parameter in network.parameters())
    assert not network(torch.zeros(1, *space.shape)).any()


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


@given(some_layers, st.integers(0, 1000), st.sampled_from([2, 1000]), st.lists(st.floats(0.01, 1), min_size=1))
def test_pruning_is_monotone_and_exact(sizes, seed, levels, densities):
    weights = layers(sizes, seed, levels)
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    noise = torch.Generator().manual_seed(seed)
    for density in sorted(densities, reverse=True):
        before = {name: mask.clone() for name, mask in masks.items()}
        values = {name: weight.detach().clone() for name, weight in weights.items()}
        kept = {name: max(1, round(weight.numel() * density)) for name, weight in weights.items()}
        prune(weights, masks, kept)
        apply_masks(weights, masks)
        for name, weight in weights.items():
            assert masks[name].sum() == kept[name]
            assert not (masks[name] & ~before[name]).any()  # nothing comes back
            expected = largest(values[name].abs().flatten().numpy(), before[name].flatten().numpy(), kept[name])
            assert set(masks[name].flatten().nonzero().flatten().tolist()) == expected
            with torch.no_grad():  # an update of the weights that are left
                weight.add_(torch.randn(weight.shape, generator=noise) * masks[name], alpha=0.3)


def adam_with_moments(weights: dict, seed: int) -> torch.optim.Adam:
    """Fused Adam after one step with random gradients, which stay in place."""
    optimizer = torch.optim.Adam(weights.values(), lr=0.01, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()
    return optimizer


@settings(deadline=None)
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
    kept = {name: max(1, round(weight.numel() * density)) for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    masks = {name: random_mask(tuple(weight.shape), kept[name], generator) for name, weight in weights.items()}
    optimizer = adam_with_moments(weights, seed)
    for fraction in fractions:  # nothing is masked in between: what stands in inactive places must not matter
        old = {name: mask.flatten().numpy().copy() for name, mask in masks.items()}
        before = copy.deepcopy({name: (w.data, optimizer.state[w]) for name, w in weights.items()})
        rewire(weights, masks, kept, optimizer, fraction, method)
        for name, weight in weights.items():
            new_mask = masks[name].flatten().numpy()
            assert new_mask.sum() == kept[name]  # the count is conserved, layer by layer

            n_drop = int(fraction * kept[name])
            staying = largest(np.abs(before[name][0].flatten().numpy()), old[name], kept[name] - n_drop)
            active = set(np.flatnonzero(new_mask).tolist())
            assert staying <= active  # RigL and SET drop the same
            if method == "rigl":
                candidates = np.array([i not in staying for i in range(weight.numel())])
                assert active - staying == largest(weight.grad.abs().flatten().numpy(), candidates, n_drop)

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
    masks = {"w": torch.tensor([[True, True, False, False]])}
    optimizer = adam_with_moments(weights, 0)
    apply_masks(weights, masks)
    value, moments = weights["w"][0, 1].item(), optimizer.state[weights["w"]]["exp_avg"].clone()
    weights["w"].grad = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    rewire(weights, masks, {"w": 2}, optimizer, 0.5, "rigl")
    assert masks["w"].tolist() == [[True, True, False, False]]
    assert weights["w"][0, 1].item() == value != 0
    assert torch.equal(optimizer.state[weights["w"]]["exp_avg"], moments) and moments[0, 1] != 0
    weights["w"].grad = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    rewire(weights, masks, {"w": 2}, optimizer, 0.5, "rigl")
    assert masks["w"].tolist() == [[True, False, False, True]]


def test_set_grows_anywhere_with_the_same_chance():
    torch.manual_seed(0)
    weights = {"w": nn.Parameter(torch.linspace(1, 2, 40).view(5, 8))}
    optimizer = adam_with_moments(weights, 0)
    grown = np.zeros(40)
    for _ in range(1_000):
        masks = {"w": (torch.arange(40) % 4 == 3).view(5, 8)}  # 10 active; the largest weights are the last
        with torch.no_grad():
            weights["w"].copy_(torch.linspace(1, 2, 40).view(5, 8) * masks["w"])
        rewire(weights, masks, {"w": 10}, optimizer, 0.4, "set")
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
    mlps = MLP(3, 2, 1, True), MLP(3, 2, 1, True)
    online, target = (nn.Sequential(q.dense1, nn.ReLU(), q.dense2, nn.ReLU(), q.head).double() for q in mlps)
    for layer in (mlps[0].dense1, mlps[0].dense2):
        nn.init.uniform_(layer.bias, -0.1, 0.1)  # a unit without any input would stand on ReLU's kink
    weights = prunable(online)
    generator = torch.Generator().manual_seed(0)
    masks = {n: random_mask(tuple(w.shape), max(1, w.numel() // 5), generator) for n, w in weights.items()}
    apply_masks(weights, masks)
    observations = torch.randn(2, 16, 3, dtype=torch.float64)
    reward, discount = torch.randn(2, 16, dtype=torch.float64)
    batch = Batch(observations[0], torch.randint(2, (16,)), reward, discount, observations[1])
    td_loss(online, target, batch, False)[0].backward()
    for name, weight in weights.items():
        inactive = (~masks[name]).flatten().nonzero().flatten()
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
    masks = {name: random_mask(tuple(w.shape), w.numel() // 10, generator) for name, w in weights.items()}
    optimizer = torch.optim.Adam(online.parameters(), lr=0.01, fused=True)
    apply_masks(weights, masks)
    for step in range(1_000):
        optimizer.zero_grad()
        (online(torch.randn(8, 6)) - torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        assert any(weights[name][~mask].any() for name, mask in masks.items())  # Adam alone would revive them
        apply_masks(weights, masks)
        if step % 100 == 0:
            target.load_state_dict(online.state_dict())
        for name, mask in masks.items():
            assert not weights[name][~mask].any() and not target_weights[name][~mask].any()
    assert all(weights[name][mask].all() for name, mask in masks.items())


# The same inside of main()


@pytest.fixture
def watch(train, monkeypatch):
    """Runs main(); gives the masks, and every eighth row of the weights, after the start and after each update."""

    def watch(**flags) -> list[tuple[dict, dict]]:
        seen, online = [], []

        def watching(weights, masks):
            apply_masks(weights, masks)
            online[:] = online or [weights]  # the first call is for the online network
            if weights is online[0]:
                masks = {name: mask.bool() for name, mask in masks.items()}
                assert all(not weights[name][~mask].any() for name, mask in masks.items())
                some = {name: weight.detach()[::8].clone() for name, weight in weights.items()}
                seen.append((masks, some))

        monkeypatch.setattr(dqn_sparse, "apply_masks", watching)
        train(total_timesteps=900, **flags)  # 200 updates
        assert len(seen) == 201
        return seen

    return watch


def counts(masks: dict) -> dict:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def changed(before: dict, after: dict) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


def test_gradual_pruning_in_a_run(watch):
    seen = watch(method="gmp", sparsity=0.9)
    size = {"dense1.weight": 4 * 512, "dense2.weight": 512 * 512, "head.weight": 512 * 2}
    raw = (512 + 512) / size["dense2.weight"]  # the two small layers stay dense, so this one has all the zeros
    budget = sum(n - math.floor(0.9 * n) for n in size.values()) - size["dense1.weight"] - size["head.weight"]
    final = 1 - budget / (raw * size["dense2.weight"]) * raw
    moves = []
    for update in range(200):
        (before, _), (after, _) = seen[update], seen[update + 1]
        assert not any((after[name] & ~before[name]).any() for name in size)  # monotone
        if changed(before, after):
            moves.append(update)
            progress = (update - 40) / 120
            sparsity = final * (1 - (1 - progress) ** 3)
            assert counts(after)["dense2.weight"] == round(size["dense2.weight"] * (1 - sparsity))
    assert all(mask.all() for mask in seen[41][0].values())  # nothing before prune_start ...
    assert moves[0] > 40 and moves[-1] == 160  # ... and frozen after prune_end
    assert len(moves) >= 50
    assert counts(seen[-1][0]) == size | {"dense2.weight": round(size["dense2.weight"] * (1 - final))}


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_rewiring_in_a_run(watch, monkeypatch, method):
    fractions = []

    def watching(weights, masks, kept, optimizer, drop_fraction, grow):
        assert grow == method
        assert all(weight.grad.any() for weight in weights.values())
        fractions.append(drop_fraction)
        rewire(weights, masks, kept, optimizer, drop_fraction, grow)

    monkeypatch.setattr(dqn_sparse, "rewire", watching)
    seen = watch(method=method, sparsity=0.9)
    moves = []
    for update in range(200):
        (before, old), (after, new) = seen[update], seen[update + 1]
        assert counts(after) == counts(before)
        if changed(before, after):
            moves.append(update)
            for name in before:  # the weight update was replaced
                survivors = (before[name] & after[name])[::8]
                assert torch.equal(old[name][survivors], new[name][survivors])
        elif update < 100:
            assert changed(old, new)
    assert len(fractions) >= 50 and moves[0] <= 5 and 150 <= moves[-1] <= 160
    assert fractions[-1] == 0 and 0.29 < fractions[0] < 0.3 and fractions == sorted(fractions, reverse=True)


def test_a_random_mask_never_moves(watch):
    seen = watch(method="random", sparsity=0.9, distribution="uniform")
    assert counts(seen[0][0]) == {"dense1.weight": 205, "dense2.weight": 26214, "head.weight": 102}
    assert not any(changed(seen[0][0], masks) for masks, _ in seen)


def test_dense_has_no_masks(train, monkeypatch):
    applied = []
    monkeypatch.setattr(dqn_sparse, "apply_masks", lambda weights, masks: applied.append(dict(masks)))
    folder = train(method="dense")
    assert applied and not any(applied)
    model = torch.load(folder / "model.pt", weights_only=True)
    assert model["masks"] == {"q_network": {}}
    assert all(weight.all() for name, weight in model["networks"]["q_network"].items() if name.endswith("weight"))


def test_mlp_takes_bytes():
    network = dqn_sparse.MLP(6, 3, 1, True)
    x = torch.randint(0, 256, (4, 2, 3), dtype=torch.uint8)
    torch.testing.assert_close(network(x), network(x.float()))
