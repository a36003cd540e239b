"""The machine and the memory plan: machine.py, plan.py, limits.py, rates.py, calibration.py."""
