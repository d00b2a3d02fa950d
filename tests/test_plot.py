"""Reading of runs, and what the figures hold: the data on their axes."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from docs import methods_figure
from utils import plot
from utils.analysis.results import find_runs, group_runs, read_run
from utils.curves import evaluation_means, save_curve, smooth_curve
from utils.records import read_scalars, training_seconds


@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    plt.close("all")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, in order."""
    figures = []
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, path, **how: figures.append((path, figure)))
    return figures


def constant(value, until=1_000):
    return [(step, value, 10) for step in range(10, until + 1, 10)]


def lines(axes):
    return {line.get_label(): line.get_ydata() for line in axes.get_lines()}


def test_each_group_is_the_mean_over_its_seeds(logged_run, drawn, tmp_path):
    for seed, value in ((1, 10.0), (2, 30.0)):
        logged_run(f"gmp{seed}", constant(value), seed=seed)
    logged_run("dense1", constant(5.0), method="dense", width=4)
    plot.main(plot.Args((str(tmp_path / "logged/*"),), by="width,method", out=tmp_path / "figures" / "a"))
    assert [path.name for path, _ in drawn] == ["a.png", "a.pdf"]
    (axes,) = drawn[0][1].axes
    found = lines(axes)
    assert list(found) == ["width 1, gmp (2)", "width 4, dense (1)"]
    np.testing.assert_allclose(found["width 1, gmp (2)"], 20)
    np.testing.assert_allclose(found["width 4, dense (1)"], 5)
    assert axes.get_lines()[0].get_xdata()[-1] == 1_000
    bands = [np.unique(band.get_paths()[0].vertices[:, 1]) for band in axes.collections]
    assert bands[0].min() == 10 and bands[0].max() == 30  # of two seeds, the interval reaches from one to the other
    assert np.ptp(bands[1]) == 0
    assert axes.get_title() == "CartPole-v1" and axes.get_xlabel() == "agent steps"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(found)


def test_scripts_are_kept_apart(logged_run, drawn, tmp_path):
    logged_run("CartPole-v1__dqn_sparse__1__17", constant(10.0))
    logged_run("CartPole-v1__my_dqn__1__18", constant(30.0))
    plot.main(plot.Args((str(tmp_path / "logged/*"),), out=tmp_path / "a"))
    (axes,) = drawn[0][1].axes
    assert {label: np.unique(values).tolist() for label, values in lines(axes).items()} == {
        "my_dqn, gmp (1)": [30.0],
        "dqn_sparse, gmp (1)": [10.0],
    }


def test_offline_runs_have_panels_of_their_own(logged_run, drawn, tmp_path):
    logged_run("CartPole-v1__dqn_sparse__1__17", constant(10.0))
    evaluations = [(step, k, 20.0 * k, 9) for step in (500, 1_000) for k in (1, 2)]
    logged_run("CartPole-v1__cql_pruned__1__18", [], evaluations=evaluations, total_updates=1_000)
    plot.main(plot.Args((str(tmp_path / "logged/*"),), out=tmp_path / "a"))
    online, offline = drawn[0][1].axes
    assert (online.get_xlabel(), offline.get_xlabel()) == ("agent steps", "updates")
    y = offline.get_lines()[0].get_ydata()
    assert set(y[~np.isnan(y)]) == {30}


def test_how_far_unfinished_runs_have_come(logged_run, drawn, tmp_path, capsys):
    logged_run("CartPole-v1__dqn_sparse__1__17", constant(10.0, until=600), finished=False)
    evaluations = [(500, 1, 20.0, 9)]
    flags = {"evaluations": evaluations, "total_updates": 1_000, "finished": False}
    logged_run("CartPole-v1__cql_pruned__1__18", [], **flags)
    plot.main(plot.Args((str(tmp_path / "logged/*"),), out=tmp_path / "a"))
    notes = capsys.readouterr().err
    assert "600 of 1,000 steps" in notes and "500 of 1,000 updates" in notes


def test_evaluations_are_drawn_as_their_means(logged_run, drawn, tmp_path):
    evaluations = [(step, k, step + k, 9) for step in (500, 1_000) for k in range(5)]
    logged_run("a", constant(1.0), evaluations=evaluations)
    assert evaluation_means(np.array(evaluations)).tolist() == [[500, 502], [1_000, 1_002]]
    plot.main(plot.Args((str(tmp_path / "logged/*"),), out=tmp_path / "a", evaluations=True))
    y = drawn[0][1].axes[0].get_lines()[0].get_ydata()
    assert set(y[~np.isnan(y)]) == {502, 1_002}


def test_a_dense_runs_sparsity_is_not_a_label(logged_run, drawn, tmp_path):
    logged_run("dense", constant(1.0), method="dense")
    logged_run("gmp", constant(1.0))
    plot.main(plot.Args((str(tmp_path / "logged/*"),), out=tmp_path / "a", by="method,sparsity"))
    assert list(lines(drawn[0][1].axes[0])) == ["dense (1)", "gmp, sparsity 0.9 (1)"]


