"""TensorBoard: its own readers find what was written, and damage to an event file is never silent."""

from __future__ import annotations

import html
import io
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.plugins.projector.projector_plugin import _read_tensor_tsv_file
from tensorboard.plugins.text.text_plugin import text_array_to_html
from tensorboard.util import img_mime_type_detector
from tensorboard.util.tensor_util import make_ndarray
from torch.utils.tensorboard import SummaryWriter

from worldmodel.errors import ConfigError, CorruptError, StorageError
from worldmodel.view import tensorboard

YAML = 'env:\n  id: "*a* <b>_c_"  # no **bold**\n\n  list:\n    - 1\n'


def picture(kind: str = "GIF", size: tuple[int, int] = (6, 4), seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    frames = [Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(3)]
    out = io.BytesIO()
    more = {"save_all": True, "append_images": frames[1:], "duration": 100} if kind == "GIF" else {}
    frames[0].save(out, format=kind, **more)
    return out.getvalue()


def accumulated(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def only_file(folder: Path) -> Path:
    (file,) = folder.glob("*tfevents*")
    return file


@pytest.fixture
def run(tmp_path) -> Path:
    """Twenty scalars and a picture of 100 KB in one closed event file."""
    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step in range(20):
            writer.add_scalar("loss", step / 4, step)
        tensorboard.image(writer, "video", picture(size=(200, 170)), 3)
    return tmp_path / "run"


# Writing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_an_image_arrives_byte_for_byte_and_is_served_as_what_it_is(kind, tmp_path):
    encoded = picture(kind)
    with SummaryWriter(str(tmp_path)) as writer:
        tensorboard.image(writer, "dream/video", encoded, 7)
    (event,) = accumulated(tmp_path).Images("dream/video")
    assert (event.step, event.encoded_image_string, event.width, event.height) == (7, encoded, 6, 4)
    assert img_mime_type_detector.from_bytes(event.encoded_image_string) == f"image/{kind.lower()}"


def test_bytes_that_are_no_image_are_refused(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer, pytest.raises(ValueError, match="'video' is neither a GIF nor a PNG"):
        tensorboard.image(writer, "video", b"GIF? no", 0)


def test_a_text_shows_as_it_stands(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        tensorboard.text(writer, "config", YAML, 0)
    (event,) = accumulated(tmp_path).Tensors("config/text_summary")
    shown = text_array_to_html(make_ndarray(event.tensor_proto), True)
    (code,) = re.findall(r"<pre><code>(.*?)</code></pre>", shown, re.DOTALL)
    assert html.unescape(code) == YAML


def test_hyperparameters_and_metrics_are_named_in_the_same_run(tmp_path):
    options = {"flag": True, "lr": 1e-3, "size": 64, "name": "s", "sizes": [1, 2], "none": None}
    with SummaryWriter(str(tmp_path)) as writer:
        tensorboard.hparams(writer, options, {"eval/mean_reward": 0.0})
        writer.add_scalar("eval/mean_reward", 5.0, 1)
    assert [p.is_file() for p in tmp_path.iterdir()] == [True], "no folder of a sub-run"
    found = accumulated(tmp_path)
    content = found.PluginTagToContent("hparams")
    assert set(content) == {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"}
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    assert {k: getattr(v, v.WhichOneof("kind")) for k, v in start.items()} == {
        "flag": True, "lr": 1e-3, "size": 64, "name": "s", "sizes": "[1, 2]"
    }  # fmt: skip
    metrics = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment.metric_infos
    assert [m.name.tag for m in metrics] == ["eval/mean_reward"]
    assert [e.value for e in found.Scalars("eval/mean_reward")] == [5.0], "the caller's value alone"


def test_hyperparameters_without_a_metric_are_refused(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer, pytest.raises(ValueError, match="at least one metric"):
        tensorboard.hparams(writer, {"lr": 1.0}, {})


def test_charts_that_belong_together_are_laid_out(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        tensorboard.layout(writer)
    (event,) = accumulated(tmp_path).Tensors("custom_scalars__config__")
    found = Layout.FromString(event.tensor_proto.string_val[0])
    charts = {c.title: {h.title: list(h.multiline.tag) for h in c.chart} for c in found.category}
    assert charts["World model"]["error over persistence, by horizon"] == ["world/ratio/.*"]
    assert charts["World model"]["losses"] == ["world/loss/.*"]
    assert any(re.match(tag, "dream/imagined_return") for tag in charts["Agent"]["real and imagined return"])


def test_importing_the_module_leaves_torchs_writer_alone():
    script = "import sys, worldmodel.view.tensorboard; sys.exit(any(m in sys.modules for m in ('torch', 'stable_baselines3')))"
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


# Projector ------------------------------------------------------------------------------------------------------------


def config(folder: Path) -> ProjectorConfig:
    return text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())


def test_the_projector_finds_latents_labels_and_images(tmp_path):
    latents = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    metadata = {"step": list(range(7)), "what\tever": ["a\tb", "c\r\nd", "", 1.5, None, True, "ü"]}
    pictures = np.stack([np.full((96, 64, 3), 30 * i, np.uint8) for i in range(7)])
    tensorboard.projector(tmp_path, latents, metadata, pictures)
    (entry,) = config(tmp_path).embeddings
    assert np.allclose(_read_tensor_tsv_file(str(tmp_path / entry.tensor_path)), latents, rtol=1e-6)
    lines = (tmp_path / entry.metadata_path).read_text(encoding="utf-8").splitlines()
    assert lines == ["step\twhat ever", "0\ta b", "1\tc d", "2\t-", "3\t1.5", "4\tNone", "5\tTrue", "6\tü"]
    assert list(entry.sprite.single_image_dim) == [32, 48]
    with Image.open(tmp_path / entry.sprite.image_path) as sprite:
        assert sprite.size == (3 * 32, 3 * 48)
        assert [sprite.getpixel((i % 3 * 32 + 5, i // 3 * 48 + 5))[0] for i in range(9)] == [30 * i for i in range(7)] + [0, 0]


def test_one_column_of_labels_has_no_header(tmp_path):
    tensorboard.projector(tmp_path, np.zeros((2, 2)), {"step": [4, ""]}, None)
    assert (tmp_path / "projector" / "metadata.tsv").read_text() == "4\n-\n", "a blank line would be skipped"


def test_of_many_points_some_are_taken_evenly(tmp_path):
    latents = np.arange(2501.0)[:, None]
    tensorboard.projector(tmp_path, latents, {"i": list(range(2501))}, np.zeros((2501, 2, 2, 3), np.uint8))
    labels = [int(x) for x in (tmp_path / "projector" / "metadata.tsv").read_text().split()]
    assert len(labels) == tensorboard.POINTS and (labels[0], labels[-1]) == (0, 2500)
    assert set(np.diff(labels)) == {2, 3}
    assert _read_tensor_tsv_file(str(tmp_path / "projector" / "tensors.tsv"))[:, 0].tolist() == labels


def test_new_points_replace_the_old_ones_and_leave_nothing_aside(tmp_path):
    tensorboard.projector(tmp_path, np.zeros((4, 2)), {"step": [1, 2, 3, 4]}, np.zeros((4, 8, 8, 3), np.uint8))
    tensorboard.projector(tmp_path, np.ones((3, 2)), {}, None)
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert names == {"projector_config.pbtxt", str(Path("projector/tensors.tsv"))}
    (entry,) = config(tmp_path).embeddings
    assert not entry.metadata_path and not entry.sprite.image_path
    assert _read_tensor_tsv_file(str(tmp_path / entry.tensor_path)).tolist() == [[1, 1]] * 3


@pytest.mark.parametrize(
    ("latents", "metadata", "pictures", "says"),
    [
        (np.zeros(3), {}, None, r"\[N, Z\]"),
        (np.zeros((0, 3)), {}, None, "at least one point"),
        (np.full((2, 2), np.nan), {}, None, "not finite"),
        (np.zeros((2, 2)), {"step": [1]}, None, "'step' has 1 values, but there are 2"),
        (np.zeros((2, 2)), {}, np.zeros((3, 4, 4, 3), np.uint8), r"uint8 \[2, H, W, 3\]"),
        (np.zeros((2, 2)), {}, np.zeros((2, 4, 4, 3)), "float64"),
    ],
)
def test_points_that_do_not_fit_are_refused_before_anything_is_written(latents, metadata, pictures, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        tensorboard.projector(tmp_path, latents, metadata, pictures)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_a_storage_error_and_nothing_stays_aside(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        tensorboard.projector(tmp_path / "file", np.zeros((2, 2)), {}, None)
    (tmp_path / "run" / "projector" / "tensors.tsv").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"tensors\.tsv"):
        tensorboard.projector(tmp_path / "run", np.zeros((2, 2)), {}, None)
    assert not list(tmp_path.rglob(".tmp-*"))


# Reading --------------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_back(tmp_path):
    encoded = picture()
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (5, 1, 3):
            writer.add_scalar("world/loss/kl", step / 4, step)
        tensorboard.image(writer, "video", encoded, 2)
        tensorboard.text(writer, "config", YAML, 4)
        tensorboard.text(writer, "note", "a **b**", 4)
        tensorboard.hparams(writer, {"lr": 1.0}, {"m": 0.0})
        tensorboard.layout(writer)
        writer.add_histogram("weights", np.arange(9.0), 0)
    found = tensorboard.read(tmp_path)
    assert found.scalars == {"world/loss/kl": [(1, 0.25), (3, 0.75), (5, 1.25)]}
    assert found.images == {"video": [(2, encoded)]}
    assert found.texts == {"config": [(4, YAML)], "note": [(4, "a **b**")]}
    assert [(e.step, e.value) for e in accumulated(tmp_path).Scalars("world/loss/kl")] == [(5, 1.25), (1, 0.25), (3, 0.75)]


def test_numbers_and_images_that_other_writers_store_as_tensors_are_read(tmp_path):
    encoded = picture("PNG")
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (0, 1):
            number, pictures = Summary.Value(tag="number"), Summary.Value(tag="video")
            if step == 0:  # TensorFlow names the plugin once
                number.metadata.plugin_data.plugin_name, pictures.metadata.plugin_data.plugin_name = "scalars", "images"
            number.tensor.dtype, pictures.tensor.dtype = 1, 7
            number.tensor.float_val.append(step + 0.5)
            pictures.tensor.tensor_shape.dim.add(size=3)
            pictures.tensor.string_val.extend([b"6", b"4", encoded])
            writer._get_file_writer().add_summary(Summary(value=[number, pictures]), step)
    found = tensorboard.read(tmp_path)
    assert found.scalars == {"number": [(0, 0.5), (1, 1.5)]} and found.images == {"video": [(0, encoded), (1, encoded)]}


def test_a_resumed_run_hides_what_it_repeats(tmp_path):
    with SummaryWriter(str(tmp_path), filename_suffix=".a") as writer:
        for step in range(6):
            writer.add_scalar("loss", step, step)
            tensorboard.image(writer, "video", picture(seed=step), step)
        writer.add_scalar("late", 1.0, 5)
    time.sleep(1.1)  # file names count seconds, and within one a counter that sorts as text
    with SummaryWriter(str(tmp_path), purge_step=3, filename_suffix=".b") as writer:
        for step in range(3, 5):
            writer.add_scalar("loss", 10 * step, step)
    assert len(list(tmp_path.glob("*tfevents*"))) == 2
    found = tensorboard.read(tmp_path)
    assert found.scalars == {"loss": [(0, 0), (1, 1), (2, 2), (3, 30), (4, 40)]}
    assert [s for s, _ in found.images["video"]] == [0, 1, 2]
    assert [(e.step, e.value) for e in accumulated(tmp_path).Scalars("loss")] == found.scalars["loss"]


def test_files_of_one_second_are_read_in_the_order_in_which_they_were_begun(tmp_path):
    for number, purge in ((9, None), (10, 2)):
        before = set(tmp_path.iterdir())
        writer = SummaryWriter(str(tmp_path), purge_step=purge)
        for step in (1, 2) if purge is None else (2,):
            writer.add_scalar("count", number, step)
        writer.close()
        (file,) = set(tmp_path.iterdir()) - before
        file.rename(tmp_path / f"events.out.tfevents.1700000000.host.5.{number}")
    assert [value for _, value in tensorboard.read(tmp_path).scalars["count"]] == [9, 10]


def test_a_file_that_is_cut_anywhere_gives_what_stands_before(run):
    file = only_file(run)
    data = file.read_bytes()
    counts = set()
    for cut in [*range(0, 300), *range(len(data) - 40, len(data))]:
        file.write_bytes(data[:cut])
        found = tensorboard.read(run)
        steps = [s for s, _ in found.scalars.get("loss", [])]
        assert steps == list(range(len(steps))) and not found.images
        counts.add(len(steps))
    assert {0, 1, 2, 20} <= counts


def test_an_older_file_that_a_killed_writer_left_cut_does_not_stop_the_reading(run):
    file = only_file(run)
    file.write_bytes(file.read_bytes()[:-9])
    with SummaryWriter(str(run), purge_step=18, filename_suffix=".b") as writer:
        writer.add_scalar("loss", 99, 18)
    assert tensorboard.read(run).scalars["loss"][-2:] == [(17, 4.25), (18, 99)]


@pytest.mark.parametrize("place", ["length", "checksum of the length", "content", "end"])
def test_a_flipped_bit_is_found_wherever_it_is(place, run):
    file = only_file(run)
    data = bytearray(file.read_bytes())
    second = 16 + int.from_bytes(data[:8], "little")
    at = {"length": second, "checksum of the length": second + 9, "content": len(data) // 2, "end": len(data) - 1}[place]
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptError, match=rf"{re.escape(file.name)} is damaged at byte \d+: the checksum"):
        tensorboard.read(run)


@pytest.mark.parametrize("content", [b"step,loss\n1,0.5\n2,0.25\n", b"hi", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_a_foreign_file_is_named(content, run):
    (run / "events.out.tfevents.x").write_bytes(content)
    with pytest.raises(CorruptError, match=r"events\.out\.tfevents\.x is no file of TensorBoard's events"):
        tensorboard.read(run)


@pytest.mark.parametrize("body", [b"\xff\xff\xff", Event(step=3).SerializeToString()])
def test_records_of_something_else_are_foreign_too(body, tmp_path):
    length = len(body).to_bytes(8, "little")
    ends = [tensorboard._masked(part) for part in (length, body)]
    (tmp_path / "a.tfevents").write_bytes(length + ends[0] + body + ends[1])
    with pytest.raises(CorruptError, match=r"a\.tfevents is no file of TensorBoard's events"):
        tensorboard.read(tmp_path)


def test_a_folder_that_is_not_there_is_named_with_what_is_near(run):
    with pytest.raises(ConfigError, match=r"rum does not exist. Expected .* Did you mean 'run'\?"):
        tensorboard.read(run.parent / "rum")
    with pytest.raises(ConfigError, match="is a file"):
        tensorboard.read(only_file(run))


def test_a_folder_without_event_files_names_where_there_are_some(run, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no event file .* There are some in .*run\."):
        tensorboard.read(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no event file"):
        tensorboard.read(tmp_path / "empty")


@pytest.mark.parametrize("size", [0, 1, 9, 255, 16_383, 16_384, 16_385, 16_639, 16_640, 50_001])
def test_the_checksum_is_tensorboards(size):
    data = np.random.default_rng(size).bytes(size)
    assert tensorboard._crc32c(data) == crc32c(data)
