"""Hopper's instructions in the runtime that runs CUDA sources on a CPU: products of a warpgroup,
bulk copies, barriers in shared memory, and the faults that it must catch.

What they compute is checked as on a GPU (tests/test_gpu_hopper.py).
"""

import re
from pathlib import Path

import pytest
from support import hopper_units as units

SOURCES = Path(__file__).parent
ORDERS = ["depth-first", "reverse", "random"]


def runs(build, **options):
    def run(name, out_bytes, numbers, data):
        result = build.run(name, out_bytes, *numbers, data=data, **options)
        assert result.returncode == 0, result.stderr.decode()
        return result.stdout

    return run


@pytest.mark.parametrize("case", units.WGMMA_CASES, ids=str)
def test_products_of_a_warpgroup(program, case):
    units.check_wgmma(runs(program), *case)


@pytest.mark.parametrize("case", units.COPY_CASES, ids=str)
def test_boxes_are_loaded_and_stored(program, case):
    units.check_copy(runs(program), *case)


def test_fragments_are_stored(program):
    units.check_stmatrix(runs(program))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("turns", [1, 2, 7])
def test_a_pipeline(program, turns, order):
    units.check_pipeline(runs(program, order=order), turns)


def test_maps_that_a_gpu_would_refuse(program):
    """Rows that don't begin at multiples of 16 bytes or aren't swizzled, large boxes."""
    right = [72, 20, 3, 64, 16, 2, *[0] * 6]
    tensor, box = 2 * 72 * 20 * 3, 2 * 64 * 16 * 2
    assert program.run("copy", box + tensor, *right, data=bytes(tensor)).returncode == 0
    for place, value in [(0, 68), (0, 0), (3, 16), (3, 128), (4, 0), (4, 257), (5, 0)]:
        numbers = [*right[:place], value, *right[place + 1 :]]
        assert "invalid argument" in program.fault("copy", box + tensor, *numbers)


# ---- Faults of the pipeline

LOAD = r"while the bulk load at {load of b} is under way|where nobody has written yet"
FAULTS = {  # fault: what the message says, with lines of the source by their comments
    "kSkippedWait": LOAD,
    "kWrongParity": LOAD,
    "kOnlyOneWaits": r"a copy for the mbarrier .* wrote it at {load of b}, .*{product}, with "
    "nothing that tells .*: mbarrier_wait tells a thread",
    "kUnreleasedStage": r"one arrival too many .*which waits for bytes only, at {full: arrive}",
    "kReleasedBeforeTheWait": r"the wgmma of warpgroup \d read it at {product}, a copy .*"
    "{load of a}, with nothing that tells .*: wgmma_wait tells its warpgroup",
    "kNeverReleased": r"deadlock.*threads (0|31) wait at mbarrier_wait \({empty: wait}\).*"
    r"\({init of empty}\), phase 0: 128 of 256 arrivals",
    "kTooFewBytes": r"deadlock.*\({init of full}\), phase 0: 1 of 1 arrivals, 16 bytes more came",
    "kTooManyBytes": r"deadlock.*\({init of full}\), phase 0: 1 of 1 arrivals, 16 bytes less came "
    r"than were expected, last at {full: arrive}",
    "kTooManyArrivals": rf"{LOAD}|deadlock.*\({{init of empty}}\), phase 2: 0 of 256 arrivals",
    "kNoInit": r"is no mbarrier: no mbarrier_init has made it at {empty: wait}",
    "kNoInitFence": r"\({init of full}\), whose maker made no mbarrier_init_fence, at {load of a}",
    "kNoBarrierAfterInit": r"\({init of full}\), with no barrier after its mbarrier_init at "
    "{full: wait}",
    "kWriteOverABarrier": r"store over the mbarrier .*\({init of full}\) at {over a barrier}",
    "kMisalignedMap": r"the tensor map is not aligned to 64 bytes at {bad map}",
    "kMisalignedBox": r"tma_load of rows of 64 bytes: byte 128 .* multiple of 512 at {load of a}",
    "kTwoLoadsToOnePlace": r"tma_load of byte 0 .* load at {load of a} is .*{load of b}",
    "kReadOfALoadUnderWay": r"load of byte 0 .* load at {load of a} is .*{read of a load}|"
    r"race on byte 0 .*read it at {read of a load}, a copy .*{load of a}, with no barrier",
    "kLoadNotWaitedFor": r"ended while a bulk load is under way, started at {one too many}|"
    "ended with an open mbarrier .*8192 bytes more came than were expected",
    "kBytesThatNeverCome": r"ended with an open mbarrier .*12288 bytes less came than were "
    "expected, last at {never come}",
    "kOrdinaryReadBeforeALoad": r"read it at {ordinary read}, .* and made no async_proxy_fence "
    "before a copy .* writes it at {load of a}",
    "kOrdinaryWriteBeforeAProduct": r"wrote it at {write before a product}, .* and made no "
    r"async_proxy_fence before the wgmma of warpgroup \d reads it at {product}",
    "kNoWgmmaFence": r"wgmma with no wgmma_fence since the last wgmma_commit at {product}",
    "kNoWgmmaWait": r"the wgmma of warpgroup \d read it at {product}, a copy .*{load of a}, with "
    "nothing",
    "kNoWgmmaCommit": r"the wgmma of warpgroup \d read it at {product}, a copy .*{load of a}, with "
    "nothing",
    "kPartOfAWarpgroup": r"{wgmma_fence}.* while other threads of its warpgroup wait elsewhere|"
    r"while other threads of its warpgroup wait elsewhere:.*{wgmma_fence}",
    "kOneThreadReturns": r"returned, but every thread of its warpgroup must .*{wgmma_fence}",
    "kOtherMatrices": r"wgmma of other matrices in one thread of the warpgroup .*{product}",
    "kSumsWritten": r"sums of the wgmma at {product} were written before a wgmma_wait",
    "kMisalignedMatrix": r"matrix at byte 8256 .* must begin at a multiple of 512 at {product}",
    "kMatrixAcrossRows": r"crosses the end of its rows of 64 bytes at {product}",
    "kMatrixOutside": r"wgmma's B outside shared memory at {product}: bytes 232448 to 232463",
    "kWriteWhereWgmmaReads": r"the wgmma of warpgroup \d read it at {product}, thread .*"
    "{ordinary write}, with nothing that tells",
    "kNoProxyFence": r"wrote it at {write of out}, .* and made no async_proxy_fence before a bulk "
    "store .* reads it at {store}",
    "kNoNamedBarrier": r"race .* wrote it at {write of out}, a bulk store of .*{store}, with no "
    "barrier between",
    "kNamedBarrierOfOthers": r"named barrier 1 .*it is for 128 threads here, and for 160 at "
    r"{named barrier}|deadlock.*named barrier 1 \({named barrier}\): 128 of 160 threads",
    "kNamedBarrierTooLarge": r"deadlock.*named barrier 2 \({named barrier}\): 128 of 160 threads",
    "kNamedBarrierTwice": r"{named barrier}, .*comes a second time before all others have come",
    "kNamedBarrierLeftOpen": r"ended with an open named barrier 5 \({left open}\): 256 of 384",
    "kStoreNotWaitedFor": r"returned without waiting for its bulk store at {store}",
    "kWriteWhereAStoreReads": r"race .* wrote it at {overwrites out}, a bulk store .*{store}, with",
    "kMoreRegistersThanThereAre": r"{more than there are} .*: (384 threads can't be launched with "
    "176 registers each|launched with 176 registers, elsewhere with 168)",
    "kTooManyRegisters": r"deadlock.*{too many registers}.*warpgroup 2 waits for 72 more "
    "registers a thread; others have given up 56",
    "kRegistersTheOtherWay": r"{the other way} .*from 232 registers to 176 is the other way",
}
SOURCE = (SOURCES / "hopper_pipeline.cu").read_text()
NUMBERS = re.findall(r"\bk\w+", re.search(r"enum Fault {(.*?)}", SOURCE, re.DOTALL)[1])


