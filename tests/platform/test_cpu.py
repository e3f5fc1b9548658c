"""The redirection of CUDA calls: what it does, and that it stays away where it is not wanted."""

from __future__ import annotations

import threading

import pytest
import torch

import megabridge.platform as platform
from megabridge.errors import ConfigError
from megabridge.parallel import process_groups
from megabridge.parallel.topology import Topology
from megabridge.platform import cpu
from megabridge.platform.patches.cuda_devices import CudaMeansCpu
from tests.support.command import python

PROBE = """
import sys, torch
before = {name: getattr(torch.cuda, name) for name in dir(torch.cuda)}, torch.compile, torch.Tensor.record_stream
import megabridge.platform as platform
platform.prepare()
after = {name: getattr(torch.cuda, name) for name in dir(torch.cuda)}, torch.compile, torch.Tensor.record_stream
changed = [name for name in before[0] if before[0][name] is not after[0][name]]
print(platform.DEVICE, changed, before[1:] == after[1:], torch._C._len_torch_function_stack(),
      "megabridge.platform.cpu" in sys.modules, "megatron" in sys.modules)
"""


def test_nothing_is_replaced_on_cuda() -> None:
    done = python(PROBE, MEGABRIDGE_PLATFORM="cuda")
    assert done.stdout == "cuda [] True 0 False False\n", done.stderr


def test_an_unknown_platform_is_refused() -> None:
    done = python("import megabridge.platform", MEGABRIDGE_PLATFORM="tpu")
    assert "MEGABRIDGE_PLATFORM='tpu' must be one of auto, cpu, cuda." in done.stderr


def test_cuda_without_a_device_is_refused_when_groups_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "DEVICE", "cuda")
    with pytest.raises(ConfigError, match="MEGABRIDGE_PLATFORM=cuda, but torch sees no CUDA device"):
        process_groups.start(Topology())
    assert process_groups.current() is None


def test_imports_warn_about_nothing() -> None:
    done = python("import megabridge.models.provider, megabridge.parallel.process_groups")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_installing_again_changes_nothing() -> None:
    stream, depth = torch.cuda.Stream, torch._C._len_torch_function_stack()
    cpu.install()
    assert platform.is_cpu() and cpu.is_installed()
    assert (torch.cuda.Stream, torch._C._len_torch_function_stack()) == (stream, depth)


def test_cuda_means_the_cpu() -> None:
    made = [
        torch.zeros(2, device="cuda"),
        torch.tensor([1], device=torch.device("cuda", 1)),
        torch.zeros(2).cuda(),
        torch.zeros(2).to("cuda"),
        torch.zeros(2).to(torch.device("cuda"), torch.float64),
        torch.zeros(2).pin_memory(),
        torch.tensor([1], pin_memory=True),
        torch.nn.Linear(2, 2).to("cuda").weight,
        torch.zeros(2, device=torch.cuda.current_device()),
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert torch.zeros(1).to("cuda", torch.float64).dtype == torch.float64
    assert torch.zeros(2, device="meta").is_meta and torch.zeros(2).to("meta").is_meta


def test_the_optimizer_accepts_cpu_parameters_by_type_name() -> None:
    name = torch.zeros(1).type()
    assert name in ("torch.cuda.HalfTensor", "torch.cuda.FloatTensor")
    assert name == "torch.FloatTensor" and name != "torch.cuda.HalfTensor"
    assert torch.ones(1, dtype=torch.float64).type(name).dtype == torch.float32


def test_the_cuda_generator_is_the_cpus() -> None:
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(2)
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(2))


def test_another_thread_enters_the_redirection_itself() -> None:
    seen: list[str] = []

    def work() -> None:
        with CudaMeansCpu():
            seen.append(torch.zeros(1, device="cuda").device.type)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["cpu"]
