"""Give gpt-oss a Python function as a tool and watch it use it: python examples/calculator_agent.py"""

import openelm_mlx as om
from openelm_mlx.conversation import Answer, Reasoning, ToolCall, ToolResult
from openelm_mlx.tools import calculator


def main(source: str = "demo-gpt-oss", question: str = "What is 12 + 30?") -> None:
    chat = om.Chat(*om.load(source), tools=[calculator], reasoning_effort="low")
    print("user     ", question)
    said: dict[type, str] = {Reasoning: "", Answer: ""}
    for event in chat.stream(question):
        if isinstance(event, (Reasoning, Answer)):
            said[type(event)] += event.text
        elif isinstance(event, ToolCall) and event.is_done:
            print("reasoning", said[Reasoning])
            print("call     ", event.name, event.arguments)
        elif isinstance(event, ToolResult):
            print("result   ", event.text)
    print("answer   ", said[Answer])


if __name__ == "__main__":
    main()
