import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from mmfusion.data import text
from mmfusion.errors import UserError

TEXTS = ["The red circle, the red square.", "the blue circle", "Is the square red?", "a green zebra"]


def words(tokenizer):
    return [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]


def test_word_vocabulary_is_by_frequency_then_code_point():
    tokenizer = text.train_tokenizer(TEXTS, "word", 10)
    assert words(tokenizer) == ["[PAD]", "[OOV]", "the", "red", "circle", "square", ",", ".", "?", "a"]


def test_word_ids_mask_case_punctuation_and_unknown_words():
    tokenizer = text.train_tokenizer(TEXTS, "word", 7)  # the red circle square ,
    ids, mask = text.encode(tokenizer, ["THE circle,red", "unseen square", "the red red the circle the"], 5)
    np.testing.assert_array_equal(ids, [[2, 4, 6, 3, 0], [1, 5, 0, 0, 0], [2, 3, 3, 2, 4]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert (ids.dtype, mask.dtype) == (np.int32, bool)


@pytest.mark.parametrize("kind", list(text.TOKENIZERS))
def test_empty_text_has_an_empty_mask(kind):
    ids, mask = text.encode(text.train_tokenizer(TEXTS, kind, 300), ["", "  \n ", "red"], 4)
    assert mask.any(axis=1).tolist() == [False, False, True]
    assert not ids[:2].any()


@pytest.mark.parametrize("kind", list(text.TOKENIZERS))
def test_text_that_spells_padding_is_not_padding(kind):
    tokenizer = text.train_tokenizer([*TEXTS, "[PAD] [OOV]"] * 3, kind, 320)
    ids, mask = text.encode(tokenizer, ["red [PAD] [OOV] red"], 16)
    assert (ids[mask] != text.PAD).all()
    assert (ids[mask] != text.OOV).all()


@pytest.mark.parametrize("kind", list(text.TOKENIZERS))
def test_json_keeps_the_encoding(kind):
    tokenizer = text.train_tokenizer(TEXTS, kind, 300)
    again = text.from_json(text.to_json(tokenizer))
    assert words(again) == words(tokenizer)
    for one, other in zip(text.encode(tokenizer, TEXTS, 9), text.encode(again, TEXTS, 9), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bpe_is_byte_level_without_unknown_words_and_learns_merges():
    tokenizer = text.train_tokenizer(TEXTS * 5, "bpe", 280)
    ids, mask = text.encode(tokenizer, ["çédille 漢字 🙂"], 64)
    assert text.OOV not in ids
    spelled = "".join(tokenizer.id_to_token(int(i)) for i in ids[mask])
    assert len(spelled) == len(" çédille 漢字 🙂".encode())  # one symbol a byte
    _, merged = text.encode(tokenizer, ["the"], 8)
    assert merged.sum() == 1
    assert tokenizer.get_vocab_size() == 280
    assert words(tokenizer)[:2] == text.SPECIAL


def test_vocabulary_is_the_same_in_any_order_and_process():
    script = (
        "import json, random, sys; from mmfusion.data import text\n"
        "texts = json.loads(sys.stdin.read()); random.shuffle(texts)\n"
        "print(json.dumps([text.to_json(text.train_tokenizer(texts, k, n)) for k, n in (('word', 40), ('bpe', 330))]))"
    )
    draw = random.Random(0)
    texts = ["".join(draw.choice("abc ") for _ in range(30)) for _ in range(200)]
    here = [text.to_json(text.train_tokenizer(texts, kind, size)) for kind, size in (("word", 40), ("bpe", 330))]
    there = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert json.loads(there.stdout) == here


def test_wrong_options_are_the_users_error():
    with pytest.raises(UserError, match="word, bpe"):
        text.train_tokenizer(TEXTS, "char", 10)
    with pytest.raises(UserError, match="258"):
        text.train_tokenizer(TEXTS, "bpe", 100)
    with pytest.raises(UserError, match="tokenizer"):
        text.from_json("{}")
