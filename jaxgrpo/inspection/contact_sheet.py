"""Pictures of the frames that the model sees, made of the very arrays that it gets.

Dimensions: T frames, H x W their pixels, N patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.records import Span
from models.qwen2_5_vl.config import VisionConfig
from models.qwen2_5_vl.processor import Prompt

_MOST_FRAMES = 48  # on a sheet
_SIDE = 160  # pixels that a frame has at most on the sheet
_COLUMNS = 8
_GAP = 10
_BORDER = 4  # around a frame within a true span
_LINE = 22  # height of a line of text
_TIMELINE = 12

_PAPER, _INK, _PALE = (255, 255, 255), (30, 30, 30), (205, 209, 214)
_TRUE = (20, 150, 70)


def frames_of(prompt: Prompt, vision: VisionConfig) -> np.ndarray:
    """The frames of a prompt of one video, u8[T, H, W, 3] RGB, from its patches.

    It goes by the tables that the model goes by (`frame_index`, `patch_hw`), and undoes what
    `positions.fill_patches` did. Pixels are normalised on the device, so these are the last ones.
    """
    side, pair = vision.patch_size, vision.temporal_patch_size
    pairs = []
    for index in prompt.frame_index:
        rows, columns = prompt.patch_hw[index].T
        height, width = rows.max() + 1, columns.max() + 1
        cells = np.zeros((height, width, 3, pair, side, side), np.uint8)
        cells[rows, columns] = prompt.patches[index].reshape(-1, 3, pair, side, side)
        pixels = cells.transpose(3, 0, 4, 1, 5, 2)
        pairs.append(pixels.reshape(pair, height * side, width * side, 3))
    return np.concatenate(pairs)


def contact_sheet(
    title: str, frames: np.ndarray, times: np.ndarray, spans: Sequence[Span], seconds: float
) -> Image.Image:
    """The frames with their times, those within a true span marked, above a timeline.

    Small frames are enlarged by a whole number, pixel by pixel; of many, equally spaced ones are
    shown.

    Args:
      title: the first line.
      frames: u8[T, H, W, 3].
      times: f64[T], seconds from the start of what is shown.
      spans: true ones, in the same seconds.
      seconds: that are shown.
    """
    count, height, width, _ = frames.shape
    chosen = np.unique(np.linspace(0, count - 1, min(count, _MOST_FRAMES)).round().astype(int))
    scale = min(_SIDE / width, _SIDE / height)
    scale = int(scale) if scale >= 1 else scale
    tile = (max(1, round(width * scale)), max(1, round(height * scale)))
    columns = min(_COLUMNS, len(chosen))
    cell = (max(tile[0], 60) + 2 * _BORDER + _GAP, tile[1] + 2 * _BORDER + _LINE + _GAP)
    head = 2 * _LINE + _GAP
    rows = -(-len(chosen) // columns)
    foot = _TIMELINE + 2 * _LINE
    size = (max(columns * cell[0], 640) + 2 * _GAP, head + rows * cell[1] + foot)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for line, text in enumerate((title, _about(frames.shape, len(chosen), scale, spans))):
        draw.text((_GAP, _GAP // 2 + line * _LINE), _fitted(text, font, size[0]), _INK, font)
    for number, frame in enumerate(chosen):
        row, column = divmod(number, columns)
        left, top = _GAP + column * cell[0], head + row * cell[1]
        inside = any(start <= times[frame] <= end for start, end in spans)
        if inside:
            box = (left, top, left + tile[0] + 2 * _BORDER - 1, top + tile[1] + 2 * _BORDER - 1)
            draw.rectangle(box, fill=_TRUE)
        how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
        picture = Image.fromarray(frames[frame]).resize(tile, how)
        sheet.paste(picture, (left + _BORDER, top + _BORDER))
        below = (left + _BORDER, top + tile[1] + 2 * _BORDER + 1)
        draw.text(below, f"{times[frame]:.2f} s", _TRUE if inside else _INK, font)
    _draw_timeline(draw, font, size, times[chosen], spans, seconds)
    return sheet


def _about(shape: tuple[int, ...], shown: int, scale: float, spans: Sequence[Span]) -> str:
    count, height, width, _ = shape
    frames = f"{count} frames" if shown == count else f"{shown} of {count} frames"
    size = f"{frames} of {width} x {height} pixels"
    size += f", enlarged {scale} times" if scale > 1 else ", reduced" if scale < 1 else ""
    true = ", ".join(f"{start:g}-{end:g} s" for start, end in spans)
    return f"{size}; green: the true span, {true}" if true else size


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """As much of a text as fits on one line, less a margin."""
    room = width - 2 * _GAP
    line = " ".join(text.split())
    length = font.getlength(line)
    if length <= room:
        return line
    kept = line[: int(len(line) * room / length)]
    while font.getlength(f"{kept}...") > room:
        kept = kept[:-1]
    return f"{kept}..."


def _draw_timeline(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
    times: np.ndarray,
    spans: Sequence[Span],
    seconds: float,
) -> None:
    """A bar from 0 to the end, the true spans in it, a tick for every frame of the sheet."""
    left, right = _GAP, size[0] - _GAP
    top = size[1] - _TIMELINE - _LINE - _GAP

    def at(time: float) -> float:
        return left + (right - left) * min(max(time / seconds, 0.0), 1.0)

    draw.rectangle((left, top, right, top + _TIMELINE), fill=_PALE)
    for start, end in spans:
        draw.rectangle((at(start), top, max(at(end), at(start) + 1), top + _TIMELINE), fill=_TRUE)
    for time in times:
        draw.line((at(time), top - 5, at(time), top + _TIMELINE), fill=_INK)
    draw.text((left, top + _TIMELINE + 3), "0 s", _INK, font)
    draw.text((right, top + _TIMELINE + 3), f"{seconds:.2f} s", _INK, font, anchor="ra")
