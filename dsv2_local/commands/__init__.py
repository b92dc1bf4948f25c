"""What each `dsv2` command reads and shows; `cli.py` parses the options and calls these."""
