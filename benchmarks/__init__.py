"""Measurements that developers make, in a clone of the repository: `python -m benchmarks.streaming -h`. No part of the wheel.

What a user measures with is openelm_mlx/bench: `bench`, `selfcheck` and `plan --calibrate`. Nothing there imports this.
"""
