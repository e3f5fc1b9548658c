"""What is said when a run has ended early: the last save, and the command that goes on from it. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from megabridge.config.redaction import CARRIED, REDACTED
from megabridge.errors import MegabridgeError
from megabridge.launchers.processes.outcome import Failure, Terminated, WorkerFailure
from megabridge.storage import folders, metrics_file, start_lines, steps
from megabridge.storage.stop_page import StopPage

MODULE: Final = "megabridge.run"
_OURS: Final = ("recipes.finetune:", "recipes.pretrain:")
_OF_A_START: Final = ("hydra.run.", "hydra.sweep", "hydra.mode", "hydra.launcher", "hydra/launcher")
"""Of a sweep, or of the directory: one run goes on in its own."""
_PLAIN: Final = re.compile(r"[\w./@%+~:-][\w./@%+~: -]*")
"""What Hydra's grammar takes without quotes."""


def last_save(values: Mapping[str, Any]) -> Path | None:
    """The newest native checkpoint of the run of these settings, wherever its saves go."""
    places = steps.places(Path(values["run_dir"]), values["checkpoint"]["path"], values["checkpoint"]["spare_path"])
    with contextlib.suppress(MegabridgeError, OSError):
        found = steps.saved_in(places)
        return found[max(found)] if found else None
    return None


def hint(values: Mapping[str, Any], overrides: Sequence[str], page: StopPage, failure: Failure | None = None) -> str:
    """The last save and the exact command that goes on from it; "" of a run that trains nothing.

    `overrides` are those of the command line. After a `failure` that megabridge raised on purpose before the first step there is
    none either: the same command would come to the same end.
    """
    is_ours = str(values["recipe"]["target"]).startswith(_OURS)
    if not page.has_begun and (not is_ours or (failure is not None and failure.is_expected)):
        return ""
    checkpoint = values["checkpoint"]
    found = last_save(values)
    steps_in_all = values["recipe"]["steps"]
    if found is not None:
        said = f"the last save is {found.parent.name.replace('_', ' ')} of {steps_in_all}, in {found.parent}; continue with:"
    elif not checkpoint["native"]:
        said = "nothing is saved that a run could continue from (checkpoint.native=false); begin again with:"
    else:
        said = "no step is saved; begin again with:"
    # A run that began elsewhere and saved nothing has to begin there again.
    return f"{said}\n  {command(values, overrides, is_auto=found is not None or checkpoint['resume'] in ('none', 'auto'))}"


def command(values: Mapping[str, Any], overrides: Sequence[str], *, is_auto: bool) -> str:
    """The command that was typed, in the directory of the run `values`, with checkpoint.resume=auto where `is_auto`."""
    replaced = {"run_dir", *(["checkpoint.resume"] if is_auto else [])}
    by_key = [(text.partition("=")[0].lstrip("+~"), text) for text in overrides]
    kept = [_shown(text) for key, text in by_key if key not in replaced and not key.startswith(_OF_A_START)]
    own = [f"run_dir={_quoted(values['run_dir'])}", *(["checkpoint.resume=auto"] if is_auto else [])]
    return shlex.join([*_program(), *_flags(), *kept, *own])


