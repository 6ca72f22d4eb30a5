"""Generation and answering against plain loops without a cache, and against transformers' own generate."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers
from transformers import JanusForConditionalGeneration, PreTrainedTokenizerFast

from jp_train.config.schema import RunConfig, Template, TokenizerConfig
from jp_train.data.encode import Encoder
from jp_train.data.image import load_understanding_image
from jp_train.data.tokenizer import load_tokenizer
from jp_train.errors import CheckpointError, SkipSample
from jp_train.model.export import write_export
from jp_train.model.pretrained import init_fresh_vq
from jp_train.model.sampling import Sampling
from jp_train.model.vq import VQTokenizer
from jp_train.tools.inference import (
    InferenceModel,
    _Reader,
    answer_questions,
    generate_image_ids,
    generate_images,
    load_for_inference,
)
from jp_train.types import Kind
from tests.model.janus_tiny import SIDE, SLOTS, Doc, gen_doc, pack, tiny_config, tiny_model

WORDS = ["a", "red", "blue", "ring", "square", "what", "is", "this", ":", "one", "two", "three", "You", "are"]
PROMPTS = ["a red ring", "blue", "a blue square is this", "two red"]


def tokenizer_folder(path: Path) -> Path:
    """A word-level Hugging Face tokenizer with the special tokens of Janus-Pro."""
    special = [
        getattr(TokenizerConfig(), name)
        for name in ("bos", "eos", "pad", "boi", "eoi", "image_placeholder", "user", "assistant")
    ]
    vocabulary = {word: i for i, word in enumerate([*special, "<unk>", *WORDS])}
    raw = RawTokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=special)
    fast.save_pretrained(path)
    return path


def small_model(folder: Path) -> InferenceModel:
    """A few thousand random weights with a tokenizer in `folder`."""
    cfg = RunConfig(model=tiny_config())
    cfg.stage.template = Template.stage3
    cfg.data.system_prompt = "You are"
    cfg.tokenizer.path = str(tokenizer_folder(folder / "tokenizer"))
    vq = VQTokenizer(cfg.model.vq, SIDE)
    init_fresh_vq(vq, 0)
    janus = tiny_model(std=0.3).eval().requires_grad_(False)
    return InferenceModel(janus=janus, vq=vq, encoder=Encoder(cfg, load_tokenizer(cfg.tokenizer)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InferenceModel:
    return small_model(tmp_path_factory.mktemp("model"))


def image_logits_without_cache(model: InferenceModel, prompt: list[int], codes: list[int]) -> torch.Tensor:
    """The image head's logits for the next code, by the training path: one packed document, nothing cached."""
    # a document of the training layout whose later slots are arbitrary: attention is causal
    doc = gen_doc(prompt[1:-1], [*codes, *[0] * (SLOTS - len(codes))])
    doc.ids[: len(prompt)] = prompt
    with torch.no_grad():
        return model.janus.model.generation_head(model.janus.hidden_states(pack([doc])))[len(prompt) - 1 + len(codes)]


def sampled_without_cache(
    model: InferenceModel, prompt: str, index: int, seed: int, scale: float, temperature: float
) -> list[int]:
    """Classifier-free guidance written out, one picture at a time."""
    special = model.tokenizer.special
    conditional = model.encoder.generation_prompt_ids(prompt)
    unconditional = [t if i in (0, len(conditional) - 1) else special.pad for i, t in enumerate(conditional)]
    generator = torch.Generator().manual_seed((seed << 20) + index)
    codes: list[int] = []
    for _ in range(SLOTS):
        with_text = image_logits_without_cache(model, conditional, codes)
        without = image_logits_without_cache(model, unconditional, codes)
        logits = without + scale * (with_text - without)
        if temperature == 0:
            codes.append(int(logits.argmax()))
        else:
            codes.append(int(torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator)))
    return codes


@pytest.mark.parametrize(("scale", "temperature"), [(5.0, 1.0), (1.5, 0.7), (1.0, 1.0), (3.0, 0.0)])
def test_generation_equals_guided_sampling_without_cache_or_padding(
    model: InferenceModel, scale: float, temperature: float
) -> None:
    result = generate_image_ids(model, PROMPTS, cfg_scale=scale, temperature=temperature, seed=4)
    expected = [sampled_without_cache(model, prompt, i, 4, scale, temperature) for i, prompt in enumerate(PROMPTS)]
    assert result.tolist() == expected


