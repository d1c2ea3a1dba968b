"""Frames to files, and what is drawn around them: videos of dreams, plots of signals, figures.

A frame is uint8 [H, W, 3], a video uint8 [T, H, W, 3]. Pillow, matplotlib and PyAV are imported where they are used.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.errors import ConfigError, MissingExtraError
from worldmodel.storage.files import write

SUFFIXES = (".gif", ".mp4")
PAPER, INK, FAINT = (255, 255, 255), (40, 40, 40), (190, 190, 190)
CONTEXT, IMAGINED, REAL, PREDICTED, SPREAD = (46, 160, 67), (230, 126, 34), (31, 119, 180), (214, 88, 20), (250, 214, 180)
"""Colours: borders of context and imagined frames; observed numbers, the mean of the roll-outs, and their deviation."""
BAR, EDGE, GAP = 22, 4, 4
"""Pixels of a line of text, of a frame's border, and between frames."""
ERROR_GAIN = 2.0
"""Errors of half the brightness range are white."""
PALETTE_PIXELS = 120_000
"""About as many pixels of a video choose its palette."""
MAX_SIGNALS, MAX_BARS = 8, 32
CAPTIONED_SIDE = 256
"""Frames under a caption are enlarged until a side has as many pixels."""


# Files ----------------------------------------------------------------------------------------------------------------


def checked(path: Path) -> Path:
    """The path, if videos can be written to it. Raises ConfigError for another suffix, MissingExtraError where PyAV is absent."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"'{path}': videos are written as {' or '.join(SUFFIXES)}. Give a name that ends in one of them.")
    if path.suffix.lower() == ".mp4":
        _av(path)
    return path


def save(path: Path, frames: np.ndarray, fps: float = 15) -> None:
    """Write a video [T, H, W, 3] as .gif or .mp4 (extra `video`), whole or not at all. Raises StorageError, and as `checked`."""
    checked(path)
    write(path, gif(frames, fps) if path.suffix.lower() == ".gif" else mp4(frames, fps))


def gif(frames: np.ndarray, fps: float = 15) -> bytes:
    """An animation [T, H, W, 3] that repeats for ever, with one palette for all frames."""
    from PIL import Image

    # The palette samples every frame. Otherwise a colour of few frames would turn into its neighbour, and Pillow would drop a
    # frame that then equals the one before.
    stride = max(1, round((frames[..., 0].size / PALETTE_PIXELS) ** 0.5))
    sample = np.ascontiguousarray(frames[:, ::stride, ::stride])
    palette = Image.fromarray(sample.reshape(-1, *sample.shape[2:])).quantize(255, dither=Image.Dither.NONE)
    pictures = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    out = io.BytesIO()
    # GIF counts in hundredths of a second, and viewers slow down frames shorter than two of them.
    options = {"duration": max(20, 10 * round(100 / fps)), "loop": 0, "optimize": False, "disposal": 1}
    pictures[0].save(out, "GIF", save_all=True, append_images=pictures[1:], **options)
    return out.getvalue()


def mp4(frames: np.ndarray, fps: float = 15) -> bytes:
    """The same as H.264 video; odd sides are padded by one pixel."""
    av = _av("an .mp4")
    frames = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], mode="edge")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=max(1, round(fps)))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def _av(what: object) -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingExtraError(
            f"Writing {what} needs the package 'av', which is not installed. Install it with: pip install 'worldmodel[video]', "
            "or write a .gif."
        ) from error
    return av


def png(frame: np.ndarray) -> bytes:
    """One frame [H, W, 3] as PNG."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(frame).save(out, "PNG", compress_level=4)
    return out.getvalue()


# Videos ---------------------------------------------------------------------------------------------------------------


