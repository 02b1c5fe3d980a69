"""pytest-benchmark's file, made small enough to commit: statistics, CPU and versions."""

import platform

import pytest
import torch


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, benchmarks, output_json):
    cpu = output_json["machine_info"].get("cpu", {}).get("brand_raw") or platform.machine()
    output_json["machine_info"] = {
        "cpu": cpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for entry in output_json["benchmarks"]:
        entry["microseconds"] = {
            name: round(entry["stats"][name] * 1e6, 2) for name in ("min", "median", "q1", "q3")
        }
        for name in set(entry) - {"name", "microseconds"}:
            del entry[name]
