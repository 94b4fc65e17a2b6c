"""The tiny language: 128 words, procedural tasks, and a corpus in which reasoning is rare.

Prompts are `<language> <question> :`. A response thinks in steps, each opened by a connective word of one of two
languages, and answers in tags: `<think> so 3 so 4 so 8 </think> <answer> 8 </answer>`.
"""

from r1mega.data.tiny.running_sum import document, documents, prompts

__all__ = ["document", "documents", "prompts"]
