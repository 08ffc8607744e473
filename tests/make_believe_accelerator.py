"""A make-believe accelerator: tensors that compute on the CPU, say that they are on another device, and do not mix.

Finds, without a GPU, code that mixes tensors of two devices. Built on torch's Python backend for PrivateUse1, which
is experimental (tried with torch 2.13). Registering it changes the whole process: tests use `Worker`, another one.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "gpu"
DEVICE = f"{NAME}:0"

aten = torch.ops.aten
# A copy is how a tensor changes its device.
COPIES = (aten.copy_.default, aten._to_copy.default)
# A CUDA tensor may be indexed by CPU tensors.
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor)
# As the pointwise operations, these take a CPU tensor without axes where they take a number.
TAKE_A_NUMBER = (*INDEXING, aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor)

_registered: list[torch.library.Library] = []  # what a library registers goes when the library does


class MixedDevicesError(RuntimeError):
    """An operation got tensors of two devices."""


class DeviceTensor(torch.Tensor):
    """A CPU tensor, `on_cpu`, that says it is on the accelerator."""

    on_cpu: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor) -> DeviceTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=torch.device(DEVICE),
        )
        tensor.on_cpu = on_cpu
        return tensor

    def tolist(self) -> Any:
        return self.on_cpu.tolist()

    def __format__(self, how: str) -> str:
        """A tensor without axes is written as its number; torch writes a subclass's otherwise, and finds no end."""
        return format(self.on_cpu, how)

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")

    def storage(self) -> Any:
        """What transformers and safetensors tell tensors apart by when they save a model."""
        return self.on_cpu.storage()

    def untyped_storage(self) -> Any:
        return self.on_cpu.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __tensor_flatten__(self):
        return ["on_cpu"], None

    @staticmethod
    def __tensor_unflatten__(inner, metadata, size, stride):
        return DeviceTensor(inner["on_cpu"])


class _OnDevice(TorchDispatchMode):
    """Lets `device="gpu"` make a `DeviceTensor`, also where no argument is a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU; its results are on the device of its arguments, or on the one it names."""
    _check_devices(func, args, kwargs)
    takes_device_tensor = any(isinstance(value, DeviceTensor) for value in tree_leaves((args, kwargs)))
    on_device = takes_device_tensor
    cpu_args, cpu_kwargs = tree_map(_to_cpu, (args, dict(kwargs)))
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == NAME
        cpu_kwargs["device"] = "cpu" if on_device else kwargs["device"]
    result = func(*cpu_args, **cpu_kwargs)
    if func is aten.copy_.default:
        return args[0]
    if func is aten._local_scalar_dense.default or not on_device:
        return result
    result = tree_map(_to_device, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if takes_device_tensor else result


def _check_devices(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if func in COPIES:
        return
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    if len(on_cpu) in (0, len(tensors)):
        return
    may_stay = []
    if func in INDEXING and isinstance(args[0], DeviceTensor):
        may_stay = [id(index) for index in args[1] if index is not None]
    takes_number = func in TAKE_A_NUMBER or torch.Tag.pointwise in func.tags
    mixed = [t for t in on_cpu if id(t) not in may_stay and not (takes_number and t.dim() == 0)]
    if mixed:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in mixed)
        raise MixedDevicesError(f"{func} got tensors on {DEVICE}, and on the cpu of shape {shapes}")


def _to_cpu(value: Any) -> Any:
    return value.on_cpu if isinstance(value, DeviceTensor) else value


def _to_device(value: Any) -> Any:
    is_other = isinstance(value, torch.Tensor) and not isinstance(value, DeviceTensor)
    return DeviceTensor(value) if is_other else value


def register() -> None:
    """Make torch know the device. Once a process, before any tensor is on it."""
    _setup_privateuseone_for_python_backend(NAME)
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # module.to(...) makes new parameters
    library = torch.library.Library("aten", "IMPL")
    _registered.append(library)

    def on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**kwargs, "device": "cpu", "pin_memory": False}

    def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        _to_cpu(target).copy_(_to_cpu(source))
        return target

    # Python's indexing, and torch.tensor of a list of tensors, run below the dispatch mode, by these.
    library.impl(
        "empty_strided", lambda *a, **k: DeviceTensor(torch.empty_strided(*a, **on_cpu(k))), "PrivateUse1"
    )
    library.impl(
        "empty.memory_format", lambda *a, **k: DeviceTensor(torch.empty(*a, **on_cpu(k))), "PrivateUse1"
    )
    library.impl("_local_scalar_dense", lambda tensor: _to_cpu(tensor).item(), "PrivateUse1")
    library.impl("copy_", copy, "PrivateUse1")
    library.impl("_copy_from", lambda source, target, _=False: copy(target, source), "PrivateUse1")
    os.environ["ACCELERATE_TORCH_DEVICE"] = DEVICE  # where the Trainer trains


@contextmanager
def accelerator() -> Iterator[None]:
    """Compute on the accelerator what names it; no fused attention kernel knows it, so attention runs unfused."""
    with _OnDevice(), sdpa_kernel(SDPBackend.MATH):
        yield


class Worker:
    """A process that has the accelerator. Functions and arguments must be picklable."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=register)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what the function returns there, or raise what it raises."""
        return self.pool.submit(_on_accelerator, function, arguments).result()

    def close(self) -> None:
        self.pool.shutdown()


def _on_accelerator(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    with accelerator():
        return function(*arguments)
