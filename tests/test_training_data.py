"""Lines of data and what is learned of them: kinds, masks, errors with the line's number."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import FIXTURES

from openelm_mlx.errors import DataError
from openelm_mlx.text.chat import render_chat
from openelm_mlx.text.harmony import HarmonyFormat
from openelm_mlx.text.openai_chat import conversation
from openelm_mlx.text.tokenizer import load_tokenizer
from openelm_mlx.training.batches import NOT_LEARNED
from openelm_mlx.training.data import checked, read_examples, validation_file
from openelm_mlx.training.rendering import Rendering

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "thinking": "T2", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "thinking": "T1", "content": "A1"},
    {"role": "user", "content": "again"},
    CALL,
    {"role": "tool", "content": "result"},
    {"role": "assistant", "thinking": "T3", "content": "A2"},
]


@pytest.fixture(scope="module")
def llama():
    tokenizer = load_tokenizer(FIXTURES / "tokenizers" / "llama")
    return Rendering(tokenizer, "openelm-instruct", 128)


@pytest.fixture(scope="module")
def harmony():
    return Rendering(load_tokenizer(FIXTURES / "harmony"), "harmony", 4096)


def learned(rendering, item, **changes):
    """What is learned of an example: the runs of targets that follow one another, as markup."""
    rows = replace(rendering, **changes).rows(checked(item, "line 1"))
    special = {number: name for name, number in rendering.tokenizer.special_tokens.items()}

    def text(run):
        spelled, plain = "", []
        for token in [*run, None]:
            if token in special or token is None:
                spelled += rendering.tokenizer.decode(plain, continuation=True) + special.get(token, "")
                plain = []
            else:
                plain.append(token)
        return spelled

    found = []
    for row in rows:
        runs, run = [], []
        for target in [*row.targets.tolist(), NOT_LEARNED]:
            if target != NOT_LEARNED:
                run.append(target)
            elif run:
                runs.append(text(run))
                run = []
        found.append(runs)
    return found if len(found) > 1 else found[0]


def test_the_last_turn_s_reasoning_is_learned_and_earlier_answers_end_a_turn(harmony):
    """Every token that the model writes, as it writes it: `<|return|>` also where the history has `<|end|>`."""
    call = "assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
    assert learned(harmony, {"messages": CHAT, "tools": TOOLS}) == [
        "A1<|return|>",  # its reasoning is not in the history, so its header is not learned
        f"<|channel|>analysis<|message|>T2<|end|><|start|>{call}",
        "<|channel|>analysis<|message|>T3<|end|><|start|>assistant<|channel|>final<|message|>A2<|return|>",
    ]
    assert learned(harmony, {"messages": CHAT[:2]}) == [
        "<|channel|>analysis<|message|>T1<|end|><|start|>assistant<|channel|>final<|message|>A1<|return|>"
    ]
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}] * 2
    assert learned(harmony, {"messages": plain}) == ["<|channel|>final<|message|>A<|return|>"] * 2
    assert learned(harmony, {"messages": plain}, learn="last") == ["<|channel|>final<|message|>A<|return|>"]


def test_a_harmony_row_is_the_prompt_with_the_answer(harmony):
    """What training sees before an answer is what generation sends."""
    row = harmony.rows(checked({"messages": [*CHAT[:3], {"role": "assistant", "content": "B"}]}, "line 1"))[0]
    format_ = HarmonyFormat(harmony.tokenizer)
    prompt = format_.render_for_completion(conversation(CHAT[:3]))
    assert row.tokens[: len(prompt)].tolist() == prompt
    last = row.targets[len(prompt) - 1 :]
    assert format_.decode_markup(last.tolist()) == "<|channel|>final<|message|>B<|return|>"
    assert format_.return_ not in row.tokens


def test_effort_date_and_tools_are_in_the_system_message(harmony):
    item = {"messages": CHAT[:2], "reasoning_effort": "high", "tools": TOOLS}
    row = replace(harmony, date="2026-03-09").rows(checked(item, "line 1"))[0]
    text = HarmonyFormat(harmony.tokenizer).decode_markup(row.tokens.tolist())
    assert "Reasoning: high" in text
    assert "Current date: 2026-03-09" in text
    assert "type f" in text


def test_openelm_learns_every_answer_and_its_end(llama):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]
    assert learned(llama, {"messages": chat}) == ["Hello</s>", "See you</s>"]
    assert learned(llama, {"messages": chat}, learn="last") == ["See you</s>"]
    row = llama.rows(checked({"messages": chat}, "line 1"))[0]
    prompt = render_chat(chat[:4], llama.tokenizer, "openelm-instruct")
    assert row.tokens[: len(prompt)].tolist() == prompt
    assert row.tokens[0] == llama.tokenizer.bos_token
    everything = llama.rows(checked({"messages": chat}, "line 1"))[0]
    assert learned(llama, {"messages": chat}, learn="all")[0].strip().startswith("<|system|>")
    assert everything.num_targets < len(everything)


def test_a_prompt_is_asked_as_generate_asks_it(llama):
    answer = {"prompt": "Hi", "completion": "Hello"}
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    rows = [llama.rows(checked(each, "line 1"))[0] for each in (answer, chat)]
    assert rows[0].tokens.tolist() == rows[1].tokens.tolist()
    plain = replace(llama, template="plain")
    row = plain.rows(checked({"prompt": "The sky", "completion": " is blue"}, "line 1"))[0]
    tokenizer = llama.tokenizer
    assert row.tokens.tolist() == [
        *tokenizer.encode_prompt("The sky"),
        *tokenizer.encode(" is blue", continuation=True),
    ]
    assert learned(plain, {"prompt": "The sky", "completion": " is blue"}) == [" is blue</s>"]
    assert learned(plain, {"text": "The sky"}) == ["The sky</s>"] or learned(plain, {"text": "The sky"}) == [
        " The sky</s>"
    ]


def test_preferences_are_two_rows_with_the_prompt_before_each(llama):
    wanted = [["good</s>"], ["bad</s>"]]
    assert learned(llama, {"prompt": "Hi", "chosen": "good", "rejected": "bad"}) == wanted
    both = {
        name: [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": name}]
        for name in ("chosen", "rejected")
    }
    assert learned(llama, {"prompt": "Hi", **both}) == [["chosen</s>"], ["rejected</s>"]]
    assert learned(llama, both) == [["chosen</s>"], ["rejected</s>"]]


def test_instructions_are_written_as_corenet_writes_them(llama):
    from openelm_mlx.training.rendering import instruction_text

    text = instruction_text({"instruction": "Add.", "output": "3"})
    assert text.splitlines()[0].endswith("completes the request.  ")
    assert text.endswith("\n                ### Response:\n                3")
    with_input = instruction_text({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert with_input.splitlines()[0].endswith(
        "further context. Write a response that appropriately completes the request. "
    )
    assert "\n                \n                ### Input:\n                1 2\n                \n" in with_input


def test_rows_that_are_too_long(llama):
    long = {"text": "word " * 200}
    with pytest.raises(DataError, match=r'line 7: it has \d+ tokens and a row may have 128: .*too_long="split"'):
        llama.rows(checked(long, "line 7"))
    for limit, advice in ((512, "shorten it, pass a larger max_length, or pass"), (128, "shorten it, or pass")):
        with pytest.raises(DataError, match=advice):
            replace(llama, context_length=limit).rows(checked(long, "line 7"))
    assert replace(llama, too_long="skip").rows(checked(long, "line 7")) == []
    cut = replace(llama, too_long="cut").rows(checked(long, "line 7"))
    assert [len(row) + 1 for row in cut] == [128]
    pieces = replace(llama, too_long="split").rows(checked(long, "line 7"))
    whole = replace(llama, max_length=10_000).rows(checked(long, "line 7"))[0]
    assert all(len(row) < 128 for row in pieces)
    assert [t for row in pieces for t in row.targets.tolist() if t >= 0] == whole.targets.tolist()
    question = {"prompt": "word " * 200, "completion": "x"}
    with pytest.raises(DataError, match="nothing is learned"):
        replace(llama, too_long="cut").rows(checked(question, "line 7"))


BROKEN = [
    ("not json", "line 2 is not JSON"),
    ("[1, 2]", r"line 2 is \[1, 2\], not an object"),
    ('{"prompt": "a"}', "line 2 has prompt: give"),
    ('{"instruction": "a"}', "line 2 has instruction: give"),
    ('{"messages": "hi"}', "line 2: messages is text"),
    ('{"messages": []}', "line 2: messages is an empty list"),
    ('{"messages": ["hi"]}', "line 2: message 1 of messages is 'hi'"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "line 2: messages has no message of the assistant"),
    ('{"text": "  "}', "line 2: text is empty"),
    ('{"text": 5}', "line 2: text is 5: give text"),
    ('{"prompt": "a", "completion": ""}', "line 2: completion is empty"),
    ('{"messages": [{"role": "assistant", "content": "x"}], "reasoning_effort": "huge"}', "line 2: reasoning_effort"),
    ('{"text": "\\ud800"}', "line 2: text holds half a character"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "line 2: preferences and other examples are mixed"),
    ("[" * 100_000, "line 2 is nested too deep"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN, ids=[message[:30] for _, message in BROKEN])
def test_a_broken_line_is_named_by_its_number(tmp_path, line, message):
    (tmp_path / "d.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n{{"text": "fine"}}\n')
    with pytest.raises(DataError, match=message):
        read_examples(tmp_path / "d.jsonl")


def test_files_that_are_none(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"has no examples"):
        read_examples(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="line 1 is not UTF-8"):
        read_examples(tmp_path / "latin.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"without train\.jsonl"):
        read_examples(tmp_path)
    with pytest.raises(DataError, match="data is 5"):
        read_examples(5)  # type: ignore[arg-type]


def test_what_other_programs_write(tmp_path):
    """A byte order mark, Windows's line ends, empty lines, further fields, a folder as mlx-lm wants it, lines from Python."""
    line = json.dumps({"text": "fine", "id": 3, "prompt": None})
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}\r\n".encode())
    (tmp_path / "valid.jsonl").write_text(line)
    found = read_examples(tmp_path)
    assert [example.kind for example in found] == ["text", "text"]
    assert found[1].place == "train.jsonl, line 3"
    assert validation_file(tmp_path) == tmp_path / "valid.jsonl"
    assert read_examples([{"text": "x"}])[0].place == "data[0]"


def test_a_dataset_of_the_hub_is_read_through_datasets(monkeypatch):
    def load(name, split):
        assert (name, split) == ("owner/name", "test")
        return [{"text": "a"}, {"text": ""}]

    # An extra, which takes 300 MB: only this function of it is called.
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    with pytest.raises(DataError, match=r"owner/name:test, row 2: text is empty"):
        read_examples("owner/name:test")


def test_templates_that_cannot_express_a_line(llama, harmony):
    chat = {"messages": CHAT[:2]}
    with pytest.raises(DataError, match="line 3: This model has no chat template"):
        replace(llama, template="plain").rows(checked(chat, "line 3"))
    with pytest.raises(DataError, match="line 3: it has tools"):
        llama.rows(checked({**chat, "tools": TOOLS}, "line 3"))
    with pytest.raises(DataError, match="line 3: Message 1 is the result of a tool"):
        harmony.rows(checked({"messages": [CHAT[4], CHAT[1]]}, "line 3"))
