"""Words about scenes: captions, detailed descriptions, and questions with exact answers.

Every text here is true of the image by construction.  Captions say only what the scene's category asks for
("a circle" leaves the colour free), as GenEval prompts do; descriptions say everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from examples.smoke.scenes import COUNTS, Scene, SceneObject

SECOND_SENTENCE_SHARE = 0.2
"""Share of captions that carry a second sentence (what the first-sentence option of stage 2 cuts off)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question about an image.  ``skill`` is the scene category that it examines."""

    skill: str
    text: str
    answer: str


def article(word: str) -> str:
    """``word`` with the indefinite article that belongs to it."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def named(item: SceneObject) -> str:
    """The object with its colour: "an orange circle"."""
    return article(f"{item.colour} {item.shape}")


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def relation(first: SceneObject, second: SceneObject) -> str:
    """How ``first`` stands to ``second``: "above", "below", "left of" or "right of" (the larger offset decides)."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def scene_prompt(scene: Scene) -> str:
    """The shortest caption of the scene: what an image must show to be right in its category."""
    first = scene.objects[0]
    if scene.category == "single":
        return article(first.shape)
    if scene.category == "colours":
        return named(first)
    if scene.category == "counting":
        return f"{COUNTS[len(scene.objects)]} {plural(first.shape)}"
    second = scene.objects[1]
    if scene.category == "two":
        return f"{article(first.shape)} and {article(second.shape)}"
    if scene.category == "position":
        return f"{article(first.shape)} {relation(first, second)} {article(second.shape)}"
    return f"{named(first)} and {named(second)}"


def scene_detail(scene: Scene) -> str:
    """The full description: every colour, count and position."""
    first = scene.objects[0]
    if len(scene.objects) == 1:
        return f"{named(first)} in the {first.cell}."
    if scene.category == "counting":
        return f"{COUNTS[len(scene.objects)]} {first.colour} {plural(first.shape)}."
    return f"{named(first)} {relation(first, scene.objects[1])} {named(scene.objects[1])}."


def scene_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A training caption: the prompt, sometimes the full description, sometimes both as two sentences."""
    draw = rng.random()
    if draw < SECOND_SENTENCE_SHARE:
        return f"{scene_prompt(scene)}. It shows {scene_detail(scene)}"
    if draw < 2 * SECOND_SENTENCE_SHARE:
        return scene_detail(scene)
    return scene_prompt(scene)


def scene_questions(scene: Scene) -> tuple[Question, ...]:
    """All questions that the scene answers, in a fixed order."""
    first = scene.objects[0]
    if len(scene.objects) == 1:
        return (
            Question(skill="single", text="What shape is this?", answer=first.shape),
            Question(skill="colours", text=f"What colour is the {first.shape}?", answer=first.colour),
            Question(skill="position", text=f"Where is the {first.shape}?", answer=first.cell),
        )
    if scene.category == "counting":
        count = COUNTS[len(scene.objects)]
        return (
            Question(skill="counting", text=f"How many {plural(first.shape)} are there?", answer=count),
            Question(skill="colours", text=f"What colour are the {plural(first.shape)}?", answer=first.colour),
        )
    second = scene.objects[1]
    subject, other = (first, second)
    return (
        Question(
            skill="two", text="Which shapes are there?", answer=f"{article(first.shape)} and {article(second.shape)}"
        ),
        Question(skill="attribution", text=f"What colour is the {subject.shape}?", answer=subject.colour),
        Question(skill="attribution", text=f"What colour is the {other.shape}?", answer=other.colour),
        Question(
            skill="position",
            text=f"Where is the {subject.shape}, seen from the {other.shape}?",
            answer=relation(subject, other).split()[0],
        ),
        Question(
            skill="position",
            text=f"Where is the {other.shape}, seen from the {subject.shape}?",
            answer=relation(other, subject).split()[0],
        ),
    )


def scene_question(scene: Scene, rng: np.random.Generator) -> Question:
    """One of the scene's questions."""
    questions = scene_questions(scene)
    return questions[int(rng.integers(len(questions)))]
