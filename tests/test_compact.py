"""Compact networks compute what the original ones do: random networks with random masks, those of every script; and
what is removed is what paths through the network, or a calculation by hand, say."""

import copy
import dataclasses
import importlib

import pytest
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Discrete
from torch import nn

from utils.analysis.compact import SparseLinear, compact, use_csr

ACTIVATIONS = [F.relu, F.leaky_relu, torch.tanh, torch.sigmoid, F.softplus, lambda x: x]


@torch.no_grad()
def randomise(network: nn.Module, sparsity: float) -> None:
    """A random mask on every weight, and random biases, of which some are zero."""
    for parameter in network.parameters():
        if parameter.ndim < 2:
            parameter.normal_()
        parameter[torch.rand(parameter.shape) < (sparsity if parameter.ndim > 1 else 0.2)] = 0


def pick(options):
    return options[int(torch.randint(len(options), ()))]


class Residual(nn.Module):
    """y = f(x) + layers(f(x)), as a sum of linear layers or of convolutions; perhaps normalised, perhaps a product."""

    def __init__(self, size: int, conv: bool, bias: bool) -> None:
        super().__init__()
        hidden = pick([1, 3, 8])
        if conv:
            kernel, padding = pick([(1, 0), (3, 1)])
            self.inner = nn.Conv2d(size, hidden, kernel, padding=padding, bias=bias)
            self.outer = nn.Conv2d(hidden, size, kernel, padding=padding, bias=bias)
            self.norm = nn.Identity()
        else:
            self.inner, self.outer = nn.Linear(size, hidden, bias=bias), nn.Linear(hidden, size, bias=bias)
            self.norm = pick([nn.Identity(), nn.Identity(), nn.LayerNorm(size)])
        self.f, self.g, self.product = pick(ACTIVATIONS), pick(ACTIVATIONS), pick([False, False, True])

    def forward(self, x):
        x = self.f(x)
        y = self.outer(self.g(self.inner(self.norm(x))))
        return x * y if self.product else x + y


