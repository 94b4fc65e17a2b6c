"""Problems of `reasoning-gym`, judged by the tasks' own scorers."""

from r1mega.data import gym
from r1mega.data.prompts import Prompt
from r1mega.rewards.answer import final_answer


def accuracy(prompt: Prompt, response: str) -> float:
    """The task's score of the response's answer, from 0 to 1; 0.0 without an answer. Many tasks score a wrong answer above 0."""
    answer = final_answer(response)
    return 0.0 if answer is None else gym.score(prompt, answer)
