"""The benchmarks start; results add up; and the limit in throughput.py, against FLOPs and bytes counted by hand."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from benchmarks import evidence
from benchmarks.throughput import spread, update_cost

CPU = torch.device("cpu")


@pytest.mark.parametrize("benchmark", sorted(path.name for path in (ROOT / "benchmarks").glob("*.py")))
def test_a_benchmark_starts_as_its_docstring_says(benchmark):
    command = [sys.executable, f"benchmarks/{benchmark}", "--help"]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)
    assert ended.returncode == 0 and f"python benchmarks/{benchmark}" in ended.stdout, ended.stderr


def test_flops_of_the_nature_network():
    convs = [21 * 21 * 32 * 4 * 8 * 8, 11 * 11 * 64 * 32 * 4 * 4, 11 * 11 * 64 * 64 * 3 * 3]
    forward = 2 * (sum(convs) + 7744 * 512 + 512 * 4)
    # forward of both networks; backward to weights and inputs, except to the observation
    assert update_cost("dqn", 1, False, CPU)[0] == 32 * (4 * forward - 2 * convs[0])


def test_flops_of_sac():
    actor = 2 * (17 * 256 + 256 * 256 + 256 * 12)
    critics = 2 * 2 * (23 * 256 + 256 * 256 + 256)
    actor_loss = actor + critics + critics + 2 * actor - 2 * 17 * 256  # the critics' weights get no gradient
    critic_loss = actor + critics + critics + 2 * critics - 2 * 2 * 23 * 256
    assert update_cost("sac-mlp", 1, False, CPU)[0] == 256 * (actor_loss + critic_loss)


def test_flops_of_drq():
    convs = [41 * 41 * 32 * 81, *(size * size * 32 * 288 for size in (39, 37, 35))]
    encoder, trunk = 2 * sum(convs), 2 * 39_200 * 50
    actor = trunk + 2 * (50 * 1024 + 1024 * 1024 + 1024 * 4)
    critics = trunk + 2 * 2 * (54 * 1024 + 1024 * 1024 + 1024)
    critic_loss = 2 * encoder + actor + 2 * critics + 2 * critics + 2 * encoder - 2 * convs[0]
    # the actor's loss: its features get no gradient, and the critics pass one on to the action alone
    actor_loss = actor + critics + 2 * actor - trunk + critics - trunk
    assert update_cost("drq", 1, False, torch.device("meta"))[0] == 256 * (critic_loss + actor_loss)


ADAM = "weight gradient mean variance -> weight mean variance"
MASK = "weight mask -> weight"


def traffic(*operations: str) -> int:
    """Tensors that these operations read and write."""
    return sum(len(operation.replace("->", "").split()) for operation in operations)


def test_bytes_of_dqn():
    weights = 32 * 4 * 64 + 64 * 32 * 16 + 64 * 64 * 9 + 7744 * 512 + 512 * 4 + (32 + 64 + 64 + 512 + 4)
    update = ["target ->", "weight ->", "weight -> gradient", ADAM]  # two forward passes, one back
    assert update_cost("dqn", 1, False, CPU)[1] == 4 * weights * traffic(*update)
    assert update_cost("dqn", 1, True, CPU)[1] == 4 * weights * traffic(*update, MASK)


def test_bytes_of_sac():
    actor = 17 * 256 + 256 * 256 + 256 * 12 + (256 + 256 + 12)
    critics = 2 * (23 * 256 + 256 * 256 + 256 + (256 + 256 + 1))
    of_actor = ["weight ->", "weight -> gradient", ADAM, MASK, "weight ->"]  # its own loss, then the next action
    of_critics = ["weight ->", "weight ->"]  # the actor's loss: forward, and back to the action
    of_critics += ["target ->", "weight ->", "weight -> gradient", ADAM, MASK, "weight target -> target"]
    expected = 4 * (actor * traffic(*of_actor) + critics * traffic(*of_critics))
    assert update_cost("sac-mlp", 1, True, CPU)[1] == expected


def test_collected_runs_are_added_and_replaced(logged_run, tmp_path):
    out, episodes = tmp_path / "results.csv", [(500, 20, 20), (1_000, 40, 20)]
    for seed in (1, 2):
        evidence.collect([str(logged_run(f"CartPole-v1__dqn_sparse__{seed}__1", episodes, seed=seed))], out, None)
    again = logged_run("CartPole-v1__dqn_sparse__1__2", [(1_000, 60, 60)])
    evidence.collect([str(again)], out, None)
    [cells] = evidence.read(out).values()
    [curves] = cells.values()
    assert {seed: list(curve.value) for seed, curve in curves.items()} == {1: [60], 2: [20, 40]}


def test_collected_diagnostics_are_means_over_the_last_fifth(logged_run, tmp_path):
    out, tag = tmp_path / "results.csv", "diagnostics/srank"
    out.write_text(",".join([*evidence.KEY, "step", "return", "evaluation"]) + "\n")  # from before these columns
    for seed, last in ((1, 30), (2, 32)):
        scalars = {tag: [(800, 90), (900, 20), (1_000, last)]}
        evaluations = [(1_000, 1, 50, 50), (1_000, 2, 70, 70)]
        logged_run(f"CartPole-v1__dqn_sparse__{seed}__1", [(1_000, 20, 20)], scalars, True, evaluations, seed=seed)
    logged_run("CartPole-v1__dqn_sparse__3__1", [(1_000, 20, 20)], evaluations=evaluations, seed=3)
    evidence.collect([str(tmp_path / "logged/*")], out, None)
    [cells] = evidence.read(out).values()
    [curves] = cells.values()
    place = list(evidence.DIAGNOSTICS).index(tag)
    assert [curve.diagnostics[place] for curve in curves.values()][:2] == [25, 26]
    assert np.isnan(curves[3].diagnostics).all() and curves[3].evaluation == 60
    assert "| gmp 0.9 | 1 | 2 |" in evidence.diagnostics_table(cells)
    assert "25.5 (25 to 26)" in evidence.diagnostics_table(cells)
    assert evidence.diagnostics_table({cell: {3: curves[3]} for cell in cells}) == ""


def test_collected_evaluations_of_an_offline_run(logged_run, tmp_path):
    out, evaluations = tmp_path / "results.csv", [(900, 1, 2, 9), (900, 2, 4, 9), (1_000, 1, 5, 9), (1_000, 2, 7, 9)]
    run = logged_run("CartPole-v1__cql_pruned__1__1", [], evaluations=evaluations, total_updates=1_000)
    evidence.collect([str(run)], out, None)
    [cells] = evidence.read(out).values()
    [[curve]] = (curves.values() for curves in cells.values())
    assert list(curve.step) == [900, 1_000] and list(curve.value) == [3, 6] and curve.score == curve.evaluation == 6


def test_learning_rates_side_by_side():
    """The best of several is bold; one alone is not."""

    def runs(*scores):
        curves = (evidence.Curve(np.array([100]), np.array([score]), np.nan, np.array([])) for score in scores)
        return dict(enumerate(curves))

    dense, pruned = evidence.Cell("dense", 0.0, 1, True), evidence.Cell("gmp", 0.9, 3, False)
    table = evidence.learning_rates_table({1e-4: {dense: runs(4)}, 3e-4: {pruned: runs(7), dense: runs(1, 1)}})
    assert table.splitlines() == [
        "| method | width | 1.0e-4 | 3.0e-4 |",
        "|---|--:|--:|--:|",
        "| dense | 1 | **4.0 (one run)** | 1.0 [1.0, 1.0] |",
        "| gmp 0.9 without biases | 3 |  | 7.0 (one run) |",
    ]


def test_runs_that_the_table_cannot_tell_apart(logged_run, tmp_path, capsys):
    """Neither silently replaces the other."""
    for name, algorithm in (("1", "sac"), ("2", "ddpg")):
        logged_run(f"Pendulum-v1__sac_sparse__1__{name}", [(1_000, 40, 20)], algorithm=algorithm)
    with pytest.raises(SystemExit) as ended:
        evidence.collect([str(tmp_path / "logged/*")], tmp_path / "results.csv", None)
    assert ended.value.code == 2 and "no column" in capsys.readouterr().err
    assert not (tmp_path / "results.csv").exists()


def test_collected_sparsity_is_that_of_the_networks(logged_run, tmp_path, capsys):
    out, flags = tmp_path / "results.csv", {"method": "random", "sparsity": 0.8, "actor_sparsity": 0.9}
    same = logged_run("Hopper-v5__sac_sparse__1__1", [(1_000, 40, 20)], critic_sparsity=0.9, **flags)
    evidence.collect([str(same)], out, None)
    [cells] = evidence.read(out).values()
    assert [cell.name for cell in cells] == ["random 0.9"]
    different = logged_run("Hopper-v5__sac_sparse__1__2", [(1_000, 40, 20)], critic_sparsity=None, **flags)
    with pytest.raises(SystemExit) as ended:
        evidence.collect([str(different)], out, None)
    assert ended.value.code == 2 and "0.9" in capsys.readouterr().err


def test_a_spread_of_nothing_is_an_empty_cell():
    assert spread([3.0, 1.0, 1.5], ".2f") == "1.00, 1.50, 3.00" and spread([], ".2f") == ""
