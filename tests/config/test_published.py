"""Text encoders with published weights: what a config takes from the files of a model, and what it warns of."""

import json

import numpy as np
import pytest
import requests

from mmfusion.config import published
from mmfusion.data import text
from mmfusion.models.pretrained import sources
from mmfusion.training.restore import open_run
from mmfusion.training.train import train
from tests import tiny
from tests.errors import rejects
from tests.models.test_text_towers import folder_of, tensors_of

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "red", "blue", "caf", "##e", "##é"]


@pytest.fixture(autouse=True)
def reports_again():
    published._report.cache_clear()


@pytest.fixture
def folder(tmp_path):
    """Returns the folder of a small XLM-RoBERTa with the tokenizer of a BERT."""
    result = folder_of("xlm-roberta", tmp_path / "model")
    write_vocabulary(tmp_path / "model" / "vocab.txt")
    return result


def write_vocabulary(path, words=VOCABULARY):
    path.write_text("\n".join(words) + "\n")
    return str(path)


def adopted(init, **changes):
    config = tiny.config(changes={"model.encoders.text.init": init, **changes})
    published.adopt(config)
    return config


def test_adopt_takes_the_encoder_its_sizes_and_its_tokenizer_from_the_folder(folder, capsys):
    config = adopted(folder)
    section = config.model.encoders.text
    expected = {
        "name": "roberta", "layers": 2, "hidden": 16, "heads": 4, "mlp": 24, "positions": 12, "embeddings": 30,
        "segments": 1, "offset": 2, "epsilon": 1e-5, "activation": "gelu", "init": folder,
    }  # fmt: skip
    assert {key: section[key] for key in expected} == expected
    assert config.data.modalities.text.tokenizer == f"{folder}/vocab.txt"
    line = capsys.readouterr().err
    assert line.startswith(f"init   text: {folder} sets name=roberta, layers=2") and line.count("\n") == 1
    published.adopt(config)
    assert capsys.readouterr().err == ""
    (sources.Path(folder) / "tokenizer.json").write_text(text.to_json(text.from_file(f"{folder}/vocab.txt")))
    assert adopted(folder).data.modalities.text.tokenizer == f"{folder}/tokenizer.json"


def test_adopt_warns_of_options_that_the_weights_contradict(folder, capsys):
    config = adopted(folder)
    capsys.readouterr()
    with config.unlocked():
        config.model.encoders.text.update(heads=2, epsilon=1e-6)
    published.adopt(config)
    assert (config.model.encoders.text.heads, config.model.encoders.text.epsilon) == (2, 1e-6)
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "warning: config.model.encoders.text.epsilon=1e-06: the weights were trained with 1e-05",
        "warning: config.model.encoders.text.heads=2: the weights were trained with 4",
    ]


def test_adopt_warns_of_another_tokenizer_and_of_another_case(folder, tmp_path, capsys):
    same = write_vocabulary(tmp_path / "copy.txt")
    cased = text.to_json(text.from_file(same)).replace('"lowercase":true', '"lowercase":false')
    (tmp_path / "cased.json").write_text(cased)
    fewer = write_vocabulary(tmp_path / "fewer.txt", VOCABULARY[:-1])
    for tokenizer, warned in ((same, 0), (str(tmp_path / "cased.json"), 1), (fewer, 1), ("bpe", 1)):
        config = adopted(folder, **{"data.modalities.text.tokenizer": tokenizer})
        warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
        assert config.data.modalities.text.tokenizer == tokenizer
        assert len(warnings) == warned, tokenizer
        assert all(line.endswith(f"set {folder}/vocab.txt") for line in warnings)


def test_adopt_reads_a_model_of_the_hub_from_the_folder_of_downloads(tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(requests, "get", lambda *_, **__: pytest.fail("no network"))
    model = home / ".cache" / "mmfusion" / "hub" / "owner" / "name"
    model.mkdir(parents=True)
    folder_of("bert", model)
    (model / "tokenizer.json").write_text(text.to_json(text.from_file(write_vocabulary(tmp_path / "vocab.txt"))))
    config = adopted("owner/name")
    assert config.model.encoders.text.name == "bert"
    assert config.data.modalities.text.tokenizer == "~/.cache/mmfusion/hub/owner/name/tokenizer.json"
    assert text.from_file(config.data.modalities.text.tokenizer).get_vocab_size() == len(VOCABULARY)


def test_adopt_leaves_other_sources_alone(tmp_path):
    folder_of("bert", tmp_path)
    for init in ("", str(tmp_path / "model.safetensors"), str(tmp_path / "nothing"), "run:elsewhere"):
        config = tiny.config(changes={"model.encoders.text.init": init})
        before = config.copy_and_resolve_references()
        published.adopt(config)
        assert config == before
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')  # as timm writes it
    assert adopted(str(tmp_path)).model.encoders.text.name == "bow"
    config = tiny.config(changes={"model.encoders.image.init": str(tmp_path)})
    folder_of("bert", tmp_path)
    published.adopt(config)
    assert config.model.encoders.image.name == "cnn"


@pytest.mark.parametrize(
    ("case", "changes", "fact"),
    [
        ("bert", {"model_type": "mpnet"}, "bert, roberta"),
        ("bert", {"hidden_size": 1e9}, "hidden_size"),
        ("bert", {"num_hidden_layers": True}, "num_hidden_layers"),
        ("bert", {"vocab_size": 1 << 40}, "vocab_size"),
        ("bert", {"layer_norm_eps": "small"}, "layer_norm_eps"),
        ("bert", {"hidden_act": "mish"}, "gelu_new"),
        ("bert", {"position_embedding_type": "relative_key"}, "absolute"),
        ("bert", {"is_decoder": True}, "encoders"),
        ("roberta", {"max_position_embeddings": 2}, "max_position_embeddings"),
        ("modernbert", {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, "layer_types"),
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type"),
        ("modernbert", {"rope_parameters": 3}, "config.json"),
    ],
)
def test_adopt_rejects_a_config_json_of_another_architecture(case, changes, fact, tmp_path):
    init = folder_of(case, tmp_path, **changes)
    with rejects("init", init, says=fact):
        adopted(init)


def test_adopt_reads_the_keys_of_modernbert_of_transformers_4(tmp_path):
    init = folder_of("modernbert", tmp_path)
    now = adopted(init).model.encoders.text
    values = json.loads((tmp_path / "config.json").read_text())
    for key in ("layer_types", "rope_parameters"):
        del values[key]
    values |= {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert adopted(init).model.encoders.text == now
    assert (now.every, now.window, now.theta, now.local_theta) == (3, 6, 160000.0, 10000.0)


@pytest.mark.thorough
@pytest.mark.loop
def test_training_with_init_alone_uses_the_published_encoder(folder, tmp_path):
    one_step = {"steps": 1, "eval_every": 1, "checkpoint_every": 1}
    changes = {"model.encoders.text.init": folder, "model.encoders.text.freeze": 1, **one_step}
    train(tiny.config("modalities=text,fusion=mean"), tmp_path / "run", changes=changes)
    run = open_run(tmp_path / "run", [])
    params = run.state.params["encoders_text"]
    tensors = tensors_of("xlm-roberta")
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors["roberta.embeddings.word_embeddings.weight"])
    np.testing.assert_array_equal(
        params["block1"]["mlp_out"]["kernel"], tensors["roberta.encoder.layer.1.output.dense.weight"].T
    )
    assert "[CLS]" in run.dataset.fitted["text"]
