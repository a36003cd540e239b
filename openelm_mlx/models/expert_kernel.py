"""A kernel for a few rows and their experts in MXFP4 (models/moe.py): each expert is read once, however many rows chose it.

MLX's gathered product reads and unpacks an expert's matrix for every row that chose it, or puts rows into tiles that are
nearly empty. With 16 rows of gpt-oss-20b, each of 4 experts, that is 64 readings of some 27 experts. Here a threadgroup has
one expert and some rows of its matrix, finds out by itself which routes go there, and multiplies what it unpacks by all of
them: nothing is sorted, placed or brought back. The first product ends with the biases and the activation, the second one
with its bias, so that a layer's experts are two kernels.

It is the same text for Metal and for CUDA. Each simdgroup (warp) has a few rows of the matrix, its threads have columns, and
their sums are put together at the end. In which order a route's numbers are summed up depends on the matrix alone, so its
bits do not depend on the other routes. `Experts.feed_forward` is the same in MLX's own operations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx

# Simdgroups in a threadgroup, rows of the matrix for each of them, routes that are multiplied together, and words that are read
# ahead. With two words ahead the kernel took a fifth longer. The loop over them goes round once, and stays: the same text
# without it took half as long again (docs/LOG.md).
SIMDGROUPS = 4
ROWS = 4
TOGETHER = 8
AHEAD = 1
# Routes of a pass, and experts of a layer, at most: a threadgroup notes them.
MOST_ROUTES, MOST_PLACES = 512, 512

# Of each language: FP4_HALVES gives two numbers of E2M1, whose bits stand in two float16 numbers, and SCALE the power of two of
# an E8M0 exponent, both together as they are meant: as bits of float16, E2M1 is 2^14 times too small.
CUDA = """
    #define THREAD int(threadIdx.x)
    #define TILE int(blockIdx.x)
    #define PLACE int(blockIdx.y)
    #define SHARED __shared__
    #define DEVICE
    #define LOCAL
    #define FUNCTION __device__ __forceinline__
    #define SHUFFLE_XOR(x, distance) __shfl_xor_sync(0xffffffffu, x, distance)
    #define BALLOT(condition) __ballot_sync(0xffffffffu, condition)
    #define POPCOUNT(bits) __popc(bits)
    #define BARRIER() __syncthreads()
    #define EXP(x) expf(x)
    #define FMA(x, y, z) fmaf(x, y, z)
    #define AS_FLOAT(bits) __uint_as_float(bits)
    #define SCALE(exponent) AS_FLOAT((unsigned(exponent) + 14u) << 23)
    #define FP4_HALVES(bits, low, high) { \\
        const unsigned int word_of_two = bits; \\
        const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word_of_two)); \\
        low = both.x; \\
        high = both.y; \\
    }
"""

METAL = """
    #define THREAD int(thread_position_in_threadgroup.x)
    #define TILE int(threadgroup_position_in_grid.x)
    #define PLACE int(threadgroup_position_in_grid.y)
    #define SHARED threadgroup
    #define DEVICE device
    #define LOCAL thread
    #define FUNCTION inline
    #define SHUFFLE_XOR(x, distance) simd_shuffle_xor(x, ushort(distance))
    #define BALLOT(condition) unsigned(static_cast<simd_vote::vote_t>(simd_ballot(condition)))
    #define POPCOUNT(bits) int(popcount(bits))
    #define BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup)
    #define EXP(x) precise::exp(x)
    #define FMA(x, y, z) fma(x, y, z)
    #define AS_FLOAT(bits) as_type<float>(bits)
    #define SCALE(exponent) AS_FLOAT(unsigned(exponent) << 23)
    #define FP4_HALVES(bits, low, high) { \\
        const half2 both = as_type<half2>(bits) * half(16384.0f); \\
        low = float(both.x); \\
        high = float(both.y); \\
    }
