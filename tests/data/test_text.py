import json
import os
import random
import subprocess
import sys

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors

from mmfusion.data import text
from tests.errors import rejects

TEXTS = ["The red circle, the red square.", "the blue circle", "Is the square red?", "a green zebra"]


def vocabulary(tokenizer):
    return [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]


def test_word_vocabulary_is_ordered_by_frequency_then_code_point():
    tokenizer = text.train_tokenizer(TEXTS, "word", 10)
    assert vocabulary(tokenizer) == ["[PAD]", "[OOV]", "the", "red", "circle", "square", ",", ".", "?", "a"]


def test_word_tokenizer_handles_case_punctuation_and_unknown_words():
    tokenizer = text.train_tokenizer(TEXTS, "word", 7)  # the red circle square ,
    ids, mask = text.encode(tokenizer, ["THE circle,red", "unseen square", "the red red the circle the"], 5)
    np.testing.assert_array_equal(ids, [[2, 4, 6, 3, 0], [1, 5, 0, 0, 0], [2, 3, 3, 2, 4]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert (ids.dtype, mask.dtype) == (np.int32, bool)


@pytest.mark.parametrize("kind", list(text.TOKENIZERS))
def test_text_encode_of_empty_text_has_an_empty_mask(kind):
    ids, mask = text.encode(text.train_tokenizer(TEXTS, kind, 300), ["", "  \n ", "red"], 4)
    assert mask.any(axis=1).tolist() == [False, False, True]
    assert not ids[:2].any()


@pytest.mark.parametrize("kind", list(text.TOKENIZERS))
def test_text_encode_does_not_produce_special_tokens_from_text(kind):
    tokenizer = text.train_tokenizer([*TEXTS, "[PAD] [OOV]"] * 3, kind, 320)
    ids, mask = text.encode(tokenizer, ["red [PAD] [OOV] red"], 16)
    assert (ids[mask] != text.PAD).all()
    assert (ids[mask] != text.OOV).all()


@pytest.mark.parametrize("kind", list(text.TOKENIZERS))
def test_tokenizer_json_keeps_the_encoding(kind):
    tokenizer = text.train_tokenizer(TEXTS, kind, 300)
    restored = text.from_json(text.to_json(tokenizer))
    assert vocabulary(restored) == vocabulary(tokenizer)
    for one, other in zip(text.encode(tokenizer, TEXTS, 9), text.encode(restored, TEXTS, 9), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bpe_is_byte_level_without_oov_and_learns_merges():
    tokenizer = text.train_tokenizer(TEXTS * 5, "bpe", 280)
    ids, mask = text.encode(tokenizer, ["çédille 漢字 🙂"], 64)
    assert text.OOV not in ids
    symbols = "".join(tokenizer.id_to_token(int(i)) for i in ids[mask])
    assert len(symbols) == len(" çédille 漢字 🙂".encode())  # one symbol per byte
    _, merged = text.encode(tokenizer, ["the"], 8)
    assert merged.sum() == 1
    assert tokenizer.get_vocab_size() == 280
    assert vocabulary(tokenizer)[:2] == text.SPECIAL


@pytest.mark.process
def test_vocabulary_is_independent_of_order_and_process():
    script = (
        "import json, random, sys; from mmfusion.data import text\n"
        "texts = json.loads(sys.stdin.read()); random.shuffle(texts)\n"
        "print(json.dumps([text.to_json(text.train_tokenizer(texts, k, n)) for k, n in (('word', 40), ('bpe', 330))]))"
    )
    generator = random.Random(0)
    texts = ["".join(generator.choice("abc ") for _ in range(30)) for _ in range(200)]
    expected = [text.to_json(text.train_tokenizer(texts, kind, size)) for kind, size in (("word", 40), ("bpe", 330))]
    process = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert json.loads(process.stdout) == expected


def test_train_tokenizer_rejects_invalid_options():
    with rejects("tokenizer", "char", "word") as error:
        text.train_tokenizer(TEXTS, "char", 10)
    assert error.value.choices == ["bpe", "word"]
    with rejects("vocabulary_size", 100, says=258):
        text.train_tokenizer(TEXTS, "bpe", 100)
    with rejects("", says="tokenizer"):
        text.from_json("{}")


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red"]
VOCABULARY += ["circ", "##le", "is", "un", "##seen", ",", "?", "çe"]


@pytest.fixture
def bert(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return str(tmp_path / "vocab.txt")


def test_published_vocabulary_gives_the_ids_of_bert_tokenizer(bert):
    """The ids are those of BertTokenizerFast in transformers 5.23, complete and truncated to five tokens."""
    tokenizer = text.train_tokenizer(TEXTS, bert, 10)
    assert tokenizer.get_vocab_size() == len(VOCABULARY)
    sentences = ["The RED circle, is unseen?", "red", "zebra the circle is the red the", " "]
    ids, mask = text.encode(tokenizer, sentences, 12)
    complete = [[2, 5, 6, 7, 8, 12, 9, 10, 11, 13, 3], [2, 6, 3], [2, 1, 5, 7, 8, 9, 5, 6, 5, 3], []]
    assert [row[real].tolist() for row, real in zip(ids, mask, strict=True)] == complete
    ids, mask = text.encode(tokenizer, sentences, 5)
    truncated = [[2, 5, 6, 7, 3], [2, 6, 3], [2, 1, 5, 7, 3], []]
    assert [row[real].tolist() for row, real in zip(ids, mask, strict=True)] == truncated
    restored = text.from_json(text.to_json(tokenizer))
    np.testing.assert_array_equal(text.encode(restored, sentences, 5)[0], ids)


def test_cased_vocabulary_keeps_case(bert, tmp_path):
    (tmp_path / "cased.txt").write_text("\n".join([*VOCABULARY, "The"]))
    ids, _ = text.encode(text.from_file(str(tmp_path / "cased.txt")), ["The the RED"], 5)
    assert ids[0].tolist() == [2, len(VOCABULARY), 5, 1, 3]


def test_tokenizer_json_of_the_library_is_read(bert, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text.to_json(text.from_file(bert)))
    ids, _ = text.encode(text.train_tokenizer([], str(tmp_path / "tokenizer.json"), 3), ["the red"], 6)
    assert ids[0].tolist() == [2, 5, 6, 3, 0, 0]
    with_padding = text.from_file(bert)  # as published with sentence encoders
    with_padding.enable_padding(length=8)
    with_padding.enable_truncation(3)
    (tmp_path / "tokenizer.json").write_text(text.to_json(with_padding))
    ids, mask = text.encode(text.from_file(str(tmp_path / "tokenizer.json")), ["the red is red"], 8)
    assert ids[0][mask[0]].tolist() == [2, 5, 6, 9, 6, 3]


def test_tokenizer_without_end_token_truncates_the_end(bert, tmp_path):
    tokenizer = text.from_file(bert)
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    ids, _ = text.encode(tokenizer, ["the red is red the"], 3)
    assert ids[0].tolist() == [2, 5, 6]


def test_id_count_covers_the_highest_id_despite_gaps(bert):
    with_gaps = Tokenizer(models.WordLevel({"[OOV]": 0, "a": 7}, unk_token="[OOV]"))
    assert text.id_count(with_gaps) == 8
    assert text.id_count(text.from_file(bert)) == len(VOCABULARY)


def test_train_tokenizer_rejects_invalid_files(tmp_path):
    for name, content, fact in (("words.txt", "the\nred\n", "[CLS]"), ("broken.json", "{", "JSON")):
        (tmp_path / name).write_text(content)
        with rejects(tmp_path / name, says=fact):
            text.train_tokenizer([], str(tmp_path / name), 100)
    with rejects(tmp_path / "none.txt", says="cannot be read"):
        text.from_file(str(tmp_path / "none.txt"))


def test_text_augment_drops_tokens_at_the_rate_per_row():
    ids = np.arange(2, 202, dtype=np.int32).reshape(1, 200).repeat(20, 0)
    keys = jax.random.split(jax.random.key(0), 20)
    dropped = np.asarray(text.augment(ids, keys, {"drop": 0.3}))
    assert (dropped == text.OOV).mean() == pytest.approx(0.3, abs=0.03)
    np.testing.assert_array_equal(dropped[dropped != text.OOV], ids[dropped != text.OOV])
    assert len({row.tobytes() for row in dropped}) == 20
    np.testing.assert_array_equal(text.augment(ids[3:5], keys[3:5], {"drop": 0.3}), dropped[3:5])
    assert text.augment(ids, keys, {"drop": 0.0}) is ids


def test_text_refuses_bytes_that_are_no_text():
    tokenizer = text.train_tokenizer(["a cat"], "word", 10)
    options = {**text.TYPE.options, "length": 4}
    assert text.TYPE.decode("a cät".encode(), options, tokenizer)[1].sum() == 2
    for data in (b"\x89PNG\r\n\x1a\n", "café".encode("latin-1")):
        with pytest.raises(ValueError, match="not text in UTF-8"):
            text.TYPE.decode(data, options, tokenizer)


@pytest.mark.parametrize("missing", [None, "", " ", float("nan"), np.float32("nan"), np.float64("nan")])
def test_text_that_is_missing_is_absent(missing):
    fitted = text.TYPE.load(text.TYPE.fit(["a nan cat", missing], text.OPTIONS))
    assert text.TYPE.decode(missing, text.OPTIONS, fitted) is None
    assert text.TYPE.decode("nan", text.OPTIONS, fitted) is not None
