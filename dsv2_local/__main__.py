"""The `dsv2` command, also as `python -m dsv2_local`."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in the background of a script
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the imports; `process.run` puts it back

from dsv2_local.cli import main

if __name__ == "__main__":
    main()
