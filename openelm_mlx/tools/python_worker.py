"""The interpreter of the python tool: runs in a process of its own and keeps its variables from one script to the next.

It knows nothing of this package: the tool hands its source to `python -c`, so that a sandbox needs no file of ours. It
reads scripts from standard input (a line with a token and the length, then the bytes), lets them write to standard output
and error as they like, and says each one's end with its token on a descriptor of its own. Scripts run in this very
process, so they may break what they find here; whatever a limit depends on stands outside of it.

The end of a script is said by the process that ran it, so a script that digs for its token can say it early: nothing that
this process does is beyond a script's reach. It deceives about itself alone, since every call has a token of its own that
comes with the next script, and what it writes later ends the interpreter.
"""

import ast
import builtins
import contextlib
import json
import linecache
import os
import random
import signal
import sys
import time
import traceback
import types

# Kept under names of our own: a script may delete them from `builtins`.
_compile, _exec, _eval, _isinstance, _repr = compile, exec, eval, isinstance, repr
_TracebackException = traceback.TracebackException
_BUILTINS = dict(vars(builtins))


def limit_resources(limits):
    """Set the limits that the system knows, by their names in `resource`; a Mac lacks some of them."""
    import resource

    for name, value in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))


def end_with_parent(every=0.5):
    """Watch the program that started this one, and end when it has ended, also in the middle of an endless script.

    Linux's sandboxes end with it; a Mac's, and no sandbox at all, do not.
    """
    import threading

    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(every)
        os.kill(os.getpid(), signal.SIGKILL)

    with contextlib.suppress(RuntimeError):  # no thread is allowed: then nobody watches
        threading.Thread(target=watch, daemon=True).start()


def out_of_the_way(descriptor, at_least):
    """The same pipe under a number that loops over all descriptors (to the limit that scripts are given) do not reach."""
    import fcntl
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = min(most, 4096) if most > 0 else 4096  # -1: no limit
    lowest = random.SystemRandom().randrange(at_least, room - 8) if room - 8 > at_least else 10
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, lowest)
    os.close(descriptor)
    return moved


class Interpreter:
    """Runs scripts in a module `__main__` of their own, so that pickle finds what they define."""

    def __init__(self, folder, limits):
        most = limits.get("RLIMIT_NOFILE", 128)
        self.scripts, self.report = out_of_the_way(os.dup(0), most), out_of_the_way(3, most)
        self.output = out_of_the_way(os.dup(1), most)
        self.nothing = out_of_the_way(os.open(os.devnull, os.O_RDONLY), most)
        self.folder, self.pid, self.count, self.is_running = folder, os.getpid(), 0, False
        self.module = types.ModuleType("__main__")
        self.variables = vars(self.module)
        sys.modules["__main__"] = self.module

    def serve(self, read=os.read, write=os.write, getpid=os.getpid):
        """Serve scripts until the pipe that brings them is closed."""
        while header := self.line(read):
            token, length = header.split()
            script, length = bytearray(), int(length)
            while len(script) < length and (part := read(self.scripts, length - len(script))):
                script += part
            self.count += 1
            self.mend()
            try:
                self.run(script.decode("utf-8", "replace"), f"<script {self.count}>")
            except KeyboardInterrupt:  # a second one, before the first was noted
                self.is_running = False
            except BaseException as error:  # noqa: BLE001  (a script broke what this class needs)
                write(2, f"The interpreter is broken ({type(error).__name__}) and starts anew.\n".encode())
                os._exit(70)
            self.flush()
            if getpid() != self.pid:
                os._exit(0)  # a child that the script forked and let go on: there is one interpreter
            write(self.report, token + b"\n")

    def line(self, read):
        """The next line of the pipe, or what there is of it at its end."""
        line = b""
        while not line.endswith(b"\n") and (byte := read(self.scripts, 1)):
            line += byte
        return line

    def mend(self):
        """Put back what the script before may have taken away and the next one needs."""
        for name, value in _BUILTINS.items():
            vars(builtins).setdefault(name, value)
        self.variables.update(__name__="__main__", __builtins__=builtins)
        for target, source in ((0, self.nothing), (1, self.output), (2, self.output)):
            os.dup2(source, target)  # a script that asks for input gets none
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            stream = getattr(sys, name, None)
            if stream is None or getattr(stream, "closed", False):
                setattr(sys, name, open(descriptor, "w", encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115
        with contextlib.suppress(ValueError):  # not the main thread: a script forked in another one
            signal.signal(signal.SIGINT, self.interrupted)
        with contextlib.suppress(OSError):
            os.makedirs(self.folder, exist_ok=True)
            os.chmod(self.folder, 0o700)
        try:
            os.getcwd()
        except OSError:  # it was deleted
            with contextlib.suppress(OSError):
                os.chdir(self.folder)

    def interrupted(self, number, frame):
        """SIGINT: an exception in the script, and nothing between two scripts."""
        if self.is_running:
            raise KeyboardInterrupt

    def run(self, script, name):
        """Run a script; the value of its last expression is shown, as a notebook does."""
        try:
            if not _isinstance(linecache.cache, dict):
                linecache.cache = {}
            linecache.cache[name] = (len(script), None, script.splitlines(keepends=True), name)  # for tracebacks
            self.is_running = True
            tree = ast.parse(script, name)
            last = tree.body.pop() if tree.body and _isinstance(tree.body[-1], ast.Expr) else None
            _exec(_compile(tree, name, "exec"), self.variables)
            if last is not None:
                value = _eval(_compile(ast.Expression(last.value), name, "eval"), self.variables)
                if value is not None:
                    self.variables["_"] = value
                    sys.stdout.write(_repr(value) + "\n")
            self.is_running = False
        except BaseException as error:  # noqa: BLE001  (whatever a script raises is shown to the model)
            self.is_running = False
            self.show(error, name)

    def show(self, error, name):
        """Write a traceback of the script's part alone."""
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename != name:
            frames = frames.tb_next  # ours are of no interest
        try:
            if _isinstance(error, SystemExit):
                sys.stderr.write(f"SystemExit: {error.code}\n")
            else:
                shown = _TracebackException(type(error), error, frames)
                if shown.stack and shown.stack[-1].name == "interrupted":
                    del shown.stack[-1]  # ours too
                sys.stderr.write("".join(shown.format()))
        except BaseException:  # noqa: BLE001  (an exception that cannot be shown, or no working standard error)
            self.flush()
            os.write(2, f"{type(error).__name__} (it cannot be shown)\n".encode("utf-8", "replace"))

    def flush(self):
        """What the script wrote is in the pipe before its end is reported."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()


def main():
    """Serve scripts until standard input ends."""
    config = json.loads(sys.argv[1])
    sys.argv[:] = [""]
    if config["report"] != 3:
        os.dup2(config["report"], 3)
        os.close(config["report"])
    interpreter = Interpreter(config["folder"], config["limits"])
    interpreter.mend()
    for stream in (sys.stdout, sys.stderr):  # half of a character is shown, and is no error
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    limit_resources(config["limits"])
    if config["watches_parent"]:
        end_with_parent()
    sys.path.extend(config["paths"])
    os.chdir(config["folder"])
    os.write(interpreter.report, config["token"].encode() + b"\n")
    interpreter.serve()


if __name__ == "__main__":
    main()
