"""Main program of a worker process: `python -m megabridge.worker --config=FD ...`, started by the launcher, never by hand.

With `--fork=N` it imports the stack once and forks N ranks (CPU). Otherwise it is rank RANK. If torchrun or srun started the
launcher as a rank (`--digest=...`), each rank composed its own config, and they first agree on rank 0's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Final, SupportsFloat

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

import megabridge.platform as platform
from megabridge import families
from megabridge.config import installed, schema
from megabridge.config.schema import Config
from megabridge.config.validation import nearest
from megabridge.errors import ConfigError, MegabridgeError, said
from megabridge.launchers import local, rank_environment
from megabridge.launchers.processes import outcome, standard_streams
from megabridge.launchers.processes.forked import fork_ranks
from megabridge.launchers.processes.outcome import CONFIG_ERROR, Failure, WorkerFailure
from megabridge.parallel import process_groups
from megabridge.platform import determinism
from megabridge.storage import atomic_files, crash_notes, start_lines, stop_page
from megabridge.storage.stop_page import StopPage

Recipe = Callable[[Config], float | None]


class LostRanksError(MegabridgeError):
    """Another rank ended, hangs, or can't be reached."""


_AGREE_SECONDS: Final = 600.0
"""Seconds that the ranks of torchrun or srun wait for each other's config."""
_IMPORTED_LATE: Final = (
    "torch._dynamo",  # by the first optimizer
    "torch._inductor",
    "megatron.core.models.mimo.optimizer",  # by get_megatron_optimizer
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "transformers.convert_slow_tokenizer",  # by the tokenizer
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.monkey_patching",
    "transformers.tokenization_python",
    "transformers.tokenization_utils_tokenizers",
)
"""Modules that torch, megatron-core and transformers import lazily, which would take each forked rank seconds."""
_LOSSES: Final = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
"""Errors that torch raises when another rank is gone or doesn't answer."""
_LOST: Final = ("gloo/transport/", "Timed out waiting", "wait timeout")
"""Parts of the messages of torch's gloo backend in that case, which has no error class of its own."""
_SETTLE: Final = 1.0
"""Seconds that a rank which lost others waits, so that the rank that was the cause reports first."""
_stores: Final[list[PrefixStore]] = []
"""Kept alive until the process ends: rank 0's store serves the other ranks, which may still read when it continues."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the worker; returns the process's exit status, 0 if its rank or all its forked ranks are done."""
    standard_streams.settle()
    platform.prepare()
    parser = argparse.ArgumentParser(prog="python -m megabridge.worker")
    parser.add_argument("--config", type=int, required=True, help="descriptor of the resolved config, JSON")
    parser.add_argument("--outcome", type=int, required=True, help="descriptor of the file for the outcome")
    parser.add_argument("--note", type=int, required=True, help="descriptor of the file for the names of mapped files")
    parser.add_argument("--stop", type=int, help="descriptor of the page on which a stop is asked for")
    parser.add_argument("--digest", help="digest of the config, if torchrun or srun started the ranks")
    parser.add_argument("--fork", type=int, help="number of ranks to fork")
    given = parser.parse_args(arguments)
    crash_notes.set_note(crash_notes.new_note(given.note))
    if given.stop is not None:
        stop_page.share(StopPage(given.stop))

    def work() -> float | None:
        values = json.loads(os.pread(given.config, os.fstat(given.config).st_size, 0))
        return _run_here(values, given.digest) if given.fork is None else _fork(values, given.fork)

    found = outcome.of(work, -1 if given.fork is not None else int(os.environ["RANK"]))
    outcome.write(given.outcome, found)
    return found.status if isinstance(found, Failure) else 0


def _run_here(values: dict[str, Any], digest: str | None) -> float | None:
    """Runs this process as a rank; returns its objective."""
    if os.environ["RANK"] == "0":
        start_lines.say("imports done")
    if digest is None:
        return run_rank(values)
    try:
        with _lost_ranks(_AGREE_SECONDS):
            values = _agreed(values, digest)
        return run_rank(values)
    except LostRanksError:
        # torchrun and srun end this rank when another reports its own failure; of ranks that only lost others, one reports.
        time.sleep(_SETTLE if os.environ.get("LOCAL_RANK") == "0" else 3 * _SETTLE)
        raise


