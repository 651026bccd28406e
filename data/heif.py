"""HEIC, HEIF and AVIF: files for which PIL needs another package or a late version."""

from PIL import features

HEIF_SUFFIXES = (".heic", ".heif", ".hif", ".avif")
AVIF_BRANDS = (b"avif", b"avis")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def formats_of(data: bytes, where: str) -> tuple[str, ...]:
    """PIL's names of the format by the container's brand; none where it is another kind of file.

    Raises: ValueError: the reader is not installed.
    """
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in HEIF_BRANDS:
        return _heif(where)
    return _avif(where) if brand in AVIF_BRANDS else ()


def _heif(where: str) -> tuple[str, ...]:
    """PIL's name of the format, which an optional package reads."""
    try:
        import pillow_heif
    except ImportError:
        raise ValueError(
            f"{where}: HEIC is read by the package pillow-heif, which is not installed"
            f' (pip install ".[heic]"); or export JPEG'
        ) from None
    pillow_heif.register_heif_opener()
    return ("HEIF",)


def _avif(where: str) -> tuple[str, ...]:
    """PIL's name of the format, which not every build of PIL reads."""
    if not features.check("avif"):
        raise ValueError(f"{where}: AVIF is read by Pillow from 11.3 on; or export JPEG")
    return ("AVIF",)
