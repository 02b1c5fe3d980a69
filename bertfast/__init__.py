"""Fused kernels that make BERT-family encoders run at the speed of the hardware."""

from . import graphs, ops
from .convert import optimize, report, revert
from .settings import disabled

__version__ = "0.1.0"
__all__ = ["__version__", "disabled", "graphs", "ops", "optimize", "report", "revert"]
