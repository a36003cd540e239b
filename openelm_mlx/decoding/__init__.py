"""Decoding: steps, sampling, constraints, speculative decoding, and the prefix cache."""
