"""Make the model that stage 1 starts from: pretrained parts, and fresh adaptors and image head between them."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, JanusForConditionalGeneration, LlamaConfig, PreTrainedTokenizerBase
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

from examples.smoke import tokenizer as names
from examples.smoke.pretrain_llm import train_llm
from examples.smoke.pretrain_vision import train_vision
from examples.smoke.pretrain_vq import train_vq
from examples.smoke.reading import image_of, read_images, read_source, texts_of
from examples.smoke.shards import GENERATION_SOURCES, UNDERSTANDING_SOURCES
from examples.smoke.sizes import SmokeSizes, janus_config
from jp_train.errors import ConfigError

MAX_TEXT_TOKENS = 40
"""Texts of image-text pairs are cut at this many tokens for the vision encoder's pretraining."""


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the special tokens, looked up by their strings.

    Raises:
        ConfigError: if one of them is not a single token of the tokenizer.
    """
    strings = {
        "bos": names.BOS,
        "eos": names.EOS,
        "pad": names.PAD,
        "boi": names.BOI,
        "eoi": names.EOI,
        "image": names.IMAGE,
    }
    vocabulary = tokenizer.get_vocab()
    missing = [string for string in strings.values() if string not in vocabulary]
    if missing:
        raise ConfigError(f"the tokenizer lacks the special tokens {', '.join(missing)}")
    return {name: vocabulary[string] for name, string in strings.items()}


def as_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 images ``[n, S, S, 3]`` (numpy) to the model's layout, ``[n, 3, S, S]``."""
    return torch.tensor(images).permute(0, 3, 1, 2).contiguous()


def image_text_pairs(
    data_dir: Path, tokenizer: PreTrainedTokenizerBase, side: int
) -> tuple[torch.Tensor, list[list[int]]]:
    """Images uint8 ``[n, 3, side, side]`` of all training sources with the token lists of their captions or
    conversations."""
    images, texts = [], []
    for source in (*UNDERSTANDING_SOURCES, *GENERATION_SOURCES):
        for sample in read_source(Path(data_dir) / source):
            images.append(torch.from_numpy(image_of(sample, side).copy()))
            texts.append(" ".join(texts_of(sample)))
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.stack(images).permute(0, 3, 1, 2).contiguous(), [ids[:MAX_TEXT_TOKENS] for ids in encoded]


def text_documents(data_dir: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The documents of the ``text`` source as token lists, each between BOS and EOS."""
    ids = special_ids(tokenizer)
    texts = [text for sample in read_source(Path(data_dir) / "text") for text in texts_of(sample)]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[ids["bos"], *tokens, ids["eos"]] for tokens in encoded]


@torch.no_grad()
def reset_adaptors(model: JanusForConditionalGeneration, *, seed: int) -> None:
    """Random adaptors and image head (normal, zero bias); generation embeddings start as the codebook.

    The std is 1/sqrt(inputs), not the 0.02 of the full-size model: in a network this narrow 0.02 makes image embeddings
    a hundred times smaller than text embeddings, and a run of minutes never recovers from that.
    """
    generator = torch.Generator().manual_seed(seed)
    core = model.model
    for part in (core.aligner, core.generation_aligner, core.generation_head):
        for layer in part.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0.0, layer.in_features**-0.5, generator=generator)
                layer.bias.zero_()
    core.generation_embeddings.weight.copy_(core.vqmodel.quantize.embedding.weight)


def pretrain_all(
    out_dir: Path, data_dir: Path, tokenizer_dir: Path, sizes: SmokeSizes | None = None, seed: int = 0
) -> Path:
    """Pretrain the VQ tokenizer, the vision encoder and the language model, and write the model stage 1 starts from.

    ``out_dir`` becomes a ``JanusForConditionalGeneration`` folder (config.json, model.safetensors) with the
    tokenizer's files beside them; returns it.  The VQ tokenizer is trained in another process meanwhile:
    two processes of one thread do more than one of two.  The thread count is set for the time of the call only.

    Raises:
        ConfigError: if the tokenizer lacks a special token.
        DataError: if a training source is missing.
    """
    sizes = sizes or SmokeSizes()
    out_dir = Path(out_dir)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = janus_config(sizes.model, vocab_size=len(tokenizer), special_ids=special_ids(tokenizer))
    assert isinstance(config.vision_config, JanusVisionConfig) and isinstance(config.text_config, LlamaConfig)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as beside:
            vq = beside.submit(_train_vq_beside, Path(data_dir), tokenizer_dir, sizes, seed)
            images, texts = image_text_pairs(data_dir, tokenizer, sizes.model.image_size)
            vision = train_vision(
                config.vision_config, images, texts, sizes.vision, vocab_size=len(tokenizer), seed=seed
            )
            llm = train_llm(config.text_config, text_documents(data_dir, tokenizer), sizes.text, seed=seed)
            vq_weights = {name: torch.from_numpy(value) for name, value in vq.result().items()}
    finally:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = JanusForConditionalGeneration(config)
    model.model.vqmodel.load_state_dict(vq_weights)
    model.model.vision_model.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.lm_head.load_state_dict(llm.lm_head.state_dict())
    reset_adaptors(model, seed=seed)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return out_dir


def _train_vq_beside(data_dir: Path, tokenizer_dir: Path, sizes: SmokeSizes, seed: int) -> dict[str, np.ndarray]:
    """The VQ tokenizer's weights, trained in this process with one thread (numpy: plain bytes travel between
    processes)."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = janus_config(sizes.model, vocab_size=len(tokenizer), special_ids=special_ids(tokenizer))
    assert isinstance(config.vq_config, JanusVQVAEConfig)
    drawn = as_tensor(read_images([data_dir / source for source in GENERATION_SOURCES], sizes.model.image_size))
    vq = train_vq(config.vq_config, drawn, sizes.vq, seed=seed)
    return {name: value.numpy() for name, value in vq.state_dict().items()}
