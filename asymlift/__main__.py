"""python -m asymlift, so that torchrun and deepspeed can launch it."""

from asymlift.cli import main

if __name__ == "__main__":
    main()
