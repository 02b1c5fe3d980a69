"""The hot path of a kernel, the gates, and what other libraries' counts are compared with."""

import dataclasses
import re
from pathlib import Path

import pytest
from test_kernels import ROW, SASS, planted, texts

import bertfast.commands.kernels as kernels
from bertfast.commands.kernels import (
    Reading,
    budget,
    flow,
    gates,
    hot,
    hot_budget,
    model,
    peers,
    pipes,
    sass,
)
from bertfast.commands.kernels.hot import Hot
from bertfast.ops.aot import Work

DATA = Path(__file__).parent / "data"


def listing(*lines):
    """Instructions, and labels, as nvdisasm prints them."""
    return [
        f"{line}:" if line.startswith(".L") else f"        /*{16 * place:04x}*/  {line} ;"
        for place, line in enumerate(lines)
    ]


def code_of(*lines):
    return flow.instructions(listing(*lines))


# A turn: 16 x 16 scores of a warp, head dimension 16, two products. The keys of the next turn are
# copied unless there is none, and where a row's largest score has grown its sums are scaled.
LOOP = (
    "LDG.E.128 R20, desc[UR4][R2.64]",
    ".L_x_1",
    "ISETP.GE.AND P0, PT, R0, R1, PT",
    "@P0 BRA `(.L_x_2)",
    "LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]",
    "LDGSTS.E.BYPASS.128 [R4+0x200], desc[UR4][R2.64]",
    ".L_x_2",
    "LDG.E R30, desc[UR4][R2.64]",
    "LDG.E R31, desc[UR4][R2.64]",
    "LDSM.16.M88.4 R8, [R5]",
    "FMUL R6, R30, R30",
    "HMMA.16816.F32.BF16 R12, R8, R20, R12",
    "HMMA.16816.F32.BF16 R16, R8, R22, R16",
    "FADD R7, R31, R31",
    "@P1 BRA `(.L_x_3)",
    *(f"FSEL R{n}, R{n}, -INF, P2" for n in range(12, 20)),
    ".L_x_3",
    "@P3 BRA `(.L_x_4)",
    *(f"FMUL R{n}, R{n}, R6" for n in range(24, 32)),
    ".L_x_4",
    *(f"MUFU.EX2 R{n}, R{n}" for n in range(12, 20)),
    "HMMA.16816.F32.BF16 R24, R12, R20, R24",
    "HMMA.16816.F32.BF16 R28, R16, R22, R28",
    "@P4 BRA `(.L_x_1)",
    "STG.E.128 desc[UR4][R2.64], R24",
    "EXIT",
)
WORK = Work(16, 16, 16, products=((16, 16),) * 2, streamed=16)


def found(work=WORK, lines=LOOP, loop=True, threads=32):
    return hot.find(flow.Flow(code_of(*lines)), work, threads, loop)


def test_the_hot_path_is_the_turn_that_copies_and_masks_nothing():
    path = found()
    # Of the 40 instructions of the loop: not 8 FSEL, not 8 FMUL.
    assert path.instructions == 24 / 8
    assert path.shared_bytes == (2 * 512 + 512) / 256
    assert path.cache_bytes == (2 * 512 + 2 * 128) / 256
    assert path.products == 2 and path.mma_sync == 4
    assert path.multiply_adds == {"mma.sync": 2 * 16}
    assert path.pipes["mufu"] == 1.0 and path.pipes["tensor"] == 0.5


def test_sums_are_scaled_where_the_softmax_is_online():
    with_them = found(dataclasses.replace(WORK, scales=True))
    assert with_them.instructions == found().instructions + 1  # a multiplication for each of 8 sums


def test_a_draw_is_asked_for_with_dropout():
    assert found(dataclasses.replace(WORK, dropout=True)) is None


@pytest.mark.parametrize("head_dim, products", [(32, 2), (16, 3), (16, 1)])
def test_a_turn_with_other_multiply_adds_is_no_hot_path(head_dim, products):
    other = dataclasses.replace(WORK, head_dim=head_dim, products=((16, 16),) * products)
    assert found(other) is None


def test_loads_are_late_if_they_are_used_before_the_first_product():
    path = found()
    assert (path.loads, path.late_loads) == (4, 1)  # R30; R31 is used after products
    earlier = [line for line in LOOP if line != "FMUL R6, R30, R30"]
    assert found(lines=earlier).late_loads == 0


