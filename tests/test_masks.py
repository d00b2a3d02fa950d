"""Densities against published tables, masks against full sorts."""

import math

import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st

from dqn_sparse import Args, make_networks
from utils.masks import (
    active_count,
    apply_masks,
    erk_densities,
    keep_largest,
    layer_densities,
    mask_table,
    prunable,
    random_mask,
    sparsity_scalars,
)


def matches(value: float, printed: str, units: float = 0.5) -> bool:
    """Whether `value` rounds to what is printed: at most half a unit of its last digit away.

    0 and 1 stand for a layer that is exactly dense.
    """
    if float(printed) in (0.0, 1.0):
        return value == float(printed)
    decimals = len(printed.split(".")[1])
    return abs(value - float(printed)) <= units * 10**-decimals + 1e-9


def impala_shapes(width: int, outputs: int = 18) -> dict:
    with torch.device("meta"):
        network = make_networks(Args(width=width), Box(0, 255, (4, 84, 84)), Discrete(outputs))["q_network"]
    return {name: tuple(weight.shape) for name, weight in prunable(network).items()}


def nature_shapes(features: int, actions: int) -> dict:
    shapes = {"c1": (8, 8, 4, 32), "c2": (4, 4, 32, 64), "c3": (3, 3, 64, 64)}
    return shapes | {"dense": (features, 512), "q": (512, actions)}


# Sparsity of each tensor under JaxPruner's ERK, 18 actions: (width, sparsity) -> a value per row
IMPALA_ROWS = {
    "first conv": ["torso.convs.0"],
    "stack 0": [f"torso.blocks.0.{i}.conv{j}" for i in (0, 1) for j in (1, 2)],
    "second conv": ["torso.convs.1"],
    "stacks 1, 2": ["torso.convs.2"]
    + [f"torso.blocks.{k}.{i}.conv{j}" for k in (1, 2) for i in (0, 1) for j in (1, 2)],
    "dense": ["head.dense"],
    "head": ["head.out"],
}
IMPALA = {
    (1, 0.90): "0 .371 .553 .710 .916 0",
    (1, 0.95): ".181 .701 .787 .862 .960 0",
    (1, 0.99): ".837 .940 .958 .973 .992 .792",
    (3, 0.95): ".232 .888 .917 .945 .953 0",
    (5, 0.95): ".202 .926 .946 .964 .949 0",
}


@pytest.mark.parametrize(("width", "sparsity"), IMPALA)
def test_erk_of_the_impala_network(width, sparsity):
    densities = erk_densities(impala_shapes(width), sparsity)
    assert len(densities) == 17 == sum(map(len, IMPALA_ROWS.values()))
    for layers, printed in zip(IMPALA_ROWS.values(), IMPALA[width, sparsity].split()):
        for layer in layers:
            # .1805, .8875 and .9455, each a trifle below, stand in the table as .181, .888 and .946
            assert matches(1 - densities[f"{layer}.weight"], printed, units=0.54), layer


@pytest.mark.parametrize(("sparsity", "printed"), [(0.90, ".861"), (0.95, ".930"), (0.99, ".986")])
def test_erk_of_the_rainbow_head(sparsity, printed):
    shapes = impala_shapes(width=3, outputs=18 * 51)
    assert matches(1 - erk_densities(shapes, sparsity)["head.out.weight"], printed)


def test_erk_of_dopamines_nature_network():
    shapes = nature_shapes(7744, 18)
    sparsities = [1 - density for density in erk_densities(shapes, 0.95).values()]
    assert all(map(matches, sparsities, [".856", ".928", ".918", ".953", "0"]))


# Density of each layer and active weights under google-research/rigl's ERK, CleanRL's network, 18 actions
NATURE = {
    0.50: ("1 .6770 .7754 .4846 1", 846_336),
    0.80: (".5308 .2654 .3040 .1900 1", 338_537),
    0.90: (".2580 .1290 .1477 .0923 1", 169_270),
    0.95: (".1216 .0608 .0696 .0435 1", 84_636),
    0.98: (".0481 .0240 .0275 .0172 .4358", 33_856),
    0.99: (".0241 .0120 .0138 .0086 .2179", 16_929),
}


def total_matches(shapes: dict, densities: dict, printed: int) -> bool:
    """The exact total is a whole number, printed cut off or rounded; layer by layer, counts are rounded once more."""
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    exact = sum(densities[name] * size[name] for name in shapes)
    kept = sum(active_count(size[name], densities[name]) for name in shapes)
    return abs(exact - printed) <= 1 + 1e-6 and abs(kept - exact) <= len(shapes) / 2


@pytest.mark.parametrize("sparsity", NATURE)
def test_erk_of_cleanrls_nature_network(sparsity):
    printed, total = NATURE[sparsity]
    shapes = nature_shapes(3136, 18)
    densities = erk_densities(shapes, sparsity)
    assert all(map(matches, densities.values(), printed.split()))
    assert total_matches(shapes, densities, total)


