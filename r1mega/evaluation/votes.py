"""Which answers are one vote."""

from collections import Counter
from collections.abc import Callable, Sequence

Pair = tuple[str, str]


def merged(answers: Sequence[Sequence[str]], equal: Callable[[list[Pair]], Sequence[bool | None]]) -> list[dict[str, str]]:
    """For each prompt, every answer given and the answer it votes with: the most frequent of those it is equal to, itself if none.

    `equal` judges many pairs at once, None where it could not; it is called once for every round over all prompts, whose most frequent
    answer without a group is compared with the others. An answer that could not be compared votes alone and is not compared again, so
    each answer costs at most one failure.
    """
    groups: list[dict[str, str]] = [{} for _ in answers]
    waiting = [[answer for answer, _ in Counter(given).most_common()] for given in answers]
    while any(waiting):
        pairs = [(rest[0], other) for rest in waiting if rest for other in rest[1:]]
        verdicts = iter(equal(pairs) if pairs else ())
        for group, rest in zip(groups, waiting, strict=True):
            if not rest:
                continue
            leader, *others = rest
            group[leader] = leader
            rest.clear()
            for other in others:
                same = next(verdicts)
                if same is False:
                    rest.append(other)
                else:
                    group[other] = leader if same else other
    return groups
