"""The regular expressions of a tokenizer.json that both runtimes take: of equal meaning in each, and of bounded work.

`tokenizers` matches with Oniguruma, the C++ runtime with PCRE2. What the two read differently is refused (anchors,
\\w, \\h, \\v, POSIX classes, lazy repetition), and so is what can take more than linear time in the length of a text,
since Oniguruma cannot be stopped. A pattern is therefore a list of alternatives without nested repetition. An
alternative that goes on after an unbounded repetition may fail there and give back what it has read; it must be
followed by one that begins in the same way, so that the text is read all the same: `\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`.

`runtime/src/tokenizer/pattern.cpp` is the same in C++.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass

from chameleon_deploy.errors import ManifestError

MAX_LENGTH = 1024  # characters of a pattern
MAX_GROUP = 3  # repetitions of a group: PCRE2 copies it
MAX_WAYS = 1000  # in which the bounded part of an alternative can match at one place
UNBOUNDED = 2**32
CATEGORIES = frozenset(
    ["L", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "Mn", "Mc", "Me", "N", "Nd", "Nl", "No", "P", "Pc", "Pd", "Ps", "Pe", "Pi",
     "Pf", "Po", "S", "Sm", "Sc", "Sk", "So", "Z", "Zs", "Zl", "Zp", "C", "Cc", "Cf", "Co", "Cn"]
)  # fmt: skip
SCRIPTS = frozenset(
    ["Arabic", "Cyrillic", "Devanagari", "Greek", "Han", "Hangul", "Hiragana", "Katakana", "Latin", "Thai"]
)
_CONTROLS = {"r": "\r", "n": "\n", "t": "\t", "f": "\f"}
# Where case is ignored: escapes, and letters of which Oniguruma takes two for one character, as in U+00DF.
_FOLDS = ("\\", "ff", "fi", "fl", "ss", "st")


@dataclass(frozen=True)
class _Item:
    """A part of an alternative.

    atom      what is repeated, as it stands in the pattern; compared by the text
    least     repetitions, at least
    most      repetitions, at most
    ways      in which it can match at one place, if most is bounded
    is_ahead  whether it only looks ahead, and so reads nothing
    """

    atom: str
    least: int
    most: int
    ways: int
    is_ahead: bool = False

    @property
    def is_obligatory(self) -> bool:
        return self.is_ahead or self.least > 0


def pattern_fault(pattern: str) -> str | None:
    """Return why a regular expression is not taken, or None."""
    try:
        _Pattern(pattern).check()
    except ManifestError as error:
        return str(error)
    return None


class _Pattern:
    """A reader of one pattern, from the left. Raises ManifestError where it is not taken."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def check(self) -> None:
        if len(self.text) > MAX_LENGTH:
            raise self.fault(f"is longer than {MAX_LENGTH} characters")
        alternatives = self.alternatives(is_group=False, ignores_case=False)
        if self.at < len(self.text):
            raise self.fault("has a parenthesis too many")
        for alternative, following in zip(alternatives, [*alternatives[1:], []], strict=True):
            if not any(item.is_obligatory and not item.is_ahead for item in alternative):
                raise self.fault("matches the empty text")
            _check_work(self, alternative, following)

    def fault(self, problem: str) -> ManifestError:
        return ManifestError(f"pattern {self.text!r:.200} {problem} at character {self.at}")

    def peek(self, text: str) -> bool:
        return self.text.startswith(text, self.at)

    def take(self, text: str) -> bool:
        """Move over a text if it stands here."""
        found = self.peek(text)
        self.at += len(text) if found else 0
        return found

    def character(self) -> str:
        """Return the next character and move over it."""
        if self.at >= len(self.text):
            raise self.fault("ends too early")
        self.at += 1
        return self.text[self.at - 1]

    def alternatives(self, is_group: bool, ignores_case: bool) -> list[list[_Item]]:
        alternatives: list[list[_Item]] = [[]]
        while self.at < len(self.text) and not self.peek(")"):
            if self.take("|"):
                alternatives.append([])
            else:
                alternatives[-1].append(self.item(is_group, ignores_case))
        if not all(alternatives):
            raise self.fault("has an empty alternative")
        for items in alternatives:
            if _ways(items) > MAX_WAYS:
                raise self.fault(f"has an alternative that can match in more than {MAX_WAYS} ways")
            letters = "".join(item.atom for item in items).lower()
            if ignores_case and (not letters.isascii() or any(part in letters for part in _FOLDS)):
                raise self.fault("ignores case where one letter can mean two")
        return alternatives

    def item(self, is_group: bool, ignores_case: bool) -> _Item:
        start, ways = self.at, 1
        for ahead in ("(?!", "(?="):
            if not is_group and self.take(ahead):
                self.single()
                if not self.take(")"):
                    raise self.fault("looks ahead at more than one character")
                if self.at < len(self.text) and not self.peek("|"):
                    raise self.fault("goes on after looking ahead")
                return _Item(self.text[start : self.at], 1, 1, 1, is_ahead=True)
        if self.take("("):
            if is_group:
                raise self.fault("has a group in a group")
            caseless = self.take("?i:")
            if not caseless and not self.take("?:") and self.peek("?"):
                raise self.fault("has an unknown kind of group")
            group = self.alternatives(is_group=True, ignores_case=caseless)
            if not self.take(")"):
                raise self.fault("has an open group")
            ways = sum(map(_ways, group))
        else:
            self.single()
        atom = self.text[start : self.at]
        least, most = self.repetition()
        if most > MAX_GROUP and (is_group or atom.startswith("(")):
            raise self.fault(f"repeats a group, or in a group, more than {MAX_GROUP} times")
        return _Item(atom, least, most, 1 if most == UNBOUNDED else (most - least + 1) * ways**most)

    def repetition(self) -> tuple[int, int]:
        least, most = 1, 1
        if self.take("{"):
            least = self.number()
            most = least
            if self.take(","):
                most = UNBOUNDED if self.peek("}") else self.number()
            if not self.take("}") or most < 1 or least > most:
                raise self.fault("has an unknown repetition")
        else:
            for sign, bounds in (("?", (0, 1)), ("*", (0, UNBOUNDED)), ("+", (1, UNBOUNDED))):
                if self.take(sign):
                    least, most = bounds
                    self.take("+")  # possessive
                    break
        if self.at < len(self.text) and self.text[self.at] in "?*+{":
            raise self.fault("repeats a repetition, or is lazy")
        return least, most

    def number(self) -> int:
        digits = ""
        while self.at < len(self.text) and self.text[self.at] in string.digits:
            digits += self.character()
        if not 1 <= len(digits) <= 4:
            raise self.fault("has an unknown repetition")
        return int(digits)

    def single(self) -> None:
        """Read what matches one character: a character, an escape or a class."""
        if self.take("["):
            self.members()
        elif self.take("\\"):
            self.escape()
        elif (character := self.character()) in "^$|?*+(){}]":
            self.at -= 1
            raise self.fault(f"has {character!r}, which is not taken here,")

    def escape(self) -> str | None:
        """Return the character that an escape means, or None for one that means several."""
        kind = self.character()
        if kind in _CONTROLS:
            return _CONTROLS[kind]
        if kind in string.punctuation:
            return kind
        if kind in "sSdD":
            return None
        if kind == "u":
            return self.code_point(4, 4)
        if kind == "x" and self.take("{"):
            character = self.code_point(1, 6)
            if not self.take("}"):
                raise self.fault("has an unknown escape")
            return character
        if kind in "pP" and self.take("{"):
            end = self.text.find("}", self.at)
            name = self.text[self.at : end] if end >= 0 else ""
            if name not in CATEGORIES and name not in SCRIPTS:
                raise self.fault("has an unknown property")
            self.at = end + 1
            return None
        raise self.fault("has an unknown escape")

    def code_point(self, least: int, most: int) -> str:
        digits = ""
        while len(digits) < most and self.at < len(self.text) and self.text[self.at] in string.hexdigits:
            digits += self.character()
        value = int(digits, 16) if len(digits) >= least else -1
        if not 0 <= value < 0x110000 or 0xD800 <= value < 0xE000:
            raise self.fault("has an unknown escape")
        return chr(value)

    def members(self, is_nested: bool = False) -> None:
        """Read a class after its bracket."""
        self.take("^")
        is_empty = True
        while not self.take("]"):
            if self.take("&&"):
                if is_empty:
                    raise self.fault("has an empty class")
                is_empty = True
            elif self.peek("[:"):
                raise self.fault("has a POSIX class")
            elif self.take("["):
                if is_nested:
                    raise self.fault("has a class in a class in a class")
                self.members(is_nested=True)
                is_empty = False
            else:
                first = self.member()
                if self.peek("-") and not self.peek("-]"):
                    self.at += 1
                    last = None if self.peek("[") else self.member()
                    if first is None or last is None or first > last:
                        raise self.fault("has an unknown range")
                is_empty = False
        if is_empty:
            raise self.fault("has an empty class")

    def member(self) -> str | None:
        character = self.character()
        return self.escape() if character == "\\" else character


def _check_work(pattern: _Pattern, alternative: list[_Item], following: list[_Item]) -> None:
    """Require that an alternative that may give back an unbounded repetition is followed by one that begins so too."""
    first = _first_unbounded(alternative)
    obligatory = [i for i in range(first + 1, len(alternative)) if alternative[i].is_obligatory]
    if not obligatory:
        return
    if obligatory != [first + 1]:
        raise pattern.fault("can match an unbounded repetition in several ways")
    again = _first_unbounded(following)
    same_start = again == first < len(following) and alternative[:first] == following[:first]
    if not same_start or alternative[first].atom != following[first].atom:
        raise pattern.fault("has an alternative that goes on after an unbounded repetition, and none like it follows,")


def _ways(items: list[_Item]) -> int:
    return math.prod(item.ways for item in items)


def _first_unbounded(alternative: list[_Item]) -> int:
    return next((i for i, item in enumerate(alternative) if item.most == UNBOUNDED), len(alternative))
