"""Fine-tunes a Hugging Face model in Megatron-Core and exports it again: recipe=finetune.

Run it with `python -m megabridge.run`, or copy it and name your copy with `recipe.target=my_module:main`.
"""

from __future__ import annotations

from megabridge.config.schema import Config
from megabridge.training import Trainer, build, build_optimizer, ddp_settings


def main(config: Config) -> float | None:
    """Every rank calls it, in running process groups. Returns the validation loss at the end."""
    bridge = build.bridge(config)
    provider = build.provider(config, bridge)
    chunks = provider.provide_distributed_model(ddp_config=ddp_settings(config.optimizer), init=build.init(config))
    optimizer, scheduler = build_optimizer(chunks, config.optimizer, config.scheduler, steps=config.recipe.steps)
    trainer = Trainer(
        config,
        chunks=chunks,
        optimizer=optimizer,
        scheduler=scheduler,
        data=build.data(config, bridge),
        bridge=bridge,
        callbacks=build.callbacks(config),
        loggers=build.loggers(config),
    )
    trainer.say(provider.describe())
    trainer.say(trainer.data.describe())
    return trainer.fit()