def closing(values: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """Lines about what a run that is done has left, and commands that may come next; none of a run that doesn't train."""
    if not str(values["recipe"]["target"]).startswith(_OURS):
        return []
    run_dir, native = Path(values["run_dir"]), last_save(values)
    step = steps.places(run_dir, values["checkpoint"]["path"], None)[0] if native is None else native.parent
    step = folders.step_folder(step, values["recipe"]["steps"]) if native is None else step
    left = {
        "Hugging Face folder": step / "hf",
        "adapters (PEFT)": step / "adapter",
        "native checkpoint": step / folders.NATIVE,
        "metrics": run_dir / metrics_file.FILE_NAME,
        "console": run_dir / start_lines.FILE_NAME,
    }
    lines = [f"done; in {run_dir}:"]
    for what, place in left.items():
        if place.exists():
            lines.append(f"  {what}: {place.relative_to(run_dir) if place.is_relative_to(run_dir) else place}")
    if following := _following(values, overrides, native, step / "hf"):
        lines += ["next, for instance:", *(f"  {what}: {text}" for what, text in following.items())]
    return lines


def _following(values: Mapping[str, Any], overrides: Sequence[str], native: Path | None, hf: Path) -> dict[str, str]:
    """Commands by what they are for."""
    found = {}
    if native is not None:
        kept = [text for text in overrides if text.partition("=")[0].lstrip("+~") != "recipe.steps"]
        found["train on"] = command(values, [*kept, f"recipe.steps={2 * values['recipe']['steps']}"], is_auto=True)
    if hf.is_dir():
        own, place = shlex.join(_program()), shlex.quote(f"model.path={_quoted(str(hf))}")
        task = shlex.quote("recipe.options.tasks={say:{kind:generations,prompts:[Hello]}}")
        found["compare with transformers"] = f"{own} recipe=compare {place}"
        found["evaluate"] = f"{own} recipe=evaluate {place} {task}"
        folder = json.dumps(str(hf))
        code = f'AutoBridge.from_hf_pretrained({folder}).push_to_hub("you/name", folder={folder})'
        found["push to the hub"] = shlex.join(["python", "-c", f"from megabridge import AutoBridge; {code}"])
    return found


@contextlib.contextmanager
def told(values: Mapping[str, Any], overrides: Sequence[str], page: StopPage) -> Iterator[None]:
    """Says the hint of a run that ends early inside: in the error of one that failed, else on standard error."""
    try:
        yield
    except WorkerFailure as error:
        text = hint(values, overrides, page, error.failure)
        said = "\n".join(part for part in (error.failure.error, text) if part)
        raise WorkerFailure(replace(error.failure, error=said)) from error
    except (KeyboardInterrupt, Terminated):
        say(hint(values, overrides, page))
        raise


def say(hint: str) -> None:
    """Says a hint, unless it is ""."""
    if hint:
        print(f"megabridge: {hint}", file=sys.stderr, flush=True)
        start_lines.record(f"megabridge: {hint}")


def _shown(override: str) -> str:
    """An override as it was typed, but for a secret."""
    key, _, value = override.partition("=")
    return f"{key}='{REDACTED}'" if CARRIED in value else override


def _quoted(value: str) -> str:
    """A value as Hydra's grammar reads it."""
    if _PLAIN.fullmatch(value):
        return value
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", value)
    return f"'{escaped}'"


def _program() -> list[str]:
    """How the program was started, up to its arguments."""
    started = _words("self")
    if Path(sys.argv[0]).name == "run.py" or not sys.argv[0]:
        own = [started[0] if started else "python", "-m", MODULE]
    else:
        name = Path(sys.argv[0]).name
        own = [name if shutil.which(name) else sys.argv[0]]
    if "RANK" in os.environ:
        return _torchrun(_words(str(os.getppid()))) or ["torchrun", "...", "-m", MODULE]
    return own if "SLURM_PROCID" not in os.environ or os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1" else ["srun", "...", *own]


def _torchrun(words: list[str]) -> list[str]:
    """The part of torchrun's own command line that comes before our arguments; nothing where it isn't torchrun's."""
    ends = [index for index, word in enumerate(words) if word == MODULE or Path(word).name in ("megabridge", "run.py")]
    if not ends:
        return []
    found = words[: ends[0] + 1]
    if len(found) > 1 and Path(found[0]).name.startswith("python") and Path(found[1]).name == "torchrun":
        found = ["torchrun", *found[2:]]
    return found


def _words(pid: str) -> list[str]:
    try:
        return Path("/proc", pid, "cmdline").read_text(errors="surrogateescape").split("\0")[:-1]
    except OSError:
        return []


def _flags() -> list[str]:
    """Hydra's flags that say which config it is."""
    from hydra._internal.utils import get_args_parser

    given, _ = get_args_parser().parse_known_args(sys.argv[1:])
    named = {"--config-dir": given.config_dir, "--config-name": given.config_name}
    return [word for flag, value in named.items() if value for word in (flag, value)]
