"""Where and how torch trains: its device, its number of threads, and the precision of the forward passes.

Arrays stay on the host; the module and one batch at a time are on the device. On the CPU the same command gives the
same bytes on one number of threads. CUDA makes no such promise, and no test of this project has run on a GPU: they
train on a second device in software, which refuses to mix with the CPU, and ask for a device that is not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch

from mezzotint.runtime.errors import InputError

from ..core.pipeline import Context

Precision = Literal["float32", "bfloat16"]


def find_device(name: str) -> torch.device:
    """Return the device `cpu`, `cuda` or `cuda:N`. Raise InputError where torch does not have it."""
    device = torch.device(name)
    if device.type == "cpu":
        return device
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there > (device.index or 0):
        return device
    if torch.version.cuda is None and torch.version.hip is None:
        what, hint = (
            f"torch {torch.__version__} is built without CUDA",
            "install a torch with CUDA, or train on the CPU",
        )
    elif there:
        what, hint = f"torch finds {there}, counted from cuda:0", f"choose one of cuda:0 to cuda:{there - 1}"
    else:
        what, hint = "torch finds no GPU on this machine", "look at its driver (nvidia-smi), or train on the CPU"
    raise InputError(f"the device {name!r} is not there: {what}", where="--device", hint=hint)


def torch_threads(context: Context) -> int:
    """Return the number of threads that torch trains with in a context."""
    return context.threads or torch.get_num_threads()


@contextmanager
def training_device(context: Context) -> Iterator[torch.device]:
    """Give torch the threads of a context, and yield its device; settings of torch are as before afterwards.

    Sums depend on the number of threads. On a GPU float32 means float32: convolutions are not computed in TF32.
    """
    device = find_device(context.device)
    threads, short = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(torch_threads(context))
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield device
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = short


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return what computes forward passes in a precision: layers in bfloat16, but all quantizers in float32."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, torch.bfloat16)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has computed all that it was given. A CPU computes at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
