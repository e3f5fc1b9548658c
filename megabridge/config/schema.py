"""The schema of every config group: names, types, defaults and meaning of its keys. No torch.

`register()` stores the schema under the name `schema` in Hydra's ConfigStore; `conf/config.yaml` lists it first, so that every YAML
file and override is checked against it while Hydra composes. Values in `conf/` override the defaults here. A field's `choices` (a
tuple, or a function that returns one) are checked after composition by `megabridge.config.validation`. Two kinds of node are open:
those whose keys are defined elsewhere (`model.hf`, `model.provider`, `recipe.options`), and those that hold a `_target_` (data,
callbacks, logger).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

from omegaconf import DictConfig, OmegaConf

from megabridge.config import installed
from megabridge.config.plan_schema import PlanConfig
from megabridge.errors import ConfigError
from megabridge.parallel.topology import SETTINGS, Topology

CONFIG_FORMAT: Final = 1
"""Increased when a published key gets another name or meaning; tests/fixtures keeps a config of every version."""
DTYPES: Final = ("float32", "bfloat16", "float16")


def choice(default: str, *others: str) -> Any:
    """Returns a text field that accepts `default` or one of `others`."""
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass
class ModelConfig:
    name: str = "???"
    """Name of the model in messages, file names and logs."""
    path: str | None = None
    """A local Hugging Face folder or a hub id. Null: a model with random weights of the shape in `hf`."""
    revision: str | None = None
    """Hub revision of config, tokenizer and weights alike."""
    trust_remote_code: bool = False
    """Whether the checkpoint's own *.py files are fetched, and kept for exports. megabridge itself runs none of them."""
    load_weights: bool = True
    """False: random weights of the shape in `hf`, even where `path` names real ones (still used for the tokenizer)."""
    dtype: str = choice(*DTYPES)
    """Dtype of parameters and activations in training; the optimizer's copy is float32. Conversions keep each tensor's dtype."""
    hf: dict[str, Any] = field(default_factory=dict)
    """Keys of the checkpoint's config.json that describe its shape: layouts are checked against them before any download."""
    ignore_keys: list[str] = field(default_factory=list)
    """Keys of config.json that nothing reads and that would be refused, if the model computes the same without them."""
    tokenizer: str | None = None
    """Tokenizer of a model without `path`: a local folder, a hub id, or `bytes` (byte-level, megabridge.hf.byte_tokenizer)."""
    provider: dict[str, Any] = field(default_factory=dict)
    """Overrides of the Megatron model: TransformerConfig's fields, e.g. +model.provider.recompute_granularity=full."""


@dataclass
class ParallelConfig:
    auto: bool = False
    """Whether sizes that are not set are chosen: the layout that fits, with the least expected time of a step. The sizes that were
    chosen stand in config.yaml."""
    tp: int = 1
    """Tensor parallel size: ranks that share each matrix."""
    pp: int = 1
    """Pipeline parallel size: ranks that share the layers."""
    vpp: int = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    cp: int = 1
    """Context parallel size: ranks that share each sequence."""
    ep: int = 1
    """Expert parallel size: ranks that share the experts."""
    etp: int | None = None
    """Tensor parallel size inside an expert. Null: tp."""
    dp: int | None = None
    """Data parallel size. Null: follows from the number of processes; 1 where the launcher starts them itself."""
    sequence_parallel: bool = False
    """Whether activations between the matrices are cut along the sequence over the tp ranks."""
    layout: str | None = None
    """megatron-core's pipeline_model_parallel_layout, e.g. 'Et|tt|tL'. Null: evenly, with fewer layers first and last."""


