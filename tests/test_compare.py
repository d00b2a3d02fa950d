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

    def compared(**flags):
        figures.clear()
        rows = compare.main(compare.Args((str(tmp_path / "logged/*"),), out=tmp_path / "out", **flags))
        assert [path.name for path, _ in figures] == ["out.png", "out.pdf"]
        return rows, figures[0][1].axes, *capsys.readouterr()

    return compared


def kinds(rows):
    return [(row.kind.width, row.kind.method, row.kind.sparsity, row.runs) for row in rows]


def test_scores_intervals_and_improvement(run, compared):
    for seed, (dense, sparse) in enumerate([(1.0, 8.0), (2.0, 1.5), (3.0, 9.0), (10.0, 9.5)]):
        run(f"dense{seed}", dense, method="dense", seed=seed)
        run(f"gmp{seed}", sparse, seed=seed)
    run("wide", 7.0, width=4)
    rows, (axes,), _, _ = compared()
    (rows,) = rows.values()
    assert kinds(rows) == [(1, "dense", "0", 4), (1, "gmp", "0.9", 4), (4, "gmp", "0.9", 1)]
    assert [row.score.value for row in rows] == [2.5, 8.5, 7.0]  # of four runs, the middle two
    assert rows[0].score.low >= 1 and rows[0].score.high <= 10 and rows[0].score.low < 2.5 < rows[0].score.high
    assert rows[1].better.value == 10 / 16  # 8, 9 and 9.5 beat three of four dense runs each, 1.5 beats one
    assert rows[0].better is None and rows[2].better is None  # nothing to beat
    assert rows[0].minutes == 0 or np.isnan(rows[0].minutes)

    line, _, (bars,) = {container.get_label(): container for container in axes.containers}["gmp 0.9"]
    assert line.get_ydata().tolist() == [8.5, 7.0]
    assert [round(x) for x in line.get_xdata()] == [0, 1]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [[pytest.approx(row.score.low), pytest.approx(row.score.high)] for row in rows[1:]]


def test_large_and_small_scores(run, compared):
    run("one", 12_345.6, method="dense", seed=1)
    run("two", 0.0123456, method="gmp", seed=1)
    _, _, table, _ = compared()
    assert "| 12,346 [12,346, 12,346] |" in table and "| 0.0123 [0.0123, 0.0123] |" in table


def test_evaluations_instead_of_training_episodes(logged_run, compared):
    evaluations = [(500, k, 1.0, 9) for k in range(3)] + [(1_000, k, 10.0 * k, 9) for k in range(3)]
    logged_run("online", [(step, 3.0, 10) for step in range(10, 1_001, 10)], evaluations=evaluations)
    logged_run("offline", [], evaluations=evaluations, env_id="Acrobot-v1", total_updates=1_000)
    assert {name: rows[0].score.value for name, rows in compared()[0].items()} == {
        "Acrobot-v1, offline": 10,
        "CartPole-v1": 3,
    }
    assert compared(evaluations=True)[0]["CartPole-v1"][0].score.value == 10


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
    assert "gmp 0.9 at width 2 lacks games" in notes


def test_forks_share_the_table_of_the_original(run, compared):
    run("CartPole-v1__dqn_sparse__1__16", 3.5, method="dense")
    for script in ("dqn_sparse", "my__dqn"):
        run(f"CartPole-v1__{script}__1__17", 3.0, method="lottery", layers=[64, 64], extra=None)
        run(f"CartPole-v1__{script}__1__18", 4.0, method="gmp")
    rows, (axes,), _, notes = compared()
    (rows,) = rows.values()
    assert [(row.kind.script, row.kind.method) for row in rows] == [
        ("dqn_sparse", "dense"),
        ("dqn_sparse", "gmp"),
        ("dqn_sparse", "lottery"),
        ("my__dqn", "gmp"),
        ("my__dqn", "lottery"),
    ]
    assert [row.better and row.better.value for row in rows] == [None, 1, 0, 1, 0]  # than the only dense runs there are
    assert "my__dqn: gmp 0.9 at width 1 is compared with dqn_sparse: dense" in notes
    assert len(axes.containers) == 5


def test_parameters_and_flops_are_of_the_model(train, compared, tmp_path):
    folder = train(method="random", sparsity=0.75, distribution="uniform", total_timesteps=500)
    (tmp_path / "logged").mkdir()
    shutil.copytree(folder, tmp_path / "logged" / folder.name)
    rows, _, out, _ = compared()
    ((row,),) = rows.values()
    assert row.cost == (66_304, 265_216, 132_608) and row.minutes > 0
    assert "66,304 of 265,216" in out


