"""The machine and what fits in it: machine.py, plan.py, limits.py, residency.py."""
