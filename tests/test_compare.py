"""The table and the figure of `python -m utils.compare`: numbers by hand, and what is said of runs that do not fit."""

import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest

from utils import compare


@pytest.fixture
def run(logged_run):
    """A run whose every episode returns `value`."""

    def run(name, value, **flags):
        return logged_run(name, [(step, value, 10) for step in range(10, 1_001, 10)], **flags)

    return run


@pytest.fixture
def compared(tmp_path, monkeypatch, capsys):
    """Compares all runs; gives rows by table, the figure's panels, stdout and stderr."""
    figures = []
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, path, **how: figures.append((path, figure)))

    def compared():
        figures.clear()
        rows = compare.main(compare.Args((str(tmp_path / "logged/*"),), out=tmp_path / "out"))
        assert [path.name for path, _ in figures] == ["out.png", "out.pdf"]
        return rows, figures[0][1].axes, *capsys.readouterr()

    return compared


def test_scores_intervals_and_improvement(run, compared):
    for seed, (dense, sparse) in enumerate([(1.0, 8.0), (2.0, 1.5), (3.0, 9.0), (10.0, 9.5)]):
        run(f"dense{seed}", dense, method="dense", seed=seed)
        run(f"gmp{seed}", sparse, seed=seed)
    run("wide", 7.0, width=4)
    rows, (axes,), out, _ = compared()
    (rows,) = rows.values()
    assert [(row.width, row.method, row.sparsity, row.runs) for row in rows] == [
        (1, "dense", "0", 4),
        (1, "gmp", "0.9", 4),
        (4, "gmp", "0.9", 1),
    ]
    assert [row.score.value for row in rows] == [2.5, 8.5, 7.0]  # of four runs, the middle two
    assert rows[0].score.low >= 1 and rows[0].score.high <= 10 and rows[0].score.low < 2.5 < rows[0].score.high
    assert rows[1].better.value == 10 / 16  # 8, 9 and 9.5 beat three of four dense runs each, 1.5 beats one
    assert rows[0].better is None and rows[2].better is None  # nothing to beat
    assert "| 1 | gmp | 0.9 | 4 | 8.5 [" in out and "| 4 | gmp | 0.9 | 1 | 7 [7, 7] |" in out

    drawn = {container.get_label(): container for container in axes.containers}
    assert list(drawn) == ["dense", "gmp 0.9"]
    line, _, (bars,) = drawn["gmp 0.9"]
    assert line.get_ydata().tolist() == [8.5, 7.0]
    assert [round(x) for x in line.get_xdata()] == [0, 1]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "4"]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [[pytest.approx(row.score.low), pytest.approx(row.score.high)] for row in rows[1:]]


def test_games_are_normalised_and_taken_together(run, compared):
    run("breakout", 30.5, env_id="ALE/Breakout-v5")  # a human's score
    run("pong", -20.7, env_id="ALE/Pong-v5")  # a random agent's
    run("wide", 1.7, env_id="ALE/Breakout-v5", width=2)
    run("cart", 77.0)
    rows, panels, _, notes = compared()
    assert list(rows) == ["Atari: ALE/Breakout-v5, ALE/Pong-v5", "CartPole-v1"]
    atari, cart = rows.values()
    assert [row.score.value for row in atari] == [0.5, 0] and cart[0].score.value == 77
    assert [axes.get_ylabel() for axes in panels] == ["human-normalised IQM", "IQM of final return"]
    assert "one table for each" in notes and "gmp 0.9 at width 2 lacks games" in notes


def test_scripts_have_tables_and_new_methods_a_line(run, compared):
    for script in ("dqn_sparse", "my_dqn"):
        run(f"CartPole-v1__{script}__1__17", 3.0, method="lottery")
        run(f"CartPole-v1__{script}__1__18", 4.0, method="gmp")
    rows, panels, _, _ = compared()
    assert list(rows) == ["CartPole-v1, dqn_sparse", "CartPole-v1, my_dqn"]
    assert [row.method for row in rows["CartPole-v1, my_dqn"]] == ["gmp", "lottery"]
    assert [container.get_label() for container in panels[1].containers] == ["gmp 0.9", "lottery 0.9"]


