"""The runtime that runs CUDA sources on a CPU: what it computes, and the faults that it must catch.

The kernels are beside this file. For every planted fault the repaired kernel runs too: a check that
always complains would pass otherwise.
"""

from pathlib import Path

import numpy as np
import pytest

SOURCES = Path(__file__).parent
ORDERS = ["depth-first", "reverse", "random"]
SEED = 7
SQUARES = [t * t for t in range(64)]


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def site(file: str, comment: str) -> str:
    """file:line of the line that ends in this comment."""
    lines = (SOURCES / file).read_text().splitlines()
    found = [i for i, line in enumerate(lines, 1) if line.endswith(f"// {comment}")]
    assert len(found) == 1, comment
    return f"{file}:{found[0]}"


# ---- Synchronisation

RACES = {  # case: what the repaired kernel computes
    "read_after_write": SQUARES[::-1],
    "write_after_read": [2 * square for square in SQUARES[::-1]],
    "read_modify_write": [64] + [-1] * 63,
    "earlier_reader": [5] * 64,
    "shuffle_is_no_barrier": [2 * (t ^ 1) for t in range(64)],
    "part_of_a_word": [2 * t | (2 * t + 1) << 16 for t in range(32)] + [-1] * 32,
}

MEETINGS = {  # case: comments at calls that the message must name, what it says, repaired result
    "barrier_after_return": (
        ["barrier_after_return"],
        r"returned",
        [39 - t if t < 40 else -1 for t in range(64)],
    ),
    "shuffle_after_return": (
        ["shuffle_after_return"],
        r"returned",
        [t + 1 if t % 32 < 31 else t for t in range(64)],
    ),
    "deadlock": (
        ["deadlock: shuffle", "deadlock: barrier"],
        r"deadlock",
        [t ^ 1 for t in range(64)],
    ),
    "different_calls": (
        ["different_calls: shuffle", "different_calls: ballot"],
        "wait elsewhere",
        [3] * 32,
    ),
    "different_barriers": (
        ["different_barriers: with an answer", "different_barriers: without"],
        "wait elsewhere",
        [101] * 64,
    ),
    "partial_mask": (["partial_mask"], "__shfl_sync", [3] * 32),
    "missing_lane": (["missing_lane"], "of a warp with 16 lanes", [t ^ 8 for t in range(48)]),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", RACES)
def test_races_are_caught(program, case: str, order: str) -> None:
    message = program.fault(case, "faulty", order=order)
    assert "error: race on byte" in message
    assert site("sync.cu", f"{case}: store") in message
    assert site("sync.cu", f"{case}: load") in message
    assert message.count("thread (") == 2 and message.count("of block (0, 0, 0)") == 2
    assert numbers(program.good(case, "repaired", order=order)) == RACES[case]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", MEETINGS)
def test_failed_meetings_are_caught(program, case: str, order: str) -> None:
    comments, words, repaired = MEETINGS[case]
    message = program.fault(case, "faulty", order=order)
    assert words in message
    for comment in comments:
        assert site("sync.cu", comment) in message
    assert numbers(program.good(case, "repaired", order=order)) == repaired


def test_deadlock_tells_who_waits_where(program) -> None:
    lines = program.fault("deadlock", "faulty").splitlines()
    assert lines[0] == "error: deadlock in block (0, 0, 0):"
    assert lines[1].startswith("  threads 0-15, 32-47 wait at __shfl_xor_sync (")
    assert lines[2].startswith("  threads 16-31, 48-63 wait at __syncthreads (")


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_in_different_branches_meet(program, order: str) -> None:
    expected = [t if t % 2 else 2 * t for t in range(64)][::-1]
    assert numbers(program.good("barriers_in_branches", order=order)) == expected


def test_a_fault_leaves_the_next_launch_alone(program) -> None:
    assert numbers(program.good("after_a_fault")) == [t ^ 1 for t in range(64)] * 3


def test_threads_of_a_failed_block_unwind(program) -> None:
    # Threads 0 to 19 waited, 20 returned, and the others never began.
    assert numbers(program.good("unwinding")) == [0, 21]


def test_launches_from_several_os_threads(program) -> None:
    assert numbers(program.good("os_threads")) == RACES["write_after_read"] * 2


# ---- Bounds

BOUNDS = {  # case: what the message says, what the repaired kernel computes
    "shared_store": (["element 64 of 4 bytes", "byte 256 of 256", "thread (63, 0, 0)"], [1] * 64),
    "shared_load": (["element -1 of 4 bytes", "byte -4 of 256", "thread (0, 0, 0)"], [1] * 64),
    "misaligned_view": (["16 bytes can't start at byte 8"], [4] * 64),
    "shared_unwritten": (["element 54 is NaN"], [1] * 64),
    "global_store": (["guard zone written: element 63 of 63"], [1] * 63),
    "global_load": (["element 63 is NaN"], [2 * t + 1 for t in range(63)] + [63]),
    "unwritten_output": (["element 17 is NaN"], [1] * 64),
    "misaligned_vector_load": (["misaligned access", "8 bytes must", "thread (0, 0, 0)"], [1] * 64),
    "misaligned_vector_store": (
        ["misaligned access", "8 bytes must", "thread (0, 0, 0)"],
        [1] * 64,
    ),
}


@pytest.mark.parametrize("case", BOUNDS)
def test_bounds(program, case: str) -> None:
    words, repaired = BOUNDS[case]
    message = program.fault(case, "faulty")
    for word in words:
        assert word in message
    if case in ("shared_store", "shared_load", "misaligned_view"):
        assert site("bounds.cu", case) in message
    assert numbers(program.good(case, "repaired")) == repaired


@pytest.mark.parametrize("case, kind", [("global_load", "READ"), ("global_store", "WRITE")])
def test_address_sanitizer_sees_overruns(sanitized, case: str, kind: str) -> None:
    result = sanitized.run(case, "faulty")
    message = result.stderr.decode()
    assert result.returncode != 0
    assert "heap-buffer-overflow" in message and f"{kind} of size 4" in message
    assert numbers(sanitized.good(case, "repaired")) == BOUNDS[case][1]


@pytest.mark.parametrize("order", ORDERS)
def test_address_sanitizer_follows_the_fibers(sanitized, order: str) -> None:
    sanitized.good("reduction", order=order)
    for case in [*RACES, *MEETINGS]:
        assert "AddressSanitizer" not in sanitized.fault(case, "faulty", order=order)
    sanitized.good("after_a_fault", order=order)
    sanitized.good("os_threads", order=order)


# ---- The schedule


def test_orders_give_the_same_bits(program, sanitized, portable) -> None:
    outputs = {program.good("reduction", order=order) for order in ORDERS}
    outputs |= {program.good("reduction", order="random", seed=seed) for seed in range(5)}
    outputs |= {build.good("reduction", order="random") for build in (sanitized, portable)}
    assert len(outputs) == 1
    rows = np.array([int(word, 16) for word in outputs.pop().split()], np.uint32).view(np.float32)
    bits, values = 1, []
    for _ in range(15 * 777):
        bits = (bits * 1664525 + 1013904223) % 2**32
        values.append((bits >> 8) / 2**24 - 0.5)
    # Partial sums of 777 values in (-0.5, 0.5) are up to sqrt(777 / 12) = 8 in size, and each
    # rounds by u of that: sqrt(777) * 8 u, as a random walk, and twice that.
    exact, bound = np.reshape(values, (15, 777)).sum(axis=1), 2 * 777**0.5 * 8 * 2**-24
    np.testing.assert_allclose(rows, exact, rtol=0, atol=bound)


def test_orders_differ_in_what_runs_first(program) -> None:
    assert numbers(program.good("block_order")) == list(range(12))
    assert numbers(program.good("block_order", order="reverse")) == list(range(12))[::-1]
    shuffled = [
        tuple(numbers(program.good("block_order", order="random", seed=seed))) for seed in range(6)
    ]
    assert all(sorted(order) == list(range(12)) for order in shuffled)
    assert len(set(shuffled)) > 3
    again = numbers(program.good("block_order", order="random", seed=0))
    assert tuple(again) == shuffled[0]


def thread_orders(program, order: str, seed: int = SEED) -> tuple[list[int], list[int]]:
    """The threads in order of arrival at a barrier, and of departure."""
    places = np.reshape(numbers(program.good("thread_order", order=order, seed=seed)), (2, 40))
    return places[0].argsort().tolist(), places[1].argsort().tolist()


def test_orders_differ_in_how_threads_interleave(program) -> None:
    up, down = list(range(40)), list(range(40))[::-1]
    # The last to arrive needn't wait, and goes on.
    assert thread_orders(program, "depth-first") == (up, [39, *up[:-1]])
    assert thread_orders(program, "reverse") == (down, [0, *down[:-1]])
    goes_on = []
    for seed in range(6):
        arrival, departure = thread_orders(program, "random", seed)
        assert sorted(arrival) == up and sorted(departure) == up
        assert arrival not in (up, down) and departure != arrival
        goes_on.append(arrival[-1] == departure[0])
    assert not all(goes_on)


def test_portable_switch(portable) -> None:
    for case, expected in RACES.items():
        portable.fault(case, "faulty")
        assert numbers(portable.good(case, "repaired")) == expected
    portable.fault("deadlock", "faulty")


# ---- Shuffles and votes


def shuffle_source(call: int, lane: int, operand: int, width: int) -> int:
    """The lane that `lane` reads, by the PTX manual's definition of shfl."""
    first, last = lane // width * width, lane // width * width + width - 1
    source = [first + operand % width, lane - operand, lane + operand, lane ^ operand][call]
    inside = [True, source >= first, source <= last, source <= last][call]
    return source if inside else lane


def test_shuffles(program) -> None:
    lines = program.good("shuffles", order="random").splitlines()
    assert len(lines) == 5 * 4 * 5 * 6
    for line in lines:
        kind, *words = line.replace("long long", "int64").split()
        call, width, operand, *result = map(int, words)
        wide = kind in ("int64", "double")
        values = [t * 1099511627777 + 7 if wide else t * 3 + 7 for t in range(64)]
        expected = [
            values[t - t % 32 + shuffle_source(call, t % 32, operand, width)] for t in range(64)
        ]
        assert result == expected, line


@pytest.mark.parametrize("threads", [32, 64, 80, 7])
@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_votes(program, threads: int, chance: float) -> None:
    predicate = (np.random.default_rng(threads).random(threads) < chance).astype(int) * 4
    result = np.reshape(numbers(program.good("votes", *predicate)), (3, threads))
    for first in range(0, threads, 32):
        warp = predicate[first : first + 32]
        ballot = sum(1 << lane for lane, vote in enumerate(warp) if vote)
        assert (result[0, first : first + 32] == ballot).all()
        assert (result[1, first : first + 32] == any(warp)).all()
        assert (result[2, first : first + 32] == all(warp)).all()


# ---- Bank conflicts

BANKS = {  # the access: words that one bank serves at worst
    "consecutive": 1,
    "stride 2": 2,
    "stride 32": 32,
    "stride 33": 1,
    "broadcast": 1,
    "16 words of one bank": 16,
    "halves": 1,
    "halves, stride 4": 2,
    "pairs": 1,
    "pairs, stride 2": 2,
    "pairs, stride 16": 16,
    "quads": 1,
    "quads, stride 2": 2,
    "half a warp": 16,
    "skipped by half a warp": 1,
    "store, stride 32": 32,
    "store, stride 33": 1,
}


def bank_records(repeats: int, warps: int, blocks: int) -> dict[str, tuple[int, int]]:
    records = {}
    for comment, degree in BANKS.items():
        stores = comment.startswith("store")
        place = site("launches.cu", f"banks: {comment}") + (" store" if stores else " load")
        times = 2 if comment.startswith("skipped") else 1
        records[place] = (degree, blocks if stores else times * repeats * warps * blocks)
    return records


def parse_records(text: str) -> dict[str, tuple[int, int]]:
    rows = [line.rsplit(" ", 2) for line in text.splitlines()]
    return {Path(place).name: (int(degree), int(count)) for place, degree, count in rows}


@pytest.mark.parametrize("order", ORDERS)
def test_bank_conflicts(program, order: str) -> None:
    records = parse_records(program.good("banks", order=order))
    assert records == bank_records(repeats=5, warps=4, blocks=2)


def test_bank_conflict_records_can_be_reset(program) -> None:
    records = parse_records(program.good("reset_banks"))
    assert records == bank_records(repeats=1, warps=1, blocks=1)


# ---- Launches

LIMITS = [
    ((1, 1, 1), (1024, 1, 1), 0, "no error"),
    ((1, 1, 1), (32, 32, 1), 227 * 1024, "no error"),
    ((1, 1, 1), (1, 1, 64), 0, "no error"),
    ((2, 3, 4), (33, 1, 1), 5, "no error"),
    ((1, 1, 1), (1025, 1, 1), 0, "invalid configuration argument"),
    ((1, 1, 1), (32, 33, 1), 0, "invalid configuration argument"),
    ((1, 1, 1), (1, 1, 65), 0, "invalid configuration argument"),
    ((1, 1, 1), (0, 1, 1), 0, "invalid configuration argument"),
    ((0, 1, 1), (32, 1, 1), 0, "invalid configuration argument"),
    ((1, 0, 1), (32, 1, 1), 0, "invalid configuration argument"),
    ((1, 65536, 1), (32, 1, 1), 0, "invalid configuration argument"),
    ((2**31, 1, 1), (32, 1, 1), 0, "invalid configuration argument"),
    ((1, 1, 1), (32, 1, 1), 227 * 1024 + 1, "invalid argument"),
    ((1, 1, 1), (32, 1, 1), -1, "invalid argument"),
]


@pytest.mark.parametrize("grid, block, shared_bytes, message", LIMITS)
def test_launch_limits(program, grid: tuple, block: tuple, shared_bytes: int, message: str) -> None:
    assert program.good("limits", *grid, *block, shared_bytes, 100).strip() == message
    assert program.good("limits", *grid, *block, shared_bytes, 100, "dry").strip() == message


@pytest.mark.parametrize("capability, kilobytes", [(80, 163), (89, 99), (90, 227), (120, 99)])
def test_shared_memory_of_other_gpus(program, capability: int, kilobytes: int) -> None:
    for extra, message in ((0, "no error"), (1, "invalid argument")):
        shared_bytes = kilobytes * 1024 + extra
        said = program.good("limits", 1, 1, 1, 32, 1, 1, shared_bytes, capability)
        assert said.strip() == message
    said = program.fault("limits", 1, 1, 1, 32, 1, 1, 0, capability + 2)
    assert "must be of compute capability 80, 86, 89, 90, 100 or 120, with one" in said


def test_a_dry_launch_runs_no_block(program) -> None:
    assert program.good("dry") == "0 12"


def test_a_kernel_launched_early_waits_in_every_thread(program) -> None:
    program.good("early_launch", 0)
    said = program.fault("early_launch", 1)
    assert "block (1, 0, 0) was launched early, but only 63 of its 64 threads waited" in said


def test_costs_are_printed(program) -> None:
    text = program.good("costs")
    assert "ns a switch" in text and "dry launch" in text
    print(text)
