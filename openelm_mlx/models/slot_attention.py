"""Two kernels for many requests whose keys and values lie side by side (models/slots.py): one writes, one attends.

MLX's attention reads every column of every row, wants a mask where rows have different lengths, and has no kernel for one
query with a mask on CUDA. This one reads for each row the columns that its token sees, each once for all query heads that
share it, and needs neither a mask nor a copy. `attend_with_mask` is the same in MLX's own operations.

It is the same text for Metal and for CUDA. A threadgroup takes one row and up to four query heads of one key head. Its
simdgroups (warps) go through the columns from the newest to the oldest, several keys at a time, each with a running softmax
(arXiv 1805.02867), and put theirs together at the end. In which order a token's keys are summed up depends on its own
position alone, so its bits do not depend on the other rows.

The other kernel puts new keys and values into the buffer as it is. MLX's own operations would copy a buffer that a pass in
flight still reads, all of it in every layer of every step where the host is ahead of the GPU. MLX does not know of what
is written so: see `write_in_slots` for what orders it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx

from .attention import attend
from .precision import runs_on_cpu

# Sizes of heads that the kernel is written for: eight numbers a thread, and a power of two of threads a key.
HEAD_DIMS = (32, 64, 128)
# Simdgroups in a threadgroup, and query heads that one goes through the keys for.
SIMDGROUPS = 8
MOST_HEADS = 4

CUDA = """
    #define THREAD int(threadIdx.x)
    #define PART_OF_HEADS int(blockIdx.y)
    #define ROW int(blockIdx.z)
    #define GROUP int(blockIdx.x)
    #define SHARED __shared__
    #define DEVICE
    #define SHUFFLE_XOR(x, distance) __shfl_xor_sync(0xffffffffu, x, distance)
    #define BARRIER() __syncthreads()
    #define EXP2(x) exp2f(x)
"""

METAL = """
    #define THREAD int(thread_position_in_threadgroup.x)
    #define PART_OF_HEADS int(threadgroup_position_in_grid.y)
    #define ROW int(threadgroup_position_in_grid.z)
    #define GROUP int(threadgroup_position_in_grid.x)
    #define SHARED threadgroup
    #define DEVICE device
    #define SHUFFLE_XOR(x, distance) simd_shuffle_xor(x, ushort(distance))
    #define BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup)
    #define EXP2(x) fast::exp2(x)
"""

# Constants: T, the type; D, numbers of a head; G, query heads of a key head; GB, those of them in one threadgroup; W,
# simdgroups. Scores are in units of log2(e), so that the exponentials are powers of two.
SOURCE = """
    constexpr int E = 8;            // numbers of a head that one thread has
    constexpr int L = D / E;        // threads of one key
    constexpr int N = 32 / L;       // keys that a simdgroup looks at together
    constexpr int P = G / GB;       // threadgroups of one key head
    struct alignas(16) Numbers { T of[E]; };

    const int thread_id = THREAD, simdgroup = thread_id / 32, lane = thread_id % 32;
    const int own_key = lane / L, part = lane % L;
    const int row = ROW, kv_head = PART_OF_HEADS / P, first_head = kv_head * G + (PART_OF_HEADS % P) * GB;
    const int num_slots = kv_shape[1], kv_heads = kv_shape[2], columns = kv_shape[3];
    const int slot = rows[2 * row], position = rows[2 * row + 1];
    const int newest = position % columns, seen = columns < WINDOW ? columns : WINDOW;
    const int count = position + 1 < seen ? position + 1 : seen;

    const size_t first_key = size_t(slot * kv_heads + kv_head) * columns * D + part * E;
    const size_t to_values = size_t(num_slots) * kv_heads * columns * D;

    float query[GB][E], sum[GB][E], top[GB], total[GB];
    for (int g = 0; g < GB; g++) {
        const size_t at = size_t(row) * q_strides[0] + size_t(first_head + g) * q_strides[1] + part * E;
        for (int e = 0; e < E; e++) {
            query[g][e] = float(q[at + e]) * SCALE;
            sum[g][e] = 0.0f;
        }
        top[g] = -1e30f;
        total[g] = 0.0f;
    }

    for (int start = simdgroup * N; start < count; start += W * N) {
        const int age = start + own_key;
        const bool is_there = age < count;
        int column = newest - (is_there ? age : start);
        column += column < 0 ? columns : 0;
        const size_t at = first_key + size_t(column) * D;
        const Numbers key = *(const DEVICE Numbers*)(kv + at);
        const Numbers value = *(const DEVICE Numbers*)(kv + at + to_values);
        for (int g = 0; g < GB; g++) {
            float score = 0.0f;
            for (int e = 0; e < E; e++) score += query[g][e] * float(key.of[e]);
            for (int distance = L / 2; distance > 0; distance /= 2) score += SHUFFLE_XOR(score, distance);
            const float higher = score > top[g] && is_there ? score : top[g];
            const float weight = is_there ? EXP2(score - higher) : 0.0f;
            const float shrink = EXP2(top[g] - higher);
            top[g] = higher;
            total[g] = total[g] * shrink + weight;
            for (int e = 0; e < E; e++) sum[g][e] = sum[g][e] * shrink + weight * float(value.of[e]);
        }
    }

    SHARED float sums[W][GB][D];
    SHARED float tops[W][GB];
    SHARED float totals[W][GB];
    for (int g = 0; g < GB; g++) {
        for (int distance = 16; distance >= L; distance /= 2) {
            const float other = SHUFFLE_XOR(top[g], distance);
            const float higher = other > top[g] ? other : top[g];
            const float mine = EXP2(top[g] - higher), theirs = EXP2(other - higher);
            top[g] = higher;
            total[g] = total[g] * mine + SHUFFLE_XOR(total[g], distance) * theirs;
            for (int e = 0; e < E; e++) sum[g][e] = sum[g][e] * mine + SHUFFLE_XOR(sum[g][e], distance) * theirs;
        }
        if (own_key == 0) {
            for (int e = 0; e < E; e++) sums[simdgroup][g][part * E + e] = sum[g][e];
            tops[simdgroup][g] = top[g];
            totals[simdgroup][g] = total[g];
        }
    }
    BARRIER();

    for (int at = thread_id; at < GB * D; at += 32 * W) {
        const int g = at / D, e = at % D;
        float highest = SINK(first_head + g);
        for (int w = 0; w < W; w++) highest = tops[w][g] > highest ? tops[w][g] : highest;
        float all = EXP2(SINK(first_head + g) - highest), found = 0.0f;
        for (int w = 0; w < W; w++) {
            const float share = EXP2(tops[w][g] - highest);
            all += totals[w][g] * share;
            found += sums[w][g][e] * share;
        }
        out[(size_t(row) * kv_heads * G + first_head + g) * D + e] = T(found / all);
    }
