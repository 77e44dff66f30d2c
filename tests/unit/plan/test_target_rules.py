"""What is written for each target keeps the rules of its runtime, whatever the model."""

from __future__ import annotations

STATIC_CASES = ("residual", "grouped_and_depthwise", "every_mover_and_elementwise_operator")
