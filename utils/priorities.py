"""Sampling in proportion to priorities, on the device that holds them."""

import numpy as np
import torch

FAN_OUT = 128  # a CPU samples fastest at 64 to 256, from 10,000 slots to 10 million


class Priorities:
    """A tree of sums over the priorities of `size` slots, as in Schaul et al. (2016), app. B, but FAN_OUT wide.

    Few levels are few kernels: three reach over two million slots. A sum is always recomputed from its children, in
    float64, so that no error builds up. A slot without priority is never drawn. `sample` and `update` never make the
    host wait for a GPU, and can be captured in a CUDA graph: the tree changes in place.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.levels: list[torch.Tensor] = []  # the root first, the slots' priorities last; each (nodes, FAN_OUT)
        while not self.levels or len(self.levels[0]) > 1:
            nodes = -(-(len(self.levels[0]) if self.levels else size) // FAN_OUT)
            self.levels.insert(0, torch.zeros(nodes, FAN_OUT, dtype=torch.float64, device=device))

    @property
    def values(self) -> torch.Tensor:
        """The priorities of all slots: (size,) float64, a view."""
        return self.levels[-1].view(-1)[: self.size]

    def sample(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws slots with replacement, each with a probability of its priority over the sum of all.

        Returns:
            The slots, (count,) int64, and their probabilities, (count,) float64.
        """
        uniform = torch.rand(len(self.levels), count, 1, dtype=torch.float64, device=self.device)
        node = torch.zeros(count, dtype=torch.int64, device=self.device)
        totals = []
        for u, level in zip(uniform, self.levels):
            children = level.index_select(0, node)  # (count, FAN_OUT)
            # A GPU may round running sums so that they grow at a child of priority 0; the product makes sure that it is
            # never chosen
            running = children.cumsum(1) * (children > 0)
            total = running.amax(1, keepdim=True)
            totals.append(total)
            node = node * FAN_OUT + (running > u * total).int().argmax(1)  # the first child beyond u x total
        return node, self.values.index_select(0, node) / totals[0].squeeze(1)

    def update(self, slots: torch.Tensor, priority: torch.Tensor) -> None:
        """Sets priorities (n,) of slots (n,). Of a slot that is given more than once, the largest counts."""
        self.values.scatter_reduce_(0, slots, priority.to(torch.float64), "amax", include_self=False)
        node = slots
        for parents, children in zip(self.levels[-2::-1], self.levels[:0:-1]):
            node = node // FAN_OUT  # a node that occurs twice is written twice, with the same sum
            parents.view(-1).index_copy_(0, node, children.index_select(0, node).sum(1))

    def refresh(self, added: np.ndarray, evicted: np.ndarray, priority: torch.Tensor) -> None:
        """Gives slots that can be drawn from now on the same `priority`, (), and takes it from those that cannot."""
        slots = torch.from_numpy(np.concatenate((added, evicted))).to(self.device, non_blocking=True)
        is_new = torch.arange(len(slots), device=self.device) < len(added)
        self.update(slots, priority * is_new)

    def state_dict(self) -> dict:
        """For a checkpoint: the priorities, on the CPU."""
        return {"values": self.values.cpu().clone()}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave, of another size too if the slots that only one of them has are empty."""
        shared = min(self.size, len(state["values"]))
        self.values.zero_()
        self.values[:shared] = state["values"][:shared].to(self.device)
        for parents, children in zip(self.levels[-2::-1], self.levels[:0:-1]):
            parents.view(-1)[: len(children)] = children.sum(1)