"""

# A thread has every 32nd word of eight numbers, so that neighbours read what lies side by side. Words are read while those
# before them are multiplied. Of a word's numbers the one at i and the one at i + 4 are unpacked together.
FUNCTIONS = """
template <typename T> struct alignas(16) Eight { T of[8]; };

template <typename T, int N, int R, int B, int D, int COLUMNS>
FUNCTION void multiply(
    LOCAL float (&sums)[R][B], const DEVICE unsigned int* weights, const DEVICE unsigned char* scales, const DEVICE T* x,
    const LOCAL int (&lines)[R], const LOCAL int (&starts)[B], int lane
) {
    constexpr int WORDS = COLUMNS / 8;
    unsigned int next[D][R], exponents[D][R];
    #pragma unroll
    for (int d = 0; d < D; d++) {
        const int at = lane + 32 * d;
        #pragma unroll
        for (int r = 0; r < R; r++) {
            next[d][r] = at < WORDS ? weights[size_t(lines[r]) * WORDS + at] : 0u;
            exponents[d][r] = at < WORDS ? scales[size_t(lines[r]) * (WORDS / 4) + at / 4] : 0u;
        }
    }
    for (int start = lane; start < WORDS; start += 32 * D) {
        #pragma unroll
        for (int d = 0; d < D; d++) {
            const int at = start + 32 * d, later = at + 32 * D;
            float weight[R][8], scale[R];
            #pragma unroll
            for (int r = 0; r < R; r++) {
                const unsigned int word = next[d][r];
                scale[r] = SCALE(exponents[d][r]);
                next[d][r] = later < WORDS ? weights[size_t(lines[r]) * WORDS + later] : 0u;
                exponents[d][r] = later < WORDS ? scales[size_t(lines[r]) * (WORDS / 4) + later / 4] : 0u;
                FP4_HALVES(((word << 9) & 0x0e000e00u) | ((word << 12) & 0x80008000u), weight[r][0], weight[r][4]);
                FP4_HALVES(((word << 5) & 0x0e000e00u) | ((word << 8) & 0x80008000u), weight[r][1], weight[r][5]);
                FP4_HALVES(((word << 1) & 0x0e000e00u) | ((word << 4) & 0x80008000u), weight[r][2], weight[r][6]);
                FP4_HALVES(((word >> 3) & 0x0e000e00u) | (word & 0x80008000u), weight[r][3], weight[r][7]);
            }
            // Beyond the end weights are zero.
            const int column = at < WORDS ? 8 * at : 0;
            #pragma unroll
            for (int b = 0; b < N; b++) {
                const Eight<T> numbers = *(const DEVICE Eight<T>*)(x + starts[b] + column);
                float parts[R];
                #pragma unroll
                for (int r = 0; r < R; r++) parts[r] = 0.0f;
                #pragma unroll
                for (int e = 0; e < 8; e++) {
                    const float number = float(numbers.of[e]);
                    #pragma unroll
                    for (int r = 0; r < R; r++) parts[r] = FMA(number, weight[r][e], parts[r]);
                }
                #pragma unroll
                for (int r = 0; r < R; r++) sums[r][b] = FMA(scale[r], parts[r], sums[r][b]);
            }
        }
    }
}
"""

# Constants: T, the type; COLUMNS of the matrix; OUT, its rows; W simdgroups, R rows for each, B routes together, D words ahead;
# SHARE, how many routes have one row of x.
SOURCE = """
    const int thread_id = THREAD, simdgroup = thread_id / 32, lane = thread_id % 32;
    const int k = places_shape[1], num_routes = places_shape[0] * k, num_places = weights_shape[0];

    // Which of the places that somebody has chosen is this threadgroup's: so there are no more of them than routes.
    SHARED int is_chosen[MOST_PLACES];
    SHARED int own_place;
    for (int at = thread_id; at < num_places; at += 32 * W) is_chosen[at] = 0;
    if (thread_id == 0) own_place = -1;
    BARRIER();
    for (int route = thread_id; route < num_routes; route += 32 * W) {
        const int place = int(places[route / k * places_strides[0] + route % k * places_strides[1]]);
        if (place >= 0 && place < num_places) is_chosen[place] = 1;
    }
    BARRIER();
    if (simdgroup == 0) {
        int before = 0;
        for (int start = 0; start < num_places; start += 32) {
            const unsigned int votes = BALLOT(start + lane < num_places && is_chosen[start + lane]);
            const int count = POPCOUNT(votes);
            if (PLACE >= before && PLACE < before + count) {
                const int rank = before + POPCOUNT(votes & ((1u << lane) - 1u));
                if ((votes >> lane & 1u) && rank == PLACE) own_place = start + lane;
            }
            before += count;
        }
    }
    BARRIER();
    const int place = own_place;
    if (place < 0) return;

    SHARED int own[MOST_ROUTES];
    SHARED int counts[W];
    int found = 0;
    for (int start = 0; start < num_routes; start += 32 * W) {
        const int route = start + thread_id;
        const bool is_own = route < num_routes &&
            int(places[route / k * places_strides[0] + route % k * places_strides[1]]) == place;
        const unsigned int votes = BALLOT(is_own);
        if (lane == 0) counts[simdgroup] = POPCOUNT(votes);
        BARRIER();
        int at = found;
        for (int w = 0; w < W; w++) {
            at += w < simdgroup ? counts[w] : 0;
            found += counts[w];
        }
        if (is_own) own[at + POPCOUNT(votes & ((1u << lane) - 1u))] = route;
        BARRIER();
    }
    const int first = (TILE * W + simdgroup) * R;
    if (first >= OUT) return;

    int lines[R];
    #pragma unroll
    for (int r = 0; r < R; r++) lines[r] = first + r < OUT ? first + r : OUT - 1;
    const DEVICE unsigned int* own_weights = weights + size_t(place) * weights_strides[0];
    const DEVICE unsigned char* own_scales = scales + size_t(place) * scales_strides[0];
    const int expert = int(experts[own[0] / k * experts_strides[0] + own[0] % k * experts_strides[1]]);
    const size_t own_bias = size_t(expert) * bias_strides[0];

    for (int start = 0; start < found; start += B) {
        const int count = found - start < B ? found - start : B;
        int starts[B];
        float sums[R][B];
        #pragma unroll
        for (int b = 0; b < B; b++) {
            starts[b] = own[start + (b < count ? b : 0)] / SHARE * COLUMNS;
            #pragma unroll
            for (int r = 0; r < R; r++) sums[r][b] = 0.0f;
        }
        if (count == 1) multiply<T, 1, R, B, D, COLUMNS>(sums, own_weights, own_scales, x, lines, starts, lane);
        else if (count == 2) multiply<T, 2, R, B, D, COLUMNS>(sums, own_weights, own_scales, x, lines, starts, lane);
        else if (count <= 4) multiply<T, 4, R, B, D, COLUMNS>(sums, own_weights, own_scales, x, lines, starts, lane);
        else multiply<T, B, R, B, D, COLUMNS>(sums, own_weights, own_scales, x, lines, starts, lane);

        #pragma unroll
        for (int b = 0; b < B; b++) {
            if (b < count) {
                #pragma unroll
                for (int r = 0; r < R; r++)
                    for (int distance = 16; distance > 0; distance /= 2) sums[r][b] += SHUFFLE_XOR(sums[r][b], distance);
                if (lane == b) {
                    const size_t route = own[start + b];
                    #pragma unroll
                    for (int r = 0; r < R; r += STEP) {
                        if (first + r < OUT) { STORE(r, b) }
                    }
                }
            }
        }
    }
