"""Copies between the host and the arrays of MLX's CUDA backend, through the CUDA driver itself.

For a NumPy view MLX moves an array to managed memory, whose pages travel between host and device on every access, and a
copy by MLX itself goes through the host's memory twice. Here reading threads fill buffers of pinned memory, which the
device's copy engine reads at the full rate of the bus while the next bytes come from the file, and a kernel writes small
results into pinned memory that the host polls. A kernel reports an array's address, which is valid until a view of the
array is made.

CUDA Driver API reference: memory management, stream management. The library comes with NVIDIA's driver.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from queue import SimpleQueue
from typing import Any, NamedTuple, final

import mlx.core as mx
import numpy as np

from .records import PIECE_BYTES, Check, Delivery, fill_with

# Buffers of a model, PIECE_BYTES each: those being filled, and those on their way to the device.
NUM_BUFFERS = 32
# How many numbers fit into the memory for results.
MOST_RESULTS = 32768
# Not a valid index.
NOT_THERE = 0xFFFFFFFF
# Seconds that the host polls; after that it waits in MLX, which reports errors.
LONGEST_LOOK = 1.0

_Pointer, _Size, _Int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (_Pointer, _Int),
    "cuDevicePrimaryCtxRetain": (_Pointer, _Int),
    "cuCtxSetCurrent": (_Pointer,),
    "cuMemHostAlloc": (_Pointer, _Size, ctypes.c_uint),
    "cuMemFreeHost": (_Pointer,),
    "cuStreamCreate": (_Pointer, ctypes.c_uint),
    "cuStreamSynchronize": (_Pointer,),
    "cuStreamDestroy_v2": (_Pointer,),
    "cuMemcpyHtoDAsync_v2": (ctypes.c_uint64, _Pointer, _Size, _Pointer),
}
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for work on the default stream


class CudaDriver:
    """The driver's library and MLX's device in it. Raises OSError where there is none."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        for name, types in _SIGNATURES.items():
            getattr(self._library, name).argtypes = types
        device = _Int()
        self._context = _Pointer()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)  # MLX's, unless told otherwise
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._library, name)(*arguments)
        if result:
            raise RuntimeError(f"{name} of the CUDA driver failed with error {result}.")

    def pinned(self, nbytes: int) -> Pinned:
        """Allocate pinned host memory, which the device can read and write."""
        self.use()
        pointer = _Pointer()
        self._call("cuMemHostAlloc", ctypes.byref(pointer), nbytes, 0)
        assert pointer.value is not None
        memory = memoryview((ctypes.c_uint8 * nbytes).from_address(pointer.value)).cast("B")
        return Pinned(memory, pointer.value, lambda: self._library.cuMemFreeHost(pointer))

    def use(self) -> None:
        """Make MLX's context current; to be called first in every thread."""
        self._call("cuCtxSetCurrent", self._context)

    def new_stream(self) -> Any:
        """A stream that nothing else waits for."""
        self.use()
        stream = _Pointer()
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        return stream

    def copy(self, address: int, pinned: int, nbytes: int, stream: Any) -> None:
        """Start a copy from pinned memory to the device's memory."""
        self._call("cuMemcpyHtoDAsync_v2", address, pinned, nbytes, stream)

    def wait(self, stream: Any) -> None:
        """Wait until everything in a stream is done."""
        self._call("cuStreamSynchronize", stream)

    def end_stream(self, stream: Any) -> None:
        """Wait for a stream and destroy it."""
        self.wait(stream)
        self._call("cuStreamDestroy_v2", stream)


class Pinned(NamedTuple):
    """Pinned memory, where it begins, and what frees it."""

    memory: memoryview
    address: int
    free: Callable[[], Any]


