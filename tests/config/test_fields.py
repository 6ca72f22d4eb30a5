from __future__ import annotations

import pytest

from jp_train.config import load_config
from jp_train.config.fields import Place, parse_fields, parse_filter, parse_images
from jp_train.errors import ConfigError


def test_a_place_is_a_file_or_a_path_in_its_json_and_a_semicolon_gives_a_second_choice():
    places = parse_fields(
        "generation", {"caption": "TXT; json:a b.captions[0].text;meta.json:c[*]", "image": "jpg;png"}
    )
    assert parse_images("left.PNG;left.jpg, right.png") == (("left.png", "left.jpg"), ("right.png",))
    assert parse_images(None) == ()
    assert places == {
        "caption": (Place("txt"), Place("json", ("a b", "captions", 0, "text")), Place("meta.json", ("c", "*")))
    }
    assert list(map(str, places["caption"])) == [".txt", '"a b.captions[0].text" of .json', '"c[*]" of .meta.json']


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        ("generation", {"text": "txt"}, "kind generation has the fields image, caption"),
        ("text", {"txet": "txt"}, "did you mean 'text'"),
        ("generation", {"caption": ""}, "no place"),
        ("generation", {"caption": "json:"}, "no place"),
        ("generation", {"caption": "json:[0]"}, "no place"),
        ("generation", {"caption": "json:a[x]"}, "no place"),
        ("generation", {"image": "json:picture"}, "extension of the image file"),
        ("generation", {"image": "a.png, b.png"}, "a generation sample has one image, found 2"),
        ("understanding", {"image": "a.png,"}, "no place"),
        ("understanding", {"image": ""}, "no place"),
        ("understanding", {"question": "json:q"}, "belong together"),
    ],
)
def test_a_field_that_cannot_be_is_refused_with_what_can(kind, fields, says):
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        parse_fields(kind, fields)


def test_a_filter_compares_a_place_with_a_value():
    assert parse_filter(" width>=384 ").values == (384.0,)
    assert parse_filter("status == success").values == ("success",)
    assert parse_filter("language in [en, de]").values == ("en", "de")
    assert parse_filter("meta.json:a.b != 3").place == Place("meta.json", ("a", "b"))
    for bad, says in [
        ("width", "cannot be read"),
        ("width => 3", "cannot be read"),
        ("width >= wide", "compares numbers"),
    ]:
        with pytest.raises(ConfigError, match=says):
            parse_filter(bad)


def test_a_run_with_a_wrong_field_is_refused_with_the_source_that_has_it(tmp_path):
    (tmp_path / "run.yaml").write_text("preset: tiny/stage1\n")
    source = "data.sources.laion={kind: generation, shards: x.tar, fields: {capton: txt}}"
    with pytest.raises(ConfigError, match=r"data\.sources\.laion\.fields\.capton.*did you mean 'caption'"):
        load_config(tmp_path / "run.yaml", [source])
