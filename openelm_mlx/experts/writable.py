"""MLX arrays whose memory is written from outside MLX, by the fastest method that works on this machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal, Protocol

import mlx.core as mx
import numpy as np

from .records import Check, HostTarget, Target

if TYPE_CHECKING:
    from .cuda_driver import Courier, CudaDriver

# view: a NumPy view of the array's own memory. driver: the CUDA driver. copy: a buffer of one place, copied in.
WriteMode = Literal["view", "driver", "copy"]

_NUMPY_TYPES = {mx.uint32: np.uint32, mx.uint8: np.uint8}


class WritableArray(Protocol):
    """An array of S places along its first axis, each of which can be filled from outside.

    in_place: whether `array` keeps its memory, so that graphs may be built on it before a place is filled, and several
    places may be filled at once. If not, `settle` and `wait` have to follow each fill.
    """

    array: mx.array
    in_place: bool

    def target(self, place: int, nbytes: int | None = None, check: Check | None = None) -> Target:
        """The first `nbytes` bytes of a place; all of them by default."""

    def settle(self, place: int) -> None:
        """Copy what was filled into the array. Nothing else may hold the array then."""

    def wait(self) -> None:
        """Wait until kernels see everything that was filled before, in any array of the same `Allocator`."""


class ViewedArray:
    """Written through a NumPy view: where host and device share memory, or the device is the host."""

    in_place = True

    def __init__(self, array: mx.array, view: np.ndarray) -> None:
        self.array, self.view = array, view

    def target(self, place: int, nbytes: int | None = None, check: Check | None = None) -> HostTarget:
        return HostTarget(self.view[place].data.cast("B")[:nbytes], check)

    def settle(self, place: int) -> None:
        pass

    def wait(self) -> None:
        pass


class CopiedArray:
    """Written through a buffer of one place, which MLX copies into the array: works everywhere, but slowly."""

    in_place = False

    def __init__(self, array: mx.array) -> None:
        self.array = array
        self._record = np.zeros(array.shape[1:], _NUMPY_TYPES[array.dtype])

    def target(self, place: int, nbytes: int | None = None, check: Check | None = None) -> HostTarget:
        return HostTarget(self._record.data.cast("B")[:nbytes], check)

    def settle(self, place: int) -> None:
        self.array[place] = mx.array(self._record)

    def wait(self) -> None:
        mx.eval(self.array)


class Allocator:
    """How one model's arrays are written: as requested if that works; by default the fastest method that works.

    For a view, MLX's CUDA backend moves the whole array to managed memory, where kernels read it at another speed. So the
    default there is the driver, or else copies.
    """

    def __init__(self, asked: WriteMode | None = None) -> None:
        on_cuda = mx.cuda.is_available() and mx.default_device() == mx.Device(mx.gpu)
        self.courier: Courier | None = None
        self.way: WriteMode = "copy"
        if asked == "driver" or (asked is None and on_cuda):
            driver = cuda_driver()
            if driver is not None:
                from .cuda_driver import Courier

                self.way, self.courier = "driver", Courier(driver)
        elif asked != "copy" and views_work():
            self.way = "view"

    def allocate(self, shape: tuple[int, ...], dtype: mx.Dtype) -> WritableArray:
        """An array of zeros to be written."""
        array = mx.zeros(shape, dtype)
        mx.eval(array)  # allocates its memory
        if self.courier is not None:
            from .cuda_driver import DeviceArray

            return DeviceArray(array, self.courier)
        view = memory_of(array) if self.way == "view" else None
        return CopiedArray(array) if view is None else ViewedArray(array, view)


def cuda_driver() -> CudaDriver | None:
    """The CUDA driver if it works. A Mac never imports the code for it."""
    if sys.platform == "darwin":
        return None
    from .cuda_driver import working_driver

    return working_driver()


def memory_of(array: mx.array) -> np.ndarray | None:
    """An evaluated array's own memory as a writable NumPy array; None if NumPy made a copy instead.

    NumPy 1 silently copies what it cannot view: two views of one array have the same address, two copies do not.
    """
    try:
        view, again = np.array(array, copy=False), np.array(array, copy=False)
    except (ValueError, TypeError, BufferError):
        return None
    is_memory = view.ctypes.data == again.ctypes.data and view.flags.writeable and view.flags.c_contiguous
    return view if is_memory else None


def views_work() -> bool:
    """Whether, on this machine and backend, a NumPy view is an array's memory and the next kernel sees writes to it."""
    for dtype, kind in _NUMPY_TYPES.items():
        array = mx.zeros((4, 64), dtype)
        mx.eval(array)
        view = memory_of(array)
        if view is None:
            return False
        before = mx.sum(array).item()
        view[2] = np.arange(64, dtype=kind)
        if (before, mx.sum(array).item()) != (0, 63 * 32):
            return False
    return True
