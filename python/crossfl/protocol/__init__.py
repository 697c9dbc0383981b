"""What the parties say to each other: typed values, one decoder, no I/O."""
