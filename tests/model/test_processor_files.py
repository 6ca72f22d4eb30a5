"""Exports in the hands of transformers' own processor: its ids, and its greedy answers, are ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from jp_train.config import RunConfig
from jp_train.config.choices import Template
from jp_train.config.schema import TokenizerConfig
from jp_train.data.encode import Encoder
from jp_train.data.tokenizer import load_tokenizer
from jp_train.model.export import write_export
from jp_train.model.pretrained import init_fresh_vq
from jp_train.model.vq import VQTokenizer
from jp_train.tools.inference import InferenceModel, answer_questions
from tests.model.janus_tiny import SIDE, SLOTS, VOCAB, tiny_config, tiny_model

QUESTION = "What is on the table?\nAnswer in one word."
STRINGS = TokenizerConfig()


def byte_level_folder(path: Path) -> Path:
    """A tokenizer of bytes without a post-processor, as transformers 5 leaves the released one."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [
        getattr(STRINGS, name) for name in ("bos", "eos", "pad", "boi", "eoi", "image_placeholder", "user", "assistant")
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=STRINGS.bos, eos_token=STRINGS.eos).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InferenceModel:
    cfg = RunConfig(model=tiny_config())
    cfg.stage.template = Template.stage3
    cfg.data.system_prompt = "You help {people}."
    cfg.tokenizer.path = str(byte_level_folder(tmp_path_factory.mktemp("tokenizer")))
    cfg.model.language.vocab_size = max(VOCAB, 272)
    vq = VQTokenizer(cfg.model.vq, SIDE)
    init_fresh_vq(vq, 0)
    janus = tiny_model(std=0.3, cfg=cfg.model).eval().requires_grad_(False)
    return InferenceModel(janus=janus, vq=vq, encoder=Encoder(cfg, load_tokenizer(cfg.tokenizer)))


def exported(model: InferenceModel, folder: Path, layout: str) -> Path:
    named = [*model.janus.state_dict().items(), *((f"model.{k}", v) for k, v in model.vq.state_dict().items())]
    text = "data: {system_prompt: 'You help {people}.'}\nstage: {template: stage3}\n"
    janus_config = model.janus.janus_config
    janus_config.image_token_id = model.tokenizer.special.image_placeholder
    write_export(folder, janus_config, named, model.tokenizer, layout=layout, dtype=torch.float32, run_config=text)
    return folder


def asked(question: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def test_the_processor_of_an_export_makes_the_ids_of_training(model: InferenceModel, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(exported(model, tmp_path / "e", "hf"))
    picture = Image.new("RGB", (SIDE, SIDE), (200, 30, 90))
    text = processor.apply_chat_template(asked(QUESTION), add_generation_prompt=True)
    ids = processor(text=text, images=[picture], return_tensors="pt").input_ids[0].tolist()
    assert ids == model.encoder.understanding_prompt_ids(QUESTION)
    assert ids.count(model.tokenizer.special.image_placeholder) == SLOTS

    caption = [{"role": "user", "content": "a red ring"}]
    text = processor.apply_chat_template(caption, add_generation_prompt=True)
    ids = processor(text=text, generation_mode="image", return_tensors="pt").input_ids[0].tolist()
    assert ids == model.encoder.generation_prompt_ids("a red ring")


def test_a_conversation_of_several_turns_is_laid_out_as_in_training(model: InferenceModel, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(exported(model, tmp_path / "e", "hf"))
    turns = [
        {"role": "system", "content": "Be short."},
        *asked("What is it?"),
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "And its colour?"},
    ]
    user, assistant = STRINGS.user, STRINGS.assistant
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
        f"Be short.\n\n{user}: {STRINGS.image_placeholder}\nWhat is it?\n\n{assistant}: A cat.{STRINGS.eos}"
        f"{user}: And its colour?\n\n{assistant}:"
    )
    assert processor.apply_chat_template([{"role": "user", "content": "Hello"}]) == f"{user}: Hello\n\n", (
        "without a picture no system prompt is added"
    )


def test_transformers_answers_as_ask_does_with_nothing_but_the_folder(model: InferenceModel, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "e", "hf")
    processor = AutoProcessor.from_pretrained(folder)
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    for seed in range(4):
        pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        messages = asked(QUESTION)
        messages[0]["content"][0]["image"] = Image.fromarray(pixels)
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        written = loaded.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        (ours,) = answer_questions(model, [Image.fromarray(pixels)], [QUESTION], max_new_tokens=8)
        assert model.tokenizer.decode(written.tolist()).strip() == ours
    assert loaded.generation_config.do_sample, "pictures are sampled unless the call says otherwise"


@pytest.mark.parametrize("layout", ["hf", "deepseek"])
def test_the_tokenizer_of_an_export_puts_bos_first(model: InferenceModel, tmp_path: Path, layout: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported(model, tmp_path / "e", layout))
    bos = model.tokenizer.special.bos
    assert tokenizer("red").input_ids == [bos, *model.tokenizer.encode("red")]
    assert tokenizer("red", add_special_tokens=False).input_ids == model.tokenizer.encode("red")


def test_the_released_code_finds_its_processor_files(model: InferenceModel, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "e", "deepseek")
    images, processor, tokenizer = (
        json.loads((folder / f"{name}_config.json").read_text()) for name in ("preprocessor", "processor", "tokenizer")
    )
    assert (images["image_processor_type"], images["image_size"]) == ("VLMImageProcessor", SIDE)
    assert (processor["num_image_tokens"], processor["sft_format"]) == (SLOTS, "deepseek")
    assert processor["image_tag"] == STRINGS.image_placeholder
    assert {images["processor_class"], processor["processor_class"]} == {"VLChatProcessor"}
    assert "extra_special_tokens" not in tokenizer, "transformers 4 cannot read the list that 5 writes"
    assert set(tokenizer["additional_special_tokens"]) >= {STRINGS.boi, STRINGS.eoi, STRINGS.image_placeholder}
