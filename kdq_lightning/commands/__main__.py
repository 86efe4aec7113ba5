"""`python -m kdq_lightning.commands fit ...`: the commands that have a model, as a study starts them."""

import sys

from kdq_lightning.commands.command_line import run_command
from kdq_lightning.commands.messages import exit_code_of

sys.exit(exit_code_of(run_command))
