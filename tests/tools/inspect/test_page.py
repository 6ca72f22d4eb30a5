"""The page of packed rows: what it shows is what the batch holds, and nothing of the data leaves its place."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jp_train.config.schema import MixtureConfig, SourceConfig, SourceKind
from jp_train.data.batch_file import describe_batch
from jp_train.data.batch_text import printable
from jp_train.tools.explain.replay import Replay
from jp_train.tools.inspect.images import EXACT_SIDE, LARGEST_SIDE, ShownImage, data_uri
from jp_train.tools.inspect.page import inspect_page
from jp_train.tools.inspect.row import InspectedRow
from tests.data.data_samples import conversation, generation_samples, json_bytes, png, write_shard

HOSTILE = (
    "<script>alert(1)</script>",
    "</style></title></div></article></section><h1>gone</h1>",
    "\"><img src=https://evil.example/x.png onerror='alert(1)'>",
    "a\u202eb\u2066c\u200fd\ufeff \x00\x07 ]]> <!-- &lt; &amp; `",
    "مرحبا بالعالم <b>שלום</b>",
)
VOID = {"meta", "img", "path", "br"}


class Tree(HTMLParser):
    """Elements with their attributes, parents and text; fails on a tag that is closed out of order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[dict] = []
        self._open: list[dict] = []
        self.feed(page)
        self.close()
        assert not self._open, f"never closed: {[element['tag'] for element in self._open]}"

    def handle_starttag(self, tag, attributes):
        element = {
            "tag": tag,
            "attributes": dict(attributes),
            "text": "",
            "within": [element["tag"] for element in self._open],
            "inside": list(self._open),
        }
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self._open and self._open[-1]["tag"] == tag, (
            f"</{tag}> closes {self._open[-1]['tag'] if self._open else 'nothing'}"
        )
        self._open.pop()

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag: str, name: str | None = None) -> list[dict]:
        return [
            element
            for element in self.elements
            if element["tag"] == tag and (name is None or name in element["attributes"].get("class", "").split())
        ]


def inspected(micro, tokenizer, with_images=True) -> list[InspectedRow]:
    rows, start = [], 0
    for described, row in zip(
        describe_batch(micro.batch, tokenizer, first_row=micro.first_row, specs=micro.specs), micro.rows, strict=True
    ):
        end = start + described["tokens"]
        shown = {
            place: [ShownImage(pixels=image, title=HOSTILE[2])]
            for place, document in enumerate(row.documents)
            for image in (*(() if document.und_images is None else document.und_images), document.gen_image)
            if image is not None and with_images
        }
        rows.append(
            InspectedRow(
                described=described,
                images=shown,
                vq_ids={},
                **{
                    name: getattr(micro.batch, name)[start:end].numpy()
                    for name in ("input_ids", "position_ids", "labels")
                },
            )
        )
        start = end
    return rows


def page_of(rows, cfg, tokenizer) -> str:
    return inspect_page(
        rows,
        title=HOSTILE[0],
        about=HOSTILE[1],
        sources={name: source.kind.value for name, source in cfg.data.sources.items()},
        tokenizer=tokenizer,
        notes=HOSTILE,
    )


@pytest.fixture
def hostile(cfg, tmp_path):
    """Sources whose names, keys, texts and captions all try to get out; one broken image."""
    key = '"><script>x'
    write_shard(
        tmp_path / "gen.tar",
        [
            (f"{key}{n}", {"png": png(n)[:50] if n == 2 else png(n), "json": json_bytes({"caption": HOSTILE[n % 5]})})
            for n, _ in enumerate(generation_samples(9))
        ],
    )
    write_shard(tmp_path / "text.tar", [(f"t{n}{key}", {"txt": (HOSTILE[n % 5] * (1 + n)).encode()}) for n in range(9)])
    write_shard(
        tmp_path / "und.tar",
        [
            (f"u{n}{key}", {"png": png(n), "json": conversation(f"<image>\n{HOSTILE[n % 5]}", HOSTILE[n % 4])})
            for n in range(9)
        ],
    )
    cfg.data.root = str(tmp_path)
    cfg.data.sources = {
        '<script>"': SourceConfig(kind=SourceKind.generation, shards="gen.tar"),
        "</style>": SourceConfig(kind=SourceKind.text, shards="text.tar"),
        "und\u202e": SourceConfig(kind=SourceKind.understanding, shards="und.tar"),
    }
    cfg.stage.mixture = MixtureConfig(understanding=3, text=3, generation=5)
    cfg.stage.batch_unit = type(cfg.stage.batch_unit).packed
    cfg.stage.batch_size = 8
    cfg.engine.micro_batch_rows = 8
    return cfg