"""

# One thread moves eight numbers. THREADS: of a threadgroup.
WRITE = """
    constexpr int E = 8;
    struct alignas(16) Numbers { T of[E]; };

    const int kv_heads = kv_shape[2], columns = kv_shape[3], at = GROUP * THREADS + THREAD;
    const int part = at % (D / E), head = at / (D / E) % (2 * kv_heads), row = at / (D / E) / (2 * kv_heads);
    if (row < rows_shape[0]) {
        const int slot = rows[2 * row], column = rows[2 * row + 1] % columns;
        const int of_slot = (head / kv_heads * kv_shape[1] + slot) * kv_heads + head % kv_heads;
        const size_t from = size_t(row) * fresh_strides[0] + size_t(head) * fresh_strides[1] + part * E;
        *(DEVICE Numbers*)(kv + (size_t(of_slot) * columns + column) * D + part * E) = *(const DEVICE Numbers*)(fresh + from);
    }
    if (at == 0) out[0] = 0;
"""
THREADS = 256


def source_of(scale: float, has_sinks: bool, window: int | None = None) -> str:
    """The kernel's text after the names of one of the two languages."""
    log2e = math.log2(math.e)
    sink = f"(float(sinks[head]) * {log2e!r}f)" if has_sinks else "(-1e30f)"
    names = {"SINK(head)": sink, "SCALE": f"{scale * log2e!r}f", "WINDOW": 2**30 if window is None else window}
    return "".join(f"    #define {name} {value}\n" for name, value in names.items()) + SOURCE


def heads_together(num_heads: int, num_kv_heads: int) -> int:
    """How many of the query heads that share a key head go through its keys together: a divisor of their number."""
    group = num_heads // num_kv_heads
    return next(each for each in range(min(group, MOST_HEADS), 0, -1) if group % each == 0)


def _made(name: str, inputs: Sequence[str], source: str) -> Callable[..., Any]:
    is_cuda = mx.cuda.is_available()
    make: Any = mx.fast.cuda_kernel if is_cuda else mx.fast.metal_kernel
    text = (CUDA if is_cuda else METAL) + source
    # Queries, keys and values are parts of a projection's heads: a copy would cost as much as the kernel.
    found: Callable[..., Any] = make(name, list(inputs), ["out"], text, ensure_row_contiguous=False)
    return found


