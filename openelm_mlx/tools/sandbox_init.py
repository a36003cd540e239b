"""What runs first in a sandbox on Linux, and stays: `python -I -c SOURCE CONFIG`. It imports nothing of this package.

Without bubblewrap it also makes the sandbox, of the kernel's namespaces: it needs no program of the system and no root,
for where it is not root it takes a user namespace. In the sandbox there are some folders to read, one to write, no
network, no other processes, and nothing else.

As the sandbox's first process it then starts, interrupts and ends interpreters as it is told by a socket that no script
has. So files and limits stay when an interpreter has to go, and a script cannot say that it ended when it did not.
"""

import ctypes
import errno
import fcntl
import json
import os
import signal
import socket
import struct
import sys

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 4, 22, 38, 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
AF_UNIX = 1

# System calls by number, of three kinds: those by which attacks on kernels begin; those by which one process reaches
# into another; and those that give memory which no limit counts (memfd, System V's and POSIX's queues and segments, AIO)
# or use up what the machine has once for all users (watches). Python has no use for any of them. Sockets are refused too,
# but for pairs, which asyncio needs. clone3 hides its flags from a filter, so it is said not to exist, and clone is used
# instead, which may make no namespaces.
COMMON = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "clone3": 435, "pidfd_getfd": 438,
    "process_madvise": 440, "mount_setattr": 442, "memfd_secret": 447,
}  # fmt: skip
CALLS = {
    "x86_64": {
        **COMMON, "clone": 56, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155,
        "chroot": 161, "bpf": 321, "ptrace": 101, "keyctl": 250, "add_key": 248, "request_key": 249,
        "perf_event_open": 298, "userfaultfd": 323, "personality": 135, "modify_ldt": 154, "name_to_handle_at": 303,
        "open_by_handle_at": 304, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "memfd_create": 319,
        "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240, "io_setup": 206, "inotify_init": 253,
        "inotify_init1": 294, "fanotify_init": 300, "vmsplice": 278, "socket": 41, "socketpair": 53,
        "prlimit64": 302,
    },
    "aarch64": {
        **COMMON, "clone": 220, "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41,
        "chroot": 51, "bpf": 280, "ptrace": 117, "keyctl": 219, "add_key": 217, "request_key": 218,
        "perf_event_open": 241, "userfaultfd": 282, "personality": 92, "name_to_handle_at": 264,
        "open_by_handle_at": 265, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "memfd_create": 279,
        "shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180, "io_setup": 0, "inotify_init1": 26,
        "fanotify_init": 262, "vmsplice": 75, "socket": 198, "socketpair": 199,
        "prlimit64": 261,
    },
}  # fmt: skip
SAID_NOT_TO_EXIST = ("clone3", "memfd_create", "io_uring_setup")  # programs then do without
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
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")  # for the names alone
    for source in config["readable"]:
        if os.path.lexists(source):
            bind(source, root)
    for name in DEVICES:
        place(f"/dev/{name}", f"{root}/dev/{name}")
    folder = config["folder"]
    os.makedirs(root + folder, exist_ok=True)
    # Files are in memory: its size limits all of them, including deleted ones that are still open.
    options = f"size={config['folder_bytes']},nr_inodes={config['most_files']},mode=700"
    mount("tmpfs", root + folder, "tmpfs", MS_NOSUID | MS_NODEV, options)
    for link in ("/tmp", "/dev/shm"):
        if not os.path.lexists(root + link):
            os.symlink(folder, root + link)
    os.makedirs(f"{root}/proc", exist_ok=True)
    try:  # noqa: SIM105 (what starts here imports little)
        mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError:
        pass  # not everywhere allowed, and Python runs without
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
        os.chown(config["folder"], config["uid"], config["uid"])
        os.setgroups([])
        os.setresgid(config["uid"], config["uid"], config["uid"])
        os.setresuid(config["uid"], config["uid"], config["uid"])
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    check(libc.capset(header, nothing), "capset")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    # Scripts have the same user: nobody looks into this process.
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")
    die_with_parent()
    forbid_calls()


def forbidden_calls():
    """A program of the kernel's packet filter that forbids system calls, as seccomp(2) takes it."""
    load, equal, at_least, has_bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    absent, no_access = 0x00050000 | errno.ENOSYS, 0x00050000 | errno.EACCES
    calls = dict(CALLS[MACHINE])
    clone, pair, sockets = calls.pop("clone"), calls.pop("socketpair"), calls.pop("socket")
    limit = calls.pop("prlimit64")
    # (operation, value, instructions to skip if so, if not)
    program = [(load, 4, 0, 0), (equal, ARCHITECTURES[MACHINE], 1, 0), (answer, kill, 0, 0), (load, 0, 0, 0)]
    program += [(at_least, 0x40000000, 0, 1), (answer, refuse, 0, 0)]  # x86's third kind of numbers
    for name, number in calls.items():
        program += [(equal, number, 0, 1), (answer, absent if name in SAID_NOT_TO_EXIST else refuse, 0, 0)]
    program += [(equal, sockets, 0, 1), (answer, no_access, 0, 0)]
    program += [(equal, pair, 0, 4), (load, 16, 0, 0), (equal, AF_UNIX, 0, 1), (answer, allow, 0, 0)]
    program += [(answer, no_access, 0, 0)]
    # A process may lower its own limits (0 is itself), not those of the first process, which is the same user's.
    program += [(equal, limit, 0, 4), (load, 16, 0, 0), (equal, 0, 0, 1), (answer, allow, 0, 0)]
    program += [(answer, refuse, 0, 0), (equal, clone, 0, 3)]
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


