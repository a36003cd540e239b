"""The text of the experts' kernel, run on the processor: each GPU thread is a thread (as in tests/slot_kernel_on_cpu.py)."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np

from openelm_mlx.models.expert_kernel import CUDA, METAL, MOST_PLACES, MOST_ROUTES, Activation, texts_of
from openelm_mlx.models.moe import clamped_swiglu

_BEFORE = """
#include <barrier>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

constexpr int SIMDGROUPS = {W};
static std::barrier<> everybody(32 * SIMDGROUPS);
static unsigned exchanged[SIMDGROUPS][32];
static std::vector<std::unique_ptr<std::barrier<>>> simdgroups;
struct Place {{ unsigned x, y, z; }};
static thread_local Place thread_, group_;

static unsigned from_lane(unsigned bits, int lane) {{
    const int w = thread_.x / 32;
    exchanged[w][thread_.x % 32] = bits;
    simdgroups[w]->arrive_and_wait();
    const unsigned found = exchanged[w][lane];
    simdgroups[w]->arrive_and_wait();
    return found;
}}
static float shuffle(float x, int distance) {{
    return std::bit_cast<float>(from_lane(std::bit_cast<unsigned>(x), (thread_.x % 32) ^ distance));
}}
static unsigned votes_of(bool condition) {{
    unsigned found = 0;
    for (int lane = 0; lane < 32; lane++) found |= (from_lane(condition, lane) & 1u) << lane;
    return found;
}}
static float half_as_float(unsigned short bits) {{
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
    return bits & 0x8000 ? -size : size;
}}

{LANGUAGE}
{HEADER}

using T = float;
constexpr int COLUMNS = {COLUMNS}, OUT = {OUT}, SHARE = {SHARE}, W = SIMDGROUPS, R = {R}, B = {B}, D = {D};
constexpr int MOST_ROUTES = {MOST_ROUTES}, MOST_PLACES = {MOST_PLACES};

#define PARAMETERS const float* x, const unsigned* weights, const int* weights_shape, const int64_t* weights_strides, \\
    const unsigned char* scales, const int64_t* scales_strides, const float* bias, const int64_t* bias_strides, \\
    const unsigned* places, const int* places_shape, const int64_t* places_strides, const unsigned* experts, \\
    const int64_t* experts_strides, float* out
#define ARGUMENTS x, weights, weights_shape, weights_strides, scales, scales_strides, bias, bias_strides, places, \\
    places_shape, places_strides, experts, experts_strides, out
static void kernel(PARAMETERS) {{
"""
_AFTER = """
}}
#undef thread

