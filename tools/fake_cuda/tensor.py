"""A tensor that claims to be on ``cuda:0``, and the dispatch mode that computes with it.

In the context ``FakeCuda()``, ``torch.ones(3, device="cuda")`` is a ``FakeCudaTensor``. If you add
it to a CPU tensor, this raises RuntimeError, as on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from .counts import COUNTS, place
from .generators import RANDOM, draw
from .kernels import KERNELS

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")

# These start no kernel: they make views or empty memory, or only ask for something.
NO_KERNEL = frozenset(
    """_conj _local_scalar_dense _reshape_alias _unsafe_view alias as_strided chunk detach diagonal
    empty empty_like empty_strided expand imag is_pinned is_same_size lift_fresh movedim new_empty
    new_empty_strided permute real record_stream resolve_conj resolve_neg select set_ slice split
    split_with_sizes squeeze t transpose unbind unfold unsqueeze view view_as_complex
    view_as_real""".split()
)
# The host waits for these, because it needs a size or a value before it can continue.
WAITING = frozenset(
    """_linalg_check_errors _local_scalar_dense _unique2 bincount equal is_nonzero masked_select
    multinomial nonzero repeat_interleave unique_consecutive unique_dim""".split()
)
INDEXED = frozenset(
    "_index_put_impl_ _unsafe_index _unsafe_index_put index index_put index_put_".split()
)
# These accept tensors of two devices.
CROSSING = frozenset("_foreach_copy_ copy copy_ is_same_size set_".split())
# These refuse a CPU tensor even if it is a single number, which elementwise operators accept.
STRICT = frozenset("addmm bmm cat embedding gather index_select isin mm scatter stack".split())
# CUDA copies smaller parts of memory that is not pinned to its own buffer, and does not wait.
STAGED_BYTES = 64 * 1024


class FakeCudaTensor(Tensor):
    """A CPU tensor that claims to be on ``cuda:0``.

    Attributes:
        held: the CPU tensor with the values.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor):  # noqa: D102 - the class says it
        return Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )

    def __init__(self, held: Tensor):
        self.held = held

    def __repr__(self, **_) -> str:
        return f"FakeCudaTensor({self.held!r})"

    def tolist(self) -> list:
        """Returns the values. The host waits for them."""
        return self.cpu().tolist()

    def untyped_storage(self):
        """Returns the storage, which is the host's."""
        return self.held.untyped_storage()

    def numpy(self, *_, **__):
        """Raises, as on a GPU."""
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first. [fake CUDA device]"
        )

    def __reduce_ex__(self, protocol):
        # A tensor that is saved or sent to another process comes back as a CPU tensor.
        return self.held.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError(
                "Only Tensors created explicitly by the user support the deepcopy protocol: detach "
                "this one first [fake CUDA device]"
            )
        # Tensors that share memory share it after the copy too.
        copy = FakeCudaTensor(deepcopy(self.held, memo)).requires_grad_(self.requires_grad)
        memo[id(self)] = copy
        vars(copy).update({name: value for name, value in vars(self).items() if name != "held"})
        return copy

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


class FakeCuda(TorchDispatchMode):
    """In this context, tensors created on ``"cuda"`` are :class:`FakeCudaTensor`."""

    def __enter__(self):
        self._changes = ExitStack()
        # Otherwise torch.tensor(x, device="cuda") bypasses the mode.
        torch._C._set_only_lift_cpu_tensors(True)
        self._changes.callback(torch._C._set_only_lift_cpu_tensors, False)
        for module in (_foreach_utils, optimizer):
            # Then optimizers and clipping handle all tensors at once, as on a GPU.
            types = [*module._foreach_supported_types, FakeCudaTensor]
            change = mock.patch.object(module, "_foreach_supported_types", types)
            self._changes.enter_context(change)
        data = property(Tensor.data.__get__, _set_data)
        self._changes.enter_context(mock.patch.object(Tensor, "data", data))
        for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
            change = mock.patch.object(owner, "synchronize", _counted(owner.synchronize))
            self._changes.enter_context(change)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._changes.close()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


