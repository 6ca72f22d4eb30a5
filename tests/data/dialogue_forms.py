"""The forms in which public sets write conversations about images, and what becomes of each: a table for the tests of
samples in place and of `data import conversations`."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

from tests.data.data_samples import png

PICTURES = (png(0), png(1))
QA = (("What?", "A."),)
FIRST, DROPPED = "image put first, as no <image> says where", "last question without an answer dropped"


@dataclass(frozen=True)
class Form:
    """`record`: as in a listing; `turns`: (question, answer) pairs of the sample, `says`: or why there is none;
    `images`: how many it has, 0: it is text. `path_only`: what differs is how the listing names the image, which a
    sample in a tar does not show."""

    record: dict[str, Any]
    turns: tuple[tuple[str, str], ...] = ()
    says: str = ""
    images: int = 1
    system: str = ""
    notes: tuple[str, ...] = ()
    path_only: bool = False


def llava(*values: str, image: Any = "0.png", **more: Any) -> dict[str, Any]:
    """LLaVA's own form: questions and answers in turn."""
    messages = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]
    return {"image": image, "conversations": messages, **more}


def talk(*messages: tuple[str, Any], keys: tuple[str, str] = ("from", "value"), name: str = "conversations") -> dict:
    """Messages of (role, content) with one image."""
    return {"image": "0.png", name: [dict(zip(keys, message, strict=True)) for message in messages]}


def named(image: Any) -> Form:
    return Form(llava("<image>\nWhat?", "A.", image=image), QA, path_only=True)


OPENAI = {"keys": ("role", "content"), "name": "messages"}
BASE64 = base64.b64encode(PICTURES[0]).decode()

