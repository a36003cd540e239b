"""Damaged files by the hundred, read by everything that reads files; run as a program, so that no damage can hurt a test.

    python tests/file_fuzz.py FIRST STOP [READER ...]

Case N is always the same file. Each case prints its number before it begins; what went wrong with it is printed as a line
of JSON. A case that takes longer than LONGEST seconds of processor time ends the process, with the place in the program
where it was.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openelm_mlx.platforms import keep_float32, use_device

keep_float32()
use_device()


import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from conftest import random_model, save_folder  # noqa: E402

from benchmarks.measurements.routing import Trace  # noqa: E402
from openelm_mlx.checkpoint.torch_file import refuse_harmful  # noqa: E402
from openelm_mlx.conversation.session import Chat  # noqa: E402
from openelm_mlx.conversion import convert  # noqa: E402
from openelm_mlx.decoding.prefix_cache import PrefixCache  # noqa: E402
from openelm_mlx.errors import UserError  # noqa: E402
from openelm_mlx.files import read_yaml  # noqa: E402
from openelm_mlx.generate import generate  # noqa: E402
from openelm_mlx.loading import load  # noqa: E402
from openelm_mlx.memory.calibration import calibrated, store_memory, store_speed  # noqa: E402
from openelm_mlx.memory.machine import this_machine  # noqa: E402
from openelm_mlx.memory.measured import Calibration, MeasuredRates  # noqa: E402
from openelm_mlx.memory.stored import store  # noqa: E402
from openelm_mlx.planning import plan  # noqa: E402
from openelm_mlx.text.tokenizer import load_tokenizer  # noqa: E402
from openelm_mlx.tools.mcp import read_servers  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
LONGEST = 10  # seconds of processor time, of a case that takes some milliseconds
MOST_MEMORY = 300_000  # kB that a case may add to the process's peak
LARGEST_PROCESS = 4 << 30
LONGEST_MESSAGE = 1500


# --- damage to bytes ---


def _cut(data: bytes, random: random.Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _flip(data: bytes, random: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _insert(data: bytes, random: random.Random) -> bytes:
    place = random.randrange(len(data) + 1)
    piece = random.choice((b"\xff\xfe", b"\xc0\x80", b"\0", b"\xed\xa0\x80", b"[" * 3000, b'"', random.randbytes(40)))
    return data[:place] + piece + data[place:]


def _drop(data: bytes, random: random.Random) -> bytes:
    first, last = sorted(random.randrange(len(data) + 1) for _ in range(2))
    return data[:first] + data[last:]


def _repeat(data: bytes, random: random.Random) -> bytes:
    first, last = sorted(random.randrange(len(data) + 1) for _ in range(2))
    return data[:last] + data[first:last] + data[last:]


def _blank(data: bytes, random: random.Random) -> bytes:
    first, last = sorted(random.randrange(len(data) + 1) for _ in range(2))
    return data[:first] + random.choice((b"\0", b"\xff", b" ")) * (last - first) + data[last:]


def _replace(data: bytes, random: random.Random) -> bytes:
    text = data.decode("latin-1")
    wholes = (
        b"", b"\0", b"null", b"[]", b"{}", b"0", b'""', b"1e999", b"NaN", b"9" * 5000, b"[" * 100_000, b'{"a":' * 100_000,
        b"<!DOCTYPE html><html><body>Log in</body></html>", b"version https://git-lfs.github.com/spec/v1\n",
        b"\xef\xbb\xbf" + data, text.encode("utf-16"), text.encode("utf-32"), data.replace(b'"', b"'"), data + data,
        b"\x1f\x8b" + data, b"PK\x03\x04" + data, b"\n" * 100 + data, data.replace(b":", b":\0"), b"\xff" * 64,
        b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", b"\x02\0\0\0\0\0\0\0{}", b"&a [*a]", b"!!python/object:os.system x",
    )  # fmt: skip
    return random.choice(wholes)


BYTES = (_cut, _flip, _flip, _insert, _drop, _repeat, _blank, _replace)


# --- damage to values ---

_DEEP: Any = 0
for _ in range(400):
    _DEEP = [_DEEP]
HUGE_NUMBER = "\x00huge\x00"  # stands for one that Python does not write out
ODD = (
    None, True, False, 0, -1, 1, 2, 3, 7, 255, 2**15, 2**24, 2**31, 2**32, 2**40, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30,
    10**400, HUGE_NUMBER, 0.0, -0.0, 0.5, 1.0, 1e-300, 1e38, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), "",
    " ", "x", "0", "1e5", "\ud800", "\0", "a\nb", "\x1b[2J", "../x", "/etc/passwd", "a" * 70_000, "ä" * 300, [], {}, [None],
    [[]], [{}], [0], [-1], [1, 2, 3], ["x"], [2**70], {"": None}, {"x": {}}, {"content": 5}, {"content": None}, _DEEP,
    [1] * 40, "F32", "BF16", "U8", "F4", "mxfp4", "yarn", "llama3", "openelm", "gpt_oss",
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Where a value has others in it: (the object or list, its key)."""
    found: list[tuple[Any, Any]] = []
    rest = [value]
    while rest:
        each = rest.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        for key in keys:
            found.append((each, key))
            rest.append(each[key])
    return found