@dataclass
class ConversionConfig:
    mode: str = choice("roundtrip", "import", "export", "verify")
    """Task of recipe=convert. import: HF to native; export: native to HF; roundtrip: both; verify: checks an exported folder."""
    output: str | None = None
    """Folder that recipe=convert publishes to. Null: inside the run directory."""
    folder: str | None = None
    """Exported folder that mode=verify checks against its manifest."""
    source: str | None = None
    """Local folder or hub id whose tensors mode=verify also compares with the exported ones. Null: only the manifest is used."""
    verify: bool = True
    """Whether every imported and exported tensor is read back and compared bit by bit."""
    strict: bool = True
    """Whether an HF tensor that nothing consumes, or a parameter that nothing feeds, is an error."""
    allow_missing: list[str] = field(default_factory=list)
    """HF names (with * as wildcard) that a checkpoint may lack."""
    allow_unexpected: list[str] = field(default_factory=list)
    """HF names (with * as wildcard) that a checkpoint may have in addition to the model's."""
    allow_bin: bool = False
    """Whether weights may come from a pickled pytorch_model.bin where there are no safetensors; only tensors are unpickled."""
    allow_nonfinite: bool = False
    """Whether weights may hold NaN or infinity."""
    reader: str = choice("auto", "mapped", "sequential")
    """Source of column cuts: copied out of a mapped file (mapped) or out of whole rows (sequential); auto: by file system."""
    dedupe: bool = False
    """Whether the ranks of a host read each part of a checkpoint only once between them, through 64 MiB of shared memory."""
    export_dtype: str | None = field(default=None, metadata={"choices": DTYPES})
    """Precision of exported tensors. Null: each tensor's in the source; without imported weights the parameters' own."""
    export_quantization: str | None = field(default=None, metadata={"choices": ("fp8_block",)})
    """fp8_block: exports have the linears of layers in DeepSeek's block-scaled FP8. Null: nothing is quantised."""
    max_shard_size: str | None = None
    """Maximum size of an export's safetensors files, such as 5GB. Null: the source's files if all dtypes are its own, else 5GB."""
    writer: str = choice("shared", "gather")
    """Writers of an export's files. shared: every rank writes its own part, on a shared file system; gather: rank 0 writes all."""


@dataclass
class CheckpointConfig:
    save_every: int | None = None
    """Steps between saves. Null: no saves before the end."""
    save_at_end: bool = True
    """Whether the last step is saved."""
    native: bool = True
    """Whether a save writes a distributed checkpoint of parameters, optimizer and progress, from which runs resume."""
    hf: bool = True
    """Whether a save publishes a Hugging Face folder."""
    resume: str = "none"
    """none; auto: the newest committed step in the run directory, if any; or the folder of a native checkpoint."""
    keep_last: int | None = None
    """Number of the newest saved steps that are kept. Null: all, or only the newest if `keep_best` is set."""
    keep_best: int | None = None
    """Number of saved steps with the lowest validation loss that are kept as well. A step is then validated before it is saved."""
    accept_changes: list[str] = field(default_factory=list)
    """Changes, as a refused resume names them, that the run continues with: settings of the data's order, different inputs."""
    path: str | None = None
    """Folder of the checkpoints. Null: `checkpoints` in the run directory."""
    on_full_disk: str = choice("wait", "fail")
    """What follows where there is no room for a save, nor in spare_path. wait: one on the way is left out, the last one waits for
    room and says how much; fail: the run ends."""
    spare_path: str | None = None
    """Folder on another disk for saves that find no room in `path`; each run has a folder of its own there, and
    checkpoint.resume=auto looks there, too."""


@dataclass
class RecipeConfig:
    target: str = "recipes.finetune:main"
    """module:function that every rank calls with the whole config."""
    steps: int = 20
    """Optimizer steps in the run, where `epochs` is null."""
    epochs: float | None = None
    """Passes over the training data, from which `steps` follows; not for data without an end."""
    global_batch_size: int = 4
    """Sequences per optimizer step, over all data parallel ranks."""
    micro_batch_size: int = 1
    """Sequences that go through the model at once on one rank."""
    seq_length: int = 512
    """Tokens per sequence."""
    eval_every: int | None = None
    """Steps between validations. Null: only at the end."""
    eval_at_start: bool = True
    """Whether validation also runs before the first step."""
    log_every: int = 1
    """Steps between log lines."""
    single_process: bool = False
    """Whether one process without process groups runs it, whatever `parallel` is: a recipe that plans, or starts ranks itself."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of your own recipe: +recipe.options.anything=1."""


@dataclass
class PeftConfig:
    name: str = choice("none", "lora", "dora")
    """none: all parameters are trained. lora, dora: adapters beside frozen linears; saves hold the adapters alone."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Ends of HF module names that get an adapter (q_proj, layers.3.mlp.up_proj, * as wildcard), or all-linear."""
    exclude_modules: list[str] = field(default_factory=list)
    """Ends of HF module names that get no adapter."""
    target_parameters: list[str] = field(default_factory=list)
    """Ends of names of experts' weights that get an adapter and are a single 3-D parameter of a layer (experts.down_proj, * as
    wildcard), as in transformers' model."""
    r: int = 16
    """Rank of each adapter."""
    lora_alpha: float = 32.0
    """An adapter's output is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Share of an adapter's input that is dropped in training."""
    use_rslora: bool = False
    """Whether an adapter's output is multiplied by lora_alpha / sqrt(r) instead."""
    path: str | None = None
    """A PEFT folder with these settings from which the adapters start. Null: they start without effect."""
    merge: bool = False
    """Whether a save publishes the whole model with the adapters merged. False: a PEFT folder with the adapters alone."""


