"""Every YAML composes, fits the schema, and names classes and functions that exist; layouts and hosts are checked."""

from __future__ import annotations

import ast
import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from megabridge.config import schema, validation
from megabridge.config.schema import Config
from megabridge.errors import ConfigError
from megabridge.families.core.known_sizes import known_sizes
from megabridge.families.gpt2 import FAMILY as GPT2
from megabridge.launchers.platform_choice import choose_platform
from megabridge.launchers.prepare import conf_folder, resolve
from megabridge.layouts.shape import shape_of
from megabridge.parallel import hardware
from megabridge.parallel.topology import Topology
from tests.support.compose import compose

CONF = conf_folder()
CHOICES = sorted((file.parent.name, file.stem) for file in CONF.glob("*/*.yaml"))
MODELS = {
    "tiny_llama": (4, 8, 8),
    "smollm2_135m": (30, 9, 3),
    "smollm2_360m": (32, 15, 5),
    "llama32_1b": (16, 32, 8),
    "llama32_3b": (28, 24, 8),
    "llama31_8b": (32, 32, 8),
}
PARAMETERS = {  # as the model cards say
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "llama31_8b": 8_030_261_248,
}
LAYOUTS = {
    "single": 1,
    "dp2": 2,
    "tp2": 2,
    "tp3": 3,
    "pp2": 2,
    "tp2pp2": 4,
    "tp3pp2": 6,
    "pp2vpp2": 2,
    "tp2pp2vpp2": 4,
    "tp8pp2": 16,
}
MIXTURE_LAYOUTS = {
    "ep2": Topology(ep=2, dp=2),
    "ep4": Topology(ep=4, dp=4),
    "ep8": Topology(ep=8, dp=8),
    "tp2ep2": Topology(tp=2, ep=2, etp=1),
    "pp2ep2": Topology(pp=2, ep=2, dp=2),
    "etp2ep2": Topology(tp=2, ep=2, etp=2, dp=2),
}
GIB = 2**30


def typed(*overrides: str) -> Config:
    return resolve(compose(*overrides), Path("run"))[1]


