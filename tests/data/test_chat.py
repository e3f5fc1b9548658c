"""The loss mask of chat data: exactly the assistant's tokens, or an error."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import pytest

from megabridge.data import chat
from megabridge.data.batches import Sample
from megabridge.data.chat import ChatEncoder
from megabridge.errors import ConfigError
from megabridge.hf import byte_tokenizer
from tests.support.chat_templates import CHATML, TURNS, byte_folder

TRIMMING = CHATML.replace("m['content']", "(m['content'] | trim)")
# Earlier answers are shortened, as templates of reasoning models do with earlier thoughts.
MUTATING = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'][:3])")
REWORDING = CHATML.replace("m['content']", "(m['content'] | upper)")
FOOTER = CHATML + "{% if not add_generation_prompt %}Rate this answer!{% endif %}"
ALTERNATING = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + CHATML
SAME_LINE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
MISPLACED_TAG = CHATML.replace("{% if add_gen", "{% generation %}{% endgeneration %}{% if add_gen")


def with_template(source: Path, folder: Path, template: str) -> Path:
    """The tokenizer of `source` with another chat template."""
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def learned(encoder: ChatEncoder, sample: Sample) -> list[str]:
    """The texts of the unmasked stretches, in order."""
    texts, run = [], []
    for token, kept in [*zip(sample.tokens, sample.mask, strict=True), (0, False)]:
        if kept:
            run.append(token)
        elif run:
            texts.append(encoder.tokenizer.decode(run, clean_up_tokenization_spaces=False))
            run = []
    return texts


def test_smollm2_learns_exactly_the_answers_and_their_end(smollm2: Path) -> None:
    encoder = ChatEncoder(smollm2)
    sample = encoder.encode(TURNS)
    assert learned(encoder, sample) == ["e acute<|im_end|>", "e\n\n  acute <b>!\n<|im_end|>"]
    assert sample.tokens == encoder.tokenizer.apply_chat_template(TURNS, return_dict=True)["input_ids"]


def test_prefix_rendering_agrees_with_transformers_mask_of_a_template_with_the_tag(smollm2: Path, tmp_path: Path) -> None:
    template = ChatEncoder(smollm2).tokenizer.get_chat_template()
    plain = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    assert plain in template
    tagged = template.replace(
        plain,
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    with_tag = ChatEncoder(with_template(smollm2, tmp_path, tagged))
    theirs = with_tag.tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    for encoder in (ChatEncoder(smollm2), with_tag):
        sample = encoder.encode(TURNS)
        assert sample.tokens == theirs["input_ids"]
        assert [int(flag) for flag in sample.mask] == theirs["assistant_masks"]


def test_white_space_that_merges_with_the_prompt_is_an_error(smollm2: Path) -> None:
    # The break after "assistant" and the first space of the answer are one token, which generation never meets.
    with pytest.raises(ConfigError, match=r"a token crosses the boundary 'assistant\\n' \| '  indented"):
        ChatEncoder(smollm2).encode([TURNS[3], {"role": "assistant", "content": "  indented"}])


@pytest.mark.parametrize("template", [CHATML, byte_tokenizer.CHAT_TEMPLATE], ids=["prefixes", "tag"])
def test_byte_tokenizer_learns_exactly_the_answers(tmp_path: Path, template: str) -> None:
    encoder = ChatEncoder(byte_folder(tmp_path, template))
    assert learned(encoder, encoder.encode(TURNS)) == ["e acute<|im_end|>", "e\n\n  acute <b>!\n<|im_end|>"]


def test_a_template_that_trims_is_understood(tmp_path: Path) -> None:
    encoder = ChatEncoder(byte_folder(tmp_path, TRIMMING))
    assert learned(encoder, encoder.encode(TURNS)) == ["e acute<|im_end|>", "e\n\n  acute <b>!<|im_end|>"]


def test_without_an_assistant_nothing_is_learned(tmp_path: Path) -> None:
    assert not any(ChatEncoder(byte_folder(tmp_path, CHATML)).encode(TURNS[:2]).mask)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (MUTATING, "message 2 changes when more follows"),
        (REWORDING, "changes the text of assistant message 2"),
        (FOOTER, "changes when more follows"),
        (ALTERNATING, "refuses the roles system, user, assistant, user, assistant: begin with the user"),
        (MISPLACED_TAG, "no token of this conversation is within it"),
        (None, "must have a chat template"),
    ],
)
def test_what_can_not_be_told_apart_is_an_error(tmp_path: Path, template: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChatEncoder(byte_folder(tmp_path, template)).encode(TURNS)


def test_text_after_the_end_of_turn_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"writes '<\|im_end\|>\\nRate this answer!' after assistant message 2"):
        ChatEncoder(byte_folder(tmp_path, FOOTER)).encode(TURNS[:3])


def test_a_token_over_the_boundary_is_an_error(smollm2: Path, tmp_path: Path) -> None:
    # "assistant: " and "e acute" share the token " e".
    encoder = ChatEncoder(with_template(smollm2, tmp_path, SAME_LINE))
    with pytest.raises(ConfigError, match=r"a token crosses the boundary 'ssistant: ' \| 'e acute"):
        encoder.encode([TURNS[3], TURNS[2]])


def test_content_that_is_not_text_needs_the_tag(tmp_path: Path) -> None:
    encoder = ChatEncoder(byte_folder(tmp_path, CHATML.replace("m['content']", "(m['content'] or 'none')")))
    with pytest.raises(ConfigError, match="message 1 must have its content as text, not NoneType"):
        encoder.encode([TURNS[1], {"role": "assistant", "content": None}])


@pytest.mark.parametrize("template", [CHATML, byte_tokenizer.CHAT_TEMPLATE], ids=["prefixes", "tag"])
def test_arguments_that_are_no_variables_of_the_template_are_refused(tmp_path: Path, template: str) -> None:
    given = {"messages": [], "tokenize": True, "return_tensors": "pt", "chat_template": CHATML, "date_string": "today"}
    with pytest.raises(
        ConfigError, match=r"\['chat_template', 'messages', 'return_tensors', 'tokenize'\] must be variables of the"
    ):
        ChatEncoder(byte_folder(tmp_path, template), template_arguments=given)


def test_every_setting_of_rendering_is_known(tmp_path: Path) -> None:
    encoder = ChatEncoder(byte_folder(tmp_path, CHATML))
    taken = set(inspect.signature(encoder.tokenizer.apply_chat_template).parameters) - {"tools", "documents", "kwargs"}
    assert taken <= chat._RESERVED


def test_arguments_reach_the_template(tmp_path: Path) -> None:
    folder = byte_folder(tmp_path, "{{ date_string }}" + CHATML)
    encoder = ChatEncoder(folder, template_arguments={"date_string": "26 Jul 2024"})
    assert encoder.tokenizer.decode(encoder.encode(TURNS).tokens).startswith("26 Jul 2024<|im_start|>")
