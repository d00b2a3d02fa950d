"""The machine's limit in benchmarks/throughput.py, against FLOPs and bytes counted by hand."""

import torch

from benchmarks.throughput import update_cost

CPU = torch.device("cpu")


def test_flops_of_the_nature_network():
    convs = [21 * 21 * 32 * 4 * 8 * 8, 11 * 11 * 64 * 32 * 4 * 4, 11 * 11 * 64 * 64 * 3 * 3]
    forward = 2 * (sum(convs) + 7744 * 512 + 512 * 4)
    # forward of both networks; backward to weights and inputs, except to the observation
    assert update_cost("dqn", 1, False, CPU)[0] == 32 * (4 * forward - 2 * convs[0])


def test_flops_of_sac():
    actor = 2 * (17 * 256 + 256 * 256 + 256 * 12)
    critics = 2 * 2 * (23 * 256 + 256 * 256)  # two; the head is a sum, not a matrix product
    actor_loss = actor + critics + critics + 2 * actor - 2 * 17 * 256  # the critics' weights get no gradient
    critic_loss = actor + critics + critics + 2 * critics - 2 * 2 * 23 * 256
    assert update_cost("sac-mlp", 1, False, CPU)[0] == 256 * (actor_loss + critic_loss)


def test_bytes():
    weights = 32 * 4 * 64 + 64 * 32 * 16 + 64 * 64 * 9 + 7744 * 512 + 512 * 4 + (32 + 64 + 64 + 512 + 4)
    assert update_cost("dqn", 1, False, CPU)[1] == 4 * 11 * weights
    assert update_cost("dqn", 1, True, CPU)[1] == 4 * 14 * weights
