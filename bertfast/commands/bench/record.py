"""The environment a number was measured in, and the CSV that keeps both.

A row is written as soon as it is known, so a run that is cut short has lost nothing.
"""

import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .timing import Sample

ROOT = Path(__file__).resolve().parents[3]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Environment:
    """The machine and the versions of a run, the same for each of its rows."""

    device: str
    driver: str
    torch: str
    triton: str
    transformers: str
    cuda: str
    python: str
    load: str  # of the machine when the run began: processes that wanted to run, over a minute
    bertfast_commit: str


@dataclass
class Row:
    """One measured number. What doesn't apply is None, an empty field."""

    provider: str
    op: str
    pass_: str  # "pass" in the CSV
    shape: str
    dtype: str
    dropout: float = 0.0
    # device: GPU time without launch cost; launch: wall time of launching eager calls; call: wall
    # time of calls until the GPU is done; process: a CPU's processor time
    clock: str = "device"
    cache: str = ""  # cold: inputs rotate through 4 times the L2 cache; warm: they fit in it
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    p99_us: float | None = None  # of single calls, where latency was measured
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    tokens_per_s: float | None = None  # real tokens
    padded_tokens_per_s: float | None = None  # with the padding to the batch's longest
    floor_us: float | None = None  # the least possible time, see floor.py
    percent_of_floor: float | None = None  # 100 * floor / median
    modelled_us: float | None = None  # by its kernels, traffic and products, see predicted.py
    peak_memory_mb: float | None = None
    error: float | None = None  # the largest ||difference|| / ||float64 reference|| of its outputs
    note: str = ""

    @property
    def sample(self) -> Sample:
        """The time of a row that was timed."""
        if self.median_us is None or self.p20_us is None or self.p80_us is None:
            raise ValueError(f"{self.provider}, {self.op} {self.shape}: not timed")
        return Sample(self.median_us, self.p20_us, self.p80_us)

    def timed(self, sample: Sample) -> "Row":
        self.median_us, self.p20_us, self.p80_us = sample.median, sample.p20, sample.p80
        if self.floor_us is not None:
            self.percent_of_floor = 100 * self.floor_us / sample.median
        return self


COLUMNS = (
    *(field.name.rstrip("_") for field in fields(Row)),
    *(field.name for field in fields(Environment)),
    "time",
)


# Columns that older files lack.
ADDED = ("modelled_us", "p99_us")


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def environment(device: str) -> Environment:
    """device is "cuda" or "cpu"."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    if commit != "unknown" and _output("git", "status", "--porcelain", "--untracked-files=no"):
        commit += "-modified"
    gpu = device == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return Environment(
        device=torch.cuda.get_device_name() if gpu else f"cpu: {cpu_name()}",
        driver=driver.partition("\n")[0] if gpu else "",
        torch=torch.__version__,
        triton=_version("triton"),
        transformers=_version("transformers"),
        cuda=torch.version.cuda or "",
        python=platform.python_version(),
        load=f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "",
        bertfast_commit=commit,
    )


def dtype_name(dtype: torch.dtype) -> str:
    return {known: name for name, known in DTYPES.items()}[dtype]


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


class Recorder:
    """Keeps rows for the table at the end and, given a path, writes each one to a CSV at once."""

    def __init__(self, path: Path | None, environment: Environment) -> None:
        self.path = path
        self.environment = asdict(environment)
        self.rows: list[Row] = []
        if path is not None:
            with path.open("w", newline="") as file:
                csv.writer(file).writerow(COLUMNS)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is None:
            return
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        values = [*asdict(row).values(), *self.environment.values(), now]
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(map(_text, values))


def read(path: Path) -> tuple[list[Row], Environment]:
    """The rows and the environment that a Recorder wrote."""
    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    if not records:
        raise ValueError(f"{path} has no rows")
    absent = set(ADDED) - set(records[0])
    rows = []
    for record in records:
        values: dict[str, Any] = {
            field.name: "" if field.name in absent else record[field.name.rstrip("_")]
            for field in fields(Row)
        }
        for field in fields(Row):
            if "float" in str(field.type):
                text = values[field.name]
                values[field.name] = float(text) if text else None
        rows.append(Row(**values))
    return rows, Environment(
        **{field.name: records[0][field.name] for field in fields(Environment)}
    )
