"""The judge: outcomes, deadlines, dead workers, and what it refuses to start with."""

import math
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from r1mega.config.rollout import Reward
from r1mega.data.prompts import Message, Prompt
from r1mega.errors import UserError
from r1mega.rewards.imports import load_function
from r1mega.rewards.judge import Judge, Verdict
from r1mega.rewards.worker import pack, unpack

MODULE = '''
    import os, re, signal, subprocess, sys, time
    from pathlib import Path

    constant = 3

    def obey(prompt, response):
        """Do what the response says."""
        word, _, rest = response.partition(" ")
        match word:
            case "value":
                return eval(rest)
            case "length":
                return float(len(rest) - rest.count("\\x00"))
            case "raise":
                raise KeyError("no such\\nthing")
            case "exit":
                sys.exit(3)
            case "die":
                os._exit(3)
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "regex":  # runs for ever inside C, holding the interpreter's lock
                return float(bool(re.match(r"(a+)+$", "a" * 64 + "b")))
            case "sleep":
                signal.signal(signal.SIGALRM, signal.SIG_IGN)
                time.sleep(600)
            case "child":
                child = subprocess.Popen(["sleep", "600"])
                Path(rest).write_text(str(child.pid))
                time.sleep(600)
            case "memory":
                return float(len(bytearray(1 << 34)))
            case "speak":
                print("[1.0, null]", flush=True)
                sys.stdin.read()
                return 1.0

    def meta(prompt, response):
        return float(prompt.meta["a"][0] + len(prompt.history) + (prompt.history[0].content == "be kind"))

    def count(prompt, response):
        with open(response, "a") as file:
            file.write(prompt.id + "\\n")
        return 1.0

    def pid(prompt, response):
        return float(os.getpid())

    def one(response):
        return 1.0
'''