def change(value: Any, random: random.Random) -> Any:
    """A JSON value, changed at one to four places; what is changed is `value` itself where it has places."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        found = places(value)
        if not found or random.random() < 0.02:
            value = random.choice(ODD)
            continue
        # Few at the top, many deep below: each depth should have its turn.
        holder, key = random.choice(found if random.random() < 0.5 else [each for each in found if each[0] is value])
        match random.randrange(8):
            case 0:
                del holder[key]
            case 1:
                other, place = random.choice(found)
                holder[key] = json.loads(json.dumps(other[place]))
            case 2:
                holder[key] = [holder[key]]
            case 3 if isinstance(holder, dict) and random.random() < 0.5:
                place = random.randrange(len(key) + 1)
                holder[key[:place] + random.choice("ZaG>é0 ") + key[place + 1 :]] = holder.pop(key)
            case 3 if isinstance(holder, dict):
                holder[str(random.choice(("", "x", "0", "-1", key + " ", key.upper(), "\ud800", "2" * 30)))] = (
                    holder.pop(key)
                )
            case 4 if isinstance(holder[key], list):
                holder[key] = holder[key] * random.choice((0, 2, 5))
            case 5 if type(holder[key]) in (int, float):
                number = holder[key]
                holder[key] = random.choice(
                    (number + 1, -number, number * 2, number * 0.5 if number < 1e9 else 0.5, str(number)[:9])
                )
            case _:
                holder[key] = random.choice(ODD)
    return value


def as_json(value: Any, random: random.Random) -> bytes:
    """The text of a JSON value; now and then with a name that stands twice."""
    text = json.dumps(value).replace(json.dumps(HUGE_NUMBER), "7" * 5000)
    if isinstance(value, dict) and value and random.random() < 0.1:
        name = random.choice(list(value))
        text = f"{{{json.dumps(name)}: {json.dumps(random.choice(ODD[:40]))}, {text[1:]}".replace(
            json.dumps(HUGE_NUMBER), "1"
        )
    return text.encode()


def damaged_json(data: bytes, random: random.Random) -> bytes:
    if random.random() < 0.25:
        return random.choice(BYTES)(data, random)
    return as_json(change(json.loads(data), random), random)


def damaged_safetensors(data: bytes, random: random.Random) -> bytes:
    if random.random() < 0.25:
        return random.choice(BYTES)(data, random)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    described = (header.get("__metadata__") or {}).get("contents")
    if described is not None and random.random() < 0.6:  # a prefix cache describes itself there
        header["__metadata__"]["contents"] = json.dumps(change(json.loads(described), random))
        text = json.dumps(header).encode()
    else:
        text = as_json(change(header, random), random)
    claimed = len(text) if random.random() < 0.9 else random.choice((0, 2, 2**24, 2**63, 2**64 - 1))
    return struct.pack("<Q", claimed) + text + data[8 + length :]


def damaged_npz(data: bytes, random: random.Random) -> bytes:
    if random.random() < 0.4:
        return random.choice(BYTES)(data, random)
    arrays: dict[str, Any] = dict(np.load(io.BytesIO(data)))
    name = random.choice(list(arrays))
    odd = (
        np.zeros(0, np.int16), np.array(5), np.zeros((2, 2), np.float32), np.array(["a"]), np.array([2**62]), np.array(-1),
        np.array([True]), np.array([1 + 2j]), np.array(float("nan")), np.zeros((3, 1, 0), np.int8), np.array([b"x"]),
        np.array(["2026-01-01"], "M8[D]"), np.zeros(2, [("a", "i4")]), np.array([2**64 - 1], np.uint64),
    )  # fmt: skip
    match random.randrange(4):
        case 0:
            del arrays[name]
        case 1:
            arrays[name] = random.choice(odd)
        case 2:
            arrays[name] = arrays[name] * random.choice((-1, 0, 2, 100))
        case _:
            arrays[name] = np.asarray(arrays[name]).astype(random.choice(("i8", "f4", "u1", "U4", "i2", "u8")))
    stream = io.BytesIO()
    random.choice((np.savez, np.savez_compressed))(stream, **arrays)
    return stream.getvalue()


def damaged_zip(data: bytes, random: random.Random) -> bytes:
    """A PyTorch file; in half of the cases a sound archive of damaged records."""
    if random.random() < 0.5:
        return random.choice(BYTES)(data, random)
    stream = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
            for record in old.infolist():
                content = old.read(record)
                if record.filename.endswith("data.pkl") or random.random() < 0.1:
                    content = random.choice(BYTES)(content, random)
                new.writestr(record.filename, content)
    except zipfile.BadZipFile:  # one of the old format
        return random.choice(BYTES)(data, random)
    return stream.getvalue()


def damaged_gguf(data: bytes, random: random.Random) -> bytes:
    """Mostly in its header: what lies there says where everything else does."""
    if random.random() < 0.2:
        return random.choice(BYTES)(data, random)
    changed = bytearray(data)
    header = data.find(b"\0" * 64) if random.random() < 0.5 else 20_000
    for _ in range(random.choice((1, 1, 2, 5))):
        place = random.randrange(max(1, min(header, len(data))))
        match random.randrange(4):
            case 0:
                changed[place] ^= 1 << random.randrange(8)
            case 1:
                changed[place : place + 8] = random.choice((b"\xff" * 8, bytes(8), struct.pack("<Q", 2**40), b"\1" * 8))
            case 2:
                changed[place] = random.randrange(256)
            case _:
                del changed[place : place + random.choice((1, 4, 8))]
    return bytes(changed)


def damaged_bytes(data: bytes, random: random.Random) -> bytes:
    return random.choice(BYTES)(data, random)


def damaged_lines(data: bytes, random: random.Random) -> bytes:
    """JSON, a line each."""
    lines = data.splitlines()
    place = random.randrange(len(lines))
    lines[place] = damaged_json(lines[place], random)
    return b"\n".join(lines) + b"\n"


# --- something else than a file ---


def _socket(path: Path) -> None:
    os.chdir(path.parent)  # a longer name is too long for a socket
    with socket.socket(socket.AF_UNIX) as here:
        here.bind(path.name)
    os.chdir("/")


def _sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(1 << 40)


def _locked(path: Path) -> None:
    path.write_bytes(b"{}")
    path.chmod(0)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


KINDS: tuple[Callable[[Path], None], ...] = (
    os.mkfifo, Path.mkdir, _socket, _sparse, _locked, _loop, lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to("/dev/full"), lambda path: path.symlink_to("nowhere"),
    lambda path: path.symlink_to(path.parent),
    lambda path: path.symlink_to("/proc/self/mem"), lambda path: path.symlink_to("/dev/tty"),
)  # fmt: skip


# --- who reads ---


class Reader:
    """A folder with sound files, one of which is damaged, and the call that reads them.

    prepare: fills the folder once. read: what a user would call; nothing in the folder may be changed by it but `scratch`.
    """

    def __init__(
        self,
        prepare: Callable[[Path], None],
        damage: dict[str, Callable[[bytes, random.Random], bytes]],
        read: Callable[[Path], object],
    ) -> None:
        self.prepare, self.damage, self.read = prepare, damage, read
        self.folder = Path()
        self.sound: dict[str, bytes] = {}

    def case(self, random: random.Random) -> str:
        """Put one damaged file into the folder; what was done, in words."""
        if not self.sound:
            self.folder = Path(tempfile.mkdtemp(dir=ROOT))
            self.prepare(self.folder)
            self.sound = {name: (self.folder / name).read_bytes() for name in self.damage}
            self.read(self.folder)  # what is sound is read, or damage would say nothing
            self.mend()
        name = random.choice(list(self.damage))
        path = self.folder / name
        if random.random() < 0.08:
            path.unlink()
            number = random.randrange(len(KINDS))
            KINDS[number](path)
            return f"{name}: kind {number}"
        path.write_bytes(self.damage[name](self.sound[name], random))
        return f"{name}: damaged"

    def mend(self) -> None:
        for name, data in self.sound.items():
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
            path.write_bytes(data)


def _copied(*folders: Path) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        for each in folders:
            shutil.copytree(each, folder, dirs_exist_ok=True)

    return prepare


def _loaded(folder: Path) -> None:
    """Load it and compute a token, as far as that goes."""
    plan(folder)
    model, tokenizer = load(folder, memory_limit="1GB")
    generate(model, tokenizer, [1, 2, 3], max_tokens=2)
    if tokenizer is not None:
        generate(model, tokenizer, "Hello", max_tokens=1)


def _converted(folder: Path) -> None:
    target = Path(tempfile.mkdtemp(dir=ROOT)) / "out"
    try:
        convert(folder, target, dtype="float16")
    except UserError:
        assert not target.exists(), "a half-written output is left"
        raise
    finally:
        shutil.rmtree(target.parent)


def _gguf(folder: Path) -> None:
    """OpenELM with a tokenizer, and gpt-oss, each in a GGUF file."""
    save_folder(folder / "m", random_model(), "llama")
    (folder / "m" / "LICENSE").write_text("A licence.")
    convert(folder / "m", folder / "openelm.gguf", gguf_type="q8_0")
    convert(FIXTURES / "gpt_oss_tiny", folder / "gpt_oss.gguf", tokenizer=None)


def _from_gguf(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        target = Path(tempfile.mkdtemp(dir=ROOT)) / "out"
        try:
            convert(folder / name, target)
        except UserError:
            assert not target.exists(), "a half-written output is left"
            raise
        finally:
            shutil.rmtree(target.parent)

    return read


def _encoded(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.encode_prompt("Hello, wörld! <s> 🙂")
    tokenizer.decode(tokens)
    tokenizer.decode(range(min(tokenizer.vocab_size, 700)))


def _whole(folder: Path) -> None:
    save_folder(folder / "m", random_model())
    for file in (*(folder / "m").iterdir(), *(FIXTURES / "tokenizers" / "llama").iterdir()):
        shutil.copy(file, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2], "bos_token_id": 1}')


def _shards(folder: Path) -> None:
    """Two shards with an index, the config, a card, licence and the rest that a conversion carries along."""
    _whole(folder)
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    names = sorted(weights)
    table = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in part})
        table |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    (folder / "model.safetensors").unlink()
    (folder / "README.md").write_text("---\nlicense: apple-amlr\ntags: [x]\n---\n# A model\n\nText.\n")
    (folder / "LICENSE").write_text("A licence.\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def _yaml(folder: Path) -> None:
    (folder / "model.yaml").write_text(
        "model:\n  language_modeling:\n    name: general_gpt\n    general_gpt:\n      model_name: OpenELM-270M\n"
        "      vocab_size: 32000\n      max_context_length: 2048\n      qkv_multipliers: [0.5, 1.0]\n"
        "x: &a [1, 2.5, ~, 2026-01-01, !!binary aGk=]\ny: *a\n"
    )


def _described(folder: Path) -> None:
    from openelm_mlx.checkpoint.reader import read_config
    from openelm_mlx.specs import spec_from_config

    read_yaml(folder / "model.yaml", UserError)
    spec_from_config(read_config(folder))


_MODEL: list[Any] = []


def _model() -> Any:
    if not _MODEL:
        _MODEL.extend(load("demo-gpt-oss"))
    return _MODEL


def _prompt_cache(folder: Path) -> None:
    model, tokenizer = _model()
    cache = PrefixCache()
    for prompt in ("Once upon a time", "What is a piano?"):
        generate(model, tokenizer, prompt, max_tokens=2, prefix_cache=cache)
    cache.save(folder / "prompts.safetensors")


def _remembered(folder: Path) -> None:
    cache = PrefixCache()
    model, tokenizer = _model()
    cache.load(folder / "prompts.safetensors", model)
    generate(model, tokenizer, "Once upon a time", max_tokens=2, prefix_cache=cache)


def _measured(folder: Path) -> None:
    os.environ["OPENELM_MLX_CACHE"] = str(folder)
    machine = this_machine()
    store_memory(Calibration({"openelm": 1.1}, 5_000_000, "2026-01-01"), machine)
    store_speed({"openelm": MeasuredRates(1e-4, 1e10, 1e10)}, 1e9, machine, "2026-01-01").rename(folder / "memory")


def _planned(folder: Path) -> None:
    os.environ["OPENELM_MLX_CACHE"] = str(folder)
    link = store("memory", {})
    link.unlink()
    link.symlink_to(folder / "memory")
    try:
        calibrated(this_machine())
        plan("demo-openelm").as_dict()
    finally:
        link.unlink()


def _routes(folder: Path) -> None:
    numbers = np.random.default_rng(0)
    passes = [np.argsort(numbers.random((n, 3, 8)), axis=-1)[..., :2].astype(np.int16) for n in (5, 1, 1, 1)]
    Trace(8, passes).save(folder / "trace.npz")


def _chat(folder: Path) -> None:
    messages = [
        {"role": "user", "content": "Hi", "channel": None, "recipient": None, "content_type": None},
        {"role": "assistant", "content": "Hello", "channel": "final", "recipient": None, "content_type": None},
    ]
    chat = Chat(*_model(), max_tokens=8)
    chat.save(folder / "chat.json")
    content = json.loads((folder / "chat.json").read_text())
    known = set(vars(chat)) and {"role", "content", "channel", "recipient", "content_type"}
    content["messages"] = [{k: v for k, v in each.items() if k in known} for each in messages]
    (folder / "chat.json").write_text(json.dumps(content | {"instructions": "Be kind.", "reasoning_effort": "low"}))


def _talked(folder: Path) -> None:
    chat = Chat(*_model(), max_tokens=2)
    try:
        chat.load(folder / "chat.json")
        if sum(len(each.text) for each in chat.messages) + len(chat.instructions or "") < 2000:
            for _ in chat.stream("And now?"):
                pass
    finally:
        chat.save(folder / "scratch.json", overwrite=True)
        (folder / "scratch.json").unlink()


def _servers(folder: Path) -> None:
    (folder / "mcp.json").write_text(
        '{"mcpServers": {"a": {"command": "x", "args": ["-y"], "env": {"A": "b"}}, "b": {"url": "http://localhost:1/"}}}'
    )


class _Stop(Exception):
    pass


def _interrupted(folder: Path) -> None:
    """A conversion that Ctrl-C ended: `out.partial`, and its source in `source`."""
    shutil.copytree(FIXTURES / "openelm_untied", folder / "source")
    count = 0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count == 12:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        convert(folder / "source", folder / "out", dtype="float16", progress=progress)
    (folder / "out.partial").rename(folder / "kept")
    for path in list((folder / "kept").rglob("*")):
        if path.is_file():
            path.rename(folder / f"kept-{path.name}")


def _resumed(folder: Path) -> None:
    partial = folder / "out.partial"
    (partial / "output").mkdir(parents=True)
    for path in folder.glob("kept-*"):
        place = partial / "output" if ".safetensors" in path.name else partial
        os.rename(path, place / path.name.removeprefix("kept-"))
    try:
        convert(folder / "source", folder / "out", dtype="float16")
    finally:
        for path in (partial, folder / "out"):
            shutil.rmtree(path, ignore_errors=True)


READERS = {
    "openelm": Reader(
        _whole,
        {
            "config.json": damaged_json, "model.safetensors": damaged_safetensors, "generation_config.json": damaged_json,
            "tokenizer_config.json": damaged_json, "tokenizer.model": damaged_bytes,
        },
        _loaded,
    ),
    "gpt-oss": Reader(
        _copied(FIXTURES / "gpt_oss_tiny"), {"config.json": damaged_json, "model.safetensors": damaged_safetensors}, _loaded
    ),
    "original": Reader(
        _copied(FIXTURES / "gpt_oss_tiny" / "original"),
        {"config.json": damaged_json, "dtypes.json": damaged_json, "model.safetensors": damaged_safetensors},
        _loaded,
    ),
    "shards": Reader(
        _shards,
        {
            "model.safetensors.index.json": damaged_json, "model-00001-of-00002.safetensors": damaged_safetensors,
            "config.json": damaged_json, "generation_config.json": damaged_json, "tokenizer.model": damaged_bytes,
            "README.md": damaged_bytes, "LICENSE": damaged_bytes, "chat_template.jinja": damaged_bytes,
            "tokenizer_config.json": damaged_json,
        },
        _converted,
    ),
    "gguf": Reader(_gguf, {"openelm.gguf": damaged_gguf}, _from_gguf("openelm.gguf")),
    "gguf, gpt-oss": Reader(_gguf, {"gpt_oss.gguf": damaged_gguf}, _from_gguf("gpt_oss.gguf")),
    "corenet": Reader(
        _copied(FIXTURES / "openelm_tiny" / "corenet"),
        {"corenet.json": damaged_json, "corenet.safetensors": damaged_safetensors},
        _loaded,
    ),
    "yaml": Reader(_yaml, {"model.yaml": damaged_bytes}, _described),
    "byte-level": Reader(
        _copied(FIXTURES / "tokenizers" / "byte_level"),
        {"tokenizer.json": damaged_json, "tokenizer_config.json": damaged_json, "generation_config.json": damaged_json},
        _encoded,
    ),
    "llama": Reader(
        _copied(FIXTURES / "tokenizers" / "llama"),
        {"tokenizer.model": damaged_bytes, "tokenizer_config.json": damaged_json},
        _encoded,
    ),
    "metaspace": Reader(
        _copied(FIXTURES / "tokenizers" / "llama_metaspace"), {"tokenizer.json": damaged_json}, _encoded
    ),
    "torch": Reader(
        _copied(FIXTURES / "torch"), {"sd.pt": damaged_zip, "bf16.pt": damaged_zip},
        lambda folder: [refuse_harmful(folder / name) for name in ("sd.pt", "bf16.pt")],
    ),
    "prompt cache": Reader(_prompt_cache, {"prompts.safetensors": damaged_safetensors}, _remembered),
    "measured": Reader(_measured, {"memory": damaged_json}, _planned),
    "trace": Reader(_routes, {"trace.npz": damaged_npz}, lambda folder: Trace.load(folder / "trace.npz")),
    "chat": Reader(_chat, {"chat.json": damaged_json}, _talked),
    "servers": Reader(_servers, {"mcp.json": damaged_json}, lambda folder: read_servers(folder / "mcp.json")),
    "interrupted": Reader(
        _interrupted, {"kept-journal.jsonl": damaged_lines, "kept-model.safetensors.part": damaged_bytes}, _resumed
    ),
}  # fmt: skip


# --- the program ---


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fault_of(reader: Reader, number: int) -> str | None:
    """What is wrong with how a case ended; None where it ended as it should."""
    before = peak()
    try:
        reader.read(reader.folder)
    except UserError as error:
        message = str(error)
        if "\n" in message or not message.isprintable():
            return f"its message is not a line of text: {message!r}"
        if len(message) > LONGEST_MESSAGE:
            return f"its message has {len(message):,} characters: {message[:300]!r}"
    except BaseException as error:  # noqa: BLE001 - anything but ours is what is looked for
        last = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{Path(each.filename).name}:{each.lineno}" for each in reversed(last))
        return f"{type(error).__name__}: {str(error)[:200]!r} at {where}"
    if number >= len(READERS) * 2 and peak() - before > MOST_MEMORY:  # not what importing takes
        return f"it took {(peak() - before) // 1000:,} MB"
    return None


def main(first: int, stop: int, names: list[str]) -> None:
    readers = {name: READERS[name] for name in names or READERS}
    resource.setrlimit(resource.RLIMIT_AS, (LARGEST_PROCESS, LARGEST_PROCESS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 41, 1 << 41))
    for number in range(first, stop):
        numbers = random.Random(number)
        name = list(readers)[number % len(readers)]
        print(number, flush=True)
        what = readers[name].case(numbers)
        signal.setitimer(signal.ITIMER_PROF, LONGEST)
        faulthandler.dump_traceback_later(60 * LONGEST, exit=True)  # of waiting
        fault = fault_of(readers[name], number - first)
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        if fault is not None:
            print(json.dumps({"case": number, "reader": name, "what": what, "fault": fault}), flush=True)
        readers[name].mend()


ROOT = ""

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as ROOT:
        warnings.simplefilter("ignore")
        faulthandler.enable()
        faulthandler.register(signal.SIGPROF, chain=True)  # and then it ends
        os.environ["OPENELM_MLX_CACHE"] = ROOT
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
