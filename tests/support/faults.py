"""What ranks do in the tests of exports and saves that are cut off or meet a bad disk."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from megabridge import AutoBridge
from megabridge.conversion.file_writer import Writer
from megabridge.native import checkpoint
from megabridge.parallel import process_groups
from megabridge.parallel.topology import Topology
from megabridge.storage import folders, steps
from tests.support import disk, tiny
from tests.support.convert import provide

ERRORS = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG]


def content(folder: Path) -> dict[str, str] | None:
    """Digests of all files below a folder; None where there is no such folder."""
    if not folder.is_dir():
        return None
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def forked(work: Callable[[], Any]) -> tuple[int, Any]:
    """(how `work` ended in a child, negative for a signal; its result)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(work()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), json.loads(text) if text else None


class Exports:
    """A model in two states, a and b, and the folder `out` in which a was published and b is to be."""

    def __init__(self, source: str, root: str) -> None:
        self.root = Path(root)
        self.live = self.root / "live"
        self.out = self.live / "out"
        self.bridge = AutoBridge.from_hf_pretrained(source)
        self.model = provide(self.bridge)
        self.save(self.root / "a")
        with torch.no_grad():
            for chunk in self.model:
                for parameter in chunk.parameters():
                    parameter.mul_(2)
        self.save(self.root / "b")
        self.states = {"a": content(self.root / "a"), "b": content(self.root / "b"), "none": None}

    def save(self, out: Path) -> dict[str, int]:
        report = self.bridge.save_hf_pretrained(self.model, out, show_progress=False, max_shard_size="60KB")
        return {"written": report.bytes_copied, "kept": report.bytes_kept, "bytes": report.bytes}

    def reset(self, *, fresh: bool = False) -> None:
        """`out` holds a, or nothing, and nothing is left over."""
        shutil.rmtree(self.live, ignore_errors=True)
        self.live.mkdir()
        if not fresh:
            shutil.copytree(self.root / "a", self.out)

    def armed(self, **how: Any) -> dict[str, int]:
        disk.arm(self.live, **how)
        report = self.save(self.out)
        return {**report, "calls": disk.count()}

    def state(self) -> str:
        found = content(self.out)
        return next((name for name, state in self.states.items() if state == found), "broken")

    def hidden(self) -> list[str]:
        return sorted(path.name for path in self.live.iterdir() if path != self.out)


def killed_exports(
    source: str, root: str, *, last: int | None = None, share: int = 1, fresh: bool = False, exchange: bool = True
) -> list[dict[str, Any]]:
    """Kills an export over an earlier one at each call (or the `last` ones), and exports again; what was seen each time.

    Of the calls before the last fifteen it takes one in `share`.
    """
    exports = Exports(source, root)
    exports.reset(fresh=fresh)
    log = exports.root / "log"
    _, whole = forked(lambda: exports.armed(exchange=exchange, log=log))
    kinds = [call.kind for call in disk.calls(log)]
    seen = []
    first = 1 if last is None else len(kinds) - last + 1
    for number in [*range(first, len(kinds) - 14, share), *range(max(first, len(kinds) - 14), len(kinds) + 1)]:
        exports.reset(fresh=fresh)
        code, _ = forked(lambda number=number: exports.armed(kill=number, exchange=exchange))
        killed = {"kind": kinds[number - 1], "code": code, "state": exports.state(), "hidden": exports.hidden()}
        aside = content(folders.removed_of(exports.out)) == exports.states["a"]
        code, again = forked(lambda: exports.armed(exchange=exchange))
        seen.append(
            {**killed, "aside": aside, "again": again, "code again": code, "after": exports.state(), "left": exports.hidden()}
        )
    assert whole["calls"] == len(kinds)
    return seen


def failing_disk(source: str, root: str) -> list[dict[str, Any]]:
    """Lets each call of an export fail once, each fourth and all after it too, with one error after the other; what was raised
    and left."""
    exports = Exports(source, root)
    exports.reset()
    calls = exports.armed()["calls"]
    seen = []
    for number in range(1, calls + 1):
        for last in (number, disk.NEVER) if number % 4 == 0 else (number,):
            exports.reset()
            code = ERRORS[number % len(ERRORS)]
            disk.arm(exports.live, fail=(number, last), error=code)
            raised = refusal(lambda: exports.save(exports.out))
            disk.arm(exports.live)
            seen.append(
                {
                    "raised": raised,
                    "error": os.strerror(code),
                    "once": last == number,
                    "state": exports.state(),
                    "hidden": exports.hidden(),
                }
            )
            exports.save(exports.out)
            assert (exports.state(), exports.hidden()) == ("b", [])
    return seen


