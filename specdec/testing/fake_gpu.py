"""A GPU that does not exist: its tensors have values, and every launch and every wait of the host for it is counted.

Tensors live in the memory of the host and say that they are on the device `fakegpu:0`, which PyTorch takes for a real
one. So the code path of a GPU runs on any machine, token for token; what would block is told from what ATen is asked:
reading a value back (`item`, `tolist`, a copy to the host), uploading memory that is not pinned, indexing with lists or
with tensors of the host, and operators whose result's size depends on values (boolean masks, `nonzero`, `unique`) or
that check their input (`multinomial`). Tensors of the two devices do not mix, as on a real one.

It counts, it does not time. An ATen call that touches data counts as one launch; some are several kernels.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_NAME = "fakegpu"
_aten = torch.ops.aten
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "lift"}
_SIZES_FROM_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
_CHECKS = {"multinomial": 2, "_local_scalar_dense": 1}
"""Values that are read back by operators."""
_UPLOADS = {"_to_copy", "copy_"}
_MASK_LAUNCHES = 3
"""With which `scaled_dot_product_attention` makes a bias of a boolean mask."""


class FakeGpuTensor(Tensor):
    """A tensor of the host that says that it is on the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> FakeGpuTensor:
        made: FakeGpuTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=FakeGpu.device(),
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            return FakeGpu.current()._attend(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():  # what is on the host is an ordinary tensor
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{function} outside of `with FakeGpu()`")


class FakeGpu(TorchDispatchMode):
    """Within, `fakegpu:0` is a device. One at a time.

    Attributes:
        launches: operator -> calls that touch data of the device.
        num_queued_copies: between the device and pinned memory, for which the host does not wait.
        syncs: "operator at file:line" -> waits of the host for the device, by the place in our code (or transformers').
    """

    _current: ClassVar[FakeGpu | None] = None
    _is_registered: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        if not FakeGpu._is_registered:  # for the life of the process: PyTorch knows no way back
            _setup_privateuseone_for_python_backend(_NAME)
            FakeGpu._is_registered = True
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.num_queued_copies = 0
        self._pinned: dict[int, Tensor] = {}

    @staticmethod
    def device() -> torch.device:
        return torch.device(_NAME, 0)

    @classmethod
    def current(cls) -> FakeGpu:
        assert cls._current is not None, "outside of `with FakeGpu()`"
        return cls._current

    @property
    def num_launches(self) -> int:
        return self.launches.total()

    @property
    def num_syncs(self) -> int:
        return self.syncs.total()

    def forget(self) -> None:
        """Begin to count again."""
        self.launches.clear()
        self.syncs.clear()
        self.num_queued_copies = 0

    @contextmanager
    def one_launch(self, name: str) -> Iterator[None]:
        """Within, all launches together are one, whose stand-in or twin they are: of a graph, or of a kernel.

        Raises:
            RuntimeError: it copies or waits, which neither can.
        """
        before = Counter(self.launches), self.num_queued_copies, Counter(self.syncs)
        yield
        if (self.num_queued_copies, self.syncs) != before[1:]:
            raise RuntimeError(f"{name} copies or waits: {self.syncs - before[2]}")
        self.launches = before[0] + Counter({name: 1})

    def take(self, model: nn.Module) -> None:
        """Move a model's weights and buffers to the device, in place (within the mode)."""
        moved: dict[int, Any] = {}

        def move(tensor: Tensor) -> FakeGpuTensor:
            return moved.setdefault(id(tensor), FakeGpuTensor(tensor.detach()))

        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None and not isinstance(weight, FakeGpuTensor):
                    module._parameters[name] = nn.Parameter(move(weight), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None and not isinstance(buffer, FakeGpuTensor):
                    module._buffers[name] = move(buffer)

    def __enter__(self) -> Self:
        assert FakeGpu._current is None, "one at a time"
        self._only_lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=...)` is seen as the copy that it is
        FakeGpu._current = self
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        FakeGpu._current = None
        torch._C._set_only_lift_cpu_tensors(self._only_lifts)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, spec = tree_flatten((args, dict(kwargs or {})))
        is_ours = any(isinstance(value, FakeGpuTensor) for value in flat)
        wanted = (kwargs or {}).get("device")
        goes_there = is_ours if wanted is None else torch.device(wanted).type == _NAME
        name = function.overloadpacket.__name__
        if name in ("is_pinned", "_pin_memory"):
            return self._pin(name, args[0])
        if is_ours or goes_there:
            self._note(function, name, args, kwargs or {}, goes_there=goes_there)
        own = {id(value.held): value for value in flat if isinstance(value, FakeGpuTensor)}
        call_args, call_kwargs = tree_unflatten([_on_host(value) for value in flat], spec)
        call_kwargs.pop("pin_memory", None)
        result = function(*call_args, **call_kwargs)
        if name == "copy_" and not isinstance(args[0], FakeGpuTensor):
            return args[0]
        if not goes_there:
            return result
        return tree_map(
            lambda value: own.get(id(value), FakeGpuTensor(value)) if isinstance(value, Tensor) else value, result
        )

    def _pin(self, name: str, tensor: Tensor) -> Any:
        if name == "is_pinned":
            return tensor.untyped_storage().data_ptr() in self._pinned
        copied = tensor.clone()
        self._pinned[copied.untyped_storage().data_ptr()] = copied  # kept: another must not come to this address
        return copied

    def _note(self, function: Any, name: str, args: Any, kwargs: dict[str, Any], *, goes_there: bool) -> None:
        """Count a call."""
        if name in _UPLOADS:
            source, target_is_ours = (
                (args[1], isinstance(args[0], FakeGpuTensor)) if name == "copy_" else (args[0], goes_there)
            )
            if isinstance(source, FakeGpuTensor) != target_is_ours:
                if not source.numel():
                    return
                scalar = name == "copy_" and target_is_ours and source.dim() == 0  # becomes an argument of the kernel
                if scalar:
                    self.launches[name] += 1
                elif self._is_async(name, args, kwargs):
                    self.num_queued_copies += 1
                else:
                    self._wait(name)
                return
        elif name in ("index", "index_put_", "index_put"):
            self._note_index(name, args)
        elif any(isinstance(value, Tensor) and _is_foreign(value) for value in tree_flatten((args, kwargs))[0]):
            raise RuntimeError(f"{function} of tensors of the host and of the GPU")
        for _ in range(_CHECKS.get(name, 1 if name in _SIZES_FROM_VALUES else 0)):
            self._wait(name)
        if not function.is_view and name not in _ALLOCATIONS and name != "_local_scalar_dense":
            self.launches[name] += 1

    def _note_index(self, name: str, args: Any) -> None:
        indices = [index for index in args[1] if index is not None]
        if not isinstance(args[0], FakeGpuTensor):
            raise RuntimeError(f"{name} of a tensor of the host with one of the GPU")
        if name != "index" and _is_foreign(args[2]):
            raise RuntimeError(f"{name} of a tensor of the GPU with values of the host")
        fills = name != "index" and len(indices) == 1 and args[2].numel() == 1
        for index in indices:
            if not isinstance(index, FakeGpuTensor) or (index.dtype == torch.bool and not fills):
                self._wait(name)

    def _is_async(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether a copy between the devices is one that the host need not wait for."""
        non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
        host = [value for value in args[:2] if isinstance(value, Tensor) and not isinstance(value, FakeGpuTensor)]
        return bool(non_blocking and host and host[0].untyped_storage().data_ptr() in self._pinned)

    def _wait(self, name: str) -> None:
        self.syncs[f"{name} at {_place()}"] += 1

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **options: Any
    ) -> Tensor:
        self.launches["scaled_dot_product_attention"] += 1
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            self.launches["scaled_dot_product_attention (mask)"] += _MASK_LAUNCHES
        held = [_on_host(part) for part in (query, key, value, attn_mask)]
        return FakeGpuTensor(nn.functional.scaled_dot_product_attention(*held, *args, **options))


def _on_host(value: Any) -> Any:
    if isinstance(value, FakeGpuTensor):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _is_foreign(value: Tensor) -> bool:
    return not isinstance(value, FakeGpuTensor) and value.dim() > 0


def _place() -> str:
    """Where in our code, or else in transformers', the present call comes from."""
    frame, found = sys._getframe(2), "elsewhere"
    while frame is not None:
        path = frame.f_code.co_filename.replace("\\", "/")
        for package in ("/specdec/", "/trees/", "/transformers/"):
            if package in path and not path.endswith("/testing/fake_gpu.py"):
                place = f"{package[1:]}{path.rpartition(package)[2]}:{frame.f_lineno}"
                if package != "/transformers/":
                    return place
                found = place if found == "elsewhere" else found
        frame = frame.f_back  # type: ignore[assignment]
    return found
