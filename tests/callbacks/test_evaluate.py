"""Exports are evaluated on real ranks, once, without a trace in the training; what can't work is refused before it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megabridge.errors import ConfigError
from megabridge.native import digests
from megabridge.parallel.topology import Topology
from megabridge.storage.metrics_file import read
from tests.support.rank_server import RankError, RankServer
from tests.support.recipe_runs import values

CASES = "tests.support.evaluate"
HELD, QUIZ, SAY = "HELLOWORLD" * 9, {"prompt": "ABC", "choices": ["D", "XYZ"], "answer": 0}, ["HELLO", "ABC"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "held.txt").write_text(HELD)
    (folder / "quiz.jsonl").write_text(json.dumps(QUIZ) + "\n")
    return {
        "held": {"kind": "perplexity", "path": str(folder / "held.txt")},
        "quiz": {"kind": "multiple_choice", "path": str(folder / "quiz.jsonl"), "delimiter": ""},
        "say": {"kind": "generations", "prompts": SAY, "max_new_tokens": 4},
    }


def config(
    run_dir: Path, tiny_source: Path, topology: Topology, tasks: Any = None, between: Any = None, **groups: Any
) -> dict[str, Any]:
    """A deterministic run that saves steps 2 and 4; evaluated where there are `tasks`."""
    settings = groups.pop("evaluate", {})
    groups = {"checkpoint": {"save_every": 2, **groups.pop("checkpoint", {})}, "deterministic": True, **groups}
    made = values(run_dir, tiny_source, topology, **groups)
    callbacks: dict[str, Any] = {"hf_export": {"_target_": "megabridge.callbacks.hf_export.HFExport"}}
    if between is not None:
        callbacks["between"] = {"_target_": between}
    if tasks is not None:
        callbacks["evaluate"] = {"_target_": "megabridge.callbacks.evaluate.Evaluate", "tasks": tasks, **settings}
    return {**made, "callbacks": callbacks}


def train(ranks: RankServer, topology: Topology, given: dict[str, Any], **how: bool) -> None:
    ranks.run(f"{CASES}:recipe", topology=topology, kwargs={"name": "finetune", "values": given, **how}, timeout=240)


def evaluated(run_dir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["evaluation/held/perplexity"]) for row in read(run_dir) if "evaluation/held/perplexity" in row]


def weights(run_dir: Path) -> dict[str, bytes]:
    """The exported weights."""
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in run_dir.glob("checkpoints/step_*/hf/*.safetensors")}


def boxes(native: Path) -> Counter[str]:
    """The digests of all that a run resumes from: tensors, random states, and the run's settings."""
    content = json.loads((native / digests.FILE).read_text())
    return Counter(digest for held in content["boxes"].values() for digest in held.values())


@pytest.mark.parametrize("topology", [Topology(dp=2), Topology(tp=2)], ids=str)
def test_saves_are_evaluated_and_training_keeps_its_bits(
    ranks: RankServer, tmp_path: Path, tiny_source: Path, tasks: dict[str, Any], topology: Topology
) -> None:
    train(ranks, topology, config(tmp_path / "plain", tiny_source, topology))
    run = tmp_path / "run"
    train(ranks, topology, config(run, tiny_source, topology, tasks))

    found = evaluated(run)
    assert [step for step, _ in found] == [2, 4] and found[0][1] != found[1][1]
    written = json.loads((run / "checkpoints/step_4/evaluation.json").read_text())
    assert written["metrics"]["held/perplexity"] == found[1][1] and written["metrics"]["held/tokens"] == len(HELD)
    assert written["metrics"]["quiz/acc"] in (0, 1) and written["tasks"]["held"]["seq_length"] == 16
    rows = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    assert [(row["step"], row["task"], row["prompt"]) for row in rows] == [(step, "say", text) for step in (2, 4) for text in SAY]
    lines = (run / "lines.txt").read_text()
    assert f"evaluation of step 4: held/perplexity {found[1][1]:.4g}" in lines

    plain = weights(tmp_path / "plain")
    assert len(plain) == 2 and weights(run) == plain
    for step in ("step_2", "step_4"):
        ours, theirs = (boxes(folder / "checkpoints" / step / "native") for folder in (run, tmp_path / "plain"))
        assert ours.total() > 20 and (ours - theirs).total() == (theirs - ours).total() == 1, "only the settings differ"
    losses = [[row["train/loss"] for row in read(folder) if "train/loss" in row] for folder in (tmp_path / "plain", run)]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    exported = {file.name for file in (run / "checkpoints/step_4/hf").iterdir()}
    assert exported == {file.name for file in (tmp_path / "plain/checkpoints/step_4/hf").iterdir()}

    again = config(run, tiny_source, topology, tasks, recipe={"steps": 6}, checkpoint={"resume": "auto"})
    if topology == Topology(tp=2):
        (run / "checkpoints/step_4/evaluation.json").unlink()  # as if the run had been killed in it
        train(ranks, topology, again)
        assert [step for step, _ in evaluated(run)] == [2, 4, 4, 6] and evaluated(run)[2] == found[1]
    else:
        train(ranks, topology, again)
        assert [step for step, _ in evaluated(run)] == [2, 4, 6]


