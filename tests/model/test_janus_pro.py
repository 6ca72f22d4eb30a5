"""The packed model against transformers' own Janus, document by document."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from transformers import JanusForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from jp_train.config.schema import LanguageConfig, LossConfig, ModelConfig, Reduction
from jp_train.errors import ConfigError
from jp_train.model import attention
from jp_train.model.configuration import build_config
from jp_train.model.freeze import module_of, set_trainable
from jp_train.model.janus_pro import Float32Rotary, JanusPro
from jp_train.types import IGNORE_INDEX, Kind
from tests.model.janus_tiny import (
    BOI,
    CODES,
    PLACEHOLDER,
    SIDE,
    Doc,
    gen_doc,
    pack,
    random_docs,
    text_doc,
    tiny_config,
    tiny_model,
    und_doc,
)

STAGES = {
    1: ["aligner", "gen_embed", "gen_aligner", "gen_head"],
    2: ["aligner", "gen_embed", "gen_aligner", "gen_head", "language_model"],
    3: ["aligner", "gen_embed", "gen_aligner", "gen_head", "language_model", "vision_model"],
}
MIXED = [Kind.TEXT, Kind.UNDERSTANDING, Kind.GENERATION, Kind.TEXT, Kind.GENERATION, Kind.UNDERSTANDING]


def as_transformers(model: JanusPro) -> JanusForConditionalGeneration:
    """transformers' model with the same weights (its VQ stays random: it is not used)."""
    reference = JanusForConditionalGeneration(build_config(tiny_config(), PLACEHOLDER)).eval()
    outcome = reference.load_state_dict(model.state_dict(), strict=False)
    assert not outcome.unexpected_keys
    assert all(key.startswith("model.vqmodel.") for key in outcome.missing_keys)
    return reference


def reference_hidden(reference: JanusForConditionalGeneration, doc: Doc) -> torch.Tensor:
    """Last hidden states [T, d] of one document alone, by transformers' public path for each kind."""
    ids = torch.tensor([doc.ids])
    if doc.kind is Kind.UNDERSTANDING:
        pixels = (doc.images.float() / 255 - 0.5) / 0.5
        return reference.model(input_ids=ids, pixel_values=pixels, use_cache=False).last_hidden_state[0]
    embeddings = reference.get_input_embeddings()(ids)
    if doc.kind is Kind.GENERATION:
        embeddings = embeddings.clone()
        embeddings[0, doc.slots] = reference.prepare_embeddings_for_image_generation(torch.tensor(doc.codes))
    return reference.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0]


def test_state_dict_names_and_shapes_are_those_of_transformers_without_the_vq() -> None:
    reference = JanusForConditionalGeneration(build_config(tiny_config(), PLACEHOLDER))
    expected = {k: v.shape for k, v in reference.state_dict().items() if not k.startswith("model.vqmodel.")}
    assert {k: v.shape for k, v in tiny_model().state_dict().items()} == expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_logits_of_both_heads_equal_transformers_run_one_document_at_a_time(checkpointing: bool) -> None:
    model = tiny_model(checkpointing=checkpointing).train()
    reference = as_transformers(model)
    docs = random_docs(3, MIXED, images=(1, 5))
    with torch.no_grad():
        batch = pack(docs)
        hidden = torch.cat([reference_hidden(reference, doc) for doc in docs])
        assert (model.lm_head(model.hidden_states(batch)) - reference.lm_head(hidden)).abs().max() <= 1e-4
        assert (
            model.model.generation_head(model.hidden_states(batch)) - reference.model.generation_head(hidden)
        ).abs().max() <= 1e-4


