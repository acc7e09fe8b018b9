"""A second device for torch, in pure Python: it computes what the CPU does, and refuses to mix with it as a GPU does.

Its tensors say that they are on `meta`, and hold their values in a tensor of the CPU. An operation that has tensors of
both devices raises, as on CUDA: but for copies, and for single numbers on the CPU. `.numpy()` raises too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SECOND = torch.device("meta")
_TRANSFERS = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class _Away(torch.Tensor):
    """A tensor on the second device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> _Away:
        made: _Away = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=SECOND
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """What lets `device=SECOND` make and move tensors. `computed` counts the operations there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.computed = 0
        self._patches = ExitStack()

    def __enter__(self) -> SecondDevice:
        for name in ("tensor", "as_tensor"):  # on `meta` torch makes an empty tensor of an array, which no mode sees
            self._patches.enter_context(patch.object(torch, name, _copied(getattr(torch, name))))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _compute(func, args, kwargs or {})
        self.computed += any(isinstance(leaf, _Away) for leaf in tree_leaves(result))
        return result


def _copied(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a function that makes a tensor on the CPU, and then moves it."""

    def made(data: Any, *, device: torch.device | None = None, **options: Any) -> torch.Tensor:
        tensor = make(data, **options)
        return tensor if device is None else tensor.to(device)

    return made


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    away = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, _Away)}
    if away and func not in _TRANSFERS:
        mixed = [tuple(t.shape) for t in tensors if not isinstance(t, _Away) and t.ndim > 0]
        if mixed:
            raise RuntimeError(f"{func} of tensors on two devices; on the CPU are those of the shapes {mixed}")
    target = SECOND if away else torch.device("cpu")
    if kwargs.get("device") is not None:
        target = kwargs["device"]
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or target.type != SECOND.type:
            return leaf
        return away.get(id(leaf)) if id(leaf) in away else _Away(leaf)

    return tree_map(placed, result)


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, _Away) else leaf
