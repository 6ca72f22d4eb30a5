"""DeepSpeed ZeRO-3 and what surrounds it; nothing outside this package and `cluster/` imports deepspeed.

`config` the generated JSON; `init` process group, model and engine; `optim` schedule and parameter groups; `proof` the
freeze proof; `guard` what a stuck rank was doing; `checkpoint` complete-or-absent checkpoints; `stop` signals, early
stop, patience, non-finite steps.
"""
