"""The experts' kernel without a GPU: its text run on the processor, and what it computes by NumPy."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from kernels_on_cpu import run_kernel

from openelm_mlx.models.expert_kernel import CUDA, METAL, MOST_PLACES, MOST_ROUTES, Activation, texts_of
from openelm_mlx.models.moe import clamped_swiglu

NAMES = {"CUDA": CUDA, "Metal": METAL}


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
    """`expert_kernel.product` in float32, compiled for the processor in `folder`. sizes: W, R, B and D."""
    header, body = texts_of(NAMES[language], activation)
    rows, routes = bias.shape[-1], places.size
    constants = {
        **sizes, "COLUMNS": x.shape[-1], "OUT": rows, "SHARE": routes // len(x), "MOST_ROUTES": MOST_ROUTES,
        "MOST_PLACES": MOST_PLACES,
    }  # fmt: skip
    arrays = {"x": x, "weights": weight, "scales": scales, "bias": bias, "places": places, "experts": experts}
    out = np.full((routes, rows if activation is None else rows // 2), np.nan, np.float32)
    groups = -(-rows // (sizes["W"] * sizes["R"])), min(len(weight), routes), 1
    run_kernel(folder, language, header, body, constants, sizes["W"], arrays, out, groups)
    return out


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