def open_loop_panels(real: np.ndarray, imagined: np.ndarray, context: int, min_size: int = 128) -> np.ndarray:
    """real | imagined | error, side by side with captions: two videos [T, H, W, 3] -> one.

    Frames of the context have a green border (there `imagined` is what the model reconstructs), imagined ones an orange one;
    their step is counted from the last frame that was seen. The error is the mean difference of the channels, brightened.
    """
    error = np.abs(real.astype(np.int16) - imagined).mean(-1, keepdims=True)
    error = np.clip(ERROR_GAIN * error, 0, 255).astype(np.uint8).repeat(3, -1)
    panels = [_enlarged(x, min_size, real.shape[1]) for x in (real, imagined, error)]
    height, width = panels[0].shape[1] + 2 * EDGE, panels[0].shape[2] + 2 * EDGE
    video = _paper(len(real), BAR + height, 3 * width + 2 * GAP)
    for i, panel in enumerate(panels):
        column = video[:, :, i * (width + GAP) :][:, :, :width]
        column[:context, BAR:], column[context:, BAR:] = CONTEXT, IMAGINED
        column[:, BAR + EDGE : -EDGE, EDGE:-EDGE] = panel
        for t, frame in enumerate(column):
            step = f"step {t + 1}, seen" if t < context else f"step +{t - context + 1}"
            words = (f"real   {step}", "reconstructed" if t < context else "imagined", "error")
            frame[:BAR] = _caption(words[i], width, BAR)
    return video


def captioned(frames: np.ndarray, words: Sequence[str]) -> np.ndarray:
    """A video with a line of text above each frame; small frames are enlarged."""
    frames = _enlarged(frames, CAPTIONED_SIDE, max(frames.shape[1:3]))
    video = _paper(len(frames), BAR + frames.shape[1], max(CAPTIONED_SIDE, frames.shape[2]))
    video[:, BAR:, : frames.shape[2]] = frames
    for frame, text in zip(video, words):
        frame[:BAR] = _caption(text, frame.shape[1], BAR)
    return video


def grid(frames: np.ndarray, rows: Sequence[str], title: str = "", min_size: int = 64) -> np.ndarray:
    """Images [R, C, H, W, 3] in labelled rows -> one frame."""
    frames = _enlarged(frames, min_size, frames.shape[2])
    count, across, height, width = frames.shape[:4]
    gap = 3
    margin = max(44, *(8 + int(_font(13).getlength(row)) for row in rows))
    out = _paper(BAR + count * (height + gap), margin + across * (width + gap))
    out[:BAR] = _caption(title, out.shape[1], BAR)
    for r in range(count):
        row = out[BAR + r * (height + gap) :][:height]
        row[:, :margin] = _caption(rows[r], margin, height)
        for c in range(across):
            row[:, margin + c * (width + gap) :][:, :width] = frames[r, c]
    return out


