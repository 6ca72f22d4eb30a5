"""A forecast as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jp_train.terminal import aligned

SHOWN_WORLDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def format_forecast(forecast: dict[str, Any]) -> str:
    """The whole forecast as text; what is not exact says how far it can be off (two standard errors)."""
    fill, sampled, mixture, per_step = forecast["fill"], forecast["sampled"], forecast["mixture"], forecast["per_step"]
    unit = mixture["unit"]
    basis = (
        "the whole stage was planned: exact"
        if sampled["whole_stage"]
        else f"planned {sampled['steps']:,} steps in {sampled['blocks']} places of the stage; "
        f"+- are two standard errors between the places"
    )
    lines = [
        f"{forecast['steps']:,} steps x {forecast['rows_per_step']} rows of {forecast['seq_len']:,} tokens, "
        f"{forecast['world']} ranks on {forecast['nodes']} "
        f"node(s); {basis}"
    ]
    if forecast.get("synthetic"):
        lines.append(
            "SYNTHETIC: lengths, sizes and numbers of samples are stated, not read from data: " + forecast["synthetic"]
        )
    lines += [
        "",
        f"  fill                  {100 * fill['mean']:.3f} % +- {100 * fill['plus_minus']:.3f} (worst step "
        f"{100 * fill['worst_step']:.2f} %)",
        f"  documents per row     {_value(forecast['documents_per_row'], 2)} (spans of cut texts counted apart)",
        f"  a step holds          {_value(per_step['tokens'])} tokens, {_value(per_step['documents'])} documents, "
        f"{_value(per_step['understanding_images'])} + {_value(per_step['generation_images'])} images (understanding + "
        "generation)",
        f"  supervised a step     text head {_value(per_step['supervised_text_tokens'])}, image head "
        f"{_value(per_step['supervised_image_tokens'])} tokens{forecast.get('supervised_note', '')}",
        f"  over_long takes       {_value(per_step['truncated_tokens'], 1)} tokens of "
        f"{_value(per_step['truncated_documents'], 2)} documents a step "
        f"({forecast['over_long']['truncated_tokens_per_million']:.0f} of a million)",
        f"  texts cut at a row    {_value(per_step['cuts'], 1)} times a step; "
        f"{_value(per_step['cut_tokens'])} tokens a step continue an earlier row",
        f"  mixture in {unit:<10} off by {mixture[unit]['error_points_worst_step']:.2f} points in the worst sampled "
        "step, "
        f"{mixture[unit]['error_points_median_step']:.2f} in the median, {mixture[unit]['error_points_sampled']:.3f} "
        "over all of them",
    ]
    for name in ("samples", "tokens"):
        lines.append(
            f"    in {name:<16}  "
            + ", ".join(f"{kind} {100 * share:.2f} %" for kind, share in mixture[name]["overall"].items())
        )
    lines += ["", *_sources(forecast["sources"])]
    lines += [f"  not used: {name} ({reason})" for name, reason in forecast["unused"].items()]
    lines += ["", *_ranks(forecast), "", *_reads(forecast)]
    return "\n".join(lines)


def _value(figure: dict[str, float], digits: int = 0) -> str:
    return f"{figure['mean']:,.{digits}f}"


def _sources(sources: Sequence[dict[str, Any]]) -> list[str]:
    head = (
        "source",
        "kind",
        "samples",
        "tokens each",
        "a step",
        "epochs",
        "+-",
        "begins again at step",
        "truncated %",
        "passed over %",
    )
    rows = [
        (
            source["name"],
            source["kind"],
            f"{source['samples']:,}",
            f"{source['mean_tokens']:,.1f}",
            f"{source['documents_per_step']:,.1f}",
            f"{source['epochs']:.3f}",
            f"{source['epochs_plus_minus']:.3f}",
            ", ".join(f"{step:,}" for step in source["repeats_at_steps"])
            + (", ..." if source["epochs"] >= len(source["repeats_at_steps"]) + 1 else "")
            or "never",
            f"{source['truncated_percent']:.3f}",
            f"{source['passed_over_percent']:.3f}",
        )
        for source in sources
    ]
    return ["  " + line for line in aligned([head, *rows], left=(0, 1, 7))]


def _ranks(forecast: dict[str, Any]) -> list[str]:
    kinds = list(forecast["ranks"][0]["step"]["some_rank_lacks"])
    rows = [["ranks", "rows each", "max/mean FLOPs", "lost %", "worst", "max/mean a micro-batch", "lost %"]]
    rows[0] += [f"no {kind} %" for kind in kinds]
    for entry in forecast["ranks"]:
        if entry["world"] not in SHOWN_WORLDS and entry["world"] != forecast["world"]:
            continue
        step, micro = entry["step"], entry.get("micro_batch")
        row = [f"{entry['world']}{' *' if entry['world'] == forecast['world'] else ''}", str(entry["rows_per_rank"])]
        row += [f"{step['max_over_mean']:.4f}", f"{step['lost_percent']:.2f}", f"{step['worst']:.3f}"]
        row += [f"{micro['max_over_mean']:.4f}", f"{micro['lost_percent']:.2f}"] if micro else ["-", "-"]
        for kind in kinds:
            lacks = [f"{100 * part['some_rank_lacks'][kind]:.1f}" for part in (step, micro) if part]
            row.append(", ".join(lacks))
        rows.append(row)
    return [
        *("  " + line for line in aligned(rows, left=())),
        "  lost: share of all arithmetic during which the other ranks wait, if ranks meet once a step, "
        "or once a micro-batch (ZeRO-3 does);"
        " * this run",
        "  FLOPs are those of MFU, with attention over the full square of a document: "
        "causal kernels do half of it, so long texts weigh less",
        "  no KIND: share of steps, and of micro-batches, in which at least one rank has no document of the kind",
    ]


def _reads(forecast: dict[str, Any]) -> list[str]:
    reads = forecast["reads"]
    if reads["step_seconds"] is None:
        lines = [
            "  reads a step; state its time with --step-seconds for those a second (FLOPs alone do not tell it here):"
        ]
    else:
        origin = (
            "stated"
            if reads["step_seconds_stated"]
            else "what the FLOPs take at 40 % of logging.peak_tflops; state it with --step-seconds"
        )
        lines = [f"  reads, with a step in {reads['step_seconds']:.2f} s ({origin}):"]
    names = {
        "samples": "samples",
        "bytes_with_pictures": "bytes, generation images read",
        "bytes_with_ids": "bytes, all VQ ids stored",
        "bytes_as_stored_now": "bytes, ids as they are stored now",
    }
    for key, name in names.items():
        bytes_read = key != "samples"
        unit, scale = (" MiB", 2**20) if bytes_read else ("", 1)
        a_step = f"{reads['per_step'][key] / scale:,.{int(bytes_read)}f}{unit}"
        line = f"    {name:<34} {a_step:>14} a step"
        if reads["per_node_per_second"] is not None:
            a_second = f"{reads['per_node_per_second'][key] / scale:,.{1 + bytes_read}f}{unit}"
            line += f" {a_second:>14} a second and node"
        lines.append(line)
    return lines
