"""What a stage will read, and in which proportions: from its index and plan, as `jp-train data simulate` has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jp_train.config.choices import OverLong, RatioUnit
from jp_train.errors import CheckpointError, ConfigError, DataError, named
from jp_train.tools.check.subject import Stage, Subject
from jp_train.types import KINDS, Kind

if TYPE_CHECKING:
    from jp_train.config.schema import DataConfig
    from jp_train.data.index import SourceIndex
    from jp_train.data.plan import Plan

FAR = 3.0
"""A kind whose share in tokens is so many times its configured one, or so many times less, is worth a warning."""
MANY = 0.5
"""Share of a source's documents over `data.seq_len` that is worth a warning."""


def sources(subject: Subject) -> list[dict[str, Any]]:
    """One entry a source that can be read: shards, samples, what its filter leaves out, tokens, share of documents over
    `data.seq_len`, and epochs over the stage (None where another source cannot be read). Warns where most documents are
    longer than a row. Builds what is missing of the index.

    Raises ConfigError, DataError.
    """
    if not subject.config.data.sources:
        return []
    from jp_train.data.vq_use import ids_summary

    stage = subject.stage
    found = []
    for index in subject.indexes:
        _left_out(subject, index, "data.sources")
        rates, over = stage and stage.rates.get(index.name), float((index.tokens > subject.config.data.seq_len).mean())
        if stage and rates and over > MANY:
            subject.warnings.append(_over_long(subject.config.data, stage.plan, index, over))
        found.append(
            {
                "name": index.name,
                "kind": str(index.kind),
                "shards": len(index.shards),
                "samples": len(index),
                "bad": len(index.bad),
                "filtered": dict(index.filtered),
                "mean_tokens": index.mean_tokens,
                "tokens": round(index.mean_tokens * len(index)),
                "over_long": over,
                "epochs": None if stage is None else _epochs(stage, index),
                "vq_ids": ids_summary(index) if index.kind is Kind.GENERATION else {},
            }
        )
    return found


def _epochs(stage: Stage, index: SourceIndex) -> float:
    rates = stage.rates.get(index.name)
    return stage.documents[index.name] * rates.draws_per_document / len(index) if rates else 0.0


def held_out(subject: Subject) -> dict[str, dict[str, int]] | None:
    """{source: what its filter leaves out}, None without held-out sources. Looks at them as training does at its start;
    builds what is missing of their index. Raises ConfigError."""
    for index in subject.held_out:
        _left_out(subject, index, "validation.sources")
    return {index.name: dict(index.filtered) for index in subject.held_out} or None


def vq_ids(subject: Subject) -> dict[str, str | None] | None:
    """`fingerprint`: of the VQ tokenizer in the starting weights, with which the stored ids agree; None where the
    weights cannot be read, which `weights` says. Reads the VQ tokenizer, no other weights.

    Raises DataError for ids of another VQ tokenizer, or missing ones (`data.vq_ids`).
    """
    config = subject.config
    indexes = [*(subject.indexes if config.data.sources else []), *subject.held_out]
    if not any(index.kind is Kind.GENERATION for index in indexes):
        return None
    from jp_train.data.vq_use import use_stored_ids
    from jp_train.engine.vq_recipe import ids_recipe

    try:
        recipe = ids_recipe(config)
    except (ConfigError, CheckpointError):
        return {"fingerprint": None}
    assert recipe is not None
    use_stored_ids(config.data, indexes, recipe)
    return {"fingerprint": recipe.fingerprint}


def _left_out(subject: Subject, index: SourceIndex, place: str) -> None:
    """Tars and samples of a source that are not used: a warning each, or a problem where they are too many."""
    from jp_train.data.ledger import bad_share

    if index.passed_over:
        subject.warnings.append(f"source {index.name}: {index.passed_over}")
    try:
        if text := bad_share(index, subject.config.data.max_bad_share, place):
            subject.warnings.append(text)
    except DataError as error:
        subject.problem(error)


def named_shards(subject: Subject) -> None:
    """A DataError or ConfigError for every source, held out ones too, whose shards are not there; none is opened."""
    from jp_train.data.shards import expand_shards

    config = subject.config
    for name, source in (*config.data.sources.items(), *config.validation.sources.items()):
        with subject.collecting(), named(f"source {name}"):
            expand_shards(source.shards, config.data.root)


def shares(subject: Subject) -> dict[str, dict[str, float]] | None:
    """{"samples" | "tokens": {kind: share}} of what the rows of the stage will hold. Warns of kinds whose share in
    tokens is far from the configured one. Raises ConfigError, DataError."""
    if not subject.config.data.sources or (stage := subject.stage) is None:
        return None
    from jp_train.tools.simulate.sample import kind_shares

    expected = kind_shares(stage.plan, stage.rates, stage.documents)
    if subject.config.stage.ratio_unit is RatioUnit.samples and (text := _far_off(subject, expected["tokens"])):
        subject.warnings.append(text)
    return expected


def _far_off(subject: Subject, tokens: dict[str, float]) -> str:
    mixture = subject.config.stage.mixture
    configured = {str(kind): getattr(mixture, str(kind)) for kind in KINDS}
    configured = {kind: share / sum(configured.values()) for kind, share in configured.items()}
    far = [
        f"{kind} {100 * tokens[kind]:.1f} % instead of {100 * share:.1f} %"
        for kind, share in configured.items()
        if share and not 1 / FAR <= tokens[kind] / share <= FAR
    ]
    if not far:
        return ""
    return (
        f"stage.mixture counts samples (stage.ratio_unit), and in tokens the rows will hold {', '.join(far)}: set "
        "stage.ratio_unit=tokens if the shares are meant in tokens, or make documents of a more equal length "
        "(`jp-train data import text --document paragraph`)"
    )


def _over_long(data: DataConfig, plan: Plan, index: SourceIndex, over: float) -> str:
    cut = plan.samples_per_row is None and next(source.cuttable for source in plan.sources if source.name == index.name)
    if cut:
        happens, cure = "are cut at the ends of rows", "import them with `--document paragraph` or `line`, or raise it"
    else:
        happens = "are truncated" if data.over_long is OverLong.truncate else "are passed over"
        happens, cure = f"{happens} (data.over_long)", "raise it"
    return (
        f"source {index.name}: {100 * over:.0f} % of its documents are longer than data.seq_len {data.seq_len} (on "
        f"average {index.mean_tokens:,.0f} tokens) and {happens}; {cure}"
    )