@dataclass
class OptimizerConfig:
    name: str = choice("adam", "sgd")
    """adam is AdamW: weight decay is decoupled."""
    lr: float = 1e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay of all parameters except those of `no_decay`."""
    no_decay: list[str] = field(default_factory=lambda: ["*norm*", "*bias*"])
    """Native names (with * as wildcard) that are not decayed. Parameters of one dimension never are."""
    freeze: list[str] = field(default_factory=list)
    """Hugging Face or native names (with * as wildcard) that are not trained. The last matching pattern decides; one that begins
    with ! is trained: ['*', '!*.mlp.*']."""
    beta1: float = 0.9
    """Adam's decay rate of the first moment."""
    beta2: float = 0.95
    """Adam's decay rate of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    momentum: float = 0.9
    """SGD's momentum."""
    clip_grad: float = 1.0
    """Largest global gradient norm. 0: no clipping."""
    distributed: bool = True
    """Whether the optimizer's state is cut over the data parallel ranks."""
    overlap_grad_reduce: bool = False
    """Whether gradients are summed over the data parallel ranks during the backward pass."""
    overlap_param_gather: bool = False
    """Whether updated parameters are gathered during the next forward pass. Needs `distributed` and overlap_grad_reduce."""
    loss_scale: float | None = None
    """Factor of a float16 model's loss, a sum over tokens. Null: adjusted during training."""
    initial_loss_scale: float = 16.0
    """Initial loss scale of a float16 model; it is halved when gradients overflow."""
    min_loss_scale: float = 2.0**-16
    """Minimum loss scale. Gradients that overflow even with it are not finite, and handled by `policy.nonfinite`."""
    loss_scale_window: int = 1000
    """Steps without overflow after which the loss scale is doubled."""
    hysteresis: int = 2
    """Consecutive steps with overflow after which the loss scale is halved."""