def defines(module: str, name: str) -> bool:
    """Whether the source of `module` defines `name` at its top; nothing is imported but the packages above it."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, module
    body = ast.parse(Path(spec.origin).read_text()).body
    return any(isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name for node in body)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_yaml_composes_and_names_what_exists(group: str, choice: str) -> None:
    more = (
        ["model.path=somewhere/else"]
        if choice in ("auto", "check", "compare", "draft", "evaluate") and group in ("model", "recipe")
        else []
    )
    more += {"indexed": ["data.paths=[corpus]"], "chat": ["data.path=chats.jsonl"], "streaming": ["data.path=some/set"]}.get(
        choice, []
    )
    if group == "experiment" and "override /data: chat" in (CONF / "experiment" / f"{choice}.yaml").read_text():
        more += ["data.path=chats.jsonl"]
    run = typed(*(["experiment=" + choice] if group == "experiment" else [f"{group}={choice}"]), *more)
    for node in (run.data, *run.callbacks.values(), *run.logger.values()):
        module, _, name = node["_target_"].rpartition(".")
        assert defines(module, name)
    module, _, function = run.recipe.target.partition(":")
    assert defines(module, function)


def test_the_groups_of_the_product_exist() -> None:
    assert MODELS.keys() | {"auto"} <= {choice for group, choice in CHOICES if group == "model"}
    assert LAYOUTS.keys() | MIXTURE_LAYOUTS.keys() | {"auto"} == {choice for group, choice in CHOICES if group == "parallel"}
    groups = "model parallel conversion checkpoint recipe bench data peft optimizer scheduler backend callbacks logger experiment"
    assert {group for group, _ in CHOICES} == set(groups.split())


def test_defaults_are_the_main_job() -> None:
    run = typed()
    assert (run.model.name, run.model.path) == ("smollm2_135m", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert (run.model.dtype, run.recipe.target, run.platform) == ("float32", "recipes.finetune:main", "auto")
    assert run.data["_target_"].endswith("PydocTopics") and run.checkpoint.hf and run.conversion.verify
    assert schema.topology(run.parallel).world_size == 1


def test_the_question_is_the_recipes_choice_of_callbacks() -> None:
    def asked(*overrides: str) -> str | None:
        prompt: str | None = typed(*overrides).callbacks["answer"]["prompt"]
        return prompt

    assert asked() == asked("experiment=smollm2_sft_export") == "Explain the Python topic 'assert'."
    assert asked("callbacks.answer.prompt=Why?") == "Why?"
    assert {asked("recipe=pretrain"), asked("experiment=llama31_8b_sft", "data.path=x"), asked("callbacks=evaluate")} == {None}
    assert typed("experiment=llama31_8b_lora", "data=random_tokens", "callbacks=none").callbacks == {}
    with pytest.raises(ConfigError, match=r"callbacks\.hf_export\.logits_tokens=-1 must be at least 0"):
        typed("callbacks.hf_export.logits_tokens=-1")


@pytest.mark.parametrize("name", MODELS)
def test_shapes(name: str) -> None:
    sizes = known_sizes(typed(f"model={name}").model)
    assert (sizes["num_layers"], sizes["num_attention_heads"], sizes["num_query_groups"]) == MODELS[name]
    assert name not in PARAMETERS or shape_of(sizes.get).parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_fit_the_models_they_are_for(name: str) -> None:
    run = typed(f"parallel={name}", "model=smollm2_135m" if "tp3" in name else "model=tiny_llama")
    topology = schema.topology(run.parallel)
    assert topology.world_size == LAYOUTS[name] and str(topology) == name
    validation.check_layout(run, topology, known_sizes(run.model))


@pytest.mark.parametrize("name", MIXTURE_LAYOUTS)
def test_layouts_with_experts_fit_a_mixture(name: str) -> None:
    run = typed(f"parallel={name}", "model=tiny_moe", f"recipe.global_batch_size={MIXTURE_LAYOUTS[name].dp}")
    topology = schema.topology(run.parallel)
    assert topology == MIXTURE_LAYOUTS[name]
    assert run.parallel.sequence_parallel == (topology.tp > 1), "megatron-core's mixtures need it"
    validation.check_layout(run, topology, known_sizes(run.model))


def test_dp_follows_from_the_world_or_sets_it() -> None:
    assert schema.topology(typed("parallel.tp=2", "parallel.dp=3").parallel).world_size == 6
    assert schema.topology(typed("parallel=tp2").parallel, 8).dp == 4
    with pytest.raises(ConfigError, match="needs 4 processes, but there are 8"):
        schema.topology(typed("parallel=tp2", "parallel.dp=2").parallel, 8)


@pytest.mark.parametrize("recipe", ["plan", "bench"])
def test_a_recipe_of_one_process(recipe: str) -> None:
    run = typed(f"recipe={recipe}", "parallel=tp8pp2")
    assert schema.processes(run) == schema.processes(run, 1) == Topology()
    assert schema.processes(typed("parallel=tp2"), 8) == Topology(tp=2, dp=4)
    with pytest.raises(ConfigError, match=rf"recipes\.{recipe}:main runs in one process, but 2 were started"):
        schema.processes(run, 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("model=llama32_1b parallel=tp3", r"parallel\.tp=3 must divide num_attention_heads=32.*use one of 1, 2, 4, 8, 16, 32"),
        ("parallel.tp=9", r"parallel\.tp=9 must divide ffn_hidden_size=1536; use one of 1, 3\.$"),
        ("model=smollm2_360m parallel=tp2", "use one of 1, 5"),
        ("model=tiny_llama parallel.pp=7", "7 x 1 leaves chunks without layers for num_layers=4; use at most 6 chunks"),
        ("model=tiny_llama parallel.pp=2 parallel.vpp=4", "2 x 4 leaves chunks without layers"),
        ("model=tiny_llama parallel.pp=3", None),
        ("model=tiny_llama parallel.pp=7 parallel.layout=Et|t|t|t||||L", None),
        ("model=tiny_llama parallel.pp=7 +model.provider.num_layers=5", None),
        (
            "model=mixtral_8x7b parallel.ep=3 parallel.dp=3",
            r"parallel\.ep=3 must divide num_moe_experts=8; use one of 1, 2, 4, 8\.",
        ),
        ("model=deepseek_v3 parallel=tp8pp2", r"parallel\.tp=8 needs parallel\.sequence_parallel=true for a model with experts"),
        ("model=mixtral_8x7b parallel=tp2ep2", None),
        (
            "model=tiny_moe parallel.tp=1 parallel.etp=5 parallel.dp=5 recipe.steps=0",
            r"parallel\.etp=5 must divide moe_ffn_hidden_size=96",
        ),
        ("model=gpt_oss_20b parallel.etp=2 parallel.dp=2", r"parallel\.etp=2 must be 1 for experts with biases"),
        ("model=tiny_llama parallel=ep2", r"parallel\.ep=2 needs a model with experts"),
        ("model=gpt2 parallel.tp=5", r"parallel\.tp=5 must divide num_attention_heads=12; use one of 1, 2, 3, 4, 6, 12\."),
        ("model=gpt2 parallel.pp=15", "for num_layers=12"),
        ("model=pythia_160m parallel.tp=8", "must divide num_attention_heads=12"),
        ("model=phi3_mini parallel.tp=3", "must divide num_attention_heads=32"),
        ("model=deepseek_v3 parallel.tp=3 parallel.sequence_parallel=true", "must divide num_attention_heads=128"),
        ("model=tiny_llama parallel.cp=2 backend=torch", r"parallel\.cp=2 needs backend=te, not torch; set it to 1\."),
        ("model=tiny_llama parallel.cp=2 platform=cpu", "needs backend=te, not torch"),
        ("model=tiny_llama parallel.cp=2 backend=te", None),
        (
            "model=tiny_llama parallel.cp=2 backend=te recipe.seq_length=66",
            r"recipe\.seq_length=66 must be a multiple of 2 x cp = 4",
        ),
        (
            "model=tiny_llama parallel=tp2 parallel.sequence_parallel=true backend=local",
            "backend=local has no sequence parallelism",
        ),
        ("parallel.sequence_parallel=true", r"needs parallel\.tp > 1"),
        (
            "parallel=tp3 parallel.sequence_parallel=true recipe.seq_length=256",
            r"recipe\.seq_length=256 must be a multiple of tp x cp = 3",
        ),
        ("parallel=dp2 recipe.global_batch_size=3", r"use recipe\.global_batch_size=2 or another multiple of 2"),
        ("parallel=dp2 recipe.steps=0 recipe.global_batch_size=3", None),
        ("parallel=pp2vpp2 recipe.global_batch_size=3", "multiple of parallel.pp=2"),
        ("recipe.micro_batch_size=0", "must be at least 1"),
    ],
)
def test_layout_rules(overrides: str, message: str | None) -> None:
    run = typed(*overrides.split())
    if message is None:
        validation.check_layout(run, schema.topology(run.parallel), known_sizes(run.model))
        return
    with pytest.raises(ConfigError, match=message):
        validation.check_layout(run, schema.topology(run.parallel), known_sizes(run.model))


def test_all_broken_rules_are_named_at_once() -> None:
    run = typed("model=tiny_llama", "parallel.tp=3", "parallel.pp=7", "recipe.global_batch_size=3", "parallel.dp=2")
    with pytest.raises(ConfigError) as caught:
        validation.check_layout(run, schema.topology(run.parallel), known_sizes(run.model))
    assert all(word in str(caught.value) for word in ("parallel.tp=3", "num_layers=4", "global_batch_size=3"))


def test_sizes_of_a_local_folder_are_read_by_its_family(tmp_path: Path) -> None:
    run = typed("model=auto", f"model.path={tmp_path}", "parallel.tp=5")

    def check(**changes: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**GPT2.tiny, "architectures": ["GPT2LMHeadModel"], **changes}))
        validation.check_layout(run, schema.topology(run.parallel), known_sizes(run.model))

    with pytest.raises(ConfigError, match=r"parallel\.tp=5 must divide num_attention_heads=6; use one of 1, 2, 3, 6"):
        check(n_head=6, n_embd=48, n_inner=96)
    check(n_head="six")
    check(architectures=["NobodysForCausalLM"])
    assert not known_sizes(run.model), "the ranks say what is wrong with it"
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="readable"):
        known_sizes(run.model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("optimizer.name=adma", "did you mean 'adam'"),
        ("config_format=2", "config_format=2 must be 1, which this version of megabridge reads"),
        ("model.dtype=bf16", "is not one of float32, bfloat16, float16"),
        ("data._target_=os", "must name a class"),
        ("+callbacks.mine.x=1", r"callbacks\.mine\._target_=None must name"),
        ("+callbacks.hf_export.inner._target_=os.system", "is not allowed"),
        ("+data.list=[{_target_:os.system}]", r"data\.list\[0\]\._target_='os\.system' is not allowed"),
        ("+model.hf._target_=os.system", "is not allowed; remove it"),
        ("+recipe.options.x._target_=os.system", "is not allowed; remove it"),
        ("recipe.target=recipes.finetne:main", "there is no module 'recipes.finetne'"),
        ("recipe.target=nowhere.at.all:main", "there is no module"),
        ("recipe.target=recipes.finetune", "must be module:function"),
        ("family=my_family", "must be module:NAME, such as my_package"),
        ("family=nowhere.at_all:FAMILY", r"family='nowhere\.at_all:FAMILY': there is no module"),
        ("recipe=check model.path=null", "has neither"),
        ("model=auto", "has neither model.path nor a shape"),
        ("peft.path=somewhere", r"peft\.path='somewhere' has no effect in this run: peft=lora or peft=dora would read it"),
        ("model.path=null", "load_weights=true needs model.path"),
    ],
)
def test_what_resolve_refuses(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        typed(*overrides.split())


def test_a_family_alone_says_which_model_where_nothing_is_trained() -> None:
    given = ["family=megabridge.families.llama:FAMILY", "model=auto"]
    assert typed("recipe=check", *given).family and typed("recipe=compare", *given).model.path is None
    with pytest.raises(ConfigError, match="has neither"):
        typed("recipe=finetune", *given)


def test_every_schema_field_is_documented() -> None:
    body = ast.parse(Path(schema.__file__).read_text()).body
    for node in (node for node in body if isinstance(node, ast.ClassDef)):
        following = [*node.body[1:], None]
        for statement, after in zip(node.body, following, strict=True):
            if isinstance(statement, ast.AnnAssign):
                assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), ast.unparse(statement)


def platform_of(*overrides: str, gpus: int = 0, memory: int = 24 * GIB) -> str:
    run = typed(*overrides)
    return choose_platform(run, schema.processes(run), gpus=gpus, memory=memory, overrides=list(overrides))


def test_small_models_run_on_a_cpu_and_gpus_are_used_where_they_suffice() -> None:
    assert platform_of() == "cpu"
    assert platform_of("model=tiny_llama", "parallel=tp8pp2") == "cpu"
    assert platform_of("model=llama32_1b", "parallel=tp8pp2", gpus=16) == "cuda"
    assert platform_of("model=tiny_llama", "parallel=tp8pp2", "platform=cpu", gpus=1) == "cpu"
    assert platform_of("model=llama32_1b", "platform=cpu", memory=64 * GIB) == "cpu"
    assert platform_of("model=llama32_1b", "recipe=convert", "platform=cpu", memory=8 * GIB) == "cpu"
    assert platform_of("model=llama31_8b", "recipe=convert", memory=8 * GIB) == "cpu", "nothing is trained"
    assert platform_of("model=llama31_8b", "recipe=plan", "parallel=tp8pp2", gpus=1) == "cuda", "one process, whatever the layout"


def refusal(*overrides: str, gpus: int = 0, memory: int = 24 * GIB) -> str:
    with pytest.raises(ConfigError) as caught:
        platform_of(*overrides, gpus=gpus, memory=memory)
    return str(caught.value)


def test_too_few_devices_says_what_is_missing_and_what_would_work() -> None:
    text = refusal("model=llama32_1b", "parallel=tp8pp2")
    assert "needs 16 GPUs, but this host has none" in text
    assert "torchrun --nnodes=2 --nproc-per-node=8" in text and "-m megabridge.run model=llama32_1b parallel=tp8pp2" in text
    assert "megabridge.run model=tiny_llama parallel.tp=8 parallel.pp=2" in text
    text = refusal("model=llama32_1b", "parallel=tp8pp2", gpus=4)
    assert "this host has 4" in text and "model=llama32_1b parallel=tp8pp2 parallel.tp=4 parallel.pp=1" in text
    assert "megabridge.run model=tiny_llama parallel=tp2 platform=cpu" in refusal("model=tiny_llama", "parallel=tp2", gpus=1)
    assert "at least 120 GiB, but this host has 24" in refusal("model=llama31_8b", "platform=cpu")
    assert "needs 1 GPU, but this host has none" in refusal("platform=cuda")


def suggested(text: str, place: str) -> list[str]:
    """The overrides of the command that a refusal has for a place; empty where it has none."""
    lines = [line for line in text.splitlines() if line.strip().startswith(f"{place}: ")]
    return shlex.split(lines[0].partition("megabridge.run ")[2]) if lines else []


def test_suggested_commands_work() -> None:
    """Each composes, passes the checks, and has the layout that was asked for, or one of its kind that fits."""
    cases = {
        ("model=llama32_3b", "parallel=tp8pp2"): (5, 4, 16),
        ("experiment=llama31_8b_sft", "data.path=x"): (2, 2, 8),
        ("experiment=qwen3_30b_a3b_sft", "data.path=x"): (4, 4, 16),
        ("model=llama32_1b", "parallel.tp=2", "parallel.dp=4"): (0, 0, 8),
        ("model=llama32_1b", "parallel=tp2pp2vpp2", "recipe.global_batch_size=4"): (1, 1, 4),
        ("model=llama32_1b", "parallel.tp=2", "parallel.cp=2", "platform=cuda"): (0, 0, None),
        ("model=llama32_1b", "parallel.pp=48"): (0, 0, None),
    }
    for overrides, (gpus, here, cpu) in cases.items():
        if (smaller := suggested(refusal(*overrides, gpus=gpus), "on this host")) or here:
            assert platform_of(*smaller, gpus=gpus) == "cuda", overrides
            run = typed(*smaller)
            validation.check_layout(run, schema.topology(run.parallel), known_sizes(run.model))
        text = refusal(*overrides)
        tiny = suggested(text, "the same layout on this host's CPU")
        assert bool(tiny) == (cpu is not None), (overrides, text)
        if tiny:
            run = typed(*tiny)
            layout = schema.topology(run.parallel)
            validation.check_layout(run, layout, known_sizes(run.model))
            assert platform_of(*tiny) == "cpu" and layout.world_size == cpu, (overrides, tiny)
            asked = typed(*overrides).parallel
            assert str(layout) == str(schema.topology(asked)) or asked.dp is None, (overrides, tiny)


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 4), ("", 0), ("-1", 0), ("0,1", 2), ("0,9,1", 1), ("GPU-abc, MIG-def", 2), ("2", 1)]
)
def test_visible_gpus(monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int) -> None:
    monkeypatch.setattr(hardware, "installed_gpus", lambda: 4)
    assert hardware.visible_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count


def frozen(node: Any, prefix: str = "") -> list[str]:
    """Every key of the schema, dotted."""
    keys = []
    for key, value in node.items():
        keys.append(prefix + key)
        if isinstance(value, dict):
            keys += frozen(value, f"{prefix}{key}.")
    return keys


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint.keep_last=0", "checkpoint.keep_last=0 must be at least 1"),
        ("checkpoint.save_every=0", "checkpoint.save_every=0 must be at least 1"),
        ("recipe.eval_every=0", "recipe.eval_every=0 must be at least 1"),
        ("policy.nonfinite=rollback", "policy rollback needs saved steps to go back to"),
        ("policy.spike=skp", "policy.spike='skp' is not one of ignore, stop, skip, rollback; did you mean 'skip'"),
        ("policy={spike: stop, spike_factor: 1.0}", "policy.spike_factor=1.0 must be above 1"),
        ("optimizer.min_loss_scale=32", "optimizer.min_loss_scale=32.0 must be above 0 and at most initial_loss_scale=16.0"),
        ("checkpoint={keep_best: 1, native: false}", "checkpoint.keep_best=1 keeps native steps"),
    ],
)
def test_training_that_cannot_work_is_refused_before_it_starts(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        typed(override)


def test_config_keys_are_frozen() -> None:
    """A key that appears, goes or changes its name is a change of the product: say so in CHANGELOG.md and here."""
    keys = OmegaConf.to_container(OmegaConf.structured(Config), resolve=False)
    expected = (Path(__file__).parent / "config_keys.txt").read_text().split()
    assert frozen(keys) == expected
