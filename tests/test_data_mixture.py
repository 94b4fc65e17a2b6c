import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1mega.data.mixture import Mixture, shuffled

SIZES = {"sums": 10, "errands": 7, "rude": 3}


def test_one_set_is_asked_in_epochs_of_random_order() -> None:
    mixture = Mixture({"sums": 10}, {"sums": 1.0}, seed=3)
    drawn = [place for _ in range(5) for _, place in mixture.draw(4, 0)]
    assert drawn == shuffled(10, 3, 0) + shuffled(10, 3, 1)
    assert sorted(drawn[:10]) == list(range(10)) and drawn[:10] != drawn[10:]


@given(st.lists(st.integers(1, 20), min_size=3, max_size=3), st.integers(1, 16))
def test_every_stretch_has_the_shares_as_nearly_as_whole_prompts_allow(weights: list[int], count: int) -> None:
    mixture = Mixture(SIZES, dict(zip(SIZES, map(float, weights), strict=True)), seed=1)
    drawn: list[str] = []
    for _ in range(20):
        drawn += [name for name, _ in mixture.draw(count, 0)]
        for name, weight in zip(SIZES, weights, strict=True):
            assert abs(drawn.count(name) - len(drawn) * weight / sum(weights)) < len(SIZES)


def test_shares_change_over_updates_and_a_resumed_run_draws_the_same() -> None:
    shares = {"sums": 1.0, "errands": {0: 0.0, 6: 1.0}, "rude": {0: 0.0, 8: 0.5}}
    whole, resumed = Mixture(SIZES, shares, 5), Mixture(SIZES, shares, 5)
    rollouts = [whole.draw(8, update) for update in range(12)]
    assert all(name == "sums" for rollout in rollouts[:6] for name, _ in rollout)
    assert [name for name, _ in rollouts[6]].count("errands") == 4
    assert any(name == "rude" for name, _ in rollouts[8])
    for update in range(7):
        resumed.draw(8, update)
    assert [resumed.draw(8, update) for update in range(7, 12)] == rollouts[7:]


def test_no_share_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="share 0 at update 3"):
        Mixture(SIZES, {"sums": {0: 1.0, 3: 0.0}, "errands": 0.0, "rude": 0.0}, 1).draw(1, 3)
