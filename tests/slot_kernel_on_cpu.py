"""The text of a GPU kernel, run on the processor: each GPU thread is a thread, and shuffles wait for each other."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np

from openelm_mlx.models.slot_attention import heads_together, source_of

_BEFORE = """
#include <barrier>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define THREAD thread_
#define PART_OF_HEADS part_
#define SLOT slot_
#define SHARED static
#define DEVICE
#define EXP2(x) std::exp2(x)
#define BARRIER() everybody.arrive_and_wait()
#define SHUFFLE_XOR(x, distance) shuffle(x, distance)

using T = float;
constexpr int D = {D}, G = {G}, GB = {GB}, W = {W};
static std::barrier<> everybody(32 * W);
static float exchanged[W][32];
static std::vector<std::unique_ptr<std::barrier<>>> simdgroups;
static thread_local int thread_;

static float shuffle(float x, int distance) {{
    const int w = thread_ / 32, lane = thread_ % 32;
    exchanged[w][lane] = x;
    simdgroups[w]->arrive_and_wait();
    const float found = exchanged[w][lane ^ distance];
    simdgroups[w]->arrive_and_wait();
    return found;
}}

static void kernel(int part_, int slot_, const float* q, const int64_t* q_strides, const float* kv, const int* kv_shape,
                   const int* state, const float* sinks, float* out) {{
"""
_AFTER = """
}}

extern "C" void run(const float* q, const int64_t* q_strides, const float* kv, const int* kv_shape, const int* state,
                    const float* sinks, float* out) {{
    for (int w = 0; w < W; w++) simdgroups.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> threads;
    for (int t = 0; t < 32 * W; t++)
        threads.emplace_back([=] {{
            thread_ = t;
            for (int slot = 0; slot < kv_shape[1]; slot++)
                for (int part = 0; part < kv_shape[2] * (G / GB); part++) {{
                    kernel(part, slot, q, q_strides, kv, kv_shape, state, sinks, out);
                    everybody.arrive_and_wait();
                }}
        }});
    for (auto& each : threads) each.join();
    simdgroups.clear();
}}
"""


def attend_on_cpu(
    folder: Path,
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
    text = _BEFORE.format(**sizes) + source_of(scale, sinks is not None) + _AFTER.format()
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
