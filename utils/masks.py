"""Mask arithmetic: how many weights each layer keeps, which tensors hold them, and keeping the rest at zero.

Pure functions of shapes and tensors. *When* and *why* a mask changes stands in the scripts. While they train, a mask
has the dtype of its weight, ones and zeros: multiplying by a bool takes four to five times as long. Files hold bools.
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


def uniform_densities(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """The same density, 1 - `sparsity`, in every layer."""
    return dict.fromkeys(shapes, 1.0 - sparsity)


def erk_densities(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Erdos-Renyi-kernel densities: a layer's density is proportional to the sum of its dimensions over their product.

    Evci et al. 2020 (RigL), sec. 3, as implemented in google-research/rigl and jaxpruner. A scale epsilon makes the
    total come out at `sparsity`. Where epsilon asks a layer for more than it has, the layer stays dense, and the zeros
    that it cannot give are taken from the others.

    Args:
        shapes: the full shape of each prunable tensor, convolution kernels included.
        sparsity: share of all these weights that is zero, in [0, 1).

    Returns:
        Density in (0, 1] of each tensor, in the order given.
    """
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / size[name] for name, shape in shapes.items()}
    zeros = {name: math.floor(sparsity * size[name]) for name in shapes}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        rest = [name for name in shapes if name not in dense]
        kept = sum(size[name] - zeros[name] for name in rest) - sum(zeros[name] for name in dense)
        epsilon = kept / sum(raw[name] * size[name] for name in rest)
        largest = max(raw[name] for name in rest)
        if epsilon * largest <= 1.0:
            break
        dense |= {name for name in rest if raw[name] == largest}
    return {name: 1.0 if name in dense else epsilon * raw[name] for name in shapes}


def kept_count(size: int, density: float) -> int:
    """How many of `size` weights a layer of this density keeps: exact, and never none."""
    return max(1, round(size * density))


def random_mask(shape: tuple[int, ...], count: int, generator: torch.Generator) -> torch.Tensor:
    """A bool mask with exactly `count` ones at uniformly random places, the same on every device for one seed.

    Args:
        generator: a CPU generator.
    """
    mask = torch.zeros(math.prod(shape), dtype=torch.bool)
    mask[torch.randperm(mask.numel(), generator=generator)[:count]] = True
    return mask.view(shape)


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
    """Sets the masked weights to zero, in place. `masks` may be empty, or cover a part of `weights`."""
    if masks:
        torch._foreach_mul_([weights[name] for name in masks], list(masks.values()))


def sparsity_scalars(shapes: Shapes, kept: dict[str, int]) -> dict[str, float]:
    """The share of zeros in each layer and in all of them, by the names under which they are logged."""
    share = {f"sparsity/{name}": 1 - kept[name] / math.prod(shape) for name, shape in shapes.items()}
    return share | {"sparsity/global": 1 - sum(kept.values()) / sum(math.prod(shape) for shape in shapes.values())}


def mask_table(shapes: Shapes, kept: dict[str, int]) -> str:
    """A markdown table of the layers: shape, weights kept, density; and the totals.

    Args:
        kept: number of weights that each layer keeps at the end of training.
    """
    total, total_kept = sum(math.prod(shape) for shape in shapes.values()), sum(kept.values())
    rows = [("layer", "shape", "kept", "density")]
    for name, shape in shapes.items():
        rows.append((name, "x".join(map(str, shape)), f"{kept[name]:,}", f"{kept[name] / math.prod(shape):.4f}"))
    rows.append(("total", f"{total:,}", f"{total_kept:,}", f"{total_kept / total:.4f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"| {row[0]:<{widths[0]}} | {row[1]:<{widths[1]}} | {row[2]:>{widths[2]}} | {row[3]:>{widths[3]}} |"
        for row in rows
    ]
    rule = f"|{'-' * (widths[0] + 2)}|{'-' * (widths[1] + 2)}|{'-' * (widths[2] + 1)}:|{'-' * (widths[3] + 1)}:|"
    return "\n".join([lines[0], rule, *lines[1:]])
