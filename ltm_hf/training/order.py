"""Which rows come next: an order that the number of processes does not change, and streams that go on."""

from collections.abc import Callable, Iterator

import torch
from accelerate import skip_first_batches
from accelerate.data_loader import DataLoaderDispatcher, IterableDatasetShard
from accelerate.utils import is_torchdata_stateful_dataloader_available
from torch.utils.data import IterableDataset, Sampler
from transformers.utils import logging

from .checkpoints import CheckpointMixin

logger = logging.get_logger(__name__)


class RowSampler(Sampler):
    """An endless sequence of rows, cut into Trainer's epochs: one permutation of the data set after the other.

    What comes at which place depends on the seed and the size of the data set alone. An epoch is made of whole steps,
    so it ends in a later permutation than it began; over any n · num_rows places, each row comes n times.

    num_rows: of the data set. rows_a_step: that all processes take in an optimiser step.
    seed: of the permutations, as accelerate's sampler takes it; None leaves the rows in their own order.
    first_place: called when an epoch begins. Below 0 are rows that are about to be skipped.
    """

    def __init__(self, num_rows: int, rows_a_step: int, seed: int | None, first_place: Callable[[int], int]):
        self.num_rows, self.seed, self.first_place = num_rows, seed, first_place
        self.length = -(-num_rows // rows_a_step) * rows_a_step

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        first, known = self.first_place(self.length), None
        for place in range(first, first + self.length):
            epoch, index = divmod(max(0, place), self.num_rows)
            if epoch != known:
                order, known = self._order(epoch), epoch
            yield int(order[index])

    def _order(self, epoch: int):
        if self.seed is None:
            return range(self.num_rows)
        return torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(self.seed + epoch)).numpy()


