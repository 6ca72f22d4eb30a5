"""`python -m examples.smoke`: what `make smoke` runs."""

from examples.smoke.run import main

if __name__ == "__main__":
    raise SystemExit(main())
