"""`python -m dsjax`, for where the command is not on the path."""

from dsjax.cli import main

main()
