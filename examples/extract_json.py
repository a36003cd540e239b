"""Structured data from text: JSON that follows a schema.

    python examples/extract_json.py [MODEL]

With a MODEL such as openai/gpt-oss-20b: the people of a text. The demo has read nothing but a dictionary, and the one kind of
JSON that it knows is a calculator's call; so without MODEL these are calculations, out of questions.
"""

import json
import sys

import openelm_mlx as om
from openelm_mlx.conversation import ToolCall
from openelm_mlx.tools import calculator

QUESTIONS = ["What is 7 times 6?", "What is 120 - 45?", "How much is 3 plus 12?"]
TEXT = (
    "Ada Lovelace, born in London in 1815, wrote the first program; Grace Hopper of New York wrote the first compiler."
)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "city": {"type": "string"}, "born": {"type": ["integer", "null"]}},
    "required": ["name", "city", "born"],
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 3}  # or a Pydantic model's class

model, tokenizer = om.load(sys.argv[1] if len(sys.argv) > 1 else "demo-gpt-oss")
if len(sys.argv) > 1:
    answer = om.generate(model, tokenizer, f"List the people in this text.\n\n{TEXT}", schema=PEOPLE)
    for person in json.loads(answer):
        print(f"{person['name']}, {person['city']}, born {person['born']}")
    sys.exit()
for question in QUESTIONS:
    for event in om.Chat(model, tokenizer, tools=[calculator], reasoning_effort="low").stream(question):
        if isinstance(event, ToolCall) and event.is_done:  # its arguments are held to the schema of the tool
            print(f"{question:24} {json.loads(event.arguments)['expression']}")
