"""What ranks run in tests/training/test_moe.py and tests/conversion/test_moe.py."""

from __future__ import annotations

import ctypes
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from megabridge import AutoBridge
from megabridge.config.schema import OptimizerConfig, SchedulerConfig
from megabridge.conversion.parameters import collect_parameters
from megabridge.models.logits import gather_logits
from megabridge.native import checkpoint
from megabridge.parallel import process_groups
from megabridge.storage import folders
from megabridge.training import build_optimizer
from megabridge.training.moe_metrics import MoEMetrics
from megabridge.training.step import forward_backward, prepare
from tests.support import families, steady, tiny
from tests.support.convert import provide
from tests.support.imports import bytes_read
from tests.support.memory import anonymous, watched
from tests.support.models import TINY_MIXTURE, prompt, reference_logits, write_model
from tests.support.training import parameters, state

from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter


def loaded(folder: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the newest step's checkpoint gives a model that has been trained by nothing."""
    trainer = tiny.trainer(tiny.config(folder, steps=100), **{**tiny.EXPERTS, **(options or {})})
    source = folders.latest(Path(folder, "checkpoints"))
    assert source is not None
    checkpoint.load(source, trainer.chunks, optimizer=trainer.optimizer, scheduler=trainer.scheduler)
    return {"parameters": parameters(trainer.chunks), "optimizer": state(trainer.optimizer, trainer.chunks)}


def make(root: str, configs: dict[str, dict[str, Any]], names: list[str]) -> None:
    """Random models of `configs` whose routing is steady, and tiny models of the families `names`."""
    for number, (name, config) in enumerate(configs.items()):
        tokens, folder = prompt(config["vocab_size"]), Path(root) / name
        for seed in range(number, number + 100 * 20, 100):
            if steady.is_model_steady(write_model(folder, config, seed), tokens):
                break
        else:
            raise AssertionError(f"{name}: every model's routing is near a tie")
        torch.save(reference_logits(folder, tokens), Path(root) / f"{name}.logits")
    if names:
        families.make(root, names)


def moved(sources: list[str]) -> list[dict[str, Any]]:
    """What this rank holds of each model, and what it reads and copies to import it."""
    out = []
    for source in sources:
        bridge = AutoBridge.from_hf_pretrained(source)
        model = provide(bridge, load_weights=False)
        with bytes_read() as counts:
            report = bridge.load_hf_weights(model, show_progress=False, verify=False, reader="mapped")
        out.append(
            {
                "copied": report.copied_by_rank[dist.get_rank()],
                "owned": bridge.plan(model).owned_bytes,
                "read": sum(counts),
                "fetched": report.fetched_by_node,
                "held": sum(live.data.nbytes for live in collect_parameters(model)),
            }
        )
    return out


def round_trips(root: str, out: str, names: list[str]) -> list[dict[str, Any]]:
    """Imports, runs and exports every model; every other one under megatron-core's own experts, which have no sequence parallelism."""
    topology = process_groups.current()
    assert topology is not None
    seen = []
    for number, name in enumerate(names):
        bridge = AutoBridge.from_hf_pretrained(Path(root) / name)
        model = provide(bridge, backend="local" if number % 2 and topology.tp == 1 else "torch")
        with steady.watched() as routed:
            logits = gather_logits(model, prompt(bridge.source.config["vocab_size"]))
        assert all(routed), f"{name}: a router is near a tie"
        expected = torch.load(Path(root) / f"{name}.logits")
        report = bridge.save_hf_pretrained(model, Path(out) / name, show_progress=False)
        difference, scale = (logits - expected).abs().max().item(), expected.abs().max().item()
        seen.append({"mismatched": report.mismatched, "logits": difference, "scale": scale})
    return seen


def memory(root: str, experts: int) -> dict[str, int]:
    """Anonymous bytes that an import into a model and an export from it take beside the model."""
    assert ctypes.CDLL(None).mallopt(-3, 1 << 20) == 1  # what is freed goes back to the system (malloc.h: M_MMAP_THRESHOLD)
    config = {**TINY_MIXTURE, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "num_local_experts": experts}
    bridge = AutoBridge.from_hf_config(config, dtype="float32")
    model = provide(bridge, load_weights=False)
    for live in collect_parameters(model):
        live.data.fill_(1.0)  # its pages exist from here on
    seen = {"model": sum(live.data.nbytes for live in collect_parameters(model)), "imports": 0}
    before = anonymous()
    with watched(seen, "export"):
        bridge.save_hf_weights(model, root, show_progress=False)
    (Path(root) / "config.json").write_text(json.dumps(config))
    with watched(seen, "import"):
        bridge.load_hf_weights(model, root, show_progress=False)
    return {**seen, "export": seen["export"] - before, "import": seen["import"] - before}


def _router_logits(chunk: Any) -> list[torch.Tensor]:
    """A list that every forward pass adds each router's logits to, [tokens, experts], with their graph."""
    found: list[torch.Tensor] = []

    def keep(module: Any, inputs: tuple[torch.Tensor, ...], outputs: Any) -> None:
        found.append(module.gating(inputs[0]).float().flatten(0, 1))

    for module in chunk.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(keep)
    return found


def _balance(logits: torch.Tensor, topk: int) -> torch.Tensor:
    """The load-balancing loss of the Switch Transformer (arXiv 2101.03961, equation 4), for several experts a token."""
    tokens, experts = logits.shape
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(topk).indices, 1.0)
    return experts * (chosen.sum(0) / (tokens * topk) * logits.softmax(-1).mean(0)).sum()


