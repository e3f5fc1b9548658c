"""Two hosts, for which two network namespaces stand in: each has a name, an address, and where a test says so a disk, of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from megabridge.conversion import manifest
from megabridge.hf import byte_tokenizer
from tests.support.free_port import free_port

ROOT = Path(__file__).parents[2]
NAMES = ("mbtest0", "mbtest1")
ADDRESSES = ("10.231.77.1", "10.231.77.2")
TRAIN = (
    "platform=cpu",
    "parallel=tp2pp2",
    "data=random_tokens",
    "data.vocab_size=260",
    "logger=local",
)
PLAIN = (
    "callbacks=none",
    "+callbacks.hf_export._target_=megabridge.callbacks.hf_export.HFExport",
    "+callbacks.hf_export.logits_tokens=0",
)
SMALL = ("recipe.seq_length=32", "recipe.eval_at_start=false")


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


if shutil.which("ip", path="/usr/sbin:/sbin:" + os.environ["PATH"]) is None or ip("netns", "add", "mbtestprobe").returncode:
    pytest.skip("two hosts are not run: ip netns needs root and iproute2", allow_module_level=True)
ip("netns", "del", "mbtestprobe")


@dataclass
class Host:
    """A namespace in which launch/torchrun.sh is started."""

    number: int

    def start(self, *arguments: str, cwd: Path, port: int, disk: Path | None = None) -> subprocess.Popen[str]:
        """The same command on both hosts. `disk`: what this host alone sees at cwd/run."""
        hosts = cwd / "hosts"
        hosts.write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for address, name in zip(ADDRESSES, NAMES, strict=True))
        )
        own = "" if disk is None else f"mount --bind {disk} {cwd}/run && "
        as_host = f"hostname {NAMES[self.number]} && mount --bind {hosts} /etc/hosts && {own}"
        inside = ["unshare", "--mount", "--uts", "bash", "-c", f'{as_host}exec {ROOT}/launch/torchrun.sh "$@"', "bash", *arguments]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}
        environ |= {"NODES": "2", "HEAD": NAMES[0], "GPUS": "2", "PORT": str(port), "PYTHONPATH": str(ROOT)}
        environ |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "MEGABRIDGE_PLATFORM": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            ["ip", "netns", "exec", NAMES[self.number], *inside],
            cwd=cwd,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def link(self, state: str) -> None:
        """Cuts this host off, or puts it back."""
        assert ip("-n", NAMES[self.number], "link", "set", f"mbt{self.number}", state).returncode == 0

    def fall(self) -> None:
        """Ends everything that runs on this host."""
        for pid in ip("netns", "pids", NAMES[self.number]).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with ExitStack() as stack:
        for name in NAMES:
            ip("netns", "del", name)
            assert ip("netns", "add", name).returncode == 0
            stack.callback(ip, "netns", "del", name)
            stack.callback(Host(NAMES.index(name)).fall)
        made = ip("link", "add", "mbt0", "netns", NAMES[0], "type", "veth", "peer", "name", "mbt1", "netns", NAMES[1])
        assert made.returncode == 0, made.stderr
        for number, name in enumerate(NAMES):
            assert ip("-n", name, "addr", "add", f"{ADDRESSES[number]}/24", "dev", f"mbt{number}").returncode == 0
            assert ip("-n", name, "link", "set", "lo", "up").returncode == 0
            Host(number).link("up")
        yield Host(0), Host(1)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """What both hosts have: a config and a tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    hf = yaml.safe_load((ROOT / "conf" / "model" / "tiny_llama.yaml").read_text())["hf"]
    (folder / "config.json").write_text(json.dumps(hf))
    byte_tokenizer.write_tokenizer(folder)
    return str(folder)


def finish(processes: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    until = time.monotonic() + seconds
    try:
        return [process.communicate(timeout=max(1.0, until - time.monotonic()))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_an_export_without_a_shared_file_system(hosts: tuple[Host, Host], model: str, tmp_path: Path) -> None:
    """Training at tp2pp2, a stage on each host; rank 0 is sent everything and publishes on its own disk."""
    disks = [tmp_path / f"disk{host.number}" for host in hosts]
    for folder in (*disks, tmp_path / "run"):
        folder.mkdir()
    arguments = ("model=auto", f"model.path={model}", "model.load_weights=false", *TRAIN, *PLAIN, *SMALL)
    arguments += ("recipe.steps=2", "checkpoint.native=false", "conversion.writer=gather", f"run_dir={tmp_path}/run")
    port = free_port()
    running = [host.start(*arguments, cwd=tmp_path, port=port, disk=disk) for host, disk in zip(hosts, disks, strict=True)]
    outputs = finish(running, 900)
    assert [process.returncode for process in running] == [0, 0], outputs
    exported = disks[0] / "checkpoints" / "step_2" / "hf"
    assert manifest.read(exported) and (exported / "model.safetensors").stat().st_size > 100_000
    assert not list(disks[1].rglob("*.safetensors")) and not list((tmp_path / "run").iterdir())


def test_a_host_that_is_cut_off_ends_the_other_and_the_run_goes_on_later(
    hosts: tuple[Host, Host], model: str, tmp_path: Path
) -> None:
    """Within the timeout, with a message that says what it means; resumed, it ends."""
    arguments = ("model=auto", f"model.path={model}", "model.load_weights=false", *TRAIN, *SMALL, "callbacks=none")
    arguments += (
        "checkpoint.save_every=5",
        "recipe.log_every=1",
        "checkpoint.hf=false",
        "checkpoint.resume=auto",
        f"run_dir={tmp_path}/run",
    )
    port = free_port()
    running = [host.start(*arguments, "recipe.steps=100000", "timeout=45", cwd=tmp_path, port=port) for host in hosts]
    until = time.monotonic() + 600
    metrics = tmp_path / "run" / "metrics.jsonl"
    # In a step, not in a save: the groups of the pipeline and of tensor parallelism have timeouts of their own.
    while not (metrics.exists() and '"step": 8,' in metrics.read_text()):
        assert time.monotonic() < until and all(process.poll() is None for process in running), finish(running, 1)
        time.sleep(0.2)
    hosts[1].link("down")
    cut = time.monotonic()
    outputs = finish(running[:1], 240)
    assert time.monotonic() - cut < 240 and running[0].returncode not in (0, None), outputs
    lost = r"megabridge: rank 0: the connection to another rank was lost, or it did not answer within timeout=45 seconds"
    assert re.search(lost, outputs[0]) and outputs[0].count("megabridge: rank") == 1, outputs[0][-4000:]
    saved = max(int(path.name.removeprefix("step_")) for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    hosts[1].fall()
    hosts[1].link("up")
    again = [host.start(*arguments, f"recipe.steps={saved + 2}", cwd=tmp_path, port=port + 1) for host in hosts]
    outputs = finish(again, 900)
    assert [process.returncode for process in again] == [0, 0], outputs
    assert f"at step {saved}" in outputs[0]
    assert (tmp_path / "run" / "checkpoints" / f"step_{saved + 2}" / "native").is_dir()
