"""The entry point of every script and command: what an error or a signal does to the program, and to its runs."""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from utils.command_line import given_flags
from utils.envs import EnvironmentFailed
from utils.flags import ArgsT, Diverged, InputError, fail, first_line, parse_args
from utils.runs import Run


class SafeStream:
    """stdout or stderr that survives a closed pipe or terminal: from then on, what is written is dropped."""

    def __init__(self, stream: object) -> None:
        self.stream, self.broken = stream, False

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable, *args: object) -> None:
        if not self.broken:
            try:
                action(*args)
            except (OSError, ValueError):  # ValueError: it is closed
                self.broken = True


def protect_output() -> None:
    """Makes printing unable to end the program: closed pipes, and terminals that cannot show a character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with contextlib.suppress(AttributeError):  # replaced by something without encodings
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, SafeStream(stream))


OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|out of memory|Storage size calculation overflow|allowed dimension exceeded", re.IGNORECASE
)


def launch(main: Callable[[ArgsT], object], args_class: type[ArgsT], preset: Callable[[ArgsT], dict]) -> None:
    """Runs a script as a program: parses the command line, calls `main`, and turns errors into exit codes.

    0 finished, 2 bad input, 128 + n stopped by signal n, 1 anything else. After an error, the state is saved unless
    training has diverged: if a loss, an action or a weight is not finite, the last good checkpoint stays.
    """
    run_program(lambda: main(parse_args(args_class, preset)))


def run_command(main: Callable[[Any], object], args_class: type) -> None:
    """`launch` for the commands in `utils`, such as `python -m utils.plot`."""
    run_program(lambda: main(args_class(**given_flags(args_class, sys.argv[1:]))))


def run_program(program: Callable[[], object]) -> None:
    protect_output()
    try:
        program()
    except KeyboardInterrupt:  # before the runs' own handlers are in place, or after
        raise SystemExit(130) from None
    except InputError as error:
        fail(str(error))
    except Diverged as error:
        stop_runs(f"training has diverged: {error}{last_checkpoints()}")
    except EnvironmentFailed as error:
        save_checkpoints()
        stop_runs(f"{error}{last_checkpoints()}")
    except Exception as error:
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            message = f"not enough memory: {first_line(error)}; try a smaller --width, --batch-size or --buffer-size"
            if not Run.open:
                fail(message)
            save_checkpoints()
            stop_runs(message + last_checkpoints())
        save_checkpoints()
        where = last_checkpoints()
        print(f"error: {type(error).__name__}: {first_line(error)}{where}; a traceback follows", file=sys.stderr)
        traceback.print_exception(error)
        stop_runs()


def save_checkpoints() -> None:
    for run in Run.open:
        with contextlib.suppress(Diverged, OSError, RuntimeError):
            run.checkpoint()


def last_checkpoints() -> str:
    """Where the open runs' checkpoints are, if they have any, as the end of a message."""
    paths = [run.folder / "checkpoint.pt" for run in Run.open]
    found = [os.path.relpath(path) for path in paths if path.exists()]
    return f"; resume from {', '.join(found)}" if found else ""


def stop_runs(message: str = "") -> NoReturn:
    """Closes the open runs and ends the program with exit code 1."""
    for run in list(Run.open):
        run.close()
    if message:
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)
