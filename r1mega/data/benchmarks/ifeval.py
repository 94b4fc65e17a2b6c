"""IFEval: prompts with instructions that a program can verify (Zhou et al. 2023, arXiv 2311.07911)."""

from collections.abc import Mapping
from typing import Any, Final

from r1mega.data import fields
from r1mega.data.prompts import Prompt
from r1mega.errors import UserError

ARGUMENTS: Final[Mapping[str, tuple[str, ...]]] = {
    "keywords:existence": ("keywords",),
    "keywords:frequency": ("keyword", "frequency", "relation"),
    "keywords:forbidden_words": ("forbidden_words",),
    "keywords:letter_frequency": ("letter", "let_frequency", "let_relation"),
    "language:response_language": ("language",),
    "length_constraints:number_sentences": ("num_sentences", "relation"),
    "length_constraints:number_paragraphs": ("num_paragraphs",),
    "length_constraints:number_words": ("num_words", "relation"),
    "length_constraints:nth_paragraph_first_word": ("num_paragraphs", "nth_paragraph", "first_word"),
    "detectable_content:number_placeholders": ("num_placeholders",),
    "detectable_content:postscript": ("postscript_marker",),
    "detectable_format:number_bullet_lists": ("num_bullets",),
    "detectable_format:constrained_response": (),
    "detectable_format:number_highlighted_sections": ("num_highlights",),
    "detectable_format:multiple_sections": ("section_spliter", "num_sections"),
    "detectable_format:json_format": (),
    "detectable_format:title": (),
    "combination:two_responses": (),
    "combination:repeat_prompt": ("prompt_to_repeat",),
    "startend:end_checker": ("end_phrase",),
    "startend:quotation": (),
    "change_case:capital_word_frequency": ("capital_frequency", "capital_relation"),
    "change_case:english_capital": (),
    "change_case:english_lowercase": (),
    "punctuation:no_comma": (),
}
"""The 25 kinds of instructions and the arguments each is given with, in the data set's spelling."""

_RELATIONS = ("less than", "at least")


def prompt_of(row: Mapping[str, Any], where: str) -> Prompt:
    """A row of `google/IFEval`: key, prompt, instruction_id_list, kwargs.

    `meta["instructions"]` holds what is to be verified, `[[instruction, arguments], ...]`. In tables every element of kwargs has every
    argument there is, most of them None, which are left out.
    """
    name, question = fields.scalar(row, where, "key"), fields.text(row, where, "prompt")
    kinds, given = fields.items(row, where, "instruction_id_list", str), fields.items(row, where, "kwargs", dict)
    if not kinds or len(kinds) != len(given):
        raise UserError(f"{where}: field 'kwargs': expected one element for each of the {len(kinds)} instructions, got {len(given)}")
    instructions = []
    for kind, arguments in zip(kinds, given, strict=True):
        arguments = {key: value for key, value in arguments.items() if value is not None}
        _check(kind, arguments, where)
        instructions.append([kind, arguments])
    return Prompt(id=f"ifeval/{name}", text=question, meta={"instructions": instructions})


def _check(kind: str, arguments: Mapping[str, Any], where: str) -> None:
    if kind not in ARGUMENTS:
        raise UserError(f"{where}: field 'instruction_id_list': no instruction is called {kind!r}")
    for name in ARGUMENTS[kind]:
        value = arguments.get(name)
        words = isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value)
        match name:
            case "keywords" | "forbidden_words":
                good = words
            case "relation" | "let_relation" | "capital_relation":
                good = value in _RELATIONS
            case _ if "num_" in name or "frequency" in name or name == "nth_paragraph":
                good = isinstance(value, int | float) and not isinstance(value, bool)
            case _:
                good = isinstance(value, str) and bool(value)
        if not good:
            raise UserError(f"{where}: field 'kwargs': {kind} needs {name!r}, got {value!r:.60}")