@dataclass
class SchedulerConfig:
    name: str = choice("cosine", "linear", "constant", "wsd")
    """Shape of the learning rate after the warm-up. wsd: constant, then decaying in the last `decay_steps`."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0 to the peak."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    wsd_decay: str = choice("linear", "cosine", "minus_sqrt", "exponential")
    """Shape of the last part of wsd; minus_sqrt is 1 - sqrt(t)."""
    decay_steps: int | None = None
    """Steps until `min_lr` is reached (null: all of the run's); for wsd the length of the last part (null: a tenth)."""


@dataclass
class PolicyConfig:
    nonfinite: str = choice("stop", "skip", "rollback")
    """Reaction to a loss or gradient norm that is not finite. stop: the run fails, nothing of the step is saved, and only steps
    that are logged, validated or saved are checked. skip: the step changes nothing. rollback: back to the last saved step; the
    batches since then are skipped. The latter two check every step, which then waits for the device."""
    spike: str = choice("ignore", "stop", "skip", "rollback")
    """Reaction to a loss above spike_factor x the mean of the last spike_window losses. All but ignore check every step."""
    spike_factor: float = 2.0
    """Factor over the mean of the last losses above which a loss is a spike."""
    spike_window: int = 32
    """Number of losses in that mean. Before there are that many, nothing is a spike."""
    limit: int = 10
    """Number of bad steps that are skipped or rolled back; the next one stops the run."""


@dataclass
class BackendConfig:
    name: str = field(default="auto", metadata={"choices": installed.backend_names})
    """Implementation of the layers. auto: Transformer Engine where it is installed, there is CUDA, and it has what the model needs,
    else torch; local: megatron-core's own; or a backend of an installed package (entry points `megabridge.backends`)."""


@dataclass
class BenchConfig:
    name: str = choice("conversion")
    """The benchmark that recipe=bench runs."""
    layouts: list[str] = field(default_factory=lambda: ["single"])
    """Layouts to measure, each written as single or tp2pp2. On CUDA, layouts that need more GPUs than the host has are left out."""
    repeats: int = 3
    """Number of repetitions of each measurement; the best one counts."""


@dataclass
class PrepareConfig:
    paths: list[str] = field(default_factory=list)
    """Files that recipe=prepare_data tokenises: .jsonl, .parquet, .txt, folders of them, or patterns with *."""
    output: str | None = None
    """Prefix of the .bin and .idx files that it writes. Null: `data` in the run directory."""
    column: str = "text"
    """Column of JSONL and parquet rows that holds the text."""
    text_rows: str = choice("file", "line")
    """Document in a plain text file: the whole file, or each line."""
    append_end: bool = True
    """Whether the tokenizer's end-of-text token closes a document."""
    workers: int | None = None
    """Number of processes that tokenise. Null: one per core."""
    max_bad_share: float = 0.01
    """Maximum share of rows that may be left out because they can't be used."""


@dataclass
class Config:
    """The whole config, as a recipe gets it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model, its source and its dtype."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The parallel layout."""
    conversion: ConversionConfig = field(default_factory=ConversionConfig)
    """Rules of import and export."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saves, and the checkpoint that a run resumes from."""
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    """The program that runs, and for how long."""
    data: dict[str, Any] = field(default_factory=dict)
    """A megabridge.data.DataModule: its class in `_target_`, its arguments beside it."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """Input and output of recipe=prepare_data."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """What recipe=plan and parallel=auto choose a layout for."""
    bench: BenchConfig = field(default_factory=BenchConfig)
    """Settings of recipe=bench."""
    peft: PeftConfig = field(default_factory=PeftConfig)
    """The trained parameters: all, or adapters."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """The learning rate over the steps."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Reaction to a step whose loss is not finite, or far too high."""
    backend: BackendConfig = field(default_factory=BackendConfig)
    """The implementation of Megatron's layers."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Maps names to megabridge.callbacks.Callback: class in `_target_`, arguments beside it. They run in this order."""
    logger: dict[str, Any] = field(default_factory=dict)
    """Maps names to megabridge.loggers.Logger: class in `_target_`, arguments beside it."""
    family: str | None = None
    """module:NAME of a megabridge.families.Family of your own; every process registers it before anything else happens."""
    platform: str = choice("auto", "cpu", "cuda")
    """Device of the ranks. auto: CUDA if there is a GPU, else the CPU with gloo."""
    seed: int = 1234
    """Seed of random weights, data order and dropout."""
    deterministic: bool = False
    """Whether torch refuses operations whose result may differ from run to run."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others in a collective before it fails, as another host may be cut off."""
    config_format: int = CONFIG_FORMAT
    """Version of the names and meanings of these keys: a config of another version is refused."""
    sweep: str | None = None
    """Directory of the sweep that recipe=collect and recipe=report read. Null: they refuse to run."""
    run_dir: str = "outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}"
    """The run's directory: config.yaml, metrics.jsonl, checkpoints. The parent or rank 0 creates it and makes it absolute."""


OPEN_NODES: Final = ("model.hf", "model.provider", "recipe.options", "data", "callbacks", "logger")
"""Nodes whose keys are not fixed by the schema."""


def register() -> None:
    """Makes the schema known to Hydra, once per process."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name in installed.backends():  # which have no file in conf/backend
        store.store(group="backend", name=name, node={"name": name})


def typed(values: Mapping[str, Any] | DictConfig) -> Config:
    """Returns the resolved config as dataclasses. Raises omegaconf's errors for an unknown key or a wrong type."""
    return cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values)))


def processes(config: Config, world_size: int | None = None) -> Topology:
    """Returns the layout of the processes that run the recipe: that of `parallel` (see `topology`), or of one process.

    Raises ConfigError when the layout doesn't fit the `world_size` processes that were started.
    """
    if not config.recipe.single_process:
        return topology(config.parallel, world_size)
    if world_size not in (None, 1):
        raise ConfigError(
            f"{config.recipe.target} runs in one process, but {world_size} were started; start it without torchrun or srun."
        )
    return Topology()


def topology(parallel: ParallelConfig, world_size: int | None = None) -> Topology:
    """Returns the layout of `world_size` ranks or, with None, of the ranks that we start: dp is then 1 unless it is set.

    Raises ConfigError when the sizes don't multiply to `world_size`.
    """
    sizes = {name: getattr(parallel, name) for name in SETTINGS}
    if world_size is None:
        return Topology(dp=1 if parallel.dp is None else parallel.dp, **sizes)
    return Topology.for_world(world_size, dp=parallel.dp, **sizes)
