"""The tiny language's Hugging Face tokenizer."""

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from r1mega.data.tiny.vocabulary import BOS, EOS, PAD, TAGS, VOCABULARY

_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
"""A conversation is the question and its answer: the language has no roles."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token; save it with `save_pretrained`.

    BOS goes in front of every encoded text, EOS is never added. `decode(skip_special_tokens=True)` drops padding, BOS
    and EOS and keeps the think and answer tags, which are ordinary words that need no white space around them.
    A word outside the vocabulary is an error: there is no unknown token to hide it.
    """
    words = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, words[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT,
        model_max_length=512,
    )
