"""The processes that make batches beside the training."""

import signal

from torch.utils.data import DataLoader, IterableDataset


def loader(stream: IterableDataset, num_workers: int) -> DataLoader:
    """Batches as the stream makes them, in ``num_workers`` processes that outlive an epoch, or in this one."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=outlive_signals,
    )


def outlive_signals(worker: int) -> None:
    """Let a loader's process live on when its rank is told to stop, which has a step to end first.

    A terminal and SLURM send their signals to it, too. After TERM it ends half a minute later, lest nobody ends it.
    """
    for sign in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(sign, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
