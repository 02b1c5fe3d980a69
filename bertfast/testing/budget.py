"""The error budget: an implementation may err twice what rounding alone makes unavoidable.

    error <= 2 * (error of the rounding model + u * scale)

for the largest error and for the root mean square (there u * rms(scale) / sqrt(3), a uniformly
distributed rounding error's). The oracle is the reference in float64 on the same rounded inputs.
The rounding model is float32 arithmetic with one rounding to the dtype wherever the algorithm must
round an operand, and at the output. scale is |reference| where nothing else is said.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@dataclass(frozen=True)
class Finding:
    """One tensor's errors beside what it may err."""

    name: str
    max_error: float
    max_budget: float
    rms_error: float
    rms_budget: float

    @property
    def share(self) -> float:
        """The larger of error / budget for max and RMS; NaN where anything is not finite."""
        shares = []
        for error, budget in (
            (self.max_error, self.max_budget),
            (self.rms_error, self.rms_budget),
        ):
            if not (math.isfinite(error) and math.isfinite(budget)):
                return math.nan
            shares.append(0.0 if error == 0 else error / budget if budget else math.inf)
        return max(shares)

    @property
    def ok(self) -> bool:
        return self.share <= 1.0

    def __str__(self) -> str:
        return (
            f"{self.name}: max error {self.max_error:.3g} of {self.max_budget:.3g} allowed, "
            f"rms {self.rms_error:.3g} of {self.rms_budget:.3g}"
        )


def _max(values: torch.Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item() if values.numel() else 0.0


def compare(
    actual: dict[str, torch.Tensor],
    oracle: dict[str, torch.Tensor],
    model: dict[str, torch.Tensor],
    scales: dict[str, torch.Tensor] | None = None,
) -> list[Finding]:
    """Each output and gradient against its budget. The dtype of `actual` sets the unit roundoff."""
    if actual.keys() != oracle.keys():
        raise ValueError(f"expected {sorted(oracle)}, got {sorted(actual)}")
    findings = []
    for name, reference in oracle.items():
        if actual[name].shape != reference.shape:
            raise ValueError(
                f"{name} must have shape {list(reference.shape)}, got {list(actual[name].shape)}"
            )
        u = UNIT_ROUNDOFF[actual[name].dtype]
        reference = reference.double()
        error = actual[name].detach().cpu().double() - reference
        model_error = model[name].double() - reference
        scale = (scales or {}).get(name, reference).double()
        findings.append(
            Finding(
                name,
                _max(error),
                2 * (_max(model_error) + u * _max(scale)),
                _rms(error),
                2 * (_rms(model_error) + u * _rms(scale) / math.sqrt(3)),
            )
        )
    return findings


def worst(findings: list[Finding]) -> Finding:
    """The finding with the largest share of its budget; one that isn't finite before all others."""
    return max(findings, key=lambda f: math.inf if math.isnan(f.share) else f.share)


def nearest_to_budget(table: Any, inputs: dict, actual: dict[str, torch.Tensor]) -> Finding:
    """The worst finding of an op's results; table is the op's module in this package."""
    return worst(
        compare(actual, table.oracle(inputs), table.rounding_model(inputs), table.scales(inputs))
    )


def hold_to_budget(table: Any, inputs: dict, actual: dict[str, torch.Tensor]) -> None:
    """Raises AssertionError if an output or gradient is outside its budget."""
    finding = nearest_to_budget(table, inputs, actual)
    if not finding.ok:
        raise AssertionError(str(finding))
