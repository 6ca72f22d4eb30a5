"""Scorers of a trained model: what it generates and what it answers, each beside chance and the best that is reachable.

A scorer takes pictures or answers and what was asked for, and returns plain numbers; a run's figures go to `evaluation.json` in its run folder
as a list of {"name", "value", "chance", "ceiling", "target", "note"}, which `jp-train report` shows. The scorers of the smoke run live in
`jp_train/smoke/`, with the data they judge.
"""