@lru_cache
def _kernel(scale: float, has_sinks: bool, window: int | None) -> Callable[..., Any]:
    name = f"slot_attention_{'sinks_' if has_sinks else ''}{window or 0}_{hash(scale) & 0xFFFFFFFF:x}"
    inputs = ["q", "kv", "rows", "written", *(["sinks"] if has_sinks else [])]
    return _made(name, inputs, source_of(scale, has_sinks, window))


@lru_cache
def _write_kernel() -> Callable[..., Any]:
    return _made("slot_write", ["fresh", "kv", "rows"], WRITE)


def has_kernel_for(head_dim: int) -> bool:
    """Whether heads of this size are attended to, and written, by the kernels."""
    return head_dim in HEAD_DIMS and not runs_on_cpu()


def write_in_slots(buffer: mx.array, new: mx.array, rows: mx.array) -> mx.array:
    """Put new keys and values (M, 2 K, D) into the buffer (2, S, K, T, D) itself, where `has_kernel_for` their size.

    rows: see `attend_in_slots`. Gives what `attend_in_slots` has to wait for, its `written`. MLX takes the buffer for one that
    stays as it is, and keeps no order for it but this one. A step's writes come after the step before has read, since they
    are made of its tokens. Where they are not, as of prompts alone, they are on the same stream, and nobody reads what they
    write before the host has waited for them (engine/flat_pass.py). Before anything else reads the buffer, or makes another
    one of it, the device has to be waited for (`mx.synchronize`).
    """
    num_rows, heads, head_dim = new.shape
    groups = -(-num_rows * heads * (head_dim // 8) // THREADS)
    found: mx.array = _write_kernel()(
        inputs=[new, buffer, rows],
        template=[("T", new.dtype), ("D", head_dim), ("THREADS", THREADS)],
        grid=(groups * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.float32],
    )[0]
    return found


def attend_in_slots(
    queries: mx.array,
    buffer: mx.array,
    rows: mx.array,
    scale: float,
    sinks: mx.array | None = None,
    window: int | None = None,
    written: mx.array | None = None,
) -> mx.array:
    """Each row's query over the columns of its slot that its token sees. -> (M, H, 1, D)

    queries (M, H, 1, D), each head's numbers side by side; buffer (2, S, K, T, D): keys and values, contiguous, the new ones
    included. rows (M, 2) int32: the slot and the position of each row; the first S are those of the slots in their order. A
    token is in the column of its position, modulo T, and sees as many up to it as there are, at most `window`. sinks (H,):
    see `attend`. written: what `write_in_slots` gave. Heads of other sizes than `HEAD_DIMS`, and the CPU backend, take
    `attend_with_mask`.
    """
    num_rows, heads, _, head_dim = queries.shape
    if not has_kernel_for(head_dim):
        return attend_with_mask(queries, buffer, rows, scale, sinks, window)
    kv_heads = buffer.shape[2]
    together = heads_together(heads, kv_heads)
    template = [
        ("T", queries.dtype), ("D", head_dim), ("G", heads // kv_heads), ("GB", together), ("W", SIMDGROUPS),
    ]  # fmt: skip
    threads = 32 * SIMDGROUPS
    found: mx.array = _kernel(scale, sinks is not None, window)(
        inputs=[queries, buffer, rows, rows if written is None else written, *([] if sinks is None else [sinks])],
        template=template,
        grid=(threads, heads // together, num_rows),
        threadgroup=(threads, 1, 1),
        output_shapes=[(num_rows, heads, 1, head_dim)],
        output_dtypes=[queries.dtype],
    )[0]
    return found


def attend_with_mask(
    queries: mx.array,
    buffer: mx.array,
    rows: mx.array,
    scale: float,
    sinks: mx.array | None = None,
    window: int | None = None,
) -> mx.array:
    """`attend_in_slots` in MLX's own operations: where there is no kernel, and to compare it with."""
    num_slots, columns = buffer.shape[1], buffer.shape[3]
    keys, values = keys_and_values(buffer)
    positions = rows[:, 1:]
    ages = (positions - mx.arange(columns)) % columns
    mask = (ages <= (positions if window is None else mx.minimum(positions, window - 1)))[:, None, None]
    out = attend(queries[:num_slots], keys, values, mask[:num_slots], scale, sinks)
    if queries.shape[0] == num_slots:
        return out
    slots = rows[num_slots:, 0]
    more = attend(queries[num_slots:], keys[slots], values[slots], mask[num_slots:], scale, sinks)
    return mx.concatenate([out, more])


def keys_and_values(buffer: mx.array) -> tuple[mx.array, mx.array]:
    """Keys and values (S, K, T, D) of what has both. Views: an index in place of the slices would copy them."""
    return buffer[:1].squeeze(0), buffer[1:].squeeze(0)