def auxiliary_losses() -> dict[str, Any]:
    """Losses, metrics and gradients of one step of two micro-batches, beside those of their formulas on another model."""
    batches = [tiny.batch(range(start, start + 2)) for start in (0, 2)]
    trainer = tiny.trainer(tiny.config("unused", steps=1), **tiny.EXPERTS)
    chunk = trainer.chunks[0]
    watched_routers = MoEMetrics(trainer.chunks)
    chunk.zero_grad_buffer()
    watched_routers.begin(is_logged=True)
    with steady.watched() as routed:
        total, count = forward_backward(trainer.chunks, batches, forward_only=False).tolist()
    metrics = watched_routers.metrics(len(batches))

    plain = tiny.model(**{**tiny.EXPERTS, "moe_router_load_balancing_type": "none", "moe_z_loss_coeff": None})[0]
    plain.zero_grad_buffer()
    logits = _router_logits(plain)
    losses = [plain(one["tokens"], one["position_ids"], None, labels=one["labels"]) for one in batches]
    masks = [one["loss_mask"] for one in batches]
    assert sum(mask.sum() for mask in masks) < 0.8 * sum(mask.numel() for mask in masks), "a mask must matter"
    loss = sum((part * mask).sum() for part, mask in zip(losses, masks, strict=True)) / sum(mask.sum() for mask in masks)
    balance = [_balance(one, 2) for one in logits]
    squares = [one.logsumexp(-1).square().mean() for one in logits]
    loss.backward(retain_graph=True)
    without = _difference(chunk, plain)
    added = tiny.EXPERTS["moe_aux_loss_coeff"] * sum(balance) + tiny.EXPERTS["moe_z_loss_coeff"] * sum(squares)
    (added / len(batches)).backward()
    counts = [
        torch.bincount(torch.cat([logits[i], logits[i + 3]]).topk(2).indices.flatten(), minlength=8).double() for i in range(3)
    ]
    imbalance = [float(one.max() / one.mean()) for one in counts]
    shares = [one / one.sum() for one in counts]
    expected = {
        "router/aux_loss": float(sum(balance)) / len(balance),
        "router/z_loss": float(sum(squares)) / len(squares),
        "router/imbalance": sum(imbalance) / 3,
        "router/imbalance_max": max(imbalance),
        "router/entropy": sum(float(-torch.special.xlogy(one, one).sum()) for one in shares) / 3 / math.log(8),
        "router/idle_experts": float(sum(int((one == 0).sum()) for one in counts)),
        **{f"router/layer_{number + 1}/imbalance": value for number, value in enumerate(imbalance)},
    }
    return {
        "steady": all(routed),
        "loss": total / count,
        "expected loss": float(loss),
        "metrics": metrics,
        "expected metrics": expected,
        "gradients": _difference(chunk, plain),
        "gradients without": without,
        "transformers": float(load_balancing_loss_func((logits[0],), 8, 2)),
        "ours times topk": 2 * float(balance[0]),
    }


def _difference(left: Any, right: Any) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max(float((one.main_grad - other.main_grad).abs().max()) for one, other in pairs)


