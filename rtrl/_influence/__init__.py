"""The influence of every parameter, slice by slice, and the tree that dormant slices are caught up through."""
