"""Numbers that papers on dropping layers report: SDR. Pure functions."""

from __future__ import annotations

LEAST_SPEEDUP = 0.005  # below half a percent a quotient would be noise


def sdr(base: float, new: float, speedup: float) -> float | None:
    """Speedup–degradation ratio γ (LLM-Drop, eq. 7): points of average performance lost per percent of speed gained.

    Args:
        base: Average performance of the dense model, in points (0 to 100).
        new: That of the smaller model.
        speedup: Its speed over that of the dense model; 1 is as fast.

    Returns:
        Absolute points over percent, which is what the tables of the paper hold though its text says percent;
        negative where performance gained, None where speed differs by less than half a percent.
    """
    return None if abs(speedup - 1) < LEAST_SPEEDUP else (base - new) / ((speedup - 1) * 100)


def sdr_relative(base: float, new: float, speedup: float) -> float | None:
    """As :func:`sdr` with the loss as a percentage of ``base``."""
    return None if abs(speedup - 1) < LEAST_SPEEDUP else (base - new) / base / (speedup - 1)