extern "C" void run(PARAMETERS, int tiles, int num_groups) {{
    for (int w = 0; w < W; w++) simdgroups.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> threads;
    for (int t = 0; t < 32 * W; t++)
        threads.emplace_back([=] {{
            thread_ = {{unsigned(t), 0, 0}};
            for (int place = 0; place < num_groups; place++)
                for (int tile = 0; tile < tiles; tile++) {{
                    group_ = {{unsigned(tile), unsigned(place), 0}};
                    kernel(ARGUMENTS);
                    everybody.arrive_and_wait();
                }}
        }});
    for (auto& each : threads) each.join();
    simdgroups.clear();
}}
"""

# Of each language what the kernel's names stand for.
_OF_CUDA = """
#define threadIdx thread_
#define blockIdx group_
#define __shared__ static
#define __device__ static
#define __forceinline__
#define __shfl_xor_sync(mask, x, distance) shuffle(x, mask == 0xffffffffu ? distance : 0)
#define __ballot_sync(mask, condition) votes_of(mask == 0xffffffffu && (condition))
#define __popc(bits) std::popcount(bits)
#define __syncthreads() everybody.arrive_and_wait()
#define __uint_as_float(bits) std::bit_cast<float>(bits)
struct __half2 { unsigned short low, high; };
struct float2 { float x, y; };
static float2 __half22float2(__half2 both) { return {half_as_float(both.low), half_as_float(both.high)}; }
"""
_OF_METAL = """
#define thread_position_in_threadgroup thread_
#define threadgroup_position_in_grid group_
#define threadgroup static
#define device
#define thread
using ushort = unsigned short;
enum class mem_flags { mem_threadgroup };
struct simd_vote {
    using vote_t = unsigned long;
    unsigned bits;
    explicit operator vote_t() const { return bits; }
};
struct half {
    float number;
    explicit half(float x) : number(x) {}
    explicit operator float() const { return number; }
};
struct half2 {
    half x, y;
    half2 operator*(half other) const { return {half(x.number * other.number), half(y.number * other.number)}; }
};
template <typename To> static To as_type(unsigned bits) {
    if constexpr (std::is_same_v<To, half2>)
        return {half(half_as_float(bits & 0xffff)), half(half_as_float(bits >> 16))};
    else
        return std::bit_cast<To>(bits);
}
static float simd_shuffle_xor(float x, ushort distance) { return shuffle(x, distance); }
static simd_vote simd_ballot(bool condition) { return {votes_of(condition)}; }
static int popcount(unsigned bits) { return std::popcount(bits); }
static void threadgroup_barrier(mem_flags) { everybody.arrive_and_wait(); }
static float fma(float x, float y, float z) { return fmaf(x, y, z); }
namespace precise { static float exp(float x) { return expf(x); } }
"""
LANGUAGES = {"CUDA": (_OF_CUDA, CUDA), "Metal": (_OF_METAL, METAL)}


def product_on_cpu(
    folder: Path,
    language: str,
    x: np.ndarray,
    weight: np.ndarray,
    scales: np.ndarray,
    bias: np.ndarray,
    places: np.ndarray,
    experts: np.ndarray,
    activation: Activation | None,
    sizes: dict[str, int],
) -> np.ndarray:
    """`expert_kernel.product` in float32, compiled for the processor in `folder`. sizes: W, R and B."""
    of_language, names = LANGUAGES[language]
    header, body = texts_of(names, activation)
    rows, columns, routes = bias.shape[-1], x.shape[-1], places.size
    before = _BEFORE.format(
        **sizes, LANGUAGE=of_language, HEADER=header, COLUMNS=columns, OUT=rows, SHARE=routes // len(x),
        MOST_ROUTES=MOST_ROUTES, MOST_PLACES=MOST_PLACES,
    )  # fmt: skip
    source, library = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text(before + body + _AFTER.format())
    subprocess.run(
        ["c++", "-std=c++20", "-O0", "-shared", "-fPIC", "-pthread", str(source), "-o", str(library)], check=True
    )
    out = np.full((routes, rows if activation is None else rows // 2), np.nan, np.float32)
    arrays = [
        x,
        weight,
        np.array(weight.shape, np.int32),
        _strides(weight),
        scales,
        _strides(scales),
        bias,
        _strides(bias),
        places,
    ]
    arrays += [np.array(places.shape, np.int32), _strides(places), experts, _strides(experts), out]
    pointers = [ctypes.c_void_p(each.ctypes.data) for each in arrays]
    tiles = -(-rows // (sizes["W"] * sizes["R"]))
    ctypes.CDLL(str(library)).run(*pointers, tiles, min(len(weight), routes))
    return out


def _strides(array: np.ndarray) -> np.ndarray:
    return np.array([each // array.itemsize for each in array.strides], np.int64)


def known(x, weight, scales, bias, places, experts, activation):
    """Each route by itself, from numbers that MLX has unpacked."""
    plain = mx.dequantize(mx.array(weight), mx.array(scales), None, 32, 4, mode="mxfp4")
    plain = np.array(plain.astype(mx.float32), np.float64)
    share = places.size // len(x)
    routes = zip(places.ravel(), experts.ravel(), strict=True)
    found = [
        plain[place, : bias.shape[1]] @ x[route // share].astype(np.float64) + bias[expert]
        for route, (place, expert) in enumerate(routes)
    ]
    sums = mx.array(np.array(found, np.float32))
    if activation is None:
        return np.array(sums)
    zeros = mx.zeros_like(sums[:, ::2])
    return np.array(clamped_swiglu(sums[:, ::2], sums[:, 1::2], zeros, zeros, *activation))


def plain_product(x, matrix, places, experts, activation=None):
    """What the kernel computes, for models on the CPU; each route by itself, so that company changes nothing."""
    given = [np.array(each.astype(mx.float32)) for each in (x, matrix.bias)]
    found = known(
        given[0],
        np.array(matrix.weight),
        np.array(matrix.scales),
        given[1],
        np.array(places),
        np.array(experts),
        activation,
    )
    return mx.array(found).astype(x.dtype)
