"""A trained model in use: images from prompts, answers about images.

Prompts come from the same code as the training layouts (``data/encode.py``). Batches of different prompt lengths are
padded on the left; padding is masked and takes no position, so a prompt's result does not depend on its neighbours
(beyond float rounding).

Shapes: B prompts, L padded prompt length, d hidden width, S ids an image, H = W image side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from transformers import DynamicCache

from jp_train.config import load_stored_config
from jp_train.config.choices import Template
from jp_train.config.schema import LossConfig, RunConfig
from jp_train.data.encode import Encoder
from jp_train.data.image import load_understanding_image, understanding_transform
from jp_train.data.tokenizer import Tokenizer, load_saved_tokenizer, load_tokenizer
from jp_train.errors import CheckpointError, ConfigError, DataError, SkipSample
from jp_train.model.export import RUN_CONFIG
from jp_train.model.janus_pro import JanusPro
from jp_train.model.pretrained import load_weights
from jp_train.model.sampling import Sampling, read_sampling
from jp_train.model.stored_config import read_model_config
from jp_train.model.vq import VQTokenizer
from jp_train.model.weight_files import open_weights
from jp_train.model.weight_places import INDEX_FILE
from jp_train.types import KINDS

ImageInput = bytes | Image.Image | np.ndarray | torch.Tensor
"""The bytes of an image file, a PIL image, or uint8 [3, H, W] already at the model's side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceModel:
    """Everything that inference needs; make one with ``load_for_inference``, or from parts you hold."""

    janus: JanusPro
    vq: VQTokenizer
    encoder: Encoder
    sampling: Sampling = field(default_factory=Sampling)
    """How images are sampled where a call says nothing else."""

    @property
    def tokenizer(self) -> Tokenizer:
        return self.encoder.tokenizer

    @property
    def device(self) -> torch.device:
        return self.janus.lm_head.weight.device


def load_for_inference(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> InferenceModel:
    """Load an exported folder, a released one, a run folder (its ``export/``), or a checkpoint of a run.

    Args:
        tokenizer: folder of the tokenizer, if it is not in ``path``.
        dtype: of the weights; default float32 on CPU, bfloat16 on CUDA.  The VQ tokenizer is always float32.

    Raises:
        CheckpointError: if weights or configuration are missing or do not fit each other.
        ConfigError: if the tokenizer lacks a special token.
    """
    path = Path(path)
    source = open_weights(path)
    folder = source.path
    if (folder / INDEX_FILE).is_file():  # a checkpoint: what its run was configured with
        cfg = load_stored_config(folder / "config.yaml")
        known = load_saved_tokenizer(tokenizer) if tokenizer else load_tokenizer(cfg.tokenizer)
    else:
        cfg = _run_config(folder)
        cfg.model = read_model_config(folder)
        known = load_saved_tokenizer(tokenizer or folder)
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    with torch.device("meta"):
        janus = JanusPro(cfg.model, LossConfig(), len(KINDS), False, known.special.image_placeholder)
    janus.to(dtype).to_empty(device=device)
    embeddings = janus.model.vision_model.embeddings
    # the only buffer; not stored
    positions = torch.arange(embeddings.num_positions, device=device).unsqueeze(0)
    embeddings.register_buffer("position_ids", positions, persistent=False)
    vq = VQTokenizer(cfg.model.vq, cfg.model.vision.image_size).to(device)
    load_weights(janus, vq, source)
    janus.requires_grad_(False).eval()
    encoder = Encoder(cfg, known)
    return InferenceModel(janus=janus, vq=vq, encoder=encoder, sampling=read_sampling(folder))


def _run_config(folder: Path) -> RunConfig:
    """The configuration that the export carries (templates, system prompt); a released model gets the defaults in
    stage 3 form."""
    file = folder / RUN_CONFIG
    if not file.exists():
        cfg = RunConfig()
        cfg.stage.template = Template.stage3
        return cfg
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(file)))
    except OmegaConfBaseException as error:
        raise CheckpointError(f"{file} is no jp_train configuration: {error}") from error
    assert isinstance(merged, RunConfig)
    return merged


