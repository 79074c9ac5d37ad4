"""``python -m ssl3d`` is ``ssl3d``."""

from ssl3d.cli import main

if __name__ == "__main__":
    main(prog_name="ssl3d")
