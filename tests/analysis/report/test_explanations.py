"""Explanations of a trained run with an image, a text, a recording and a table: numbers, pages, and the demo's form."""

import dataclasses
import io
import json
import re
from base64 import b64decode

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from PIL import Image

from mmfusion.analysis.report import explanation_panels, prediction_form
from mmfusion.analysis.report.explanation_pages import Card, TaskCard, render, write_pages
from mmfusion.config import defaults
from mmfusion.data.batch import Batch
from mmfusion.data.decoding import Reader
from mmfusion.inference.explanations import Attribution, Explainer, Explanation, apply_with_layers, log_odds
from mmfusion.inference.trained_model import TrainedModel
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.fusion.concat import Concat
from mmfusion.models.model import FusionModel
from mmfusion.training.loop import train
from mmfusion.training.restore import open_run
from tests import planted
from tests.errors import rejects
from tests.models.encoder_cases import CASES, make

pytestmark = pytest.mark.usefixtures("traced_once")

FACTS = {"colour": ["red", "green", "blue"], "size": [1.0, 20.0, 300.0]}


def row(i, **changes):
    facts = {name: values[i % 3] for name, values in FACTS.items()}
    return planted.row(i, **facts, audio=planted.wav(0.1 + i / 50, 40 + 3 * i), **changes)


def make_config():
    result = planted.config(tasks="label+amount", steps=6).copy_and_resolve_references()
    with result.unlocked():
        result.data.modalities.facts = defaults.modality("table", "colour+size", categorical=("colour",))
        result.model.encoders.facts = defaults.encoder("facts", "table_mlp", hidden=(8,))
        result.data.targets.amount.scale = "standard"
    return result.lock()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        planted.plant(patch, train=[row(i) for i in range(20)], test=[row(i) for i in range(4)])
        train(make_config(), folder)
        return TrainedModel(open_run(folder, []))


def given(i, *absent):
    """Returns a row as a user has it, without some modalities."""
    raw = row(i)
    facts = {name: raw[name] for name in FACTS}
    values = {"image": raw["image"], "text": raw["text"], "audio": raw["audio"], "facts": facts}
    return {m: value for m, value in values.items() if m not in absent}


ROWS = [given(0), given(1, "image"), given(2, "text", "facts"), {"image": b"no image"}, given(4, "audio")]


@pytest.fixture(scope="module")
def explanations(model):
    return model.explain(ROWS)


@pytest.mark.loop
def test_explanations_sum_to_the_change_of_the_output(model, explanations):
    predicted = model.predict(ROWS, calibrated=False)
    for i, found in enumerate(explanations):
        if i == 3:
            assert "not an image" in found.error and not found.tasks
            continue
        for attribution in found.tasks.values():
            change = attribution.value - attribution.baseline
            assert attribution.gap < 0.01 * max(abs(change), 1)
            assert abs(sum(map(attribution.total, attribution.modalities)) - change) < attribution.gap + 1e-5
        top = predicted.tasks["label"].probabilities[i].max()
        assert found.tasks["label"].output == predicted.tasks["label"].labels[i]
        assert found.tasks["label"].value == pytest.approx(np.log(top / (1 - top)), abs=1e-4)
        assert found.tasks["amount"].value == pytest.approx(predicted.tasks["amount"].values[i], abs=1e-4)
        assert found.tasks["amount"].output == "amount"


@pytest.mark.loop
def test_explanations_leave_out_absent_modalities_and_padding(explanations):
    full = explanations[0].tasks["label"].modalities
    assert {m: share.shape for m, share in full.items()} == {
        "image": (8, 8), "text": (6,), "audio": (10, 8), "facts": (2,)
    }  # fmt: skip
    assert all(share.any() for share in full.values()) and explanations[0].unattributed == ()
    assert full["text"][:3].all() and not full["text"][3:].any()  # three words
    assert full["audio"][:4].any() and not full["audio"][4:].any()  # 40 samples, four frames
    assert set(explanations[1].tasks["label"].modalities) == {"text", "audio", "facts"}
    assert set(explanations[2].tasks["amount"].modalities) == {"image", "audio"}


@pytest.mark.thorough
@pytest.mark.loop
def test_explanations_do_not_depend_on_the_batch_size(model, explanations):
    for found, alone in zip(explanations, Explainer(model._run).explain(ROWS, batch_size=2), strict=True):
        assert found.error == alone.error and found.tasks.keys() == alone.tasks.keys()
        for task, attribution in found.tasks.items():
            for m, share in attribution.modalities.items():
                np.testing.assert_allclose(share, alone.tasks[task].modalities[m], rtol=1e-3, atol=1e-5)
    assert model.explain([]) == []