def generate_images(
    model: InferenceModel,
    prompts: Sequence[str],
    *,
    cfg_scale: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    template: Template | str | None = None,
    batch_size: int = 16,
) -> np.ndarray:
    """Images of prompts, uint8 ``[n, H, W, 3]``.

    Sampling as in the paper: logits = uncond + cfg_scale x (cond - uncond), softmax at ``temperature``, multinomial
    over all codes, exactly S steps.  At temperature 0 the likeliest code is taken.

    Args:
        cfg_scale, temperature: None takes ``model.sampling``.
        template: layout of the prompt; default the stage the model was trained in.
        seed: image i of the call depends on (seed, i) alone, not on ``batch_size``.
    """
    ids = generate_image_ids(
        model,
        prompts,
        cfg_scale=cfg_scale,
        temperature=temperature,
        seed=seed,
        template=template,
        batch_size=batch_size,
    )
    return model.vq.decode(ids).permute(0, 2, 3, 1).cpu().numpy()


@torch.inference_mode()
def generate_image_ids(
    model: InferenceModel,
    prompts: Sequence[str],
    *,
    cfg_scale: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    template: Template | str | None = None,
    batch_size: int = 16,
) -> torch.Tensor:
    """VQ ids int64 ``[n, S]`` of ``generate_images``.  At ``cfg_scale`` 1 the unconditional branch cancels out and is
    not run."""
    sampling = model.sampling.override(cfg_scale, temperature)
    cfg_scale, temperature = sampling.cfg_scale, sampling.temperature
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: it must be 0 (greedy) or larger")
    janus, encoder, device = model.janus, model.encoder, model.device
    guided = cfg_scale != 1.0
    generators = [torch.Generator(device).manual_seed((seed << 20) + i) for i in range(len(prompts))]
    made = [torch.empty(0, janus.slots, dtype=torch.int64, device=device)]
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        rows = [encoder.generation_prompt_ids(prompt, template) for prompt in part]
        if guided:  # both branches in one batch
            rows += [encoder.unconditional_prompt_ids(prompt, template) for prompt in part]
        with janus.plain_attention():
            reader = _Reader(janus, rows, encoder.tokenizer.special.pad)
            hidden = reader.read(janus.model.language_model.embed_tokens(reader.ids))
            columns = []
            for step in range(janus.slots):
                logits = janus.model.generation_head(hidden).float()
                if guided:
                    conditional, unconditional = logits.chunk(2)
                    logits = unconditional + cfg_scale * (conditional - unconditional)
                columns.append(_sample(logits, temperature, generators[start : start + batch_size]))
                if step + 1 < janus.slots:
                    codes = columns[-1].repeat(2) if guided else columns[-1]
                    hidden = reader.read(janus.code_embeddings(codes).unsqueeze(1))
        made.append(torch.stack(columns, dim=1))
    return torch.cat(made)