@torch.no_grad()
def test_cached_logits_of_a_padded_batch_equal_uncached_logits_of_each_prompt(model: InferenceModel) -> None:
    prompts = [model.encoder.generation_prompt_ids(prompt) for prompt in PROMPTS]
    assert len({len(prompt) for prompt in prompts}) > 2
    janus, codes = model.janus, [[7, 8, 9], [1, 2, 3], [40, 41, 42], [5, 5, 5]]
    steps = []
    with janus.plain_attention():
        reader = _Reader(janus, prompts, model.tokenizer.special.pad)
        steps.append(janus.model.generation_head(reader.read(janus.model.language_model.embed_tokens(reader.ids))))
        for column in torch.tensor(codes).t():
            steps.append(janus.model.generation_head(reader.read(janus.code_embeddings(column).unsqueeze(1))))
    for row, prompt in enumerate(prompts):
        for step, logits in enumerate(steps):
            assert (logits[row] - image_logits_without_cache(model, prompt, codes[row][:step])).abs().max() <= 1e-4


def test_scale_one_is_conditional_sampling_alone(model: InferenceModel) -> None:
    result = generate_image_ids(model, PROMPTS, cfg_scale=1.0, seed=2)
    almost = generate_image_ids(model, PROMPTS, cfg_scale=1.0 + 1e-9, seed=2)  # runs both branches
    assert torch.equal(result, almost)


def test_a_picture_depends_on_seed_and_index_and_not_on_the_batch(model: InferenceModel) -> None:
    whole = generate_image_ids(model, PROMPTS, seed=1)
    assert torch.equal(whole, generate_image_ids(model, PROMPTS, seed=1, batch_size=1))
    assert torch.equal(whole, generate_image_ids(model, PROMPTS, seed=1, batch_size=3))
    assert not torch.equal(whole, generate_image_ids(model, PROMPTS, seed=2))
    same_prompt = generate_image_ids(model, ["blue", "blue", "blue"], seed=1)
    assert len({tuple(row) for row in same_prompt.tolist()}) > 1


def test_pictures_are_the_decoded_ids(model: InferenceModel) -> None:
    pictures = generate_images(model, PROMPTS[:2], seed=3)
    assert pictures.shape == (2, SIDE, SIDE, 3)
    assert pictures.dtype == np.uint8
    ids = generate_image_ids(model, PROMPTS[:2], seed=3)
    assert np.array_equal(pictures, model.vq.decode(ids).permute(0, 2, 3, 1).numpy())
    assert generate_images(model, []).shape == (0, SIDE, SIDE, 3)


def greedy_without_cache(model: InferenceModel, pixels: np.ndarray, question: str, limit: int) -> list[int]:
    special = model.tokenizer.special
    images = torch.from_numpy(pixels).reshape(-1, 3, SIDE, SIDE)
    prompt = model.encoder.understanding_prompt_ids(question, images=len(images))
    slots = [i for i, token in enumerate(prompt) if token == special.image_placeholder]
    written: list[int] = []
    while len(written) < limit:
        ids = [*prompt, *written]
        ignored = [-100] * len(ids)
        doc = Doc(Kind.UNDERSTANDING, ids, ignored, ignored, slots, images=images)
        with torch.no_grad():
            token = int(model.janus.lm_head(model.janus.hidden_states(pack([doc])))[-1].argmax())
        if token == special.eos:
            break
        written.append(token)
    return written


def test_answers_equal_greedy_decoding_without_cache_or_padding(model: InferenceModel) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8) for _ in range(5)]
    questions = ["what is this", "what", "is this red", "a", "is this a blue square"]
    result = answer_questions(model, pictures, questions, max_new_tokens=6, batch_size=3)
    expected = [greedy_without_cache(model, p, q, 6) for p, q in zip(pictures, questions, strict=True)]
    assert result == [model.tokenizer.decode(ids).strip() for ids in expected]
    assert len(set(result)) > 1


def test_a_question_of_several_images_sees_each_in_its_place(model: InferenceModel) -> None:
    rng = np.random.default_rng(3)
    left, right = (rng.integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8) for _ in range(2))
    questions = ["what", "is <image> red <image>", "is <image> red <image>"]
    result = answer_questions(model, [left, [left, right], [right, left]], questions, max_new_tokens=6)
    expected = [
        greedy_without_cache(model, left, questions[0], 6),
        greedy_without_cache(model, np.stack([left, right]), questions[1], 6),
        greedy_without_cache(model, np.stack([right, left]), questions[2], 6),
    ]
    assert result == [model.tokenizer.decode(ids).strip() for ids in expected]
    assert len(set(result)) == 3
    with pytest.raises(SkipSample, match="1 <image> for 2 images"):
        answer_questions(model, [[left, right]], ["is <image> red"])