@pytest.mark.loop
def test_pages_have_the_numbers_of_their_rows(model, explanations, tmp_path):
    rows = {7 + i: values for i, values in enumerate(ROWS)}
    write_pages(model, rows, tmp_path, tmp_path / "out", "--explain", "a<b>.csv", 9)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    pages = {f"row_{n:05d}.html" for n in rows}
    arrays = {f"row_{n:05d}.npz" for n in rows if n != 10}  # row 10 cannot be read
    assert names == pages | arrays | {"index.html", "explanations.json"}
    index = (tmp_path / "out" / "index.html").read_text()
    assert "The first 5 of 9 predicted rows" in index and "a&lt;b&gt;.csv" in index and "a<b>" not in index
    assert all(f'href="{page}"' in index for page in pages)
    assert "not an image" in (tmp_path / "out" / "row_00010.html").read_text()
    for page in pages:  # they load nothing
        assert not re.search(r'(src|href)="(?!data:|index\.html|row_\d)', (tmp_path / "out" / page).read_text())
    with np.load(tmp_path / "out" / "row_00007.npz") as saved:
        for m, share in explanations[0].tasks["label"].modalities.items():
            np.testing.assert_allclose(saved[f"attribution/label/{m}"], share, rtol=1e-3, atol=1e-5)
            np.testing.assert_array_equal(saved[f"input/{m}"], explanations[0].inputs[m])
    summary = json.loads((tmp_path / "out" / "explanations.json").read_text())
    assert [entry["row"] for entry in summary] == list(rows) and summary[3]["tasks"] == {}
    words = summary[0]["tasks"]["label"]["words"]["text"]
    assert [word for word, _ in words] == ["row", "0", "number0"]
    np.testing.assert_allclose([x for _, x in words], explanations[0].tasks["label"].modalities["text"][:3], rtol=1e-3)
    assert {label for label, _ in summary[0]["tasks"]["amount"]["columns"]["facts"]} == {"colour = red", "size = 1"}
    with rejects("--explain", None, says="exists"):
        write_pages(model, rows, tmp_path, tmp_path / "out", "--explain", "", 9)