def run_rank(values: Mapping[str, Any]) -> float | None:
    """Runs the recipe on this rank; returns its objective. Every rank calls it.

    The process groups of `parallel` exist meanwhile, unless recipe.single_process says that it needs none.
    """
    config = schema.typed(values)
    if config.family is not None:
        families.register_named(config.family)
    recipe = load_recipe(config.recipe.target)
    speaks = os.environ.get("RANK") == "0" and not config.recipe.single_process
    if config.deterministic:
        determinism.require()
    with _disk_errors(), _lost_ranks(config.timeout):
        if not config.recipe.single_process:
            process_groups.start(schema.processes(config, process_groups.world_size()), seed=config.seed, timeout=config.timeout)
        if speaks and (count := process_groups.world_size()) > 1:
            start_lines.say(f"{count} ranks connected")
        objective = objective_of(recipe(config), config.recipe.target)
    process_groups.stop()
    standard_streams.check()
    return objective


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Raises MegabridgeError for a write that failed because of a full disk, in any part of a run."""
    try:
        yield
    except OSError as error:
        if error.errno not in atomic_files.NO_ROOM:
            raise
        name = f"{error.filename} can't be written" if error.filename else "a file of the run can't be written"
        raise MegabridgeError(f"{name} ({error.strerror}); earlier saves are complete; free space, and start again.") from error


@contextlib.contextmanager
def _lost_ranks(timeout: float) -> Iterator[None]:
    """Raises LostRanksError for errors of torch when another rank is gone, or doesn't answer for `timeout` seconds."""
    try:
        yield
    except Exception as error:  # an interrupted save has it in its own error
        text = said(error)
        if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError) or any(
            sign in text for sign in _LOST
        ):
            raise LostRanksError(
                f"the connection to another rank was lost, or it did not answer within timeout={timeout:g} seconds; look at "
                f"the other ranks' output and hosts, and continue with checkpoint.resume=auto. It was: {text.splitlines()[0]}"
            ) from error
        raise


def objective_of(returned: object, target: str) -> float | None:
    """Converts a recipe's return value to the objective. Raises ConfigError for anything but a number or None."""
    if returned is None:
        return None
    try:
        if isinstance(returned, SupportsFloat):
            return float(returned)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # a tensor of several elements, a huge int
        pass
    raise ConfigError(f"recipe.target={target} must return a number or None, not such a {type(returned).__name__}; return one.")


def load_recipe(target: str) -> Recipe:
    """Imports the function at `target`, module:function. Raises ConfigError if there is none."""
    module_name, _, name = target.partition(":")
    members = vars(importlib.import_module(module_name))
    if not callable(members.get(name)):
        functions = [known for known, member in members.items() if callable(member) and not known.startswith("_")]
        raise ConfigError(f"recipe.target={target!r}: {module_name} has no function {name!r}{nearest(name, functions)}")
    recipe: Recipe = members[name]
    return recipe


def _fork(values: Mapping[str, Any], world_size: int) -> float | None:
    """Imports everything that the ranks need, forks them and waits; returns rank 0's objective. Raises WorkerFailure."""
    config = schema.typed(values)
    if config.family is not None:
        families.register_named(config.family)
    load_recipe(config.recipe.target)
    _import_targets(config)
    if config.backend.name in installed.backends():
        importlib.import_module(installed.backends()[config.backend.name].module)
    for module in _IMPORTED_LATE:
        importlib.import_module(module)

    if not config.recipe.single_process:
        start_lines.say("imports done")

    def target(rank: int, listener: socket.socket) -> float | None:
        process_groups.become_forked_rank(listener, threads=local.threads_each(world_size))
        return run_rank(values)

    found = fork_ranks(world_size, target)
    if isinstance(found, Failure):
        raise WorkerFailure(found)
    return found.objective


def _import_targets(config: Config) -> None:
    """Imports the modules of the `_target_` classes, once for all ranks. A failed import is reported when the class is built."""
    for node in (config.data, *config.callbacks.values(), *config.logger.values()):
        if node is not None:
            with contextlib.suppress(ImportError):
                importlib.import_module(str(node.get("_target_")).rpartition(".")[0])


def _agreed(values: dict[str, Any], digest: str) -> dict[str, Any]:
    """Returns rank 0's config, after checking that all ranks composed the same. Every rank calls it, before the groups start.

    `digest` is that of this rank's config before its interpolations were resolved, since clocks and hosts may differ. If
    digests differ, rank 0 reports the ranks, and all exit.
    """
    here = rank_environment.find(os.environ)
    if here is None or here.world_size == 1:
        return values
    wait = timedelta(seconds=_AGREE_SECONDS)
    shared, _, _ = next(rendezvous("env://", here.rank, here.world_size, timeout=wait))
    store = PrefixStore("megabridge/config", shared)
    _stores.append(store)
    store.set(f"digest/{here.rank}", digest)
    if here.rank == 0:
        digests = [store.get(f"digest/{rank}") for rank in range(here.world_size)]
        different = [rank for rank, other in enumerate(digests) if other != digests[0]]
        store.set("verdict", json.dumps({"different": different, "config": values}))
    verdict = json.loads(store.get("verdict"))
    if verdict["different"]:
        store.set(f"seen/{here.rank}", "")
        if here.rank == 0:  # the others may still read from the store in this process
            with contextlib.suppress(dist.DistError):
                store.wait([f"seen/{rank}" for rank in range(here.world_size)], timedelta(seconds=5))
        names = ", ".join(map(str, verdict["different"]))
        rule = "all ranks must compose one config; start all with the same command and conf"
        text = f"the config of rank {names} differs from rank 0's: {rule}." if here.rank == 0 else ""
        raise WorkerFailure(Failure(-1, CONFIG_ERROR, text, is_expected=True))
    agreed: dict[str, Any] = verdict["config"]
    return agreed


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A failed rank exits without waiting for threads and groups that still wait for the other ranks.
    if status:
        os._exit(status)
