"""Rows against an oracle that knows none of the loader's code: one document at a time, tokens in plain lists, labels
from the table in docs/model.md."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from jp_train.config.batch import batch_plan
from jp_train.config.choices import TokenIds
from jp_train.config.schema import Template
from jp_train.data.index import index_sources
from jp_train.data.loader import StepLoader, build_plan, image_bytes_ahead
from jp_train.data.permute import document_uniform
from jp_train.data.rows import RowBuilder
from tests.data.data_samples import IMAGE_SIZE, SLOTS, several_samples, write_shard

IGNORE, PENDING = -100, -1


class Oracle:
    """Encodes the documents of the `mixed` sources; `text` is the tokenizer's own answer for one string."""

    def __init__(self, cfg, tokenizer, folder) -> None:
        self.cfg, self.text, self.special, self.tokenizer = cfg, tokenizer.encode, tokenizer.special, tokenizer
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        for path in sorted(folder.glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    self.files.setdefault((path.name, key), {})[extension] = tar.extractfile(member).read()

    def document(self, ref, provenance) -> tuple[list[int], list[int], list[int]]:
        """Ids, labels and image labels of a document as provenance `one` and reference `ref` name it."""
        files = self.files[provenance.shard, provenance.key]
        stage3 = self.cfg.stage.template is Template.stage3
        special, text = self.special, self.text
        user, assistant = self.tokenizer.role("<|User|>"), self.tokenizer.role("<|Assistant|>")
        picture = [special.boi, *[special.image_placeholder] * SLOTS, special.eoi]
        ids: list[int] = [special.bos]
        learnt: list[bool] = [False]
        targets: list[int] = []

        def add(tokens: list[int], learn: bool = False) -> None:
            ids.extend(tokens)
            learnt.extend([learn] * len(tokens))

        if provenance.kind.value == "text":
            add([*text(files["txt"].decode()), special.eos], True)
        elif provenance.kind.value == "understanding":
            note = json.loads(files["json"])
            images = len([name for name in files if name.endswith("png")])

            def placed(words: str, learn: bool) -> None:
                for number, part in enumerate(words.split("<image>")):
                    add(picture if number else [])
                    add(text(part) if part else [], learn)

            if "text" in note:
                placed(note["text"], True)
                add([special.eos], True)
            else:
                messages = [message["value"].strip() for message in note["conversations"]]
                if images == 1 and "<image>" in messages[0]:
                    messages[0] = messages[0].replace("<image>", "").strip()
                front = "" if any("<image>" in question for question in messages[::2]) else "<image>" * images
                if not stage3:
                    placed(front, False)
                for number, (question, answer) in enumerate(zip(messages[::2], messages[1::2], strict=True)):
                    if stage3:
                        add([] if number else text("Be helpful.\n\n"))
                        add([user])
                        before = f"{front}\n" if front and not number else ""
                        placed(f": {before}{question}\n\n", False)
                        add([assistant, *text(":")])
                    else:
                        placed(("\n" if number else "") + question, True)
                    add(text(f" {answer}"), True)
                    add([special.eos] if stage3 or number == len(messages) // 2 - 1 else [], True)
        else:
            caption = json.loads(files["json"])["caption"]
            if ref.short_caption:
                caption = caption[: caption.index(".") + 1]
            condition = [user, *text(f": {caption}\n\n"), assistant, *text(":")] if stage3 else text(caption)
            if (
                document_uniform(self.cfg.seed, provenance.source, ref.epoch, ref.sample, "pad_dropout")
                < self.cfg.data.pad_dropout
            ):
                condition = [special.pad] * len(condition)
            add(condition)
            targets = np.load(io.BytesIO(files["vq.npy"])).tolist() if "vq.npy" in files else [PENDING] * SLOTS
            add([*picture, special.eos])
        labels = [ids[n + 1] if n + 1 < len(ids) and learnt[n + 1] else IGNORE for n in range(len(ids))]
        image_labels = [IGNORE] * len(ids)
        if targets:
            boi = ids.index(special.boi)
            image_labels[boi : boi + SLOTS] = targets
        span = slice(provenance.start, provenance.start + provenance.length)
        return ids[span], labels[span], image_labels[span]

    def images(self, provenance) -> list[np.ndarray]:
        """The pictures of a document in order, resized as its kind wants."""
        files = self.files[provenance.shard, provenance.key]
        names = sorted(name for name in files if name.endswith("png"))
        return [self.image(files[name], provenance) for name in names]

    def image(self, data: bytes, provenance) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as file:
            image = file.convert("RGB")
        if provenance.kind.value == "generation":
            image = image.resize(
                [int(side * IMAGE_SIZE / min(image.size)) for side in image.size], Image.Resampling.BICUBIC
            )
            left, top = ((side - IMAGE_SIZE) // 2 for side in image.size)
            image = image.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
        else:
            image = image.resize(
                [max(14, int(side / max(image.size) * IMAGE_SIZE)) for side in image.size], Image.Resampling.BICUBIC
            )
            canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (127, 127, 127))
            canvas.paste(image, ((IMAGE_SIZE - image.width) // 2, (IMAGE_SIZE - image.height) // 2))
            image = canvas
        return np.asarray(image).transpose(2, 0, 1)


def plan_of(cfg, tokenizer):
    indexes, batch = index_sources(cfg, tokenizer), batch_plan(cfg, 1)
    return build_plan(cfg, indexes, batch, tokenizer), indexes, batch


@pytest.mark.parametrize("template", list(Template))
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("several", [False, True])
def test_batches_equal_an_oracle_that_encodes_one_document_at_a_time(
    mixed, tokenizer, tmp_path, template, workers, several
):
    """With one image a sample, and with up to five, in their places; with stored ids and without."""
    cfg = mixed()
    if several:
        write_shard(tmp_path / "several.tar", several_samples(30))
        cfg.data.sources["und"].shards = "several.tar"
        cfg.data.token_ids = TokenIds.off if workers else TokenIds.auto
    cfg.stage.template, cfg.data.workers, cfg.engine.micro_batch_rows = template, workers, 2
    oracle = Oracle(cfg, tokenizer, tmp_path)
    specs = plan_of(cfg, tokenizer)[0]
    plan, indexes, batch = plan_of(cfg, tokenizer)
    seen = set()
    with StepLoader(cfg, plan, indexes, tokenizer, dp_rank=0, dp_world_size=1, batch_plan=batch) as loader:
        for _ in range(5):
            step, rows = next(loader), iter(specs.next_step())
            for made in step.micro_batches:
                ids, labels, image_labels, positions, und, gen = [], [], [], [], [], []
                for row in made.provenance:
                    for ref, provenance in zip(next(rows).documents, row, strict=True):
                        streams = oracle.document(ref, provenance)
                        for whole, part in zip((ids, labels, image_labels), streams, strict=True):
                            whole += part
                        positions += range(len(streams[0]))
                        seen.add((provenance.kind, provenance.start > 0, ref.short_caption))
                        if provenance.kind.value == "understanding":
                            und += oracle.images(provenance)
                        elif PENDING in streams[2]:
                            gen += oracle.images(provenance)
                assert made.input_ids.tolist() == ids
                assert made.labels.tolist() == labels
                assert made.gen_labels.tolist() == image_labels
                assert made.position_ids.tolist() == positions
                slots = (made.input_ids == tokenizer.special.image_placeholder).nonzero()[:, 0].tolist()
                assert sorted([*made.und_slots.tolist(), *made.gen_slots.tolist()]) == slots
                for pictures, expected in ((made.und_images, und), (made.gen_images, gen)):
                    assert len(pictures) == len(expected)
                    assert not expected or np.array_equal(pictures.numpy(), np.stack(expected))
    assert len(seen) >= 5  # all kinds, cut texts, short captions


def test_pictures_for_another_process_lie_in_shared_memory(mixed, tokenizer):
    cfg = mixed()
    plan, indexes, _ = plan_of(cfg, tokenizer)
    locators = [index.locator for index in indexes]
    private, shared = RowBuilder(cfg, locators, tokenizer), RowBuilder(cfg, locators, tokenizer, shared_images=True)
    pictures = 0
    for spec in plan.next_step():
        plain, crossing = private.build(spec), shared.build(spec)
        for name in ("und_images", "gen_images"):
            assert torch.equal(getattr(plain, name), getattr(crossing, name))
            assert not getattr(plain, name).is_shared()
            assert getattr(crossing, name).is_shared() or not len(getattr(crossing, name))
            pictures += len(getattr(crossing, name))
    assert pictures


def test_rows_ahead_and_their_pictures_stay_within_the_stated_bound(mixed, tokenizer):
    cfg = mixed()
    cfg.data.workers, cfg.data.prefetch_rows = 2, 3
    plan, indexes, batch = plan_of(cfg, tokenizer)
    with StepLoader(cfg, plan, indexes, tokenizer, dp_rank=0, dp_world_size=1, batch_plan=batch) as loader:
        for _ in range(4):
            step = next(loader)
            assert len(loader._sampler.handed_out) <= cfg.data.workers * cfg.data.prefetch_rows
            for made in step.micro_batches:
                row = (made.und_images.nbytes + made.gen_images.nbytes) / made.rows
                assert row * cfg.data.workers * (cfg.data.prefetch_rows + 1) <= image_bytes_ahead(cfg)
