"""What stands beside exported weights so that others turn pictures and texts into the ids of training: transformers'
``AutoProcessor`` (layout ``hf``) and the released ``VLChatProcessor`` (``deepseek``).

A tokenizer that transformers has written knows neither the roles of the image tokens nor that every document begins
with BOS (transformers 5 drops that from some). Folders with a SentencePiece model only are left as they are: neither
processor reads them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jp_train.config.schema import TokenizerConfig
from jp_train.types import SpecialTokens

TOKENIZER_CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"

CHAT_TEMPLATE = """\
{%- set ns = namespace(system='', images=0) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- if message['content'] is string -%}
      {%- set ns.system = message['content'] -%}
    {%- else -%}
      {%- for part in message['content'] -%}
        {%- if part['type'] == 'text' -%}{%- set ns.system = ns.system + part['text'] -%}{%- endif -%}
      {%- endfor -%}
    {%- endif -%}
  {%- elif message['content'] is not string -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}{%- set ns.images = ns.images + 1 -%}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
{%- if ns.images and not ns.system -%}{%- set ns.system = SYSTEM -%}{%- endif -%}
{%- if ns.system -%}{{ ns.system + '\\n\\n' }}{%- endif -%}
{%- for message in messages if message['role'] != 'system' -%}
  {%- if message['role'] == 'user' -%}
    {{ USER + ': ' }}
    {%- if message['content'] is string -%}
      {{ message['content'] }}
    {%- else -%}
      {%- for part in message['content'] -%}
        {%- if part['type'] == 'image' -%}
          {{ IMAGE }}
        {%- elif part['type'] == 'text' -%}
          {%- if not loop.first and loop.previtem['type'] == 'image' -%}{{ '\\n' }}{%- endif -%}
          {{ part['text'] }}
        {%- endif -%}
      {%- endfor -%}
    {%- endif -%}
    {{ '\\n\\n' }}
  {%- else -%}
    {{ ASSISTANT + ': ' }}
    {%- if message['content'] is string -%}
      {{ message['content'] }}
    {%- else -%}
      {%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
    {%- endif -%}
    {{ EOS }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ASSISTANT + ':' }}{%- endif -%}
"""
"""The conversations of stage 3 (``data/layouts.py``); BOS comes from the tokenizer."""


def write_processor_files(
    folder: Path,
    strings: TokenizerConfig,
    special: SpecialTokens,
    *,
    released: bool,
    slots: int,
    side: int,
    system_prompt: str,
) -> None:
    """Complete an export in whose ``folder`` the tokenizer has been saved. ``released``: for the released code.
    ``slots``: tokens of an image; ``side``: of an image in pixels."""
    processor = "VLChatProcessor" if released else "JanusProcessor"
    write_json(folder / "preprocessor_config.json", _image_processor(side, processor, released=released))
    if not (folder / TOKENIZER_CONFIG).is_file():
        return
    _complete_tokenizer_config(folder / TOKENIZER_CONFIG, strings, processor, released=released)
    _begin_with_bos(folder / TOKENIZER, strings.bos, special.bos)
    if released:
        settings = {
            "add_special_token": False,
            "ignore_id": -100,
            "image_tag": strings.image_placeholder,
            "mask_prompt": True,
            "num_image_tokens": slots,
            "processor_class": processor,
            "sft_format": "deepseek",
        }
        write_json(folder / "processor_config.json", settings)
        return
    write_json(folder / "processor_config.json", {"processor_class": processor, "num_image_tokens": slots})
    words = {
        "SYSTEM": system_prompt, "USER": strings.user, "ASSISTANT": strings.assistant, "EOS": strings.eos,
        "IMAGE": strings.image_placeholder,
    }  # fmt: skip
    lines = [f"{{%- set {name} = {json.dumps(text, ensure_ascii=False)} -%}}\n" for name, text in words.items()]
    (folder / "chat_template.jinja").write_text("".join(lines) + CHAT_TEMPLATE, encoding="utf-8")


def _complete_tokenizer_config(file: Path, strings: TokenizerConfig, processor: str, *, released: bool) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    images = {"image_token": strings.image_placeholder, "boi_token": strings.boi, "eoi_token": strings.eoi}
    config.pop("extra_special_tokens", None)  # a list of transformers 5, which transformers 4 cannot read
    if released:
        config["additional_special_tokens"] = [*images.values(), strings.user, strings.assistant]
    else:
        config["extra_special_tokens"] = images
    config |= {
        "bos_token": strings.bos,
        "eos_token": strings.eos,
        "pad_token": strings.pad,
        "add_bos_token": True,
        "add_eos_token": False,
        "processor_class": processor,
        # as tokenizer.json says; the class of a model would build its own, and transformers 4 lacks some of 5
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(file, config)


def _begin_with_bos(file: Path, bos: str, bos_id: int) -> None:
    """Let tokenizer.json put BOS before a text, as in training, where it does not yet."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    before = tokenizer.get("post_processor")
    if before is not None and json.dumps(bos) in json.dumps(before):
        return

    def begun(*texts: str) -> list[dict[str, Any]]:
        first = {"SpecialToken": {"id": bos, "type_id": 0}}
        return [first, *({"Sequence": {"id": text, "type_id": number}} for number, text in enumerate(texts))]

    with_bos = {
        "type": "TemplateProcessing",
        "single": begun("A"),
        "pair": begun("A", "B"),
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    tokenizer["post_processor"] = with_bos if before is None else {"type": "Sequence", "processors": [before, with_bos]}
    write_json(file, tokenizer)


def _image_processor(side: int, processor: str, *, released: bool) -> dict[str, Any]:
    common = {
        "background_color": [127, 127, 127],
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "min_size": 14,
        "processor_class": processor,
        "rescale_factor": 1 / 255,
    }
    if released:
        return {"image_processor_type": "VLMImageProcessor", "image_size": side, **common}
    return {
        "image_processor_type": "JanusImageProcessor",
        "size": {"height": side, "width": side},
        "do_resize": True,
        "do_rescale": True,
        "resample": 3,
        **common,
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """As transformers writes its files."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
