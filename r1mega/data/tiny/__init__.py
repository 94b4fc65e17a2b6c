"""The tiny language: 128 words, procedural tasks, and corpora in which reasoning is rare.

Prompts are `<language> <question> :`. A response thinks, in words of one of two languages, and answers in tags:
`<think> so 3 so 4 so 8 </think> <answer> 8 </answer>`. The tasks: `running_sum`, on which everything is shown; `signs`, a search in which
looking back pays; `errand` and `rude_errand`, requests that are no problems, for preferences and safety.
"""

from r1mega.config.prompts import TinyPrompts
from r1mega.data.prompts import Prompt
from r1mega.data.tiny import errand, running_sum, signs


def prompts(source: TinyPrompts) -> list[Prompt]:
    """Up to `source.size` problems of a task, all different; UserError for more of them than there are."""
    if source.task == "running_sum":
        return running_sum.prompts(source.size, source.seed)
    if source.task == "signs":
        return signs.prompts(source.size, source.seed)
    return errand.prompts(source.task, source.size, source.seed)