def test_the_recipe_finds_the_same(ranks: RankServer, tmp_path: Path, tiny_source: Path, tasks: dict[str, Any]) -> None:
    every = {"every": None}
    train(ranks, Topology(), config(tmp_path / "run", tiny_source, Topology(), tasks, evaluate=every))
    assert [step for step, _ in evaluated(tmp_path / "run")] == [4]
    exported = tmp_path / "run/checkpoints/step_4"
    given = config(tmp_path / "alone", exported / "hf", Topology())
    given["recipe"] |= {"options": {"tasks": tasks, "batch_size": 4, "device": "cpu"}, "steps": 0, "single_process": True}
    ranks.run(f"{CASES}:recipe", topology=Topology(), kwargs={"name": "evaluate", "values": given})
    one, other = (json.loads((folder / "evaluation.json").read_text()) for folder in (exported, tmp_path / "alone"))
    assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-6) and one["generations"] == other["generations"]
    assert evaluated(tmp_path / "alone") == [(0, pytest.approx(one["metrics"]["held/perplexity"], rel=1e-6))]

    given["recipe"]["options"]["tasks"] = {"held": {**tasks["held"], "seq_length": 4096}, "other": {"kind": "generations"}}
    with pytest.raises(RankError, match="prompts or path must be given"):
        ranks.run(f"{CASES}:recipe", topology=Topology(), kwargs={"name": "evaluate", "values": given})


def test_what_cannot_work_is_refused_on_every_rank_before_the_first_step(
    ranks: RankServer, tmp_path: Path, tiny_source: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "A"}\n{"text": 3}\n')
    wrong = {
        "quiz": {"kind": "multiple_choice", "path": str(bad)},
        "long": {"kind": "perplexity", "path": str(bad), "seq_length": 100_000},
        "odd": {"kind": "perplexities"},
    }
    given = config(
        tmp_path / "run",
        tiny_source,
        Topology(dp=2),
        wrong,
        evaluate={"on_error": "explode", "every": 0, "device": "tpu"},
        peft={"name": "lora"},
        checkpoint={"save_every": None, "save_at_end": False},
    )
    with pytest.raises(RankError) as caught:
        train(ranks, Topology(dp=2), given)
    text = str(caught.value)
    assert ConfigError.__name__ in text
    for part in (
        f"{bad}:1: 'choices' must be",
        f"{bad}:2: 'prompt' (or 'question')",
        "kind='perplexities' is not one of perplexity",
        "long: seq_length=100000 must be at most",
        "callbacks.evaluate.on_error='explode' is not one of warn, fail",
        "callbacks.evaluate.every=0 must be at least 1",
        "device='tpu' must be auto",
        "with peft=lora a save has only the adapters; set peft.merge=true",
        "would evaluate no save of this run",
    ):
        assert part in text, part
    assert not read(tmp_path / "run") or not any("train/loss" in row for row in read(tmp_path / "run"))