# PyTorch's own ``tensor.data = value``.
_SET_DATA = Tensor.data.__set__


def _set_data(tensor: Tensor, value: Tensor) -> None:
    """Does ``tensor.data = value``, by which ``Module.to`` moves parameters in place."""
    if isinstance(tensor, FakeCudaTensor) == isinstance(value, FakeCudaTensor):
        _SET_DATA(tensor, value)
        if isinstance(tensor, FakeCudaTensor):
            tensor.held = value.held
        return
    if isinstance(tensor, nn.Parameter):
        moved = nn.Parameter(value.detach(), tensor.requires_grad)
    else:
        moved = value.detach().requires_grad_(tensor.requires_grad)
    attributes = {name: x for name, x in vars(tensor).items() if name not in ("held", "_is_param")}
    gradient, tensor.grad = tensor.grad, None
    torch.utils.swap_tensors(tensor, moved)
    vars(tensor).update(attributes)
    if gradient is not None:
        tensor.grad = gradient.to(tensor)


def _counted(synchronize: Callable) -> Callable:
    def wait(*args, **kwargs):
        COUNTS.waits["synchronize", place()] += 1
        return synchronize(*args, **kwargs)

    return wait


def _refuse(operator, words: str) -> None:
    raise RuntimeError(f"{words} (operator {operator}) [fake CUDA device]")


def _flat(args, kwargs) -> Iterator[Any]:
    """Yields all arguments, also those in lists; no operator nests lists."""
    for each in (*args, *kwargs.values()):
        if isinstance(each, list | tuple):
            yield from each
        else:
            yield each


