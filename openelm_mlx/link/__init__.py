"""Layers that run on other machines: the protocol (framing, handshake), and what stands in for them in a model (chain).

No collective operations and nothing inside MLX's graph: arrays are evaluated, and their bytes go over a socket. So every
wait has a deadline, a machine that sleeps is an error, and a test can run three of them on two cores.
"""
