"""`python -m openelm_mlx serve`: OpenAI's and Anthropic's APIs on this machine, and a page to chat on.

What has to be known is checked first, then the server listens, and only then MLX is imported and a model is loaded.
"""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from ..checks import whole_number
from ..errors import SettingError
from ..files import expanded
from . import INTERRUPTED, output
from .options import add_preset_argument, add_worker_arguments, bits_asked_for, worker_options
from .output import say

if TYPE_CHECKING:
    from ..server.own_tools import OwnTools
    from ..server.settings import ServerSettings

HELP = "serve models over HTTP: OpenAI's and Anthropic's APIs, and a page to chat on"
KEY_VARIABLE = "OPENELM_MLX_API_KEY"
DEFAULT_MODEL = "demo-gpt-oss"
LARGEST_KEY_FILE = 2**16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    models = parser.add_argument_group("models")
    models.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="SOURCE",
        help="a model to serve (repeatable): demo-gpt-oss (the default), demo-openelm, a folder, a weight file, or a Hugging "
        "Face repository as owner/name; NAME=SOURCE gives it another name. The first one is loaded at the start, others when "
        "a request names them",
    )
    models.add_argument("--models-folder", metavar="DIR", help="serve the models in the folders of DIR, too")
    models.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=PATH",
        help="a LoRA or DoRA adapter of the first model, which requests call MODEL:NAME; MODEL:NAME=PATH for that of another "
        "one (repeatable)",
    )  # fmt: skip
    models.add_argument(
        "--alias", action="append", default=[], metavar="ALIAS=NAME", help="another name of a model (repeatable)"
    )
    models.add_argument(
        "--keep-alive",
        default="forever",
        metavar="TIME",
        help="give back a model that nobody has used for so long: 5m, 90s, 1h, 0 for at once (default: forever; when another "
        "one needs the memory, the least recently used is given back anyway)",
    )
    loading = parser.add_argument_group("loading (every model)")
    loading.add_argument(
        "--memory-limit", metavar="SIZE", help="memory limit for all models together, for example 8GB (default: what the "
        "machine has)",
    )  # fmt: skip
    loading.add_argument("--context-length", type=int, metavar="N", help="use at most N tokens of a model's context")
    loading.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="compute in this type (default: as stored)"
    )
    add_preset_argument(loading)
    loading.add_argument(
        "--dense-bits", type=int, choices=[8, 6, 5, 4], help="instead of a preset: quantize dense matrices to N bits"
    )
    loading.add_argument("--kv-bits", type=int, choices=[8, 16], help="8: keys and values in half the memory")
    loading.add_argument(
        "--expert-slots", type=int, metavar="N", help="keep N of each layer's experts in memory, the others on disk"
    )
    loading.add_argument(
        "--wire",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="wire the models' memory (default: if needed)",
    )
    add_worker_arguments(parser.add_argument_group("several machines (one model at a time)"))
    requests = parser.add_argument_group("requests")
    requests.add_argument(
        "--max-running", type=int, metavar="N", help="requests that are computed at once (default: what memory allows)"
    )
    requests.add_argument(
        "--max-waiting",
        type=int,
        metavar="N",
        help="requests in a model's queue; one more is refused (default: 1024)",
    )
    tools = parser.add_argument_group("tools (off unless named)")
    tools.add_argument(
        "--tools",
        default="",
        metavar="NAMES",
        help="tools that gpt-oss may run on this machine, for whoever may reach the server, comma-separated: calculator, "
        "python, files=DIR, patch=DIR, mcp=SERVER",
    )
    tools.add_argument(
        "--allow-unsandboxed", action="store_true", help="run python without a sandbox if this machine has none"
    )
    tools.add_argument(
        "--max-rounds", type=int, default=16, metavar="N", help="let it call tools N times an answer (default: 16)"
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS",
        help="listen on this address (default: 127.0.0.1, this machine alone; others need a key)",
    )  # fmt: skip
    network.add_argument("--port", type=int, default=8080, metavar="N", help="the port (default: 8080; 0: a free one)")
    network.add_argument(
        "--api-key-file", metavar="FILE",
        help=f"ask requests for a key: one a line in FILE, which only you may read (or one in the variable {KEY_VARIABLE})",
    )  # fmt: skip
    network.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="another name of this machine (repeatable)"
    )
    network.add_argument(
        "--allow-origin", action="append", default=[], metavar="ORIGIN",
        help="let web pages of this origin use the server, for example http://localhost:3000 (repeatable)",
    )  # fmt: skip
    shown = parser.add_argument_group("output")
    shown.add_argument("--quiet", "-q", action="store_true", help="no line for each request")


