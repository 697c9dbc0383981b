"""What the user, the VM and the facilities say to each other: typed, versioned values.

Each document has one type, which also holds its limits, and all of them go through one decoder
(`crossfl.protocol.decoding`). Code behind the decoder never sees a dict that another party wrote.
The package imports the standard library, msgspec and `crossfl.errors` only.
"""