@pytest.mark.parametrize("reduction", Reduction)
@pytest.mark.parametrize("kinds", [[Kind.TEXT], [Kind.UNDERSTANDING, Kind.TEXT, Kind.GENERATION]])
@pytest.mark.parametrize("every", [0, 1])
def test_a_pass_reads_nothing_back_from_the_device(
    reduction: Reduction, kinds: list[Kind], every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that the host waits for would drain a GPU's queue; the meta device has none to give."""
    monkeypatch.setattr(attention, "uses_varlen_kernel", lambda query: True)
    model = tiny_model(checkpointing=every, loss=LossConfig(reduction=reduction)).train().to("meta", torch.bfloat16)
    batch = pack(random_docs(3, kinds)).to("meta")
    terms = model(batch)
    loss = terms.text_sum + terms.image_sum if terms.document_mean_sum is None else terms.document_mean_sum
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        terms.text_sum.item()


def test_every_kth_layer_of_a_tower_is_computed_again_and_no_gradient_changes() -> None:
    docs = random_docs(3, MIXED)
    gradients = []
    for every, expected in ((0, [1, 1]), (1, [2, 2]), (2, [2, 1])):
        model = tiny_model(checkpointing=every).train()
        layers = [*model.model.language_model.layers, *model.model.vision_model.encoder.layers]
        calls = [0] * len(layers)

        def count(module: torch.nn.Module, *_: object, at: int, calls: list[int]) -> None:
            calls[at] += 1

        for at, layer in enumerate(layers):
            layer.self_attn.register_forward_pre_hook(partial(count, at=at, calls=calls))
        terms = model(pack(docs))
        (terms.text_sum + terms.image_sum).backward()
        assert calls == 2 * expected
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]) and torch.equal(gradient, gradients[2][name]), name


@torch.no_grad()
def test_understanding_documents_equal_the_full_forward_of_transformers() -> None:
    model = tiny_model()
    reference = as_transformers(model)
    docs = random_docs(8, [Kind.UNDERSTANDING] * 5, images=(1, 2, 3, 4, 5))
    expected = [
        reference(input_ids=torch.tensor([d.ids]), pixel_values=(d.images.float() / 255 - 0.5) / 0.5).logits[0]
        for d in docs
    ]
    assert (model.lm_head(model.hidden_states(pack(docs))) - torch.cat(expected)).abs().max() <= 1e-4


def test_loss_terms_equal_a_plain_cross_entropy_of_each_document() -> None:
    model = tiny_model(
        loss=LossConfig(reduction=Reduction.sample_mean, text_weight=1.0, image_weight=0.5, chunk_tokens=5)
    )
    reference = as_transformers(model)
    docs = random_docs(5, MIXED)
    terms = model(pack(docs))
    text_sum, image_sum, mean_sum = 0.0, 0.0, 0.0
    kinds = {kind: [0.0, 0] for kind in Kind}
    sources: dict[int, list[float]] = {}
    for doc in docs:
        hidden = reference_hidden(reference, doc)
        text = F.cross_entropy(reference.lm_head(hidden), torch.tensor(doc.labels), reduction="sum")
        image = F.cross_entropy(reference.model.generation_head(hidden), torch.tensor(doc.gen_labels), reduction="sum")
        count = sum(x != IGNORE_INDEX for x in doc.labels + doc.gen_labels)
        text_sum, image_sum = text_sum + text, image_sum + image
        mean_sum = mean_sum + (text + 0.5 * image) / count
        kinds[doc.kind][0] += float((text + image).detach())
        kinds[doc.kind][1] += count
        result = sources.setdefault(doc.source, [0.0, 0])
        result[0] += float((text + image).detach())
        result[1] += count
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(terms.text_sum, text_sum, **close)
    torch.testing.assert_close(terms.image_sum, image_sum, **close)
    torch.testing.assert_close(terms.document_mean_sum, mean_sum, **close)
    assert terms.kind_sums.tolist() == pytest.approx([kinds[k][0] for k in Kind], rel=1e-5)
    assert terms.kind_tokens.tolist() == [kinds[k][1] for k in Kind]
    assert terms.source_sums.tolist() == pytest.approx([sources[s][0] for s in range(3)], rel=1e-5)
    assert terms.source_tokens.tolist() == [sources[s][1] for s in range(3)]
    assert (terms.text_tokens, terms.image_tokens) == (
        sum(x != IGNORE_INDEX for d in docs for x in d.labels),
        sum(x != IGNORE_INDEX for d in docs for x in d.gen_labels),
    )


def test_gradients_equal_transformers_run_one_document_at_a_time() -> None:
    model = tiny_model(checkpointing=True).train()
    reference = as_transformers(model)
    docs = random_docs(6, MIXED, images=(2, 1))
    terms = model(pack(docs))
    (terms.text_sum + terms.image_sum).backward()
    for doc in docs:
        hidden = reference_hidden(reference, doc)
        loss = F.cross_entropy(reference.lm_head(hidden), torch.tensor(doc.labels), reduction="sum")
        image = F.cross_entropy(reference.model.generation_head(hidden), torch.tensor(doc.gen_labels), reduction="sum")
        (loss + image).backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        intended = expected[name].grad  # of a key bias it is zero but for rounding
        assert (parameter.grad - intended).abs().max() <= 1e-4 * intended.abs().max() + 1e-6, name