def test_erk_depends_on_the_number_of_actions():
    assert all(erk_densities(nature_shapes(3136, 6), sparsity)["q"] == 1 for sparsity in (0.5, 0.8, 0.9, 0.95, 0.98))
    assert matches(erk_densities(nature_shapes(3136, 6), 0.99)["q"], ".638")


def test_erk_with_same_padding_keeps_more_weights():
    shapes = nature_shapes(7744, 18)
    densities = erk_densities(shapes, 0.95)
    assert all(map(matches, densities.values(), [".1436", ".0718", ".0823", ".0471", "1"]))
    assert total_matches(shapes, densities, 202_601)


@pytest.mark.parametrize(
    ("sparsity", "printed"), [(0.90, ".0910 .1103 1"), (0.95, ".0448 .0543 1"), (0.99, ".0078 .0095 1")]
)
def test_erk_of_a_critic(sparsity, printed):
    densities = erk_densities({"fc1": (393, 256), "fc2": (256, 256), "q": (256, 1)}, sparsity)
    assert all(map(matches, densities.values(), printed.split()))


def simba_leaves(inputs: int, hidden: int, blocks: int, heads: dict) -> dict:
    """Every tensor of a SimBa network, biases and LayerNorms too: the pool of the published code."""
    shapes = {"in": (inputs, hidden), "in.bias": (hidden,), "norm.scale": (hidden,), "norm.bias": (hidden,)}
    for k in range(blocks):
        shapes |= {f"fc1.{k}": (hidden, 4 * hidden), f"fc1.{k}.bias": (4 * hidden,)}
        shapes |= {f"fc2.{k}": (4 * hidden, hidden), f"fc2.{k}.bias": (hidden,)}
        shapes |= {f"norm.{k}.scale": (hidden,), f"norm.{k}.bias": (hidden,)}
    for name, outputs in heads.items():
        shapes |= {name: (hidden, outputs), f"{name}.bias": (outputs,)}
    return shapes


SIMBA = [
    ("actor", 128, 0.50, "1 0.442 1", 73_174),
    ("actor", 128, 0.80, "0.359 0.154 0.874", 29_277),
    ("actor", 128, 0.90, "0.171 0.073 0.416", 14_640),
    ("actor", 128, 0.95, "0.077 0.033 0.188", 7_324),
    ("critic", 512, 0.50, "1 0.494 1", 2_124_289),
    ("critic", 512, 0.80, "1 0.190 1", 849_727),
    ("critic", 512, 0.90, "0.511 0.0936 1", 424_869),
    ("critic", 512, 0.95, "0.250 0.0458 1", 212_435),
    ("actor", 640, 0.80, "1 0.181 1", 670_602),
    ("actor", 640, 0.90, "0.701 0.083 1", 335_302),
    ("critic", 2560, 0.80, "1 0.198 1", 21_025_793),
    ("critic", 2560, 0.90, "1 0.0977 1", 10_512_896),
]


@pytest.mark.parametrize(("net", "hidden", "sparsity", "printed", "total"), SIMBA)
def test_erk_of_simba_with_all_leaves(net, hidden, sparsity, printed, total):
    if net == "actor":
        shapes = simba_leaves(67, hidden, 1, {"head": 21, "log_std": 21})
        rows = [["in"], ["fc1.0", "fc2.0"], ["head", "log_std"]]
    else:
        shapes = simba_leaves(67 + 21, hidden, 2, {"head": 1})
        rows = [["in"], ["fc1.0", "fc2.0", "fc1.1", "fc2.1"], ["head"]]
    densities = erk_densities(shapes, sparsity)
    for names, value in zip(rows, printed.split()):
        assert all(matches(densities[name], value) for name in names), names
    assert all(densities[name] == 1 for name, shape in shapes.items() if len(shape) == 1)
    assert total_matches(shapes, densities, total)


some_shapes = st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=4).map(tuple), min_size=1, max_size=8)


@given(some_shapes, st.floats(0, 0.999))
def test_erk_fills_layers_like_water(shapes, sparsity):
    """The same answer by bisection: density = min(1, epsilon * raw), with epsilon such that the budget is spent."""
    size = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / n for shape, n in zip(shapes, size)]
    budget = sum(n - math.floor(sparsity * n) for n in size)
    low, high = 0.0, 1 / min(raw)
    for _ in range(200):
        epsilon = (low + high) / 2
        spent = sum(min(1.0, epsilon * r) * n for r, n in zip(raw, size))
        low, high = (epsilon, high) if spent < budget else (low, epsilon)
    densities = erk_densities({str(i): shape for i, shape in enumerate(shapes)}, sparsity)
    assert list(densities.values()) == pytest.approx([min(1.0, high * r) for r in raw], rel=1e-9)