def place_descriptors(descriptors):
    """Make (input, output, report) the descriptors 0, 1 and 2, 3, and close the others."""
    high = [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in descriptors]  # out of the way first
    for target, source in ((0, high[0]), (1, high[1]), (2, high[1]), (3, high[2])):
        os.dup2(source, target)
    os.closerange(4, 256)


class Keeper:
    """The first process of the sandbox: starts interpreters and ends them, until its socket is closed.

    A message is an object in JSON. It takes {"start": number, "program": [...], "environment": {...}} with three
    descriptors (input, output, report), {"interrupt": number} and {"kill": number}; it says when it "did" that, and when
    the interpreter of a number "ended".
    """

    def __init__(self, config):
        self.control = socket.socket(fileno=config["control"])
        self.pid, self.number = 0, 0
        self.wake, writing = os.pipe()
        for descriptor in (self.wake, writing):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # from inside, the first process gets no signal without a handler
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def serve(self, folder):
        """Say that the sandbox is there, with its folder's descriptor, and do what is asked for."""
        import select

        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        socket.send_fds(self.control, [b"ready"], [descriptor])
        os.close(descriptor)
        while True:
            ready = select.select([self.control, self.wake], [], [])[0]  # type: ignore[type-var]
            if self.wake in ready:
                os.read(self.wake, 4096)
            self.reap()
            if self.control in ready:
                data, descriptors, _, _ = socket.recv_fds(self.control, 1 << 20, 3)
                if not data:
                    return  # the program that made the sandbox has ended, or closed it
                self.obey(json.loads(data), descriptors)

    def obey(self, message, descriptors):
        """Do what one message says."""
        if "start" in message:
            self.number = message["start"]
            self.pid = self.spawn(message, descriptors)
        elif "interrupt" in message:
            try:
                if self.pid:
                    os.killpg(self.pid, signal.SIGINT)  # what it started is in its group, as in a terminal
            except ProcessLookupError:
                pass  # it has only begun
            self.say("interrupted")
        elif "kill" in message:
            self.kill_all()
            self.pid = 0
            self.say("killed")

    def spawn(self, message, descriptors):
        """Start an interpreter; the report is its descriptor 3."""
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores the last two
                    signal.signal(number, signal.SIG_DFL)
                place_descriptors(descriptors)
                os.execve(message["program"][0], message["program"], message["environment"])
            except OSError as error:
                os.write(2, f"{message['program'][0]}: {error.strerror}\n".encode())
            finally:
                os._exit(126)
        for descriptor in descriptors:
            os.close(descriptor)
        return pid

    def reap(self):
        """Take note of processes that ended; with the interpreter, all that it has started end."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.pid:
                self.pid = 0
                self.kill_all()
                self.say("ended", code=os.waitstatus_to_exitcode(status))

    def kill_all(self):
        """End all processes of the sandbox but this one, which is the only one that signals to "all" do not reach."""
        while True:
            try:  # noqa: SIM105
                os.kill(-1, signal.SIGKILL)
            except ProcessLookupError:
                pass
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return

    def say(self, did, **more):
        """Tell the program that made the sandbox."""
        self.control.send(json.dumps({"did": did, "number": self.number, **more}).encode())


def main():
    config = json.loads(sys.argv[1])
    die_with_parent()
    try:
        if MACHINE not in CALLS:
            raise OSError(errno.ENOSYS, f"the system calls of {MACHINE} are not known")
        if "root" in config:
            become_first_process(config)
            build_root(config)
        drop_powers(config)
        Keeper(config).serve(config["folder"])
    except OSError as error:
        sys.stderr.write(f"sandbox: {error}\n")
        os._exit(125)
    os._exit(0)


def become_first_process(config):
    """Go on in new namespaces, as the first process there; the one outside only waits for it."""
    if os.getppid() != config["parent"]:
        os._exit(1)  # it ended before it was watched
    if os.getuid() != 0:
        take_user_namespace()
    check(libc.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET), "unshare")
    pid = os.fork()
    if pid == 0:
        return die_with_parent()
    os.close(config["control"])
    status = os.waitpid(pid, 0)[1]
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


if __name__ == "__main__":
    main()