def changed(doc: Doc) -> Doc:
    """The same layout with other words, pixels and codes."""
    ids = [t if t <= PLACEHOLDER else 6 + (t - 6 + 11) % 50 for t in doc.ids]
    images = None if doc.images is None else 255 - doc.images
    codes = None if doc.codes is None else [(c + 7) % CODES for c in doc.codes]
    return replace(doc, ids=ids, images=images, codes=codes)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("position", range(3))
def test_perturbing_a_document_moves_no_logit_and_no_gradient_of_another(position: int, images: int) -> None:
    docs = random_docs(9, [Kind.GENERATION, Kind.UNDERSTANDING, Kind.TEXT], images=(images,))
    other = list(docs)
    other[position] = changed(docs[position])
    bounds = [0]
    for doc in docs:
        bounds.append(bounds[-1] + len(doc.ids))
    results = []
    for packed in (pack(docs), pack(other)):
        model = tiny_model()
        embeddings = []
        original = model.input_embeddings
        model.input_embeddings = lambda b, f=original, kept=embeddings: kept.append(f(b)) or kept[-1]
        hidden = model.hidden_states(packed)
        text, image = model.lm_head(hidden), model.model.generation_head(hidden)
        embeddings[0].retain_grad()
        keep = [i for k in range(3) if k != position for i in range(bounds[k], bounds[k + 1])]
        # a loss of the other documents only: its gradient must not reach the perturbed one, and must not change
        (text[keep].square().sum() + image[keep].square().sum()).backward()
        span = slice(bounds[position], bounds[position + 1])
        assert embeddings[0].grad[span].abs().max() == 0
        results.append((text[keep], image[keep], embeddings[0].grad[keep]))
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "present", [kinds for n in range(4) for kinds in combinations(Kind, n)], ids=lambda k: "+".join(k) or "nothing"
)
def test_every_trainable_parameter_gets_a_gradient_whatever_is_present(stage: int, present: tuple[Kind, ...]) -> None:
    model = tiny_model(checkpointing=True).train()
    set_trainable(model, STAGES[stage])
    terms = model(pack(random_docs(2, present)))
    (terms.text_sum + terms.image_sum).backward()
    reached = {
        "vision_model": Kind.UNDERSTANDING in present,
        "aligner": Kind.UNDERSTANDING in present,
        "gen_embed": Kind.GENERATION in present,
        "gen_aligner": Kind.GENERATION in present,
        "gen_head": Kind.GENERATION in present,
        "language_model": bool(present),
    }
    biggest = dict.fromkeys(STAGES[stage], 0.0)
    for name, parameter in model.named_parameters():
        module = module_of(name)
        if module not in STAGES[stage]:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        biggest[module] = max(biggest[module], float(parameter.grad.abs().max()))
    assert {name: value > 0 for name, value in biggest.items()} == {name: reached[name] for name in STAGES[stage]}


def test_every_module_is_called_the_same_number_of_times_whatever_is_present() -> None:
    """ZeRO-3 gathers in the order of module calls: it must not depend on the data, nor on the number of chunks."""
    traces = []
    for kinds in ((), (Kind.TEXT,), (Kind.GENERATION, Kind.GENERATION), tuple(MIXED) * 2):
        model = tiny_model()
        trace: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, n=name, t=trace: t.append(n))
        model(pack(random_docs(4, kinds)))
        traces.append(trace)
    assert all(trace == traces[0] for trace in traces)
    parents_without_forward = {"model", "model.vision_model.encoder.layers", "model.language_model.layers"}
    parents_without_forward |= {"model.aligner.hidden_layers", "model.generation_aligner.hidden_layers"}
    called = set(traces[0])
    assert {name for name, _ in tiny_model().named_modules()} - called <= parents_without_forward
    assert len([n for n in traces[0] if n in ("lm_head", "model.generation_head.vision_head")]) == 2


def test_a_dummy_changes_no_loss() -> None:
    docs = random_docs(7, [Kind.TEXT])
    model = tiny_model()
    expected = model.lm_head(reference_hidden(as_transformers(model), docs[0]))
    assert (model.lm_head(model.hidden_states(pack(docs))) - expected).abs().max() <= 1e-4


