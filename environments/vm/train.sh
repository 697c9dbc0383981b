# Nothing more is particular to a machine without a scheduler.