def refusal(work: Callable[[], Any]) -> str:
    """The error of `work` as type and message, or nothing."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def logged_export(source: str, root: str) -> str:
    """Exports below folders that don't exist yet, and over that again; the log of both."""
    exports = Exports(source, root)
    exports.reset(fresh=True)
    log = exports.root / "log"
    disk.arm(exports.live, log=log)
    exports.save(exports.live / "new" / "deeper" / "out")
    exports.save(exports.live / "new" / "deeper" / "out")
    disk.arm(exports.live)
    return str(log)


def full_disk(source: str, small: str) -> tuple[str, list[str]]:
    """The error of an export to a file system that is too small, and what is there after."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    raised = refusal(lambda: bridge.save_hf_pretrained(model, Path(small) / "out", show_progress=False))
    return raised, sorted(path.name for path in Path(small).iterdir())


def too_large_a_file(source: str, out: str) -> tuple[str, list[str]]:
    """The same where no file may be larger than 8 KiB."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    try:
        raised = refusal(lambda: bridge.save_hf_pretrained(model, out, show_progress=False))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return raised, sorted(path.name for path in Path(out).parent.iterdir())


def dying_export(source: str, out: str, there: str, rank: int, after: int) -> None:
    """An export of two ranks in which `rank` is killed when both wrote `after` boxes; the other makes the file `there` then."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    is_killed = torch.distributed.get_rank() == rank
    write, written = Writer._write, []

    def last(self: Writer, *arguments: Any) -> None:
        write(self, *arguments)
        written.append(1)
        if len(written) == after and not is_killed:
            Path(there).touch()
        while len(written) == after and is_killed:
            if Path(there).exists():
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)

    Writer._write = last  # type: ignore[method-assign]
    bridge.save_hf_pretrained(model, out, show_progress=False)


def two_exports(source: str, root: str) -> dict[str, Any]:
    """A second export while one is at its sync; then the first goes on. And one after the first was killed there."""
    exports = Exports(source, root)
    sync = Writer.sync
    there, go = exports.root / "there", exports.root / "go"

    def slow(self: Writer) -> None:
        there.touch()
        while not go.exists():
            time.sleep(0.01)
        sync(self)

    def first() -> dict[str, int]:
        Writer.sync = slow  # type: ignore[method-assign]
        return exports.save(exports.out)

    seen: dict[str, Any] = {}
    exports.reset()
    child = os.fork()
    if child == 0:
        first()
        os._exit(0)
    while not there.exists():
        time.sleep(0.01)
    seen["second"] = [refusal(lambda: exports.save(exports.out)), exports.state()]
    go.touch()
    seen["first"] = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), exports.state(), exports.hidden()]

    exports.reset()
    there.unlink()
    go.unlink()
    child = os.fork()
    if child == 0:
        first()
        os._exit(0)
    while not there.exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen["killed"] = [exports.state(), exports.hidden()]
    seen["after"] = [exports.save(exports.out), exports.state(), exports.hidden()]
    return seen


def not_finite(source: str, root: str) -> dict[str, Any]:
    """Exports of a model with NaN, infinite and large values, on each rank that holds the place."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    plan = bridge.plan(model)
    with torch.no_grad():
        for item in plan.items:
            if item.record.name == "decoder.layers.3.mlp.linear_fc2.weight":
                item.local.data[-1, -1] = float("nan")
            if item.record.name == "decoder.layers.0.self_attention.linear_proj.weight":
                item.local.data[0, 0] = float("-inf")
            if item.record.name == "decoder.final_layernorm.weight":
                item.local.data[3] = 1e9

    def save(name: str, **how: Any) -> str:
        raised = refusal(lambda: bridge.save_hf_pretrained(model, Path(root) / name, show_progress=False, **how))
        torch.distributed.barrier()
        return raised

    refused = save("refused")
    left = sorted(path.name for path in Path(root).iterdir())
    torch.distributed.barrier()
    return {
        "refused": refused,
        "left": left,
        "allowed": save("allowed", allow_nonfinite=True),
        "half": save("half", weight_dtype="float16"),
    }


