from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from jp_train.errors import ConfigError
from jp_train.model.pretrained import init_fresh_vq
from jp_train.model.vq import VQTokenizer, fill_pending, unit_rows
from jp_train.types import IGNORE_INDEX, PENDING_VQ_ID
from tests.model.janus_tiny import CODES, SIDE, SLOTS, gen_doc, pack, text_doc, tiny_config


def tokenizer(unit: bool = False) -> VQTokenizer:
    """Random weights; codebook rows of very different lengths unless `unit`."""
    vq = VQTokenizer(tiny_config().vq, SIDE)
    init_fresh_vq(vq, 0)
    if not unit:
        g = torch.Generator().manual_seed(1)
        vq.vqmodel.quantize.embedding.weight.mul_(torch.rand(CODES, 1, generator=g) * 3 + 0.2)
    return vq


def pictures(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def nearest_by_hand(vq: VQTokenizer, images: torch.Tensor) -> torch.Tensor:
    """Unit vectors, all distances in float64, one position after the other, row-major."""
    with torch.no_grad():
        latent = vq.vqmodel.quant_conv(vq.vqmodel.encoder(images.float() / 127.5 - 1)).double()
    codes = vq.vqmodel.quantize.embedding.weight.double()
    codes = codes / codes.square().sum(1, keepdim=True).sqrt()
    ids = torch.empty(len(images), latent.shape[2] * latent.shape[3], dtype=torch.int64)
    for n in range(len(images)):
        for y in range(latent.shape[2]):
            for x in range(latent.shape[3]):
                vector = latent[n, :, y, x]
                vector = vector / vector.square().sum().sqrt()
                ids[n, y * latent.shape[3] + x] = (codes - vector).square().sum(1).argmin()
    return ids


def test_ids_are_the_nearest_unit_rows_of_unit_outputs() -> None:
    vq, images = tokenizer(), pictures(11)
    ids = vq.encode(images)
    assert ids.shape == (11, SLOTS)
    assert torch.equal(ids, nearest_by_hand(vq, images))
    assert len(ids.unique()) > 5


def test_transformers_own_encode_agrees_only_with_unit_codebook_rows() -> None:
    images = pictures(8)
    pixels = images.float() / 127.5 - 1
    for unit in (True, False):
        vq = tokenizer(unit)
        theirs = vq.vqmodel.encode(pixels).image_tokens.view(8, -1)
        assert torch.equal(theirs, vq.encode(images)) is unit


def test_decoding_is_transformers_decoding_clipped_to_bytes() -> None:
    vq = tokenizer()
    ids = torch.randint(0, CODES, (9, SLOTS), generator=torch.Generator().manual_seed(3))
    expected = ((vq.vqmodel.decode(ids).detach() + 1) * 127.5).clamp(0, 255)
    result = vq.decode(ids)
    assert result.dtype is torch.uint8
    assert (result.float() - expected).abs().max() <= 0.5 + 1e-3


def test_nothing_of_it_learns_and_nothing_sets_it_to_training() -> None:
    vq = tokenizer()
    torch.nn.Sequential(vq).train()
    assert not any(module.training for module in vq.modules())
    assert not any(parameter.requires_grad for parameter in vq.parameters())
    assert not vq.encode(pictures(1)).requires_grad


def test_the_fingerprint_changes_with_what_decides_an_id_and_with_nothing_else() -> None:
    first, same = tokenizer(), tokenizer()
    same.vqmodel.decoder.conv_out.bias.add_(1)
    same.vqmodel.quantize.embedding.weight.copy_(unit_rows(same.vqmodel.quantize.embedding.weight))
    assert first.fingerprint() == same.fingerprint()
    other = tokenizer()
    other.vqmodel.encoder.conv_in.bias.add_(1e-6)
    assert other.fingerprint() != first.fingerprint()


def test_unit_rows_are_a_fixed_point_to_the_last_bit() -> None:
    rows = unit_rows(torch.randn(500, 8) * 5)
    assert torch.equal(unit_rows(rows), rows)


def test_pending_pictures_are_filled_into_inputs_and_labels_where_they_belong() -> None:
    vq = tokenizer()
    codes = [1, 2, 3, 4]
    docs = [gen_doc([9], [0] * SLOTS), text_doc([8]), gen_doc([7, 7], codes), gen_doc([], [0] * SLOTS)]
    images = pictures(2)
    batch = pack(docs)
    gen_ids, labels = batch.gen_ids.clone(), batch.gen_labels.clone()
    for picture in (0, 2):
        gen_ids[picture] = PENDING_VQ_ID
        labels[batch.gen_slots.view(3, SLOTS)[picture] - 1] = PENDING_VQ_ID
    labels[batch.gen_slots.view(3, SLOTS)[2] - 1] = IGNORE_INDEX  # an unsupervised picture stays unsupervised
    pending = replace(batch, gen_ids=gen_ids, gen_labels=labels, gen_pending=torch.tensor([0, 2]), gen_images=images)
    filled = fill_pending(pending, vq)
    expected = nearest_by_hand(vq, images).tolist()
    assert filled.gen_ids.tolist() == [expected[0], codes, expected[1]]
    by_hand = pack(
        [gen_doc([9], expected[0]), text_doc([8]), gen_doc([7, 7], codes), gen_doc([], [IGNORE_INDEX] * SLOTS)]
    )
    assert torch.equal(filled.gen_labels, by_hand.gen_labels)
    assert len(filled.gen_pending) == len(filled.gen_images) == 0
    assert fill_pending(filled, vq) is filled


def test_wrong_pictures_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected uint8 images \[n, 3, 16, 16\], got torch.float32"):
        tokenizer().encode(pictures(1).float())
    with pytest.raises(ValueError, match=r"expected ids \[n, 4\]"):
        tokenizer().decode(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ConfigError, match="image_size=20 is not a multiple of the VQ stride 8"):
        VQTokenizer(tiny_config().vq, 20)


def test_an_empty_batch_gives_empty_results() -> None:
    vq = tokenizer()
    assert vq.encode(pictures(0)).shape == (0, SLOTS)
    assert vq.decode(torch.zeros(0, SLOTS, dtype=torch.int64)).shape == (0, 3, SIDE, SIDE)
