"""What a command prints: one sentence for what the user can fix, and none of Lightning's own hints."""

import logging
import sys
import traceback
import warnings
from collections.abc import Callable

from kdq_lightning.errors import UserError


def sentence_for(error: BaseException | None) -> str | None:
    """Return what to tell the user; jsonargparse wraps errors of constructors, so the causes are looked through."""
    # Here, because torch and Lightning take seconds to import and `kdq report` needs neither unless it fails.
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    while error is not None:
        if notes := getattr(error, "__notes__", None):
            return f"{'; '.join(notes)} ({error})"
        if isinstance(error, UserError | MisconfigurationException):
            return str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return f"the memory is full ({error}): give smaller batches (--data.batch_size) or a smaller network"
        if isinstance(error, OSError) and error.strerror:
            return f"{error.strerror}: {error.filename or 'a file'}; mend it and give the same command again"
        if isinstance(error, ModuleNotFoundError) and str(error).startswith("Requirement"):  # of a logger
            return f"a package is not installed: {' '.join(str(error).split())}"
        if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on metric"):
            return " ".join(str(error).split())
        if isinstance(error, ValueError) and "embedded null byte" in str(error):
            return "a null character stands where a file or folder is named: leave it out"
        error = error.__cause__ or error.__context__
    return None


def exit_code_of(command: Callable[[], int]) -> int:
    """Call a command and return its exit code; if it fails, print one sentence that says why, and return 1.

    After Ctrl-C the code is 130, as is usual in a shell.
    """
    try:
        return command()
    except KeyboardInterrupt:
        print("kdq: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        sentence = sentence_for(error)
        if sentence is None:
            traceback.print_exc()
            sentence = f"an error that nobody foresaw ({type(error).__name__}): please report it with the lines above"
        print(f"kdq: {sentence}", file=sys.stderr)
        return 1


def quieten() -> None:
    """Silence Lightning's hints and those of its warnings that don't apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.strategies.launchers").setLevel(logging.INFO)  # which rank has died
    for message in (
        ".*does not have many workers.*",  # the loader gathers whole batches from memory: workers would slow it down
        ".*sync_dist=True.*",  # what is logged is already summed over ranks
        ".*LeafSpec.*",
        ".*args parameter is intended to run from within Python.*",  # tests and studies call main(args)
        ".*could not find the monitored key.*",  # a few-steps limit ends before the first validation
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
        ".*srun.*",
        ".*infer the batch indices.*",  # each batch carries its own
        ".*smaller than the logging interval.*",  # we log once an epoch
        ".*in eval mode at the start of training.*",  # BatchNorm of a network that is recovered
    ):
        warnings.filterwarnings("ignore", message)