def test_merged_adapters_are_evaluated(ranks: RankServer, tmp_path: Path, tiny_source: Path, tasks: dict[str, Any]) -> None:
    train(
        ranks,
        Topology(dp=2),
        config(tmp_path, tiny_source, Topology(dp=2), tasks, peft={"name": "lora", "merge": True}, evaluate={"every": 2}),
        is_forked=False,
    )
    assert [step for step, _ in evaluated(tmp_path)] == [4]


def test_a_failed_evaluation_warns_or_ends_the_run_and_costs_no_save(
    ranks: RankServer, tmp_path: Path, tiny_source: Path, tasks: dict[str, Any]
) -> None:
    given = config(tmp_path / "warned", tiny_source, Topology(dp=2), tasks, f"{CASES}.Break")
    train(ranks, Topology(dp=2), given)
    assert evaluated(tmp_path / "warned") == []
    said = (tmp_path / "warned/lines.txt").read_text()
    assert "step_2/hf was not evaluated: " in said and "config.json" in said

    given = config(tmp_path / "failed", tiny_source, Topology(dp=2), tasks, f"{CASES}.Break", evaluate={"on_error": "fail"})
    with pytest.raises(RankError, match=r"EvaluationError.*step_2/hf was not evaluated"):
        train(ranks, Topology(dp=2), given)
    step = tmp_path / "failed/checkpoints/step_2"
    (step / "hf/config.gone").rename(step / "hf/config.json")  # the cause is mended
    shutil.rmtree(tmp_path / "failed/checkpoints/step_4", ignore_errors=True)
    given = config(
        tmp_path / "failed", tiny_source, Topology(dp=2), tasks, checkpoint={"resume": "auto"}, evaluate={"on_error": "fail"}
    )
    train(ranks, Topology(dp=2), given)
    assert [step for step, _ in evaluated(tmp_path / "failed")] == [2, 4]


def test_ranks_wait_longer_than_a_collective_may_take(
    ranks: RankServer, tmp_path: Path, tiny_source: Path, tasks: dict[str, Any]
) -> None:
    given = config(tmp_path, tiny_source, Topology(dp=2), tasks, timeout=2.5, evaluate={"every": None})
    ended = ranks.run(f"{CASES}:outlasting_the_timeout", world_size=2, kwargs={"values": given}, timeout=240)
    assert [step for step, _ in evaluated(tmp_path)] == [4]
    assert ended[1] != "waited", "a plain wait of as long fails"


def test_a_signal_gives_an_evaluation_up(ranks: RankServer, tmp_path: Path, tiny_source: Path, tasks: dict[str, Any]) -> None:
    given = config(tmp_path, tiny_source, Topology(dp=2), tasks)
    assert ranks.run(f"{CASES}:stopped", topology=Topology(dp=2), kwargs={"values": given}) == [2, 2]
    assert evaluated(tmp_path) == [] and not list(tmp_path.glob("checkpoints/step_*/evaluation.json"))
    train(ranks, Topology(dp=2), config(tmp_path, tiny_source, Topology(dp=2), tasks, checkpoint={"resume": "auto"}))
    assert [step for step, _ in evaluated(tmp_path)] == [2, 4]


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="the package lm_eval isn't installed: pip install 'megabridge[eval]'")
def test_the_harness_runs_beside_the_training(ranks: RankServer, tmp_path: Path, tiny_source: Path, tasks: dict[str, Any]) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tasks['quiz']['path']}}}}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{prompt}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        'target_delimiter: ""\nmetric_list: [{metric: acc}]\n'
    )
    own = {"kind": "lm_eval", "tasks": ["own"], "include_path": str(folder)}
    given = config(
        tmp_path / "run",
        tiny_source,
        Topology(dp=2),
        {"own": own, "quiz": tasks["quiz"]},
        evaluate={"every": None, "on_error": "fail"},
    )
    train(ranks, Topology(dp=2), given)
    (row,) = [row for row in read(tmp_path / "run") if "evaluation/own/own/acc" in row]
    assert row["evaluation/own/own/acc"] == row["evaluation/quiz/acc"]
    given = config(tmp_path / "other", tiny_source, Topology(dp=2), {"own": {**own, "tasks": ["own", "not_there"]}})
    with pytest.raises(RankError, match="lm-evaluation-harness has no 'not_there'"):
        train(ranks, Topology(dp=2), given)
