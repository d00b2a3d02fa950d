"""Command-line flags: those that every script inherits, what values a flag accepts, and one-line errors."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, NamedTuple, TypeVar, get_args, get_type_hints

from utils.command_line import fail, flag, given_flags, make_parser

ArgsT = TypeVar("ArgsT", bound="CpuRunFlags")


class InputError(Exception):
    """Bad input found deep inside: the entry point prints the message, one line, and exits with code 2."""


class Diverged(Exception):
    """A loss, a value, an action or a weight is no longer finite."""


class Range(NamedTuple):
    """Which values a flag accepts, as metadata of its type."""

    expected: str
    accepts: Callable[[float], bool]


class Above(NamedTuple):
    """The flag's value must exceed a number, or the value of another field."""

    other: float | str


PositiveInt = Annotated[int, Range("an integer of at least 1", lambda x: x >= 1)]
Count = Annotated[int, Range("an integer from 1 to 1,000", lambda x: 1 <= x <= 1_000)]  # building more modules hangs
NonNegativeInt = Annotated[int, Range("an integer of at least 0", lambda x: x >= 0)]
Seed = Annotated[int, Range("an integer in [0, 2^30)", lambda x: 0 <= x < 2**30)]
PositiveFloat = Annotated[float, Range("a number above 0", lambda x: x > 0)]
NonNegativeFloat = Annotated[float, Range("a number of at least 0", lambda x: x >= 0)]
Probability = Annotated[float, Range("a number in [0, 1]", lambda x: 0 <= x <= 1)]
Sparsity = Annotated[float, Range("a number in [0, 1)", lambda x: 0 <= x < 1)]
PositiveFraction = Annotated[float, Range("a number in (0, 1]", lambda x: 0 < x <= 1)]


@dataclass
class CpuRunFlags:
    """Flags that say how to run a script and do not affect what it learns."""

    # Running
    runs_dir: str = "runs"
    """parent directory of the run folders"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_project_name: str = "sparse-rl"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases entity (user or team)"""
    checkpoint_every: NonNegativeInt = 0
    """steps between checkpoints; 0 writes one only when the run is interrupted"""
    resume: str | None = None
    """run folder, or checkpoint.pt in it, to resume from; flags that are not given keep the checkpoint's values"""
    eval_every: NonNegativeInt = 0
    """steps between evaluations during training; 0 evaluates the final network only"""
    eval_episodes: PositiveInt = 10
    """episodes of each evaluation"""
    capture_video: bool = False
    """record the episodes of the final evaluation as MP4"""


@dataclass
class RunFlags(CpuRunFlags):
    """`CpuRunFlags`, and those of a script that learns from batches, on a GPU if there is one."""

    # Running
    device: str = "auto"
    """device to train on: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"""
    cuda_graph: bool = True
    """on a GPU, capture the update and the policy as CUDA graphs and replay them"""
    tf32: bool = True
    """on a GPU, use TF32 (10-bit mantissa) for matrix products and convolutions, as JAX does by default"""
    diagnostics_every: NonNegativeInt = 0
    """steps between diagnostics (dormant units, ranks, norms, gradient interference); 0 disables them"""


# What a resumed run may change
RESUMABLE = {field.name for field in fields(RunFlags)} - {"runs_dir"} | {"total_timesteps", "total_updates"}


def check_flags(args: CpuRunFlags) -> None:
    """Ends the program with one line unless every flag is within the range that its type annotation gives."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        if value is None or value == getattr(type(args), name, None) == "":
            continue
        expect(args, name, value != "", "a non-empty string")
        expect(args, name, not isinstance(value, int) or abs(value) <= 2**53, "an integer of at most 2^53")
        expect(args, name, not isinstance(value, float) or abs(value) < 2**127, "a finite float32 number")
        for rule in rules_of(hint):
            if isinstance(rule, Range):
                expect(args, name, rule.accepts(value), rule.expected)
            elif isinstance(rule, Above):
                least, named = rule.other, f"{rule.other}"
                if isinstance(least, str):
                    least, named = getattr(args, least), f"{flag(least)}, which is {getattr(args, least)}"
                expect(args, name, value > least, f"more than {named}")


def expect(args: object, name: str, ok: bool, expected: str) -> None:
    """Ends the program unless `ok`, naming the flag of the field `name`, what it takes and what it got."""
    if not ok:
        value = getattr(args, name)
        fail(f"{flag(name)}: expected {expected}, got {value or repr(value)}")


def rules_of(hint: object) -> list:
    """The `Range` and `Above` in an annotated type, which may be optional."""
    own = [rule for rule in getattr(hint, "__metadata__", ()) if isinstance(rule, Range | Above)]
    return own + [rule for part in get_args(hint) for rule in rules_of(part)]


def parse_args(args_class: type[ArgsT], preset: Callable[[ArgsT], dict], argv: Sequence[str] | None = None) -> ArgsT:
    """The command line as `args_class`. A flag that is not given has, in this order: the value in the checkpoint that
    `--resume` names; the value in `preset(args)`; the default in the class.

    Args:
        preset: values that replace defaults for the flags given so far, such as those of a small environment.
        argv: instead of `sys.argv[1:]`; makes a preset available to a notebook.
    """
    argv = sys.argv[1:] if argv is None else argv
    wants_help = not {"-h", "--help"}.isdisjoint(argv)
    given = given_flags(args_class, [word for word in argv if word not in ("-h", "--help")])
    args, changed = args_class(**given), {}
    if args.resume is not None and not wants_help:
        return resumed_args(args, given)
    while (values := preset(args)) != changed:  # a preset may set a flag that asks for another preset
        args, changed = args_class(**values | given), values
    if wants_help:  # with the defaults of this very command line
        make_parser(args_class, args).print_help()
        raise SystemExit(0)
    check_flags(args)
    if changed:
        used = {name: value for name, value in changed.items() if getattr(args, name) == value}
        print("defaults of the preset: " + ", ".join(f"{flag(name)} {value}" for name, value in used.items()))
    return args


def resumed_args(args: ArgsT, given: dict) -> ArgsT:
    """The flags of the run that `args.resume` continues, with those `given` that a resumed run may change."""
    from utils.checkpoints import load_checkpoint

    path = os.path.join(args.resume, "checkpoint.pt") if os.path.isdir(args.resume) else args.resume
    saved = load_checkpoint(path)["args"]
    names = {field.name for field in fields(args)}
    if set(saved) != names:
        fail(f"--resume: {path} was written by another version of the script: it has other flags")
    args = replace(args, **saved | given | {"resume": path})
    for name in names - RESUMABLE:
        if getattr(args, name) != saved[name]:
            fail(f"{flag(name)}: a resumed run keeps {saved[name]}, got {getattr(args, name)}")
    check_flags(args)
    return args


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]