class Courier:
    """Copies bytes to the device for one model, from buffers that any thread may fill; one thread at a time sends.

    Threads that call the driver slow each other down (docs/LOG.md), so reading threads do not call it. The sending thread must
    not wait for a buffer while others fill them: they may hold all of them. See `records.Buffers`.
    """

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._stream = driver.new_stream()
        self._pinned = driver.pinned(NUM_BUFFERS * PIECE_BYTES)
        self._sent: list[int] = []
        weakref.finalize(self, _end, driver, self._stream, self._pinned).atexit = False
        self.open()

    def open(self) -> None:
        self._driver.use()
        # A new queue for each reading: an interruption may have lost entries of the last one.
        self._sent, free = [], SimpleQueue[int | None]()
        for number in range(NUM_BUFFERS):
            free.put(number)
        self._free = free

    def stop(self) -> None:
        self._free.put(None)

    def fill(self, address: int, nbytes: int, read: Callable[[memoryview], None], check: Check | None) -> Delivery:
        """Fill a buffer with `nbytes` bytes; return the delivery that sends them to the device's address."""
        free = self._free
        number = free.get()
        if number is None:
            free.put(None)  # wakes the next waiting thread
            raise RuntimeError("No buffer becomes free: the reads have been abandoned.")
        start = number * PIECE_BYTES
        buffer = self._pinned.memory[start : start + nbytes]
        read(buffer)
        if check is not None:
            check(buffer)
        return partial(self._send, number, address, nbytes)

    def _send(self, number: int, address: int, nbytes: int) -> None:
        self._driver.copy(address, self._pinned.address + number * PIECE_BYTES, nbytes, self._stream)
        self._sent.append(number)
        if 2 * len(self._sent) >= NUM_BUFFERS:
            self.wait()

    def wait(self) -> None:
        """Wait until everything that was sent has arrived."""
        self._driver.use()
        self._driver.wait(self._stream)
        sent, self._sent = self._sent, []
        for number in sent:
            self._free.put(number)


def _end(driver: CudaDriver, stream: Any, pinned: Pinned) -> None:
    driver.use()  # any thread may release a courier
    driver.end_stream(stream)
    pinned.free()


def working_driver() -> CudaDriver | None:
    """The driver; None where MLX does not compute on CUDA, or where it cannot be reached."""
    if not mx.cuda.is_available() or mx.default_device() == mx.Device(mx.cpu):
        return None
    return _tried_driver()


@lru_cache(maxsize=1)
def _tried_driver() -> CudaDriver | None:
    try:
        driver = CudaDriver()
        return driver if driver_works(driver) else None
    except (OSError, AttributeError, RuntimeError):  # no library, another one, or its refusal
        return None


def driver_works(driver: CudaDriver) -> bool:
    """Whether, on this machine, the next kernel reads exactly the bytes that were sent to an array's address."""
    for dtype, kind in ((mx.uint32, np.uint32), (mx.uint8, np.uint8)):
        array = mx.zeros((4, 64), dtype)
        mx.eval(array)
        before = mx.sum(array).item()
        row = np.arange(64, dtype=kind)
        courier = Courier(driver)
        fill_with(DeviceTarget(courier, address_of(array) + 2 * row.nbytes, row.nbytes), row)
        courier.wait()
        sums = [mx.sum(array[i]).item() for i in range(4)]
        if before != 0 or sums != [0, 0, 63 * 32, 0]:
            return False
    return results_on_host([mx.array([3, 1, 2], mx.uint32) + 1], ResultBuffer(driver))[0].tolist() == [4, 2, 3]


@lru_cache(maxsize=1)
def _address_kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="openelm_mlx_address",
        input_names=["array"],
        output_names=["address"],
        source="address[0] = reinterpret_cast<uint64_t>(array);",
    )


def address_of(array: mx.array) -> int:
    """An evaluated array's address in the device's memory, valid until the array is freed or viewed."""
    [address] = _address_kernel()(
        inputs=[array], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,)], output_dtypes=[mx.uint64]
    )
    return int(address.item())


class DeviceTarget:
    """Memory of the device, as a `records.Target`: `nbytes` bytes from `address` on."""

    def __init__(self, courier: Courier, address: int, nbytes: int, check: Check | None = None) -> None:
        self._courier, self._address, self.nbytes, self._check = courier, address, nbytes, check

    def part(self, start: int, stop: int) -> DeviceTarget:
        stop = min(stop, self.nbytes)
        return DeviceTarget(self._courier, self._address + start, stop - start, self._check)

    def fill(self, read: Callable[[memoryview], None]) -> Delivery:
        return self._courier.fill(self._address, self.nbytes, read, self._check)


