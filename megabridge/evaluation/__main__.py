"""The evaluating process: `python -m megabridge.evaluation`, started by megabridge.evaluation.process, never by hand.

The first line of standard input is the request; when standard input is closed, the parent has ended and this process ends too. The
outcome is one JSON object on standard output: the results of the tasks, the problems of a check, or an error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from megabridge.errors import MegabridgeError, said


def main() -> None:
    # The queue may send this signal to every process of a job; the parent decides what to do.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    outcome_file = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries must not mix with the outcome
    try:
        outcome = _outcome(request)
    except BaseException as error:  # whatever it is, the parent is told
        if not isinstance(error, MegabridgeError):
            traceback.print_exc()
        outcome = {"error": said(error)}
    json.dump(outcome, outcome_file)
    outcome_file.flush()


def _outcome(request: dict[str, Any]) -> dict[str, Any]:
    import torch

    from megabridge import evaluation
    from megabridge.evaluation import harness

    torch.set_num_threads(request["threads"])
    tasks, problems = evaluation.parsed(request["tasks"], where="tasks", seq_length=1)
    if not problems and request["check"]:
        problems = harness.problems(tasks)
    if problems or request["check"]:
        return {"problems": problems}
    device = evaluation.device_name(request["device"])
    results = evaluation.evaluate(Path(request["folder"]), tasks, batch_size=request["batch_size"], device=device)
    return dataclasses.asdict(results)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
