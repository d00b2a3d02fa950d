"""Refusing flags without a meaning, in one line: the flag, what it got and what it takes."""

import math
import sys
from typing import NoReturn


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def require(args: object, name: str, ok: bool, takes: str) -> None:
    """Ends the program unless `ok`, naming the flag of the field `name`, what it got and what it takes."""
    if not ok:
        fail(f"--{name.replace('_', '-')}: got {getattr(args, name)}, takes {takes}")


def first_line(error: Exception) -> str:
    """The first line of its message, or its kind if it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


# What the flags take, in whichever script has them.
RANGES = {
    "a number in [0, 1)": (lambda x: 0 <= x < 1, "sparsity actor_sparsity critic_sparsity sticky_actions"),
    "a number in [0, 1]": (lambda x: 0 <= x <= 1, "gamma start_e end_e eval_epsilon drop_fraction"),
    "a number in (0, 1]": (lambda x: 0 < x <= 1, "tau prune_end rewire_end data_fraction"),
    "a number above 0": (lambda x: x > 0, "learning_rate policy_lr q_lr replay_ratio utd init_alpha"),
    "a number from 0 on": (lambda x: x >= 0, "adam_eps weight_decay exploration_noise alpha beta noisy_sigma"),
    "a whole number from 0 on, below 2^30": (lambda x: 0 <= x < 2**30, "seed mask_seed data_seed"),
    "a whole number from 0 on": (lambda x: x >= 0, "noop_max checkpoint_every diagnostics_every"),
    "a whole number from 1 on": (
        lambda x: x >= 1,
        "width depth num_envs batch_size buffer_size n_step action_repeat num_critics exploration_steps eval_every "
        "eval_episodes target_network_frequency prune_interval rewire_interval",
    ),
    "a whole number from 2 on": (lambda x: x >= 2, "n_atoms"),
    "a whole number from 10 on": (lambda x: x >= 10, "total_updates"),
}


def require_ranges(args: object) -> None:
    """Ends the program unless every number among the flags is finite and within its range, where `RANGES` has one."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name, value in given.items():
        require(args, name, not isinstance(value, float) or math.isfinite(value), "a finite number")
    for takes, (ok, names) in RANGES.items():
        for name in names.split():
            require(args, name, name not in given or ok(given[name]), takes)


def changed_flags(saved: dict, args: object) -> str:
    """The flags whose value is not the one that a checkpoint's run had, and both values; for a message."""
    changed = {name: value for name, value in vars(args).items() if name != "resume" and saved.get(name) != value}
    said = [f"--{name.replace('_', '-')} {value} (it has {saved.get(name)})" for name, value in changed.items()]
    return ", ".join(said) or "this version of the script"
