"""Reading a cache: sequences are found by what they contain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from fusedkd.cache.batches import on, teacher_of
from fusedkd.cache.errors import CacheError, Damaged
from fusedkd.cache.head import open_head
from fusedkd.cache.hidden import HiddenLayout
from fusedkd.cache.keys import sequence_key
from fusedkd.cache.layout import Target
from fusedkd.cache.manifest import Manifest
from fusedkd.cache.policy import linear_in_teacher
from fusedkd.cache.shard import REMEDY, open_index, open_shard
from fusedkd.cache.sums import known
from fusedkd.distributions import LMHead, SparseTeacher
from fusedkd.divergences import Divergence


class TeacherCache:
    """A teacher's answers on the disk.

    The manifest and the index are checked here, each shard when it is first needed: its checksum
    and its structure are looked at once, and then it is a memory map. Safe to use from several
    processes at once. A cache of somebody else's is safe to open: it is read or refused.

    Args:
        folder: what ``fusedkd cache`` wrote.

    Raises:
        CacheError: no cache there, one of another schema, or one that is not complete.
        Damaged: the manifest or the index is not what was written, or not what is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        if not self.manifest.complete:
            raise CacheError(
                f"{folder}: only {len(known(self.folder, self.manifest))} of "
                f"{self.manifest.number_of_shards} shards are there. Run the `fusedkd cache` "
                "command that began it again: it goes on where it was."
            )
        self.layout = self.manifest.layout
        self._index = open_index(self.folder, self.manifest)
        self._order = np.argsort(self._index.keys)
        self._keys = self._index.keys[self._order]
        self._known = np.zeros(len(self._keys), bool)  # those that were decoded before
        self._shards: dict[int, pa.RecordBatch] = {}

    def __reduce__(self) -> tuple[Callable[..., TeacherCache], tuple[Path]]:
        return TeacherCache, (self.folder,)  # another process maps the files for itself

    @property
    def sampled(self) -> bool:
        """Whether it holds draws, and not the most probable entries."""
        return self.layout.policy.kind == "sample"

    @property
    def hidden(self) -> bool:
        """Whether it holds hidden states, so that :meth:`states` is to be called, and not
        :meth:`get`."""
        return isinstance(self.layout, HiddenLayout)

    def head(self) -> LMHead:
        """What turns hidden states into logits, with none of them, (0, H).

        Raises:
            CacheError: the cache holds none.
            Damaged: its file is not what was written.
        """
        if (file := self.manifest.head) is None:
            raise CacheError(f"the cache {self.folder} keeps {self.layout.policy}, and no head.")
        return open_head(self.folder, file, self.manifest.padded_vocab_size, self.layout.k)

    def states(self, ids: Sequence[int] | np.ndarray) -> Tensor:
        """(L, H) bf16, the head's input at each of the tokens ``ids``, without padding.

        Raises:
            CacheError: the sequence is not in the cache, or it holds no hidden states.
            Damaged: its shard is not what was written.
        """
        if not self.hidden:
            raise CacheError(f"the cache {self.folder} keeps {self.layout.policy}: use get().")
        return self._states(self._place(ids))

    def _states(self, place: int) -> Tensor:
        assert isinstance(self.layout, HiddenLayout)
        with self._damage(place):
            return self.layout.states(self._columns(place), int(self._index.tokens[place]))

    def find(self, ids: Sequence[int] | np.ndarray) -> int | None:
        """Which sequence of the cache this is; None if it is not there."""
        key = np.frombuffer(sequence_key(ids, self.manifest.tokenizer_hash), self._keys.dtype)
        place = int(np.searchsorted(self._keys, key)[0])
        found = place < len(self._keys) and self._keys[place] == key[0]
        return int(self._order[place]) if found else None

    def get(self, ids: Sequence[int] | np.ndarray, temperature: float) -> Target:
        """The teacher's distributions after each of the tokens ``ids``, without padding.

        Raises:
            CacheError: the sequence is not in the cache, or the temperature was not declared.
            Damaged: its shard is not what was written.
        """
        if self.hidden:
            raise CacheError(f"the cache {self.folder} keeps {self.layout.policy}: use states().")
        return self._decode(self._place(ids), temperature)

    def _place(self, ids: Sequence[int] | np.ndarray) -> int:
        place = self.find(ids)
        if place is None:
            raise CacheError(
                f"a sequence of {len(ids)} tokens that begins with {list(map(int, ids[:8]))} is "
                f"not in the cache {self.folder}. {SAME_DATA}"
            )
        if len(ids) != (tokens := int(self._index.tokens[place])):
            path = self.folder / self.manifest.index.name
            raise Damaged(f"{path} is damaged: {len(ids)} tokens are {tokens} there. {REMEDY}")
        return place

    def teacher(
        self, ids: Sequence[int] | np.ndarray, temperature: float = 1.0
    ) -> SparseTeacher | LMHead:
        """The teacher of a sequence without padding, as :func:`fusedkd.kd_loss` takes it: (L, ...).

        Raises:
            CacheError, Damaged: as :meth:`get`.
        """
        row = np.asarray(ids)
        return teacher_of(self, [row], np.ones(len(row), bool), temperature)

    def batch(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, temperature: float = 1.0
    ) -> SparseTeacher | LMHead:
        """The same of a batch (B, L), on its device: (B, L, ...), with nothing known at padding.

        Raises:
            CacheError, Damaged: as :meth:`get`.
        """
        ids = input_ids.cpu().numpy()
        there = np.ones(ids.shape, bool)
        if attention_mask is not None:
            there = attention_mask.cpu().numpy().astype(bool)
        rows = [row[mask] for row, mask in zip(ids, there, strict=True)]
        return on(teacher_of(self, rows, there, temperature), input_ids.device)

    def get_many(
        self, sequences: Sequence[Sequence[int] | np.ndarray], temperature: float
    ) -> list[Target]:
        """:meth:`get` of each."""
        return [self.get(ids, temperature) for ids in sequences]

    def _decode(self, place: int, temperature: float) -> Target:
        tokens, known = int(self._index.tokens[place]), bool(self._known[place])
        with self._damage(place):
            target = self.layout.decode(self._columns(place), tokens, temperature, known)
        self._known[place] = True
        return target

    @contextmanager
    def _damage(self, place: int) -> Iterator[None]:
        try:
            yield
        except CacheError:
            raise
        except ValueError as error:
            number, row = divmod(place, self.manifest.per_shard)
            path = self.folder / self.manifest.shards[number].name
            raise Damaged(f"{path} is damaged: sequence {row}: {error} {REMEDY}") from None

    def _columns(self, place: int) -> dict[str, pa.Buffer]:
        number, row = divmod(place, self.manifest.per_shard)
        shard = self._shards.get(number)
        if shard is None:
            file = self.manifest.shards[number]
            shard = open_shard(self.folder, self.manifest, number, file, self._index)
            self._shards[number] = shard
        return {name: shard[name][row].as_buffer() for name in self.layout.columns}

    def tail_masses(self, most_shards: int = 3) -> tuple[float, ...]:
        """What the teacher gives to all that is outside a token's entries: its mean at each of the
        declared temperatures, over the tokens of so many shards. Nothing for draws, or where no
        token has an entry.

        Raises:
            Damaged: one of these shards is not what was written.
        """
        if self.sampled or self.hidden or not self.manifest.shards:
            return ()
        shards, size = len(self.manifest.shards), self.manifest.per_shard
        chosen = range(0, shards, -(-shards // most_shards))
        places = [p for p in range(len(self._keys)) if p // size in chosen]
        every = np.concatenate([self._tails(place) for place in places])
        return tuple(map(float, every.mean(0))) if len(every) else ()

    def _tails(self, place: int) -> np.ndarray:
        with self._damage(place):
            return self.layout.tails(self._columns(place), int(self._index.tokens[place]))

    def check_answers(self) -> None:
        """Read the answers to every sequence.

        Raises:
            Damaged: one holds what no teacher's answers are.
        """
        for place in range(len(self._keys)):
            if self.hidden:
                self._states(place)
            else:
                self._decode(place, self.layout.temperatures[0])

    # ---- what can be known before training ----

    def check_tokenizer(self, found: str) -> None:
        """Compare a :func:`~fusedkd.cache.keys.tokenizer_hash`.

        Raises:
            CacheError: it is another one.
        """
        if found != self.manifest.tokenizer_hash:
            raise CacheError(
                f"the tokenizer has the hash {found[:12]}..., but the cache {self.folder} was made "
                f"with {self.manifest.tokenizer_hash[:12]}...: ids mean other tokens. Use the "
                f"tokenizer of {self.manifest.teacher}."
            )

    def check_loss(self, divergence: Divergence, temperature: float) -> None:
        """Whether a loss can be computed from this cache.

        Raises:
            CacheError: a teacher's temperature that was not declared, or draws for a divergence
                whose gradient they would bias.
        """
        self.layout.slot(temperature)
        if self.sampled and not linear_in_teacher(divergence):
            raise CacheError(
                f"divergence {divergence.name}: the cache {self.folder} holds "
                f"{self.layout.policy}, which are unbiased only where the gradient is linear in "
                "the teacher's probabilities. Use forward_kl, or a cache with --top-k."
            )

    def check_rows(self, name: str, rows: Iterable[Sequence[int] | np.ndarray]) -> None:
        """Look all sequences of a data set up.

        Raises:
            CacheError: some are not there.
        """
        total, missing, first = 0, 0, 0
        for total, ids in enumerate(rows, 1):
            if self.find(ids) is None:
                missing += 1
                first = first or total
        if missing:
            raise CacheError(
                f"{missing:,} of the {total:,} sequences of the {name} data are not in the cache "
                f"{self.folder} (the first is number {first}). {SAME_DATA}"
            )


SAME_DATA = (
    "Make the cache with the same flags for the data (--data, --eval_data, --eval_share, "
    "--max_length, --packing, --train_on, ...) as are trained with."
)
