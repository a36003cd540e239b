"""Apple's instruct template in tokens, and which template a model gets."""

from pathlib import Path

import pytest

from openelm_mlx.errors import PromptError, SettingError, TokenizerError
from openelm_mlx.text.chat import OPENELM_INSTRUCT, PLAIN, choose_template, render_chat
from openelm_mlx.text.tokenizer import load_tokenizer

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizers"
SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "B"}


@pytest.fixture(scope="module", params=["llama", "llama_json"])
def tokenizer(request):
    return load_tokenizer(FIXTURES / request.param)


def spelled(tokens, tokenizer) -> str:
    """The prompt as text, with its control tokens written out."""
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    return b"".join(names.get(token, "").encode() or tokenizer.token_bytes(token) for token in tokens).decode()


# What Apple's Jinja template gives with trim_blocks and lstrip_blocks. The space after <s> is the tokenizer's.
@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([USER], "<s> <|user|>\nHi</s>\n<|assistant|>\n"),
        ([SYSTEM, USER], "<s> <|system|>\nS</s>\n<|user|>\nHi</s>\n<|assistant|>\n"),
        (
            [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "C"}],
            "<s> <|system|>\nS</s>\n<|user|>\nHi</s>\n<|assistant|>\nB</s>\n<|user|>\nC</s>\n<|assistant|>\n",
        ),
        ([{"role": "user", "content": ""}], "<s> <|user|>\n</s>\n<|assistant|>\n"),
        ([{"role": "user", "content": " a\n"}], "<s> <|user|>\n a\n</s>\n<|assistant|>\n"),
    ],
)
def test_messages_are_rendered_as_apples_template_does(messages, text, tokenizer):
    tokens = render_chat(messages, tokenizer, OPENELM_INSTRUCT)
    assert spelled(tokens, tokenizer) == text
    assert tokens[0] == tokenizer.bos_token
    assert tokens.count(tokenizer.eos_tokens[0]) == len(messages)


def test_without_a_generation_prompt_the_last_message_is_ended(tokenizer):
    tokens = render_chat([USER, ASSISTANT], tokenizer, OPENELM_INSTRUCT, add_generation_prompt=False)
    assert spelled(tokens, tokenizer) == "<s> <|user|>\nHi</s>\n<|assistant|>\nB</s>\n"


def test_segments_after_an_end_token_get_no_space_of_the_tokenizers(tokenizer):
    end = tokenizer.eos_tokens[0]
    tokens = render_chat([USER], tokenizer, OPENELM_INSTRUCT)
    cut = tokens.index(end) + 1
    assert tokens[1 : cut - 1] == tokenizer.encode("<|user|>\nHi")
    assert tokens[cut:] == tokenizer.encode("\n<|assistant|>\n", continuation=True)
    assert tokenizer.token_bytes(tokens[cut]).startswith(b"\n")


def test_the_beginning_of_a_conversation_keeps_its_tokens(tokenizer):
    first = render_chat([USER], tokenizer, OPENELM_INSTRUCT, add_generation_prompt=False)
    longer = render_chat([USER, ASSISTANT, USER], tokenizer, OPENELM_INSTRUCT)
    assert longer[: len(first) - 1] == first[:-1]  # without the line break, which may merge with the next tag


def test_content_that_spells_control_tokens_makes_none(tokenizer):
    content = "a</s>\n<s><unk> </s>"
    plain = render_chat([USER], tokenizer, OPENELM_INSTRUCT)
    tokens = render_chat([{"role": "user", "content": content}], tokenizer, OPENELM_INSTRUCT)
    for control in tokenizer.special_tokens.values():
        assert tokens.count(control) == plain.count(control)
    assert content in spelled(tokens, tokenizer)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("Hi", "at least one message"),
        (USER, "at least one message"),
        (["Hi"], "Message 1 is 'Hi'"),
        ([USER, {"role": "tool", "content": "x"}], "Message 2 has the role 'tool'.*system, user, assistant"),
        ([{"content": "x"}], "Message 1 has the role None"),
        ([{"role": ["user"], "content": "x"}], "Message 1 has the role"),
        ([{"role": "user"}], "Message 1 has no content"),
        ([{"role": "user", "content": 5}], "The content of message 1 is 5"),
        ([{"role": "user", "content": "\ud800"}], "half a character"),
    ],
)
def test_what_is_no_conversation_is_one_sentence(messages, message, tokenizer):
    with pytest.raises(PromptError, match=message):
        render_chat(messages, tokenizer, OPENELM_INSTRUCT)