FORMS = {
    "plain": Form(llava("<image>\nWhat?", "A."), QA),
    "image_at_end": Form(llava("What?\n<image>", "A."), QA),
    "no_marker": Form(llava("What?", "A."), QA, notes=(FIRST,)),
    "marker_in_second_turn": Form(
        llava("Hi", "Hello", "<image>\nWhat?", "A."), (("Hi", "Hello"), ("<image>\nWhat?", "A."))
    ),
    "marker_in_every_turn": Form(
        llava("<image>\nWhat?", "A.", "<image>\nWhy?", "B."),
        says="2 <image> for 1 image (1 in question 1, 1 in question 2); give one for each, or none at all",
    ),
    "marker_twice": Form(llava("<image><image>\nWhat?", "A."), says="2 <image> for 1 image (2 in question 1)"),
    "marker_in_answer": Form(llava("<image>\nHow?", "Write <image>."), (("How?", "Write <image>."),)),
    "two_images_list": Form(
        llava("<image>\n<image>\nWhich?", "A.", image=["0.png", "1.png"]),
        (("<image>\n<image>\nWhich?", "A."),),
        images=2,
    ),
    "two_images_one_marker": Form(
        llava("<image>\nWhich?", "A.", image=["0.png", "1.png"]),
        says="1 <image> for 2 images (1 in question 1)",
        images=2,
    ),
    "one_image_list": named(["0.png"]),
    "images_plural_one": Form(
        {"images": ["0.png"], **{"conversations": llava("<image>\nWhat?", "A.")["conversations"]}}, QA
    ),
    "system_first": Form(
        talk(("system", "Be brief."), ("human", "<image>\nWhat?"), ("gpt", "A.")), QA, system="Be brief."
    ),
    "system_field": Form(llava("<image>\nWhat?", "A.", system="Be brief."), QA, system="Be brief."),
    "system_later": Form(
        talk(("human", "<image>\nWhat?"), ("gpt", "A."), ("system", "Be brief."), ("gpt", "B.")),
        says="message 3 of the conversation is from 'system', expected 'human'",
    ),
    "gpt_first": Form(
        talk(("gpt", "A."), ("human", "<image>\nWhat?")),
        says="message 1 of the conversation is from 'gpt', expected 'human'",
    ),
    "ends_with_human": Form(llava("<image>\nWhat?", "A.", "Why?"), QA, notes=(DROPPED,)),
    "only_a_question": Form(llava("<image>\nWhat?"), says="ends with an answer; this one has human"),
    "two_humans_in_a_row": Form(
        talk(("human", "<image>"), ("human", "What?"), ("gpt", "A."), ("gpt", "B.")),
        says="message 2 of the conversation is from 'human', expected 'gpt'",
    ),
    "openai_roles": Form(talk(("user", "<image>\nWhat?"), ("assistant", "A."), **OPENAI), QA),
    "openai_system": Form(
        talk(("system", "Be brief."), ("user", "<image>\nWhat?"), ("assistant", "A."), **OPENAI), QA, system="Be brief."
    ),
    "openai_content_list": Form(
        talk(
            ("user", [{"type": "image"}, {"type": "text", "text": "What?"}]),
            ("assistant", [{"type": "text", "text": "A."}]),
            **OPENAI,
        ),
        QA,
    ),
    "openai_image_in_an_answer": Form(
        talk(("user", "<image>\nDraw."), ("assistant", [{"type": "image"}]), **OPENAI),
        says="message 2 is from 'gpt' and has an image; only questions have",
    ),
    "openai_audio_part": Form(
        talk(("user", [{"type": "input_audio"}]), ("assistant", "A."), **OPENAI),
        says="message 1 has a part of type 'input_audio'; text and images are read",
    ),
    "cauldron_texts": Form(
        {"images": ["0.png"], "texts": [{"user": "What?", "assistant": "A.", "source": "vqa"}]}, QA, notes=(FIRST,)
    ),
    "cauldron_two_pairs": Form(
        {"images": ["0.png"], "texts": [{"user": "What?", "assistant": "A."}, {"user": "Why?", "assistant": "B."}]},
        (*QA, ("Why?", "B.")),
        notes=(FIRST,),
    ),
    "from_user_assistant": Form(talk(("user", "<image>\nWhat?"), ("assistant", "A.")), QA),
    "from_USER_caps": Form(talk(("USER", "<image>\nWhat?"), ("ASSISTANT", "A.")), QA),
    "from_a_stranger": Form(
        talk(("tool", "<image>\nWhat?"), ("gpt", "A.")),
        says="message 1 of the conversation is from 'tool', expected 'human' or 'gpt' (user, assistant, system)",
    ),
    "role_human_gpt": Form(talk(("human", "<image>\nWhat?"), ("gpt", "A."), keys=("role", "content")), QA),
    "role_value_mixed": Form(talk(("user", "<image>\nWhat?"), ("assistant", "A."), keys=("role", "value")), QA),
    "from_content_mixed": Form(talk(("human", "<image>\nWhat?"), ("gpt", "A."), keys=("from", "content")), QA),
    "json_string": Form(
        {"image": "0.png", "conversations": json.dumps(llava("<image>\nWhat?", "A.")["conversations"])}, QA
    ),
    "answer_number": Form(talk(("human", "<image>\nWhat?"), ("gpt", 4)), says="message 2 is a int, expected text"),
    "answer_empty": Form(llava("<image>\nWhat?", " "), says="message 2 is empty"),
    "answer_null": Form(
        talk(("human", "<image>\nWhat?"), ("gpt", None)), says="message 2 is a NoneType, expected text"
    ),
    "empty_list": Form({"image": "0.png", "conversations": []}, says="this one has none"),
    "video_marker": Form(llava("<video>\nWhat?", "A.", image=None), says="a question has <video>, and ", images=0),
    "video_marker_beside_an_image": Form(
        llava("<video>\nWhat?", "A."), says="a question has <video>, and there is nothing that it stands for"
    ),
    "image_null_text": Form(llava("Hi", "Hello", image=None), (("Hi", "Hello"),), images=0),
    "image_missing_but_marker": Form(
        llava("<image>\nWhat?", "A.", image=None), says="a question has <image>, and ", images=0
    ),
    "dot_slash": named("./0.png"),
    "windows_path": named("sub\\0.png"),
    "percent_path": named("my%20pic.png"),
    "url_path": Form(
        llava("<image>\nWhat?", "A.", image="http://h/0.png"),
        says="'http://h/0.png' is an address: download the images first (img2dataset)",
        path_only=True,
    ),
    "abs_path_elsewhere": Form(
        llava("<image>\nWhat?", "A.", image="/data/0.png"),
        says="the path '/data/0.png' leaves the image folder",
        path_only=True,
    ),
    "windows_path_outside": Form(
        llava("<image>\nWhat?", "A.", image="..\\0.png"),
        says="the path '../0.png' leaves the image folder",
        path_only=True,
    ),
    "percent_path_outside": Form(
        llava("<image>\nWhat?", "A.", image="%2e%2e/0.png"),
        says="the path '../0.png' leaves the image folder",
        path_only=True,
    ),
    "base64": named(f"data:image/png;base64,{BASE64}"),
    "bare_base64": named(BASE64),
    "broken_base64": Form(
        llava("<image>\nWhat?", "A.", image=f"data:image/png;base64,{BASE64[:-1]}!"), says="no base64", path_only=True
    ),
    "nested_image": named({"bytes": None, "path": "0.png"}),
    "nested_file_name": named({"file_name": "0.png"}),
    "Image_token_caps": Form(llava("<Image>\nWhat?", "A."), QA),
    "img_tags": Form(
        llava("<img>0.png</img>What?", "A."), says="a question has <img>, and there is nothing that it stands for"
    ),
    "image_placeholder_marker": Form(talk(("<|User|>", "<image_placeholder>\nWhat?"), ("<|Assistant|>", "A.")), QA),
    "not_a_list": Form(
        {"image": "0.png", "conversations": {"q": "a"}}, says="the conversation is a dict, expected a list"
    ),
    "list_of_texts": Form(
        {"image": "0.png", "conversations": ["q", "a"]}, says="message 1 of the conversation is a str"
    ),
}
