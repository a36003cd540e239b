"""`generate --json-schema`, `--regex` and `--grammar`: answers in the form, and mistakes in one sentence."""

import json
import re

import pytest

from openelm_mlx.commands import main

SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]}


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["generate", *arguments, "-q"])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_json_schema_from_a_file(capsys, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    code, out, err = run(capsys, "What is an apple?", "--json-schema", str(tmp_path / "s.json"))
    assert (code, err) == (0, "")
    assert json.loads(out)["colour"] in ("red", "green")


def test_a_regex_and_a_grammar(capsys, tmp_path):
    code, out, _ = run(capsys, "What is an apple?", "--regex", "[a-z]{3}[0-9]{2}")
    assert code == 0
    assert re.fullmatch("[a-z]{3}[0-9]{2}\n", out)
    (tmp_path / "g.lark").write_text('start: "yes" | "no"')
    assert run(capsys, "Is it?", "--grammar", str(tmp_path / "g.lark"), "--json")[0] == 0


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        ("{", ["--json-schema", "FILE"], "is not JSON"),
        ('{"type": "objct"}', ["--json-schema", "FILE"], "objct"),
        ("start: what", ["--grammar", "FILE"], "what"),
        (None, ["--json-schema", "FILE"], "cannot be read"),
        (None, ["--regex", "a(b"], "unclosed group"),
        ("{}", ["--regex", "a", "--json-schema", "FILE"], "leave all but one out"),
    ],
)
def test_mistakes_are_said_before_the_weights_are_read(capsys, tmp_path, monkeypatch, content, options, says):
    monkeypatch.setattr("openelm_mlx.loading.prepare", None)
    file = tmp_path / "given"
    if content is not None:
        file.write_text(content)
    code, out, err = run(capsys, "Hi", *[str(file) if option == "FILE" else option for option in options])
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
