"""The entry point of every script and command: what an error or a signal does to the program, and to its runs."""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

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


OUT_OF_MEMORY = re.compile(r"can't allocate memory|out of memory|too large|overflow", re.IGNORECASE)


def launch(main: Callable[[ArgsT], object], args_class: type[ArgsT], preset: Callable[[ArgsT], dict]) -> None:
    """Runs a script as a program: parses the command line, calls `main`, and turns errors into exit codes.

    0 finished, 2 bad input, 128 + number stopped by that signal, 1 anything else. Whatever ends training, the state of
    the last complete step is saved first if the networks' weights are finite.
    """
    protect_output()
    try:
        main(parse_args(args_class, preset))
    except InputError as error:
        fail(str(error))
    except Diverged as error:
        die(f"training has diverged: {error}{last_checkpoint()}")
    except EnvironmentFailed as error:
        die(f"{error}{rescue()}")
    except KeyboardInterrupt:  # before the run's own handlers are in place, or after
        raise SystemExit(130) from None
    except (MemoryError, OverflowError, RuntimeError, ValueError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            crash(error)
        message = f"does not fit in memory: {first_line(error)}; try a smaller --width, --batch-size or --buffer-size"
        if Run.open:
            die(message + rescue())
        fail(message)
    except Exception as error:
        crash(error)


def die(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 1."""
    close_all()
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


def crash(error: Exception) -> NoReturn:
    """Ends the program for an error in the code: one line, then its traceback."""
    message = f"error: {type(error).__name__}: {first_line(error)}{rescue()}"
    close_all()
    print(message, file=sys.stderr)
    traceback.print_exception(error)
    raise SystemExit(1)


def close_all() -> None:
    for run in list(Run.open):
        run.close()


def rescue() -> str:
    """Writes the checkpoints of the open runs; where they are, for a message."""
    for run in Run.open:
        with contextlib.suppress(Diverged, OSError, RuntimeError):
            run.checkpoint()
    return last_checkpoint()


def last_checkpoint() -> str:
    """Where the open runs' checkpoints are, and where nothing is saved, for a message."""
    paths = [run.folder / "checkpoint.pt" for run in Run.open]
    found = [os.path.relpath(path) for path in paths if path.exists()]
    return f"; the last good state is in {', '.join(found)}" if found else ""
