"""Runs untrusted code in bubblewrap: no network, no files of the host, resource limits, and nothing left behind.

The code sees an interpreter with its standard library, the system's shared libraries, time zones, and the named
packages, all read-only, and an empty folder in memory. It has its own namespaces for processes, network, host name and
inter-process communication. Killing bubblewrap ends all of its processes, including detached ones, and the files
vanish with the last of them.

As root, bubblewrap makes no user namespace; the harness switches to a different user id in each run, since the
operating system does not limit root's processes. As another user, bubblewrap makes a user namespace, in which
processes are counted separately. A run takes about 85 ms, mostly the start of the interpreter.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import select
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import final

from memgen.environments.code.execution import (
    HARNESS,
    Executor,
    Program,
    RunLimits,
    base_python,
    run_environment,
)
from memgen.environments.processes import Launch

INSTALL = (
    "install it (Debian and Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap), or set "
    "isolation: limits, which limits time and memory but lets the code read files and use the network"
)
UNUSABLE = (
    "allow user namespaces (in a container: more privileges), or set isolation: limits, which limits time and memory but "
    "lets the code read files and use the network"
)

_PYTHON = "/python"
_PACKAGES = "/packages"
_WORK = "/tmp/work"
_PROGRAM = "/program.py"
_PROGRAMS = "/bin"
_HOSTS = "127.0.0.1 localhost\n"
_LOOKUP = "hosts: files\n"
_FIRST_UID = 1_900_000_000
"""First user id of runs started by root, far above those of real users."""


@final
class Sandbox:
    """Starts a Python program in bubblewrap."""

    def __init__(
        self,
        program: Path,
        folder_mb: int,
        processes: int,
        packages: Sequence[str] = (),
        programs: Sequence[str] = (),
    ) -> None:
        """Checks that bubblewrap is installed; starts nothing.

        Args:
            program: the Python file, which sees the standard library and `packages`.
            folder_mb: size of all files that it may write, which are in memory.
            processes: processes and threads at a time.
            packages: import names of installed packages that the code may import, with their requirements.
            programs: commands of the host that the code may run, such as `sh` or `ls`.

        Raises:
            RuntimeError: if bubblewrap is not installed.
            ValueError: if a package or a program is not installed.
        """
        found = shutil.which("bwrap")
        if found is None:
            raise RuntimeError(
                f"bubblewrap (bwrap) is not installed, and code is not run without it; {INSTALL}"
            )
        self.bwrap = found
        # Of bubblewrap 0.8 and later; it needs a user namespace, which is not made for root.
        usage = subprocess.run([found, "--help"], capture_output=True, text=True, check=False).stdout
        self._no_more_namespaces = ["--disable-userns"] if "--disable-userns" in usage else []
        self._folder_mb = folder_mb
        self._processes = processes
        self.packages = tuple(packages)
        self.programs = tuple(programs)
        self._mounts = [
            *_read_only(program, _PROGRAM),
            *_interpreter(),
            *_libraries(),
            *_package_files(self.packages),
            *_program_files(self.programs),
        ]

    @contextlib.contextmanager
    def launch(self, number: int) -> Iterator[Launch]:
        """A sandbox, in which the program has not begun; the kernel cleans up after it.

        Args:
            number: differs between the sandboxes of this process that run at the same time.
        """
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        try:
            with contextlib.ExitStack() as stack:
                names = [stack.enter_context(_text(text)) for text in (_HOSTS, _LOOKUP)]
                yield self._launch(number, writer, names)
        finally:
            os.close(writer)
            _wait_for_end(reader)
            os.close(reader)

    def _launch(self, number: int, info: int, names: Sequence[int]) -> Launch:
        root = os.getuid() == 0
        apart = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        apart += ["--cap-drop", "ALL"]
        if root:
            apart += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            apart += ["--unshare-user", "--uid", "65534", "--gid", "65534", *self._no_more_namespaces]
        size = str(self._folder_mb << 20)
        path = f"{_PYTHON}/bin:{_PROGRAMS}"
        command = [
            self.bwrap, *apart, "--die-with-parent", "--new-session", "--hostname", "sandbox",
            "--info-fd", str(info),
            "--perms", "0444", "--ro-bind-data", str(names[0]), "/etc/hosts",
            "--perms", "0444", "--ro-bind-data", str(names[1]), "/etc/nsswitch.conf",
            *_folders(), *self._mounts,
            "--proc", "/proc", "--dev", "/dev",
            "--perms", "1777", "--size", size, "--tmpfs", "/dev/shm",
            "--perms", "1777", "--size", size, "--tmpfs", "/tmp",
            "--perms", "0777", "--dir", _WORK,
            "--remount-ro", "/", "--chdir", _WORK,
            "--", f"{_PYTHON}/bin/python3", "-s", "-P", "-B", _PROGRAM,
        ]  # fmt: skip
        environment = run_environment(
            home=_WORK, temporary="/tmp", path=path, packages=_PACKAGES if self.packages else None
        )
        # PYTHONHOME: the interpreter was built for another place.
        environment |= {"PYTHONHOME": _PYTHON, "LD_LIBRARY_PATH": f"{_PYTHON}/lib"}
        return Launch(
            command=command,
            # bubblewrap's own environment is visible in the sandbox's /proc, so it is this one too.
            environment=environment,
            folder="/",
            # Differs between parallel runs of this process, and between processes.
            uid=_FIRST_UID + (os.getpid() * 256 + number % 256) % 100_000_000 if root else None,
            processes=self._processes,
            inherited=(info, *names),
        )


@final
class Bubblewrap(Executor):
    """Runs each program in a sandbox of its own."""

    def __init__(
        self,
        limits: RunLimits | None = None,
        workers: int = 1,
        packages: Sequence[str] = (),
        programs: Sequence[str] = (),
    ) -> None:
        """Checks the installation; the first run checks that it works.

        Args:
            limits: resource limits of each run.
            workers: number of parallel runs.
            packages: import names of installed packages that the code may import, with their requirements.
            programs: commands of the host that the code may run, such as `sh` or `ls`.

        Raises:
            RuntimeError: if bubblewrap is not installed.
            ValueError: if a package or a program is not installed.
        """
        super().__init__(limits or RunLimits(), workers)
        self._sandbox = Sandbox(HARNESS, self.limits.folder_mb, self.limits.processes, packages, programs)
        self._tried = False

    @contextlib.contextmanager
    def launch(self, number: int) -> Iterator[Launch]:
        """A sandbox; the kernel cleans up after it."""
        if not self._tried:
            self._try()
        with self._sandbox.launch(number) as launch:
            yield launch

    def _try(self) -> None:
        self._tried = True
        probe = Program(solution="", tests="def test_probe():\n    import json, socket\n", style="pytest")
        try:
            execution = self.run(probe)
            problem = None if execution.passed else f"{execution.error or dict(execution.details)}"
        except RuntimeError as error:
            problem = str(error)
        if problem is not None:
            self._tried = False
            raise RuntimeError(f"bubblewrap is installed, but cannot be used here ({problem}); {UNUSABLE}")


@contextlib.contextmanager
def _text(text: str) -> Iterator[int]:
    """A file descriptor to read a short text from."""
    reader, writer = os.pipe()
    try:
        os.write(writer, text.encode())
        os.close(writer)
        yield reader
    finally:
        os.close(reader)


def _wait_for_end(info: int) -> None:
    """Waits until the sandbox's first process has ended, and with it all others and their files."""
    try:
        pid = int(json.loads(os.read(info, 4096))["child-pid"])
        process = os.pidfd_open(pid)
    except (OSError, ValueError):  # It never started, or has ended.
        return
    try:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        poll.poll(10_000)
    finally:
        os.close(process)


