"""RankServer: runs functions in real gloo ranks, each set forked in a fraction of a second from one imported stack.

    def test_sum(ranks):
        results = ranks.run("tests.support.sums:total", topology=Topology(tp=2, pp=2), kwargs={"start": 3})
        assert results == [...]  # one per rank

This file has two sides. RankServer lives in the pytest process, which needs no torch for it. Run as a program, the file
is the host: it imports the stack once and forks `topology.world_size` ranks per request. The module of a request is
imported in the host, so it must only define things: no tensor is computed there.

    done = ranks.program("recipe=plan model=tiny_llama", cwd=tmp_path)

is `python -m megabridge.run ...` in a process forked from the host, whose workers are forked, too: the same functions of the same
modules run in processes of their own, and only the interpreters' starts and imports are left out. Tests of a start itself start it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self

from megabridge.parallel.topology import Topology

WARMED: Final = (
    "accelerate",
    "datasets",
    "megabridge.callbacks.answer",
    "megabridge.callbacks.hf_export",
    "megabridge.callbacks.parity",
    "megabridge.callbacks.progress",
    "megabridge.data.finetuning",
    "megabridge.loggers.console",
    "megatron.core.dist_checkpointing.strategies.torch",
    "numpy.ctypeslib",
    "recipes.convert",
    "recipes.finetune",
    "rich._emoji_codes",
    "tests.support.loggers",
    "torch.utils.serialization.config",
    "transformers.generation.continuous_batching",
    "transformers.models.llama.modeling_llama",
)
"""What ranks of many tests import, beside what megabridge's worker imports for its own: seconds for each of thousands of ranks."""
START_TIMEOUT: Final = 180.0  # seconds to import the stack on a busy machine


@dataclass
class RankError(Exception):
    """A rank failed; `failure` is the host's report of the first one (launchers.processes.outcome.Failure as a dict)."""

    failure: dict[str, Any]
    output: str

    def __str__(self) -> str:
        parts = [f"rank {self.failure['rank']}: {self.failure['error']}", self.failure["traceback"], self.output]
        return "\n".join(part for part in parts if part)


class RankServer:
    """The host process, started at the first `run`. Used as a context manager: leaving it ends the host."""

    def __init__(self, folder: Path, *, root: Path) -> None:
        self.folder = folder
        self.root = root
        self.host: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.host is not None:
            assert self.host.stdin is not None
            self.host.stdin.close()
            try:
                self.host.wait(10)
            except subprocess.TimeoutExpired:
                self.host.kill()
                self.host.wait()
            self.host = None

    def run(
        self,
        target: str,
        *,
        topology: Topology | None = None,
        kwargs: Mapping[str, Any] | None = None,
        timeout: float = 120.0,
        world_size: int | None = None,
        threads_each: int = 1,
    ) -> list[Any]:
        """Runs `target` ("module:function") with `kwargs` in every rank; returns what each rank returned, by rank.

        With a topology, its groups exist when the function is called; with `world_size` alone, the function makes its
        own. Arguments and results are pickled. Raises RankError with the first failing rank's traceback and what the
        ranks printed, also when they take more than `timeout` seconds.
        """
        if topology is None and world_size is None:
            topology = Topology()
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        (folder / "request.pickle").write_bytes(pickle.dumps(dict(kwargs or {})))
        request = {
            "target": target,
            "topology": None if topology is None else asdict(topology),
            "world_size": world_size if topology is None else topology.world_size,
            "folder": str(folder),
            "timeout": timeout,
            "threads_each": threads_each,
        }
        answer = self._ask(request, timeout + 30)
        if answer is not None:
            output = folder / "output.txt"
            raise RankError(answer, output.read_text(errors="replace")[-8000:] if output.exists() else "")
        return [pickle.loads((folder / f"result_{rank}.pickle").read_bytes()) for rank in range(request["world_size"])]

    def program(
        self,
        arguments: str | Sequence[str],
        *,
        cwd: Path,
        environ: Mapping[str, str] | None = None,
        timeout: float = 240.0,
        signalled: tuple[int, str, int] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """`python -m megabridge.run` with `arguments`, in `cwd`; `environ` is beside this process's environment.

        With `signalled` (number, glob, count) it gets that signal as soon as `count` files below `cwd` fit the pattern.
        """
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        given = shlex.split(arguments) if isinstance(arguments, str) else list(arguments)
        request = {
            "program": given,
            "cwd": str(cwd),
            "environ": {**os.environ, "MEGABRIDGE_PLATFORM": "cpu", **(environ or {})},
            "folder": str(folder),
            "timeout": timeout,
            "signalled": signalled,
        }
        answer = self._ask(request, timeout + 30)
        assert answer is not None
        printed = [(folder / name).read_text(errors="replace") for name in ("stdout.txt", "stderr.txt")]
        return subprocess.CompletedProcess(given, answer["status"], *printed)

    def _ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        if self.host is None or self.host.poll() is not None:
            self.host = self._started()
            self._answer(START_TIMEOUT)
        assert self.host.stdin is not None
        self.host.stdin.write(json.dumps(request) + "\n")
        self.host.stdin.flush()
        return self._answer(timeout)

    def _started(self) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.root), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "MEGABRIDGE_PLATFORM": "cpu",
            "OMP_NUM_THREADS": "1",  # no thread pool in the host; each rank sets its own number
            "TOKENIZERS_PARALLELISM": "false",
            "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator starts a thread, which no fork has
        }
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.rank_server"],
            cwd=self.root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _answer(self, timeout: float) -> dict[str, Any] | None:
        assert self.host is not None and self.host.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.host.stdout, selectors.EVENT_READ)
            line = self.host.stdout.readline() if selector.select(timeout) else ""
        if not line:
            self.host.kill()
            code = self.host.wait()
            raise RuntimeError(f"the host of the test ranks gave no answer in {timeout} s (exit code {code}).")
        answer: dict[str, Any] | None = json.loads(line)
        return answer