def test_runs_that_differ_are_not_averaged_silently(logged_run, drawn, tmp_path, capsys):
    logged_run("a", constant(1.0), width=1)
    logged_run("b", constant(1.0), width=2, seed=2, runs_dir="elsewhere")
    plot.main(plot.Args((str(tmp_path / "logged/*"),), out=tmp_path / "a"))
    notes = capsys.readouterr().err
    assert "width" in notes and "runs_dir" not in notes and "seed" not in notes


@pytest.mark.parametrize("name", ["a.b", "a.b.png", "a.b.pdf"])
def test_a_figure_has_two_files(name, logged_run, tmp_path):
    logged_run("one", constant(1.0))
    plot.main(plot.Args((str(tmp_path / "logged/*"),), out=tmp_path / "figures" / name))
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"a.b.png", "a.b.pdf"}


def test_a_figure_that_cannot_be_written(logged_run, tmp_path, capsys):
    logged_run("one", constant(1.0))
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "a", tmp_path / "logged"):  # below a file; a folder
        with pytest.raises(SystemExit) as ended:
            plot.main(plot.Args((str(tmp_path / "logged/*"),), out=out))
        assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: --out: ")


def test_smoothing_by_hand():
    step, value = np.array([10.0, 20, 30, 100]), np.array([1.0, 3, 5, 7])
    grid = np.array([5.0, 10, 20, 29, 30, 60, 100, 106])
    expected = [np.nan, 1, 2, 2, 4, 5, 7, np.nan]  # mean over (point - 20, point]; the latest; nothing beyond the end
    np.testing.assert_allclose(smooth_curve(step, value, grid, 20), expected)
    assert np.isnan(smooth_curve(np.empty(0), np.empty(0), grid, 20)).all()


def test_scalars_have_panels(logged_run, drawn, tmp_path, capsys):
    rows = [(step, step / 1_000) for step in range(1, 1_001)]
    logged_run("a", constant(1.0), {"sparsity/global": rows, "sparsity/head.weight": rows, "losses/td": rows})
    pattern = str(tmp_path / "logged/*")
    plot.main(
        plot.Args((pattern,), scalars=("sparsity/h*", "sparsity/*", "diagnostics/*", "losses/*"), out=tmp_path / "a")
    )
    assert [axes.get_ylabel() for axes in drawn[0][1].axes] == [
        "episodic return",
        "sparsity/head.weight",
        "sparsity/global",
        "losses/td",
    ]
    (line,) = drawn[0][1].axes[2].get_lines()
    np.testing.assert_allclose(line.get_ydata()[10:], line.get_xdata()[10:] / 1_000 - 0.0245, atol=1e-6)
    assert "diagnostics/*" in capsys.readouterr().err


def test_environments_are_not_mixed(logged_run, drawn, tmp_path):
    logged_run("a", constant(1.0))
    logged_run("b", constant(-100.0, 500), env_id="Acrobot-v1", total_timesteps=500)
    plot.main(plot.Args((str(tmp_path / "logged/*"),), out=tmp_path / "a"))
    panels = {axes.get_title(): axes.get_lines()[0] for axes in drawn[0][1].axes}
    for title, value in (("Acrobot-v1", -100), ("CartPole-v1", 1)):
        y = panels[title].get_ydata()
        assert set(y[~np.isnan(y)]) == {value}
    assert panels["Acrobot-v1"].get_xdata()[-1] == 500


def test_an_unfinished_run_is_drawn_as_far_as_it_goes(logged_run, drawn, tmp_path, capsys):
    logged_run("half", constant(2.0, 500), finished=False)
    plot.main(plot.Args((str(tmp_path / "logged/*"),), out=tmp_path / "a"))
    (line,) = drawn[0][1].axes[0].get_lines()
    np.testing.assert_array_equal(np.isnan(line.get_ydata()), line.get_xdata() >= 505)
    assert "500 of 1,000" in capsys.readouterr().err


def test_what_is_no_run_is_named_and_the_rest_is_read(logged_run, tmp_path, capsys):
    logged_run("good", constant(1.0))
    logged_run("torn", constant(1.0)).joinpath("args.json").write_text('{"env_id": "Cart')
    logged_run("older", constant(1.0)).joinpath("args.json").write_text(json.dumps({"steps": 3}))
    (tmp_path / "logged" / "empty").mkdir()
    assert [run.folder.name for run in find_runs([str(tmp_path / "logged/*")])] == ["good"]
    notes = capsys.readouterr().err.splitlines()
    for name in ("torn", "older", "empty"):
        assert sum(name in line and "args.json" in line for line in notes) == 1, name


@pytest.mark.parametrize(
    ("pattern", "flags", "says"),
    [
        ("nothing/*", {}, "nothing/*"),
        ("empty", {}, "error: no runs in"),
        ("good", {"by": "colour"}, "error: --by: "),
    ],
)
def test_bad_input_ends_with_one_line(logged_run, tmp_path, capsys, pattern, flags, says):
    logged_run("good", constant(1.0))
    (tmp_path / "logged" / "empty").mkdir()
    with pytest.raises(SystemExit, match="2"):
        plot.main(plot.Args((str(tmp_path / "logged" / pattern),), **flags))
    assert says in capsys.readouterr().err.splitlines(keepends=True)[-1]


