"""The hot path of products whose operands bulk copies load, and whose warps may work apart."""

import pytest
from test_kernels import ROW
from test_kernels_hot import found, listing

import bertfast.commands.kernels as kernels
from bertfast.commands.kernels import cuda_modules, sass
from bertfast.ops.aot import Case, Work

# A turn by bulk copies, whose wait for the next one stands apart, and the sums' way out.
BULK = (
    "LDG.E R20, desc[UR4][R2.64]",
    ".L_x_1",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R5], R6",
    "@!P0 BRA `(.L_x_2)",
    ".L_x_3",
    "UTMALDG.2D [UR12], [UR8]",
    "UTMALDG.2D [UR16], [UR4]",
    "HMMA.16816.F32.BF16 R12, R8, R20, R12",
    "HMMA.16816.F32.BF16 R16, R8, R22, R16",
    "@P4 BRA `(.L_x_1)",
    *(f"FMUL R{n}, R{n}, R6" for n in range(12, 20)),
    "UTMASTG.2D [UR4], [UR14]",
    "EXIT",
    ".L_x_2",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R5], R6",
    "@!P0 BRA `(.L_x_2)",
    "BRA `(.L_x_3)",
)
PRODUCT = Work(16, 16, 16, products=((16, 16),), streamed=16, outputs=1)


def test_a_turn_by_bulk_copies():
    path = found(PRODUCT, BULK)
    assert (path.instructions, path.loads) == (0.88, 2)  # 7 for 8 sums of a thread
    assert path.cache_bytes == 4  # of two tiles of 16 x 16 for 16 x 16 sums
    assert path.outside == 1.38  # 11
    without = [line for line in BULK if not line.startswith("UTMALDG.2D [UR16]")]
    assert found(PRODUCT, without) is None


def test_what_one_of_the_warps_starts_counts_by_its_share():
    """Two warps of 16 x 16 sums; one of them starts the copies, by three instructions."""
    lines = (
        ".L_x_1",
        "HMMA.16816.F32.BF16 R12, R8, R20, R12",
        "HMMA.16816.F32.BF16 R16, R8, R22, R16",
        "@P0 BRA `(.L_x_2)",
        *("ELECT P1, URZ, PT", "UTMALDG.2D [UR12], [UR8]", "UTMALDG.2D [UR16], [UR4]"),
        ".L_x_2",
        "@P4 BRA `(.L_x_1)",
        "EXIT",
    )
    work = Work(32, 16, 16, products=((32, 16),), streamed=16)
    path = found(work, lines, threads=64)
    assert (path.instructions, path.loads) == (round((4 + 3 / 2) / 8, 2), 2)


def test_a_wait_that_stands_apart_makes_no_loop():
    (code,) = sass.parse("\n".join([".text.one:", *listing(*BULK)])).values()
    assert code.loop.instructions == 7 and not code.loop.loop


def test_warps_of_different_work_are_reached_through_a_table():
    """Some copy and some multiply: the turn of those that multiply has no copies."""
    lines = (
        "@P0 BRA `(.L_x_9)",
        "BRX R2 -0x170",
        ".L_x_1",
        *("NOP", "UTMALDG.2D [UR12], [UR8]", "UTMALDG.2D [UR16], [UR4]", "@P4 BRA `(.L_x_1)"),
        "EXIT",
        ".L_x_2",
        *("HMMA.16816.F32.BF16 R12, R8, R20, R12", "HMMA.16816.F32.BF16 R16, R8, R22, R16"),
        "@P4 BRA `(.L_x_2)",
        "EXIT",
        ".L_x_9",
        *("UTMASTG.2D [UR4], [UR14]", "EXIT"),
    )
    path = found(PRODUCT, lines)
    assert (path.instructions, path.loads) == (0.38, 0)


@pytest.mark.parametrize("arch, found", [("sm_90a", 1), ("sm_80", 0)])
def test_a_kernel_of_one_architecture_is_empty_elsewhere_and_not_read(monkeypatch, arch, found):
    (code,) = sass.parse("\n".join([".text.one:", *listing(*BULK)])).values()
    case = Case("a form", "float16", 128, None, capability=90)
    monkeypatch.setattr(cuda_modules, "module_path", lambda: None)
    monkeypatch.setattr(cuda_modules, "_compile", lambda *_: [(None, "")])
    read = {"one": (code, sass.Resources(1, 0, 0))}
    monkeypatch.setattr(cuda_modules, "read_cubin", lambda *_: read)
    monkeypatch.setattr(cuda_modules, "_describe", lambda *_: ("op", case))
    assert len(cuda_modules.read(arch)) == found


def test_a_form_is_stale_only_if_all_architectures_were_read():
    """A table says by architecture which kernels there are."""
    for archs, complete in ((kernels.DEFAULT_ARCHS, ["triton"]), (["sm_80"], [])):
        jobs = [("triton", arch) for arch in archs]
        rows = {job: [ROW] for job in jobs}
        read = kernels._reading(jobs, rows, {job: [] for job in jobs}, whole=True)
        assert read.complete_sources == complete
