"""A forecast as text for a terminal."""

from __future__ import annotations

from typing import Any

from jp_train.terminal import aligned, printable

PARTS = (
    ("parameters", "param"),
    ("optimizer", "optim"),
    ("gradients", "grad"),
    ("reduce_bucket", "bucket"),
    ("secondary", "hpZ copy"),
    ("vq", "VQ"),
    ("activations", "activ"),
    ("gathered", "gathered"),
    ("reducing", "reducing"),
)
"""Parts of a GPU's memory in the order of table and image."""


def format_forecast(forecast: dict[str, Any]) -> str:
    """Everything on about one screen, the configuration's own line marked with `>`, the best that fits with `*`."""
    cluster, hardware = forecast["cluster"], forecast["hardware"]
    lines = [
        f"{printable(forecast['model'])}, {printable(forecast['stage'])}: {cluster['world']} ranks on "
        f"{cluster['nodes']} node(s), {cluster['gpu']} with {hardware['memory_gib']:g} GiB",
        forecast["batch"],
        "",
        "GiB of one GPU at the peak of its fullest micro-batch, and seconds of a step (overlapped - one after the "
        "other)",
        *_candidates(forecast),
        *_verdict(forecast),
        "",
        *_step(forecast),
        "",
        *_days(forecast),
        "",
        *_advice(forecast),
        "",
        "hardware (change with --hardware name=value): "
        + " ".join(f"{name}={value:g}" for name, value in hardware.items()),
        *(f"taken for granted: {line}" for line in forecast["assumptions"]),
    ]
    return "\n".join(lines)


def _candidates(forecast: dict[str, Any]) -> list[str]:
    rows = [
        [
            "",
            "rows",
            "accum",
            "again",
            "hpZ",
            *(short for _, short in PARTS),
            "overhead",
            "total",
            "fits",
            "step s",
            "MFU",
            "between",
            "bound by",
        ]
    ]
    for candidate in forecast["candidates"]:
        memory = candidate["memory_gib"]
        rows.append(
            [
                (">" if candidate["own"] else "") + ("*" if candidate["best"] else ""),
                str(candidate["micro_batch_rows"]),
                str(candidate["accumulation"]),
                _recomputed(candidate),
                str(candidate["hpz"]),
                *(f"{memory[name]:.2f}" for name, _ in PARTS),
                f"{candidate['overhead_gib']:.2f}",
                f"{candidate['total_gib']:.1f}",
                "yes" if candidate["roomy"] else "barely" if candidate["fits"] else "NO",
                f"{candidate['step_s']:.2f}-{candidate['serial_step_s']:.2f}",
                f"{100 * candidate['mfu']:.0f}%",
                f"{candidate['between_nodes_gib']:.0f}",
                candidate["bound"],
            ]
        )
    return aligned(rows, left=(0, 3, len(rows[0]) - 1))


def _recomputed(candidate: dict[str, Any]) -> str:
    if not candidate["activation_checkpointing"]:
        return "no"
    return "all" if candidate["recompute_every"] == 1 else f"1/{candidate['recompute_every']}"


def _verdict(forecast: dict[str, Any]) -> list[str]:
    current = next(row for row in forecast["candidates"] if row["own"])
    lines = [
        "(> this configuration, * the best that fits; again: layers computed again in the backward pass; "
        "between: GiB a node receives from the others in a step)"
    ]
    if forecast["best"] is None:
        lines.append(
            "NOTHING FITS: use more GPUs, GPUs with more memory, or a smaller "
            "engine.deepspeed.zero_optimization.reduce_bucket_size"
        )
    elif not current["fits"]:
        lines.append(f"THIS CONFIGURATION DOES NOT FIT; the best that does: {forecast['best']}")
    elif forecast["best_is_own"]:
        lines.append("this configuration fits, and is the best of these")
    else:
        lines.append(f"this configuration fits; the best: {forecast['best']}")
    return lines


def _step(forecast: dict[str, Any]) -> list[str]:
    chosen = forecast["chosen"]
    time, flops, sent = chosen["time"], chosen["flops"], chosen["step_communication"]
    rows = [["one micro-batch", "GiB over all ranks", "GiB inside nodes", "calls"]]
    for name, leg in chosen["micro_batch_communication"].items():
        rows.append(
            [name.replace("_", " "), f"{leg['all_ranks_gib']:.2f}", f"{leg['node_gib']:.2f}", f"{leg['calls']:.0f}"]
        )
    seconds = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in time["parts_s"].items())
    return [
        *aligned(rows, left=(0,)),
        f"a step of {sent['micro_batches']} micro-batch(es): a node receives {sent['between_nodes_gib']:.1f} GiB from "
        f"the others, a GPU {sent['inside_node_gib']:.1f} GiB inside its node",
        f"FLOPs a step: {flops['step']:.3g} (forward {flops['forward']:.3g}, backward {flops['backward']:.3g}), "
        f"recomputed {flops['recomputed']:.3g}, VQ encoding {flops['vq_encode']:.3g}; of one GPU {flops['rank']:.3g}",
        f"seconds of a step by work: {seconds}",
        f"step {time['overlapped_s']:.2f} s overlapped, {time['serial_s']:.2f} s not; MFU {100 * time['mfu']:.1f} % "
        f"and {100 * time['serial_mfu']:.1f} %; {time['tokens_per_second_per_gpu']:,.0f} and "
        f"{time['serial_tokens_per_second_per_gpu']:,.0f} tokens/s a GPU; bound by {time['bound']}",
    ]


def _days(forecast: dict[str, Any]) -> list[str]:
    days, training = forecast["days"], forecast["training"]
    lines = [f"{forecast['steps']:,} steps: {days['overlapped']:.2f} days overlapped, {days['serial']:.2f} not"]
    if training:
        stages = ", ".join(
            f"{stage['stage']} {stage['overlapped']:.2f}-{stage['serial']:.2f} ({stage['ranks']} ranks, "
            f"{stage['total_gib']:.0f} GiB)"
            for stage in training["stages"]
        )
        lines.append(f"the three stages: {training['overlapped']:.1f}-{training['serial']:.1f} days: {stages}")
        if training["paper_days"]:
            lines.append(
                f"the paper: about {training['paper_days']} days on {training['paper_nodes']} nodes of 8 A100-40GB"
            )
    return lines


def _advice(forecast: dict[str, Any]) -> list[str]:
    if not forecast["advice"]:
        return ["what would make it faster: none of the variants that were reckoned saves 1 % of a step"]
    rows = [["what would make it faster (each reckoned alone)", "saves", "step s", "GiB", "GPU hours"]]
    for variant in forecast["advice"]:
        rows.append(
            [
                variant["change"],
                f"{100 * variant['gain']:.0f}%",
                f"{variant['step_s']:.2f}-{variant['serial_step_s']:.2f}",
                f"{variant['total_gib']:.0f}",
                f"x {variant['cost']:.2f}",
            ]
        )
    return aligned(rows, left=(0,))
