"""The end of a training in several processes."""

from __future__ import annotations

import gc

from torch import distributed


def end_processes() -> None:
    """End the process group of a finished training; does nothing where there is none.

    Call it last, in every process, where no variable holds the Trainer any more. DDP's reducer
    holds the group. As the last to hold it, the reducer would join gloo's threads with the GIL
    taken while one of them waits for the GIL to free a finished collective: the process hangs.
    And a group still open when Python ends may abort it. So what is left of DDP goes first.
    """
    gc.collect()
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
