"""`python -m dsv2_local`: the `dsv2` command."""

from dsv2_local.cli import main

main()
