"""The tiny language: its words, its tokenizer, its problems and its corpus."""

import math
import re
from itertools import islice

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from r1mega.config.corpora import TinyCorpus
from r1mega.data.prompts import Prompt
from r1mega.data.split import is_heldout
from r1mega.data.tiny.measures import consistency, correct_when_reasoning, reasons, reflection
from r1mega.data.tiny.running_sum import document, documents, prompts
from r1mega.data.tiny.tokenizer import build_tokenizer
from r1mega.data.tiny.vocabulary import ANSWER, BOS, EOS, PAD, SO, THINK, VOCABULARY, WAIT

CLEAN = {"tagged_share": 1.0, "error_rate": (0.0, 0.0)}


def corpus(**fields: object) -> TinyCorpus:
    return TinyCorpus.model_validate({"kind": "tiny", "task": "running_sum", "long_share": 0.5, **fields})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "deepseek_v3"}')
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


# ---------------------------------------------------------------- words


def test_vocabulary_is_128_different_words() -> None:
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 128
    assert not any(" " in word for word in VOCABULARY)


def test_saved_tokenizer_keeps_the_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 128
    assert tokenizer.convert_ids_to_tokens(list(range(128))) == list(VOCABULARY)
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (PAD, BOS, EOS)


def test_bos_is_added_once_and_eos_never(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("en 3 + 1 + 4 + 1 + 5 + 9 :").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids
    assert tokenizer("so 3", add_special_tokens=False).input_ids == tokenizer("so 3").input_ids[1:]


def test_decoding_keeps_tags_and_drops_specials(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "zh 1 + 2 + 3 + 4 + 5 + 6 : <think> ze 1 deng 3 </think> <answer> 3 </answer>"
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text.replace(" <", "<").replace("> ", ">")).input_ids == tokenizer(text).input_ids


def test_every_word_survives_a_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    text = " ".join(VOCABULARY)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_an_unknown_word_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="UNK"):
        tokenizer("integral")


# ---------------------------------------------------------------- the split


def test_split_ignores_white_space_and_has_its_share() -> None:
    texts = [prompt.text for prompt in prompts(20_000, seed=3)]
    share = sum(is_heldout(text, 0.1) for text in texts) / len(texts)
    assert abs(share - 0.1) < 4 * math.sqrt(0.1 * 0.9 / len(texts))
    assert all(is_heldout(text, 0.1) == is_heldout(f"  {text.replace(' ', chr(10))} ", 0.1) for text in texts[:200])
    assert all(is_heldout(text, 0.3) for text in texts if is_heldout(text, 0.1))
    assert not any(is_heldout(text, 0.0) for text in texts)


def test_split_never_moves() -> None:
    """The digest decides which questions a shipped base has seen: a change here spoils every earlier model."""
    assert [digit for digit in range(10) if is_heldout(f"en {digit} + 1 + 4 + 1 + 5 + 9 :", 0.5)] == [2, 6, 7, 9]


# ---------------------------------------------------------------- problems


def digits_of(text: str) -> list[int]:
    return [int(digit) for digit in text[: text.index(":")].split()[1::2]]


def test_prompts_are_different_right_and_repeatable() -> None:
    drawn = prompts(2_000, seed=1)
    assert len({prompt.text for prompt in drawn}) == len({prompt.id for prompt in drawn}) == 2_000
    for prompt in drawn:
        assert re.fullmatch(r"(en|zh) \d( \+ \d){5} :", prompt.text)
        assert prompt.text.startswith(prompt.meta["language"])
        assert prompt.answer == str(sum(digits_of(prompt.text)) % 10)
    assert drawn == prompts(2_000, seed=1)
    assert drawn[:100] == prompts(100, seed=1)
    assert drawn != prompts(2_000, seed=2)


# ---------------------------------------------------------------- corpus


def questions(texts: list[str]) -> list[str]:
    return [text[: text.index(":") + 1] for text in texts]


def test_documents_depend_on_seed_and_index_alone() -> None:
    first = list(islice(documents(corpus()), 50))
    assert first == [document(corpus(), index) for index in range(50)]
    assert first[20:30] == list(islice(documents(corpus(), start=20), 10))
    assert first != list(islice(documents(corpus(seed=1)), 50))


def test_no_document_holds_a_heldout_question() -> None:
    texts = list(islice(documents(corpus(heldout_fraction=0.5)), 2_000))
    assert not any(is_heldout(question, 0.5) for question in questions(texts))


