"""Tests of what only runs on a GPU, on the simulated one: see tests/test_simulated_gpu.py."""

from support import simulated_gpu

if not simulated_gpu.wanted():
    collect_ignore_glob = ["test_*.py"]
