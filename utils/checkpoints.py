"""Checkpoints: the state that goes into them, and how they are written and read."""

import pickle
import zipfile
from pathlib import Path

import torch

from utils.files import replacing
from utils.flags import fail

CONTENT = {"script", "args", "state", "step", "update", "seconds", "rng"}  # of a checkpoint


def save_atomically(content: dict, path: Path) -> None:
    """`torch.save`, by `replacing`: a kill at any moment leaves the old file or the new one.

    Raises:
        OSError, RuntimeError: it cannot be written; `path` is as it was.
    """
    with replacing(path) as file:
        torch.save(content, file)


def load_checkpoint(path: str) -> dict:
    """A checkpoint's content on the CPU, read lazily. A file that is damaged, or not one, ends the program."""
    if not Path(path).is_file():
        if Path(path).name == "checkpoint.pt" and Path(path).with_name("model.pt").exists():
            fail(f"--resume: {Path(path).parent} is of a finished run without a checkpoint.pt (see --checkpoint-every)")
        fail(f"--resume: expected a checkpoint.pt, got {path or 'an empty string'}, which is not there")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares checksums; torch.load does not
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile):
        damaged = "not a checkpoint"
    if damaged:
        fail(f"--resume: expected a checkpoint.pt, got {path}, which is torn, damaged or another file")
    if not isinstance(content, dict) or "networks" in content:
        fail(f"--resume: expected a checkpoint.pt, got {path}, which is the model.pt of a finished run or another file")
    counters = [content.get("step"), content.get("update")]
    if set(content) != CONTENT or not all(isinstance(number, int) and number >= 0 for number in counters):
        fail(f"--resume: {path} was written by another version of this repository")
    return content


def state_of(part: object) -> object:
    """The state of a network, optimizer, replay or tensor, or of each in a dictionary of them."""
    if isinstance(part, dict):
        return {name: state_of(each) for name, each in part.items()}
    return part.detach().clone() if isinstance(part, torch.Tensor) else part.state_dict()  # a view would bring its base


@torch.no_grad()
def load_state(part: object, state: object) -> None:
    """The reverse of `state_of`, in place.

    Raises:
        KeyError, RuntimeError, TypeError, ValueError: it does not fit.
    """
    if isinstance(part, dict):
        if part.keys() != state.keys():  # weights whose mask is missing would revive
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


def all_finite(part: object) -> bool:
    """Whether all parameters and buffers of a network, or of those in nested dictionaries, are finite; and tensors are
    numbers, though perhaps infinite, as the logarithm of a temperature of 0 is."""
    if isinstance(part, dict):
        return all(map(all_finite, part.values()))
    if isinstance(part, torch.nn.Module):
        return all(bool(tensor.isfinite().all()) for tensor in part.state_dict().values())
    return not (isinstance(part, torch.Tensor) and bool(part.isnan().any()))