WRITERS = """
    import re

    def number(prompt, response):
        return len(response)

    def shout(prompt, response):
        if response == "regex":
            re.match(r"(a+)+$", "a" * 64 + "b")
        return {"none": None, "number": 1}.get(response, f"{prompt.text} {response.upper()}")

    def last(response):
        return response.split()[-1]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "obedient.py").write_text(textwrap.dedent(MODULE))
    return tmp_path


@pytest.fixture
def judge(folder: Path) -> Iterator[Judge]:
    with Judge({"obey": Reward(function="obedient:obey", deadline_s=1.0)}, workers=2, search_path=[folder]) as judge:
        yield judge


def obey(judge: Judge, *orders: str) -> list[Verdict]:
    return [verdicts["obey"] for verdicts in judge.judge([(Prompt("p", "q"), order) for order in orders])]


# ---------------------------------------------------------------- outcomes


def test_numbers_and_what_is_none(judge: Judge) -> None:
    orders = [
        "value 0.25",
        "value True",
        "value -3",
        "value __import__('numpy').float32(0.5)",
        "value __import__('fractions').Fraction(1, 4)",
    ]
    assert [verdict.value for verdict in obey(judge, *orders)] == [0.25, 1.0, -3.0, 0.5, 0.25]
    orders = ["value None", "value 'yes'", "value [1.0]", "value float('nan')", "value float('inf')", "value 10**400", "raise", "exit"]
    assert obey(judge, *orders) == [
        Verdict(None, "returned None"),
        Verdict(None, "returned str, not a number"),
        Verdict(None, "returned list, not a number"),
        Verdict(None, "returned nan"),
        Verdict(None, "returned inf"),
        Verdict(None, "OverflowError: int too large to convert to float"),
        Verdict(None, "KeyError: 'no such\\nthing' (obedient.py, line 16)"),
        Verdict(None, "SystemExit: 3 (obedient.py, line 18)"),
    ]


def test_functions_that_return_texts(folder: Path) -> None:
    (folder / "writers.py").write_text(textwrap.dedent(WRITERS))
    functions = {name: Reward(function=f"writers:{name}", deadline_s=1.0) for name in ("number", "shout", "last")}
    with Judge(functions, workers=1, search_path=[folder], texts={"shout": 2, "last": 1}) as judge:
        items = [(Prompt("p", "q"), text) for text in ("a b", "none", "number", "regex", "的" * 10_000)]
        found = judge.judge(items)
    assert [one["number"] for one in found] == [Verdict(float(len(text)), None) for _, text in items]
    late = Verdict(None, "no verdict within 1 s; its process was killed")
    told = [Verdict(None, None, "q A B"), Verdict(None, None), Verdict(None, "returned int, not a text"), late]
    assert [one["shout"] for one in found] == [*told, Verdict(None, None, "q " + "的" * 10_000)]
    assert [one["last"].text for one in found] == ["b", "none", "number", "regex", "的" * 10_000]


def test_order_is_kept(judge: Judge) -> None:
    assert [verdict.value for verdict in obey(judge, *(f"value {i}" for i in range(1_000)))] == list(range(1_000))
    assert judge.judge([]) == []


def test_what_a_reward_prints_is_not_a_verdict(judge: Judge) -> None:
    assert [verdict.value for verdict in obey(judge, "speak", "value 2", "value 3")] == [1.0, 2.0, 3.0]


def test_text_of_any_kind_arrives(judge: Judge) -> None:
    text = "\ud800\x00\n\u2028" + "的" * 1_000_000
    assert obey(judge, f"length {text}", "length ", "length \x00") == [Verdict(1_000_003.0, None), Verdict(0.0, None), Verdict(0.0, None)]


def test_several_rewards_and_the_whole_prompt(folder: Path) -> None:
    rewards = {"meta": Reward(function="obedient:meta"), "format": Reward(function="r1mega.rewards.format:tags")}
    prompt = Prompt("p", "q", meta={"a": [40]}, history=(Message("system", "be kind"),))
    with Judge(rewards, workers=1, search_path=[folder]) as judge:
        verdicts = judge.judge([(prompt, "<think> a </think> <answer> b </answer>"), (prompt, "b")])
    assert verdicts == [
        {"meta": Verdict(42.0, None), "format": Verdict(1.0, None)},
        {"meta": Verdict(42.0, None), "format": Verdict(0.0, None)},
    ]


def test_cases_survive_the_pipe() -> None:
    shared = Prompt("p", "q", "3", {"a": {"b": [1, None]}}, (Message("system", "s"), Message("user", "u")))
    cases = [("x", shared, "1"), ("y", shared, "2"), ("x", Prompt("o", "q"), "3")]
    assert unpack(pack(cases)) == cases
    assert len(pack(cases)["prompts"]) == 2


@pytest.mark.parametrize("response", ["1.0\n[1.0, null]\n", "\x00", "\ud800", '"}], "cases": []}', "[1.0, null]", "\u2028[1.0, null]"])
def test_no_response_speaks_the_protocol(response: str) -> None:
    prompt = Prompt("p", "q", answer="5")
    right = "<think> a </think> <answer> 5 </answer>"
    with Judge({"math": Reward(function="r1mega.rewards.math:accuracy")}, workers=1) as judge:
        verdicts = judge.judge([(prompt, text) for text in (response, f"<answer>{response}</answer>", right, response)])
    assert [verdict["math"].value for verdict in verdicts] == [0.0, 0.0, 1.0, 0.0]


def test_answers_of_a_megabyte_are_judged() -> None:
    rewards = {name: Reward(function=f"r1mega.rewards.{name}:accuracy", deadline_s=30.0) for name in ("math", "exact")}
    rewards["language"] = Reward(function="r1mega.rewards.language:consistency", deadline_s=30.0)
    prompt = Prompt("p", "Find the sum of all the digits.", answer="5")
    long = [
        "5" * (1 << 20),
        "(" * (1 << 20),
        r"\sqrt{" * (1 << 17),
        "5 + 0" * (1 << 18),
        "5 or " * (1 << 18),
        "\\boxed{5} and " * (1 << 16),
    ]
    with Judge(rewards, workers=2) as judge:
        verdicts = judge.judge([(prompt, f"<think> so we add </think> <answer>{text}</answer>") for text in long])
        verdicts += judge.judge([(prompt, f"<think> {'so we add ' * 100_000} </think> <answer> 5 </answer>")])
    print([(verdict["math"].value, verdict["exact"].value, verdict["language"].value) for verdict in verdicts])
    assert [verdict["math"].value for verdict in verdicts] == [0.0] * 5 + [1.0] * 2
    assert [verdict["exact"].value for verdict in verdicts] == [0.0] * 5 + [1.0] * 2
    assert [verdict["language"].value for verdict in verdicts] == [1.0] * 7


# ---------------------------------------------------------------- deadlines and deaths


@pytest.mark.parametrize("order", ["regex", "sleep"])
def test_what_runs_for_ever_is_killed_and_only_that(judge: Judge, order: str) -> None:
    orders = [f"value {i}" for i in range(40)]
    orders[3] = orders[21] = order
    start = time.monotonic()
    verdicts = obey(judge, *orders)
    assert time.monotonic() - start < 10
    late = Verdict(None, "no verdict within 1 s; its process was killed")
    assert verdicts == [late if i in (3, 21) else Verdict(float(i), None) for i in range(40)]
    assert obey(judge, "value 7")[0].value == 7.0


def test_a_dead_worker_costs_one_verdict(judge: Judge) -> None:
    verdicts = obey(judge, *["value 1"] * 5, "die", *["value 1"] * 5, "segfault", *["value 1"] * 5)
    assert [verdict.value for verdict in verdicts] == [1.0] * 5 + [None] + [1.0] * 5 + [None] + [1.0] * 5
    assert verdicts[5].reason == "its process ended with exit code 3"
    assert verdicts[11].reason == "its process ended with SIGSEGV"


def test_memory_is_bounded(judge: Judge) -> None:
    assert obey(judge, "memory", "value 1") == [Verdict(None, "MemoryError: (obedient.py, line 33)"), Verdict(1.0, None)]


def test_what_a_reward_started_is_killed_with_it(judge: Judge, tmp_path: Path) -> None:
    assert obey(judge, f"child {tmp_path / 'pid'}")[0].value is None
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(child)


def test_finished_cases_are_not_judged_twice(folder: Path) -> None:
    log = folder / "log"
    rewards = {"count": Reward(function="obedient:count"), "obey": Reward(function="obedient:obey")}
    items = [(Prompt(str(i), "q"), str(log)) for i in range(20)]
    with Judge(rewards, workers=1, search_path=[folder]) as judge:
        verdicts = judge.judge(items)
    assert [verdict["count"].value for verdict in verdicts] == [1.0] * 20
    assert log.read_text().split() == [str(i) for i in range(20)]


def test_workers_that_died_idle_are_replaced(folder: Path) -> None:
    with Judge({"pid": Reward(function="obedient:pid")}, workers=2, search_path=[folder]) as judge:
        pids = {int(verdicts["pid"].value or 0) for verdicts in judge.judge([(Prompt("p", "q"), "")] * 50)}
        for pid in pids:
            os.kill(pid, 9)
        time.sleep(0.05)
        verdicts = judge.judge([(Prompt("p", "q"), "")] * 50)
        assert all(verdict["pid"].value and int(verdict["pid"].value) not in pids for verdict in verdicts)


def test_a_call_that_takes_long_holds_up_no_other(folder: Path) -> None:
    prompt = Prompt("p", "q")
    with Judge({"obey": Reward(function="obedient:obey", deadline_s=60.0)}, workers=2, search_path=[folder]) as judge:
        first = judge.ask([(prompt, "value 1"), (prompt, "sleep")])
        assert obey(judge, "value 0")[0].value == 0.0  # the other two are with a worker each: a batch would share its worker's fate
        then = [judge.ask([(prompt, f"value {i}") for i in range(n)]) for n in range(20)]
        found = [[verdict["obey"].value for verdict in call.result(timeout=30)] for call in then]
        assert found == [list(range(n)) for n in range(20)]
        assert not first.done()


def test_many_threads_may_ask(judge: Judge) -> None:
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda n: obey(judge, *[f"value {n}"] * 50), range(40)))
    assert found == [[Verdict(float(n), None)] * 50 for n in range(40)]


def test_what_ends_the_judge_reaches_those_who_wait(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(worker: object) -> None:
        raise OSError("no space left for a process")

    monkeypatch.setattr(judge, "_start", full)
    for orders in (["die", "value 1"], ["value 2"]):
        with pytest.raises(OSError, match="no space left for a process"):
            judge.ask([(Prompt("p", "q"), order) for order in orders]).result(timeout=30)


def test_closing_ends_the_workers(folder: Path) -> None:
    with Judge({"pid": Reward(function="obedient:pid")}, workers=1, search_path=[folder]) as judge:
        pid = int(judge.judge([(Prompt("p", "q"), "")])[0]["pid"].value or 0)
        assert _runs(pid)
    assert not _runs(pid)


def test_workers_end_with_the_trainer(folder: Path) -> None:
    script = f"""
        import os, pathlib
        from r1mega.config.rollout import Reward
        from r1mega.data.prompts import Prompt
        from r1mega.rewards.judge import Judge
        judge = Judge({{"pid": Reward(function="obedient:pid")}}, 1, [pathlib.Path({str(folder)!r})])
        print(int(judge.judge([(Prompt("p", "q"), "")])[0]["pid"].value), flush=True)
        os.kill(os.getpid(), 9)
    """
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, check=False, timeout=60
    ).stdout
    deadline = time.monotonic() + 5
    while _runs(int(output)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(int(output))


# ---------------------------------------------------------------- cost


def test_short_responses_take_milliseconds() -> None:
    rewards = {"accuracy": Reward(function="r1mega.rewards.exact:accuracy"), "format": Reward(function="r1mega.rewards.format:tags")}
    prompts = [Prompt(str(i), f"en {i} :", answer=str(i)) for i in range(16)]
    items = [(prompts[i // 16], f"<think> so 3 so 4 so 5 </think> <answer> {i % 16} </answer>") for i in range(256)]
    with Judge(rewards, workers=2) as judge:
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            verdicts = judge.judge(items)
            seconds.append(time.perf_counter() - start)
    assert sum(verdict["accuracy"].value or 0.0 for verdict in verdicts) == 16
    print(f"512 verdicts: {1e3 * min(seconds):.1f} ms")
    assert min(seconds) < 0.1


def test_workers_do_not_import_torch() -> None:
    modules = ", ".join(f"r1mega.rewards.{name}" for name in ("worker", "math", "choice", "language", "gym"))
    script = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True, timeout=60) == "False\n"


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("obedient", "'obedient' is not an import path; write module:function, such as r1mega.rewards.math:accuracy"),
        ("obedient:", "is not an import path"),
        (":obey", "is not an import path"),
        ("obedient:obey()", "is not an import path"),
        ("obedience:obey", "no module 'obedience' is installed or lies in "),
        ("r1mega.rewards.maths:accuracy", "no module 'r1mega.rewards.maths' is installed or lies in "),
        ("obedient:disobey", "obedient has no function 'disobey'; it has obey, meta, count, pid, one"),
        ("obedient:constant", "obedient has no function 'constant'"),
        ("obedient:one", "'obedient:one' is called with (prompt, response) but is defined as one(response)"),
        ("broken:f", "'broken:f': importing broken failed: ZeroDivisionError: division by zero"),
        ("needy:f", "'needy:f': importing needy failed: ModuleNotFoundError: No module named 'not_there'"),
        ("typo:f", "'typo:f': importing typo failed: SyntaxError: "),
        ("leaver:f", "'leaver:f': importing leaver failed: SystemExit: 1"),
        ("dying:f", "a judge that imported dying:f ended with exit code 9"),
    ],
)
def test_refused_before_anything_runs(folder: Path, path: str, message: str) -> None:
    (folder / "broken.py").write_text("1 / 0")
    (folder / "needy.py").write_text("import not_there")
    (folder / "typo.py").write_text("def f(:")
    (folder / "leaver.py").write_text("import sys; sys.exit(1)")
    (folder / "dying.py").write_text("import os; os._exit(9)")
    with pytest.raises(UserError) as error:
        Judge({"r": Reward(function=path)}, workers=1, search_path=[folder])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_users_file_hides_no_installed_module(folder: Path) -> None:
    (folder / "math.py").write_text("1 / 0")
    (folder / "mine.py").write_text("import math\ndef f(prompt, response):\n    return math.pi")
    with Judge({"r": Reward(function="mine:f")}, workers=1, search_path=[folder]) as judge:
        assert judge.judge([(Prompt("p", "q"), "")])[0]["r"].value == math.pi


def test_extractors_take_one_argument() -> None:
    assert load_function("r1mega.rewards.exact:answer_of", arguments=1)("<answer> 1 </answer>") == "1"
    with pytest.raises(UserError, match=r"is called with \(response\) but is defined as accuracy\(prompt"):
        load_function("r1mega.rewards.exact:accuracy", arguments=1)


def _runs(pid: int) -> bool:
    """Whether a process exists and is not a zombie that waits for init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