def _folders() -> list[str]:
    """Arguments for the mount points' folders: if bubblewrap made them itself, only the owner could read them."""
    names = [
        "/usr", "/usr/lib", "/usr/share", "/lib", _PYTHON, f"{_PYTHON}/bin", f"{_PYTHON}/lib", _PACKAGES,
        _PROGRAMS, "/etc",
    ]  # fmt: skip
    return [
        word
        for name in names
        if not (name == "/lib" and Path(name).is_symlink())
        for word in ("--perms", "0755", "--dir", name)
    ]


def _read_only(source: str | Path, target: str | Path) -> list[str]:
    return ["--ro-bind", str(source), str(target)]


def _interpreter() -> list[str]:
    """Mounts of the interpreter without installed packages."""
    python = base_python()
    prefix = Path(sys.base_prefix)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    mounts: list[str] = []
    if prefix in (Path("/usr"), Path("/")):
        standard = sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix})
        extensions = sysconfig.get_path("platstdlib", vars={"platbase": sys.base_prefix})
        mounts += _read_only(standard, f"{_PYTHON}/lib/{version}")
        if Path(extensions).resolve() != Path(standard).resolve():
            mounts += _read_only(extensions, f"{_PYTHON}/{sys.platlibdir}/{version}")
    else:
        mounts += _read_only(prefix / "lib", f"{_PYTHON}/lib")
        if sys.platlibdir != "lib" and (prefix / sys.platlibdir).is_dir():
            mounts += _read_only(prefix / sys.platlibdir, f"{_PYTHON}/{sys.platlibdir}")
    for name in dict.fromkeys(("lib", sys.platlibdir)):
        for installed in ("site-packages", "dist-packages"):
            if (prefix / name / version / installed).is_dir():
                mounts += ["--tmpfs", f"{_PYTHON}/{name}/{version}/{installed}"]
    for name in ("python", "python3"):
        mounts += _read_only(python, f"{_PYTHON}/bin/{name}")
    return mounts