def run(args: argparse.Namespace) -> int:
    """Listen until Ctrl-C. Returns the exit code."""
    settings = settings_of(args)
    from ..server.connections import listening_socket

    listening = listening_socket(settings.host, settings.port)
    import asyncio

    from ..server.loading import is_still_loading
    from ..server.running import serve

    with listening, _opened_tools(settings) as tools:
        _log_to_stderr(args.quiet)
        told = Told([] if tools is None else tools.names)
        failure = asyncio.run(serve(settings, listening, told, tools))
    if failure is not None:
        raise SettingError(failure)
    code = INTERRUPTED if told.was_hurried else 0
    if is_still_loading():
        output.flush()
        os._exit(code)
    return code


def _opened_tools(settings: ServerSettings) -> AbstractContextManager[OwnTools | None]:
    """The tools that are switched on. Raises ToolError for those that cannot be started."""
    if not settings.tools:
        return nullcontext()
    from ..server.own_tools import OwnTools

    opened = OwnTools(settings.tools, allow_unsandboxed=settings.allow_unsandboxed)
    for note in opened.notes:
        say(note)
    return opened


def settings_of(args: argparse.Namespace, environment: Mapping[str, str] | None = None) -> ServerSettings:
    """What the options say, checked. Raises SettingError, and CheckpointError for what cannot be a model."""
    from ..server.hosts import checked_hosts, checked_origins, is_loopback
    from ..server.names import Names, models_in, parse_aliases, served_model, with_adapters
    from ..server.settings import ServerSettings

    environment = os.environ if environment is None else environment
    keys = _keys(args.api_key_file, environment)
    whole_number("--port", args.port, low=0, high=65535)
    if not keys and not is_loopback(args.host):
        raise SettingError(
            f"--host {args.host} lets other machines use this server: give it a key first, in a file with --api-key-file, or "
            f"in the variable {KEY_VARIABLE}."
        )
    for name in ("max_running", "max_waiting"):
        value = getattr(args, name)
        if value is not None:
            whole_number(name, value, low=int(name == "max_running"))
    whole_number("max_rounds", args.max_rounds)
    if args.tools.strip(" ,"):
        from ..tools.toolbox import parse_names

        parse_names(args.tools)
    sources = args.model or ([] if args.models_folder else [DEFAULT_MODEL])
    models = [served_model(each) for each in sources]
    if args.models_folder is not None:
        models += models_in(args.models_folder)
    aliases = parse_aliases(args.alias)
    Names(models, {})  # says whether two of them have one name; an alias may be an adapter's
    models = with_adapters(models, args.adapter)
    Names(models, aliases)
    return ServerSettings(
        models=tuple(models), aliases=aliases, host=args.host, port=args.port, keep_alive=seconds_of(args.keep_alive),
        load_options=_load_options(args), max_running=args.max_running, max_waiting=args.max_waiting, api_keys=keys,
        tools=args.tools.strip(" ,"), allow_unsandboxed=args.allow_unsandboxed, max_rounds=args.max_rounds,
        allow_hosts=checked_hosts(args.allow_host), allow_origins=checked_origins(args.allow_origin, bool(keys)),
    )  # fmt: skip