def test_rows_that_cannot_be_read_are_passed_over(logged_run):
    values = [0.5, -20.0, 1e6, 1.5e-7, -math.inf, math.nan]
    folder = logged_run("a", [(10 * i, f"{value:g}", 7) for i, value in enumerate(values)])
    with (folder / "episodes.csv").open("a") as file:
        file.write("60,1\nx,y,z\n\0\0\n70,2,7\n80,1,")
    episodes = read_run(folder).episodes
    np.testing.assert_array_equal(episodes[:, 1], [*values, 2])
    assert episodes[:, 0].tolist() == [0, 10, 20, 30, 40, 50, 70] and set(episodes[:, 2]) == {7}


def test_the_final_score_is_of_the_last_tenth(logged_run):
    episodes = [(900, 1.0, 9), (901, 10.0, 9), (1_000, 20.0, 9)]
    assert read_run(logged_run("a", episodes)).final_score() == 15
    assert np.isnan(read_run(logged_run("b", episodes[:1])).final_score())


def test_scalars_are_what_was_logged_up_to_a_torn_end(logged_run):
    rows = {"a/b": [(3, 0.5), (7, -2.0)], "c": [(1, 4.0)]}
    folder = logged_run("a", constant(1.0), rows)
    assert {tag: values.tolist() for tag, values in read_scalars(folder).items()} == {
        tag: [list(row) for row in values] for tag, values in rows.items()
    }
    assert training_seconds(folder) == 90
    path = folder / "scalars.csv"
    path.write_bytes(path.read_bytes()[:-2])  # the last row, c, is torn
    assert list(read_scalars(folder)) == ["a/b"]
    path.unlink()
    assert read_scalars(folder) == {} and np.isnan(training_seconds(folder))


def test_groups_are_in_order(logged_run, tmp_path):
    for number, (width, method) in enumerate([(4, "gmp"), (1, "gmp"), (4, "dense")]):
        logged_run(str(number), constant(1.0), width=width, method=method)
    groups = group_runs(find_runs([str(tmp_path / "logged/*")]), ["width", "method", "depth"])
    assert list(groups) == [(1, "gmp", None), (4, "dense", None), (4, "gmp", None)]


def test_the_curve_of_one_run(logged_run, drawn):
    evaluations = [(step, k, 7.0, 9) for step in (500, 1_000) for k in range(3)]
    folder = logged_run("a", [(10 * i, float(i), 10) for i in range(1, 101)], evaluations=evaluations)
    save_curve(folder, "title")
    dots, mean, evaluated = drawn[0][1].axes[0].get_lines()
    assert dots.get_ydata().tolist() == list(range(1, 101))
    np.testing.assert_allclose(mean.get_ydata()[-1], np.mean([96, 97, 98, 99, 100]))  # a twentieth of the run
    assert evaluated.get_xdata().tolist() == [500, 1_000] and set(evaluated.get_ydata()) == {7}


def test_the_curve_of_an_offline_run(logged_run, drawn):
    scalars = {"losses/q_values": [(100, 1.0)], "losses/policy_q_values": [(100, 2.0)]}
    folder = logged_run("a", [], scalars, evaluations=[(500, 0, 3.0, 9), (500, 1, 5.0, 9)], total_updates=1_000)
    save_curve(folder, "title")
    returns, q = drawn[0][1].axes
    assert returns.get_lines()[0].get_ydata().tolist() == [3, 5] and returns.get_lines()[1].get_ydata().tolist() == [4]
    assert sorted(line.get_ydata()[0] for line in q.get_lines()) == [1, 2]


def test_states_of_weights_over_time():
    alive = np.array([[1, 1, 0, 0, 1], [1, 0, 0, 1, 0], [1, 0, 0, 0, 1]], dtype=bool)  # time downwards
    names = list(methods_figure.STATES)
    never, removed, start, grown = range(4)
    assert names == ["never active", "removed", "active from the start", "grown later"]
    assert methods_figure.states(alive).T.tolist() == [
        [start, start, start],
        [start, removed, removed],
        [never, never, never],
        [never, grown, removed],
        [start, removed, grown],
    ]


def test_figure_of_the_methods_holds_the_masks():
    size = 512 * 512
    masks = [np.arange(size) % 4 == 0, np.arange(size) % 4 <= 1, np.arange(size) % 4 == 2]
    figure, axes = plt.subplots(2)
    methods_figure.draw(axes, np.array([10, 20, 30]), masks, "title")
    now, so_far = axes[1].lines
    assert now.get_ydata().tolist() == [25, 50, 25] and so_far.get_ydata().tolist() == [25, 50, 75]
    picture = axes[0].images[0].get_array()  # a row for each weight
    assert picture.shape == (methods_figure.WEIGHTS, 3)
    rows = {tuple(row) for row in picture.tolist()}
    assert rows == {(2, 2, 1), (0, 3, 1), (0, 0, 3), (0, 0, 0)}
    plt.close(figure)
