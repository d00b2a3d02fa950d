"""Checkpoints: a run's whole state on the disk, and the command line of a run that goes on from there."""

import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import tyro

from utils.flags import changed_flags, fail, first_line

ArgsT = TypeVar("ArgsT")


def parse_args(args_class: type[ArgsT], preset: Callable[[ArgsT], dict[str, object]]) -> ArgsT:
    """The command line as `args_class`. A flag that is not given has, in this order: the value in the checkpoint that
    `--resume` names; the value in `preset(args)`, what the other flags ask for; the default in the class.
    """
    args, applied = tyro.cli(args_class), {}
    if args.resume:
        saved = load_checkpoint(args.resume, Path(sys.argv[0]).stem)["args"]
        known = {field.name for field in fields(args_class)}
        return tyro.cli(args_class, default=args_class(**{k: v for k, v in saved.items() if k in known}))
    while (values := preset(args)) != applied:  # a preset may set a flag that asks for another preset
        args, applied = tyro.cli(args_class, default=replace(args_class(), **values)), values
    return args


def save_checkpoint(
    folder: Path, script: str, args: object, rng: np.random.Generator, parts: dict, masks: dict, **counters: object
) -> None:
    """Writes `checkpoint.pt`: what `restore` needs, and `counters`, plain numbers that the script reads back itself.

    Args:
        rng: the script's own generator; torch's are saved too.
        parts: everything with a state: networks, optimisers, the replay, tensors; dictionaries of them too.
        masks: by the name of the weight, or dictionaries of such.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    content = {
        "script": script,
        "args": asdict(args),
        "rng": {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": rng.bit_generator.state},
        "masks": as_bool(masks),
    }
    save_atomically(content | state_of(parts) | counters, folder / "checkpoint.pt")


def save_model(folder: Path, script: str, args: object, networks: dict, masks: dict) -> None:
    """Writes `model.pt`: the trained networks, by name, and the masks of each."""
    content = {"script": script, "args": asdict(args), "networks": state_of(networks), "masks": as_bool(masks)}
    save_atomically(content, folder / "model.pt")


def load_checkpoint(path: str, script: str) -> dict:
    """What `save_checkpoint` wrote, on the CPU, read lazily; a file that `script` cannot resume ends the program."""
    if not Path(path).is_file():
        fail(f"--resume: got {path}, takes a checkpoint.pt; there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile):
        fail(f"--resume: got {path}, takes a checkpoint.pt; this file is torn or no checkpoint")
    if not isinstance(content, dict) or content.get("script") != script:
        found = content.get("script") if isinstance(content, dict) else None
        fail(f"--resume: got {path}, takes a checkpoint of {script}.py; this one is of {found or 'something else'}")
    if "rng" not in content:
        fail(f"--resume: got {path}, takes a checkpoint.pt; this one is a finished run's model.pt")
    return content


def restore(saved: dict, args: object, rng: np.random.Generator, parts: dict, masks: dict, kept: dict) -> None:
    """Gives `parts`, `masks` and the random numbers the state that a checkpoint has, all in place.

    Ends the program, naming the flags that differ, if something does not fit: a network's sizes, the replay's, the
    method, or how many weights are `kept` where that number is fixed for the whole run.
    """
    try:
        if saved["args"]["method"] != args.method or (args.method != "gmp" and saved["kept"] != kept):
            raise ValueError("it has other masks")
        wanted = {**parts, "masks": masks}
        load_state(wanted, {name: saved[name] for name in wanted})
    except (KeyError, RuntimeError, ValueError):
        fail(f"--resume: {args.resume} does not fit {changed_flags(saved['args'], args)}")
    torch.set_rng_state(saved["rng"]["torch"])
    if len(saved["rng"]["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
    rng.bit_generator.state = saved["rng"]["numpy"]


def state_of(part: object) -> object:
    """The state of a network, optimiser, replay or tensor, or of each in a dictionary of them."""
    if isinstance(part, dict):
        return {name: state_of(each) for name, each in part.items()}
    return part.detach() if isinstance(part, torch.Tensor) else part.state_dict()


@torch.no_grad()
def load_state(part: object, state: object) -> None:
    """The reverse of `state_of`, in place."""
    if isinstance(part, dict):
        if part.keys() != state.keys():  # a mask too many would be lost, and its zeros come alive
            raise KeyError("other names")
        for name, each in part.items():
            load_state(each, state[name])
    elif isinstance(part, torch.Tensor):
        part.copy_(state)
    elif isinstance(part, torch.optim.Optimizer):  # the moments; the learning rate and the like are the flags'
        own = [{name: value for name, value in group.items() if name != "params"} for group in part.param_groups]
        part.load_state_dict(state)
        for group, settings in zip(part.param_groups, own):
            group.update(settings)
    else:
        part.load_state_dict(state)


def as_bool(masks: dict | torch.Tensor) -> dict | torch.Tensor:
    return {name: as_bool(mask) for name, mask in masks.items()} if isinstance(masks, dict) else masks.bool()


def save_atomically(content: dict, path: Path) -> None:
    """`torch.save` beside `path`, then a rename: whatever kills the process, `path` is the old file or the new one.

    A full disk is reported on stderr and ends nothing.
    """
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch has its own for a write that fails
        beside.unlink(missing_ok=True)
        print(f"\nnot saved: {path}: {first_line(error)}", file=sys.stderr)
