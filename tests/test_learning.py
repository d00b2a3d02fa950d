"""The agents learn a small task, with the values that the scripts give it. Thresholds hold for any seed."""

import dqn_sparse
import rainbow_pruned

CARTPOLE = {"env_id": "CartPole-v1", "device": "cpu", "sparsity": 0.9}


def test_dqn_learns_cartpole_at_90_percent_sparsity(tmp_path):
    args = dqn_sparse.CLASSIC_CONTROL | CARTPOLE | {"runs_dir": str(tmp_path), "total_timesteps": 15_000}
    returns = dqn_sparse.main(dqn_sparse.Args(**args))
    assert len(returns) == 20 and returns.mean() > 100  # a random policy has 22


def test_rainbow_learns_cartpole_with_a_tenth_of_its_weights(tmp_path):
    # With Dopamine's epsilon of Adam it learns faster at first
    short = {"runs_dir": str(tmp_path), "total_timesteps": 12_000, "adam_eps": 1.5e-4}
    args = rainbow_pruned.CLASSIC_CONTROL | CARTPOLE | short
    returns = rainbow_pruned.main(rainbow_pruned.Args(**args))
    assert len(returns) == 20 and returns.mean() > 100
