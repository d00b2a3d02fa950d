"""What happens inside a network: dormant units, rank and norm of features, interference, use of the weights.

Plain functions of tensors and modules, for a notebook or a script. None changes what it measures.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.overrides import TorchFunctionMode

TAUS = (0.0, 0.025, 0.1)  # the thresholds of Sokar et al. (2023)


class _Relus(TorchFunctionMode):
    """Keeps the output of each ReLU under the name of the layer that ran last, and which took just its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.output = "input", None
        self.found: dict[str, torch.Tensor] = {}
        self.direct: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        is_direct = bool(args) and args[0] is self.output
        output = function(*args, **(kwargs or {}))
        if function in (F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_):
            self.found[self.layer] = output.clone()
            self.direct |= {self.layer} if is_direct else set()
        return output


@torch.no_grad()
def _record(network: nn.Module, *inputs: torch.Tensor) -> _Relus:
    relus, hooks = _Relus(), []

    def remember(name: str, output: torch.Tensor) -> None:
        relus.layer, relus.output = name, output

    for name, module in network.named_modules():
        if any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False)):
            hooks.append(module.register_forward_hook(lambda _, __, output, name=name: remember(name, output)))
    try:
        with relus:
            network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return relus


def relu_activations(network: nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output of every ReLU in `network(*inputs)`, by the name of the layer before it.

    A layer is a module with a parameter of two or more dimensions. In a ResNet the ReLU before a block is under the
    name of the layer that last added to its input. A ReLU on the network's input is called "input".

    Returns:
        Tensors (B, units) or (B, channels, height, width), in the order of the forward pass.
    """
    return _record(network, *inputs).found


def unit_scores(activation: torch.Tensor) -> torch.Tensor:
    """Mean |activation| of each unit over its layer's mean (Sokar et al. 2023, eq. 1): scores that average 1.

    Args:
        activation: after the ReLU, (B, units), or (B, channels, height, width), where a unit is a channel.

    Returns:
        (units,). As in Dopamine, 1e-9 is added to the layer's mean.
    """
    means = activation.abs().flatten(2).mean((0, 2)) if activation.ndim > 2 else activation.abs().mean(0)
    return means / (means.mean() + 1e-9)


def has_inputs(mask: torch.Tensor) -> torch.Tensor:
    """Which units (units,) of a layer have an incoming weight; `mask` is that of an nn.Linear or nn.Conv2d."""
    return mask.flatten(1).any(1)


def dormant_ratios(activation: torch.Tensor, connected: torch.Tensor | None = None) -> dict[str, float]:
    """Share of units whose score is at most tau, for tau 0, 0.025 and 0.1, as "dormant_<tau>"; and "unconnected".

    Args:
        activation: as in `unit_scores`.
        connected: (units,) from `has_inputs`. The other units only ever show their bias: they count in neither the
            layer's mean nor the ratios, and their share of all units is "unconnected".
    """
    units = activation.shape[1]
    connected = torch.ones(units, dtype=torch.bool) if connected is None else connected.to(activation.device)
    scores = unit_scores(activation[:, connected]) if connected.any() else torch.zeros(0)
    ratios = {f"dormant_{tau:g}": (scores <= tau).float().mean().item() for tau in TAUS} if len(scores) else {}
    return ratios | {"unconnected": 1 - connected.float().mean().item()}


def srank(features: torch.Tensor, delta: float = 0.01) -> int:
    """Effective rank (Kumar et al. 2021): the least k whose k largest singular values make up 1 - delta of their sum.

    Args:
        features: (B, units). The rank is at most the smaller of the two: choose B larger than the ranks to compare.
    """
    values = torch.linalg.svdvals(features.double())
    share = values.cumsum(0) / values.sum()
    return 0 if values.sum() == 0 else int((share < 1 - delta - 1e-12).sum()) + 1


def stable_rank(features: torch.Tensor) -> float:
    """Squared Frobenius norm over the squared largest singular value of `features` (B, units); 0 of a zero matrix."""
    values = torch.linalg.svdvals(features.double())
    return (values.square().sum() / values[0].square()).item() if values[0] > 0 else 0.0


def feature_norm(features: torch.Tensor) -> float:
    """Mean L2 norm of the rows of `features` (B, units)."""
    return features.norm(dim=1).mean().item()


def weight_norms(network: nn.Module) -> dict[str, float]:
    """L2 norm of each parameter, and of all together as "total"; biases and normalisations included."""
    norms = {name: parameter.detach().norm().item() for name, parameter in network.named_parameters()}
    return norms | {"total": math.sqrt(sum(norm**2 for norm in norms.values()))}


def gradient_cosines(network: nn.Module, loss: Callable, batch: Sequence[torch.Tensor], chunk: int = 8) -> torch.Tensor:
    """Cosines of the angles between the gradients of single samples (Lyle et al. 2023): far from 0 off the diagonal is
    interference.

    Memory is bounded by 2 x `chunk` gradients of the whole network; they are computed anew for each pair of chunks.

    Args:
        network: without randomness in its forward pass.
        loss: `loss(forward, *sample)` to a scalar, where `forward` stands for the network, and `sample` for the parts
            of `batch` with a batch dimension of 1.
        batch: tensors (B, ...).
        chunk: samples whose gradients are held at once.

    Returns:
        (B, B), symmetric, 1 on the diagonal; 0 where a gradient is 0.
    """
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    buffers = dict(network.named_buffers())

    def sample_loss(parameters, *sample):
        forward = lambda *inputs: functional_call(network, (parameters, buffers), inputs)  # noqa: E731
        return loss(forward, *(part[None] for part in sample))

    def gradients(first: int) -> torch.Tensor:  # (samples of the chunk, parameters), each row of length 1
        part = [tensor[first : first + chunk] for tensor in batch]
        found = vmap(grad(sample_loss), in_dims=(None, *[0] * len(part)))(parameters, *part)
        return F.normalize(torch.cat([gradient.flatten(1) for gradient in found.values()], 1))

    firsts = range(0, len(batch[0]), chunk)
    cosines = torch.zeros(len(batch[0]), len(batch[0]))
    for i in firsts:
        rows = gradients(i)
        for j in range(i, len(batch[0]), chunk):
            block = (rows @ (rows if i == j else gradients(j)).T).cpu()
            cosines[i : i + chunk, j : j + chunk] = block
            cosines[j : j + chunk, i : i + chunk] = block.T
    return cosines


def ever_active(ever: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> float:
    """Adds the masks to `ever`, which begins as {}, and returns the share of weights that some mask has let live.

    The exploration rate of Liu et al. (2021), Do we actually need dense over-parameterization? ("ITOP").
    """
    for name, mask in masks.items():
        ever[name] = ever[name] | mask if name in ever else mask.clone()
    total = sum(mask.numel() for mask in ever.values())
    return sum(int(mask.sum()) for mask in ever.values()) / total if total else 1.0


def target_variance(reward: torch.Tensor, discount: torch.Tensor, next_value: torch.Tensor) -> float:
    """Variance over a batch of the targets reward + discount x next_value, each (B,). The papers do not say theirs."""
    return (reward + discount * next_value).var(correction=0).item()


def report(network: nn.Module, observation: torch.Tensor, masks: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scalars to log of a value network: each layer's dormancy, rank and norm of the last features, weight norm.

    Args:
        observation: (B, ...), a sample of the replay that is larger than a mini-batch; 256 in the papers' code.
        masks: those of the network's weights by their names; may be empty. Units are looked through for a missing input
            only where the ReLU takes just its layer's output, not where a residual connection adds to it.
    """
    relus = _record(network, observation)
    scalars = {}
    for layer, activation in relus.found.items():
        mask = masks.get(f"{layer}.weight") if layer in relus.direct else None
        for name, value in dormant_ratios(activation, None if mask is None else has_inputs(mask)).items():
            scalars[f"diagnostics/{layer}/{name}"] = value
    features = list(relus.found.values())[-1]
    scalars |= {"diagnostics/srank": srank(features), "diagnostics/stable_rank": stable_rank(features)}
    scalars |= {"diagnostics/feature_norm": feature_norm(features)}
    return scalars | {"diagnostics/weight_norm": weight_norms(network)["total"]}
