"""Measuring: how fast ops, layers and models are, against every alternative and the physical limit.

case      what can be timed: the protocol
op_case   the cases of ops; in `cases` a module for each op, found by itself
encoder   the cases of layers and models; models, lengths: which, on which batches
providers bertfast and all others: one table; names: their names for a layer's parameters
harness   a case: numbers are checked first, and only what is right is timed, in turns
timing    interleaved medians: CUDA-graph replays on a GPU, processor time on a CPU
ceilings  of the machine: copy bandwidth, launch gap, matrix product rate
floor     the least time of an op, a layer or a model, from the ceilings
parts     the kinds of work in a layer, timed apart
record    the environment, and rows in a CSV of a fixed schema
compare   medians with spread in one unit, and how many times as fast
command, tables, plots, style   `bertfast bench`
"""
