"""What infrared numbers mean: units, a camera's Planck constants, and band radiance.

The second half is the physics of the synthetic scenes: thermal radiance in the 8-14 um band, and
the fixed window that maps it to image values.

A pixel of an infrared camera integrates Planck's law over its spectral response; here the response
is flat from 8 to 14 um. The integral is tabulated once (64-point Gauss-Legendre quadrature, every
0.25 K) and interpolated: relative error below 1e-6 between 180 and 420 K.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# kelvin = value * scale + offset
TEMPERATURES = {
    "kelvin": (1.0, 0.0),
    "celsius": (1.0, 273.15),
    "fahrenheit": (5 / 9, 273.15 - 32 * 5 / 9),
    "centikelvin": (0.01, 0.0),
}


class Planck(NamedTuple):
    """A camera's constants: black-body temperature T = B / ln(R1 / (R2 (counts + O)) + F)."""

    R1: float
    B: float
    F: float
    O: float  # noqa: E741 (the makers' name)
    R2: float

    def to_kelvin(self, counts):
        """Counts to kelvin, numpy arrays and tensors; emissivity and air are not corrected for."""
        signal = self.R2 * (_wide(counts) + self.O).clip(min=1.0)  # 0 or less has no temperature
        log = torch.log if isinstance(counts, Tensor) else np.log
        return self.B / log(self.R1 / signal + self.F)

    def to_counts(self, kelvin):
        """The inverse of `to_kelvin`."""
        exp = torch.exp if isinstance(kelvin, Tensor) else np.exp
        return self.R1 / (self.R2 * (exp(self.B / _wide(kelvin)) - self.F)) - self.O


def make_planck(values: dict, where: str) -> Planck:
    """From a mapping of names to numbers. Raises: ValueError: one is missing or impossible."""
    try:
        planck = Planck(*(float(values[name]) for name in Planck._fields))
    except (KeyError, TypeError, ValueError):
        names = ", ".join(Planck._fields)
        raise ValueError(f"{where}: Planck constants are {names}, got {values!r:.80}") from None
    positive = planck.R1, planck.B, planck.R2
    if not all(map(math.isfinite, planck)) or min(positive) <= 0 or planck.F <= 0:
        raise ValueError(f"{where}: impossible Planck constants {planck._asdict()}")
    return planck


def to_kelvin(values, unit: str, planck: Planck | None = None):
    """Values in `unit` to kelvin. Raises: ValueError: the unit is no temperature."""
    if planck is not None:
        return planck.to_kelvin(values)
    if unit not in TEMPERATURES:
        raise ValueError(f"'{unit}' is no unit of temperature; those are {', '.join(TEMPERATURES)}")
    scale, offset = TEMPERATURES[unit]
    return _wide(values) * scale + offset


def from_kelvin(kelvin, unit: str):
    """Kelvin to a unit of TEMPERATURES."""
    scale, offset = TEMPERATURES[unit]
    return (_wide(kelvin) - offset) / scale


def kelvin_known(unit: str, planck: Planck | None = None) -> bool:
    return planck is not None or unit in TEMPERATURES


def mae_kelvin(x: Tensor, y: Tensor, restore, unit: str, planck: Planck | None = None) -> Tensor:
    """Mean absolute difference in kelvin, one number per image.

    x, y: (B,1,H,W) in [0,1]. restore: [0,1] to values in `unit`, such as `Window.restore`; what
    the window clips is clipped on both sides. Raises: ValueError: the unit is no temperature.
    """
    if x.shape != y.shape:
        raise ValueError(f"images of {tuple(x.shape)} and {tuple(y.shape)} cannot be compared")
    a, b = (to_kelvin(restore(image), unit, planck) for image in (x, y))
    return (a - b).abs().flatten(1).mean(1).float()


def kelvin_measures(window, planck: Planck | None) -> dict[str, Callable]:
    """{"mae_kelvin": measure of two images in [0,1]} where a data set's window has a temperature.

    window: a `Window`, or None where each image has its own.
    """
    if window is None or not kelvin_known(window.unit, planck):
        return {}
    meaning = {"restore": window.restore, "unit": window.unit, "planck": planck}
    return {"mae_kelvin": partial(mae_kelvin, **meaning)}


def _wide(values):
    if isinstance(values, Tensor):
        return values.double()
    return np.asarray(values, np.float64)


# ---------------------------------------------------------------------------- band radiance

BAND_UM = (8.0, 14.0)

# Image value 0 and 1 of the synthetic infrared, as black-body temperatures in kelvin: cold enough
# that most of a clear sky saturates at 0, hot enough that skin (0.8) lies below an engine (1).
WINDOW_K = (256.15, 318.15)

_FIRST_C = 1.191042972e8  # 2 h c^2 in W um^4 / (m^2 sr)   (CODATA 2018)
_SECOND_C = 1.438776877e4  # h c / k in um K
_TABLE_K = np.arange(180.0, 420.25, 0.25)


def _integrate(temperature_k: np.ndarray) -> np.ndarray:
    low, high = BAND_UM
    nodes, weights = np.polynomial.legendre.leggauss(64)
    wavelength = 0.5 * (high - low) * nodes + 0.5 * (high + low)
    exponent = _SECOND_C / (wavelength * temperature_k[:, None])
    return (_FIRST_C / wavelength**5 / np.expm1(exponent)) @ weights * 0.5 * (high - low)


_TABLE_RADIANCE = _integrate(_TABLE_K)


def band_radiance(temperature_k: np.ndarray | float) -> np.ndarray:
    """Black-body radiance in the band, W / (m^2 sr), of temperatures between 180 and 420 K."""
    return np.interp(temperature_k, _TABLE_K, _TABLE_RADIANCE)


def band_temperature(radiance: np.ndarray) -> np.ndarray:
    """Temperature in kelvin of a black body with this band radiance: inverse of `band_radiance`."""
    return np.interp(radiance, _TABLE_RADIANCE, _TABLE_K)


_LOW, _HIGH = (float(band_radiance(t)) for t in WINDOW_K)


def to_unit(radiance: np.ndarray) -> np.ndarray:
    """Radiance in W / (m^2 sr) to the unit of the synthetic infrared: linear, not clipped.

    Being linear, it commutes with mixing: to_unit(e * b + (1 - e) * r) equals
    e * to_unit(b) + (1 - e) * to_unit(r).
    """
    return (radiance - _LOW) / (_HIGH - _LOW)


def to_window(radiance: np.ndarray) -> np.ndarray:
    """Radiance in W / (m^2 sr) to an image value in [0, 1]; the camera saturates at both ends."""
    return np.clip(to_unit(radiance), 0.0, 1.0)