"""

# What is stored: with the activation of two rows that belong together, whose NaN stays one, or each row as it is.
_GATED = """
    #define STEP 2
    #define STORE(r, b) \\
        float gate = sums[r][b] + float(bias[own_bias + first + r]); \\
        float up = sums[r + 1][b] + float(bias[own_bias + first + r + 1]); \\
        gate = gate > LIMIT ? LIMIT : gate; \\
        up = up > LIMIT ? LIMIT : up < -LIMIT ? -LIMIT : up; \\
        out[route * (OUT / 2) + (first + r) / 2] = T(gate / (1.0f + EXP(-ALPHA * gate)) * (up + 1.0f));
"""
_PLAIN = """
    #define STEP 1
    #define STORE(r, b) out[route * OUT + first + r] = T(sums[r][b] + float(bias[own_bias + first + r]));
"""


class PackedMatrix(NamedTuple):
    """The matrices of a layer's experts in MXFP4, as `QuantizedExpertLinear` has them, and all experts' biases (E, rows)."""

    weight: mx.array
    scales: mx.array
    bias: mx.array


class Activation(NamedTuple):
    """What `clamped_swiglu` is told."""

    limit: float
    alpha: float


def texts_of(language: str, activation: Activation | None) -> tuple[str, str]:
    """The kernel's text in the language whose names are given: what stands before it, and its body."""
    if activation is None:
        return language + _PLAIN + FUNCTIONS, SOURCE
    # A config may have whole numbers, which would be none of float32's with the letter behind them.
    limit, alpha = (float(each) for each in activation)
    limits = f"\n    #define LIMIT {limit!r}f\n    #define ALPHA {alpha!r}f\n"
    return language + limits + _GATED + FUNCTIONS, SOURCE


