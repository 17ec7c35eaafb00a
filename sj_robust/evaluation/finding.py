"""One symptom of gradient masking: how it is told, and how much of it passes."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["THRESHOLDS", "Finding"]

THRESHOLDS: Mapping[str, float] = MappingProxyType(
    {
        "clean_errors": 0.9,
        "random_outputs": 0.0,
        "silent_layers": 0.95,
        "saturated_layers": 0.5,
        "zero_gradients": 0.5,
        "tiny_gradients": 0.1,
        "flat_loss": 0.1,
        "saturated_loss": 0.1,
        "loss_does_not_rise": 0.1,
        "noise_beats_attack": 0.05,
        "single_step_beats_iterative": 0.05,
        "more_steps_fool_fewer": 0.05,
        "larger_budget_fools_fewer": 0.05,
        "unbounded_attack_fails": 0.0,
        "transfer_beats_white_box": 0.05,
        "other_estimator_stronger": 0.2,
    }
)
"""Largest value with which each finding passes: shares in [0, 1]. ``clean_errors`` is relative to guessing; where 0.05
of the images is less than one image, one image passes."""


@dataclass(frozen=True)
class Finding:
    """One symptom of gradient masking, measured. 一项梯度掩蔽诊断结果。

    Attributes:
        name: Name of the symptom, a key of ``THRESHOLDS``.
        value: Extent of the symptom in [0, 1]; the lower the better.
        threshold: Largest value that passes.
        passed: Whether ``value <= threshold``.
        meaning: What was measured and what it says, in plain words with its numbers.
        remedy: What to do where it fails.

    Examples:
        >>> print(Finding("zero_gradients", 0.75, 0.5, False, "75 % are zero.", "Sweep estimators."))
        FAILED zero_gradients: 0.75 (at most 0.5). 75 % are zero. Sweep estimators.
    """

    name: str
    value: float
    threshold: float
    passed: bool
    meaning: str
    remedy: str

    def __str__(self) -> str:
        state, remedy = ("passed", "") if self.passed else ("FAILED", f" {self.remedy}")
        return f"{state} {self.name}: {self.value:.3g} (at most {self.threshold:.3g}). {self.meaning}{remedy}"
