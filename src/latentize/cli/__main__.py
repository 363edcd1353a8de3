"""``python -m latentize.cli``, which is what ``torchrun`` takes."""

from latentize.cli import main

if __name__ == "__main__":
    main()