class Lambda(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def random_network(seed: int) -> tuple[nn.Module, torch.Tensor]:
    """Convolutions or none, then linear layers; every size, padding, pooling, bias and activation at random."""
    torch.manual_seed(seed)
    layers, bias = [], pick([True, True, False])
    x = torch.randn(3, 2, 32, 32)
    if pick([True, False]):
        for _ in range(pick([1, 2, 3])):
            channels = pick([1, 6, 12])
            layers += [nn.Conv2d(x.shape[1], channels, pick([1, 3]), pick([1, 2]), pick([0, 1]), bias=bias)]
            layers += pick([[], [Residual(channels, True, bias)]])
            layers += [Lambda(pick(ACTIVATIONS))]
            layers += pick([[], [nn.MaxPool2d(3, 2, 1)], [Lambda(lambda x: F.pad(x, (1, 2, 1, 2)))], [nn.AvgPool2d(1)]])
            with torch.no_grad():
                x = nn.Sequential(*layers)(torch.randn(3, 2, 32, 32))
    layers += [nn.Flatten()]
    size = x[0].numel()
    for _ in range(pick([1, 2, 3])):
        hidden = pick([1, 8, 30])
        layers += [nn.Linear(size, hidden, bias=bias), Lambda(pick(ACTIVATIONS))]
        layers += pick([[], [Residual(hidden, False, bias)], [nn.LayerNorm(hidden)]])
        size = hidden
    network = nn.Sequential(*layers, nn.Linear(size, 3, bias=bias))
    randomise(network, pick([0.8, 0.95, 0.99, 1.0]))
    return network.double().eval(), torch.randn(3, 2, 32, 32, dtype=torch.float64)


def numel(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def made_compact(network: nn.Module, *example: torch.Tensor) -> nn.Module:
    """A compact copy; it computes the same for other inputs of other batch sizes, small ones and large ones."""
    small = copy.deepcopy(network)
    compact(small, example)
    dtype, tolerance = example[0].dtype, 1e-9 if example[0].dtype == torch.float64 else 1e-4
    for n, scale in ((5, 1.0), (1, 30.0)):
        x = scale * torch.randn(n, *example[0].shape[1:], dtype=dtype)
        others = [torch.rand(n, *each.shape[1:], dtype=each.dtype) for each in example[1:]]
        expected = network(x, *others)
        torch.testing.assert_close(small(x, *others), expected, rtol=tolerance, atol=tolerance * scale)
    return small


@pytest.mark.parametrize("seed", range(10))
def test_a_random_network_computes_the_same(seed):
    network, x = random_network(seed)
    made_compact(network, x)


def test_random_networks_are_made_smaller():
    """Else the test above would show little."""
    smaller = 0
    for seed in range(8):
        network, x = random_network(seed)
        smaller += any(after < before for _, before, after in compact(network, (x,)))
    assert smaller >= 4


VECTOR, IMAGE = Box(-1, 1, (5,)), Box(0, 255, (4, 84, 84))
NETWORKS = [
    ("dqn_sparse", VECTOR, {}),
    ("dqn_sparse", Box(0, 1, (4, 10, 10)), {"bias": False}),
    ("dqn_sparse", IMAGE, {"network": "nature"}),
    ("dqn_sparse", IMAGE, {"network": "impala"}),
    ("rainbow_pruned", VECTOR, {"noisy": True, "dueling": True}),
    ("rainbow_pruned", VECTOR, {"bias": False}),
    ("iqn_pruned", VECTOR, {}),
    ("iqn_pruned", Box(0, 1, (4, 10, 10)), {"bias": False}),
    ("cql_pruned", VECTOR, {"loss": "c51"}),
    ("cql_pruned", VECTOR, {}),
    ("sac_sparse", VECTOR, {"num_critics": 1}),
    ("sac_sparse", VECTOR, {"num_critics": 1, "network": "mlp", "algorithm": "ddpg"}),
    ("drq_sparse", Box(0, 255, (9, 40, 40)), {}),
    ("stream_sparse", VECTOR, {"env_id": "CartPole-v1"}),
    ("stream_sparse", VECTOR, {"env_id": "CartPole-v1", "algorithm": "q"}),
]


@pytest.mark.parametrize(("script", "space", "flags"), NETWORKS, ids=str)
def test_the_policies_of_every_script(script, space, flags):
    torch.manual_seed(1)
    script = importlib.import_module(script)
    args = dataclasses.replace(script.Args(), **flags)
    action_space = Discrete(3) if hasattr(args, "eval_epsilon") and flags.get("algorithm") != "ac" else Box(-1, 1, (2,))
    networks = script.make_networks(args, space, action_space)
    for network in networks.values():
        randomise(network, 0.97)
        network.eval()
    greedy = script.make_greedy(args, networks)
    example = [torch.rand(2, *space.shape)]
    example += [torch.zeros(2)] * (script.__name__ == "stream_sparse")
    small = made_compact(greedy, *example)
    if script.__name__ == "stream_sparse":
        assert numel(small) == numel(greedy)  # every unit is under a LayerNorm
    else:
        assert numel(small) < 0.98 * numel(greedy)


def test_units_that_stay_are_those_on_a_path_from_the_input_to_the_output():
    """Without biases; counted by products of the masks."""
    torch.manual_seed(0)
    a, b, c = (nn.Linear(i, o, bias=False).double() for i, o in ((4, 60), (60, 50), (50, 2)))
    network = nn.Sequential(a, nn.ReLU(), b, nn.Tanh(), c)
    randomise(network, 0.95)
    small = made_compact(network, torch.randn(2, 4, dtype=torch.float64))
    masks = [(layer.weight != 0).double() for layer in (a, b, c)]
    reached = [masks[0].sum(1) > 0, masks[1] @ masks[0].sum(1) > 0]
    read = [masks[2].sum(0) @ masks[1] > 0, masks[2].sum(0) > 0]
    hidden = [int((there & back).sum()) for there, back in zip(reached, read)]
    assert [(each.in_features, each.out_features) for each in small[::2]] == [
        (4, hidden[0]),
        (hidden[0], hidden[1]),
        (hidden[1], 2),
    ]
    assert 0 < hidden[0] < 60 and 0 < hidden[1] < 50


def test_a_constant_unit_moves_into_the_next_bias():
    network = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        network[0].weight[1] = 0
    small = made_compact(network, torch.zeros(2, 2, dtype=torch.float64))
    assert small[0].out_features == 2
    constant = network[2].weight[0, 1] * network[0].bias[1].sigmoid()
    torch.testing.assert_close(small[2].bias, network[2].bias + constant)


@pytest.mark.parametrize(("padding", "activation", "stay"), [(0, nn.Sigmoid, 1), (1, nn.Sigmoid, 2), (1, nn.ReLU, 1)])
def test_a_constant_channel_stays_before_a_padding_unless_it_is_zero(padding, activation, stay):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), activation(), nn.Conv2d(2, 2, 3, padding=padding)).double()
    with torch.no_grad():
        network[0].weight[1], network[0].bias[1] = 0, -1
    assert made_compact(network, torch.zeros(2, 1, 8, 8, dtype=torch.float64))[0].out_channels == stay


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)) + self.second(x))


