"""A cold start's rewriting: what the paper had DeepSeek-V3 do to R1-Zero's thoughts, the tiny language's grammar does here."""

from r1mega.data.prompts import Prompt
from r1mega.data.tiny.vocabulary import CONNECTIVES


def readable(prompt: Prompt, response: str) -> str:
    """The response with every connective word translated into the question's language."""
    target = CONNECTIVES[prompt.meta["language"]]
    translated = {word: target[place] for words in CONNECTIVES.values() for place, word in enumerate(words)}
    return " ".join(translated.get(word, word) for word in response.split())
