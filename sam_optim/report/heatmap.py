"""A 2D landscape: bands of colour between contour lines, one scale for all panels that are to be compared."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from sam_optim.report.axes import Panel, Scale, marker, path, words
from sam_optim.report.charts import WIDTH
from sam_optim.report.markup import Markup, tag

# Viridis, sampled: dark violet to yellow, evenly lighter, readable with any colour vision and in grey.
VIRIDIS = ("#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725")
CELLS = 4  # colour samples between two grid points, in each direction

Grid = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Levels:
    """Contour levels, ascending; a value's colour is that of the band it lies in."""

    values: tuple[float, ...]

    @staticmethod
    def geometric(low: float, high: float, count: int = 22) -> Levels:
        """`count` levels with equal ratios: losses differ by factors."""
        low = max(low, 1e-6)
        high = max(high, low * 1.01)
        return Levels(tuple(low * (high / low) ** (i / (count - 1)) for i in range(count)))

    def band(self, value: float) -> int:
        """0 below the first level, len(values) above the last; what is not finite is above."""
        return sum(value >= level for level in self.values) if math.isfinite(value) else len(self.values)

    def colour(self, band: int) -> tuple[int, int, int]:
        return _blend(band / len(self.values))

    def colours(self) -> list[str]:
        return ["#{:02x}{:02x}{:02x}".format(*self.colour(i)) for i in range(len(self.values) + 1)]


def contour_map(
    title: str, a: Sequence[float], b: Sequence[float], losses: Grid, levels: Levels, *, note: str = ""
) -> Markup:
    """`losses[i][j]` at a_i (vertical) and b_j (horizontal), with a marker at the weights, a = b = 0."""
    side = WIDTH - 60
    left, top = 46.0, 34.0
    x, y = Scale(b[0], b[-1], left, left + side), Scale(a[0], a[-1], top + side, top)
    panel = Panel(title, x, y, WIDTH, top + side + 40, "second direction")
    middle = top + side / 2
    turned = f"rotate(-90 12 {middle:g})"
    panel.add(words(12, middle, "first direction", class_="label", text_anchor="middle", transform=turned))
    uri = "data:image/png;base64," + base64.b64encode(_png(_colours(losses, levels))).decode()
    panel.add(tag("image", x=left, y=top, width=side, height=side, href=uri, preserveAspectRatio="none"))
    for level in levels.values[1:]:
        for (i0, j0), (i1, j1) in contour(losses, level):
            ends = [(x(_at(b, j)), y(_at(a, i))) for i, j in ((i0, j0), (i1, j1))]
            panel.add(path(ends, class_="contour"))
    panel.add(marker(x(0), y(0), 5, class_="origin"))
    low, high = (f(v for row in losses for v in row if math.isfinite(v)) for f in (min, max))
    return panel.render(f"Loss over two directions from {low:.3g} to {high:.3g}. {note}", grid="")


def contour(values: Grid, level: float) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Segments of the line where bilinear interpolation of `values` has `level`, in grid units (marching squares)."""
    found: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for i in range(len(values) - 1):
        for j in range(len(values[0]) - 1):
            corners = [(i, j), (i, j + 1), (i + 1, j + 1), (i + 1, j)]
            heights = [values[p][q] for p, q in corners]
            if not all(map(math.isfinite, heights)):
                continue
            cuts = []
            for k in range(4):
                (p, q), (r, s), h0, h1 = corners[k], corners[(k + 1) % 4], heights[k], heights[(k + 1) % 4]
                if (h0 < level) != (h1 < level):
                    t = (level - h0) / (h1 - h0)
                    cuts.append((p + t * (r - p), q + t * (s - q)))
            if len(cuts) == 4 and (math.fsum(heights) / 4 >= level) != (heights[0] >= level):
                cuts = cuts[-1:] + cuts[:-1]  # a saddle: the middle belongs to the other two corners
            found.extend(zip(cuts[::2], cuts[1::2], strict=True))
    return found


def _colours(losses: Grid, levels: Levels) -> list[list[tuple[int, int, int]]]:
    """Pixels from the top row down: bands of the bilinear interpolation."""
    rows, columns = (len(losses) - 1) * CELLS, (len(losses[0]) - 1) * CELLS
    pixels = []
    for r in reversed(range(rows)):
        i = (r + 0.5) / CELLS
        pixels.append([levels.colour(levels.band(_bilinear(losses, i, (c + 0.5) / CELLS))) for c in range(columns)])
    return pixels


def _bilinear(values: Grid, i: float, j: float) -> float:
    p, q = int(i), int(j)
    s, t = i - p, j - q
    upper = values[p][q] * (1 - t) + values[p][q + 1] * t
    lower = values[p + 1][q] * (1 - t) + values[p + 1][q + 1] * t
    return upper * (1 - s) + lower * s


def _at(axis: Sequence[float], position: float) -> float:
    k = min(int(position), len(axis) - 2)
    return axis[k] + (position - k) * (axis[k + 1] - axis[k])


def _blend(position: float) -> tuple[int, int, int]:
    where = min(max(position, 0.0), 1.0) * (len(VIRIDIS) - 1)
    k = min(int(where), len(VIRIDIS) - 2)
    low, high = (tuple(int(c[n : n + 2], 16) for n in (1, 3, 5)) for c in VIRIDIS[k : k + 2])
    r, g, b = (round(u + (where - k) * (v - u)) for u, v in zip(low, high, strict=True))
    return r, g, b


def _png(pixels: Sequence[Sequence[tuple[int, int, int]]]) -> bytes:
    """An RGB image as a PNG file."""
    raw = b"".join(b"\0" + bytes(channel for pixel in row for channel in pixel) for row in pixels)
    header = struct.pack(">IIBBBBB", len(pixels[0]), len(pixels), 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body