@pytest.fixture
def hostile_page(hostile, tokenizer):
    with Replay(hostile) as replay:
        micro = next(iter(replay.micro_batches(1)))
    rows = inspected(micro, tokenizer)
    return rows, page_of(rows, hostile, tokenizer)


def test_a_hostile_text_never_leaves_its_element(hostile_page, tokenizer):
    rows, page = hostile_page
    assert any(row.described["skipped"] for row in rows)
    tree = Tree(page)
    known = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "header",
        "h1",
        "h2",
        "h3",
        "p",
        "div",
        "b",
        "span",
        "nav",
        "a",
        "section",
    }
    known |= {
        "small",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "ul",
        "li",
        "i",
        "mark",
        "svg",
        "path",
        "details",
        "summary",
        "article",
    }
    known |= {"figure", "img", "figcaption", "pre", "footer"}
    assert {element["tag"] for element in tree.elements} <= known
    assert len(tree.all("h1")) == 1 and tree.all("h1")[0]["text"] == HOSTILE[0]
    allowed = {
        "class",
        "id",
        "style",
        "title",
        "href",
        "alt",
        "src",
        "width",
        "height",
        "role",
        "tabindex",
        "dir",
        "scope",
        "open",
        "viewbox",
        "d",
    }
    allowed |= {"preserveaspectratio", "aria-label", "aria-hidden", "lang", "charset", "content", "name", "http-equiv"}
    assert {name for element in tree.elements for name in element["attributes"]} <= allowed
    forbidden = "\x00\x07\u202e\u2066\u200f\ufeff"
    assert not set(page) & set(forbidden)
    page.encode("utf-8")


