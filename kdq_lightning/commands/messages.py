"""What a command prints: one sentence for what the user can fix, and none of Lightning's own hints."""

import importlib
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress

from kdq_lightning.errors import UserError

_KNOWN = (
    (
        ModuleNotFoundError,  # of a logger or an accelerator
        r"Requirement '([\w.-]+)[^']*' not met.*?`(pip install -U) '([^`]+)'`",
        "{0} is not installed: {1} '{2}'",
    ),
    (
        RuntimeError,
        r"Early stopping conditioned on metric `(.*?)` which is not available.*following: (.*)",
        "EarlyStopping watches {0}, which this run doesn't log: give its monitor one of {1}",
    ),
    (
        Exception,
        r"`ModelCheckpoint\(monitor='(.*?)'\)` could not find the monitored key in the returned metrics: \[(.*?)\]",
        "ModelCheckpoint watches {0}, which this run doesn't log: give its monitor one of {1}",
    ),
    (
        ValueError,
        r"`val_check_interval` \((\d+)\) must be less than or equal to the number of the training batches \((\d+)\)",
        "--trainer.val_check_interval {0} is more than an epoch's batches, {1}: give no more, or a share of the epoch"
        " such as 0.5; to count batches over all epochs, give --trainer.check_val_every_n_epoch null, too",
    ),
    (
        ValueError,
        r"embedded null byte()",
        "a null character stands where a file or folder is named: leave it out",
    ),
)
"""Errors of other packages that an option causes: kind, pattern of their text, and the sentence with its groups."""


def sentence_for(error: BaseException | None) -> str | None:
    """Return what to tell the user; jsonargparse wraps errors of constructors, so the causes are looked through."""
    # Here, because torch and Lightning take seconds to import and `kdq report` needs neither unless it fails.
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from torch.multiprocessing.spawn import ProcessRaisedException

    while error is not None:
        if isinstance(error, ProcessRaisedException):
            error = _error_of_process(str(error)) or error
        if notes := getattr(error, "__notes__", None):
            return f"{'; '.join(notes)} ({error})"
        text = " ".join(str(error).split())
        for kind, pattern, sentence in _KNOWN:
            if isinstance(error, kind) and (found := re.search(pattern, text)):
                return sentence.format(*(re.sub("[`']", "", group) for group in found.groups()))
        if isinstance(error, UserError | MisconfigurationException):
            return str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return f"the memory is full ({error}): give smaller batches (--data.batch_size) or a smaller network"
        if isinstance(error, OSError) and error.strerror:
            return f"{error.strerror}: {error.filename or 'a file'}; mend it and give the same command again"
        error = error.__cause__ or error.__context__
    return None


def _error_of_process(message: str) -> BaseException | None:
    """Return the error that has ended a forked process, of which torch passes on the printed traceback alone.

    Args:
        message: The traceback, whose last lines are the error's class and text.

    Returns:
        The error without its causes; None if it can't be made from its text.
    """
    lines = message.rstrip().splitlines()
    begin = max((i + 1 for i, line in enumerate(lines) if line.startswith("  ")), default=0)
    name, _, text = "\n".join(lines[begin:]).partition(": ")
    module, _, kind = name.rpartition(".")
    number = re.match(r"\[Errno (\d+)\] (.*?)(?:: '(.*)')?$", text)
    with suppress(ImportError, AttributeError, TypeError):
        found = getattr(importlib.import_module(module or "builtins"), kind)
        error = found(int(number[1]), number[2], number[3]) if number else found(text)
        return error if isinstance(error, BaseException) else None
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
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # that it ends the other ranks
    logging.getLogger("lightning.fabric.strategies.launchers").setLevel(logging.INFO)  # which rank has died
    for message in (
        ".*does not have many workers.*",  # the loader gathers whole batches from memory: workers would slow it down
        ".*sync_dist=True.*",  # what is logged is already summed over ranks
        ".*LeafSpec.*",
        ".*args parameter is intended to run from within Python.*",  # tests and studies call main(args)
        ".*could not find the monitored key.*",  # a few-steps limit ends before the first validation
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
        ".*srun.*",
        ".*Total length of `DataLoader` across ranks is zero.*",  # no validation images, as asked for
        ".*infer the batch indices.*",  # each batch carries its own
        ".*smaller than the logging interval.*",  # we log once an epoch
        ".*in eval mode at the start of training.*",  # BatchNorm of a network that is recovered
    ):
        warnings.filterwarnings("ignore", message)