def test_a_turn_of_a_loop_inside_counts_as_often_as_it_runs():
    inner = (
        ".L_x_1",
        "LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]",
        ".L_x_2",
        "HMMA.16816.F32 R12, R8, R20, R12",
        "@P0 BRA `(.L_x_2)",
        "@P1 BRA `(.L_x_1)",
        "EXIT",
    )
    work = Work(16, 16, 16, products=((16, 16),), streamed=0, turns=2)
    assert found(work, inner).instructions == (2 + 2 * 2) / 8
    assert found(dataclasses.replace(work, turns=3), inner) is None


def test_a_kernel_without_a_loop_is_taken_whole_up_to_an_early_exit():
    lines = (
        "@P0 EXIT",
        "HMMA.16816.F32 R12, R8, R20, R12",
        "HMMA.16816.F32 R12, R8, R20, R12",
        "@P1 EXIT",
        "HMMA.16816.F32 R12, R8, R20, R12",
        "EXIT",
    )
    path = found(Work(16, 16, 16, products=((16, 16),), streamed=0), lines, loop=False)
    assert path.instructions == 4 / 8 and path.late_loads == 0


# A block of one warp: 16 x 16 sums, 16 deep a turn. The second half of the stores is only for rows
# that are there; sums for a bias's gradient only where they are wanted.
PRODUCT = (
    "S2R R0, SR_CTAID.X",
    "@P0 EXIT",
    *LOOP[1:5],
    *LOOP[5:7],
    "HMMA.16816.F32.BF16 R12, R8, R20, R12",
    "HMMA.16816.F32.BF16 R16, R8, R22, R16",
    "@P4 BRA `(.L_x_1)",
    *(f"FFMA R{n}, R{n}, R6, R7" for n in range(12, 20)),
    "@P5 BRA `(.L_x_5)",
    "STG.E.128 desc[UR4][R2.64], R12",
    ".L_x_5",
    "@P6 BRA `(.L_x_6)",
    "FADD R6, R6, R7",
    "STG.E desc[UR4][R2.64], R6",
    ".L_x_6",
    "EXIT",
)
OF_A_PRODUCT = Work(16, 16, 16, ((16, 16),), streamed=16, outputs=1, most_outside=2.0)


def test_outside_the_loop_is_what_a_block_does_that_writes_all_its_outputs():
    path = found(OF_A_PRODUCT, PRODUCT)
    assert path.instructions == round(7 / 8, 2)
    # Two before the loop; eight, a branch and its store; the other branch and the end.
    assert path.outside == round(14 / 8, 2)
    row = dataclasses.replace(ROW, multiplies=True, most_outside=2.0, hot=path)
    assert not gates.excesses(row)
    too_many = dataclasses.replace(row, most_outside=1.7)
    assert [one.text for one in gates.excesses(too_many)] == [
        "1.75 instructions outside the main loop per sum, 1.7 are allowed"
    ]
    unwritten = found(dataclasses.replace(OF_A_PRODUCT, outputs=2), PRODUCT)
    (excess,) = gates.excesses(dataclasses.replace(row, hot=unwritten))
    assert excess.gate == "path" and "all of its stores" in excess.text


def test_bulk_copies_are_asked_for_once_an_output():
    lines = [line.replace("STG.E.128 desc[UR4][R2.64], R12", "UTMASTG.2D") for line in PRODUCT]
    assert found(OF_A_PRODUCT, lines).outside == round(14 / 8, 2)
    assert found(dataclasses.replace(OF_A_PRODUCT, outputs=2), lines).outside is None


WGMMA = (
    ".L_x_1",
    "WARPGROUP.ARRIVE",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "HGMMA.64x16x64.F32.BF16 R56, R8, gdesc[UR8], R56",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "@P0 BRA `(.L_x_1)",
    "EXIT",
)


def test_tiles_of_tcgen05_are_counted_beside_mma_sync():
    lines = (
        ".L_x_1",
        "HMMA.16816.F32 R12, R8, R20, R12",
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], !UPT",
        "@P0 BRA `(.L_x_1)",
        "EXIT",
    )
    work = Work(16, 16, 8, products=((16, 8), (64, 16)), streamed=0)
    path = found(work, lines)
    assert path.shared_bytes is None and path.mma_sync == 1
    assert found(dataclasses.replace(work, products=((16, 8), (64, 32))), lines) is None