class DataOrderMixin(CheckpointMixin):
    """Before any `Trainer`: a resumed run reads on where it stopped, also on another number of processes.

    Rows are counted in the order of all processes together. With `max_steps`, data sets that have a length are read
    by `RowSampler`: none twice and none lost, whatever the processes, batch size and accumulation before and after.
    Streams (`IterableDataset`) with a `state_dict` go on at once if torchdata is installed. Others are read again and
    skipped, as are those with a shuffle buffer of `datasets`, whose state lacks what the buffer holds. On another
    number of processes this is exact where each takes its part of one common order, as accelerate has it unless a
    stream has a shard for each process; if not, a warning says so.
    """

    def __init__(self, *args, **kwargs):
        self._first_row = 0  # the place of the first row, had all steps been of as many rows as now
        self._pass = (0, 0, 0)  # over a stream: its number, the step it began at, and `_first_row` within it
        self._stream = None  # to be resumed
        self._instead = (None, None)  # of an iterator over the stream, another
        super().__init__(*args, **kwargs)

    @property
    def _rows_a_step(self) -> int:
        return self.get_total_train_batch_size(self.args)

    @property
    def _is_stream(self) -> bool:
        return isinstance(self.train_dataset, IterableDataset)

    def _run_state(self):
        step = self.state.global_step
        state = super()._run_state() | {"rows": self._first_row + step * self._rows_a_step}
        if self._is_stream:
            loader = self.callback_handler.train_dataloader
            number, began, first_row = self._pass
            state["stream"] = {
                "pass": number,
                "steps": step - began,
                "rows": first_row + step * self._rows_a_step,
                "common": self._is_common(loader),
                "loader": loader.state_dict() if self._has_state(loader) else None,
            }
        return state

    def _init_training_state(self, *args):
        epochs, batches = super()._init_training_state(*args)
        states, step = self._restored, self.state.global_step
        self._first_row = states[0]["rows"] - step * self._rows_a_step if states else 0
        self._pass, self._stream, self._instead = (0, 0, 0), None, (None, None)
        if states and self._is_stream and not self.args.ignore_data_skip:
            streams = [state["stream"] for state in states]
            same = len(streams) == self.args.world_size
            self._stream = streams[self.args.process_index] if same else streams[0] | {"loader": None}
            self._pass = (
                self._stream["pass"],
                step - self._stream["steps"],
                self._stream["rows"] - step * self._rows_a_step,
            )
            return self._stream["pass"], self._stream["steps"] * self.args.gradient_accumulation_steps
        return epochs, batches

    def _run_epoch(self, *, epoch, **kwargs):
        if epoch != self._pass[0]:
            step = self.state.global_step
            self._pass = (epoch, step, -step * self._rows_a_step)
        super()._run_epoch(epoch=epoch, **kwargs)

    # ---------------------------------------------------------------- data sets with a length

    def _get_train_sampler(self, train_dataset=None):
        dataset, args = self.train_dataset if train_dataset is None else train_dataset, self.args
        strategy = getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy)
        ours = args.max_steps > 0 and strategy in ("random", "sequential") and hasattr(dataset, "__len__")
        if not ours or args.ignore_data_skip or args.accelerator_config.split_batches:
            return super()._get_train_sampler(train_dataset)
        seed = args.seed if args.data_seed is None else args.data_seed
        return RowSampler(
            len(dataset), self._rows_a_step, None if strategy == "sequential" else seed, self._first_place
        )

    def _first_place(self, length: int) -> int:
        """The place at which Trainer's present epoch of so many rows begins; after a resume it skips the first."""
        return self._first_row + self.state.global_step // (length // self._rows_a_step) * length

    # ---------------------------------------------------------------- streams

    def get_train_dataloader(self):
        stateful = self._is_stream and hasattr(self.train_dataset, "state_dict") and not _buffers(self.train_dataset)
        configuration = self.accelerator.dataloader_config
        configuration.use_stateful_dataloader = stateful and is_torchdata_stateful_dataloader_available()
        loader = super().get_train_dataloader()
        configuration.use_stateful_dataloader = False
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self._stream is not None and self._stream["steps"]:
            self._instead = (epoch_iterator, self._resumed(self._stream))
            self._stream = None
        if epoch_iterator is self._instead[0]:
            epoch_iterator = self._instead[1]
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _resumed(self, stream: dict) -> Iterator:
        """The rest of the pass, where Trainer would read it from its beginning and count in batches of now."""
        loader = self.callback_handler.train_dataloader
        loader.set_epoch(stream["pass"])
        if stream["loader"] is not None and self._has_state(loader):
            if stream["loader"]["_iterator_finished"]:
                loader.load_state_dict({})  # forgets the iterator that it was made with: the next pass needs its own
                return iter(())
            loader.load_state_dict(stream["loader"])
            return iter(loader)
        rows_a_batch = self._rows_a_step // self.args.gradient_accumulation_steps
        batches, rest = divmod(stream["rows"], rows_a_batch)
        if len(self._restored) != self.args.world_size and not (stream["common"] and self._is_common(loader)):
            logger.warning(
                f"The stream gives each process a part of its own, and there are {self.args.world_size} processes in "
                f"place of {len(self._restored)}: in this pass, some rows come twice and some not at all."
            )
        elif rest:
            logger.warning(f"{stream['rows']} rows of the stream are no whole batches of now: {rest} come twice.")
        logger.warning(f"Reading {batches * rows_a_batch} rows of the stream again, to skip them.")
        skipping = skip_first_batches(loader, batches)
        skipping.set_epoch(stream["pass"])
        return iter(skipping)

    def _is_common(self, loader) -> bool:
        """Whether processes take turns in one order of the stream."""
        alone = self.accelerator.num_processes == 1
        return alone or isinstance(loader, DataLoaderDispatcher) or isinstance(loader.dataset, IterableDatasetShard)

    def _has_state(self, loader) -> bool:
        # What a dispatcher of several processes has read ahead is missing from its state.
        dispatched = isinstance(loader, DataLoaderDispatcher) and self.accelerator.num_processes > 1
        return getattr(loader, "use_stateful_dataloader", False) and not dispatched


def _buffers(stream) -> bool:
    """Whether a stream of `datasets` shuffles in a buffer."""
    if type(stream).__name__ == "BufferShuffledExamplesIterable":
        return True
    inner = [getattr(stream, name, None) for name in ("_ex_iterable", "ex_iterable")]
    return any(_buffers(x) for x in [*inner, *getattr(stream, "ex_iterables", [])] if x is not None)