def test_a_whole_row_is_one_segment_with_causal_packing() -> None:
    docs = [text_doc([7, 8, 9]), text_doc([10, 11])]
    joined = Doc(
        Kind.TEXT,
        docs[0].ids + docs[1].ids,
        docs[0].labels + docs[1].labels,
        docs[0].gen_labels + docs[1].gen_labels,
        [],
    )
    model = tiny_model()
    whole = replace(
        pack(docs), cu_seqlens=torch.tensor([0, 9], dtype=torch.int32), max_seqlen=9, position_ids=torch.arange(9)
    )
    assert torch.equal(model.lm_head(model.hidden_states(whole)), model.lm_head(model.hidden_states(pack([joined]))))


def test_rotary_frequencies_stay_float32_in_a_bfloat16_model() -> None:
    config = build_config(ModelConfig(language=LanguageConfig(hidden_size=256, heads=2)), 0).text_config
    rotary = Float32Rotary(config).bfloat16()
    positions = torch.arange(4000, 4096)[None]
    cos, _ = rotary(torch.empty(0, dtype=torch.float32), positions)
    exact = torch.outer(positions[0].double(), 10000.0 ** (-torch.arange(0, 128, 2).double() / 128))
    assert (cos[0, :, :64].double() - exact.cos()).abs().max() < 2e-3


def test_norms_have_the_bits_of_transformers_in_float32_and_are_closer_to_float64_in_bfloat16() -> None:
    model = tiny_model()
    assert not any(isinstance(module, LlamaRMSNorm) for module in model.modules())
    ours = model.model.language_model.norm
    g = torch.Generator().manual_seed(0)
    ours.weight.data = torch.rand(ours.weight.shape, generator=g) + 0.5
    theirs = LlamaRMSNorm(len(ours.weight), eps=ours.eps)
    theirs.load_state_dict(ours.state_dict())
    x, grad = torch.randn(2, 512, len(ours.weight), generator=g)

    def passes(norm: torch.nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        norm, given = norm.to(dtype), x.detach().to(dtype).requires_grad_()
        norm.weight.grad = None
        value = norm(given)
        value.backward(grad.to(dtype))
        return [value, given.grad, norm.weight.grad]

    for mine, other in zip(passes(ours, torch.float32), passes(theirs, torch.float32), strict=True):
        assert torch.equal(mine, other)
    half, rounded = passes(ours, torch.bfloat16), passes(theirs, torch.bfloat16)
    value = x.bfloat16().double()
    exact = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + ours.eps) * ours.weight.double()
    assert (half[0].double() - exact).norm() < (rounded[0].double() - exact).norm() < 0.004 * exact.norm()


def test_pending_pictures_and_wrong_slots_are_refused_before_the_forward_pass() -> None:
    batch = pack([gen_doc([9], [1, 2, 3, 4]), und_doc([8], [9], torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8))])
    with pytest.raises(ValueError, match="call vq.fill_pending"):
        tiny_model()(replace(batch, gen_pending=torch.tensor([0])))
    with pytest.raises(ValueError, match=r"und_slots has 3 positions for 1 images of 4 slots"):
        tiny_model()(replace(batch, und_slots=batch.und_slots[:3]))
    with pytest.raises(ValueError, match="documents would see each other"), (model := tiny_model()).plain_attention():
        model(batch)


def test_sizes_that_do_not_fit_are_a_config_error() -> None:
    cfg = tiny_config()
    cfg.vision.patch_size = 4
    with pytest.raises(ConfigError, match=r"4 and 2 tokens a side"):
        build_config(cfg, PLACEHOLDER)
    cfg = tiny_config()
    cfg.language.heads = 3
    with pytest.raises(ConfigError, match=r"language.hidden_size=32 is not divisible"):
        build_config(cfg, PLACEHOLDER)


def test_the_text_head_is_untied_and_the_pad_row_can_learn() -> None:
    config = build_config(tiny_config(), PLACEHOLDER)
    assert config.tie_word_embeddings is False
    assert config.text_config.tie_word_embeddings is False
    assert tiny_model().model.language_model.embed_tokens.padding_idx is None


def test_boi_predicts_the_first_code_and_the_last_slot_predicts_none() -> None:
    doc = gen_doc([9, 10], [5, 6, 7, 8])
    assert doc.ids[3] == BOI
    assert doc.gen_labels[3] == 5
    assert doc.gen_labels[doc.slots[-1]] == IGNORE_INDEX
