"""The loaders that others use, on the same samples: webdataset, Megatron-Energon, MosaicML Streaming. Each reads,
decodes, tokenises and packs.

All use the loader's own image function and the bare loop's tokenizer call, and lay rows out with the same few array
operations (`RowMaker`), so that what differs is the loader. None shuffles, which is to their advantage. Energon and
Streaming pin other versions of what jp_train uses; `install` puts them, without their dependencies' dependencies, into
a folder that only this benchmark looks into.
"""

from __future__ import annotations

import importlib
import itertools
import json
import site
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, IterableDataset

from jp_train.config.schema import RunConfig
from jp_train.data.image import load_generation_image
from jp_train.data.shards import expand_shards
from jp_train.data.tokenizer import load_tokenizer
from loaders.samples import NPY_HEADER
from loaders.sides import plain_encode

PACKAGES = [
    "megatron-energon==7.4.1",
    "mosaicml-streaming==0.13.0",
    "multi-storage-client==1.3.1",
    "s3fs==2026.9.0",
    "aiobotocore==3.10.0",
    "botocore==1.43.117",
    "aiohttp==3.14.5",
    "aiohappyeyeballs==2.7.1",
    "aioitertools==0.13.0",
    "aiosignal==1.4.0",
    "attrs==26.1.0",
    "bracex==3.2.2",
    "brotli==1.2.1",
    "catalogue==2.0.10",
    "cffi==2.1.1",
    "cramjam==2.14.0",
    "deprecation==2.1.0",
    "filetype==1.2.0",
    "frozenlist==1.8.0",
    "jmespath==1.1.0",
    "jsonschema==4.26.0",
    "jsonschema-specifications==2025.9.1",
    "lark==1.3.1",
    "mfusepy==3.1.1",
    "multidict==7.2.1",
    "prettytable==3.18.0",
    "propcache==0.5.4",
    "pycparser==3.12",
    "pyroute2==0.9.7",
    "python-dateutil==2.9.0.post0",
    "python-snappy==0.7.3",
    "rapidyaml==0.15.2",
    "referencing==0.37.0",
    "rpds-py==2026.9.1",
    "six==1.17.0",
    "wcmatch==10.2.1",
    "wcwidth==0.9.4",
    "wrapt==2.5.2",
    "xattr==1.3.0",
    "yarl==1.25.1",
    "zlib-state==0.1.13",
    "zstd==1.5.7.2",
]


def install(folder: Path) -> None:
    """Put the rivals into `folder`. Raises subprocess.CalledProcessError when pip cannot get them."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--target",
        str(folder),
    ]
    subprocess.run([*command, *PACKAGES], check=True)


Document: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Token ids, and the image or its VQ ids."""
StartRows: TypeAlias = "Callable[[RunConfig, RowMaker], Iterable[dict[str, torch.Tensor]]]"
"""A loader's endless rows, from a configuration."""


