"""Structured data from text: JSON that follows a schema, whatever the model would rather write.

    python examples/extract_json.py [MODEL]

With the demo the form is right and the content is not: it has learned a dictionary, and to write no JSON. Try it with
openai/gpt-oss-20b.
"""

import json
import sys

import openelm_mlx as om

TEXT = (
    "Ada Lovelace, born in London in 1815, wrote the first program; Grace Hopper of New York wrote the first compiler."
)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "city": {"enum": ["London", "New York", "other"]},
        "born": {"type": ["integer", "null"], "minimum": 1000, "maximum": 2100},
    },
    "required": ["name", "city", "born"],
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 3}  # or a Pydantic model's class

model, tokenizer = om.load(sys.argv[1] if len(sys.argv) > 1 else "demo-gpt-oss")
answer = om.generate(model, tokenizer, f"List the people in this text.\n\n{TEXT}", schema=SCHEMA, max_tokens=400)
for person in json.loads(answer):
    print(f"{person['name']!r}, {person['city']}, born {person['born']}")
