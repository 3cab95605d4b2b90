"""The command line: ``xbt COMMAND``, with configs as the recipes have them, and JSON for programs.

What a command has found goes to standard output, everything else to standard error. Under ``--json`` standard
output holds exactly one JSON document; where the command fails that is ``{"error": …}``. Exit statuses: 0, 1
for an answer that is no (the upgrade does not pass, the gallery is damaged), 2 for what the user can mend, 70
for a bug, which has a traceback, and 130 after an interrupt.
"""

from __future__ import annotations

from xbt.cli.app import main
from xbt.cli.output import Outcome

__all__ = ["Outcome", "main"]
