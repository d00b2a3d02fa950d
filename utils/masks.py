"""Mask arithmetic: how many weights are active in each layer, which ones, and keeping the others at zero.

Pure functions of shapes and tensors; *when* and *why* a mask changes is in the scripts. During training a mask has the
dtype of its weight: multiplying by a bool tensor takes four to five times as long. Files hold bools.
"""

import math

import torch
from torch import nn

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, torch.Tensor]


def prunable(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that sparsity counts: all with two or more dimensions, first layer and head included.

    Biases and normalisation parameters (one dimension) are never pruned, as in google-research/jaxpruner.
    """
    return {name: parameter for name, parameter in network.named_parameters() if parameter.ndim >= 2}


def erk_densities(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Erdos-Renyi-kernel densities: a layer's density is proportional to the sum of its dimensions over their product.

    Evci et al. 2020 (RigL), sec. 3, as implemented in google-research/rigl and jaxpruner. A scale epsilon makes the
    total come out at `sparsity`. Where epsilon asks a layer for more than it has, the layer stays dense, and the zeros
    that it cannot give are taken from the others.

    Args:
        shapes: the full shape of each prunable tensor, convolution kernels included.
        sparsity: fraction of all these weights that is zero, in [0, 1).

    Returns:
        Density in (0, 1] of each tensor, in the order given.
    """
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / size[name] for name, shape in shapes.items()}
    zeros = {name: math.floor(sparsity * size[name]) for name in shapes}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        rest = [name for name in shapes if name not in dense]
        active = sum(size[name] - zeros[name] for name in rest) - sum(zeros[name] for name in dense)
        epsilon = active / sum(raw[name] * size[name] for name in rest)
        largest = max(raw[name] for name in rest)
        if epsilon * largest < 1 - 1e-9:  # a rounding error below 1 is dense, too
            break
        dense |= {name for name in rest if raw[name] == largest}
    return {name: 1.0 if name in dense else epsilon * raw[name] for name in shapes}


def layer_densities(weights: Tensors, sparsity: float, distribution: str) -> dict[str, float]:
    """Density in (0, 1] of each weight, so that `sparsity` of all of them are zero.

    Args:
        distribution: "erk" for Erdos-Renyi-kernel densities, "uniform" for 1 - `sparsity` in every layer.
    """
    if distribution == "uniform":
        return dict.fromkeys(weights, 1.0 - sparsity)
    return erk_densities({name: tuple(weight.shape) for name, weight in weights.items()}, sparsity)


def active_count(size: int, density: float) -> int:
    """Number of active weights in a layer of `size` weights: exact, and never zero."""
    return max(1, round(size * density))


def random_mask(weight: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """A mask like `weight` with exactly `count` ones at uniformly random places, the same on every device for one seed.

    Args:
        generator: a CPU generator.
    """
    mask = torch.zeros(weight.numel())
    mask[torch.randperm(mask.numel(), generator=generator)[:count]] = 1
    return torch.zeros_like(weight).copy_(mask.view(weight.shape))  # in the weight's memory format


def keep_largest(score: torch.Tensor, count: int) -> torch.Tensor:
    """A bool mask over the `count` largest entries of `score`: exactly `count`, ties go to the lower flat index.

    Runs without a host synchronisation.
    """
    flat = score.flatten()
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = flat.topk(count, sorted=False).values.min()
    above, ties = flat > threshold, flat == threshold
    room = count - above.sum()
    return (above | (ties & (ties.cumsum(0) <= room))).view(score.shape)


@torch.no_grad()
def apply_masks(weights: Tensors, masks: Tensors) -> None:
    """Sets the masked weights to zero, in place. `masks` may be empty, or cover only some of `weights`."""
    if masks:
        torch._foreach_mul_([weights[name] for name in masks], list(masks.values()))


def sparsity_scalars(weights: Tensors, masks: Tensors) -> dict[str, float]:
    """The fraction of zeros among all weights, and in each layer, by the names under which they are logged."""
    active = {
        name: int(masks[name].count_nonzero()) if name in masks else weight.numel() for name, weight in weights.items()
    }
    total = sum(weight.numel() for weight in weights.values())
    layers = {f"sparsity/{name}": 1 - active[name] / weight.numel() for name, weight in weights.items()}
    return {"sparsity/global": 1 - sum(active.values()) / total} | layers


def mask_table(weights: Tensors, densities: dict[str, float]) -> str:
    """A markdown table of the layers: shape, active weights at the end of training, density; and the totals."""
    active = {name: active_count(weight.numel(), densities[name]) for name, weight in weights.items()}
    total, total_active = sum(weight.numel() for weight in weights.values()), sum(active.values())
    rows = [("layer", "shape", "active", "density")]
    for name, weight in weights.items():
        shape = "x".join(map(str, weight.shape))
        rows.append((name, shape, f"{active[name]:,}", f"{active[name] / weight.numel():.4f}"))
    rows.append(("total", f"{total:,}", f"{total_active:,}", f"{total_active / total:.4f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"| {row[0]:<{widths[0]}} | {row[1]:<{widths[1]}} | {row[2]:>{widths[2]}} | {row[3]:>{widths[3]}} |"
        for row in rows
    ]
    rule = f"|{'-' * (widths[0] + 2)}|{'-' * (widths[1] + 2)}|{'-' * (widths[2] + 1)}:|{'-' * (widths[3] + 1)}:|"
    return "\n".join([lines[0], rule, *lines[1:]])