def test_distributions():
    weights = {"a": torch.zeros(3, 3, 4, 8), "b": torch.zeros(100, 50)}
    assert layer_densities(weights, 0.75, "uniform") == {"a": 0.25, "b": 0.25}
    assert layer_densities(weights, 0.0, "erk") == layer_densities(weights, 0.0, "uniform") == {"a": 1.0, "b": 1.0}
    assert layer_densities(weights, 0.75, "erk") == erk_densities({"a": (3, 3, 4, 8), "b": (100, 50)}, 0.75)


@pytest.mark.parametrize(
    ("size", "density", "count"),
    [(1000, 0.1, 100), (1000, 0.0504, 50), (1000, 0.0506, 51), (10, 0.01, 1), (7, 1.0, 7), (1, 1e-9, 1)],
)
def test_active_count(size, density, count):
    assert active_count(size, density) == count


@given(st.integers(1, 300), st.data())
def test_random_mask_is_exact_and_seeded(size, data):
    count, seed = data.draw(st.integers(0, 2 * size)), data.draw(st.integers(0, 100))
    weight = torch.randn(size, 2)
    mask = random_mask(weight, count, torch.Generator().manual_seed(seed))
    assert mask.dtype == weight.dtype and mask.shape == (size, 2)
    assert mask.sum() == count and set(mask.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(mask, random_mask(weight, count, torch.Generator().manual_seed(seed)))


def test_random_mask_is_uniform():
    generator, weight = torch.Generator().manual_seed(0), torch.zeros(5, 4)
    draws = sum(random_mask(weight, 5, generator) for _ in range(4_000)).double()
    # 20 places, each taken with probability 1/4; the counts of one draw are negatively correlated by 1/19
    chi2 = (((draws - 1_000) ** 2).sum() / (4_000 * 0.25 * 0.75 * 20 / 19)).item()
    assert chi2 < 43.8  # 99.9 % of the distribution with 19 degrees of freedom
    weight = torch.zeros(50, 4)
    assert not torch.equal(random_mask(weight, 99, generator), random_mask(weight, 99, generator))


def test_a_mask_has_its_weights_memory_format():
    weight = torch.zeros(8, 4, 3, 3).to(memory_format=torch.channels_last)
    assert random_mask(weight, 9, torch.Generator()).is_contiguous(memory_format=torch.channels_last)


scores = st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 0.5000001, 2.0]), min_size=1, max_size=60)


@settings(max_examples=300)
@given(scores, st.data())
def test_keep_largest_is_a_stable_sort(values, data):
    count = data.draw(st.integers(0, len(values)))
    order = sorted(range(len(values)), key=lambda i: -values[i])  # Python's sort is stable
    expected = [i in order[:count] for i in range(len(values))]
    mask = keep_largest(torch.tensor(values), count)
    assert mask.dtype == torch.bool and mask.tolist() == expected
    folded = torch.tensor(values * 2).view(2, -1)
    assert torch.equal(keep_largest(folded, count), keep_largest(folded.flatten(), count).view(2, -1))


def test_prunable_leaves_out_biases_and_norms():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.LayerNorm(5), torch.nn.Linear(5, 1))
    assert list(prunable(network)) == ["0.weight", "2.weight"]


def test_apply_masks_is_in_place_and_may_cover_a_part():
    weights = {"a": torch.nn.Parameter(torch.tensor([[1.0, -2.0]])), "b": torch.nn.Parameter(torch.ones(2, 2))}
    before = {name: weight.data_ptr() for name, weight in weights.items()}
    apply_masks(weights, {})
    assert weights["a"].tolist() == [[1.0, -2.0]]
    apply_masks(weights, {"a": torch.tensor([[True, False]])})
    assert weights["a"].tolist() == [[1.0, 0.0]] and weights["b"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert {name: weight.data_ptr() for name, weight in weights.items()} == before


def test_mask_table_adds_up():
    weights = {"conv": torch.zeros(32, 4, 8, 8), "head": torch.zeros(6, 512)}
    rows = mask_table(weights, {"conv": 1_218 / 8_192, "head": 1.0}).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert len({len(row) for row in rows}) == 1  # aligned
    assert cells[2:] == [
        ["conv", "32x4x8x8", "1,218", "0.1487"],
        ["head", "6x512", "3,072", "1.0000"],
        ["total", "11,264", "4,290", "0.3809"],
    ]


def test_counts_beyond_what_float32_can_count():
    weight = torch.zeros(2**24 + 3)
    assert sparsity_scalars({"a": weight}, {"a": torch.ones_like(weight)}) == {"sparsity/a": 0, "sparsity/global": 0}


def test_logged_sparsity_is_the_fraction_of_zeros():
    weights = {"a": torch.zeros(2, 3, 4), "b": torch.zeros(8, 2)}
    mask = torch.zeros(2, 3, 4)
    mask[0, 0] = mask[1, 2, :2] = 1
    scalars = sparsity_scalars(weights, {"a": mask})
    assert scalars == {"sparsity/a": 0.75, "sparsity/b": 0.0, "sparsity/global": pytest.approx(18 / 40)}
