"""The forecast of a stage before anyone books GPUs: memory, communication, FLOPs and time as pure functions on plain
dataclasses.

`jp_train.tools.forecast.forecast` puts them together; nothing here needs a GPU, data, or a process group.
"""