class RowMaker:
    """Samples -> rows ready for the device: ids, labels and image labels int64 [T], cu_seqlens, images uint8 or
    ids stacked."""

    def __init__(self, cfg: RunConfig) -> None:
        tokenizer = load_tokenizer(cfg.tokenizer)
        special = tokenizer.special
        self._encode = plain_encode(tokenizer)
        self._size, self.seq_len = cfg.model.vision.image_size, cfg.data.seq_len
        slots = (cfg.model.vision.image_size // cfg.model.vision.patch_size) ** 2
        self._lead = np.array([special.bos])
        self._tail = np.array([special.boi, *[special.image_placeholder] * slots, special.eoi, special.eos])
        self._after = np.full(3, -100)

    def encode(self, image: bytes, caption: bytes, *, is_image: bool) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a document, and its image or ids."""
        ids = np.concatenate([self._lead, self._encode(json.loads(caption)["caption"]), self._tail])
        if is_image:
            return ids, load_generation_image(image, self._size)
        return ids, np.frombuffer(image, np.uint16, offset=NPY_HEADER)

    def row(self, documents: list[Document]) -> dict[str, torch.Tensor]:
        """One packed row."""
        lengths = [len(ids) for ids, _ in documents]
        targets = []
        for ids, image in documents:
            slots = np.full(len(self._tail) - 3, -1) if image.ndim == 3 else image
            targets += [np.full(len(ids) - len(self._tail), -100), slots, self._after]
        row = {
            "input_ids": np.concatenate([ids for ids, _ in documents]),
            "labels": np.full(sum(lengths), -100),
            "gen_labels": np.concatenate(targets, dtype=np.int64),
            "position_ids": np.concatenate([np.arange(length) for length in lengths]),
            "cu_seqlens": np.cumsum([0, *lengths], dtype=np.int32),
            "images": np.stack([image for _, image in documents]),
        }
        return {name: torch.from_numpy(array) for name, array in row.items()}

    def next_fit(self, documents: Iterable[Document]) -> Iterator[dict[str, torch.Tensor]]:
        """Rows that close as soon as the next document does not fit."""
        held: list[Document] = []
        room = self.seq_len
        for document in documents:
            if len(document[0]) > room:
                yield self.row(held)
                held, room = [], self.seq_len
            held.append(document)
            room -= len(document[0])


class Rival:
    """A side over an endless iterator of rows, made by `start(workers)`."""

    def __init__(self, name: str, cfg: RunConfig, start: StartRows) -> None:
        self.name = name
        self._rows = iter(start(cfg, RowMaker(cfg)))

    def advance(self, samples: int) -> tuple[int, int]:
        done = rows = 0
        while done < samples:
            done += len(next(self._rows)["cu_seqlens"]) - 1
            rows += 1
        return done, rows

    def processes(self) -> list[psutil.Process]:
        return [
            process for process in psutil.Process().children() if "resource_tracker" not in " ".join(process.cmdline())
        ]

    def close(self) -> None:
        self._rows = iter(())


def webdataset_rows(cfg: RunConfig, maker: RowMaker) -> Iterable[dict[str, torch.Tensor]]:
    """webdataset 1.0: tars read from front to back, decode and transform in `map`, next-fit."""
    import webdataset

    is_image = cfg.data.sources["bench"].shards.startswith("photos")
    member = "jpg" if is_image else "vq.npy"
    urls = expand_shards(cfg.data.sources["bench"].shards, cfg.data.root)
    samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).repeat()
    samples = samples.map(lambda sample: maker.encode(sample[member], sample["json"], is_image=is_image))
    return _loaded(_Packed(samples, maker), cfg.data.workers)


def energon_rows(cfg: RunConfig, maker: RowMaker) -> Iterable[dict[str, torch.Tensor]]:
    """Megatron-Energon: a crude dataset with a cooker, packing over a buffer of 100 samples (longest first, first
    fit)."""
    from megatron import energon

    folder = _energon_folder(cfg)
    is_image = cfg.data.sources["bench"].shards.startswith("photos")
    member = "jpg" if is_image else "vq.npy"

    @energon.stateless
    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        return dict(sample)

    class Encoder(energon.TaskEncoder):
        cookers = (energon.Cooker(cook),)
        decoder = None

        @energon.stateless
        def encode_sample(self, sample: Any) -> Any:
            return maker.encode(sample[member], sample["json"], is_image=is_image)

        def select_samples_to_pack(self, samples: Any) -> Any:
            rows: list[list[Any]] = []
            rooms: list[int] = []
            for document in sorted(samples, key=lambda document: -len(document[0])):
                place = next((n for n, room in enumerate(rooms) if room >= len(document[0])), len(rows))
                if place == len(rows):
                    rows.append([])
                    rooms.append(maker.seq_len)
                rows[place].append(document)
                rooms[place] -= len(document[0])
            return rows

        @energon.stateless
        def pack_selected_samples(self, samples: Any) -> Any:
            return maker.row(samples)

    dataset = energon.get_train_dataset(
        folder,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=cfg.data.workers),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        packing_buffer_size=100,
        task_encoder=Encoder(),
    )
    return energon.get_loader(dataset)


def streaming_rows(cfg: RunConfig, maker: RowMaker) -> Iterable[dict[str, torch.Tensor]]:
    """MosaicML Streaming: MDS shards of the same bytes, next-fit."""
    streaming = _import_streaming()
    is_image = cfg.data.sources["bench"].shards.startswith("photos")
    folder = Path(cfg.data.root) / ("mds-photos" if is_image else "mds-ids")
    if not (folder / "index.json").exists():
        import webdataset

        urls = expand_shards(cfg.data.sources["bench"].shards, cfg.data.root)
        with streaming.MDSWriter(out=str(folder), columns={"image": "bytes", "json": "bytes"}) as writer:
            for sample in webdataset.WebDataset(urls, shardshuffle=False):
                writer.write({"image": sample["jpg" if is_image else "vq.npy"], "json": sample["json"]})
    streaming.base.util.clean_stale_shared_memory()
    samples = streaming.StreamingDataset(local=str(folder), shuffle=False, batch_size=1)

    def encoded() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for sample in itertools.chain.from_iterable(itertools.repeat(samples)):
            yield maker.encode(sample["image"], sample["json"], is_image=is_image)

    return _loaded(_Packed(encoded, maker), cfg.data.workers)


RIVALS = {"webdataset": webdataset_rows, "Megatron-Energon": energon_rows, "MosaicML Streaming": streaming_rows}


def available(folder: Path) -> dict[str, StartRows]:
    """The rivals that can be imported, from here or from `folder`; a line on stderr for each that cannot."""
    if folder.is_dir():
        site.addsitedir(str(folder))
    importable: dict[str, StartRows] = {}
    for name, start in RIVALS.items():
        module = {
            "webdataset": "webdataset",
            "Megatron-Energon": "megatron.energon",
            "MosaicML Streaming": "streaming",
        }[name]
        try:
            _import_streaming() if module == "streaming" else importlib.import_module(module)
            importable[name] = start
        except Exception as error:  # whatever a foreign package raises while it is imported
            print(
                f"bench: {name} is left out: {type(error).__name__}: {error} (`--install` fetches it)", file=sys.stderr
            )
    return importable


class _Packed(IterableDataset[dict[str, torch.Tensor]]):
    def __init__(self, documents: Iterable[Document] | Callable[[], Iterator[Document]], maker: RowMaker) -> None:
        self._documents, self._maker = documents, maker

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self._maker.next_fit(self._documents() if callable(self._documents) else self._documents)


def _loaded(dataset: IterableDataset[dict[str, torch.Tensor]], workers: int) -> Iterable[dict[str, torch.Tensor]]:
    return DataLoader(dataset, batch_size=None, num_workers=workers) if workers else dataset


def _import_streaming() -> types.ModuleType:
    """Streaming imports torchvision for its ready-made image datasets, which are not used here: a stand-in serves
    while it is imported."""
    import transformers  # noqa: F401  - it looks for torchvision while it is imported, and must not find the stand-in

    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    stands_in = {name: types.ModuleType(name) for name in names if "torchvision" not in sys.modules}
    sys.modules.update(stands_in)
    for name, attribute in (
        ("torchvision.datasets", "VisionDataset"),
        ("torchvision.transforms.functional", "to_tensor"),
    ):
        if name in stands_in:
            setattr(stands_in[name], attribute, object)
    try:
        return importlib.import_module("streaming")
    finally:
        for name in stands_in:
            del sys.modules[name]


def _energon_folder(cfg: RunConfig) -> Path:
    """A folder with links to the shards, prepared by Energon's own tool."""
    folder = Path(cfg.data.root) / f"energon-{cfg.data.sources['bench'].shards.split('-')[0]}"
    if (folder / ".nv-meta" / "dataset.yaml").exists():
        return folder
    folder.mkdir(exist_ok=True)
    for path in map(Path, expand_shards(cfg.data.sources["bench"].shards, cfg.data.root)):
        link = folder / path.name
        if not link.exists():
            link.hardlink_to(path)
    code = "import sys; from megatron.energon.cli.main import main; sys.argv[0] = 'energon'; main()"
    options = [
        "prepare",
        str(folder),
        "--split-ratio",
        "1,0,0",
        "--sample-type",
        "CrudeWebdataset",
        "--non-interactive",
        "--num-workers",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-c", f"import site; [site.addsitedir(p) for p in {sys.path!r}]; {code}", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"energon prepare failed: {done.stderr[-500:]}")
    return folder
