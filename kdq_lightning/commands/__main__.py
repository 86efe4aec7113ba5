"""`python -m kdq_lightning.commands fit ...`: the commands that have a model, as a study starts them."""

import sys

from kdq_lightning.commands.messages import exit_code_of
from kdq_lightning.commands.running import run_command

sys.exit(exit_code_of(run_command))
