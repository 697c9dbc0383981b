"""Many deltas and the master weights in; the next model and state out."""
