"""Batch arithmetic: global batch = micro_batch_rows x gradient_accumulation_steps x dp_world_size, in rows, without
a remainder."""

from __future__ import annotations

from dataclasses import dataclass

from jp_train.config.choices import BatchUnit
from jp_train.config.schema import RunConfig
from jp_train.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How one optimizer step's rows are spread. `samples_per_row` is None where a batch counts packed rows."""

    rows_per_step: int
    micro_batch_rows: int
    gradient_accumulation_steps: int
    dp_world_size: int
    samples_per_row: int | None
    seq_len: int

    def describe(self) -> str:
        """One sentence for the log, like `512 rows = 1 rows x 4 accumulation x 128 ranks, at most 2,097,152 tokens`."""
        text = (
            f"{self.rows_per_step} rows a step = {self.micro_batch_rows} micro-batch rows x "
            f"{self.gradient_accumulation_steps} accumulation x {self.dp_world_size} ranks, at most "
            f"{self.rows_per_step * self.seq_len:,} tokens"
        )
        if self.samples_per_row is not None:
            text += f" ({self.rows_per_step * self.samples_per_row} samples, {self.samples_per_row} a row)"
        return text


def rows_per_step(config: RunConfig) -> int:
    """Packed rows of one optimizer step. Raises ConfigError when the samples do not fill whole rows."""
    stage = config.stage
    if stage.batch_unit is BatchUnit.packed:
        return stage.batch_size
    rows, rest = divmod(stage.batch_size, stage.samples_per_row)
    if rest or rows == 0:
        raise ConfigError(
            f"stage.batch_size {stage.batch_size} samples is not a multiple of stage.samples_per_row "
            f"{stage.samples_per_row}; valid samples_per_row: {_divisors(stage.batch_size)}"
        )
    return rows


def batch_plan(config: RunConfig, dp_world_size: int, *, shrink: bool = False) -> BatchPlan:
    """The batch of every rank for this world size.

    `shrink`, for a run that goes on with another number of ranks: where the rows of a rank are no multiple of
    engine.micro_batch_rows, the largest smaller micro-batch that fits is taken. The rows of a step and the loss do not
    depend on it.

    Raises ConfigError when dp_world_size x micro_batch_rows does not divide the rows of a step, naming the nearest
    valid sizes.
    """
    rows = rows_per_step(config)
    micro = config.engine.micro_batch_rows
    if dp_world_size < 1:
        raise ConfigError(f"the data-parallel world size must be at least 1, found {dp_world_size}")
    if shrink and rows % dp_world_size == 0:
        micro = next(
            fitting
            for fitting in range(min(micro, rows // dp_world_size), 0, -1)
            if rows // dp_world_size % fitting == 0
        )
    if rows % (dp_world_size * micro):
        valid = valid_world_sizes(config)
        near = sorted(valid, key=lambda size: (abs(size - dp_world_size), size))[:4]
        hint = (
            f"nearest world sizes with {micro} micro-batch row(s): {', '.join(map(str, sorted(near)))}"
            if near
            else f"engine.micro_batch_rows {micro} does not divide {rows} rows; valid: {_divisors(rows)}"
        )
        raise ConfigError(
            f"{rows} rows a step cannot be split over {dp_world_size} ranks x {micro} micro-batch row(s) "
            f"(stage.batch_size {config.stage.batch_size} {config.stage.batch_unit.value}); {hint}"
        )
    return BatchPlan(
        rows_per_step=rows,
        micro_batch_rows=micro,
        gradient_accumulation_steps=rows // (dp_world_size * micro),
        dp_world_size=dp_world_size,
        samples_per_row=config.stage.samples_per_row if config.stage.batch_unit is BatchUnit.samples else None,
        seq_len=config.data.seq_len,
    )


def valid_world_sizes(config: RunConfig) -> list[int]:
    """Every data-parallel world size that divides the rows of a step, smallest first."""
    rows = rows_per_step(config)
    return [size for size in _divisors(rows) if (rows // size) % config.engine.micro_batch_rows == 0]


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
