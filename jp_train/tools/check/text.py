"""The plan of `jp-train check` as text."""

from __future__ import annotations

from typing import Any

from jp_train.types import Kind


def format_check(plan: dict[str, Any]) -> str:
    """For people: problems first, then warnings, then the plan."""
    lines = [f"PROBLEM: {problem}" for problem in plan["problems"]] or ["no problem found"]
    lines += [f"warning: {warning}" for warning in plan["warnings"]]
    steps = plan["steps"]
    early = f", stopped early at {steps['stops_at']:,}" if steps["stops_at"] != steps["training_steps"] else ""
    lines += ["", f"{plan['stage']} -> {plan['run_dir']}", f"  steps       {steps['training_steps']:,}{early}"]
    if "run_folder" in plan and plan["run_folder"]["step"] is not None:
        lines.append(f"  run folder  {_run_folder_text(plan['run_folder'])}")
    if "batch" in plan:
        lines.append(f"  batch       {plan['batch']['text']}")
    optimizer = plan["optimizer"]
    lines.append(
        f"  optimizer   lr {optimizer['lr']:g} {optimizer['schedule']}, warm-up {optimizer['warmup_steps']:,}, decay "
        f"{optimizer['weight_decay']:g}"
    )
    lines += _mixture_lines(plan)
    if "parameters" in plan:
        counts = plan["parameters"]
        lines.append(f"  parameters  {counts['total']:,}, of which {counts['trainable']:,} learn:")
        for name, number in counts["modules"].items():
            lines.append(
                f"    {name:<18}{number:>16,}  {'learns' if name in counts['trainable_modules'] else 'frozen'}"
            )
    if "tokenizer" in plan:
        lines.append(f"  tokenizer   {plan['tokenizer']['path']}, {plan['tokenizer']['entries']:,} entries")
    if "weights" in plan:
        lines.append(f"  weights     {_weights_text(plan['weights'])}")
    if "sources" in plan:
        from jp_train.tools.index import left_out  # heavy, and loaded already where there are sources

        lines += [
            "",
            f"  {'source':<22}{'kind':<15}{'shards':>8}{'samples':>12}{'bad':>6}{'tokens each':>13}{'epochs':>9}",
        ]
        for row in plan["sources"]:
            epochs = "-" if row["epochs"] is None else f"{row['epochs']:.2f}"
            lines.append(
                f"  {row['name']:<22}{row['kind']:<15}{row['shards']:>8,}{row['samples']:>12,}{row['bad']:>6,}"
                f"{row['mean_tokens']:>13,.1f}{epochs:>9}"
            )
        lines.append("  tokens are in this stage's template: every stage has an index of its own (jp-train data index)")
        filtered = [(row["name"], row["filtered"]) for row in plan["sources"]]
        filtered += [(f"validation/{name}", counts) for name, counts in plan.get("held_out", {}).items()]
        lines += [f"  {line}" for name, counts in filtered for line in left_out(name, counts)]
        lines += _ids_lines(plan["sources"], plan.get("vq_ids"))
    return "\n".join(lines)


def _run_folder_text(folder: dict[str, Any]) -> str:
    accepted = f", with accepted differences: {'; '.join(folder['accepted'])}" if folder["accepted"] else ""
    return f"{'finished at' if folder['finished'] else 'goes on after'} step {folder['step']:,}{accepted}"


def _mixture_lines(plan: dict[str, Any]) -> list[str]:
    """The shares as they are configured, and what they come to in samples and in tokens."""
    shares = plan["mixture"]["shares"]
    lines = [
        f"  mixture     {' : '.join(f'{value:g}' for value in shares.values())} ({' : '.join(shares)}, in "
        f"{plan['mixture']['unit']})"
    ]
    for unit, of_kinds in plan.get("shares", {}).items():
        lines.append(
            f"    in {unit:<9}{', '.join(f'{kind} {100 * share:.1f} %' for kind, share in of_kinds.items() if share)}"
        )
    return lines


def _ids_lines(sources: list[dict[str, Any]], vq: dict[str, Any] | None) -> list[str]:
    """Which generation sources have stored VQ ids, and whether those are of the starting weights (`vq` is None where
    they are not, which is a problem of its own)."""
    ours = vq and vq["fingerprint"]
    unread = "" if vq is None or ours else "; not compared: the starting weights cannot be used"
    lines = [
        f"  VQ ids of {row['name']}: fingerprint {fingerprint} for {shards:,} of {row['shards']:,} shards"
        f"{', as in the starting weights' if fingerprint == ours else unread}"
        for row in sources
        for fingerprint, shards in row["vq_ids"].items()
    ]
    without = [row["name"] for row in sources if row["kind"] == str(Kind.GENERATION) and not row["vq_ids"]]
    if without:
        lines.append(
            f"  no VQ ids stored for {', '.join(without)}: images are encoded in training (jp-train data "
            "encode-images does it once)"
        )
    return lines


def _weights_text(weights: dict[str, Any]) -> str:
    remark = weights["remark"]
    if "init_from" in weights:
        return f"{weights['init_from']}: all {weights['tensors']} tensors fit{remark}"
    if weights["init_parts"]:
        parts = ", ".join(f"{name} from {part['path']}" for name, part in weights["init_parts"].items())
        return f"{parts}; the rest fresh{remark}"
    return "all fresh (random)"
