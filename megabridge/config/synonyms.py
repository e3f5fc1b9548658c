"""What settings are called elsewhere (transformers, PEFT, Megatron-LM, axolotl, LLaMA-Factory, torchtune), and what they are here.

A name is looked up by the last part of a key, whatever stands before it. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from megabridge.errors import plain

_GROUPS: Final[Mapping[str, str]] = {
    "optimizer.lr": "learning_rate lr max_lr base_lr peak_lr",
    "scheduler.min_lr": "min_learning_rate min_lr lr_end end_learning_rate",
    "optimizer.weight_decay": "weight_decay wd",
    "optimizer.beta1": "adam_beta1 beta1",
    "optimizer.beta2": "adam_beta2 beta2",
    "optimizer.eps": "adam_epsilon adam_eps eps epsilon",
    "optimizer.momentum": "sgd_momentum momentum",
    "optimizer.clip_grad": "max_grad_norm grad_clip gradient_clip gradient_clipping gradient_clip_val clip_grad_norm clip_grad",
    "optimizer.distributed": "use_distributed_optimizer zero_stage zero1",
    "optimizer.freeze": "frozen_parameters unfrozen_parameters freeze_layers freeze",
    "recipe.steps": "max_steps total_steps num_steps train_steps num_train_steps max_train_steps training_steps "
    "train_iters max_iters",
    "recipe.seq_length": "max_seq_length max_seq_len max_length max_len seq_len sequence_len sequence_length cutoff_len block_size "
    "model_max_length context_length seq_length",
    "recipe.eval_every": "eval_steps eval_interval val_check_interval evaluation_steps",
    "recipe.log_every": "logging_steps log_interval log_every_n_steps logging_interval",
    "checkpoint.save_every": "save_steps save_interval save_every_n_steps checkpoint_interval checkpoint_every",
    "checkpoint.keep_last": "save_total_limit keep_last_n_checkpoints max_checkpoints keep_last",
    "checkpoint.resume": "resume resume_from_checkpoint resume_from load_checkpoint auto_resume_from_checkpoints",
    "peft.r": "lora_rank lora_r lora_dim adapter_rank",
    "peft.lora_alpha": "lora_alpha",
    "peft.lora_dropout": "lora_dropout",
    "peft.target_modules": "lora_target_modules lora_target target_modules lora_modules lora_attn_modules",
    "peft.use_rslora": "use_rslora rslora",
    "peft.path": "adapter_path lora_model_dir adapter_name_or_path lora_path",
    "peft.merge": "merge_lora merge_and_unload merge_weights",
    "parallel.tp": "tp_size tensor_parallel_size tensor_model_parallel_size tensor_parallel tensor_model_parallel "
    "model_parallel_size num_tp tp_degree tensor_parallel_degree tp",
    "parallel.pp": "pp_size pipeline_parallel_size pipeline_model_parallel_size pipeline_parallel "
    "pipeline_parallel_degree pp_degree pp",
    "parallel.vpp": "virtual_pipeline_model_parallel_size vpp_size virtual_pipeline_parallel_size vpp num_virtual_stages",
    "parallel.cp": "cp_size context_parallel_size context_parallel ring_attn_size context_parallel_degree "
    "sequence_parallel_degree cp",
    "parallel.ep": "ep_size expert_parallel_size expert_model_parallel_size expert_parallel expert_parallel_degree ep",
    "parallel.etp": "expert_tensor_parallel_size etp_size etp",
    "parallel.dp": "dp_size data_parallel_size data_parallel dp num_gpus n_gpus gpus nproc_per_node num_processes world_size "
    "data_parallel_replicate_degree data_parallel_shard_degree dp",
    "data.packing": "packing sample_packing pack_sequences neat_packing packed",
    "data.validation_path": "eval_dataset validation_file val_dataset test_dataset eval_file validation_dataset",
    "data.validation_share": "val_set_size val_size test_size validation_split_percentage eval_split_ratio",
    "seed": "random_seed data_seed manual_seed rng_seed",
    "deterministic": "deterministic_mode full_determinism use_deterministic_algorithms",
    "model.trust_remote_code": "trust_remote_code",
    "model.revision": "model_revision revision",
    "+logger.wandb.project": "wandb_project project project_name",
    "+logger.wandb.name": "wandb_name wandb_run_name run_name wandb_run_id exp_name experiment_name",
    "+logger.wandb.entity": "wandb_entity",
    "recipe.epochs": "num_train_epochs num_epochs epochs n_epochs max_epochs epoch",
    "callbacks.answer.max_new_tokens": "max_new_tokens",
    "timeout": "ddp_timeout distributed_timeout_minutes nccl_timeout",
    "conversion.max_shard_size": "max_shard_size shard_size",
    "conversion.export_dtype": "save_dtype export_dtype",
}
"""Names elsewhere, by the key that means the same, value for value."""
_OTHERWISE: Final[Mapping[str, str]] = {
    "batch_size train_batch_size effective_batch_size total_batch_size global_batch_size": (
        "recipe.global_batch_size=N is the sequences of a step, over all ranks, recipe.micro_batch_size=N those of one rank at once"
    ),
    "per_device_train_batch_size per_device_batch_size micro_batch_size micro_train_batch_size train_micro_batch_size_per_gpu "
    "device_batch_size batch_size_per_gpu local_batch_size": (
        "it is recipe.micro_batch_size; recipe.global_batch_size = per_device_train_batch_size x gradient_accumulation_steps x "
        "data-parallel ranks"
    ),
    "gradient_accumulation_steps grad_accum gradient_accumulation accumulate_grad_batches grad_accum_steps "
    "gradient_accumulation_factor": (
        "set recipe.global_batch_size = recipe.micro_batch_size x data-parallel ranks x gradient_accumulation_steps"
    ),
    "warmup_ratio lr_warmup_ratio warmup_fraction lr_warmup_fraction": "set scheduler.warmup_steps = warmup_ratio x recipe.steps",
    "warmup_steps num_warmup_steps lr_warmup_steps lr_warmup_iters warmup_iters": "it is scheduler.warmup_steps",
    "lr_scheduler_type lr_scheduler lr_decay_style scheduler_type": "choose scheduler=cosine, linear, constant or wsd",
    "lr_decay_iters lr_decay_steps decay_iters": "it is scheduler.decay_steps",
    "optim optimizer_type optimizer_name": "choose optimizer=adam (AdamW) or optimizer=sgd",
    "bf16 use_bf16 bfloat16 bf16_full_eval": "set model.dtype=bfloat16",
    "fp16 use_fp16 half float16": "set model.dtype=float16",
    "tf32 fp32 float32 pure_fp32": "set model.dtype=float32",
    "torch_dtype precision dtype mixed_precision compute_dtype params_dtype": "set model.dtype=bfloat16, float16 or float32",
    "fp8": "set backend=te +model.provider.fp8=hybrid",
    "load_in_4bit load_in_8bit quantization_bit bnb_4bit_compute_dtype qlora": (
        "the frozen weights are not quantised in training; leave it out, and use peft=lora"
    ),
    "output_dir save_dir out_dir output_path log_dir logging_dir save_path output": (
        "it is run_dir; saves go to its checkpoints, or to checkpoint.path"
    ),
    "checkpoint_dir checkpoint_path ckpt_dir ckpt_path": "it is checkpoint.path",
    "overwrite_output_dir": "give each run a run_dir of its own, or continue with checkpoint.resume=auto",
    "model_name_or_path base_model model_name pretrained_model_name_or_path model_id model_path hf_model_id pretrained_model "
    "pretrained_checkpoint": "set model=auto model.path=<folder or hub id>, or model=<name> for one of conf/model",
    "tokenizer tokenizer_name tokenizer_name_or_path tokenizer_path": (
        "the tokenizer is that of model.path; a model without path has model.tokenizer"
    ),
    "dataset datasets dataset_name train_file train_dataset data_path dataset_path train_data train_path dataset_dir data_files "
    "train_files": "set data=chat data.path=<file, folder or hub id>",
    "dataset_text_field text_column": "set data.columns={text: <field>}",
    "use_lora lora finetuning_type adapter use_peft peft_type": "choose peft=lora or peft=dora",
    "use_dora dora": "choose peft=dora",
    "sequence_parallel": "it is parallel.sequence_parallel",
    "gradient_checkpointing activation_checkpointing enable_activation_checkpointing recompute recompute_granularity "
    "use_gradient_checkpointing": (
        "set +model.provider.recompute_granularity=full +model.provider.recompute_method=uniform "
        "+model.provider.recompute_num_layers=1"
    ),
    "attn_implementation flash_attention use_flash_attn flash_attn attention_backend attn_impl use_flash_attention_2": (
        "the backend chooses attention's kernels; leave it out, or choose backend=torch or te"
    ),
    "deepspeed fsdp fsdp_config zero_optimization": (
        "Megatron-Core cuts the model by parallel.tp, pp, cp and ep, and the optimizer's state with optimizer.distributed=true; "
        "leave it out"
    ),
    "report_to": "choose logger=default (Weights & Biases, too) or logger=local",
    "push_to_hub hub_model_id": "push the run's folder afterwards with AutoBridge.push_to_hub (docs/autobridge.md)",
    "device device_map accelerator": "set platform=cpu or platform=cuda",
    "num_workers dataloader_num_workers": "rows are read before training; leave it out",
    "do_train do_eval do_predict": "a recipe trains and validates; leave it out, or choose recipe=evaluate",
    "evaluation_strategy eval_strategy": "set recipe.eval_every=<steps>",
    "save_strategy": "set checkpoint.save_every=<steps>",
    "train_on_inputs train_on_prompt": "the loss is on answers; with data.schema=text it is on every token",
    "num_layers hidden_size num_attention_heads num_hidden_layers ffn_hidden_size vocab_size": (
        "the shape is model.hf, by the names of config.json; Megatron's own settings are +model.provider.NAME=..."
    ),
}
"""What to do instead, by names elsewhere."""
_HERE: Final[dict[str, str]] = {name: f"it is {key}" for key, names in _GROUPS.items() for name in names.split()} | {
    name: said for names, said in _OTHERWISE.items() for name in names.split()
}
_OF_OTHERS: Final = ("model.hf.", "model.provider.", "recipe.options.")
"""Where names are those of others."""
CHOICES: Final[Mapping[str, Mapping[str, str]]] = {
    "optimizer": {
        "adam": "adamw adamw_torch adamw_torch_fused adamw_hf fused_adam adamw_8bit adamw_bnb_8bit paged_adamw_8bit adam_w",
        "sgd": "momentum sgd_momentum",
    },
    "scheduler": {
        "cosine": "cosine_with_warmup cosine_with_min_lr cosine_annealing cosine_with_restarts",
        "linear": "linear_with_warmup polynomial",
        "constant": "constant_with_warmup none",
        "wsd": "warmup_stable_decay trapezoidal",
    },
    "peft": {"lora": "qlora loraplus adapter", "none": "full null false off"},
    "backend": {"te": "transformer_engine transformerengine", "torch": "sdpa flash_attention_2 eager pytorch"},
    "recipe": {"finetune": "sft train fine_tune lora_finetune", "pretrain": "pretraining cpt", "convert": "export import"},
    "logger": {"local": "none null tensorboard", "default": "wandb"},
    "parallel": {"single": "none null 1 dp1 tp1"},
    "data": {"chat": "sft sharegpt alpaca messages jsonl", "indexed": "megatron bin pretrain", "streaming": "hf hub stream"},
}
"""Choices elsewhere, by group and by ours."""


def of_key(key: str) -> str | None:
    """What the setting `key` is here, as the second part of a sentence; None where no such name is known."""
    if key.startswith(_OF_OTHERS):
        return None
    last = re.sub(r"[^a-z0-9_]", "_", key.rpartition(".")[2].lower())
    said = _HERE.get(last)
    # Our own word in a group that is none is a slip in the group's name.
    return None if said is not None and "." in key and said.startswith("it is ") and said.endswith(f".{last}") else said


def of_choice(group: str, choice: str) -> str | None:
    """Our choice of a group that is called `choice` elsewhere."""
    wanted = re.sub(r"[^a-z0-9_]", "_", choice.lower())
    return next((ours for ours, names in CHOICES.get(group, {}).items() if wanted in names.split()), None)


def of_flags(arguments: list[str]) -> str | None:
    """What to say of arguments written as `--name value` that are settings; None where none is."""
    for text in arguments:
        name = text.lstrip("-").partition("=")[0].replace("-", "_")
        if text.startswith("--") and (said := _HERE.get(name.lower())) is not None:
            return f"settings are written key=value, without dashes: {plain(text)}: {said}."
    return None
