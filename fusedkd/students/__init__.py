"""Students that are made out of their teacher."""

from fusedkd.students.copy import StudentPlan, build_student

__all__ = ["StudentPlan", "build_student"]