def test_parameters_and_flops_are_of_the_model(train, compared, tmp_path):
    folder = train(method="random", sparsity=0.75, distribution="uniform", total_timesteps=500)
    (tmp_path / "logged").mkdir()
    shutil.copytree(folder, tmp_path / "logged" / "real")
    rows, _, out, _ = compared()
    ((row,),) = rows.values()
    assert row.cost == (66_304, 265_216, 132_608) and row.minutes > 0
    assert "66,304 of 265,216 | 0.133 |" in out


def test_what_cannot_be_compared_is_named_and_the_rest_is_shown(run, logged_run, compared):
    run("good", 1.0)
    run("faster", 1.0, learning_rate=0.1)
    run("half", 1.0, finished=False)
    logged_run("early", [(10, 1.0, 10)])
    alien = run("alien", 1.0)
    alien.joinpath("args.json").write_text('{"env_id": "CartPole-v1", "total_timesteps": 1000}')
    run("longer", 1.0, total_timesteps=1_050, method="dense")
    rows, _, _, notes = compared()
    assert sum(row.runs for row in rows["CartPole-v1"]) == 3
    for name, why in (
        ("half", "not finished"),
        ("early", "no episode ended in the last tenth"),
        ("alien", "flags do not say"),
        ("faster", "its cost is not known"),  # an empty model.pt
        ("CartPole-v1", "different lengths (1,000, 1,050 steps)"),
        ("gmp 0.9 at width 1", "differ in learning_rate"),
    ):
        assert any(name in line and why in line for line in notes.splitlines()), name


def test_sparsities_of_actor_and_critic(run, compared):
    run("a", 1.0, method="random", sparsity=0.8, actor_sparsity=None, critic_sparsity=None)
    run("b", 1.0, method="random", sparsity=0.5, actor_sparsity=0.8, critic_sparsity=0.8)
    run("c", 2.0, method="random", sparsity=0.9, actor_sparsity=0.0, critic_sparsity=None)
    run("d", 3.0, method="random", sparsity=0.9, actor_sparsity=0.0, critic_sparsity=0.5)
    run("e", 4.0, method="dense", sparsity=0.8, mask_seed=3)
    run("f", 4.0, method="dense", sparsity=0.9, diagnostics_every=10)
    rows, (axes,), out, notes = compared()
    expected = [("dense", "0", 2), ("random", "0 / 0.5", 1), ("random", "0 / 0.9", 1), ("random", "0.8", 2)]
    assert [(row.method, row.sparsity, row.runs) for row in rows["CartPole-v1"]] == expected
    assert "| 1 | random | 0 / 0.9 | 1 | 2 [2, 2] |" in out
    labels = [container.get_label() for container in axes.containers]
    assert labels == ["dense", "random 0 / 0.5", "random 0 / 0.9", "random 0.8"]
    assert "differ" not in notes  # of one kind


def test_a_seed_that_is_there_twice(run, compared):
    for number in (1, 2):
        run(f"run{number}", 5.0, seed=7)
    assert "gmp 0.9 at width 1: a seed is there more than once" in compared()[3]


def test_nothing_to_compare(run, compared, tmp_path, capsys):
    run("half", 1.0, finished=False)
    with pytest.raises(SystemExit, match="2"):
        compared()
    assert "error: none of these runs can be compared\n" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        compare.main(compare.Args((str(tmp_path / "none/*"),)))
    assert "matches no folder\n" in capsys.readouterr().err


def test_an_interval_never_turns_round():
    """A bootstrap's interval may lie beside the value; the bar then has no length on that side."""
    row = compare.Row(1, "gmp", "0.9", 2, compare.Estimate(1.0, 1.2, 1.5), None, None, 0.0)
    axes = plt.figure().subplots()
    compare.draw(axes, [row], "", "")
    (segment,) = axes.containers[0][2][0].get_segments()
    np.testing.assert_allclose(segment[:, 1], [1.0, 1.5])
    plt.close("all")
