"""Training one stage: `session.train` sets up a process, `trainer.Trainer` is the loop. Start reading in
`trainer.py`."""
