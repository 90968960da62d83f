"""A small picture with a palette as a data URI, without any library for pictures."""

import base64
import struct
import zlib
from collections.abc import Sequence

Colour = tuple[int, int, int, int]
"""Red, green, blue and opacity, each up to 255."""


def png_uri(rows: Sequence[bytes], palette: Sequence[Colour]) -> str:
    """Rows of equal length, a byte per pixel that names one of at most 256 colours, as "data:image/png;base64,..."."""
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    pixels = b"".join(b"\0" + row for row in rows)
    parts = ((b"IHDR", header), (b"PLTE", b"".join(bytes(colour[:3]) for colour in palette)),
             (b"tRNS", bytes(colour[3] for colour in palette)), (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b""))
    image = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)
    return "data:image/png;base64," + base64.b64encode(image).decode()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