def serve() -> None:
    """The host's loop: a request per line of stdin, an answer per line of stdout (null, or the first failure)."""
    from megabridge import worker
    from megabridge.launchers.processes.forked import fork_ranks
    from megabridge.launchers.processes.outcome import Failure
    from megabridge.parallel import process_groups

    for name in (*worker._IMPORTED_LATE, *WARMED):
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imported modules print is not an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to pytest, which closes stdin
    print(json.dumps(None), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "program" in request:
            print(json.dumps({"status": _program(request)}), file=answers, flush=True)
            continue
        module, _, function = request["target"].partition(":")
        try:
            importlib.import_module(module)
        except Exception as error:
            failure = {"rank": -1, "error": f"{module} can't be imported: {error!r}", "traceback": ""}
            print(json.dumps(failure), file=answers, flush=True)
            continue

        def target(
            rank: int, listener: socket.socket, request: dict[str, Any] = request, name: tuple[str, str] = (module, function)
        ) -> None:
            process_groups.become_forked_rank(listener, threads=request["threads_each"])
            _run(rank, request, *name)

        found = fork_ranks(request["world_size"], target, timeout=request["timeout"])
        print(json.dumps(asdict(found) if isinstance(found, Failure) else None), file=answers, flush=True)


def _program(request: dict[str, Any]) -> int:
    """The exit status of the command, as a shell gives it."""
    import recipes
    from megabridge import run
    from megabridge.config import installed
    from megabridge.families.core import registry
    from megabridge.launchers.processes import children

    for file in Path(recipes.__path__[0]).glob("*.py"):
        importlib.import_module(f"recipes.{file.stem}")

    def live() -> int:
        for descriptor, name in ((1, "stdout.txt"), (2, "stderr.txt")):
            os.dup2(os.open(Path(request["folder"], name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        children.spawn = _forked_worker
        for asked in (registry._installed, installed.backends):
            asked.cache_clear()  # what lies on this program's PYTHONPATH is its own
        os.chdir(request["cwd"])
        sys.argv = ["megabridge", *request["program"]]
        return run.main()

    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(live, request["environ"], parent, cwd=request["cwd"])
    until = time.monotonic() + request["timeout"]
    number, pattern, count = request["signalled"] or (0, "", 0)
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if number and len(list(Path(request["cwd"]).glob(pattern))) >= count:
            os.kill(pid, number)
            number = 0
        if time.monotonic() > until:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


def _forked_worker(
    module: str, arguments: Sequence[str], *, rank: int, environ: Mapping[str, str], config: int, **more: Any
) -> Any:
    """`children.spawn` with a fork of this process in the place of a new interpreter."""
    from megabridge.launchers.processes import children
    from megabridge.storage import crash_notes

    report, note, parent = children.unnamed(), children.unnamed(), os.getpid()
    blocked = more.get("blocked", frozenset())

    def live() -> int:
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        main: Callable[[list[str]], int] = importlib.import_module(module).main
        return main([f"--config={config}", f"--outcome={report}", f"--note={note}", *arguments])

    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become(live, environ, parent)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)
    return children.Child(rank, pid, os.pidfd_open(pid), report, crash_notes.new_note(note))


def _become(live: Callable[[], int], environ: Mapping[str, str], parent: int, *, cwd: str | None = None) -> NoReturn:
    """A forked process's whole life as a program of its own."""
    from megabridge.launchers.processes.ending import die_with_parent

    status = 1
    try:
        os.setpgid(0, 0)
        die_with_parent(parent)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environ)
        paths = [str(Path.cwd()) if cwd is None else cwd, *environ.get("PYTHONPATH", "").split(os.pathsep)]
        sys.path[:0] = [entry for entry in paths if entry and entry not in sys.path]
        status = live()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _run(rank: int, request: dict[str, Any], module: str, function: str) -> None:
    from megabridge.parallel import process_groups

    folder = Path(request["folder"])
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    kwargs = pickle.loads((folder / "request.pickle").read_bytes())
    if request["topology"] is not None:
        process_groups.start(Topology(**request["topology"]))
    result = getattr(importlib.import_module(module), function)(**kwargs)
    partial = folder / f"result_{rank}.partial"
    partial.write_bytes(pickle.dumps(result))
    partial.rename(folder / f"result_{rank}.pickle")
    if request["topology"] is not None:
        process_groups.stop()


if __name__ == "__main__":
    serve()
