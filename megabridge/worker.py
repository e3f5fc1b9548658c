"""What a worker process runs: `python -m megabridge.worker --config=FD ...`, started by the launcher, never by hand.

With `--fork=N` it imports the stack once and forks N ranks (CPU). Otherwise it is the rank that RANK says: started by
the launcher (`--outcome=FD`), or by torchrun or srun (`--digest=...`). In the latter case the ranks composed their
configs apart, and first agree on rank 0's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Final

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from megabridge import config as schema
from megabridge import families, last_words
from megabridge.checks import nearest
from megabridge.config import Config
from megabridge.errors import ConfigError, MegabridgeError
from megabridge.launchers import local, place, report
from megabridge.launchers.report import CONFIG_ERROR, Failure
from megabridge.platform import determinism, groups, ranks

Recipe = Callable[[Config], float | None]


class LostRanksError(MegabridgeError):
    """Another rank ended, hangs, or can't be reached."""


_AGREE_SECONDS: Final = 600.0
"""How long the ranks of torchrun or srun wait for each other's config."""
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
"""What torch, megatron-core and transformers import only when a run needs it: seconds for each rank, if left to them."""
_LOST: Final = ("gloo/transport/", "Timed out waiting", "wait timeout")
"""In what torch's gloo backend says when another rank is gone or silent."""
_SETTLE: Final = 1.0
"""Seconds in which a rank that lost others lets the rank that was the cause speak first."""
_stores: Final[list[PrefixStore]] = []
"""Kept for the life of the process: rank 0's serves the others, who may still read when it goes on."""


def main(arguments: list[str] | None = None) -> int:
    """The process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m megabridge.worker")
    parser.add_argument("--config", type=int, required=True, help="descriptor of the resolved config, JSON")
    parser.add_argument("--outcome", type=int, help="descriptor of the file that takes the outcome")
    parser.add_argument("--note", type=int, help="descriptor of the file that takes what this process reads")
    parser.add_argument("--digest", help="of the config, where torchrun or srun started the ranks")
    parser.add_argument("--fork", type=int, help="number of ranks to fork")
    given = parser.parse_args(arguments)
    values = json.loads(os.pread(given.config, os.fstat(given.config).st_size, 0))
    if given.note is not None:
        last_words.keep(last_words.page(given.note))
    outcome: Failure | float | None
    try:
        if given.fork is not None:
            return _fork(values, given.fork, given.outcome)
        if given.digest is not None:
            values = _agreed(values, given.digest)
        outcome = run_rank(values)
    except Exception as error:
        outcome = _failure(error)
        if given.outcome is None and isinstance(error, LostRanksError):
            # torchrun and srun end this rank when another tells its own failure; of those that only lost others, one speaks.
            time.sleep(_SETTLE if os.environ.get("LOCAL_RANK") == "0" else 3 * _SETTLE)
    return _finish(outcome, given.outcome)


def run_rank(values: Mapping[str, Any]) -> float | None:
    """Runs the recipe on this rank; returns its objective. Every rank calls it.

    The process groups of `parallel` exist meanwhile, unless recipe.single_process says that it needs none.
    """
    config = schema.typed(values)
    if config.family is not None:
        families.register_named(config.family)
    recipe = load_recipe(config.recipe.target)
    if config.deterministic:
        determinism.require()
    if not config.recipe.single_process:
        groups.start(schema.processes(config, groups.world_size()), seed=config.seed, timeout=config.timeout)
    try:
        objective = recipe(config)
    except Exception as error:  # a save that was interrupted says it in its own error
        if isinstance(error, dist.DistBackendError) or any(sign in str(error) for sign in _LOST):
            raise LostRanksError(
                f"the connection to another rank was lost, or it did not answer within timeout={config.timeout:g} seconds; look at "
                f"the other ranks' output and hosts, and continue with checkpoint.resume=auto. It was: {str(error).splitlines()[0]}"
            ) from error
        raise
    groups.stop()
    return objective


def load_recipe(target: str) -> Recipe:
    """The function that `target`, module:function, names. Raises ConfigError when there is none."""
    module_name, _, name = target.partition(":")
    members = vars(importlib.import_module(module_name))
    if not callable(members.get(name)):
        functions = [known for known, member in members.items() if callable(member) and not known.startswith("_")]
        raise ConfigError(f"recipe.target={target!r}: {module_name} has no function {name!r}{nearest(name, functions)}")
    recipe: Recipe = members[name]
    return recipe


def _fork(values: Mapping[str, Any], world_size: int, outcome: int) -> int:
    """Imports everything that the ranks need, forks them and waits; leaves rank 0's objective or the first failure."""
    config = schema.typed(values)
    if config.family is not None:
        families.register_named(config.family)
    load_recipe(config.recipe.target)
    _import_targets(config)
    for module in _IMPORTED_LATE:
        importlib.import_module(module)

    def target(rank: int) -> None:
        objective = run_rank(values)
        if rank == 0:
            report.write(outcome, objective)

    failure = ranks.fork_ranks(world_size, target, threads_each=local.threads_each(world_size))
    if failure is None:
        return 0
    report.write(
        outcome,
        Failure(failure.rank, failure.exit_code, failure.error, failure.traceback, failure.is_expected),
    )
    return 1


def _import_targets(config: Config) -> None:
    """Imports the modules of the `_target_` classes, once for all ranks. A failure is reported where one is built."""
    for node in (config.data, *config.callbacks.values(), *config.logger.values()):
        if node is not None:
            with contextlib.suppress(ImportError):
                importlib.import_module(str(node.get("_target_")).rpartition(".")[0])


def _agreed(values: dict[str, Any], digest: str) -> dict[str, Any]:
    """Rank 0's config, after checking that all ranks composed the same. Every rank calls it, before the groups start.

    `digest` stands for this rank's config before its interpolations were resolved: clocks and hosts may differ. When it
    differs, rank 0 says which ranks, once, and all exit.
    """
    here = place.find(os.environ)
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
        if different:
            names = ", ".join(map(str, different))
            rule = "all ranks must compose one config; start all with the same command and conf"
            print(f"megabridge: the config of rank {names} differs from rank 0's: {rule}.", file=sys.stderr, flush=True)
        store.set("verdict", json.dumps({"different": different, "config": values}))
    verdict = json.loads(store.get("verdict"))
    if verdict["different"]:
        store.set(f"seen/{here.rank}", "")
        if here.rank == 0:  # the others may read from a store that lives in this process
            with contextlib.suppress(dist.DistError):
                store.wait([f"seen/{rank}" for rank in range(here.world_size)], timedelta(seconds=5))
        raise SystemExit(CONFIG_ERROR)
    agreed: dict[str, Any] = verdict["config"]
    return agreed


def _failure(error: Exception) -> Failure:
    """This process's failure, as the launcher hears of it."""
    is_expected = isinstance(error, MegabridgeError)
    return Failure(
        rank=int(os.environ.get("RANK", "-1")),
        exit_code=1,
        error=str(error) if is_expected else f"{type(error).__name__}: {error}",
        traceback="".join(traceback.format_exception(error)),
        is_expected=is_expected,
    )


def _finish(outcome: Failure | float | None, descriptor: int | None) -> int:
    """Reports to the launcher, or on stderr where there is none; returns the exit status."""
    if descriptor is not None:
        report.write(descriptor, outcome)
    elif isinstance(outcome, Failure):
        print(f"megabridge: {outcome.text()}", file=sys.stderr)
    return outcome.exit_code if isinstance(outcome, Failure) else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A failed rank leaves without waiting for threads and groups that still wait for the others.
    if status:
        os._exit(status)
