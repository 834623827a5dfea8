"""What a training step holds in memory, measured without a machine that could hold it.

The real step runs once, forward and backward, on fake tensors: they have shapes and dtypes but no
numbers. Bytes are counted by storage, from the operation that makes one until the last reference
to it is gone, so what autograd saves, what is temporary and every peak are in it.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd import Variable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from asymlift.maths.zero_memory import Device, Point
from asymlift.model.like_cuda import LikeCuda
from asymlift.model.perceptual import Perceptual
from asymlift.model.pixel_flow import PixelFlow
from asymlift.model.training_step import Batch, TrainingStep

INDEXED = {
    torch.ops.aten.index,
    torch.ops.aten.index_put,
    torch.ops.aten.index_put_,
    torch.ops.aten._index_put_impl_,
}
BLOCK = {"cuda": 512, "cpu": 64}  # bytes that allocations are rounded up to


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations inside make, while they live."""

    def __init__(self, device: Device = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block = BLOCK[device]
        self.live = self.peak = 0
        self.sizes: dict[int, tuple[int, Any]] = {}  # by storage; the reference keeps its callback

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = (value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor))
        self.ignore(tensor for tensor in given if tensor.device.type != "meta")
        made = func(*args, **(kwargs or {}))
        for one in tree_iter(made):
            if isinstance(one, Tensor):
                self.count(one)
        return made

    def count(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":  # a shape alone; a fake tensor names its device
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self.sizes:
            return
        size = -(-storage.nbytes() // self.block) * self.block
        self.remember(storage, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def remember(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        self.sizes[key] = size, weakref.ref(storage, lambda _: self.forget(key))

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave out what was there before: parameters, and tables that a class keeps."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.remember(storage, 0)

    def forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)[0]

    def restart(self) -> int:
        """The peak so far; a new one begins at what is alive now."""
        peak, self.peak = self.peak, self.live
        return peak


class KeepReal(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Among fake tensors, what follows from real ones alone stays real: masks, positions, tables.

    Shapes may depend on them: pictures behind differing numbers of words, say.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if not given:  # only whole numbers are worth making
            made = func(*args, **kwargs)
            if not isinstance(made, FakeTensor) or made.is_floating_point() or made.is_complex():
                return made
        elif any(isinstance(tensor, FakeTensor) for tensor in given):
            if func.overloadpacket in INDEXED:
                args = (args[0], [p for index in args[1] for p in as_places(index)], *args[2:])
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def as_places(index: Tensor | None) -> Sequence[Tensor | None]:
    """Where a real mask is true: how many places there are, a fake tensor could not tell.

    One that follows from fake numbers, as of the tokens that an expert takes, may take all.
    """
    if index is None or index.dtype != torch.bool:
        return [index]
    with unset_fake_temporarily():
        if isinstance(index, FakeTensor):
            return torch.ones(index.shape, dtype=torch.bool).nonzero().unbind(1)
        return index.nonzero().unbind(1)


@dataclass(frozen=True)
class StepFootprint:
    """Bytes that one micro-batch takes beside weights and gradients."""

    batch: int
    student: int  # alive after the student's forward pass: what its backward pass needs
    reference: int  # of the reference pass at its highest, beside that
    perceptual: int  # likewise; what the way back needs of it included
    kept: int  # alive when the way back begins
    curve: tuple[
        Point, ...
    ]  # the highest since the gradient before, and the gradients made by then

    @property
    def peak(self) -> int:
        return max(point.live for point in self.curve)


def measure_step(
    step: TrainingStep,
    make_batch: Callable[[], Batch],
    size: int,
    device: Device,
    mode: AbstractContextManager[Any],
) -> StepFootprint:
    """Run a step, of fake tensors if `mode` makes such, forward and backward as the device would.

    The step is used up: its hooks stay.
    """
    watch = Watch(LiveBytes(device), step)
    everyone = list(range(size))  # which samples are compared follows from numbers
    step.chosen = lambda batch: (everyone, everyone)  # type: ignore[method-assign]
    with ExitStack() as inside:
        inside.enter_context(mode)
        inside.enter_context(KeepReal())  # type: ignore[no-untyped-call]
        inside.enter_context(LikeCuda(device))
        inside.enter_context(watch.bytes)
        batch = make_batch()
        watch.found["batch"] = watch.bytes.live
        loss, logged = step(batch)
        watch.found["kept"] = watch.bytes.live
        del logged
        backward(loss)
        watch.note(0)
    return StepFootprint(**watch.found, curve=tuple(watch.curve))


def backward(loss: Tensor) -> None:
    """loss.backward(), but seen by function modes, which that hides from recomputed activations."""
    Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), True, True
    )


def measure_sampling(
    flow: PixelFlow, make_batch: Callable[[], Batch], device: Device, mode: FakeTensorMode
) -> int:
    """The highest of one evaluation of the velocity without gradients, weights aside."""
    live = LiveBytes(device)
    live.ignore([*flow.parameters(), *flow.buffers()])
    keep_real = KeepReal()  # type: ignore[no-untyped-call]
    with mode, keep_real, LikeCuda(device), live, torch.no_grad():
        batch = make_batch()
        flow(batch.x0, batch.sigma, batch.text, batch.grid, floor=1.0)
    return live.peak


class Watch:
    """Notes what is alive at the seams of a training step."""

    def __init__(self, live: LiveBytes, step: TrainingStep) -> None:
        self.bytes, self.curve, self.gradients = live, list[Point](), 0
        self.found = {"batch": 0, "student": 0, "reference": 0, "perceptual": 0, "kept": 0}
        self.highest = 0  # since the gradient before
        live.ignore(step.parameters())
        live.ignore(step.buffers())
        step.student.register_forward_pre_hook(lambda *_: self.begins())
        step.student.register_forward_hook(lambda *_: self.ends_flow())
        if step.reference_copy is not None:
            step.reference_copy.register_forward_pre_hook(lambda *_: self.begins())
            step.reference_copy.register_forward_hook(lambda *_: self.ends_flow())
        if step.perceptual[0] is not None:
            step.perceptual = [self.watched(step.perceptual[0])]
        for parameter in step.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self.gradient)  # type: ignore[no-untyped-call]

    def begins(self) -> None:
        self.highest = max(self.highest, self.bytes.restart())
        self.start = self.bytes.live

    def ends(self) -> int:
        """How far above its beginning the inside got."""
        peak = self.bytes.restart()
        self.highest = max(self.highest, peak)
        return peak - self.start

    def ends_flow(self) -> None:
        """The student comes first; the second pass is the reference's."""
        above = self.ends()
        if self.found["student"]:
            self.found["reference"] = above
        else:
            self.found["student"] = self.bytes.live - self.found["batch"]

    def watched(self, measure: Perceptual) -> Perceptual:
        def watching(image: Tensor, target: Tensor) -> Tensor:
            self.begins()
            distance = measure(image, target)
            self.found["perceptual"] = self.ends()
            return distance

        return watching

    def gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        size = parameter.grad.untyped_storage().nbytes()
        parameter.grad = None
        self.note(size)

    def note(self, size: int) -> None:
        highest = max(self.highest, self.bytes.restart())
        self.highest = 0
        self.curve.append(Point(highest, self.gradients))
        self.gradients += size


def make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Give a module on the meta device fake weights: of the same shapes and dtypes, on a CPU."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = (
                nn.Parameter(empty, requires_grad=tensor.requires_grad) if weight else empty
            )
        return made[id(tensor)]

    with mode:
        for part in module.modules():
            for store in (part._parameters, part._buffers):
                for name, tensor in store.items():
                    if tensor is not None:
                        store[name] = fake(tensor)  # type: ignore[assignment]
