"""Counts of transformers' own tests, of stock models and of converted ones."""

MARKERS = ("accelerate_tests", "flash_attn_3_test", "flash_attn_4_test", "flash_attn_test")
MARKERS += ("order", "slow", "torch_compile_test")
COUNTED = {"passed": "passed", "skipped": "skipped", "xfailed": "excepted", "failed": "failed"}


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: transformers' own")


def pytest_terminal_summary(terminalreporter):
    for how in ("Stock", "Converted"):
        counts = {}
        for outcome, name in COUNTED.items():
            found = terminalreporter.stats.get(outcome, [])
            counts[name] = sum(f"suite.py::{how}" in report.nodeid for report in found)
        if any(counts.values()):
            told = ", ".join(f"{count} {name}" for name, count in counts.items())
            terminalreporter.write_line(f"{how.lower()}: {told}")
