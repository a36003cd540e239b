"""The text of a GPU kernel, run on the processor: each GPU thread is a thread, and shuffles wait for each other.

What the two languages have of their own is written in C++ here, so that the names that the kernel gives it are tested too.
Whether a device's compiler takes the text is not: C++ has no address spaces.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np

from openelm_mlx.models.slot_attention import CUDA, METAL, heads_together, source_of

_BEFORE = """
#include <barrier>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

using T = float;
constexpr int D = {D}, G = {G}, GB = {GB}, W = {W};
static std::barrier<> everybody(32 * W);
static float exchanged[W][32];
static std::vector<std::unique_ptr<std::barrier<>>> simdgroups;
struct Place {{ unsigned x, y, z; }};
static thread_local Place thread_, group_;

static float shuffle(float x, int distance) {{
    const int w = thread_.x / 32, lane = thread_.x % 32;
    exchanged[w][lane] = x;
    simdgroups[w]->arrive_and_wait();
    const float found = exchanged[w][lane ^ distance];
    simdgroups[w]->arrive_and_wait();
    return found;
}}

{LANGUAGE}
static void kernel(const float* q, const int64_t* q_strides, const float* kv, const int* kv_shape, const int* state,
                   const float* sinks, float* out) {{
"""
_AFTER = """
}}

extern "C" void run(const float* q, const int64_t* q_strides, const float* kv, const int* kv_shape, const int* state,
                    const float* sinks, float* out) {{
    for (int w = 0; w < W; w++) simdgroups.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> threads;
    for (int t = 0; t < 32 * W; t++)
        threads.emplace_back([=] {{
            thread_ = {{unsigned(t), 0, 0}};
            for (int slot = 0; slot < kv_shape[1]; slot++)
                for (int part = 0; part < kv_shape[2] * (G / GB); part++) {{
                    group_ = {{0, unsigned(part), unsigned(slot)}};
                    kernel(q, q_strides, kv, kv_shape, state, sinks, out);
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
#define __shfl_xor_sync(mask, x, distance) shuffle(x, mask == 0xffffffffu ? distance : 0)
#define __syncthreads() everybody.arrive_and_wait()
"""
_OF_METAL = """
#define thread_position_in_threadgroup thread_
#define threadgroup_position_in_grid group_
#define threadgroup static
#define device
using ushort = unsigned short;
enum class mem_flags { mem_threadgroup };
static float simd_shuffle_xor(float x, ushort distance) { return shuffle(x, distance); }
static void threadgroup_barrier(mem_flags) { everybody.arrive_and_wait(); }
namespace fast { static float exp2(float x) { return std::exp2(x); } }
"""
LANGUAGES = {"CUDA": (_OF_CUDA, CUDA), "Metal": (_OF_METAL, METAL)}


def attend_on_cpu(
    folder: Path,
    language: str,
    queries: np.ndarray,
    buffer: np.ndarray,
    state: np.ndarray,
    scale: float,
    sinks: np.ndarray | None,
    simdgroups: int,
) -> np.ndarray:
    """`attend_in_slots` in float32, compiled for the processor in `folder`."""
    slots, heads, _, head_dim = queries.shape
    group = heads // buffer.shape[2]
    sizes = {"D": head_dim, "G": group, "GB": heads_together(heads, buffer.shape[2]), "W": simdgroups}
    of_language, names = LANGUAGES[language]
    before, after = _BEFORE.format(**sizes, LANGUAGE=of_language), _AFTER.format()
    text = before + names + source_of(scale, sinks is not None) + after
    source, library = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text(text)
    subprocess.run(
        ["c++", "-std=c++20", "-O0", "-shared", "-fPIC", "-pthread", str(source), "-o", str(library)], check=True
    )
    out = np.zeros((slots, heads, 1, head_dim), np.float32)
    strides = np.array([each // queries.itemsize for each in queries.strides], np.int64)
    shape = np.array(buffer.shape, np.int32)
    arrays = [queries, strides, np.ascontiguousarray(buffer), shape, state, sinks, out]
    pointers = [None if each is None else ctypes.c_void_p(each.ctypes.data) for each in arrays]
    ctypes.CDLL(str(library)).run(*pointers)
    return out