@pytest.mark.parametrize(
    "odd",
    [{"seed": None}, {"seed": "one"}, {"sparsity": "high"}, {"width": "wide"}, {"env_id": None}, {"width": None}],
)
def test_odd_flags_leave_a_run_out_and_the_others_in(run, compared, odd):
    run("good", 1.0, layers=[64, 64])
    run("odd", 1.0, **odd)
    rows, _, _, notes = compared()
    assert kinds(rows["CartPole-v1"]) == [(1, "gmp", "0.9", 1)] and "odd" in notes


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
        ("early", "last tenth"),
        ("alien", "args.json"),
        ("faster", "cost"),  # an empty model.pt
        ("CartPole-v1", "1,000, 1,050"),
        ("gmp 0.9 at width 1", "learning_rate"),
    ):
        assert any(name in line and why in line for line in notes.splitlines()), name


def test_sparsities_of_actor_and_critic(run, compared):
    run("a", 1.0, method="random", sparsity=0.8, actor_sparsity=None, critic_sparsity=None)
    run("b", 1.0, method="random", sparsity=0.5, actor_sparsity=0.8, critic_sparsity=0.8)
    run("c", 2.0, method="random", sparsity=0.9, actor_sparsity=0.0, critic_sparsity=None)
    run("d", 3.0, method="random", sparsity=0.9, actor_sparsity=0.0, critic_sparsity=0.5)
    run("e", 4.0, method="dense", sparsity=0.8, mask_seed=3)
    run("f", 4.0, method="dense", sparsity=0.9, diagnostics_every=10)
    run("g", 4.0, method="random", sparsity=0.8, encoder_sparsity=0.0, actor_sparsity=None, critic_sparsity=None)
    run("h", 4.0, method="random", sparsity=0.8, encoder_sparsity=0.0, actor_sparsity=None, critic_sparsity=0.0)
    rows, (axes,), _, notes = compared()
    expected = [
        ("dense", "0", 2),
        *[("random", each, 1) for each in ("0 / 0.5", "0 / 0.8 / 0", "0 / 0.8 / 0.8", "0 / 0.9")],
        ("random", "0.8", 2),
    ]
    assert [(method, sparsity, count) for _, method, sparsity, count in kinds(rows["CartPole-v1"])] == expected
    labels = [container.get_label() for container in axes.containers]
    assert labels == ["dense", *(f"random {sparsity}" for _, sparsity, _ in expected[1:])]
    assert "taken together" not in notes  # they are of one kind


def test_more_flags_that_tell_rows_apart(run, compared):
    for number, (method, algorithm, value) in enumerate(
        [("dense", "sac", 1.0), ("dense", "ddpg", 5.0), ("random", "sac", 2.0), ("random", "ddpg", 4.0)]
    ):
        run(f"CartPole-v1__sac_sparse__{number}__1", value, method=method, algorithm=algorithm)
    (rows,), _, _, notes = [*compared()[0].values()], *compared()[1:]
    assert [row.score.value for row in rows] == [3, 3] and "algorithm are taken together" in notes
    rows, (axes,), out, notes = compared(by="algorithm")
    (rows,) = rows.values()
    expected = [
        ("dense", "ddpg", 5, None),
        ("dense", "sac", 1, None),
        ("random", "ddpg", 4, 0),
        ("random", "sac", 2, 1),
    ]
    assert expected == [
        (row.kind.method, row.kind.more.split()[1], row.score.value, row.better and row.better.value) for row in rows
    ]
    assert "| random 0.9, algorithm sac |" in out and "taken together" not in notes and len(axes.containers) == 4


def test_flags_by_which_no_run_can_be_told_apart(run, compared):
    run("one", 1.0)
    with pytest.raises(SystemExit) as ended:
        compared(by="bias,nothing")
    assert ended.value.code == 2


def test_a_seed_that_is_there_twice(run, compared):
    for number in (1, 2):
        run(f"run{number}", 5.0, seed=7)
    assert any("seeds" in line and "more than once" in line for line in compared()[3].splitlines())


def test_nothing_to_compare(run, compared, tmp_path, capsys):
    run("half", 1.0, finished=False)
    for patterns in ("logged/*", "none/*"):
        with pytest.raises(SystemExit) as ended:
            compare.main(compare.Args((str(tmp_path / patterns),), out=tmp_path / "out"))
        assert ended.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_an_interval_never_turns_round():
    """A bootstrap's interval may lie beside the value; the bar then has no length on that side."""
    row = compare.Row(compare.Kind(1, "s", "gmp", "0.9", ""), 2, compare.Estimate(1.0, 1.2, 1.5), None, None, 0.0)
    axes = plt.figure().subplots()
    compare.draw(axes, [row], "", "")
    (segment,) = axes.containers[0][2][0].get_segments()
    np.testing.assert_allclose(segment[:, 1], [1.0, 1.5])
    plt.close("all")
