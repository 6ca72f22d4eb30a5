"""The structure of a run's configuration: every key, its default, unit and meaning.

OmegaConf structured configs (the subset that versions 2.3 and 2.4 both accept). Numbers in brackets [n] refer to
docs/open_points.md: where the paper is silent there is a key with a default. Presets override the defaults, a launch
YAML overrides the preset, `key=value` overrides all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from jp_train.config.choices import (
    BatchUnit,
    ClassPrompt,
    Crop,
    GenEmbedInit,
    ImageDecode,
    ImageEnd,
    Init,
    Mix,
    NonfiniteAction,
    OutlierAction,
    OverLong,
    Packing,
    PadDropoutForm,
    Precision,
    RatioUnit,
    Reduction,
    SaveErrorAction,
    Schedule,
    SourceKind,
    Template,
    TokenIds,
    VqIds,
    WandbMode,
)

MODULES = ("vision_model", "aligner", "language_model", "gen_embed", "gen_aligner", "gen_head")
"""Names that `stage.trainable` may list. `language_model` includes the token embeddings and the text head (paper,
figure 2); the VQ tokenizer `gen_vision_model` is never trained here."""


@dataclass
class VisionConfig:
    """SigLIP tower for understanding (docs/model.md)."""

    hidden_size: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    image_size: int = 384
    """Side of the square input, in pixels; also the side of generated images."""
    patch_size: int = 16


@dataclass
class VQConfig:
    """LlamaGen VQ tokenizer for generation. Stride is 2 ** (len(channel_multiplier) - 1)."""

    codebook_size: int = 16384
    embed_dim: int = 8
    base_channels: int = 128
    channel_multiplier: List[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    res_blocks: int = 2
    latent_channels: int = 256


@dataclass
class LanguageConfig:
    """DeepSeek-LLM, Llama architecture, no grouped-query attention, text head not tied."""

    hidden_size: int = 2048
    intermediate_size: int = 5632
    layers: int = 24
    heads: int = 16
    vocab_size: int = 102400
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 16384


@dataclass
class InitPartsConfig:
    """Pretrained parts a stage 1 starts from: folders in transformers' format or safetensors / weights-only files."""

    language_model: Optional[str] = None
    vision_model: Optional[str] = None
    gen_vision_model: Optional[str] = None


