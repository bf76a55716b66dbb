"""The teacher's side of the loss, as the trainer calls it: with a batch."""

from fusedkd.models.live import LiveTeacher
from fusedkd.teachers.cached import CachedTeacher
from fusedkd.teachers.routed import RoutedTeachers
from fusedkd.teachers.served import ServedTeacher, Service

__all__ = ["CachedTeacher", "LiveTeacher", "RoutedTeachers", "ServedTeacher", "Service"]
