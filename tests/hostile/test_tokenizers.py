"""Tokenizers whose tokens are random, whose work or output has no limit, or whose ids are in no table."""

import json
import os
import time

import numpy as np
import pytest
from tokenizers import Tokenizer

from mmfusion.data import text, tokenizer_files
from tests.errors import rejects
from tests.hostile.limits import within

WORDS = {"type": "WordLevel", "vocab": {"[PAD]": 0, "[UNK]": 1, "a": 2}, "unk_token": "[UNK]"}
PAIRS = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "dropout": None, "unk_token": "a"}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def tokenizer(**parts):
    """Returns a tokenizer of three words as JSON, with other parts."""
    none = dict.fromkeys(["truncation", "padding", "normalizer", "post_processor", "decoder"])
    base = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": WORDS}
    return json.dumps({**none, **base, **parts})


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*normalizers):
    return {"type": "Sequence", "normalizers": list(normalizers)}


def template(ids, name="X", tokens=1):
    pieces = [{"SpecialToken": {"id": name, "type_id": 0}}] * tokens
    special = {"X": {"id": "X", "ids": ids, "tokens": ["X"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": [*pieces, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
            "special_tokens": special}  # fmt: skip


CATASTROPHES = ("(a+)+b", "(a|a)*b", "(?:a*)*b", "a*a*b", "(a|a)(a|a)(a|a)b", "a?" * 9 + "a" * 9, r"(a)\1", "a{9999}",
                "(?:a{1,50}){1,50}", "a{1,9}{1,9}", "[b]|(?i:(a+)+)", "x" * 600, "(?<n>a)\\k<n>")  # fmt: skip
HOSTILE = {
    "dropout": tokenizer(model={**PAIRS, "dropout": 0.1}),
    "dropout of 1": tokenizer(model={**PAIRS, "dropout": 1}),
    "large id": tokenizer(model={**WORDS, "vocab": {**WORDS["vocab"], "b": 2**31 - 1}}),
    "id of 32 bits": tokenizer(model={**WORDS, "vocab": {**WORDS["vocab"], "b": 2**32 - 1}}),
    "id beyond the vocabulary": tokenizer(post_processor=template([10**9])),
    "id just beyond the vocabulary": tokenizer(post_processor=template([3])),
    "BERT's ids beyond": tokenizer(post_processor={"type": "BertProcessing", "sep": ["[SEP]", 9], "cls": ["[CLS]", 2]}),
    "many special tokens": tokenizer(post_processor=template([1] * 1000)),
    "repeated special tokens": tokenizer(post_processor=template([1], tokens=1000)),
    "a special token that is missing": tokenizer(post_processor=template([1], "Y")),
    "chained replacements": tokenizer(normalizer=sequence(*[replace({"String": "a"}, "a" * 10)] * 10)),
    "nested replacements": tokenizer(normalizer=sequence(sequence(replace({"Regex": "."}, "aaaa"), sequence()),
                                                         sequence(sequence(replace({"Regex": "."}, "aaaa"))))),
    "one replacement": tokenizer(normalizer=replace({"String": ""}, "a" * 10**6)),
    "prefixes": tokenizer(normalizer=sequence(*[{"type": "Prepend", "prepend": "a" * 10**6}] * 100)),
    "many normalizers": tokenizer(normalizer=sequence(*[{"type": "NFC"}] * 1000)),
    "no unknown token": tokenizer(model={**WORDS, "vocab": {"[PAD]": 0}}),
    "no vocabulary": tokenizer(model={**WORDS, "vocab": {}}),
    "negative id": tokenizer(model={**WORDS, "vocab": {"[UNK]": 0, "a": -1}}),
    "panic on opening": tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "//8="}),
    "panic on encoding": tokenizer(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "deep": tokenizer().replace('"normalizer": null', '"normalizer": ' + '{"a":' * 9000 + "1" + "}" * 9000),
    "not closed": "[" * 200_000,
    "a list": "[]",
    "regex in a normalizer": tokenizer(normalizer=sequence(replace({"Regex": "(a+)+b"}, "a"))),
    "regex in a decoder": tokenizer(decoder=replace({"Regex": "(a+)+b"}, "a")),
    **{f"regex {pattern[:20]}": tokenizer(pre_tokenizer=split(pattern)) for pattern in CATASTROPHES},
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_from_json_refuses_a_hostile_tokenizer(kind, capfd):
    with rejects("t.json", None), within(10):
        text.from_json(HOSTILE[kind], "t.json")
    assert capfd.readouterr().err == ""  # the library's panics print a trace


def test_from_file_refuses_other_files(tmp_path):
    (tmp_path / "large.json").touch()
    os.truncate(tmp_path / "large.json", 1 << 40)
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    for name in ("large.json", "pipe.json", "zero.txt", "bytes.json", "a\0b.json", "none.json"):
        with rejects(f"{tmp_path}/{name}", None), within(5):
            text.from_file(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    "pattern", [*tokenizer_files.PUBLISHED, GPT2, " {2,}", r"\s+", r"(?:ab)?c|\d{1,3}", r"\p{L}++|a+?"]
)
def test_from_json_accepts_published_patterns(pattern):
    assert text.from_json(tokenizer(pre_tokenizer=split(pattern))).encode("a b").ids


def test_hostile_patterns_take_exponential_time():
    opened = Tokenizer.from_str(tokenizer(pre_tokenizer=split(CATASTROPHES[0])))  # without our checks

    def seconds(length):
        start = time.perf_counter()
        opened.encode("a" * length + "c")
        return time.perf_counter() - start

    assert seconds(21) > 8 * seconds(14)  # which doubles with each character


def test_from_json_neither_pads_nor_truncates():
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "[PAD]"}  # fmt: skip
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    assert text.from_json(tokenizer(padding=padding, truncation=truncation)).encode("a a a").ids == [2, 2, 2]


def test_encode_gives_the_same_ids_again():
    opened = text.from_json(tokenizer(model={**PAIRS, "dropout": 0.0}, pre_tokenizer=None))
    first, _ = text.encode(opened, ["ab" * 20] * 50, 20)
    assert (first == 2).all() and np.array_equal(first, text.encode(opened, ["ab" * 20] * 50, 20)[0])


def test_encode_refuses_a_text_without_end(monkeypatch):
    monkeypatch.setattr(text, "TEXT_CHARACTERS", 100)
    opened = text.from_json(tokenizer())
    assert text.encode(opened, ["a " * 50], 4)[0].tolist() == [[2, 2, 2, 2]]
    with pytest.raises(ValueError, match="101 characters, more than 100"):
        text.encode(opened, ["a" * 101], 4)


def test_encode_refuses_what_the_tokenizer_does():
    words = {"type": "WordLevel", "vocab": {"a": 0, "A": 1, "b": 2, "é中": 3, "1": 4, ".": 5, "5": 6, "-": 7, "_x": 8},
             "unk_token": "[UNK]"}  # fmt: skip
    opened = text.from_json(tokenizer(model=words))
    with pytest.raises(ValueError, match=r"the tokenizer refuses it: .*UNK"):
        text.encode(opened, ["unknown"], 4)


def test_trained_tokenizers_pass_the_checks():
    for name in ("word", "bpe"):
        trained = text.train_tokenizer(["a b", "dropout Regex {a+}+"], name, 300)
        again = text.from_json(text.to_json(trained))
        assert text.to_json(again) == text.to_json(trained)
