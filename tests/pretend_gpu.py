"""A GPU for machines that have none: its tensors are in the CPU's memory, but say that they are on `cuda:0`.

Operations on tensors of both devices raise, as in CUDA. All numbers are those of the CPU.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch._C import _functorch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
on_gpu: dict[int, StorageWeakRef] = {}  # by address, which is not used again while there is a weak reference


def storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    while _functorch.is_functorch_wrapped_tensor(tensor):  # inside vmap and grad
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.untyped_storage()


def device_of(tensor: torch.Tensor) -> torch.device:
    return GPU if storage(tensor)._cdata in on_gpu else CPU


def put(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor, whose storage counts as this device's from now on."""
    on_gpu.pop(storage(tensor)._cdata, None)
    if device.type == "cuda":
        on_gpu[storage(tensor)._cdata] = StorageWeakRef(storage(tensor))
    return tensor


class Calls(TorchFunctionMode):
    """Answers what a program asks about devices; what it wants on the GPU is made on the CPU, and counts as on it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        source = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if function == torch.Tensor.device.__get__:
            return device_of(source)
        if function == torch.Tensor.is_cuda.__get__:
            return device_of(source) == GPU
        if function is torch.Tensor.numpy and device_of(source) == GPU:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if function is torch.Tensor.pin_memory:
            return source
        if function is torch._C._nn._parse_to:  # the arguments of `Module.to`
            return function(*args, **kwargs)
        wanted = [CPU] if function is torch.Tensor.cpu else []
        wanted += [argument for argument in (*args, kwargs.get("device")) if isinstance(argument, torch.device)]
        args = [CPU if isinstance(argument, torch.device) else argument for argument in args]
        result = function(*args, **kwargs | ({"device": CPU} if "device" in kwargs else {}))
        return result if not wanted or device_of(result) == wanted[0] else put(result.clone(), wanted[0])


class Operations(TorchDispatchMode):
    """Results are where their arguments are."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        deciding = given[:1] if function.overloadpacket.__name__ in ("copy_", "_to_copy", "index") else given
        in_backward = torch._C._current_graph_task_id() != -1  # which makes zeros from nothing, on the loss's device
        device = GPU if GPU in map(device_of, deciding) or (in_backward and not given) else CPU
        if any(tensor.ndim and device_of(tensor) != device for tensor in deciding):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found two in {function}")
        old = {storage(tensor)._cdata for tensor in given}
        result = function(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and storage(leaf)._cdata not in old:
                put(leaf, device)
        return result


@contextlib.contextmanager
def pretend_gpu() -> Iterator[None]:
    on_gpu.clear()
    with Calls(), Operations():
        yield
