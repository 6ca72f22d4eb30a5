"""What a smoke run should reach, and how much runs differ.

Seven runs of the same code: seed 0 on three machines (digits named 0.81, 0.78, 0.78; digits generated 0.84, 0.93,
0.78), seeds 1 to 4 on one (named 0.83, 0.78, 0.75, 0.82; generated 0.92, 0.82, 0.90, 0.84). Means 0.79 and 0.86,
standard deviations 0.03 and 0.06. A target is the mean less two standard deviations, rounded down: about one run in
twenty of a sound program misses one of the two.
"""

from __future__ import annotations

SPREADS = {"digits generated": 0.06, "digits named": 0.03}
"""Standard deviation of a score between seeds and machines."""
TARGETS = {"digits generated": 0.74, "digits named": 0.73}
