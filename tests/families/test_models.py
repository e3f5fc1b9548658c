"""The shapes in conf/model: each is one that its family represents, and that transformers reads in the same way."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megabridge.families import family_for
from megabridge.launchers.prepare import conf_folder


def entries() -> dict[str, dict[str, Any]]:
    files = {file.stem: OmegaConf.to_container(OmegaConf.load(file)) for file in sorted((conf_folder() / "model").glob("*.yaml"))}
    return {name: content for name, content in files.items() if isinstance(content, dict) and "hf" in content}


ENTRIES = entries()


@pytest.mark.parametrize("name", ENTRIES)
def test_a_named_shape_means_the_same_to_its_family_and_to_transformers(name: str) -> None:
    hf = ENTRIES[name]["hf"]
    family = family_for(hf)
    native = family.native(hf)
    assert (family.architecture, family.model_type) == (hf["architectures"][0], hf["model_type"])
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf["model_type"]] == family.architecture
    filled_in = {**AutoConfig.for_model(**hf).to_dict(), "architectures": hf["architectures"]}
    assert family.native(filled_in) == native


def test_a_file_is_named_as_its_model() -> None:
    assert len(ENTRIES) >= 40
    assert all(content["name"] == name for name, content in ENTRIES.items())
