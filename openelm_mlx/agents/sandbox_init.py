"""Makes a sandbox of Linux namespaces around itself and runs a program in it: `python -I sandbox_init.py CONFIG`.

Needs no program of the system and no root: where it is not root, it takes a user namespace. In the sandbox there are
some folders to read, one to write, no network, no other processes, and nothing else. It imports nothing of this package.
"""

import contextlib
import ctypes
import errno
import json
import os
import signal
import struct
import sys

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000

# System calls by number. What Python has no use for and attacks on kernels begin with is forbidden; clone3 hides its flags
# from a filter, so it is said not to exist, and clone is used instead, which may make no namespaces.
COMMON = {
    "mount_setattr": 442,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "io_uring_setup": 425,
    "clone3": 435,
}
CALLS = {
    "x86_64": {
        **COMMON, "clone": 56, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155, "bpf": 321,
        "ptrace": 101, "keyctl": 250, "add_key": 248, "request_key": 249, "perf_event_open": 298, "userfaultfd": 323,
    },
    "aarch64": {
        **COMMON, "clone": 220, "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41, "bpf": 280,
        "ptrace": 117, "keyctl": 219, "add_key": 217, "request_key": 218, "perf_event_open": 241, "userfaultfd": 282,
    },
}  # fmt: skip
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
NAMESPACE_FLAGS = 0x7E020000
DEVICES = ("null", "zero", "full", "random", "urandom")

MACHINE = os.uname().machine
libc = ctypes.CDLL(None, use_errno=True)


def check(result, what):
    """Raise OSError with what failed, if it failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source, target, kind=None, flags=0, options=None):
    """mount(2)."""
    encoded = [None if each is None else os.fsencode(each) for each in (source, target, kind, options)]
    check(libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]), f"mount {target}")


def restrict(target, flags, is_recursive=False):
    """Add restrictions to a mount, and to all below it: mount_setattr(2), Linux 5.12. What it has already, it keeps."""
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    path, size = ctypes.c_char_p(os.fsencode(target)), ctypes.c_size_t(ctypes.sizeof(attributes))
    depth = AT_RECURSIVE if is_recursive else 0
    result = libc.syscall(CALLS[MACHINE]["mount_setattr"], AT_FDCWD, path, depth, ctypes.byref(attributes), size)
    check(result, f"mount_setattr {target}")


def bind(source, root):
    """Show `source`, to be read, under the same path below `root`; a link is copied as a link."""
    target = root + source
    if os.path.islink(source):
        if not os.path.lexists(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(source), target)
        return
    place(source, target)
    restrict(target, MS_RDONLY | MS_NOSUID | MS_NODEV, is_recursive=True)


def place(source, target):
    """Bind `source` to `target`, which is made if it is not there."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "a"):
            pass
    mount(source, target, flags=MS_BIND | MS_REC)


def build_root(config):
    """A root of its own: folders to read, the scratch folder, a few devices, and processes of this sandbox alone."""
    root = config["root"]
    mount(None, "/", flags=MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for source in config["readable"]:
        if os.path.lexists(source):
            bind(source, root)
    for name in DEVICES:
        place(f"/dev/{name}", f"{root}/dev/{name}")
    folder = config["folder"]
    os.makedirs(root + folder, exist_ok=True)
    mount(config["scratch"], root + folder, flags=MS_BIND)
    restrict(root + folder, MS_NOSUID | MS_NODEV)
    if not os.path.lexists(f"{root}/tmp"):
        os.symlink(folder, f"{root}/tmp")
    os.makedirs(f"{root}/proc", exist_ok=True)
    with contextlib.suppress(OSError):  # not everywhere allowed, and Python runs without
        mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(root)
    check(libc.syscall(CALLS[MACHINE]["pivot_root"], b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")
    restrict("/", MS_RDONLY | MS_NOSUID | MS_NODEV)


def take_user_namespace():
    """Become all-powerful in a user namespace in which only this user exists."""
    uid, gid = os.getuid(), os.getgid()
    check(libc.unshare(CLONE_NEWUSER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def drop_powers(config):
    """Give up root and every way back to it."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(config["uid"], config["uid"], config["uid"])
        os.setresuid(config["uid"], config["uid"], config["uid"])
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    check(libc.capset(header, nothing), "capset")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    die_with_parent()
    forbid_calls()


def forbidden_calls():
    """A program of the kernel's packet filter that forbids system calls, as seccomp(2) takes it."""
    load, equal, at_least, has_bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
    calls = dict(CALLS[MACHINE])
    clone, clone3 = calls.pop("clone"), calls.pop("clone3")
    # (operation, value, instructions to skip if so, if not)
    program = [(load, 4, 0, 0), (equal, ARCHITECTURES[MACHINE], 1, 0), (answer, kill, 0, 0), (load, 0, 0, 0)]
    program += [(at_least, 0x40000000, 0, 1), (answer, refuse, 0, 0)]  # x86's third kind of numbers
    for number in calls.values():
        program += [(equal, number, 0, 1), (answer, refuse, 0, 0)]
    program += [(equal, clone3, 0, 1), (answer, absent, 0, 0), (equal, clone, 0, 3)]
    program += [(load, 16, 0, 0), (has_bits, NAMESPACE_FLAGS, 0, 1), (answer, refuse, 0, 0), (answer, allow, 0, 0)]
    return b"".join(struct.pack("=HBBI", operation, so, other, value) for operation, value, so, other in program)


def forbid_calls():
    """Forbid system calls for good."""
    program = forbidden_calls()
    text = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(text)))
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0), "seccomp")


def die_with_parent():
    """Be killed when the process that started this one ends, however it ends. Changing the user takes this back."""
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def wait_for(pid):
    """The exit code of `pid`, while other children that end are taken note of."""
    while True:
        ended, status = os.wait()
        if ended == pid:
            return os.waitstatus_to_exitcode(status) & 0xFF


def run(config):
    """As the first process of the sandbox: build it, start the program, end with it. With this one, all others end."""
    build_root(config)
    drop_powers(config)
    pid = os.fork()
    if pid == 0:
        die_with_parent()
        os.execve(config["program"][0], config["program"], config["environment"])
    close_pipes(config)
    os._exit(wait_for(pid))


def close_pipes(config):
    """Leave the pipes to the program alone, so that their ends are seen when it ends."""
    for descriptor in (0, 1, config["report"]):
        os.close(descriptor)


def main():
    config = json.loads(sys.argv[1])
    die_with_parent()
    if os.getppid() != config["parent"]:
        os._exit(1)  # it ended before it was watched
    try:
        if MACHINE not in CALLS:
            raise OSError(errno.ENOSYS, f"the system calls of {MACHINE} are not known")
        if os.getuid() != 0:
            take_user_namespace()
        check(libc.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET), "unshare")
        pid = os.fork()
        if pid == 0:
            die_with_parent()
            run(config)
    except OSError as error:
        sys.stderr.write(f"sandbox: {error.strerror or error}\n")
        os._exit(125)
    close_pipes(config)
    os._exit(wait_for(pid))


if __name__ == "__main__":
    main()
