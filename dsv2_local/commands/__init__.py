"""The `dsv2` commands: `cli.py` parses the options and calls one of these modules."""
