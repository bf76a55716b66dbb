"""A teacher's answers on the disk: made once, for any number of students, epochs and machines.

``fusedkd cache`` writes one, ``fusedkd distill --teacher_cache`` trains from it, and
:class:`TeacherCache` reads it. What the files look like: :mod:`fusedkd.cache.manifest` (the
folder), :mod:`fusedkd.cache.layout` (a sequence), :mod:`fusedkd.cache.packing` (bits). Needs
pyarrow: ``pip install fusedkd[train]``. Nothing is ever unpickled.
"""

from fusedkd.cache.build import Job, build
from fusedkd.cache.errors import CacheError, Damaged
from fusedkd.cache.layout import Layout, Target
from fusedkd.cache.policy import Policy
from fusedkd.cache.reader import TeacherCache
from fusedkd.cache.verify import verify

__all__ = [
    "CacheError",
    "Damaged",
    "Job",
    "Layout",
    "Policy",
    "Target",
    "TeacherCache",
    "build",
    "verify",
]
