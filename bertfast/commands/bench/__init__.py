"""Measuring: how fast each op is, against every alternative and against the physical limit.

record    the environment, and rows in a CSV of a fixed schema
timing    interleaved medians: CUDA-graph replays on a GPU, wall time on a CPU
ceilings  what the machine can do: copy bandwidth, launch gap, matrix product rate
floor     the least time of an op, a layer or a model, from the ceilings
lengths   token counts as real batches have them
cases     for each op what is timed: inputs, providers, and the bytes that it must move
measure   one op's case: the numbers are checked first, and only what is right is timed
models    the encoders and batches that are measured
baselines, layer_baselines   bertfast and everybody else, running a model or a layer
encoder   one layer's or model's case, checked and timed in the same way
parts     the kinds of work in a layer, timed apart
compare   medians with spread in one unit, and how many times as fast
command, tables, plots, style   `bertfast bench`
"""