@torch.inference_mode()
def answer_questions(
    model: InferenceModel,
    images: Sequence[ImageInput | list[ImageInput]],
    questions: Sequence[str],
    *,
    template: Template | str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> list[str]:
    """Greedy answers to one question per image, or list of images, each up to EOS or ``max_new_tokens``.

    The images of a list stand at the ``<image>`` of their question in order, or before it where it has none.

    Raises:
        ValueError: if the numbers of images and questions differ, or an image array has another size than the model
        takes.
        SkipSample: if an image file cannot be decoded, or a question has another number of ``<image>`` than images.
    """
    if len(images) != len(questions):
        raise ValueError(f"{len(images)} images for {len(questions)} questions: give one question per image")
    janus, encoder = model.janus, model.encoder
    special = encoder.tokenizer.special
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        part = slice(start, start + batch_size)
        shown = [image if isinstance(image, list) else [image] for image in images[part]]
        rows = [
            encoder.understanding_prompt_ids(question, template, len(of_question))
            for question, of_question in zip(questions[part], shown, strict=True)
        ]
        pixels = torch.stack([_pixels(image, model) for of_question in shown for image in of_question])
        with janus.plain_attention():
            reader = _Reader(janus, rows, special.pad)
            embeddings = janus.model.language_model.embed_tokens(reader.ids)
            features = janus.image_features(pixels.to(model.device)).flatten(0, 1).to(embeddings.dtype)
            embeddings[reader.ids == special.image_placeholder] = features
            hidden = reader.read(embeddings)
            written: list[list[int]] = [[] for _ in rows]
            open_rows = set(range(len(rows)))
            for _ in range(max_new_tokens):
                tokens = janus.lm_head(hidden).argmax(-1)
                for row, token in enumerate(tokens.tolist()):
                    if row in open_rows:
                        if token == special.eos:
                            open_rows.discard(row)
                        else:
                            written[row].append(token)
                if not open_rows:
                    break
                hidden = reader.read(janus.model.language_model.embed_tokens(tokens).unsqueeze(1))
        answers += [encoder.tokenizer.decode(ids).strip() for ids in written]
    return answers


def answer_about_files(
    model: InferenceModel,
    files: Sequence[Path],
    question: str,
    *,
    template: Template | str | None = None,
    max_new_tokens: int = 64,
) -> str:
    """The answer to one question about the images of these files.

    Raises:
        DataError: for a file that cannot be read or decoded.
        ConfigError: if the question has another number of ``<image>`` than there are files.
    """
    images: list[ImageInput] = []
    for file in files:
        try:
            images.append(load_understanding_image(file.read_bytes(), model.janus.side))
        except (OSError, SkipSample) as reason:
            raise DataError(f"image {file}: {reason}") from None
    try:
        (answer,) = answer_questions(model, [images], [question], template=template, max_new_tokens=max_new_tokens)
    except SkipSample as reason:
        raise ConfigError(f"question {question!r}: {reason}") from None
    return answer


class _Reader:
    """The language model reading a left-padded batch with a KV cache, a prompt first and one position at a time
    after it."""

    def __init__(self, janus: JanusPro, rows: Sequence[Sequence[int]], pad: int) -> None:
        device = janus.lm_head.weight.device
        longest = max(len(row) for row in rows)
        self._language_model = janus.model.language_model
        self.ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
        """int64 ``[B, L]``."""
        self._mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._cache = DynamicCache(config=self._language_model.config)

    def read(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The hidden state ``[B, d]`` after reading ``[B, L or 1, d]`` more."""
        if self._cache.get_seq_length():
            self._mask = torch.cat((self._mask, torch.ones_like(self._mask[:, :1])), dim=1)
            self._positions = self._positions[:, -1:] + 1
        out = self._language_model(
            inputs_embeds=embeddings,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        return out.last_hidden_state[:, -1]


def _sample(logits: torch.Tensor, temperature: float, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """One id a row of logits ``[B, K]``, each row with its own generator."""
    if temperature == 0:
        return logits.argmax(-1)
    chances = torch.softmax(logits / temperature, dim=-1)
    return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(chances, generators, strict=True)])


def _pixels(image: ImageInput, model: InferenceModel) -> torch.Tensor:
    """uint8 ``[3, H, W]`` at the model's side."""
    side = model.janus.side
    if isinstance(image, bytes):
        image = load_understanding_image(image, side)
    elif isinstance(image, Image.Image):
        image = understanding_transform(image.convert("RGB"), side)
    pixels = torch.as_tensor(image)
    if pixels.dtype != torch.uint8 or pixels.shape != (3, side, side):
        raise ValueError(
            f"an image array must be uint8 [3, {side}, {side}], got {pixels.dtype} {list(pixels.shape)}; or give the "
            "file's bytes"
        )
    return pixels
