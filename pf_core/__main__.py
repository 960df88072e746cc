"""python -m pf_core: the command `pf`."""

from pf_core.cli import main

if __name__ == "__main__":
    main()
