"""LoRA and DoRA: low-rank matrices beside frozen linears, one per Hugging Face linear even where Megatron fuses several."""

from megabridge.peft.lora_config import LoRA

__all__ = ["LoRA"]
