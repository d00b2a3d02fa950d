"""Replaying a fixed piece of GPU work as one CUDA graph: hundreds of kernel launches become one."""

import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from tqdm import tqdm

from utils.flags import first_line

Result = TypeVar("Result")
# Before the capture: libraries, autograd and the optimizer allocate what they need at their first calls
EAGER_CALLS = 3
capture_failed = False  # in this process


def cuda_graph(function: Callable[[], Result], enabled: bool) -> Callable[[], Result]:
    """`function`, captured at its fourth call and replayed from then on; `function` itself unless `enabled`.

    A replay runs the same kernels on the same memory, with new random numbers, and none of the Python. So `function`
    must take everything that changes from one call to the next from tensors on the GPU that are changed in place (its
    masks, the replay's position, the observation to act on), must keep its shapes, and must never make the host wait.
    If a capture fails, one line says so, and all functions are called eagerly from then on.

    Returns:
        A function that returns what `function` does. After the capture these are always the same tensors: the next
        replay overwrites them.

    The recipe is that of PyTorch's notes on CUDA graphs, "Whole-network capture".
    """
    if not enabled:
        return function
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    calls, result = 0, None

    def replayed() -> Result:
        global capture_failed
        nonlocal calls, result
        calls += 1
        if capture_failed:
            return function()
        if calls <= EAGER_CALLS:  # on a side stream, as the capture will be
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                eager_result = function()
            torch.cuda.current_stream().wait_stream(stream)
            return eager_result
        if calls == EAGER_CALLS + 1:
            try:
                with torch.cuda.graph(graph, stream=stream):  # captures, and runs nothing
                    result = function()
            except RuntimeError as error:
                capture_failed = True
                tqdm.write(f"note: training continues without CUDA graphs: {first_line(error)}", file=sys.stderr)
                # An invalid capture leaves the generator's state waiting for its end: eager calls would raise, and so
                # would replays of earlier graphs, which share that state
                generator = torch.cuda.default_generators[torch.cuda.current_device()]
                generator.graphsafe_set_state(generator.clone_state())
                return function()
        graph.replay()
        return result

    return replayed