def test_a_unit_goes_only_if_the_sum_that_it_feeds_allows_it():
    network = Sum().double()
    with torch.no_grad():
        network.first.weight[:2] = 0  # two are constant, but only one of these is so in the other summand too
        network.second.weight[1:3] = 0
        network.last.weight[0, 3] = 0  # and one sum is not read
    small = made_compact(network, torch.zeros(2, 2, dtype=torch.float64))
    assert small.first.out_features == small.second.out_features == small.last.in_features == 2


class SumReadElsewhere(Sum):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        second = self.second(x)
        elsewhere = second.cumsum(1)[:, -1:]
        return self.last(torch.tanh(self.first(x)) + second) + elsewhere


def test_a_unit_stays_in_a_sum_if_what_is_not_understood_reads_its_other_summand():
    network = SumReadElsewhere().double()
    with torch.no_grad():
        network.last.weight[0, 3] = 0
    assert numel(made_compact(network, torch.zeros(2, 2, dtype=torch.float64))) == numel(network)


def test_a_channel_that_is_read_after_flattening_stays_if_any_place_of_it_is_read():
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4, 2)).double()
    with torch.no_grad():
        network[3].weight[:, :4] = 0  # nobody reads the first channel
        network[3].weight[:, 4:7] = 0  # one place of the second is read
    small = made_compact(network, torch.zeros(2, 1, 4, 4, dtype=torch.float64))
    assert small[0].out_channels == 2 and small[3].in_features == 8


class Untouched(nn.Module):
    """What has no rule: a layer that is called twice, shared weights, a slice, a sum over units, groups."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.shared, self.other = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.shared.weight
        self.sliced, self.last = nn.Linear(6, 6), nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(torch.relu(self.twice(x)))
        x = self.other(self.scale * self.shared(x))
        x = self.sliced(x).cumsum(1)
        return self.last(x[:, 2:5]) + x.sum(1, keepdim=True)


def test_what_is_not_understood_stays_as_it_is():
    network = Untouched().double()
    for seed in range(5):
        torch.manual_seed(seed)
        randomise(network, 0.8)
        assert numel(made_compact(network, torch.zeros(2, 6, dtype=torch.float64))) == numel(network)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) if x.sum() > 0 else -self.layers(x)


def test_a_network_that_cannot_be_traced_is_as_it_was():
    network = Branch()
    randomise(network, 0.9)
    with pytest.raises(ValueError, match="cannot trace"):
        compact(network, (torch.ones(2, 2),))
    assert network.layers[0].out_features == 8


@pytest.mark.parametrize("bias", [True, False])
def test_csr_layers_compute_the_same(bias):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(30, 40, bias=bias), nn.ReLU(), nn.Linear(40, 3, bias=bias))
    randomise(network[0], 0.9)
    sparse = copy.deepcopy(network)
    assert use_csr(sparse, (torch.randn(2, 30),), always=True) == ["0"]
    assert isinstance(sparse[0], SparseLinear) and copy.deepcopy(sparse)[0].weight.values().numel() == int(
        (network[0].weight != 0).sum()
    )
    for n in (1, 2, 50):
        x = torch.randn(n, 30)
        torch.testing.assert_close(sparse(x), network(x))


def test_csr_layers_are_used_where_they_are_faster():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 4))
    randomise(network[0], 0.999)
    randomise(network[2], 0.01)
    assert use_csr(network, (torch.randn(32, 2048),), always=False) == ["0"]
