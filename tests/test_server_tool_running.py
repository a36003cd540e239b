"""Tools of this machine in the server: one answer of several completions, who waits meanwhile, and whose tools they are."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
from server_fakes import (
    ASKED,
    THOUGHT_AND_ANSWER,
    USAGE,
    FakeGenerations,
    FakeModels,
    FakePython,
    after,
    asked,
    calling,
    end,
    item,
    results,
)

from openelm_mlx.conversation.history import LEFT_OUT
from openelm_mlx.server import own_tools
from openelm_mlx.server.failures import ApiError
from openelm_mlx.server.generation import AnswerSchema, NamedTool, collected
from openelm_mlx.server.own_tools import OwnTools
from openelm_mlx.server.parts import Finished, ItemText
from openelm_mlx.server.tool_running import ToolGenerations
from openelm_mlx.text.conversation import Message
from openelm_mlx.text.schema import Tool

FULL = ApiError(400, "It is too long.", code="context_length_exceeded")
LOOK_UP = Tool("look_up", "Looks up.", {"type": "object", "properties": {}})


@pytest.fixture(scope="module")
def tools():
    with OwnTools("calculator") as found:
        yield found


def answered(script, tools, request=None, most_rounds=16, models=None):
    """The answer, and the requests that it took; everything has been given back."""
    inner, models = FakeGenerations(script), models or FakeModels()

    async def main():
        generations = ToolGenerations(inner, models, tools, most_rounds)
        async with await generations.start(request or asked()) as generation:
            assert generation.prompt_tokens == USAGE.prompt_tokens
            return (await collected(generation))[0]

    answer = asyncio.run(main())
    assert models.num_leases == 0
    assert all(each.is_closed for each in inner.generations)
    return answer, inner.requests


def kinds(answer):
    return [(each.kind, each.text) for each in answer.items]


# --- One answer -------------------------------------------------------------------------------------------------------


def test_a_tool_runs_and_the_model_goes_on_in_the_same_answer(tools):
    answer, requests = answered(after(calling(), calling("3*3")), tools)
    assert kinds(answer) == [
        ("reasoning", "I need it."),
        ("reasoning", '[calculator {"expression": "2+2"}]\n[= 4]'),
        ("reasoning", "I need it."),
        ("reasoning", '[calculator {"expression": "3*3"}]\n[= 9]'),
        ("reasoning", "Let me think."),
        ("message", "2 + 2 = 4."),
    ]
    assert answer.reason == "stop"
    # The client's prompt counts once, and everything that was written.
    assert (answer.usage.prompt_tokens, answer.usage.cached_tokens) == (12, 4)
    assert (answer.usage.completion_tokens, answer.usage.reasoning_tokens) == (27, 15)
    assert [tool.name for tool in requests[0].tools] == ["calculator"]
    # The next prompt has the calls as they were written, and their results.
    assert requests[1].messages == [
        *ASKED,
        Message("assistant", "I need it.", channel="analysis"),
        Message("assistant", '{"expression": "2+2"}', channel="commentary", recipient="functions.calculator"),
        Message("tool", "4", "functions.calculator", "commentary", "assistant"),
    ]
    assert requests[2].messages[:4] == requests[1].messages
    assert results(requests[2]) == ["4", "9"]


def test_several_calls_in_one_completion(tools):
    both = [*calling()[:-1], *calling("3*3")[3:]]
    assert [part.kind for part in both if hasattr(part, "kind")] == ["reasoning", "call", "call"]
    answer, requests = answered(lambda request: THOUGHT_AND_ANSWER if results(request) else both, tools)
    assert results(requests[-1]) == ["4", "9"]
    assert answer.items[-1].text == "2 + 2 = 4."


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), RuntimeError("no")])
def test_what_a_tool_raises_is_told_to_the_model(tools, monkeypatch, error):
    def fails(tool, arguments):
        raise error

    monkeypatch.setattr(own_tools, "run_tool", fails)
    answer, requests = answered(after(calling()), tools)
    said = "no" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    assert results(requests[1]) == [f"Error: {said}"]
    assert answer.items[1].text.endswith(f"\n[failed: {said}]")


@pytest.mark.parametrize(("arguments", "said"), [("1/0", "cannot be computed"), ("2 + x", "is not arithmetic")])
def test_arguments_that_the_tool_refuses(tools, arguments, said):
    _, requests = answered(after(calling(arguments)), tools)
    assert results(requests[1])[0].startswith("Error: ")
    assert said in results(requests[1])[0]


def test_a_long_result_is_shown_short_and_cut_to_a_quarter_of_the_context(tools, monkeypatch):
    monkeypatch.setattr(own_tools, "run_tool", lambda *_: "line\n" * 100 + "\x1b[31m" + "x" * 500)
    answer, requests = answered(after(calling()), tools)
    result = results(requests[1])[0]
    assert result.startswith("line\nline\n")
    assert 200 < result.index("\n[") <= 250
    assert "more characters were left out" in result
    shown = answer.items[1].text.splitlines()[1]
    assert shown.startswith("[= line line")
    assert len(shown) < 320
    assert shown.endswith(" …]")
    monkeypatch.setattr(own_tools, "run_tool", lambda *_: "\x1b[31mred\a")
    assert answered(after(calling()), tools)[0].items[1].text.endswith("[= \ufffd[31mred\ufffd]")


def test_after_so_many_rounds_it_has_to_answer(tools):
    def always(request):
        return THOUGHT_AND_ANSWER if request.tool_choice == "none" else calling()

    answer, requests = answered(always, tools, most_rounds=3)
    assert len(requests) == 4
    # The prompt still begins as before.
    assert requests[3].tools == requests[0].tools
    assert [result.startswith("4\n[No more tools") for result in results(requests[3])] == [False, False, True]
    assert (answer.reason, answer.items[-1].text) == ("stop", "2 + 2 = 4.")


def test_max_tokens_is_for_the_whole_answer(tools):
    answer, requests = answered(after(calling()), tools, asked(max_tokens=20))
    assert [each.max_tokens for each in requests] == [20, 11]
    assert answer.reason == "stop"
    answer, requests = answered(after(calling()), tools, asked(max_tokens=9))
    assert (len(requests), answer.reason, kinds(answer)) == (1, "length", [("reasoning", "I need it.")])
    cut = [*calling()[:-1], end("length")]
    answer, requests = answered(lambda _: cut, tools)
    assert (len(requests), answer.reason, kinds(answer)) == (1, "length", [("reasoning", "I need it.")])


def test_a_full_context_costs_older_results_and_then_ends_the_answer(tools, monkeypatch):
    monkeypatch.setattr(own_tools, "run_tool", lambda *_: "x" * 100)

    def small(request):
        return [FULL] if sum(map(len, results(request))) > 190 else after(calling(), calling())(request)

    answer, requests = answered(small, tools)
    assert answer.reason == "stop"
    assert results(requests[-1]) == [LEFT_OUT, "x" * 100]
    answer, requests = answered(lambda request: [FULL] if results(request) else calling(), tools)
    assert (answer.reason, answer.items[-1].text.splitlines()[1]) == ("length", f"[= {'x' * 100}]")
    assert answer.usage.completion_tokens == 9
    # Any other error is the request's.
    broken = ApiError(503, "The queue is full.", code="overloaded")
    with pytest.raises(ApiError, match="queue"):
        answered(lambda request: [broken] if results(request) else calling(), tools)


# --- Whose tools ------------------------------------------------------------------------------------------------------


def test_the_clients_call_ends_the_answer(tools):
    theirs = [*item("call", "{}", name="look_up"), end("tool_calls")]
    request = asked(tools=(LOOK_UP,))
    answer, requests = answered(after(calling(), then=theirs), tools, request)
    assert [each.name for each in requests[0].tools] == ["look_up", "calculator"]
    assert (answer.reason, answer.items[-1].kind, answer.items[-1].name) == ("tool_calls", "call", "look_up")
    # With its result, the chat goes on, and ours run again.
    said = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "look_up", "arguments": "{}"}}]}
    history = [*ASKED, said, {"role": "tool", "tool_call_id": "c", "content": "found"}]
    answer, requests = answered(after([], calling()), tools, asked(tools=(LOOK_UP,), messages=history))
    assert results(requests[-1]) == ["found", "4"]
    assert answer.reason == "stop"
    # When it calls both at once, ours waits: the model will call it again.
    both = [*calling()[:-1], *theirs]
    answer, requests = answered(lambda _: both, tools, request)
    assert (len(requests), [each.kind for each in answer.items]) == (1, ["reasoning", "call"])
    assert answer.items[-1].name == "look_up"


def test_after_the_last_round_the_client_may_still_be_called(tools):
    theirs = [*item("call", "{}", name="look_up"), end("tool_calls")]
    answer, requests = answered(after(calling(), then=theirs), tools, asked(tools=(LOOK_UP,)), most_rounds=1)
    assert (requests[1].tools, requests[1].tool_choice) == ((LOOK_UP,), "auto")
    assert answer.items[-1].name == "look_up"


def test_the_clients_tool_goes_before_one_of_the_same_name(tools, monkeypatch):
    monkeypatch.setattr(own_tools, "run_tool", lambda *_: pytest.fail("it ran"))
    own = Tool("calculator", "Mine.", {"type": "object", "properties": {}})
    answer, requests = answered(lambda _: calling(), tools, asked(tools=(own,)))
    assert requests[0].tools == (own,)
    assert (answer.reason, answer.items[-1].name) == ("tool_calls", "calculator")


@pytest.mark.parametrize(
    "options",
    [
        {"tool_choice": "none"}, {"tool_choice": "required", "tools": (LOOK_UP,)},
        {"tool_choice": NamedTool("look_up"), "tools": (LOOK_UP,)}, {"answer_schema": AnswerSchema({"type": "object"})},
        {"n": 2}, {"logprobs": 0}, {"messages": None, "prompts": ("Hello",)}, {"model": "openelm"},
    ],
    ids=str,
)  # fmt: skip
def test_requests_that_are_passed_on_as_they_are(tools, monkeypatch, options):
    monkeypatch.setattr(own_tools, "run_tool", lambda *_: pytest.fail("it ran"))
    request = asked(**options)
    answer, requests = answered(lambda _: calling(), tools, request)
    assert requests == [request]
    assert answer.reason == "tool_calls"
    inner, models = FakeGenerations([]), FakeModels()
    assert asyncio.run(ToolGenerations(inner, models, tools, 16).count_tokens(request)) == 12
    assert inner.requests == [request]
    assert models.num_leases == 0


def test_a_model_that_calls_no_tools_is_told_of_once(tools, caplog):
    models = FakeModels()

    async def main():
        generations = ToolGenerations(FakeGenerations(lambda _: calling()), models, tools, 16)
        for _ in range(2):
            async with await generations.start(asked(model="openelm")) as generation:
                await collected(generation)

    asyncio.run(main())
    assert [each.getMessage() for each in caplog.records] == [
        "openelm was not trained to call functions: the server's tools are not used with it"
    ]
    assert models.num_leases == 0


def test_tokens_are_counted_with_the_tools(tools):
    inner = FakeGenerations([])
    asyncio.run(ToolGenerations(inner, FakeModels(), tools, 16).count_tokens(asked()))
    assert [tool.name for tool in inner.requests[0].tools] == ["calculator"]


# --- While a tool runs ------------------------------------------------------------------------------------------------


@pytest.fixture
def blocked(monkeypatch):
    """A tool that runs until `may_end` is set."""
    state = SimpleNamespace(has_begun=threading.Event(), may_end=threading.Event(), has_ended=threading.Event())

    def run(tool, arguments):
        state.has_begun.set()
        assert state.may_end.wait(60)
        state.has_ended.set()
        return "late"

    monkeypatch.setattr(own_tools, "run_tool", run)
    yield state
    state.may_end.set()


def test_whoever_waits_hears_that_it_is_worked_on(tools, blocked):
    async def main():
        inner = FakeGenerations(after(calling()))
        async with await ToolGenerations(inner, FakeModels(), tools, 16).start(asked()) as generation:
            seen = []
            async for parts in generation.batches(0.01):
                seen.append(parts)
                if seen[-3:] == [[], [], []]:
                    blocked.may_end.set()
            assert generation.progress().place == 2
            return seen

    seen = asyncio.run(main())
    asked_at = next(at for at, parts in enumerate(seen) if parts and getattr(parts[-1], "text", "")[:5] == "[calc")
    assert seen[asked_at + 1] == []
    assert isinstance(seen[-1][-1], Finished)


def test_a_long_call_that_is_held_back_is_no_silence(tools):
    pieces = [each for text in "abcdef" for each in (ItemText(0, text), 0.03)]
    started, *_ = item("call", "x", name="calculator")

    async def main():
        inner = FakeGenerations([started, *pieces, end("length")])
        async with await ToolGenerations(inner, FakeModels(), tools, 16).start(asked()) as generation:
            return [parts async for parts in generation.batches(0.02)]

    *before, last = asyncio.run(main())
    assert last == [end("length")]
    assert before.count([]) >= 5


def test_a_client_that_goes_while_a_tool_runs_gets_everything_freed(tools, blocked):
    async def main():
        inner, models = FakeGenerations(after(calling())), FakeModels()
        generation = await ToolGenerations(inner, models, tools, 16).start(asked())
        async with generation:
            reading = asyncio.ensure_future(collected(generation))
            while not blocked.has_begun.is_set():
                await asyncio.sleep(0.005)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        assert models.num_leases == 0
        assert inner.generations[0].is_closed
        blocked.may_end.set()
        while not blocked.has_ended.is_set():
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.01)
        assert len(inner.requests) == 1  # its result has been dropped

    asyncio.run(main())


def test_a_client_that_goes_while_the_next_completion_begins(tools):
    class Slow(FakeGenerations):
        async def start(self, request):
            found = await super().start(request)
            if results(request):
                await asyncio.sleep(60)
            return found

    async def main():
        inner, models = Slow(after(calling())), FakeModels()
        async with await ToolGenerations(inner, models, tools, 16).start(asked()) as generation:
            reading = asyncio.ensure_future(collected(generation))
            while len(inner.requests) < 2:
                await asyncio.sleep(0.005)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        assert models.num_leases == 0

    asyncio.run(main())


# --- Tools of one answer ----------------------------------------------------------------------------------------------


def script(text):
    return [*item("call", text, name="python"), end("tool_calls")]


def test_an_interpreter_is_of_one_answer(monkeypatch):
    monkeypatch.setattr("openelm_mlx.tools.python_tool.PythonTool", FakePython)
    monkeypatch.setattr(FakePython, "made", [])
    monkeypatch.setattr(own_tools, "MOST_INTERPRETERS", 1)
    with OwnTools("python") as tools:
        first, requests = answered(after(script("a"), script("b")), tools)
        assert results(requests[-1]) == ["a", "a b"]
        assert first.items[0].text == "[python a]\n[= a]"
        assert [each.name for each in requests[0].built_in] == ["python"]
        assert requests[0].tools == ()
        _, requests = answered(after(script("c")), tools)
        assert results(requests[-1]) == ["c"]
        assert len(FakePython.made) == 3  # the first one only shows that there can be one
    assert all(each.is_closed for each in FakePython.made)


def test_only_so_many_answers_have_an_interpreter_at_once(monkeypatch):
    monkeypatch.setattr("openelm_mlx.tools.python_tool.PythonTool", FakePython)
    monkeypatch.setattr(FakePython, "made", [])
    monkeypatch.setattr(own_tools, "MOST_INTERPRETERS", 2)

    async def one(generations):
        async with await generations.start(asked()) as generation:
            answers = await collected(generation)
            running = sum(not each.is_closed for each in FakePython.made)
            return answers[0].reason, running - 1  # the first one is nobody's

    async def main(tools):
        generations = ToolGenerations(FakeGenerations(after(script("a"))), FakeModels(), tools, 16)
        return await asyncio.gather(*(one(generations) for _ in range(6)))

    with OwnTools("python") as tools:
        found = asyncio.run(main(tools))
    assert {reason for reason, _ in found} == {"stop"}
    assert max(running for _, running in found) <= 2
    assert len(FakePython.made) == 7


def test_pages_are_of_one_answer(tmp_path):
    (tmp_path / "harbor.txt").write_text("A harbor is a place for ships.")
    search = [*item("call", '{"query": "harbor"}', name="browser.search"), end("tool_calls")]
    back = [*item("call", "{}", name="browser.open"), end("tool_calls")]
    with OwnTools(f"files={tmp_path}") as tools:
        assert tools.names == ["browser.search", "browser.open", "browser.find"]
        _, requests = answered(after(search, back), tools)
        assert "A harbor is a place for ships." in results(requests[1])[0]
        assert "harbor" in results(requests[2])[1]
        _, requests = answered(after(back), tools)
        assert results(requests[1])[0].startswith("Error: ")
