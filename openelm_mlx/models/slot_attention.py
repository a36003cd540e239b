"""One kernel for the attention of many decoding requests whose keys and values lie side by side (models/slots.py).

MLX's attention reads every column of every row, wants a mask where rows have different lengths, and has no kernel for one
query with a mask on CUDA. This one reads of each slot the columns that its request has written, each once for all query
heads that share it, and needs neither a mask nor a copy. `attend_with_mask` is the same in MLX's own operations.

It is the same text for Metal and for CUDA. A threadgroup takes one slot and up to four query heads of one key head. Its
simdgroups (warps) go through the columns from the newest to the oldest, several keys at a time, each with a running softmax
(arXiv 1805.02867), and put theirs together at the end. In which order a request's keys are summed up depends on its own
length alone, so its bits do not depend on the other slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    #define SLOT int(blockIdx.z)
    #define SHARED __shared__
    #define DEVICE
    #define SHUFFLE_XOR(x, distance) __shfl_xor_sync(0xffffffffu, x, distance)
    #define BARRIER() __syncthreads()
    #define EXP2(x) exp2f(x)
"""

METAL = """
    #define THREAD int(thread_position_in_threadgroup.x)
    #define PART_OF_HEADS int(threadgroup_position_in_grid.y)
    #define SLOT int(threadgroup_position_in_grid.z)
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
    const int slot = SLOT, kv_head = PART_OF_HEADS / P, first_head = kv_head * G + (PART_OF_HEADS % P) * GB;
    const int num_slots = kv_shape[1], kv_heads = kv_shape[2], columns = kv_shape[3];
    const int newest = state[0];
    const int count = state[1 + slot] + 1 < columns ? state[1 + slot] + 1 : columns;

    const size_t first_key = size_t(slot * kv_heads + kv_head) * columns * D + part * E;
    const size_t to_values = size_t(num_slots) * kv_heads * columns * D;

    float query[GB][E], sum[GB][E], top[GB], total[GB];
    for (int g = 0; g < GB; g++) {
        const size_t at = size_t(slot) * q_strides[0] + size_t(first_head + g) * q_strides[1] + part * E;
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
        out[(size_t(slot) * kv_heads * G + first_head + g) * D + e] = T(found / all);
    }
"""


def source_of(scale: float, has_sinks: bool) -> str:
    """The kernel's text after the names of one of the two languages."""
    log2e = math.log2(math.e)
    sink = f"(float(sinks[head]) * {log2e!r}f)" if has_sinks else "(-1e30f)"
    return f"    #define SINK(head) {sink}\n    #define SCALE {scale * log2e!r}f\n{SOURCE}"


def heads_together(num_heads: int, num_kv_heads: int) -> int:
    """How many of the query heads that share a key head go through its keys together: a divisor of their number."""
    group = num_heads // num_kv_heads
    return next(each for each in range(min(group, MOST_HEADS), 0, -1) if group % each == 0)


@lru_cache
def _kernel(scale: float, has_sinks: bool) -> Callable[..., Any]:
    names = ["q", "kv", "state", *(["sinks"] if has_sinks else [])]
    is_cuda = mx.cuda.is_available()
    make: Any = mx.fast.cuda_kernel if is_cuda else mx.fast.metal_kernel
    text = (CUDA if is_cuda else METAL) + source_of(scale, has_sinks)
    made: Callable[..., Any] = make(
        name=f"slot_attention_{'sinks_' if has_sinks else ''}{hash(scale) & 0xFFFFFFFF:x}",
        input_names=names,
        output_names=["out"],
        source=text,
        ensure_row_contiguous=False,
    )
    return made


def attend_in_slots(
    queries: mx.array, buffer: mx.array, state: mx.array, scale: float, sinks: mx.array | None = None
) -> mx.array:
    """Each slot's query over its own columns. -> (S, H, 1, D)

    queries (S, H, 1, D), each head's numbers side by side; buffer (2, S, K, T, D): keys and values, contiguous, the new ones
    included. state (1 + S,) int32: the newest column, and how many tokens each slot had before it. A slot of n tokens sees
    the n + 1 columns up to the newest, modulo T, at most T. sinks (H,): see `attend`. Heads of other sizes than `HEAD_DIMS`,
    and the CPU backend, take `attend_with_mask`.
    """
    slots, heads, _, head_dim = queries.shape
    if head_dim not in HEAD_DIMS or runs_on_cpu():
        return attend_with_mask(queries, buffer, state, scale, sinks)
    kv_heads = buffer.shape[2]
    together = heads_together(heads, kv_heads)
    template = [
        ("T", queries.dtype), ("D", head_dim), ("G", heads // kv_heads), ("GB", together), ("W", SIMDGROUPS),
    ]  # fmt: skip
    threads = 32 * SIMDGROUPS
    found: mx.array = _kernel(scale, sinks is not None)(
        inputs=[queries, buffer, state, *([] if sinks is None else [sinks])],
        template=template,
        grid=(threads, heads // together, slots),
        threadgroup=(threads, 1, 1),
        output_shapes=[(slots, heads, 1, head_dim)],
        output_dtypes=[queries.dtype],
    )[0]
    return found


def attend_with_mask(
    queries: mx.array, buffer: mx.array, state: mx.array, scale: float, sinks: mx.array | None = None
) -> mx.array:
    """`attend_in_slots` in MLX's own operations: where there is no kernel, and to compare it with."""
    columns = buffer.shape[3]
    ages = (state[0] - mx.arange(columns)) % columns
    mask = ages <= state[1:, None, None, None]
    return attend(queries, *keys_and_values(buffer), mask, scale, sinks)


def keys_and_values(buffer: mx.array) -> tuple[mx.array, mx.array]:
    """Keys and values (S, K, T, D) of what has both. Views: an index in place of the slices would copy them."""
    return buffer[:1].squeeze(0), buffer[1:].squeeze(0)
