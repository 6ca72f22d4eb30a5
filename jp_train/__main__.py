"""`python -m jp_train` is `jp-train`: the form that the deepspeed launcher starts on each rank."""

from jp_train.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
