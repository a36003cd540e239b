"""The texts of GPU kernels, run on the processor: each GPU thread is a thread, and shuffles wait for each other.

What the two languages have of their own is written in C++ here, so that the names that a kernel gives it are tested too.
Whether a device's compiler takes the text is not: C++ has no address spaces.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Before a kernel: a threadgroup of SIMDGROUPS times 32 threads, and what its threads tell each other.
_THREADGROUP = """
#include <barrier>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

constexpr int SIMDGROUPS = {simdgroups};
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
"""

# Of each language what the kernels' names stand for.
LANGUAGES = {
    "CUDA": """
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
""",
    "Metal": """
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
namespace fast { static float exp2(float x) { return std::exp2(x); } }
namespace precise { static float exp(float x) { return expf(x); } }
""",
}

# After it: every threadgroup of the grid, one after the other.
_GRID = """
#undef thread

extern "C" void run({parameters}, const int* groups) {{
    for (int w = 0; w < SIMDGROUPS; w++) simdgroups.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> threads;
    for (int t = 0; t < 32 * SIMDGROUPS; t++)
        threads.emplace_back([=] {{
            thread_ = {{unsigned(t), 0, 0}};
            for (int group = 0; group < groups[0] * groups[1] * groups[2]; group++) {{
                const int of_layer = group % (groups[0] * groups[1]);
                group_.x = of_layer % groups[0], group_.y = of_layer / groups[0];
                group_.z = group / (groups[0] * groups[1]);
                kernel({names});
                everybody.arrive_and_wait();
            }}
        }});
    for (auto& each : threads) each.join();
    simdgroups.clear();
}}
"""

_TYPES = {"float32": "float", "int32": "int", "int64": "int64_t", "uint32": "unsigned", "uint8": "unsigned char"}


def run_kernel(
    folder: Path,
    language: str,
    header: str,
    body: str,
    constants: dict[str, int],
    simdgroups: int,
    arrays: dict[str, np.ndarray],
    out: np.ndarray,
    groups: Sequence[int],
) -> None:
    """A kernel over float32 arrays, compiled for the processor in `folder`, writes `out`.

    header, body: its text, what stands before its function and inside of it. constants: those of MLX's template, but `T`.
    arrays: its inputs by name; their shapes and strides have the names that MLX gives them. groups: threadgroups of the grid in
    x, y and z.
    """
    given = dict(arrays)
    for name, array in arrays.items():
        given[f"{name}_shape"] = np.array(array.shape, np.int32)
        given[f"{name}_strides"] = np.array([each // array.itemsize for each in array.strides], np.int64)
    parameters = (
        ", ".join(f"const {_TYPES[array.dtype.name]}* {name}" for name, array in given.items()) + ", float* out"
    )
    text = "".join(
        [
            _THREADGROUP.format(simdgroups=simdgroups), LANGUAGES[language], header, "\nusing T = float;\n",
            *(f"constexpr int {name} = {value};\n" for name, value in constants.items()),
            f"static void kernel({parameters}) {{\n{body}\n}}\n",
            _GRID.format(parameters=parameters, names=", ".join([*given, "out"])),
        ]
    )  # fmt: skip
    source, library = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text(text)
    subprocess.run(
        ["c++", "-std=c++20", "-O0", "-shared", "-fPIC", "-pthread", str(source), "-o", str(library)], check=True
    )
    every = [*given.values(), out, np.array(groups, np.int32)]
    ctypes.CDLL(str(library)).run(*(ctypes.c_void_p(each.ctypes.data) for each in every))