def test_the_page_loads_nothing_and_its_policy_says_so(hostile_page):
    _, page = hostile_page
    tree = Tree(page)
    for element in tree.elements:
        for name, value in element["attributes"].items():
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
                assert value.startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#")), value[:60]
            if name == "style":
                assert "url(" not in value and re.fullmatch(r"(left|width):[\d.]+%(;width:[\d.]+%)?", value), value
    (style,) = tree.all("style")
    assert not re.search(r"url\(|@import|https?:", style["text"])
    (policy,) = [
        element for element in tree.all("meta") if element["attributes"].get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy["attributes"]["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_links_lead_to_places_of_the_page_and_every_picture_has_a_text(hostile_page):
    tree = Tree(hostile_page[1])
    ids = [element["attributes"]["id"] for element in tree.elements if "id" in element["attributes"]]
    assert len(set(ids)) == len(ids)
    assert {element["attributes"]["href"][1:] for element in tree.all("a")} <= set(ids)
    assert tree.all("img") and all(element["attributes"]["alt"] for element in tree.all("img"))
    assert all(
        element["attributes"].get("aria-label")
        for element in tree.all("svg") + tree.all("a")
        if "bar" in element["within"] or element["tag"] == "svg"
    )


def text_of(element: dict) -> str:
    return element["text"].replace("↵\n", "\n").replace("⇥\t", "\t")


def test_each_document_shows_its_text_and_marks_what_the_text_head_is_to_predict(hostile_page, tokenizer):
    rows, page = hostile_page
    tree = Tree(page)
    marked_documents = 0
    for row in rows:
        for place, document in enumerate(row.described["documents"]):
            a, b = document["row_span"]
            ids, labels = row.input_ids[a:b], row.labels[a:b]
            name = f"r{row.described['row']}d{place}"
            (box,) = [
                element
                for element in tree.all("div", "tokens")
                if any(up["attributes"].get("id") == name for up in element["inside"])
            ]
            marks = [element for element in tree.all("mark") if box in element["inside"]]
            body = "".join(
                text_of(element)
                for element in tree.all("i")
                if box in element["inside"] and "sp" not in element["attributes"].get("class", "")
            )
            assert body == printable(tokenizer.decode(ids))
            targets = [int(token) for token, label in zip(ids[1:], labels[:-1], strict=True) if label != -100]
            inside = [element for element in tree.all("i") if any(up in marks for up in element["inside"])]
            predicted = [
                int(token)
                for element in inside
                for token in element["attributes"]["title"].split(" ×")[0].split(": id ")[1].split()
            ]
            assert predicted == targets
            marked_documents += bool(targets)
            positions = [int(element["attributes"]["title"].split(":")[0]) for element in inside]
            assert all(
                row.input_ids[position] == int(element["attributes"]["title"].split(": id ")[1].split()[0])
                for position, element in zip(positions, inside, strict=True)
            )
            following = [element for element in marks if "next" in element["attributes"].get("class", "")]
            assert len(following) == int(labels[-1] != -100)
    assert marked_documents


def test_the_bar_and_its_lanes_are_to_scale(hostile_page):
    rows, page = hostile_page
    tree = Tree(page)
    for row, bar in zip(rows, tree.all("div", "bar"), strict=True):
        segments = [element for element in tree.all("a") if bar in element["inside"]]
        shares = [
            tuple(float(value) for value in re.findall(r"[\d.]+", element["attributes"]["style"]))
            for element in segments
        ]
        expected = [
            (100 * a / 256, 100 * (b - a) / 256) for a, b in (d["row_span"] for d in row.described["documents"])
        ]
        assert np.allclose(shares, expected, rtol=1e-3)
        (lanes,) = [up for up in bar["inside"] if up["attributes"].get("class") == "lanes"]
        drawn = {}
        for svg in tree.all("svg"):
            if lanes in svg["inside"]:
                (path,) = [element for element in tree.all("path") if svg in element["inside"]]
                drawn[svg["attributes"]["class"]] = path["attributes"]["d"]
        for name, head in (("text-lane", "text"), ("image-lane", "image")):
            spans = [(int(a), int(a) + int(n)) for a, n in re.findall(r"M(\d+) 0h(\d+)", drawn[name])]
            assert spans == [tuple(span) for d in row.described["documents"] for span in d["loss"][head]["spans"]]
        restarts = [int(a) for a in re.findall(r"M(\d+) 19", drawn["position"])]
        assert (
            restarts
            == np.flatnonzero(row.position_ids == 0).tolist()
            == [d["row_span"][0] for d in row.described["documents"]]
        )


@pytest.mark.parametrize("side", [32, EXACT_SIDE, 384])
def test_pictures_are_inlined_exactly_when_small_and_scaled_down_when_large(side):
    smooth = np.linspace(0, 255, 3 * side * side).reshape(3, side, side).astype(np.uint8)
    uri, width, height = data_uri(smooth)
    kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", uri).groups()
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    assert shown.shape == (height, width, 3)
    if side <= EXACT_SIDE:
        assert kind == "png" and np.array_equal(shown, smooth.transpose(1, 2, 0))
    else:
        assert max(width, height) == LARGEST_SIDE and len(uri) < 30_000


def test_every_source_has_its_colour_and_many_sources_still_do(hostile, tokenizer):
    with Replay(hostile) as replay:
        rows = inspected(next(iter(replay.micro_batches(1))), tokenizer, with_images=False)
    sources = {f"other {n}": "text" for n in range(30)} | {
        name: source.kind.value for name, source in hostile.data.sources.items()
    }
    tree = Tree(inspect_page(rows, title="t", about="a", sources=sources, tokenizer=tokenizer))
    (legend,) = [element for element in tree.all("ul") if element["attributes"]["aria-label"] == "Sources"]
    colour = dict(
        zip(
            sources,
            [
                element["attributes"]["class"].split()[1]
                for element in tree.all("span", "swatch")
                if legend in element["inside"]
            ],
            strict=True,
        )
    )
    (style,) = tree.all("style")
    assert all(f".{name}{{--c:#" in style["text"] for name in colour.values())
    for row in rows:
        for place, document in enumerate(row.described["documents"]):
            (article,) = [
                element
                for element in tree.all("article")
                if element["attributes"]["id"] == f"r{row.described['row']}d{place}"
            ]
            assert article["attributes"]["class"].split()[1] == colour[document["source"]]
