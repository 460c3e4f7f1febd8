"""Small helpers without any idea of a cell or a learner."""