@pytest.mark.loop
def test_pages_are_written_whole_or_not_at_all(model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with rejects("--explain", None, says="No space left"):
        write_pages(model, {0: ROWS[0]}, tmp_path, tmp_path / "out", "--explain", "", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.loop
def test_form_has_an_input_per_modality_and_answers_with_what_is_left_empty(model, tmp_path):
    inputs = prediction_form.fields(model.reader)
    assert [(field.label, field.form) for field in inputs] == [
        ("audio", "audio"), ("facts: colour", "choice"), ("facts: size", "number"), ("image", "image"), ("text", "text")
    ]  # fmt: skip
    assert set(inputs[1].choices) == set(FACTS["colour"])
    (tmp_path / "a.png").write_bytes(ROWS[0]["image"])
    values = [None, "red", 20.0, str(tmp_path / "a.png"), "row 1 <b>"]
    facts = {"colour": "red", "size": 20.0}
    expected = {"image": str(tmp_path / "a.png"), "text": "row 1 <b>", "audio": "", "facts": facts}
    assert prediction_form.row_of(inputs, values) == expected
    first, last = prediction_form.answers(model, inputs, values, True)
    predicted = model.predict([expected]).tasks["label"]
    for html in (first, last):
        assert f"label: {predicted.labels[0]}" in html and f"{predicted.probabilities[0].max():.1%}" in html
    assert "being computed" in first and "log odds of" not in first
    assert "being computed" not in last and "log odds of" in last and "colour = red" in last
    assert last.count("absent") == 2  # the audio, in the panels of two tasks
    (only,) = prediction_form.answers(model, inputs, values, False)
    assert only == first.replace('<p class="note">The explanation is being computed …</p>', "")


@pytest.mark.loop
def test_form_answers_errors_in_one_line(model, tmp_path):
    inputs = prediction_form.fields(model.reader)
    (empty,) = prediction_form.answers(model, inputs, [None, None, None, None, ""], True)
    assert "every modality is absent" in empty
    (tmp_path / "a.png").write_bytes(b"no <image>")
    (damaged,) = prediction_form.answers(model, inputs, [None, None, None, str(tmp_path / "a.png"), ""], True)
    assert "not an image" in damaged and "failed" in damaged


def test_form_reads_arrays_and_several_features(tmp_path):
    modalities = {
        "vector": {"kind": "embedding", "feature": "v"},
        "graph": {"kind": "graph", "feature": "nodes+edges"},
        "views": {"kind": "images", "feature": "views", "count": 3},
        "facts": {"kind": "table", "feature": "day+point", "categorical": ()},
    }
    fitted = {"facts": {"day": {"mean": [0] * 7, "date": True}, "point": {"mean": [0, 0]}}}
    inputs = prediction_form.fields(Reader(modalities, {}, {}, fitted))
    assert [field.form for field in inputs] == ["array", "array", "array", "files", "text", "text"]
    np.save(tmp_path / "v.npy", np.arange(3.0))
    (tmp_path / "nodes.json").write_text("[[1, 2]]")
    values = [str(tmp_path / "v.npy"), str(tmp_path / "nodes.json"), None, [], "2024-05-31", ""]
    found = prediction_form.row_of(inputs, values)
    np.testing.assert_array_equal(found.pop("vector"), np.arange(3.0))
    assert found == {
        "graph": {"nodes": [[1, 2]], "edges": ""}, "views": "", "facts": {"day": "2024-05-31", "point": ""}
    }  # fmt: skip
    np.save(tmp_path / "v.npy", np.array([{}], object), allow_pickle=True)
    with rejects("vector", "v.npy", says=".npy file of numbers"):  # a pickle is not loaded
        prediction_form.row_of(inputs, values)


# Shapes of the layers that stand in for the inputs of `encoder_cases`: embeddings of ids, of the categorical column and
# of entities, and spectrograms. BERT's embeddings of positions and segments are not among them.
LAYERS = {
    "bow-mean": [(3, 6, 8)], "textcnn-max": [(3, 6, 4)], "rnn-lstm": [(3, 6, 4)], "transformer": [(3, 6, 8)],
    "bert-all": [(3, 6, 8)], "table_mlp": [(3, 8)], "ft_transformer": [(3, 1, 8)],
    "knowledge_attention": [(3, 5, 8), (3, 5, 8)], "logmel_cnn-layer": [(3, 20, 8)], "ast": [(3, 20, 8)],
    "waveform_cnn": [], "cnn-layer": [], "rnn-sequence": [], "gcn": [],
}  # fmt: skip


@pytest.mark.parametrize("case", LAYERS)
def test_layers_that_stand_in_for_an_input_are_found_in_each_encoder(case):
    name, options, (x, mask), _ = CASES[case]
    reads = ENCODERS[name].reads
    kind = reads if isinstance(reads, str) else reads[case.endswith("sequence")]
    model = FusionModel(encoders=FrozenDict({"m": make(name, options)}), fusion=Concat(width=8), tasks=(("t", 2),))
    batch = Batch({"m": x}, {"m": mask}, {"m": mask.any(axis=1)}, {}, np.ones(3, np.float32), np.arange(3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, train=False))
    _, layers = jax.eval_shape(lambda v: apply_with_layers(model, v, batch, {"m": kind}), variables)
    assert [layer.shape for layer in layers.values()] == LAYERS[case]
    assert list(layers) == [f"m/{i}" for i in range(len(layers))]


def test_log_odds_are_those_of_the_probability():
    logits = jnp.array([[1.0, 2.0, -1.0], [0.0, 0.5, 3.0]])
    p = jax.nn.softmax(logits)[jnp.arange(2), jnp.array([1, 0])]
    for shift in (0, 7):  # which changes no probability
        found = log_odds(logits + shift, jnp.array([1, 0]), "classification")
        np.testing.assert_allclose(found, jnp.log(p / (1 - p)), rtol=1e-5)
    np.testing.assert_allclose(log_odds(logits, jnp.array([1, 0]), "multilabel"), [2, 0])


def decoded(url):
    return np.asarray(Image.open(io.BytesIO(b64decode(url.partition(",")[2]))))


def explanation(**changes):
    """Returns an explanation of a 4 × 6 image and a text of three tokens, of which the last one is padding."""
    image = np.zeros((4, 6), np.float32)
    image[1, 2], image[3, 5] = 2, -2
    shares = {"image": image, "text": np.array([1, -0.5, 0], np.float32)}
    weights = np.zeros((3, 6), np.float32)
    weights[0, 4] = weights[1, 1] = 1  # each word attends to one cell of a 2 × 3 grid
    found = Explanation(
        inputs={"image": np.full((4, 6, 3), 128, np.uint8), "text": np.array([2, 3, 0])},
        masks={"image": np.ones(1, bool), "text": np.array([True, True, False])},
        tasks={"label": Attribution("yes", 1.0, 0.5, 0.0, shares)},
        attention={("text", "image"): weights},
    )
    return dataclasses.replace(found, **changes)


class Words:
    """A tokenizer of two words."""

    def id_to_token(self, i):
        return {2: "red", 3: "Ġdot"}[i]


def test_panels_colour_pixels_and_words_by_sign_and_show_attention():
    found = explanation()
    attribution = found.tasks["label"]
    panel = explanation_panels.panel(found, attribution, "image", {"kind": "image"}, None)
    assert [picture.caption for picture in panel.pictures] == ["input", "attribution", "attention"]
    overlay = decoded(panel.pictures[1].overlay)  # [H, W, RGBA]
    assert overlay.shape == (4, 6, 4) and (overlay[..., 3] > 0).sum() == 2
    assert tuple(overlay[1, 2, :3]) == explanation_panels.SUPPORTS and overlay[1, 2, 3] > 200
    assert tuple(overlay[3, 5, :3]) == explanation_panels.OPPOSES and overlay[3, 5, 3] > 200
    heat = decoded(panel.pictures[2].overlay)[..., 3]
    assert (heat[:, 2:4] == heat.max()).all() and heat.max() > 150 and not heat[:, [0, 5]].any()  # the middle column
    panel = explanation_panels.panel(found, attribution, "text", {"kind": "text"}, Words())
    assert panel.words == (("red", 1.0, 1.0), ("dot", -0.5, -0.5)) and panel.total == "+0.5"
    first, second = (decoded(picture.overlay)[..., 3] for picture in panel.maps)
    assert [picture.caption for picture in panel.maps] == ["red", "dot"]
    assert panel.shows_attention and not explanation_panels.Panel("x").shows_attention
    assert first[3, 2:4].max() == first.max() and second[0, 2:4].max() == second.max()


def test_panels_average_large_images_and_keep_what_is_averaged():
    share = np.zeros((112, 112), np.float32)
    share[:2, :2] = 1
    found = explanation(inputs={"image": np.zeros((112, 112, 1), np.uint8)})
    panel = explanation_panels.panel(
        found, Attribution("", 0, 0, 0, {"image": share}), "image", {"kind": "image"}, None
    )
    overlay = decoded(panel.pictures[1].overlay)
    assert overlay.shape == (56, 56, 4) and (overlay[..., 3] > 0).sum() == 1 and "averaged" in panel.note


def test_panels_show_table_values_as_in_the_table_and_sum_vectors():
    fitted = {
        "colour": {"categories": ["red", "green"]}, "size": {"mean": [10.0], "std": [2.0]},
        "point": {"mean": [0.0, 0.0], "std": [1.0, 1.0]}, "age": {"mean": [0.0], "std": [1.0]},
    }  # fmt: skip
    found = Explanation({"t": np.array([2, 1.5, 0, 0, 0])}, {"t": np.array([1, 1, 1, 1, 0], bool)})
    shares = np.array([-3, 1, 0.5, 1.5, 0], np.float32)
    panel = explanation_panels.panel(found, Attribution("", 0, 0, 0, {"t": shares}), "t", {"kind": "table"}, fitted)
    assert [(bar.label, bar.text) for bar in panel.bars] == [
        ("colour = green", "-3"), ("point = vector of 2", "+2"), ("size = 13", "+1"), ("age = missing", "+0"),
    ]  # fmt: skip
    assert panel.bars[0].share == -1


def test_bars_beyond_the_largest_are_summed():
    bars = explanation_panels.bars([str(k) for k in range(30)], [1.0] * 29 + [5.0])
    assert len(bars) == explanation_panels.MAX_BARS and bars[0].label == "29"
    assert bars[-1].label == "15 others" and bars[-1].text == "+15"


def test_numbers_are_rounded_with_commas_and_signs():
    found = [explanation_panels.number(x, "+") for x in (0.0, -0.01234, 1.5, 999.6, -40449.0, 2e15)]
    assert found == ["+0", "-0.0123", "+1.5", "+1,000", "-40,400", "+2e+15"]
    assert explanation_panels.number(259_623.4, digits=5) == "259,620"
    assert [explanation_panels.number(x, digits=1) for x in (11.0, 0.0068)] == ["10", "0.007"]


def test_panels_say_what_is_absent_or_not_attributed():
    found = explanation()
    assert explanation_panels.panel(found, found.tasks["label"], "audio", {"kind": "audio"}, None).note == "absent"
    without = Attribution("", 0, 0, 0, {})
    assert "no embedding layer" in explanation_panels.panel(found, without, "text", {"kind": "text"}, None).note


def test_pages_escape_names_and_values():
    task = TaskCard("<task>", "<label>", (), (), "<b>")
    html = render(page="part", card=Card(None, (task,), ""), busy=False)
    assert "&lt;task&gt;: &lt;label&gt;" in html and "<task>" not in html
