"""Frames to files, and what is drawn around them: films of dreams, plots of signals, figures.

A frame is uint8 [H, W, 3], a film uint8 [T, H, W, 3]. Pillow, matplotlib and PyAV are imported where they are used.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.errors import ConfigError, MissingExtraError
from worldmodel.storage.files import write

SUFFIXES = (".gif", ".mp4")
PAPER, INK, FAINT = (255, 255, 255), (40, 40, 40), (190, 190, 190)
CONTEXT, IMAGINED, REAL, PREDICTED, SPREAD = (46, 160, 67), (230, 126, 34), (31, 119, 180), (214, 88, 20), (250, 214, 180)
"""Colours: borders of context and imagined frames; what came, what was believed, and its spread."""
ERROR_GAIN = 2.0
"""Errors of half the brightness range are white."""
PALETTE_PIXELS = 120_000
"""About as many pixels of a film choose its palette."""


# Files ----------------------------------------------------------------------------------------------------------------


def checked(path: Path) -> Path:
    """The path, if films can be written to it. Raises ConfigError for another suffix, MissingExtraError where PyAV is absent."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"'{path}': films are written as {' or '.join(SUFFIXES)}. Give a name that ends in one of them.")
    if path.suffix.lower() == ".mp4":
        _av(path)
    return path


def save(path: Path, frames: np.ndarray, fps: float = 15) -> None:
    """Write a film [T, H, W, 3] as .gif or .mp4 (extra `video`), whole or not at all. Raises StorageError, and as `checked`."""
    checked(path)
    write(path, gif(frames, fps) if path.suffix.lower() == ".gif" else mp4(frames, fps))


def gif(frames: np.ndarray, fps: float = 15) -> bytes:
    """An animation [T, H, W, 3] that repeats for ever, with one palette for all frames."""
    from PIL import Image

    # Every frame has its say: a colour that few frames show would else turn into its neighbour, and a frame that equals the
    # one before for that reason is merged away.
    stride = max(1, round((frames[..., 0].size / PALETTE_PIXELS) ** 0.5))
    sample = np.ascontiguousarray(frames[:, ::stride, ::stride])
    palette = Image.fromarray(sample.reshape(-1, *sample.shape[2:])).quantize(255, dither=Image.Dither.NONE)
    pictures = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    out = io.BytesIO()
    # GIF counts in hundredths of a second, and viewers slow down what is shorter than two of them.
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


# Films ----------------------------------------------------------------------------------------------------------------


