"""`python -m manyicl` is the command line."""

from manyicl.cli import main

main()
