"""Measuring: how fast each op is, against every alternative and against the physical limit.

record    the environment, and rows in a CSV of a fixed schema
timing    interleaved medians: CUDA-graph replays on a GPU, wall time on a CPU
ceilings  what the machine can do: copy bandwidth, launch gap, matrix product rate
cases     for each op what is timed: inputs, providers, and the bytes that it must move
measure   one case: the numbers are checked first, and only what is right is timed
"""
