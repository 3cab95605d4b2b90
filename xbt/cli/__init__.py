"""The command line ``xbt COMMAND``, with the configs of the recipes and JSON for programs.

The result of a command goes to standard output, everything else to standard error. With ``--json`` standard
output holds exactly one JSON document; after a failure it is ``{"error": …}``. Exit statuses: 0 for success,
1 for a negative answer (the upgrade does not pass, the gallery is damaged), 2 for an error that the user can
fix, 70 for a bug (with a traceback) and 130 after an interrupt.
"""

from __future__ import annotations

from xbt.cli.app import main
from xbt.cli.output import CommandResult

__all__ = ["CommandResult", "main"]
