"""Reading of runs, and what the figures hold: the data on their axes."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from docs import methods_figure
from utils import plot
from utils.results import find_runs, group_runs, read_run, read_scalars, training_seconds
from utils.runs import read_episodes


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
    logged_run("CartPole-v1__cql_pruned__1__18", constant(30.0), total_updates=1_000)
    plot.main(plot.Args((str(tmp_path / "logged/*"),), out=tmp_path / "a"))
    (axes,) = drawn[0][1].axes
    assert {label: np.unique(values).tolist() for label, values in lines(axes).items()} == {
        "cql_pruned, gmp (1)": [30.0],
        "dqn_sparse, gmp (1)": [10.0],
    }
    assert axes.get_xlabel() == "agent steps or updates"


def test_a_figure_that_cannot_be_written(logged_run, tmp_path, capsys):
    logged_run("one", constant(1.0))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        plot.main(plot.Args((str(tmp_path / "logged/*"),), out=tmp_path / "file" / "a"))
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: --out: got ")


def test_smoothing_by_hand():
    step, value = np.array([10.0, 20, 30, 100]), np.array([1.0, 3, 5, 7])
    grid = np.array([5.0, 10, 20, 29, 30, 60, 100, 119, 120])
    expected = [
        np.nan,
        1,
        2,
        2,
        4,
        5,
        7,
        7,
        np.nan,
    ]  # mean over (point - 20, point]; the latest; nothing beyond the end
    np.testing.assert_allclose(plot.smooth_curve(step, value, grid, 20), expected)
    assert np.isnan(plot.smooth_curve(np.empty(0), np.empty(0), grid, 20)).all()


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
    assert "no run has logged diagnostics/*" in capsys.readouterr().err


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
    np.testing.assert_array_equal(np.isnan(line.get_ydata()), line.get_xdata() >= 550)
    assert "step 500 of 1,000" in capsys.readouterr().err


def test_what_is_no_run_is_named_and_the_rest_is_read(logged_run, tmp_path, capsys):
    logged_run("good", constant(1.0))
    logged_run("torn", constant(1.0)).joinpath("args.json").write_text('{"env_id": "Cart')
    logged_run("older", constant(1.0)).joinpath("args.json").write_text(json.dumps({"steps": 3}))
    logged_run("silent", constant(1.0)).joinpath("episodes.csv").unlink()
    (tmp_path / "logged" / "empty").mkdir()
    assert [run.folder.name for run in find_runs([str(tmp_path / "logged/*")])] == ["good"]
    notes = capsys.readouterr().err
    for name, why in (
        ("torn", "a torn args.json"),
        ("older", "another layout"),
        ("silent", "no episodes.csv"),
        ("empty", "no args.json"),
    ):
        assert any(f"{name} has" in line and why in line for line in notes.splitlines()), name


@pytest.mark.parametrize(
    ("pattern", "flags", "says"),
    [
        ("nothing/*", {}, "nothing/*; it matches no folder\n"),
        ("empty", {}, "error: no runs in"),
        ("good", {"by": "colour"}, "error: --by: got colour, takes names of flags"),
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
    assert [row[0] for row in read_episodes(folder / "episodes.csv")] == episodes[:, 0].tolist()  # a resume's rule


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
    (events,) = folder.glob("events*")
    events.write_bytes(events.read_bytes()[:-5])  # the last record, c, is torn
    assert list(read_scalars(folder)) == ["a/b"]


def test_scalars_that_a_resumed_run_repeats_are_read_once(tmp_path):
    """A checkpoint at step 20, a kill after 40: the run goes on from 20 in a second file."""
    for purge_step, rows in ((None, [(10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0)]), (21, [(30, 5.0), (40, 6.0)])):
        writer = SummaryWriter(tmp_path, purge_step=purge_step, filename_suffix=f".{purge_step or 0}")
        for step, value in rows:
            writer.add_scalar("a", value, step)
        writer.close()
    assert read_scalars(tmp_path)["a"].tolist() == [[10, 1], [20, 2], [30, 5], [40, 6]]


def test_training_seconds_of_two_processes(tmp_path):
    from tensorboard.compat.proto.event_pb2 import Event

    for number, times in enumerate(((100.0, 130.0), (500.0, 501.0, 507.0))):
        with (tmp_path / f"events.out.tfevents.{number}").open("wb") as file:
            for time in times:
                data = Event(wall_time=time).SerializeToString()
                file.write(len(data).to_bytes(8, "little") + b"sums" + data + b"sums")
    assert training_seconds(tmp_path) == 37


def test_groups_are_in_order(logged_run, tmp_path):
    for number, (width, method) in enumerate([(4, "gmp"), (1, "gmp"), (4, "dense")]):
        logged_run(str(number), constant(1.0), width=width, method=method)
    groups = group_runs(find_runs([str(tmp_path / "logged/*")]), ["width", "method", "depth"])
    assert list(groups) == [(1, "gmp", None), (4, "dense", None), (4, "gmp", None)]


def test_the_curve_of_one_run(drawn, tmp_path):
    plot.learning_curve([(10 * i, float(i), 10) for i in range(1, 41)], "title", tmp_path / "curve.png")
    dots, mean = drawn[0][1].axes[0].get_lines()
    assert dots.get_ydata().tolist() == list(range(1, 41))
    assert mean.get_label() == "mean of 2 episodes" and mean.get_ydata().tolist() == [i + 0.5 for i in range(1, 40)]


def test_states_of_weights_over_time():
    alive = np.array([[1, 1, 0, 0, 1], [1, 0, 0, 1, 0], [1, 0, 0, 0, 1]], dtype=bool)  # time downwards
    names = list(methods_figure.STATES)
    never, removed, start, grown = range(4)
    assert names == ["never alive", "removed", "alive from the start", "grown later"]
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