def open_loop_panels(real: np.ndarray, imagined: np.ndarray, context: int, min_size: int = 128) -> np.ndarray:
    """real | imagined | error, side by side with captions: two films [T, H, W, 3] -> one.

    Frames of the context have a green border (there `imagined` is what the model reconstructs), imagined ones an orange one;
    their step is counted from the last frame that was seen. The error is the mean difference of the channels, brightened.
    """
    scale = max(1, -(-min_size // real.shape[1]))
    error = np.abs(real.astype(np.int16) - imagined).mean(-1, keepdims=True)
    error = np.clip(ERROR_GAIN * error, 0, 255).astype(np.uint8).repeat(3, -1)
    panels = [x.repeat(scale, 1).repeat(scale, 2) for x in (real, imagined, error)]
    bar, edge, gap = 22, 4, 4
    count, height, width = len(real), *panels[0].shape[1:3]
    video = np.empty((count, bar + height + 2 * edge, 3 * (width + 2 * edge) + 2 * gap, 3), np.uint8)
    video[:] = PAPER
    for t in range(count):
        seen = t < context
        words = ("real", "reconstructed" if seen else "imagined", "error")
        step = f"step {t + 1}, seen" if seen else f"step +{t - context + 1}"
        for i, (panel, word) in enumerate(zip(panels, words)):
            left = i * (width + 2 * edge + gap)
            video[t, bar:, left : left + width + 2 * edge] = CONTEXT if seen else IMAGINED
            video[t, bar + edge : bar + edge + height, left + edge : left + edge + width] = panel[t]
            caption = _caption(word if i else f"real   {step}", width + 2 * edge, bar)
            video[t, :bar, left : left + width + 2 * edge] = caption
    return video


def captioned(frames: np.ndarray, words: Sequence[str], min_size: int = 256) -> np.ndarray:
    """A film with a line of text above each frame; small frames become several times as large, until a side has `least` pixels."""
    scale, bar = max(1, -(-min_size // max(frames.shape[1:3]))), 22
    frames = frames.repeat(scale, 1).repeat(scale, 2)
    video = np.empty((len(frames), bar + frames.shape[1], max(min_size, frames.shape[2]), 3), np.uint8)
    video[:] = PAPER
    for t, text in enumerate(words):
        video[t, :bar] = _caption(text, video.shape[2], bar)
        video[t, bar:, : frames.shape[2]] = frames[t]
    return video


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


def signal_frames(true: np.ndarray, imagined: np.ndarray, names: Sequence[str], context: int, max_count: int = 8) -> np.ndarray:
    """Numbers over time as a film: true [T, D] (NaN: unknown) and roll-outs imagined [K, T, D] -> uint8 [T, H, W, 3].

    A panel for each of the first `most` numbers. What came lies there faintly from the start; what came (blue), the mean
    of the roll-outs (orange) and a deviation to both sides grow with time. A line marks the last row that was seen.
    """
    from PIL import Image, ImageDraw

    steps, count = len(true), min(max_count, true.shape[1])
    true, imagined = (np.where(np.isfinite(x), x, np.nan)[..., :count].astype(float) for x in (true, imagined))
    mean, spread = imagined.mean(0), imagined.std(0)
    known = np.concatenate([true, mean - spread, mean + spread])
    low, high = (np.nan_to_num(f(np.where(np.isnan(known), fill, known), 0)) for f, fill in ((np.min, np.inf), (np.max, -np.inf)))
    low, high = np.where(low <= high, low, 0), np.where(low <= high, high, 0)
    margin = np.where(high > low, 0.08 * (high - low), 0.5)
    low, high = low - margin, high + margin
    columns = 1 if count == 1 else 2
    width, height, pad = 300, 96, 20
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * (height + pad) + 4), PAPER)
    draw = ImageDraw.Draw(sheet)

    def panel_at(d: int) -> Callable[[int, float], tuple[float, float]]:
        left, top = (d % columns) * width + 6, (d // columns) * (height + pad) + pad

        def at(t: int, value: float) -> tuple[float, float]:
            share = (np.clip(value, low[d], high[d]) - low[d]) / (high[d] - low[d])
            return left + t * (width - 12) / max(1, steps - 1), top + (1 - share) * (height - 1)

        return at

    panels_at = [panel_at(d) for d in range(count)]
    for d, at in enumerate(panels_at):
        draw.rectangle([*at(0, high[d]), *at(steps - 1, low[d])], outline=FAINT)
        if 0 < context < steps:
            draw.line([at(context - 1, high[d]), at(context - 1, low[d])], fill=CONTEXT, width=2)
        x, y = at(0, high[d])
        draw.text((x, y - pad // 2), f"{names[d]}   [{low[d]:.2g}, {high[d]:.2g}]", fill=INK, font=_font(12), anchor="lm")
        _line(draw, at, true[:, d], range(1, steps), FAINT, 1)
    video = np.empty((steps, sheet.height, sheet.width, 3), np.uint8)
    for t in range(steps):
        for d, at in enumerate(panels_at) if t else ():
            _band(draw, at, mean[:, d], spread[:, d], t)
            _line(draw, at, true[:, d], [t], REAL, 2)
            _line(draw, at, mean[:, d], [t], PREDICTED, 2)
        video[t] = np.asarray(sheet)
    return video


def _line(draw: Any, at: Callable, values: np.ndarray, steps: Sequence[int], colour: tuple, width: int) -> None:
    """Segments that end at `steps`, where both of their ends are known."""
    for t in steps:
        if np.isfinite(values[t - 1]) and np.isfinite(values[t]):
            draw.line([at(t - 1, values[t - 1]), at(t, values[t])], fill=colour, width=width)


def _band(draw: Any, at: Callable, mean: np.ndarray, spread: np.ndarray, t: int) -> None:
    if np.isfinite([*mean[t - 1 : t + 1], *spread[t - 1 : t + 1]]).all():
        upper = [at(s, mean[s] + spread[s]) for s in (t - 1, t)]
        lower = [at(s, mean[s] - spread[s]) for s in (t, t - 1)]
        draw.polygon(upper + lower, fill=SPREAD)


def grid(frames: np.ndarray, rows: Sequence[str], title: str = "", min_size: int = 64) -> np.ndarray:
    """Pictures [R, C, H, W, 3] in labelled rows -> one frame."""
    scale = max(1, -(-min_size // frames.shape[2]))
    frames = frames.repeat(scale, 2).repeat(scale, 3)
    count, across, height, width = frames.shape[:4]
    bar, gap = 22, 3
    margin = max(44, *(8 + int(_font(13).getlength(row)) for row in rows))
    out = np.empty((bar + count * (height + gap), margin + across * (width + gap), 3), np.uint8)
    out[:] = PAPER
    out[:bar] = _caption(title, out.shape[1], bar)
    for r in range(count):
        top = bar + r * (height + gap)
        out[top : top + height, :margin] = _caption(rows[r], margin, height)
        for c in range(across):
            left = margin + c * (width + gap)
            out[top : top + height, left : left + width] = frames[r, c]
    return out


# Figures --------------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float, left: float = 0.7, bottom: float = 0.55, top: float = 0.35, right: float = 0.15) -> Any:
    """A figure with margins in inches: matplotlib's layout engines find their own, but draw everything twice for that."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=80)
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    return figure


def _encoded(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return png(np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3]))


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


def bar_figure(values: Sequence[float], labels: Sequence[str], title: str, unit: str, max_count: int = 32) -> bytes:
    """PNG of the first `most` values as bars."""
    figure = _figure(7.5, 3.2)
    axes = figure.add_subplot()
    axes.bar(range(len(values[:max_count])), values[:max_count], color="C0")
    axes.set_xticks(range(len(values[:max_count])), labels[:max_count], fontsize=7, rotation=90 if len(values) > 12 else 0)
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(unit)
    return _encoded(figure)


def lines_figure(x: Sequence[float], series: Sequence[tuple[str, Mapping[str, Sequence[float]]]], title: str, xlabel: str) -> bytes:
    """PNG of small multiples: one axes for each (name, {label: values})."""
    columns = min(4, len(series))
    rows = -(-len(series) // columns)
    figure = _figure(2.4 * columns + 0.6, 1.9 * rows + 0.8, left=0.4, bottom=0.6, top=0.55)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, gridspec_kw={"wspace": 0.2, "hspace": 0.25}).flat
    for axes, (name, lines) in zip(grid, series):
        for label, values in lines.items():
            axes.plot(x, values, label=label, linewidth=1.2)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=6)
    for axes in list(grid)[len(series) :]:
        axes.set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=7)
    figure.suptitle(f"{title} ({xlabel})", fontsize=10)
    return _encoded(figure)