def moved_bias(source: str, out: str) -> dict[str, Any]:
    """How far correction biases are from where one step should have moved them, in the model and in its export; and unmoved ones."""
    bridge = AutoBridge.from_hf_pretrained(source)
    before = {name: info for name, info in _biases(Path(source)).items()}
    seen: dict[str, Any] = {}
    for rate in (0.0, 0.01):
        model = provide(bridge, wrap_with_ddp=True, calculate_per_token_loss=True, moe_router_bias_update_rate=rate)
        optimizer, _ = build_optimizer(model, OptimizerConfig(), SchedulerConfig(name="constant"), steps=10)
        prepare(model, optimizer)
        counts = _counted(model)
        statistics = MoEMetrics(model)
        statistics.begin(is_logged=True)
        forward_backward(model, [_random_batch(bridge.source.config["vocab_size"])], forward_only=False)
        metrics = statistics.metrics(1)
        live = {live.name: live.data.clone() for live in collect_parameters(model) if live.name.endswith("expert_bias")}
        assert len(live) == len(before) > 0
        if not rate:
            seen["still"] = max(float((live[_native(name)] - bias).abs().max()) for name, bias in before.items())
            continue
        expected = {}
        for name, bias in before.items():
            tokens = counts[_native(name)]
            dist.all_reduce(tokens)
            expected[name] = bias + rate * torch.sign(tokens.mean() - tokens)
            assert not torch.equal(expected[name], bias)
        seen["live"] = max(float((live[_native(name)] - bias).abs().max()) for name, bias in expected.items())
        bridge.save_hf_weights(model, out, show_progress=False)
        exported = _biases(Path(out))
        seen["exported"] = max(float((exported[name] - bias).abs().max()) for name, bias in expected.items())
        everything = torch.cat(list(live.values()))
        seen["range"] = [float(everything.min()), float(everything.max())]
        seen["metrics"] = [metrics["router/bias_min"], metrics["router/bias_max"]]
    return seen


def bias_in_bf16(source: str, out: str) -> dict[str, Any]:
    """Dtypes of routers' buffers in a bf16 model, and how far the imported and the exported biases are from the file's."""
    bridge = AutoBridge.from_hf_pretrained(source, dtype="bfloat16")
    model = provide(bridge)
    before = _biases(Path(source))
    live = {live.name: live.data for live in collect_parameters(model)}
    bridge.save_hf_weights(model, out, show_progress=False)
    after = _biases(Path(out))
    routers = [module for chunk in model for module in chunk.modules() if isinstance(module, TopKRouter)]
    return {
        "dtypes": {str(buffer.dtype) for router in routers for buffer in router.buffers()},
        "weights": {str(router.weight.dtype) for router in routers},
        "live": [torch.equal(live[_native(name)], bias) for name, bias in before.items()],
        "exported": [torch.equal(after[name], bias) for name, bias in before.items()],
    }


def _biases(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if name.endswith("e_score_correction_bias")
    }


def _native(name: str) -> str:
    return f"decoder.layers.{name.split('.')[2]}.mlp.router.expert_bias"


def _counted(model: list[Any]) -> dict[str, torch.Tensor]:
    """By the name of a router's bias, how many of this rank's tokens went to each expert; filled by the forward passes to come."""
    found: dict[str, torch.Tensor] = {}

    def count(module: Any, inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        found[f"decoder.layers.{module.layer_number - 1}.mlp.router.expert_bias"].add_(outputs[1].sum(0))

    for chunk in model:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                experts = module.config.num_moe_experts
                found[f"decoder.layers.{module.layer_number - 1}.mlp.router.expert_bias"] = torch.zeros(experts)
                module.register_forward_hook(count)
    return found


def _random_batch(vocabulary: int) -> dict[str, torch.Tensor]:
    tokens = prompt(vocabulary, length=33, seed=parallel_state.get_data_parallel_rank())
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(2, 32),
        "position_ids": torch.arange(32).expand(2, -1).contiguous(),
    }


def one_call(source: str, out: str) -> list[str]:
    """The short names of sizes with experts; layouts of the running processes."""
    root = Path(out)
    AutoBridge.import_ckpt(source, root / "native", tp=2, ep=2, etp=1, sequence_parallel=True, show_progress=False)
    assert process_groups.current() is None
    bridge = AutoBridge.from_auto_config(root / "native")
    bridge.export_ckpt(root / "native", root / "ep2", False, ep=2)
    bridge.export_ckpt(root / "native", root / "pp2", False, pp=2)
    model = bridge.load_megatron_model(root / "native", ep=2)
    return [live.name for live in collect_parameters(model) if not live.name.startswith(("embedding", "output"))]
