"""`python -m vmae2_fast COMMAND`: the same as `vmae2 COMMAND`."""

from .cli import main

main()