def _enlarged(frames: np.ndarray, min_size: int, side: int) -> np.ndarray:
    """Frames [..., H, W, 3] a whole number of times as large, so that `side` becomes at least `min_size`."""
    scale = max(1, -(-min_size // side))
    return frames.repeat(scale, -3).repeat(scale, -2)


def _paper(*shape: int) -> np.ndarray:
    return np.full((*shape, 3), PAPER, np.uint8)


@lru_cache(maxsize=512)
def _caption(text: str, width: int, height: int) -> np.ndarray:
    """A line of text on paper [height, width, 3]."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (width, height), PAPER)
    ImageDraw.Draw(picture).text((4, height // 2), text, fill=INK, font=_font(13), anchor="lm")
    return np.asarray(picture)


@lru_cache(maxsize=8)
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


# Signals --------------------------------------------------------------------------------------------------------------


def signal_frames(true: np.ndarray, imagined: np.ndarray, names: Sequence[str], context: int) -> np.ndarray:
    """Numbers over time as a video: true [T, D] (NaN: unknown) and roll-outs imagined [K, T, D] -> uint8 [T, H, W, 3].

    A panel for each of the first `MAX_SIGNALS` numbers. All observed values are there faintly from the start; the observed
    ones (blue), the mean of the roll-outs (orange) and a deviation to both sides grow with time. A green line marks the last
    observation that the model saw.
    """
    from PIL import Image, ImageDraw

    steps, count = len(true), min(MAX_SIGNALS, true.shape[1])
    true, imagined = (np.where(np.isfinite(x), x, np.nan)[..., :count].astype(float) for x in (true, imagined))
    mean, spread = imagined.mean(0), imagined.std(0)
    low, high = _limits(np.concatenate([true, mean - spread, mean + spread]))
    columns = 1 if count == 1 else 2
    width, height, pad = 300, 96, 20
    x = 6 + np.arange(count) % columns * width + np.arange(steps)[:, None] * (width - 12) / max(1, steps - 1)
    top = pad + np.arange(count) // columns * (height + pad)
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * (height + pad) + 4), PAPER)
    draw = ImageDraw.Draw(sheet)

    def pixels(values: np.ndarray) -> np.ndarray:
        """[T, D] -> [T, D, 2]"""
        share = (np.clip(values, low, high) - low) / (high - low)
        return np.stack([x, top + (1 - share) * (height - 1)], -1)

    def line(points: np.ndarray, colour: tuple, thick: int = 2) -> None:
        if np.isfinite(points).all():
            draw.line(points.ravel().tolist(), fill=colour, width=thick)

    true, mean, upper, lower = map(pixels, (true, mean, mean + spread, mean - spread))
    for d in range(count):
        draw.rectangle([x[0, d], top[d], x[-1, d], top[d] + height - 1], outline=FAINT)
        if 0 < context < steps:
            draw.line([x[context - 1, d], top[d], x[context - 1, d], top[d] + height - 1], fill=CONTEXT, width=2)
        words = f"{names[d]}   [{low[d]:.2g}, {high[d]:.2g}]"
        draw.text((x[0, d], top[d] - pad // 2), words, fill=INK, font=_font(12), anchor="lm")
        for t in range(1, steps):
            line(true[t - 1 : t + 1, d], FAINT, 1)
    video = np.empty((steps, sheet.height, sheet.width, 3), np.uint8)
    for t in range(steps):
        for d in range(count) if t else ():
            band = np.concatenate([upper[t - 1 : t + 1, d], lower[t - 1 : t + 1, d][::-1]])
            if np.isfinite(band).all():
                draw.polygon(band.ravel().tolist(), fill=SPREAD)
            line(true[t - 1 : t + 1, d], REAL)
            line(mean[t - 1 : t + 1, d], PREDICTED)
        video[t] = np.asarray(sheet)
    return video


def _limits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) [D] of the axes for values [N, D], with a margin; NaN: unknown."""
    low, high = np.fmin.reduce(values, 0), np.fmax.reduce(values, 0)
    low, high = np.nan_to_num(low), np.nan_to_num(high)
    margin = np.where(high > low, 0.08 * (high - low), 0.5)
    return low - margin, high + margin


# Figures --------------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float, left: float = 0.7, bottom: float = 0.55, top: float = 0.35, right: float = 0.15) -> Any:
    """A figure with margins in inches: matplotlib's layout engines find their own, but draw everything twice for that."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=80)
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    return figure


def _encoded(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", pil_kwargs={"compress_level": 4})
    return out.getvalue()


def error_figure(
    horizons: Sequence[int],
    curves: Mapping[str, Sequence[float]],
    persistence: Mapping[str, Sequence[float]],
    title: str = "",
    unit: str = "",
) -> bytes:
    """PNG of errors by horizon: the first curve bold, the others thin, persistence dashed in the same colour; NaN is a gap."""
    figure = _figure(7.5, 4.5)
    axes = figure.add_subplot()
    for i, (name, curve) in enumerate(curves.items()):
        colour = "black" if i == 0 else f"C{i - 1}"
        axes.plot(horizons, curve, color=colour, linewidth=2.5 if i == 0 else 1.2, label=name, marker="o", markersize=3)
        if name in persistence:
            axes.plot(horizons, persistence[name], color=colour, linestyle="--", linewidth=1.5 if i == 0 else 0.8)
    axes.set(title=title, xlabel="steps ahead", ylabel=f"root mean square error, {unit}" if unit else "root mean square error")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return _encoded(figure)


def bar_figure(values: Sequence[float], labels: Sequence[str], title: str, unit: str) -> bytes:
    """PNG of the first `MAX_BARS` values as bars."""
    figure = _figure(7.5, 3.2)
    axes = figure.add_subplot()
    shown = values[:MAX_BARS]
    axes.bar(range(len(shown)), shown, color="C0")
    axes.set_xticks(range(len(shown)), labels[:MAX_BARS], fontsize=7, rotation=90 if len(values) > 12 else 0)
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(unit)
    return _encoded(figure)


def lines_figure(x: Sequence[float], series: Sequence[tuple[str, Mapping[str, Sequence[float]]]], title: str, xlabel: str) -> bytes:
    """PNG of small multiples: one axes for each (name, {label: values})."""
    columns = min(4, len(series))
    rows = -(-len(series) // columns)
    figure = _figure(2.4 * columns + 0.6, 1.9 * rows + 0.8, left=0.4, bottom=0.6, top=0.55)
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True, gridspec_kw={"wspace": 0.2, "hspace": 0.25}).flat)
    for axes, (name, lines) in zip(grid, series):
        for label, values in lines.items():
            axes.plot(x, values, label=label, linewidth=1.2)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=6)
    for axes in grid[len(series) :]:
        axes.set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=7)
    figure.suptitle(f"{title} ({xlabel})", fontsize=10)
    return _encoded(figure)


def curves_figure(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], xlabel: str, levels: Mapping[str, float | None]
) -> bytes:
    """PNG of panels {title: {label: points (x, y)}}, each with axes of its own; a dashed line at the level of its title."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(4.2 * columns, 2.9 * rows, left=0.75, bottom=0.6, top=0.4)
    grid = list(figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.3, "hspace": 0.45}).flat)
    for axes, (title, lines) in zip(grid, panels.items()):
        for label, points in lines.items():
            axes.plot(*zip(*points), label=label, linewidth=1.4, marker="o" if len(points) < 30 else None, markersize=3)
        if (level := levels.get(title)) is not None:
            axes.axhline(level, color="grey", linestyle="--", linewidth=1)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(xlabel)
        axes.grid(alpha=0.3)
        if any(lines):
            axes.legend(fontsize=8)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return _encoded(figure)


