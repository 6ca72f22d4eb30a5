"""`python -m jp_train.smoke`: what `make smoke` runs."""

from jp_train.smoke.run import main

if __name__ == "__main__":
    raise SystemExit(main())
