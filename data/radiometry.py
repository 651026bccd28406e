"""Thermal radiance in the 8-14 um band, and the fixed window that maps it to image values.

A pixel of an infrared camera integrates Planck's law over its spectral response; here the response
is flat from 8 to 14 um. The integral is tabulated once (64-point Gauss-Legendre quadrature, every
0.25 K) and interpolated: relative error below 1e-6 between 180 and 420 K.
"""

import numpy as np

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


def band_radiance(temperature_k: np.ndarray) -> np.ndarray:
    """Black-body radiance in the band, W / (m^2 sr), of temperatures between 180 and 420 K."""
    return np.interp(temperature_k, _TABLE_K, _TABLE_RADIANCE)


def band_temperature(radiance: np.ndarray) -> np.ndarray:
    """Temperature in kelvin of a black body with this band radiance: inverse of `band_radiance`."""
    return np.interp(radiance, _TABLE_RADIANCE, _TABLE_K)


_LOW, _HIGH = (float(band_radiance(np.float64(t))) for t in WINDOW_K)


def to_unit(radiance: np.ndarray) -> np.ndarray:
    """Radiance in W / (m^2 sr) to the unit of the synthetic infrared: linear, not clipped.

    Being linear, it commutes with mixing: to_unit(e * b + (1 - e) * r) equals
    e * to_unit(b) + (1 - e) * to_unit(r).
    """
    return (radiance - _LOW) / (_HIGH - _LOW)


def to_window(radiance: np.ndarray) -> np.ndarray:
    """Radiance in W / (m^2 sr) to an image value in [0, 1]; the camera saturates at both ends."""
    return np.clip(to_unit(radiance), 0.0, 1.0)
