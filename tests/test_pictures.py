"""Videos are readable and whole, panels and plots show what they are given, and a file is written or not at all."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from worldmodel.errors import ConfigError, MissingExtraError, StorageError
from worldmodel.view import pictures


def video(steps: int = 6, height: int = 20, width: int = 31) -> np.ndarray:
    """A white bar that moves over colours."""
    frames = np.zeros((steps, height, width, 3), np.uint8)
    frames[..., 2] = np.linspace(0, 200, width).astype(np.uint8)
    for t in range(steps):
        frames[t, :, 2 * t : 2 * t + 3] = 255
    return frames


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


# Files ------------------------------------------------------------------------------------------------------------------


def test_a_gif_has_every_frame_its_time_and_no_end():
    frames = video(6)
    shown = opened(pictures.gif(frames, fps=10))
    assert shown.n_frames == 6 and shown.info["loop"] == 0 and shown.size == (31, 20)
    for t in range(6):
        shown.seek(t)
        assert shown.info["duration"] == 100
        assert np.abs(np.asarray(shown.convert("RGB")).astype(int) - frames[t]).mean() < 8


def test_frames_that_stand_still_keep_their_time():
    frames = np.repeat(video(3), 4, 0)
    shown, total = opened(pictures.gif(frames, fps=20)), 0
    for t in range(shown.n_frames):
        shown.seek(t)
        total += shown.info["duration"]
    assert total == 12 * 50


def test_what_few_frames_show_is_not_lost():
    frames = np.zeros((45, 60, 90, 3), np.uint8)
    frames[20, 20:30, 30:40] = (255, 0, 0)
    shown = opened(pictures.gif(frames))
    shown.seek(1)
    assert tuple(np.asarray(shown.convert("RGB"))[25, 35]) == (255, 0, 0)


def test_no_frame_is_shorter_than_viewers_show():
    assert opened(pictures.gif(video(3), fps=1000)).info["duration"] == 20


def test_an_mp4_has_even_sides_and_every_frame(tmp_path):
    av = pytest.importorskip("av")
    pictures.save(tmp_path / "video.mp4", video(12, 21, 31), fps=10)
    with av.open(str(tmp_path / "video.mp4")) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(shown) == 12 and shown[0].shape == (22, 32, 3)
    assert np.abs(shown[3][:21, :31].astype(int) - video(12, 21, 31)[3]).mean() < 25


def test_without_pyav_an_mp4_names_the_extra_and_a_gif_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"worldmodel\[video\]"):
        pictures.save(tmp_path / "video.mp4", video())
    pictures.save(tmp_path / "video.gif", video())
    assert [p.name for p in tmp_path.iterdir()] == ["video.gif"]


@pytest.mark.parametrize("name", ["video.webm", "video", "video.png"])
def test_other_videos_are_refused_by_name(tmp_path, name):
    with pytest.raises(ConfigError, match=r"\.gif or \.mp4"):
        pictures.save(tmp_path / name, video())
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "deep/video.gif"
    pictures.save(path, video(2))
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"video\.gif"):
        pictures.save(path, video(3))
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["video.gif"]


# Videos of dreams -------------------------------------------------------------------------------------------------------


def test_panels_stand_side_by_side_and_equal_ones_have_no_error():
    real = video(4, 32, 48)
    shown = pictures.open_loop_panels(real, real, context=2, min_size=64)
    assert shown.shape[0] == 4 and shown.shape[2] == 3 * (2 * 48 + 8) + 8
    left = [slice(4 + i * (96 + 12), 4 + i * (96 + 12) + 96) for i in range(3)]
    panels = [shown[:, 22 + 4 : 22 + 4 + 64, x] for x in left]
    assert np.array_equal(panels[0], panels[1]) and np.array_equal(panels[0][:, ::2, ::2], real) and not panels[2].any()
    other = pictures.open_loop_panels(real, np.zeros_like(real), context=2, min_size=64)
    assert other[:, 26:90, left[2]].max() == 255 and not other[:, 26:90, left[1]].any()


def test_seen_frames_are_marked_otherwise_than_imagined_ones():
    shown = pictures.open_loop_panels(video(4), video(4), context=2)
    borders = [tuple(int(x) for x in frame[30, 1]) for frame in shown]
    assert borders == [pictures.CONTEXT, pictures.CONTEXT, pictures.IMAGINED, pictures.IMAGINED]
    captions = [frame[:22].tobytes() for frame in shown]
    assert len(set(captions)) == 4  # the step is written in each


def signals(steps: int = 20, numbers: int = 3, samples: int = 4) -> tuple[np.ndarray, np.ndarray]:
    true = np.sin(np.arange(steps)[:, None] / 3 + np.arange(numbers))
    return true, true + 0.1 * np.random.default_rng(0).normal(size=(samples, steps, numbers))


def test_signals_grow_with_time_and_show_observed_and_predicted_values():
    true, imagined = signals()
    shown = pictures.signal_frames(true, imagined, ["a", "b", "c"], context=5)
    assert len(shown) == 20
    drawn = [(frame == np.array(pictures.REAL, np.uint8)).all(-1).sum() for frame in shown]
    assert drawn[0] == 0 and drawn[-1] > drawn[9] > 50
    assert (shown[-1] == np.array(pictures.PREDICTED, np.uint8)).all(-1).sum() > 50
    assert (shown[-1] == np.array(pictures.SPREAD, np.uint8)).all(-1).sum() > 50
    assert not np.array_equal(shown, pictures.signal_frames(true + np.linspace(0, 3, 20)[:, None], imagined, list("abc"), 5))
    assert not np.array_equal(shown, pictures.signal_frames(true, -imagined, list("abc"), 5))


def test_signals_that_are_constant_unknown_or_many_are_drawn():
    true, imagined = np.zeros((6, 12)), np.zeros((2, 6, 12))
    true[:, 1], imagined[:, :, 2], imagined[:, :3, 3] = np.nan, np.inf, np.nan
    assert pictures.signal_frames(true, imagined, [str(i) for i in range(12)], 2).shape[0] == 6
    assert pictures.signal_frames(np.full((6, 1), np.nan), np.full((2, 6, 1), np.nan), ["a"], 0).shape[0] == 6


# Figures ----------------------------------------------------------------------------------------------------------------


def test_figures_are_pngs_that_show_their_numbers():
    one, other = ([0.1, 0.2, value] for value in (0.3, 0.9))
    kept = {"all": [1, 1, 1]}
    drawn = [pictures.error_figure([1, 2, 3], {"all": curve, "x": [0.1, np.nan, 0.2]}, kept) for curve in (one, other)]
    bars = [pictures.bar_figure(curve, ["a", "b", "c"], "title", "nats") for curve in (one, other)]
    lines = [pictures.lines_figure([1, 2, 3], [("z0", {"x": curve}), ("z1", {"x": one})], "t", "x") for curve in (one, other)]
    points = [{"return": {"": list(enumerate(curve))}, "loss": {"a": [(1, 2.0)]}} for curve in (one, other)]
    curves = [pictures.curves_figure(panels, "real steps", {"return": 0.5}) for panels in points]
    for first, second in (drawn, bars, lines, curves):
        assert opened(first).format == "PNG" and min(opened(first).size) > 150 and first != second


def test_places_of_a_grid_that_no_panel_fills_stay_empty():
    panels = {str(i): {"": [(0, 0.0), (1, 1.0)]} for i in range(4)}
    shown = np.asarray(opened(pictures.curves_figure(panels, "real steps", {})).convert("L"))
    assert (shown[shown.shape[0] // 2 + 5 :, shown.shape[1] // 3 + 5 :] == 255).all(), "two of six places"
    series = [(str(i), {"x": [0.0, 1.0]}) for i in range(5)]
    shown = np.asarray(opened(pictures.lines_figure([0, 1], series, "t", "x")).convert("L"))
    middle, floor = shown.shape[1] * 3 // 10, shown.shape[0] - 40
    assert (shown[shown.shape[0] // 2 + 20 : floor, middle:] == 255).all(), "three of eight places"


def test_a_grid_has_each_picture_in_its_place():
    frames = np.stack([video(3, 16, 16), 255 - video(3, 16, 16)])
    shown = pictures.grid(frames, ["a", "b"], "title", min_size=16)
    assert np.array_equal(shown[22:38, 44:60], frames[0, 0]) and np.array_equal(shown[41:57, 63:79], frames[1, 1])
    assert np.array_equal(np.asarray(opened(pictures.png(shown))), shown)
