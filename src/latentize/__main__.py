"""``python -m latentize``: the command line, where its script is not on the path."""

from latentize.cli import main

if __name__ == "__main__":
    main()
