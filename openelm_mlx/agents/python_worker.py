"""The interpreter of the python tool: runs in a process of its own and keeps its variables from one script to the next.

It knows nothing of this package: the tool hands its source to `python -c`, so that a sandbox needs no file of ours. It
reads scripts from standard input (a line with the length, then the bytes), lets them write to standard output and error
as they like, and says on a file descriptor of its own when each has ended.
"""

import ast
import contextlib
import json
import linecache
import os
import signal
import sys
import time
import traceback


def limit_resources(limits):
    """Set the limits that the system knows, by their names in `resource`; a Mac lacks some of them."""
    import resource

    for name, value in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))


def forbid_calls(program):
    """Give up system calls for good, by a filter's program (sandbox_init.py makes it); an OSError where that fails."""
    import ctypes
    import struct

    libc = ctypes.CDLL(None, use_errno=True)
    text = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(text)))
    for arguments in ((38, 1, 0, 0, 0), (22, 2, header, 0, 0)):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "the kernel did not take the filter of system calls")


def end_with_parent(every=0.5):
    """Watch the program that started this one, and end when it has ended, also in the middle of an endless script.

    Linux's sandbox is told to by the kernel; a Mac's, and no sandbox at all, are not.
    """
    import threading

    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(every)
        os.kill(os.getpid(), signal.SIGKILL)

    with contextlib.suppress(RuntimeError):  # no thread is allowed: then nobody watches
        threading.Thread(target=watch, daemon=True).start()


def run_script(script, variables, name):
    """Run a script; the value of its last expression is shown, as a notebook does. False if an exception ended it."""
    linecache.cache[name] = (len(script), None, script.splitlines(keepends=True), name)  # for tracebacks
    try:
        tree = ast.parse(script, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), variables)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), variables)
            if value is not None:
                variables["_"] = value
                sys.stdout.write(f"{value!r}\n")
    except SystemExit as end:
        sys.stderr.write(f"SystemExit: {end.code}\n")
        return False
    except BaseException as error:  # noqa: BLE001  (whatever a script raises is shown to the model)
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename != name:
            frames = frames.tb_next  # ours are of no interest
        traceback.print_exception(type(error), error, frames)
        return False
    return True


def main():
    """Serve scripts until standard input ends."""
    config = json.loads(sys.argv[1])
    limit_resources(config["limits"])
    if "filter" in config:
        forbid_calls(bytes.fromhex(config["filter"]))
    if os.getppid() > 1:  # 1 or 0: the first process of a sandbox of our own, with which all others end
        end_with_parent()
    sys.path.extend(config["paths"])
    os.chdir(config["folder"])
    scripts, report = os.fdopen(os.dup(0), "rb"), os.fdopen(config["report"], "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # a script that asks for input gets none
    os.set_inheritable(config["report"], False)
    variables = {"__name__": "__main__", "__builtins__": __builtins__}
    report.write("ready\n")
    report.flush()
    count, own_pid = 0, os.getpid()
    while header := scripts.readline():
        count += 1
        is_done = run_script(scripts.read(int(header)).decode("utf-8", "replace"), variables, f"<script {count}>")
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        if os.getpid() != own_pid:
            os._exit(0)  # a child that the script forked and let go on: there is one interpreter
        report.write("done\n" if is_done else "failed\n")
        report.flush()


if __name__ == "__main__":
    main()