@dataclass
class ModelConfig:
    name: str = "janus_pro"
    vision: VisionConfig = field(default_factory=VisionConfig)
    vq: VQConfig = field(default_factory=VQConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    init_from: Optional[str] = None
    """Weights the stage starts from: an exported folder, a released one, or a run folder / checkpoint of an earlier
    stage.
    Weights only: the optimizer and the data position start anew."""
    init_parts: InitPartsConfig = field(default_factory=InitPartsConfig)
    init: Init = Init.pretrained
    """`pretrained`: what never trains (modules that are not in `stage.trainable`, and the VQ tokenizer) must have
    weights from `init_from` or `init_parts`; `random`: it may stay random, for tests and measurements of speed. Modules
    that train may start from random weights with either."""
    gen_embed_init: GenEmbedInit = GenEmbedInit.codebook
    """[10] used only when `init_from` is not set."""
    adaptor_init_std: float = 0.02
    """[20] used only when `init_from` is not set; biases start at zero."""


@dataclass
class TokenizerConfig:
    path: Optional[str] = None
    """Folder with a Hugging Face tokenizer, or a SentencePiece .model file."""
    bos: str = "<｜begin▁of▁sentence｜>"
    eos: str = "<｜end▁of▁sentence｜>"
    pad: str = "<｜▁pad▁｜>"
    boi: str = "<begin_of_image>"
    eoi: str = "<end_of_image>"
    image_placeholder: str = "<image_placeholder>"
    user: str = "<|User|>"
    """Plain `User` and `Assistant` in the predecessor Janus."""
    assistant: str = "<|Assistant|>"


@dataclass
class MixtureConfig:
    """Shares of the three kinds; only their proportions matter. A kind at 0 needs no source."""

    understanding: float = 1.0
    text: float = 0.0
    generation: float = 3.0


@dataclass
class EarlyStopConfig:
    at_step: Optional[int] = None
    """[14] Stop after this step although `training_steps` (the schedule's length) is larger: 270000 of 360000 in
    stage 2."""
    patience: Optional[int] = None
    """Stop when the held-out loss has not improved for this many validations (needs `validation.every_steps`)."""


@dataclass
class StageConfig:
    name: str = "stage1"
    trainable: List[str] = field(default_factory=lambda: ["aligner", "gen_embed", "gen_aligner", "gen_head"])
    """Modules that learn; unlisted means frozen."""
    training_steps: int = 20000
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    batch_unit: BatchUnit = BatchUnit.samples
    """[1] what `batch_size` counts: documents, or packed rows of `data.seq_len` tokens."""
    batch_size: int = 256
    """Global batch of one optimizer step, in `batch_unit`."""
    samples_per_row: int = 2
    """Only with `batch_unit: samples`: a row closes after this many documents. Rows a step = batch_size /
    samples_per_row."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    ratio_unit: RatioUnit = RatioUnit.samples
    """[2] what the mixture's shares count."""
    mix: Mix = Mix.carry
    """[3] `carry`: exact over the period; `sampled`: independent draws."""
    template: Template = Template.stage1
    """Token layouts of the documents (docs/model.md)."""


@dataclass
class SourceConfig:
    kind: SourceKind = SourceKind.text
    shards: str = ""
    """Tar shards: a path or URL (http, https, s3, gs, az, hf) with brace expansion or, but for http, a glob:
    `folder/{000000..000127}.tar`, or a folder. Relative to `data.root`."""
    weight: float = 1.0
    """Share within the kind: real 1 and synthetic 1 is the paper's 1:1."""
    from_step: int = 0
    """First step at which the source is used."""
    to_step: Optional[int] = None
    """First step at which it is no longer used (Janus: ImageNet generation until 120000)."""
    fields: Dict[str, str] = field(default_factory=dict)
    """Where the parts of a sample lie, by name: `image`, `caption`, `conversations`, `question` and `answer`, `text`,
    `system`. `txt` is a file, `json:key.list[0]` a place in its JSON, `json:captions[*]` one of a list, drawn anew
    every epoch; `a;b` the first that there is; `left.png, right.png` two images. Empty: the usual names
    (data_recipes/README.md)."""
    filter: List[str] = field(default_factory=list)
    """Conditions on a sample's JSON, all of which it must meet: `width >= 384`, `status == success`,
    `language in [en, de]`, `aspect_ratio <= 2` (width / height). Samples that do not are counted by reason."""
    map: str = ""
    """`module:function` of your own: gets a sample's texts, decoded ({"__key__", "json", "txt", ...}), and returns them
    as `fields` and `filter` are to see them, or None to leave the sample out. Needs `allow_code`; the module must be
    importable on every host. Another version of its file is another index."""
    class_names: str = ""
    """A text file with the name of class i in line i + 1, for class numbers in `.cls` files."""
    class_prompt: ClassPrompt = ClassPrompt.as_is
    """[12] ImageNet-style captions: `first_lemma` keeps the text before the first comma, `template` puts it into
    `class_template`."""
    class_template: str = "a photo of {}"
    license: str = ""
    """A note for people: licence and origin."""


@dataclass
class DataConfig:
    root: str = "."
    sources: Dict[str, SourceConfig] = field(default_factory=dict)
    seq_len: int = 4096
    """Tokens of a packed row, at most."""
    pool_size: int = 32
    """Documents the packer may choose from. More fill rows better (64: 99.98% at 1:0:3, 32: 99.85%), fewer keep each
    single step closer to the ratio (0.38 and 0.26 points in the worst of 200 steps at 1:0:3) and plan faster
    (bench/planner.py)."""
    packing: Packing = Packing.document
    """[5] `document`: block-diagonal attention, positions restart; `causal`: the whole row attends."""
    pad_dropout: float = 0.1
    """[8] probability that a generation sample loses its text condition (unconditional training)."""
    pad_dropout_form: PadDropoutForm = PadDropoutForm.every_token
    """[9]"""
    first_sentence: float = 0.0
    """[16] probability that only the first sentence of a generation caption is used (0.25 in stage 2)."""
    mask_question: bool = False
    """[6] stages 1 and 2: leave the question of an understanding sample unsupervised. Stage 3 always does."""
    supervise_eoi: bool = False
    """[7] train the text head to end an image."""
    image_end: ImageEnd = ImageEnd.eoi_eos
    """[7] what follows a generated image."""
    space_before_boi: bool = False
    """[15] stage 3 generation: a space between `<|Assistant|>:` and the image."""
    crop: Crop = Crop.centre
    """[13] where the long side of a generation image is cropped."""
    image_decode: ImageDecode = ImageDecode.exact
    """`fast` decodes a JPEG at 1/2, 1/4 or 1/8 of its size (scaled DCT) as long as twice the target side is left, and
    then resizes as `exact` does; it pays for images of two megapixels and more and leaves smaller ones, PNG,
    WebP, and sides that the divisor does not divide, exact. At 384 (measured on one core): 2048 x 1536 in 28 ms
    rather than 59, 4032 x 3024 in 88-109 rather than 252-333. Against exact, photographs differ by at most 5 of 255
    grey levels (mean 0.2-0.4, PSNR over 51 dB), drawn pages of coloured text and lines by up to 45 (mean 0.6-1.8,
    PSNR over 36 dB). Stored VQ ids of one are rejected by the other; inference decodes exactly."""
    vq_ids: VqIds = VqIds.auto
    """VQ ids of generation images stored beside the shards (`jp-train data encode-images`). `auto`: used where
    they are, and rejected when they were made with another VQ or transform; `require`: every generation shard must
    have them; `off`: images are read and encoded in training; `trust`: like auto, and `.vq.npy` members of unknown
    origin are taken as they are."""
    token_ids: TokenIds = TokenIds.auto
    """Token ids of texts in the index beside the shards. `auto`: the index holds them (about 2.1 bytes a token with
    102,400 ids) and rows are made of them, so that training reads and tokenises no text; `off`: they are neither
    written nor used, and each text is read and tokenised whenever it is drawn. Rows are the same."""
    over_long: OverLong = OverLong.truncate
    """[22] a document longer than `seq_len`: cut its text, never its image; or drop it."""
    system_prompt: str = (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language."
    )
    """Stage 3 understanding only; empty string for none."""
    caption_question: str = "Describe the image in detail."
    """Stage 2: the question of captions that come without one."""
    max_image_pixels: int = 100_000_000
    """A larger image is rejected before it is decoded (decompression bombs)."""
    workers: int = 2
    """Loader processes per rank; rows do not depend on it."""
    image_threads: int = 1
    """Threads of each loader process (of the trainer, with no workers) that decode and resize the images of a row;
    rows do not depend on it. Two threads do about the work of two workers with one each, for the memory of one; each
    holds one decoded image."""
    prefetch_rows: int = 2
    """Rows each worker prepares ahead."""
    max_bad_share: float = 0.05
    """A source, held out or not, of which more than this share of the samples cannot be used stops the run before its
    start: its index leaves them out, so the rest would be drawn more often. Samples that a `filter` leaves out do not
    count."""
    skip_budget: float = 0.001
    """Bad samples allowed per source, as a share of its samples used so far (at least `skip_minimum` are always
    allowed)."""
    skip_minimum: int = 8
    skip_consecutive: int = 32
    """Bad samples in a row of one source that stop the run."""
    io_retries: int = 20
    """Tries of one read of a shard. The waits between them double from 0.1 s to 10 s, with the default 133 s in all: a
    storage server takes 30 to 60 s to fail over, one for NFS serves nobody for 90 s more. More than
    `engine.stall_timeout_s` in all would let the watchdog end the run first. Looking a shard up at a start is tried at
    most four times."""
    index_dir: str = ""
    """Folder for what is written about shards (index with token ids, VQ ids, exclusions), for data that is read-only or
    in an object store; shared by all hosts. Relative to the current folder. Empty: beside each shard, or in
    `$XDG_CACHE_HOME/jp_train/index` where that cannot be written."""
    snapshot_steps: int = 1000
    """The plan keeps a snapshot of its few integers every this many steps, so that any row is reached by a short
    fold."""


@dataclass
class LrScaleConfig:
    """[21] factors on the learning rate per module."""

    vision_model: float = 1.0
    aligner: float = 1.0
    language_model: float = 1.0
    gen_embed: float = 1.0
    gen_aligner: float = 1.0
    gen_head: float = 1.0


@dataclass
class OptimizerConfig:
    """AdamW (paper, table 2)."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Applied to matrices only; norms and biases are never decayed."""
    clip: float = 1.0
    """Maximum global gradient norm."""
    schedule: Schedule = Schedule.constant
    warmup_steps: int = 0
    warmup_from: float = 0.0
    """[18] factor on lr at the first step of the linear warm-up."""
    lr_scale: LrScaleConfig = field(default_factory=LrScaleConfig)


@dataclass
class LossConfig:
    reduction: Reduction = Reduction.token_mean
    """[4] `token_mean`: one mean over all supervised tokens of the global step; `task_mean`: a mean per head, added;
    `sample_mean`: mean over documents of their mean."""
    text_weight: float = 1.0
    image_weight: float = 1.0
    chunk_tokens: int = 1024
    """Supervised positions whose logits exist at one time: 1024 x 102400 in bf16 are 0.2 GiB."""


@dataclass
class EngineConfig:
    micro_batch_rows: int = 1
    """Rows per rank per forward; gradient accumulation follows from the batch and the world size."""
    activation_checkpointing: bool = True
    recompute_every: int = 1
    """With `activation_checkpointing`: every k-th layer of each tower keeps only its input and is computed again in the
    backward pass; the others keep all. 1: every layer; 3: a third of the arithmetic again, for more memory."""
    deterministic: bool = False
    """Equal bits in every run on the same number and kind of GPUs, resumed or not: PyTorch's deterministic algorithms.
    Without it the backward pass of attention adds in any order on a GPU: the rows are the same, losses to rounding.
    CPUs are deterministic without it."""
    persistence_threshold: int = 100_000
    """ZeRO-3 keeps parameters below this many elements gathered."""
    hpz_partition_size: int = 1
    """ZeRO++ secondary partition: 8 keeps backward's gathers inside a node."""
    collective_timeout_s: float = 1800.0
    """A collective that waits longer is an error, not a silent hang."""
    stall_timeout_s: float = 300.0
    """A rank that makes no progress (no module entered, no row received) for so many seconds makes all ranks write
    their Python stacks, names the rank, step, module and row at fault, and ends the run. Never more than 0.9 x
    `collective_timeout_s`, which is what start-up, the first step, saves, validations and exports may take. 0: off."""
    grace_s: float = 300.0
    """Seconds between the scheduler's stop signal and its kill. A warning says when the longest step and save so far
    take longer together."""
    deepspeed: Dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed keys, merged last, for experts. Those that have an effect stand in `config/deepspeed.py`; a key
    that jp_train owns (batch sizes, clip, dtype, optimizer), that has no effect here, or that DeepSpeed does not know
    is rejected with what to use instead. `{zero_optimization: {offload_optimizer: {device: cpu}}}` keeps master
    weights and moments in host memory (docs/zero3.md)."""
    deepspeed_config: Optional[str] = None
    """A DeepSpeed user's JSON file (path, as `recipe`), merged below `deepspeed` when the configuration is read: the
    resolved configuration has its keys under `deepspeed`, and null here. What jp_train sets must be "auto" or the
    same there."""

    @property
    def recomputed(self) -> int:
        """Every k-th layer is computed again in the backward pass; 0: none."""
        return self.recompute_every if self.activation_checkpointing else 0


@dataclass
class GuardConfig:
    """What happens to a step whose loss or gradient norm is not finite, or far above those of the steps before it
    (`engine/outliers.py`)."""

    nonfinite_action: NonfiniteAction = NonfiniteAction.skip
    """`skip`: the update is left out, weights and optimizer stay bit for bit what they were; `stop`: left out, and
    the run ends."""
    outlier_action: OutlierAction = OutlierAction.record
    """`record`: the update is made, and the step dumped; `skip` and `stop` as above; `off`: outliers are not looked
    for."""
    outlier_window: int = 128
    """Steps before this one that define what is normal: their median, and their spread (1.4826 x the median distance
    from the median)."""
    outlier_factor: float = 20.0
    """A loss or gradient norm is an outlier when it lies this many spreads above the median. A spread counts as at
    least 2% of the median."""
    max_consecutive_skips: int = 3
    """Updates left out in a row that stop the run: one can be a bad document, three are a diverged model."""
    skip_window: int = 1000
    """Steps over which `max_skip_share` counts."""
    max_skip_share: float = 0.02
    """Share of the last `skip_window` steps that may be left out; one more stops the run."""
    max_dumps: int = 20
    """Dumps under RUN_DIR/forensics that a run makes at most; later bad steps are only named in events.jsonl."""
    dump_tensors: bool = False
    """Also store the step's exact input tensors of every rank (up to megabytes an image). The rows can be rebuilt
    without: `jp-train data explain`."""


@dataclass
class CheckpointConfig:
    every_steps: int = 1000
    keep_last: int = 2
    keep_every: int = 0
    """Additionally keep every checkpoint whose step is a multiple of this; 0 for none."""
    keep_best: bool = False
    """Additionally keep the checkpoint with the lowest held-out loss (`val/total`); `checkpoints/best` names it.
    `every_steps` must be a multiple of `validation.every_steps`, so that each checkpoint has its own measurement."""
    background: bool = True
    """Training goes on as soon as weights and optimizer state are copied to host memory (as much again as this rank
    holds, kept for the next save); a thread writes them. False: training waits for the disk."""
    on_error: SaveErrorAction = SaveErrorAction.stop
    """When a save fails (full disk, read-only or deleted folder): `stop` the run, or `continue` and try again at the
    next interval. A save that ends the run (last step, early stop, signal) and fails always is an error."""
    max_failed_saves: int = 3
    """With `on_error: continue`: failed saves in a row that stop the run."""
    resume_from: Optional[int] = None
    """Go back to the checkpoint of this step and train on from there. What came after it is moved to
    RUN_DIR/abandoned, a run folder of its own. Done once: the same command, run again, goes on from its newest
    checkpoint; with another setting that decides what is trained (`optimizer.lr` ...) it goes back again."""
    accept: List[str] = field(default_factory=list)
    """Keys that may differ from the checkpoint that is resumed, like `optimizer.lr`; for the once that they change
    on purpose (events.jsonl keeps it)."""
    export_at_end: bool = True
    """Write `export/` (transformers' format) when the stage ends: the next stage starts from it."""


@dataclass
class ValidationConfig:
    every_steps: int = 0
    """0: only before the first and after the last step, if `sources` are given."""
    sources: Dict[str, SourceConfig] = field(default_factory=dict)
    """Held-out sources; the loss of each is measured on the same documents every time."""
    documents: int = 64
    """Documents per held-out source, from its start."""


@dataclass
class WandbConfig:
    mode: WandbMode = WandbMode.auto
    """`auto`: online when logged in (API key present), offline otherwise. A server that cannot be reached delays
    nothing: the run is then offline, and the console has the command that uploads it later."""
    project: str = "jp_train"
    entity: Optional[str] = None
    group: Optional[str] = None
    name: Optional[str] = None
    tags: List[str] = field(default_factory=list)


A100_TFLOPS = 312.0
"""Dense bf16 arithmetic of an A100."""


@dataclass
class LoggingConfig:
    every_steps: int = 10
    """Console line every N steps; metrics.jsonl and wandb get every step."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    peak_tflops: Optional[float] = None
    """Per device, for MFU. null: of the GPU by its name (`engine/device.py`), 312 (A100, bf16) for unknown ones."""


@dataclass
class RunConfig:
    """The root. `preset` and `recipe` are merged below the file that names them."""

    preset: Optional[str] = None
    """A file of jp_train/presets without its ending: `janus_pro_1b/stage2`."""
    recipe: Optional[str] = None
    """A YAML of data_recipes/ (path, relative to the working directory): it sets `data` keys, sources above all."""
    run_dir: str = "runs/default"
    seed: int = 0
    precision: Precision = Precision.bf16
    allow_code: bool = False
    """Whether functions that sources name (`map`) may be imported and run. A preset or recipe cannot set it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