def test_wgmma_reads_shared_memory_and_is_waited_for():
    work = Work(64, 64, 16, products=((64, 16), (64, 64)), streamed=0, wgmma=True)
    path = found(work, WGMMA, threads=128)
    # Of the first both sides lie there, of the second one.
    assert path.shared_bytes == (2 * 16 * (64 + 64) + 2 * 64 * 16) / 4096
    assert (path.waits, path.products, path.mma_sync) == (2, 2, 0)
    assert path.multiply_adds == {"wgmma": 2 * 16}


@pytest.mark.parametrize(
    "line, pipe, shared, cache",
    [
        ("FFMA R1, R2, R3, R4", "fma", 0, 0),
        ("IMAD.WIDE.U32 R2, R3, R4, RZ", "imad", 0, 0),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", "alu", 0, 0),
        ("MUFU.EX2 R1, R1", "mufu", 0, 0),
        ("LDSM.16.MT88.4 R4, [R1]", "ldsm", 512, 0),
        ("STS.128 [R1], R4", "shared", 512, 0),
        ("SHFL.BFLY PT, R1, R2, 0x1, 0x1f", "shared", 128, 0),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64]", "global", 512, 512),
        ("LDG.E.U8 R1, desc[UR4][R2.64]", "global", 0, 32),
        ("RED.E.ADD.F32 desc[UR4][R2.64], R1", "global", 0, 256),
        ("LDL R1, [R2]", "local", 0, 0),
        (
            "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], !UPT",
            "tensor",
            0,
            0,
        ),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "other", 0, 0),
    ],
)
def test_what_an_instruction_asks_of_a_multiprocessor(line, pipe, shared, cache):
    (one,) = code_of(line)
    assert (pipes.pipe(one), pipes.shared_bytes(one), pipes.cache_bytes(one)) == (
        pipe,
        shared,
        cache,
    )


def test_the_part_that_bounds():
    row = dataclasses.replace(ROW, hot=found())
    assert hot_budget.bound(row) == "L2"
    cycles = hot.bound(row.hot, pipes.MACHINES[90])
    assert cycles["L2"] == 5 / 32 and cycles["shared"] == 6 / 128 and cycles["mufu"] == 1 / 32 / 0.5
    assert hot_budget.bound(dataclasses.replace(row, arch="sm_120")) == ""


# The gates.

HOT = Hot(9.0, 12.0, 4.0, 8, 0, 2, 2, 0, 64, 64, 64, outside=18.0)


def gated(row, **exceptions):
    limits = planted() | exceptions
    return texts(row, limits)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"late_loads": 3}, "3 loads are issued only behind the first exponential"),
        ({"local_in_loops": 3}, "3 accesses to local memory in a loop"),
        ({"before_wait": 2}, "2 accesses to global memory before it waits for earlier kernels"),
        ({"multiplies": True}, "no path through its main loop multiplies what one turn should"),
        ({"hot": dataclasses.replace(HOT, waits=8)}, "8 waits for 2 products by wgmma"),
        (
            {"wgmma": True, "hot": dataclasses.replace(HOT, mma_sync=16)},
            "16 mma.sync in a kernel whose tile is large enough for wgmma",
        ),
        ({"mma_sync": 2, "mma_async": 8}, "2 mma.sync in a kernel with 8 wgmma"),
        ({"compiler_said": ["(C7515) serialized"]}, "the compiler said: (C7515) serialized"),
    ],
)
def test_each_gate_fires(change, said):
    assert gated(dataclasses.replace(ROW, **change)) == [said]


def test_no_gate_fires_without_a_reason():
    row = dataclasses.replace(ROW, multiplies=True, wgmma=True, hot=HOT)
    assert gated(row) == []
    assert (
        gated(dataclasses.replace(row, wgmma=False, hot=dataclasses.replace(HOT, mma_sync=1))) == []
    )
    by_triton = dataclasses.replace(row, source="triton", mma_sync=2, mma_async=8)
    assert gates.excesses(by_triton) == []


def test_an_exception_is_for_one_gate_and_one_form_and_must_be_needed():
    entry = {"gate": "local memory", "kernel": ROW.kernel, "forms": ["768"], "arch": ROW.arch}
    exceptions = [entry | {"why": "registers"}]
    row = dataclasses.replace(ROW, local_in_loops=1)
    assert gated(row, exceptions=exceptions) == []
    for change in ({"label": "384"}, {"arch": "sm_80"}, {"compiler_said": ["(C7515)"]}):
        assert gates.unexcused({"exceptions": exceptions}, dataclasses.replace(row, **change))
    limits = planted() | {"exceptions": exceptions}
    assert budget.stale(limits, [row], ["cuda"]) == []
    (unneeded,) = budget.stale(limits, [ROW], ["cuda"])
    assert "an exception of the gate 'local memory' that nothing needs" in unneeded.text
    assert budget.stale(limits, [ROW], []) == []


