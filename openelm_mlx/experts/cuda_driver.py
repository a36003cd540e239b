"""Bytes between the host and the arrays of MLX's CUDA backend, through the CUDA driver itself.

MLX answers a NumPy view of an array by moving it to managed memory, from where pages travel between host and device on
every touch; and what is copied in by MLX itself goes through the host's memory twice. Here readers fill buffers of pinned
memory, which the device's copy engine reads at the full rate of the bus while the next bytes come from the file, and small
results are written by a kernel into pinned memory that the host looks at. An array's address is asked of a kernel; it holds
as long as nobody makes a view of the array.

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
# Numbers that fit into the memory that results come back through.
MOST_RESULTS = 32768
# No index is this number.
NOT_THERE = 0xFFFFFFFF
# Seconds for which the host only looks; after that it waits in MLX, which knows of errors.
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
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: not held up by work on the default stream


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
            raise RuntimeError(f"CUDA's driver answers {name} with error {result}.")

    def pinned(self, nbytes: int) -> Pinned:
        """So many bytes of the host's memory that the device reads and writes."""
        self.use()
        pointer = _Pointer()
        self._call("cuMemHostAlloc", ctypes.byref(pointer), nbytes, 0)
        assert pointer.value is not None
        memory = memoryview((ctypes.c_uint8 * nbytes).from_address(pointer.value)).cast("B")
        return Pinned(memory, pointer.value, lambda: self._library.cuMemFreeHost(pointer))

    def use(self) -> None:
        """Before anything else in a thread."""
        self._call("cuCtxSetCurrent", self._context)

    def new_stream(self) -> Any:
        """A stream that nothing else waits for."""
        self.use()
        stream = _Pointer()
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        return stream

    def copy(self, address: int, pinned: int, nbytes: int, stream: Any) -> None:
        """Begin to copy from pinned memory to the device's memory."""
        self._call("cuMemcpyHtoDAsync_v2", address, pinned, nbytes, stream)

    def wait(self, stream: Any) -> None:
        """Until all that was begun in a stream is done."""
        self._call("cuStreamSynchronize", stream)

    def end_stream(self, stream: Any) -> None:
        """Wait for it, and let it go."""
        self.wait(stream)
        self._call("cuStreamDestroy_v2", stream)


class Pinned(NamedTuple):
    """Pinned memory, where it begins, and what frees it."""

    memory: memoryview
    address: int
    free: Callable[[], Any]


class Courier:
    """Brings bytes to the device for one model, in buffers that any thread may fill; one thread at a time sends.

    Threads that call the driver hold each other up (docs/LOG.md), so those that read do not. Whoever sends must not wait for
    a buffer while others fill them: they may have all. See `records.Buffers`.
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
        # A queue of its own for each reading: an interruption may have lost numbers of the last one's.
        self._sent, free = [], SimpleQueue[int | None]()
        for number in range(NUM_BUFFERS):
            free.put(number)
        self._free = free

    def stop(self) -> None:
        self._free.put(None)

    def fill(self, address: int, nbytes: int, read: Callable[[memoryview], None], check: Check | None) -> Delivery:
        """Have a buffer filled with so many bytes; gives what sends them to the device's address."""
        free = self._free
        number = free.get()
        if number is None:
            free.put(None)  # for the next one who waits
            raise RuntimeError("There will be no buffer: the reads have been abandoned.")
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
        """Until all that was sent has arrived."""
        self._driver.use()
        self._driver.wait(self._stream)
        sent, self._sent = self._sent, []
        for number in sent:
            self._free.put(number)


def _end(driver: CudaDriver, stream: Any, pinned: Pinned) -> None:
    driver.use()  # whichever thread it is that lets go of a courier last
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
    """Whether, on this machine, what is sent to an array's address is what the next kernel reads there, and no more."""
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
    """Where an evaluated array lies in the device's memory. It stays there until the array is freed or viewed."""
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

    A kernel that nobody has waited for, after an interruption, writes into the half that is not looked at next; and when the
    results of the next one are there, it has run.
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
    """The numbers of uint32 arrays, none of them NOT_THERE, in all at most MOST_RESULTS; evaluated, and what they need.

    Reading an array by itself moves it to managed memory first, which takes longer than all else here.
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
                mx.eval(done)  # much to compute before it, or an error, which is raised here
                break
    except BaseException:
        mx.eval(done)  # see `ResultBuffer`
        raise
    found = memory.copy()
    stops = np.cumsum([array.size for array in arrays])[:-1]
    return [part.reshape(array.shape) for part, array in zip(np.split(found, stops), arrays, strict=True)]


@final
class DeviceArray:
    """Through CUDA's driver, to the address of the array on the device. No view of the array may ever be made."""

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
    """Small results on the host, through pinned memory."""

    def __init__(self, driver: CudaDriver) -> None:
        self._buffer = ResultBuffer(driver)

    def has_room(self, arrays: Sequence[mx.array]) -> bool:
        """Whether so many numbers fit."""
        return sum(each.size for each in arrays) <= MOST_RESULTS

    def on_host(self, arrays: Sequence[mx.array]) -> list[np.ndarray]:
        """Each of the arrays, uint32, of any shapes. See `results_on_host`."""
        return results_on_host(arrays, self._buffer)