def _libraries() -> list[str]:
    """Mounts of the system's shared libraries and time zones."""
    triplet = sysconfig.get_config_var("MULTIARCH") or "none"
    folders = [Path("/usr/lib64"), Path("/usr/lib", triplet), Path("/lib64"), Path("/lib", triplet)]
    if not Path("/usr/lib", triplet).is_dir():  # Not Debian's layout.
        folders.append(Path("/usr/lib"))
    mounts: list[str] = []
    for folder in (Path("/lib"), Path("/lib64")):
        if folder.is_symlink():  # To /usr/lib, on most systems.
            mounts += ["--symlink", os.readlink(folder), str(folder)]
    for folder in [*folders, Path("/usr/share/zoneinfo")]:
        if folder.is_dir() and folder.resolve() == folder:
            mounts += _read_only(folder, folder)
    return mounts


def _package_files(names: Sequence[str]) -> list[str]:
    """Mounts of the files that the named packages and their requirements installed."""
    if not names:
        return []
    providers = importlib.metadata.packages_distributions()
    pending: list[str] = []
    for name in names:
        if name not in providers:
            raise ValueError(f"packages: there is no installed package {name}; install it or leave it out")
        pending += providers[name]
    mounts: list[str] = []
    seen: set[str] = set()
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # A requirement for other platforms.
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "/")}
        for top in sorted(tops - {"__pycache__"}):
            mounts += _read_only(str(distribution.locate_file(top)), f"{_PACKAGES}/{top}")
        for requirement in distribution.requires or ():
            if "extra ==" not in requirement and (match := re.match(r"[A-Za-z0-9._-]+", requirement)):
                pending.append(match.group())
    return mounts


def _program_files(names: Sequence[str]) -> list[str]:
    mounts: list[str] = []
    for name in names:
        found = shutil.which(name)
        if found is None:
            raise ValueError(f"programs: there is no command {name}; install it or leave it out")
        mounts += _read_only(os.path.realpath(found), f"{_PROGRAMS}/{name}")
    return mounts
