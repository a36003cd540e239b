"""What the benchmarks measure and simulate; the commands beside this folder read arguments and print."""
