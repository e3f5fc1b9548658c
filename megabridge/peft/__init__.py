"""LoRA and DoRA adapters: low-rank matrices beside frozen linears, one per Hugging Face linear, also where Megatron fuses several."""

from megabridge.peft.lora_config import LoRA

__all__ = ["LoRA"]