def line_of(source, comment):
    found = [i for i, text in enumerate(source.splitlines(), 1) if text.endswith(f"// {comment}")]
    assert len(found) == 1, comment
    return found[0]


def pattern(text):
    """Comments in braces become places."""
    return re.sub(
        "{([^{}]+)}", lambda found: rf"\S*hopper_pipeline\.cu:{line_of(SOURCE, found[1])}", text
    )


def message_of(build, fault, turns=7, **options):
    numbers = [128 * 64 * 2, turns, NUMBERS.index(fault)]
    data = bytes(2 * (128 + 64) * 32 * turns)
    return build.fault("pipeline", *numbers, data=data, **options)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_pipeline_are_caught(program, fault, order):
    message = message_of(program, fault, order=order)
    assert re.search(pattern(FAULTS[fault]), message, re.DOTALL), message


def test_a_block_waits_for_its_products(program):
    message = message_of(program, "kNoWgmmaWait", turns=1)
    assert re.search(pattern("ended without waiting for its wgmma at {product}"), message), message


# ---- Ordinary accesses

SQUARES = [t * t for t in range(32)][::-1]
HANDOVERS = {  # case: what the repaired kernel computes
    "through_an_mbarrier": SQUARES,
    "back_again": SQUARES,
    "by_one_lane": SQUARES,
    "through_a_named_barrier": SQUARES,
    "one_reader_of_two": [7, 7],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", HANDOVERS)
def test_handovers(program, case, order):
    message = program.fault(case, "faulty", order=order)
    assert "error: race on byte" in message
    source = (SOURCES / "handovers.cu").read_text()
    for access in ("store", "load"):
        assert f"handovers.cu:{line_of(source, f'{case}: {access}')}" in message
    words = program.good(case, "repaired", order=order).split()
    assert [int(word) for word in words] == HANDOVERS[case]


def test_address_sanitizer_has_nothing_to_add(sanitized):
    units.check_pipeline(runs(sanitized), 3)
    for fault in ("kOnlyOneWaits", "kNeverReleased", "kSumsWritten"):
        assert "AddressSanitizer" not in message_of(sanitized, fault)
