"""Opens tokenizers of the tokenizers library from files that may be hostile: random, endless, or of a huge vocabulary.

Its library matches regular expressions by backtracking, applies every normalizer to the output of the one before, and
gives the ids that the file says.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from mmfusion.errors import UserError, one_line

CHARACTERS = 128 << 20  # of a file; the largest published ones have 40 million
IDS = 1 << 21  # the largest published vocabularies have 300,000
SPECIAL_TOKENS = 64  # that are added to each text
NORMALIZERS = 32
GROWTH = 16.0  # characters that replacements may make of one
PROBES = ("a", "A b", "\u00e9\u4e2d 1.5\n\t-_x")  # texts that every tokenizer must take
QUANTIFIERS = 4  # in each alternative of a regular expression, of which one may be without a limit
GROUPS = 2  # in each alternative
PATTERN_CHARACTERS = 500
REPEATS = 100  # limit of n and m in {n,m}
# Alternatives with several open-ended repeats, in tokenizers of OpenAI (cl100k, o200k), Llama 3 and Qwen 2.
_CASED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PUBLISHED = (
    rf"{_CASED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",
    rf"{_CASED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CASED}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CASED}?|"
    rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}",
)
# Classes, escapes, repeats and other characters of a regular expression.
TOKENS = re.compile(r"\\[pP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]|\{\d*(?:,\d*)?\}|.", re.DOTALL)


def open_tokenizer(text: str, path: str) -> Tokenizer:
    """Returns the tokenizer of a JSON string; it neither pads nor truncates.

    Args:
      text: the JSON of the tokenizers library.
      path: where it is from, for errors.

    Raises:
      UserError: another format, or a tokenizer whose tokens would be random, or whose work or ids have no limit.
    """
    try:
        if len(text) > CHARACTERS:
            raise ValueError(f"it has {len(text):,} characters, more than {CHARACTERS:,}")
        spec = json.loads(text)
        if not isinstance(spec, dict):
            raise ValueError("it holds no object")
        _check_nodes(spec)
        growth, count = _growth(spec.get("normalizer"))
        if growth > GROWTH or count > NORMALIZERS:
            raise ValueError(f"its {count} normalizers may make {growth:.3g} characters of one, more than {GROWTH:g}")
        with _quiet():
            tokenizer = Tokenizer.from_str(text)
            tokenizer.no_padding()
            tokenizer.no_truncation()
            _check_ids(tokenizer)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the Rust library raises a bare Exception, and panics with a BaseException
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        message = f"the tokenizer cannot be used: {reason}; it must be JSON of the tokenizers library"
        raise UserError(message, path=path) from error
    return tokenizer


def id_count(tokenizer: Tokenizer) -> int:
    """Returns the size of the embedding table that the tokenizer needs: its highest id plus one."""
    return max(tokenizer.get_vocab().values()) + 1


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the library writes to standard error as it panics; the exception has the reason, too."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _check_ids(tokenizer: Tokenizer) -> None:
    """Raises ValueError unless all ids are in an embedding table of a size that fits the vocabulary."""
    tokens = tokenizer.get_vocab_size()
    if not tokens:
        raise ValueError("its vocabulary is empty")
    count = id_count(tokenizer)
    if count > min(IDS, 2 * tokens + 1000):
        raise ValueError(f"it has {tokens:,} tokens, and ids up to {count - 1:,}")
    if tokenizer.num_special_tokens_to_add(is_pair=False) > SPECIAL_TOKENS:
        raise ValueError(f"it adds more than {SPECIAL_TOKENS} tokens to each text")
    for probe in PROBES:
        ids = tokenizer.encode(probe).ids
        if max(ids, default=0) >= count:
            raise ValueError(f"it gives the id {max(ids):,}, beyond its vocabulary of {count:,}")


def _check_nodes(value: Any) -> None:
    """Raises ValueError for a dropout and for a regular expression that may take forever, anywhere in the file."""
    if isinstance(value, Mapping):
        if isinstance(value.get("dropout"), (int, float)) and value["dropout"] > 0 and "merges" in value:
            raise ValueError(f"its dropout of {value['dropout']} makes its tokens random; set it to null")
        if isinstance(value.get("Regex"), str):
            check_regex(value["Regex"])
    for inner in value.values() if isinstance(value, Mapping) else value:
        if isinstance(inner, (dict, list)):
            _check_nodes(inner)


def check_regex(pattern: str) -> None:
    """Raises ValueError unless matching takes at most quadratic time: published, or without nested or many repeats."""
    if pattern in PUBLISHED:
        return
    reason = f"the regular expression {pattern[:60]!r} may take too long"
    if len(pattern) > PATTERN_CHARACTERS:
        raise ValueError(f"{reason}: it has {len(pattern):,} characters")
    depth = quantifiers = endless = groups = 0
    before = ""
    for token in TOKENS.findall(pattern):
        if token == "(":
            depth, groups = depth + 1, groups + 1
        elif token == ")":
            depth -= 1
        elif token == "|" and not depth:
            quantifiers = endless = groups = 0
        elif token[0] == "\\" and (token[1].isdigit() or token[1] in "kgK"):
            raise ValueError(f"{reason}: it refers to a group")
        elif token in ("*", "+", "?") or re.fullmatch(r"\{\d*(,\d*)?\}", token):
            if token in "?+" and before in ("*", "+", "?"):  # lazy or possessive
                before = ""
                continue
            if before == "(":  # (?: and others
                continue
            bounds = [int(number) for number in re.findall(r"\d+", token)]
            if (before == ")" and token != "?") or before in ("*", "+", "?") or before[:1] == "{":
                raise ValueError(f"{reason}: it repeats a repeat or a group")
            if max(bounds, default=0) > REPEATS:
                raise ValueError(f"{reason}: it repeats more than {REPEATS} times")
            quantifiers += 1
            endless += token in ("*", "+") or token.endswith(",}")
        if quantifiers > QUANTIFIERS or endless > 1 or groups > GROUPS:
            raise ValueError(f"{reason}: an alternative has several repeats without a limit, or many groups")
        before = token


def _growth(normalizer: Any) -> tuple[float, int]:
    """Returns how many characters a normalizer's replacements may make of one, and how many normalizers it has."""
    if not isinstance(normalizer, Mapping):
        return 1.0, 0
    kind = normalizer.get("type")
    if kind == "Sequence":
        parts = [_growth(part) for part in normalizer.get("normalizers") or ()]
        product = 1.0
        for growth, _ in parts:
            product = min(product * growth, 1e9)
        return product, sum(count for _, count in parts)
    if kind == "Replace":
        pattern = normalizer.get("pattern")
        literal = pattern.get("String", "") if isinstance(pattern, Mapping) else ""
        content = len(str(normalizer.get("content", "")))
        return max(1.0, content / len(literal) if literal else content + 1.0), 1
    if kind == "Prepend":
        return 1.0 + len(str(normalizer.get("prepend", ""))), 1
    return 1.0, 1  # of Unicode: applied again, it changes nothing