def odd_places(source: str, root: str, umask: int) -> dict[str, str]:
    """Exports to places with odd names and of odd kinds: the error of each, if any. All ranks write under `umask`."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    os.umask(umask)
    here = Path(root)
    places = {
        "spaces": here / " a folder \t with spaces ",
        "unicode": here / "模型-модель-é-🦙",
        "longest": here / ("n" * 255),
        "longest in bytes": here / ("é" * 127 + "n"),
        "deep": here / "one" / "two" / "out",
        "dots": here / "one" / ".." / "dots",
        "link": here / "link",
        "earlier export": here / "earlier",
        "empty folder": here / "empty",
        "too long": here / ("n" * 256),
        "a file": here / "file",
        "below a file": here / "file" / "out",
        "foreign": here / "foreign",
    }
    return {
        name: refusal(lambda place=place: bridge.save_hf_pretrained(model, place, show_progress=False))
        for name, place in places.items()
    }


def apart(source: str, outs: list[str]) -> tuple[str, float]:
    """An export in which each rank sees a folder of its own: the error, and the seconds it took."""
    folders._VISIBLE = 0.5
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    begin = time.monotonic()
    raised = refusal(lambda: bridge.save_hf_pretrained(model, outs[torch.distributed.get_rank()], show_progress=False))
    torch.distributed.barrier()
    return raised, time.monotonic() - begin


class Saves:
    """Native saves in children: step 1 is there, step 2 is to be."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.live = self.root / "live"

    def native(self, step: int) -> Path:
        return folders.step_folder(self.live, step) / folders.NATIVE

    def save(self, step: int, **how: Any) -> dict[str, Any]:
        """Saves parameters times `step` on the one rank of groups of its own."""
        process_groups.start(Topology())
        chunks = tiny.model()
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.mul_(step)
        disk.arm(self.live, **how)
        raised = refusal(
            lambda: checkpoint.save(
                self.native(step), chunks, progress=checkpoint.TrainingProgress(step=step), write_assets=_assets
            )
        )
        calls = disk.count()
        disk.arm(self.live)
        return {"raised": raised, "calls": calls, "latest": self.latest(chunks)}

    def look(self) -> int:
        process_groups.start(Topology())
        return self.latest(tiny.model())

    def latest(self, chunks: list[torch.nn.Module]) -> int:
        """The step that the newest committed folder holds, bit for bit, whatever its name says; 0 where it holds none."""
        found = folders.latest(self.live)
        assert found is not None
        whole = [parameter.detach().clone() for parameter in tiny.model()[0].parameters()]
        checkpoint.load_weights(found, chunks)
        read = list(chunks[0].parameters())
        equal = [step for step in (1, 2) if all(torch.equal(own, other * step) for own, other in zip(read, whole, strict=True))]
        return equal[0] if equal == [int(found.parent.name.removeprefix("step_"))] else 0


def _assets(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def native_saves(root: str, share: int) -> dict[str, list[dict[str, Any]]]:
    """Kills the save of step 2 at one write or fsync in `share`, every call of another kind and the last ten; fails half of these."""
    saves = Saves(root)
    saves.live.mkdir(parents=True)
    code, first = forked(lambda: saves.save(1))
    assert (code, first["raised"], first["latest"]) == (0, "", 1), (code, first)
    before = content(saves.native(1))
    log = saves.root / "log"
    code, whole = forked(lambda: saves.save(2, log=log))
    assert (code, whole["raised"], whole["latest"]) == (0, "", 2), (code, whole)
    kinds = [call.kind for call in disk.calls(log)]
    last = len(kinds) - 10
    chosen = [
        number for number, kind in enumerate(kinds, 1) if kind not in ("write", "fsync") or number % share == 0 or number > last
    ]
    seen: dict[str, list[dict[str, Any]]] = {"killed": [], "failed": [], "kinds": [{"kinds": kinds}]}

    def clear() -> None:
        shutil.rmtree(folders.step_folder(saves.live, 2), ignore_errors=True)

    for number in chosen:
        clear()
        code, _ = forked(lambda number=number: saves.save(2, kill=number))
        code_after, latest = forked(saves.look)
        steps.remove_orphans(saves.live)
        hidden = [path.name for path in saves.live.rglob("*") if path.name.endswith((".partial", ".removed"))]
        seen["killed"].append(
            {"kind": kinds[number - 1], "code": code, "latest": latest if code_after == 0 else None, "hidden": hidden}
        )
        assert content(saves.native(1)) == before
    for number in chosen[::2]:
        clear()
        error = ERRORS[number % len(ERRORS)]
        code, found = forked(lambda number=number, error=error: saves.save(2, fail=(number, number), error=error))
        hidden = [path.name for path in saves.live.rglob("*") if path.name.endswith((".partial", ".removed"))]
        seen["failed"].append(
            {"kind": kinds[number - 1], "code": code, "error": os.strerror(error), "found": found, "hidden": hidden}
        )
        assert content(saves.native(1)) == before
    return seen