def test_the_committed_exceptions_say_why():
    gates_with_some = {"ptxas", "waits", "mma.sync", "path", "late loads", "local memory"}
    for entry in budget.load().get("exceptions", []):
        assert len(entry["why"]) > 20 and entry["gate"] in gates_with_some


@pytest.mark.parametrize("number", [7508, 7510, 7515, 7519, 7520])
def test_the_compilers_warnings_are_seen(number):
    line = (
        f"ptxas info    : (C{number}) Potential Performance Loss: wgmma.mma_async instructions ..."
    )
    harmless = "ptxas info    : (C7509) some\nptxas info    : Used 128 registers\n"
    assert gates.warnings(f"{harmless}{line}\n{line}\n") == [line]


def test_local_memory_counts_only_in_a_loop():
    outside = SASS.replace("LDC R1, c[0x0][0x28]", "STL [R1], R2")
    assert sass.parse(outside)["first_kernel"].local_in_loops == 0
    inside = SASS.replace("SHFL.BFLY PT, R9, R8, 0x1, 0x1f", "LDL R9, [R1]")
    assert sass.parse(inside)["first_kernel"].local_in_loops == 1


@pytest.mark.parametrize(
    "place, count", [("LDC R1, c[0x0][0x28]", 0), ("LDG.E.64.CONSTANT R4, desc[UR4][R2.64]", 1)]
)
def test_global_accesses_before_the_wait_for_earlier_kernels(place, count):
    assert sass.parse(SASS)["first_kernel"].before_wait == 0
    assert sass.parse(SASS.replace(place, "ACQBULK"))["first_kernel"].before_wait == count


# The budget of hot paths.


def line_of(**change):
    row = dataclasses.replace(ROW, hot=HOT)
    return {hot_budget.key(row): dataclasses.replace(hot_budget.line(row), **change)}


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, []),
        (
            {"outside": 17.5},
            ["hot path: 18 instructions outside the main loop per sum, budget 17.5"],
        ),
        ({"instructions": 8.9}, ["hot path: 9 instructions per score, budget 8.9"]),
        ({"shared_bytes": 11.0}, ["hot path: 12 bytes of shared memory per score, budget 11"]),
        ({"cache_bytes": 3.9}, ["hot path: 4 bytes of L2 per score, budget 3.9"]),
        ({"waits": 1}, ["hot path: 2 waits for wgmma in a turn, budget 1"]),
        ({"late_loads": -1}, ["hot path: 0 loads that a turn waits for, budget -1"]),
        ({"blocks": 9}, ["hot path: 8 blocks fit on a multiprocessor, budget 9"]),
    ],
)
def test_each_figure_of_a_hot_path_has_a_limit(change, said):
    row = dataclasses.replace(ROW, hot=HOT)
    assert texts(row, planted() | {"hot_paths": line_of(**change)}) == said


def test_a_hot_path_without_a_line_fails_on_an_architecture_that_has_lines():
    row = dataclasses.replace(ROW, hot=HOT)
    limits = planted() | {"hot_paths": line_of()}
    other = dataclasses.replace(row, dtypes="bfloat16")
    limits["kernels"]["cuda"][ROW.kernel]["forms"]["768"]["bfloat16"] = 16.5
    assert texts(other, limits) == ["no line in hot_paths.csv; enter it with --update-budget"]
    assert texts(dataclasses.replace(other, arch="sm_89"), limits) == []


def test_hot_paths_are_written_and_read_again(tmp_path):
    row = dataclasses.replace(ROW, hot=HOT)
    tcgen05 = dataclasses.replace(
        row, arch="sm_100", hot=dataclasses.replace(HOT, shared_bytes=None)
    )
    lines, changes = hot_budget.update({}, [row, tcgen05], [])
    assert [change[:8] for change in changes] == ["new     "] * 2
    hot_budget.write(lines, tmp_path / "hot_paths.csv")
    assert hot_budget.load(tmp_path / "hot_paths.csv") == lines
    slower = dataclasses.replace(row, hot=dataclasses.replace(HOT, instructions=9.5))
    _, changes = hot_budget.update(lines, [slower], ["cuda"])
    assert changes == [
        "changed  cuda, layer_norm_forward_kernel, 768, float16, sm_90a: "
        "hot path, instructions 9.0 -> 9.5"
    ]
    assert len(hot_budget.stale(lines, [dataclasses.replace(row, hot=None)], ["cuda"])) == 1


