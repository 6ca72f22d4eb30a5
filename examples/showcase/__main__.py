"""`python -m examples.showcase`: what `make showcase` runs."""

from examples.showcase.run import main

if __name__ == "__main__":
    raise SystemExit(main())
