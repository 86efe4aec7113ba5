"""What the `kdq` command does with its arguments, and the commands that need no study and no benchmark."""