def test_every_product_by_wgmma_is_waited_for_once_at_most():
    lines = [(key, line) for key, line in budget.load()["hot_paths"].items() if key[-1] == "sm_90a"]
    assert len([line for _, line in lines if line.waits]) > 20
    assert all(line.waits <= line.products for _, line in lines)


# Others' counts, and the model.


def test_peers_stand_beside_ours_by_form():
    lines = budget.load()["hot_paths"]
    groups = peers.groups([*peers.ours(lines), *peers.theirs()])
    names = [(one.name, one.arch) for one in groups["attention, forward, D 64"]]
    for source in ("triton", "cuda"):
        assert {("sm_80"), ("sm_90a")} == {a for n, a in names if n == f"bertfast {source}"}
    assert ("FlashAttention-3", "sm_90a") in names
    ours = [key for key in lines if peers.form_of(key) == ("dq", "D 64")]
    assert {source for source, *_ in ours} == {"triton", "cuda"}


def test_our_backward_is_two_kernels_together():
    key = ("triton", "attention_bwd_dq_kernel", "dq, packed, D 64, up to 512", "bfloat16", "sm_90a")
    dq = hot_budget.line(dataclasses.replace(ROW, hot=HOT))
    dkv = dataclasses.replace(dq, instructions=11.0, registers=210, blocks=2)
    dkv_key = (key[0], key[1].replace("dq", "dkv"), key[2].replace("dq", "dkv"), *key[3:])
    (both,) = peers.ours({key: dq, dkv_key: dkv})
    assert (both.pass_, both.form, both.instructions) == ("backward", "D 64", 20.0)
    assert (both.registers, both.blocks, both.shared_bytes) == (210, 2, 24.0)
    assert peers.ours({key: dq}) == []


def test_of_two_kernels_for_a_form_the_shorter_one_stands_beside_peers():
    key = ("cuda", "attention_forward_kernel", "D 64, 64 x 64", "bfloat16", "sm_80")
    double = (key[0], "attention_forward_double_kernel", "D 64, 128 x 64", *key[3:])
    longer = hot_budget.line(dataclasses.replace(ROW, hot=HOT))
    shorter = dataclasses.replace(longer, instructions=longer.instructions - 1)
    (one,) = peers.ours({key: longer, double: shorter})
    assert (one.form, one.instructions) == ("D 64", shorter.instructions)


def test_the_model_is_as_near_to_published_speeds_as_it_says(capsys):
    """It is fitted by one factor; 13 % off at most."""
    assert len(model.errors()) == 15
    assert -0.08 < min(model.errors()) < 0 < max(model.errors()) < 0.14
    model.print_model([], kernels.console())
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing here was measured" in said and "-6% to +13% off" in said


def test_the_model_waits_for_late_loads_and_for_more_instructions():
    (kernel,) = (k for k in model.theirs() if k.key == ("FlashAttention-2", "forward", "D 64", 90))
    assert round(model.speed(kernel)) == 277
    for change in ({"late_loads": 8}, {"instructions": 26.0}, {"shared_bytes": 40.0}):
        slower = kernel._replace(hot=dataclasses.replace(kernel.hot, **change))
        assert model.speed(slower) < model.speed(kernel)


@pytest.mark.parametrize("option", ["with_peers", "with_model"])
def test_tables_of_peers_and_model_have_80_columns(monkeypatch, capsys, option):
    row = dataclasses.replace(ROW, hot=HOT)
    monkeypatch.setattr(kernels, "read", lambda archs, op, done, say: Reading([row]))
    kernels.kernels(**{option: True})
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if not line.startswith("FAIL")]
    assert max(map(len, lines)) <= 80 and said.isascii()
    assert re.search("not speeds|nothing here was measured", said)


def test_row_kernels_stand_beside_ours_too():
    found = peers.groups([*peers.our_rows(budget.load()), *peers.theirs()])
    for name in ("layer_norm, forward", "layer_norm, backward", "bias_gelu, forward, bf16"):
        assert any(one.is_ours for one in found[name]) and len(found[name]) > 1
