"""What a network's output means, in words; `process.py` says it in formulas."""

from typing import Literal

Prediction = Literal["eps", "x_0", "x_prev", "v"]
Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
