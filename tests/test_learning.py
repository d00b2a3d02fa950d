"""Every method solves a small task, with the values that the script gives it."""

import pytest

import dqn_sparse


@pytest.mark.parametrize("method", ["dense", "random", "gmp", "rigl", "set"])
def test_dqn_solves_cartpole_at_90_percent_sparsity(method, tmp_path):
    args = dqn_sparse.CLASSIC_CONTROL | {"env_id": "CartPole-v1", "cuda": False, "runs_dir": str(tmp_path)}
    returns = dqn_sparse.main(dqn_sparse.Args(**args, method=method, sparsity=0.9))
    assert len(returns) == 20
    assert returns.mean() >= 475  # the task's own threshold
