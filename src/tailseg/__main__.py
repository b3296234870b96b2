"""``python -m tailseg``: the command where its script is not on the path."""

from tailseg.cli.main import main

main()