def pareto_figure(points: Mapping[str, tuple[float, float]], xlabel: str, ylabel: str) -> bytes:
    """PNG of named points (cost, gain), costs on a logarithmic axis; a line joins those that none beats in both."""
    figure = _figure(7.5, 4.5)
    axes = figure.add_subplot()
    for name, (x, y) in points.items():
        axes.scatter(x, y, s=24)
        axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=9)
    front = [p for p in points.values() if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points.values())]
    if front:
        axes.step(*zip(*sorted(front)), where="post", color="grey", linewidth=1)
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log")
    axes.grid(alpha=0.3)
    return _encoded(figure)


def points_figure(
    lines: Mapping[str, Sequence[tuple[str, float, float, float, float]]], xlabel: str, ylabel: str, log: bool = False
) -> bytes:
    """PNG of lines through labelled points (label, x, y, lowest y, highest y); log: x is logarithmic."""
    figure = _figure(7.5, 4.5)
    axes = figure.add_subplot()
    for name, points in lines.items():
        labels, x, y, low, high = zip(*points)
        errors = np.subtract(y, low), np.subtract(high, y)
        axes.errorbar(x, y, errors, label=name, marker="o", markersize=4, linewidth=1.2, capsize=3)
        for label, *place in zip(labels, x, y):
            axes.annotate(label, place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=8)
    return _encoded(figure)
