"""Dataclasses as command lines: a flag for each field, help under the headings of the source, errors in one line."""

import argparse
import ast
import contextlib
import difflib
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Annotated, Literal, NoReturn, get_args, get_origin, get_type_hints


class Positional:
    """Marks a field, `Annotated[tuple[str, ...], Positional]`, whose values are given without a flag."""


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def flag(name: str) -> str:
    """How the field `name` is spelled on the command line."""
    return f"--{name.replace('_', '-')}"


def given_flags(args_class: type, argv: Sequence[str]) -> dict:
    """The fields that a command line sets, with their values. Ends the program with one line if it cannot be read."""
    given, unknown = known_flags(args_class, argv)
    if unknown:
        word = unknown[0].partition("=")[0]
        if not word.startswith("-"):
            fail(f"expected a flag, got {word}")
        near = nearest(word, [flag(field.name) for field in fields(args_class)])
        fail(f"unknown flag {word}; {f'did you mean {near}?' if near else '--help lists all flags'}")
    return given


def known_flags(args_class: type, argv: Sequence[str]) -> tuple[dict, list[str]]:
    """The fields that a command line sets, with their values; and the words that belong to no field."""
    words = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in argv]
    namespace, unknown = make_parser(args_class).parse_known_args(words)
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(namespace).items()
    }, unknown


def nearest(word: str, names: Sequence[str]) -> str:
    """The flags that `word` may mean: spelled alike, or it is a part (--lr of --policy-lr) or the initials of them."""
    bare = word.lstrip("-")
    found = [flag(name) for name in difflib.get_close_matches(bare, [name[2:] for name in names], n=2)]
    for name in names:
        parts = name[2:].split("-")
        if bare in parts or bare == "".join(part[0] for part in parts):
            found.append(name)
    return " or ".join(dict.fromkeys(found))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message.removeprefix("argument "))


class HelpFormatter(argparse.HelpFormatter):
    """Wraps each paragraph of a description, but leaves indented ones, the commands, as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            part if part.startswith("    ") else textwrap.fill(part, width) for part in text.split("\n\n")
        )


def make_parser(args_class: type, args: object = None) -> Parser:
    """A parser whose namespace has only those fields of a dataclass that the command line sets.

    Args:
        args: the help shows its values as defaults, instead of those of the class.
    """
    program = sys.modules["__main__"].__spec__
    summary, *rest = (sys.modules[args_class.__module__].__doc__ or "").strip("\n").split("\n\n")
    parser = Parser(
        prog=f"python -m {program.name}" if program else f"python {os.path.basename(sys.argv[0])}",
        description="\n\n".join([summary, *(part for part in rest if part.startswith("    "))]),
        epilog="Defaults depend on other flags, such as the environment: these are those of this command line."
        if args
        else None,
        formatter_class=HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # as of Python 3.14: -1e-3 is a number, not a flag
    hints = get_type_hints(args_class, include_extras=True)
    defaults = {field.name: getattr(args, field.name, field.default) for field in fields(args_class)}
    groups, usage = {}, ["%(prog)s"]
    for name, (heading, text) in documented(args_class).items():
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        keywords = reading(hints[name]) | {"help": (text + shown(defaults[name])).replace("%", "%%")}
        if defaults[name] is MISSING and "nargs" in keywords:
            keywords["nargs"] = "+"
        if Positional in getattr(hints[name], "__metadata__", ()):
            groups[heading].add_argument(name, **keywords | {"metavar": name})
            usage.append(f"{name} ..." if "nargs" in keywords else name)
        else:
            groups[heading].add_argument(flag(name), required=defaults[name] is MISSING, **keywords)
            usage += [f"{flag(name)} {name.upper()}"] if defaults[name] is MISSING else []
    groups[heading].add_argument("-h", "--help", action="help", help="show this help")
    parser.usage = " ".join([*usage, "[--flag value ...]"])
    return parser


def shown(default: object) -> str:
    """A default at the end of a help text."""
    if default is MISSING or default in (None, "", ()):
        return ""
    return f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"


@cache
def documented(args_class: type) -> dict[str, tuple[str, str]]:
    """For each field of a dataclass its heading and its help, from the source: the latest comment above a field, and
    the string below it. The class's own fields come before those that it inherits."""
    found = {}
    for owner in filter(is_dataclass, args_class.__mro__):
        with contextlib.suppress(OSError):  # there is no source, as in python -c
            source, heading = textwrap.dedent(inspect.getsource(owner)), "Flags"
            lines, body = source.splitlines(), ast.parse(source).body[0].body
            for node, below in zip(body, [*body[1:], None]):
                if isinstance(node, ast.AnnAssign):
                    above = lines[node.lineno - 2].strip()
                    heading = above[2:] if above.startswith("# ") else heading
                    text = ast.literal_eval(below.value) if isinstance(below, ast.Expr) else ""
                    found.setdefault(node.target.id, (heading, " ".join(text.split())))
    names = {field.name for field in fields(args_class)}
    return {name: found.get(name, ("Flags", "")) for name in [*(n for n in found if n in names), *sorted(names)]}


def reading(hint: object) -> dict:
    """How argparse reads a field of this type: keywords of `add_argument`."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if get_origin(hint) is Annotated or NoneType in get_args(hint):
        return reading(kinds[0])
    if get_origin(hint) is tuple:
        return reading(kinds[0]) | {"nargs": "*"}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"metavar": "{" + ",".join(map(str, kinds)) + "}", "type": one_of(kinds)}
    if not isinstance(hint, type) or issubclass(hint, list | dict | set):
        raise TypeError(f"a flag cannot be a {hint}: see docs/your_own.md for the types that can")
    return {"metavar": hint.__name__.upper(), "type": converted_to(hint)}


def one_of(choices: Sequence) -> Callable[[str], object]:
    def read(word: str) -> object:
        for choice in choices:
            if str(choice) == word:
                return choice
        raise argparse.ArgumentTypeError(f"expected {', '.join(map(str, choices))}, got {word}")

    return read


def converted_to(kind: type) -> Callable[[str], object]:
    def read(word: str) -> object:
        with contextlib.suppress(ValueError):
            return kind(word)
        with contextlib.suppress(ValueError):
            if kind is int and float(word).is_integer():  # 1e6
                return int(float(word))
        expected = {int: "an integer", float: "a number"}.get(kind, f"a {kind.__name__}")
        raise argparse.ArgumentTypeError(f"expected {expected}, got {word}")

    return read
