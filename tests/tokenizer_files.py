"""Parts of tokenizer.json, and patterns of published ones, that both runtimes take or refuse."""

from __future__ import annotations

from typing import Any

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = (  # with possessive repetition
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIMI = r"[\p{Han}]+|[\p{Lu}\p{Lt}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lo}&&[^\p{Han}]]*|\p{N}{1,3}|\s+"
BLOOM = r" ?[^(\s|[.,!?…。\uff0c、।\u06d4،])]+"  # a class in a class
TAKEN = [GPT_2, LLAMA_3, GPT_4O, CL100K, DEEPSEEK, KIMI, BLOOM, r"a|b", r"[^\n]", r"\u0041\x{1F600}+", "(ab?){2}c",
         r"a.b+c|a.b+", r"[a&&b]", "[-a]", "[a-]", r"(?:ab|c)?d"]  # fmt: skip
HOSTILE = [
    "(a+)+b", "(a|a)*b", r"(a*)*", r"\s+$", "a+b", r"\s*[\r\n]+", "a*", "a+?b", "^a", r"(a)\1", "(?<=a)b", "(?i:ss)",
    r"(?i:\p{Lu})", r"\w+", r"\h", r"[[:alpha:]]+", "a{0,100}a{0,100}b", "", "a||b", "(", ")", "[", "[a", "\\",
    "[z-a]", "[]", "[a&&]", "[&&a]", r"\s*x|\s*", "a+b*c|a+", "a(?!bc)", "(?!a)b", r"\s+(?!\S)", "(?:(a))", "a" * 1025,
    "a{1,2}{3}", "a{,3}", "a{0}", "a{2,1}", "a{99999}", "(a){4}", r"\p{Foo}", r"\p{^L}", r"\x41", r"\x{110000}",
    r"\ud800", "[a-\\s]", "[[a[b]]]", "(?P<n>a)", "(?#c)", "a**", r"[\p{L}--]", r"\Aa", "(?>a)",
]  # fmt: skip
SPLIT = {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": False}
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}
TEXT, OTHER = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
TEMPLATE = {"type": "TemplateProcessing", "single": [TEXT], "pair": [TEXT, OTHER], "special_tokens": {}}
FIRST = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": True}
REFUSED: list[dict[str, Any]] = [
    {"normalizer": {"type": "NFD"}},
    {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 33}},
    {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}},
    {"normalizer": {"type": "Prepend", "prepend": "a" * 65}},
    {"normalizer": {"type": "Sequence", "normalizers": [REPLACE | {"content": "aaaa"}] * 4}},
    {"normalizer": REPLACE | {"pattern": {"String": ""}}},
    {"normalizer": REPLACE | {"pattern": {"String": "a", "Regex": "a"}}},
    {"normalizer": REPLACE | {"pattern": {"Regex": "a*"}}},
    {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
    {"pre_tokenizer": {"type": "Whitespace"}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}]}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": "Digits"}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, FIRST]}},
    {"pre_tokenizer": FIRST | {"replacement": "__"}},
    {"pre_tokenizer": FIRST, "normalizer": {"type": "NFC"}},
    {"pre_tokenizer": SPLIT | {"behavior": "isolated"}},
    {"post_processor": TEMPLATE | {"single": [TEXT, TEXT]}},
    {"post_processor": {"type": "Sequence", "processors": [TEMPLATE, TEMPLATE]}},  # `tokenizers` panics
    {"post_processor": {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}},
    {"decoder": None},
    {"decoder": {"type": "CTC"}},
    {"decoder": {"type": "Strip", "content": " ", "start": 0, "stop": 1}},
    {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]], "byte_fallback": False}},
    {"model__unk_token": "no token"},
    {"model__end_of_word_suffix": "</w>"},
    {"model__dropout": 0.1},
    {"model__vocab__!": 2},
    {"model__vocab__!": None},  # of which `tokenizers` panics
    {"added_tokens": [{"id": 9, "content": "new", "single_word": False, "lstrip": False, "rstrip": False,
                       "normalized": False, "special": False}]},
]  # fmt: skip
