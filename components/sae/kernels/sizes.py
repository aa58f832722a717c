"""What decides which of several kernels is taken."""

from __future__ import annotations

LARGE = (256, 4_096)
"""`d_in` and `d_sae` from which on a step may be sparse where smaller ones are quick."""
GROUP = 32
"""Features that a GPU looks for the strongest of together."""
