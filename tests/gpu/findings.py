"""What a check found: figures beside what was expected of them, some judged, some only printed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Findings:
    """`measured` and `expected` have the same names; `faults` has a sentence for each figure that is not as judged."""

    measured: dict[str, Any] = field(default_factory=dict)
    expected: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    judged: int = 0

    def beside(self, name: str, measured: Any, expected: Any = None) -> None:
        """Printed, not judged; `expected`: usually of the forecast."""
        self.measured[name], self.expected[name] = _short(measured), _short(expected)

    def equal(self, name: str, measured: Any, expected: Any) -> None:
        self._judge(name, measured, expected, measured == expected)

    def at_most(self, name: str, measured: float, limit: float) -> None:
        self._judge(name, measured, f"<= {_short(limit)}", measured <= limit)

    def at_least(self, name: str, measured: float, limit: float) -> None:
        self._judge(name, measured, f">= {_short(limit)}", measured >= limit)

    def near(self, name: str, measured: float, expected: float, within: float) -> None:
        """`within`: of `expected`, as a share."""
        close = math.isfinite(measured) and abs(measured - expected) <= within * abs(expected)
        self._judge(name, measured, f"{_short(expected)} within {within:g} of it", close)

    def _judge(self, name: str, measured: Any, expected: Any, holds: bool) -> None:
        self.beside(name, measured, expected)
        self.judged += 1
        if not holds:
            self.faults.append(f"{name} is {_short(measured)}, expected {_short(expected)}")


def _short(value: Any) -> Any:
    """Floats with five digits, also inside lists; what JSON has no word for as text."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return [_short(item) for item in value]
    return value