def _load_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `om.load` for every model."""
    from ..memory.sizes import parse_memory

    return {
        "context_length": args.context_length, "dtype": args.dtype, "dense_bits": bits_asked_for(args),
        "kv_bits": args.kv_bits, "expert_slots": args.expert_slots, "memory_limit": parse_memory(args.memory_limit),
        "wire": args.wire, "batch_size": args.max_running or 1, **worker_options(args),
    }  # fmt: skip


_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds_of(text: str) -> float | None:
    """Seconds of a time such as 5m; None for "forever". Raises SettingError."""
    text = text.strip().lower()
    if text in ("forever", "-1"):
        return None
    number, unit = (text[:-1], text[-1]) if text and text[-1] in "smhd" else (text, "")
    if not number.isascii() or not number.isdecimal():
        raise SettingError(f"--keep-alive is {text!r}: give a time such as 5m, 90s or 1h, 0 for at once, or forever.")
    return int(number) * _UNITS[unit]


def _keys(name: str | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of the file and of the environment. Raises SettingError for a file that others may read."""
    found = []
    if name is not None:
        found += [line.strip() for line in _read_private(name).splitlines() if line.strip()]
        if not found:
            raise SettingError(
                f"--api-key-file {name} holds no key: write one into it, as `openssl rand -hex 24` makes them."
            )
    if environment.get(KEY_VARIABLE, "").strip():
        found.append(environment[KEY_VARIABLE].strip())
    for key in found:
        if not key.isascii() or not key.isprintable() or " " in key:
            where = KEY_VARIABLE if name is None else f"--api-key-file {name}"
            raise SettingError(
                f"A key of {where} has characters that a header cannot carry: use letters, digits, - and _."
            )
    return tuple(dict.fromkeys(found))


def _read_private(name: str) -> str:
    path = expanded(name, SettingError)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise SettingError(f"--api-key-file {name} cannot be read: {error.strerror or error}.") from None
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise SettingError(f"--api-key-file {name} is no ordinary file: give one with a key a line.")
        if facts.st_mode & 0o077:
            raise SettingError(
                f"--api-key-file {name} can be read by others (mode {stat.S_IMODE(facts.st_mode):o}): run `chmod 600 {name}`."
            )
        return os.read(descriptor, LARGEST_KEY_FILE).decode()
    except (OSError, UnicodeDecodeError):
        raise SettingError(f"--api-key-file {name} is not text: give a file with a key a line.") from None
    finally:
        os.close(descriptor)


class Told:
    """What is said at the terminal while the server runs."""

    def __init__(self, tool_names: Sequence[str] = ()) -> None:
        self.was_hurried = False
        self._tool_names = tool_names

    def listening(self, settings: ServerSettings, host: str, port: int) -> None:
        """The address, and what to point a client at."""
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        first = settings.models[0].name
        key = "your API key" if settings.api_keys else "any API key"
        others = f" and {len(settings.models) - 1} more" if len(settings.models) > 1 else ""
        output.report(f"Serving {first}{others} at {address} (open it in a browser to chat).")
        say(f"Clients of OpenAI: base URL {address}/v1, model {first}, {key}. Of Anthropic: {address}. Ctrl-C ends it.")
        if self._tool_names:
            who = "have the key" if settings.api_keys else "can reach this address"
            say(f"Tools run on this machine for all who {who}: {', '.join(self._tool_names)}.")

    def stopping(self, num_answers: int, seconds: float) -> None:
        """After the first Ctrl-C."""
        if num_answers:
            answers = "1 answer is" if num_answers == 1 else f"{num_answers} answers are"
            say(f"{answers} still being written, and may take {seconds:g} seconds. Ctrl-C again ends everything now.")

    def stopping_at_once(self) -> None:
        """After the second."""
        self.was_hurried = True


def _log_to_stderr(quiet: bool) -> None:
    """Lines of the server's log, each with its request's id."""
    import logging

    from ..server.log import log, request_id

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            of = request_id.get()
            say(f"{f'{of} ' if of else ''}{self.format(record)}")

    handler = Lines()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for logger in (log, logging.getLogger("uvicorn.error")):
        logger.handlers, logger.propagate = [handler], False
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
