"""Command lines of the scripts and the commands: what they accept, the help, and one line for what they refuse."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from conftest import run_python

import dqn_sparse
from utils.command_line import Positional, documented, given_flags, known_flags, make_parser, reading
from utils.flags import PositiveInt, parse_args


@dataclass
class Base:
    # Inherited
    verbose: bool = False
    """says more"""
    seed: int = 1


@dataclass(kw_only=True)
class Args(Base):
    """Not a help text."""

    files: Annotated[tuple[Path, ...], Positional]
    """what to read"""

    # Network (100 % ours)
    hidden: tuple[int, ...] = (64, 32)
    """units of
    each layer"""
    width: Annotated[PositiveInt, "more metadata"] | None = None
    rate: float = 0.1  # not a heading
    """learning rate"""

    # Method
    kind: Literal["a", "b"] = "a"
    seed: int = 2
    """overrides"""

    @property
    def answer(self) -> int:
        return 42


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["x", "y"], {"files": (Path("x"), Path("y"))}),
        (["--seed", "1e6"], {"seed": 1_000_000}),
        (["--seed=-3"], {"seed": -3}),
        (["--width", "10_000"], {"width": 10_000}),
        (["--rate", "-1e-3"], {"rate": -0.001}),
        (["--hidden", "7", "1e1"], {"hidden": (7, 10)}),
        (["--hidden"], {"hidden": ()}),
        (["--no-verbose"], {"verbose": False}),
        (["--kind", "b", "--verbose"], {"kind": "b", "verbose": True}),
    ],
)
def test_the_fields_that_are_given(words, expected):
    given = given_flags(Args, words if "x" in words else ["f", *words])
    assert ({} if "x" in words else {"files": (Path("f"),)}) | expected == given
    assert {name: type(value) for name, value in expected.items()} == {name: type(given[name]) for name in expected}


def test_a_flag_in_cleanrls_spelling():
    assert given_flags(dqn_sparse.Args, ["--env_id", "a_b", "--save_dataset=c_d"]) == {
        "env_id": "a_b",
        "save_dataset": "c_d",
    }


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--lr", "0.1"], ["--lr", "--learning-rate"]),
        (["-lr", "0.1"], ["-lr", "--learning-rate"]),
        (["--divice", "cpu"], ["--divice", "did you mean --device?"]),
        (["--learning-rat=1"], ["--learning-rat", "--learning-rate"]),
        (["--timesteps", "3"], ["--total-timesteps"]),
        (["--zzz"], ["--zzz", "--help"]),
        (["--total-timesteps", "1.5"], ["--total-timesteps", "1.5", "integer"]),
        (["--learning-rate", "fast"], ["--learning-rate", "fast", "number"]),
        (["--method", "lottery"], ["--method", "lottery", "gmp", "rigl"]),
        (["--seed"], ["--seed"]),
        (["--double=3"], ["--double"]),
        (["CartPole-v1"], ["CartPole-v1"]),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(words, names, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(dqn_sparse.Args, dqn_sparse.preset, words)
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    assert all(name in line for name in names), line


def test_words_that_belong_to_no_field_are_handed_on():
    given, rest = known_flags(Args, ["f", "--batch-size", "1", "2", "--no-bias", "--v-min", "-1e-3", "--seed", "5"])
    assert given == {"files": (Path("f"),), "seed": 5}
    assert rest == ["--batch-size", "1", "2", "--no-bias", "--v-min", "-1e-3"]


def test_headings_and_help_come_from_the_source():
    assert documented(Args) == {
        "files": ("Flags", "what to read"),
        "hidden": ("Network (100 % ours)", "units of each layer"),
        "width": ("Network (100 % ours)", ""),
        "rate": ("Network (100 % ours)", "learning rate"),
        "kind": ("Method", ""),
        "seed": ("Method", "overrides"),
        "verbose": ("Inherited", "says more"),
    }


def test_a_class_without_a_source_still_has_flags():
    scope = {"dataclass": dataclass, "__name__": __name__}
    exec("@dataclass\nclass Bare:\n    size: int = 3\n", scope)
    assert given_flags(scope["Bare"], ["--size", "4"]) == {"size": 4}


def test_help_of_a_dataclass():
    text = make_parser(Args, Args(files=(), hidden=(5, 6))).format_help()
    places = [
        text.index(part) for part in ("Network (100 % ours):", "--hidden", "Method:", "--kind {a,b}", "Inherited:")
    ]
    assert places == sorted(places)
    assert "(default: 5 6)" in text and "(default: 0.1)" in text and "--verbose, --no-verbose" in text


def test_help_fits_the_terminal_and_shows_the_environments_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        parse_args(dqn_sparse.Args, dqn_sparse.preset, ["--env-id", "CartPole-v1", "--width", "3", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for part in ("Exploration:", "Replay:", "Sparsity:", "Running:", "(default: CartPole-v1)", "(default: 60000)"):
        assert part in text
    assert "(default: 3)" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("    python ")) <= 80


@pytest.mark.parametrize("hint", [list[int], float | str, dict])
def test_types_that_no_flag_has(hint):
    with pytest.raises(TypeError):
        reading(hint)


@pytest.mark.parametrize("command", [["cql_pruned.py"], ["-m", "utils.plot"], ["-m", "utils.sweep"]])
def test_help_needs_nothing_else(command):
    ended = run_python(*command, "--help")
    assert ended.returncode == 0 and ended.stdout.startswith(f"usage: python {' '.join(command)}") and not ended.stderr