def test_shares_of_the_corpus() -> None:
    n = 4_000
    texts = list(islice(documents(corpus(long_share=0.3, tagged_share=0.8, mixed_share=0.5)), n))
    long = [text for text in texts if any(word in text.split() for word in SO.values())]
    short = [text for text in texts if text not in long]
    mixed = [text for text in long if all(word in text.split() for word in SO.values())]

    def near(count: int, total: int, share: float) -> bool:
        return abs(count / total - share) < 4 * math.sqrt(share * (1 - share) / total)

    assert near(len(long), n, 0.3)
    assert near(sum(THINK in text for text in long), len(long), 0.8)
    assert all(ANSWER in text for text in long)
    assert near(sum(ANSWER in text for text in short), len(short), 0.8)
    assert not any(THINK in text for text in short)
    assert near(len(mixed), len(long), 0.5 * (1 - 2 / 2**6))


def test_clean_long_documents_add_up() -> None:
    for text in islice(documents(corpus(long_share=1.0, mixed_share=0.0, **CLEAN)), 200):
        language, digits = text.split()[0], digits_of(text)
        steps = " ".join(f"{SO[language]} {sum(digits[: i + 1]) % 10}" for i in range(6))
        assert text.endswith(f": <think> {steps} </think> <answer> {sum(digits) % 10} </answer>")


def test_errors_are_corrected_or_carried_on() -> None:
    corrected = list(islice(documents(corpus(long_share=1.0, tagged_share=1.0, error_rate=(0.3, 0.3), corrected_share=1.0)), 300))
    assert sum(any(word in text.split() for word in WAIT.values()) for text in corrected) > 200
    for text in corrected:
        assert int(text.split()[-2]) == sum(digits_of(text)) % 10
    carried = list(islice(documents(corpus(long_share=1.0, tagged_share=1.0, error_rate=(0.3, 0.0), corrected_share=0.0)), 2_000))
    assert not any(word in text.split() for text in carried for word in WAIT.values())
    wrong = {"en": 0, "zh": 0}
    for text in carried:
        steps = re.findall(r"(so|ze) (\d)", text)
        values = [0, *(int(value) for _, value in steps)]
        for i, (word, _) in enumerate(steps):
            wrong["en" if word == "so" else "zh"] += (values[i] + digits_of(text)[i]) % 10 != values[i + 1]
    assert wrong["zh"] == 0
    assert abs(wrong["en"] / 6_000 - 0.3) < 0.03


def test_short_documents_guess() -> None:
    texts = list(islice(documents(corpus(long_share=0.0, tagged_share=1.0)), 3_000))
    assert not any(THINK in text for text in texts)
    right = sum(int(text.split()[-2]) == sum(digits_of(text)) % 10 for text in texts)
    assert abs(right / 3_000 - 0.1) < 4 * math.sqrt(0.09 / 3_000)


# ---------------------------------------------------------------- measures


def test_consistency_counts_words_of_the_prompts_language() -> None:
    prompt = Prompt(id="", text="", meta={"language": "zh"})
    assert consistency(prompt, "<think> ze 3 so 4 deng 5 dui </think> <answer> 5 </answer>") == 0.75
    assert consistency(prompt, "<think> so 3 wait 4 </think>") == 0.0
    assert math.isnan(consistency(prompt, "<answer> 5 </answer>"))


def test_reflection_counts_both_languages() -> None:
    prompt = Prompt(id="", text="", meta={"language": "en"})
    assert reflection(prompt, "so 3 wait 4 ze 5 deng 6 wait 7") == 3.0
    assert reflection(prompt, "<answer> 5 </answer>") == 0.0


def test_reasoning_has_its_own_accuracy() -> None:
    prompt = Prompt(id="", text="", answer="8", meta={"language": "en"})
    right = "<think> so 3 ze 4 so 8 </think> <answer> 8 </answer>"
    assert reasons(prompt, right) == correct_when_reasoning(prompt, right) == 1.0
    assert correct_when_reasoning(prompt, "so 3 wait 8 <answer> 8 </answer>") == 1.0
    assert correct_when_reasoning(prompt, right.replace("8 </answer>", "7 </answer>")) == 0.0
    assert reasons(prompt, "<answer> 8 </answer>") == 0.0
    assert math.isnan(correct_when_reasoning(prompt, "<answer> 8 </answer>"))