def test_an_answer_ends_at_eos(model: InferenceModel) -> None:
    picture = np.zeros((3, SIDE, SIDE), np.uint8)
    first = greedy_without_cache(model, picture, "what", 1)[0]
    head = model.janus.lm_head.weight
    before = head.clone()
    try:
        head[[first, model.tokenizer.special.eos]] = head[[model.tokenizer.special.eos, first]]
        assert answer_questions(model, [picture], ["what"]) == [""]
    finally:
        head.copy_(before)


def test_pictures_may_be_files_pil_images_or_arrays(model: InferenceModel) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 20, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.save(file, "PNG")
    pictures = [file.getvalue(), image, load_understanding_image(file.getvalue(), SIDE)]
    answers = answer_questions(model, pictures, ["what is this"] * 3, max_new_tokens=5)
    assert len(set(answers)) == 1
    with pytest.raises(ValueError, match=r"must be uint8 \[3, 16, 16\]"):
        answer_questions(model, [np.zeros((16, 16, 3), np.uint8)], ["what"])
    with pytest.raises(ValueError, match="1 images for 2 questions"):
        answer_questions(model, pictures[:1], ["a", "b"])


def exported(model: InferenceModel, folder: Path, layout: str = "hf", sampling: Sampling | None = None) -> Path:
    named = [*model.janus.state_dict().items(), *((f"model.{k}", v) for k, v in model.vq.state_dict().items())]
    text = "data: {system_prompt: You are}\nstage: {template: stage3}\n"
    write_export(
        folder,
        model.janus.janus_config,
        named,
        model.tokenizer,
        layout=layout,
        dtype=torch.float32,
        run_config=text,
        sampling=sampling,
    )
    return folder


@pytest.mark.parametrize("layout", ["hf", "deepseek"])
def test_an_export_generates_and_answers_as_the_model_did(model: InferenceModel, tmp_path: Path, layout: str) -> None:
    loaded = load_for_inference(exported(model, tmp_path / "run" / "export", layout).parent)
    assert torch.equal(generate_image_ids(loaded, PROMPTS, seed=9), generate_image_ids(model, PROMPTS, seed=9))
    assert np.array_equal(generate_images(loaded, PROMPTS[:1], seed=9), generate_images(model, PROMPTS[:1], seed=9))
    picture = np.full((3, SIDE, SIDE), 80, np.uint8)
    questions = ["what is this"]
    assert answer_questions(loaded, [picture], questions, max_new_tokens=5) == answer_questions(
        model, [picture], questions, max_new_tokens=5
    )


@pytest.mark.parametrize("layout", ["hf", "deepseek"])
def test_an_export_carries_how_its_images_are_sampled(model: InferenceModel, tmp_path: Path, layout: str) -> None:
    folder = exported(model, tmp_path / "e", layout, Sampling(cfg_scale=1.5, temperature=0.6))
    loaded = load_for_inference(folder)
    stated = generate_image_ids(model, PROMPTS, cfg_scale=1.5, temperature=0.6, seed=9)
    assert torch.equal(generate_image_ids(loaded, PROMPTS, seed=9), stated)
    assert not torch.equal(generate_image_ids(loaded, PROMPTS, cfg_scale=5.0, temperature=1.0, seed=9), stated)


def test_transformers_reads_the_guidance_and_warns_of_nothing(
    model: InferenceModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = exported(model, tmp_path / "e", sampling=Sampling(cfg_scale=1.5, temperature=0.6))
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        loaded = JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert loaded.generation_config.guidance_scale == 1.5
    assert caplog.messages == []


def test_transformers_own_generate_makes_the_same_picture_from_an_export(model: InferenceModel, tmp_path: Path) -> None:
    loaded = JanusForConditionalGeneration.from_pretrained(exported(model, tmp_path / "e"), dtype=torch.float32).eval()
    for prompt in PROMPTS[:2]:
        ids = torch.tensor([model.encoder.generation_prompt_ids(prompt)])
        options = {"generation_mode": "image", "do_sample": False, "guidance_scale": 3.0}
        theirs = loaded.generate(ids, attention_mask=torch.ones_like(ids), **options)
        ours = generate_image_ids(model, [prompt], cfg_scale=3.0, temperature=0.0)
        assert torch.equal(theirs, ours)
        pixels = ((loaded.decode_image_tokens(theirs) + 1) / 2 * 255).clamp(0, 255)
        assert (
            np.abs(pixels.detach().numpy() - generate_images(model, [prompt], cfg_scale=3.0, temperature=0.0)).max()
            <= 0.51
        )


def test_packed_training_works_again_after_generation(model: InferenceModel) -> None:
    generate_image_ids(model, PROMPTS[:1])
    model.janus.lm_head(model.janus.hidden_states(pack([gen_doc([9], [1, 2, 3, 4])])))


def test_a_folder_without_a_model_names_the_cause(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*.safetensors"):
        load_for_inference(tmp_path)