@lru_cache
def _kernel(activation: Activation | None) -> Callable[..., Any]:
    is_cuda = mx.cuda.is_available()
    make: Any = mx.fast.cuda_kernel if is_cuda else mx.fast.metal_kernel
    header, source = texts_of(CUDA if is_cuda else METAL, activation)
    made: Callable[..., Any] = make(
        name=f"experts_{'plain' if activation is None else f'gated_{hash(activation) & 0xFFFFFFFF:x}'}",
        input_names=["x", "weights", "scales", "bias", "places", "experts"],
        output_names=["out"],
        source=source,
        header=header,
        ensure_row_contiguous=False,
    )
    return made


def product(
    x: mx.array, matrix: PackedMatrix, places: mx.array, experts: mx.array, activation: Activation | None = None
) -> mx.array:
    """Each route's row by its expert's matrix, and the bias. -> (R, rows), with an activation (R, rows / 2)

    places (M, k): where the matrix of each route's expert lies, R = M k routes; experts (M, k): which bias, one for all
    routes of a place. x (M, columns), a row for k routes, or (R, columns), contiguous. What routes get whose place is beyond
    the matrices is undefined.
    """
    routes, num_places, rows, columns = places.size, matrix.weight.shape[0], matrix.bias.shape[-1], x.shape[-1]
    template = [
        ("T", x.dtype), ("COLUMNS", columns), ("OUT", rows), ("SHARE", routes // x.shape[0]),
        ("W", SIMDGROUPS), ("R", ROWS), ("B", TOGETHER), ("D", AHEAD), ("MOST_ROUTES", MOST_ROUTES),
        ("MOST_PLACES", MOST_PLACES),
    ]  # fmt: skip
    tiles = -(-rows // (SIMDGROUPS * ROWS))
    found: mx.array = _kernel(activation)(
        inputs=[x, matrix.weight, matrix.scales, matrix.bias, places, experts],
        template=template,
        grid=(32 * SIMDGROUPS * tiles, min(num_places, routes), 1),
        threadgroup=(32 * SIMDGROUPS, 1, 1),
        output_shapes=[(routes, rows if activation is None else rows // 2)],
        output_dtypes=[x.dtype],
    )[0]
    return found