def test_null_and_parts_are_contents(tokenizer):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    for role in ("system", "user", "assistant"):
        for content, text in ((None, ""), (parts, "Hello"), ([], "")):
            given = render_chat([{"role": role, "content": content}, USER], tokenizer, OPENELM_INSTRUCT)
            assert given == render_chat([{"role": role, "content": text}, USER], tokenizer, OPENELM_INSTRUCT)
    with pytest.raises(PromptError, match="Message 1 has a part of type 'image_url'"):
        render_chat([{"role": "user", "content": [{"type": "image_url"}]}], tokenizer, OPENELM_INSTRUCT)
    calling = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    with pytest.raises(PromptError, match="Message 2 calls a tool"):
        render_chat([USER, calling], tokenizer, OPENELM_INSTRUCT)


def test_a_base_model_takes_no_messages(tokenizer):
    with pytest.raises(PromptError, match=OPENELM_INSTRUCT):
        render_chat([USER], tokenizer, PLAIN)


def test_a_template_that_does_not_exist_names_those_that_do(tokenizer):
    for call in (
        lambda: render_chat([USER], tokenizer, "chatml"),
        lambda: choose_template("chatml", None, "OpenELM-270M-Instruct"),
        lambda: choose_template(None, "chatml", "OpenELM-270M-Instruct"),
    ):
        with pytest.raises(SettingError, match=r"chatml.*openelm-instruct or plain"):
            call()


def test_a_tokenizer_without_an_end_token_cannot_chat(tmp_path):
    from tokenizers import Tokenizer, decoders, models

    library = Tokenizer(models.BPE({"a": 0}, []))
    library.decoder = decoders.ByteLevel()
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="end-of-text"):
        render_chat([USER], load_tokenizer(tmp_path), OPENELM_INSTRUCT)


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("apple/OpenELM-270M-Instruct", OPENELM_INSTRUCT),
        ("openelm-3b-instruct-4bit", OPENELM_INSTRUCT),
        ("/Users/me/models/OpenELM-1_1B-Instruct/", OPENELM_INSTRUCT),
        ("OPENELM_450M_INSTRUCT", OPENELM_INSTRUCT),
        ("/hub/models--apple--OpenELM-3B-Instruct/snapshots/0a1b2c", OPENELM_INSTRUCT),
        ("apple/OpenELM-270M", PLAIN),
        ("/Users/me/instruct/OpenELM-270M", PLAIN),
        ("instruct/OpenELM-270M", PLAIN),
        ("/hub/models--instruct--OpenELM-3B/snapshots/0a1b2c", PLAIN),
        ("", PLAIN),
    ],
)
def test_the_name_is_the_last_resort(name, template):
    choice = choose_template(None, None, name)
    assert choice.template == template
    assert choice.reason.startswith('because the name "')
    assert ("says Instruct" in choice.reason) == (template == OPENELM_INSTRUCT)


def test_what_was_asked_for_comes_before_what_is_stored_before_the_name():
    assert choose_template(PLAIN, OPENELM_INSTRUCT, "x-Instruct") == (PLAIN, "because it was given")
    assert choose_template(None, PLAIN, "x-Instruct") == (PLAIN, "because it is stored with the model")
    assert choose_template(None, OPENELM_INSTRUCT, "x").template == OPENELM_INSTRUCT
