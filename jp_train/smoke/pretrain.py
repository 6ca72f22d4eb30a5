"""Make the model that stage 1 starts from: pretrained parts, and fresh adaptors and image head between them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, JanusForConditionalGeneration

from jp_train.errors import ConfigError
from jp_train.smoke import tokenizer as names
from jp_train.smoke.pretrain_llm import train_llm
from jp_train.smoke.pretrain_vision import train_vision
from jp_train.smoke.pretrain_vq import train_vq
from jp_train.smoke.reading import picture_of, read_pictures, read_source, texts_of
from jp_train.smoke.shards import GENERATION_SOURCES, UNDERSTANDING_SOURCES
from jp_train.smoke.sizes import SmokeSizes, janus_config

ADAPTOR_STD = 0.02
MAX_TEXT_TOKENS = 40
"""Texts of image-text pairs are cut at this many tokens for the vision encoder's pretraining."""


def special_ids(tokenizer) -> dict[str, int]:
    """Ids of the special tokens, looked up by their strings.

    Raises:
        ConfigError: if one of them is not a single token of the tokenizer.
    """
    strings = {"bos": names.BOS, "eos": names.EOS, "pad": names.PAD, "boi": names.BOI, "eoi": names.EOI, "image": names.IMAGE}
    vocabulary = tokenizer.get_vocab()
    missing = [string for string in strings.values() if string not in vocabulary]
    if missing:
        raise ConfigError(f"the tokenizer lacks the special tokens {', '.join(missing)}")
    return {name: vocabulary[string] for name, string in strings.items()}


def as_tensor(pictures) -> torch.Tensor:
    """uint8 pictures ``[n, S, S, 3]`` (numpy) to the model's layout, ``[n, 3, S, S]``."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).contiguous()


def image_text_pairs(data_dir: Path, tokenizer, side: int) -> tuple[torch.Tensor, list[list[int]]]:
    """Pictures uint8 ``[n, 3, side, side]`` of all training sources with the token lists of their captions or dialogues."""
    pictures, texts = [], []
    for source in (*UNDERSTANDING_SOURCES, *GENERATION_SOURCES):
        for sample in read_source(Path(data_dir) / source):
            pictures.append(torch.from_numpy(picture_of(sample, side).copy()))
            texts.append(" ".join(texts_of(sample)))
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.stack(pictures).permute(0, 3, 1, 2).contiguous(), [ids[:MAX_TEXT_TOKENS] for ids in encoded]


def text_documents(data_dir: Path, tokenizer) -> list[list[int]]:
    """The documents of the ``text`` source as token lists, each between BOS and EOS."""
    ids = special_ids(tokenizer)
    texts = [text for sample in read_source(Path(data_dir) / "text") for text in texts_of(sample)]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[ids["bos"], *tokens, ids["eos"]] for tokens in encoded]


@torch.no_grad()
def reset_adaptors(model: JanusForConditionalGeneration, *, seed: int) -> None:
    """Random adaptors and image head (normal, std 0.02, zero bias); generation embeddings start as the codebook."""
    generator = torch.Generator().manual_seed(seed)
    core = model.model
    for part in (core.aligner, core.generation_aligner, core.generation_head):
        for layer in part.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0.0, ADAPTOR_STD, generator=generator)
                layer.bias.zero_()
    core.generation_embeddings.weight.copy_(core.vqmodel.quantize.embedding.weight)


def pretrain_all(out_dir: Path, data_dir: Path, tokenizer_dir: Path, sizes: SmokeSizes | None = None, seed: int = 0) -> Path:
    """Pretrain the VQ tokenizer, the vision encoder and the language model, and write the model stage 1 starts from.

    ``out_dir`` becomes a ``JanusForConditionalGeneration`` folder (config.json, model.safetensors) with the
    tokenizer's files beside them; returns it.  The process's thread count is set for the time of the call only.

    Raises:
        ConfigError: if the tokenizer lacks a special token.
        DataError: if a training source is missing.
    """
    sizes = sizes or SmokeSizes()
    out_dir = Path(out_dir)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = janus_config(sizes.model, vocab_size=len(tokenizer), special_ids=special_ids(tokenizer))
    threads = torch.get_num_threads()
    torch.set_num_threads(sizes.threads)
    try:
        folders = [Path(data_dir) / source for source in GENERATION_SOURCES]
        drawn = as_tensor(read_pictures(folders, sizes.model.image_size))
        vq = train_vq(config.vq_config, drawn, sizes.vq, seed=seed)
        pictures, texts = image_text_pairs(data_dir, tokenizer, sizes.model.image_size)
        vision = train_vision(config.vision_config, pictures, texts, sizes.vision, vocab_size=len(tokenizer), seed=seed)
        llm = train_llm(config.text_config, text_documents(data_dir, tokenizer), sizes.text, seed=seed)
    finally:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = JanusForConditionalGeneration(config)
    model.model.vqmodel.load_state_dict(vq.state_dict())
    model.model.vision_model.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.lm_head.load_state_dict(llm.lm_head.state_dict())
    reset_adaptors(model, seed=seed)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return out_dir