def _imagining() -> bool:
    """Returns whether a FakeTensorMode is active; it runs after this mode."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _on_cpu(x):
    """Replaces fake tensors by the CPU tensors that they hold, also in lists."""
    if isinstance(x, FakeCudaTensor):
        return x.held
    if isinstance(x, list | tuple):
        return type(x)(_on_cpu(each) for each in x)
    return x


def _run(operator, args: tuple, kwargs: dict):
    """Computes an operator on the device of its arguments, or refuses it as CUDA does."""
    name = operator._schema.name.partition("::")[2]
    tensors = [x for x in _flat(args, kwargs) if isinstance(x, Tensor)]
    fakes = [x for x in tensors if isinstance(x, FakeCudaTensor)]
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if not fakes and (device is None or device.type != "cuda"):
        return operator(*args, **kwargs)
    if _imagining() or any(isinstance(x, FakeTensor) for x in tensors):
        return operator(*args, **kwargs)
    if name == "_to_copy":
        return _to_copy(operator, args[0], device, kwargs)
    if name == "copy_":
        return _copy(operator, *args, **kwargs)
    on_gpu = device.type == "cuda" if device else True
    # If a device is given, the tensors are only patterns for the new tensor.
    if device is None and len(fakes) < len(tensors):
        on_gpu &= _may_mix(operator, name, args, tensors)
    if on_gpu:
        _count(name, args)
    plain, options = _on_cpu(args), {key: _on_cpu(value) for key, value in kwargs.items()}
    if on_gpu and device is not None:
        options |= {"device": CPU}
        options.pop("pin_memory", None)
    if on_gpu and name in KERNELS:
        out = KERNELS[name](*plain, **options)
    elif on_gpu and (name.startswith(RANDOM) or "generator" in options):
        out = draw(operator, plain, options)
    else:
        out = operator(*plain, **options)
    if name == "_local_scalar_dense" or not on_gpu:
        return out
    if torch.Tag.inplace_view in operator.tags:
        return return_and_correct_aliasing(operator, args, kwargs, out)
    # A tensor that was changed in place is the argument itself.
    known = {id(fake.held): fake for fake in fakes}
    return _on_gpu(out, known)


def _on_gpu(x, known: dict[int, Tensor]):
    if isinstance(x, Tensor):
        return known[id(x)] if id(x) in known else FakeCudaTensor(x)
    if isinstance(x, list | tuple):
        return type(x)(_on_gpu(each, known) for each in x)
    return x


def _count(name: str, args: tuple) -> None:
    here = place()
    if name not in NO_KERNEL:
        COUNTS.operators[name, here] += 1
    if name in WAITING:
        COUNTS.waits[name, here] += 1
    if name in INDEXED:
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        number = len(args) > 2 and args[2].numel() == 1 and args[2].device.type == "cpu"
        if masks and not (number and len(masks) == 1):  # masked_fill writes a single number
            COUNTS.waits["index by a mask", here] += 1
        for index in args[1]:
            if index is not None and not isinstance(index, FakeCudaTensor):
                COUNTS.uploads["index", here] += 1
                COUNTS.waits["upload of an index", here] += 1


def _may_mix(operator, name: str, args: tuple, tensors: list[Tensor]) -> bool:
    """Returns whether the GPU runs an operator on two devices; raises if CUDA refuses it."""
    if name in CROSSING:
        return True
    if name in INDEXED:
        own = isinstance(args[0], FakeCudaTensor)
        if not own and any(isinstance(x, FakeCudaTensor) for x in args[1]):
            _refuse(
                operator, "indices should be either on cpu or on the same device as the indexed "
                "tensor (cpu)"
            )  # fmt: skip
        value = args[2] if len(args) > 2 else None
        if value is not None and isinstance(value, FakeCudaTensor) != own and value.dim() > 0:
            _refuse(operator, "expected self and value to be on one device, found cuda:0 and cpu")
        return own
    for each in tensors:
        if not isinstance(each, FakeCudaTensor) and (each.dim() > 0 or name in STRICT):
            shapes = [(tuple(x.shape), x.device.type) for x in tensors]
            _refuse(
                operator, "Expected all tensors to be on the same device, but found at least two "
                f"devices, cuda:0 and cpu: {shapes}"
            )  # fmt: skip
    return True


def _to_copy(operator, source: Tensor, device: torch.device | None, kwargs: dict) -> Tensor:
    """Does ``Tensor.to``, between two devices or on one."""
    target = device or source.device
    options = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
    if target.type not in ("cuda", "cpu"):
        return operator(_on_cpu(source), device=target, **options)
    if source.device.type == "meta":
        _refuse(operator, "Cannot copy out of meta tensor; no data!")
    options.pop("pin_memory", None)
    copy = operator(_on_cpu(source), device=CPU, **options)
    _count_copy("_to_copy", source, target, bool(kwargs.get("non_blocking")), pinned=True)
    return FakeCudaTensor(copy) if target.type == "cuda" else copy


def _copy(operator, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    pinned = to.device.type == "cpu" and to.is_pinned()
    _count_copy("copy_", source, to.device, non_blocking, pinned)
    operator(_on_cpu(to), _on_cpu(source))
    return to


def _count_copy(
    name: str, source: Tensor, target: torch.device, non_blocking: bool, pinned: bool
) -> None:
    """Counts a copy, and a wait unless the copy is asynchronous.

    Args:
        name: the operator's name.
        source: the tensor that is copied.
        target: the device of the copy.
        non_blocking: whether the caller asks the host not to wait.
        pinned: whether the target's memory is pinned, if the target is the host. With
            ``non_blocking``, ``Tensor.to`` pins it.
    """
    here = place()
    if source.device.type == target.type:
        COUNTS.operators[name, here] += 1
    elif target.type == "cuda":
        COUNTS.uploads[name, here] += 1
        size = source.numel() * source.element_size()
        if not non_blocking or (size > STAGED_BYTES and not source.is_pinned()):
            COUNTS.waits["upload", here] += 1
    elif not (non_blocking and pinned):
        COUNTS.waits["download", here] += 1
