"""A Janus-Pro of a few thousand parameters, and packed batches for it, written independently of the data package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import torch

from jp_train.config.schema import LanguageConfig, LossConfig, ModelConfig, VisionConfig, VQConfig
from jp_train.model.janus_pro import JanusPro
from jp_train.types import IGNORE_INDEX, KINDS, Kind, PackedBatch

BOS, EOS, PAD, BOI, EOI, PLACEHOLDER = 0, 1, 2, 3, 4, 5
SIDE, SLOTS, VOCAB, CODES, DIM = 16, 4, 64, 48, 32
N_SOURCES = 3


def tiny_config() -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(hidden_size=24, layers=2, heads=2, mlp_ratio=2.0, image_size=SIDE, patch_size=8),
        vq=VQConfig(
            codebook_size=CODES,
            embed_dim=8,
            base_channels=32,
            channel_multiplier=[1, 1, 1, 2],
            res_blocks=1,
            latent_channels=32,
        ),
        language=LanguageConfig(
            hidden_size=DIM, intermediate_size=48, layers=2, heads=2, vocab_size=VOCAB, max_position_embeddings=256
        ),
    )


def tiny_model(
    *,
    seed: int = 0,
    loss: LossConfig | None = None,
    checkpointing: int = 0,
    std: float = 0.2,
    cfg: ModelConfig | None = None,
) -> JanusPro:
    """float32, with weights large enough that a wrong position or a leak shows; every parameter random, norms and
    biases too."""
    loss = loss or LossConfig(chunk_tokens=7)
    model = JanusPro(cfg or tiny_config(), loss, N_SOURCES, checkpointing, PLACEHOLDER)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))
    return model


@dataclass
class Doc:
    """One document by hand: tokens, labels already shifted, and its pictures if it has some."""

    kind: Kind
    ids: list[int]
    labels: list[int]
    gen_labels: list[int]
    slots: list[int]
    images: torch.Tensor | None = None  # uint8 [I, 3, H, W]
    codes: list[int] | None = None
    source: int = 0


def text_doc(ids: Sequence[int], source: int = 0) -> Doc:
    ids = [BOS, *ids, EOS]
    return Doc(Kind.TEXT, ids, [*ids[1:], IGNORE_INDEX], [IGNORE_INDEX] * len(ids), [], source=source)


def und_doc(question: Sequence[int], answer: Sequence[int], images: torch.Tensor, source: int = 1) -> Doc:
    """With the question after the first of `images`, the others behind it, each with a word before it."""
    picture = [BOI, *[PLACEHOLDER] * SLOTS, EOI]
    head = [BOS, *picture, *question]
    for number in range(1, len(images)):
        head += [5 + number, *picture]
    ids = [*head, *answer, EOS]
    labels = [IGNORE_INDEX] * (len(head) - 1) + [*answer, EOS, IGNORE_INDEX]
    return Doc(
        Kind.UNDERSTANDING,
        ids,
        labels,
        [IGNORE_INDEX] * len(ids),
        [at for at, token in enumerate(ids) if token == PLACEHOLDER],
        images=images,
        source=source,
    )


def gen_doc(caption: Sequence[int], codes: Sequence[int], source: int = 2) -> Doc:
    ids = [BOS, *caption, BOI, *[PLACEHOLDER] * SLOTS, EOI, EOS]
    boi = 1 + len(caption)
    gen_labels = [IGNORE_INDEX] * len(ids)
    gen_labels[boi : boi + SLOTS] = codes
    return Doc(
        Kind.GENERATION,
        ids,
        [IGNORE_INDEX] * len(ids),
        gen_labels,
        list(range(boi + 1, boi + 1 + SLOTS)),
        codes=list(codes),
        source=source,
    )


def random_docs(seed: int, kinds: Sequence[Kind], images: Sequence[int] = (1,)) -> list[Doc]:
    """Documents of these kinds; those to understand have so many images, in turn."""
    counts = cycle(images)
    g = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high, (), generator=g))
        return torch.randint(6, VOCAB, (count,), generator=g).tolist()

    made = []
    for kind in kinds:
        if kind is Kind.TEXT:
            made.append(text_doc(words(3, 12)))
        elif kind is Kind.UNDERSTANDING:
            shape = (next(counts), 3, SIDE, SIDE)
            shown = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
            made.append(und_doc(words(1, 5), words(2, 6), shown))
        else:
            made.append(gen_doc(words(1, 6), torch.randint(0, CODES, (SLOTS,), generator=g).tolist()))
    return made


def pack(docs: Sequence[Doc]) -> PackedBatch:
    """Lay the documents end to end in one micro-batch."""
    starts = [0]
    for doc in docs:
        starts.append(starts[-1] + len(doc.ids))

    def flat(name: str) -> torch.Tensor:
        return torch.tensor([x for doc in docs for x in getattr(doc, name)], dtype=torch.int64)

    def slots(kind: Kind) -> torch.Tensor:
        result = [s + start for doc, start in zip(docs, starts, strict=False) if doc.kind is kind for s in doc.slots]
        return torch.tensor(result, dtype=torch.int64)

    images = [image for doc in docs if doc.images is not None for image in doc.images]
    codes = [doc.codes for doc in docs if doc.codes is not None]
    return PackedBatch(
        input_ids=flat("ids"),
        position_ids=torch.tensor([i for doc in docs for i in range(len(doc.ids))], dtype=torch.int64),
        labels=flat("labels"),
        gen_labels=flat("gen_labels"),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=max((len(doc.ids) for doc in docs), default=0),
        und_images=torch.stack(images) if images else torch.zeros(0, 3, SIDE, SIDE, dtype=torch.uint8),
        und_slots=slots(Kind.UNDERSTANDING),
        gen_images=torch.zeros(0, 3, SIDE, SIDE, dtype=torch.uint8),
        gen_pending=torch.zeros(0, dtype=torch.int64),
        gen_ids=torch.tensor(codes, dtype=torch.int64) if codes else torch.zeros(0, SLOTS, dtype=torch.int64),
        gen_slots=slots(Kind.GENERATION),
        document_lengths=torch.tensor([len(doc.ids) for doc in docs], dtype=torch.int64),
        document_kinds=torch.tensor([KINDS.index(doc.kind) for doc in docs], dtype=torch.int64),
        document_sources=torch.tensor([doc.source for doc in docs], dtype=torch.int64),
        rows=1,
        seq_len=256,
        step=0,
    )
