"""The values that a configuration key may take where they are words. What each means stands at the key that takes
it, in schema.py."""

from __future__ import annotations

from enum import Enum


class BatchUnit(Enum):
    samples = "samples"
    packed = "packed"


class RatioUnit(Enum):
    samples = "samples"
    tokens = "tokens"


class Mix(Enum):
    carry = "carry"
    sampled = "sampled"


class Packing(Enum):
    document = "document"
    causal = "causal"


class Template(Enum):
    stage1 = "stage1"
    stage2 = "stage2"
    stage3 = "stage3"


class PadDropoutForm(Enum):
    every_token = "every_token"
    single_pad = "single_pad"
    empty = "empty"


class ImageEnd(Enum):
    eoi_eos = "eoi_eos"
    eoi = "eoi"
    none = "none"


class ClassPrompt(Enum):
    as_is = "as_is"
    first_lemma = "first_lemma"
    template = "template"


class Crop(Enum):
    centre = "centre"
    random = "random"


class ImageDecode(Enum):
    exact = "exact"
    fast = "fast"


class VqIds(Enum):
    auto = "auto"
    require = "require"
    off = "off"
    trust = "trust"


class TokenIds(Enum):
    auto = "auto"
    off = "off"


class OverLong(Enum):
    truncate = "truncate"
    drop = "drop"


class SourceKind(Enum):
    understanding = "understanding"
    text = "text"
    generation = "generation"


class Reduction(Enum):
    token_mean = "token_mean"
    task_mean = "task_mean"
    sample_mean = "sample_mean"


class Schedule(Enum):
    constant = "constant"
    cosine = "cosine"


class Precision(Enum):
    bf16 = "bf16"
    fp32 = "fp32"


class Init(Enum):
    pretrained = "pretrained"
    random = "random"


class GenEmbedInit(Enum):
    codebook = "codebook"
    random = "random"


class NonfiniteAction(Enum):
    skip = "skip"
    stop = "stop"


class OutlierAction(Enum):
    record = "record"
    skip = "skip"
    stop = "stop"
    off = "off"


# `continue` cannot be written as an attribute
SaveErrorAction = Enum("SaveErrorAction", {"stop": "stop", "continue": "continue"})


class WandbMode(Enum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"
