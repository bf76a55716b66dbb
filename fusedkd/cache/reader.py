"""Reading a cache: sequences are found by what they contain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusedkd.cache.actual import ActualLayout
from fusedkd.cache.batches import on, teacher_of
from fusedkd.cache.build import build
from fusedkd.cache.errors import CacheError, Damaged
from fusedkd.cache.head import open_head
from fusedkd.cache.hidden import HiddenLayout
from fusedkd.cache.keys import sequence_key
from fusedkd.cache.layout import Target
from fusedkd.cache.manifest import Manifest
from fusedkd.cache.policy import Policy, linear_in_teacher
from fusedkd.cache.shard import REMEDY, open_index, open_shard
from fusedkd.cache.sums import known
from fusedkd.cache.writer import SHARD_BYTES, Share
from fusedkd.distributions import LMHead, SparseTeacher
from fusedkd.divergences import Divergence
from fusedkd.top import top_k

CPU = torch.device("cpu")


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
        self._heads: dict[torch.device, LMHead] = {}

    @classmethod
    def build(
        cls,
        folder: str | Path,
        teacher: nn.Module,
        tokenizer: Any,
        rows: Any,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        sample: int | None = None,
        hidden: str | None = None,
        actual: bool = False,
        temperatures: Sequence[float] = (1.0,),
        vocab_size: int | None = None,
        batch_size: int = 8,
        shard_bytes: int = SHARD_BYTES,
    ) -> TeacherCache:
        """Write a model's answers down, or what is missing of them, as ``fusedkd cache`` does, and
        open the cache.

        In a process group of torch.distributed every process calls this, with the same arguments;
        each writes shards of its own, and all have the cache on return.

        Args:
            folder: of the cache; made where it is missing.
            teacher: a causal language model of transformers, where it is to run; it is switched to
                ``eval()``.
            tokenizer: the teacher's.
            rows: lists or tensors of token ids without padding; rows that have ``input_ids`` (a
                data set) and perhaps an ``attention_mask``; or a batch of these, as a tokenizer
                gives it.
            top_k, top_p, sample, hidden, actual: what is kept of a token, see
                :class:`~fusedkd.cache.policy.Policy`: by default the 64 most probable entries.
                ``hidden`` is ``"bf16"`` or ``"int8"``.
            temperatures: to serve; hidden states serve all.
            vocab_size: entries with an id; None: the tokenizer's.
            batch_size: sequences of one length in a forward pass.
            shard_bytes: about the size of a file: what a kill costs at most.

        Raises:
            CacheError: a number out of range, a folder of something else, the disk is too small,
                the teacher answers with NaN, or a group's processes have it in parts.
        """
        from fusedkd.cache.of_model import LiveTeacher, check_whole, job_of, sequences_of

        share = Share.of_group()
        if share.world > 1:
            check_whole(teacher)
        run = LiveTeacher(teacher.eval())
        job = job_of(
            *(run, tokenizer, sequences_of(rows)),
            Policy.of(top_k, top_p, sample, hidden, temperatures, actual),
            tuple(map(float, temperatures)),
            name=getattr(teacher, "name_or_path", "") or type(teacher).__name__,
            vocab_size=vocab_size,
            batch_size=batch_size,
            shard_bytes=shard_bytes,
        )
        device = next(teacher.parameters()).device
        build(Path(folder), job, lambda ids: run({"input_ids": ids.to(device)}), share=share)
        if share.world > 1:
            dist.barrier()
        return cls(folder)

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

    @property
    def actual(self) -> bool:
        """Whether it holds the log-probabilities of the tokens that are there and no distribution,
        so that :meth:`log_probs` is to be called, and not :meth:`get`."""
        return isinstance(self.layout, ActualLayout)

    def log_probs_of(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
        """(L,) fp32 each: number n is the log-probability of token n + 1 of the sequence, which has
        no padding, given those up to n; the last is 0.

        Raises:
            CacheError: a sequence is not in the cache, or it holds something else.
            Damaged: its shard is not what was written.
        """
        if not self.actual:
            raise CacheError(
                f"the cache {self.folder} keeps {self.layout.policy}, which does not tell how "
                "probable each token that is there was. Make it with --actual."
            )
        return [self._actual(self._place(ids)) for ids in sequences]

    def _actual(self, place: int) -> np.ndarray:
        assert isinstance(self.layout, ActualLayout)
        with self._damage(place):
            return self.layout.log_probs(self._columns(place), int(self._index.tokens[place]))

    def _check_distributions(self) -> None:
        if self.actual:
            raise CacheError(
                f"the cache {self.folder} keeps {self.layout.policy}, and no distribution: it is "
                "for --cross_tokenizer alm."
            )

    def head(self, device: torch.device = CPU) -> LMHead:
        """What turns hidden states into logits, with none of them, (0, H). It is read, and sent to
        a device, once.

        Raises:
            CacheError: the cache holds none.
            Damaged: its file is not what was written.
        """
        if (file := self.manifest.head) is None:
            raise CacheError(f"the cache {self.folder} keeps {self.layout.policy}, and no head.")
        if CPU not in self._heads:
            columns = self.manifest.padded_vocab_size
            self._heads[CPU] = open_head(self.folder, file, columns, self.layout.k)
        if device not in self._heads:
            self._heads[device] = on(self._heads[CPU], device)
        return self._heads[device]

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
        self._check_distributions()
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
        return teacher_of(self, [row], np.ones(len(row), bool), temperature, CPU)

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
        return teacher_of(self, rows, there, temperature, input_ids.device)

    def top(self, row: int, k: int, temperature: float = 1.0) -> Target:
        """What it holds of a sequence by its number: no more than k entries a token, the most
        probable first; of hidden states the k most probable tokens.

        Raises:
            CacheError: no such row, no distribution, or the temperature was not declared.
            Damaged: its shard, or the head, is not what was written.
        """
        if not 0 <= row < len(self._keys):
            raise CacheError(
                f"row {row} of the cache {self.folder}: expected 0 to {len(self._keys) - 1}."
            )
        self._check_distributions()
        if self.hidden:
            head, size = self.head(), self.layout.vocab_size
            side = replace(head, hidden=self._states(row).to(head.weight.dtype))
            found = top_k(side, min(k, size), temperature=temperature, vocab_size=size)
            unknown = np.full(len(found.indices), np.nan, np.float32)
            return Target(found.indices.numpy(), found.log_probs.float().numpy(), unknown)
        ids, logs, entropy = self._decode(row, temperature)
        order = np.argsort(-logs, axis=1, kind="stable")[:, :k]
        ids, logs = (np.take_along_axis(part, order, 1) for part in (ids, logs))
        return Target(ids, logs, entropy)

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
        if self.layout.policy.kind != "top" or not self.manifest.shards:
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
            elif self.actual:
                self._actual(place)
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
            CacheError: a teacher's temperature that was not declared, draws for a divergence whose
                gradient they would bias, or no distributions.
        """
        self._check_distributions()
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
