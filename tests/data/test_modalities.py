import io
import json
import tracemalloc

import numpy as np
import pytest
from PIL import ExifTags, Image

from mmfusion.data import video
from mmfusion.data.modalities import MODALITY_TYPES, feature_names, raw_value
from tests.errors import rejects

VIDEO = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8) * 10


def options(kind, feature="x", **changes):
    return {"kind": kind, "feature": feature, **MODALITY_TYPES[kind].options, **changes}


def gif(frames):
    file = io.BytesIO()
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(file, "GIF", save_all=True, append_images=rest)
    return file.getvalue()


def png(frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("stored", [VIDEO, list(VIDEO), [png(frame) for frame in VIDEO], gif(VIDEO)])
def test_video_decode_accepts_pixels_images_and_animations(stored):
    pixels, mask = MODALITY_TYPES["video"].decode(stored, options("video", frames=7, size=(4, 4)), None)
    assert (pixels.shape, pixels.dtype) == ((7, 4, 4, 3), np.uint8)
    np.testing.assert_array_equal(mask, [1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(pixels[:5], VIDEO)
    assert not pixels[5:].any()


def test_video_frames_are_evenly_spaced_from_first_to_last():
    pixels, mask = MODALITY_TYPES["video"].decode(VIDEO, options("video", frames=3, size=(4, 4)), None)
    assert mask.all()
    np.testing.assert_array_equal(pixels[:, 0, 0, 0], [0, 20, 40])


@pytest.mark.parametrize("kind", ["video", "graph"])
def test_decode_of_none_is_absent(kind):
    empty = {"nodes": None, "edges": None} if kind == "graph" else None
    assert MODALITY_TYPES[kind].decode(empty, options(kind, "nodes+edges" if kind == "graph" else "x"), None) is None


@pytest.mark.parametrize("broken", [b"no video", [b"no image"]])
def test_video_decode_rejects_corrupt_data(broken):
    with pytest.raises(ValueError, match="not a"):
        MODALITY_TYPES["video"].decode(broken, options("video", size=(4, 4)), None)


def test_video_decode_turns_frames_upright():
    upright = np.zeros((3, 4, 6, 3), np.uint8)
    upright[:, :, :3] = 50 * np.arange(1, 4)[:, None, None, None]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the first row is right, and the first column is on top
    file = io.BytesIO()
    first, *rest = [Image.fromarray(np.ascontiguousarray(frame[:, ::-1].transpose(1, 0, 2))) for frame in upright]
    first.save(file, "WEBP", save_all=True, append_images=rest, lossless=True, exif=exif)
    pixels, _ = MODALITY_TYPES["video"].decode(file.getvalue(), options("video", frames=3, size=(4, 6)), None)
    np.testing.assert_array_equal(pixels, upright)


@pytest.mark.parametrize("stored", ["animation", "files", "pixels"])
def test_video_decode_rejects_frames_deeper_than_8_bits(stored):
    frames = [np.full((6, 6), 1000 * i, np.uint16) for i in range(3)]
    values = {"animation": stack(frames), "files": [png(frame) for frame in frames], "pixels": np.stack(frames)}
    with pytest.raises(ValueError, match="uint16 pixels"):
        MODALITY_TYPES["video"].decode(values[stored], options("video", size=(6, 6)), None)


@pytest.mark.parametrize("shape", [(6, 8, 3), (6, 8, 1), (3, 8, 4)])
def test_video_decode_does_not_read_an_image_as_frames(shape):
    with pytest.raises(ValueError, match="is an image, not frames"):
        MODALITY_TYPES["video"].decode(np.zeros(shape, np.uint8), options("video", size=(6, 8)), None)


def test_video_decode_rejects_a_gif_cut_anywhere():
    frames = [Image.fromarray(np.full((6, 8), 60 * i, np.uint8)) for i in range(4)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    data, as_video = file.getvalue(), options("video", frames=4, size=(6, 8))
    assert MODALITY_TYPES["video"].decode(data, as_video, None)[1].all()
    assert MODALITY_TYPES["video"].decode(data + b"more", as_video, None)[1].all()
    for cut in range(1, len(data)):  # Pillow reads those cut between frames as shorter animations
        with pytest.raises(ValueError, match=r"truncated|no GIF block|not an animated image"):
            MODALITY_TYPES["video"].decode(data[:cut], as_video, None)


def test_video_decode_limits_the_pixels_of_a_frame(monkeypatch):
    file = io.BytesIO()
    Image.new("1", (9000, 6000)).save(file, "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="1 frames of 9000 x 6000 pixels, over the limit of 2000000000, or 50000000 a"):
        MODALITY_TYPES["video"].decode(file.getvalue(), options("video"), None)


def stack(frames):
    file = io.BytesIO()
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(file, "TIFF", save_all=True, append_images=rest)
    return file.getvalue()


def test_video_decode_rejects_channels_first():
    with pytest.raises(ValueError, match=r"\[3, 4, 4\], not \[h, w, c\]"):
        MODALITY_TYPES["video"].decode(VIDEO.transpose(0, 3, 1, 2), options("video", size=(4, 4)), None)


def test_video_decode_limits_pixels_and_frees_unused_frames():
    frames = np.zeros((40, 500, 500, 3), np.uint8)
    frames[:, 0, 0, 0] = np.arange(40)  # distinct, so that GIF keeps every frame
    animation, size = gif(frames), (4, 4)
    tracemalloc.start()
    pixels, mask = MODALITY_TYPES["video"].decode(animation, options("video", frames=2, size=size), None)
    assert tracemalloc.get_traced_memory()[1] < 12e6  # all frames are 30 MB
    tracemalloc.stop()
    assert mask.all() and pixels.shape == (2, 4, 4, 3)
    with pytest.raises(ValueError, match="40 frames of 500 x 500 pixels, over the limit of 9999999"):
        video.decode_animation(animation, range, size, 3, max_pixels=9_999_999)


TABLE = options("table", "age+sex+sizes", categorical=("sex",))
ROWS = [
    {"age": 30, "sex": "f", "sizes": np.array([1.0, 4.0])},
    {"age": "50", "sex": b"m", "sizes": [3.0, 8.0]},
    {"age": "", "sex": "f", "sizes": None},
]


def fitted(rows=ROWS):
    return json.loads(MODALITY_TYPES["table"].fit(rows, TABLE))


def test_table_decode_standardises_by_the_fitted_columns():
    assert feature_names(TABLE) == ["age", "sex", "sizes"]
    columns = fitted()
    assert MODALITY_TYPES["table"].encoder_kwargs(TABLE, columns) == {"categories": (0, 3, 0, 0)}
    assert MODALITY_TYPES["table"].shape(TABLE, columns) == ((4,), np.float32, 4)
    read = [MODALITY_TYPES["table"].decode(raw_value({**row, "more": 1}, TABLE, {}), TABLE, columns) for row in ROWS]
    np.testing.assert_allclose([x for x, _ in read], [[-1, 1, -1, -1], [1, 2, 1, 1], [0, 1, 0, 0]])
    np.testing.assert_array_equal([mask for _, mask in read], [[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0]])


def test_table_decode_maps_unknown_categories_to_zero():
    x, mask = MODALITY_TYPES["table"].decode({"age": 40, "sex": "other", "sizes": [2, np.nan]}, TABLE, fitted())
    np.testing.assert_allclose(x, [0, 0, 0, 0])
    np.testing.assert_array_equal(mask, [1, 1, 1, 0])
    assert MODALITY_TYPES["table"].decode({"age": None, "sex": "", "sizes": None}, TABLE, fitted()) is None


def test_table_decode_handles_columns_without_variance():
    x, _ = MODALITY_TYPES["table"].decode(ROWS[0], TABLE, fitted(ROWS[:1]))
    np.testing.assert_array_equal(x, [0, 1, 0, 0])


def test_table_rejects_columns_of_another_width():
    with pytest.raises(ValueError, match="'sizes' has 3 values, not 2"):
        MODALITY_TYPES["table"].decode({"age": 1, "sex": "f", "sizes": [1, 2, 3]}, TABLE, fitted())
    with rejects("column sizes", None, says="[2, 3] values"):
        fitted([*ROWS, {"age": 1, "sex": "f", "sizes": [1, 2, 3]}])


GRAPH = options("graph", "nodes+edges", nodes=4, features=2)
NODES = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


@pytest.mark.parametrize("as_json", [False, True])
def test_graph_decode_pads_and_makes_edges_undirected(as_json):
    value = {"nodes": NODES, "edges": [[0, 1], [2, 1]]}
    value = {name: json.dumps(part) for name, part in value.items()} if as_json else value
    x, mask = MODALITY_TYPES["graph"].decode(value, GRAPH, None)
    np.testing.assert_array_equal(mask, [1, 1, 1, 0])
    np.testing.assert_array_equal(x[:3, :2], NODES)
    np.testing.assert_array_equal(x[:, 2:], [[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    assert not x[3].any()


def test_graph_decode_accepts_no_edges_and_a_weight_matrix():
    x, _ = MODALITY_TYPES["graph"].decode({"nodes": NODES, "edges": []}, GRAPH, None)
    assert not x[:, 2:].any()
    weights = np.arange(9.0).reshape(3, 3)
    x, _ = MODALITY_TYPES["graph"].decode({"nodes": NODES, "edges": weights}, {**GRAPH, "edges": "matrix"}, None)
    np.testing.assert_array_equal(x[:3, 2:5], weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": [[1.0]]}, "with 1 features"),
        ({"nodes": NODES * 2}, "6 nodes"),
        ({"edges": [[0, 3]]}, "outside 0 to 2"),
        ({"edges": [[-1, 0]]}, "outside 0 to 2"),
        ({"nodes": "no JSON"}, "must be a list of numbers in 'nodes', got no JSON"),
        ({"nodes": '{"a": 1}'}, "must be a list of numbers"),
        ({"nodes": "5"}, r"nodes are an array \[\], not \[n, 2\]"),
        ({"nodes": "[" * 100_000}, "must be a list of numbers"),
        ({"nodes": np.ones((3, 2), complex)}, "must be a list of numbers"),  # NumPy would drop the imaginary part
        ({"nodes": np.ones((3, 1, 2))}, r"nodes are an array \[3, 1, 2\], not \[n, 2\]"),
        ({"nodes": "[[null, 1]]"}, "not finite"),
        ({"edges": '{"a": 1}'}, "must be a list of numbers"),
        ({"edges": np.zeros((2, 3), int)}, r"edges are an array \[2, 3\], not pairs of nodes \[e, 2\]"),
        ({"edges": np.zeros(2, int)}, r"edges are an array \[2\], not pairs"),
        ({"edges": [[0, 1.9]]}, "outside 0 to 2"),
    ],
)
def test_graph_decode_rejects_invalid_graphs(changes, message):
    with pytest.raises(ValueError, match=message):
        MODALITY_TYPES["graph"].decode({"nodes": NODES, "edges": [], **changes}, GRAPH, None)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 1), (1, 1)])
def test_graph_decode_does_not_broadcast_a_matrix_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"not a matrix \[3, 3\]"):
        MODALITY_TYPES["graph"].decode({"nodes": NODES, "edges": np.ones(shape)}, {**GRAPH, "edges": "matrix"}, None)