# --- results ----------------------------------------------------------------------------------------------------------


class ResultBuffer:
    """Pinned memory for up to MOST_RESULTS numbers that a kernel writes and the host waits for; twice, used in turns.

    After an interruption, a kernel that was not waited for writes into the half that is not read next; when the results of the
    next kernel are there, it has run.
    """

    def __init__(self, driver: CudaDriver) -> None:
        pinned = driver.pinned(2 * 4 * MOST_RESULTS)
        numbers = np.frombuffer(pinned.memory, np.uint32)
        self._halves = deque(
            (numbers[start : start + MOST_RESULTS], mx.array([pinned.address + 4 * start], mx.uint64))
            for start in (0, MOST_RESULTS)
        )
        weakref.finalize(self, pinned.free).atexit = False

    def next(self) -> tuple[np.ndarray, mx.array]:
        """The memory for the next results, and where it is."""
        self._halves.rotate()
        return self._halves[0]


@lru_cache(maxsize=1)
def _result_kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="openelm_mlx_result",
        input_names=["numbers", "address"],
        output_names=["done"],
        source="""
            unsigned int i = blockIdx.x * blockDim.x + threadIdx.x;
            if (i < numbers_shape[0]) {
                reinterpret_cast<volatile unsigned int*>(address[0])[i] = numbers[i];
                done[i] = numbers[i];
            }
            __threadfence_system();
        """,
    )


def results_on_host(arrays: Sequence[mx.array], buffer: ResultBuffer) -> list[np.ndarray]:
    """The numbers of uint32 arrays, none of them NOT_THERE and together at most MOST_RESULTS. Evaluates them.

    Reading an array directly moves it to managed memory first, which takes longer than everything else here.
    """
    flat = [array.reshape(-1) for array in arrays]
    numbers = mx.concatenate(flat) if len(flat) > 1 else flat[0]
    count = numbers.size
    memory, address = buffer.next()
    memory = memory[:count]
    memory[:] = NOT_THERE
    [done] = _result_kernel()(
        inputs=[numbers, address],
        grid=(count, 1, 1),
        threadgroup=(min(count, 256), 1, 1),
        output_shapes=[(count,)],
        output_dtypes=[mx.uint32],
    )
    try:
        mx.async_eval(done)
        deadline = time.perf_counter() + LONGEST_LOOK
        while (memory == NOT_THERE).any():
            if time.perf_counter() > deadline:
                mx.eval(done)  # a long computation before it, or an error, which is raised here
                break
    except BaseException:
        mx.eval(done)  # see `ResultBuffer`
        raise
    found = memory.copy()
    stops = np.cumsum([array.size for array in arrays])[:-1]
    return [part.reshape(array.shape) for part, array in zip(np.split(found, stops), arrays, strict=True)]


@final
class DeviceArray:
    """An array written through the CUDA driver, at its address on the device. No view of it may ever be made."""

    in_place = True

    def __init__(self, array: mx.array, courier: Courier) -> None:
        self.array, self._courier = array, courier
        self._address = address_of(array)
        self._place_bytes = array.nbytes // array.shape[0]

    def target(self, place: int, nbytes: int | None = None, check: Check | None = None) -> DeviceTarget:
        address = self._address + place * self._place_bytes
        return DeviceTarget(self._courier, address, self._place_bytes if nbytes is None else nbytes, check)

    def settle(self, place: int) -> None:
        pass

    def wait(self) -> None:
        self._courier.wait()


@final
class Results:
    """Reads small results on the host, through pinned memory."""

    def __init__(self, driver: CudaDriver) -> None:
        self._buffer = ResultBuffer(driver)

    def has_room(self, arrays: Sequence[mx.array]) -> bool:
        """Whether the arrays' numbers fit into the memory for results."""
        return sum(each.size for each in arrays) <= MOST_RESULTS

    def on_host(self, arrays: Sequence[mx.array]) -> list[np.ndarray]:
        """Each of the arrays, uint32, of any shapes. See `results_on_host`."""
        return results_on_host(arrays, self._buffer)
