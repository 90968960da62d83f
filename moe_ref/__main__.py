"""`python -m moe_ref` is `moe-ref`."""

from moe_ref.cli.main import main

if __name__ == "__main__":
    main()
